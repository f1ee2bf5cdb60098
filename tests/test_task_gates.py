"""Limits on drift and tasks in recipes, in targets' files and on the command line, and what a report says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import write_checkpoint

from phi4edge.cli.commands.run import _read
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, UsageError
from phi4edge.measurement.gates import Limits, gate_error
from phi4edge.measurement.tasks.pairing import Pairing, paired_interval
from phi4edge.measurement.tasks.run import task_gates
from phi4edge.targets.catalog import TARGET_PATH
from phi4edge.targets.schema import read_profile

TEXT, OTHER = Path(__file__).with_name("support.py"), Path(__file__)
TARGET = """
name = "Mine"
kind = "phone"
sources = ["a test"]
ram_gb = 8
usable_ram_gb = 4
arch = "aarch64"
transports = ["adb"]
{gates}
[[runtimes]]
name = "llama_cpp"
formats = ["gguf"]
schemes = ["q4_0"]
"""


# --- the share of the reference's accuracy --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "share", "outcome"),
    [
        (Pairing(500, 100, 5, 395), 0.99, "fail"),  # 505 of 600
        (Pairing(900, 2, 3, 95), 0.99, "pass"),
        (Pairing(45, 1, 0, 4), 0.99, "undecided"),  # 45 of 46, of 50 questions
        (Pairing(45, 1, 0, 4), 0.5, "pass"),
        (Pairing(0, 0, 0, 20), 0.99, "undecided"),  # none right: q/p is not even a number
    ],
)
def test_gate_on_the_share_of_the_reference_takes_its_error_into_account(
    cells: Pairing, share: float, outcome: str
) -> None:
    (gate,) = task_gates({"gsm8k": cells.as_dict()}, Limits(min_reference_share=share, target="mine"))
    assert (gate.outcome, gate.task, gate.share, gate.target) == (outcome, "gsm8k", share, "mine")
    right, theirs = cells.both + cells.gained, cells.both + cells.lost
    assert gate.value == pytest.approx((right - share * theirs) / cells.n)
    assert gate.lower <= gate.value <= gate.upper
    error = gate_error([gate])
    assert (error is None) == (outcome == "pass")
    assert error is None or f"mine: accuracy in gsm8k less {share:g} of the reference's" in error.message


def test_surplus_is_the_mean_of_weighted_pairs_and_with_all_of_the_reference_the_difference() -> None:
    cells, share = Pairing(6, 3, 4, 2), 0.9
    pairs = [1 - share] * 6 + [-share] * 3 + [1.0] * 4 + [0.0] * 2
    mean = sum(pairs) / 15
    assert cells.surplus(share) == pytest.approx(mean)
    assert cells.surplus_se(share) == pytest.approx((sum((x - mean) ** 2 for x in pairs) / 15 / 15) ** 0.5)
    assert (cells.surplus(1.0), cells.surplus_se(1.0)) == pytest.approx((cells.difference, cells.se))


def test_interval_of_the_surplus_holds_the_truth_in_about_95_of_100_samples() -> None:
    import numpy as np

    p, q, shared, share = 0.6, 0.55, 0.5, 0.9
    draws = np.random.default_rng(7).multinomial(80, [shared, p - shared, q - shared, 1 - p - q + shared], size=2000)
    bounds = [paired_interval(Pairing(*map(int, draw)), share=share) for draw in draws]
    assert 0.93 < np.mean([low <= q - share * p <= high for low, high in bounds]) < 0.985


def test_bounds_of_the_surplus_scale_with_the_share_of_the_reference() -> None:
    """None right of 20 and no correlation: Wilson's 0.1611 (Newcombe 1998) up, and the share of it down."""
    assert paired_interval(Pairing(0, 0, 0, 20), share=0.5) == pytest.approx((-0.5 * 0.1611, 0.1611), abs=5e-5)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_nothing_means_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="is no share"):
        Limits(min_reference_share=share)


# --- targets --------------------------------------------------------------------------------------------------


