"""Android's state and power, clusters and their masks, and what is cold and what is sustained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from power_support import BATTERY, CPU, THERMAL, Machine, policies

from phi4edge.core.errors import UsageError
from phi4edge.measurement.power._api import Decoded
from phi4edge.measurement.power.android import battery, thermal_status
from phi4edge.measurement.power.clusters import big_core_mask
from phi4edge.measurement.power.sampler import sampler_for
from phi4edge.measurement.power.sustained import repetitions_for, settled_from, sustained_of, sustained_text
from phi4edge.measurement.power.text import power_text
from phi4edge.targets.catalog import open_catalog

PHONE = open_catalog(()).profile("phone-pixel-6a-6gb")
CELL = "sys/class/power_supply/battery"
TENSOR = (("0 1 2 3", 1803000, 160), ("4 5", 2253000, 498), ("6 7", 2802000, 1024))


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path, monkeypatch)
    made.program(
        "getprop",
        """case "$1" in
ro.soc.model) echo Tensor;; ro.soc.manufacturer) echo Google;; ro.product.model) echo 'Pixel 6a';;
ro.build.version.release) echo 16;; *) echo;;
esac""",
    )
    made.program("dumpsys", 'cat "$HERE/$1.txt"')
    made.files(policies(*TENSOR))
    draws(made, 1.0)
    says(made)
    return made


def says(phone: Machine, *, usb: str = "false", status: int = 3, tenths: int = 391, thermal: int = 0) -> None:
    folder = phone.bin.parent
    (folder / "battery.txt").write_text(BATTERY.format(usb=usb, status=status, tenths=tenths))
    (folder / "thermalservice.txt").write_text(THERMAL.format(status=thermal))


def draws(phone: Machine, ampere: float) -> None:
    phone.files({f"{CELL}/current_now": round(-ampere * 1e6), f"{CELL}/voltage_now": 4_000_000})


def watched(phone: Machine) -> dict[str, object]:
    with sampler_for(phone.device, PHONE, root=str(phone.root), idle_s=0.4) as sampler:
        sampler.before()
        sampler.start()
        time.sleep(0.4)
        sampler.stop(Decoded(4, 0.4, time.monotonic()))
        return sampler.after()


# --- the phone ----------------------------------------------------------------------------------------------


def test_energy_of_a_phone_on_its_battery_equals_the_one_worked_out(
    phone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 V · (1.5 − 0.25) A for 1.5 s over 30 tokens: a quarter of a joule a token."""
    monkeypatch.setattr("phi4edge.measurement.power.android._INTERVAL_S", 0.05)
    draws(phone, 0.25)
    with sampler_for(phone.device, PHONE, root=str(phone.root), idle_s=1.0) as sampler:
        sampler.before()
        draws(phone, 1.5)
        sampler.start()
        time.sleep(1.7)
        decode = sampler.stop(Decoded(30, 1.5, time.monotonic()))
        says(phone, tenths=437)
        document = sampler.after()
    assert decode["energy_j_per_token"]["value"] == pytest.approx(0.25)
    assert decode["clock_mhz"]["max"] == 2802
    assert document["before"]["soc"] == "Tensor"
    assert (document["before"]["model"], document["before"]["android"]) == ("Pixel 6a", "16")
    assert document["before"]["platform"] is None
    assert document["not_measured"]["before.platform"] == "ro.board.platform is empty"
    assert document["before"]["battery_percent"] == 54
    assert document["before"]["big_core_mask"] == "c0"
    assert (document["temperature_c"]["before"], document["temperature_c"]["after"]) == (39.1, 43.7)
    assert document["throttled"] is False
    assert "not measured on hardware" in document["note"]
    n = decode["energy_j_per_token"]["n"]
    assert power_text(document) == (
        f"25.0 ± 0.0 J/100 tokens (battery less idle, {n} samples), governor schedutil, 39 → 44 °C (battery)"
    )


def test_a_phone_on_a_cable_has_no_energy(phone: Machine) -> None:
    says(phone, usb="true", status=2)
    document = watched(phone)
    assert "the phone is on USB" in str(document["not_measured"]["decode.power_w"])  # type: ignore[index]


def test_a_current_in_the_wrong_unit_is_no_power(phone: Machine) -> None:
    phone.files({f"{CELL}/current_now": 1500})  # mA, as some makers have it
    document = watched(phone)
    assert "no current of a phone at work in µA" in str(document["not_measured"]["decode.power_w"])  # type: ignore[index]


def test_meters_that_the_shell_may_not_read_are_told(phone: Machine) -> None:
    (phone.root / CELL / "current_now").unlink()
    document = watched(phone)
    assert "may not read the battery" in str(document["not_measured"]["decode.power_w"])  # type: ignore[index]


def test_heat_and_caps_that_slow_the_phone_are_told(phone: Machine) -> None:
    with sampler_for(phone.device, PHONE, root=str(phone.root), idle_s=0) as sampler:
        sampler.before()
        says(phone, thermal=2)
        phone.files({f"{CPU}/cpufreq/policy6/scaling_max_freq": 1800000})
        document = sampler.after()
    assert document["throttled_by"] == ["thermal status moderate", "cores 6, 7 are capped at 1800 of 2802 MHz"]


