"""The README and the pages of docs/: their examples, and the targets of their links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Document:
    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text()

    def example(self, name: str) -> str:
        """Return the code that follows the comment `run: name`."""
        found = re.search(rf"<!-- run: {re.escape(name)} -->\n```\w+\n(.*?)```", self.text, re.DOTALL)
        assert found, f"{self.path} has no example {name!r}"
        return found[1]

    def assert_every_example_is_run(self, *tests: str) -> None:
        """Check that one of these modules of tests/ runs each example by name, and that all code has a name."""
        code = "".join((ROOT / "tests" / test).read_text() for test in tests)
        for name in re.findall(r"<!-- run: (\S+) -->", self.text):
            assert f'example("{name}")' in code, name
        before = re.findall(r"^(.*)\n```\w+$", self.text, re.MULTILINE)
        assert before and all(line.startswith("<!-- run: ") for line in before), before

    def assert_links_lead_somewhere(self) -> None:
        for link in re.findall(r"\]\(([^)]+)\)", self.text):
            name, _, anchor = link.partition("#")
            if "://" not in link:
                path = (ROOT / self.path).parent / name if name else ROOT / self.path
                assert path.exists(), link
                assert not anchor or anchor in _anchors(path.read_text()), link
        for name in re.findall(r"`(tests/[^`:]+)", self.text):
            assert (ROOT / name).exists(), name


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in titles}
