"""AutoRound: ``--iters 200`` is its default, ``--iters 0`` its rounding to nearest on searched scales (opt-rtn)."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from dequantized import Watch, load_chunks, parse_arguments, source_tensors, write_checkpoint
from packed_gptq import read_gptq
from transformers import AutoModelForCausalLM, AutoTokenizer


def options(parser: argparse.ArgumentParser) -> None:
    """What only this peer has."""
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--blocks", type=int, help="tune only the first so many blocks: to time it, not to compare it")


def main() -> None:
    """Quantize, save in AutoGPTQ's format, read that back."""
    a = parse_arguments(__doc__, options)
    tokens = load_chunks(a.chunks, a.samples)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch()
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
        total = model.config.num_hidden_layers
        left = {} if a.blocks is None else {f"model.layers.{i}.": {"bits": 16} for i in range(a.blocks, total)}
        rounding = AutoRound(
            model,
            AutoTokenizer.from_pretrained(a.model),
            bits=a.scheme.bits,
            group_size=a.scheme.group_size,
            sym=a.scheme.symmetric,
            iters=a.iters,
            dataset=samples,
            nsamples=len(tokens),
            seqlen=tokens.shape[1],
            device_map="cpu",
            layer_config=left or None,
        )
        rounding.quantize_and_save(scratch, format="auto_gptq")
        facts = {"method": f"AutoRound iters {a.iters}", "samples": len(tokens), "cost": watch.stop()}
        folder = next(path.parent for path in sorted(Path(scratch).rglob("*.safetensors")))
        linears, others = read_gptq(folder, a.scheme)
        if a.blocks is not None:
            print(json.dumps({**facts, "blocks": a.blocks, "of": total}, indent=2))
            return
        source = source_tensors(a.model)  # it saves in float32 what it does not touch
        others = {name: t for name, t in others.items() if not torch.equal(t.float(), source[name].float())}
        packages = ("auto-round", "torch", "transformers")
        print(json.dumps(write_checkpoint(a.model, a.out, linears, others, a.scheme, facts, packages), indent=2))


if __name__ == "__main__":
    main()