def test_a_clock_that_falls_while_the_phone_decodes_is_throttling(
    phone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4edge.measurement.power.android._INTERVAL_S", 0.04)
    with sampler_for(phone.device, PHONE, root=str(phone.root), idle_s=0) as sampler:
        sampler.before()
        sampler.start()
        begin = time.monotonic()
        time.sleep(0.5)
        for cpu in (0, 4, 6):
            phone.files({f"{CPU}/cpufreq/policy{cpu}/scaling_cur_freq": 1400000})
        time.sleep(0.5)
        now = time.monotonic()
        sampler.stop(Decoded(10, now - begin, now))
        document = sampler.after()
    assert document["throttled_by"] == ["the clock fell from 2802 to 1400 MHz"]


def test_a_phone_that_answers_nothing_has_reasons(phone: Machine) -> None:
    (phone.bin / "getprop").unlink()
    (phone.bin / "dumpsys").unlink()
    document = watched(phone)
    missing = document["not_measured"]
    assert isinstance(missing, dict)
    assert {"before.soc", "before.battery_temperature_c", "before.thermal_status"} <= set(missing)
    assert "dumpsys" in missing["before.battery_percent"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=120))
def test_no_answer_makes_the_readers_fail(text: str) -> None:
    battery(text)
    battery(f"  level: {text}\n  temperature: {text}")
    thermal_status(text)
    thermal_status(f"Thermal Status: {text}")


# --- clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "mask", "rule"),
    [
        # Snapdragon 8 Gen 3: two A520, five A720 in two clusters, one X4.
        ((("0 1", 2265600, 300), ("2 3 4", 3148800, 870), ("5 6", 2956800, 830), ("7", 3302400, 1024)), "fc", "capac"),
        # Snapdragon 8 Elite: all are big.
        ((("0 1 2 3 4 5", 3532800, 800), ("6 7", 4320000, 1024)), None, "alike"),
        # Without capacities, the slowest cluster is left out.
        ((("0 1 2 3", 1803000, None), ("4 5", 2253000, None), ("6 7", 2802000, None)), "f0", "cpuinfo_max_freq"),
        ((("0 1 2 3 4 5 6 7", 2000000, None),), None, "alike"),
        ((), None, "no clusters"),
    ],
)
def test_the_mask_keeps_to_the_big_cores(
    cores: tuple[tuple[str, int, int | None], ...],
    mask: str | None,
    rule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Machine(tmp_path, monkeypatch)
    made.files(policies(*cores))
    found = big_core_mask(made.device, str(made.root))
    assert found.mask == mask
    assert rule in found.rule
    if mask is not None:
        assert found.cpus == tuple(cpu for cpu in range(8) if int(mask, 16) >> cpu & 1)


def test_the_mask_is_one_that_taskset_takes(phone: Machine) -> None:
    phone.files({f"{CPU}/cpufreq/policy4/related_cpus": "1"})
    phone.files(policies(("0", 1000000, 1024)))
    for cpu in (4, 6):
        (phone.root / f"{CPU}/cpufreq/policy{cpu}/related_cpus").unlink()
    phone.files(policies(("1", 1000000, 100)))
    mask = big_core_mask(phone.device, str(phone.root)).mask
    assert mask == "1"
    done = phone.device.run(["taskset", mask, "sh", "-c", "grep Cpus_allowed_list /proc/self/status"], timeout_s=10)
    assert done.text.split()[-1] == "0"


# --- cold and sustained -------------------------------------------------------------------------------------


def benched(values: list[float], before: float | None = None, after: float | None = None) -> dict[str, Any]:
    """A bench document with these generations of 20 tokens."""
    decode = {"samples": values, "median": values[0]}
    heat = {"sensor": "battery" if before else None, "before": before, "after": after}
    return {"metrics": {"decode_tps": decode}, "settings": {"gen_tokens": 20}, "power": {"temperature_c": heat}}


def test_cold_samples_come_before_the_settled_run() -> None:
    found = sustained_of(benched([10.0, 10.0, 8.0, 8.0, 5.0, 5.1, 4.9, 5.0], 39.0, 44.0), 20)
    assert found["first"]["value"] == 10
    assert found["cold"]["value"] == pytest.approx(9)
    assert (found["settled"]["value"], found["settled"]["n"]) == (pytest.approx(5.0), 4)
    assert found["settled_to_first"] == pytest.approx(0.5)
    assert found["settled_after_s"] == pytest.approx(2 + 2 + 2.5 + 2.5)
    assert found["start_in_range"] is True
    assert sustained_text(found) == (
        "sustained: first 10.00, settled 5.00 tok/s (50 % of the first) after 9 s; 39 → 44 °C (battery)"
    )
    assert "38 to 43" in sustained_text(sustained_of(benched([5.0, 5.0, 5.0], 30.0, 31.0), 20))


def test_a_speed_that_still_falls_has_not_settled() -> None:
    found = sustained_of(benched([10.0, 8.0, 6.0, 4.0]), 7.5)
    assert found["settled"]["value"] is None
    assert "repeat for longer" in found["settled"]["reason"]
    assert found["settled_to_first"] is None
    assert found["start_in_range"] is None
    assert "not settled" in sustained_text(found)


def test_a_speed_that_never_falls_is_settled_from_the_start() -> None:
    assert settled_from([5.0, 5.1, 4.9]) == 0
    assert settled_from([5.0, 5.1]) is None


def test_generations_are_as_many_as_the_time_holds() -> None:
    assert repetitions_for(60, benched([10.0])) == 30
    assert repetitions_for(0.1, benched([10.0])) == 3
    nothing = {"metrics": {"decode_tps": {"value": None}}, "settings": {"gen_tokens": 0}}
    with pytest.raises(UsageError, match="none was asked for"):
        repetitions_for(60, nothing)
