"""What the commands that measure share: options of the runtime, and where the document goes."""

from __future__ import annotations

__all__ = ["checked_out", "kv_type_for", "plus_minus", "runtime_options", "table"]

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from phi4edge.core import registry
from phi4edge.core.errors import UsageError
from phi4edge.runtimes._api import FLASH_ATTENTION, KV_TYPES

F = TypeVar("F", bound=Callable[..., Any])


def runtime_options(function: F) -> F:
    """``--runtime``, ``--threads``, ``--flash-attention``, ``--kv`` and ``--out``.

    The command receives ``runtime: str | None``, ``threads: int | None``, ``flash_attention: str``,
    ``kv: str | None`` and ``out: Path | None``.
    """
    for decorator in (
        click.option(
            "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the document of --json here too."
        ),
        click.option(
            "--kv", type=click.Choice(KV_TYPES), help="Type of the KV cache.  [default: f16, in ONNX f32]"
        ),
        click.option(
            "--flash-attention", type=click.Choice(FLASH_ATTENTION), default="auto", show_default=True,
            help="As llama.cpp's -fa; what auto came to stands in the result.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), envvar="PHI4EDGE_THREADS", metavar="N",
            help="Threads that compute.  [default: physical cores]",
        ),
        click.option(
            "--runtime", type=click.Choice(registry.names("phi4edge.runtimes")),
            help="Where ARTIFACT runs.  [default: llama_cpp for GGUF, onnxruntime_genai for ONNX, else torch_ref]",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


def kv_type_for(artifact: Path, runtime: str | None, asked: str | None) -> str:
    """The type of the KV cache that was asked for, or else the runtime's own."""
    from phi4edge.measurement.artifact import default_runtime
    from phi4edge.runtimes._api import default_settings

    return asked or default_settings(runtime or default_runtime(artifact)).kv_type


def checked_out(out: Path | None) -> None:
    """Refuse an --out that could not be written, before hours are spent.

    Raises:
        UsageError: a folder, or a place whose parent cannot be made.
    """
    if out is None:
        return
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a .json file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {out.parent} cannot be made ({error.strerror})") from error


def plus_minus(metric: Mapping[str, Any], spec: str, scale: float = 1.0) -> tuple[str, str]:
    """A metric's value and its ± as text; "not measured" and the reason where there is none.

    ``spec`` is a format, or "kld": six decimals as llama-perplexity prints them, and exponents where those say nothing.
    """
    if metric["value"] is None:
        return "not measured", metric["reason"]
    value, error = metric["value"] * scale, metric["se"]
    if spec == "kld":
        spec = ".6f" if abs(value) >= 1e-4 else ".2e"
    return format(value, spec), "" if error is None else f"± {error * scale:{spec}}"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Rows under ``head``, the first column flush left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
