"""llama.cpp as a runtime: its logits are the model's, its failures are sentences."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, MissingToolError, TargetError, UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.measurement.drift_run import measure_drift
from phi4edge.measurement.reference import ReferenceStore, build_store
from phi4edge.measurement.texts import Chunks
from phi4edge.model.forward import stream_logits
from phi4edge.runtimes import llama_cpp as runtime
from phi4edge.runtimes import torch_ref
from phi4edge.runtimes._api import Settings, load_runtime
from phi4edge.runtimes._threads import physical_cores
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._gguf_file import read_gguf
from phi4edge.writers.gguf import write_f16

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

CONTEXT, COUNT = 64, 6
ONE = Settings(threads=1)


@pytest.fixture(scope="module")
def f16(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16(
        open_checkpoint(phi4_checkpoint), tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf", WriteOptions()
    ).path


@pytest.fixture(scope="module")
def f32(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    return write_f16(open_checkpoint(phi4_checkpoint), out, WriteOptions(), dtype="f32").path


@pytest.fixture(scope="module")
def q8_0(f16: Path) -> Path:
    """The model rounded by llama.cpp itself, in a process of its own."""
    out = f16.with_name("tiny-q8_0.gguf")
    code = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.ftype = 7; p.nthread = 1;"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    subprocess.run([sys.executable, "-c", code, str(f16), str(out)], check=True, capture_output=True)
    return out


def tokens(seed: int = 0, count: int = COUNT, context: int = CONTEXT) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, (count, context))


@pytest.fixture(scope="module")
def store(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceStore:
    ids = tokens()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI4EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_store(open_checkpoint(phi4_checkpoint), Chunks("ids", sha256_bytes(ids.tobytes()), 1, ids))


def test_the_model_in_float32_has_the_reference_s_logits_and_no_drift(f32: Path, store: ReferenceStore) -> None:
    settings = Settings(threads=1, kv_type="f32", flash_attention="off")
    data = measure_drift(f32, store, settings=settings)
    assert data["metrics"]["kld"]["value"] < 1e-7
    assert data["metrics"]["same_top_p"]["value"] == 1
    assert abs(data["metrics"]["ln_ppl_ratio"]["value"]) < 1e-6
    assert data["runtime"]["settings"]["kv_type"] == "f32"
    assert data["runtime"]["settings"]["flash_attention"] == "off"


def test_a_half_precision_artifact_drifts_at_the_floor(f16: Path, store: ReferenceStore) -> None:
    data = measure_drift(f16, store, settings=ONE)
    assert 1e-9 < data["metrics"]["kld"]["value"] < 1e-5
    assert data["metrics"]["same_top_p"]["value"] > 0.98
    assert data["runtime"]["settings"]["threads"] == 1
    assert data["text"] | {"sha256": ""} == {
        "name": "ids", "sha256": "", "context": CONTEXT, "chunks": COUNT, "positions": COUNT * 31
    }  # fmt: skip


HIGH_LEVEL = """
import sys, numpy, llama_cpp
path, ids, out = sys.argv[1:]
ids = numpy.load(ids)
model = llama_cpp.Llama(path, n_ctx=ids.shape[1], n_batch=ids.shape[1], logits_all=True, n_threads=1, verbose=False)
found = []
for row in ids:
    model.reset()
    model.eval(row.tolist())
    found.append(model.scores.copy())
