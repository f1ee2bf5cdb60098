"""The inside of the sandbox: ``python -I -S -B _sandboxed.py`` with a request on stdin; the outside is sandbox.py.

A stage is a process, each with less than the one before:

    outer    drops root (to nobody), takes namespaces of its own: user, mount, process, network, IPC, host name
    first    process 1 of the new ones: every mount is read-only, /proc, /run, /dev/shm and the temporary folders are
             empty, the working folder is a small file system in RAM, no capability is left; it waits for the next one,
             and with its end the kernel ends whatever else runs in there
    program  resource limits, no standard streams, then the code

A program has passed when it came to its end and said the word of its request: exit() before the tests is no success.
"""

from __future__ import annotations

__all__ = ["main"]

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_PASSED, _FAILED, _NOT_ISOLATED = 0, 1, 97
_NOBODY = 65534
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 1, 2, 4, 16384, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1  # 442 on every architecture
_PDEATHSIG, _DUMPABLE, _NO_NEW_PRIVS = 1, 4, 38  # prctl's
_COVERED = ("/proc", "/run", "/tmp", "/var/tmp", "/dev/shm", "/dev/pts", "/dev/mqueue")
_WORKING = ("/tmp", "/var/tmp", "/mnt", "/media")  # the first that Python itself is not in
_PRELOADED = (
    "abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "dataclasses",
    "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "math", "numbers",
    "operator", "queue", "random", "re", "socket", "statistics", "string", "struct", "subprocess", "textwrap",
    "threading", "time", "traceback", "types", "typing", "unicodedata", "zlib",
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def main() -> None:
    """Run the program of the request on stdin; the exit code says how it ended."""
    request = json.load(sys.stdin)
    for name in _PRELOADED:  # where Python lies in root's home, nobody cannot import anything later
        importlib.import_module(name)
    try:
        _write("/proc/self/oom_score_adj", "1000")  # where memory runs out all the same, this goes first
        _new_namespaces()
        _prctl(_PDEATHSIG, signal.SIGKILL)
        first = os.fork()
    except OSError as error:
        _not_isolated(error)
    if first == 0:
        _first(request)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)


def _not_isolated(error: OSError) -> NoReturn:
    os.write(2, f"{error.strerror}\n".encode())
    os._exit(_NOT_ISOLATED)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _new_namespaces() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _prctl(_DUMPABLE, 1)  # or /proc/self would stay root's
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")


def _first(request: dict[str, Any]) -> NoReturn:
    try:
        _prctl(_PDEATHSIG, signal.SIGKILL)
        _close_filesystem(request["limits"]["disk_bytes"])
        _drop_capabilities()
        said, word = os.pipe()
        program = os.fork()
    except OSError as error:
        _not_isolated(error)
    if program == 0:
        os.close(said)
        _program(request, word)
    os.close(word)
    _prctl(_DUMPABLE, 0)  # the program must not be able to trace this process
    os.waitpid(program, 0)
    os.set_blocking(said, False)
    try:
        passed = os.read(said, 256) == request["word"].encode()
    except BlockingIOError:  # a child of the program's lives on and holds the pipe
        passed = False
    os._exit(_PASSED if passed else _FAILED)


class _MountAttributes(ctypes.Structure):
    """struct mount_attr of linux/mount.h."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _close_filesystem(disk_bytes: int) -> None:
    def holds_python(place: str) -> bool:
        return f"{os.path.realpath(sys.base_prefix)}/".startswith(f"{place}/")

    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    attributes = _MountAttributes(_ATTR_RDONLY, 0, 0, 0)
    _call(
        "syscall", ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), b"/", ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip
    working = next((p for p in _WORKING if Path(p).is_dir() and not holds_python(p)), None)
    if working is None:
        raise OSError(0, "there is no folder to work in")
    covered = {os.path.realpath(place) for place in _COVERED if Path(place).is_dir() and not holds_python(place)}
    for place in sorted(covered - {working}):
        _mount("tmpfs", place, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k,nr_inodes=2,mode=0555")
    _mount("tmpfs", working, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_bytes},nr_inodes=1000,mode=0700")
    os.chdir(working)
    os.environ["HOME"] = os.environ["TMPDIR"] = working


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    try:
        _call("mount", *words[:3], ctypes.c_ulong(flags), words[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from error


def _drop_capabilities() -> None:
    _prctl(_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _program(request: dict[str, Any], word: int) -> NoReturn:
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for descriptor in range(3, 256):
            if descriptor != word:
                _close(descriptor)
        limits = request["limits"]
        for name, value in (
            ("CPU", limits["cpu_s"]), ("AS", limits["memory_bytes"]), ("FSIZE", limits["disk_bytes"]),
            ("NPROC", limits["processes"]), ("NOFILE", 64), ("CORE", 0),
        ):  # fmt: skip
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        exec(compile(request["program"], "<answer>", "exec"), {"__name__": "answer"})
        os.write(word, request["word"].encode())
    except BaseException:  # noqa: BLE001  whatever it raises, it did not pass
        os._exit(_FAILED)
    os._exit(_PASSED)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return  # it was not open


if __name__ == "__main__":
    main()
