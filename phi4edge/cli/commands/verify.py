"""``phi4edge verify ARTIFACT``."""

from __future__ import annotations

from pathlib import Path

import click

from phi4edge.cli.options import common
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit


@click.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Run directory that the artifact was exported from.")
@click.option("--model", help="Where the run's checkpoint lies now, if it was moved.")
@common
def command(artifact: Path, against: Path | None, model: str | None, as_json: bool, verbose: int, quiet: bool) -> None:
    """Read every tensor of ARTIFACT back, and hold its files against their SHA-256 (exit 8).

    With --against, every tensor is compared with the run's, bit for bit, and the first that differs is named.
    """
    from phi4edge.stages.verify import verify

    result = verify(artifact, against, model=model, progress=progress_for(quiet))
    data = {
        "artifact": str(result.path),
        "format": result.format,
        "tensors": result.tensors,
        "tensors_compared": result.compared,
        "linears_compared": result.linears,
        "hashes_checked": result.hashes,
        "against": str(result.against) if result.against else None,
    }
    text = f"{artifact}: {result.tensors} tensors read"
    if result.against is not None:
        text += f", all equal to {result.against} bit for bit, {result.linears} linears in their codes"
    else:
        text += "; nothing to compare with (give --against RUN)"
    text += "; files are as their SHA-256 say" if result.hashes else "; no list of hashes lies with it"
    emit("verify", data, text, as_json=as_json)