def target(folder: Path, gates: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text(TARGET.format(gates=f"[gates]\n{gates}" if gates else ""))
    return folder / "mine.toml"


@pytest.mark.parametrize(
    ("gates", "message", "hint"),
    [
        ("max_kdl = 0.1", "gates.max_kdl: unknown key", "did you mean 'max_kld'?"),
        ("min_reference_share = 99", "is 99, expected a number above 0 and at most 1", None),
        ("max_kld = -0.5", "gates.max_kld: is -0.5, expected 0 or more", None),
        ("min_top1 = true", "gates.min_top1: is true or false, expected a number", None),
        ("# nothing", "gates: is empty", "it may hold max_kld"),
    ],
)
def test_a_wrong_gate_of_a_target_names_file_and_key(
    tmp_path: Path, gates: str, message: str, hint: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        read_profile(target(tmp_path, gates))
    assert "mine.toml" in caught.value.message
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_a_targets_gates_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target(tmp_path, "max_kld = 0.0\nmin_reference_share = 0.99")
    assert main(["targets", "show", "mine", "--target-path", str(tmp_path)]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert [line for line in lines if line and line[0] == "gate"] == [
        ["gate", "max_kld", "0"],
        ["gate", "min_reference_share", "0.99"],
    ]
    assert main(["targets", "show", "mine", "--target-path", str(tmp_path), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)["data"]["target"]["gates"]
    assert (shown["max_kld"], shown["min_reference_share"], shown["max_ppl_ratio"]) == (0.0, 0.99, None)


# --- recipes --------------------------------------------------------------------------------------------------


def test_a_recipe_takes_domains_and_tasks_with_paths_relative_to_it(tmp_path: Path) -> None:
    for name in ("a.txt", "train.jsonl", "prompts.txt"):
        (tmp_path / name).write_text("x")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'model = "m"\n[drift]\ntext = {prose = "a.txt", mine = "builtin:eval"}\ntasks = ["gsm8k", "mgsm"]\n'
        'task_data = "data"\nlimit = 3\nshots = 2\nshots_file = {gsm8k = "train.jsonl"}\ngreedy = "prompts.txt"\n'
        "max_task_drop = 0.02\nchat_template = false\n"
    )
    found = _read(recipe)["drift"]
    assert found == {
        "texts": (f"prose={tmp_path / 'a.txt'}", "mine=builtin:eval"),
        "task_names": "gsm8k,mgsm",
        "task_data": tmp_path / "data",
        "task_limit": 3,
        "shots": 2,
        "shots_files": (f"gsm8k={tmp_path / 'train.jsonl'}",),
        "greedy": str(tmp_path / "prompts.txt"),
        "max_task_drop": 0.02,
        "task_chat": False,
    }
    recipe.write_text('model = "m"\n[drift]\ntext = ["a.txt", "prompts.txt"]\n')
    assert _read(recipe)["drift"]["texts"] == (str(tmp_path / "a.txt"), str(tmp_path / "prompts.txt"))
    recipe.write_text('model = "m"\n[drift]\ntasks = "gsm8k"\n')
    with pytest.raises(InputError, match=r"drift\.tasks: is a string, expected a list of strings"):
        _read(recipe)


class Pipeline:
    """``phi4edge run`` on a tiny model and a target of the user's own."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capfd = folder, capfd
        questions = [{"question": f"Which {i}?", "choices": ["cat", "dog", "cow"], "answer": i % 3} for i in range(6)]
        (folder / "animals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
        (folder / "prompts.txt").write_text("def f(x):\nimport os\n")
        self._model = write_checkpoint(folder / "phi-tiny", "phi4")

    def __call__(self, drift: str, *more: object) -> tuple[int, dict[str, Any]]:
        recipe = self._folder / "recipe.toml"
        recipe.write_text(
            f'model = "{self._model.name}"\ntargets = ["mine"]\n[quantize]\nmethod = "rtn"\n[drift]\ncontext = 64\n'
            f'chunks = 2\ntext = "{OTHER}"\n{drift}'
        )
        self._capfd.readouterr()
        code = main(["run", str(recipe), "--out", str(self._folder / "out"), "-q", "--json", *map(str, more)])
        return code, json.loads(self._capfd.readouterr().out)

    def page(self) -> str:
        return (self._folder / "out" / "report" / "report.md").read_text()

    def drift(self) -> dict[str, Any]:
        (path,) = (self._folder / "out" / "results").glob("*.drift.json")
        found: dict[str, Any] = json.loads(path.read_text())["data"]
        return found


@pytest.fixture
def pipeline(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(TARGET_PATH, str(tmp_path / "targets"))
    return Pipeline(tmp_path, capfd)


ASKED = 'tasks = ["animals"]\ntask_data = "."\ngreedy = "prompts.txt"\ngreedy_tokens = 4\n'


def gates(document: dict[str, Any]) -> dict[str, tuple[float, str | None]]:
    return {g["name"]: (g.get("share", g["limit"]), g.get("target")) for g in document["data"]["gates"]}


def test_run_asks_tasks_once_and_holds_the_stronger_limit(pipeline: Pipeline, tmp_path: Path) -> None:
    target(tmp_path / "targets", "max_kld = 1e-9\nmax_task_drop = 1.0\nmin_top1 = 0.01")
    code, document = pipeline(ASKED)
    assert code == 6, document
    assert "mine: kld" in document["error"]["message"]
    assert gates(document) == {"max_kld": (1e-9, "mine"), "min_top1": (0.01, "mine"), "max_task_drop": (1.0, "mine")}
    found = pipeline.drift()
    assert found["tasks"]["results"]["animals"]["n"] == 6
    assert found["greedy"]["prompts"] == 2
    assert (found["tasks"]["artifact"]["reused"], found["tasks"]["reference"]["reused"]) == (0, 0)
    assert len((tmp_path / "out" / "results" / found["tasks"]["answers"]).read_text().splitlines()) == 6
    page = pipeline.page()
    assert "answered the same questions of animals" in page
    assert "1 of 3 gates was missed" in page
    # Another recipe asks the same questions: nobody is asked again, and its limits go before the target's.
    code, document = pipeline(f'{ASKED}max_kld = 9.0\nmin_reference_share = 1.0\ngate_undecided = "pass"\n')
    assert gates(document)["max_kld"] == (9.0, None)
    assert gates(document)["min_reference_share"] == (1.0, None)
    assert gates(document)["min_top1"] == (0.01, "mine")
    found = pipeline.drift()
    assert (found["tasks"]["artifact"]["reused"], found["tasks"]["reference"]["reused"]) == (18, 18)
    # And the command line before the recipe.
    _, document = pipeline(f"{ASKED}max_kld = 9.0\n", "--max-kld", 8.0, "--limit", 2)
    assert gates(document)["max_kld"] == (8.0, None)
    assert pipeline.drift()["tasks"]["results"]["animals"]["n"] == 2


@pytest.mark.parametrize(
    ("drift", "code", "message"),
    [
        ("", 2, "mine limits what tasks may lose, and no task is asked"),
        ("max_task_drop = 0.1", 2, "--max-task-drop without --tasks"),
        ('tasks = ["nosuch"]\ntask_data = "."', 3, "no file of task 'nosuch'"),
        ('tasks = ["humaneval"]\ntask_data = "."', 2, "runs code that the models write"),
    ],
)
def test_what_could_not_be_held_is_refused_before_anything_is_made(
    pipeline: Pipeline, tmp_path: Path, drift: str, code: int, message: str
) -> None:
    target(tmp_path / "targets", "min_reference_share = 0.99")
    found, document = pipeline(drift)
    assert (found, document["error"]["code"]) == (code, code)
    assert message in document["error"]["message"]
    assert not (tmp_path / "out").exists()


# --- reports of what was measured alone -----------------------------------------------------------------------


def report(tmp_path: Path, capfd: pytest.CaptureFixture[str], *more: object) -> tuple[str, dict[str, Any]]:
    model, results = write_checkpoint(tmp_path / "phi-tiny", "phi4"), tmp_path / "results"
    (tmp_path / "animals.jsonl").write_text('{"question": "Which?", "choices": ["cat", "dog"], "answer": 1}\n')
    (tmp_path / "prompts.txt").write_text("def f(x):\n")
    words = ["drift", model, "--reference", model, "--out", results / "d.json", "--threads", 1, "-q", *more]
    assert main([str(word) for word in words]) == 0
    shown = capfd.readouterr().out
    assert "PPL and KLD were not measured" in shown
    assert main(["report", str(results), "--out", str(tmp_path / "page"), "-q"]) == 0
    return (tmp_path / "page" / "report.md").read_text(), json.loads((tmp_path / "page" / "report.json").read_text())


@pytest.mark.parametrize("alone", ["tasks", "greedy"])
def test_a_report_of_tasks_or_greedy_text_alone_claims_no_kld(
    alone: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / "cache"))
    tasks = ("--tasks", "animals", "--task-data", tmp_path)
    greedy = ("--greedy", tmp_path / "prompts.txt", "--greedy-tokens", 3)
    page, document = report(tmp_path, capfd, *(tasks if alone == "tasks" else greedy))
    title, _, summary, *_ = page.splitlines()
    assert title == f"# phi-tiny: {'tasks' if alone == 'tasks' else 'greedy text'}"
    assert "Perplexity and KLD were not measured." in summary
    assert "Mean KLD" not in page
    assert "KLD" not in page.replace("Perplexity and KLD were not measured.", "")
    assert document["data"]["comparisons"] == []
    if alone == "tasks":
        assert "of 1 pairs 0 were right in full precision alone, 0 in the artifact alone" in summary
    else:
        assert "part from full precision's after at least 3 tokens" in summary
        assert document["data"]["greedy"][0]["greedy"]["identical"] == 1.0
