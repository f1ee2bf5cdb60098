"""A measured speed written into a user's target file, so that plans rest on it: ``bench --calibrate-target``.

The efficiency is what :mod:`phi4edge.targets.roofline` would have needed to estimate the decode speed that was
measured; the compute rate likewise for the prompt. An entry of the same runtime and scheme is replaced, all else of the
file stays as it is, comments included. The built-in files are never written: a target of theirs is copied first.
"""

from __future__ import annotations

__all__ = ["calibrate_target", "calibration_file"]

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.resources import data_folder
from phi4edge.core.settings import read_toml
from phi4edge.measurement.plausible import artifact_traffic, runtime_option
from phi4edge.targets.catalog import TARGET_PATH, Entry
from phi4edge.targets.profile import LOCAL, Figure, Profile, RuntimeOption
from phi4edge.targets.roofline import Traffic
from phi4edge.targets.schema import parse_profile

if TYPE_CHECKING:
    from tomlkit import TOMLDocument
    from tomlkit.items import AoT

THIS_MACHINE = "this-machine"  # id of the file that `local` becomes, unless another is named


def calibration_file(entry: Entry, asked: Path | None, folders: Sequence[Path]) -> Path:
    """The file to write: the one asked for, the user's own of this target, or a new one in the first of ``folders``.

    Raises:
        UsageError: a built-in file, a file whose name is no id, or nowhere to put a new one.
    """
    path = asked
    if path is None and entry.user:
        path = entry.path
    if path is None:
        places = [*folders, *(Path(f) for f in os.environ.get(TARGET_PATH, "").split(os.pathsep) if f)]
        if not places:
            raise UsageError(
                f"--calibrate-target: there is no file of yours for {entry.id}, and no folder to put one into",
                "name it: --calibrate-target my-folder/my-device.toml",
            )
        path = places[0] / f"{THIS_MACHINE if entry.path is None else entry.id}.toml"
    if path.suffix != ".toml":
        raise UsageError(f"--calibrate-target {path}: a target's file ends in .toml")
    if path.resolve().parent == data_folder("targets").resolve():
        raise UsageError(
            f"--calibrate-target {path}: is a built-in target, which others measure against too",
            "name a file in a folder of yours, and pass --target-path FOLDER",
        )
    return path


def calibrate_target(
    path: Path, data: Mapping[str, Any], profile: Profile, entry: Entry, artifact: Path
) -> dict[str, Any]:
    """Write what bench document ``data`` measured on the target of ``profile`` into ``path``; says what was written.

    Raises:
        InputError: the target has no bandwidth, which an efficiency is a share of; or the file breaks the schema.
        TargetError: the measurement is above the roofline, or nothing was measured.
    """
    import tomlkit

    settings = data["settings"]
    traffic = artifact_traffic(artifact, settings.get("gen_tokens") or 1, settings.get("kv_type", "f16"))
    option = runtime_option(profile, data["runtime"]["name"], settings.get("gpu_layers") or 0)
    if option is None:
        raise InputError(f"{profile.id}: has no runtime {data['runtime']['name']}", f"add it to {path} first")
    source = _source(data)
    shares = _efficiency(data["metrics"]["decode_tps"], profile, option, traffic)
    rates = _compute(data["metrics"]["prefill_tps"], traffic)
    document = _document(path, profile, entry)
    written: dict[str, Any] = {"file": str(path), "runtime": option.name, "backend": option.backend}
    for key, figure in (("efficiency", shares), ("compute", rates)):
        if figure is not None:
            _put(document, key, option, traffic, figure, source)
            written[key] = {"scheme": traffic.scheme, "value": figure.value, "low": figure.low, "high": figure.high}
    text = tomlkit.dumps(document)
    parse_profile(tomlkit.parse(text).unwrap(), path.stem, str(path))  # nothing is written that would not be read
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())
    return written


def _source(data: Mapping[str, Any]) -> str:
    artifact, runtime = data["artifact"], data["runtime"]
    metric = data["metrics"]["decode_tps"]
    what = "prefill" if metric["value"] is None else f"decode {metric['value']:.2f} tok/s"
    date = datetime.now(UTC).date().isoformat()
    return (
        f"measured on {date} by phi4edge bench: {artifact['name']} (sha256 {artifact['sha256'][:12]}), "
        f"{runtime['name']} {runtime['version']}, {data['settings'].get('threads')} threads, {what}"
    )


