"""English prose found wherever the demo runs: Python's language reference, scikit-learn's data set notes."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator
from itertools import chain, zip_longest

WORDS = range(6, 41)

# Mark-up, formulas and code have no place in a sentence; quotes and parentheses do.
_FOREIGN = re.compile(r"[^\w\s.,;:!?'\"()\u2018\u2019\u201c\u201d/-]|_|::|\.\w|\w\(|https?:|\d{4,}")
_ROLE = re.compile(
    r":[\w:]+:`~?([^`<]*)(?:<[^`]*)?`|``([^`]*)``|`([^`<]*)(?:<[^`]*)?`_*|\*{1,2}([^*\s][^*]*)\*{1,2}"
)
_FOOTNOTE = re.compile(r"\s*\[\d+\]_?")
_BREAK = re.compile(r"(?<=[a-z)\"\u201d][.!?])\s+(?=[A-Z\"\u201c])")


def sentences(count: int) -> list[str]:
    """`count` different sentences of 6 to 40 words, if there are as many, in turn from each document."""
    rows = zip_longest(*(extract(text) for text in _documents()))
    distinct = dict.fromkeys(sentence for sentence in chain.from_iterable(rows) if sentence)
    return list(distinct)[:count]


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".rst"):
            yield file.read_text(encoding="utf-8")


def extract(text: str) -> list[str]:
    """The whole sentences in the plain paragraphs of a reStructuredText document.

    A paragraph with an indented line, a list, a table, a heading or a directive is passed over.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").splitlines()
        if not lines or not lines[0][:1].isupper() or any(not line[:1].isalnum() for line in lines[1:]):
            continue
        prose = _FOOTNOTE.sub(
            "", _ROLE.sub(lambda m: next(g for g in m.groups() if g is not None), " ".join(lines))
        )
        found += [s for s in _BREAK.split(" ".join(prose.split())) if _is_sentence(s)]
    return found


def _is_sentence(text: str) -> bool:
    whole = (
        text[:1].isupper()
        and text[-1:] in ".!?"
        and text.count('"') % 2 == 0
        and text.count("(") == text.count(")")
    )
    return whole and len(text.split()) in WORDS and not _FOREIGN.search(text)
