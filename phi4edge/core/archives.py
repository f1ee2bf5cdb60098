"""Archives from elsewhere, unpacked into a folder and nowhere else."""

from __future__ import annotations

__all__ = ["extract_all"]

import tarfile
from pathlib import Path


def extract_all(archive: tarfile.TarFile, folder: Path) -> None:
    """Everything in ``archive``, under ``folder``.

    Raises:
        tarfile.TarError: the archive is damaged, or a member of it would lie, or point, outside of ``folder``.
        OSError: it cannot be written.
    """
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    root = folder.resolve()  # Python before 3.11.4
    for member in archive.getmembers():
        place = root / member.name
        points = [place]
        if member.issym():
            points.append(place.parent / member.linkname)
        elif member.islnk():
            points.append(root / member.linkname)
        elif not (member.isfile() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name} is neither a file nor a folder")
        if not all(point.resolve().is_relative_to(root) for point in points):
            raise tarfile.ExtractError(f"{member.name} is outside of its folder")
    archive.extractall(folder)
