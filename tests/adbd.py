"""The device's side of adb, for tests: what Google's own client sees of it is a phone on the network.

The transport layer (CNXN, AUTH, OPEN, OKAY, WRTE, CLSE), the shell services (v2 with its packets and exit codes,
``exec:`` raw, both by a socket pair as on a phone) and sync in both versions. Commands really run, under the shell and
the PATH that are given, each in a session of its own; as on a phone, a command outlives the connection that began it.
``/data/local/tmp`` in what the client asks for stands for the folder ``--data``.

SIGUSR1 pulls the cable: every connection is dropped, and new ones are welcome.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (int.from_bytes(w, "little") for w in b"CNXN AUTH OPEN OKAY CLSE WRTE".split())
VERSION, MAX_PAYLOAD = 0x01000001, 1 << 18  # from this version on, nobody checks sums
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)  # shell v2's packets
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir,sendrecv_v2"
STAT_V2 = struct.Struct("<IQQIIIIQqqq")  # error dev ino mode nlink uid gid size atime mtime ctime


class GoneError(Exception):
    """The other side has closed."""


class Stream:
    """One service that the client has opened."""

    def __init__(self, connection: Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.incoming: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.ready = threading.Semaphore(0)  # the client's OKAYs
        self.gone = False
        self._rest = b""

    def read(self, size: int | None = None) -> bytes:
        """The next ``size`` bytes, or the next piece as it came; the client may go on when a piece was used up."""
        while not self._rest if size is None else len(self._rest) < size:
            if (piece := self.incoming.get()) is None:
                self.incoming.put(None)
                raise GoneError
            if self.connection.device.rate:
                time.sleep(len(piece) / self.connection.device.rate)
            self._rest += piece
            self.connection.send(OKAY, self.local, self.remote)
        size = len(self._rest) if size is None else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), self.connection.max_payload):
            self.connection.send(WRTE, self.local, self.remote, data[start : start + self.connection.max_payload])
            self.ready.acquire()
            if self.gone:
                raise GoneError

    def close(self) -> None:
        if not self.gone:
            with contextlib.suppress(OSError):
                self.connection.send(CLSE, self.local, self.remote)
        self.drop()

    def drop(self) -> None:
        """Wake whoever waits on it."""
        self.gone = True
        self.incoming.put(None)
        self.ready.release()


class Connection:
    """One adb server that is connected."""

    def __init__(self, device: Adbd, sock: socket.socket) -> None:
        self.device, self.sock = device, sock
        self.max_payload = MAX_PAYLOAD
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._count = 0

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        header = struct.pack("<6I", command, first, second, len(data), 0, command ^ 0xFFFFFFFF)
        with self._lock:
            self.sock.sendall(header + data)

    def serve(self) -> None:
        try:
            with self.sock, self.sock.makefile("rb") as file:
                while len(header := file.read(24)) == 24:
                    command, first, second, length, _, _ = struct.unpack("<6I", header)
                    self._handle(command, first, second, file.read(length))
        except OSError:
            pass
        finally:
            for stream in list(self._streams.values()):
                stream.drop()

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command in (CNXN, AUTH):
            if command == CNXN:
                self.max_payload = min(second, self.device.max_payload)
            if self.device.auth == "silent":
                return
            if self.device.auth == "unauthorized":
                if command == CNXN or first == 2:  # 2: a signature; 3, the public key, waits for the user's word
                    self.send(AUTH, 1, 0, os.urandom(20))
                return
            self.send(CNXN, VERSION, self.device.max_payload, self.device.banner)
        elif command == OPEN:
            self._count += 1
            stream = self._streams[self._count] = Stream(self, self._count, first)
            service = data.rstrip(b"\0").replace(b"/data/local/tmp", os.fsencode(self.device.data))
            threading.Thread(target=self._serve_stream, args=(stream, service), daemon=True).start()
        elif (stream := self._streams.get(second)) is None:
            if command == WRTE:
                self.send(CLSE, 0, first)
        elif command == WRTE:
            stream.incoming.put(data)
        elif command == OKAY:
            stream.ready.release()
        elif command == CLSE:
            stream.drop()

    def _serve_stream(self, stream: Stream, service: bytes) -> None:
        kind, _, rest = service.partition(b":")
        kind, *modes = kind.split(b",")
        handler: Callable[[], None] | None = None
        if kind == b"shell":
            handler = lambda: self.device.shell(stream, rest, framed=b"v2" in modes)  # noqa: E731
        elif kind == b"exec":
            handler = lambda: self.device.shell(stream, rest, framed=False)  # noqa: E731
        elif kind == b"sync":
            handler = Sync(stream, self.device.data).serve
        try:
            if handler is not None:
                self.send(OKAY, stream.local, stream.remote)
                handler()
        except (GoneError, OSError):
            pass
        finally:
            stream.close()
            del self._streams[stream.local]


class Adbd:
    """The device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Path = options.data
        self.auth, self.rate, self.max_payload = options.auth, options.rate, options.max_payload
        self.shell_program: str = options.shell
        model = options.model
        properties = f"ro.product.name={model};ro.product.model={model};ro.product.device={model}"
        features = f";features={options.features}" if options.features else ""
        self.banner = f"device::{properties}{features};".encode()
        self.connections: list[socket.socket] = []

    def listen(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            signal.signal(signal.SIGUSR1, self.unplug)
            sys.stdout.write(f"{server.getsockname()[1]}\n")
            sys.stdout.flush()
            while True:
                sock, _ = server.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections.append(sock)
                threading.Thread(target=Connection(self, sock).serve, daemon=True).start()

    def unplug(self, number: int, frame: object) -> None:
        for sock in self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def shell(self, stream: Stream, command: bytes, *, framed: bool) -> None:
        """One command; without frames its stdout and stderr are one, and nobody learns how it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [self.shell_program, "-c", command],
                    stdin=theirs,
                    stdout=theirs,
                    stderr=subprocess.PIPE if framed else theirs,
                    cwd="/",
                    start_new_session=True,
                )
            threads = [threading.Thread(target=self._feed, args=(stream, ours, framed), daemon=True)]
            outputs = [threading.Thread(target=self._drain, args=(stream, ours, STDOUT if framed else None))]
            if process.stderr is not None:
                outputs.append(threading.Thread(target=self._drain, args=(stream, process.stderr, STDERR)))
            for thread in (*threads, *outputs):
                thread.start()
            threading.Thread(target=process.wait, daemon=True).start()  # reaped, whoever still listens
            for thread in outputs:
                thread.join()
            if process.stderr is not None:
                process.stderr.close()
            if framed and not stream.gone:
                code = process.wait()
                stream.write(struct.pack("<BIB", EXIT, 1, code & 0xFF if code >= 0 else 128 - code))

    def _feed(self, stream: Stream, ours: socket.socket, framed: bool) -> None:
        """The client's bytes, to the command; nothing more, when the connection is gone."""
        try:
            while True:
                if not framed:
                    ours.sendall(stream.read())
                    continue
                kind, length = struct.unpack("<BI", stream.read(5))
                data = stream.read(length) if length else b""
                if kind == STDIN:
                    with contextlib.suppress(BrokenPipeError):
                        ours.sendall(data)
                elif kind == CLOSE_STDIN:
                    ours.shutdown(socket.SHUT_WR)
        except (GoneError, OSError):
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)

    def _drain(self, stream: Stream, source: object, kind: int | None) -> None:
        """What the command says, to the client."""
        read = source.recv if isinstance(source, socket.socket) else source.read1  # type: ignore[attr-defined]
        with contextlib.suppress(GoneError, OSError):
            while data := read(1 << 16):
                stream.write(data if kind is None else struct.pack("<BI", kind, len(data)) + data)


