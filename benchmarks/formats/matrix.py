"""Every format × every scheme, each in someone else's runtime: what it computes, from which weights, how fast.

    python benchmarks/formats/matrix.py
    python benchmarks/formats/matrix.py --formats onnx,gguf --schemes w4g32,q4_k

The model is the demo's stand-in, widened to hidden 768 so that every scheme divides it; its codes are rounded to
nearest, because how they were found does not matter here. For every scheme one run, and from it an artifact in every
format that can hold it. Of each artifact:

- **bits**: `phi4edge verify --against RUN`: every tensor equal, bit for bit.
- **runtime's weights**: the same linears as the runtime's own code sees them (libggml's to_float by ctypes; a
  MatMulNBits node fed the identity; mx.dequantize; compressed-tensors' decompression; the linears of GPTQ and AWQ
  folders after ONNX Runtime GenAI's builder unpacked them). They must be equal to ours in every bit.
- **logits**: max |difference| to the torch forward of the dequantized weights, over one text; once with float
  activations where the runtime can (`exact`), once as it serves (`served`). For comparison, what rounding activations
  to 8 bits makes of the torch forward (`simulated`): the weights being equal, a served difference of that size is it.
- **tok/s**: decode, in that runtime, one process at a time.

What cannot be held says so in its cell, in the writer's own words. Exit 8 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(HERE)]
from record import record, update_readme  # noqa: E402
from runtime_views import VIEWS, built_by_genai, mlx_logits, mlx_speed, transformers_logits  # noqa: E402

from phi4edge.core.errors import InputError, Phi4EdgeError  # noqa: E402
from phi4edge.core.recipe import Recipe  # noqa: E402
from phi4edge.core.registry import names  # noqa: E402
from phi4edge.model.tokenizer import load_tokenizer  # noqa: E402
from phi4edge.runtimes import llama_cpp, onnxruntime_genai, torch_ref  # noqa: E402
from phi4edge.runtimes._api import Settings, SpeedRequest, default_settings  # noqa: E402
from phi4edge.stages.export import export, reader_of  # noqa: E402
from phi4edge.stages.quantize import quantize  # noqa: E402
from phi4edge.stages.verify import verify  # noqa: E402
from phi4edge.writers._api import WriteOptions  # noqa: E402

SCHEMES = (
    "w4g32", "w4g64", "w4g128", "w4g32-asym", "w8g32", "w8g128",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k",
)  # fmt: skip
EXACT = 2e-5  # largest relative difference (norms) of float32 logits from the same weights
TEXT = (
    "Rounding a weight is a decision that is taken once. Whoever reads the number afterwards, on a laptop or a phone, "
    "must read the same one: def f(x): return 3 * x + 0.25  # and 17 % of 300 is 51."
)
REQUEST = SpeedRequest(prompt_tokens=16, gen_tokens=16, repetitions=2)
Logits = NDArray[np.float32]


@dataclass
class Cell:
    """One artifact, or why there is none."""

    format: str
    scheme: str
    refused: str | None = None
    mebibytes: float | None = None
    bits_equal: bool | None = None
    view_equal: bool | None = None
    exact: float | None = None
    exact_relative: float | None = None
    served: float | None = None
    simulated: float | None = None
    decode_tps: float | None = None

    @property
    def misread(self) -> bool:
        """A trap that tests pin: GenAI's builder takes checkpoint_format v2, which zero points of 0 need, for v1."""
        return self.format == "gptq" and self.scheme.endswith("-asym") and self.view_equal is False

    @property
    def sound(self) -> bool:
        """Whether everything that must hold does."""
        if self.refused is not None or self.misread:
            return True
        exact = self.exact_relative is None or self.exact_relative <= EXACT
        return bool(self.bits_equal and self.view_equal and exact)


def first(logits: Any) -> Logits:
    """The one sequence's logits."""
    return np.asarray(next(iter(logits)))


def apart(found: Logits, expected: Logits) -> float:
    """Largest difference of two logits."""
    return float(np.abs(found - expected).max())


def relative(found: Logits, expected: Logits) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def torch_logits(artifact: Path, tokens: NDArray[np.int64], activations: str = "none") -> Logits:
    """Of the torch forward on an artifact's dequantized weights."""
    with torch_ref.open(artifact, tokens.shape[1], Settings(activations=activations)) as session:
        return first(session.logits(tokens))


