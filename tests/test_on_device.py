"""On a device: over the ``local`` transport the very figures of this machine, and every failure told."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from device_support import (
    BENCH_HELP,
    BENCH_JSON,
    PERPLEXITY_HELP,
    PERPLEXITY_OUTPUT,
    arguments_of,
    lies_there,
    program,
    this_machine,
)
from report_support import write
from rounded import quantized_model
from scripts import load_script
from ssh_support import Keys, OpenSsh, need, serving

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, MissingToolError, TargetError, UsageError
from phi4edge.core.hashing import sha256_bytes, sha256_file
from phi4edge.measurement.device_drift import check_on_device, measure_drift_on
from phi4edge.measurement.device_speed import measure_speed_on
from phi4edge.measurement.drift_run import greedy_on, measure_drift
from phi4edge.measurement.environment import environment
from phi4edge.measurement.gates import Limits
from phi4edge.measurement.on_device import Site, device_host, open_site, time_limit
from phi4edge.measurement.reference import ReferenceStore, build_store
from phi4edge.measurement.texts import Chunks
from phi4edge.report.build import build_report, write_report
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.runtimes._remote_python import archive, worker_modules
from phi4edge.runtimes._runner_cache import MANIFEST, SCHEMA
from phi4edge.runtimes._runner_recipe import DEFAULT_MARCH
from phi4edge.targets.local import detect_local
from phi4edge.transports import ssh
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
CONTEXT, COUNT = 64, 4
ONE = Settings(threads=1)


@pytest.fixture(scope="module")
def gguf(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf"
    return write_f16(open_checkpoint(phi4_checkpoint), out, WriteOptions()).path


@pytest.fixture(scope="module")
def store(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceStore:
    ids = np.random.default_rng(0).integers(0, 512, (COUNT, CONTEXT))
    text = Chunks("ids", sha256_bytes(ids.tobytes()), 1, ids)
    return build_store(open_checkpoint(phi4_checkpoint), text, tmp_path_factory.mktemp("store") / "s")


# --- our worker in the device's Python


@needs_llama
def test_the_worker_on_a_device_gives_the_very_figures_of_this_machine(
    gguf: Path, store: ReferenceStore, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    stores = {"ids": store}
    here = measure_drift(gguf, store, settings=ONE)
    with this_machine(tmp_path / "device", sys.executable) as site:
        check_on_device(site, gguf, settings=ONE, generates=True)
        there = measure_drift_on(site, gguf, stores, settings=ONE, limits=Limits(max_kld=1e-3))
        written = greedy_on(device_host(site, gguf, "llama_cpp", ONE), stores, str(phi4_checkpoint), "chunks", count=4)
    for key in ("metrics", "se_between_chunks", "per_chunk", "per_position", "text", "reference", "artifact"):
        assert there[key] == here[key], key
    assert there["runtime"] == here["runtime"]
    assert (there["target"], there["transport"]) == ("local", "local")
    assert "measured_by" not in there
    assert [gate["outcome"] for gate in there["gates"]] == ["pass"]
    assert there["environment"]["cpu"]["model"] == environment()["cpu"]["model"]
    assert written["prompts"] == COUNT
    sent = lies_there(site)
    assert {path.parts[0] for path in sent} == {"artifacts", "worker"}
    assert len(sent) == 2, "what is there is not sent again"


@needs_llama
def test_speed_in_the_device_s_python_has_all_figures(gguf: Path, tmp_path: Path) -> None:
    with this_machine(tmp_path / "device", sys.executable, kind="jetson") as site:
        data = measure_speed_on(site, gguf, request=SpeedRequest(16, 4, 2, warmup=1), settings=ONE)
    for name in ("prefill_tps", "decode_tps", "ttft_s", "tpot_s", "load_s", "peak_rss_bytes"):
        assert data["metrics"][name]["value"] > 0
    assert [len(data["metrics"][name]["samples"]) for name in ("prefill_tps", "decode_tps", "tpot_s")] == [2, 2, 8]
    assert data["settings"]["warmup"] == 2, "the first run of a Jetson is one more that does not count"
    assert data["settings"]["threads"] == 1
    assert data["power"]["source"]


def test_the_archive_is_the_worker_and_no_torch_and_the_same_every_time() -> None:
    workers = "phi4edge.runtimes._llama_worker", "phi4edge.runtimes._onnx_worker"
    names = zipfile.ZipFile(io.BytesIO(archive(*workers))).namelist()
    assert {"phi4edge/__init__.py", "phi4edge/runtimes/_llama_worker.py", "phi4edge/runtimes/_onnx_worker.py"} <= set(
        names
    )
    assert len(names) == len(worker_modules(*workers)) < 20
    assert archive(*workers) == archive(*workers)


def test_the_archive_alone_is_enough_for_the_worker(tmp_path: Path) -> None:
    """In a Python that sees no other phi4edge; torch and psutil must not be asked for."""
    (tmp_path / "worker.zip").write_bytes(archive("phi4edge.runtimes._llama_worker"))
    code = (
        "import sys, phi4edge.runtimes._llama_worker as w; assert 'worker.zip' in w.__file__, w.__file__;"
        "sys.exit(bool({'torch', 'psutil'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "worker.zip")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


@needs_llama
def test_a_device_that_goes_away_midway_is_a_sentence(gguf: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 512, (3, CONTEXT))
    with this_machine(tmp_path / "device", sys.executable) as site:
        with device_host(site, gguf, "llama_cpp", ONE).open(CONTEXT, 0) as session:
            found = session.logits(tokens)
            next(found)
            os.killpg(worker_of(session).pid, signal.SIGKILL)
            with pytest.raises(TargetError, match="was ended by SIGKILL"):
                list(found)
        with device_host(site, gguf, "llama_cpp", ONE).open(CONTEXT, 0) as session:
            session.close()
            with pytest.raises((TargetError, ValueError)):
                list(session.logits(tokens))


def worker_of(session: Any) -> Any:
    return session._child._stream._process


@needs_llama
def test_an_ssh_connection_that_is_cut_midway_is_a_sentence(gguf: Path, tmp_path: Path) -> None:
    need("ssh", "ssh-keygen")
    with serving(OpenSsh(Keys(tmp_path / "keys"), tmp_path / "server")) as server:
        with (
            ssh.open(server.address()) as device,
            open_site(device, detect_local(), runners=[sys.executable]) as site,
            device_host(site, gguf, "llama_cpp", ONE).open(CONTEXT, 0) as session,
        ):
            found = session.logits(np.random.default_rng(0).integers(0, 512, (40, CONTEXT)))
            next(found)
            server.kill()
            with pytest.raises((TargetError, MissingToolError)) as caught:
                list(found)
        assert str(caught.value)


@needs_llama
def test_an_artifact_that_does_not_load_there_is_refused(gguf: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with this_machine(tmp_path / "device", sys.executable) as site:
        with pytest.raises(InputError):
            check_on_device(site, damaged)
        with pytest.raises(InputError, match="no such file"):
            check_on_device(site, tmp_path / "nothing.gguf")


@needs_llama
def test_a_shell_that_prints_before_the_worker_answers_is_told(gguf: Path, tmp_path: Path) -> None:
    chatty = program(tmp_path / "bin", "python3")
    chatty.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo Welcome to this device\nexec {sys.executable} "$@"\n')
    with this_machine(tmp_path / "device", chatty) as site, pytest.raises(TargetError, match="Welcome to this device"):
        check_on_device(site, gguf)


def test_an_onnx_folder_in_the_device_s_python_gives_the_figures_of_this_machine(
    phi4_checkpoint: Path, store: ReferenceStore, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    from phi4edge.writers import onnx

    folder = onnx.write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "onnx", WriteOptions(context=64)).path
    settings = Settings(threads=1, kv_type="f32")
    here = measure_drift(folder, store, settings=settings, chunks=2)
    with this_machine(tmp_path / "device", sys.executable) as site:
        check_on_device(site, folder, settings=settings)
        there = measure_drift_on(site, folder, {"ids": store}, settings=settings, chunks=2)
    assert there["metrics"] == here["metrics"]
    assert there["runtime"] == here["runtime"]


def test_what_only_this_machine_can_compute_is_refused(phi4_checkpoint: Path, tmp_path: Path) -> None:
    with (
        this_machine(tmp_path / "device", sys.executable) as site,
        pytest.raises(UsageError, match="this machine only"),
    ):
        check_on_device(site, phi4_checkpoint)


# --- llama.cpp's own programs


def reported(folder: Path, kind: str, data: dict[str, Any]) -> str:
    """What a report says of a document."""
    result = write(folder / "results.json", {"schema": f"phi4edge/{kind}/1", "ok": True, "data": data})
    write_report(build_report([result]), folder / "report")
    return (folder / "report" / "report.md").read_text()


def perplexity(folder: Path, **more: str) -> Path:
    return program(folder, "llama-perplexity", help=PERPLEXITY_HELP, says=PERPLEXITY_OUTPUT, **more)


def test_llama_perplexity_s_figures_stand_in_our_fields(gguf: Path, store: ReferenceStore, tmp_path: Path) -> None:
    tool = perplexity(tmp_path / "bin")
    limits = Limits(max_kld=1e-3, min_top1=0.99, max_ppl_ratio=0.9)
    with this_machine(tmp_path / "device", tool) as site:
        check_on_device(site, gguf)
        data = measure_drift_on(site, gguf, {"ids": store}, limits=limits)
        assert {path.parts[0] for path in lies_there(site)} == {"artifacts", "references"}
    assert data["measured_by"] == "llama-perplexity"
    assert data["differences"][0].startswith("KLD leaves out tokens that the reference holds less likely than e^-16; ")
    assert data["runtime"]["version"] == "4567 (abc1234)"
    assert data["metrics"]["kld"] == {"value": 2e-6, "unit": "nat", "n": COUNT * 31, "se": 5e-7}
    assert [gate["outcome"] for gate in data["gates"]] == ["pass", "fail", "pass"]
    assert data["reference"]["noise_floor_kld"] >= 5e-7
    words = arguments_of(tool)
    assert words[words.index("-c") + 1] == str(CONTEXT)
    assert str(tmp_path) not in str(data["runtime"] | data["details"]), "no folder of a user's"
    report = reported(tmp_path, "drift", data)
    assert "2.00e−6 ± 5.0e−7" in report
    assert "lower bound" not in report, "what llama-perplexity leaves out is not the tail of a store"


def test_what_llama_perplexity_cannot_do_is_refused_beforehand(
    gguf: Path, store: ReferenceStore, mini_checkpoint: Path, tmp_path: Path
) -> None:
    tool = perplexity(tmp_path / "bin")
    other = write_f16(open_checkpoint(mini_checkpoint), tmp_path / "mini.gguf", WriteOptions()).path
    with this_machine(tmp_path / "device", tool) as site:
        with pytest.raises(UsageError, match="93 positions are scored"):
            measure_drift_on(site, gguf, {"ids": store}, chunks=3)
        with pytest.raises(UsageError, match="one text a run"):
            measure_drift_on(site, gguf, {"a": store, "b": store})
        with pytest.raises(UsageError, match="rounds activations"):
            measure_drift_on(site, gguf, {"ids": store}, settings=Settings(activations="q8_0"))
        with pytest.raises(MissingToolError, match="llama-cpp-python"):
            check_on_device(site, gguf, generates=True)
        assert site.describe(other)["format"] == "gguf"
    assert not tool.with_name("llama-perplexity.arguments").exists()


def bench(folder: Path, **more: str) -> Path:
    return program(folder, "llama-bench", help=BENCH_HELP, says=BENCH_JSON, **more)


def test_llama_bench_s_times_stand_in_our_fields(gguf: Path, tmp_path: Path) -> None:
    tool = bench(tmp_path / "bin")
    with this_machine(tmp_path / "device", tool) as site:
        data = measure_speed_on(site, gguf, request=SpeedRequest(32, 8, 3, warmup=2), settings=Settings(threads=2))
    assert data["metrics"]["decode_tps"]["samples"][0] == pytest.approx(8 / 0.015102172)
    assert data["metrics"]["ttft_s"]["value"] is None
    details = data["runtime"]["details"]
    assert (details["threads"], details["weight_bytes"], details["backends"]) == (2, 279808, "CPU")
    assert data["details"]["output"]["decode"]["n_gen"] == 8
    assert data["details"]["arguments"][:2] == ["-m", "tiny-f16.gguf"]
    assert "somebody" not in str(data), "no folder of a user's"
    assert str(tmp_path / "device") not in str(data["runtime"] | data["details"])
    assert "llama-bench does not tell it" in reported(tmp_path, "bench", data)


def test_a_bench_that_says_nothing_or_hangs_is_a_sentence(gguf: Path, tmp_path: Path) -> None:
    silent = program(tmp_path / "silent", "llama-bench", help=BENCH_HELP)
    with this_machine(tmp_path / "device", silent) as site, pytest.raises(TargetError, match="not its JSON"):
        measure_speed_on(site, gguf)
    asleep = bench(tmp_path / "asleep", then="sleep 60")
    with this_machine(tmp_path / "device", asleep) as site:
        hasty = Site(site.device, site.profile, site.environment, site.found, timeout_s=0.5)
        with pytest.raises(TargetError, match=r"longer than 0\.5 s"):
            measure_speed_on(hasty, gguf)


def test_nothing_there_says_what_is_missing_and_how_to_get_it(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no runner that was built on this machine
    bare = program(tmp_path / "bin", "python3")
    bare.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -S "$@"\nexit 1\n')
    with this_machine(tmp_path / "device", bare) as site:
        for work in (measure_speed_on, check_on_device):
            with pytest.raises(MissingToolError, match="without numpy and llama-cpp-python") as caught:
                work(site, gguf)
            assert caught.value.exit_code == 5
            assert "phi4edge runner build --arch" in str(caught.value.hint)


def test_programs_that_were_built_here_are_sent_where_the_device_has_none(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runner = tmp_path / "cache" / "phi4edge" / "runners" / os.uname().machine / "key"
    bench(runner)
    held = {"llama-bench": {"bytes": 1, "sha256": sha256_file(runner / "llama-bench")}}
    arch = os.uname().machine
    about = {"schema": SCHEMA, "arch": arch, "march": DEFAULT_MARCH[arch], "key": "key", "created": "", "files": held}
    (runner / MANIFEST).write_text(json.dumps(about))
    bare = program(tmp_path / "bin", "python3", then="exit 1")
    with this_machine(tmp_path / "device", bare) as site, pytest.raises(TargetError, match="llama-bench printed"):
        measure_speed_on(site, gguf)  # it was started there, without its recorded words
    assert PurePosixPath("runner/key/llama-bench") in lies_there(site)


def test_last_words_that_were_lost_are_asked_for_again(gguf: Path, store: ReferenceStore, tmp_path: Path) -> None:
    """llama.cpp ends without waiting for its log: the same program says it all the second time."""
    tool = perplexity(tmp_path / "bin")
    whole = tool.read_text()
    tool.write_text(whole.replace('cat "$0.says"', 'head -n 3 "$0.says"; mv "$0.whole" "$0"'))
    tool.with_name("llama-perplexity.whole").write_text(whole)
    tool.with_name("llama-perplexity.whole").chmod(0o755)
    with this_machine(tmp_path / "device", tool) as site:
        found = measure_drift_on(site, gguf, {"ids": store}, settings=ONE)
    assert found["metrics"]["kld"]["value"] > 0
    tool.write_text(whole.replace('cat "$0.says"', 'head -n 3 "$0.says"; echo again >>"$0.times"'))
    with this_machine(tmp_path / "device", tool) as site, pytest.raises(TargetError, match="printed no ppl") as caught:
        measure_drift_on(site, gguf, {"ids": store}, settings=ONE)
    assert "does not wait for its log" in str(caught.value.hint)
    assert len(tool.with_name("llama-perplexity.times").read_text().splitlines()) == 3


def test_a_device_of_another_processor_than_the_target_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match="and target local is s390x"),
        this_machine(tmp_path / "device", sys.executable, arch="s390x", transports=("ssh",)),
    ):
        pass


def test_limits_grow_with_what_is_to_be_done() -> None:
    assert time_limit(0, 0, 0) == 120
    assert time_limit(2 * 10**9, 512, 0) == 120 + 100 + 256
    assert time_limit(2 * 10**9, 0, 128) == 120 + 100 + 256


# --- the real programs


@pytest.mark.slow
@needs_llama
def test_the_real_llama_perplexity_agrees_with_us_from_our_base_file(
    gguf: Path, store: ReferenceStore, tmp_path: Path
) -> None:
    built = load_script("benchmarks/drift/perplexity.py").perplexity_path()
    if not built.is_file():
        pytest.skip("benchmarks/drift/perplexity.py has not built llama-perplexity yet")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "llama-perplexity"
    lib = Path(str(importlib.util.find_spec("llama_cpp").origin)).parent / "lib"  # type: ignore[union-attr]
    tool.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={lib} exec {built} "$@"\n')
    tool.chmod(0o755)
    ours = measure_drift(gguf, store, settings=ONE)["metrics"]
    with this_machine(tmp_path / "device", tool) as site:
        theirs = measure_drift_on(site, gguf, {"ids": store}, settings=ONE)["metrics"]
    for name in ("kld", "kld_max", "kld_p99", "kld_median", "ln_ppl_ratio"):
        assert theirs[name]["value"] == pytest.approx(ours[name]["value"], abs=2e-5), name
    assert theirs["ppl"]["value"] == pytest.approx(ours["ppl"]["value"], rel=1e-6)
    assert theirs["same_top_p"]["value"] == pytest.approx(ours["same_top_p"]["value"], abs=1e-5)
