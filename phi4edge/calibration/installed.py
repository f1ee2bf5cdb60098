"""Texts that every installation carries: Python's own, those of sympy and mpmath, and sums that we make up.

torch needs sympy and sympy needs mpmath, so both are always there. A document belongs to the calibration half or to
the evaluation half by a hash of the name it stands under (a module, a package, a kind of problem), so that no
document, and no two pieces of one, are ever on both sides.
"""

from __future__ import annotations

__all__ = ["KINDS", "installed_documents"]

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from phi4edge.calibration.arithmetic import PROBLEMS, problems
from phi4edge.calibration.sources import Document, pieces
from phi4edge.core.errors import InputError

KINDS = ("python-docs", "python-docstrings", "python-sources", "python-questions", "sympy-docs", "arithmetic")
# Not text that a person wrote: tables, generated code, and the interpreter's own tests.
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
_GENERATED = "_sysconfigdata"  # how this Python was built: tables, in some installations twice
# Not about mathematics, or generated.
_NOT_MATHEMATICS = {
    *("benchmarks", "codegen", "conftest.py", "external", "interactive", "multipledispatch", "parsing", "plotting"),
    *("printing", "sandbox", "testing", "unify", "utilities", "visualization.py"),
}
_MARKS = (">>> ", ".. math")  # of worked examples and formulas
_TEXTLESS = (ast.Name, ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
_QUESTIONS = (
    "What does `{}` do?",
    "Explain `{}` from Python's standard library.",
    "I found `{}` in a program that I have to maintain. What is it for?",
    "Can you tell me about `{}`?",
)
_TURNS = 3  # questions a chat, at most
_ANSWER = 1200  # characters of an answer, unless its first paragraph has more
_SHORT = 200  # characters of a docstring that says little


def in_evaluation_half(name: str) -> bool:
    """Whether the document called ``name`` belongs to the evaluation half."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


@lru_cache(maxsize=2 * len(KINDS))
def installed_documents(kind: str, *, evaluation: bool) -> tuple[Document, ...]:
    """Documents of one ``kind`` (see KINDS) from one half, in a fixed order.

    Raises:
        InputError: sympy or mpmath is not installed.
    """
    if kind == "python-docs":
        return tuple(_topics(evaluation))
    if kind == "sympy-docs":
        return tuple(document for text in _mathematics(evaluation) for document in pieces(text))
    if kind == "arithmetic":
        names = [name for name in PROBLEMS if in_evaluation_half(f"arithmetic {name}") == evaluation]
        return tuple(document for name in names for document in problems(name))
    return _standard_library(evaluation)[kind]


def _topics(evaluation: bool) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if in_evaluation_half(f"topic {name}") == evaluation:
            yield from pieces(topics[name])


@lru_cache(maxsize=2)
def _standard_library(evaluation: bool) -> dict[str, tuple[Document, ...]]:
    """Sources, docstrings and questions of the standard library's modules; each module is parsed once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Document]] = {"python-sources": [], "python-docstrings": [], "python-questions": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # The top-level name decides, so that a package's modules stay together on one side.
        if relative.name.startswith(_GENERATED) or _SKIPPED & set(relative.parts):
            continue
        if in_evaluation_half(f"module {relative.parts[0]}") != evaluation:
            continue
        source = _read(path)
        found["python-sources"] += pieces(source)
        tree = _parse(source)
        found["python-docstrings"] += pieces("".join(f"{text}\n\n" for text in _docstrings(tree)))
        parts = relative.with_suffix("").parts
        if not any(part.startswith("_") for part in parts if part != "__init__"):
            found["python-questions"] += _chats(tree, ".".join(part for part in parts if part != "__init__"))
    return {kind: tuple(documents) for kind, documents in found.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(source)
        except SyntaxError:
            return ast.Module([], [])


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """``ast.walk``, in its order, without the leaves that hold no text: most of the nodes."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                todo.extend(item for item in value if isinstance(item, ast.AST) and not isinstance(item, _TEXTLESS))
            elif isinstance(value, ast.AST) and not isinstance(value, _TEXTLESS):
                todo.append(value)
        yield node


def _docstrings(tree: ast.Module) -> Iterator[str]:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in _walk(tree) if isinstance(node, nodes))
    return (text for text in found if text and len(text) > _SHORT)


def _chats(tree: ast.Module, module: str) -> Iterator[Document]:
    """Chats about what is public in a module: a question, and what the docstring says."""
    asked: list[tuple[str, str]] = []
    for name, text in _public(tree.body, module):
        ask = _QUESTIONS[hashlib.sha256(name.encode()).digest()[1] % len(_QUESTIONS)]
        asked.append((ask.format(name), _opening(text)))
    for start in range(0, len(asked), _TURNS):
        chat = asked[start : start + _TURNS]
        turns = [turn for ask, reply in chat for turn in ({"role": "user", "content": ask}, _assistant(reply))]
        yield Document("".join(f"{ask}\n{reply}\n" for ask, reply in chat), tuple(turns))


def _public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted names of public functions, classes and methods, and their docstrings."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text and len(text) > _SHORT:
                yield f"{prefix}.{node.name}", text
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}.{node.name}")


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _opening(text: str) -> str:
    """The first paragraph, and as many more as fit an answer."""
    kept, *rest = text.split("\n\n")
    for paragraph in rest:
        if len(kept) + len(paragraph) > _ANSWER:
            break
        kept += f"\n\n{paragraph}"
    return kept


def _mathematics(evaluation: bool) -> Iterator[str]:
    """What the modules of sympy and mpmath say of themselves, with formulas and worked examples; one text a module."""
    for package in ("mpmath", "sympy"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"corpus part sympy-docs: {package} is not installed", "torch needs it; install torch anew"
            )
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            skipped = (_SKIPPED | _NOT_MATHEMATICS) & set(parts)
            if not skipped and in_evaluation_half(f"module {package}/{parts[0]}") == evaluation:
                source = _read(path)
                tree = _parse(source) if any(mark.strip() in source for mark in _MARKS) else ast.Module([], [])
                yield "".join(f"{text}\n\n" for text in _worked_texts(tree))


def _worked_texts(tree: ast.Module) -> Iterator[str]:
    """String constants with worked examples or formulas; mpmath keeps many of its docstrings as values of names."""
    for node in _walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > _SHORT:
            text = inspect.cleandoc(node.value)
            if any(mark in text for mark in _MARKS):
                yield text
