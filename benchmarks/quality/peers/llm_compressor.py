"""llm-compressor's GPTQ and AWQ, as shipped: their defaults but for the grid."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from dequantized import Grid, Watch, load_chunks, parse_arguments, unpack_rows, write_checkpoint
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def options(parser: argparse.ArgumentParser) -> None:
    """What only this peer has."""
    parser.add_argument("--method", choices=("gptq", "awq"), required=True)


def modifiers(method: str, grid: Grid) -> list[Any]:
    """The recipe: every linear but the head."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group",
        "group_size": grid.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if not torch.cuda.is_available():
        # Its AWQ pins host memory for copies to a GPU; without one, torch refuses to.
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def dequantize(tensors: Mapping[str, Tensor], linear: str, grid: Grid) -> Tensor:
    """s · (q − z) of one linear from compressed-tensors' pack-quantized form, [out_features, in_features] float32.

    weight_packed [out, in/8] int32 holds q + 8; weight_zero_point [out/8, groups] likewise, packed along the rows.
    """
    half = 1 << (grid.bits - 1)
    rows, columns = tensors[f"{linear}.weight_shape"].tolist()
    codes = unpack_rows(tensors[f"{linear}.weight_packed"], grid.bits)[:, :columns] - half
    scales = tensors[f"{linear}.weight_scale"].float()  # [out, groups]
    zeros = torch.zeros_like(scales)
    if not grid.symmetric:
        packed = tensors[f"{linear}.weight_zero_point"]
        zeros = (unpack_rows(packed.t().contiguous(), grid.bits).t()[:rows] - half).float()
    groups = torch.arange(columns) // grid.group_size
    return scales[:, groups] * (codes.float() - zeros[:, groups])


def main() -> None:
    """Quantize, save compressed, read that back."""
    a = parse_arguments(__doc__, options)
    tokens = load_chunks(a.chunks, a.samples)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch()
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
        oneshot(
            model=model,
            dataset=data,
            recipe=modifiers(a.method, a.scheme),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
        )
        model.save_pretrained(scratch, save_compressed=True)
        facts = {"method": a.method.upper(), "samples": len(tokens), "cost": watch.stop()}
        tensors = {n: t for file in sorted(Path(scratch).glob("*.safetensors")) for n, t in load_file(file).items()}
        names = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
        linears = {name: dequantize(tensors, name, a.scheme) for name in names}
        others = {name: t for name, t in tensors.items() if name.endswith(".weight")}
        packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
        print(json.dumps(write_checkpoint(a.model, a.out, linears, others, a.scheme, facts, packages), indent=2))


if __name__ == "__main__":
    main()
