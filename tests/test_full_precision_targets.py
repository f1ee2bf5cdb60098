"""Full-precision targets: the shifted weights are what least squares says, and they bring a model nearer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_quantize import CORPUS, OTHER_TEXT, TEXT, digests
from test_solvers import problem
from torch import Tensor

from phi4edge.calibration.budget import plan_memory
from phi4edge.calibration.statistics import SHARD, InputMoments, LayerStats, shards
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.model.block import forward_block, load_block
from phi4edge.model.forward import embed
from phi4edge.model.rope import rotary_table
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import gptq
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.solvers._targets import shifted_target
from phi4edge.stages import block_solver, guard, job
from phi4edge.stages.guard import held_out_errors
from phi4edge.stages.inputs import check_tokenizer
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run


def inputs(width: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a linear is fed by the quantized model and by the full-precision one, [samples, length, width]."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(8, 40, width, generator=generator)
    own = exact + 0.2 * torch.randn(8, 40, width, generator=generator) + 0.3 * exact.roll(1, dims=-1)
    return own, exact


def moments(weight: Tensor, own: Tensor, exact: Tensor, **options: float) -> LayerStats:
    collected = InputMoments(own.shape[-1], full=True, exact=weight)
    for i in range(0, own.shape[0], 2):
        collected.add(own[i : i + 2], exact[i : i + 2])
    return collected.result(**options)


def shifted(weight: Tensor, stats: LayerStats, strength: float, damp: float = 0.0, **options: bool) -> Tensor:
    shift = stats.shift
    assert stats.hessian is not None
    assert shift is not None
    base = Problem("layer", weight, stats.hessian, parse_scheme("w4g16"))
    factor = gptq.factor(base, SolverOptions(damp_percent=damp, **options))  # type: ignore[arg-type]
    return shifted_target(weight, factor, shift.values.clone(), strength, multiplied=shift.product)


def weights(rows: int = 20, width: int = 48) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [20, 40])  # few enough for W D to be gathered in place of D, and not
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"group_aware": True}])
def test_the_shifted_target_is_the_least_squares_solution(rows: int, options: dict[str, bool]) -> None:
    """W′ is the matrix that, fed the quantized model's inputs, comes nearest to W fed the full-precision ones."""
    own, exact = inputs()
    weight = weights(rows)
    stats = moments(weight, own, exact)
    target = shifted(weight, stats, 1.0, **options)
    X, Xq = exact.reshape(-1, 48).double(), own.reshape(-1, 48).double()
    best = torch.linalg.lstsq(Xq, X @ weight.double().T).solution.T
    assert float((target - best).norm() / (best - weight).norm()) < 1e-3
    assert torch.allclose(shifted(weight, stats, 0.5, **options), (weight + target) / 2, atol=1e-5)
    assert torch.equal(shifted(weight, stats, 0.0, **options), weight)


def test_the_objective_differs_from_the_shifted_one_by_a_constant() -> None:
    """‖W X − Q X̃‖² − tr((W′ − Q) H (W′ − Q)ᵀ) is the same for every Q."""
    own, exact = inputs()
    generator, weight = torch.Generator().manual_seed(2), weights()
    stats = moments(weight, own, exact)
    assert stats.hessian is not None
    target, H = shifted(weight, stats, 1.0).double(), stats.hessian.double()
    X, Xq = exact.reshape(-1, 48).double(), own.reshape(-1, 48).double()
    constants = []
    for spread in (0.0, 0.1, 1.0):
        Q = weight.double() + spread * torch.randn(20, 48, generator=generator).double()
        whole = ((X @ weight.double().T - Xq @ Q.T) ** 2).sum() / X.shape[0]
        constants.append(float(whole - (((target - Q) @ H) * (target - Q)).sum()))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-4)


OPTIONS = [{}, {"sink_share": 0.2}, {"sink_share": 0.2, "shrinkage": 0.4}]


