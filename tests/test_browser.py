"""A model in a real browser: speed and drift as elsewhere, and a page that no token lets in twice."""

from __future__ import annotations

import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_support import Client, Visitor, acting, chromium, until, wllama_or_skip
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, MissingToolError, TargetError, UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.measurement import browser_guest
from phi4edge.measurement.browser_guest import Guest, open_guest
from phi4edge.measurement.in_browser import measure_drift_in_browser, measure_speed_in_browser
from phi4edge.measurement.reference import ReferenceStore, build_store
from phi4edge.measurement.texts import Chunks
from phi4edge.report.parse import parse_document
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.targets.probe_llama import PROBE_MODEL, write_probe_model
from phi4edge.transports import _wllama
from phi4edge.transports.browser import Place
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._gguf_cut import cut_gguf
from phi4edge.writers._gguf_file import read_gguf, read_rows
from phi4edge.writers.gguf import write_f16

QUICK = Place(wait_s=60, idle_s=40, limit_s=120)
EXACT = Settings(threads=1, flash_attention="off", kv_type="f32")
SMALL = SpeedRequest(prompt_tokens=8, gen_tokens=3, repetitions=2, warmup=1)
FACTS = json.dumps({"user_agent": "a test", "clock_step_s": 1e-4, "cross_origin_isolated": False}).encode()


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> None:
    wllama_or_skip()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.gguf"
    write_probe_model(path, PROBE_MODEL)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Phi-4-mini's kind; llama.cpp's shortest context of 256 is still within the short rope factors."""
    folder = tmp_path_factory.mktemp("model") / "phi-tiny"
    return write_checkpoint(folder, "mini", original_max_position_embeddings=256)


@pytest.fixture(scope="module")
def f32(checkpoint: Path) -> Path:
    return write_f16(open_checkpoint(checkpoint), checkpoint.parent / "tiny.gguf", WriteOptions(), dtype="f32").path


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceStore:
    ids = np.random.default_rng(1).integers(4, 512, (2, 24))
    text = Chunks("ids", sha256_bytes(ids.tobytes()), 1, ids)
    return build_store(open_checkpoint(checkpoint), text, tmp_path_factory.mktemp("store") / "store")


def guest(path: Path, visitor: Visitor, *, place: Place = QUICK, settings: Settings = EXACT) -> Guest:
    return open_guest(path, settings, place, visitor.announce)


def loaded(**changes: Any) -> bytes:
    """What a page says that has loaded the probe model."""
    info = {"vocab_size": 256, "layers": 2, "threads_asked": 1}
    said = {"transfer_s": 0.1, "load_s": 0.2, "transferred": 0, "threads": 1, "info": info, "log": []}
    return json.dumps(said | changes).encode()


# --- in Chromium ---------------------------------------------------------------------------------------------


def test_a_browser_measures_speed_with_every_sample_and_says_what_it_runs_on(probe: Path, tmp_path: Path) -> None:
    visitor = Visitor()
    with chromium(visitor, tmp_path):
        found = guest(probe, visitor, settings=Settings(threads=2))
        data = measure_speed_in_browser(found, target="browser", request=SMALL)
    assert data["transport"] == "browser"
    assert data["runtime"]["name"] == "wllama"
    assert data["runtime"]["version"] == _wllama.VERSION
    metrics, details = data["metrics"], data["runtime"]["details"]
    assert len(metrics["prefill_tps"]["samples"]) == 2
    assert len(metrics["tpot_s"]["samples"]) == 6
    assert metrics["decode_tps"]["value"] > 0
    assert metrics["ttft_s"]["value"] >= 8 / metrics["prefill_tps"]["samples"][0] * 0.1
    assert metrics["peak_rss_bytes"]["value"] is None
    assert details["transfer_bytes"] == probe.stat().st_size
    assert (details["threads"], details["wasm_build"]) == (2, "multi-thread")
    assert details["cross_origin_isolated"] is True
    browser = data["environment"]["browser"]
    assert "Chrome" in browser["user_agent"]
    assert browser["wasm_simd"] is True
    assert browser["hardware_concurrency"] >= 1
    assert data["warnings"] == []
    (read,) = parse_document({"schema": "phi4edge/bench/1", "ok": True, "data": data}, "bench.json", "")
    assert read.runtime.name == "wllama"  # type: ignore[union-attr]


def test_a_browser_gives_the_reference_s_distributions_from_a_file_that_it_gets_in_parts(
    f32: Path, store: ReferenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain http from another host's name, where a page has one thread."""
    monkeypatch.setattr(browser_guest, "_PIECE", 200_000)
    visitor = Visitor()
    with chromium(visitor, tmp_path, host="phone.test"):
        settings = Settings(threads=2, flash_attention="off", kv_type="f32")
        served = guest(f32, visitor, settings=settings)
        assert len(served.pieces) > 2
        data = measure_drift_in_browser(served, {"ids": store})
    assert 0 <= data["metrics"]["kld"]["value"] < 1e-6
    assert data["metrics"]["same_top_p"]["value"] > 0.9
    assert data["text"]["positions"] == 2 * store.positions
    assert data["estimate"]["kind"] == "whole vocabulary"
    assert data["runtime"]["settings"]["threads"] == 1
    assert any("one thread computed, 2 were asked for" in text for text in data["warnings"])


