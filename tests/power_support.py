"""A device made of a folder: programs that print as the real ones do, files as Linux shows them, and a local shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from phi4edge.transports.local import LocalDevice

# One line of each module, in the form that tegrastats has there (lines people published, shortened in their cores).
TEGRASTATS = {
    "thor": "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972,0%@972,0%@972] EMC_FREQ 0%@2750 "
    "GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 VIC off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C "
    "VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW",
    "thor, idle GPU": "RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972,4%@972] cpu@37C VDD_GPU -392mW/-392mW "
    "VDD_CPU_SOC_MSS 3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW",
    "thor, JetPack 7.2": "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) "
    "CPU [2%@972,1%@972] cpu@60.406C tj@63.281C gpu@62.906C VDD_GPU 37528mW/37528mW/37528mW "
    "VDD_CPU_SOC_MSS 18961mW/18961mW/18961mW VIN_SYS_5V0 18331mW/18331mW/18331mW VIN 87426mW/43713mW/87426mW",
    "agx orin": "08-14-2026 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) "
    "CPU [90%@2201,100%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 "
    "CV0@-256C CPU@77.281C Tboard@62C GPU@69.125C tj@77.281C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW "
    "VIN_SYS_5V0 4968mW/5048mW NC 0mW/0mW VDDQ_VDD2_1V8AO 1091mW/1091mW NC 0mW/0mW",
    "agx orin, JetPack 7": "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] "
    "EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] NVENC0 off APE 174 cpu@52.968C/52.968C gpu@47.625C/47.625C "
    "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW",
    "orin nano": "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) "
    "CPU [15%@729,11%@729,off] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off APE 200 cpu@53.968C soc2@52.437C "
    "gpu@53.343C tj@53.968C VDD_IN 12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW",
    "agx xavier": "RAM 1903/15692MB (lfb 3251x4MB) CPU [1%@1190,1%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@32.5C GPU@32C "
    "Tboard@32C AUX@31.5C CPU@33.5C thermal@32.9C PMIC@100C GPU 0/0 CPU 216/216 SOC 864/864 CV 0/0 VDDRQ 144/144 "
    "SYS5V 1889/1889",
    "tx2": "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU [44%@1421,49%@2031] EMC_FREQ 1%@1866 "
    "GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% PLL@42.5C MCPU@42.5C PMIC@50C GPU@39.5C thermal@41.3C "
    "VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN 5297/5290 VDD_SYS_CPU 1917/1917",
    "nano": "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) CPU [5%@1224,4%@1224] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C POM_5V_IN 1750/1628 POM_5V_GPU 0/0",
    "tx1, old": "RAM 3607/3983MB (lfb 47x4MB) SWAP 873/8192MB (cached 281MB) cpu [17%,11%,65%,0%]@1734 EMC 1%@1600 "
    "APE 25 GR3D 39%@76",
}
JETSON_CLOCKS = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit
Online CPUs: 0-1
cpu0:  Online=1 Governor=schedutil MinFreq={low} MaxFreq=1510400 CurrentFreq=960000 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq={low} MaxFreq=1510400 CurrentFreq=729600 IdleStates: WFI=1 c7=1
cpu2:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq={gpu} MaxFreq=624750000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed control=active hwmon2_pwm1=55
NV Power Mode: 15W
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: {usb}
  Wireless powered: false
  Dock powered: false
  Max charging current: 0
  Max charging voltage: 5000000
  Charge counter: 2848000
  status: {status}
  health: 2
  present: true
  level: 54
  scale: 100
  voltage: 3906
  temperature: {tenths}
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
Thermal Status: {status}
Cached temperatures:
    Temperature{{mValue=39.9, mType=0, mName=soc_max, mStatus=0}}
HAL Ready: true
"""
CPU = "sys/devices/system/cpu"


class Machine:
    """The folder: ``bin`` goes in front of PATH, ``root`` holds /sys and /proc."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.root = folder / "bin", folder / "root of it"  # a name with spaces
        self.bin.mkdir(parents=True)
        self.root.mkdir()
        self.pids = folder / "pids"
        self.device = LocalDevice(folder)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")

    def program(self, name: str, script: str) -> None:
        """A shell program; ``$PIDS`` is where it notes its process."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\nPIDS='{self.pids}'\nHERE='{self.bin.parent}'\n{script}")
        path.chmod(0o755)

    def prints(self, name: str, text: str) -> None:
        """A program that prints ``text`` and ends."""
        (self.bin / f"{name}.txt").write_text(text)
        self.program(name, f"cat '{self.bin / name}.txt'")

    def tegrastats(self, line: str, every_s: float = 0.05) -> None:
        """One that prints ``line`` again and again, NOW being the text of the file ``now``."""
        self.program(
            "tegrastats",
            f'echo $$ >> "$PIDS"\nwhile :; do read -r now < "$HERE/now"\n'
            f'echo "{line}" | sed "s/NOW/$now/"\nsleep {every_s}\ndone\n',
        )

    def now(self, text: object) -> None:
        """What the tegrastats of :meth:`tegrastats` prints from here on."""
        (self.bin.parent / "now").write_text(f"{text}\n")

    def files(self, contents: Mapping[str, object]) -> None:
        """Files below the root."""
        for name, content in contents.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    def left_running(self) -> list[int]:
        """The processes that noted themselves and still run."""
        pids = [int(word) for word in self.pids.read_text().split()] if self.pids.exists() else []
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def policies(*clusters: tuple[str, int, int | None]) -> dict[str, object]:
    """cpufreq's files of clusters: cores, highest kHz, capacity."""
    found: dict[str, object] = {}
    for cpus, khz, capacity in clusters:
        folder = f"{CPU}/cpufreq/policy{cpus.split()[0]}"
        for key, value in (("related_cpus", cpus), ("scaling_governor", "schedutil"), ("scaling_min_freq", 300000)):
            found[f"{folder}/{key}"] = value
        for key in ("cpuinfo_max_freq", "scaling_max_freq", "scaling_cur_freq"):
            found[f"{folder}/{key}"] = khz
        if capacity is not None:
            found |= {f"{CPU}/cpu{cpu}/cpu_capacity": capacity for cpu in cpus.split()}
    return found
