"""A target file, read strictly: its keys, their types, and what contradicts itself.

The keys are those of :class:`~phi4edge.targets.profile.Profile`. A figure is a number, resting on the file's
``sources``; or a table ``{ value, source }`` with a source of its own, and ``low``/``high`` when it is a range; or a
guess, ``{ value, estimated = true, reason }``.
"""

from __future__ import annotations

__all__ = ["parse_profile", "read_profile"]

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.settings import Table, read_toml
from phi4edge.quant.scheme import parse_scheme
from phi4edge.targets.profile import (
    ACCELERATORS,
    ARCHITECTURES,
    FOREIGN_SCHEMES,
    FORMATS,
    ISA,
    KINDS,
    KV_TYPES,
    LOCAL,
    MEMORY,
    POWER_INTERFACES,
    RUNTIMES,
    TRANSPORTS,
    Accelerator,
    Anchor,
    Compute,
    Connection,
    Efficiency,
    Figure,
    Gates,
    Profile,
    RuntimeOption,
)

ID = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*")
FIGURE_KEYS = ("value", "low", "high", "source", "estimated", "reason")
KEYS = (
    "name",
    "kind",
    "sources",
    "notes",
    "ram_gb",
    "memory",
    "usable_ram_gb",
    "bandwidth_gb_s",
    "arch",
    "cpu",
    "cores",
    "isa",
    "transports",
    "power_interface",
    "default_context",
    "min_decode_tps",
    "accelerators",
    "runtimes",
    "efficiency",
    "compute",
    "anchors",
    "gates",
    "connection",
)
RUNTIME_KEYS = ("name", "backend", "formats", "schemes", "kv_types", "overhead_gb", "layer_us")
RATE_KEYS = ("runtime", "backend", "bits", "scheme", *FIGURE_KEYS)
CONNECTION_KEYS = tuple(field.name for field in fields(Connection))
GATE_KEYS = tuple(field.name for field in fields(Gates))
ACCELERATOR_KEYS = ("kind", "name", "api")
ANCHOR_KEYS = ("model", "decode_tps", "runtime", "precision", "source")


def read_profile(path: Path) -> Profile:
    """Read and check one target file.

    Raises:
        InputError: not TOML, an unknown key (the closest is offered), a wrong type, a missing value, a word that is
            not known, or figures that contradict each other; the message names the file and the place in it.
    """
    if not ID.fullmatch(path.stem):
        raise InputError(
            f"{path}: {path.stem!r} is not a target id",
            "the file's name is the id: small letters, digits and dashes, as in jetson-orin-nano-8gb.toml",
        )
    if path.stem == LOCAL:
        raise InputError(f"{path}: {LOCAL!r} is this machine, which is detected", "give the file another name")
    return parse_profile(read_toml(path), path.stem, str(path))


def parse_profile(data: dict[str, Any], name: str, file: str) -> Profile:
    """Turn a target's TOML document into a :class:`Profile`; errors name ``file``."""
    table = Table(data, KEYS, file)
    sources = tuple(table.strings("sources", default=[]))
    runtimes = tuple(_runtime(entry, sources) for entry in table.tables("runtimes", RUNTIME_KEYS, required=True))
    profile = Profile(
        id=name,
        name=table.string("name"),
        kind=table.choice("kind", KINDS),
        sources=sources,
        notes=table.string("notes", default=""),
        ram_gb=table.number("ram_gb"),
        memory=table.choice("memory", MEMORY, default="system"),
        usable_ram_gb=_figure(table, "usable_ram_gb", sources),
        bandwidth_gb_s=_figure(table, "bandwidth_gb_s", sources, optional=True),
        arch=table.choice("arch", ARCHITECTURES),
        cpu=table.string("cpu", default=""),
        cores=table.integer("cores") if "cores" in table else None,
        isa=tuple(table.strings("isa", ISA, default=[])),
        accelerators=tuple(
            Accelerator(entry.choice("kind", ACCELERATORS), entry.string("name"), entry.string("api"))
            for entry in table.tables("accelerators", ACCELERATOR_KEYS)
        ),
        transports=tuple(table.strings("transports", TRANSPORTS)),
        power_interface=table.choice("power_interface", POWER_INTERFACES, default="none"),
        default_context=table.integer("default_context", default=4096),
        min_decode_tps=table.number("min_decode_tps") if "min_decode_tps" in table else None,
        runtimes=runtimes,
        # Above 1 a device would read faster than its memory can: the figure or the bandwidth is wrong.
        efficiency=tuple(
            Efficiency(*_rate(entry, runtimes, sources, most=1.0)) for entry in table.tables("efficiency", RATE_KEYS)
        ),
        compute=tuple(
            Compute(*_rate(entry, runtimes, sources, most=1e7)) for entry in table.tables("compute", RATE_KEYS)
        ),
        anchors=tuple(_anchor(entry) for entry in table.tables("anchors", ANCHOR_KEYS)),
        gates=_gates(table.table("gates", GATE_KEYS)) if "gates" in table else Gates(),
        connection=_connection(table.table("connection", CONNECTION_KEYS)) if "connection" in table else Connection(),
    )
    _check(profile, table)
    return profile


def _figure(table: Table, key: str, sources: Iterable[str], *, optional: bool = False, most: float = 1e6) -> Figure:
    if optional and key not in table:
        return Figure(None, reason=f"not given in {table.file}")
    if isinstance(table.data.get(key), dict):
        return _figure_table(table.table(key, FIGURE_KEYS), sources, most)
    value = table.number(key, most=most)
    if not sources:
        raise InputError(
            f"{table.where(key)}: {value:g} has no source",
            f'add sources = ["…"], or write {key} = {{ value = {value:g}, estimated = true, reason = "…" }}',
        )
    return Figure(value)


