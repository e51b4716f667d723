"""Foreign text in Markdown: what a file says of itself must not become markup of a page that shows it."""

import json
import re
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")
_REPLACED = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",
    "`": "'",
    "](": "]&#40;",
    "![": "&#33;[",
    "**": "&#42;&#42;",
}
_MARKUP = re.compile("|".join(re.escape(key) for key in sorted(_REPLACED, key=len, reverse=True)))


def plain(text: str) -> str:
    """The text on one line without HTML, code spans, table borders, links and pictures; names and numbers stay."""
    one_line = _MARKUP.sub(lambda match: _REPLACED[match[0]], _CONTROL.sub(" ", text))
    return re.sub(r"^(\s*)#", r"\1&#35;", one_line)  # a heading, where the text begins a line or a list's item


def all_plain(value: Any) -> Any:
    """``plain`` of every string in mappings, lists and tuples, keys included; anything else as it is."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {all_plain(key): all_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(all_plain(part) for part in value)
    return value


def python_string(text: str) -> str:
    """The text as a Python literal in double quotes, for a snippet to be copied."""
    return json.dumps(text, ensure_ascii=False)
