"""Jetson's power: every form of tegrastats, and the whole way from a program that prints to a figure of energy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from power_support import JETSON_CLOCKS, TEGRASTATS, Machine

from phi4edge.measurement.power._api import Decoded, Line
from phi4edge.measurement.power.jetson import clocks_pinned, power_mode
from phi4edge.measurement.power.sampler import sampler_for
from phi4edge.measurement.power.tegrastats import parse_line, whole_of
from phi4edge.measurement.power.text import power_text
from phi4edge.targets.catalog import open_catalog

PROFILE = open_catalog(()).profile("jetson-orin-nano-8gb")
NANO = "RAM 6185/7620MB (lfb 8x2MB) CPU [50%@729] GR3D_FREQ 99%@[621] tj@53.9C VDD_IN NOWmW/1mW VDD_SOC 2817mW/2817mW"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path, monkeypatch)
    made.prints("nvpmodel", "NV Power Mode: 25W\n1\n")
    made.program("jetson_clocks", "echo 'Error: Run this script(jetson_clocks) as a root user' >&2; exit 1")
    made.tegrastats(NANO)
    made.now(5000)
    made.files(
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": 47000,
            "sys/class/thermal/thermal_zone8/type": "tj-thermal",
            "sys/class/thermal/thermal_zone8/temp": 48000,
            "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert",
            "sys/class/thermal/cooling_device0/cur_state": 0,
            "sys/class/thermal/cooling_device1/type": "pwm-fan",
            "sys/class/thermal/cooling_device1/cur_state": 3,
            "sys/class/hwmon/hwmon3/oc3_event_cnt": 15,
        }
    )
    return made


# --- one line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "watts", "rail", "clock_mhz", "load", "hottest_c"),
    [
        ("thor", 19.780, "VIN", 314, None, 38.875),
        ("thor, idle GPU", 15.004, "VIN", None, None, 37),
        ("thor, JetPack 7.2", 87.426, "VIN", None, None, 63.281),
        ("agx orin", 3.150 + 14.312 + 4.968, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 407, 14, 77.281),
        ("agx orin, JetPack 7", 5.139 + 3.268 + 5.5, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 1300, 12, 52.968),
        ("orin nano", 12.479, "VDD_IN", 621, 63, 53.968),
        ("agx xavier", 0.216 + 0.864 + 0.144 + 1.889, "GPU + CPU + SOC + CV + VDDRQ + SYS5V", None, 0, 100),
        ("tx2", 5.297, "VDD_IN", 114, 0, 50),
        ("nano", 1.750, "POM_5V_IN", 76, 0, 50),
    ],
)
def test_every_generation_gives_its_whole_power(
    module: str, watts: float, rail: str, clock_mhz: float | None, load: float | None, hottest_c: float
) -> None:
    sample = parse_line(Line(1.0, TEGRASTATS[module]))
    assert sample is not None
    whole = whole_of([sample])
    assert whole.name == rail
    assert sum(sample.rails_mw[name] for name in whole.rails) / 1000 == pytest.approx(watts)
    assert (sample.clock_mhz, sample.load_percent) == (clock_mhz, load)
    assert max(sample.temperatures_c.values()) == hottest_c
    assert "NC" not in sample.rails_mw
    assert sample.ram_mb


def test_memory_and_cores_are_read_and_what_is_off_is_left_out() -> None:
    sample = parse_line(Line(0.0, TEGRASTATS["orin nano"]))
    assert sample is not None
    assert (sample.ram_mb, sample.cpu_percent, sample.emc_percent) == (6185, 13, 43)
    orin = parse_line(Line(0.0, TEGRASTATS["agx orin"]))
    assert orin is not None
    assert "CV0" not in orin.temperatures_c


def test_a_line_without_rails_has_load_and_no_power() -> None:
    sample = parse_line(Line(0.0, TEGRASTATS["tx1, old"]))
    assert sample is not None
    assert (sample.load_percent, sample.cpu_percent, dict(sample.rails_mw)) == (39, 23.25, {})
    assert "no rail" in whole_of([sample]).reason


def test_unknown_rails_are_not_added_up() -> None:
    sample = parse_line(Line(0.0, "RAM 1/2MB VDD_NEW 100mW/100mW VDD_OTHER 50mW/50mW"))
    assert sample is not None
    assert whole_of([sample]).rails == ()
    assert "VDD_NEW, VDD_OTHER" in whole_of([sample]).reason


_CUT = st.sampled_from(sorted(TEGRASTATS.values())).flatmap(
    lambda line: st.integers(0, len(line)).map(lambda n: line[:n])
)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200) | _CUT)
def test_no_line_makes_the_parser_fail_and_a_cut_one_gives_no_wrong_rail(text: str) -> None:
    sample = parse_line(Line(0.0, text))
    power_mode(text)
    clocks_pinned(text)
    full = next((line for line in TEGRASTATS.values() if text and line.startswith(text)), None)
    if sample is not None and full is not None:
        whole = parse_line(Line(0.0, full))
        assert whole is not None
        assert sample.rails_mw.items() <= whole.rails_mw.items()


def test_the_mode_is_its_name_and_clocks_are_pinned_when_all_are() -> None:
    assert power_mode("NVPM VERB: parsing done\nNV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert power_mode("2\n") is None
    assert clocks_pinned(JETSON_CLOCKS.format(low=1510400, gpu=624750000)) is True
    assert clocks_pinned(JETSON_CLOCKS.format(low=729600, gpu=624750000)) is False
    assert clocks_pinned(JETSON_CLOCKS.format(low=1510400, gpu=306000000)) is False
    assert clocks_pinned("cpu0: Online=1 MinFreq=1 MaxFreq=1") is None


# --- the whole way ------------------------------------------------------------------------------------------


def test_energy_is_power_less_idle_times_seconds_by_tokens(machine: Machine) -> None:
    """(15 − 5) W for 1.5 s over 30 tokens: half a joule a token, with no spread where the readings have none."""
    with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=1.0) as sampler:
        sampler.before()
        assert machine.left_running() == []
        machine.now(15000)
        sampler.start()
        time.sleep(1.8)
        assert len(machine.left_running()) == 1
        decode = sampler.stop(Decoded(30, 1.5, time.monotonic()))
        assert machine.left_running() == []
        machine.files({"sys/class/thermal/thermal_zone8/temp": 55000})
        document = sampler.after()
    energy = decode["energy_j_per_token"]
    assert energy["value"] == pytest.approx(0.5)
    assert energy["se"] == 0
    assert energy["n"] == decode["samples"] == len(decode["power_w"]["samples"]) >= 5
    assert (decode["power_w"]["value"], decode["idle_power_w"]["value"]) == (15, 5)
    assert (decode["rail"], decode["rail_scope"]) == ("VDD_IN", "the module")
    assert decode["rails_mw"]["VDD_SOC"]["mean"] == 2817
    assert decode["ram_mb"]["max"] == 6185
    assert document["temperature_c"] == {"sensor": "tj-thermal", "before": 48, "after": 55}
    assert document["throttled"] is False
    assert "not measured on hardware" in document["note"]
    # What needs root is missing with the words of the program, and nothing else is.
    assert set(document["not_measured"]) == {"before.clocks_pinned", "after.clocks_pinned"}
    assert "as a root user" in document["not_measured"]["before.clocks_pinned"]
    assert power_text(document) == f"50.0 ± 0.0 J/100 tokens (VDD_IN less idle, {energy['n']} samples), 25W, 48 → 55 °C"


def test_samples_outside_the_decoding_are_left_out(machine: Machine) -> None:
    """Loading at 9 W comes before decoding at 15 W; only the last second counts."""
    with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=1.0) as sampler:
        sampler.before()
        machine.now(9000)
        sampler.start()
        time.sleep(0.6)
        machine.now(15000)
        time.sleep(1.4)
        decode = sampler.stop(Decoded(10, 1.0, time.monotonic()))
    assert decode["power_w"]["value"] == 15
    assert decode["energy_j_per_token"]["value"] == pytest.approx(10 * 1.0 / 10)


def test_heat_and_current_that_slow_the_module_are_told(machine: Machine) -> None:
    with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=0) as sampler:
        sampler.before()
        machine.files({"sys/class/thermal/cooling_device0/cur_state": 1, "sys/class/hwmon/hwmon3/oc3_event_cnt": 37})
        document = sampler.after()
    assert document["throttled"] is True
    assert document["throttled_by"] == ["gpu-throttle-alert is on", "22 over-current events (oc3)"]
    assert "THROTTLED: gpu-throttle-alert is on; 22 over-current" in power_text(document)


def test_clocks_are_read_in_sysfs_where_jetson_clocks_wants_root(machine: Machine) -> None:
    gpu, policy = "sys/class/devfreq/17000000.gpu", "sys/devices/system/cpu/cpufreq/policy0"
    machine.files({f"{gpu}/min_freq": 918000000, f"{gpu}/max_freq": 918000000, f"{gpu}/cur_freq": 918000000})
    machine.files({f"{policy}/related_cpus": "0 1", f"{policy}/scaling_max_freq": 1510400})
    for low, pinned in ((1510400, True), (729600, False)):
        machine.files({f"{policy}/scaling_min_freq": low})
        with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=0) as sampler:
            sampler.before()
            document = sampler.after()
        assert document["before"]["clocks_pinned"] is pinned
        assert ("clocks pinned" in power_text(document)) is pinned


# --- what goes wrong stays a reason -------------------------------------------------------------------------


def watched(machine: Machine, seconds: float = 0.5) -> dict[str, object]:
    with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=0.8) as sampler:
        sampler.before()
        sampler.start()
        time.sleep(seconds)
        sampler.stop(Decoded(10, seconds, time.monotonic()))
        document = sampler.after()
    assert machine.left_running() == []
    energy = document["decode"]["energy_j_per_token"]
    assert energy["value"] is None
    assert energy["reason"]
    assert "energy not measured (" in power_text(document)
    return document


def reason(document: dict[str, object], field: str = "decode.samples") -> str:
    found = document["not_measured"]
    assert isinstance(found, dict)
    return str(found[field])


def test_a_sampler_that_dies_is_a_reason_with_its_last_words(machine: Machine) -> None:
    machine.program("tegrastats", "echo 'tegrastats: cannot open /dev/nvmap' >&2; exit 3")
    assert reason(watched(machine)) == "tegrastats ended by itself: tegrastats: cannot open /dev/nvmap"


def test_a_sampler_that_dies_midway_gives_no_energy(machine: Machine) -> None:
    machine.program("tegrastats", f"for i in 1 2 3 4 5 6 7 8 9 10; do echo '{TEGRASTATS['nano']}'; sleep 0.02; done")
    document = watched(machine, 3.0)
    assert "ended by itself" in reason(document)
    assert "last" in reason(document, "decode.power_w")


def test_garbage_is_a_reason_that_quotes_it(machine: Machine) -> None:
    machine.program("tegrastats", 'echo $$ >> "$PIDS"; while :; do head -c 300 /dev/urandom; echo; sleep 0.05; done')
    assert "could be read" in reason(watched(machine))


def test_a_flood_without_an_end_of_line_is_ended(machine: Machine) -> None:
    machine.program("tegrastats", 'echo $$ >> "$PIDS"; exec cat /dev/zero')
    assert "could be read" in reason(watched(machine))


def test_a_missing_tegrastats_and_nvpmodel_are_named(machine: Machine) -> None:
    for name in ("tegrastats", "nvpmodel", "jetson_clocks"):
        (machine.bin / name).unlink()
    document = watched(machine)
    assert reason(document) == "tegrastats: not on the device's PATH"
    assert "nvpmodel" in reason(document, "before.power_mode")
    assert document["mode"] is None


def test_a_program_that_hangs_costs_its_limit_and_no_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi4edge.measurement.power._ask._LIMIT_S", 0.4)
    machine.program("nvpmodel", 'echo $$ >> "$PIDS"; exec sleep 100')
    with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=0) as sampler:
        sampler.before()
        document = sampler.after()
    assert machine.left_running() == []
    assert "longer than 0.4 s" in document["not_measured"]["before.power_mode"]


def test_no_more_power_than_at_rest_is_no_energy(machine: Machine) -> None:
    assert "not above" in reason(watched(machine, 1.5), "decode.energy_j_per_token")


def test_an_error_of_the_measurement_leaves_nothing_running(machine: Machine) -> None:
    def measure() -> None:
        with sampler_for(machine.device, PROFILE, root=str(machine.root), idle_s=0) as sampler:
            sampler.start()
            time.sleep(0.3)
            assert len(machine.left_running()) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert machine.left_running() == []
