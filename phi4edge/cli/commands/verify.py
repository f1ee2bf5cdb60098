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
    """Read every tensor of ARTIFACT back; with --against, compare its codes with the run's, bit for bit (exit 8)."""
    from phi4edge.stages.export import verify

    result = verify(artifact, against, model=model, progress=progress_for(quiet))
    data = {
        "artifact": str(result.path),
        "format": result.format,
        "tensors": result.tensors,
        "linears_compared": result.linears,
        "against": str(result.against) if result.against else None,
    }
    text = f"{artifact}: {result.tensors} tensors read"
    if result.against is not None:
        text += f", {result.linears} linears equal to {result.against} bit for bit"
    else:
        text += "; nothing to compare with (give --against RUN)"
    emit("verify", data, text, as_json=as_json)
