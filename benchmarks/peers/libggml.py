"""The libggml that llama.cpp computes with, through its C interface: what it reads from blocks."""

from __future__ import annotations

__all__ = ["libggml", "to_float", "traits"]

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h, up to the last field that is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def libggml() -> ctypes.CDLL:
    """The library that the installed llama-cpp-python carries."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(iter(sorted(folder.glob("libggml-base.*"))))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def traits(code: int) -> Any:
    """What libggml says of type ``code`` (enum ggml_type)."""
    return libggml().ggml_get_type_traits(code).contents


def to_float(code: int, data: NDArray[Any], count: int) -> NDArray[np.float32]:
    """``count`` values of the contiguous blocks ``data`` of type ``code``."""
    out = np.empty(count, dtype=np.float32)
    traits(code).to_float(data.ctypes.data, out.ctypes.data, count)
    return out
