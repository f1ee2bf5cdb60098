"""The process that compares mathematics: ``python -m phi4edge.measurement.tasks._math_worker``; see mathematics.py.

{"found", "target"} a line on stdin → {"equal": bool} a line on stdout; math-verify parses both with a grammar (no eval)
and compares with SymPy. What takes too long, or too much memory, ends this process and nothing else.
"""

from __future__ import annotations

__all__ = ["main"]

import json
import resource
import sys
from typing import Any

_MEMORY = 4 * 2**30  # of address space


def main() -> None:
    """Answer until stdin ends."""
    import math_verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    forms = (math_verify.LatexExtractionConfig(),)  # its grammar; the form for plain text goes through SymPy's eval
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()

    def parsed(text: str) -> list[Any]:
        found: list[Any] = math_verify.parse(f"${text}$", forms, parsing_timeout=None, raise_on_error=False)
        return found

    for line in sys.stdin:
        pair = json.loads(line)
        try:
            target = parsed(pair["target"])
            equal = bool(math_verify.verify(target, parsed(pair["found"]), timeout_seconds=None, raise_on_error=False))
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            equal = False  # what SymPy cannot take is no answer
        sys.stdout.write(json.dumps({"equal": equal}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
