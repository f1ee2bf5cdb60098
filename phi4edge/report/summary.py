"""The paragraph at the top, every word of it computed: which artifact, how much drift, against what, how sure."""

from __future__ import annotations

__all__ = ["headline", "summarize"]

from collections.abc import Iterable, Sequence

from phi4edge.core.errors import GateError
from phi4edge.report.compare import Comparison, Row, SpeedGroup
from phi4edge.report.documents import Failure, GreedyText, Quantization, TaskScore
from phi4edge.report.fields import Metric
from phi4edge.report.numbers import mebibytes, with_error

SAME_SIZE = 1.02  # an artifact up to 2 % larger than the baseline counts as of its size


def headline(comparison: Comparison) -> Row | None:
    """The artifact to speak of: lowest mean KLD among those no larger than the baseline; without one, of all."""
    rows = [row for row in comparison.rows if row.kld is not None and row is not comparison.baseline]
    base = comparison.baseline
    if base is not None and base.artifact.bytes:
        limit = base.artifact.bytes * SAME_SIZE
        rows = [row for row in rows if row.artifact.bytes and row.artifact.bytes <= limit] or rows
    return min(rows, key=lambda row: row.kld or 0.0, default=None)


def summarize(
    comparisons: Sequence[Comparison],
    speeds: Sequence[SpeedGroup],
    quantizations: Sequence[Quantization],
    failures: Sequence[Failure],
    scores: Sequence[TaskScore] = (),
    greedy: Sequence[GreedyText] = (),
) -> str:
    """The summary paragraph; of what was not measured it says so or nothing."""
    sentences: list[str] = []
    if comparisons:
        sentences += _drift_sentences(comparisons)
    sentences += _task_sentences(scores)
    sentences += _greedy_sentences(greedy)
    if (scores or greedy) and not comparisons:
        sentences.append("Perplexity and KLD were not measured.")
    sentences += _speed_sentences(comparisons, speeds)
    for run in quantizations:
        fallen = sum(linear.method != run.method for linear in run.linears)
        if fallen:
            sentences.append(
                f"In run {run.run}, {fallen} of {len(run.linears)} linears did not take {run.method}'s weights "
                "(see Quantization)."
            )
    gates = [gate for comparison in comparisons for row in comparison.rows for gate in row.gates]
    gates += [gate for score in scores for gate in score.gates]
    verdicts = [verdict for gate in gates if isinstance(verdict := gate.get("passed", gate.get("ok")), bool)]
    if verdicts:
        failed, plural = verdicts.count(False), "s" if len(verdicts) > 1 else ""
        missed = f"{failed} of {len(verdicts)} gate{plural} {'was' if failed == 1 else 'were'} missed."
        sentences.append(missed if failed else "All gates were kept." if plural else "The gate was kept.")
    failures = [failure for failure in failures if failure.code != GateError.exit_code]  # told by the gates
    if failures:
        commands = ", ".join(f"{failure.command} ({failure.file})" for failure in failures)
        sentences.append(f"{len(failures)} command{'s' if len(failures) > 1 else ''} ended in an error: {commands}.")
    return " ".join(sentences) or "The results hold no measurement."


def _value(metric: Metric, unit: str = "") -> str:
    assert metric.value is not None
    return with_error(metric.value, metric.se) + (f" {unit}" if unit else "")


def _drift_sentences(comparisons: Sequence[Comparison]) -> Iterable[str]:
    comparison = comparisons[0]
    reference, text = comparison.condition.reference, comparison.condition.text
    extent = f"{text.positions:,} positions of {text.name}" if text.positions else text.name
    count = len({row.artifact.sha256 for row in comparison.rows})
    artifacts = f"{count} artifact{'s were' if count > 1 else ' was'} compared with"
    yield f"{artifacts} {reference.model} at full precision over {extent}."
    if len(comparisons) > 1:
        yield f"({len(comparisons) - 1} further condition{'s' if len(comparisons) > 2 else ''} apart, below.)"
    row, base = headline(comparison), comparison.baseline
    if row is None:
        return
    size = f" at {mebibytes(row.artifact.bytes)} MiB" if row.artifact.bytes else ""
    kld = _value(row.metrics["kld"], "nat")
    if base is None:
        drifts = "drifts least, with" if count > 1 else "has"
        yield f"{row.label}{size} {drifts} a mean KLD of {kld}{_agreement(row, None)}."
        sized = [r for r in comparison.rows if r.artifact.bytes and r.kld is not None]
        smallest = min(sized, key=lambda r: r.artifact.bytes or 0, default=row)
        if smallest is not row and smallest.artifact.bytes:
            small = mebibytes(smallest.artifact.bytes)
            yield f"The smallest, {smallest.label} at {small} MiB, has {_value(smallest.metrics['kld'], 'nat')}."
        return
    if row.ratio is None or row.ratio.value is None:
        why = row.ratio.method if row.ratio else "no baseline"
        yield f"{row.label}{size} has a mean KLD of {kld}; no ratio to {base.label} ({why})."
        return
    sizes = [r.artifact.bytes for r in (row, base)]
    bounded = sizes[0] is not None and sizes[1] is not None and sizes[0] <= sizes[1] * SAME_SIZE
    among = "Of those no larger than the baseline" if bounded else "Of the others"
    times = with_error(row.ratio.value, row.ratio.se)
    against = f" against {mebibytes(sizes[1])} MiB" if size and sizes[1] else ""
    yield (
        f"{among}, {row.label} drifts least: its mean KLD of {kld} is {times} times that of {base.label} "
        f"({_value(base.metrics['kld'], 'nat')}; error of the ratio {row.ratio.method}){size}{against}"
        f"{_agreement(row, base)}."
    )


