"""How the figures were made, and what they do not say: only of the figures that the page shows."""

from __future__ import annotations

__all__ = ["method_section"]

from collections.abc import Iterable, Sequence

from phi4edge.report.compare import Comparison, SpeedGroup
from phi4edge.report.documents import Quantization
from phi4edge.report.numbers import plain
from phi4edge.report.page import Block, Heading, Items, Section

Statement = tuple[str, str]  # the words that lead in, and the rest

_ONE_TEXT = (
    "One text.",
    """Drift depends on the text: prose, code, mathematics and other languages lose differently from the same
    rounding, and text like the calibration text loses least. A small difference here may turn round elsewhere.""",
)
_NO_ANSWERS = (
    "Not the quality of answers.",
    """Nothing was generated for these figures and no answer was scored. PPL and the agreement of single tokens can look
    alike for models that differ in long generated answers; a PPL below the reference's is not a better model.""",
)
_INDEPENDENCE = (
    "Errors assume independence.",
    """The standard errors over positions treat positions as independent, which neighbours in a text are not: they are
    somewhat too small. Ratios whose error is paired over chunks do not rest on that.""",
)
_KLD = (
    "KLD.",
    """Kullback–Leibler divergence Σ p ln(p/q) over the whole vocabulary, in nat; mean, quantiles and maximum are over
    scored positions. Zero means the same distribution.""",
)
_TOKENS = (
    "PPL, same top-1, Δp.",
    """PPL is exp of the mean −ln q of the token that follows. Same top-1 is the share of positions where both find the
    same token most likely. Δp is q − p of the token that follows; its root mean square is over positions.""",
)
_RATIO = (
    "KLD ÷ baseline.",
    """Ratio of two mean KLDs. Both artifacts read the same chunks, so the error of the ratio r is taken from the
    differences a − r·b of the chunks (delta method) wherever both results hold a KLD for each chunk.""",
)
_SPEED = (
    "Prefill and decode.",
    """Prefill is prompt tokens divided by the time to process them; decode is generated tokens divided by the time to
    generate them one at a time, from an empty cache. Tokenization, sampling, loading and warm-up are not in them. TTFT
    is the time until the first token's logits, TPOT that of each further token. Peak RSS is the largest resident set of
    the process that ran.""",
)
_ONE_MACHINE = (
    "One machine, one state.",
    """Speeds hold for the device, runtime, threads and lengths named with them. Longer contexts decode more slowly, hot
    devices throttle, and a busy machine slows everything: look at the scatter of the dots.""",
)
_RUNS = (
    "Quantization.",
    """Figures of a run are as its manifest holds them. Held-out errors are output errors on calibration samples that no
    Hessian has seen: other samples of the same corpus, so they are no measure of drift on another text.""",
)
_PAGE = (
    "This page.",
    """Everything on it is computed from the files listed above; raw samples and values per chunk are in report.json.
    Artifacts are joined by SHA-256. Figures have three or four significant digits, their errors end at the same decimal
    place. What was not measured says so, with the reason; what is estimated carries that word.""",
)


def method_section(
    comparisons: Sequence[Comparison], speeds: Sequence[SpeedGroup], runs: Sequence[Quantization]
) -> Section:
    """Definitions of the figures that are shown, and the limits of what they say."""
    made = [*_drift(comparisons), *([_SPEED] if speeds else []), *([_RUNS] if runs else []), _PAGE]
    silent = [*([_ONE_TEXT, _NO_ANSWERS, _INDEPENDENCE] if comparisons else []), *([_ONE_MACHINE] if speeds else [])]
    blocks: list[Block] = [_items(made)]
    if silent:
        blocks += [Heading("What they do not say"), _items(silent)]
    return Section("How these figures were made", tuple(blocks))


def _items(statements: Iterable[Statement]) -> Items:
    return Items(tuple((lead, " ".join(text.split())) for lead, text in statements))


def _drift(comparisons: Sequence[Comparison]) -> Iterable[Statement]:
    if not comparisons:
        return
    text, scored = comparisons[0].condition.text, ""
    if len(comparisons) == 1 and text.positions and text.chunks and text.positions % text.chunks == 0:
        scored = f" ({text.positions // text.chunks} of the {text.context} positions of a chunk are scored)"
    yield (
        "Drift.",
        f"""The artifact and the full-precision model read the same tokens in chunks{scored}; at each scored position
        their distributions of the next token, q for the artifact and p for full precision, are compared.""",
    )
    yield _KLD
    yield _TOKENS
    if any(comparison.baseline for comparison in comparisons):
        yield _RATIO
    floors = [floor for c in comparisons if (floor := c.condition.reference.noise_floor_kld)]
    if floors:
        listed = ", ".join(plain(floor) for floor in dict.fromkeys(floors))
        yield (
            "Noise floor.",
            f"""Stored full-precision logits are rounded. The KLD of the full-precision model against its own stored
            logits is the least that can be told from zero: here {listed} nat.""",
        )
