"""A page of terms as plain text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

SILENT = {"script", "style", "head", "nav", "header", "footer", "button", "template"}
BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "div", "tr", "br", "section"}


class _Text(HTMLParser):
    """The words of a page that a reader would see, one block a line."""

    def __init__(self) -> None:
        super().__init__()
        self.silent = 0
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in SILENT
        if tag in BLOCKS:
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag in BLOCKS:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.words.append(re.sub(r"\s+", " ", data))


def page_text(page: str) -> str:
    """The text of the article in an HTML page, or of the page where it has none."""
    article = re.search(r"<article\b.*</article>", page, re.DOTALL)
    parser = _Text()
    parser.feed(article.group() if article else page)
    lines = (" ".join(line.split()) for line in "".join(parser.words).split("\n"))
    return "\n\n".join(line for line in lines if line)
