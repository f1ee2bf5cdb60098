"""One line of Jetson's ``tegrastats``, of every generation.

Names and forms differ by module and by release; what a line has is read, what it has not is missing:

    rails         ``VDD_IN 12479mW/12479mW`` (now/mean), without units before JetPack 5 (``POM_5V_IN 1750/1628``), with
                  a third figure from JetPack 7 on, with one alone in some; the first is the present one
    GPU           ``GR3D_FREQ 45%``, ``45%@1300``, ``12%@[1300,1300]``; Thor gives ``@[314,314,314]``, or nothing
    temperatures  ``tj@52.4C``, from JetPack 7 on ``tj@52.4C/52.4C``; −256 stands for a part that is switched off
    cores         ``CPU [15%@729,off]``, on a TX1 ``cpu [17%,13%]@408``

Which rails add up to the whole, by NVIDIA's developer guides and what its staff answered in its forum:

    VIN                                     Thor: the board with the module
    VDD_IN                                  Orin NX, Orin Nano, Xavier NX, TX2, TX1: the module
    POM_5V_IN                               Nano: the module
    VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0  AGX Orin: the module; VDDQ_VDD2_1V8AO is a part of VIN_SYS_5V0
    GPU + CPU + SOC + CV + VDDRQ + SYS5V    AGX Xavier: the module

Not measured on hardware: the forms are those of published lines of eight modules.
"""

from __future__ import annotations

__all__ = ["parse_line", "whole_of"]

import re
import statistics
from collections.abc import Iterable, Sequence

from phi4edge.measurement.power._api import Line, Sample, Whole

_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_RAIL = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*) (-?\d+)(mW)?((?:/-?\d+(?:mW)?)*)(?!\S)")
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
_GPU = re.compile(r"\bGR3D(?:_FREQ)? (?:(\d+)%)?(?:@(?:\[([\d,]+)\]|(\d+)))?")
_EMC = re.compile(r"\bEMC(?:_FREQ)? (\d+)%")
_CPU = re.compile(r"\b(?:CPU|cpu) \[([^\]]*)\]")
_OFF_C = -200.0
_NO_RAILS = ("NC", "RAM", "SWAP", "IRAM")  # NC: not connected; a line cut behind "RAM 1923/39" looks like a rail

_WHOLES = (
    (("VIN",), "VIN", "the board with the module"),
    (("VDD_IN",), "VDD_IN", "the module"),
    (("POM_5V_IN",), "POM_5V_IN", "the module"),
    (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", "the module"),
    (("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), "GPU + CPU + SOC + CV + VDDRQ + SYS5V", "the module"),
)


def parse_line(line: Line) -> Sample | None:
    """What a line says; None where it is not one of tegrastats."""
    text = line.text
    rails = {
        name: float(now) for name, now, unit, more in _RAIL.findall(text) if (unit or more) and name not in _NO_RAILS
    }
    ram = _RAM.search(text)
    if ram is None and not rails:
        return None
    gpu, emc = _GPU.search(text), _EMC.search(text)
    clocks = [int(clock) for clock in (gpu[2] or gpu[3] or "").split(",") if clock] if gpu else []
    return Sample(
        line.at_s,
        rails,
        {name: float(value) for name, value in _TEMPERATURE.findall(text) if float(value) > _OFF_C},
        clock_mhz=max(clocks, default=0) or None,
        load_percent=float(gpu[1]) if gpu and gpu[1] else None,
        cpu_percent=_cores(text),
        emc_percent=float(emc[1]) if emc else None,
        ram_mb=float(ram[1]) if ram else None,
    )


def _cores(text: str) -> float | None:
    found = _CPU.search(text)
    loads = [int(load) for load in re.findall(r"(\d+)%", found[1])] if found else []
    return statistics.fmean(loads) if loads else None


def whole_of(samples: Sequence[Sample]) -> Whole:
    """The rails that make up what the device draws."""
    names = _common(sample.rails_mw for sample in samples if sample.rails_mw)
    for rails, name, scope in _WHOLES:
        if names.issuperset(rails):
            return Whole(rails, name, scope)
    if not names:
        return Whole(reason="tegrastats gave no rail; this module or its kernel has no power monitor")
    return Whole(reason=f"of the rails {', '.join(sorted(names))} none is known to be the whole")


def _common(rails: Iterable[Iterable[str]]) -> set[str]:
    """The names that most lines have: a line may be cut, a release does not change midway."""
    each = [frozenset(names) for names in rails]
    return set().union(*each) if each else set()
