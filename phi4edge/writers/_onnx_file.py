"""A folder for ONNX Runtime GenAI as it lies on disk, whoever wrote it: its graph, and where every weight lies.

No weight is read. A folder that contradicts itself is refused here, with the tensor's name, before a runtime maps it.
"""

from __future__ import annotations

__all__ = ["INSTALL", "OnnxFile", "missing_package", "read_onnx"]

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.index import DTYPE_BYTES, TensorRef
from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.core.jsonfile import read_object
from phi4edge.writers._onnx_names import GENAI_CONFIG

INSTALL = 'pip install "phi4edge[onnx]"'
_DAMAGED = "the folder is damaged or incomplete; export or download it again"
_DTYPES = {1: "F32", 2: "U8", 3: "I8", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16"}


@dataclass(frozen=True)
class OnnxFile:
    """What model.onnx and genai_config.json say."""

    folder: Path
    settings: Mapping[str, Any]  # genai_config.json
    metadata: Mapping[str, str]  # of the graph
    tensors: Mapping[str, TensorRef]  # weights in data files, by name; those of types that are not read here left out
    attributes: Mapping[str, Mapping[str, Any]]  # of the MatMulNBits node that a weight belongs to, by its name
    switches: bool  # whether a part of the graph is chosen while it runs, as longrope's factors are


def missing_package() -> str | None:
    """Why no ONNX graph can be read or written here, or None when it can."""
    return None if importlib.util.find_spec("onnx") else "the Python package onnx is not installed"


def read_onnx(folder: Path) -> OnnxFile:
    """Read the headers of ``folder``, and hold every weight's place against its file's size.

    Raises:
        InputError: a file is missing, damaged or shorter than the graph says.
        MissingToolError: the onnx package is not installed.
    """
    reason = missing_package()
    if reason:
        raise MissingToolError(reason, INSTALL)
    import onnx
    from google.protobuf.message import DecodeError

    settings = read_object(folder / GENAI_CONFIG, _DAMAGED)
    decoder = settings.get("model", {}).get("decoder", {})
    name = decoder.get("filename")
    if not isinstance(name, str):
        raise InputError(f"{folder / GENAI_CONFIG}: names no model.decoder.filename", _DAMAGED)
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: is missing, and {GENAI_CONFIG} names it", _DAMAGED)
    try:
        model = onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX model ({error})", _DAMAGED) from error
    if not model.graph.node:
        raise InputError(f"{path}: holds no graph", _DAMAGED)
    sizes: dict[Path, int | None] = {}
    tensors = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        ref = _reference(folder, tensor)
        if ref.path not in sizes:
            sizes[ref.path] = ref.path.stat().st_size if ref.path.is_file() else None
        _check_place(ref, sizes[ref.path])
        if tensor.data_type in _DTYPES:
            tensors[ref.name] = ref
    return OnnxFile(
        folder,
        settings,
        {entry.key: entry.value for entry in model.metadata_props},
        tensors,
        {
            node.input[1]: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
        },
        any(node.op_type == "If" for node in model.graph.node),
    )


def _reference(folder: Path, tensor: Any) -> TensorRef:
    """Where an initializer lies; a type that is not read here keeps the file's word for its length."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    path = folder / location
    if not location or path.parent.resolve() != folder.resolve():
        raise InputError(f"{folder}: {tensor.name} lies in {location!r}, outside of the folder", _DAMAGED)
    dtype = _DTYPES.get(tensor.data_type, f"type {tensor.data_type}")
    shape = tuple(tensor.dims)
    expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else int(where.get("length", 0))
    nbytes = int(where.get("length", expected))
    if nbytes != expected:
        raise InputError(
            f"{folder}: {tensor.name} has {nbytes} bytes, {dtype} {list(shape)} needs {expected}", _DAMAGED
        )
    return TensorRef(
        name=tensor.name, dtype=dtype, shape=shape, path=path, offset=int(where.get("offset", 0)), nbytes=nbytes
    )


def _check_place(ref: TensorRef, size: int | None) -> None:
    if size is None:
        raise InputError(f"{ref.path}: is missing, and the graph's {ref.name} lies in it", _DAMAGED)
    if ref.offset + ref.nbytes > size:
        raise InputError(
            f"{ref.path}: {ref.name} ends at byte {ref.offset + ref.nbytes}, the file has {size}", _DAMAGED
        )
