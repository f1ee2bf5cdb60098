"""Does it fit? Weights + KV cache at a context + compute buffers + the process, against what a target can give.

* **Weights** are counted tensor by tensor as the file stores them. GGUF: linears in the block type that holds the
  scheme, embedding and head in theirs, norms and rope factors in float32. GPTQ: packed codes, float16 scales, packed
  zero points and g_idx for each linear; embedding, head and norms in float16. ONNX: packed codes, float32 scales and
  packed zero points, tables of 8 bits in blocks of 32 likewise. Tokenizer metadata (a few MB) is left out.
  With a GPU, llama.cpp leaves the embedding in host RAM; it is counted all the same, so the sum is a bound.
* **KV cache** = 2 · layers · kv_heads · head_dim values a token, for the context rounded up to a multiple of 256 as
  llama.cpp allocates it; f16 takes 2 bytes a value, q8_0 34 bytes for 32, q4_0 18 bytes for 32.
* **Compute buffers**, an estimate: a prompt goes through in micro-batches of ``UBATCH`` tokens, and llama.cpp's
  allocator reuses one buffer for all layers, so the larger of two moments counts, in float32 values a token:
  the head (vocabulary + 2 · hidden) and the MLP (3 · intermediate + 4 · hidden, and the mask, 2 bytes a token of
  context). Flash attention on, as llama.cpp chooses by itself; without it heads · context values come on top.
* **Process**: runtime, tokenizer and work space; ``PROCESS_BYTES`` unless the target's file gives its own.
"""

from __future__ import annotations

