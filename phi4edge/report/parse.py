"""Result documents read into typed values, strictly: what is wrong is named with its file and key.

A document is ``{"schema": "phi4edge/<command>/1", "ok": true, "data": …}``. One that failed (``"ok": false``) becomes a
:class:`Failure`; when it holds data as well (a gate was missed), both are kept. Only what identifies an artifact and
a condition is required; a figure that is absent stays absent, with that as its reason.
"""

from __future__ import annotations

__all__ = ["SCHEMAS", "parse_document"]

from collections.abc import Callable
from typing import Any

from phi4edge.core.errors import UsageError
from phi4edge.quant.scheme import parse_scheme
from phi4edge.report.documents import (
    Artifact,
    Bench,
    Document,
    Drift,
    Export,
    Failure,
    GreedyText,
    HeldOut,
    HeldOutKld,
    LearnedBlock,
    Linear,
    Mix,
    Quantization,
    Reference,
    Runtime,
    TaskScore,
    Text,
    Tuning,
)
from phi4edge.report.drift_parts import read_attribution, read_domains, read_greedy, read_positions
from phi4edge.report.fields import Field, Metric, read_metric

_FLOATS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "float32": 32.0, "float16": 16.0, "bfloat16": 16.0}


def parse_document(document: Any, file: str, run: str, performance: dict[str, Any] | None = None) -> list[Document]:
    """The typed values in ``document``; ``run`` names a quantization, ``performance`` is what stands beside it.

    Raises:
        InputError: a key is missing, or holds something else than it should; file and key are named.
    """
    root = Field(document, file)
    schema = root["schema"].text()
    found: list[Document] = []
    if root.object().get("ok") is False:
        error = root["error"]
        code, hint = error.get("code"), error.get("hint")
        command = schema.split("/")[1]
        failure = Failure(
            file, command, code.integer() if code else None, error["message"].text(), hint.text() if hint else None
        )
        if root.get("data") is None:
            return [failure]
        found.append(failure)
    data = root["data"]
    if schema == "phi4edge/quantize/1":
        return [_quantization(data, file, run, performance), *found]
    if schema == "phi4edge/drift/1" and (data.get("tasks") or data.get("greedy")):
        measured: list[Document] = []
        if data.get("text") is not None:
            measured.append(_drift(data, file))
        elif data.get("greedy") is not None:
            measured.append(_greedy_text(data, file))
        return [*measured, *(_scores(data, file) if data.get("tasks") else ()), *found]
    return [_READERS[schema](data, file), *found]


def _text(field: Field | None) -> str | None:
    return field.text() if field else None


def _object(field: Field | None) -> dict[str, Any]:
    return field.object() if field else {}


def _artifact(field: Field, runtime: Runtime) -> Artifact:
    scheme, size = _text(field.get("scheme")), field.get("bytes")
    weight_bytes, parameters = runtime.settings.get("weight_bytes"), runtime.settings.get("parameters")
    whole = 8 * weight_bytes / parameters if isinstance(weight_bytes, int) and isinstance(parameters, int) else None
    return Artifact(
        sha256=field["sha256"].text(),
        name=field["name"].text(),
        format=_text(field.get("format")),
        scheme=scheme,
        bytes=size.integer(1) if size else None,
        bits_per_weight=whole or _bits(scheme),
        bits_of_linears=not whole,
    )


def _bits(scheme: str | None) -> float | None:
    if scheme is None or scheme in _FLOATS:
        return _FLOATS.get(scheme or "")
    try:
        return parse_scheme(scheme).bits_per_weight
    except UsageError:
        return None


def _runtime(data: Field) -> Runtime:
    field = data["runtime"]
    if isinstance(field.value, str):
        return Runtime(field.text(), None, {})
    settings = _object(field.get("settings")) | _object(field.get("details"))
    return Runtime(field["name"].text(), _text(field.get("version")), settings)


def _metrics(data: Field) -> dict[str, Metric]:
    return {name: read_metric(field) for name, field in data["metrics"].entries()}


