"""Importance matrices, exchanged with llama.cpp: the same numbers there and back, and what rtn makes of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import ROOT, load_script
from support import write_checkpoint
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, ResumeError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import rtn
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.stages.calibrate import calibrate
from phi4edge.stages.imatrix import export_imatrix
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._imatrix import Imatrix, read_imatrix, write_imatrix
from phi4edge.writers.gguf import write_f16

peer = load_script("benchmarks/peers/llama_quantize.py")
CORPUS = CorpusRecipe(corpus=str(ROOT / "README.md"), samples=16, sequence_length=32)
WORDS = {  # as llama.cpp names them
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "phi4", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    calibrate(model, CORPUS, folder)
    return folder


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    export_imatrix(run, run / "imatrix.gguf")
    return run / "imatrix.gguf"


def measured(run: Path) -> dict[str, Tensor]:
    return {n.removesuffix(".imatrix"): v for n, v in load_file(run / "calibration" / "imatrix.safetensors").items()}


def test_the_file_is_the_one_that_llama_imatrix_writes(file: Path, run: Path) -> None:
    reader, kind = gguf_py.GGUFReader(file), gguf_py.GGUFValueType
    fields = {name: (f.types, f.contents()) for name, f in reader.fields.items() if "GGUF." not in name}
    assert fields == {
        "general.type": ([kind.STRING], "imatrix"),
        "imatrix.datasets": ([kind.ARRAY, kind.STRING], [CORPUS.corpus]),
        "imatrix.chunk_count": ([kind.UINT32], 16),
        "imatrix.chunk_size": ([kind.UINT32], 32),
    }
    names = sorted(f"blk.{layer}.{word}.weight" for layer in range(2) for word in WORDS)
    assert [t.name for t in reader.tensors] == [f"{n}.{part}" for n in names for part in ("in_sum2", "counts")]
    found = {t.name: t for t in reader.tensors}
    for linear, means in measured(run).items():
        layer, word = linear.split(".")[2], linear.split(".", 3)[3]
        name = f"blk.{layer}.{next(w for w, ours in WORDS.items() if ours == word)}.weight"
        sums, counts = found[f"{name}.in_sum2"], found[f"{name}.counts"]
        assert (sums.tensor_type.name, list(sums.shape)) == ("F32", [means.numel(), 1])
        assert (counts.tensor_type.name, list(counts.shape)) == ("F32", [1, 1])
        assert float(counts.data.reshape(-1)[0]) == 16 * 32  # tokens
        np.testing.assert_array_equal(sums.data.reshape(-1), means.numpy() * np.float32(512))


def test_the_numbers_come_back_exactly_and_with_an_odd_count_nearly(file: Path, run: Path, tmp_path: Path) -> None:
    back, expected = read_imatrix(file), measured(run)
    assert back.values.keys() == expected.keys()
    assert all(torch.equal(back.values[name], means) for name, means in expected.items())
    assert (back.tokens, back.datasets, back.chunks, back.chunk_size) == (512, (CORPUS.corpus,), 16, 32)
    odd = Imatrix(expected, 7 * 31)
    write_imatrix(tmp_path / "odd.gguf", odd)
    for name, means in read_imatrix(tmp_path / "odd.gguf").values.items():
        assert torch.allclose(means, expected[name], rtol=2**-23, atol=0)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_llama_cpp_quantizes_the_same_with_the_file_as_with_the_numbers(
    model: Path, file: Path, run: Path, tmp_path: Path, kind: str
) -> None:
    """Sum by count in float32, as llama-quantize loads such a file, by gguf-py and NumPy alone."""
    source = write_f16(open_checkpoint(model), tmp_path / "f16.gguf", WriteOptions()).path
    tensors = {t.name: t.data.reshape(-1) for t in gguf_py.GGUFReader(file).tensors}
    loaded = {
        name.removesuffix(".in_sum2"): sums / tensors[name.replace(".in_sum2", ".counts")]
        for name, sums in tensors.items()
        if name.endswith(".in_sum2")
    }
    direct = peer.load_imatrix(run / "calibration" / "imatrix.safetensors")
    made = []
    for i, imatrix in enumerate((loaded, direct, None)):
        out = tmp_path / f"{i}.gguf"
        peer.quantize(source, out, peer.QuantizeOptions(kind, imatrix=imatrix, threads=1))
        made.append({t.name: t.data.tobytes() for t in gguf_py.GGUFReader(out).tensors})
    assert made[0] == made[1]
    assert made[0] != made[2]


def rounded_to(model: Path, file: Path, out: Path, scheme: str = "q4_0") -> Path:
    recipe = Recipe(method="rtn", scheme=scheme, corpus=None, imatrix_sha256=sha256_file(file))
    quantize(model, recipe, out, imatrix=file)
    return out


@pytest.mark.parametrize("scheme", ["q4_0", "w4g32", "w4g32-asym"])
def test_rtn_weighs_channels_by_the_given_imatrix_without_any_text(
    model: Path, file: Path, tmp_path: Path, scheme: str
) -> None:
    source, result = open_checkpoint(model), open_run(rounded_to(model, file, tmp_path / "run", scheme))
    plain = differing = 0
    for name, means in read_imatrix(file).values.items():
        weight = source.tensor(f"{name}.weight")
        expected = rtn.solve(Problem(name, weight, None, parse_scheme(scheme), means), SolverOptions()).linear
        found = result.load(name)
        assert torch.equal(found.codes, expected.codes)
        assert all(torch.equal(found.params[field], values) for field, values in expected.params.items())
        unweighted = rtn.solve(Problem(name, weight, None, parse_scheme(scheme)), SolverOptions()).linear
        differing += int((unweighted.codes != found.codes).sum())
        plain += found.codes.numel()
    assert differing > 0.01 * plain


def test_the_manifest_says_where_the_numbers_came_from_and_they_can_be_handed_on(
    model: Path, file: Path, tmp_path: Path
) -> None:
    run = rounded_to(model, file, tmp_path / "run")
    data = json.loads((run / "manifest.json").read_text())["data"]
    assert data["corpus"] is None
    assert data["imatrix"] | {"sha256": ""} == {
        "sha256": "", "datasets": [CORPUS.corpus], "tokens": 512, "chunks": 16, "chunk_size": 32,
    }  # fmt: skip
    provenance = open_run(run).provenance
    assert provenance["calibration"] == f"imatrix of {CORPUS.corpus}, 512 tokens"
    assert provenance["calibration_sha256"] == sha256_file(file)
    export_imatrix(run, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_the_commands_do_the_same(model: Path, run: Path, file: Path, tmp_path: Path, capsys: Any) -> None:
    def phi4edge(*arguments: str | Path, expect: int = 0) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json", "-q"]) == expect
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document["data"] if expect == 0 else document["error"]  # type: ignore[no-any-return]

    out = tmp_path / "i.gguf"
    assert phi4edge("export", run, "--format", "imatrix", "--out", out, "--dry-run")["sha256"] is None
    assert not out.exists()
    data = phi4edge("export", run, "--format", "imatrix", "--out", out)
    assert (data["linears"], data["tokens"], data["measured_on"]) == (8, 512, "full precision")
    assert data["sha256"] == sha256_file(out) == sha256_file(file)
    assert "already exists" in phi4edge("export", run, "--format", "imatrix", "--out", out, expect=3)["message"]
    options = ("--method", "rtn", "--scheme", "q4_0", "--imatrix", out)
    made = phi4edge("quantize", model, "--out", tmp_path / "run", *options)
    assert (
        made["files"]
        == json.loads((rounded_to(model, file, tmp_path / "b") / "manifest.json").read_text())["data"]["files"]
    )
    error = phi4edge("quantize", model, "--out", tmp_path / "c", "--method", "gptq", "--imatrix", out, expect=2)
    assert "--method gptq measures more than that" in error["message"]
    error = phi4edge("export", tmp_path, "--format", "imatrix", "--out", tmp_path / "no.gguf", expect=3)
    assert "holds no imatrix" in error["message"]


def test_another_imatrix_is_another_run(model: Path, file: Path, tmp_path: Path) -> None:
    rounded_to(model, file, tmp_path / "run")
    other = tmp_path / "other.gguf"
    found = read_imatrix(file)
    write_imatrix(other, Imatrix({name: v.flip(0) for name, v in found.values.items()}, 512))
    with pytest.raises(ResumeError, match="imatrix_sha256"):
        rounded_to(model, other, tmp_path / "run")


def test_what_a_quantized_run_measured_of_its_own_channels_is_exported_only_if_they_are_the_checkpoints(
    model: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="rtn", scheme="q4_0", corpus=CORPUS)
    quantize(model, recipe, tmp_path / "plain")
    data = export_imatrix(tmp_path / "plain", tmp_path / "i.gguf")
    assert (data["tokens"], data["measured_on"]) == (14 * 32, "the quantized model")
    quantize(model, Recipe(method="rtn", scheme="q4_0", corpus=CORPUS, awq=True), tmp_path / "awq")
    with pytest.raises(InputError, match="rotated or scaled channels"):
        export_imatrix(tmp_path / "awq", tmp_path / "j.gguf")
    with pytest.raises(UsageError, match="not as rotated"):
        Recipe(method="rtn", corpus=None, imatrix_sha256="0", rotation="residual")


# --- the older form ----------------------------------------------------------------------------


def older(values: dict[str, Tensor], calls: int = 3, tail: bytes | None = None) -> bytes:
    """The binary form, by its description."""
    data = struct.pack("<i", len(values))
    for linear, means in values.items():
        name = linear.encode()
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, means.numel())
        data += (means.numpy() * np.float32(calls)).tobytes()
    return data + (struct.pack("<ii", 16, 7) + b"wiki.tx" if tail is None else tail)


def by_llama(values: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {ours: theirs for theirs, ours in WORDS.items()}
    return {f"blk.{n.split('.')[2]}.{words[n.split('.', 3)[3]]}.weight": v for n, v in values.items()}


def test_the_older_form_is_read(run: Path, tmp_path: Path) -> None:
    expected, path = measured(run), tmp_path / "imatrix.dat"
    path.write_bytes(older(by_llama(expected) | {"output.weight": torch.ones(64)}, calls=4))
    found = read_imatrix(path)
    assert found.values.keys() == expected.keys()
    assert all(torch.equal(found.values[name], means) for name, means in expected.items())
    assert (found.tokens, found.datasets, found.chunks, found.chunk_size) == (4, ("wiki.tx",), 16, 0)
    path.write_bytes(older(by_llama(expected), tail=b""))  # older still
    assert read_imatrix(path).datasets == ()
    whole = older(by_llama(expected))
    for length in (3, 6, 15, 40, 400, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"imatrix\.dat: "):
            read_imatrix(path)


# --- what is refused ---------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def changed(values: dict[str, Tensor]) -> dict[str, Tensor]:
        copied = {name: v.clone() for name, v in values.items()}
        change(copied)
        return copied

    return changed


FIRST = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(lambda v: v.pop(FIRST)), f"1 of the model's 8 linears are not in it, such as {FIRST}"),
        (edit(lambda v: v.update({FIRST: torch.ones(64)})), f"{FIRST} has 64 values, the model 128 input channels"),
        (edit(lambda v: v[FIRST].zero_()), "no mean squares"),
        (edit(lambda v: v[FIRST][3:4].fill_(-1)), "no mean squares"),
        (edit(lambda v: v[FIRST][3:4].fill_(torch.nan)), "no mean squares"),
    ],
)
def test_an_imatrix_of_another_model_or_no_squares_is_refused_before_any_work(
    model: Path, file: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(path, Imatrix(change(dict(read_imatrix(file).values)), 512))
    with pytest.raises(InputError, match=words):
        rounded_to(model, path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_files_are_told_by_name(model: Path, file: Path, run: Path, tmp_path: Path) -> None:
    weights = write_f16(open_checkpoint(model), tmp_path / "model.gguf", WriteOptions()).path
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    data = file.read_bytes()
    name = b"blk.0.ffn_down.weight.counts"
    assert data.count(name) == 1
    (tmp_path / "half.gguf").write_bytes(data.replace(name, name[:-1] + b"z"))
    for path, words in (
        (weights, r"general\.type is 'model', not 'imatrix'"),
        (tmp_path / "a.safetensors", "neither a GGUF nor an imatrix"),
        (tmp_path / "empty", "needs 4 bytes"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "half.gguf", r"blk\.0\.ffn_down\.weight\.counts is missing"),
    ):
        with pytest.raises(InputError, match=words):
            read_imatrix(path)
