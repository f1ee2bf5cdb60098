"""A scheme says what integer codes are solved for: the grid, its bits and its group size.

Three kinds of grid: ``affine`` (a scale, and for asymmetric ones an integer zero point, for each
group; GPTQ, AWQ, compressed-tensors, MatMulNBits hold it), the blocks of GGML (``q4_0`` … ``q8_0``)
and its super-blocks (``q4_k``, ``q5_k``, ``q6_k``), in which a group's scale is a whole number of
steps that 256 weights share. ``q4_0`` is the affine symmetric 4-bit grid of group 32, and ``q8_0``
the 8-bit one, so those codes travel between formats without a second rounding.
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
    grid: str  # "affine", or the name of a block type of GGML
    bits: int
    group_size: int
    symmetric: bool

    @property
    def nested(self) -> bool:
        """Whether groups have whole-numbered scales, in steps of one float16 that a super-block shares."""
        return self.grid in _NESTED

    @property
    def unit(self) -> int:
        """Consecutive input channels whose parameters are found together: a super-block, or a group."""
        return _SUPER_BLOCK if self.nested else self.group_size

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: the code and its share of the scales and of the zero point or minima."""
        if self.group_size < 0:
            return float(self.bits)
        if self.nested:
            whole, halves = (8, 16) if self.symmetric else (6 + 6, 16 + 16)
            return self.bits + whole / self.group_size + halves / self.unit
        zero = 0 if self.symmetric else (16 if self.grid != "affine" else self.bits)
        return self.bits + (16 + zero) / self.group_size

    def groups(self, in_features: int, where: str = "weight") -> int:
        """Number of groups in a row of ``in_features`` weights.

        Raises:
            InputError: the group size, or the super-block, does not divide ``in_features``.
        """
        if self.group_size < 0:
            return 1
        if self.nested and in_features % _SUPER_BLOCK:
            raise InputError(
                f"{where}: in_features {in_features} is not divisible by {_SUPER_BLOCK}, "
                f"the weights in a {self.name} super-block",
                f"{_NESTED[self.grid]} has blocks of 32; it is what llama.cpp takes in such a place",
            )
        if in_features % self.group_size:
            valid = [g for g in range(8, min(in_features, 1024) + 1) if in_features % g == 0]
            if self.grid != "affine":
                affine = f"w{4 if self.bits < 8 else 8}g32"
                hint = f"{self.name} has blocks of {self.group_size}; use an affine scheme such as {affine}"
            else:
                shown = ", ".join(map(str, valid)) or "none"
                hint = f"valid sizes {shown}; or --group-size -1"
            raise InputError(
                f"{where}: in_features {in_features} is not divisible by group_size {self.group_size}", hint
            )
        return in_features // self.group_size


_SUPER_BLOCK = 256
_NESTED = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # and what stands in where super-blocks do not fit
GGML_SCHEMES = {
    name: Scheme(name, name, bits, group_size, symmetric)
    for name, bits, group_size, symmetric in (
        ("q4_0", 4, 32, True),
        ("q4_1", 4, 32, False),
        ("q5_0", 5, 32, True),
        ("q5_1", 5, 32, False),
        ("q8_0", 8, 32, True),
        ("q4_k", 4, 32, False),
        ("q5_k", 5, 32, False),
        ("q6_k", 6, 16, True),
    )
}


def _affine(bits: int, group_size: int, symmetric: bool) -> Scheme:
    if bits not in (4, 8):
        raise UsageError(f"bits {bits} is not supported", "use 4 or 8")
    if group_size != -1 and group_size < 8:
        raise UsageError(f"group_size {group_size} is too small", "use at least 8, or -1 for a whole row")
    group = "row" if group_size == -1 else f"g{group_size}"
    return Scheme(f"w{bits}{group}{'' if symmetric else '-asym'}", "affine", bits, group_size, symmetric)


def parse_scheme(name: str) -> Scheme:
    """The scheme called ``name``: ``w4g32``, ``w4g128-asym``, ``w8row``, ``q4_0``, ``q4_k``, …

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
