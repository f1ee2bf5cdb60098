"""``phi4edge bench ARTIFACT --target ID``."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from phi4edge.cli.browser_options import BROWSER, browser_options, guest_for, memory_line, place_of, warning_lines
from phi4edge.cli.device_options import DeviceOptions, device_options, site_for
from phi4edge.cli.measure_options import checked_out, kv_type_for, plus_minus, runtime_options
from phi4edge.cli.options import common
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, envelope, table
from phi4edge.cli.roofline_text import calibration_line, roofline_lines
from phi4edge.cli.target_options import target_path_option
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import UsageError
from phi4edge.core.memory import format_bytes
from phi4edge.targets.profile import LOCAL

COMMAND = "bench"


def _text(data: dict[str, Any]) -> str:
    from phi4edge.measurement.power.sustained import sustained_text
    from phi4edge.measurement.power.text import power_text

    artifact, runtime, settings, metrics = data["artifact"], data["runtime"], data["settings"], data["metrics"]
    rows = []
    for label, key, spec, scale in (
        (f"prefill pp{settings['prompt_tokens']}, tok/s", "prefill_tps", ".2f", 1),
        (f"decode tg{settings['gen_tokens']}, tok/s", "decode_tps", ".2f", 1),
        ("TTFT, ms", "ttft_s", ".1f", 1000),
        ("TPOT, ms", "tpot_s", ".2f", 1000),
        ("load, s", "load_s", ".2f", 1),
    ):
        value, error = plus_minus(metrics[key], spec, scale)
        middle = metrics[key].get("median")
        rows.append((label, value, error, "" if middle is None else format(middle * scale, spec)))
    return "\n".join(
        [
            *warning_lines(data),
            f"{artifact['name']}: {artifact['format']} {artifact['scheme'] or ''}, {format_bytes(artifact['bytes'])}",
            f"in {runtime['name']} {runtime['version']} on {data['target']} ({data['environment']['cpu']['model']}), "
            f"{settings['threads']} threads, {settings['repetitions']} repetitions after {settings['warmup']} warm-up",
            "",
            table(["", "mean", "", "median"], rows, numeric=(1, 3)),
            "",
            memory_line(metrics),
            *([f"power: {power_text(data['power'])}"] if "power" in data else []),
            *([sustained_text(data["sustained"])] if "sustained" in data else []),
            *roofline_lines(data),
        ]
    )


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--target", metavar="ID", help="The device.  [default: local, this machine; or what opens the page]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of the prompt.",
)
@click.option(
    "--gen-tokens", type=click.IntRange(min=0), default=128, show_default=True, metavar="N", help="Tokens generated."
)
@click.option(
    "--repetitions", type=click.IntRange(min=1), default=5, show_default=True, metavar="R", help="Times each is timed."
)
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Repetitions not counted.")
@click.option(
    "--sustained",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Then generate without a break for about so long, and tell cold from settled speed.",
)
@click.option(
    "--calibrate-target",
    "calibrate",
    is_flag=False,
    flag_value="",
    metavar="[FILE.toml]",
    help="Write the efficiency that was measured into a target file of yours; it is made where there is none.",
)
@device_options
@browser_options
@target_path_option
@runtime_options
@common
def command(
    artifact: Path,
    target: str | None,
    prompt_tokens: int,
    gen_tokens: int,
    repetitions: int,
    warmup: int,
    sustained: float | None,
    calibrate: str | None,
    device: DeviceOptions,
    target_path: tuple[Path, ...],
    runtime: str | None,
    threads: int | None,
    flash_attention: str,
    kv: str | None,
    out: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **page: Any,
) -> None:
    """Measure ARTIFACT's prefill and decode speed, TTFT, TPOT and peak RSS in the runtime that serves it.

    Prompt and generation are timed apart and from an empty cache, as llama-bench does; tokenization and sampling are
    not in the times. Every sample is kept in the document. A decode speed above what the target's memory can deliver
    for the bytes that a token reads of ARTIFACT is flagged as implausible.

    On another device than this machine the artifact is sent there, and llama-bench times it, or a Python with the
    runtime. What is missing there is said with how to get it; phi4edge doctor --target ID looks beforehand.

    With --transport browser a page is served, and a phone or laptop that opens its link runs the GGUF there, in
    WebAssembly, on half of the processors that the browser counts, or on --threads. This was run in Chromium on a PC;
    on a phone it is not measured on hardware.

    --calibrate-target makes plans for the target rest on what was measured. Without a FILE it is your own file of the
    target, or a new one in the first folder of --target-path or $PHI4EDGE_TARGET_PATH. Built-in files stay as they are.
    """
    from phi4edge.measurement.calibrate import calibrate_target, calibration_file
    from phi4edge.measurement.device_speed import measure_speed_on
    from phi4edge.measurement.plausible import assess
    from phi4edge.measurement.power.sustained import repetitions_for, sustained_of
    from phi4edge.measurement.speed import measure_speed
    from phi4edge.runtimes._api import Settings, SpeedRequest
    from phi4edge.targets.catalog import open_catalog

    target = target or (BROWSER if device.transport == BROWSER else LOCAL)
    request = SpeedRequest(prompt_tokens, gen_tokens, repetitions, warmup)
    settings = Settings(threads=threads, flash_attention=flash_attention, kv_type=kv_type_for(artifact, runtime, kv))
    profile, transport = place_of(target, device, target_path)
    checked_out(out)
    if transport == BROWSER:
        if calibrate is not None or sustained is not None:
            raise UsageError("--calibrate-target and --sustained are not for a browser", "leave them out")
        from phi4edge.measurement.in_browser import measure_speed_in_browser

        guest = guest_for(artifact, runtime, settings, page, progress_for(quiet))
        data = measure_speed_in_browser(guest, target=target, request=request)
    else:
        assert profile is not None
        entry = open_catalog(target_path).entry(target)
        own = Path(calibrate) if calibrate else None
        file = None if calibrate is None else calibration_file(entry, own, target_path)
        with ExitStack() as held:
            how: dict[str, Any] = {"runtime": runtime, "settings": settings}
            if transport == LOCAL and not device.given:
                measure = partial(measure_speed, artifact, target=target, transport=transport, **how)
            else:
                site = held.enter_context(site_for(profile, transport, device, progress_for(quiet), artifact))
                measure = partial(measure_speed_on, site, artifact, **how)
            data = measure(request=request)
            if sustained is not None:
                longer = SpeedRequest(0, gen_tokens, repetitions_for(sustained, data), 0)
                data["sustained"] = sustained_of(measure(request=longer), sustained)
        data |= assess(data, profile, artifact)
        if file is not None:
            data["calibration"] = calibrate_target(file, data, profile, entry, artifact)
    if out is not None:
        write_json(out, envelope(COMMAND, data))
    emit(COMMAND, data, "\n".join([_text(data), *calibration_line(data)]), as_json=as_json)
