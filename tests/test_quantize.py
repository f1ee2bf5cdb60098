"""Quantize: what a run promises, on small models of both kinds."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_at
from safetensors.torch import load_file, save_file
from support import write_checkpoint

from phi4edge.calibration import judging
from phi4edge.calibration.statistics import InputMoments, LayerStats
from phi4edge.calibration.store import ActivationStore
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, Phi4EdgeError, ResumeError, TargetError, UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.model.block import LINEARS, forward_block, load_block
from phi4edge.model.forward import embed, stream_logits
from phi4edge.model.rope import rotary_table
from phi4edge.stages import calibrate as calibration
from phi4edge.stages import job
from phi4edge.stages.calibrate import calibrate, corpus_of_run
from phi4edge.stages.guard import HeldOut
from phi4edge.stages.inputs import check_tokenizer
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.samples import LocalSamples

TEXT = str(Path(__file__).with_name("support.py"))  # calibration text of these tests
OTHER_TEXT = str(Path(__file__))  # and text that they evaluate on
CORPUS = CorpusRecipe(corpus=TEXT, samples=8, sequence_length=48)
RECIPE = Recipe(corpus=CORPUS)


def digests(run: Path) -> dict[str, str]:
    """Hashes of everything that a finished run keeps, but for what it cost and where things lay."""
    kept = [*run.glob("blocks/*"), run / "imatrix.safetensors", run / "manifest.json"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def undisturbed(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "whole"
    quantize(phi4_checkpoint, RECIPE, run)
    return run


@pytest.mark.parametrize("kind", ["phi4", "mini"])
@pytest.mark.parametrize("scheme", ["w4g32", "w4g32-asym", "w8row", "q4_1", "q8_0"])
def test_a_finished_run_holds_every_linear(
    kind: str, scheme: str, phi4_checkpoint: Path, mini_checkpoint: Path, tmp_path: Path
) -> None:
    folder = phi4_checkpoint if kind == "phi4" else mini_checkpoint
    summary = quantize(folder, Recipe(scheme=scheme, corpus=CORPUS), tmp_path / "run")
    model = open_run(tmp_path / "run")
    assert len(model.linears) == 8 == len(summary.manifest["data"]["linears"])
    for name in model.linears:
        exact, kept = model.checkpoint.tensor(f"{name}.weight"), model.load(name).dequantize()
        assert float((exact - kept).norm() / exact.norm()) < (0.2 if "4" in scheme else 0.02)


def test_two_runs_give_the_same_bytes(undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    quantize(phi4_checkpoint, RECIPE, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(undisturbed)


def test_activations_on_disk_give_the_same_bytes_as_in_ram(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from phi4edge.stages import job as module

    whole = module.plan_memory
    monkeypatch.setattr(module, "plan_memory", lambda *a: replace(whole(*a), spill=True))
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(undisturbed)
    assert not list((tmp_path / "run" / "hidden").iterdir())


def test_the_next_block_sees_the_outputs_of_the_quantized_ones(undisturbed: Path, phi4_checkpoint: Path) -> None:
    """The recorded imatrix of block 1 is that of the quantized block 0's outputs, not of the full-precision ones."""
    model, exact = open_run(undisturbed), open_checkpoint(phi4_checkpoint)
    from phi4edge.calibration.corpus import load_corpus

    tokens = load_corpus(TEXT, check_tokenizer(exact.index), samples=8, sequence_length=48).tokens[:7]
    rotary = rotary_table(exact.config.rope, 48)

    def mean_square(source: object) -> torch.Tensor:
        block, following = load_block(source, 0), load_block(source, 1)  # type: ignore[arg-type]
        hidden = forward_block(block, embed(exact, tokens), rotary, exact.config)
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5) * following.input_norm
        return normed.pow(2).mean((0, 1))

    recorded = load_file(undisturbed / "imatrix.safetensors")["model.layers.1.self_attn.qkv_proj.imatrix"]
    assert torch.allclose(recorded, mean_square(model), rtol=1e-4)
    assert not torch.allclose(recorded, mean_square(exact), rtol=1e-3)


