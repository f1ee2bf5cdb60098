"""What every peer's script shares: the same arguments, the same chunks, and one kind of result.

A peer writes the source model again with its own weights, multiplied out in float32, under the source's names and
beside the source's config and tokenizer, so that all peers are measured by one forward pass. The head and the
embedding must be the source's. ``peer.json`` in the folder says what it cost and what was checked.

This file runs in the environments of the peers, which have torch and safetensors and nothing of phi4edge.
"""

from __future__ import annotations

__all__ = ["Grid", "Watch", "distinct_levels", "parse_arguments", "parse_scheme", "unpack_rows", "write_checkpoint"]

import argparse
import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
UNTOUCHED = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


@dataclass(frozen=True)
class Grid:
    """What a peer is asked to round to."""

    name: str
    bits: int
    group_size: int
    symmetric: bool


def parse_scheme(name: str) -> Grid:
    """``w4g64`` or ``w4g32-asym`` as phi4edge names them."""
    match = re.fullmatch(r"w(\d+)g(\d+)(-asym)?", name)
    if match is None:
        raise SystemExit(f"scheme {name!r}: peers know wBgN and wBgN-asym")
    return Grid(name, int(match[1]), int(match[2]), not match[3])


def parse_arguments(
    description: str | None, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """MODEL CHUNKS OUT --scheme, and what the peer adds through ``more``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("chunks", type=Path, help="safetensors with tokens [samples, length] int64")
    parser.add_argument("out", type=Path, help="folder to write; one that is there is replaced")
    parser.add_argument("--scheme", type=parse_scheme, required=True)
    parser.add_argument("--samples", type=int, help="only the first so many chunks; default: all")
    if more is not None:
        more(parser)
    return parser.parse_args()


@dataclass
class Watch:
    """Cost of a peer's own work: from making this until :meth:`stop`, child processes that ended included."""

    began: float = field(default_factory=time.perf_counter)
    cpu_began: float = field(default_factory=lambda: _usage()[0])

    def stop(self) -> dict[str, float | int]:
        """Seconds of the wall clock and of processors, and the largest resident set of the process so far."""
        cpu, peak = _usage()
        return {
            "wall_seconds": time.perf_counter() - self.began,
            "cpu_seconds": cpu - self.cpu_began,
            "peak_rss_bytes": peak,
        }


def _usage() -> tuple[float, int]:
    """Processor seconds of this process and its children, and the largest resident set of any of them."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(u.ru_utime + u.ru_stime for u in usages), max(u.ru_maxrss for u in usages) * unit


def load_chunks(path: Path, samples: int | None) -> Tensor:
    """[samples, length] int64; all that there are for None."""
    return load_file(path)["tokens"][:samples].contiguous()


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Codes from int32 words along the last dimension, lowest bits first: [..., words] to [..., words · 32/bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def distinct_levels(weight: Tensor, group_size: int) -> int:
    """The largest number of distinct values in any group of ``group_size`` columns of ``weight`` [out, in]."""
    ordered = weight.reshape(-1, group_size).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1


def source_tensors(model: Path) -> dict[str, Tensor]:
    """Every tensor of the source checkpoint, as stored."""
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_checkpoint(
    model: Path,
    out: Path,
    linears: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    grid: Grid,
    facts: Mapping[str, Any],
    packages: tuple[str, ...],
) -> dict[str, Any]:
    """Write the source with ``linears`` (name without ``.weight`` → float32 [out, in]) and what a peer changed else.

    ``others`` are the peer's float tensors by the source's names; where it has none, the source's stay. A linear of
    the source that is missing, has another shape or leaves the grid ends the program: such a result is not compared.
    """
    tensors, changed, worst = {}, [], 0
    for name, source in source_tensors(model).items():
        linear = name.removesuffix(".weight")
        if ".layers." in name and linear.split(".", 3)[3] in LINEARS:
            weight = linears[linear].float()
            if weight.shape != source.shape or not torch.isfinite(weight).all():
                raise SystemExit(f"{name}: {list(weight.shape)} with values {weight.abs().max()}, {list(source.shape)}")
            levels = distinct_levels(weight, grid.group_size)
            if levels > 1 << grid.bits:
                raise SystemExit(
                    f"{name}: {levels} levels in a group of {grid.group_size}, the grid has {1 << grid.bits}"
                )
            worst = max(worst, levels)
            tensors[name] = weight.contiguous()
            continue
        tensors[name] = others.get(name, source)
        if not torch.equal(tensors[name].float(), source.float()):
            changed.append(name)
    touched = [name for name in changed if name in UNTOUCHED]
    if touched:
        raise SystemExit(f"the peer changed {', '.join(touched)}, which the comparison leaves at full precision")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    report = {
        "scheme": grid.name,
        **facts,
        "versions": {name: version(name) for name in packages},
        "linears": len(linears),
        "most_levels_in_a_group": worst,
        "norms_changed": len(changed),
    }
    (partial / "peer.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return report