class Sync:
    """Files to and from the device."""

    def __init__(self, stream: Stream, data: Path) -> None:
        self.stream, self.data = stream, os.fsencode(data)

    def serve(self) -> None:
        while True:
            word, length = struct.unpack("<4sI", self.stream.read(8))
            if word == b"QUIT":
                return
            path = self.stream.read(length).replace(b"/data/local/tmp", self.data)
            try:
                self._answer(word, path)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        reason = (error.strerror or "failed").encode()
        self.stream.write(struct.pack("<4sI", b"FAIL", len(reason)) + reason)

    def _answer(self, word: bytes, path: bytes) -> None:
        if word in (b"STAT", b"STA2", b"LST2"):
            self.stream.write(word + self._stat(path, new=word != b"STAT", follow=word == b"STA2"))
        elif word in (b"LIST", b"LIS2"):
            new = word == b"LIS2"
            for name in (b".", b"..", *self._names(path)):
                entry = self._stat(path + b"/" + name, new=new, follow=False)
                self.stream.write((b"DNT2" if new else b"DENT") + entry + struct.pack("<I", len(name)) + name)
            self.stream.write(b"DONE" + bytes((STAT_V2.size if new else 12) + 4))
        elif word in (b"RECV", b"RCV2"):
            if word == b"RCV2":
                self.stream.read(8)  # the word again, and flags: no compression is offered
            with open(path, "rb") as file:
                while piece := file.read(1 << 16):
                    self.stream.write(struct.pack("<4sI", b"DATA", len(piece)) + piece)
            self.stream.write(struct.pack("<4sI", b"DONE", 0))
        elif word in (b"SEND", b"SND2"):
            self._receive(word, path)
        else:
            raise OSError(0, f"unknown request {word!r}")

    def _receive(self, word: bytes, path: bytes) -> None:
        """As on a device, what did not arrive whole is removed, and a failure is told when all has been read."""
        if word == b"SND2":
            _, mode, _ = struct.unpack("<4sII", self.stream.read(12))
        else:
            path, _, digits = path.rpartition(b",")
            mode = int(digits)
        failure: OSError | None = None
        whole = False
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 (bytes)
            file = open(path, "wb")  # noqa: SIM115
        except OSError as error:
            failure, file = error, open(os.devnull, "wb")  # noqa: SIM115
        try:
            with file:
                while True:
                    word, length = struct.unpack("<4sI", self.stream.read(8))
                    if word == b"DONE":
                        break
                    data = self.stream.read(length)
                    if failure is None:
                        try:
                            file.write(data)
                            file.flush()
                        except OSError as error:
                            failure = error
            whole = failure is None
        finally:
            if not whole:
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108 (bytes)
        if failure is not None:
            raise failure
        os.chmod(path, mode & 0o777)  # noqa: PTH101 (bytes)
        self.stream.write(struct.pack("<4sI", b"OKAY", 0))

    @staticmethod
    def _names(path: bytes) -> list[bytes]:
        with contextlib.suppress(OSError):
            return os.listdir(path)  # noqa: PTH208 (bytes)
        return []

    def _stat(self, path: bytes, *, new: bool, follow: bool) -> bytes:
        try:
            s = os.stat(path) if follow else os.lstat(path)  # noqa: PTH116 (bytes)
        except OSError as error:
            return STAT_V2.pack(error.errno or 5, *[0] * 10) if new else bytes(12)
        if not new:
            return struct.pack("<3I", s.st_mode, s.st_size & 0xFFFFFFFF, int(s.st_mtime))
        times = (int(s.st_atime), int(s.st_mtime), int(s.st_ctime))
        assert stat.S_IFMT(s.st_mode)
        return STAT_V2.pack(0, s.st_dev, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, *times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="what /data/local/tmp is")
    parser.add_argument("--model", default="Pixel_9")
    parser.add_argument("--features", default=FEATURES, help="empty: a device of before Android 7")
    parser.add_argument("--auth", choices=("none", "unauthorized", "silent"), default="none")
    parser.add_argument("--rate", type=float, default=0, help="bytes a second that it takes in, on each stream")
    parser.add_argument("--max-payload", type=int, default=MAX_PAYLOAD)
    parser.add_argument("--shell", default="/bin/sh")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Adbd(options).listen()


if __name__ == "__main__":
    main()
