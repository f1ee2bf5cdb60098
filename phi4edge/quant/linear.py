"""A quantized weight matrix as every solver makes it and every writer takes it.

A run stores 4-bit codes two to a byte, and many formats pack them just so. A linear that was read, or that was rounded
a few rows at a time, is therefore unpacked only when somebody asks for its codes: writing a folder moves half of the
bytes and computes on none of them.
"""

from __future__ import annotations

__all__ = ["QuantizedLinear"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import Params, grid_for
from phi4edge.quant.packing import as_words, pack_bytes, unpack_nibbles
from phi4edge.quant.scheme import Scheme


@dataclass(frozen=True)
class QuantizedLinear:
    """Integer codes of one weight matrix and the grid parameters that give them meaning."""

    name: str  # the checkpoint's tensor name without ".weight"
    scheme: Scheme
    codes: Tensor  # [out_features, in_features] uint8
    params: Params  # e.g. {"scales": [out_features, groups] float16}

    if not TYPE_CHECKING:  # to a type checker, this would be any attribute at all

        def __getattr__(self, attribute: str) -> Tensor:
            """``codes``, when first asked for, of a linear that has them two to a byte."""
            if attribute != "codes" or "_nibbles" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
            self.__dict__["codes"] = unpack_nibbles(self.__dict__["_nibbles"])
            return self.__dict__["codes"]

    @classmethod
    def _packed(cls, name: str, scheme: Scheme, nibbles: Tensor, params: Params) -> QuantizedLinear:
        """Of 4-bit codes two to a byte, [out_features, in_features / 2] uint8."""
        linear = object.__new__(cls)
        linear.__dict__.update(name=name, scheme=scheme, params=params, _nibbles=nibbles)
        return linear

    @property
    def _nibbles_if_stored(self) -> Tensor | None:
        return self.__dict__.get("_nibbles")

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        nibbles = self._nibbles_if_stored
        return int((self.codes if nibbles is None else nibbles).shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        nibbles = self._nibbles_if_stored
        return int(self.codes.shape[1]) if nibbles is None else 2 * int(nibbles.shape[1])

    def packed(self) -> Tensor:
        """The codes as bytes, [out_features, in_features·bits/8] uint8, the first lowest; bits 4, 5, 6 or 8."""
        nibbles = self._nibbles_if_stored
        return pack_bytes(self.codes, self.scheme.bits) if nibbles is None else nibbles

    def words(self) -> Tensor:
        """The same as words, [out_features, in_features·bits/32] int32; in_features·bits divides by 32."""
        return as_words(self.packed())

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, [out_features, in_features] float32."""
        return grid_for(self.scheme).decode(self.codes, self.params)

    def rows(self, start: int, stop: int) -> QuantizedLinear:
        """Some rows of it, without a copy."""
        params, nibbles = {f: p[start:stop] for f, p in self.params.items()}, self._nibbles_if_stored
        if nibbles is None or "codes" in self.__dict__:
            return QuantizedLinear(self.name, self.scheme, self.codes[start:stop], params)
        return self._packed(self.name, self.scheme, nibbles[start:stop], params)

    def every(self, step: int) -> QuantizedLinear:
        """Every ``step``-th row of it, from the first on, without a copy."""
        params, nibbles = {f: p[::step] for f, p in self.params.items()}, self._nibbles_if_stored
        if nibbles is None or "codes" in self.__dict__:
            return QuantizedLinear(self.name, self.scheme, self.codes[::step], params)
        return self._packed(self.name, self.scheme, nibbles[::step], params)

    def to(self, device: str) -> QuantizedLinear:
        """The same on another device."""
        params, nibbles = {f: p.to(device) for f, p in self.params.items()}, self._nibbles_if_stored
        if nibbles is None:
            return QuantizedLinear(self.name, self.scheme, self.codes.to(device), params)
        return self._packed(self.name, self.scheme, nibbles.to(device), params)

    def to_tensors(self) -> dict[str, Tensor]:
        """What the run directory stores: 4-bit codes two to a byte, parameters as they are."""
        codes = self.packed() if self.scheme.bits == 4 else self.codes
        return {f"{self.name}.codes": codes.contiguous()} | {
            f"{self.name}.{field}": self.params[field].contiguous() for field in grid_for(self.scheme).fields
        }

    @classmethod
    def from_tensors(cls, name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """The inverse of :meth:`to_tensors`; 4-bit codes are unpacked once they are asked for.

        Raises:
            InputError: a tensor is missing.
        """
        fields = grid_for(scheme).fields
        missing = [f for f in ("codes", *fields) if f"{name}.{f}" not in tensors]
        if missing:
            raise InputError(f"{name}: {', '.join(missing)} missing from the run directory", "run with --restart")
        stored, params = tensors[f"{name}.codes"], {f: tensors[f"{name}.{f}"] for f in fields}
        if scheme.bits == 4:
            return cls._packed(name, scheme, stored, params)
        return cls(name, scheme, stored.to(torch.uint8), params)