def _drift(data: Field, file: str) -> Drift:
    reference, text, metrics, runtime = data["reference"], data["text"], _metrics(data), _runtime(data)
    if "kld" not in metrics:
        data["metrics"]["kld"].fail("is missing")
    floor, chunks, positions = reference.get("noise_floor_kld"), text.get("chunks"), text.get("positions")
    tail = reference.get("tail_mass")
    per_chunk, gates = data.get("per_chunk_kld"), data.get("gates")
    return Drift(
        file=file,
        artifact=_artifact(data["artifact"], runtime),
        runtime=runtime,
        reference=Reference(
            model=reference["model"].text(),
            fingerprint=reference["fingerprint"].text(),
            dtype=_text(reference.get("dtype")),
            encoding=_text(reference.get("encoding")),
            noise_floor_kld=read_metric(floor).value if floor else None,
            tail_mass=tail.number(0.0) if tail else None,
        ),
        text=Text(
            name=text["name"].text(),
            sha256=text["sha256"].text(),
            context=text["context"].integer(1),
            chunks=chunks.integer(1) if chunks else None,
            positions=positions.integer(1) if positions else None,
        ),
        metrics=metrics,
        per_chunk_kld=tuple(item.number() for item in per_chunk.items()) if per_chunk else (),
        gates=tuple(held for gate in gates.items() if "task" not in (held := gate.object())) if gates else (),
        environment=_object(data.get("environment")),
        domains=read_domains(data.get("domains")),
        per_position=read_positions(data.get("per_position")),
        attribution=read_attribution(data.get("attribution")),
        greedy=read_greedy(data.get("greedy")),
    )


def _greedy_text(data: Field, file: str) -> GreedyText:
    runtime, greedy = _runtime(data), read_greedy(data["greedy"])
    assert greedy is not None, "looked at before"
    return GreedyText(file, _artifact(data["artifact"], runtime), runtime, data["reference"]["model"].text(), greedy)


def _scores(data: Field, file: str) -> list[TaskScore]:
    """One score a task; a language of mgsm is a task of its own, behind the whole."""
    tasks, runtime, scores = data["tasks"], _runtime(data), list[TaskScore]()
    reference, gates = tasks["reference"], data.get("gates")
    held = [gate.object() for gate in gates.items()] if gates else []
    asked = ("harness", "chat_template", "context", "limit", "code_isolation")
    conditions = {key: tasks.object().get(key) for key in asked}

    def read(name: str, result: Field) -> TaskScore:
        change, flips = result["difference"], result["flips"]
        return TaskScore(
            file=file,
            artifact=_artifact(data["artifact"], runtime),
            runtime=runtime,
            reference=f"{reference['model'].text()} in {reference['runtime'].text()} {reference['version'].text()}",
            task=name,
            n=result["n"].integer(1),
            accuracy=result["artifact"]["accuracy"].number(0),
            accuracy_reference=result["reference"]["accuracy"].number(0),
            difference=change["value"].number(),
            low=change["low"].number(),
            high=change["high"].number(),
            lost=flips["lost"].integer(),
            gained=flips["gained"].integer(),
            mcnemar_p=result["mcnemar_p"].number(0),
            conditions=conditions | {"worked_examples": _shots(result, data, name)},
            gates=tuple(gate for gate in held if gate.get("task") == name),
        )

    for name, result in tasks["results"].entries():
        scores.append(read(name, result))
        parts = result.get("parts")
        for part, found in parts.entries() if parts else ():
            scores.append(read(f"{name} {part}", found))
    return scores


def _shots(result: Field, data: Field, name: str) -> int:
    """Worked examples before a question; a part has those of its task, and earlier versions had none."""
    given = result.get("shots") or data["tasks"]["results"][name.split(" ")[0]].get("shots")
    return given["count"].integer() if given else 0


def _bench(data: Field, file: str) -> Bench:
    metrics, runtime = _metrics(data), _runtime(data)
    estimates = {name: metrics[name] for name in metrics if name.endswith("_estimated")}
    estimates |= {name: read_metric(field) for name, field in data.entries() if name.endswith("_estimated")}
    roofline = data.get("roofline")
    above = roofline is not None and roofline.object().get("implausible") is True
    return Bench(
        file=file,
        artifact=_artifact(data["artifact"], runtime),
        runtime=runtime,
        target=data["target"].text(),
        transport=_text(data.get("transport")),
        settings=_object(data.get("settings")),
        metrics={name: metric for name, metric in metrics.items() if name not in estimates},
        estimates=estimates,
        environment=_object(data.get("environment")),
        implausible=roofline["reason"].text() if roofline is not None and above else None,
    )