# --- who gets in ---------------------------------------------------------------------------------------------


def test_only_the_first_who_has_the_token_gets_in_and_paths_lead_nowhere_else(probe: Path) -> None:
    visitor = Visitor()
    seen: dict[str, int] = {}

    def act(client: Client) -> None:
        stranger = Client(visitor.link)
        seen["no cookie"] = stranger.ask("GET", "/")[0]
        seen["wrong token"] = stranger.ask("GET", "/open/" + "A" * 22)[0]
        seen["preview"] = stranger.ask("GET", client.url.path, Sec_Purpose="prefetch")[0]
        seen["head"] = stranger.ask("HEAD", client.url.path)[0]
        seen["first"] = client.open()
        seen["second"] = stranger.open()
        stranger.cookie = client.cookie.split("=")[0] + "=" + "B" * 43
        seen["forged"] = stranger.ask("GET", "/job")[0]
        seen["stranger posts"] = stranger.ask("POST", "/say/error", b'{"message": "no"}')[0]
        seen["again"] = client.ask("GET", client.url.path)[0]
        for path in ("/page/../browser.py", "/page/%2e%2e/browser.py", "//etc/passwd", "/wllama/../../secret",
                     "/model/1", "/model/-1", "/page/..%2f_wllama.py"):  # fmt: skip
            seen[path] = client.ask("GET", path)[0]
        status, headers, body = client.ask("GET", "/")
        assert status == 200
        assert b"/page/main.js" in body
        assert "unsafe-inline" not in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        client.ask("POST", "/say/error", b'{"message": "that is \\u001b[31mall"}')

    with acting(visitor, act), pytest.raises(TargetError, match=r"in the browser: that is  \[31mall"):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)
    assert {key: seen.pop(key) for key in ("first", "again")} == {"first": 200, "again": 200}
    assert {key: seen.pop(key) for key in ("preview", "head")} == {"preview": 503, "head": 503}
    nowhere = [key for key in seen if key.startswith("/")]
    assert {seen.pop(key) for key in nowhere} == {404}
    assert set(seen.values()) == {403}


def test_the_model_is_sent_in_ranges_that_together_are_the_file(probe: Path) -> None:
    visitor = Visitor()

    def act(client: Client) -> None:
        client.open()
        whole, size = probe.read_bytes(), probe.stat().st_size
        assert client.ask("GET", "/model/0")[2] == whole
        for asked, part in (
            ("bytes=10-19", whole[10:20]),
            (f"bytes={size - 5}-", whole[-5:]),
            ("bytes=-7", whole[-7:]),
        ):
            status, headers, body = client.ask("GET", "/model/0", Range=asked)
            assert (status, body) == (206, part)
            assert headers["Content-Range"].endswith(f"/{size}")
        assert client.ask("GET", "/model/0", Range=f"bytes={size}-")[0] == 416
        assert client.ask("HEAD", "/model/0")[1]["Content-Length"] == str(size)
        client.ask("POST", "/say/error", b'{"message": "enough"}')

    with acting(visitor, act), pytest.raises(TargetError, match="enough"):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/say/prefill", b'{"prefill_s": -1, "ttft_s": 1}', "prefill_s is -1"),
        ("/say/prefill", b'{"prefill_s": NaN, "ttft_s": 1}', "prefill_s is nan"),
        ("/say/decode", b'{"token_s": []}', "not a list of times"),
        ("/say/decode", b"[" * 100_000, "too deep|not JSON"),
        ("/say/hello", b"\xff\xfe", "not JSON"),
        ("/say/loaded", loaded(info=7), "info is not an object"),
        ("/say/nothing", b"{}", "no message 'nothing'"),
        ("/say/status", b" " * 300_000, "300000 bytes; at most 262144"),
        ("/row/0/1", b"\0" * 12, "a row of 12 bytes, not 1024"),
    ],
)
def test_what_cannot_be_is_refused_and_ends_the_measurement(probe: Path, path: str, body: bytes, reason: str) -> None:
    visitor = Visitor()

    def act(client: Client) -> None:
        client.open()
        client.ask("POST", "/say/hello", FACTS)
        try:
            assert client.ask("POST", path, body)[0] == 400
        except (BrokenPipeError, ConnectionResetError):
            assert len(body) > 262144, "a body that is too long is not read"

    with acting(visitor, act), pytest.raises(TargetError, match=reason):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)


