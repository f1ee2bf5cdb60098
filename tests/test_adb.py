"""Devices reached by adb: Google's client, against an emulated device that really runs what it is told."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from adb_support import Phone, Server, alive, eventually, phones, serving, toybox
from transport_contract import CONTRACT, REMOTE, Claim, Counted, Given, named, noise, shell

from phi4edge.core.errors import MissingToolError, TargetError, UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.transports import _adb_client, _adb_files, adb
from phi4edge.transports._api import Address


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path_factory.mktemp("adb"), patch) as server:
        yield server


@pytest.fixture(scope="module")
def phone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    phone = Phone(tmp_path_factory.mktemp("phone"))
    with phones(phone):
        yield phone


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A server that sees nothing yet."""
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path / "alone", patch):
        yield


@pytest.mark.parametrize("claim", [*CONTRACT, *REMOTE], ids=named)
def test_contract(claim: Claim, phone: Phone, tmp_path: Path) -> None:
    folder = str(phone.data / claim.__name__ / "our folder")

    def again() -> adb.AdbDevice:
        return adb.open(phone.address(folder=folder))

    local = tmp_path / "local"
    local.mkdir()
    with again() as device:
        claim(Given(device, again, local))


# --- which device -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_no_device_is_an_error_that_says_what_to_turn_on() -> None:
    with pytest.raises(MissingToolError, match="no device") as caught:
        adb.open(Address())
    assert "USB debugging" in str(caught.value.hint)
    with pytest.raises(MissingToolError, match="R5CT: adb sees no such device"):
        adb.open(Address("R5CT"))
    with pytest.raises(MissingToolError, match="refused"):
        adb.open(Address("127.0.0.1:1"))


@pytest.mark.usefixtures("alone")
def test_only_device_needs_no_name_and_of_two_one_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Phone(tmp_path / "1"), Phone(tmp_path / "2", ("--model", "SM_S921B"))
    with phones(one, two):
        with adb.open(one.address()):
            pass
        with adb.open(Address()) as device:  # in Android's usual place
            assert device.name == f"Pixel 9 ({one.serial})"
            assert str(device.folder) == str(one.data / "phi4edge")
        with adb.open(two.address()) as device:
            assert device.name == f"SM S921B ({two.serial})"
        with pytest.raises(UsageError, match="2 devices") as caught:
            adb.open(Address())
        assert f"Pixel 9 ({one.serial})" in str(caught.value.hint)
        assert f"SM S921B ({two.serial})" in str(caught.value.hint)
        monkeypatch.setenv("ANDROID_SERIAL", two.serial)
        with adb.open(Address()) as device:
            assert device.name == f"SM S921B ({two.serial})"


@pytest.mark.usefixtures("alone")
def test_device_that_does_not_trust_us_is_an_error_that_says_what_to_accept(tmp_path: Path) -> None:
    phone = Phone(tmp_path / "1", ("--auth", "unauthorized"))
    with phones(phone):
        for address in (phone.address(), Address()):
            with pytest.raises(MissingToolError, match="unauthorized") as caught:
                adb.open(address)
            assert "Allow USB debugging?" in str(caught.value.hint)


@pytest.mark.usefixtures("alone")
def test_device_that_is_silent_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phone = Phone(tmp_path / "1", ("--auth", "silent"))
    monkeypatch.setattr(_adb_client, "CONNECT_S", 1.0)
    monkeypatch.setattr(_adb_client, "SETTLE_S", 0.3)
    with phones(phone):
        with pytest.raises(MissingToolError, match="no answer within 1 s"):
            adb.open(phone.address())
        with pytest.raises(MissingToolError, match="offline") as caught:
            adb.open(Address())
        assert "plug it in again" in str(caught.value.hint)


def test_states_are_read_as_adb_lists_them() -> None:
    groups = "no permissions (missing udev rules? user is in the plugdev group); see [http://developer.android.com]"
    for line, serial, state, model in (
        ("0011664BC00243         unauthorized usb:2-1 transport_id:12", "0011664BC00243", "unauthorized", None),
        (
            "emu-5554  device product:x model:Pixel_8_Pro device:husky transport_id:1",
            "emu-5554",
            "device",
            "Pixel 8 Pro",
        ),
        (f"R5CT\t{groups} usb:1-4 transport_id:3", "R5CT", groups, None),
        ("192.168.1.7:5555\toffline", "192.168.1.7:5555", "offline", None),
    ):
        match = _adb_client._LISTED.fullmatch(line)
        assert match is not None
        assert _adb_client._listed(match) == _adb_client.Listed(serial, state, model)