def served_logits(runtime: Any, artifact: Path, tokens: NDArray[np.int64]) -> Logits:
    """Of a serving runtime, as it is set up by default."""
    with runtime.open(artifact, tokens.shape[1], default_settings(runtime.NAME)) as session:
        return first(session.logits(tokens))


def speed(runtime: Any, artifact: Path) -> float:
    """Median decode speed, tokens a second."""
    samples = runtime.speed(artifact, REQUEST, default_settings(runtime.NAME))
    return 1 / float(np.median([s for repetition in samples.token_s for s in repetition]))


def measure_gguf(cell: Cell, run: Path, artifact: Path, tokens: NDArray[np.int64], expected: Logits) -> None:
    """llama.cpp rounds activations always."""
    cell.served = apart(served_logits(llama_cpp, artifact, tokens), expected)
    kind = "q8_k" if cell.scheme.endswith("_k") else "q8_0"
    cell.simulated = apart(torch_logits(artifact, tokens, kind), expected)
    cell.decode_tps = speed(llama_cpp, artifact)


def measure_onnx(cell: Cell, run: Path, artifact: Path, tokens: NDArray[np.int64], expected: Logits) -> None:
    """Both accuracy levels; the first leaves activations alone."""
    exact = artifact.with_name("exact")
    export(run, "onnx", exact, WriteOptions(force=True, accuracy_level=1))
    found = served_logits(onnxruntime_genai, exact, tokens)
    cell.exact, cell.exact_relative = apart(found, expected), relative(found, expected)
    shutil.rmtree(exact)
    cell.served = apart(served_logits(onnxruntime_genai, artifact, tokens), expected)
    cell.simulated = apart(torch_logits(artifact, tokens, "int8-b32"), expected)
    cell.decode_tps = speed(onnxruntime_genai, artifact)


def measure_built(cell: Cell, run: Path, artifact: Path, tokens: NDArray[np.int64], expected: Logits) -> None:
    """GPTQ and AWQ folders go through GenAI's builder, with float activations."""
    built = built_by_genai(artifact, artifact.with_name("built"))
    found = served_logits(onnxruntime_genai, built, tokens)
    cell.exact, cell.exact_relative = apart(found, expected), relative(found, expected)
    cell.decode_tps = speed(onnxruntime_genai, built)


def measure_transformers(cell: Cell, run: Path, artifact: Path, tokens: NDArray[np.int64], expected: Logits) -> None:
    """A reader, not a server: its weights are multiplied out when it loads."""
    found = transformers_logits(artifact, tokens)
    if found is None:
        return
    cell.exact, cell.exact_relative = apart(found, expected), relative(found, expected)


def measure_mlx(cell: Cell, run: Path, artifact: Path, tokens: NDArray[np.int64], expected: Logits) -> None:
    """On the CPU of this machine."""
    found = mlx_logits(artifact, tokens)
    cell.exact, cell.exact_relative = apart(found, expected), relative(found, expected)
    cell.decode_tps = mlx_speed(artifact, REQUEST)


MEASURE: dict[str, Callable[[Cell, Path, Path, NDArray[np.int64], Logits], None]] = {
    "gguf": measure_gguf,
    "onnx": measure_onnx,
    "gptq": measure_built,
    "awq": measure_built,
    "compressed_tensors": measure_transformers,
    "mlx": measure_mlx,
}


def view_equals(artifact: Path, format_name: str, linears: list[str]) -> bool:
    """Whether the runtime's own code sees our weights in each of ``linears``."""
    reader = reader_of(artifact)
    view: Callable[[Path, str], Tensor] = VIEWS[format_name]
    return all(torch.equal(view(artifact, name), reader.tensor(f"{name}.weight")) for name in linears)


def measure(run: Path, format_name: str, scheme: str, folder: Path, tokens: NDArray[np.int64]) -> Cell:
    """One cell; what it needs on disk is gone afterwards."""
    cell = Cell(format_name, scheme)
    shutil.rmtree(folder, ignore_errors=True)
    artifact = folder / ("model.gguf" if format_name == "gguf" else "model")
    try:
        made = export(run, format_name, artifact, WriteOptions())
    except InputError as error:
        cell.refused = error.message.split("cannot hold this run: ")[-1]
        return cell
    cell.mebibytes = made.nbytes / 2**20
    checked = verify(artifact, run)
    cell.bits_equal = checked.compared == checked.tensors
    layers = reader_of(artifact).config.num_layers
    linears = [f"model.layers.{i}.{n}" for i in (0, layers - 1) for n in ("self_attn.qkv_proj", "self_attn.o_proj",
               "mlp.gate_up_proj", "mlp.down_proj")]  # fmt: skip
    cell.view_equal = view_equals(artifact, format_name, linears)
    MEASURE[format_name](cell, run, artifact, tokens, torch_logits(artifact, tokens))
    shutil.rmtree(folder)
    return cell


