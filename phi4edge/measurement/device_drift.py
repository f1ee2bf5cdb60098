"""Drift on a device: by our worker in its Python, with the reference kept here, else by llama-perplexity there.

The worker sends logits, and the figures are made as on this machine, all of them. llama-perplexity compares on the
device, against our reference in a file of its own (:mod:`phi4edge.measurement.kld_base`); the tokens are in it, so that
the tokenizer there does not matter. Its figures have the same names, and the document says what they differ in.
"""

from __future__ import annotations

__all__ = ["check_on_device", "measure_drift_on"]

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from phi4edge.core.errors import InputError, UsageError
from phi4edge.measurement.artifact import default_runtime
from phi4edge.measurement.drift_run import measure_on, text_of
from phi4edge.measurement.gates import Limits, evaluate
from phi4edge.measurement.kld_base import base_file
from phi4edge.measurement.llama_perplexity import DIFFERENCES, LEAST_POSITIONS, LostWordsError, parse_drift
from phi4edge.measurement.on_device import Site, device_host, time_limit
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.result import Measurement
from phi4edge.runtimes._api import Settings, default_settings
from phi4edge.runtimes._llama_tools import help_of, perplexity_arguments, run_tool, version_of
from phi4edge.runtimes._remote import PERPLEXITY, Program, missing
from phi4edge.runtimes._remote_python import placed_runtime
from phi4edge.transports._api import Finished

_PRINTED = 5e-7  # nat: half of the last decimal that llama-perplexity prints
_ATTEMPTS = 3
_NO_SPREAD = {"kld": None, "ln_ppl_ratio": None, "same_top_p": None}


def _program(site: Site, runtime: str) -> Program | None:
    """What measures there: llama-perplexity, or None for our worker in a Python.

    Raises:
        UsageError: the runtime computes on this machine only.
        MissingToolError: neither is there.
    """
    placed_runtime(runtime)
    if site.found.has_python(runtime):
        return None
    program = site.program(PERPLEXITY) if runtime == "llama_cpp" else None
    if program is None:
        wanted = PERPLEXITY if runtime == "llama_cpp" else ""
        raise missing(site.device, site.found, runtime, wanted, site.hint(runtime))
    return program


def check_on_device(
    site: Site,
    artifact: Path,
    *,
    runtime: str | None = None,
    settings: Settings | None = None,
    generates: bool = False,
) -> None:
    """Have ``artifact`` and what measures it on the device, and load it there where that is quick to do.

    What is wrong is said before a reference is computed for it. ``generates``: text will be generated as well, which
    llama-perplexity cannot.

    Raises:
        As :func:`measure_drift_on`.
    """
    name = runtime or default_runtime(artifact)
    site.describe(artifact)
    settings = settings or default_settings(name)
    if _program(site, name) is not None:
        _check_settings(settings)
        if generates:
            raise missing(site.device, site.found, name, "", site.hint(name))
        site.send_artifact(artifact)
        return
    with device_host(site, artifact, name, settings).open(8, 0):
        pass


def measure_drift_on(
    site: Site,
    artifact: Path,
    stores: Mapping[str, ReferenceStore],
    *,
    chunks: int | None = None,
    runtime: str | None = None,
    settings: Settings | None = None,
    limits: Limits | Sequence[Limits] = (),
) -> dict[str, Any]:
    """Run the tokens of ``stores`` through ``artifact`` on the device; the ``data`` of a drift document.

    Raises:
        UsageError: as :func:`measure_on`; or what llama-perplexity cannot do (several texts, under 100 positions).
        InputError: a bad artifact, one of another vocabulary, or one that gives NaN.
        MissingToolError: nothing on the device can measure it; the hint says how to get what can.
        TargetError: the program failed or took too long, or the device is gone.
    """
    name = runtime or default_runtime(artifact)
    settings = settings or default_settings(name)
    program = _program(site, name)
    if program is None:
        host = device_host(site, artifact, name, settings)
        with site.awake():
            return measure_on(host, stores, chunks=chunks, limits=limits, progress=site.progress)
    if len(stores) > 1:
        raise UsageError(
            f"{PERPLEXITY} compares on one text a run, and {len(stores)} are given",
            "measure them one by one; with a Python on the device all are measured together",
        )
    _check_settings(settings)
    store = next(iter(stores.values()))
    asked = (limits,) if isinstance(limits, Limits) else limits
    return _by_perplexity(site, artifact, program, store, chunks, site.settings(settings, name), asked)


