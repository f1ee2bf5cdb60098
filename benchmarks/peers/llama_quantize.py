"""llama.cpp's own quantizer, the peer that every GGUF of ours is held against.

``llama_model_quantize`` is what the ``llama-quantize`` tool calls; here it is called through ctypes, since
the Python package carries the library but not the tool. Three things make the comparison fair, and
the result states each: head and embedding get the types that ours have; the imatrix is the one our
solver was given, and was used for every linear; and which type each tensor got is read back from the
file. Two rules of llama.cpp's to know when comparing bytes: with an imatrix it stores ffn_down of the
first n/8 layers of a Q4_0 file as Q4_1 (``--pure`` prevents it), and rows that are no multiple of 256
make Q4_K fall back to Q5_0, Q6_K to Q8_0.

    python benchmarks/peers/llama_quantize.py model-f16.gguf model-q4_0.gguf --type q4_0
    python benchmarks/peers/llama_quantize.py model-f16.gguf model-q4_0-imatrix.gguf --type q4_0 \
        --imatrix run/imatrix.safetensors

The imatrix file holds ``<linear>.imatrix`` float32 [in_features], the mean of the squared inputs.
"""

from __future__ import annotations

__all__ = ["QuantizeOptions", "Quantized", "gguf_name", "load_imatrix", "quantize"]

import argparse
import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import load_file

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import InputError, Phi4EdgeError, UsageError, closest
from phi4edge.core.hashing import sha256_file

Imatrix = Mapping[str, NDArray[np.float32]]  # GGUF tensor name → mean squared inputs [in_features]

FILE_TYPES = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): value
    for name, value in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
}
TENSOR_TYPES = {
    name: Type[name.upper()]
    for name in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
}
LINEARS = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class QuantizeOptions:
    """What llama.cpp is asked for."""

    type: str  # of the file, as llama-quantize names it in lower case: q4_0, q4_k_m, …
    head: str = "q8_0"
    embedding: str = "q8_0"
    pure: bool = False  # every linear in the file's base type
    imatrix: Imatrix | None = None
    imatrix_name: str = "imatrix.safetensors"  # goes into the file's metadata, as the tool does it
    threads: int = 0  # 0: one a core


@dataclass(frozen=True)
class Quantized:
    """What llama.cpp made."""

    path: Path
    nbytes: int
    sha256: str
    types: Mapping[str, str]  # tensor → type, as read back from the file
    imatrix_entries: int  # linears whose rounding was weighted by the imatrix
    fallbacks: int  # tensors that got another type than asked because of their width
    library: str  # version of the binding, which pins llama.cpp's

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON: the types by count, and every tensor that differs from the most common one."""
        counts = Counter(kind for name, kind in self.types.items() if name.startswith("blk.") and "norm" not in name)
        base = counts.most_common(1)[0][0]
        return {
            "path": str(self.path),
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "linear_types": dict(counts),
            "other_types": {n: k for n, k in self.types.items() if k != base and "norm" not in n},
            "imatrix_entries": self.imatrix_entries,
            "fallbacks": self.fallbacks,
            "library": self.library,
        }


def gguf_name(linear: str) -> str:
    """``model.layers.3.mlp.down_proj`` as llama.cpp names it, ``blk.3.ffn_down.weight``.

    Raises:
        InputError: not a linear of a Phi-3 block.
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", linear)
    if match is None or match[2] not in LINEARS:
        raise InputError(f"{linear}: not a linear of a block", f"known: model.layers.N.{{{', '.join(LINEARS)}}}")
    return f"blk.{match[1]}.{LINEARS[match[2]]}.weight"


def load_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """The imatrix of a calibration, by GGUF tensor name; other tensors in the file are passed over.

    Raises:
        InputError: no such file, or no imatrix in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "phi4edge calibrate MODEL --out RUN writes it")
    entries = {
        gguf_name(name.removesuffix(".imatrix")): np.ascontiguousarray(values, dtype=np.float32)
        for name, values in load_file(path).items()
        if name.endswith(".imatrix")
    }
    if not entries:
        raise InputError(f"{path}: holds no tensor named <linear>.imatrix")
    return entries


def _known(word: str, known: Mapping[str, Any], what: str) -> Any:
    if word not in known:
        near = closest(word, known)
        raise UsageError(
            f"unknown {what} {word!r}", f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        )
    return known[word]


def _check_source(source: Path, options: QuantizeOptions) -> dict[str, tuple[int, ...]]:
    """Shapes [out_features, in_features] of the source's matrices, after checks llama.cpp makes by aborting."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    shapes = {t.name: tuple(map(int, t.shape[::-1])) for t in gguf.GGUFReader(source).tensors if len(t.shape) > 1}
    for name, kind in (("output.weight", options.head), ("token_embd.weight", options.embedding)):
        block = gguf.GGML_QUANT_SIZES[_known(kind, TENSOR_TYPES, "tensor type")][0]
        if name in shapes and shapes[name][-1] % block:
            raise InputError(f"{name}: rows of {shapes[name][-1]} are not divisible by {kind}'s block of {block}")
    return shapes


