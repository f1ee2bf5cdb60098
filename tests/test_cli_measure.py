"""``phi4edge drift`` and ``phi4edge bench`` as scripts see them: documents, exit codes, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.measurement import reference
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

METRICS = (
    "ppl", "ppl_reference", "ln_ppl_ratio", "kld", "kld_max", "kld_p999", "kld_p99", "kld_p95", "kld_p90",
    "kld_median", "rms_delta_p", "mean_delta_p", "same_top_p",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "phi-tiny", "phi4")


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    return write_f16(open_checkpoint(model), model.parent / "tiny-f16.gguf", WriteOptions()).path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text((Path(__file__).read_text() + "\n") * 2)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path_factory.getbasetemp() / "shared-cache"))


class Outcome:
    """What a command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Outcome:
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


def drift(gguf: Path, model: Path, text: Path, *more: object) -> tuple[object, ...]:
    small = ("--context", 64, "--chunks", 4, "--threads", 1, "-q")
    return ("drift", gguf, "--reference", model, "--text", text, *small, *more)


def test_drift_prints_one_document_and_writes_the_same(
    run: Any, gguf: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "drift.json"
    found = run(*drift(gguf, model, text, "--json", "--out", out, "--max-kld", 0.001))
    assert found.code == 0, found.err
    document = found.document
    assert json.loads(out.read_text()) == document
    assert (document["schema"], document["ok"]) == ("phi4edge/drift/1", True)
    data = document["data"]
    assert {"path", "name", "format", "scheme", "sha256", "bytes"} <= set(data["artifact"])
    assert data["artifact"]["format"] == "gguf"
    assert data["reference"]["model"] == "phi-tiny"
    assert data["reference"]["noise_floor_kld"] < 1e-7
    assert data["text"]["positions"] == 4 * 31
    for name in METRICS:
        assert data["metrics"][name]["value"] is not None
        assert data["metrics"][name]["n"] == 4 * 31
    assert data["metrics"]["kld"]["value"] < 1e-4
    assert len(data["per_chunk_kld"]) == 4
    assert [gate["outcome"] for gate in data["gates"]] == ["pass"]
    assert data["environment"]["versions"]["llama_cpp"]
    assert data["seconds"] > 0


def test_drift_prints_a_table_with_errors(run: Any, gguf: Path, model: Path, text: Path) -> None:
    found = run(*drift(gguf, model, text))
    assert found.code == 0
    for label in ("PPL(artifact)", "ln(PPL ratio)", "KLD mean", "KLD 99.9 %", "Δp RMS", "Same top p"):
        assert label in found.out
    assert "±" in found.out
    assert "4 chunks of 64, 124 positions" in found.out


def test_a_failed_gate_ends_with_6_after_the_results(
    run: Any, gguf: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drift.json"
    gates = ("--max-kld", 1e-12, "--min-top1", 50, "--out", out)
    found = run(*drift(gguf, model, text, *gates, "--json"))
    assert found.code == 6
    document = found.document
    assert document["ok"] is False
    assert document["error"]["code"] == 6
    assert "kld" in document["error"]["message"]
    assert [gate["passed"] for gate in document["data"]["gates"]] == [False, True]
    assert document["data"]["metrics"]["kld"]["value"] > 0
    assert json.loads(out.read_text()) == document
    found = run(*drift(gguf, model, text, *gates))
    assert found.code == 6
    assert "KLD mean" in found.out
    assert found.err.startswith("Error: kld")


def test_an_undecided_gate_fails_unless_it_is_allowed(run: Any, gguf: Path, model: Path, text: Path) -> None:
    value = run(*drift(gguf, model, text, "--json")).document["data"]["metrics"]["ppl_ratio"]["value"]
    found = run(*drift(gguf, model, text, "--max-ppl-ratio", value))
    assert found.code == 6
    assert "undecided" in found.err
    assert "--chunks" in found.err
    assert run(*drift(gguf, model, text, "--max-ppl-ratio", value, "--gate-undecided", "pass")).code == 0


def test_a_store_serves_again_without_model_or_text(
    run: Any, gguf: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = run(*drift(gguf, model, text, "--store", store, "--json")).document["data"]
    again = run("drift", gguf, "--reference", store, "--threads", 1, "--json", "-q").document["data"]
    assert again["metrics"] == first["metrics"]
    assert again["text"] == first["text"]
    fewer = run("drift", gguf, "--reference", store, "--text", text, "--chunks", 2, "--json", "-q")
    assert fewer.document["data"]["per_chunk_kld"] == pytest.approx(first["per_chunk_kld"][:2], rel=1e-3)
    for more, words in (
        (("--chunks", 9), "has 4 chunks, --chunks is 9"),
        (("--context", 128), "chunks of 64 tokens, --context is 128"),
        (("--text", __file__), "is another"),
    ):
        refused = run("drift", gguf, "--reference", store, *more, "-q")
        assert refused.code == 3
        assert words in refused.err
    assert run("drift", gguf, "--reference", store, "--store", store, "-q").code == 2
    assert run("drift", gguf, "--reference", store, "--chunks", 0, "-q").code == 2


def test_bad_input_is_refused_with_its_exit_code(
    run: Any, gguf: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "stream_logits", lambda *_, **__: pytest.fail("a reference was computed"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:-5000])
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a few words")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (drift(broken, model, text), 3, "broken.gguf"),
        (drift(tmp_path / "none.gguf", model, text), 3, "none.gguf"),
        (drift(gguf, tmp_path / "none", text), 3, "config.json"),
        (drift(gguf, model, empty), 3, "empty"),
        (drift(gguf, model, short), 3, "need 256"),
        (drift(gguf, model, text, "--context", 1024, "--chunks", 1), 3, "exceeds the model's 512"),
        (("drift", gguf, "--reference", model, "-q"), 2, "--text"),
        (drift(gguf, model, text, "--max-kld", -1), 2, "negative"),
        (drift(gguf, model, text, "--out", tmp_path), 2, "is a folder"),
        (drift(model, model, text, "--runtime", "llama_cpp"), 3, "is a folder"),
    ]
    for arguments, code, words in cases:
        found = run(*arguments)
        assert found.code == code, (arguments, found.err)
        assert words in found.err, found.err
        assert "Traceback" not in found.err
    found = run(*drift(broken, model, text, "--json"))
    assert found.document["error"]["code"] == 3


def test_an_artifact_of_another_vocabulary_is_refused(run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "phi4", vocab_size=544)
    artifact = write_f16(open_checkpoint(other), tmp_path / "other.gguf", WriteOptions()).path
    found = run(*drift(artifact, model, text))
    assert found.code == 3
    assert "544" in found.err
    assert "512" in found.err


def test_a_run_directory_is_measured_in_the_reference(run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    made = run("quantize", model, "--out", tmp_path / "run", "--method", "rtn", "--scheme", "q8_0", "-q", "--json")
    assert made.code == 0, made.out
    data = run(*drift(tmp_path / "run", model, text, "--json")).document["data"]
    assert data["runtime"]["name"] == "torch_ref"
    assert (data["artifact"]["format"], data["artifact"]["scheme"]) == ("run", "q8_0")
    assert 1e-7 < data["metrics"]["kld"]["value"] < 1e-2
    refused = run(*drift(tmp_path / "run", model, text, "--runtime", "llama_cpp"))
    assert refused.code == 2
    assert "export it" in refused.err


def test_bench_prints_one_document_and_writes_the_same(run: Any, gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    small = ("--prompt-tokens", 16, "--gen-tokens", 4, "--repetitions", 2, "--threads", 1)
    found = run("bench", gguf, *small, "--json", "--out", out)
    assert found.code == 0, found.err
    document = found.document
    assert json.loads(out.read_text()) == document
    assert (document["schema"], document["ok"]) == ("phi4edge/bench/1", True)
    data = document["data"]
    assert (data["target"], data["transport"], data["runtime"]["name"]) == ("local", "local", "llama_cpp")
    for name in ("prefill_tps", "decode_tps", "ttft_s", "tpot_s", "peak_rss_bytes", "load_s"):
        assert data["metrics"][name]["value"] > 0
    assert len(data["metrics"]["decode_tps"]["samples"]) == 2
    assert data["settings"]["threads"] == 1
    found = run("bench", gguf, *small, "--prompt-tokens", 0)
    assert found.code == 0
    assert "not measured" in found.out
    assert "tok/s" in found.out


def test_bench_goes_on_for_as_long_as_it_is_asked_to(run: Any, gguf: Path) -> None:
    small = ("--prompt-tokens", 16, "--gen-tokens", 4, "--repetitions", 2, "--threads", 1)
    data = run("bench", gguf, *small, "--sustained", 0.2, "--json").document["data"]
    samples = data["sustained"]["samples"]
    assert len(samples) >= 3
    assert samples[-1]["at_s"] == pytest.approx(sum(4 / sample["value"] for sample in samples))
    assert len(data["metrics"]["decode_tps"]["samples"]) == 2
    assert "sustained: first" in run("bench", gguf, *small, "--sustained", 0.2).out


def test_bench_measures_no_other_machine_than_this(run: Any, gguf: Path, model: Path) -> None:
    for arguments, code, words in (
        (("--target", "lokal"), 2, "local"),
        (("--transport", "carrier-pigeon"), 2, "carrier-pigeon"),
        (("--repetitions", 0), 2, "repetitions"),
    ):
        found = run("bench", gguf, *arguments)
        assert found.code == code, found.err
        assert words in found.err
    found = run("bench", model)
    assert found.code == 2
    assert "serves nothing" in found.err


def test_bench_does_not_give_this_machine_another_s_name(run: Any, gguf: Path) -> None:
    from phi4edge.targets.catalog import open_catalog

    catalog = open_catalog()
    remote = [name for name in catalog.entries if "local" not in catalog.profile(name).transports]
    if not remote:
        pytest.skip("every target in targets/ is local")
    found = run("bench", gguf, "--target", remote[0], "--transport", "local")
    assert found.code == 2
    assert "is reached over" in found.err
