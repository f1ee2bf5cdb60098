"""What llama-perplexity prints of ``--kl-divergence``, in the figures and units of our own drift."""

from __future__ import annotations

__all__ = ["DIFFERENCES", "LEAST_POSITIONS", "LostWordsError", "parse_drift"]

import math
import re

from phi4edge.core.errors import InputError, TargetError
from phi4edge.measurement.result import Measurement

LEAST_POSITIONS = 100  # below that it prints no statistics
DIFFERENCES = (
    "KLD leaves out tokens that the reference holds less likely than e^-16",
    "a token of the text that the reference holds less likely than that counts as that likely in PPL(reference)",
    "standard errors are over positions, taken as independent; none between chunks",
    "six decimals are printed, of Δp and shares three of a per cent; an error printed as 0 is given as 5e-7",
)

_QUANTILES = {
    "Maximum": "max", r"99\.9%": "p999", r"99\.0%": "p99", r"95\.0%": "p95", r"90\.0%": "p90", "Median": "median",
    r"10\.0%": "p10", r"5\.0%": "p05", r"1\.0%": "p01", r"0\.1%": "p001", "Minimum": "min",
}  # fmt: skip
_QUARTERS = {r"75\.0%": "p75", r"25\.0%": "p25"}
_PPL = r"PPL\(Q\)", r"PPL\(base\)"
# Our name of a figure: the words before it, its unit here, and how much of ours one of its own is.
_FIGURES: dict[str, tuple[str, str, float]] = {
    "ppl": (rf"Mean {_PPL[0]}", "1", 1.0),
    "ppl_reference": (rf"Mean {_PPL[1]}", "1", 1.0),
    "ln_ppl_ratio": (rf"Mean ln\({_PPL[0]}/{_PPL[1]}\)", "nat", 1.0),
    "ppl_ratio": (rf"Mean {_PPL[0]}/{_PPL[1]}", "1", 1.0),
    "ln_ppl_correlation": (rf"Cor\(ln\({_PPL[0]}\), ln\({_PPL[1]}\)\)", "1", 0.01),
    "kld": (r"Mean\s+KLD", "nat", 1.0),
    **{f"kld_{name}": (rf"{words}\s+KLD", "nat", 1.0) for words, name in _QUANTILES.items()},
    "mean_delta_p": (r"Mean\s+Δp", "fraction", 0.01),
    "rms_delta_p": (r"RMS Δp", "fraction", 0.01),
    **{f"delta_p_{name}": (rf"{words}\s+Δp", "fraction", 0.01) for words, name in (_QUANTILES | _QUARTERS).items()},
    "same_top_p": (r"Same top p", "fraction", 0.01),
}
_PRECISE = ("kld", "ln_ppl_ratio", "ppl_ratio")
_PRINTED = 5e-7  # half of the last decimal: an error that is printed as 0 is at most that
_NOT_PRINTED = (
    "is it of 2024 or later? on a busy device its last words can be lost, as llama.cpp does not wait for its log: run "
    "it again, or remove it there and let us send one that does (phi4edge runner build)"
)
_DECIDING = ("ppl", "ppl_reference", "ppl_ratio", "kld", "same_top_p")


class LostWordsError(TargetError):
    """llama-perplexity ended well, and not all that it said arrived."""


def parse_drift(output: str, positions: int) -> dict[str, Measurement]:
    """Every figure in ``output`` with its standard error, by name; ``positions`` were scored.

    Raises:
        LostWordsError: some of the statistics are not there, and it tells of no error.
        TargetError: they are not there because of an error; it ends with 0 after many of its own.
        InputError: it compared, and a figure that decides is NaN or infinite.
    """
    found = {}
    for name, (words, unit, scale) in _FIGURES.items():
        match = re.search(rf"^\s*{words}\s*:\s*(\S+?)%?\s*(?:±\s*(\S+))?(?:\s*%)?\s*$", output, re.MULTILINE)
        if match is None:
            words, failed = _last_words(output)
            kind = TargetError if failed else LostWordsError
            raise kind(f"llama-perplexity printed no {name}: {words}", _NOT_PRINTED)
        value, se = _number(match[1], scale), _number(match[2], scale)
        if se == 0 and name in _PRECISE:  # a gate would take it for certain
            se = _PRINTED
        if value is not None:
            found[name] = Measurement(name, value, unit, positions, se)
        elif name in _DECIDING:
            raise InputError(f"llama-perplexity printed {match[1]} as {name}", "the artifact is damaged")
        else:
            found[name] = Measurement.missing(name, unit, f"llama-perplexity printed {match[1]}")
    return found


def _number(words: str | None, scale: float) -> float | None:
    """A finite number in our unit, or None; words that are none are the caller's to refuse."""
    try:
        value = float(words) * scale if words else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _last_words(output: str) -> tuple[str, bool]:
    """The last line that tells an error, or the last one; and whether it tells an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marks = ("failed", "error", "inconsistent", "does not look like")
    told = next((line for line in reversed(lines) if any(m in line for m in marks)), None)
    return told or (lines[-1] if lines else "nothing"), told is not None
