"""docs/tutorial.md is right: the program that it builds runs after each step, in browsers, and so do its own tests."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.docs.test_security_docs import COUNT_OPENINGS
from tests.support.client import Message, request
from tests.support.documents import ROOT, Document
from tests.support.postgres import execute
from tests.support.servers import WebServer, gunicorn

PAGE = Document("docs/tutorial.md")
Start = Callable[..., WebServer]
HOSTILE = """<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>"""


def merged(program: str, block: str) -> str:
    """Return the program with a step's block in it, as the page says.

    Functions take the place of those with their name; new ones, and statements, go to the end. A line that registers
    the blueprint replaces the older one. Imports go to the top.
    """
    for node in ast.parse(block).body:
        text = _text(block, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            program = _without(program, lambda old, text=text: _begins_alike(old, text, " import"))  # type: ignore[misc]
            [last] = [
                one.end_lineno for one in ast.parse(program).body if isinstance(one, ast.Import | ast.ImportFrom)
            ][-1:]
            lines = program.splitlines(keepends=True)
            program = "".join([*lines[:last], text + "\n", *lines[last:]])
        elif isinstance(node, ast.FunctionDef) and node.name in _functions(program):
            program = program.replace(_text(program, _functions(program)[node.name]), text)
        else:
            program = _without(program, lambda old, text=text: _begins_alike(old, text, "("))  # type: ignore[misc]
            program += f"\n\n{text}\n"
    return program


def _functions(program: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)}


def _text(program: str, node: ast.stmt) -> str:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
    return "\n".join(program.splitlines()[first - 1 : node.end_lineno])


def _begins_alike(old: str, new: str, end: str) -> bool:
    return end in new and not new.startswith(("@", "def ")) and old.startswith(new.partition(end)[0] + end)


def _without(program: str, is_old: Callable[[str], bool]) -> str:
    for node in ast.parse(program).body:
        if is_old(_text(program, node)):
            return program.replace(_text(program, node) + "\n", "", 1)
    return program


class Tutorial:
    """The page's program, in a folder that was empty, and its server."""

    def __init__(self, folder: Path, database_url: str, start_server: Start) -> None:
        self.folder = folder
        self.env = {
            "DATABASE_URL": database_url.replace("postgresql://", "postgresql+psycopg://"), "SECRET_KEY": "a secret",
        }  # fmt: skip
        self._start_server = start_server
        self._sections = PAGE.text.split("\n## ")
        (folder / "templates").mkdir(parents=True)
        self.server: WebServer | None = None

    def write(self, title: str) -> None:
        """Do what a section of the page says with its blocks."""
        [section] = [section for section in self._sections if section.startswith(title)]
        blocks = re.findall(r"<!-- (file|step): (\S+) -->\n```\w+\n(.*?)```", section, re.DOTALL)
        assert blocks
        for kind, name, text in blocks:
            path = self.folder / name
            if kind == "file":
                assert not path.exists()
                path.write_text(text)
            elif name.endswith(".py"):
                path.write_text(merged(path.read_text(), text))
            else:
                path.write_text(path.read_text() + text)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", *command]
        return subprocess.run(line, cwd=self.folder, env=env, capture_output=True, text=True)

    def restart(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = self._start_server(
            "",
            command=lambda port: gunicorn("app:app", port, "--chdir", str(self.folder)),
            port=self.server and self.server.port,
            ready="/login",
            **self.env,
        )

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.port}"

    def stream(self, page: Page | None, channel: str) -> tuple[int, Message | None]:
        """Return the status of a stream that the page's user opens, and its first block."""
        assert self.server is not None
        cookies = page.context.cookies() if page is not None else []
        headers = {"Cookie": "; ".join(f"{one['name']}={one['value']}" for one in cookies)}
        with request(self.server.port, f"/sse?channel={channel}", headers=headers) as response:
            return response.status, response.next() if response.status == 200 else None


@pytest.fixture
def log_in(browser: Browser) -> Iterator[Callable[[str, str], Page]]:
    """Logs users in, each in a window of their own."""
    contexts = []

    def log_in(url: str, name: str) -> Page:
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.goto(url)
        fill_in(page, name)
        return page

    yield log_in
    for context in contexts:
        context.close()


def fill_in(page: Page, name: str) -> None:
    page.get_by_placeholder("Name").fill(name)
    page.get_by_placeholder("Password").fill("secret")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


def add(page: Page, title: str) -> None:
    page.locator("[name=title]").fill(title)
    page.get_by_role("button", name="Add").click()
    shows(page, title)


def shows(page: Page, title: str) -> None:
    expect(page.locator("#tasks > li > span", has_text=title)).to_have_count(1)


def test_links_lead_somewhere() -> None:
    PAGE.assert_links_lead_somewhere()
    before = re.findall(r"^(.*)\n```\w+$", PAGE.text, re.MULTILINE)
    assert before and all(re.fullmatch(r"<!-- (file|step): \S+ -->", line) for line in before), before


