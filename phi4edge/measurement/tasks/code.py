"""From an answer to a HumanEval question to the program that is run.

An answer is either the function whole (in a code block, as chat models write it) or its body, which goes on where the
prompt ends. What stands behind the function in a continuation is cut by the stop strings of the HumanEval paper
(arXiv:2107.03374, section 2.1).
"""

from __future__ import annotations

__all__ = ["STOP_CODE", "program_of", "solution_of"]

import re

STOP_CODE = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```")
_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def solution_of(answer: str, prompt: str, entry_point: str) -> str:
    """Code that defines ``entry_point``, if the answer has it: of several code blocks the last that defines it."""
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [block for block in _BLOCK.findall(answer) if defines.search(block)]
    if blocks:
        # The prompt's imports and helpers stand before; its own unfinished function is defined again.
        return f"{_before(prompt, entry_point)}\n{blocks[-1]}\n"
    if defines.search(answer):
        return f"{_before(prompt, entry_point)}\n{answer}\n"
    return f"{prompt}{answer}\n"


def _before(prompt: str, entry_point: str) -> str:
    """What the prompt has before the function that is to be completed."""
    head, found, _ = prompt.rpartition(f"def {entry_point}")
    return head if found else ""


def program_of(code: str, test: str, entry_point: str) -> str:
    """The code, the publisher's tests and the call that runs them."""
    return f"{code}\n{test}\n\ncheck({entry_point})\n"