def test_a_page_that_loaded_another_model_is_not_believed(probe: Path) -> None:
    visitor = Visitor()

    def act(client: Client) -> None:
        client.open()
        client.ask("POST", "/say/loaded", loaded(transferred=probe.stat().st_size - 1))

    with acting(visitor, act), pytest.raises(TargetError, match="loaded another model"):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)


def test_a_page_that_says_it_is_done_too_early_is_not_believed(probe: Path) -> None:
    visitor = Visitor()

    def act(client: Client) -> None:
        client.open()
        client.ask("POST", "/say/loaded", loaded(transferred=probe.stat().st_size))
        client.ask("POST", "/say/done", b'{"hidden": 0}')

    with acting(visitor, act), pytest.raises(TargetError, match="done after 0 prefills"):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)


def test_rows_that_are_no_distributions_are_refused(f32: Path, store: ReferenceStore) -> None:
    visitor, served = Visitor(), None

    def act(client: Client) -> None:
        client.open()
        said = {"transferred": f32.stat().st_size, "info": {"vocab_size": 512, "layers": 2, "threads_asked": 1}}
        client.ask("POST", "/say/loaded", loaded(**said))
        client.ask("POST", f"/row/0/{store.first}", np.full(512, 0.5, dtype="<f4").tobytes())

    served = guest(f32, visitor)
    with acting(visitor, act), pytest.raises(TargetError, match=r"no distribution \(sum 256\); 0 of 2 chunks"):
        measure_drift_in_browser(served, {"ids": store})


