"""The fingerprint of a device: the ``environment`` of what was measured there, never this machine's.

One script in the device's POSIX shell tells it all; what a system does not say is None. It has no name of a host or a
user in it.
"""

from __future__ import annotations

__all__ = ["fingerprint"]

import re
from collections.abc import Mapping
from typing import Any

from phi4edge import __version__
from phi4edge.core.errors import TargetError
from phi4edge.measurement.environment import FLAGS
from phi4edge.transports._api import Device

_ASK_S = 60.0
# One line for each fact, "key=value"; what a system does not have is left out.
_FACTS = """
put() { [ -n "$2" ] && echo "$1=$2"; }
put system "$(uname -s)"; put release "$(uname -r)"; put machine "$(uname -m)"
put android "$(getprop ro.build.version.release 2>/dev/null)"
put soc "$(getprop ro.soc.model 2>/dev/null)"
put product "$(getprop ro.product.model 2>/dev/null)"
put board "$(tr -d '\\0' < /proc/device-tree/model 2>/dev/null)"
put l4t "$(head -n 1 /etc/nv_tegra_release 2>/dev/null)"
put distribution "$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
put ram_kb "$(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo 2>/dev/null)"
put free_kb "$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo 2>/dev/null)"
put model "$(sed -n 's/^\\(model name\\|Hardware\\|Model\\)[[:space:]]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
numbers='s/^\\(cpu family\\|model\\|stepping\\)[[:space:]]*: *//p'
put generation "$(sed -n "$numbers" /proc/cpuinfo 2>/dev/null | head -n 3 | tr '\\n' / )"
put part "$(sed -n 's/^CPU part[[:space:]]*: *//p' /proc/cpuinfo 2>/dev/null | sort -u | tr '\\n' ' ')"
put flags "$(sed -n 's/^\\(flags\\|Features\\)[[:space:]]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
put logical "$(grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
put usable "$(nproc 2>/dev/null)"
put cores "$(cat /sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list 2>/dev/null | sort -u | grep -c .)"
put governor "$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"
put load "$(cut -d ' ' -f 1-3 /proc/loadavg 2>/dev/null)"
put mac_model "$(sysctl -n machdep.cpu.brand_string 2>/dev/null)"
put mac_ram "$(sysctl -n hw.memsize 2>/dev/null)"
put mac_logical "$(sysctl -n hw.logicalcpu 2>/dev/null)"
put mac_cores "$(sysctl -n hw.physicalcpu 2>/dev/null)"
put mac_version "$(sw_vers -productVersion 2>/dev/null)"
put disk_kb "$(df -Pk . 2>/dev/null | { read -r _; read -r _ _ _ free _; echo "$free"; })"
exit 0
"""


def fingerprint(device: Device) -> dict[str, Any]:
    """The device's own ``environment`` of a document, in the fields of this machine's.

    Raises:
        TargetError: the device is gone, or has no POSIX shell.
    """
    done = device.run(["sh", "-c", _FACTS], timeout_s=_ASK_S)
    facts = dict(line.split("=", 1) for line in done.text.splitlines() if "=" in line)
    if done.code or "machine" not in facts:
        raise TargetError(f"{device.name}: does not say what it is: {done.last_words}", "it needs a POSIX shell")
    words = set(facts.get("flags", "").split())
    logical = _number(facts, "logical", "mac_logical")
    usable = _number(facts, "usable", "mac_logical") or logical
    cores = _number(facts, "cores", "mac_cores") or usable
    names = [facts[key] for key in ("soc", "board", "product") if key in facts]
    arm = f"ARM part {facts['part'].strip()}" if "part" in facts else None
    ram, free = _number(facts, "ram_kb"), _number(facts, "free_kb")
    system = "Android" if "android" in facts else facts["system"]
    macos = f"macOS {facts['mac_version']}" if "mac_version" in facts else None
    return {
        "cpu": {
            "model": facts.get("model") or facts.get("mac_model") or ", ".join(names) or arm or "unknown",
            "generation": _generation(facts.get("generation", "")),
            "architecture": facts["machine"],
            "flags": [flag for flag in FLAGS if flag in words],
            "logical_cores": logical,
            "usable_cores": usable,
            "physical_cores": min(cores, usable) if cores and usable else cores or usable,
            "governor": facts.get("governor"),
        },
        "ram_bytes": ram * 1024 if ram else _number(facts, "mac_ram"),
        "available_bytes": free * 1024 if free else None,
        "system": f"{facts['system']} {facts.get('release', '')}".strip(),
        "distribution": f"Android {facts['android']}" if system == "Android" else facts.get("distribution") or macos,
        "hardware": names or None,
        "l4t": facts.get("l4t"),
        "load_average": [float(part) for part in facts["load"].split()] if "load" in facts else None,
        "disk_free_bytes": (_number(facts, "disk_kb") or 0) * 1024 or None,
        "versions": {"phi4edge": __version__},
        "transport": device.transport,
    }


def _generation(said: str) -> str | None:
    """Family, model and stepping of an x86 CPU, which a virtual machine may hide from its name."""
    return said[:-1] if re.fullmatch(r"\d+/\d+/\d+/", said) else None


def _number(facts: Mapping[str, str], *keys: str) -> int | None:
    for key in keys:
        if re.fullmatch(r"[1-9]\d*", facts.get(key, "")):
            return int(facts[key])
    return None
