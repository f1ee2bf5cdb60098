"""What the process holds in RAM, and byte counts as people write them."""

from __future__ import annotations

__all__ = [
    "available_bytes",
    "format_bytes",
    "give_large_arrays_back",
    "parse_bytes",
    "peak_rss_bytes",
    "release_memory",
    "reset_peak_rss",
    "rss_bytes",
]

import ctypes
import re
import resource
import sys
from pathlib import Path

from phi4edge.core.errors import UsageError

_M_MMAP_THRESHOLD, _LARGE = -3, 4 * 2**20  # of malloc.h; from so many bytes on, an array is mapped by itself
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def parse_bytes(text: str) -> int:
    """``"8GiB"``, ``"1.5 GB"`` or ``"4096"`` as a number of bytes.

    Raises:
        UsageError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if not match or unit is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a size", "write it as 8GiB, 1.5GB or 500MB")
    return int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    """A byte count in binary units with three significant digits, ``"1.25 GiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def rss_bytes() -> int:
    """Resident set size of this process now, bytes (its peak where the system tells no more)."""
    return _status("VmRSS") or peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident set size of this process so far, bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def reset_peak_rss() -> bool:
    """Ask Linux to forget the peak so far; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """RAM that a new process could take without swapping, bytes; None where unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def give_large_arrays_back() -> None:
    """Have every large array mapped by itself and given back when it is freed, where the C library can (glibc).

    By itself it starts to keep arrays of up to 32 MiB in its arenas, where one small tensor that outlives them is
    enough for the next of the same size not to fit: a sample's activations were found there twenty times over. Every
    array then comes as fresh pages, which took 2 to 12 % of a run's time (benchmarks/scale/README.md): it is for those
    who asked for a budget.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE)


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc); its arenas fragment otherwise."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
