"""What every transport promises, as claims that a test of any of them runs on a device that it has.

A test module makes a :class:`Given` for its transport (a device, a way to open it once more, an empty folder on this
side) and runs each function of :data:`CONTRACT` with it::

    @pytest.mark.parametrize("claim", CONTRACT, ids=named)
    def test_contract(claim: Claim, given: Given) -> None:
        claim(given)

:data:`REMOTE` is for transports whose files go over a connection. The device needs a POSIX shell with cat and sleep.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest

from phi4edge.core.errors import TargetError, UsageError
from phi4edge.core.events import Progress
from phi4edge.transports import _folder
from phi4edge.transports._api import Device

NASTY = (
    "", " ", " a  b ", "it's", '"quoted"', "$HOME", "`id`", "$(id)", "a\nb\n", "\\", "\\\\'\\'", "naïve ✓ 日本", "*",
    "~", "-n", "!x", "%s\\n", "=ls", "a;b&c|d", "{a,b}", "#c", "(x)", "^a", "\t", "--", "x=y", "\r", "\x01\x7f",
)  # fmt: skip
NASTY_NAMES = ('it\'s "$HOME" `id`.bin', "naïve ✓ 日本 *?[x]{a,b}", "a\nb\\c", "-n")


@dataclass
class Given:
    """A device to test, and where its files may come from."""

    device: Device
    again: Callable[[], Device]  # the same device, opened once more
    local: Path  # an empty folder on this side


Claim = Callable[[Given], None]


def named(claim: Claim) -> str:
    """The name of a claim, for pytest."""
    return claim.__name__


@dataclass
class Counted(Progress):
    """Counts what is reported."""

    total: int = 0
    done: int = 0
    units: set[str] = field(default_factory=set)

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.total, self.done = total, done
        self.units.add(unit)

    def advance(self, count: int = 1) -> None:
        self.done += count


def shell(device: Device, script: str, *words: str, timeout_s: float = 20, stdin: bytes = b"") -> str:
    """What a script says on the device, which has to succeed."""
    done = device.run(["sh", "-c", script, "sh", *words], timeout_s=timeout_s, stdin=stdin)
    assert done.code == 0, done
    return done.text


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of every value."""
    return random.Random(seed).randbytes(nbytes)


def alive(device: Device, *pids: str) -> list[str]:
    """Which processes are still there; one that has ended and was not yet waited for is not."""
    script = 'for p; do case $(ps -o stat= -p "$p" 2>/dev/null | tr -d " \\n") in ""|Z*) ;; *) echo "$p" ;; esac; done'
    return shell(device, script, *pids).split()


def none_alive(device: Device, *pids: str, within_s: float = 5) -> bool:
    """Whether all of them are gone, or are soon."""
    deadline = time.monotonic() + within_s
    while left := alive(device, *pids):
        if time.monotonic() > deadline:
            raise AssertionError(f"still running: {left}")
        time.sleep(0.05)
    return True


# A program with a child and a grandchild, their numbers in a file; none of them reads stdin or ends by itself.
FAMILY = '(sleep 300 & echo $! >>"$1"; exec sleep 301) & echo $! >>"$1"; echo $$ >>"$1"; '
FAMILY += 'until [ "$(wc -l <"$1")" -eq 3 ]; do sleep 0.05; done; echo up; while :; do sleep 302; done'


# --- programs -----------------------------------------------------------------------------------------------


def folder_is_absolute_and_there(given: Given) -> None:
    assert given.device.folder.is_absolute()
    assert shell(given.device, "pwd -P").rstrip("\n") == str(given.device.folder)


def words_arrive_as_they_are(given: Given) -> None:
    said = given.device.run(["sh", "-c", 'for w; do printf "%s\\0" "$w"; done', "sh", *NASTY], timeout_s=20)
    assert said.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in NASTY]
    assert (said.code, said.stderr) == (0, b"")


