"""A scheme says what integer codes are solved for: the grid, its bits and its group size.

Two kinds of grid: ``affine`` (a scale, and for asymmetric ones an integer zero point, for each
group; GPTQ, AWQ, compressed-tensors, MatMulNBits hold it) and the blocks of GGML (``q4_0``,
``q4_1``, ``q8_0``). ``q4_0`` is the affine symmetric 4-bit grid of group 32, and ``q8_0`` the 8-bit
one, so those codes travel between formats without a second rounding.
"""

from __future__ import annotations

__all__ = ["GGML_SCHEMES", "Scheme", "parse_scheme", "scheme_from_options"]

import re
from dataclasses import dataclass

from phi4edge.core.errors import InputError, UsageError, closest


@dataclass(frozen=True)
class Scheme:
    """What one weight matrix is rounded to.

    ``group_size`` counts consecutive input channels that share a scale; -1 is a whole row.
    """

    name: str
    grid: str  # "affine", "q4_0", "q4_1", "q8_0"
    bits: int
    group_size: int
    symmetric: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: the code and its share of the float16 scale and of the zero point."""
        if self.group_size < 0:
            return float(self.bits)
        zero = 0 if self.symmetric else (16 if self.grid != "affine" else self.bits)
        return self.bits + (16 + zero) / self.group_size

    def groups(self, in_features: int, where: str = "weight") -> int:
        """Number of groups in a row of ``in_features`` weights.

        Raises:
            InputError: the group size does not divide ``in_features``.
        """
        if self.group_size < 0:
            return 1
        if in_features % self.group_size:
            valid = [g for g in range(8, min(in_features, 1024) + 1) if in_features % g == 0]
            if self.grid != "affine":
                hint = f"{self.name} has blocks of {self.group_size}; use an affine scheme such as w{self.bits}g32"
            else:
                shown = ", ".join(map(str, valid)) or "none"
                hint = f"valid sizes {shown}; or --group-size -1"
            raise InputError(
                f"{where}: in_features {in_features} is not divisible by group_size {self.group_size}", hint
            )
        return in_features // self.group_size


GGML_SCHEMES = {
    "q4_0": Scheme("q4_0", "q4_0", 4, 32, True),
    "q4_1": Scheme("q4_1", "q4_1", 4, 32, False),
    "q8_0": Scheme("q8_0", "q8_0", 8, 32, True),
}


def _affine(bits: int, group_size: int, symmetric: bool) -> Scheme:
    if bits not in (4, 8):
        raise UsageError(f"bits {bits} is not supported", "use 4 or 8")
    if group_size != -1 and group_size < 8:
        raise UsageError(f"group_size {group_size} is too small", "use at least 8, or -1 for a whole row")
    group = "row" if group_size == -1 else f"g{group_size}"
    return Scheme(f"w{bits}{group}{'' if symmetric else '-asym'}", "affine", bits, group_size, symmetric)


def parse_scheme(name: str) -> Scheme:
    """The scheme called ``name``: ``w4g32``, ``w4g128-asym``, ``w8row``, ``q4_0``, …

    Raises:
        UsageError: no such scheme.
    """
    if name in GGML_SCHEMES:
        return GGML_SCHEMES[name]
    match = re.fullmatch(r"w(\d+)(?:g(\d+)|row)(-asym)?", name)
    if not match:
        examples = [*GGML_SCHEMES, "w4g32", "w4g64", "w4g128", "w4g32-asym", "w8g128", "w8row"]
        near = closest(name, examples)
        raise UsageError(f"unknown scheme {name!r}", f"did you mean {near!r}?" if near else ", ".join(examples))
    return _affine(int(match[1]), int(match[2]) if match[2] else -1, not match[3])


def scheme_from_options(name: str | None, bits: int | None, group_size: int | None, symmetric: bool | None) -> Scheme:
    """The scheme that ``--scheme``, or else ``--bits/--group-size/--symmetric``, ask for.

    Raises:
        UsageError: both ways are used and disagree, or the values are impossible.
    """
    if name is None:
        return _affine(4 if bits is None else bits, 32 if group_size is None else group_size, symmetric is not False)
    scheme = parse_scheme(name)
    given = {"--bits": (bits, scheme.bits), "--group-size": (group_size, scheme.group_size)}
    given["--symmetric"] = (symmetric, scheme.symmetric)
    for flag, (asked, held) in given.items():
        if asked is not None and asked != held:
            raise UsageError(
                f"--scheme {name} has {flag.lstrip('-')} {held}, but {flag} says {asked}", "give one of both"
            )
    return scheme
