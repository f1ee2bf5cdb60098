"""Several texts in one call: figures and gates of each and of all, and drift by position with its error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4edge.cli.main import main
from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import Recipe
from phi4edge.measurement.drift import PositionFigures, position_curve
from phi4edge.measurement.texts import named_texts
from phi4edge.stages.quantize import quantize


@pytest.fixture(scope="module")
def run(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(phi4_checkpoint, Recipe(method="rtn", scheme="w4g32"), tmp_path_factory.mktemp("run") / "r").path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a=b.txt").write_text("Every good thing is 3 or 4 things, said the fox. " * 80)
    (folder / "code.txt").write_text(Path(__file__).read_text())
    return str(folder / "a=b.txt"), f"code={folder / 'code.txt'}"


def drift(
    capfd: pytest.CaptureFixture[str], run: Path, model: Path, texts: tuple[str, ...], *more: object
) -> tuple[int, Any]:
    given = [argument for text in texts for argument in ("--text", text)]
    small = ["--context", "64", "--chunks", "3", "--threads", "1", "-q", "--json"]
    code = main(["drift", str(run), "--reference", str(model), *given, *small, *map(str, more)])
    return code, json.loads(capfd.readouterr().out)


def test_texts_are_named_by_the_user_or_by_their_file(texts: tuple[str, str], tmp_path: Path) -> None:
    plain, named = texts
    assert named_texts([plain, named]) == {"a=b": plain, "code": named.removeprefix("code=")}
    assert named_texts(["builtin:eval"]) == {"builtin:eval": "builtin:eval"}
    with pytest.raises(UsageError, match="two texts are named 'code'"):
        named_texts([named, named])


def test_each_domain_has_figures_of_its_own_and_all_together_pool_them(
    capfd: pytest.CaptureFixture[str], run: Path, phi4_checkpoint: Path, texts: tuple[str, str]
) -> None:
    code, document = drift(capfd, run, phi4_checkpoint, texts)
    assert code == 0
    data = document["data"]
    assert [d["name"] for d in data["domains"]] == ["a=b", "code"]
    klds = [d["metrics"]["kld"]["value"] for d in data["domains"]]
    assert klds[0] != klds[1]
    assert data["metrics"]["kld"]["value"] == pytest.approx(np.mean(klds))
    assert (data["text"]["name"], data["text"]["chunks"], data["text"]["positions"]) == ("a=b + code", 6, 6 * 31)
    for text, domain in zip(texts, data["domains"], strict=True):
        _, alone = drift(capfd, run, phi4_checkpoint, (text,))
        assert "domains" not in alone["data"]
        for name in ("metrics", "per_chunk_kld", "per_position", "text"):
            assert alone["data"][name] == domain[name]


def test_limits_hold_for_each_domain_and_for_all(
    capfd: pytest.CaptureFixture[str], run: Path, phi4_checkpoint: Path, texts: tuple[str, str]
) -> None:
    _, document = drift(capfd, run, phi4_checkpoint, texts)
    klds = [d["metrics"]["kld"]["value"] for d in document["data"]["domains"]]
    worse = ("a=b", "code")[int(np.argmax(klds))]
    limit = max(klds) * 0.999
    code, document = drift(capfd, run, phi4_checkpoint, texts, "--max-kld", limit, "--gate-undecided", "pass")
    assert code == 0
    assert [gate.get("domain") for gate in document["data"]["gates"]] == [None, "a=b", "code"]
    code, document = drift(capfd, run, phi4_checkpoint, texts, "--max-kld", limit)
    assert code == 6
    assert f"{worse}: kld" in document["error"]["message"]


def test_what_only_one_text_can_have_is_refused_for_two(
    capfd: pytest.CaptureFixture[str], run: Path, phi4_checkpoint: Path, texts: tuple[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "stores"
    assert drift(capfd, run, phi4_checkpoint, texts, "--attribute")[0] == 2
    assert drift(capfd, run, phi4_checkpoint, texts, "--store", store)[0] == 0
    assert sorted(path.name for path in store.iterdir()) == ["a=b", "code"]
    assert drift(capfd, run, store / "code", texts)[0] == 2


def test_drift_by_position_has_the_error_between_chunks() -> None:
    rng = np.random.default_rng(0)
    kld = (
        rng.gamma(1.0, 0.01, (5, 12)) + np.array([0.1, 0.1, 0.1, 0.9, 0.9])[:, None]
    )  # a hard chunk is hard all through
    figures = PositionFigures(kld, kld, kld, kld < 0.1)
    for number, entry in enumerate(position_curve(figures, first=12, bins=4)):
        part = kld[:, 3 * number : 3 * number + 3]
        between = part.mean(axis=1).std(ddof=1) / np.sqrt(5)
        over = part.std() / np.sqrt(part.size - 1)
        assert entry["kld_se"] == pytest.approx(max(between, over))
        assert entry["kld_se"] > over
        assert entry["same_top_p_se"] >= 0
