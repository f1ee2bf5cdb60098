"""A quantized weight matrix as every solver makes it and every writer takes it."""

from __future__ import annotations

__all__ = ["QuantizedLinear"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import Params, grid_for
from phi4edge.quant.packing import pack_nibbles, unpack_nibbles
from phi4edge.quant.scheme import Scheme


@dataclass(frozen=True)
class QuantizedLinear:
    """Integer codes of one weight matrix and the grid parameters that give them meaning."""

    name: str  # the checkpoint's tensor name without ".weight"
    scheme: Scheme
    codes: Tensor  # [out_features, in_features] uint8
    params: Params  # e.g. {"scales": [out_features, groups] float16}

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return int(self.codes.shape[1])

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, [out_features, in_features] float32."""
        return grid_for(self.scheme).decode(self.codes, self.params)

    def rows(self, start: int, stop: int) -> QuantizedLinear:
        """Some rows of it, without a copy."""
        return QuantizedLinear(
            self.name, self.scheme, self.codes[start:stop], {f: p[start:stop] for f, p in self.params.items()}
        )

    def to(self, device: str) -> QuantizedLinear:
        """The same on another device."""
        return QuantizedLinear(
            self.name, self.scheme, self.codes.to(device), {f: p.to(device) for f, p in self.params.items()}
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """What the run directory stores: 4-bit codes two to a byte, parameters as they are."""
        codes = pack_nibbles(self.codes) if self.scheme.bits == 4 else self.codes
        return {f"{self.name}.codes": codes.contiguous()} | {
            f"{self.name}.{field}": self.params[field].contiguous() for field in grid_for(self.scheme).fields
        }

    @classmethod
    def from_tensors(cls, name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """The inverse of :meth:`to_tensors`.

        Raises:
            InputError: a tensor is missing.
        """
        fields = grid_for(scheme).fields
        missing = [f for f in ("codes", *fields) if f"{name}.{f}" not in tensors]
        if missing:
            raise InputError(f"{name}: {', '.join(missing)} missing from the run directory", "run with --restart")
        stored = tensors[f"{name}.codes"]
        codes = unpack_nibbles(stored) if scheme.bits == 4 else stored
        return cls(name, scheme, codes.to(torch.uint8), {f: tensors[f"{name}.{f}"] for f in fields})
