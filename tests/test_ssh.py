"""What is ssh's own: its errors in people's words, what a lost connection leaves, shells and tools that differ."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import psutil
import pytest
from ssh_support import AsyncSsh, Keys, OpenSsh, Server, free_port, need, new_key, serving
from transport_contract import FAMILY, NASTY, Counted, noise, none_alive, shell

from phi4edge.core.errors import MissingToolError, Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT
from phi4edge.transports import _folder, _ssh_files, ssh
from phi4edge.transports._api import Address, load_transport
from phi4edge.transports._shell import guard_line, keeper_line, program_stderr, quote


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    need("ssh", "ssh-keygen")
    return Keys(tmp_path_factory.mktemp("ssh") / "keys")


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    """After each test, neither a program nor what watches over it: both have the device's folder among their words."""
    yield
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if _is_of(p, str(tmp_path))])


def _is_of(process: psutil.Process, folder: str) -> bool:
    words = process.info["cmdline"] or []
    return words[:2] == ["sh", "-c"] and any(word.startswith(folder) for word in words)


@pytest.fixture(params=[OpenSsh, AsyncSsh])
def server(request: pytest.FixtureRequest, keys: Keys, tmp_path: Path) -> Iterator[Server]:
    """A server of either kind, which the test may kill."""
    with serving(request.param(keys, tmp_path / "server")) as running:
        yield running


@pytest.fixture
def openssh(keys: Keys, tmp_path: Path) -> Iterator[OpenSsh]:
    with serving(OpenSsh(keys, tmp_path / "server")) as running:
        assert isinstance(running, OpenSsh)
        yield running


# What a device is asked for, beside a shell: the tools of POSIX, and those that it may have.
TOOLS = (
    *(
        "sh",
        "cat",
        "chmod",
        "cut",
        "dd",
        "df",
        "awk",
        "head",
        "ls",
        "mkdir",
        "mv",
        "ps",
        "rm",
        "rmdir",
        "sleep",
        "tail",
    ),
    *("wc", "which", "perl", "env", "true", "rsync", "setsid", "sha256sum", "shasum", "openssl", "stat", "timeout"),
)


