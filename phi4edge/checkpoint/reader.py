"""Reads tensors of a checkpoint by slice, as float32, never a whole file.

Plain positional reads, not a memory map: pages of a map count as resident until they are evicted,
and peak RSS is a promise here.
"""

from __future__ import annotations

__all__ = [
    "CheckpointReader",
    "check_values",
    "finite_values",
    "open_checkpoint",
    "read_tensor",
    "stored_dtype",
]

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.hub import resolve_model
from phi4edge.checkpoint.index import CheckpointIndex, TensorRef, open_index
from phi4edge.core.direct_io import read_range
from phi4edge.core.errors import InputError
from phi4edge.core.pagecache import let_go, outgrows_memory, will_need

_TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip


def stored_dtype(ref: TensorRef) -> torch.dtype:
    """The dtype that a tensor has in its file."""
    return _TORCH[ref.dtype]


def read_tensor(
    ref: TensorRef,
    rows: slice | None = None,
    *,
    around_cache: bool = False,
    into: NDArray[np.uint8] | None = None,
) -> Tensor:
    """The tensor (or the rows ``start:stop`` of it) that ``ref`` points at, in its stored dtype.

    ``around_cache`` and ``into`` are :func:`phi4edge.core.direct_io.read_range`'s.

    Raises:
        InputError: the file ends early or cannot be read.
    """
    offset, shape, nbytes = ref.offset, ref.shape, ref.nbytes
    if rows is not None:
        start, stop, _ = rows.indices(shape[0])
        row_bytes = ref.nbytes // max(shape[0], 1)
        offset, shape = offset + start * row_bytes, (max(stop - start, 0), *shape[1:])
        nbytes = shape[0] * row_bytes
    try:
        data = read_range(ref.path, offset, nbytes, around_cache=around_cache, into=into)
    except OSError as error:
        raise InputError(f"{ref.path}: cannot be read ({error.strerror})") from error
    if len(data) < nbytes:
        raise InputError(f"{ref.path}: {ref.name}: file ends {nbytes - len(data)} bytes early")
    return torch.from_numpy(data).view(_TORCH[ref.dtype]).reshape(shape)


def check_values(ref: TensorRef, values: Tensor, first: int = 0) -> None:
    """Hold values of the tensor that ``ref`` points at, from its ``first`` on, to be finite.

    Raises:
        InputError: one is NaN or Inf; how many, and where the first of them stands.
    """
    bad = ~torch.isfinite(values.reshape(-1))
    if not bool(bad.any()):
        return
    place = [int(i) for i in np.unravel_index(first + int(bad.to(torch.uint8).argmax()), ref.shape)]
    raise InputError(
        f"{ref.path.name}: {ref.name} holds {int(bad.sum())} value(s) that are NaN or Inf, the first at {place}",
        "the weights are damaged; download the shard again",
    )


def finite_values(ref: TensorRef, stored: Tensor, first_row: int = 0, out: Tensor | None = None) -> Tensor:
    """``stored``, rows of the tensor that ``ref`` points at from ``first_row`` on, in float32; ``out`` is room for it.

    Raises:
        InputError: a value is NaN or Inf.
    """
    values = stored.float() if out is None else out.copy_(stored)
    # A sum is finite only if all terms are (overflow of a float32 sum is re-examined).
    if not torch.isfinite(values.sum()):
        check_values(ref, values, first_row * math.prod(ref.shape[1:]))
    return values


@dataclass(frozen=True)
class CheckpointReader:
    """Weights of a checkpoint by name, float32, checked for NaN and Inf as they pass."""

    index: CheckpointIndex

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.index.config

    @property
    def head_name(self) -> str:
        """The tensor that the head multiplies with."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that tensor ``name`` has in its file."""
        return stored_dtype(self.index.tensors[name])

    def will_need(self, name: str) -> None:
        """Have the system read tensor ``name`` into its page cache meanwhile, where it can; takes no RAM of ours."""
        self._advise(will_need, name)

    def done_with(self, name: str) -> None:
        """Tensor ``name`` was read: where the checkpoint is larger than the memory, it makes room for others."""
        if self.outgrows_memory:
            self._advise(let_go, name)

    def _advise(self, advice: Callable[[int, int, int], None], name: str) -> None:
        ref = self.index.tensors.get(name)
        if ref is not None:
            with suppress(OSError), open(ref.path, "rb", buffering=0) as file:
                advice(file.fileno(), ref.offset, ref.nbytes)

    @cached_property
    def outgrows_memory(self) -> bool:
        """Whether the checkpoint would not stay in memory as it is read."""
        return outgrows_memory(self.index.nbytes)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor ``name`` (or rows of it) in float32.

        A whole one is read through the page cache, into which it may have been asked for (:meth:`will_need`); rows,
        for which nobody asked, around it where the checkpoint outgrows the memory.

        Raises:
            InputError: no such tensor, or a value in it that is not finite.
        """
        ref = self.place(name)
        stored = read_tensor(ref, rows, around_cache=rows is not None and self.outgrows_memory)
        return finite_values(ref, stored, 0 if rows is None else rows.start or 0)

    def place(self, name: str) -> TensorRef:
        """Where tensor ``name`` lies.

        Raises:
            InputError: no such tensor.
        """
        ref = self.index.tensors.get(name)
        if ref is None:
            raise InputError(f"{self.index.folder}: tensor {name} is missing")
        return ref


def open_checkpoint(model: str | Path) -> CheckpointReader:
    """Open a local folder, or a hub id where there is network, for reading."""
    return CheckpointReader(open_index(resolve_model(str(model))))
