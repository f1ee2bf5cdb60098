"""``[drift]`` of a recipe: the options of ``phi4edge drift`` by their names, ``-`` written ``_``, as values of theirs.

    text                      a path or a corpus; a list of them; or a table NAME = PATH, a domain each
    context, chunks, store_top, greedy, greedy_tokens
    tasks                     a list of names; then task_data, limit, task_context, max_answer_tokens, chat_template,
                              allow_code_execution, reference_runtime, shots
    shots_file                a path where one task is asked; or a table TASK = PATH
    max_kld, max_ppl_ratio, min_top1, max_task_drop, min_reference_share, gate_undecided

Paths are relative to the recipe.
"""

from __future__ import annotations

__all__ = ["DRIFT_KEYS", "read_drift"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi4edge.cli.gate_options import GATES
from phi4edge.core.errors import InputError
from phi4edge.core.settings import Table

_NUMBERS = {
    "context": "context",
    "chunks": "chunks",
    "store_top": "store_top",
    "greedy_tokens": "greedy_tokens",
    "limit": "task_limit",
    "task_context": "task_context",
    "max_answer_tokens": "max_answer_tokens",
    "shots": "shots",
}
_FLAGS = {"chat_template": "task_chat", "allow_code_execution": "allow_code_execution"}
_CHOICES = {"reference_runtime": ("llama_cpp", "torch_ref"), "gate_undecided": ("fail", "pass")}
DRIFT_KEYS = ("text", "greedy", "tasks", "task_data", "shots_file", *_NUMBERS, *_FLAGS, *_CHOICES, *GATES)


def read_drift(table: Table, folder: Path) -> dict[str, Any]:
    """The values that ``table`` gives, by the parameters of the command line; paths from ``folder``.

    Raises:
        InputError: a value of the wrong type; file and key are named.
    """

    def from_folder(path: str) -> str:
        return str(folder / path) if (folder / path).exists() else path

    found: dict[str, Any] = {name: table.integer(key) for key, name in _NUMBERS.items() if key in table}
    found |= {name: table.boolean(key, False) for key, name in _FLAGS.items() if key in table}
    found |= {key: table.choice(key, allowed) for key, allowed in _CHOICES.items() if key in table}
    found |= {key: _limit(table, key) for key in GATES if key in table}
    if "text" in table:
        found["texts"] = _paths(table, "text", from_folder)
    if "shots_file" in table:
        found["shots_files"] = _paths(table, "shots_file", from_folder)
    if "tasks" in table:
        found["task_names"] = ",".join(table.strings("tasks"))
    if "task_data" in table:
        found["task_data"] = folder / table.string("task_data")
    if "greedy" in table:
        found["greedy"] = from_folder(table.string("greedy"))
    return found


def _limit(table: Table, key: str) -> float:
    """A number; whether it can be a limit is said where limits are made."""
    value = table.data[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{table.where(key)}: is {value!r}, expected a number")
    return float(value)


def _paths(table: Table, key: str, from_folder: Callable[[str], str]) -> tuple[str, ...]:
    """What ``key`` names, as the option of that name takes it: ``NAME=PATH``, or a path alone."""
    value = table.data[key]
    if isinstance(value, str):
        return (from_folder(table.string(key)),)
    if isinstance(value, list):
        return tuple(map(from_folder, table.strings(key)))
    named = table.table(key, value if isinstance(value, dict) else ())
    return tuple(f"{name}={from_folder(named.string(name))}" for name in named.data)