def _heldout(field: Field | None) -> HeldOut | None:
    if field is None or not isinstance(field.value, dict):
        return HeldOut(field.number(0.0), None) if field else None
    first = field.get("first")
    return HeldOut(field["rest"].number(0.0), first.number(0.0) if first else None)


def _linear(field: Field) -> Linear:
    loss = field.get("loss")
    return Linear(
        name=field["name"].text(),
        method=field["method"].text(),
        loss=loss.number() if loss else None,
        heldout_error=_heldout(field.get("heldout_error")),
        heldout_error_rtn=_heldout(field.get("heldout_error_rtn")),
    )


def _quantization(data: Field, file: str, run: str, performance: dict[str, Any] | None) -> Quantization:
    spent = data.get("performance") or (Field(performance, file, "performance") if performance else None)

    def cost(key: str) -> Field | None:
        return data.get(key) or (spent.get(key) if spent else None)

    seconds, peak, corpus, events = cost("seconds"), cost("peak_rss_bytes"), data.get("corpus"), data.get("events")
    for event in events.items() if events else ():
        event["kind"].text()
    return Quantization(
        file=file,
        run=run,
        key=_text(data.get("key")),
        model=data["model"].text(),
        method=data["method"].text(),
        scheme=data["scheme"].text(),
        corpus=corpus.object() if corpus else None,
        quantized_fraction=data["quantized_fraction"].number(0.0),
        seconds=seconds.number(0.0) if seconds else None,
        peak_rss_bytes=peak.integer() if peak else None,
        events=tuple(event.object() for event in events.items()) if events else (),
        linears=tuple(_linear(item) for item in data["linears"].items()),
        rounding=tuple(_learned(item) for item in rounding.items()) if (rounding := data.get("rounding")) else (),
        tuning=_tuning(tuning) if (tuning := data.get("tuning")) else None,
        mix=_mix(allocation) if (allocation := data.get("allocation")) else None,
    )


def _learned(data: Field) -> LearnedBlock:
    kept = data["kept_step"].integer()
    errors = {item["step"].integer(): item["error"].number(0.0) for item in data["heldout"].items()}
    if not {0, kept} <= errors.keys():
        data["heldout"].fail(f"has no figures of step {0 if kept in errors else kept}")
    return LearnedBlock(errors[0], errors[kept], data["codes_moved"].number(0.0))


def _tuning(data: Field) -> Tuning:
    kept, first = (data["kept_step"].integer(), _halvings(data.get("kept_halvings"))), (0, 0)
    evaluated = {
        (item["step"].integer(), _halvings(item.get("halvings"))): _by_domain(item["domains"])
        for item in data["heldout"].items()
    }
    if kept not in evaluated or first not in evaluated:
        data["heldout"].fail(f"has no figures of step {0 if kept in evaluated else kept[0]}")
    rate = data["recipe"]["code_rate"].number(0.0)
    return Tuning(data["steps"].integer(), *kept, rate > 0, evaluated[first], evaluated[kept])


def _halvings(field: Field | None) -> int:
    return 0 if field is None else field.integer()


def _by_domain(data: Field) -> dict[str, HeldOutKld]:
    found = {}
    for name, item in data.entries():
        se = item.get("se")
        found[name] = HeldOutKld(item["kld"].number(), se.number(0.0) if se else None, item["samples"].integer())
    return found


def _mix(data: Field) -> Mix:
    return Mix(
        nbytes=data["nbytes"].integer(),
        bits_per_weight=data["bits_per_weight"].number(0.0),
        predicted_kld=data["predicted_kld"].number(0.0),
        types={name: kind.text() for name, kind in data["types"].entries()},
        tables={name: kind.text() for name, kind in data["tables"].entries()},
    )


def _export(data: Field, file: str) -> Export:
    fraction, files = data.get("quantized_fraction"), data.get("files")
    return Export(
        file=file,
        name=data["path"].text().rstrip("/").rsplit("/", 1)[-1],
        format=data["format"].text(),
        scheme=_text(data.get("scheme")),
        quantized_fraction=fraction.number(0.0) if fraction else None,
        files={name: digest.text() for name, digest in files.entries()} if files else {},
    )


_READERS: dict[str, Callable[[Field, str], Document]] = {
    "phi4edge/drift/1": _drift,
    "phi4edge/bench/1": _bench,
    "phi4edge/export/1": _export,
}
SCHEMAS = ("phi4edge/quantize/1", *_READERS)
