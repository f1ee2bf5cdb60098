"""A GGUF in several files: the same model, all files or none, and whatever is wrong with them is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf_support import Llama
from rounded import quantized_model
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.atomic import atomic_files
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.measurement.artifact import describe
from phi4edge.runtimes import llama_cpp as runtime
from phi4edge.runtimes._api import Settings
from phi4edge.stages.verify import verify
from phi4edge.writers import gguf
from phi4edge.writers._api import Artifact, WriteOptions
from phi4edge.writers._gguf_file import read_gguf
from phi4edge.writers._gguf_names import FACTORS
from phi4edge.writers._gguf_shards import shard_path, split_name

LIMIT = 52 * 1024  # makes four files of the model


def write(checkpoint: Path, out: Path, limit: int | None = LIMIT, **options: Any) -> Artifact:
    return gguf.write(quantized_model(checkpoint, "q4_0"), out, WriteOptions(split_bytes=limit, **options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "mini", num_hidden_layers=6)


@pytest.fixture(scope="module")
def split(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(checkpoint, tmp_path_factory.mktemp("split") / "m.gguf")


@pytest.fixture
def copy(split: Artifact, tmp_path: Path) -> Path:
    """The first file of a copy that may be damaged."""
    for name in split.files:
        shutil.copy(split.path.with_name(name), tmp_path / name)
    return tmp_path / split.path.name


def test_files_are_laid_out_as_gguf_split_does(split: Artifact, checkpoint: Path, tmp_path: Path) -> None:
    single = write(checkpoint, tmp_path / "m.gguf", None)
    whole = gguf_py.GGUFReader(single.path)
    count = len(split.files)
    assert count == 4
    assert list(split.files) == [f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    tensors, data = [], b""
    for i, (name, digest) in enumerate(split.files.items()):
        path = split.path.with_name(name)
        assert path.stat().st_size <= LIMIT
        assert sha256_file(path) == digest
        reader = gguf_py.GGUFReader(path)
        fields = {key: (field.types, field.contents()) for key, field in reader.fields.items() if "GGUF." not in key}
        kind = gguf_py.GGUFValueType
        assert fields.pop("split.no") == ([kind.UINT16], i)
        assert fields.pop("split.count") == ([kind.UINT16], count)
        assert fields.pop("split.tensors.count") == ([kind.INT32], len(whole.tensors))
        expected = {key: (field.types, field.contents()) for key, field in whole.fields.items() if "GGUF." not in key}
        assert fields == (expected if i == 0 else {})  # every other key in the first file alone
        tensors += [(t.name, t.tensor_type, tuple(t.shape)) for t in reader.tensors]
        data += path.read_bytes()[reader.data_offset :]
    assert tensors == [(t.name, t.tensor_type, tuple(t.shape)) for t in whole.tensors]
    assert data == single.path.read_bytes()[whole.data_offset :]
    assert split.nbytes == sum(split.path.with_name(name).stat().st_size for name in split.files)


def test_files_are_filled_as_far_as_the_size_allows(split: Artifact) -> None:
    sizes = [split.path.with_name(name).stat().st_size for name in split.files]
    parts = [read_gguf_alone(split.path.with_name(name)) for name in split.files]
    for size, following in zip(sizes[:-1], parts[1:], strict=True):
        name, nbytes = following[0]
        assert size + 8 + len(name) + 8 + nbytes > LIMIT - 64, "the next file's first tensor had room here"


def read_gguf_alone(path: Path) -> list[tuple[str, int]]:
    return [(t.name, t.n_bytes) for t in gguf_py.GGUFReader(path).tensors]


def test_llama_cpp_and_the_reader_find_the_same_model(split: Artifact, checkpoint: Path, tmp_path: Path) -> None:
    single = write(checkpoint, tmp_path / "m.gguf", None)
    tokens = np.arange(60) % 512
    logits = []
    for path in (single.path, split.path):
        with Llama(path) as llama:
            logits.append(llama.logits(tokens, 256))
    assert torch.equal(logits[0], logits[1])
    ours, theirs = gguf.read(split.path), gguf.read(single.path)
    assert ours.config == theirs.config
    for name in ours.config.tensor_shapes():
        assert torch.equal(ours.tensor(name), theirs.tensor(name))


def test_runtime_description_and_verify_take_the_first_file(split: Artifact) -> None:
    with runtime.open(split.path, 64, Settings(threads=1)) as session:
        assert session.vocab_size == 512
        assert session.details["weight_bytes"] == sum(t.nbytes for t in read_gguf(split.path).tensors.values())
    described = describe(split.path)
    assert (described["bytes"], described["scheme"]) == (split.nbytes, "q4_0")
    assert described["sha256"] not in split.files.values()
    assert verify(split.path, None).tensors == len(gguf.read(split.path).config.tensor_shapes())


def test_a_description_s_hash_is_over_every_file(copy: Path) -> None:
    before = describe(copy)["sha256"]
    last = sorted(copy.parent.iterdir())[-1]
    data = bytearray(last.read_bytes())
    data[-40] ^= 1
    last.write_bytes(data)
    assert describe(copy)["sha256"] != before


def test_what_fits_stays_one_file_without_split_keys(checkpoint: Path, tmp_path: Path) -> None:
    single = write(checkpoint, tmp_path / "a.gguf", None)
    roomy = write(checkpoint, tmp_path / "b.gguf", single.nbytes)
    assert roomy.path == tmp_path / "b.gguf"
    assert list(roomy.files.values()) == list(single.files.values())
    assert len(write(checkpoint, tmp_path / "c.gguf", single.nbytes - 1).files) == 2


def test_the_first_file_may_hold_keys_alone(phi4_checkpoint: Path, tmp_path: Path) -> None:
    table = 512 * 64 // 32 * 34  # the embedding, first of all tensors
    artifact = write(phi4_checkpoint, tmp_path / "m.gguf", table + 4096)
    assert read_gguf_alone(artifact.path) == []
    with Llama(artifact.path) as llama:
        assert llama.logits(np.arange(5), 256).isfinite().all()


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (4096, r"the file's keys .* take .*, more than --split-size 4 KiB"),
        (34 * 1024, r"token_embd\.weight alone takes 34 KiB, more than --split-size 34 KiB"),
    ],
)
def test_a_size_that_one_piece_exceeds_is_refused(checkpoint: Path, tmp_path: Path, limit: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        write(checkpoint, tmp_path / "m.gguf", limit)
    assert not list(tmp_path.iterdir())


def test_rope_factors_are_never_the_last_of_a_file_whatever_the_limit(checkpoint: Path, tmp_path: Path) -> None:
    """llama.cpp reads half a head of them, also where fewer channels turn; behind a mapped file may be nothing."""
    whole = gguf_py.GGUFReader(write(checkpoint, tmp_path / "whole.gguf", None).path)
    assert [tensor.name for tensor in whole.tensors[:2]] == list(FACTORS.values())
    embedding, keys = whole.tensors[2], whole.data_offset
    alone = False
    for limit in range(keys, keys + 2 * int(embedding.n_bytes), 256):  # from one that the keys all but fill
        try:
            made = write(checkpoint, tmp_path / f"m{limit}.gguf", limit)
        except UsageError:
            continue
        for name in made.files:
            tensors = gguf_py.GGUFReader(made.path.with_name(name)).tensors
            last = max(tensors, key=lambda tensor: tensor.data_offset, default=None)
            assert last is None or last.name not in FACTORS.values()
            alone |= last is None
    assert alone  # the first file had room for the factors, and not for the embedding behind them


# --- all or none -------------------------------------------------------------------------------


def test_an_interruption_in_the_last_file_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    class Interrupting(Progress):
        def status(self, text: str) -> None:
            if text == "output_norm.weight":  # the last tensor
                assert [p.suffix for p in tmp_path.iterdir()] == [".partial"] * 4
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, tmp_path / "m.gguf", progress=Interrupting())
    assert not list(tmp_path.iterdir())


def put(paths: list[Path], content: bytes, replaced: Sequence[Path] = ()) -> None:
    with atomic_files(paths, replaced=replaced) as files:
        for _, file in zip(paths, files, strict=False):
            file.write(content)


def test_a_rename_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name == "b":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    paths = [tmp_path / name for name in "abc"]
    with pytest.raises(TargetError, match="No space left"):
        put(paths, b"x")
    assert not list(tmp_path.iterdir())


def test_at_no_instant_can_a_mixture_of_two_sets_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is opened by its first file; whatever it is killed after, the others belong to it."""
    paths = [tmp_path / name for name in "abc"]
    for path in (*paths, tmp_path / "d"):
        path.write_bytes(b"old")
    seen: list[dict[str, bytes]] = []

    def look() -> None:
        seen.append({p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".partial"})

    for name in ("replace", "unlink"):
        real = getattr(Path, name)

        def watched(self: Path, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            look()
            result = real(self, *args, **kwargs)
            look()
            return result

        monkeypatch.setattr(Path, name, watched)
    put(paths, b"new", replaced=[*paths, tmp_path / "d"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys("abc", b"new")
    for state in seen:
        if "a" in state:
            assert {state[name] for name in "abc"} == {state["a"]}


def test_an_old_split_is_replaced_whole_and_only_when_told(checkpoint: Path, tmp_path: Path) -> None:
    old = write(checkpoint, tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m-00001-of-00004\.gguf: already exists"):
        write(checkpoint, tmp_path / "m.gguf", 2 * LIMIT)
    new = write(checkpoint, tmp_path / "m.gguf", 2 * LIMIT, force=True)
    assert len(new.files) < len(old.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(new.files)


# --- what is wrong is named --------------------------------------------------------------------


def test_a_missing_file_is_named_by_everything_that_opens_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = shard_path(copy.with_name("m.gguf"), 2, 4)
    lost.unlink()
    for use in (gguf.read, describe, lambda path: runtime.open(path, 64, Settings(threads=1))):
        with pytest.raises(InputError, match=rf"1 of its 4 files are missing: {lost.name}"):
            use(copy)  # type: ignore[operator]
    assert main(["verify", str(copy), "--json"]) == 3
    assert lost.name in json.loads(capsys.readouterr().out)["error"]["message"]


def test_another_file_than_the_first_says_which_to_give(copy: Path) -> None:
    second = shard_path(copy.with_name("m.gguf"), 1, 4)
    with pytest.raises(InputError, match="is file 2 of 4") as caught:
        gguf.read(second)
    assert copy.name in str(caught.value.hint)


def test_files_of_different_splits_are_not_mixed(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    names = sorted(copy.parent.iterdir())
    shutil.copy(names[1], names[2])
    with pytest.raises(InputError, match=r"says that it is file 2 of 4, its name says 3 of 4"):
        gguf.read(copy)
    other = write(checkpoint, tmp_path / "other" / "m.gguf", 2 * LIMIT)
    shutil.copy(sorted(other.path.parent.iterdir())[1], names[1])
    with pytest.raises(InputError, match=r"says that it is file 2 of \d, its name says 2 of 4"):
        gguf.read(copy)


def test_a_first_file_under_another_name_is_told(copy: Path) -> None:
    with pytest.raises(InputError, match="is file 1 of 4, and its name does not say so"):
        gguf.read(copy.rename(copy.with_name("model.gguf")))


def test_a_tensor_too_few_or_twice_is_told(copy: Path) -> None:
    second, third = (shard_path(copy.with_name("m.gguf"), i, 4) for i in (1, 2))
    data = copy.read_bytes()
    key = b"split.tensors.count\x05\x00\x00\x00"
    assert data.count(key) == 1
    copy.write_bytes(data.replace(key + data[data.index(key) + len(key) :][:4], key + b"\x63\x00\x00\x00"))
    with pytest.raises(InputError, match="hold 40 tensors, 99 were written"):
        gguf.read(copy)
    no = b"split.no\x02\x00\x00\x00"
    third.write_bytes(second.read_bytes().replace(no + b"\x01\x00", no + b"\x02\x00"))
    with pytest.raises(InputError, match=r"m-00003-of-00004\.gguf: tensor \S+ stands in m-00002-of-00004\.gguf too"):
        gguf.read(copy)


def test_names_are_the_same_in_both_directions(tmp_path: Path) -> None:
    path = shard_path(tmp_path / "a-b.q4.gguf", 11, 345)
    assert path.name == "a-b.q4-00012-of-00345.gguf"
    assert split_name(path) == (tmp_path / "a-b.q4.gguf", 11, 345)
    assert shard_path(tmp_path / "plain", 0, 2).name == "plain-00001-of-00002.gguf"
    assert split_name(tmp_path / "m.gguf") is None


def test_a_name_that_is_one_of_a_split_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is called as one file of a split"):
        write(checkpoint, tmp_path / "m-00001-of-00002.gguf")