@pytest.mark.slow
def test_step_by_step(
    database_url: str, start_server: Start, tmp_path: Path, log_in: Callable[[str, str], Page]
) -> None:
    app = Tutorial(tmp_path / "tasks", database_url, start_server)

    app.write("The app that you have")
    assert app.run("flask", "create").returncode == 0
    app.restart()
    anna, ben, carl = (log_in(app.url, name) for name in ("anna", "ben", "carl"))
    add(anna, "Soup")
    ben.goto(app.url)
    shows(ben, "Soup")
    anna.get_by_role("button", name="Done").click()
    expect(anna.locator(".done")).to_have_text("Soup")

    app.write("Step 1")
    assert app.run("flask", "sse", "init").returncode == 0
    examined = app.run("flask", "sse", "doctor")
    assert examined.returncode < 2 and "ok      event log" in examined.stdout, examined.stdout
    app.restart()
    add(anna, "Tea")
    anna.get_by_role("button", name="Done").nth(1).click()
    expect(anna.locator(".done")).to_have_count(2)
    sent = execute(database_url, "SELECT channel, data::text FROM flask_pg_sse.event ORDER BY id")
    assert [(channel, json.loads(data)) for channel, data in sent] == [
        ("team-kitchen", {"id": 2, "title": "Tea", "done": done}) for done in (False, True)
    ]
    assert app.stream(anna, "team-kitchen") == app.stream(None, "team-kitchen") == (403, None)

    app.write("Step 2")
    app.restart()
    for page in (anna, ben):
        status, first = app.stream(page, "team-kitchen")
        assert status == 200 and first is not None and first.event == "sse-open"
    assert app.stream(carl, "team-kitchen") == app.stream(None, "team-kitchen") == (403, None)
    assert app.stream(carl, "team-bar")[0] == 200

    app.write("Step 3")
    app.restart()
    add(anna, "Cake")

    app.write("Step 4")
    app.restart()
    for page in (anna, ben, carl):
        page.goto(app.url)
    add(anna, HOSTILE)
    shows(ben, HOSTILE)
    assert ben.locator("img").count() == 0 and ben.evaluate("window.hacked") is None
    ben.locator("li", has_text="Cake").get_by_role("button", name="Done").click()
    expect(anna.locator(".done", has_text="Cake")).to_have_count(1)
    ben.evaluate("window.before = true")
    app.restart()
    add(anna, "Pie")  # while ben's page is perhaps still away
    shows(ben, "Pie")
    assert ben.evaluate("window.before"), "by the stream, and not by a reload"
    expect(carl.locator("li")).to_have_count(0)

    app.write("Step 5")
    app.restart()
    second = anna.context.new_page()
    second.add_init_script(COUNT_OPENINGS)
    second.goto(app.url)
    ben.goto(app.url)
    for _ in range(3):
        expect(second.locator("#tasks > li")).to_have_count(5)
        second.wait_for_function("opened == 1")  # one that is still opening would come too late for the end
        anna.get_by_role("button", name="Log out").click()
        for page in (anna, second):
            expect(page.get_by_role("button", name="Log in")).to_be_visible()
        fill_in(anna, "anna")
        second.goto(app.url)
    add(anna, "Bread")
    shows(ben, "Bread")
    assert app.server is not None and "Traceback" not in app.server.log()


@pytest.mark.slow
def test_its_own_tests(database_url: str, start_server: Start, tmp_path: Path) -> None:
    """They pass, and fail for the mistake that the page names and for each step that is not done.

    The package's checkout is where the page says, and pytest does not collect its tests.
    """
    app = Tutorial(tmp_path / "tasks", database_url, start_server)
    [checkout] = re.findall(r"^ +pip install (\S*flask_pg_sse)/? ", PAGE.text, re.MULTILINE)
    (app.folder / checkout).symlink_to(ROOT)
    for title in ("The app that you have", "Step 1", "Step 2", "Step 3", "Step 4", "Step 5"):
        app.write(title)
    app.env = {}
    code = (app.folder / "app.py").read_text()
    done = app.run("pytest", "-q", "-p", "no:cacheprovider")
    assert re.search(r"^3 passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
    late = code.replace(
        "    db.session.add(task)\n    announce(task)\n    db.session.commit()\n",
        "    db.session.add(task)\n    db.session.commit()\n    announce(task)\n",
    )
    everybody = code.replace('channel == f"team-{current_user.team}"', "True")
    stays = re.sub(r"    disconnect\(subject=user_id, .*\n", "", code)
    for broken, failed in ((late, "announced"), (everybody, "nobody_else"), (stays, "logging_out")):
        assert broken != code
        (app.folder / "app.py").write_text(broken)
        done = app.run("pytest", "-q", "-p", "no:cacheprovider")
        assert re.search(rf"^FAILED \S+{failed}", done.stdout, re.MULTILINE), done.stdout
