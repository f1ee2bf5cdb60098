"""Tuning: the gradient is the model's own, held-out KLD falls, and a run that was killed ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from drifting import mean_kld
from killing import killed_at
from rounded import rounded
from safetensors.torch import load_file
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe, TuningRecipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.distillation.adam import adam_step, learning_rate, new_state
from phi4edge.distillation.block import BlockRunner
from phi4edge.distillation.loss import Head
from phi4edge.distillation.parameters import QuantizedBlock, gradients_of_theta, values_of
from phi4edge.model.block import LINEARS, Block, forward_block, rms_norm
from phi4edge.model.rope import rotary_table
from phi4edge.quant.grid import grid_for
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages import tune as tune_stage
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import block_file, open_run, tuned_file
from phi4edge.stages.tuning_state import score

CORPUS = CorpusRecipe(samples=96, sequence_length=64)
TUNING = TuningRecipe(passes=2, learning_rate=3e-3, batch=8)
RECIPE = Recipe(scheme="q4_0", corpus=CORPUS, tuning=TUNING)


def quantized_block(folder: Path, scheme_name: str, layer: int = 0) -> QuantizedBlock:
    checkpoint, scheme = open_checkpoint(folder), parse_scheme(scheme_name)
    prefix = f"model.layers.{layer}."
    linears = tuple(rounded(prefix + n, checkpoint.tensor(f"{prefix}{n}.weight"), scheme) for n in LINEARS)
    norms = [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
    return QuantizedBlock(linears, {name: checkpoint.tensor(name) for name in norms}, torch.bfloat16)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q4_k"])
def test_gradients_of_theta_are_those_of_what_it_makes(scheme: str) -> None:
    generator = torch.Generator().manual_seed(2)
    linear = rounded("layer", torch.randn(6, 512, generator=generator), parse_scheme(scheme))
    block = QuantizedBlock((linear,), {}, torch.float32)
    # In float32 nothing is rounded, so that autograd sees the formula; and a minimum of zero is one too.
    continuous = {name: replace(c, dtype=torch.float32) for name, c in block.continuous.items()}
    theta = {
        n: (0.01 * torch.randn(c.start.shape, generator=generator)).requires_grad_() for n, c in continuous.items()
    }
    values = values_of(continuous, theta)
    given = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
    expected = torch.autograd.grad(list(values.values()), list(theta.values()), list(given.values()))
    found = gradients_of_theta(continuous, given)
    for name, gradient in zip(theta, expected, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("scheme", ["q4_1", "q4_k"])
def test_a_scale_takes_its_minimum_along(scheme: str) -> None:
    """A scale a tenth larger makes every weight a tenth larger, and moves none to another place on its grid."""
    generator = torch.Generator().manual_seed(2)
    linear = rounded("layer", torch.randn(6, 512, generator=generator), parse_scheme(scheme))
    block = QuantizedBlock((linear,), {}, torch.float32)
    continuous = block.continuous
    theta = {n: torch.full(c.start.shape, 0.1 if n.endswith("scales") else 0.0) for n, c in continuous.items()}
    after = block.with_values(values_of(continuous, theta), {}).linears[0].dequantize()
    assert torch.allclose(after, 1.1 * linear.dequantize(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "w4g32-asym", "w8row"])
def test_gradients_equal_those_of_the_whole_graph(scheme: str, phi4_checkpoint: Path) -> None:
    """Against autograd through dequantization, block and loss in one graph, over a batch in two pieces."""
    block, config = quantized_block(phi4_checkpoint, scheme), open_checkpoint(phi4_checkpoint).config
    rotary = rotary_table(config.rope, 24)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, config.hidden_size, generator=generator)
    dy = torch.randn(3, 24, config.hidden_size, generator=generator)
    runner, slopes = BlockRunner(block, rotary, config), [dy[:2], dy[2:]]
    arriving, found, weight_gradients = runner.backward(slopes, [x[:2], x[2:]])
    keeping = BlockRunner(block, rotary, config)
    outputs = [keeping.forward_kept(x[:2]), keeping.forward_kept(x[2:])]
    assert torch.equal(torch.cat(outputs), torch.cat([runner.forward(x[:2]), runner.forward(x[2:])]))
    kept_arriving, kept_found, kept_weight_gradients = keeping.backward(slopes)
    assert all(torch.equal(a, b) for a, b in zip(arriving, kept_arriving, strict=True))
    assert all(torch.equal(found[name], kept_found[name]) for name in found)
    assert all(torch.equal(weight_gradients[name], kept_weight_gradients[name]) for name in weight_gradients)
    one_by_one, weights_one_by_one = BlockRunner(block, rotary, config).learn([x[:2], x[2:]], lambda i, _: slopes[i])
    assert all(torch.equal(found[name], one_by_one[name]) for name in found)
    assert all(torch.equal(weight_gradients[name], weights_one_by_one[name]) for name in weight_gradients)

    leaves: dict[str, Tensor] = {name: gain.clone().requires_grad_() for name, gain in block.gains.items()}
    weights = []
    for linear in block.linears:
        grid = grid_for(linear.scheme)
        params = dict(linear.params)
        for field in grid.tunable:
            leaves[f"{linear.name}.{field}"] = params[field] = params[field].float().requires_grad_()
        weights.append(grid.decode(linear.codes, params))
    for weight in weights:
        weight.retain_grad()
    qkv, o, gate_up, down = weights
    first, second = (leaves[name] for name in block.gains)
    leaf = x.clone().requires_grad_()
    forward_block(Block(first, qkv, o, second, gate_up, down), leaf, rotary, config).backward(dy)
    assert leaf.grad is not None
    assert torch.allclose(torch.cat(arriving), leaf.grad, atol=1e-5)
    for linear, weight in zip(block.linears, weights, strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight_gradients[linear.name], weight.grad, atol=1e-4, rtol=1e-4)
    assert found.keys() == leaves.keys()
    for name, value in leaves.items():
        assert value.grad is not None
        scale = float(value.grad.abs().max())
        assert torch.allclose(found[name], value.grad, atol=1e-5 * scale, rtol=1e-4), name


def test_loss_and_slope_are_those_of_kld(phi4_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    weight = checkpoint.tensor("lm_head.weight")
    head = Head(lambda start, stop: weight[start:stop], len(weight), 100)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 64, generator=generator).requires_grad_()
    reference = torch.randn(20, 64, generator=generator)
    ln_q = F.log_softmax(F.linear(hidden, weight), 1)
    ln_p = F.log_softmax(F.linear(reference, weight), 1)
    expected = F.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(1)
    expected.sum().backward()
    values, slope = head.divergence(hidden.detach(), reference, gradient=True)
    assert slope is not None
    assert torch.allclose(values.float(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(slope, hidden.grad, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    same, _ = head.divergence(reference, reference, gradient=False)
    assert float(same.abs().max()) < 1e-6


def test_sampled_slope_is_that_of_words_drawn_from_the_model() -> None:
    """With the head's rows orthogonal, the slope says which word was drawn; drawn often, words come as P has them."""
    vocabulary, positions = 50, 4000
    generator = torch.Generator().manual_seed(2)
    weight = torch.linalg.qr(torch.randn(64, vocabulary, generator=generator)).Q.T.contiguous()
    hidden = (torch.randn(1, 64, generator=generator) * 8).expand(positions, 64).contiguous()
    p = F.softmax(F.linear(hidden[:1], weight).double(), 1)[0]
    found = []
    for rows in (7, vocabulary):  # slices must not matter
        head = Head(lambda start, stop: weight[start:stop], vocabulary, rows)
        slope, spread = head.sampled_slope(hidden, torch.Generator().manual_seed(3))
        assert torch.allclose(spread.double(), positions * p * (1 - p), rtol=1e-4, atol=1e-4)
        drawn = p - F.linear(slope, weight).double()  # one where the word was drawn, zero elsewhere
        assert torch.allclose(drawn.sum(1), torch.ones(positions, dtype=torch.float64), atol=1e-4)
        assert torch.allclose(drawn.amax(1), torch.ones(positions, dtype=torch.float64), atol=1e-4)
        found.append(drawn.argmax(1))
    assert float((found[0] != found[1]).double().mean()) < 0.002, "another order of sums moves words at the edges"
    counts = torch.bincount(found[0], minlength=vocabulary).double()
    errors = (counts - positions * p) / (positions * p * (1 - p)).sqrt().clamp_min(1)
    assert float(errors.abs().max()) < 5
    assert float(errors.square().mean()) < 2.5


