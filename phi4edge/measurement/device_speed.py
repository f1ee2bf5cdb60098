"""Speed on a device: by llama-bench where it is there, else by our worker in the device's Python.

Both time the same: a prompt, and a generation, each from an empty cache. What llama-bench does not tell (the first
token's time, loading, memory) is missing with that reason; its own output stands in the document's details.
"""

from __future__ import annotations

__all__ = ["measure_speed_on", "summarize_bench"]

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from phi4edge.core.errors import UsageError
from phi4edge.measurement.artifact import default_runtime
from phi4edge.measurement.on_device import Site, time_limit
from phi4edge.measurement.power._api import Decoded
from phi4edge.measurement.power.sampler import sampler_for
from phi4edge.measurement.result import Measurement, mean_of
from phi4edge.measurement.speed import summarize_speed
from phi4edge.runtimes._api import Settings, SpeedRequest, default_settings
from phi4edge.runtimes._llama_tools import BenchTest, bench_arguments, help_of, parse_bench, run_tool
from phi4edge.runtimes._remote import BENCH, Program, missing
from phi4edge.runtimes._remote_python import PlacedRuntime, placed_runtime

_UNTOLD = "llama-bench does not tell it"
# What of llama-bench's fields says how it computed; the times are the metrics, and all of it stands in ``output``.
_TOLD = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_type", "n_batch", "n_ubatch",
    "type_k", "type_v", "n_gpu_layers", "flash_attn", "devices", "repack", "test_time",
)  # fmt: skip


def measure_speed_on(
    site: Site,
    artifact: Path,
    *,
    runtime: str | None = None,
    request: SpeedRequest | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Time ``artifact`` on the device of ``site``; the ``data`` of a bench document.

    A Jetson raises its clocks during its first run, so one more repetition of it is not counted.

    Raises:
        UsageError: the runtime serves nothing on a device.
        InputError: a bad artifact.
        MissingToolError: nothing there can time it; the hint says how to get what can.
        TargetError: the program failed or took too long, or the device is gone.
    """
    name = runtime or default_runtime(artifact)
    module = placed_runtime(name)
    request, settings = request or SpeedRequest(), site.settings(settings or default_settings(name), name)
    if settings.activations != "none":
        raise UsageError("a device rounds activations as it does", "leave --activations out")
    if site.profile.kind == "jetson":
        request = replace(request, warmup=request.warmup + 1)
    description, found = site.describe(artifact), site.found
    program = found.programs.get(BENCH) if name == "llama_cpp" else None
    if program is None and not found.has_python(name):
        program = site.program(BENCH) if name == "llama_cpp" else None
        if program is None:
            raise missing(site.device, found, name, BENCH if name == "llama_cpp" else "", site.hint(name))
    runs = request.repetitions + request.warmup
    limit = site.timeout_s or time_limit(description["bytes"], request.prompt_tokens * runs, request.gen_tokens * runs)
    if program is not None:
        run = _llama_bench(site, artifact, program, request, settings, limit)
    else:
        run = _worker(site, artifact, module, request, settings, limit)
    site.progress.note(f"timing {artifact.name} on {site.device.name}")
    with site.awake(), sampler_for(site.device, site.profile) as sampler:
        sampler.before()
        sampler.start()
        timed = run()
        sampler.stop(Decoded(timed.tokens, timed.seconds, time.monotonic()) if timed.tokens else None)
        power = sampler.after()
    return {
        "artifact": description,
        "target": site.profile.id,
        "transport": site.device.transport,
        "runtime": {"name": name, "version": timed.version, "details": timed.details},
        "settings": asdict(settings) | asdict(request) | {"threads": timed.details.get("threads")},
        "metrics": {key: metric.as_dict() for key, metric in timed.metrics.items()},
        **({} if timed.raw is None else {"details": timed.raw}),
        "environment": dict(site.environment),
        "power": power,
    }


@dataclass(frozen=True)
class _Timed:
    """What a run gave; generating came last in it."""

    version: str
    details: Mapping[str, Any]
    metrics: Mapping[str, Measurement]
    tokens: int  # generated in repetitions that count
    seconds: float  # spent on them
    raw: Mapping[str, Any] | None = None  # what a program of another's was asked, and all that it answered


def _worker(
    site: Site, artifact: Path, module: PlacedRuntime, request: SpeedRequest, settings: Settings, limit: float
) -> Callable[[], _Timed]:
    """Send what is needed; the returned function times it."""
    place = site.python(module, artifact, limit)

    def run() -> _Timed:
        samples = module.speed(artifact, request, settings, place)
        steps = list(chain.from_iterable(samples.token_s))
        return _Timed(place.version, dict(samples.details), summarize_speed(samples, request), len(steps), sum(steps))

    return run


def _llama_bench(
    site: Site, artifact: Path, program: Program, request: SpeedRequest, settings: Settings, limit: float
) -> Callable[[], _Timed]:
    """Send what is needed; the returned function times it."""
    path = site.send_artifact(artifact)
    arguments = bench_arguments(help_of(site.device, program), path, request, settings)
    told = [artifact.name if word == path else word for word in arguments]  # no folder of a user's

    def run() -> _Timed:
        tests = parse_bench(run_tool(site.device, program, arguments, limit).text, request)
        decode = tests["decode"].seconds if "decode" in tests else ()
        said = next(iter(tests.values())).fields
        version = f"{said.get('build_number', 'unknown')} ({said.get('build_commit', 'unknown')})"
        output = {name: {**test.fields, "model_filename": artifact.name} for name, test in tests.items()}
        return _Timed(
            version,
            _details(said, settings),
            summarize_bench(tests, request),
            request.gen_tokens * len(decode),
            sum(decode),
            {"arguments": told, "output": output},
        )

    return run


def _details(said: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """How llama-bench computed, as it says; the names of our own worker where they mean the same."""
    return {
        "program": BENCH,
        "threads": said.get("n_threads"),
        "kv_type": said.get("type_k", settings.kv_type),
        "weight_bytes": said.get("model_size"),
        "parameters": said.get("model_n_params"),
        **{key: said[key] for key in _TOLD if key in said},
    }


def summarize_bench(tests: Mapping[str, BenchTest], request: SpeedRequest) -> dict[str, Measurement]:
    """The metrics of a speed measurement, by name, from llama-bench's times; see :mod:`phi4edge.measurement.speed`."""
    found = []
    if "prefill" in tests:
        seconds = tests["prefill"].seconds
        found.append(mean_of("prefill_tps", "token/s", [request.prompt_tokens / s for s in seconds]))
    else:
        found.append(Measurement.missing("prefill_tps", "token/s", "no prompt was asked for (--prompt-tokens 0)"))
    found.append(Measurement.missing("ttft_s", "s", _UNTOLD))
    if "decode" in tests:
        seconds = tests["decode"].seconds
        found.append(mean_of("decode_tps", "token/s", [request.gen_tokens / s for s in seconds]))
        found.append(mean_of("tpot_s", "s", [s / request.gen_tokens for s in seconds]))
    else:
        reason = "no generation was asked for (--gen-tokens 0)"
        found += [Measurement.missing("decode_tps", "token/s", reason), Measurement.missing("tpot_s", "s", reason)]
    found += [Measurement.missing(name, unit, _UNTOLD) for name, unit in _NOT_BY_BENCH]
    return {measurement.name: measurement for measurement in found}


_NOT_BY_BENCH = (("load_s", "s"), ("peak_rss_bytes", "byte"), ("idle_rss_bytes", "byte"))
