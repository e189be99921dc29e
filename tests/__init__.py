import os
import sys

# As ./tests/run does: hundreds of tests start their own Python, and it should not compile everything again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
