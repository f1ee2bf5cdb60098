"""Power of laptops, desktops and Macs: counters that wrap, governors, and a bench that is measured as before."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from power_support import CPU, Machine, policies

from phi4edge.measurement.power._api import Decoded, Line
from phi4edge.measurement.power.mac import speed_limit
from phi4edge.measurement.power.rapl import Domain, domains, samples_of, whole_of
from phi4edge.measurement.power.sampler import local_sampler, sampler_for
from phi4edge.measurement.power.text import power_text
from phi4edge.targets.catalog import open_catalog

RAPL = "sys/class/powercap/intel-rapl"
LAPTOP = open_catalog(()).profile("laptop-x86-ddr5")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path, monkeypatch)
    made.files(policies(("0 1 2 3", 4400000, None)))
    made.files(
        {
            f"{CPU}/intel_pstate/no_turbo": 0,
            f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 2,
            f"{CPU}/cpu0/thermal_throttle/package_throttle_count": 5,
            "sys/class/power_supply/AC/type": "Mains",
            "sys/class/power_supply/AC/online": 1,
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/status": "Charging",
            "sys/class/power_supply/BAT0/capacity": 81,
            "sys/class/hwmon/hwmon1/name": "coretemp",
            "sys/class/hwmon/hwmon1/temp1_input": 61000,
            "sys/class/thermal/thermal_zone2/type": "x86_pkg_temp",
            "sys/class/thermal/thermal_zone2/temp": 60000,
            "proc/loadavg": "0.25 0.20 0.10 1/200 999",
            "proc/uptime": "100.00 50.00",
        }
    )
    return made


def counters(machine: Machine, package_uj: int, dram_uj: int, span: int = 10_000_000) -> None:
    """A package with cores and memory, counting from there on."""
    for place, name, value in (("0", "package-0", package_uj), ("0:0", "core", 7), ("0:1", "dram", dram_uj)):
        folder = f"{RAPL}:{place}"
        machine.files({f"{folder}/name": name, f"{folder}/energy_uj": value, f"{folder}/max_energy_range_uj": span})


def passing(machine: Machine, spend: str = "") -> None:
    """Let ``sleep``, between two readings, pass half a second on the machine's own clock, and do ``spend``."""
    machine.program(
        "sleep",
        f"""cd '{machine.root}'
read -r up rest < proc/uptime
cents=$(( ${{up%.*}} * 100 + 1${{up#*.}} - 100 + 50 ))
printf '%d.%02d 0\\n' $((cents / 100)) $((cents % 100)) > proc/uptime
{spend}
exec /bin/sleep 0.04
""",
    )


def wait(machine: Machine, steps: int, limit_s: float = 30) -> None:
    """Until so many half seconds have passed on the machine's own clock."""

    def clock() -> float:
        while not (said := (machine.root / "proc/uptime").read_text()).endswith("\n"):  # at work on it just now
            time.sleep(0.001)
        return float(said.split()[0])

    end, deadline = clock() + steps / 2, time.monotonic() + limit_s
    while clock() < end:
        assert time.monotonic() < deadline, "the machine's clock stands still"
        time.sleep(0.02)


def counting(machine: Machine) -> None:
    """Let the processor spend what ``now`` says, in µJ, in each half second; the counters begin again at 10 J."""
    machine.now("1000000 500000")
    passing(
        machine,
        f"""read -r package dram < "$HERE/now"
add() {{ read -r v < "$1"; echo $(( (v + $2) % 10000000 )) > "$1"; }}
add {RAPL}:0/energy_uj $package
add {RAPL}:0:1/energy_uj $dram""",
    )


# --- RAPL ---------------------------------------------------------------------------------------------------