def environment_arrives_as_it_is(given: Given) -> None:
    environment = {f"A_b{n}": value for n, value in enumerate(NASTY)}
    script = "".join(f'printf "%s\\0" "${name}"; ' for name in environment)
    done = given.device.run(["sh", "-c", script], timeout_s=20, environment=environment)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(value) for value in NASTY]


def bytes_are_exact(given: Given) -> None:
    data = noise(300_001)
    done = given.device.run(["sh", "-c", "cat; cat >&2", "sh"], timeout_s=20, stdin=data)
    assert (done.stdout, done.stderr) == (data, b"")
    done = given.device.run(["sh", "-c", "cat >&2"], timeout_s=20, stdin=data)
    assert (done.stdout, done.stderr) == (b"", data)


def exit_status_is_the_programs(given: Given) -> None:
    for code in (0, 1, 126, 127, 137, 255):
        done = given.device.run(["sh", "-c", f"echo out; echo err >&2; exit {code}"], timeout_s=20)
        assert (done.code, done.stdout, done.stderr) == (code, b"out\n", b"err\n")


def signal_is_told_by_the_exit_status(given: Given) -> None:
    for signal in (9, 15):
        assert given.device.run(["sh", "-c", f"kill -{signal} $$"], timeout_s=20).code == 128 + signal


def missing_program_is_an_error(given: Given) -> None:
    for program in ("no-such-program", "./no-such-program", "no such 'program'"):
        with pytest.raises(TargetError, match="does not start"):
            given.device.run([program], timeout_s=20)
        with pytest.raises(TargetError, match="does not start"):
            given.device.start([program], timeout_s=20)


def stdin_that_nobody_reads_is_no_error(given: Given) -> None:
    assert given.device.run(["true"], timeout_s=20, stdin=noise(1 << 20)).code == 0


def time_limit_ends_the_whole_family(given: Given) -> None:
    start = time.monotonic()
    with pytest.raises(TargetError, match="took longer than 1 s"):
        given.device.run(["sh", "-c", FAMILY, "sh", "family"], timeout_s=1)
    assert time.monotonic() - start < 8
    pids = shell(given.device, "cat family").split()
    assert len(pids) == 3
    assert none_alive(given.device, *pids)


def program_that_ends_leaves_no_children(given: Given) -> None:
    pid = shell(given.device, "sleep 300 >/dev/null 2>&1 </dev/null & echo $!").strip()
    assert none_alive(given.device, pid)


# --- streams ------------------------------------------------------------------------------------------------


def stream_carries_bytes_both_ways(given: Given) -> None:
    stream = given.device.start(["cat"], timeout_s=30)
    try:
        for size, seed in ((1, 1), (70_000, 2), (3, 3)):
            data = noise(size, seed)
            stream.stdin.write(data)
            stream.stdin.flush()
            assert stream.stdout.read(size) == data
        stream.stdin.close()
        assert stream.stdout.read() == b""
        assert stream.wait(10) == 0
    finally:
        stream.close()


def stream_tells_its_status_and_last_words(given: Given) -> None:
    stream = given.device.start(["sh", "-c", "echo one >&2; echo two >&2; read x; exit 255"], timeout_s=30)
    try:
        deadline = time.monotonic() + 10
        while stream.last_words() != "two":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(TargetError, match="has not ended"):
            stream.wait(0.05)
        stream.stdin.write(b"go\n")
        stream.stdin.flush()
        assert stream.wait(10) == 255
        assert stream.last_words() == "two"
    finally:
        stream.close()


def closing_a_stream_ends_the_whole_family(given: Given) -> None:
    stream = given.device.start(["sh", "-c", FAMILY, "sh", "family"], timeout_s=60)
    assert stream.stdout.readline() == b"up\n"
    stream.close()
    stream.close()  # once more does nothing
    pids = shell(given.device, "cat family").split()
    assert len(pids) == 3
    assert none_alive(given.device, *pids)


