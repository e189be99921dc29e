"""docs/servers.md names the servers that the tests run, with what they say of themselves."""

from __future__ import annotations

import re

from tests.http.test_other_servers import SERVERS
from tests.support.documents import Document

PAGE = Document("docs/servers.md")


def test_links() -> None:
    PAGE.assert_links_lead_somewhere()


def test_the_servers_of_the_page_are_those_of_the_tests() -> None:
    table = PAGE.text.split("| says of itself")[1].partition("\n\n")[0]
    assert re.findall(r"^\| (\w+)", table, re.MULTILINE) == list(SERVERS)