def test_power_is_energy_by_time_and_a_counter_may_begin_again() -> None:
    found = (Domain("package-0", "a", 1000e6), Domain("package-0/dram", "b", 100e6))
    lines = [
        Line(0, "10.0 990000000 0 55000 3000000"),
        Line(1, "10.5 5000000 1000000 56000 3000000 4000000"),
        Line(2, "-"),
        Line(3, "11.5 25000000 3000000 57000"),
    ]
    samples = samples_of(lines, found, "x86_pkg_temp")
    assert [sample.seconds for sample in samples] == [0.5, 1.0]
    assert [dict(sample.rails_mw) for sample in samples] == [
        {"package-0": 30_000, "package-0/dram": 2_000},
        {"package-0": 20_000, "package-0/dram": 2_000},
    ]
    assert [sample.temperatures_c["x86_pkg_temp"] for sample in samples] == [56, 57]
    assert [sample.clock_mhz for sample in samples] == [4000, None]
    assert whole_of(found, "").rails == ("package-0", "package-0/dram")


def test_counters_that_are_closed_or_missing_are_told_apart() -> None:
    assert domains({f"{RAPL}:0/energy_uj": None, f"{RAPL}:0/max_energy_range_uj": "10"})[1] == (
        "energy_uj is readable by root alone"
    )
    assert domains({})[1] == "this machine shows no RAPL counter"
    assert "package" in whole_of((Domain("psys", "a", 1.0),), "").reason


def test_energy_on_a_machine_with_counters_equals_the_one_worked_out(machine: Machine) -> None:
    """At rest 1 + 0.5 J in half a second: 3 W; at work 6 + 0.5 J: 13 W. The difference is 10 W."""
    counters(machine, 9_900_000, 0)
    counting(machine)
    with sampler_for(machine.device, LAPTOP, root=str(machine.root), idle_s=2.5) as sampler:
        sampler.before()
        machine.now("6000000 500000")
        sampler.start()
        wait(machine, 2)
        began = time.monotonic()
        wait(machine, 12)
        seconds = time.monotonic() - began
        decode = sampler.stop(Decoded(40, seconds, time.monotonic()))
        machine.files({f"{CPU}/cpu0/thermal_throttle/package_throttle_count": 9})
        document = sampler.after()
    assert decode["idle_power_w"]["value"] == pytest.approx(3)
    assert decode["power_w"]["value"] == pytest.approx(13)
    assert decode["energy_j_per_token"]["value"] == pytest.approx(10 * seconds / 40)
    assert decode["rail"] == "RAPL package + DRAM"
    assert set(decode["rails_mw"]) == {"package-0", "package-0/core", "package-0/dram"}
    assert decode["peak_temperature_c"] == 60
    assert document["throttled_by"] == ["4 thermal throttle events"]
    assert not any(name.startswith("decode") for name in document["not_measured"])
    text = power_text(document)
    assert text.startswith(f"{1000 * seconds / 40:.1f} ± 0.0 J/100 tokens (RAPL package + DRAM less idle, ")
    assert text.endswith(
        "governor schedutil, 61 → 61 °C, on AC, load 0.25 before, THROTTLED: 4 thermal throttle events"
    )


def test_counters_of_root_alone_are_told_and_clocks_still_watched(machine: Machine) -> None:
    counters(machine, 1, 1)
    for place in ("0", "0:0", "0:1"):
        file = machine.root / f"{RAPL}:{place}" / "energy_uj"
        file.unlink()
        file.symlink_to("/proc/self/mem")  # exists, and no one can read its first line
    passing(machine)
    with sampler_for(machine.device, LAPTOP, root=str(machine.root), idle_s=0) as sampler:
        sampler.before()
        sampler.start()
        time.sleep(1.2)
        decode = sampler.stop(Decoded(1, 1.2, time.monotonic()))
        document = sampler.after()
    assert decode["clock_mhz"]["max"] == 4400
    assert document["not_measured"]["decode.power_w"] == "energy_uj is readable by root alone"
    assert power_text(document).startswith(
        "energy not measured (energy_uj is readable by root alone), governor schedutil"
    )


def test_where_nothing_can_be_read_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Machine(tmp_path, monkeypatch)
    bare.program("sleep", 'echo $$ >> "$PIDS"; exec /bin/sleep 1')
    with sampler_for(bare.device, LAPTOP, root=str(bare.root)) as sampler:
        begin = time.monotonic()
        sampler.before()
        sampler.start()
        assert time.monotonic() - begin < 2  # it did not wait at rest either
        sampler.stop(Decoded(1, 1.0, time.monotonic()))
        text = power_text(sampler.after())
    assert not bare.pids.exists()
    assert text == "energy not measured (this machine shows no RAPL counter, nor a clock)"