def shown(value: float | None, digits: int = 2) -> str:
    """A figure, or that there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def mark(cell: Cell) -> str:
    """A cell of the small table."""
    if cell.refused is not None:
        return "–"
    if cell.misread:
        return "v2, misread by ONNX Runtime's builder"
    return "exact" if cell.sound else "**differs**"


def tables(cells: list[Cell], formats: list[str], schemes: list[str]) -> str:
    """What is held, and then a row for each artifact."""
    by = {(cell.format, cell.scheme): cell for cell in cells}
    lines = ["| scheme | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    lines += [f"| {scheme} | " + " | ".join(mark(by[form, scheme]) for form in formats) + " |" for scheme in schemes]
    columns = ("format", "scheme", "MiB", "bits = run", "runtime's weights = ours")
    columns += ("max \\|Δ logit\\|, float activations", "as served", "8-bit activations simulated", "decode tok/s")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell in (cell for cell in cells if cell.refused is None):
        yes = {True: "yes", False: "**no**", None: "–"}
        lines.append(
            f"| {cell.format} | {cell.scheme} | {cell.mebibytes:.1f} | {yes[cell.bits_equal]} | {yes[cell.view_equal]} "
            f"| {shown(cell.exact)} | {shown(cell.served)} | {shown(cell.simulated)} | {shown(cell.decode_tps, 3)} |"
        )
    lines += ["", "Not held, and why:", ""]
    refused: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.refused is not None:
            reason = cell.refused.split(": ", 1)[-1].replace(cell.scheme, "the scheme")
            refused.setdefault((cell.format, reason), []).append(cell.scheme)
    lines += [f"- {form}, {', '.join(held)}: {reason}" for (form, reason), held in refused.items()]
    return "\n".join(lines)


def main() -> int:
    """Everything, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "formats" / "model", help="made if missing")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "formats" / "matrix")
    parser.add_argument("--formats", help="only these, with commas")
    parser.add_argument("--schemes", help="only these, with commas; then nothing is recorded")
    a = parser.parse_args()
    formats = a.formats.split(",") if a.formats else [name for name in names("phi4edge.writers") if name in MEASURE]
    schemes = a.schemes.split(",") if a.schemes else list(SCHEMES)
    if not (a.model / "config.json").is_file():
        make = ROOT / "benchmarks" / "demo" / "make_model.py"
        subprocess.run([sys.executable, make, "--pad-hidden", "768", a.model], check=True)
    tokens = np.array([load_tokenizer(a.model).encode(TEXT)], dtype=np.int64)
    began, cells = time.monotonic(), []
    for scheme in schemes:
        run = a.out / "runs" / scheme
        try:
            quantize(a.model, Recipe(method="rtn", scheme=scheme, corpus=None), run)
            for format_name in formats:
                cell = measure(run, format_name, scheme, a.out / "artifact", tokens)
                print(f"{time.monotonic() - began:6.0f} s  {cell}", file=sys.stderr, flush=True)
                cells.append(cell)
        except Phi4EdgeError as error:
            print(f"Error: {scheme}: {error.message}\n{error.hint or ''}", file=sys.stderr)
            return error.exit_code
        shutil.rmtree(run)
    found = tables(cells, formats, schemes)
    if not a.schemes and not a.formats:
        rows = [{**vars(cell), "sound": cell.sound} for cell in cells]
        results = {"tokens": tokens.shape[1], "exact_tolerance": EXACT, "cells": rows}
        record(
            HERE / "results" / "matrix.json", "python benchmarks/formats/matrix.py", results, ("benchmarks/formats",)
        )
        update_readme(HERE / "README.md", "matrix", found)
    print(found)
    return 0 if all(cell.sound for cell in cells) else 8


if __name__ == "__main__":
    sys.exit(main())