def _check_imatrix(shapes: Mapping[str, tuple[int, ...]], imatrix: Imatrix) -> None:
    """llama.cpp rounds without weights, and only logs it, where an entry is missing."""
    linears = {name for name in shapes if name.startswith("blk.")}
    missing, unknown = sorted(linears - set(imatrix)), sorted(set(imatrix) - linears)
    if missing or unknown:
        raise InputError(
            f"the imatrix has {len(imatrix)} entries, the model {len(linears)} linears; "
            f"first missing: {missing[0] if missing else 'none'}, first unknown: {unknown[0] if unknown else 'none'}",
            "calibrate this model and give that imatrix",
        )
    for name, values in imatrix.items():
        if values.shape != (shapes[name][-1],):
            raise InputError(f"{name}: imatrix of shape {list(values.shape)}, in_features {shapes[name][-1]}")
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise InputError(f"{name}: the imatrix must hold finite squares that are not all zero")


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Pieces of llama.cpp's log while the block runs; afterwards whoever got the log before gets it again."""
    pieces: list[str] = []

    def keep(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pieces.append(text.decode(errors="replace"))

    ours = llama_cpp.llama_log_callback(keep)
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(ours, ctypes.c_void_p(0))
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(before, data)


def _overrides(options: QuantizeOptions, entries: int) -> Any:
    """The two keys by which llama-quantize marks a file that had an imatrix; the list ends with an empty key."""
    array = (llama_cpp.llama_model_kv_override * 3)()
    array[0].key, array[0].tag = b"quantize.imatrix.file", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
    array[0].value.val_str = options.imatrix_name.encode()[:127]
    array[1].key, array[1].tag = b"quantize.imatrix.entries_count", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    array[1].value.val_i64 = entries
    return array


def quantize(source: Path, out: Path, options: QuantizeOptions) -> Quantized:
    """Let llama.cpp quantize the float GGUF ``source`` into ``out``.

    Raises:
        UsageError: an unknown type.
        InputError: a source, imatrix or type that do not fit together.
        Phi4EdgeError: llama.cpp failed, or did something else than it was asked.
    """
    file_type = _known(options.type, FILE_TYPES, "file type")
    shapes = _check_source(source, options)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = options.threads, file_type, options.pure
    params.output_tensor_type = int(TENSOR_TYPES[options.head])
    params.token_embedding_type = int(TENSOR_TYPES[options.embedding])
    if options.imatrix is not None:
        _check_imatrix(shapes, options.imatrix)
        entries = (llama_cpp.llama_model_imatrix_data * (len(options.imatrix) + 1))()  # the last stays null: the end
        kept = {name.encode(): np.ascontiguousarray(values, np.float32) for name, values in options.imatrix.items()}
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = name, values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
        params.kv_overrides = overrides = _overrides(options, len(kept))  # noqa: F841  must outlive the call
    with atomic_file(out) as file, _captured_log() as pieces:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), file.name.encode(), ctypes.byref(params))
        log = "".join(pieces)
        if failed:
            reason = re.findall(r"failed to quantize: (.*)", log)
            raise Phi4EdgeError(
                f"{source}: llama.cpp did not quantize it ({reason[0] if reason else 'no reason given'})"
            )
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(out).tensors}
    unweighted = [name for name in re.findall(r"did not find weights for (\S+)", log) if name.startswith("blk.")]
    used = len(options.imatrix) - len(unweighted) if options.imatrix is not None else 0
    _check_result(out, options, types, log, unweighted)
    return Quantized(
        path=out,
        nbytes=out.stat().st_size,
        sha256=sha256_file(out),
        types=types,
        imatrix_entries=used,
        fallbacks=len(re.findall(r"falling back to", log)),
        library=f"llama-cpp-python {llama_cpp.__version__}",
    )


def _check_result(
    out: Path, options: QuantizeOptions, types: Mapping[str, str], log: str, unweighted: list[str]
) -> None:
    for name, asked in (("output.weight", options.head), ("token_embd.weight", options.embedding)):
        if types.get(name, asked) != asked:
            raise Phi4EdgeError(f"{out}: {name} became {types[name]}, asked for {asked}")
    if options.imatrix is not None:
        said = re.search(r"have importance matrix data with (\d+) entries", log)
        if said is None or int(said[1]) != len(options.imatrix) or unweighted:
            count = said[1] if said else "no"
            raise Phi4EdgeError(
                f"{out}: llama.cpp took {count} imatrix entries of {len(options.imatrix)}, and found none for "
                f"{len(unweighted)} linears"
            )


def main() -> None:
    """The command line; prints the result as JSON."""
    parser = argparse.ArgumentParser(description="Quantize a float GGUF with llama.cpp's own quantizer")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True, help="q4_0, q4_1, q8_0, q4_k_m, …")
    parser.add_argument("--head", default="q8_0", help="type of output.weight; %(default)s")
    parser.add_argument("--embedding", default="q8_0", help="type of token_embd.weight; %(default)s")
    parser.add_argument("--pure", action="store_true", help="all linears in the base type")
    parser.add_argument("--imatrix", type=Path, help="imatrix.safetensors of a calibration")
    parser.add_argument("--threads", type=int, default=0)
    a = parser.parse_args()
    try:
        imatrix = load_imatrix(a.imatrix) if a.imatrix else None
        name = a.imatrix.name if a.imatrix else ""
        options = QuantizeOptions(a.type.lower(), a.head, a.embedding, a.pure, imatrix, name, a.threads)
        print(json.dumps(quantize(a.source, a.out, options).as_dict(), indent=2))
    except Phi4EdgeError as error:
        print(f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else ""), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