def programs_run_beside_each_other(given: Given) -> None:
    streams = [given.device.start(["cat"], timeout_s=30) for _ in range(3)]
    try:
        for n, stream in enumerate(streams):
            stream.stdin.write(b"%d\n" % n)
            stream.stdin.flush()
        assert shell(given.device, "echo fourth") == "fourth\n"
        assert [stream.stdout.readline() for stream in streams] == [b"0\n", b"1\n", b"2\n"]
    finally:
        for stream in streams:
            stream.close()


# --- files --------------------------------------------------------------------------------------------------


def file_arrives_whole_with_its_mode(given: Given) -> None:
    local = given.local / "runner"
    for data, mode in ((noise(1_500_000), 0o755), (b"", 0o644), (b"x", 0o600)):
        local.write_bytes(data)
        local.chmod(mode)
        given.device.push(local, PurePosixPath("bin/deep/runner"))
        done = given.device.run(["cat", "bin/deep/runner"], timeout_s=20)
        assert done.stdout == data
        assert shell(given.device, "ls -A bin/deep").split() == ["runner"]
        assert shell(given.device, "ls -l bin/deep/runner")[:10] == mode_words(mode)
        back = given.local / "back" / "runner"
        given.device.pull(PurePosixPath("bin/deep/runner"), back)
        assert back.read_bytes() == data
        assert back.stat().st_mode & 0o777 == mode
        assert [path.name for path in back.parent.iterdir()] == ["runner"]


def mode_words(mode: int) -> str:
    """``mode`` as ls shows it."""
    return "-" + "".join(letter if mode >> (8 - i) & 1 else "-" for i, letter in enumerate("rwxrwxrwx"))


def names_may_have_any_character(given: Given) -> None:
    for name in NASTY_NAMES:
        local = given.local / name
        local.write_bytes(name.encode())
        given.device.push(local, PurePosixPath(name) / name)
        given.device.pull(PurePosixPath(name) / name, given.local / "back")
        assert (given.local / "back").read_bytes() == name.encode()
        assert shell(given.device, 'cat -- "./$1/$1"', name) == name
        local.unlink()


def absolute_names_are_taken_as_they_are(given: Given) -> None:
    (given.local / "x").write_bytes(b"absolute")
    given.device.push(given.local / "x", given.device.folder / "there")
    assert shell(given.device, "cat there") == "absolute"


def missing_file_is_an_error(given: Given) -> None:
    with pytest.raises(TargetError, match="absent"):
        given.device.pull(PurePosixPath("absent"), given.local / "absent")
    assert list(given.local.iterdir()) == []


def link_is_fetched_as_its_file(given: Given) -> None:
    shell(given.device, "printf text >file; chmod 640 file; ln -s file link")
    given.device.pull(PurePosixPath("link"), given.local / "back")
    assert (given.local / "back").read_bytes() == b"text"
    assert (given.local / "back").stat().st_mode & 0o777 == 0o640
    assert not (given.local / "back").is_symlink()


def files_are_sent_once(given: Given) -> None:
    device, model, program = given.device, given.local / "model", given.local / "program"
    model.write_bytes(noise(200_000))
    program.write_bytes(b"#!/bin/sh\necho run\n")
    program.chmod(0o755)
    files = {"models/m 1.gguf": model, "bin/program": program}
    assert _folder.send(device, files) == ("models/m 1.gguf", "bin/program")
    assert _folder.send(device, files) == ()
    assert device.run(["bin/program"], timeout_s=20).text == "run\n"
    model.write_bytes(noise(200_000, seed=1))
    assert _folder.send(device, files) == ("models/m 1.gguf",)
    assert device.run(["cat", "models/m 1.gguf"], timeout_s=20).stdout == model.read_bytes()


