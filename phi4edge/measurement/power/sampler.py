"""Which sampler suits a device: the entry of this package."""

from __future__ import annotations

__all__ = ["local_sampler", "sampler_for"]

from pathlib import Path

from phi4edge.measurement.power._api import Platform, Sampler
from phi4edge.measurement.power._ask import shell
from phi4edge.measurement.power._sampler import IDLE_S, DeviceSampler
from phi4edge.measurement.power.android import Android
from phi4edge.measurement.power.jetson import Jetson
from phi4edge.measurement.power.linux import Linux
from phi4edge.measurement.power.mac import Mac
from phi4edge.targets.profile import Profile
from phi4edge.transports._api import Device
from phi4edge.transports.local import LocalDevice

_KIND = "uname -s; command -v tegrastats; command -v getprop; true"


def sampler_for(device: Device, profile: Profile | None = None, *, root: str = "/", idle_s: float = IDLE_S) -> Sampler:
    """A sampler of ``device``; what its profile says goes before what it looks like.

    Never raises: a device that cannot be asked is one whose document holds reasons. ``root`` is where the device's
    /sys and /proc are (tests give their own), ``idle_s`` how long it is watched at rest, seconds.
    """
    return DeviceSampler(device, _platform(device, profile, root), idle_s)


def local_sampler(profile: Profile | None = None) -> Sampler:
    """A sampler of this machine; writes nothing."""
    return sampler_for(LocalDevice(Path("/")), profile)


def _platform(device: Device, profile: Profile | None, root: str) -> Platform:
    looks = shell(device, _KIND).text or ""
    if (profile is not None and profile.kind == "phone") or "getprop" in looks:
        return Android(device, root)
    if (profile is not None and profile.power_interface == "tegrastats") or "tegrastats" in looks:
        return Jetson(device, root)
    if (profile is not None and profile.power_interface == "powermetrics") or looks.startswith("Darwin"):
        return Mac(device)
    return Linux(device, root, gpu=profile is not None and profile.power_interface == "nvidia-smi")
