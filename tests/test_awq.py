"""AWQ: scales that leave the function as it is, that GQA does not break, and that do what they are for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_config, write_checkpoint
from torch import Tensor

from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.model.block import LINEARS
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import Overlay, WeightSource
from phi4edge.model.topology import LINKS, NORMS
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.solvers import rtn
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.stages import export, scaling
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.transforms.awq import Scaling, divide_rows, fold_gain, search_scales
from phi4edge.writers._api import WriteOptions

TEXT = str(Path(__file__).with_name("support.py"))
VALUES = "model.layers.1.self_attn.qkv_proj.weight"
OUTPUT = "model.layers.1.self_attn.o_proj.weight"
CORPUS = CorpusRecipe(corpus=TEXT, samples=8, sequence_length=48)
AWQ = Recipe(method="awq", scheme="q4_0", corpus=CORPUS)


def with_outliers(folder: Path, kind: str) -> Path:
    """A checkpoint some of whose channels are far stronger than others, as in trained models."""
    write_checkpoint(folder, kind)
    weights = load_file(folder / "model.safetensors")
    config = parse_config(tiny_config(kind))
    for layer in range(config.num_layers):
        for link in LINKS:
            values = weights[f"model.layers.{layer}.{link.producer}.weight"]
            values[link.rows(config)][::8] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(tmp_path_factory.mktemp("outliers") / "phi4", "phi4")


def random_scales(count: int, seed: int) -> Tensor:
    return torch.exp(0.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def folded(source: WeightSource, dtype: torch.dtype = torch.bfloat16) -> Overlay:
    """``source`` with random scales on every link of every block."""
    config, changed = source.config, {}
    for layer in range(config.num_layers):
        for number, link in enumerate(LINKS):
            producer, consumer = (f"model.layers.{layer}.{name}.weight" for name in (link.producer, link.consumer))
            rows, channels = link.rows(config), link.channels(config)
            scales = random_scales(rows.stop - rows.start, 10 * layer + number)
            values = changed.get(producer, source.tensor(producer))
            if link.from_norm:
                changed[producer], factors = fold_gain(values, scales, dtype)
            else:
                changed[producer], factors = divide_rows(values, rows, scales), scales[channels]
            changed[consumer] = source.tensor(consumer) * factors
    return Overlay(source, changed)


def logits(source: WeightSource, length: int = 70) -> Tensor:
    tokens = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(1))
    return torch.stack(list(stream_logits(source, tokens)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)], ids=["gqa", "one kv head", "mha"])
@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_folding_leaves_full_precision_logits_unchanged(kind: str, heads: tuple[int, int], tmp_path: Path) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    source = open_checkpoint(write_checkpoint(tmp_path / "model", kind, **shape))
    changed = folded(source)
    assert relative(changed.tensor(OUTPUT), source.tensor(OUTPUT)) > 0.2
    assert relative(logits(changed), logits(source)) <= 1e-5


def test_queries_keys_and_gates_are_not_divided(phi4_checkpoint: Path) -> None:
    """AutoAWQ divides the last rows of qkv_proj by the scales of o_proj's columns: with GQA, keys and queries too."""
    config = open_checkpoint(phi4_checkpoint).config
    for link, kept in ((LINKS[1], config.q_size + config.kv_size), (LINKS[3], config.intermediate_size)):
        whole = torch.randn(config.linear_shapes[link.producer], generator=torch.Generator().manual_seed(0))
        rows = link.rows(config)
        assert (rows.start, rows.stop) == (kept, whole.shape[0])
        divided = divide_rows(whole, rows, torch.full((rows.stop - rows.start,), 2.0))
        assert torch.equal(divided[:kept], whole[:kept])
        assert torch.equal(divided[kept:], whole[kept:] / 2)


