"""``phi4edge inspect MODEL``."""

from __future__ import annotations

from typing import Any

import click

from phi4edge.checkpoint.hub import resolve_model
from phi4edge.checkpoint.index import CheckpointIndex, open_index
from phi4edge.cli.options import common
from phi4edge.cli.render import emit, table
from phi4edge.core.memory import format_bytes


def _describe(index: CheckpointIndex) -> dict[str, Any]:
    config, rope = index.config, index.config.rope
    dtypes: dict[str, int] = {}
    for ref in index.tensors.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    return {
        "folder": str(index.folder),
        "family": config.family,
        "architecture": "Phi3ForCausalLM",
        "parameters": config.parameters,
        "linear_parameters": config.linear_parameters,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "context_length": config.context_length,
        "rope": {
            "type": "longrope" if rope.is_longrope else "default",
            "theta": rope.theta,
            "rotated_channels": rope.dim,
            "original_context": rope.original_context,
            "attention_factor": rope.attention_factor,
        },
        "linears": {name: list(shape) for name, shape in config.linear_shapes.items()},
        "dtype_bytes": dtypes,
        "block_bytes": index.block_bytes(0),
        "total_bytes": index.nbytes,
        "kv_bytes_per_token_f16": int(config.kv_bytes_per_token()),
        "shards": [{"file": path.name, "bytes": path.stat().st_size} for path in index.shards],
    }


def _text(data: dict[str, Any]) -> str:
    rope = data["rope"]
    rope_text = f"{rope['type']}, theta {rope['theta']:g}, {rope['rotated_channels']} of {data['head_dim']} channels"
    if rope["original_context"]:
        rope_text += f", original context {rope['original_context']}, attention factor {rope['attention_factor']:.6f}"
    heads = f"{data['num_heads']} query, {data['num_kv_heads']} key/value, {data['head_dim']} channels each"
    rows = [
        ("family", data["family"]),
        ("parameters", f"{data['parameters']:,} ({data['linear_parameters']:,} in linears that are quantized)"),
        ("blocks", f"{data['num_layers']} of {format_bytes(data['block_bytes'])}"),
        ("hidden / intermediate", f"{data['hidden_size']} / {data['intermediate_size']}"),
        ("heads", heads),
        ("vocabulary", f"{data['vocab_size']:,}, head {'tied' if data['tie_word_embeddings'] else 'of its own'}"),
        (
            "context",
            f"{data['context_length']:,} tokens; KV cache {data['kv_bytes_per_token_f16']:,} bytes a token (f16)",
        ),
        ("rope", rope_text),
        ("dtypes", ", ".join(f"{k} {format_bytes(v)}" for k, v in data["dtype_bytes"].items())),
        ("files", f"{len(data['shards'])} safetensors, {format_bytes(data['total_bytes'])} of weights"),
    ]
    linears = table(
        ["linear of a block", "out", "in", "parameters"],
        [(n, str(o), str(i), f"{o * i:,}") for n, (o, i) in data["linears"].items()],
        numeric=(1, 2, 3),
    )
    return "\n".join(f"{k:<22} {v}" for k, v in rows) + "\n\n" + linears


@click.command("inspect")
@click.argument("model")
@common
def command(model: str, as_json: bool, verbose: int, quiet: bool) -> None:
    """Show family, shapes, dtypes and bytes of MODEL (a folder or hub id) without reading a weight."""
    data = _describe(open_index(resolve_model(model)))
    emit("inspect", data, _text(data), as_json=as_json)
