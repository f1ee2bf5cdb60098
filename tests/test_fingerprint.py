"""A device's fingerprint: what systems say, in the fields of this machine's own, and no name of a host or a user."""

from __future__ import annotations

import getpass
import platform
import socket
from pathlib import Path
from typing import Any

import pytest

from phi4edge.core.errors import TargetError
from phi4edge.measurement.environment import environment
from phi4edge.measurement.fingerprint import fingerprint
from phi4edge.transports import local
from phi4edge.transports._api import Address, Finished

# Written by hand, as a phone and a Mac would answer; no such device was asked.
ANDROID = """system=Linux
release=6.1.75-android14
machine=aarch64
android=15
soc=SM8650
product=SM-S921B
ram_kb=11534336
part=0xd80 0xd81 0xd82 
flags=fp asimd evtstrm aes crc32 asimdhp asimddp i8mm bf16 sve
logical=8
usable=8
cores=8
governor=walt
load=3.20 3.11 3.05
"""  # noqa: W291  as tr leaves it
MACOS = """system=Darwin
release=24.5.0
machine=arm64
mac_model=Apple M4
mac_ram=17179869184
mac_logical=10
mac_cores=10
mac_version=15.5
disk_kb=1000
"""


class Says:
    """A device that answers with given words."""

    transport, name = "ssh", "a device"

    def __init__(self, words: str, code: int = 0) -> None:
        self.finished = Finished(code, words.encode(), b"")

    def run(self, *_: Any, **__: Any) -> Finished:
        return self.finished


def test_this_machine_as_a_device_has_its_own_fingerprint(tmp_path: Path) -> None:
    found, own = fingerprint(local.open(Address(folder=str(tmp_path)))), environment()
    for key in ("model", "generation", "architecture", "flags", "logical_cores", "usable_cores", "governor"):
        assert found["cpu"][key] == own["cpu"][key], key
    for key in ("ram_bytes", "system", "distribution"):
        if platform.system() == "Linux":
            assert found[key] == own[key], key
    assert set(own) - {"variables"} <= set(found)
    x86 = platform.system() == "Linux" and platform.machine() == "x86_64"
    assert (own["cpu"]["generation"] is not None) == x86
    assert found["disk_free_bytes"] > 0


def test_no_host_and_no_user_is_named(tmp_path: Path) -> None:
    found = str(fingerprint(local.open(Address(folder=str(tmp_path)))))
    words = [word for word in (socket.gethostname(), getpass.getuser()) if len(word) > 4]
    assert [word for word in words if word in found] == []
    assert str(tmp_path) not in found


def test_a_phone_is_told_by_its_chip_and_a_mac_by_its_model() -> None:
    phone = fingerprint(Says(ANDROID))  # type: ignore[arg-type]
    assert phone["cpu"]["model"] == "SM8650, SM-S921B"
    assert phone["cpu"]["flags"] == ["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"]
    assert phone["distribution"] == "Android 15"
    assert (phone["cpu"]["physical_cores"], phone["ram_bytes"], phone["load_average"][0]) == (8, 11534336 * 1024, 3.2)
    mac = fingerprint(Says(MACOS))  # type: ignore[arg-type]
    assert (mac["cpu"]["model"], mac["distribution"], mac["ram_bytes"]) == ("Apple M4", "macOS 15.5", 2**34)
    assert mac["cpu"]["physical_cores"] == 10


@pytest.mark.parametrize(("words", "code"), [("", 0), ("Welcome!\n", 0), (ANDROID, 1)])
def test_a_device_that_does_not_say_what_it_is_is_refused(words: str, code: int) -> None:
    with pytest.raises(TargetError, match="does not say what it is"):
        fingerprint(Says(words, code))  # type: ignore[arg-type]