def test_scales_are_tied_over_the_query_heads_that_share_a_kv_head(phi4_checkpoint: Path) -> None:
    source = open_checkpoint(phi4_checkpoint)
    config, factors = source.config, folded(source).tensor(OUTPUT)[0] / source.tensor(OUTPUT)[0]
    by_head = factors.reshape(config.num_kv_heads, -1, config.head_dim)
    assert by_head.shape[1] == 2
    assert torch.allclose(by_head[:, 0], by_head[:, 1], rtol=1e-5)
    assert not torch.allclose(by_head[0], by_head[1], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folded_gain_is_storable_and_its_factors_restore_it(dtype: torch.dtype) -> None:
    gain = torch.tensor([1.0, -0.3, 0.0, 1e-7, 3.0])
    scales = torch.tensor([1.7, 0.03, 2.0, 900.0, 1e-6])
    stored, factors = fold_gain(gain, scales, dtype)
    assert torch.isfinite(factors).all()
    assert torch.allclose(stored * factors, gain, rtol=2e-7, atol=0)
    changed = stored != gain
    assert torch.equal(stored[changed].to(dtype).float(), stored[changed])
    assert changed[:2].all()


def outlier_problem(seed: int, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A weight, and inputs in which every eighth channel is twenty times as strong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, columns, generator=generator)
    x[:, ::8] *= 20
    return torch.randn(96, columns, generator=generator), x


@pytest.mark.parametrize("scheme", ["w4g32", "w4g64-asym", "q4_1"])
@pytest.mark.parametrize("seed", range(3))
def test_awq_loses_less_than_rtn_where_channels_stick_out(scheme: str, seed: int) -> None:
    W, x = outlier_problem(seed)
    H = x.T @ x / x.shape[0]
    found = search_scales(W, H, parse_scheme(scheme), torch.arange(W.shape[1]))

    def output_error(factors: Tensor) -> float:
        stats = H / factors / factors[:, None]
        problem = Problem("linear", W * factors, stats, parse_scheme(scheme))
        rounded = rtn.solve(problem, SolverOptions()).linear.dequantize() / factors
        return float((x @ (W - rounded).T).pow(2).sum(1).mean())

    plain, scaled = output_error(torch.ones(W.shape[1])), output_error(found.scales)
    assert found.alpha > 0
    assert scaled < 0.9 * plain
    # What the search reported is the error over the outputs, without the outputs.
    assert found.error * W.shape[0] == pytest.approx(scaled, rel=1e-3)
    assert found.error_unscaled * W.shape[0] == pytest.approx(plain, rel=1e-3)


def test_where_scaling_does_not_help_it_is_left_alone() -> None:
    W = outlier_problem(0)[0]
    found = search_scales(W, torch.eye(128), parse_scheme("w4g32"), torch.arange(128))
    assert found.alpha == 0
    assert torch.equal(found.scales, torch.ones(128))


def test_method_awq_goes_through_every_format_and_verifies(outliers: Path, tmp_path: Path) -> None:
    manifest = quantize(outliers, AWQ, tmp_path / "run").manifest["data"]
    assert all(linear["awq"]["error"] <= linear["awq"]["error_unscaled"] for linear in manifest["linears"])
    scaled = {linear["name"].split(".", 3)[3] for linear in manifest["linears"] if linear["awq"]["alpha"] > 0}
    assert scaled >= set(LINEARS) - {"self_attn.o_proj"}
    model, checkpoint = open_run(tmp_path / "run"), open_checkpoint(outliers)
    assert {name.split(".")[3] for name in model.replaced} == set(NORMS)
    for name, form in (("model.gguf", "gguf"), ("folder", "gptq")):
        export.export(tmp_path / "run", form, tmp_path / name, WriteOptions(embedding="f16", head="f16"))
        assert verify(tmp_path / name, tmp_path / "run").linears == 8
        reader = export.reader_of(tmp_path / name)
        assert relative(logits(reader), logits(model)) <= 1e-3  # the head and the embedding are float16 in a GGUF
        for norm, gain in model.replaced.items():
            assert torch.equal(reader.tensor(norm), gain)
            assert not torch.equal(gain, checkpoint.tensor(norm))


@pytest.mark.parametrize("targets", [0.0, 1.0], ids=["own inputs", "full-precision targets"])
@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_a_run_folds_any_scales_without_changing_the_function(
    kind: str,
    targets: float,
    phi4_checkpoint: Path,
    mini_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scales that no search would choose, at 8 bits: what is left of the difference is rounding."""
    folder = phi4_checkpoint if kind == "phi4" else mini_checkpoint

    def any_scales(weight: Tensor, hessian: Tensor, scheme: Scheme, channels: Tensor) -> Scaling:
        return Scaling(1.0, random_scales(int(channels.max()) + 1, weight.shape[0]), 0.0, 0.0)

    recipe = replace(AWQ, scheme="w8g32", full_precision_targets=targets)
    quantize(folder, replace(recipe, method="rtn"), tmp_path / "rtn")
    monkeypatch.setattr(scaling, "search_scales", any_scales)
    manifest = quantize(folder, recipe, tmp_path / "awq").manifest["data"]
    assert all(linear["heldout_error"]["rest"] < 0.01 for linear in manifest["linears"] if targets)
    exact = logits(open_checkpoint(folder))
    assert not torch.equal(open_run(tmp_path / "awq").tensor(VALUES), open_run(tmp_path / "rtn").tensor(VALUES))
    assert relative(logits(open_run(tmp_path / "awq")), exact) <= 2 * relative(
        logits(open_run(tmp_path / "rtn")), exact
    )


def digests(run: Path) -> dict[str, str]:
    kept = [*run.glob("blocks/*"), run / "imatrix.safetensors", run / "manifest.json"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.mark.parametrize(("method", "targets"), [("awq", 0.0), ("gptq", 0.0), ("gptq", 0.5)])
def test_a_lost_residual_stream_is_recomputed_through_changed_norms(
    method: str, targets: float, outliers: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", replace(AWQ, method=method, awq=True, full_precision_targets=targets)
    quantize(outliers, recipe, run)
    whole = digests(run)
    assert any(key.endswith("norm.weight") for key in load_file(run / "blocks" / "00000.safetensors"))
    lines = (run / JOURNAL).read_bytes().split(b"\n")
    (run / JOURNAL).write_bytes(lines[0] + b"\n")  # as if killed after block 0; its stream is gone
    (run / "manifest.json").unlink()
    quantize(outliers, recipe, run)
    assert digests(run) == whole


def test_scaled_inputs_are_what_the_solver_and_the_imatrix_see(outliers: Path, tmp_path: Path) -> None:
    """The imatrix of the first linear is that of norm(embedding) under the gain that the run stores."""
    from phi4edge.calibration.corpus import load_corpus
    from phi4edge.model.block import rms_norm
    from phi4edge.model.forward import embed
    from phi4edge.stages.inputs import check_tokenizer

    quantize(outliers, replace(AWQ, guard=False), tmp_path / "run")
    model = open_run(tmp_path / "run")
    tokens = load_corpus(TEXT, check_tokenizer(model.checkpoint.index), samples=8, sequence_length=48).tokens
    gain = model.tensor("model.layers.0.input_layernorm.weight")
    x = rms_norm(embed(model, tokens), gain, model.config.rms_norm_eps)
    recorded = load_file(tmp_path / "run" / "imatrix.safetensors")["model.layers.0.self_attn.qkv_proj.imatrix"]
    assert torch.allclose(recorded, x.pow(2).mean((0, 1)), rtol=1e-4)


def test_awq_without_text_is_a_usage_error() -> None:
    for recipe in ({"method": "awq"}, {"method": "rtn", "awq": True}):
        with pytest.raises(UsageError, match="awq needs calibration text"):
            Recipe(**recipe, corpus=None)  # type: ignore[arg-type]


def test_the_command_line_offers_awq_as_a_method_and_as_a_switch(outliers: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from phi4edge.cli.commands.quantize import command

    arguments = [str(outliers), "--corpus", TEXT, "--samples", "8", "--sequence-length", "48", "--json"]
    for name, flags in (("method", ["--method", "awq"]), ("switch", ["--method", "gptq", "--awq"])):
        result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / name), *flags])
        assert result.exit_code == 0, result.output
        linears = json.loads(result.stdout)["data"]["linears"]
        assert all("awq" in linear for linear in linears)
