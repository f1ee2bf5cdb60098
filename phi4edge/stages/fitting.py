"""Does a run's artifact fit a target? Asked before anything is written."""

from __future__ import annotations

__all__ = ["check_run_fits"]

from pathlib import Path

from phi4edge.checkpoint.config import load_config
from phi4edge.core.errors import TargetError
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages.inputs import LOCATION
from phi4edge.stages.run_reader import read_json, read_manifest
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.choice import process_bytes, refusal
from phi4edge.targets.fit import Request, memory_needed


def check_run_fits(
    run: Path,
    target: str,
    *,
    format_name: str,
    context: int | None,
    head: str | None,
    embedding: str | None,
    model: str | None,
) -> int:
    """The context that was held against ``target``: ``context``, or the target's default.

    Finished run ``run`` as a ``format_name`` artifact is held against the target's memory.

    Raises:
        UsageError: no such target.
        TargetError: weights, KV cache at ``context`` and buffers exceed what the target can give.
    """
    manifest = read_manifest(run)["data"]
    folder = model or str(read_json(run / LOCATION)["folder"])
    config = load_config(Path(folder))
    profile = open_catalog().profile(target)
    asked = context or min(profile.default_context, config.context_length)
    tables = [kind or manifest["tables"].get(role, "q8_0") for role, kind in (("head", head), ("embedding", embedding))]
    option = next((option for option in profile.runtimes if format_name in option.formats), None)
    if option is None:
        runs = ", ".join(sorted({name for option in profile.runtimes for name in option.formats}))
        raise TargetError(f"{target} runs no {format_name}", f"formats that it runs: {runs}")
    kv = "f16" if "f16" in option.kv_types else option.kv_types[0]
    request = Request(parse_scheme(manifest["scheme"]), asked, format_name, kv, *tables)
    fit = memory_needed(config, request, usable_bytes=profile.usable_bytes, process_bytes=process_bytes(option))
    if not fit.fits:
        raise refusal(manifest["model"], config, profile, option, fit)
    return asked
