"""Where the data that travels with phi4edge lies: inside an installed wheel, or at the top of a checkout."""

from __future__ import annotations

__all__ = ["data_folder"]

from pathlib import Path

import phi4edge


def data_folder(name: str) -> Path:
    """The folder ``targets`` or ``calibration`` that was installed with this package."""
    package = Path(phi4edge.__file__).parent
    packaged = package / "data" / name
    return packaged if packaged.is_dir() else package.parent / name