# --- the state ----------------------------------------------------------------------------------------------


def test_a_laptop_tells_governor_turbo_supply_and_heat(machine: Machine) -> None:
    def state() -> dict[str, object]:
        with sampler_for(machine.device, LAPTOP, root=str(machine.root)) as sampler:
            sampler.before()
            return dict(sampler.after()["before"])

    found = state()
    assert (found["governor"], found["turbo"], found["supply"], found["battery_percent"]) == (
        "schedutil",
        True,
        "AC",
        81,
    )
    assert found["load_average_1min"] == 0.25
    assert found["throttle_count"] == 7
    machine.files({f"{CPU}/intel_pstate/no_turbo": 1, "sys/class/power_supply/AC/online": 0})
    machine.files({"sys/class/power_supply/BAT0/status": "Discharging"})
    found = state()
    assert (found["turbo"], found["supply"]) == (False, "battery")


def test_a_machine_that_shows_nothing_says_so_for_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Machine(tmp_path, monkeypatch)
    with sampler_for(bare.device, None, root=str(bare.root)) as sampler:
        sampler.before()
        sampler.start()
        sampler.stop(None)
        document = sampler.after()
    for fact in ("governor", "turbo", "supply", "temperature_c"):
        assert document["not_measured"][f"before.{fact}"]
    assert document["throttled"] is None
    assert document["not_measured"]["throttled"]
    assert json.dumps(document)


def test_power_of_a_graphics_card_is_said_to_be_missing(machine: Machine) -> None:
    with sampler_for(machine.device, open_catalog(()).profile("laptop-rtx-4050"), root=str(machine.root)) as sampler:
        assert "graphics card" in sampler.after()["note"]


def test_a_mac_tells_its_limit_and_that_power_needs_root(machine: Machine) -> None:
    machine.program(
        "pmset",
        """case "$2" in
therm) echo '2026-08-20 05:08:37 -0700 CPU Power notify'; printf '\\tCPU_Speed_Limit \\t= 80\\n';;
batt) echo "Now drawing from 'Battery Power'";;
esac""",
    )
    with sampler_for(machine.device, open_catalog(()).profile("mac-m4")) as sampler:
        sampler.before()
        sampler.start()
        sampler.stop(Decoded(1, 1.0, time.monotonic()))
        document = sampler.after()
    assert document["before"] == {"cpu_speed_limit_percent": 80, "supply": "battery"}
    assert document["throttled_by"] == ["macOS holds the cores at 80 % of their speed"]
    assert power_text(document).startswith("energy not measured (powermetrics needs root), on battery, THROTTLED")
    assert speed_limit("Note: No thermal warning level has been recorded\n") == 100
    assert speed_limit("?") is None


# --- the bench on this machine ------------------------------------------------------------------------------


def test_this_machine_can_be_asked() -> None:
    with local_sampler() as sampler:
        sampler.before()
        document = sampler.after()
    assert document["before"]["load_average_1min"] >= 0


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_bench_has_power_beside_its_metrics(
    phi4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from phi4edge.checkpoint.reader import open_checkpoint
    from phi4edge.cli.main import main
    from phi4edge.writers._api import WriteOptions
    from phi4edge.writers.gguf import write_f16

    path, out = tmp_path / "tiny.gguf", tmp_path / "bench.json"
    write_f16(open_checkpoint(phi4_checkpoint), path, WriteOptions())
    small = ("--prompt-tokens", "8", "--gen-tokens", "4", "--repetitions", "2", "--threads", "1")
    assert main(["bench", str(path), "--out", str(out), *small]) == 0
    data = json.loads(out.read_text())["data"]
    assert data["power"]["decode"]["tokens"] == 8
    decoding = sum(data["metrics"]["tpot_s"]["samples"])
    assert data["power"]["decode"]["seconds"] == pytest.approx(decoding)
    assert f"power: {power_text(data['power'])}" in capsys.readouterr().out
