"""``phi4edge drift ARTIFACT --reference MODEL|STORE --text PATH``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi4edge.cli.attribution import attribution_options, attribution_text, greedy_options, greedy_text, tensor_count
from phi4edge.cli.browser_options import BROWSER, browser_options, guest_for, place_of, warning_lines
from phi4edge.cli.device_options import DeviceOptions, device_options, site_for
from phi4edge.cli.gate_options import gate_line, gate_options
from phi4edge.cli.measure_options import checked_out, kv_type_for, plus_minus, runtime_options, table
from phi4edge.cli.options import common
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, emit_failure, envelope, failure_document
from phi4edge.cli.target_options import target_path_option
from phi4edge.cli.task_options import task_options, task_request, task_table
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import UsageError
from phi4edge.core.memory import format_bytes
from phi4edge.runtimes._api import ACTIVATIONS
from phi4edge.targets.profile import LOCAL

COMMAND = "drift"
_ROWS = (
    ("PPL(artifact)", "ppl", ".4f", 1),
    ("PPL(reference)", "ppl_reference", ".4f", 1),
    ("ln(PPL ratio)", "ln_ppl_ratio", ".5f", 1),
    ("PPL ratio", "ppl_ratio", ".5f", 1),
    ("KLD mean", "kld", "kld", 1),
    ("KLD maximum", "kld_max", "kld", 1),
    ("KLD 99.9 %", "kld_p999", "kld", 1),
    ("KLD 99 %", "kld_p99", "kld", 1),
    ("KLD 95 %", "kld_p95", "kld", 1),
    ("KLD 90 %", "kld_p90", "kld", 1),
    ("KLD median", "kld_median", "kld", 1),
    ("Δp mean, %", "mean_delta_p", ".3f", 100),
    ("Δp RMS, %", "rms_delta_p", ".3f", 100),
    ("Same top p, %", "same_top_p", ".3f", 100),
)


def _text(data: dict[str, Any]) -> str:
    artifact, text, reference, runtime = data["artifact"], data["text"], data["reference"], data["runtime"]
    if text is None:
        lines = [f"{artifact['name']}: {artifact['format']} {artifact['scheme'] or ''}, in {runtime['name']}"]
        lines += [f"against {reference['model']} at full precision; PPL and KLD were not measured (no --text)"]
        lines += greedy_text(data["greedy"]) if "greedy" in data else []
        lines += ["", task_table(data["tasks"])] if "tasks" in data else []
        return "\n".join([*lines, *_gate_lines(data)])
    lines = [
        *warning_lines(data),
        f"{artifact['name']}: {artifact['format']} {artifact['scheme'] or ''}, {format_bytes(artifact['bytes'])}",
        f"in {runtime['name']} {runtime['version']}, {runtime['settings']['threads']} threads, "
        f"against {reference['model']} in {reference['dtype']} (noise floor {reference['noise_floor_kld']:.1e}"
        f"{_left_out(reference)})",
        *_place_lines(data),
        f"text {text['name']}: {text['chunks']} chunks of {text['context']}, {text['positions']:,} positions scored",
        "",
    ]
    cells = [(label, *plus_minus(data["metrics"][key], spec, scale)) for label, key, spec, scale in _ROWS]
    width = max(len(value) for _, value, _ in cells)
    lines += [f"{label:<16}{value:>{width}}  {error}".rstrip() for label, value, error in cells]
    lines += _domain_lines(data.get("domains", []))
    if "greedy" in data:
        lines += greedy_text(data["greedy"])
    if "attribution" in data:
        lines += attribution_text(data["attribution"])
    if "tasks" in data:
        lines += ["", task_table(data["tasks"])]
    return "\n".join([*lines, *_gate_lines(data)])


def _gate_lines(data: dict[str, Any]) -> list[str]:
    lines = [gate_line(gate) for gate in data["gates"]]
    return ["", *lines] if lines else []


def _place_lines(data: dict[str, Any]) -> list[str]:
    """Where it was measured, where that was not here, and how the figures differ from our own."""
    if "target" not in data:
        return []
    cpu, by = data["environment"]["cpu"]["model"], data.get("measured_by")
    lines = [f"on {data['target']} ({cpu}) over {data['transport']}{f', measured by {by} there' if by else ''}"]
    return lines + [f"  {difference}" for difference in data.get("differences", ())]


def _left_out(reference: dict[str, Any]) -> str:
    if not reference["tail_mass"]:
        return ""
    return (
        f"; tokens that the store left out hold {reference['tail_mass']:.2g} of the probability: KLD is a lower bound"
    )


def _domain_lines(domains: list[dict[str, Any]]) -> list[str]:
    if not domains:
        return []
    metrics = (
        ("PPL ratio", "ppl_ratio", ".5f", 1),
        ("KLD mean", "kld", "kld", 1),
        ("Same top p, %", "same_top_p", ".3f", 100),
    )
    rows = [
        [d["name"], str(d["text"]["chunks"]), *(" ".join(plus_minus(d["metrics"][k], f, x)) for _, k, f, x in metrics)]
        for d in domains
    ]
    return ["", *table(["domain", "chunks", *(title for title, *_ in metrics)], rows)]


@click.command("drift")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="MODEL|STORE", help="Full-precision checkpoint, or its store.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME=]PATH",
    help="A text file, or builtin:eval; several (--text prose=a.txt --text code=b.txt) give figures and gates each "
    "and over all. A store brings its own.",
)
@click.option("--context", type=int, metavar="N", help="Tokens a chunk; the second half is scored.  [default: 512]")
@click.option("--chunks", type=int, metavar="N", help="Chunks to measure.  [default: all of a file, 32 of a corpus]")
@click.option("--store", type=click.Path(path_type=Path), help="Keep the reference logits here, not in the cache.")
@click.option(
    "--store-top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Keep only the K most likely tokens a position and the sum of the others: a smaller store, and a KLD that is "
    "a lower bound.  [default: the whole vocabulary]",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="none",
    show_default=True,
    help="In torch_ref: round inputs of linears to 8 bits as llama.cpp (q8_0, q8_k) or ONNX Runtime (int8) do.",
)
@browser_options
@gate_options
@greedy_options
@attribution_options
@task_options
@click.option("--target", metavar="ID", help="The device.  [default: local, this machine; or what opens the page]")
@target_path_option
@device_options
@click.option(
    "--task-answers",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Every question with both answers.  [default: beside --out, as NAME.answers.jsonl]",
)
@runtime_options
@common
def command(
    artifact: Path,
    reference: str,
    texts: tuple[str, ...],
    context: int | None,
    chunks: int | None,
    store: Path | None,
    store_top: int | None,
    max_kld: float | None,
    max_ppl_ratio: float | None,
    min_top1: float | None,
    max_task_drop: float | None,
    min_reference_share: float | None,
    gate_undecided: str | None,
    activations: str,
    greedy: str | None,
    greedy_tokens: int,
    attribute: bool,
    against: Path | None,
    attribute_tensors: str,
    attribute_chunks: int | None,
    target: str | None,
    target_path: tuple[Path, ...],
    device: DeviceOptions,
    runtime: str | None,
    threads: int | None,
    flash_attention: str,
    kv: str | None,
    out: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **tasks: Any,  # and the page's
) -> None:
    """Measure how far ARTIFACT's predictions drift from the full-precision model's, in the runtime that serves it.

    The figures are llama-perplexity's: PPL, KLD with its quantiles, Δp and same-top-p, each with its standard error.
    The reference's logits are computed once, streamed block by block, and kept for the next artifact.

    A gate compares at 95 % confidence: a value fails when it misses the limit beyond its error, passes when it keeps
    the limit with its error counted against it, and is undecided in between. A failed gate ends with exit code 6,
    after the results were written and printed.

    --attribute adds where the drift comes from: every step from full precision to the serving runtime on the same
    positions, and single tensors, each put alone into the full-precision model and each restored alone.

    With --tasks both models also answer questions from local files: accuracies with their intervals, the difference
    over pairs, McNemar's test and every flip. Answers are kept, so a run that was interrupted goes on. Without --text
    tasks, and --greedy FILE, are measured alone.

    With --target ARTIFACT runs on that device, in a Python with the runtime, or in llama-perplexity, against the
    reference that is made here; tasks and --attribute are measured on this machine only.
    """
    from phi4edge.core.workdir import RUN_FILE
    from phi4edge.measurement.artifact import default_runtime
    from phi4edge.measurement.device_drift import check_on_device, measure_drift_on
    from phi4edge.measurement.drift_run import (
        CHUNKS,
        check_artifact,
        greedy_on,
        measure_domains,
        without_text,
    )
    from phi4edge.measurement.gates import Gate, Limits, gate_error
    from phi4edge.measurement.host import this_machine
    from phi4edge.measurement.on_device import device_host
    from phi4edge.measurement.reference import ReferenceStore, is_store
    from phi4edge.measurement.references import resolve_domains
    from phi4edge.measurement.tasks.run import check_tasks, measure_tasks, task_gates
    from phi4edge.runtimes._api import Settings

    limits = Limits(max_kld, max_ppl_ratio, min_top1, gate_undecided or "fail", max_task_drop, min_reference_share)
    settings = Settings(
        threads=threads,
        flash_attention=flash_attention,
        kv_type=kv_type_for(artifact, runtime, kv),
        activations=activations,
    )
    checked_out(out)
    target = target or (BROWSER if device.transport == BROWSER else LOCAL)
    profile, transport = place_of(target, device, target_path)
    elsewhere = transport != LOCAL or device.given
    tensors, source, written_from = tensor_count(attribute_tensors), None, None
    if against is not None and not attribute:
        raise UsageError("--against says what drift is attributed to", "add --attribute")
    if (artifact / RUN_FILE).is_file() or against is not None:
        from phi4edge.stages.run_reader import open_run

        source = open_run(artifact) if (artifact / RUN_FILE).is_file() else None
        written_from = open_run(against) if against is not None else None
    progress = progress_for(quiet)
    guest = None
    if transport == BROWSER:
        if attribute or greedy is not None or tasks["task_names"] or len(texts) > 1:
            raise UsageError(
                "in a browser, drift is measured on one text alone",
                "leave --attribute, --greedy, --tasks and a second --text out",
            )
        guest = guest_for(artifact, runtime, settings, tasks, progress)
    asked = task_request(tasks | {"max_task_drop": max_task_drop, "min_reference_share": min_reference_share})
    if asked is not None:
        check_tasks(asked, reference)
    site = None
    if guest is not None:
        pass  # the page says what is wrong with the artifact when it opens
    elif elsewhere:
        assert profile is not None
        if attribute or asked is not None or source is not None:
            raise UsageError(
                "--attribute, --tasks and run directories are measured on this machine only",
                "leave them out, or leave --target out",
            )
        if not texts and not is_store(Path(reference)):
            raise UsageError("drift on a device is measured on a text", "give a --text, or a store as --reference")
        site = click.get_current_context().with_resource(site_for(profile, transport, device, progress, artifact))
        check_on_device(site, artifact, runtime=runtime, settings=settings, generates=greedy is not None)
    elif not is_store(Path(reference)):
        check_artifact(artifact, runtime=runtime, settings=settings, source=source)
    if attribute and len(texts) > 1:
        raise UsageError("--attribute takes one --text", "attribute each domain by itself")
    found: dict[str, ReferenceStore] = {}
    if not texts and (asked is not None or greedy not in (None, CHUNKS)) and not is_store(Path(reference)):
        if limits.asks_for_text or attribute or greedy == CHUNKS:
            raise UsageError(
                "--max-kld, --max-ppl-ratio, --min-top1, --attribute and --greedy chunks need a --text",
                "give a text file, or leave them out",
            )
        data = without_text(artifact, reference, runtime=runtime, settings=settings)
    else:
        found = resolve_domains(
            reference, texts=texts, context=context, chunks=chunks, store=store, top=store_top, progress=progress
        )
        if guest is not None:
            from phi4edge.measurement.in_browser import measure_drift_in_browser

            data = measure_drift_in_browser(guest, found, chunks=chunks, limits=limits)
        elif site is not None:
            data = measure_drift_on(
                site, artifact, found, chunks=chunks, runtime=runtime, settings=settings, limits=limits
            )
        else:
            data = measure_domains(
                artifact,
                found,
                chunks=chunks,
                runtime=runtime,
                settings=settings,
                limits=limits,
                source=source,
                progress=progress,
            )
        if attribute:
            from phi4edge.measurement.attribution_run import attribute as attribute_drift

            data["attribution"] = attribute_drift(
                artifact,
                next(iter(found.values())),
                reference,
                runtime=runtime,
                settings=settings,
                source=source,
                run=written_from,
                tensors=tensors,
                chunks=attribute_chunks or chunks,
                tensor_chunks=attribute_chunks,
                progress=progress,
            )
    if greedy is not None:
        host = (
            this_machine(artifact, runtime=runtime, settings=settings, source=source)
            if site is None
            else device_host(site, artifact, runtime or default_runtime(artifact), settings)
        )
        data["greedy"] = greedy_on(
            host, found, reference, greedy, count=greedy_tokens, chunks=chunks, progress=progress
        )
    if asked is not None:
        answers = tasks["task_answers"] or (out.with_suffix(".answers.jsonl") if out is not None else None)
        measured = measure_tasks(
            artifact,
            reference,
            asked,
            runtime=runtime,
            settings=settings,
            source=source,
            answers=answers,
            progress=progress,
        )
        gates = task_gates(measured["results"], limits)
        data |= {"tasks": measured, "gates": [*data["gates"], *(gate.as_dict() for gate in gates)]}
    failure = gate_error([Gate(**gate) for gate in data["gates"]])
    if out is not None:
        write_json(out, failure_document(COMMAND, data, failure) if failure else envelope(COMMAND, data))
    if failure:
        emit_failure(COMMAND, data, _text(data), failure, as_json=as_json)
    emit(COMMAND, data, _text(data), as_json=as_json)