def _by_perplexity(
    site: Site,
    artifact: Path,
    program: Program,
    store: ReferenceStore,
    chunks: int | None,
    settings: Settings,
    limits: Sequence[Limits],
) -> dict[str, Any]:
    began = time.perf_counter()
    text = text_of(store, chunks)
    differences = [*DIFFERENCES, *_check(artifact, store, text)]
    base = base_file(store, text["chunks"], site.progress)
    differences[0] += f"; they hold {base.left_out_mass:.2g} of the probability here"
    differences[1] += f"; exactly it is {base.ppl:.6g}"
    model = site.send_artifact(artifact)
    where = PurePosixPath("references", base.path.name)
    site.send({where: base.path})
    arguments = perplexity_arguments(
        help_of(site.device, program), model, str(site.device.folder / where), store.context, settings
    )
    told = [artifact.name if word == model else word.rsplit("/", 1)[-1] for word in arguments]  # no folder of a user's
    nbytes = site.describe(artifact)["bytes"]
    limit = site.timeout_s or time_limit(nbytes, text["chunks"] * store.context, 0)
    site.progress.note(f"measuring {artifact.name} on {site.device.name} with {PERPLEXITY}")
    with site.awake():
        done, metrics = _compared(site, program, arguments, limit, text["positions"])
    errors = done.stderr.decode("utf-8", errors="replace")
    gates = [gate for each in limits for gate in evaluate(each, metrics, _NO_SPREAD)]
    return {
        "artifact": site.describe(artifact),
        "target": site.profile.id,
        "transport": site.device.transport,
        "measured_by": PERPLEXITY,
        "differences": differences,
        "runtime": {
            "name": "llama_cpp",
            "version": version_of(site.device, program),
            "settings": _settings(settings, f"{done.text}\n{errors}"),
        },
        "reference": {
            "model": store.header["model"],
            "fingerprint": store.header["key"]["fingerprint"],
            "dtype": store.header["dtype"],
            "encoding": f"{store.header['encoding']} in llama-perplexity's base file",
            "noise_floor_kld": max(store.header["noise_floor_kld"], _PRINTED),
            "tail_mass": 0.0,
            "left_out_mass": base.left_out_mass,
            "ppl": base.ppl,
        },
        "text": text,
        "metrics": {key: metric.as_dict() for key, metric in metrics.items()},
        "se_between_chunks": dict(_NO_SPREAD),
        "gates": [gate.as_dict() for gate in gates],
        "details": {"arguments": told, "output": done.text},
        "environment": dict(site.environment),
        "seconds": time.perf_counter() - began,
    }


def _compared(
    site: Site, program: Program, arguments: Sequence[str], limit: float, positions: int
) -> tuple[Finished, dict[str, Measurement]]:
    """What llama-perplexity said, and its figures; asked again where it ended well and its last words were lost.

    llama.cpp does not wait for the thread that writes its log, and the statistics are what it says last.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        done = run_tool(site.device, program, arguments, limit)
        errors = done.stderr.decode("utf-8", errors="replace")
        try:
            return done, parse_drift(f"{done.text}\n{errors}", positions)
        except LostWordsError as error:
            if attempt == _ATTEMPTS:
                raise
            site.progress.note(f"{error.message}; its last words were lost, asking again")
    raise AssertionError("unreachable")


def _check_settings(settings: Settings) -> None:
    if settings.activations != "none":
        raise UsageError("llama.cpp rounds activations as it does", "leave --activations out on a device")


def _check(artifact: Path, store: ReferenceStore, text: Mapping[str, Any]) -> list[str]:
    """Refuse what llama-perplexity would only log, and go on with; and a difference that this file makes.

    Raises:
        UsageError: too few positions.
        InputError: another vocabulary.
    """
    from phi4edge.writers._gguf_file import read_gguf

    if text["positions"] < LEAST_POSITIONS:
        raise UsageError(
            f"{text['positions']} positions are scored, and {PERPLEXITY} prints no statistics of fewer than "
            f"{LEAST_POSITIONS}",
            "more --chunks, or a longer --context",
        )
    metadata = read_gguf(artifact).metadata
    vocab = len(metadata.get("tokenizer.ggml.tokens", ()))
    if vocab != store.vocab_size:
        raise InputError(
            f"{artifact}: has a vocabulary of {vocab}, the reference one of {store.vocab_size}",
            "they are not the same model",
        )
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token") and (store.tokens[:, 0] != bos).any():
        return ["the first token of every chunk is replaced by BOS, as this file's tokenizer asks"]
    return []


def _settings(settings: Settings, said: str) -> dict[str, Any]:
    """What the settings came to, from what llama.cpp logs."""
    threads = re.search(r"n_threads = (\d+)", said)
    flash = re.search(r"Flash Attention (?:was auto, set to )?(enabled|disabled)", said)
    system = re.search(r"^(?:.*\s)?system_info: (.*)$", said, re.MULTILINE)
    return {
        "threads": int(threads[1]) if threads else settings.threads,
        "kv_type": settings.kv_type,
        "flash_attention": {"enabled": "on", "disabled": "off"}.get(
            flash[1] if flash else "", settings.flash_attention
        ),
        "gpu_layers": settings.gpu_layers,
        "program": PERPLEXITY,
        "system": system[1].strip() if system else None,
    }
