"""TREC's topics, the classic form: `<top>`, `<num>`, `<title>`, more that is not read, `</top>`.

In: numbered lines. Out: queries, whose text is the title, with the blanks between its words as one. What stands
before the values (`<num> Number: 301`, `<title> Topic: ...`) is left out; closing tags may be there or not.

Not covered: topics in XML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sparse_ingest.corpora.documents import BadRow, id_in, shown
from sparse_ingest.records import Query

_TAG = re.compile(r"<(/?[a-z]+)>", re.IGNORECASE)
_LABEL = re.compile(r"^(number|topic)\s*:", re.IGNORECASE)


def begins_topic(text: str) -> bool:
    """Whether a line is the first of a topic."""
    return text.lstrip().lower().startswith("<top>")


def topics(texts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Query | BadRow]]:
    """The line where each topic begins, and its query or what is wrong with it; blank lines are left out already."""
    for start, text in texts:
        if not begins_topic(text):
            yield start, BadRow(f"<top> was expected, found {shown(text)}")
            return
        lines = [text]
        while "</top>" not in lines[-1].lower():
            _, text = next(texts, (0, "<top>"))
            if begins_topic(text):
                yield start, BadRow("the topic that begins here has no </top>; is the file cut off?")
                return
            lines.append(text)
        try:
            yield start, _query_of(" ".join(lines))
        except BadRow as bad:
            yield start, bad


def _query_of(topic: str) -> Query:
    _, *parts = _TAG.split(topic)
    values: dict[str, str] = {}
    for tag, text in zip(parts[::2], parts[1::2], strict=True):
        if tag.lower() == "/top" and text.strip():
            raise BadRow(f"something follows </top>: {shown(text.strip())}")
        if (name := tag.lower()) in values:
            raise BadRow(f"the topic has <{name}> twice")
        values[name] = " ".join(_LABEL.sub("", text.strip()).split())
    for name in ("num", "title"):
        if not values.get(name):
            raise BadRow(f"the topic has no <{name}>, which was expected")
    return Query(id_in(values, "num"), values["title"])
