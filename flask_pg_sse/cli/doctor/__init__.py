"""`flask sse doctor`: look at everything from configuration to delivery, and name the remedy for what is wrong.

A check is a function of the `Setup` that returns a `Result`, several, or None if it has nothing to look at. To add one,
write the function in the module of its kind, and add it to that module's `CHECKS` under its name. `checks.py` has the
order of the modules, and runs the checks, each for a limited time.
"""
