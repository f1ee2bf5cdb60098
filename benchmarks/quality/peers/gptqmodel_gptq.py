"""GPTQModel's GPTQ, as shipped: its defaults but for the grid."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with more, workers starve each other on two cores

import json
import tempfile
from pathlib import Path

import torch
from dequantized import Watch, load_chunks, parse_arguments, write_checkpoint
from gptqmodel import GPTQModel, QuantizeConfig
from packed_gptq import read_gptq


def main() -> None:
    """Quantize, save as GPTQModel saves, read that back."""
    a = parse_arguments(__doc__)
    tokens = load_chunks(a.chunks, a.samples)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch()
        config = QuantizeConfig(bits=a.scheme.bits, group_size=a.scheme.group_size, sym=a.scheme.symmetric)
        model = GPTQModel.load(str(a.model), config, device="cpu")
        model.quantize(samples, batch_size=1)
        model.save(scratch)
        facts = {"method": "GPTQ", "samples": len(tokens), "cost": watch.stop()}
        saved = json.loads(Path(scratch, "quantize_config.json").read_text())
        if saved["checkpoint_format"] != "gptq":
            raise SystemExit(f"checkpoint_format {saved['checkpoint_format']!r}: read here is 'gptq' (v1)")
        linears, others = read_gptq(Path(scratch), a.scheme)
        facts["settings"] = {"act_group_aware": saved["meta"]["act_group_aware"], "desc_act": saved["desc_act"]}
        facts["settings"]["damp_percent"] = saved["meta"]["damp_percent"]
        packages = ("gptqmodel", "torch", "transformers")
        print(json.dumps(write_checkpoint(a.model, a.out, linears, others, a.scheme, facts, packages), indent=2))


if __name__ == "__main__":
    main()