def _figure_table(table: Table, sources: Iterable[str], most: float) -> Figure:
    value = table.number("value", most=most)
    low = table.number("low", most=most) if "low" in table else None
    high = table.number("high", most=most) if "high" in table else None
    if (low is None) != (high is None):
        raise InputError(f"{table.where()}: has one of low and high", "give both, or neither")
    if low is not None and high is not None and not low <= value <= high:
        raise InputError(f"{table.where()}: value {value:g} is not between low {low:g} and high {high:g}")
    estimated = table.boolean("estimated", False)
    reason = table.string("reason") if "reason" in table else None
    source = table.string("source") if "source" in table else None
    if estimated and reason is None:
        raise InputError(f"{table.where('reason')}: missing; an estimated figure says what the guess rests on")
    if not estimated and source is None and not tuple(sources):
        raise InputError(
            f"{table.where('source')}: missing", "name a source, or mark it estimated = true with a reason"
        )
    return Figure(value, low, high, source, estimated, reason)


def _runtime(table: Table, sources: Iterable[str]) -> RuntimeOption:
    schemes = table.strings("schemes")
    for index, name in enumerate(schemes):
        if name not in FOREIGN_SCHEMES:
            try:
                parse_scheme(name)
            except UsageError as error:
                raise InputError(f"{table.where(f'schemes[{index}]')}: {error.message}", error.hint) from error
    option = RuntimeOption(
        name=table.choice("name", RUNTIMES),
        backend=table.string("backend", default="cpu"),
        formats=tuple(table.strings("formats", FORMATS)),
        schemes=tuple(schemes),
        kv_types=tuple(table.strings("kv_types", KV_TYPES, default=["f16"])),
        overhead_gb=_figure(table, "overhead_gb", sources) if "overhead_gb" in table else None,
        layer_us=_figure(table, "layer_us", sources) if "layer_us" in table else None,
    )
    for key, values in (("formats", option.formats), ("schemes", option.schemes), ("kv_types", option.kv_types)):
        if not values:
            raise InputError(f"{table.where(key)}: is empty, expected at least one")
    return option


def _rate(
    table: Table, runtimes: Sequence[RuntimeOption], sources: Iterable[str], most: float
) -> tuple[str, str, int, Figure, str | None]:
    """Runtime, backend, bits, figure and scheme of an efficiency or a compute rate."""
    runtime, bits = table.choice("runtime", tuple(dict.fromkeys(r.name for r in runtimes))), table.integer("bits")
    backends = [option.backend for option in runtimes if option.name == runtime]
    backend = table.choice("backend", backends, default=backends[0])
    if bits not in (4, 8, 16):
        raise InputError(f"{table.where('bits')}: is {bits}, expected 4, 8 or 16")
    scheme = table.string("scheme") if "scheme" in table else None
    return runtime, backend, bits, _figure_table(table, sources, most=most), scheme


def _connection(table: Table) -> Connection:
    return Connection(
        transport=table.choice("transport", TRANSPORTS) if "transport" in table else None,
        address=table.string("address") if "address" in table else None,
        folder=table.string("folder") if "folder" in table else None,
        options=tuple(table.strings("options", default=[], repeated=True)),
    )


def _anchor(table: Table) -> Anchor:
    return Anchor(
        model=table.string("model"),
        decode_tps=table.number("decode_tps"),
        runtime=table.string("runtime", default="unknown"),
        precision=table.string("precision", default="unknown"),
        source=table.string("source"),
    )


def _gates(table: Table) -> Gates:
    """Shares are fractions here, so that 99 is not taken for 0.99; a divergence or a loss of 0 may be asked for."""
    found = {}
    for key in table.data:
        least = -1.0 if key in ("max_kld", "max_task_drop") else 0.0
        found[key] = table.number(key, least=least, most=math.inf if key in ("max_kld", "max_ppl_ratio") else 1.0)
        if found[key] < 0:
            raise InputError(f"{table.where(key)}: is {found[key]:g}, expected 0 or more")
    if not found:
        raise InputError(f"{table.where()}: is empty", f"it may hold {', '.join(GATE_KEYS)}")
    return Gates(**found)


def _check(profile: Profile, table: Table) -> None:
    usable, ram = profile.usable_ram_gb.bounds(), profile.ram_gb * 2**30 / 1e9
    if usable and usable[1] > ram:
        raise InputError(
            f"{table.where('usable_ram_gb')}: {usable[1]:g} GB is more than ram_gb {profile.ram_gb:g} ({ram:.1f} GB)",
            "usable_ram_gb is what one process can take, below ram_gb",
        )
    for key, rates in (("efficiency", profile.efficiency), ("compute", profile.compute)):
        entries = [(entry.runtime, entry.backend, entry.bits, entry.scheme) for entry in rates]
        for entry in entries:
            if entries.count(entry) > 1:
                what = f"{entry[0]} {entry[1]} at {entry[2]} bits{f' with {entry[3]}' if entry[3] else ''}"
                raise InputError(f"{table.where(key)}: {what} stands there twice")
    if not profile.transports:
        raise InputError(f"{table.where('transports')}: is empty, expected at least one of {', '.join(TRANSPORTS)}")