def _efficiency(metric: Mapping[str, Any], profile: Profile, option: RuntimeOption, traffic: Traffic) -> Figure | None:
    """Bytes read for a token, half of the generation in the cache, ÷ its seconds less what layers cost, ÷ bandwidth."""
    if metric["value"] is None:
        return None
    bandwidth = profile.bandwidth_gb_s.value
    if bandwidth is None:
        raise InputError(
            f"{profile.id}: its bandwidth is {profile.bandwidth_gb_s.text()}, and an efficiency is a share of it",
            profile.bandwidth_gb_s.reason or "add bandwidth_gb_s to its file",
        )
    fixed = traffic.layers * (option.layer_us.value or 0.0) * 1e-6 if option.layer_us else 0.0
    nbytes = traffic.empty + traffic.kv_bytes // 2

    def share(tps: float) -> float:
        return nbytes / max(1 / tps - fixed, 1e-12) / (bandwidth * 1e9)

    value = share(metric["value"])
    if value > 1:
        raise TargetError(
            f"{profile.id}: {metric['value']:.2f} tok/s of {nbytes / 1e6:.0f} MB each is more than {bandwidth:g} GB/s"
            + (f" and {fixed * 1e3:.2g} ms for {traffic.layers} layers" if fixed else "")
            + ", so this is no efficiency to plan with",
            "measure a larger artifact, which no cache holds, or correct bandwidth_gb_s",
        )
    samples = [min(share(tps), 1.0) for tps in metric.get("samples", ())]
    return _figure(value, samples)


def _compute(metric: Mapping[str, Any], traffic: Traffic) -> Figure | None:
    if metric["value"] is None:
        return None
    gigaflop = 2 * sum(traffic.linears.values()) / 1e9
    return _figure(metric["value"] * gigaflop, [tps * gigaflop for tps in metric.get("samples", ())])


def _figure(value: float, samples: Sequence[float]) -> Figure:
    """The mean with the range of the repetitions; four figures, rounded outwards where they are a bound."""
    low, high = min([value, *samples]), max([value, *samples])
    rounded = [float(f"{x:.4g}") for x in (low, value, high)]
    return Figure(rounded[1], min(rounded), max(rounded))


def _document(path: Path, profile: Profile, entry: Entry) -> TOMLDocument:
    """The file as it is; else a copy of the target's; else what was detected of this machine."""
    import tomlkit

    origin = path if path.exists() else entry.path
    if origin is None:
        return _detected(profile)
    read_toml(origin)  # refuses what is not TOML in our words
    document = tomlkit.parse(origin.read_text(encoding="utf-8"))
    parse_profile(document.unwrap(), path.stem, str(origin))
    return document


def _detected(profile: Profile) -> TOMLDocument:
    """This machine as a target's file."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("Detected on this machine; figures that were measured say when."))
    usable, bandwidth = profile.usable_ram_gb, profile.bandwidth_gb_s
    document["name"], document["kind"] = profile.name, profile.kind
    document["sources"] = list(profile.sources)
    document["ram_gb"], document["memory"] = profile.ram_gb, profile.memory
    document["usable_ram_gb"] = _inline({"value": round(usable.value or 0.0, 2), "source": usable.source or ""})
    document["bandwidth_gb_s"] = _inline({"value": bandwidth.value, "source": bandwidth.source or ""})
    document["arch"] = profile.arch
    if profile.cpu:
        document["cpu"] = profile.cpu
    if profile.cores:
        document["cores"] = profile.cores
    document["isa"], document["transports"] = list(profile.isa), list(profile.transports)
    document["power_interface"], document["default_context"] = profile.power_interface, profile.default_context
    runtimes = tomlkit.aot()
    for option in profile.runtimes:
        table = tomlkit.table()
        table["name"], table["backend"] = option.name, option.backend
        table["formats"], table["schemes"] = list(option.formats), list(option.schemes)
        table["kv_types"] = list(option.kv_types)
        if option.layer_us is not None and option.layer_us.value is not None:
            table["layer_us"] = _inline({"value": option.layer_us.value, "source": option.layer_us.source or ""})
        runtimes.append(table)
    document["runtimes"] = runtimes
    document["connection"] = {"transport": LOCAL}
    return document


def _inline(values: Mapping[str, Any]) -> Any:
    import tomlkit

    table = tomlkit.inline_table()
    table.update(values)
    return table


def _put(
    document: TOMLDocument, key: str, option: RuntimeOption, traffic: Traffic, figure: Figure, source: str
) -> None:
    """Replace the entry of this runtime and scheme in ``[[key]]``, or add one."""
    import tomlkit

    if key not in document:
        document[key] = tomlkit.aot()
    entries: AoT = document[key]
    wanted = {"runtime": option.name, "backend": option.backend, "bits": traffic.bits, "scheme": traffic.scheme}
    backends = {"backend": option.backend}  # a file may leave it out
    found = [table for table in entries if {**backends, **table.unwrap()}.items() >= wanted.items()]
    table = found[0] if found else tomlkit.table()
    values = {"value": figure.value, "low": figure.low, "high": figure.high, "source": source}
    for name, value in (wanted | values).items():
        table[name] = value
    for name in ("estimated", "reason"):  # it is measured now
        table.pop(name, None)
    if not found:
        entries.append(table)
