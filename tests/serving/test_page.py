"""The chat page: it is served whole, needs nothing from elsewhere, and says to the API what the API understands."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import andromeda.serving

PAGE = Path(andromeda.serving.__file__).with_name("chat.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Attributes:
    links: what elements refer to.
    ids: that they have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "action", "data", "poster") if name in values]
        self.ids += [values["id"]] if "id" in values else []


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(served):
    answer = served.http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy


def test_the_page_refers_to_nothing_elsewhere():
    elements = Elements()
    elements.feed(PAGE)
    assert not elements.links
    assert not re.search(r"https?:|//[\w-]+\.\w|url\(|@import|import\s*\(", PAGE)
    assert len(PAGE) < 8000


def test_its_parts_are_there():
    elements = Elements()
    elements.feed(PAGE)
    assert set(re.findall(r'find\("(\w+)"\)', PAGE)) <= set(elements.ids)


def test_what_it_asks_is_answered(served):
    """The routes that it fetches, with the fields that it sends."""
    routes = re.findall(r'fetch\("([^"]+)"', PAGE)
    assert routes == ["v1/models", "v1/chat/completions"]
    model = served.http.get("/v1/models").json()["data"][0]["id"]
    body = re.search(r"JSON\.stringify\(\{(.*?)\}\)", PAGE, re.DOTALL)
    assert body is not None
    fields = set(re.findall(r"(?:^|,)\s*(\w+)", body[1]))
    assert fields == {"model", "messages", "stream", "temperature", "max_completion_tokens"}
    asked = {"model": model, "messages": [{"role": "user", "content": "a"}], "temperature": 0.8}
    answer = served.http.post("/v1/chat/completions", json={**asked, "stream": True, "max_completion_tokens": 4})
    assert answer.status_code == 200 and answer.text.startswith("data: {")