def tools_but(folder: Path, *missing: str) -> str:
    """A PATH that has nothing but TOOLS, and of these not ``missing``."""
    folder.mkdir()
    for tool in set(TOOLS) - set(missing):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def alive_here(pid: int) -> bool:
    """Whether a process of this machine, which is the device too, still runs."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- errors -------------------------------------------------------------------------------------------------


def refusal(address: Address) -> Phi4EdgeError:
    with pytest.raises(Phi4EdgeError) as caught:
        ssh.open(address)
    assert caught.value.hint
    return caught.value


def test_ssh_is_a_transport() -> None:
    assert load_transport("ssh").DESCRIPTION == ssh.DESCRIPTION


@pytest.mark.parametrize("place", [None, "", "-oProxyCommand=x", "a b", "host:", "host:x", "user@", "http://host"])
def test_address_that_is_none_is_a_usage_error(place: str | None) -> None:
    assert isinstance(refusal(Address(place)), UsageError)


def test_unknown_host_says_so() -> None:
    error = refusal(Address("no-such-host.invalid", options=("-F", "/dev/null")))
    assert isinstance(error, MissingToolError)
    assert "no such host" in error.message


def test_refused_connection_says_so() -> None:
    error = refusal(Address(f"127.0.0.1:{free_port()}", options=("-F", "/dev/null")))
    assert isinstance(error, MissingToolError)
    assert "no ssh server answers" in error.message


def test_silent_host_times_out(keys: Keys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        error = refusal(Address(place, options=("-F", "/dev/null", "-o", "ConnectTimeout=1")))
    assert "cannot be reached" in error.message


def test_wrong_option_is_a_usage_error(openssh: OpenSsh) -> None:
    error = refusal(openssh.address("-o", "NoSuchOption=1"))
    assert isinstance(error, UsageError)
    assert "nosuchoption" in error.message.lower()


def test_settings_are_told_as_in_ssh_config_or_as_words_for_ssh(openssh: OpenSsh) -> None:
    known, key = str(openssh.known_hosts), str(openssh.keys.user)
    options = ("-F", "/dev/null", f"UserKnownHostsFile={known}", f"IdentityFile={key}", "IdentitiesOnly=yes")
    with ssh.open(Address("127.0.0.1", options=(*options, f"Port={openssh.port}"))) as device:
        assert device.run(["echo", "here"], timeout_s=20).text == "here\n"
    error = refusal(openssh.address("2222"))
    assert isinstance(error, UsageError)
    assert "KEY=VALUE" in str(error.hint)


def test_refused_key_says_what_to_do(openssh: OpenSsh, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other")
    options = tuple(str(other) if word == str(openssh.keys.user) else word for word in openssh.options)
    error = refusal(Address(f"127.0.0.1:{openssh.port}", options=options))
    assert isinstance(error, MissingToolError)
    assert "refuses our key" in error.message
    assert "ssh-copy-id" in str(error.hint)


def test_unknown_host_key_is_not_accepted(openssh: OpenSsh) -> None:
    openssh.known_hosts.write_text("")
    error = refusal(openssh.address())
    assert isinstance(error, MissingToolError)
    assert "host key is not known" in error.message
    assert openssh.known_hosts.read_text() == ""


def test_changed_host_key_names_the_line_and_is_not_accepted(openssh: OpenSsh, tmp_path: Path) -> None:
    openssh.keys.known_hosts(openssh.known_hosts, openssh.port, new_key(tmp_path / "other"))
    before = "# a remark\n" + openssh.known_hosts.read_text()
    openssh.known_hosts.write_text(before)
    error = refusal(openssh.address())
    assert isinstance(error, MissingToolError)
    assert f"line 2 of {openssh.known_hosts}" in error.message
    assert openssh.known_hosts.read_text() == before


def test_folder_that_cannot_be_made_is_an_error(openssh: OpenSsh) -> None:
    (openssh.folder / "file").write_text("")
    error = refusal(openssh.address(folder=str(openssh.folder / "file" / "below")))
    assert isinstance(error, TargetError)
    assert "cannot be made" in error.message


# --- what differs from device to device ---------------------------------------------------------------------


@pytest.mark.parametrize("login", ["dash", "bash", "zsh", "mksh", "fish", "busybox sh"])
def test_words_arrive_through_every_login_shell(login: str, tmp_path: Path) -> None:
    """The lines themselves, as sshd hands them to a login shell."""
    need(login.split()[0])
    keeper, word, folder = "keeper-1", "program-1", tmp_path / "it's a folder"
    start = [*login.split(), "-c"]
    line = keeper_line(keeper, str(folder))
    with subprocess.Popen([*start, line], stdin=-1, stdout=-1, start_new_session=True) as keeping:
        assert keeping.stdin is not None
        assert keeping.stdout is not None
        while b"ready" not in keeping.stdout.readline():
            pass
        script = 'for w; do printf "%s\\0" "$w"; done; printf "%s\\0" "$A"; kill -9 $$'
        line = guard_line(
            ["sh", "-c", script, "sh", *NASTY],
            {"A": "\\v'\n$x"},
            word=word,
            timeout_s=9.5,
            folder=str(folder),
            keeper=keeper,
        )
        done = subprocess.run([*start, line], capture_output=True, start_new_session=True)
        keeping.stdin.close()
    said = done.stdout.removeprefix(f"{word} start\n".encode()).split(b"\0")
    assert said == [*map(os.fsencode, [*NASTY, "\\v'\n$x"]), b""]
    ended = program_stderr(done.stderr, word)
    assert (ended.code, ended.stderr, ended.limit) == (137, b"", False)
    assert not list((folder / ".phi4edge").glob("running*"))


def test_plain_words_stay_readable() -> None:
    assert [quote(word) for word in ("/usr/bin/x", "a b", "=x")] == ["/usr/bin/x", "'a b'", "'=x'"]


@pytest.mark.parametrize("settings", [("MaxSessions 1",), ('ForceCommand echo noise; eval "$SSH_ORIGINAL_COMMAND"',)])
def test_server_of_other_habits_is_used_all_the_same(settings: tuple[str, ...], keys: Keys, tmp_path: Path) -> None:
    """One that refuses a second session on a connection, and one whose login shell speaks."""
    (tmp_path / "x").write_bytes(noise(100_000))
    with serving(OpenSsh(keys, tmp_path / "server", settings=settings)) as server, ssh.open(server.address()) as device:
        done = device.run(["sh", "-c", "printf out; printf err >&2; exit 255"], timeout_s=20)
        assert (done.code, done.stdout, done.stderr) == (255, b"out", b"err")
        device.push(tmp_path / "x", PurePosixPath("x"))
        assert device.run(["cat", "x"], timeout_s=20).stdout == noise(100_000)


def test_default_folder_is_in_the_cache_and_ours(openssh: OpenSsh) -> None:
    with ssh.open(Address(f"127.0.0.1:{openssh.port}", None, openssh.options)) as device:
        assert device.folder == PurePosixPath(openssh.folder.resolve()) / ".cache" / "phi4edge"
        _folder.clean(device)
    assert not (openssh.folder / ".cache" / "phi4edge").exists()


def test_configuration_of_the_user_names_the_device(openssh: OpenSsh, tmp_path: Path) -> None:
    config = tmp_path / "my config"
    lines = ["Host lab-*", " HostName 127.0.0.1", f" Port {openssh.port}", f" IdentityFile {openssh.keys.user}"]
    lines += [f" UserKnownHostsFile {openssh.known_hosts}", " RequestTTY force", " RemoteCommand echo no"]
    lines += [" ControlMaster auto", " ControlPath /nowhere/%C"]
    config.write_text("\n".join(lines))
    (tmp_path / "x").write_bytes(noise(1000))
    with ssh.open(Address("ssh://lab-1", "~/of ours", ("-F", str(config)))) as device:
        assert device.name == "ssh://lab-1"
        assert device.folder == PurePosixPath(openssh.folder.resolve()) / "of ours"
        device.push(tmp_path / "x", PurePosixPath("x"))
        assert shell(device, "wc -c <x").strip() == "1000"


@pytest.mark.parametrize(
    "missing", [("rsync",), ("timeout", "setsid", "stat"), ("sha256sum",), ("sha256sum", "shasum")]
)
def test_device_without_a_tool(missing: tuple[str, ...], keys: Keys, tmp_path: Path) -> None:
    path = tools_but(tmp_path / "bin", *missing)
    local = tmp_path / "x"
    local.write_bytes(noise(100_000))
    with serving(OpenSsh(keys, tmp_path / "server", path=path)) as server, ssh.open(server.address()) as device:
        assert shell(device, 'for t; do command -v "$t"; done; :', *missing) == ""
        assert _folder.send(device, {"x": local}) == ("x",)
        assert _folder.send(device, {"x": local}) == ()
        device.pull(PurePosixPath("x"), tmp_path / "y")
        assert (tmp_path / "y").read_bytes() == local.read_bytes()
        with pytest.raises(TargetError, match="took longer"):
            device.run(["sleep", "60"], timeout_s=0.3)


def test_device_that_cannot_hash_is_an_error(keys: Keys, tmp_path: Path) -> None:
    path = tools_but(tmp_path / "bin", "sha256sum", "shasum", "openssl")
    (tmp_path / "x").write_bytes(b"x")
    with (
        serving(OpenSsh(keys, tmp_path / "server", path=path)) as server,
        ssh.open(server.address()) as device,
        pytest.raises(MissingToolError, match="sha256sum"),
    ):
        device.push(tmp_path / "x", PurePosixPath("x"))


# --- connections that end -----------------------------------------------------------------------------------


def test_server_killed_during_a_run_leaves_nothing(server: Server) -> None:
    with ssh.open(server.address()) as device:
        pids = server.folder / "device" / "our folder" / "family"

        def kill() -> None:
            wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
            server.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        begun = time.monotonic()
        with pytest.raises(TargetError, match="connection was lost"):
            device.run(["sh", "-c", FAMILY, "sh", "family"], timeout_s=300)
        assert time.monotonic() - begun < 40
        killer.join()
        family = [int(pid) for pid in pids.read_text().split()]
        wait_until(lambda: not any(map(alive_here, family)))
        with pytest.raises(TargetError):
            device.run(["true"], timeout_s=20)


@pytest.mark.parametrize("by", ["rsync", "cat"])
def test_push_that_lost_its_server_is_gone_on_with(by: str, keys: Keys, tmp_path: Path) -> None:
    path = os.environ["PATH"] if by == "rsync" else tools_but(tmp_path / "bin", "rsync")
    need("rsync")
    server = OpenSsh(keys, tmp_path / "server", path=path)
    local, remote = tmp_path / "model.gguf", server.folder / "device" / "our folder" / "model.gguf"
    local.write_bytes(noise(60_000_000))

    class Killing(Counted):
        def advance(self, count: int = 1) -> None:
            super().advance(count)
            if self.done > 10_000_000:
                server.kill()

    with serving(server):
        with ssh.open(server.address()) as device, pytest.raises(TargetError, match="connection was lost"):
            device.push(local, PurePosixPath("model.gguf"), Killing())
        assert not remote.exists()
        [partial] = remote.parent.glob(".model.gguf.*.partial")
        assert partial.stat().st_size > 1_000_000
        server.start()
        counted = Counted()
        with ssh.open(server.address()) as device:
            begun = partial.stat().st_size
            device.push(local, PurePosixPath("model.gguf"), counted)
        assert counted.total == counted.done == 60_000_000
    assert begun > 1_000_000
    assert remote.read_bytes() == local.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("by", ["rsync", "cat"])
def test_wrong_partial_file_is_not_taken_for_the_file(by: str, keys: Keys, tmp_path: Path) -> None:
    path = os.environ["PATH"] if by == "rsync" else tools_but(tmp_path / "bin", "rsync")
    local = tmp_path / "x"
    local.write_bytes(noise(300_000))
    name = f".x.{_folder.local_sha256(local)[:16]}.partial"
    with serving(OpenSsh(keys, tmp_path / "server", path=path)) as server, ssh.open(server.address()) as device:
        for wrong in (noise(1000, seed=9), noise(300_000, seed=9), noise(400_000, seed=9)):
            shell(device, 'cat >"$1"; echo old >.x.0123456789abcdef.partial', name, stdin=wrong)
            device.push(local, PurePosixPath("x"))
            assert device.run(["cat", "x"], timeout_s=20).stdout == local.read_bytes()
            assert shell(device, "ls -A").split() == [".phi4edge", "x"]


def test_link_that_falls_silent_is_noticed(openssh: OpenSsh) -> None:
    """A server that is stopped answers no more than one whose network is gone."""
    with ssh.open(openssh.address("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1")) as device:
        pids = openssh.folder / "device" / "our folder" / "family"
        stopping = threading.Thread(
            target=lambda: (wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3), openssh.stop())
        )
        stopping.start()
        with pytest.raises(TargetError, match="connection was lost"):
            device.run(["sh", "-c", FAMILY, "sh", "family"], timeout_s=120)
        stopping.join()
        openssh.go_on()
        family = [int(pid) for pid in pids.read_text().split()]
        wait_until(lambda: not any(map(alive_here, family)))


def test_push_of_which_nothing_is_taken_is_an_error(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ssh_files, "STALLED_S", 1.0)
    path = Path(tools_but(tmp_path / "bin", "rsync", "cat"))
    (path / "cat").write_text("#!/bin/sh\nexec sleep 300\n")
    (path / "cat").chmod(0o755)
    (tmp_path / "x").write_bytes(noise(8_000_000))
    with serving(OpenSsh(keys, tmp_path / "server", path=str(path))) as server, ssh.open(server.address()) as device:
        begun = time.monotonic()
        with pytest.raises(TargetError, match="nothing was taken for 1 s"):
            device.push(tmp_path / "x", PurePosixPath("x"))
        assert time.monotonic() - begun < 20


def test_loss_that_stdout_shows_first_is_one_of_a_program_that_ran(keys: Keys, tmp_path: Path) -> None:
    """Of the two words of the start, the one on stdout is lost: here the login shell keeps it to itself."""
    lossy = 'ForceCommand case "$SSH_ORIGINAL_COMMAND" in *" guard "*) exec >/dev/null ;; esac; '
    settings = (lossy + 'eval "$SSH_ORIGINAL_COMMAND"',)
    with (
        serving(OpenSsh(keys, tmp_path / "server", settings=settings)) as server,
        ssh.open(server.address()) as device,
        pytest.raises(TargetError, match="lost while sh ran: last words"),
    ):
        device.run(["sh", "-c", "echo last words >&2"], timeout_s=20)


def test_stream_whose_server_is_killed_ends_with_a_clear_error(server: Server) -> None:
    with ssh.open(server.address()) as device:
        stream = device.start(["sh", "-c", "echo $$; exec sleep 300"], timeout_s=300)
        pid = int(stream.stdout.readline())
        server.kill()
        assert stream.stdout.read() == b""
        with pytest.raises(TargetError, match="connection was lost"):
            stream.wait(30)
        stream.close()
        wait_until(lambda: not alive_here(pid))


def test_time_limit_of_a_stream_is_kept_on_the_device(openssh: OpenSsh) -> None:
    with ssh.open(openssh.address()) as device:
        stream = device.start(["sh", "-c", FAMILY, "sh", "family"], timeout_s=1)
        with pytest.raises(TargetError, match="took longer"):
            stream.wait(20)
        stream.close()
        assert none_alive(device, *shell(device, "cat family").split())


_INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored: behind a shell's &
from phi4edge.transports import ssh
from phi4edge.transports._api import Address
place, folder, script, *options = sys.argv[1:]
with ssh.open(Address(place, folder, tuple(options))) as device:
    device.run(["sh", "-c", script, "sh", "family"], timeout_s=300)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_our_own_end_leaves_nothing_there(how: signal.Signals, openssh: OpenSsh) -> None:
    address = openssh.address()
    words = [str(address.place), str(address.folder), FAMILY, *address.options]
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, *words], stderr=subprocess.DEVNULL, start_new_session=True
    )
    pids = Path(str(address.folder)) / "family"
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    os.killpg(process.pid, how)  # as a terminal does it
    assert process.wait(20) != 0
    family = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(map(alive_here, family)))


# --- disks that are full ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["rsync", "cat"])
def test_full_disk_is_told_in_bytes_before_anything_is_sent(by: str, keys: Keys, tmp_path: Path) -> None:
    """df on the device says that little is free."""
    path = Path(tools_but(tmp_path / "bin", "df", *(() if by == "rsync" else ("rsync",))))
    (path / "df").write_text("#!/bin/sh\necho head\necho /dev/x 100 98 2 98% /\n")
    (path / "df").chmod(0o755)
    (tmp_path / "x").write_bytes(noise(3000))
    with serving(OpenSsh(keys, tmp_path / "server", path=str(path))) as server, ssh.open(server.address()) as device:
        with pytest.raises(TargetError, match="needs 3000 bytes, 2048 are free"):
            device.push(tmp_path / "x", PurePosixPath("x"))
        assert shell(device, "ls -A").split() == [".phi4edge"]


@pytest.mark.parametrize("by", ["rsync", "cat"])
def test_disk_that_fills_on_the_way_is_told_in_bytes(by: str, keys: Keys, tmp_path: Path) -> None:
    """A limit on what a program may write stands for the disk."""
    path = os.environ["PATH"] if by == "rsync" else tools_but(tmp_path / "bin", "rsync")
    limit = ("ForceCommand trap '' XFSZ; ulimit -f 1000; eval \"$SSH_ORIGINAL_COMMAND\"",)
    (tmp_path / "x").write_bytes(noise(3_000_000))
    server = OpenSsh(keys, tmp_path / "server", path=path, settings=limit)
    with serving(server), ssh.open(server.address()) as device:
        with pytest.raises(TargetError, match=r"needs \d+ bytes more, \d+ are free") as caught:
            device.push(tmp_path / "x", PurePosixPath("x"), SILENT)
        assert "file" in str(caught.value.hint)
        assert not (server.folder / "device" / "our folder" / "x").exists()