numpy.save(out, found)
"""


def test_figures_through_llama_cpp_equal_a_direct_computation(
    q8_0: Path, store: ReferenceStore, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    """By llama-cpp-python's high-level class and float64 NumPy, which share no code with ours."""
    ids, out = tmp_path / "ids.npy", tmp_path / "logits.npy"
    np.save(ids, tokens())
    subprocess.run([sys.executable, "-c", HIGH_LEVEL, str(q8_0), str(ids), str(out)], check=True, capture_output=True)
    reference = stream_logits(open_checkpoint(phi4_checkpoint), torch.from_numpy(tokens()))
    nll, kld = [], []
    for row, logits, exact in zip(tokens(), np.load(out), reference, strict=True):
        for position in range(CONTEXT // 2, CONTEXT - 1):
            p, q = (np.exp(np.float64(x) - x.max()) for x in (exact[position].numpy(), logits[position]))
            p, q = p / p.sum(), q / q.sum()
            nll.append(-np.log(q[row[position + 1]]))
            kld.append(float((p * np.log(p / q)).sum()))
    settings = Settings(threads=1, flash_attention="off")  # as that class has it
    metrics = measure_drift(q8_0, store, settings=settings)["metrics"]
    assert metrics["ppl"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert metrics["kld"]["value"] == pytest.approx(np.mean(kld), rel=1e-3)
    assert metrics["kld"]["se"] == pytest.approx(np.std(kld) / np.sqrt(len(kld) - 1), rel=1e-2)
    assert metrics["kld_max"]["value"] == pytest.approx(max(kld), rel=1e-2)


def test_shuffled_scales_of_one_tensor_are_seen(q8_0: Path, store: ReferenceStore, tmp_path: Path) -> None:
    sound = measure_drift(q8_0, store, settings=ONE)["metrics"]
    tensor = read_gguf(q8_0).tensors["blk.1.ffn_down.weight"]
    data = bytearray(q8_0.read_bytes())
    blocks = np.frombuffer(data, dtype=np.uint8)[tensor.offset : tensor.offset + tensor.nbytes].reshape(-1, 34)
    blocks[:, :2] = np.random.default_rng(0).permutation(blocks[:, :2])  # every block's scale, two bytes
    damaged = tmp_path / "shuffled.gguf"
    damaged.write_bytes(data)
    found = measure_drift(damaged, store, settings=ONE)["metrics"]
    assert sound["kld"]["value"] < 1e-2
    assert found["kld"]["value"] > 20 * sound["kld"]["value"]


def test_chunks_do_not_see_each_other(f16: Path) -> None:
    ids = tokens(count=3)
    with runtime.open(f16, CONTEXT, ONE) as session:
        together = [rows.copy() for rows in session.logits(ids, first=5)]
        (alone,) = session.logits(ids[2:], first=5)
    assert together[0].shape == (CONTEXT - 5, 512)
    np.testing.assert_array_equal(together[2], alone)


def test_the_next_row_is_computed_while_the_caller_has_the_last_one(f16: Path) -> None:
    with runtime.open(f16, CONTEXT, ONE) as session:
        rows = session.logits(tokens(count=2))
        next(rows)
        assert select.select([session._child.stdout], [], [], 60)[0], "nobody asked for the second row"
        next(rows)
        assert not select.select([session._child.stdout], [], [], 0.2)[0], "there is no third row to ask for"


def test_what_was_asked_for_ahead_never_answers_another_request(f16: Path) -> None:
    ids = tokens(count=3)
    with runtime.open(f16, CONTEXT, ONE) as session:
        expected = [[rows.copy() for rows in session.logits(part, first=60)] for part in (ids, ids[::-1])]
        token = next(session.generate([5, 6, 7]))
        left = session.logits(ids)  # of more positions than the others
        next(left)
        assert next(session.generate([5, 6, 7])) == token
        pair = [map(np.copy, session.logits(part, first=60)) for part in (ids, ids[::-1])]
        for one, other, *rows in zip(*expected, *pair, strict=True):
            np.testing.assert_array_equal(np.stack(rows), np.stack([one, other]))
        np.testing.assert_array_equal(next(left)[60:], expected[0][1])


@pytest.mark.parametrize("first", [0, 31, 32, 45, 63])
def test_a_context_longer_than_a_batch_is_whole(f32: Path, first: int) -> None:
    ids = tokens(count=2)
    settings = {"threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with (
        runtime.open(f32, CONTEXT, Settings(batch=16, ubatch=16, **settings)) as pieces,
        runtime.open(f32, CONTEXT, Settings(**settings)) as whole,
    ):
        for a, b in zip(pieces.logits(ids, first=first), whole.logits(ids, first=first), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_pytorch_reference_reads_the_artifact_s_own_weights(
    f16: Path, q8_0: Path, store: ReferenceStore, phi4_checkpoint: Path
) -> None:
    weights = {
        path: measure_drift(path, store, runtime="torch_ref", settings=ONE)["metrics"]["kld"]["value"]
        for path in (phi4_checkpoint, f16, q8_0)
    }
    assert weights[phi4_checkpoint] < 2e-8
    assert weights[f16] < 1e-6
    assert 1e-6 < weights[q8_0] < 1e-2
    with pytest.raises(UsageError, match="serves nothing"):
        load_runtime("torch_ref").speed(f16, None, ONE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exceeds the model's 512"):
        torch_ref.open(f16, 513, ONE)


def test_a_damaged_file_is_refused_before_llama_cpp_sees_it(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("llama.cpp was started")

    monkeypatch.setattr(runtime, "LlamaSession", never)
    data = f16.read_bytes()
    cases = {
        "short.gguf": (data[: len(data) * 3 // 4], "ends at byte|has"),
        "header.gguf": (data[:200], "has 200"),
        "photo.gguf": (b"\xff\xd8\xff" + data[3:], "begins with"),
        "future.gguf": (data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
        "empty.gguf": (b"", "has 0"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            runtime.open(tmp_path / name, 64, ONE)
    with pytest.raises(InputError, match="is a folder"):
        runtime.open(tmp_path, 64, ONE)
    with pytest.raises(InputError, match="No such file"):
        runtime.open(tmp_path / "none.gguf", 64, ONE)


def test_what_llama_cpp_says_of_a_file_it_refuses_is_quoted(f16: Path, tmp_path: Path) -> None:
    data = f16.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.m0del")
    (tmp_path / "nameless.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"llama.cpp cannot load it: .*tokenizer\.ggml\.model"):
        runtime.open(tmp_path / "nameless.gguf", 64, ONE)


def test_settings_that_llama_cpp_refuses_are_a_usage_error(f16: Path) -> None:
    with pytest.raises(UsageError, match="refuses these settings"):
        runtime.open(f16, 64, Settings(threads=1, kv_type="q8_0", flash_attention="off"))
    for wrong in ({"threads": 0}, {"kv_type": "int8"}, {"batch": 8}, {"flash_attention": "yes"}):
        with pytest.raises(UsageError):
            Settings(**wrong)  # type: ignore[arg-type]


def test_without_the_package_the_command_that_installs_it_is_given(f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingToolError, match="not installed") as caught:
        runtime.open(f16, 64, ONE)
    assert caught.value.hint is not None
    assert "pip install" in caught.value.hint
    assert "llama-cpp-python==" in caught.value.hint


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A package llama_cpp that runs ``code`` when it is imported, in front of the real one, in children only."""
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_library_that_does_not_load_is_a_missing_tool(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "print('noise on stdout')\nraise RuntimeError('libllama.so: wrong ELF class')")
    with pytest.raises(MissingToolError, match="wrong ELF class"):
        runtime.open(f16, 64, ONE)


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV", "GGML_NATIVE=OFF|--no-binary"),
        ("import os; os.kill(os.getpid(), 4)", "ended by SIGILL", "another CPU"),
        (
            "import os; os.write(2, b'ggml.c:7: GGML_ASSERT(x) failed\\n0x7f\\n'); os.abort()",
            r"SIGABRT: ggml\.c:7: GGML_ASSERT",
            None,
        ),
        ("import os; os._exit(3)", "exit code 3", None),
    ],
)
def test_a_crash_in_native_code_is_a_sentence(
    code: str, message: str, hint: str | None, f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, code)
    with pytest.raises(TargetError, match=message) as caught:
        runtime.open(f16, 64, ONE)
    if hint is not None:
        assert any(part in str(caught.value.hint) for part in hint.split("|"))


def test_a_process_that_dies_between_chunks_is_reported_and_no_child_stays(f16: Path) -> None:
    session = runtime.open(f16, CONTEXT, ONE)
    stream = session.logits(tokens(), first=32)
    next(stream)
    os.kill(session._child.pid, signal.SIGKILL)
    with pytest.raises(TargetError, match="SIGKILL") as caught, session:
        list(stream)  # the next chunk may be in the pipe already
    assert "memory" in str(caught.value.hint)
    assert session._child.poll() == -signal.SIGKILL
    with pytest.raises(ZeroDivisionError), runtime.open(f16, CONTEXT, ONE) as session:
        _ = 1 / 0
    assert session._child.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_the_child_ends_when_its_parent_is_killed(f16: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from phi4edge.runtimes import llama_cpp as r;"
        "from phi4edge.runtimes._api import Settings;"
        "s = r.open(Path(sys.argv[1]), 64, Settings(threads=1)); print(s._child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(f16)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        parent.kill()
        libc = ctypes.CDLL(None)
        poll = struct.pack("ihh", descriptor, 1, 0)
        assert libc.poll(poll, 1, 10_000) == 1, "the child is still there"
        os.close(descriptor)


def test_threads_are_the_physical_cores_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cgroup = tmp_path / "cpu", tmp_path / "cgroup"
    for number in range(8):  # four cores of two threads
        topology = cpu / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_cpus_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    cgroup.mkdir()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert physical_cores(cpu, cgroup) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1}, raising=False)
    assert physical_cores(cpu, cgroup) == 2
    (cgroup / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert physical_cores(cpu, cgroup) == 2
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert physical_cores(cpu, cgroup) == 4
