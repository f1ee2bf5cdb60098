"""Token chunks made elsewhere: a corpus that is tokens already, so that several tools calibrate on the same ones.

The file is safetensors with a tensor ``tokens`` [samples, length] int64. Its metadata may have ``domains``, a JSON
list of the samples' domains; where it has none, all are of one domain that has the file's name.
"""

from __future__ import annotations

__all__ = ["SUFFIX", "read_chunks"]

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi4edge.core.errors import InputError

SUFFIX = ".safetensors"
_TENSOR = "tokens"


def read_chunks(
    path: Path, *, samples: int | None, sequence_length: int, vocab_size: int
) -> list[tuple[str, list[int]]]:
    """Domain and token ids of the first ``samples`` chunks in ``path``, in their order; None takes all.

    Raises:
        InputError: no such file, another layout or length, fewer chunks than asked, or ids outside the vocabulary.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", f"give a safetensors file with a tensor {_TENSOR!r}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tokens: Tensor | None = file.get_tensor(_TENSOR) if _TENSOR in names else None
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    if tokens is None:
        raise InputError(f"{path}: has no tensor {_TENSOR!r}, only {', '.join(names) or 'none at all'}")
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        kind = str(tokens.dtype).removeprefix("torch.")
        raise InputError(f"{path}: {_TENSOR} is {kind} {list(tokens.shape)}, expected int64 [samples, length]")
    have, length = tokens.shape
    if length != sequence_length:
        raise InputError(
            f"{path}: has chunks of {length} tokens, the sequence length is {sequence_length}",
            f"give --sequence-length {length}",
        )
    samples = have if samples is None else samples
    if have < samples:
        raise InputError(f"{path}: has {have} chunks, {samples} samples are asked for", f"give --samples {have}")
    tokens = tokens[:samples]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{path}: holds token id {low if low < 0 else high}, the vocabulary has {vocab_size}",
            "make the chunks with this model's tokenizer",
        )
    return list(zip(_domains(path, metadata, have)[:samples], tokens.tolist(), strict=True))


def _domains(path: Path, metadata: dict[str, str], count: int) -> list[str]:
    if "domains" not in metadata:
        return [path.stem] * count
    try:
        domains = json.loads(metadata["domains"])
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: domains is not valid JSON ({error.msg})") from error
    if not isinstance(domains, list) or not all(isinstance(d, str) for d in domains) or len(domains) != count:
        raise InputError(f"{path}: domains is not a list of {count} names, one a chunk")
    return domains
