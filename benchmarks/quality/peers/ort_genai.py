"""ONNX Runtime GenAI's int4 weights: its own model builder, MatMulNBits read back. Data-free: no chunk is used."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from dequantized import Grid, Watch, parse_arguments, write_checkpoint
from onnx import numpy_helper
from torch import Tensor

BLOCK = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul")


def options(parser: argparse.ArgumentParser) -> None:
    """What only this peer has."""
    parser.add_argument("--algorithm", choices=("rtn", "k_quant"), required=True)


def build(model: Path, out: Path, algorithm: str, grid: Grid) -> None:
    """Run the builder; the head stays in full precision."""
    extra = [f"algo_config={algorithm}", f"block_size={grid.group_size}", "nodes_to_exclude=/lm_head/MatMul"]
    extra.append(f"is_symmetric={str(grid.symmetric).lower()}")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    command += ["-p", f"int{grid.bits}", "-e", "cpu", "-c", str(out / "cache"), "--extra_options", *extra]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit("the model builder failed; its messages are above")


def nibbles(packed: Tensor) -> Tensor:
    """[..., bytes] uint8 to [..., 2 · bytes], the low half first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def dequantized(folder: Path, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """(linear as the graph names it, s · (q − z) [out, in] float32) for every MatMulNBits of the graph.

    B [out, blocks, bytes] uint8; scales [out · blocks]; zero_points [out · ⌈blocks/2⌉] uint8, 8 where there are none.
    """
    graph = onnx.load(str(folder / "model.onnx")).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in (n for n in graph.node if n.op_type == "MatMulNBits"):
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        if facts["bits"] != 4 or facts["block_size"] != grid.group_size:
            raise SystemExit(f"{node.name}: {facts['bits']} bits in blocks of {facts['block_size']}, asked {grid.name}")
        out, blocks = facts["N"], -(-facts["K"] // facts["block_size"])
        packed, scales, *zeros = (
            torch.from_numpy(numpy_helper.to_array(values[n]).copy()) for n in node.input[1:4] if n
        )
        codes = nibbles(packed.reshape(out, blocks, -1)).float()
        zero = nibbles(zeros[0].reshape(out, -1))[:, :blocks].float() if zeros else torch.full((out, blocks), 8.0)
        weight = scales.float().reshape(out, blocks, 1) * (codes - zero.unsqueeze(-1))
        yield node.input[1], weight.reshape(out, -1)[:, : facts["K"]]


def main() -> None:
    """Build, read the graph back, fuse what the builder split."""
    a = parse_arguments(__doc__, options)
    parts: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch()
        build(a.model, Path(scratch), a.algorithm, a.scheme)
        facts = {"method": f"{a.algorithm}, data-free", "samples": 0, "cost": watch.stop()}
        for name, weight in dequantized(Path(scratch), a.scheme):
            match = BLOCK.match(name)
            if match is None:
                raise SystemExit(f"{name}: quantized, and not a linear of a block")
            module = "self_attn" if match[2] == "attn" else "mlp"
            parts[f"model.layers.{match[1]}.{module}.{match[3]}"] = weight
    for fused, pieces in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for first in [name for name in parts if name.endswith(f".{pieces[0]}")]:
            module = first.removesuffix(f".{pieces[0]}")
            parts[f"{module}.{fused}"] = torch.cat([parts.pop(f"{module}.{piece}") for piece in pieces])
    packages = ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
    print(json.dumps(write_checkpoint(a.model, a.out, parts, {}, a.scheme, facts, packages), indent=2))


if __name__ == "__main__":
    main()