def test_gptq_drifts_less_than_rtn(phi4_checkpoint: Path, tmp_path: Path) -> None:
    quantize(phi4_checkpoint, Recipe(method="rtn", corpus=None), tmp_path / "rtn")
    quantize(
        phi4_checkpoint, Recipe(corpus=CorpusRecipe(OTHER_TEXT, samples=64, sequence_length=48)), tmp_path / "gptq"
    )
    exact = open_checkpoint(phi4_checkpoint)
    from phi4edge.calibration.corpus import load_corpus

    tokens = load_corpus(TEXT, check_tokenizer(exact.index), samples=8, sequence_length=48).tokens

    def kld(run: Path) -> float:
        total = 0.0
        for p, q in zip(stream_logits(exact, tokens), stream_logits(open_run(run), tokens), strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
        return total / 8

    assert kld(tmp_path / "gptq") < 0.9 * kld(tmp_path / "rtn")


KILLER = """
# Every instant at which the disk changes hands: before an fsync, a rename, an unlink.
os.fsync = dying(os.fsync)
Path.replace = dying(Path.replace)
Path.unlink = dying(Path.unlink)
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.stages.quantize import quantize
quantize(sys.argv[2], Recipe(corpus=CorpusRecipe(sys.argv[4], 8, 48)), Path(sys.argv[3]))
print("finished", count)
"""


@pytest.mark.slow
def test_killed_at_any_commit_point_and_resumed_gives_the_same_bytes(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    """One run, killed at one commit point after the other, each time a little further on."""
    run, kills = tmp_path / "run", 0
    done_before = 0
    for stop in (1, 3, 4, 6, 7, 8, 9, 10, 5, 12, 2, 11):
        if not killed_at(stop, KILLER, phi4_checkpoint, run, TEXT, threads=1):
            break
        kills += 1
        journal = run / JOURNAL
        done = journal.read_bytes().count(b"\n") if journal.exists() else 0
        assert done >= done_before, "a finished block was lost"
        done_before = done
        assert not (run / "manifest.json").exists()
    assert kills >= 5
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


def test_finished_blocks_are_not_redone(undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    """A resumed run reads no more of a finished block: its journal lines, seconds included, stay as they are."""
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    before = (run / JOURNAL).read_bytes()
    (run / "manifest.json").unlink()
    quantize(phi4_checkpoint, RECIPE, run)
    assert (run / JOURNAL).read_bytes() == before
    assert digests(run) == digests(undisturbed)


def test_a_lost_residual_stream_is_recomputed_to_the_same_bytes(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    journal = run / JOURNAL
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")  # as if killed after block 0; its stream is gone
    (run / "manifest.json").unlink()
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def half_written(data: bytes) -> bytes:
    return data[:100]


@pytest.mark.parametrize("damage", [flipped, half_written])
@pytest.mark.parametrize("layer", [0, 1])  # with a block behind it, and the last one
def test_a_damaged_block_is_done_again_and_those_behind_it(
    damage: Callable[[bytes], bytes], layer: int, undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    block = run / "blocks" / f"{layer:05d}.safetensors"
    block.write_bytes(damage(block.read_bytes()))
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


def test_a_damaged_marker_is_refused_and_a_restart_begins_anew(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    (run / "run.json").write_bytes((run / "run.json").read_bytes()[:200])
    with pytest.raises(ResumeError, match=r"run\.json: damaged"):
        quantize(phi4_checkpoint, RECIPE, run)
    quantize(phi4_checkpoint, RECIPE, run, restart=True)
    assert digests(run) == digests(undisturbed)


def test_a_disk_that_takes_no_more_ends_the_run_and_with_more_room_it_goes_on(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    """No file may grow beyond what a block needs: the system's own limit, as on a disk that is full."""
    run = tmp_path / "run"
    size = (undisturbed / "blocks" / "00000.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises((OSError, Phi4EdgeError)):
            quantize(phi4_checkpoint, RECIPE, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (run / "manifest.json").exists()
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


def test_a_changed_recipe_is_refused(undisturbed: Path, phi4_checkpoint: Path) -> None:
    with pytest.raises(ResumeError, match=r"recipe\.damp_percent was 0\.01, is now 0\.02"):
        quantize(phi4_checkpoint, Recipe(corpus=CORPUS, damp_percent=0.02), undisturbed)


def test_a_changed_weight_is_refused_naming_the_file(phi4_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "phi4")
    quantize(folder, RECIPE, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ResumeError, match=r"checkpoint\.model\.safetensors was"):
        quantize(folder, RECIPE, tmp_path / "run")
    with pytest.raises(InputError, match="not finished"):
        open_run(tmp_path / "run")


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", "phi4", intermediate_size=120)
    small = write_checkpoint(tmp_path / "small", "phi4", vocab_size=300)
    poisoned = write_checkpoint(tmp_path / "poisoned", "phi4")
    weights = load_file(poisoned / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][2, 2] = float("nan")
    save_file(weights, poisoned / "model.safetensors")
    bare = write_checkpoint(tmp_path / "bare", "phi4")
    (bare / "tokenizer.json").unlink()
    for folder, message in (
        (odd, r"model\.layers\.0\.mlp\.down_proj: in_features 120 is not divisible by group_size 32"),
        (small, "vocabulary"),
        (poisoned, r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 value"),
        (bare, r"tokenizer\.json"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(folder, RECIPE, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_would_do(
    phi4_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="is too small; this run needs") as caught:
        quantize(phi4_checkpoint, RECIPE, tmp_path / "run", ram_budget=50 * 2**20)
    least = re.search(r"--ram-budget (\d+)MiB", caught.value.hint or "")
    assert least is not None
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run", ram_budget=int(least[1]) * 2**20)


def test_a_factor_in_the_place_of_its_hessian_gives_the_same_bytes_as_one_beside_it(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RECIPE.hessian_used_up
    monkeypatch.setattr(Recipe, "hessian_used_up", False)
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(undisturbed)


@pytest.mark.parametrize("targets", [0.0, 0.5])
def test_samples_are_stored_as_they_stood_before_a_block_however_slow_the_disk_is(
    targets: float, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written while the block behind them is begun, which changes them."""
    recipe, save, slow = replace(RECIPE, full_precision_targets=targets), ActivationStore.save, []

    def late(self: ActivationStore, path: Path) -> str:
        time.sleep(0.5)
        slow.append(path.name)
        return save(self, path)

    quantize(phi4_checkpoint, recipe, tmp_path / "quick")
    monkeypatch.setattr(ActivationStore, "save", late)
    quantize(phi4_checkpoint, recipe, tmp_path / "slow")
    assert len(slow) == (2 if targets else 1)
    kept = [
        [
            {kind: record[kind] for kind in ("hidden", "exact") if kind in record}
            for record in (json.loads(line)["record"] for line in (tmp_path / name / JOURNAL).read_text().splitlines())
        ]
        for name in ("quick", "slow")
    ]
    assert kept[0] == kept[1]
    assert kept[0][0]["hidden"]["sha256"]
    assert digests(tmp_path / "slow") == digests(tmp_path / "quick")


@pytest.mark.parametrize("awq", [False, True])
def test_nobody_holds_a_hessian_once_it_is_used_up(
    awq: bool, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []  # at every comparison of outputs
    result, held_out = InputMoments.result, LocalSamples.held_out

    def watched(self: InputMoments, sink_share: float | None = None, shrinkage: float = 0.0) -> LayerStats:
        stats = result(self, sink_share, shrinkage)
        assert stats.hessian is not None
        made.append(weakref.ref(stats.hessian))
        return stats

    def looked(self: LocalSamples, *arguments: Any) -> list[HeldOut]:
        held.append(made[-1]() is not None)
        return held_out(self, *arguments)

    monkeypatch.setattr(InputMoments, "result", watched)
    monkeypatch.setattr(LocalSamples, "held_out", looked)
    quantize(phi4_checkpoint, replace(RECIPE, awq=awq), tmp_path / "run")
    assert held == [False] * 8
    held.clear()
    quantize(phi4_checkpoint, replace(RECIPE, sweeps=1), tmp_path / "other")  # which asks for H until the end
    assert held == [True] * 8


def test_who_asks_for_a_budget_gets_freed_memory_given_back(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(job, "give_large_arrays_back", lambda: asked.append("quantize"))
    monkeypatch.setattr(calibration, "give_large_arrays_back", lambda: asked.append("calibrate"))
    quantize(phi4_checkpoint, RECIPE, tmp_path / "free")
    calibrate(phi4_checkpoint, CORPUS, tmp_path / "free.imatrix")
    assert not asked
    quantize(phi4_checkpoint, RECIPE, tmp_path / "kept", ram_budget=8 * 2**30)
    calibrate(phi4_checkpoint, CORPUS, tmp_path / "kept.imatrix", ram_budget=8 * 2**30)
    assert asked == ["quantize", "calibrate"]
    assert digests(tmp_path / "kept") == digests(tmp_path / "free")


def test_few_calibration_tokens_are_an_event(phi4_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(corpus=CorpusRecipe(TEXT, samples=2, sequence_length=32))
    manifest = quantize(phi4_checkpoint, recipe, tmp_path / "run").manifest
    event = next(e for e in manifest["data"]["events"] if e["kind"] == "few_calibration_tokens")
    assert event["values"] == {"tokens": 32, "advised": 256}


@pytest.mark.parametrize("judged", [1024, 16])
def test_a_linear_that_loses_to_rtn_on_held_out_rows_takes_rtn(
    judged: int, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starved of tokens, GPTQ fits the few rows that it sees; the guard takes RTN's codes and says so."""
    monkeypatch.setattr(judging, "_JUDGED_ROWS", judged)
    recipe = Recipe(corpus=CorpusRecipe(TEXT, samples=2, sequence_length=4), damp_percent=1e-5)
    guarded = quantize(phi4_checkpoint, recipe, tmp_path / "guarded").manifest["data"]
    fallen = [e["where"] for e in guarded["events"] if e["kind"] == "fallback_to_rtn"]
    assert fallen
    assert [linear["name"] for linear in guarded["linears"] if linear["method"] == "rtn"] == fallen
    run, model = open_run(tmp_path / "guarded"), open_checkpoint(phi4_checkpoint)
    for linear in guarded["linears"]:
        ours, theirs = linear["heldout_error"], linear["heldout_error_rtn"]
        loses = ours["rest"] > theirs["rest"] or ours["first"] > theirs["first"]
        assert loses == (linear["name"] in fallen)
        rows = model.config.linears[linear["name"]][0]
        assert linear["heldout_rows"] == len(range(0, rows, max(1, rows // judged)))
        if loses:  # all of its rows are rounded, whatever was judged by
            rounded, weight = (tensors(f"{linear['name']}.weight") for tensors in (run.tensor, model.tensor))
            assert float((rounded - weight).norm(dim=1).div(weight.norm(dim=1)).max()) < 0.5


def test_the_guard_judges_by_rows_that_are_spread_evenly() -> None:
    assert list(judging.judged_rows(1000)) == list(range(1000))
    for rows in (1024, 2047, 3072, 5120, 35840):
        judged = judging.judged_rows(rows)
        assert 1024 <= len(judged) < 2048
        assert rows - judged[-1] <= judged.step


def test_calibrate_measures_the_full_precision_model_and_quantize_takes_its_corpus(
    phi4_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    manifest = calibrate(phi4_checkpoint, CORPUS, run)
    assert corpus_of_run(run) == CORPUS
    assert calibrate(phi4_checkpoint, CORPUS, run) == manifest
    imatrix = load_file(run / "calibration" / "imatrix.safetensors")
    assert len(imatrix) == 2 * len(LINEARS)
    quantize(phi4_checkpoint, Recipe(corpus=corpus_of_run(run)), run)
    assert (
        json.loads((run / "manifest.json").read_text())["data"]["corpus"]["sha256"] == manifest["data"]["corpus_sha256"]
    )
    with pytest.raises(ResumeError, match=r"recipe\.samples was 8, is now 9"):
        calibrate(phi4_checkpoint, CorpusRecipe(TEXT, samples=9, sequence_length=48), run)


@pytest.mark.parametrize(
    "bad",
    [{"damp_percent": -0.1}, {"sink_share": 1.0}, {"corpus": CorpusRecipe(samples=1)}],
    ids=lambda b: next(iter(b)),
)
def test_impossible_recipes_are_usage_errors(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe(**bad)  # type: ignore[arg-type]
