"""Code that a model wrote can do nothing to the machine; whatever it tries, it has not passed."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from phi4edge.core.errors import MissingToolError
from phi4edge.measurement.tasks import sandbox
from phi4edge.measurement.tasks.sandbox import SandboxLimits, check_sandbox, run_program

LIMITS = SandboxLimits(wall_s=8, cpu_s=2)


@pytest.fixture(scope="module", autouse=True)
def _isolated() -> None:
    """Nothing below is run where the sandbox does not hold."""
    try:
        check_sandbox()
    except MissingToolError as error:
        pytest.skip(str(error))


def left_over() -> list[str]:
    return [p.info["name"] for p in psutil.process_iter(["name", "cmdline"]) if "_sandboxed.py" in str(p.info)]


@pytest.fixture(autouse=True)
def _nothing_remains() -> object:
    yield
    deadline = time.monotonic() + 5
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over() == []


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert run_program("import math\n\ndef area(r):\n    return math.pi * r * r\n\nassert 3 < area(1) < 4\n", LIMITS)
    assert not run_program("assert 1 + 1 == 3", LIMITS)
    assert not run_program("def f(:", LIMITS)


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "import os; os._exit(0)", "import os; os.kill(0, 9)"])
def test_an_end_before_the_tests_is_no_success(code: str) -> None:
    assert not run_program(f"{code}\nassert False", LIMITS)


def test_ten_gigabytes_are_not_to_be_had() -> None:
    assert not run_program("data = bytearray(10 * 2**30)", LIMITS)
    assert run_program("try:\n    bytearray(10 * 2**30)\nexcept MemoryError:\n    pass", LIMITS)


def test_an_endless_loop_ends_with_its_processor_seconds() -> None:
    began = time.monotonic()
    assert not run_program("while True:\n    pass", SandboxLimits(wall_s=60, cpu_s=1))
    assert time.monotonic() - began < 40


def test_a_sleeper_ends_with_the_wall_time_and_its_children_too() -> None:
    began = time.monotonic()
    code = "import os, time\nos.fork()\nos.setsid() if os.getpid() > 2 else None\ntime.sleep(300)"
    assert not run_program(code, SandboxLimits(wall_s=1.5))
    assert time.monotonic() - began < 10


def test_a_fork_bomb_runs_into_its_limit() -> None:
    bomb = "import os\nwhile True:\n    os.fork()"
    assert not run_program(bomb, SandboxLimits(wall_s=4, cpu_s=1))
    counted = (
        "import os, time\nmade = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "        made += 1\nexcept BlockingIOError:\n    assert made <= 6, made"
    )
    assert run_program(counted, LIMITS)  # the kernel refuses the next one


def test_no_network_can_be_reached_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (server.getsockname(), ("192.0.2.1", 80)):
            connect = f"import socket\nassert socket.socket().connect_ex({address!r}) == "
            assert run_program(f"{connect}{errno.ENETUNREACH}", LIMITS)
            assert not run_program(f"{connect}0", LIMITS)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that anybody may write to, in none of the places that are covered."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_nothing_is_written_outside_of_its_folder(open_to_all: Path) -> None:
    for folder in (open_to_all, Path.home(), Path("/tmp"), Path("/dev/shm"), Path("/var/tmp")):
        target = folder / "written-by-a-model"
        run_program(f"open({str(target)!r}, 'w').write('x')", LIMITS)
        assert not target.exists()
    own = "import os\nassert os.listdir('.') == []\nopen('a', 'w').write('x')\nassert os.environ['HOME'] == os.getcwd()"
    assert run_program(own, LIMITS)
    assert not run_program("open('a', 'wb').write(bytes(20 * 2**20))", LIMITS)


def test_the_parent_s_environment_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_TEST_SECRET", "hunter2")
    assert run_program("import os\nassert 'hunter2' not in str(dict(os.environ))", LIMITS)
    read = f"import os\nopen('/proc/{os.getpid()}/environ', 'rb').read()"
    assert not run_program(read, LIMITS)
    assert run_program("import os\nassert os.listdir('/proc') == []", LIMITS)


def test_the_parent_cannot_be_killed() -> None:
    code = (
        f"import os\nfor pid in ({os.getpid()}, {os.getppid()}, os.getppid(), 1, -1):\n"
        "    try:\n        os.kill(pid, 9)\n    except ProcessLookupError:\n        pass\n"
    )
    assert run_program(code, LIMITS)  # the signals reached nobody: this process goes on


def test_a_capability_cannot_be_won_back() -> None:
    remount = "assert libc.mount(None, b'/', None, 32 | 4096, None) != 0\n"  # MS_REMOUNT | MS_BIND, writable
    code = f"import ctypes, os\nlibc = ctypes.CDLL(None)\nassert os.getuid() != 0\n{remount}"
    assert run_program(f"{code}libc.unshare(0x10000000 | 0x00020000)\n{remount}", LIMITS)


def test_nothing_is_run_where_the_machine_isolates_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_sandboxed.py"
    source = Path(sandbox._sandboxed.__file__).read_text()
    broken.write_text(source.replace("_NEWNET = (", "_NEWNET = _wrong = (").replace("0x40000000,", "0x40000001,"))
    monkeypatch.setattr(sandbox._sandboxed, "__file__", str(broken))
    with pytest.raises(MissingToolError, match="cannot isolate code that a model wrote: unshare"):
        check_sandbox()