def file_that_was_changed_or_lost_there_is_sent_again(given: Given) -> None:
    device, model = given.device, given.local / "model"
    model.write_bytes(noise(1000))
    assert _folder.send(device, {"m": model}) == ("m",)
    shell(device, "printf x | dd of=m bs=1 conv=notrunc 2>/dev/null")  # the same size
    assert _folder.send(device, {"m": model}) == ("m",)
    shell(device, "rm m")
    assert _folder.send(device, {"m": model}) == ("m",)
    shell(device, "cp m other && mv other m")  # not ours any more by its stamp, but the same
    assert _folder.send(device, {"m": model}) == ()
    shell(device, "printf '{' >.phi4edge/files.json")  # what was known is lost, the files are not
    assert _folder.send(device, {"m": model}) == ()


def files_outside_the_folder_are_not_sent(given: Given) -> None:
    (given.local / "x").write_bytes(b"x")
    for name in ("../x", "/x", "a/../../x", "", ".", ".phi4edge/x"):
        with pytest.raises(UsageError):
            _folder.send(given.device, {name: given.local / "x"})


def cleaning_removes_what_is_ours_and_nothing_else(given: Given) -> None:
    device = given.device
    (given.local / "x").write_bytes(b"x")
    shell(device, 'mkdir -p "$1" && echo precious >"$1/kept"', f"{device.folder}-outside")
    _folder.send(device, {"a b/x": given.local / "x"})
    shell(device, 'echo out >result.json; ln -s "$1" link; ln -s "$1/kept" file', f"{device.folder}-outside")
    removed = _folder.clean(device)
    assert removed == tuple(device.folder / name for name in ("a b/x", "file", "link", "result.json"))
    with given.again() as other:
        listed = shell(other, 'cat "$1/kept"; ls -A "$2"', f"{device.folder}-outside", str(other.folder))
        assert listed in ("precious\n", "precious\n.phi4edge\n")


def folder_without_our_mark_is_left_alone(given: Given) -> None:
    device = given.device
    (given.local / "x").write_bytes(b"x")
    shell(device, "echo precious >kept; rm -f .phi4edge/ours")
    assert _folder.clean(device) == ()
    with pytest.raises(UsageError, match="not made by phi4edge"):
        _folder.send(device, {"x": given.local / "x"})
    assert shell(device, "ls; cat kept") == "kept\nprecious\n"


CONTRACT: tuple[Claim, ...] = (
    folder_is_absolute_and_there,
    words_arrive_as_they_are,
    environment_arrives_as_it_is,
    bytes_are_exact,
    exit_status_is_the_programs,
    signal_is_told_by_the_exit_status,
    missing_program_is_an_error,
    stdin_that_nobody_reads_is_no_error,
    time_limit_ends_the_whole_family,
    program_that_ends_leaves_no_children,
    stream_carries_bytes_both_ways,
    stream_tells_its_status_and_last_words,
    closing_a_stream_ends_the_whole_family,
    programs_run_beside_each_other,
    file_arrives_whole_with_its_mode,
    names_may_have_any_character,
    absolute_names_are_taken_as_they_are,
    missing_file_is_an_error,
    link_is_fetched_as_its_file,
    files_are_sent_once,
    file_that_was_changed_or_lost_there_is_sent_again,
    files_outside_the_folder_are_not_sent,
    cleaning_removes_what_is_ours_and_nothing_else,
    folder_without_our_mark_is_left_alone,
)


# --- files over a connection --------------------------------------------------------------------------------


def progress_counts_the_bytes(given: Given) -> None:
    local, counted = given.local / "x", Counted()
    local.write_bytes(noise(3_000_001))
    given.device.push(local, PurePosixPath("x"), counted)
    assert (counted.total, counted.done, counted.units) == (3_000_001, 3_000_001, {"B"})
    counted = Counted()
    given.device.pull(PurePosixPath("x"), given.local / "y", counted)
    assert (counted.total, counted.done, counted.units) == (3_000_001, 3_000_001, {"B"})


REMOTE: tuple[Claim, ...] = (progress_counts_the_bytes,)