def test_adam_is_torchs_adam() -> None:
    theta = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([theta], betas=(0.9, 0.95), eps=1e-12)
    state = new_state(theta)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        gradient, rate = torch.randn(5, generator=generator), learning_rate(step, 10, 1e-2)
        optimizer.param_groups[0]["lr"] = rate
        theta.grad = gradient
        optimizer.step()
        state = adam_step(state, gradient, step, rate)
    assert torch.allclose(state[0], theta.detach(), rtol=1e-4, atol=1e-7)
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[0] < 0.15
    assert rates[-1] < 0.02


def run_digests(run: Path) -> dict[str, str]:
    kept = [*run.glob("blocks/*"), *run.glob("tuning/*.safetensors"), run / "manifest.json"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def tuned(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    return run


def untuned(run: Path) -> Path:
    """The same run as its manifest would describe it without tuning."""
    other = run.parent / "untuned"
    other.mkdir()
    for path in run.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    document = json.loads((run / "manifest.json").read_text())
    document["data"]["tuning"] = None
    (other / "manifest.json").write_text(json.dumps(document))
    return other


def test_tuning_lowers_kld_on_unseen_text_and_keeps_the_codes(tuned: Path, phi4_checkpoint: Path) -> None:
    after, before = (
        mean_kld(phi4_checkpoint, open_run(run), __file__, samples=8, length=48) for run in (tuned, untuned(tuned))
    )
    assert after < 0.9 * before
    manifest = json.loads((tuned / "manifest.json").read_text())["data"]
    evaluated = manifest["tuning"]["heldout"]
    first, last = evaluated[0], [e for e in evaluated if not e["halvings"]][-1]
    assert first["step"] == 0
    assert len(first["domains"]) >= 3
    assert manifest["tuning"]["kept_step"] == last["step"] == manifest["tuning"]["steps"] == 2 * 84 // 8
    assert manifest["tuning"]["kept_halvings"] == 0
    assert [e["halvings"] for e in evaluated if e["halvings"]] == [1]  # tried, and worse
    assert len(manifest["tuning"]["losses"]) == manifest["tuning"]["steps"]
    assert all(last["domains"][d]["kld"] < first["domains"][d]["kld"] for d in first["domains"])
    stored = load_file(tuned / tuned_file(0))
    codes = load_file(tuned / block_file(0))
    for name, values in stored.items():
        assert values.dtype == (torch.bfloat16 if "norm" in name else torch.float16)
        if "norm" not in name:
            change = (values.float() - codes[name].float()).abs() / codes[name].float().abs().clamp_min(1e-6)
            assert 0 < float(change.median()) < 0.2, name
    assert not any(name.endswith("codes") for name in stored)


def test_states_on_disk_give_the_same_bytes(
    tuned: Path, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget too small for codes and states moves them to files, and changes nothing else."""
    from dataclasses import replace

    from phi4edge.stages import job

    plan = job.plan_memory
    monkeypatch.setattr(job, "plan_memory", lambda *a: replace(plan(*a), keep_graphs=False, spill_tuning=True))
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
    assert run_digests(tmp_path / "run") == run_digests(tuned)
    assert not list((tmp_path / "run" / "tuning").glob("state-*"))


KILLER = """
import phi4edge.stages.tune as tune
tune._COMMIT_SECONDS = 0.0
inner = tune.tune
def outer(*arguments):
    os.fsync, Path.replace, Path.rename = dying(os.fsync), dying(Path.replace), dying(Path.rename)
    return inner(*arguments)
import phi4edge.stages.quantize as quantize
quantize.tune = outer
from phi4edge.core.recipe import CorpusRecipe, Recipe, TuningRecipe
recipe = Recipe(scheme="q4_0", corpus=CorpusRecipe(sys.argv[4], 96, 64), tuning=TuningRecipe(2, 3e-3, 8))
quantize.quantize(sys.argv[2], recipe, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_while_tuning_and_resumed_gives_the_same_bytes(phi4_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"  # a file: nothing has to be gathered at each start
    text.write_text("".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_t*.py"))))
    recipe = replace(RECIPE, corpus=replace(CORPUS, corpus=str(text)))
    quantize(phi4_checkpoint, recipe, tmp_path / "undisturbed")
    run, kills, steps = tmp_path / "run", 0, 0
    for stop in (2, 5, 17, 31, 22, 43, 60):
        if not killed_at(stop, KILLER, phi4_checkpoint, run, text):
            break
        kills += 1
        journal = run / "tuning" / JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        now = max((json.loads(line)["record"].get("step", 0) for line in lines), default=0)
        assert now >= steps, "a finished step was lost"
        steps = now
        assert not (run / "manifest.json").exists()
    assert kills >= 5
    assert steps > 3
    quantize(phi4_checkpoint, recipe, run)
    assert run_digests(run) == run_digests(tmp_path / "undisturbed")


def test_a_damaged_state_is_done_again(
    tuned: Path, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def stop(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_stage, "_COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(tune_stage._Tuner, "_write_result", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(phi4_checkpoint, RECIPE, run)
    newest = max((run / "tuning").glob("state-*"))
    data = bytearray((newest / "00001.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "00001.safetensors").write_bytes(data)
    quantize(phi4_checkpoint, RECIPE, run)
    assert run_digests(run) == run_digests(tuned)


def test_changes_that_went_too_far_are_halved(phi4_checkpoint: Path, tmp_path: Path) -> None:
    """At twenty times the rate, a part of the way is better than all of it, and than none."""
    recipe = replace(RECIPE, tuning=replace(TUNING, learning_rate=0.06))
    tuning = quantize(phi4_checkpoint, recipe, tmp_path / "run").manifest["data"]["tuning"]
    evaluated = {(e["step"], e["halvings"]): score(e["domains"]) for e in tuning["heldout"]}
    steps, halvings = tuning["steps"], tuning["kept_halvings"]
    chain = [evaluated[steps, h] for h in range(max(h for _, h in evaluated) + 1)]
    assert tuning["kept_step"] == steps
    assert halvings > 0
    assert evaluated[steps, halvings] == min(evaluated.values()) < min(chain[0], evaluated[0, 0])
    assert all(b < a for a, b in pairwise(chain[:-1]))  # as long as it helps, and three times at the most
    assert len(chain) == 4 or chain[-1] >= chain[-2]


def test_halving_takes_every_value_half_way_back(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_stage._Tuner, "_write_result", stop)
    states = []
    for halvings in (0, 1):
        monkeypatch.setattr(tune_stage, "_HALVINGS", halvings)
        with pytest.raises(KeyboardInterrupt):
            quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
        newest = max((tmp_path / "run" / "tuning").glob("state-*"))
        states.append([load_file(path) for path in sorted(newest.iterdir())])
    for whole, half in zip(*states, strict=True):
        for name, values in whole.items():
            assert float(values[0].abs().max()) > 0
            assert torch.equal(half[name][0], values[0] / 2)


def test_tuning_without_held_out_text_is_refused() -> None:
    with pytest.raises(UsageError, match="kept aside"):
        Recipe(corpus=CORPUS, guard=False, tuning=TUNING)
    with pytest.raises(UsageError, match="kept aside"):
        Recipe(method="rtn", corpus=None, tuning=TUNING)


def test_final_norm_is_tuned_too(tuned: Path) -> None:
    model = open_run(tuned)
    gain = model.tensor("model.norm.weight")
    assert not torch.equal(gain, model.checkpoint.tensor("model.norm.weight"))
    assert torch.equal(gain, gain.to(torch.bfloat16).float())
    assert torch.isfinite(rms_norm(torch.ones(1, 64), gain, 1e-5)).all()
