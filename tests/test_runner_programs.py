"""A runner that was built, run: the aarch64 programs under qemu's user mode, the x86-64 ones as they are.

Nothing here is a device: qemu executes the instructions, and its speed says nothing.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

import adb_support
import numpy as np
import pytest
import ssh_support
import torch
from scripts import load_script
from tokenizers import Tokenizer

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.model.forward import stream_logits
from phi4edge.runtimes._runner_cache import built
from phi4edge.transports import adb, ssh
from phi4edge.transports._api import Device
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CONTEXT = 64
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1", "-tb", "1")


def commands() -> list[object]:
    """What is put before a program, and the folder it lies in, by processor."""
    reasons = {
        "aarch64": "" if QEMU else "qemu-aarch64 (Debian's qemu-user-static) is not installed",
        "x86_64": "" if platform.machine() == "x86_64" else "this machine is not x86-64",
    }
    found = []
    for arch, reason in reasons.items():
        folder = built(arch)
        reason = reason or ("" if folder else f"no runner is cached: phi4edge runner build --arch {arch}")
        mark = pytest.mark.skipif(bool(reason), reason=reason)
        words = [QEMU, "-cpu", "cortex-a76"] if arch == "aarch64" else []
        found.append(pytest.param((words, folder), id=arch, marks=[mark, pytest.mark.slow]))
    return found


def run(where: tuple[list[str], Path], program: str, *arguments: str | Path) -> str:
    words, folder = where
    command = [*words, folder / program, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode(errors="replace")  # random weights write bytes that are no text


@pytest.fixture(scope="module")
def f32(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    return write_f16(open_checkpoint(phi4_checkpoint), out, WriteOptions(), dtype="f32").path


@pytest.mark.parametrize("where", commands())
def test_llama_perplexity_of_a_runner_has_the_logits_of_our_own_forward(
    where: tuple[list[str], Path], phi4_checkpoint: Path, f32: Path, tmp_path: Path
) -> None:
    text, base = tmp_path / "text", tmp_path / "base.bin"
    text.write_text(Path(__file__).read_text())
    size = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-ub", str(CONTEXT), "--chunks", "2"]
    run(where, "llama-perplexity", "-m", f32, "-f", text, *size, *EXACT, "--kl-divergence-base", base)
    compare(base, phi4_checkpoint)


def compare(base: Path, model: Path) -> None:
    """What llama-perplexity wrote, with the logits of our own forward on this machine."""
    tokens = np.fromfile(base, "<i4", offset=20, count=2 * CONTEXT).reshape(2, CONTEXT).astype(np.int64)
    stored = load_script("benchmarks/drift/direct.py").base_file(base, tokens)
    first = CONTEXT // 2
    ours = stream_logits(open_checkpoint(model), torch.from_numpy(tokens), first=first)
    for theirs, logits in zip(stored, ours, strict=True):
        expected = torch.log_softmax(logits[:-1].double(), -1).numpy()
        # What lies 16 nat below the top is stored as that, the rest in 65,535 steps over the range.
        expected = np.maximum(expected, expected.max(-1, keepdims=True) - 16)
        assert np.abs(theirs - expected).max() < 5e-4


@pytest.mark.parametrize("where", commands())
def test_llama_completion_of_a_runner_writes_what_our_own_forward_would(
    where: tuple[list[str], Path], phi4_checkpoint: Path, f32: Path
) -> None:
    prompt = "tokenizer = Tokenizer(models.BPE())"
    tokenizer = Tokenizer.from_file(str(phi4_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    source = open_checkpoint(phi4_checkpoint)
    for _ in range(6):
        (logits,) = stream_logits(source, torch.tensor([ids]), first=len(ids) - 1)
        ids.append(int(logits[-1].argmax()))
    how = ["-n", "6", "--temp", "0", "-no-cnv", "--no-display-prompt", "-c", "128", "-t", "1", "--no-warmup"]
    for _ in range(5):  # on a busy machine llama.cpp's own main loses most of it
        said = run(where, "llama-completion", "-m", f32, "-p", prompt, *how)
        assert said.strip() == tokenizer.decode(ids[start:]).strip()


@pytest.mark.parametrize("where", commands())
def test_llama_bench_of_a_runner_gives_its_json(where: tuple[list[str], Path], f32: Path) -> None:
    found = json.loads(run(where, "llama-bench", "-m", f32, "-p", "16", "-n", "4", "-r", "2", "-t", "1", "-o", "json"))
    assert [(each["n_prompt"], each["n_gen"], len(each["samples_ns"])) for each in found] == [(16, 0, 2), (0, 4, 2)]


@contextmanager
def over_ssh(tmp_path: Path) -> Iterator[Device]:
    """The loopback behind OpenSSH's own server."""
    with (
        ssh_support.serving(ssh_support.OpenSsh(ssh_support.Keys(tmp_path / "keys"), tmp_path / "server")) as server,
        ssh.open(server.address()) as device,
    ):
        yield device


@contextmanager
def over_adb(tmp_path: Path) -> Iterator[Device]:
    """An emulated phone behind Google's adb client."""
    phone = adb_support.Phone(tmp_path / "phone", android=False)
    with (
        pytest.MonkeyPatch.context() as patch,
        adb_support.serving(tmp_path / "adb", patch),
        adb_support.phones(phone),
        adb.open(phone.address()) as device,
    ):
        yield device


@pytest.mark.slow
@pytest.mark.skipif(not QEMU, reason="qemu-aarch64 (Debian's qemu-user-static) is not installed")
@pytest.mark.skipif(built("aarch64") is None, reason="no runner is cached: phi4edge runner build --arch aarch64")
@pytest.mark.parametrize("reached", [over_ssh, over_adb])
def test_an_aarch64_runner_that_was_pushed_has_x86_s_logits(
    reached: Callable[[Path], AbstractContextManager[Device]], phi4_checkpoint: Path, f32: Path, tmp_path: Path
) -> None:
    """Both devices have an x86-64 kernel: a script under the program's name calls qemu."""
    folder = built("aarch64")
    assert folder is not None
    text, script, base = tmp_path / "text", tmp_path / "script", tmp_path / "base.bin"
    text.write_text(Path(__file__).read_text())
    script.write_text(f'#!/bin/sh\nexec {QEMU} -cpu cortex-a76 "$0.aarch64" "$@"\n')
    script.chmod(0o755)
    size = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-ub", str(CONTEXT), "--chunks", "2"]
    with reached(tmp_path) as device:
        for local, name in ((f32, "tiny.gguf"), (text, "text"), (script, "llama-bench"), (script, "llama-perplexity")):
            device.push(local, PurePosixPath(name))
        for name in ("llama-bench", "llama-perplexity"):
            device.push(folder / name, PurePosixPath(f"{name}.aarch64"))
        words = ["./llama-bench", "-m", "tiny.gguf", "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-o", "json"]
        timed = device.run(words, timeout_s=120)
        words = ["./llama-perplexity", "-m", "tiny.gguf", "-f", "text", *size, *EXACT, "--kl-divergence-base", "b.bin"]
        done = device.run(words, timeout_s=120)
        device.pull(PurePosixPath("b.bin"), base)
    assert (timed.code, done.code) == (0, 0), (timed.last_words, done.last_words)
    (found,) = json.loads(timed.stdout)
    assert (found["n_prompt"], found["model_filename"]) == (8, "tiny.gguf")
    compare(base, phi4_checkpoint)
