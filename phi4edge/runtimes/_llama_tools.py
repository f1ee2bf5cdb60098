"""llama.cpp's own programs on a device: their flags, what llama-bench prints, and how they end.

A build is asked for its flags (``--help``) and never given one that it does not know: builds of several years are
about, and one that ignored a flag would be measured under another's name.
"""

from __future__ import annotations

__all__ = [
    "BenchTest",
    "bench_arguments",
    "help_of",
    "parse_bench",
    "perplexity_arguments",
    "run_tool",
    "version_of",
]

import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4edge.core.errors import TargetError
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.runtimes._remote import BENCH, PERPLEXITY, Program
from phi4edge.transports._api import Device, Finished

_HELP_S = 60.0
_HINTS = {
    signal.SIGILL: "it was built for another CPU; phi4edge runner build makes one that runs on all of them",
    signal.SIGKILL: "most likely out of memory; take a smaller artifact or a shorter context",
    signal.SIGBUS: "the file became shorter while it was read, or the device's disk fails",
}


@dataclass(frozen=True)
class BenchTest:
    """One test of llama-bench's JSON."""

    seconds: tuple[float, ...]  # one a repetition
    fields: Mapping[str, Any]  # all that it said


def help_of(device: Device, program: Program) -> str:
    """What the program says of its flags.

    Raises:
        TargetError: it does not run on the device.
    """
    done = device.run([program.path, "--help"], timeout_s=_HELP_S, environment=program.environment)
    if done.code > 1 or not (done.stdout or done.stderr):  # some builds end their help with 1
        raise _failure(device, program, done)
    return done.text + done.stderr.decode("utf-8", errors="replace")


def version_of(device: Device, program: Program) -> str:
    """The build, as the program tells it.

    Raises:
        TargetError: the device is gone.
    """
    done = device.run([program.path, "--version"], timeout_s=_HELP_S, environment=program.environment)
    said = re.search(r"^version: (.+)$", done.text + done.stderr.decode("utf-8", errors="replace"), re.MULTILINE)
    return said[1].strip() if said else "of an unknown build"


def run_tool(device: Device, program: Program, arguments: Sequence[str], timeout_s: float) -> Finished:
    """Run a program of llama.cpp; its stdout is the result.

    Raises:
        TargetError: it failed, was ended, took too long, or the device is gone.
    """
    done = device.run([program.path, *arguments], timeout_s=timeout_s, environment=program.environment)
    if done.code:
        raise _failure(device, program, done)
    return done


def _failure(device: Device, program: Program, done: Finished) -> TargetError:
    name = program.path.rsplit("/", 1)[-1]
    words = f": {done.last_words}" if done.last_words else ""
    try:
        ended_by = signal.Signals(done.code - 128)
    except ValueError:
        hint = None
        if done.code in (126, 127) or "xec format error" in done.last_words:
            hint = "is it for that processor and system? phi4edge runner build makes static programs"
        return TargetError(f"{device.name}: {name} ended with exit code {done.code}{words}", hint)
    return TargetError(f"{device.name}: {name} was ended by {ended_by.name}{words}", _HINTS.get(ended_by))


def bench_arguments(known: str, model: str, request: SpeedRequest, settings: Settings) -> list[str]:
    """llama-bench's arguments for ``request``; ``known`` is its help.

    It warms up once by itself; further warm-up is repetitions whose times :func:`parse_bench` leaves out.

    Raises:
        TargetError: the build does not know one of them.
    """
    repetitions = request.repetitions + max(request.warmup - 1, 0)
    found = ["-m", model, "-p", str(request.prompt_tokens), "-n", str(request.gen_tokens), "-r", str(repetitions)]
    if request.warmup == 0:
        found += _needed(BENCH, known, "--no-warmup", "a first run that counts (--warmup 0)")
    found += _shared(BENCH, known, settings, settings.batch)
    return [*found, "-o", "json"]


