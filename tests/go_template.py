"""The part of Go's text/template that a Modelfile of ours uses, after its documentation (pkg.go.dev/text/template).

Actions ``range $i, $x := PIPE``, ``if PIPE``, ``else``, ``end``, ``$x := PIPE`` and PIPE; operands are fields, ``$``,
variables, numbers, strings and calls of eq, ne, and, or, not, len, slice; ``{{-`` and ``-}}`` trim white space. All
else raises, so that a template that needs more cannot seem to work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\d+|:=|[(),]|\$?[A-Za-z_]\w*|\$|\.[A-Za-z]\w*|\.)')
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *values: next((v for v in values if not v), values[-1]),
    "or": lambda *values: next((v for v in values if v), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda value, *ends: value[slice(ends[0], ends[1] if len(ends) > 1 else None)],
}


def render(template: str, data: dict[str, Any]) -> str:
    """``template`` filled in with ``data``."""
    pieces = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    items: list[str | list[str]] = []
    for i, piece in enumerate(pieces):
        if piece.startswith("{{"):
            inner = piece[2:-2].removeprefix("-").removesuffix("-")
            items.append(tokens(inner))
            continue
        if i > 0 and pieces[i - 1].endswith("-}}"):
            piece = piece.lstrip()
        if i + 1 < len(pieces) and pieces[i + 1].startswith("{{-"):
            piece = piece.rstrip()
        items.append(piece)
    body, rest = block(items, 0)
    assert rest == len(items), "an end too many"
    return "".join(run(body, data, {"$": data}))


def tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match, f"not Go: {text[at:]!r}"
        found.append(match[1])
        at = match.end()
    return found


def block(items: list[Any], at: int) -> tuple[list[Any], int]:
    """Nodes up to an ``end`` or ``else`` that belongs to someone outside."""
    nodes: list[Any] = []
    while at < len(items):
        item = items[at]
        if isinstance(item, list) and item[0] in ("end", "else"):
            return nodes, at
        at += 1
        if isinstance(item, list) and item[0] in ("if", "range"):
            body, at = block(items, at)
            other: list[Any] = []
            if items[at] == ["else"]:
                other, at = block(items, at + 1)
            assert items[at] == ["end"]
            at += 1
            item = (item, body, other)
        nodes.append(item)
    return nodes, at


def run(nodes: list[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    names = dict(names)  # variables end with their block
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            if node[1:2] == [":="]:
                names[node[0]] = value(node[2:], dot, names)
            else:
                yield str(value(node, dot, names))
        elif node[0][0] == "if":
            yield from run(node[1] if value(node[0][1:], dot, names) else node[2], dot, names)
        else:
            index, comma, item, assign, *pipe = node[0][1:]
            assert (comma, assign) == (",", ":=")
            for i, each in enumerate(value(pipe, dot, names)):
                yield from run(node[1], each, {**names, index: i, item: each})


def value(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    """A pipeline of one command: an operand, or a function and its operands."""
    if words[0] in _FUNCTIONS:
        arguments, at = [], 1
        while at < len(words):
            found, at = operand(words, at, dot, names)
            arguments.append(found)
        return _FUNCTIONS[words[0]](*arguments)
    found, at = operand(words, 0, dot, names)
    assert at == len(words), words
    return found


def operand(words: list[str], at: int, dot: Any, names: dict[str, Any]) -> tuple[Any, int]:
    word = words[at]
    if word == "(":
        depth, end = 1, at + 1
        while depth:
            depth += {"(": 1, ")": -1}.get(words[end], 0)
            end += 1
        found, at = value(words[at + 1 : end - 1], dot, names), end
    elif word.startswith('"') or word.isdigit():
        return json.loads(word), at + 1
    elif word.startswith("$"):
        found, at = names[word], at + 1
    elif word == ".":
        return dot, at + 1
    else:
        assert word.startswith("."), word
        return dot[word[1:]], at + 1
    while at < len(words) and len(words[at]) > 1 and words[at].startswith(".") and word == "$":
        found, at = found[words[at][1:]], at + 1
    return found, at
