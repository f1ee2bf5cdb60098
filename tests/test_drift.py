"""The figures of drift: against an independent slow computation, in closed form, and with their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from phi4edge.core.errors import InputError, UsageError
from phi4edge.measurement.drift import (
    PositionFigures,
    between_chunks,
    compare_chunk,
    divergence,
    position_curve,
    summarize,
)
from phi4edge.measurement.encoding import STEP, StoredChunk, encode
from phi4edge.measurement.gates import Limits, evaluate, gate_error
from phi4edge.measurement.result import Measurement, mean_of

VOCAB = 300


def pair(chunks: int = 4, positions: int = 40, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference logits, artifact logits [chunks, positions, VOCAB], and the tokens that follow."""
    generator = torch.Generator().manual_seed(3)
    reference = 3 * torch.randn(chunks, positions, VOCAB, generator=generator) + 7
    artifact = reference + noise * torch.randn(reference.shape, generator=generator) - 2
    return reference, artifact, torch.randint(VOCAB, (chunks, positions), generator=generator)


def compare(reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> PositionFigures:
    return PositionFigures.stack(
        [compare_chunk(a, encode(r, f), f) for r, a, f in zip(reference, artifact, following, strict=True)]
    )


def naive(reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> list[dict[str, float]]:
    """The definitions, one position and one token at a time, in float64, from sums as llama-perplexity keeps them."""
    rows = []
    for r, a, x in zip(
        reference.reshape(-1, VOCAB).double().numpy(),
        artifact.reshape(-1, VOCAB).double().numpy(),
        following.reshape(-1).tolist(),
        strict=True,
    ):
        p, q = np.exp(r - r.max()), np.exp(a - a.max())
        p, q = p / p.sum(), q / q.sum()
        rows.append(
            {
                "nll": -math.log(q[x]),
                "nll_reference": -math.log(p[x]),
                "kld": sum(pv * (math.log(pv) - math.log(qv)) for pv, qv in zip(p, q, strict=True)),
                "delta_p": q[x] - p[x],
                "same": float(p.argmax() == q.argmax()),
            }
        )
    return rows


def mean_and_se(values: list[float]) -> tuple[float, float]:
    n = len(values)
    mean, square = sum(values) / n, sum(v * v for v in values) / n
    return mean, math.sqrt((square - mean * mean) / (n - 1))


def percentile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    return (1 - (place - low)) * ordered[low] + (place - low) * ordered[min(low + 1, len(ordered) - 1)]


def test_figures_equal_an_independent_float64_computation() -> None:
    tensors = pair()
    metrics, rows = summarize(compare(*tensors)), naive(*tensors)
    column = {name: [row[name] for row in rows] for name in rows[0]}

    def close(name: str, value: float, se: float | None, rel: float = 2e-5) -> None:
        assert metrics[name].value == pytest.approx(value, rel=rel, abs=1e-7), name
        assert metrics[name].se == (None if se is None else pytest.approx(se, rel=1e-3)), name
        assert metrics[name].n == len(rows)

    (nll, nll_se), (base, base_se) = mean_and_se(column["nll"]), mean_and_se(column["nll_reference"])
    close("ppl", math.exp(nll), math.exp(nll) * nll_se)
    close("ppl_reference", math.exp(base), math.exp(base) * base_se)
    product = sum(a * b for a, b in zip(column["nll"], column["nll_reference"], strict=True)) / len(rows)
    covariance = (product - nll * base) / (len(rows) - 1)
    ratio_se = math.sqrt(nll_se**2 + base_se**2 - 2 * covariance)
    close("ln_ppl_ratio", nll - base, ratio_se)
    close("ppl_ratio", math.exp(nll - base), math.exp(nll - base) * ratio_se)
    close("ln_ppl_correlation", covariance / (nll_se * base_se), None)
    close("kld", *mean_and_se(column["kld"]))
    close("kld_max", max(column["kld"]), None, 1e-3)
    close("kld_min", min(column["kld"]), None, 1e-4)
    for name, fraction in {"p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5, "p01": 0.01}.items():
        close(f"kld_{name}", percentile(column["kld"], fraction), None, 1e-3)
        close(f"delta_p_{name}", percentile(column["delta_p"], fraction), None, 1e-3)
    close("mean_delta_p", *mean_and_se(column["delta_p"]), 1e-4)
    square, square_se = mean_and_se([d * d for d in column["delta_p"]])
    close("rms_delta_p", math.sqrt(square), 0.5 / math.sqrt(square) * square_se)
    share = sum(column["same"]) / len(rows)
    close("same_top_p", share, math.sqrt(share * (1 - share) / (len(rows) - 1)))


def test_identical_logits_have_no_drift() -> None:
    reference, _, following = pair()
    metrics = summarize(compare(reference, reference, following))
    assert 0 <= metrics["kld"].value < 2e-8
    assert metrics["kld_max"].value < 1e-7
    assert metrics["same_top_p"].value == 1
    assert abs(metrics["ln_ppl_ratio"].value) < 1e-6
    assert metrics["rms_delta_p"].value < 1e-6


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_rows_worked_on_together_change_no_figure_and_the_logits_stay(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty positions in blocks that divide them or leave a rest; what is held for a block is used for the next."""
    (reference, _, _), (artifact, _, _), (following, _, _) = (tensor[:3] for tensor in pair(chunks=3))
    given = [reference.clone(), artifact.clone()]
    whole = [(encode(reference, following, keep), divergence(reference, artifact)) for keep in (None, 30)]
    expected = [compare_chunk(artifact, stored, following) for stored, _ in whole]
    monkeypatch.setattr("phi4edge.measurement.encoding.BLOCK_BYTES", rows * VOCAB * 4)
    for (stored, between), figures, keep in zip(whole, expected, (None, 30), strict=True):
        again = encode(reference, following, keep)
        np.testing.assert_array_equal(again.codes, stored.codes)
        np.testing.assert_allclose(again.log_prob, stored.log_prob, rtol=1e-6)
        np.testing.assert_allclose(again.noise, stored.noise, rtol=1e-4)
        found = compare_chunk(artifact, stored, following)
        np.testing.assert_allclose(found.kld, figures.kld, rtol=1e-5)
        np.testing.assert_allclose(found.nll, figures.nll, rtol=1e-6)
        np.testing.assert_array_equal(found.same_top, figures.same_top)
        np.testing.assert_allclose(divergence(reference, artifact), between, rtol=1e-5)
    assert torch.equal(reference, given[0])
    assert torch.equal(artifact, given[1])


def test_a_drift_below_float32_s_resolution_of_a_log_sum_is_still_measured() -> None:
    generator = torch.Generator().manual_seed(4)
    reference = 3 * torch.randn(60, 2000, generator=generator)
    artifact = reference + 2e-4 * torch.randn(reference.shape, generator=generator)
    following = torch.zeros(60, dtype=torch.int64)
    stored = encode(reference, following)
    held = torch.log_softmax(-torch.from_numpy(stored.codes).double() * STEP, dim=1)
    exact = (held.exp() * (held - torch.log_softmax(artifact.double(), dim=1))).sum(dim=1).numpy()
    found = compare_chunk(artifact, stored, following).kld[0]
    assert exact.mean() < 5e-8
    np.testing.assert_allclose(found, exact, rtol=1e-2, atol=1e-11)


def test_an_artifact_that_is_sure_of_the_least_likely_token_has_a_finite_divergence() -> None:
    reference, artifact = torch.zeros(1, 8), torch.zeros(1, 8)
    reference[0, 0], artifact[0, 7] = 60, 60
    figures = compare_chunk(artifact, encode(reference, torch.tensor([0])), torch.tensor([0]))
    assert figures.kld.item() == pytest.approx(60, rel=1e-4)
    assert figures.nll.item() == pytest.approx(60, rel=1e-6)
    assert not figures.same_top.item()


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    reference, artifact, following = pair()
    plain, shifted = compare(reference, artifact, following), compare(reference, artifact + 100, following)
    np.testing.assert_allclose(shifted.kld, plain.kld, atol=2e-5)
    np.testing.assert_allclose(shifted.nll, plain.nll, atol=2e-5)


def test_two_tokens_give_the_closed_form() -> None:
    p, q = 0.8, 0.3
    reference, artifact = torch.tensor([[p, 1 - p]]).log(), torch.tensor([[q, 1 - q]]).log()
    figures = compare_chunk(artifact, encode(reference, torch.tensor([0])), torch.tensor([0]))
    assert figures.kld.item() == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=5e-4)
    assert figures.nll.item() == pytest.approx(-math.log(q), rel=1e-6)
    assert figures.nll_reference.item() == pytest.approx(-math.log(p), rel=1e-6)
    assert figures.delta_p.item() == pytest.approx(q - p, rel=1e-5)
    assert not figures.same_top.item()


def test_a_uniform_artifact_has_the_vocabulary_as_its_perplexity() -> None:
    reference, _, following = pair()
    metrics = summarize(compare(reference, torch.zeros_like(reference), following))
    assert metrics["ppl"].value == pytest.approx(VOCAB, rel=1e-6)
    assert metrics["ppl"].se == pytest.approx(0, abs=1e-5)


def test_logits_that_are_not_numbers_are_named_by_position() -> None:
    reference, artifact, following = pair(chunks=1)
    stored = encode(reference[0], following[0])
    artifact[0, 17, 5] = float("nan")
    with pytest.raises(InputError, match=r"position 17.*NaN"):
        compare_chunk(artifact[0], stored, following[0])
    with pytest.raises(InputError, match="reference model gives"):
        encode(artifact[0], following[0])


def test_stored_logits_lie_within_half_a_step_of_the_exact_ones() -> None:
    reference, _, following = pair(chunks=1)
    stored = encode(reference[0], following[0])
    below = reference[0].max(dim=1, keepdim=True).values - reference[0]
    decoded = torch.from_numpy(stored.codes).float() * STEP
    assert (decoded - below.clamp(max=32)).abs().max() <= STEP / 2 * 1.01
    np.testing.assert_array_equal(stored.top, reference[0].argmax(dim=1).numpy())
    np.testing.assert_array_equal(stored.maximum, reference[0].amax(dim=1).numpy())


def exact_noise(logits: torch.Tensor, stored: StoredChunk) -> np.ndarray:
    exact = torch.log_softmax(logits.double(), dim=1)
    held = torch.log_softmax(-torch.from_numpy(stored.codes).double() * STEP, dim=1)
    return (exact.exp() * (exact - held)).sum(dim=1).numpy()


@pytest.mark.parametrize("width", [0.1, 3.0, 30.0])
def test_the_noise_that_a_store_states_is_the_noise_that_it_has(width: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = width * torch.randn(64, 2000, generator=generator)
    stored = encode(logits, torch.zeros(64, dtype=torch.int64))
    noise = exact_noise(logits, stored)
    np.testing.assert_allclose(stored.noise, noise, rtol=0.02, atol=2e-10)
    assert noise.mean() < 2e-8


def test_padding_with_huge_negative_logits_does_not_coarsen_the_rest() -> None:
    logits, _, following = pair(chunks=1)
    logits[0, :, -30:] = -1e4
    stored = encode(logits[0], following[0] % (VOCAB - 30))
    assert exact_noise(logits[0], stored).mean() < 2e-8


def test_errors_between_chunks_are_those_of_the_chunk_means() -> None:
    figures = compare(*pair())
    means = figures.kld.mean(axis=1)
    assert between_chunks(figures)["kld"] == pytest.approx(means.std(ddof=1) / 2)
    one = compare(*(t[:1] for t in pair()))
    assert between_chunks(one) == {"kld": None, "ln_ppl_ratio": None, "same_top_p": None}


def test_the_position_curve_averages_to_the_whole() -> None:
    figures = compare(*pair())
    curve = position_curve(figures, first=40, bins=8)
    assert [entry["first"] for entry in curve] == list(range(40, 80, 5))
    assert curve[-1]["last"] == 79
    assert np.mean([entry["kld"] for entry in curve]) == pytest.approx(figures.kld.mean())


def metric(value: float, se: float, name: str) -> Measurement:
    return Measurement(name, value, "1", 100, se)


@pytest.mark.parametrize(
    ("value", "se", "between", "outcome"),
    [
        (0.0100, 0.0001, None, "pass"),
        (0.0120, 0.0001, None, "fail"),
        (0.0109, 0.0001, None, "undecided"),
        (0.0111, 0.0001, None, "undecided"),
        (0.0100, 0.0001, 0.01, "undecided"),  # the spread between chunks counts when it is the larger one
    ],
)
def test_a_gate_is_decided_with_the_error_in_mind(value: float, se: float, between: float | None, outcome: str) -> None:
    metrics, spread = {"kld": metric(value, se, "kld")}, {"kld": between}
    (gate,) = evaluate(Limits(max_kld=0.011), metrics, spread)
    assert gate.outcome == outcome
    assert gate.passed == (outcome == "pass")
    (lenient,) = evaluate(Limits(max_kld=0.011, undecided="pass"), metrics, spread)
    assert lenient.passed == (outcome != "fail")
    assert (gate_error([gate]) is None) == gate.passed


def test_top1_can_be_given_in_per_cent() -> None:
    metrics = {"same_top_p": metric(0.93, 0.001, "same_top_p")}
    for limit in (0.9, 90):
        (gate,) = evaluate(Limits(min_top1=limit), metrics, {"same_top_p": None})
        assert (gate.limit, gate.outcome) == (0.9, "pass")
    (gate,) = evaluate(Limits(min_top1=95), metrics, {"same_top_p": None})
    assert gate.outcome == "fail"
    error = gate_error([gate])
    assert error is not None
    assert "same_top_p 0.93" in error.message
    assert error.exit_code == 6


@pytest.mark.parametrize("limits", [{"max_kld": -1.0}, {"max_ppl_ratio": 0.0}, {"min_top1": 120.0}])
def test_limits_that_mean_nothing_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**limits)


def test_a_measurement_survives_its_json_form() -> None:
    for measurement in (mean_of("tps", "token/s", [1.0, 2.0, 6.0]), Measurement.missing("rss", "byte", "no /proc")):
        assert Measurement.from_dict(measurement.name, measurement.as_dict()) == measurement
    assert mean_of("tps", "token/s", [1.0, 2.0, 6.0]).median == 2
    assert mean_of("tps", "token/s", [1.0]).se is None
