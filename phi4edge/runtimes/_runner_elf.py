"""Is a file a program for the device that needs nothing of it? Read from its ELF header."""

from __future__ import annotations

__all__ = ["check_program"]

import struct
from pathlib import Path

from phi4edge.core.errors import Phi4EdgeError

_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
_HINT = "remove the folder of this build, and take another --compiler"
_INTERP = 3  # p_type of the segment that names a dynamic loader


def check_program(path: Path, arch: str) -> None:
    """Raises Phi4EdgeError where ``path`` is no statically linked 64-bit ELF program for ``arch``."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
                raise Phi4EdgeError(f"{path}: not a 64-bit little-endian ELF file", _HINT)
            machine = struct.unpack_from("<H", header, 18)[0]
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(offset)
            table = file.read(size * count)
    except OSError as error:
        raise Phi4EdgeError(f"{path}: was not built ({error.strerror})", _HINT) from error
    if machine != _MACHINES[arch]:
        raise Phi4EdgeError(f"{path}: for machine {machine}, and {arch} is {_MACHINES[arch]}", _HINT)
    if any(struct.unpack_from("<I", table, size * i)[0] == _INTERP for i in range(count)):
        raise Phi4EdgeError(
            f"{path}: is not linked statically, it asks for a loader that the device may not have", _HINT
        )