def _task_sentences(scores: Sequence[TaskScore]) -> Iterable[str]:
    """How many answers changed, over whole tasks; their parts are in these."""
    whole = [score for score in scores if " " not in score.task]
    if not whole:
        return
    count = len({score.artifact.sha256 for score in whole})
    tasks = ", ".join(dict.fromkeys(score.task for score in whole))
    lost, gained, asked = (sum(values) for values in zip(*((s.lost, s.gained, s.n) for s in whole), strict=True))
    answered = f"{count} artifact{'s' if count > 1 else ''} and full precision answered the same questions of {tasks}"
    yield f"{answered}: of {asked:,} pairs {lost} were right in full precision alone, {gained} in the artifact alone."
    worst = min(whole, key=lambda score: score.difference)
    points = f"{100 * worst.difference:+.1f} [{100 * worst.low:+.1f}, {100 * worst.high:+.1f}]".replace("-", "\u2212")
    yield f"The {'lowest' if len(whole) > 1 else 'only'} difference in accuracy is {points} points, in {worst.task}."


def _greedy_sentences(greedy: Sequence[GreedyText]) -> Iterable[str]:
    for text in greedy:
        found, least = text.greedy, "at least " if text.greedy.at_least else ""
        low, high = found.median_interval
        yield (
            f"Greedy texts of {text.artifact.name} part from full precision's after {least}{found.median:g} "
            f"tokens (median of {found.prompts} prompts, 95 % {low:g} to {high:g}); {100 * found.identical:.0f} % of "
            f"them keep all {found.tokens} tokens."
        )


def _agreement(row: Row, base: Row | None) -> str:
    ours = row.metric("same_top_p").percent()
    if ours.value is None:
        return ""
    text = f"; its most likely token is that of full precision at {_value(ours)} % of positions"
    theirs = base.metric("same_top_p").percent() if base is not None else Metric.missing("")
    return f"{text}, the baseline's at {_value(theirs)} %" if theirs.value is not None else text


def _speed_sentences(comparisons: Sequence[Comparison], speeds: Sequence[SpeedGroup]) -> Iterable[str]:
    if not speeds:
        return
    group = speeds[0]
    measured = [row for row in group.rows if row.metric("decode_tps").value is not None]
    row = headline(comparisons[0]) if comparisons else None
    base = comparisons[0].baseline if comparisons else None
    ours = next((r for r in measured if row is not None and r.artifact.sha256 == row.artifact.sha256), None)
    theirs = next((r for r in measured if base is not None and r.artifact.sha256 == base.artifact.sha256), None)
    if ours is not None:
        text = f"It decodes at {_value(ours.metric('decode_tps'), 'tok/s')}"
        if theirs is not None and theirs is not ours:
            text += f", the baseline at {_value(theirs.metric('decode_tps'), 'tok/s')}"
        yield f"{text} ({group.place})."
    elif measured:
        fastest = max(measured, key=lambda r: r.metric("decode_tps").value or 0.0)
        yield f"{fastest.label} decodes fastest, at {_value(fastest.metric('decode_tps'), 'tok/s')} ({group.place})."
    doubtful = [f"{row.label} on {each.target}" for each in speeds for row in each.rows if row.implausible]
    if doubtful:
        yield f"Above the roofline, and so not plausible: the decode speed of {', '.join(doubtful)} (see Speed)."
