"""Rows that are read ahead: the checkpoint's own, in whichever thread, and nothing is left when it ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import write_checkpoint

from phi4edge.checkpoint import rows_ahead
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.checkpoint.rows_ahead import READ_AHEAD, RowsAhead
from phi4edge.core.errors import InputError
from phi4edge.model.block import LINEARS

USERS = 3


@pytest.fixture(params=["fits", "outgrows memory"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointReader:
    monkeypatch.setattr("phi4edge.checkpoint.reader.outgrows_memory", lambda _: request.param != "fits")
    return open_checkpoint(write_checkpoint(tmp_path / "model", num_hidden_layers=3))


def pieces(checkpoint: CheckpointReader, step: int = 50) -> list[tuple[str, slice]]:
    names = [f"model.layers.{layer}.{linear}.weight" for layer in range(3) for linear in LINEARS]
    rows = {name: checkpoint.place(name).shape[0] for name in names}
    return [(name, slice(at, min(at + step, rows[name]))) for name in names for at in range(0, rows[name], step)]


def readers() -> int:
    return sum(thread.name.startswith("read") for thread in threading.enumerate())


def test_every_piece_is_what_the_checkpoint_has_there(checkpoint: CheckpointReader) -> None:
    wanted = pieces(checkpoint)
    with RowsAhead(checkpoint, wanted, USERS) as rows, ThreadPoolExecutor(USERS) as users:

        def use(name: str, part: slice) -> bool:
            with rows.piece(name, part) as some:
                middle = (part.start + part.stop) // 2
                first, second = (
                    some.values(slice(a, b)).clone() for a, b in ((part.start, middle), (middle, part.stop)) if a < b
                )
                whole = checkpoint.tensor(name, part)
                return torch.equal(torch.cat((first, second)), whole) and torch.equal(some.stored.float(), whole)

        assert all(users.map(lambda one: use(*one), wanted))
    assert readers() == 0


def test_no_more_is_in_ram_than_was_planned(checkpoint: CheckpointReader, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: set[int] = set()
    read = rows_ahead.read_tensor

    def noted(*arguments: object, **named: object) -> object:
        rooms.add(named["into"].ctypes.data)  # type: ignore[attr-defined]
        return read(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(rows_ahead, "read_tensor", noted)
    wanted = pieces(checkpoint, 20)
    assert len(wanted) > 2 * (1 + READ_AHEAD)
    with RowsAhead(checkpoint, wanted, 1) as rows:
        for name, part in wanted:
            with rows.piece(name, part) as some:
                assert len(some.values(part)) == part.stop - part.start
    assert len(rooms) == 1 + READ_AHEAD


def test_a_damaged_weight_and_a_file_that_ends_are_said(checkpoint: CheckpointReader) -> None:
    name = pieces(checkpoint)[0][0]
    ref = checkpoint.place(name)
    row_bytes = ref.nbytes // ref.shape[0]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset + 3 * row_bytes)
        file.write(b"\xc0\x7f")  # NaN in bfloat16

    def use(part: slice) -> None:
        with RowsAhead(checkpoint, [(name, part)], 1) as rows, rows.piece(name, part) as some:
            some.values(part)

    with pytest.raises(InputError, match=r"NaN or Inf, the first at \[3, 0\]"):
        use(slice(0, 10))
    use(slice(4, 10))
    with ref.path.open("r+b") as file:
        file.truncate(ref.offset + 6 * row_bytes)
    with pytest.raises(InputError, match=r"ends .* bytes early"):
        use(slice(4, 10))
    assert readers() == 0