@pytest.mark.parametrize("rows", [20, 40])
@pytest.mark.parametrize("options", OPTIONS)
def test_inputs_that_are_a_multiple_shift_the_weight_by_that_multiple(rows: int, options: dict[str, float]) -> None:
    """Sink weights and shrinkage are the same in D and in H."""
    own, _ = inputs()
    weight = weights(rows)
    stats = moments(weight, own, 1.25 * own, **options)
    assert stats.hessian is not None
    assert stats.shift is not None
    wanted = 0.25 * (weight @ stats.hessian if stats.shift.product else stats.hessian)
    assert torch.allclose(stats.shift.values, wanted, atol=1e-4)
    assert torch.allclose(shifted(weight, stats, 1.0, 1e-6), 1.25 * weight, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_product_is_gathered_as_from_the_matrix(options: dict[str, float]) -> None:
    own, exact = inputs()
    few, many = weights(20), weights(40)
    product, matrix = moments(few, own, exact, **options).shift, moments(many, own, exact, **options).shift
    assert product is not None
    assert matrix is not None
    assert product.product
    assert not matrix.product
    assert torch.allclose(product.values, few @ matrix.values, atol=1e-4)


def test_moments_by_shards_add_up_and_hang_on_nothing_but_their_order() -> None:
    own, exact = inputs()
    weight = weights()
    whole = moments(weight, own, exact, sink_share=0.2, shrinkage=0.25)
    for _ in range(2):
        first = InputMoments(48, full=True, exact=weight)
        first.add(own[:4], exact[:4])
        part = first.empty()
        part.add(own[:3], exact[:3])
        part.clear()
        part.add(own[4:], exact[4:])
        first.merge(part)
        stats = first.result(sink_share=0.2, shrinkage=0.25)
        assert stats.tokens == whole.tokens
        for found, wanted in ((stats.hessian, whole.hessian), (stats.mean_square, whole.mean_square)):
            assert found is not None
            assert wanted is not None
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert stats.shift is not None
        assert whole.shift is not None
        assert torch.allclose(stats.shift.values, whole.shift.values, rtol=1e-4, atol=1e-5)


def test_shards_hold_every_sample_once_and_the_last_may_be_short() -> None:
    assert [list(shard) for shard in shards(SHARD + 3)] == [list(range(SHARD)), list(range(SHARD, SHARD + 3))]
    assert shards(SHARD) == [range(SHARD)]


def rows_of(values: Tensor) -> Callable[[slice], Tensor]:
    return values.__getitem__


def test_aiming_at_full_precision_lowers_the_error_against_it_on_held_out_rows() -> None:
    own, exact = inputs(128)
    held_own, held_exact = inputs(128, seed=5)
    base = problem("w4g32")
    stats = moments(base.weight, own, exact)
    plain = gptq.solve(Problem("layer", base.weight, stats.hessian, base.scheme), SolverOptions())
    target = shifted(base.weight, stats, 1.0, 0.01)
    aimed = gptq.solve(Problem("layer", target, stats.hessian, base.scheme), SolverOptions())
    candidates = [rows_of(found.linear.dequantize()) for found in (plain, aimed)]
    without, with_shift = held_out_errors(lambda: [(0, held_own, held_exact)], base.weight, candidates)
    assert with_shift.rest < 0.8 * without.rest


def test_the_guard_compares_with_what_full_precision_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "CHECKED_WEIGHTS", 16 * 48)  # two pieces of the weight
    own, exact = inputs()
    generator = torch.Generator().manual_seed(1)
    weight, other = torch.randn(20, 48, generator=generator), torch.randn(20, 48, generator=generator)
    (found,) = held_out_errors(lambda: [(0, own, exact)], weight, [rows_of(other)])
    aimed, got = exact @ weight.T, own @ other.T
    expected = ((aimed - got)[:, 1:] ** 2).sum() / (aimed[:, 1:] ** 2).sum()
    assert found.rest == pytest.approx(float(expected), rel=1e-5)


def test_dead_columns_and_a_singular_hessian_are_borne() -> None:
    own, exact = inputs()
    own[..., 5], exact[..., 5] = 0, 0
    own[..., 7] = own[..., 6]
    weight = weights()
    stats = moments(weight, own, exact)
    target = shifted(weight, stats, 1.0)
    assert bool(torch.isfinite(target).all())
    assert torch.allclose(target[:, 5], weight[:, 5])
    made = gptq.factor(Problem("layer", weight, stats.hessian, parse_scheme("w4g16")), SolverOptions(damp_percent=0.0))
    assert [event.kind for event in made.events] == ["dead_columns", "damping_raised"]


