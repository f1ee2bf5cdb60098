"""How long a quantization takes: the arithmetic, the measurement, and what the display says on the way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny_config, write_checkpoint

from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.progress import TerminalProgress
from phi4edge.cli.render import duration
from phi4edge.core.events import Progress
from phi4edge.core.recipe import CorpusRecipe, Recipe, RoundingRecipe, TuningRecipe
from phi4edge.model.block import LINEARS
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages.job import prepare
from phi4edge.stages.pace import Pace, PacedProgress
from phi4edge.stages.predict import LinearRates, Prediction, Rates, Work, predict
from phi4edge.stages.quantize import plan, quantize
from phi4edge.stages.rates import estimate, estimate_shapes

NEVER = 1e30  # a rate so high that its part takes no time
FREE = LinearRates(NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, 0.0, 0.0, 0.0, 0.0)
CONFIG = parse_config(tiny_config(num_hidden_layers=3))
SHAPES = CONFIG.linear_shapes
WEIGHTS = sum(rows * n for rows, n in SHAPES.values())
CORPUS = CorpusRecipe(samples=16, sequence_length=32)  # two of them held out
PLAIN = Recipe(corpus=CORPUS, scheme="w4g32")


def rates(linear: LinearRates = FREE, **changes: float) -> Rates:
    """Rates of a machine that does everything at once, but for what is named."""
    free = Rates(dict.fromkeys(LINEARS, linear), 0, 0, 0, NEVER, NEVER, NEVER, NEVER, 0, NEVER, 0, 2)
    return replace(free, **changes)


def work(recipe: Recipe = PLAIN, **changes: object) -> Work:
    return replace(Work(CONFIG, recipe, parse_scheme(recipe.scheme), 2, False), **changes)


def test_parts_are_shapes_over_rates() -> None:
    seconds = predict(work(), rates(replace(FREE, forward=1e6), norm=0.5)).block
    products = 2 * WEIGHTS / 1e6  # seconds a token
    assert seconds["forward"] == pytest.approx(16 * (32 * products + 4 * 0.5))
    assert seconds["check"] == pytest.approx(2 * 32 * 3 * products)
    squares = sum(2 * rows * n * n for rows, n in SHAPES.values()) / 1e6
    errors = predict(work(), rates(replace(FREE, errors=1e6))).block
    assert errors["solve"] == pytest.approx(0.5 * squares)  # the loop's half; rounding to nearest takes none
    assert predict(work(), rates(replace(FREE, moments=1e6))).block["moments"] == pytest.approx(
        14 * 32 * sum(n * n for _, n in SHAPES.values()) / 1e6
    )
    assert predict(work(), rates(replace(FREE, factor=1e6))).block["solve"] == pytest.approx(
        sum(n**3 / 3 for _, n in SHAPES.values()) / 1e6
    )
    assert predict(work(), rates(replace(FREE, solve=1e-3, nearest=1e-4))).block["solve"] == pytest.approx(
        WEIGHTS * 1.1e-3
    )
    assert predict(work(), rates(read=1e6)).block["read"] == pytest.approx(2 * WEIGHTS / 1e6)


def test_a_checkpoint_is_hashed_some_files_at_a_time_as_fast_as_the_disk_gives_them() -> None:
    nbytes = 2 * CONFIG.parameters
    assert predict(work(), rates(check=1e6)).hashing == pytest.approx(nbytes / 1e6)
    assert predict(work(files=2), rates(check=1e6)).hashing == pytest.approx(nbytes / 2e6)
    assert predict(work(files=2), rates(check=1e6, disk=1.5e6)).hashing == pytest.approx(nbytes / 1.5e6)


def test_codes_are_written_and_weights_are_fetched_behind_the_computing() -> None:
    codes, residual = 4.5 * WEIGHTS / 8, 16 * 32 * 64 * 4
    alone = predict(work(), rates(write=1e6, disk=1e6)).block
    assert alone["write"] == pytest.approx((codes + residual) / 1e6)  # there is nothing to hide behind
    assert alone["read"] == pytest.approx(2 * WEIGHTS / 1e6)
    slow = predict(work(), rates(replace(FREE, forward=1e6), write=1e6, disk=1e6)).block
    assert slow["write"] == 0
    assert slow["read"] < 1e-9
    fast = predict(work(), rates(replace(FREE, forward=1e8), write=1e6))
    assert fast.block["write"] == pytest.approx((codes + residual) / 1e6 - fast.linears[0])
    free = predict(work(replace(PLAIN, method="rtn", corpus=None)), rates(replace(FREE, nearest=1e-7), write=1e6))
    assert free.block["write"] == pytest.approx(codes / 1e6 - sum(free.linears[:3]))


def test_a_second_stream_sweeps_and_files_cost_what_they_add() -> None:
    only_forward = rates(replace(FREE, forward=1e6, dense=2e6, errors=1e6))
    one = predict(work(), only_forward).block
    two = predict(work(replace(PLAIN, full_precision_targets=0.5)), only_forward).block
    assert two["forward"] == pytest.approx(2 * one["forward"])
    assert two["check"] == pytest.approx(one["check"] * 4 / 3)
    swept = predict(work(replace(PLAIN, sweeps=3, refit=True)), only_forward).block
    squares = sum(2 * rows * n * n for rows, n in SHAPES.values()) / 1e6
    assert swept["solve"] - one["solve"] == pytest.approx(3.5 * squares)  # each pass, and the loss behind them
    on_disk = predict(work(spill=True), rates(scratch=1e6)).block
    assert on_disk["forward"] > predict(work(), rates(scratch=1e6)).block["forward"]


def test_data_free_rounding_reads_rounds_and_writes() -> None:
    recipe = Recipe(method="rtn", corpus=None, scheme="w4g32")
    found = predict(work(recipe), rates(replace(FREE, forward=1.0, moments=1.0, nearest=1e-3), check=1e6))
    hashed = 2 * CONFIG.parameters / 3 / 1e6 / 2  # beside each of three blocks, on two cores
    assert found.block == pytest.approx({**dict.fromkeys(found.block, 0.0), "solve": WEIGHTS * 1e-3, "hash": hashed})
    assert found.hashing == 0
    assert found.as_dict()["parts_seconds_estimated"]["hash"] == pytest.approx(3 * hashed)
    slow = predict(work(recipe), rates(replace(FREE, nearest=1e-9), check=1e6, disk=1e5))
    assert slow.block_seconds == pytest.approx(2 * CONFIG.parameters / 3 / 1e5)  # the disk's, for all that is hashed


def test_tuning_grows_with_passes_and_is_apart() -> None:
    def tuned(passes: float) -> Prediction:
        recipe = replace(PLAIN, tuning=TuningRecipe(passes=passes))
        return predict(work(recipe), rates(replace(FREE, forward=1e9), head=1e-9))

    once, twice, thrice = (tuned(passes).tuning for passes in (1.0, 2.0, 3.0))
    assert thrice - twice == pytest.approx(twice - once)
    assert twice > once > 0
    assert tuned(1.0).seconds == pytest.approx(3 * tuned(1.0).block_seconds + once)


def test_learned_rounding_goes_back_and_forth_so_often_over_the_samples() -> None:
    def learned(passes: float, linear: LinearRates) -> dict[str, float]:
        rounding = RoundingRecipe(passes=passes, batch=2)
        return dict(predict(work(replace(PLAIN, rounding=rounding, full_precision_targets=0.5)), rates(linear)).block)

    sample = 32 * 2 * WEIGHTS / 1e6
    once, twice = (learned(passes, replace(FREE, forward=1e6)) for passes in (1, 2))
    assert twice["round"] - once["round"] == pytest.approx(14 * 3 * sample)
    assert once["round"] == pytest.approx((2 * 16 + 3 * 2 + 14 * 3) * sample)
    assert {part: twice[part] - once[part] for part in twice} == pytest.approx(
        {**dict.fromkeys(twice, 0.0), "round": 14 * 3 * sample}
    )
    assert learned(2, replace(FREE, learn=1e-3))["round"] == pytest.approx(14 * WEIGHTS * 1e-3)
    assert predict(work(), rates(replace(FREE, learn=1.0))).block["round"] == 0


def test_what_has_no_estimate_is_named_and_nothing_is_called_measured() -> None:
    found = predict(work(replace(PLAIN, output_curvature=0.5)), rates()).as_dict()
    assert found["not_estimated"] == ["output curvature"]
    assert all(key.endswith("_estimated") for key in found)
    assert predict(work(), rates()).not_estimated == ()


# --- what the display says -----------------------------------------------------------------------------------

# Seconds of the 30 blocks of a real run: SmolLM2-135M as Phi-3, GPTQ at default effort, 32 × 512 tokens.
RECORDED = [
    8.4, 8.0, 7.5, 7.4, 7.7, 8.4, 8.7, 8.5, 7.6, 7.3, 7.7, 7.0, 7.2, 7.6, 8.5,
    8.6, 10.7, 7.8, 7.7, 7.5, 7.8, 7.4, 9.1, 10.2, 7.9, 7.7, 8.5, 8.3, 8.1, 7.9,
]  # fmt: skip


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def prediction(block: float, tuning: float = 0.0) -> Prediction:
    shares = {"read": 0.1 * block, "solve": 0.8 * block, "write": 0.1 * block}
    return Prediction(30, shares, (0.3 * block, 0.1 * block, 0.3 * block, 0.2 * block), 0.0, 0.0, tuning, ())


def test_after_two_blocks_the_rest_of_a_recorded_run_is_foretold() -> None:
    for done in range(2, 29):
        left = Pace(30, RECORDED[:done], None, _Clock()).remaining()
        assert left == pytest.approx(sum(RECORDED[done:]), rel=0.25), done


def test_before_the_first_block_the_prediction_is_scaled_by_what_was_measured() -> None:
    clock = _Clock()
    pace = Pace(30, [], prediction(10.0), clock)
    assert pace.remaining() == pytest.approx(300.0)
    clock.now = 6.0  # twice as long as predicted for reading and the first linear
    pace.linear_done()
    assert pace.remaining() == pytest.approx(600.0 - 6.0)


def test_blocks_of_earlier_processes_count() -> None:
    clock = _Clock()
    pace = Pace(30, [8.0, 12.0], None, clock)
    assert pace.remaining() == pytest.approx(280.0)
    clock.now = 4.0
    assert pace.remaining() == pytest.approx(276.0)
    clock.now = 50.0  # this one takes longer: nothing is known of how much
    assert pace.remaining() == pytest.approx(270.0)
    assert Pace(30, [], None, clock).remaining() is None


def test_what_comes_after_the_blocks_is_scaled_with_their_forward_passes() -> None:
    clock = _Clock()
    foretold = replace(prediction(10.0, tuning=100.0), block={"forward": 2.0, "solve": 8.0})
    pace = Pace(4, [20.0], foretold, clock, forward=[3.0])  # twice as long for all of it
    assert pace.remaining() == pytest.approx(3 * 20.0 + 150.0)
    clock.now = 20.0
    pace.block_done(5.0)
    assert pace.remaining() == pytest.approx(2 * 20.0 + 200.0)


def test_where_nothing_is_known_of_forward_passes_it_is_scaled_with_the_blocks() -> None:
    clock = _Clock()
    pace = Pace(2, [], prediction(10.0, tuning=100.0), clock)
    for now in (20.0, 40.0):
        clock.now = now
        pace.block_done()
    assert pace.remaining() == pytest.approx(200.0)


def test_the_display_is_told_at_every_linear_and_block() -> None:
    said: list[float] = []

    class Shown(Progress):
        def remaining(self, seconds: float) -> None:
            said.append(seconds)

    clock = _Clock()
    paced = PacedProgress(Shown(), Pace(3, [10.0], None, clock))
    paced.start("quantize", 12, "linear", 4)
    for _ in LINEARS:
        clock.now += 2.5
        paced.advance()
    paced.block_done()
    assert said == pytest.approx([20.0, 17.5, 15.0, 12.5, 10.0, 10.0])


@pytest.mark.slow
def test_a_small_run_takes_about_as_long_as_predicted(tmp_path: Path) -> None:
    """Wide bounds: the machine may be busy with other things, so CPU seconds are compared."""
    shape = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
    model = write_checkpoint(tmp_path / "model", **shape)
    text = str(Path(__file__).with_name("support.py"))
    recipe = Recipe(corpus=CorpusRecipe(text, 16, 128), scheme="q4_0", full_precision_targets=0.5, refit=True, sweeps=3)
    job = prepare(open_checkpoint(model), recipe, None, "cpu")
    predicted = estimate(job, tmp_path / "run", clock=time.process_time)
    assert not (tmp_path / "run").exists()
    began = time.process_time()
    quantize(model, recipe, tmp_path / "run")
    took = time.process_time() - began
    assert 0.4 * took < predicted.seconds < 2.5 * took


def test_shapes_alone_are_enough_but_for_reading(tmp_path: Path) -> None:
    found = estimate_shapes(CONFIG, replace(PLAIN, tuning=TuningRecipe()), tmp_path / "run")
    assert found.tuning > 0
    assert found.block["read"] == found.hashing == 0
    assert found.not_estimated == ("reading the checkpoint",)


def test_a_plan_says_how_long_and_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", corpus=None, scheme="q4_0")
    found = plan(phi4_checkpoint, recipe, out=tmp_path / "run")
    assert 0 < found["time"]["seconds_estimated"] < 60
    assert not list(tmp_path.iterdir())


def test_the_terminal_counts_down_what_it_was_told_and_else_goes_by_units(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr("phi4edge.cli.progress.time.monotonic", clock)
    shown = TerminalProgress()
    shown.start("quantize", 8, "linear", 2)
    assert shown.left() is None
    clock.now = 30.0
    shown.advance(3)
    assert shown.left() == pytest.approx(30.0)  # three to go at ten seconds each
    shown.remaining(500.0)
    clock.now = 70.0
    assert shown.left() == pytest.approx(460.0)
    shown.start("tune", 10, "step")
    assert shown.left() is None


def test_durations_are_as_a_reader_plans_with_them() -> None:
    assert [duration(s) for s in (0.44, 41.2, 99.6, 720, 12_000)] == ["0.4 s", "41 s", "2 min", "12 min", "3 h 20 min"]