__all__ = [
    "BLOCKS",
    "FLOAT_TYPES",
    "HEAD_TYPES",
    "KV_BYTES",
    "LAYOUTS",
    "PROCESS_BYTES",
    "ROUNDED_TABLES",
    "Fit",
    "Line",
    "Request",
    "Suggestion",
    "block_type",
    "check_context",
    "decode_bytes",
    "largest_that_fits",
    "layout_holds",
    "memory_needed",
    "weight_lines",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.published import PUBLISHED
from phi4edge.core.errors import InputError
from phi4edge.quant.scheme import Scheme

# type → (weights a block, bytes a block); float types are blocks of one. Same as ggml-common.h's block structs.
BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
_Q8_0_F32 = "q8_0 with float32 scales"  # of an ONNX table
FLOAT_TYPES = ("f32", "f16")
HEAD_TYPES = ("q8_0", "q6_k", "f16")
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes a value
LAYOUTS = ("gguf", "gptq", "onnx")  # formats whose bytes are known here
ROUNDED_TABLES = ("gguf", "onnx")  # formats that give embedding and head a type of their own
CELLS = 256  # llama.cpp rounds a context up to a multiple of this
UBATCH = 512  # llama.cpp's default n_ubatch, tokens
PROCESS_BYTES = 150_000_000
SMALLEST_CONTEXT = 512  # a suggestion below this helps nobody


@dataclass(frozen=True)
class Request:
    """What shall fit: a scheme in a format, at a context."""

    scheme: Scheme
    context: int  # tokens
    format: str = "gguf"  # one of LAYOUTS
    kv: str = "f16"  # type of the KV cache, a key of KV_BYTES
    head: str = "q8_0"  # type of the head in GGUF, one of HEAD_TYPES; a tied embedding is the head
    embedding: str = "q8_0"

    def text(self) -> str:
        """``"q4_0 with 4,096 tokens of context (KV cache f16)"``."""
        return f"{self.scheme.name} with {self.context:,} tokens of context (KV cache {self.kv})"


@dataclass(frozen=True)
class Line:
    """One summand."""

    label: str
    nbytes: int
    how: str  # how it was counted
    estimated: bool = False


@dataclass(frozen=True)
class Fit:
    """The sum, and what it is held against."""

    request: Request
    lines: tuple[Line, ...]
    usable_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Sum of all lines."""
        return sum(line.nbytes for line in self.lines)

    @property
    def fits(self) -> bool:
        """Whether the sum is within what the target gives."""
        return self.needed_bytes <= self.usable_bytes


def block_type(scheme: Scheme) -> str | None:
    """The GGUF block type that holds ``scheme``'s codes without another rounding; None when there is none."""
    if scheme.grid != "affine":
        return scheme.grid
    if scheme.group_size > 0 and scheme.group_size % 32:
        return None
    # A wider group repeats its scale in each block of 32.
    return {(4, True): "q4_0", (8, True): "q8_0"}.get((scheme.bits, scheme.symmetric))


def layout_holds(layout: str, scheme: Scheme) -> bool:
    """Whether format ``layout``, one of LAYOUTS, stores ``scheme``'s codes and parameters without another rounding."""
    if layout == "gguf":
        return block_type(scheme) is not None
    if layout == "onnx" and scheme.group_size > 0 and (scheme.group_size < 16 or scheme.group_size.bit_count() > 1):
        return False  # a block of MatMulNBits is a power of two
    return scheme.grid in ("affine", "q4_0", "q8_0")  # a float16 scale a group, whole-numbered zero points


def tensor_bytes(shape: Sequence[int], kind: str, where: str) -> int:
    """Bytes of a tensor of ``shape`` ([rows, columns] or [columns]) stored as ``kind``.

    Raises:
        InputError: a row is not a whole number of blocks.
    """
    weights, size = (32, 36) if kind == _Q8_0_F32 else BLOCKS[kind]
    if shape[-1] % weights:
        raise InputError(
            f"{where}: rows of {shape[-1]} weights do not divide into {kind} blocks of {weights}",
            "q4_0 … q8_0 have blocks of 32; f16 has none",
        )
    return math.prod(shape) // weights * size


def _gptq_linear_bytes(shape: tuple[int, int], scheme: Scheme, where: str) -> int:
    """qweight, scales (float16), qzeros (there even when symmetric) and g_idx (int32) of one linear."""
    out, inp = shape
    groups = scheme.groups(inp, where)
    packed = 32 // scheme.bits  # codes an int32
    return 4 * math.ceil(inp / packed) * out + 2 * groups * out + 4 * groups * math.ceil(out / packed) + 4 * inp


def _onnx_linear_bytes(shape: tuple[int, int], scheme: Scheme, where: str) -> int:
    """Codes, scales (float32) and, where asymmetric, zero points of one linear."""
    out, inp = shape
    groups = scheme.groups(inp, where)
    zeros = 0 if scheme.symmetric else out * math.ceil(groups * scheme.bits / 8)
    return out * inp * scheme.bits // 8 + 4 * out * groups + zeros


def weight_lines(config: ModelConfig, request: Request) -> tuple[Line, ...]:
    """Linears, embedding, head and norms, in bytes as the file stores them.

    Raises:
        InputError: the format cannot hold the scheme, or a block does not divide a row.
    """
    scheme = request.scheme
    linears = 0
    if request.format == "gguf":
        kind = block_type(scheme)
        if kind is None:
            raise InputError(f"gguf: no block type holds {scheme.name}", "use q4_0, q4_k, q8_0 or w4g32")
        for name, shape in config.linear_shapes.items():
            linears += config.num_layers * tensor_bytes(shape, kind, name)
        how, head, embedding, norm = f"GGUF {kind}", request.head, request.embedding, "f32"
    elif request.format == "gptq":
        if not layout_holds("gptq", scheme):
            raise InputError(f"gptq: its scales and zero points do not hold {scheme.name}", "use w4g32 or w8g128")
        for name, shape in config.linear_shapes.items():
            linears += config.num_layers * _gptq_linear_bytes(shape, scheme, name)
        how, head, embedding, norm = "codes, scales, zero points, g_idx", "f16", "f16", "f16"
    elif request.format == "onnx":
        if not layout_holds("onnx", scheme):
            raise InputError(f"onnx: MatMulNBits does not hold {scheme.name}", "use w4g32, w8g32 or w4g128-asym")
        for name, shape in config.linear_shapes.items():
            linears += config.num_layers * _onnx_linear_bytes(shape, scheme, name)
        how, norm = "codes, scales, zero points", "f32"
        head, embedding = (_Q8_0_F32 if kind == "q8_0" else kind for kind in (request.head, request.embedding))
    else:
        raise InputError(f"{request.format}: its bytes are not known here", f"known: {', '.join(LAYOUTS)}")
    bits = 8 * linears / config.linear_parameters
    table = (config.vocab_size, config.hidden_size)
    lines = [Line("linears", linears, f"{config.linear_parameters:,} weights, {how}, {bits:.2f} bits each")]
    if config.tie_word_embeddings:
        lines.append(Line("embedding and head", tensor_bytes(table, head, "lm_head"), f"one tensor (tied), {head}"))
    else:
        lines.append(Line("embedding", tensor_bytes(table, embedding, "model.embed_tokens"), embedding))
        lines.append(Line("head", tensor_bytes(table, head, "lm_head"), head))
    norms = (2 * config.num_layers + 1) * tensor_bytes((config.hidden_size,), norm, "norm")
    factors = 2 * 4 * (config.rope.dim // 2) if config.rope.is_longrope and request.format == "gguf" else 0
    lines.append(Line("norms", norms + factors, norm + (" and rope factors" if factors else "")))
    return tuple(lines)


def check_context(config: ModelConfig, context: int) -> None:
    """Raises InputError when ``context`` is beyond what the model was made for."""
    if context > config.context_length:
        raise InputError(
            f"context {context:,} is more than the {config.context_length:,} tokens the model was made for",
            f"give at most --context {config.context_length}",
        )


def memory_needed(
    config: ModelConfig, request: Request, *, usable_bytes: int, process_bytes: int = PROCESS_BYTES
) -> Fit:
    """All that serving ``config`` as ``request`` takes, line by line.

    Raises:
        InputError: the context is beyond the model's, or the format cannot hold the scheme.
    """
    check_context(config, request.context)
    cells = math.ceil(request.context / CELLS) * CELLS
    per_token = config.kv_bytes_per_token(KV_BYTES[request.kv])
    head_phase = 4 * (config.vocab_size + 2 * config.hidden_size)
    mlp_phase = 4 * (3 * config.intermediate_size + 4 * config.hidden_size) + 2 * cells
    compute = min(UBATCH, cells) * max(head_phase, mlp_phase)
    lines = (
        *weight_lines(config, request),
        Line("KV cache", math.ceil(cells * per_token), f"{cells:,} tokens × {per_token:,.0f} bytes, {request.kv}"),
        Line("compute buffers", compute, f"micro-batch of {min(UBATCH, cells)} tokens, flash attention", True),
        Line("process", process_bytes, "runtime, tokenizer, work space", True),
    )
    return Fit(request, lines, usable_bytes)


def decode_bytes(config: ModelConfig, request: Request) -> tuple[int, int]:
    """Bytes of memory read for one token: with an empty context, and with ``request.context`` tokens in it.

    Every weight is read once, but of an embedding that is not the head only one row.
    """
    lines = weight_lines(config, request)
    weights = sum(line.nbytes for line in lines if line.label != "embedding")
    return weights, weights + math.ceil(request.context * config.kv_bytes_per_token(KV_BYTES[request.kv]))


def _largest_context(config: ModelConfig, request: Request, usable: int, process: int) -> Fit | None:
    """``request`` at the largest context (a multiple of 256, at most the one asked for) that fits; None: none does."""
    low, high = SMALLEST_CONTEXT // CELLS, request.context // CELLS
    best: Fit | None = None
    while low <= high:
        middle = (low + high) // 2
        smaller = replace(request, context=middle * CELLS)
        fit = memory_needed(config, smaller, usable_bytes=usable, process_bytes=process)
        if fit.fits:
            best, low = fit, middle + 1
        else:
            high = middle - 1
    return best


@dataclass(frozen=True)
class Suggestion:
    """Something near to what was asked that does fit."""

    model: str
    fit: Fit


def largest_that_fits(
    model: str,
    config: ModelConfig,
    request: Request,
    schemes: Sequence[Scheme],
    *,
    usable_bytes: int,
    kv_types: Sequence[str] = ("f16",),
    process_bytes: int = PROCESS_BYTES,
) -> Suggestion | None:
    """The nearest thing to ``request`` that fits, or None when even the smallest family member does not.

    In this order: the best of ``schemes`` at the context asked for; the smallest of them with a smaller type of KV
    cache; the smallest of them at the largest context that fits, with the KV cache asked for and then with smaller
    ones; the same again for the next smaller published model. "Best" is most bytes.
    """

    def attempt(config: ModelConfig, request: Request) -> Fit:
        return memory_needed(config, request, usable_bytes=usable_bytes, process_bytes=process_bytes)

    smaller_models = [(n, c) for n, c in PUBLISHED.items() if c.parameters < config.parameters]
    for name, shapes in [(model, config), *smaller_models]:
        wish = replace(request, context=min(request.context, shapes.context_length))
        held = [s for s in schemes if _holds(shapes, replace(wish, scheme=s))]
        options = sorted((attempt(shapes, replace(wish, scheme=s)) for s in held), key=lambda fit: -fit.needed_bytes)
        for fit in options:
            if fit.fits:
                return Suggestion(name, fit)
        if not options:
            continue
        smallest = min(options, key=lambda fit: fit.needed_bytes).request  # of equal ones the first of ``schemes``
        smaller_kv = sorted((t for t in kv_types if KV_BYTES[t] < KV_BYTES[request.kv]), key=lambda t: -KV_BYTES[t])
        for kv in smaller_kv:
            fit = attempt(shapes, replace(smallest, kv=kv))
            if fit.fits:
                return Suggestion(name, fit)
        for kv in (request.kv, *smaller_kv):
            best = _largest_context(shapes, replace(smallest, kv=kv), usable_bytes, process_bytes)
            if best is not None:
                return Suggestion(name, best)
    return None


def _holds(config: ModelConfig, request: Request) -> bool:
    try:
        weight_lines(config, request)
    except InputError:
        return False
    return True