def test_options_are_those_of_adbs_server(server: Server, phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.port
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    for options in (("-P", str(port)), (f"-P {port}", "-H localhost")):
        with adb.open(Address(phone.serial, str(phone.data / "options"), options)) as device:
            assert shell(device, "echo here") == "here\n"
    for wrong in (("-s", "x"), ("-P",), ("-P 1 -H",), ("shell",)):
        with pytest.raises(UsageError, match="adb is given"):
            adb.open(Address(None, None, wrong))


def test_folder_is_named_from_the_root_and_can_be_made(phone: Phone) -> None:
    with pytest.raises(UsageError, match="not a folder on the device"):
        adb.open(phone.address(folder="phi4edge"))
    with pytest.raises(TargetError, match="cannot be made"):
        adb.open(phone.address(folder="/proc/phi4edge"))


def test_adb_is_the_users_own_before_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("adbutils", reason="adbutils is not installed")
    assert "adbutils" in _adb_client.find_adb().parts
    for folder in ("sdk/platform-tools", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        program = tmp_path / folder / "adb"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
        assert _adb_client.find_adb() == program
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ANDROID_HOME")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match="adb is not installed"):
        adb.open(Address())


def test_starting_needs_no_code_of_the_package() -> None:
    script = "import sys; from phi4edge.transports import adb; assert not {'adbutils', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- a connection that is lost ------------------------------------------------------------------------------

FOREVER = ["sh", "-c", "echo $$ >pid; while :; do sleep 1000; done"]


def pid_of(phone: Phone) -> int:
    """The number of FOREVER's shell, once it runs."""
    file = phone.data / "our folder" / "pid"
    eventually(lambda: file.is_file() and file.read_text().endswith("\n"))
    return int(file.read_text())


@pytest.mark.parametrize("how", ["server", "cable"])
def test_lost_connection_ends_the_program_on_the_device(how: str, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path / "adb", patch) as server, phones(phone):
        errors: list[TargetError] = []

        def run() -> None:
            try:
                device.run(FOREVER, timeout_s=60)
            except TargetError as error:
                errors.append(error)

        with adb.open(phone.address()) as device:
            thread = threading.Thread(target=run)
            thread.start()
            pid = pid_of(phone)
            server.kill() if how == "server" else phone.unplug()
            thread.join(10)
            assert not thread.is_alive()
            assert "connection was lost while sh ran" in str(errors[0])
            eventually(lambda: not alive(pid))
            with pytest.raises(TargetError, match=r"connection was lost|does not start"):
                device.run(["true"], timeout_s=10)
        with adb.open(phone.address()) as device:
            assert shell(device, "echo again") == "again\n"


def test_killed_process_leaves_nothing_behind_on_the_device(server: Server, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    script = (
        "import sys; from phi4edge.transports import adb; from phi4edge.transports._api import Address\n"
        "with adb.open(Address(*sys.argv[1:3])) as device, device.awake():\n"
        "    device.run(sys.argv[3:], timeout_s=60)"
    )
    with phones(phone):
        phone.set("5")
        words = [sys.executable, "-c", script, phone.serial, str(phone.data / "our folder"), *FOREVER]
        with subprocess.Popen(words) as process:
            pid = pid_of(phone)
            assert phone.setting() == "7"
            process.send_signal(signal.SIGKILL)
        eventually(lambda: not alive(pid))
        eventually(lambda: phone.setting() == "5")
        eventually(lambda: not list((phone.data / "our folder").glob(".phi4edge/running-*")))


@pytest.mark.parametrize("how", ["server", "cable"])
def test_interrupted_push_goes_on_from_where_it_stopped(how: str, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone", ("--rate", "4e6"))
    data = noise(8_000_000)
    (tmp_path / "model.gguf").write_bytes(data)
    remote = phone.data / "our folder" / "model.gguf"
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path / "adb", patch) as server, phones(phone):
        errors: list[TargetError] = []

        def push() -> None:
            try:
                device.push(tmp_path / "model.gguf", PurePosixPath("model.gguf"))
            except TargetError as error:
                errors.append(error)

        def sent() -> int:
            return sum(path.stat().st_size for path in remote.parent.glob(".*.partial"))

        with adb.open(phone.address()) as device:
            thread = threading.Thread(target=push)
            thread.start()
            eventually(lambda: sent() > 2_000_000)
            server.kill() if how == "server" else phone.unplug()
            thread.join(10)
            assert not thread.is_alive()
        assert "connection was lost" in str(errors[0])
        assert not remote.exists()
        with adb.open(phone.address()) as device:
            counted = Resumed()
            device.push(tmp_path / "model.gguf", PurePosixPath("model.gguf"), counted)
        assert remote.read_bytes() == data
        assert counted.begun >= 2_000_000
        assert counted.begun + counted.done == len(data)
        assert sent() == 0


class Resumed(Counted):
    """Also knows how much was there already."""

    begun = 0

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        super().start(stage, total, unit)
        self.begun = done


# --- files --------------------------------------------------------------------------------------------------


def test_what_is_no_beginning_of_the_file_is_not_taken_for_one(phone: Phone, tmp_path: Path) -> None:
    local = tmp_path / "model"
    with adb.open(phone.address()) as device:
        folder = Path(device.folder) / "beginnings"
        folder.mkdir()
        for bad in (b"something else", noise(200_000, seed=9), noise(100_000)[:-1] + b"?"):
            local.write_bytes(data := noise(100_000))
            prefix = f".{sha256_bytes(b'model')[:8]}-"
            (folder / f"{prefix}{sha256_bytes(data)[:16]}.partial").write_bytes(bad)
            (folder / f"{prefix}0123456789abcdef.partial").write_bytes(b"of another version")
            device.push(local, PurePosixPath("beginnings/model"))
            assert (folder / "model").read_bytes() == data
            assert [path.name for path in folder.iterdir()] == ["model"]


def test_folder_is_not_replaced_by_a_file(phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with adb.open(phone.address()) as device:
        shell(device, "mkdir -p taken/x")
        with pytest.raises(TargetError, match="a folder of that name"):
            device.push(tmp_path / "x", PurePosixPath("taken/x"))
        with pytest.raises(TargetError, match="taken: a folder"):
            device.pull(PurePosixPath("taken"), tmp_path / "y")


def test_pull_that_fails_here_leaves_nothing(phone: Phone, tmp_path: Path) -> None:
    with adb.open(phone.address()) as device:
        shell(device, "echo text >result")
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(TargetError, match="file"):
            device.pull(PurePosixPath("result"), tmp_path / "file" / "result")


def test_full_device_says_what_is_free_and_what_is_needed(server: Server, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare makes no mount namespace here")
    mount = (
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=6m none "$0" && exec "$@"',
        str(tmp_path / "phone/tmp"),
    )
    phone = Phone(tmp_path / "phone", ("--rate", "4e6"), prefix=mount)
    local = tmp_path / "model"
    with phones(phone), adb.open(phone.address()) as device:
        local.write_bytes(noise(8_000_000))
        with pytest.raises(TargetError, match="8000000 bytes needed") as caught:
            device.push(local, PurePosixPath("model"))
        free = re.search(r"(\d+) free", str(caught.value))
        assert free is not None
        assert 5_000_000 < int(free[1]) <= 6 * 1024 * 1024

        local.write_bytes(data := noise(4_000_000))  # fits, until another takes the room
        filler = threading.Timer(
            0.5, lambda: device.run(["sh", "-c", "head -c 4000000 /dev/zero >filler"], timeout_s=20)
        )
        filler.start()
        with pytest.raises(TargetError, match=r"no room for model: \d+ bytes needed"):
            device.push(local, PurePosixPath("model"))
        filler.join()
        shell(device, "rm filler")
        counted = Resumed()
        device.push(local, PurePosixPath("model"), counted)
        assert counted.begun > 0
        assert device.run(["cat", "model"], timeout_s=20).stdout == data


def test_dead_connection_is_noticed_while_a_file_is_sent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = Phone(tmp_path / "phone", ("--rate", "1e5"))
    monkeypatch.setattr(_adb_files, "STALLED_S", 1.0)
    (tmp_path / "model").write_bytes(noise(4_000_000))
    with phones(phone), adb.open(phone.address()) as device:
        start = time.monotonic()
        with pytest.raises(TargetError, match="nothing was taken for 1 s"):
            device.push(tmp_path / "model", PurePosixPath("model"))
        assert time.monotonic() - start < 20


def test_line_longer_than_adb_takes_goes_through_a_file(phone: Phone) -> None:
    words = [f"{n} it's" * 40 for n in range(500)]
    with adb.open(phone.address()) as device:
        done = device.run(["sh", "-c", 'printf "%s\\n" "$@"', "sh", *words], timeout_s=20)
        assert done.text.splitlines() == words
        assert len(list(Path(device.folder).glob(".phi4edge/*/line-*"))) == 1
    assert not list(Path(device.folder).glob(".phi4edge/*/line-*"))


# --- while it is measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["3", None])
def test_awake_restores_what_was_set(before: str | None, server: Server, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    with phones(phone), adb.open(phone.address()) as device:
        if before:
            phone.set(before)
        with device.awake():
            assert phone.setting() == "7"
        assert phone.setting() == before
        with pytest.raises(ZeroDivisionError), device.awake():
            raise ZeroDivisionError
        assert phone.setting() == before
        with device.awake():
            phone.unplug()
            eventually(lambda: phone.setting() == before)


def test_awake_says_that_the_device_refuses(server: Server, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    with phones(phone), adb.open(phone.address()) as device:
        (phone.folder / "bin" / "svc").write_text("#!/bin/sh\necho 'not allowed' >&2; exit 1\n")
        with pytest.raises(TargetError, match="not allowed"), device.awake():
            pytest.fail("it is not awake")


# --- before Android 7 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    phone = Phone(tmp_path_factory.mktemp("old"), ("--features", "", "--max-payload", "4096"))
    with phones(phone):
        yield phone


# What goes another way there.
ON_OLD = "words_arrive|bytes_are|exit_status|signal|time_limit|leaves_no_children|absolute_names|cleaning"


@pytest.mark.parametrize("claim", [claim for claim in CONTRACT if re.search(ON_OLD, named(claim))], ids=named)
def test_contract_before_android_7(claim: Claim, old: Phone, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    folder = str(old.data / claim.__name__ / "our folder")
    with adb.open(old.address(folder=folder)) as device:
        claim(Given(device, lambda: adb.open(old.address(folder=folder)), local))


def test_old_device_says_what_it_cannot(old: Phone) -> None:
    with adb.open(old.address()) as device:
        with pytest.raises(TargetError, match="does not start"):
            device.run(["no-such-program"], timeout_s=20)
        with pytest.raises(TargetError, match="cannot speak to a program"):
            device.start(["cat"], timeout_s=20)
        with device.awake():
            assert old.setting() == "2"
        assert old.setting() == "0"


def test_device_that_cannot_hash_is_read_back(server: Server, tmp_path: Path) -> None:
    if toybox() is None:
        pytest.skip("toybox or mksh is not installed")
    phone = Phone(tmp_path / "phone", ("--features", ""))
    (tmp_path / "x").write_bytes(noise(100_000))
    with phones(phone):
        (phone.folder / "bin" / "sha256sum").unlink()
        with adb.open(phone.address()) as device:
            device.push(tmp_path / "x", PurePosixPath("x"))
            device.pull(PurePosixPath("x"), tmp_path / "y")
        assert (tmp_path / "y").read_bytes() == (phone.data / "our folder" / "x").read_bytes() == noise(100_000)


def test_lost_connection_before_android_7_leaves_it_to_the_time_limit(tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone", ("--features", ""))
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path / "adb", patch) as server, phones(phone):
        with adb.open(phone.address()) as device:
            threading.Timer(1.0, server.kill).start()
            with pytest.raises(TargetError, match="connection was lost") as caught:
                device.run(FOREVER, timeout_s=4)
            assert "until its time limit" in str(caught.value.hint)
            pid = pid_of(phone)
        eventually(lambda: not alive(pid))
