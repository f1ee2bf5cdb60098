"""``phi4edge runner fetch-web``: the WebAssembly runtime for ``--transport browser``."""

from __future__ import annotations

__all__ = ["fetch_web"]

from pathlib import Path

import click

from phi4edge.cli.options import common
from phi4edge.cli.render import emit
from phi4edge.transports._wllama import LICENCE, PACKAGE, VERSION, fetch


@click.command("fetch-web")
@click.option(
    "--from",
    "archive",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.tgz",
    help="The package's archive, from `npm pack`, instead of a download.",
)
@common
def fetch_web(archive: Path | None, as_json: bool, verbose: int, quiet: bool) -> None:
    """Fetch what runs a GGUF in a browser: llama.cpp as WebAssembly, by wllama, 4 MB, through npm.

    One version, known by its hash, kept in $XDG_CACHE_HOME/phi4edge/web with its licence (MIT). After that bench and
    drift --transport browser need no network but that between this machine and the device.
    """
    folder = fetch(archive)
    data = {"package": PACKAGE, "version": VERSION, "folder": str(folder), "licence": str(folder / LICENCE)}
    emit("runner", data, f"{PACKAGE} {VERSION}: {folder}\nlicence: {folder / LICENCE}", as_json=as_json)
