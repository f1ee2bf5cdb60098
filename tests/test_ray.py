"""--executor ray: the same bytes as in one process, whatever becomes of the workers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from cli_support import call_json
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.memory import parse_bytes
from phi4edge.core.recipe import CorpusRecipe, Recipe, solving_recipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.model.compute import has_bfloat16_units
from phi4edge.pipeline import Order, _solve
from phi4edge.quant.parallel import row_pieces
from phi4edge.stages import cluster as module
from phi4edge.stages.cluster import Cluster, connect
from phi4edge.stages.quantize import quantize
from phi4edge.stages.sweep import Wanted, solve_all

TEXT = str(Path(__file__).with_name("support.py"))
# Three shards to learn from, the last of them not whole, and one kept aside.
RECIPE = solving_recipe({"compute": "float32"}, CorpusRecipe(corpus=TEXT, samples=20, sequence_length=48))
WIDE = 1088  # gate_up_proj has two pieces of rows then


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Here and in workers, so that two of these work at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert len(row_pieces(2 * WIDE, 64)) > 1
    return write_checkpoint(tmp_path_factory.mktemp("model"), "phi4", intermediate_size=WIDE)


@pytest.fixture(scope="module")
def here(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that this process makes alone."""
    run = tmp_path_factory.mktemp("runs") / "here"
    quantize(model, RECIPE, run)
    return run


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    """Two workers on this machine; started once, since that takes seconds."""
    pytest.importorskip("ray", reason="the extra phi4edge[ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_usable_cores", lambda: 2)
        with connect("local") as cluster:
            yield cluster


def contents(run: Path) -> dict[str, str]:
    """Hash of every file of a run but its costs, and its journal without them."""
    kept = {
        path for path in run.rglob("*") if path.is_file() and path.name not in ("performance.json", "lock", JOURNAL)
    }
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    records = [json.loads(line)["record"] for line in (run / JOURNAL).read_text().splitlines()]
    return found | {JOURNAL: json.dumps([{**record, "performance": None} for record in records])}


class Interrupted(Progress):
    """Ends the process's work, as Ctrl-C would, when block 1 begins."""

    def status(self, text: str) -> None:
        if text.startswith("block 1 "):
            raise KeyboardInterrupt


UNITS = pytest.param(
    {"compute": "bfloat16"}, marks=pytest.mark.skipif(not has_bfloat16_units(), reason="no bfloat16 units")
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"effort": "low", "scheme": "q4_0"}, {"awq": True}, {"method": "rtn"}, {"round_passes": 0.5}, UNITS],
    ids=["default", "low", "awq", "rtn", "rounding", "bfloat16"],
)
def test_workers_give_the_same_bytes_as_one_process(
    changes: dict[str, object], model: Path, here: Path, workers: Cluster, tmp_path: Path
) -> None:
    recipe = solving_recipe(changes, RECIPE.corpus)
    if changes:
        quantize(model, recipe, tmp_path / "alone")
    quantize(model, recipe, tmp_path / "spread", cluster=workers)
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone" if changes else here)