def test_a_run_that_aims_at_full_precision_comes_nearer_to_it(phi4_checkpoint: Path, tmp_path: Path) -> None:
    """The residual stream after the last block, on text that was not calibrated on."""
    corpus = CorpusRecipe(OTHER_TEXT, samples=64, sequence_length=48)
    model = open_checkpoint(phi4_checkpoint)
    from phi4edge.calibration.corpus import load_corpus

    tokens = load_corpus(TEXT, check_tokenizer(model.index), samples=8, sequence_length=48).tokens
    rotary = rotary_table(model.config.rope, 48)

    def outputs(source: object) -> Tensor:
        hidden = embed(model, tokens)
        for layer in range(model.config.num_layers):
            hidden = forward_block(load_block(source, layer), hidden, rotary, model.config)  # type: ignore[arg-type]
        return hidden

    exact, errors = outputs(model), []
    for strength in (0.0, 1.0):
        recipe = Recipe(corpus=corpus, full_precision_targets=strength)
        data = quantize(phi4_checkpoint, recipe, tmp_path / f"{strength}").manifest["data"]
        errors.append(float((outputs(open_run(tmp_path / f"{strength}")) - exact).norm() / exact.norm()))
        shifts = [linear.get("target_shift") for linear in data["linears"]]
        # Nothing is quantized before the first linear of the first block: its inputs are full precision's.
        assert shifts == [None] * 8 if strength == 0 else shifts[0] == 0 and all(s > 0 for s in shifts[1:])
    assert errors[1] < errors[0]


def test_the_second_stream_is_in_the_memory_plan(phi4_checkpoint: Path) -> None:
    config = open_checkpoint(phi4_checkpoint).config
    corpus = CorpusRecipe(TEXT, samples=4096, sequence_length=512)
    one, two = (
        plan_memory(config, Recipe(corpus=corpus, full_precision_targets=alpha), 1 << 50) for alpha in (0.0, 0.5)
    )
    stores = corpus.tokens * (config.hidden_size + config.q_size + config.intermediate_size) * 4
    assert two.expected - one.expected > 0.9 * stores > 2**30  # but for what this process grew by in between


def test_streams_on_disk_give_the_same_bytes_as_in_ram(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(corpus=CORPUS, full_precision_targets=0.5)
    quantize(phi4_checkpoint, recipe, tmp_path / "ram")
    monkeypatch.setattr(job, "plan_memory", lambda *a: replace(plan_memory(*a), spill=True))
    quantize(phi4_checkpoint, recipe, tmp_path / "disk")
    assert digests(tmp_path / "disk") == digests(tmp_path / "ram")
    assert not list((tmp_path / "disk" / "hidden").iterdir())


def test_impossible_strengths_are_usage_errors() -> None:
    for bad in (-0.1, 1.1):
        with pytest.raises(UsageError, match="full_precision_targets"):
            Recipe(full_precision_targets=bad)
    with pytest.raises(UsageError, match="need calibration text"):
        Recipe(method="rtn", corpus=None, full_precision_targets=0.5)


def test_a_shift_that_loses_gives_way_to_the_solver_without_it(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard tries the weights as they are before it takes rounding to nearest."""
    quantize(phi4_checkpoint, Recipe(corpus=CORPUS), tmp_path / "plain")
    monkeypatch.setattr(block_solver, "shifted_target", lambda weight, *_, **__: weight * 1.5)
    summary = quantize(phi4_checkpoint, Recipe(corpus=CORPUS, full_precision_targets=0.5), tmp_path / "run")
    data = summary.manifest["data"]
    assert {event["kind"] for event in data["events"]} & {"fallback_to_unshifted", "fallback_to_rtn"}
    unshifted = {event["where"] for event in data["events"] if event["kind"] == "fallback_to_unshifted"}
    first = "model.layers.0.self_attn.qkv_proj"
    assert first in unshifted
    assert torch.equal(open_run(tmp_path / "run").load(first).codes, open_run(tmp_path / "plain").load(first).codes)
    record = next(linear for linear in data["linears"] if linear["name"] == first)
    assert record["method"] == "gptq"
    assert record["heldout_error"]["rest"] <= record["heldout_error_rtn"]["rest"]
