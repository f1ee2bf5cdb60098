"""What a file costs through the system's page cache and around it: MB/s, and CPU seconds of all cores.

Every file is read from its start to its end in pieces of 8 MiB, one request after the other, as ``dd`` does, and one of
the same size written and synced. In turns: through the cache, which is told to forget the files before, and around it
(``dd``'s ``iflag=direct``, ``oflag=direct``). CPU seconds are the system's, of /proc/stat: what the kernel spends on
pages it does not all count as the process's.

    python benchmarks/scale/around_cache.py build/scale/phi-4/model-*.safetensors --name phi-4
"""

from __future__ import annotations

__all__ = ["main", "read_rate", "write_rate"]

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT)]
from record import machine_name, record, update_readme  # noqa: E402

RESULTS = HERE / "results"
PIECE = 8 << 20
TURNS = 2


@dataclass(frozen=True)
class Moved:
    """Bytes that went one way."""

    nbytes: int
    seconds: float
    cpu_seconds: float  # user and system time of all cores meanwhile

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


def busy_seconds() -> float:
    """CPU seconds that all cores spent since the system started, waiting for disks left out."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def forget(paths: Sequence[Path]) -> None:
    """Tell the system that these files need not stay in its cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(paths: Sequence[Path], *, direct: bool) -> Moved:
    """Read files one after the other, from the disk."""
    forget(paths)
    buffer, count = mmap.mmap(-1, PIECE), 0  # memory that begins with a page, as direct reads want it
    began, cpu = time.perf_counter(), busy_seconds()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            read = PIECE
            while read == PIECE:  # a file's last piece is shorter, and behind it nothing begins with a sector
                read = os.readv(descriptor, [buffer])
                count += read
        finally:
            os.close(descriptor)
    return Moved(count, time.perf_counter() - began, busy_seconds() - cpu)


def write_rate(folder: Path, nbytes: int, *, direct: bool) -> Moved:
    """Write about ``nbytes`` into a file of ``folder``, to the disk at the end; it is removed."""
    path, piece = folder / "written", mmap.mmap(-1, PIECE)
    piece.write(os.urandom(PIECE))
    pieces = max(1, round(nbytes / PIECE))
    began, cpu = time.perf_counter(), busy_seconds()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0))
        try:
            for _ in range(pieces):
                assert os.write(descriptor, piece) == PIECE
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return Moved(pieces * PIECE, time.perf_counter() - began, busy_seconds() - cpu)
    finally:
        path.unlink(missing_ok=True)


def table(results: dict[str, Any], machine: str) -> str:
    """The README's table: the best of the turns."""
    lines = ["| | MB/s | CPU seconds a GB |", "|---|---|---|"]
    for name, turns in results["moved"].items():
        best = max((Moved(**turn) for turn in turns), key=lambda moved: moved.rate)
        lines.append(f"| {name} | {best.rate / 1e6:.0f} | {best.cpu_seconds / (best.nbytes / 1e9):.2f} |")
    return "\n".join(
        [*lines, "", f"{results['nbytes'] / 1e9:.1f} GB each way, the better of {TURNS} turns; {machine}."]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what is read; as much is written beside the first")
    parser.add_argument("--most", type=float, default=10e9, help="bytes to read; %(default)g")
    parser.add_argument("--name", help="write results/around-cache-NAME.json and the README's table")
    a = parser.parse_args()
    files, nbytes = list[Path](), 0
    for path in a.files:
        if nbytes + path.stat().st_size <= a.most or not files:
            files.append(path)
            nbytes += path.stat().st_size
    moved: dict[str, list[dict[str, Any]]] = {}
    for _ in range(TURNS):
        for way, direct in (("through the cache", False), ("around it", True)):
            moved.setdefault(f"read {way}", []).append(asdict(read_rate(files, direct=direct)))
            written = write_rate(files[0].parent, nbytes, direct=direct)
            moved.setdefault(f"written {way}", []).append(asdict(written))
    results = {"nbytes": nbytes, "moved": moved}
    print(json.dumps(results, indent=1))
    if a.name:
        command = f"python benchmarks/scale/around_cache.py {' '.join(str(path) for path in files)} --name {a.name}"
        document = record(
            RESULTS / f"around-cache-{a.name}.json", command, results, ("benchmarks/scale/around_cache.py",)
        )
        update_readme(HERE / "README.md", "around-cache", table(results, machine_name(document["machine"])))


if __name__ == "__main__":
    main()
