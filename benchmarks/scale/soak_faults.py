"""Damage on purpose: each fault is done to a run that was stopped midway, which then goes on to its end."""

from __future__ import annotations

__all__ = ["DAMAGES", "Full", "damage", "small_disk"]

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phi4edge.core.workdir import JOURNAL, RUN_FILE


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _torn(run: Path, rng: random.Random, done: int) -> int:
    journal = run / JOURNAL
    data = journal.read_bytes()
    last = len(data) - data.rstrip(b"\n").rfind(b"\n") - 1
    journal.write_bytes(data[: -rng.randint(1, last - 1)])
    return done - 1


def _line(run: Path, rng: random.Random, done: int) -> int:
    """A bit in the middle of the journal. (A flipped bit may leave JSON of the same meaning: not in a value.)"""
    journal = run / JOURNAL
    lines = journal.read_bytes().split(b"\n")
    at = rng.randrange(1, done - 1)
    line = bytearray(lines[at])
    line[rng.randrange(len(line))] ^= 1
    lines[at] = bytes(line)
    journal.write_bytes(b"\n".join(lines))
    return at


def _lines_lost(run: Path, rng: random.Random, done: int) -> int:
    """The journal of a file system that lost the end of it and put zeros there."""
    journal = run / JOURNAL
    data = journal.read_bytes()
    cut = rng.randrange(len(data) // 2, len(data) - 1)
    journal.write_bytes(data[:cut] + bytes(len(data) - cut))
    return data[:cut].count(b"\n")


def _block(run: Path, rng: random.Random, done: int) -> int:
    at = rng.randrange(done)
    _flip(run / f"blocks/{at:05d}.safetensors", rng)
    return at


def _half(run: Path, rng: random.Random, done: int) -> int:
    at = rng.randrange(done)
    path = run / f"blocks/{at:05d}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])
    return at


def _missing(run: Path, rng: random.Random, done: int) -> int:
    at = rng.randrange(done)
    (run / f"blocks/{at:05d}.safetensors").unlink()
    return at


def _hidden(run: Path, rng: random.Random, done: int) -> int:
    _flip(run / f"hidden/{done:05d}.hidden.bin", rng)
    return done


def _streams(run: Path, rng: random.Random, done: int) -> int:
    shutil.rmtree(run / "hidden")
    return done


def _strays(run: Path, rng: random.Random, done: int) -> int:
    """What killed writers leave: halves of files under names of their own."""
    for name in (f"blocks/{done:05d}.safetensors", f"hidden/{done + 1:05d}.hidden.bin", JOURNAL, RUN_FILE):
        (run / f"{name}.partial").write_bytes(rng.randbytes(1000))
    (run / f"blocks/{done:05d}.safetensors").write_bytes(rng.randbytes(1000))  # whole, but not in the journal
    return done


# What each leaves to go on from: (run, generator, blocks committed) → the block that is begun next.
DAMAGES: dict[str, Callable[[Path, random.Random, int], int]] = {
    "last line of the journal torn": _torn,
    "bit flipped in the middle of the journal": _line,
    "end of the journal zeroed": _lines_lost,
    "bit flipped in a block": _block,
    "block half written": _half,
    "block missing": _missing,
    "bit flipped in the residual stream": _hidden,
    "residual streams lost": _streams,
    "stray halves of files": _strays,
}


def damage(name: str, run: Path, rng: random.Random, done: int) -> int:
    """Do it; the block that has to be begun next."""
    return DAMAGES[name](run, rng, done)


@dataclass(frozen=True)
class Full:
    """A file system of a chosen size."""

    path: Path

    def grow(self, size: int) -> None:
        """Make room."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Full | None]:
    """A file system of ``size`` bytes at ``path``, or None where this user cannot mount one."""
    path.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    try:
        yield Full(path) if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", str(path)], check=True)
