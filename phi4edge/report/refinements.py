"""What a run did beside solving linears: the types it chose, and what learning gained on held-out samples."""

from __future__ import annotations

__all__ = ["mix_block", "rounding_block", "tuning_block"]

from collections.abc import Sequence
from statistics import median

from phi4edge.report.documents import LearnedBlock, Mix, Tuning
from phi4edge.report.numbers import mebibytes, plain, with_error
from phi4edge.report.page import ABSENT, Block, Cell, Column, Paragraph, Table


def rounding_block(blocks: Sequence[LearnedBlock]) -> Block:
    """What became of the error of the blocks' outputs."""
    ratios = [block.after / block.before for block in blocks if block.before > 0]
    helped = sum(block.after < block.before for block in blocks)
    moved = [block.codes_moved for block in blocks]
    said = f"Rounding was learned on what full precision puts out of each block, and kept in {helped} of {len(blocks)}."
    if ratios:
        said += (
            f" Error of a block's outputs on samples kept aside, after ÷ before: median {plain(median(ratios))}, "
            f"from {plain(min(ratios))} to {plain(max(ratios))}. Codes that turned: {100 * min(moved):.2f} to "
            f"{100 * max(moved):.2f} %."
        )
    return Paragraph(said)


def tuning_block(tuning: Tuning) -> Block:
    """Held-out KLD of every domain before and after."""
    columns = (
        Column("Held-out domain", numeric=False),
        Column("Samples"),
        Column("KLD before", "nat"),
        Column("KLD after", "nat"),
        Column("After ÷ before"),
    )
    rows = []
    for name, before in tuning.before.items():
        after = tuning.after.get(name)
        ratio = after.kld / before.kld if after is not None and before.kld > 0 else None
        rows.append(
            (
                Cell(name),
                Cell(str(before.samples)),
                Cell(with_error(before.kld, before.se)),
                Cell(with_error(after.kld, after.se)) if after is not None else ABSENT,
                Cell(plain(ratio)) if ratio is not None else ABSENT,
            )
        )
    what = "scales, minima, norm gains and codes" if tuning.codes else "scales, minima and norm gains; codes stayed"
    halved = f", with its changes divided by {2**tuning.kept_halvings}," if tuning.kept_halvings else ""
    caption = (
        f"Tuning on KLD to full precision: {what}. {tuning.steps} steps, "
        f"the state after step {tuning.kept_step}{halved} was kept; "
        "mean KLD on calibration samples that no step has seen, all positions, by the torch forward."
    )
    return Table(columns, tuple(rows), caption)


def mix_block(mix: Mix) -> Block:
    """How many tensors have which type."""
    counts: dict[str, int] = {}
    for kind in mix.types.values():
        counts[kind] = counts.get(kind, 0) + 1
    rows = [(Cell(kind), Cell(str(count)), Cell("linears")) for kind, count in sorted(counts.items())]
    rows += [(Cell(kind), Cell("1"), Cell(role)) for role, kind in mix.tables.items()]
    columns = (Column("Type", numeric=False), Column("Tensors"), Column("Of", numeric=False))
    caption = (
        f"The chosen mix: {mebibytes(mix.nbytes)} MiB of tensors, {plain(mix.bits_per_weight)} bits a parameter. "
        f"KLD that its rounding alone was predicted to cost: {plain(mix.predicted_kld)} nat (estimated)."
    )
    return Table(columns, tuple(rows), caption)
