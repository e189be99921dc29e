"""Run `flask sse doctor`, and look for what it must find."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flask import Flask

from tests.support.servers import ROOT

# What tests use as passwords, tokens and keys. No answer may have any of them.
SECRETS = ("hush-hush", "s3cret-key", "s3cret-password", "token=")


class Answer:
    """What doctor has said: its lines by the check's name, and the exit status."""

    def __init__(self, status: int, output: str, seconds: float) -> None:
        self.status = status
        self.seconds = seconds
        self.output = output
        self.lines: list[dict[str, str]] = json.loads(output)["checks"]
        for line in self.lines:
            assert line.keys() == {"name", "state", "text", "remedy"}
            assert (line["remedy"] == "") == (line["state"] == "ok"), line
        states = {line["state"] for line in self.lines}
        assert status == (2 if "fault" in states else 1 if "warning" in states else 0), output
        assert not [secret for secret in SECRETS if secret in output], output

    def of(self, name: str) -> list[dict[str, str]]:
        return [line for line in self.lines if line["name"] == name]

    def bad(self) -> list[str]:
        return [f"{one['state']} {one['name']}: {one['text']}" for one in self.lines if one["state"] != "ok"]


def doctor(app: Flask, *options: str) -> Answer:
    """Ask doctor about an app of this process."""
    started = time.monotonic()
    result = app.test_cli_runner().invoke(args=["sse", "doctor", "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return Answer(result.exit_code, result.stdout, time.monotonic() - started)


def doctor_command(cwd: Path, environ: dict[str, str], *options: str, app: str = "app") -> Answer:
    """Run `flask --app app sse doctor` in a folder, as a person does."""
    started = time.monotonic()
    command = [sys.executable, "-m", "flask", "--app", app, "sse", "doctor", "--json", *options]
    done = subprocess.run(
        command, cwd=cwd, env={**environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1, 2) and done.stdout, done.stderr
    return Answer(done.returncode, done.stdout, time.monotonic() - started)


def found(answer: Answer, name: str, state: str, *words: str) -> dict[str, Any]:
    """Check that doctor found it, and return the line."""
    lines = [one for one in answer.of(name) if one["state"] == state and all(w in one["text"] for w in words)]
    assert len(lines) == 1, (name, state, words, answer.output)
    return lines[0]
