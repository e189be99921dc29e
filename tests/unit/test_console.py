"""The package's log on stderr: only where nobody has configured logging, before or after."""

from __future__ import annotations

import logging
import logging.config
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_pg_sse.server import console

logger = logging.getLogger("flask_pg_sse.engine.outage")
LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[WARNING\] flask_pg_sse\.engine\.outage: gone\n"
)
TO_STDERR: dict[str, Any] = {
    "version": 1,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
}


@pytest.fixture
def new_process() -> Iterator[Callable[[], None]]:
    """Have logging as it is in a new process, without pytest's handlers, until the test ends."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.handlers[:], one.level, one.disabled, one.propagate) for one in [logging.root, *loggers]]

    def start() -> None:  # in the test, because pytest adds its handlers after the fixtures
        for one in (logging.root, *loggers):
            one.handlers = []
        logging.root.setLevel("WARNING")

    yield start
    for one, handlers, level, disabled, propagate in before:
        one.handlers, one.disabled, one.propagate = handlers, disabled, propagate
        one.setLevel(level)


def test_without_configuration_lines_have_time_process_level_and_logger(
    capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    new_process()
    console.install()
    console.install()
    logger.warning("gone")
    logger.info("not shown")
    logging.getLogger("another").warning("bare, as Python has it")
    first, rest = capsys.readouterr().err.split("\n", 1)
    assert LINE.fullmatch(f"{first}\n") and rest == "bare, as Python has it\n"


def test_with_a_handler_of_the_app_it_alone_gets_the_lines(
    capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    new_process()
    for name in ("flask_pg_sse.engine", "flask_pg_sse", ""):
        console.install()
        handler = logging.StreamHandler()
        logging.getLogger(name).addHandler(handler)
        logger.warning("gone")
        assert capsys.readouterr().err == "gone\n", name
        logging.getLogger(name).removeHandler(handler)
    logger.warning("gone")
    assert LINE.fullmatch(capsys.readouterr().err)


@pytest.mark.parametrize("disables", [True, False])
@pytest.mark.parametrize("configured_first", [True, False])
def test_dict_config(
    capsys: pytest.CaptureFixture[str], configured_first: bool, disables: bool, new_process: Callable[[], None]
) -> None:
    """In both orders, and with its default, which disables all loggers that exist."""
    new_process()
    if not configured_first:
        console.install()
    logging.config.dictConfig({**TO_STDERR, "disable_existing_loggers": disables})
    if configured_first:
        console.install()
    console.check()
    logger.warning("gone")
    said = capsys.readouterr().err
    if disables:
        assert said.startswith("The log of flask_pg_sse is disabled") and said.count("\n") == 1
    else:
        assert said == "gone\n"


def test_basic_config_afterwards(capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]) -> None:
    new_process()
    console.install()
    logging.basicConfig(format="mine %(message)s")
    console.check()
    logger.warning("gone")
    assert capsys.readouterr().err == "mine gone\n"


def test_a_level_is_no_handler(capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]) -> None:
    new_process()
    console.install()
    logging.getLogger("flask_pg_sse").setLevel("ERROR")
    logger.warning("gone")
    assert capsys.readouterr().err == ""


def test_logging_switched_off_on_purpose_stays_off(
    capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    new_process()
    console.install()
    logging.getLogger("flask_pg_sse").disabled = True
    logging.getLogger("flask_pg_sse").addHandler(logging.NullHandler())
    console.check()
    logger.warning("gone")
    assert capsys.readouterr().err == ""
