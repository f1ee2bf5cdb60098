"""Speed of an artifact: prefill and decode apart, as llama-bench times them, with every sample kept.

    prefill_tps   prompt_tokens / seconds of a prompt run into an empty cache
    decode_tps    gen_tokens / seconds of as many single-token steps from an empty cache
    ttft_s        from handing over the prompt to holding the logits of the first token
    tpot_s        one decode step; the mean over all steps of all repetitions, its error over repetitions
    load_s        model and context, files as warm as they happened to be
    peak_rss_bytes, idle_rss_bytes   of the runtime's own process at its height, and before it loaded the model

Tokenization and sampling are excluded: the tokens that are fed are fixed. Beside the times stands what the machine
said of its clocks, heat and power meanwhile (:mod:`phi4edge.measurement.power`), which costs it nothing that shows.
"""

from __future__ import annotations

__all__ = ["measure_speed", "summarize_speed"]

import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from phi4edge.core.errors import MissingToolError
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.environment import environment
from phi4edge.measurement.power._api import Decoded
from phi4edge.measurement.power.sampler import local_sampler
from phi4edge.measurement.result import Measurement, mean_of
from phi4edge.runtimes._api import Settings, SpeedRequest, SpeedSamples, default_settings, load_runtime


def summarize_speed(samples: SpeedSamples, request: SpeedRequest) -> dict[str, Measurement]:
    """The metrics of a speed measurement, by name."""
    found = []
    if samples.prefill_s:
        found.append(mean_of("prefill_tps", "token/s", [request.prompt_tokens / s for s in samples.prefill_s]))
        found.append(mean_of("ttft_s", "s", samples.ttft_s))
    else:
        reason = "no prompt was asked for (--prompt-tokens 0)"
        found += [Measurement.missing("prefill_tps", "token/s", reason), Measurement.missing("ttft_s", "s", reason)]
    if samples.token_s:
        found.append(mean_of("decode_tps", "token/s", [request.gen_tokens / sum(s) for s in samples.token_s]))
        found.append(_time_per_token(samples.token_s))
    else:
        reason = "no generation was asked for (--gen-tokens 0)"
        found += [Measurement.missing("decode_tps", "token/s", reason), Measurement.missing("tpot_s", "s", reason)]
    found.append(Measurement("load_s", samples.load_s, "s", 1))
    found.append(Measurement("peak_rss_bytes", samples.peak_rss_bytes, "byte", 1))
    found.append(Measurement("idle_rss_bytes", samples.idle_rss_bytes, "byte", 1))
    return {measurement.name: measurement for measurement in found}


def _time_per_token(repetitions: tuple[tuple[float, ...], ...]) -> Measurement:
    """Steps of one repetition are not independent: the error is that of the repetitions' means."""
    means = mean_of("tpot_s", "s", [fmean(repetition) for repetition in repetitions])
    steps = tuple(chain.from_iterable(repetitions))
    return Measurement("tpot_s", means.value, "s", len(steps), means.se, steps, median=median(steps))


def measure_speed(
    artifact: Path,
    *,
    target: str = "local",
    transport: str = "local",
    runtime: str | None = None,
    request: SpeedRequest | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Time ``artifact`` on this machine; the ``data`` of a bench document.

    Raises:
        UsageError: the artifact's runtime serves nothing.
        InputError: a bad artifact.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    description = describe(artifact)
    name = runtime or default_runtime(artifact)
    request, settings = request or SpeedRequest(), settings or default_settings(name)
    module = load_runtime(name)
    reason = module.available()
    if reason:
        raise MissingToolError(reason, getattr(module, "INSTALL", None))
    before = environment()  # its load average is the one that the measurement met
    with local_sampler() as sampler:
        sampler.before()
        sampler.start()
        samples = module.speed(artifact, request, settings)
        sampler.stop(_decoded(samples))
        power = sampler.after()
    return {
        "artifact": description,
        "target": target,
        "transport": transport,
        "runtime": {"name": name, "version": module.version(), "details": dict(samples.details)},
        "settings": asdict(settings) | asdict(request) | {"threads": samples.details.get("threads")},
        "metrics": {key: metric.as_dict() for key, metric in summarize_speed(samples, request).items()},
        "environment": before,
        "power": power,
    }


def _decoded(samples: SpeedSamples) -> Decoded | None:
    """Decoding comes last in a measurement of speed, so it is the last of the time that the machine was watched."""
    tokens = list(chain.from_iterable(samples.token_s))
    return Decoded(len(tokens), sum(tokens), time.monotonic()) if tokens else None