def perplexity_arguments(known: str, model: str, base: str, context: int, settings: Settings) -> list[str]:
    """llama-perplexity's arguments for its comparison with ``base``, one chunk at a time.

    Raises:
        TargetError: the build does not know one of them.
    """
    flag = _needed(PERPLEXITY, known, "--kl-divergence", "comparing with a base file")
    base_flag = _needed(PERPLEXITY, known, "--kl-divergence-base", "comparing with a base file")
    batch = min(settings.batch, context)  # a larger one takes several chunks at once
    return ["-m", model, *flag, *base_flag, base, "-c", str(context), *_shared(PERPLEXITY, known, settings, batch)]


def _shared(tool: str, known: str, settings: Settings, batch: int) -> list[str]:
    found = ["-b", str(batch), "-ub", str(min(settings.ubatch, batch))]
    if settings.threads is not None:
        found += ["-t", str(settings.threads)]
    if "-ngl" in known:
        found += ["-ngl", str(settings.gpu_layers)]
    elif settings.gpu_layers:
        raise _unknown(tool, "-ngl", "layers on an accelerator")
    if settings.kv_type != "f16":
        for flag in ("-ctk", "-ctv"):
            found += [*_needed(tool, known, flag, f"a KV cache in {settings.kv_type}"), settings.kv_type]
    return found + _flash(tool, known, settings.flash_attention)


def _flash(tool: str, known: str, asked: str) -> list[str]:
    """-fa has had three forms: a flag alone, 0 or 1, and on, off or auto."""
    match = re.search(r"-fa,?\s+(?:-fa,?\s+)?--flash-attn(?:\s+([<\[{]\S+))?", known)
    if match is None:
        if asked != "auto":
            raise _unknown(tool, "-fa", f"--flash-attention {asked}")
        return []
    takes = match[1] or ""
    if "auto" in takes:
        return ["-fa", asked]
    if asked == "auto":
        return []
    if takes:
        return ["-fa", "1" if asked == "on" else "0"]
    return ["-fa"] if asked == "on" else []


def _needed(tool: str, known: str, flag: str, purpose: str) -> list[str]:
    if re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known) is None:
        raise _unknown(tool, flag, purpose)
    return [flag]


def _unknown(tool: str, flag: str, purpose: str) -> TargetError:
    return TargetError(
        f"the device's {tool} does not know {flag}, which {purpose} needs",
        "a newer build of llama.cpp does (phi4edge runner build makes one), or ask for its default",
    )


def parse_bench(output: str, request: SpeedRequest) -> dict[str, BenchTest]:
    """llama-bench's JSON: its tests ``prefill`` and ``decode``, those of them that were asked for.

    Raises:
        TargetError: not its JSON, or without what was asked for.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith("[")), 0)
    try:
        document = json.loads("\n".join(lines[start:]))
        tests = [
            (int(t["n_prompt"]), int(t["n_gen"]), [float(ns) / 1e9 for ns in t["samples_ns"]], t) for t in document
        ]
    except (ValueError, KeyError, TypeError) as error:
        said = output.strip()[:80]
        raise TargetError(f"{BENCH} printed {said!r}, which is not its JSON ({error})", "is it llama.cpp's?") from error
    found: dict[str, BenchTest] = {}
    extra = max(request.warmup - 1, 0)
    for name, (prompt, generated) in {
        "prefill": (request.prompt_tokens, 0),
        "decode": (0, request.gen_tokens),
    }.items():
        if not prompt + generated:
            continue
        own = [(seconds, fields) for p, g, seconds, fields in tests if (p, g) == (prompt, generated)]
        if len(own) != 1 or len(own[0][0]) != request.repetitions + extra or min(own[0][0]) <= 0:
            raise TargetError(
                f"{BENCH} printed no {request.repetitions + extra} times of {prompt or generated} tokens ({name})",
                "is it llama.cpp's, of 2024 or later?",
            )
        found[name] = BenchTest(tuple(own[0][0][extra:]), dict(own[0][1]))
    return found