def test_a_page_closed_midway_leaves_what_it_measured_in_the_error(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4edge.transports.browser._BACK_S", 0.3)
    visitor = Visitor()

    def act(client: Client) -> None:
        client.open()
        client.ask("POST", "/say/loaded", loaded(transferred=probe.stat().st_size))
        client.ask("POST", "/say/prefill", b'{"prefill_s": 0.5, "ttft_s": 0.6}')
        client.ask("POST", "/say/gone")

    with acting(visitor, act), pytest.raises(TargetError, match=r"closed; .*1 of 2 prefills \(16.00 tok/s\)"):
        measure_speed_in_browser(guest(probe, visitor), target="browser", request=SMALL)


def test_a_client_that_vanishes_and_one_that_never_comes_are_told_apart(probe: Path) -> None:
    visitor = Visitor()
    place = Place(wait_s=30, idle_s=0.4)
    with (
        acting(visitor, lambda client: client.open() and None),
        pytest.raises(TargetError, match="not been heard of for 0 s; nothing was measured"),
    ):
        measure_speed_in_browser(guest(probe, visitor, place=place), target="browser", request=SMALL)
    with pytest.raises(MissingToolError, match="nobody opened the link"):
        measure_speed_in_browser(guest(probe, Visitor(), place=Place(wait_s=0.2)), target="browser", request=SMALL)


def test_over_tls_the_page_comes_with_a_certificate_for_its_address(probe: Path) -> None:
    pytest.importorskip("cryptography", reason="the package cryptography is not installed")
    visitor = Visitor()

    def act(client: Client) -> None:
        assert client.url.scheme == "https"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with urllib.request.urlopen(visitor.link, context=context, timeout=20) as answer:
            assert "Secure" in answer.headers["Set-Cookie"]
        assert any("fingerprint" in note for note in visitor.notes)
        pem = ssl.get_server_certificate((str(client.url.hostname), int(client.url.port or 0)), timeout=20)
        trusting = ssl.create_default_context(cadata=pem)  # now the name is checked, against our own certificate
        until(lambda: _status(trusting, visitor.link) == 403)

    place = Place(tls=True, wait_s=30, idle_s=2)
    with acting(visitor, act), pytest.raises(TargetError):
        measure_speed_in_browser(guest(probe, visitor, place=place), target="browser", request=SMALL)


def _status(context: ssl.SSLContext, link: str) -> int:
    try:
        with urllib.request.urlopen(link, context=context, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


# --- before anything is served -------------------------------------------------------------------------------


def test_parts_of_a_file_hold_its_keys_once_and_all_its_tensors(f32: Path, tmp_path: Path) -> None:
    whole = read_gguf(f32)
    parts = cut_gguf(whole, 60_000)
    assert len(parts) > 3
    for number, part in enumerate(parts):
        data = part.header + f32.read_bytes()[part.offset : part.offset + part.nbytes]
        (tmp_path / f"cut-{number + 1:05d}-of-{len(parts):05d}.gguf").write_bytes(data)
    again = read_gguf(tmp_path / f"cut-00001-of-{len(parts):05d}.gguf")
    assert len(again.files) == len(parts)
    assert {k: v for k, v in again.metadata.items() if not k.startswith("split.")} == dict(whole.metadata)
    assert set(again.tensors) == set(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert (read_rows(again.tensors[name]) == read_rows(tensor)).all(), name
    for path in again.files:
        names = [t.name for t in sorted(read_gguf_part(again, path), key=lambda t: t.offset)]
        assert not names[-1].startswith("rope_factors"), "llama.cpp reads past their end"


def read_gguf_part(file: Any, path: Path) -> list[Any]:
    return [tensor for tensor in file.tensors.values() if tensor.path == path]


def test_what_cannot_run_in_a_browser_is_refused_before_a_page_is_served(
    probe: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(link: str, notes: object) -> None:
        pytest.fail("a link was announced")

    def refused(path: Path = probe, **settings: Any) -> Guest:
        return open_guest(path, Settings(**settings), QUICK, nobody)

    with pytest.raises(InputError, match="a browser runs a GGUF"):
        refused(checkpoint)
    with pytest.raises(UsageError, match="bf16 is unknown to wllama"):
        refused(kv_type="bf16")
    with pytest.raises(UsageError, match="cannot be forced"):
        refused(flash_attention="on")
    with pytest.raises(UsageError, match="not an address"):
        Place(host="phone")
    monkeypatch.setattr(browser_guest, "_MEMORY", browser_guest._ROOM + 1000)
    with pytest.raises(TargetError, match="do not fit WebAssembly's"):
        refused()


def test_the_command_says_how_to_get_the_runtime_and_takes_no_other_archive(
    probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["bench", str(probe), "--transport", "browser", "--json"]) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["hint"] == "phi4edge runner fetch-web"
    other = tmp_path / "other.tgz"
    other.write_bytes(b"not it")
    assert main(["runner", "fetch-web", "--from", str(other), "--json"]) == 3
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["runner", "fetch-web", "--json"]) == 5
    assert "--from FILE" in capsys.readouterr().out


def test_a_target_that_no_browser_reaches_is_refused(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(probe), "--transport", "browser", "--target", "jetson-thor-128gb"]) == 2
    assert "reached over ssh" in capsys.readouterr().err
    assert main(["bench", str(probe), "--transport", "browser", "--runtime", "llama_cpp"]) == 2
    assert "which runs wllama" in capsys.readouterr().err


def test_the_link_for_a_phone_has_an_address_that_it_can_reach_and_says_what_plain_http_costs(probe: Path) -> None:
    visitor = Visitor()

    def act(client: Client) -> None:
        assert client.url.hostname not in (None, "0.0.0.0", "::")
        assert any("one thread only" in note for note in visitor.notes)

    place = Place(host="0.0.0.0", wait_s=0.5)
    with acting(visitor, act), pytest.raises(MissingToolError):
        measure_speed_in_browser(guest(probe, visitor, place=place), target="browser", request=SMALL)


def test_drift_in_a_browser_takes_no_work_that_needs_text_written(
    probe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["drift", str(probe), "--reference", str(checkpoint), "--transport", "browser"]
    for more in (["--greedy", "chunks"], ["--attribute"], ["--tasks", "gsm8k"], ["--text", "a=x", "--text", "b=y"]):
        assert main([*there, *more]) == 2
        assert "drift is measured on one text alone" in capsys.readouterr().err
