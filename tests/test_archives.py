"""Archives: what would lie outside of the folder is refused, with and without the filter of Python 3.11.4 and later."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from phi4edge.core.archives import extract_all


def packed(place: Path, name: str, change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> Path:
    """An archive with a file, a link to it, and a member called ``name``."""
    with tarfile.open(place / "some.tar.gz", "w:gz") as archive:
        for each in ("top/file", name):
            member = tarfile.TarInfo(each)
            member.size = 4
            if each == name:
                change(member)
            archive.addfile(member, io.BytesIO(b"text"))
        link = tarfile.TarInfo("top/link")
        link.type, link.linkname = tarfile.SYMTYPE, "file"
        archive.addfile(link)
    return place / "some.tar.gz"


def linked(kind: bytes, to: str) -> Callable[[tarfile.TarInfo], None]:
    """Makes a member a link."""

    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, to, 0

    return change


@pytest.fixture(params=[True, False])
def maybe_filtered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("maybe_filtered")
def test_what_belongs_there_is_unpacked(tmp_path: Path) -> None:
    with tarfile.open(packed(tmp_path, "top/inside/other")) as archive:
        extract_all(archive, tmp_path / "out")
    assert (tmp_path / "out" / "top" / "link").read_text() == "text"
    assert (tmp_path / "out" / "top" / "inside" / "other").read_text() == "text"


@pytest.mark.usefixtures("maybe_filtered")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("top/../../outside", lambda _: None),
        ("top/away", linked(tarfile.SYMTYPE, "../../outside")),
        ("top/away", linked(tarfile.LNKTYPE, "../outside")),
        ("top/device", linked(tarfile.FIFOTYPE, "")),
    ],
)
def test_what_would_lie_elsewhere_is_refused(
    tmp_path: Path, name: str, change: Callable[[tarfile.TarInfo], None]
) -> None:
    with tarfile.open(packed(tmp_path, name, change)) as archive, pytest.raises(tarfile.TarError):
        extract_all(archive, tmp_path / "out")
    assert not (tmp_path / "outside").exists()