def test_object_stores_too_small_for_the_samples_are_said_to_be(
    model: Path, workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray spills then, which no error tells and only the clock does."""
    noted: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            noted.append(text)

    recipe = replace(RECIPE, method="rtn")
    quantize(model, recipe, tmp_path / "roomy", cluster=workers, progress=Listening())
    assert not noted
    config = open_checkpoint(model).config
    needed = 4 * 2 * 20 * 48 * (3 * config.hidden_size + config.intermediate_size)
    for room, count in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(workers, "store_bytes", room)
        quantize(model, recipe, tmp_path / f"{room}", cluster=workers, progress=Listening())
        assert sum("object stores hold" in text for text in noted) == count


def test_workers_compute_with_the_drivers_threads(model: Path, workers: Cluster, tmp_path: Path) -> None:
    """On three threads exponentials and factorisations have other last bits, and so they have there."""
    torch.set_num_threads(3)
    try:
        assert workers.get(workers.start(torch.get_num_threads)) == 3
        quantize(model, RECIPE, tmp_path / "alone")
        quantize(model, RECIPE, tmp_path / "spread", cluster=workers)
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")


def test_without_calibration_text_too(model: Path, workers: Cluster, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", corpus=None)
    quantize(model, recipe, tmp_path / "alone")
    quantize(model, recipe, tmp_path / "spread", cluster=workers)
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")


def test_a_killed_workers_task_is_done_again(model: Path, here: Path, workers: Cluster, tmp_path: Path) -> None:
    """The worker is killed while it computes for a block."""
    killed: list[int] = []

    class Killing(Progress):
        def status(self, text: str) -> None:
            if text.startswith("block 0 mlp.gate_up") and not killed:
                threading.Thread(target=self.kill, daemon=True).start()

        def kill(self) -> None:
            while not killed:
                killed.extend(process.pid for process in self.busy()[:1])
            os.kill(killed[0], signal.SIGKILL)

        def busy(self) -> list[psutil.Process]:
            found = []
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # one that has ended meanwhile
                    if "ray::_computed" in process.cmdline():
                        found.append(process)
            return found

    quantize(model, RECIPE, tmp_path / "run", cluster=workers, progress=Killing())
    assert killed
    assert contents(tmp_path / "run") == contents(here)


def test_a_run_goes_on_under_the_other_executor(model: Path, here: Path, workers: Cluster, tmp_path: Path) -> None:
    for first, then in ((None, workers), (workers, None)):
        run = tmp_path / ("begun-here" if first is None else "begun-there")
        with pytest.raises(KeyboardInterrupt):
            quantize(model, RECIPE, run, cluster=first, progress=Interrupted())
        begun = (run / JOURNAL).read_bytes()
        assert begun.count(b"\n") == 1
        quantize(model, RECIPE, run, cluster=then)
        assert (run / JOURNAL).read_bytes().startswith(begun)
        assert contents(run) == contents(here)


def test_a_sweep_is_its_single_runs(
    model: Path, here: Path, workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two schemes as two tasks: the first begun before, the second from nothing; relative paths are the driver's."""
    monkeypatch.chdir(tmp_path)
    runs = [Wanted(RECIPE, Path("sweep/w4g32")), Wanted(replace(RECIPE, scheme="q4_0"), Path("sweep/q4_0"))]
    with pytest.raises(KeyboardInterrupt):
        quantize(model, RECIPE, runs[0].out, progress=Interrupted())
    begun = (runs[0].out / JOURNAL).read_bytes()
    Path("model").symlink_to(model)
    summaries = list(solve_all("model", runs, workers, Path("sweep")))
    assert [summary.manifest["data"]["scheme"] for summary in summaries] == ["w4g32", "q4_0"]
    assert (runs[0].out / JOURNAL).read_bytes().startswith(begun)
    assert contents(runs[0].out) | {"location.json": ""} == contents(here) | {"location.json": ""}
    quantize(model, runs[1].recipe, tmp_path / "alone")
    assert contents(runs[1].out) | {"location.json": ""} == contents(tmp_path / "alone") | {"location.json": ""}
    assert not list(Path("sweep").glob(".seen*"))


def test_the_pipeline_sweeps_over_schemes_and_restarts_them_once(model: Path, workers: Cluster, tmp_path: Path) -> None:
    low = solving_recipe({"effort": "low", "compute": "float32"}, RECIPE.corpus)
    order = Order(str(model), ("local",), tmp_path, low, restart=True)
    for scheme in ("w4g32", "q8_0"):
        quantize(model, replace(low, scheme=scheme, damp_percent=0.5), tmp_path / "runs" / scheme)
    for scheme, summary in zip(("w4g32", "q8_0"), _solve(order, ("w4g32", "q8_0"), SILENT, workers), strict=True):
        assert summary.path == tmp_path / "runs" / scheme
        assert summary.manifest["data"]["scheme"] == scheme
        assert summary.manifest["data"]["recipe"]["damp_percent"] == low.damp_percent


def test_a_folder_that_workers_do_not_see_is_refused(
    model: Path, workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # what this process believes to have written is not there for the worker
        patch.setattr(Path, "write_text", lambda *_, **__: 0)
        with pytest.raises(InputError, match="does not see what is written here"):
            workers.check_shared(tmp_path, model)
    workers.check_shared(tmp_path, model)
    monkeypatch.setattr(module, "_sizes", lambda folder: {"model.safetensors": 1})
    with pytest.raises(InputError, match="does not have the same files"):
        workers.check_shared(tmp_path, model)


def test_a_worker_with_other_code_is_refused(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = sys.modules["ray"]
    monkeypatch.setattr(module, "code_sha256", lambda: "0" * 64)
    with pytest.raises(MissingToolError, match=r"has phi4edge .*, this process has .*\(000000000000\)"):
        module._examined(ray, "here")


def test_a_worker_without_the_package_is_refused(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot import what it is asked to run: here, a module that only this process has."""
    only_here = ModuleType("only_here")
    exec("def describe(): pass", only_here.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with pytest.raises(MissingToolError, match=r"another phi4edge, or none .*only_here"):
        workers.on_every_machine(only_here.describe)


def test_other_instruction_sets_are_an_event_and_no_error(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = module.environment()["cpu"]
    monkeypatch.setattr(module, "environment", lambda: {"cpu": {**cpu, "architecture": "sparc64"}})
    (event,) = module._examined(sys.modules["ray"], "here").events
    assert event.kind == "mixed_instruction_sets"
    assert sum("sparc64" in str(kind) for kind in event.values.values()) == 1
    assert not workers.events


def test_what_workers_cannot_compute_is_refused(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cuda"):
        workers.check_job("cuda", "float32")
    workers.check_job("cpu", "float32")
    monkeypatch.setattr(workers, "without_bfloat16", ["192.0.2.7 (node 00000000)"])
    with pytest.raises(MissingToolError, match=r"192\.0\.2\.7"):
        workers.check_job("cpu", "bfloat16")


def test_an_error_in_a_task_is_the_tasks_own(workers: Cluster) -> None:
    with pytest.raises(UsageError, match="'lots' is not a size") as caught:
        workers.get(workers.start(parse_bytes, "lots"))
    assert "8GiB" in str(caught.value.hint)


def test_a_value_that_is_only_looked_at_is_not_copied(workers: Cluster) -> None:
    sent = torch.randn(300, 200)
    reference = workers.put(sent)
    looked, again = workers.look(reference), workers.look(reference)
    assert torch.equal(looked, sent)
    assert looked.data_ptr() == again.data_ptr()
    got = workers.get(reference)
    assert got.data_ptr() != looked.data_ptr()
    got.zero_()
    assert torch.equal(looked, sent)


def test_tensors_arrive_as_they_were_and_may_be_written_into(workers: Cluster) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64):
        sent = torch.arange(600).to(dtype).reshape(20, 30).T
        back = workers.get(workers.start(torch.clone, workers.put(sent)))
        assert back.dtype == dtype
        assert torch.equal(back, sent)
        back.zero_()


@pytest.mark.slow
def test_the_command_prints_one_document_and_nothing_of_rays(model: Path, here: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra phi4edge[ray] is not installed")
    command = [sys.executable, "-m", "phi4edge", "quantize", str(model), "--out", str(tmp_path / "run"), "--json"]
    command += ["--corpus", TEXT, "--samples", "20", "--sequence-length", "48", "--executor", "ray"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["OMP_NUM_THREADS"] = "1"  # as this module
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    assert contents(tmp_path / "run") == contents(here)


def test_without_ray_the_error_says_how_to_get_it(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, document = call_json(capfd, "quantize", model, "--out", tmp_path / "run", "--executor", "ray")
    assert code == 5
    assert document["error"]["hint"] == 'pip install "phi4edge[ray]"'
    assert not (tmp_path / "run").exists()


def test_an_address_that_does_not_answer_is_refused_at_once(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="the extra phi4edge[ray] is not installed")
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address, expected, word in (
            (f"127.0.0.1:{port}", 5, "no Ray cluster answers"),
            ("head-node", 2, "HOST:PORT"),
            ("ray://127.0.0.1:10001", 2, "client protocol"),
        ):
            arguments = ("quantize", model, "--out", tmp_path / "run", "--executor", "ray", "--ray-address", address)
            code, document = call_json(capfd, *arguments)
            assert code == expected
            assert word in document["error"]["message"]


def test_an_address_without_the_executor_is_refused(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", model, "--out", tmp_path / "run", "--method", "rtn", "--dry-run")
    code, document = call_json(capfd, *arguments, "--ray-address", "auto")
    assert (code, document["error"]["hint"]) == (2, "give --executor ray too")
    monkeypatch.setenv("PHI4EDGE_RAY_ADDRESS", "auto")  # a machine's setting: it waits for an executor that asks
    assert call_json(capfd, *arguments)[0] == 0


def test_a_recipe_names_the_executor(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{model}"\n[quantize]\nexecutor = "slurm"\n')
    code, document = call_json(capfd, "run", recipe, "--out", tmp_path / "out")
    assert code == 2
    assert "'slurm' is not known" in document["error"]["message"]
    recipe.write_text(f'model = "{model}"\n[quantize]\nexecutor = "ray"\nray_address = "ray://head"\n')
    code, document = call_json(capfd, "run", recipe, "--out", tmp_path / "out")
    assert code == 2
    assert "client protocol" in document["error"]["message"]
