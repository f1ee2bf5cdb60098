"""A checkpoint of Phi-4's or Phi-4-mini's exact shapes: config, tensor names, files, dtype; drawn weights.

Where no model hub can be reached, memory, speed and disk needs at full size are still measured on this: its bytes lie
as the published ones do. Weights are drawn so that they resemble a trained model's where a quantizer looks
(synthetic_weights.py says in what, and in what not). The tokenizer has the family's split, special tokens and ids,
with a small vocabulary of its own between them.

Written as a stream: a few megabytes of weights are in RAM at a time, drawn on all cores while the last are written.

    python benchmarks/scale/make_checkpoint.py build/scale/phi-4 --model phi-4                 29 GB
    python benchmarks/scale/make_checkpoint.py build/scale/cut --model phi-4-mini --layers 4   2 GB
    python benchmarks/scale/make_checkpoint.py build/scale/cut --model phi-4-mini --layers 4 --chunks 72 --length 512

With ``--chunks``, token chunks for ``--corpus`` are written as well, to OUT-72x512.safetensors here: ids drawn
independently with probabilities as Zipf's law has them. A checkpoint that is there already, and the one asked for, is
kept.
"""

from __future__ import annotations

__all__ = ["main", "make_checkpoint", "make_chunks"]

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests")]
from phi_tokenizers import SETTINGS, TEMPLATES, tokenizer_json  # noqa: E402
from published_configs import CONFIGS, TOKENIZERS, module_order  # noqa: E402
from synthetic_weights import SyntheticWeights  # noqa: E402

from phi4edge.checkpoint.config import ModelConfig, parse_config  # noqa: E402
from phi4edge.core.atomic import atomic_directory, write_json  # noqa: E402
from phi4edge.core.disk import require_space  # noqa: E402
from phi4edge.core.errors import InputError, Phi4EdgeError  # noqa: E402

_SHARD = 5_000_000_000  # bytes: transformers' limit when these models were saved
_WAITING = 4  # pieces drawn ahead, for each core
_TOLD = 1 << 26  # bytes between two reminders to the system that nothing of this is read again
_RECIPE = "synthetic.json"


def shards(config: ModelConfig) -> list[list[str]]:
    """Names of the tensors of every file: as many, in the order of the modules, as stay below the limit."""
    shapes, nbytes = config.tensor_shapes(), 0
    files: list[list[str]] = [[]]
    for name in module_order(config):
        size = 2 * prod(shapes[name])
        if nbytes + size > _SHARD:
            files.append([])
            nbytes = 0
        files[-1].append(name)
        nbytes += size
    return files


def in_order(pieces: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """Results of ``pieces`` in their order, a few of them made ahead on all cores."""
    cores = os.cpu_count() or 1
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for piece in pieces:
            waiting.append(pool.submit(piece))
            if len(waiting) >= _WAITING * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_shard(path: Path, names: list[str], weights: SyntheticWeights, config: ModelConfig) -> None:
    """One file: tensors lie in the order of their names, as the safetensors library has them."""
    shapes = config.tensor_shapes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names):
        begin, end = end, end + 2 * prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        told = 0
        for piece in in_order(p for name in sorted(names) for p in weights.pieces(name)):
            file.write(piece.view(torch.int16).numpy().data)
            if file.tell() - told > _TOLD:
                told = _forget(file, told)
        assert file.tell() == 8 + len(text) + end


def _forget(file: BinaryIO, told: int) -> int:
    """Tell the system that what was written need not stay in its cache: it begins to write it out."""
    file.flush()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file.tell()


def make_checkpoint(out: Path, model: str, layers: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write the folder ``out``; it appears only when whole. Bytes, seconds and MB/s.

    Raises:
        InputError: ``out`` exists, or ``layers`` is more than the model has.
        TargetError: no room for it.
    """
    raw = dict(CONFIGS[model])
    depth = raw["num_hidden_layers"]
    if layers is not None:
        if not 0 < layers <= depth:
            raise InputError(f"--layers {layers}: {model} has {depth} blocks")
        raw["num_hidden_layers"] = layers
    config = parse_config(raw)
    nbytes = 2 * config.parameters
    require_space(out, nbytes, "this checkpoint")
    files = shards(config)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    weights = SyntheticWeights(config, depth, seed)
    started = time.monotonic()
    with atomic_directory(out) as folder:
        write_json(folder / "config.json", raw)
        ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", ids)
        kind = TOKENIZERS[model]
        (folder / "tokenizer.json").write_text(tokenizer_json(kind, stripping=True), encoding="utf-8")
        # The class that takes tokenizer.json as it is; a GPT2Tokenizer would build its own split.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SETTINGS[kind], "chat_template": TEMPLATES[kind]}
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / _RECIPE, _recipe(model, layers, seed))
        for name, tensors in zip(names, files, strict=True):
            write_shard(folder / name, tensors, weights, config)
        placed = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(placed.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    seconds = time.monotonic() - started
    return {"path": str(out), "bytes": nbytes, "seconds": seconds, "mb_per_s": nbytes / seconds / 1e6}


def _recipe(model: str, layers: int | None, seed: int) -> dict[str, Any]:
    return {"made_by": "benchmarks/scale/make_checkpoint.py", "model": model, "layers": layers, "seed": seed}


def is_there(out: Path, model: str, layers: int | None, seed: int) -> bool:
    """Whether ``out`` is the checkpoint that was asked for, from an earlier call."""
    path = out / _RECIPE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == _recipe(model, layers, seed)


def make_chunks(path: Path, model: str, count: int, length: int, seed: int) -> None:
    """Write ``count`` chunks of ``length`` token ids, drawn by Zipf's law from all ids below the special ones."""
    ids = CONFIGS[model]["bos_token_id"] - 1
    probabilities = 1 / (torch.arange(ids, dtype=torch.float64) + 2.7)
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7)
    drawn = torch.multinomial(probabilities, count * length, replacement=True, generator=generator)
    # Rank and id have nothing to do with each other, whatever the seed.
    order = torch.randperm(ids, generator=torch.Generator().manual_seed(7))
    save_file({"tokens": order[drawn].reshape(count, length)}, path)
    path.chmod(0o644)  # the library leaves it to its owner alone


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--model", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--layers", type=int, help="the first blocks alone; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, help="also write token chunks, to OUT-CHUNKSxLENGTH.safetensors")
    parser.add_argument("--length", type=int, default=512, help="tokens of a chunk; %(default)s")
    parser.add_argument("--chunks-seed", type=int, default=0, help="other chunks of the same kind")
    a = parser.parse_args()
    made: dict[str, Any] = {}
    try:
        if a.chunks and is_there(a.out, a.model, a.layers, a.seed):
            made["kept"] = str(a.out)
        else:
            made |= make_checkpoint(a.out, a.model, a.layers, a.seed)
        if a.chunks:
            suffix = f"-{a.chunks_seed}" if a.chunks_seed else ""
            path = a.out.with_name(f"{a.out.name}-{a.chunks}x{a.length}{suffix}.safetensors")
            make_chunks(path, a.model, a.chunks, a.length, a.chunks_seed)
            made["chunks"] = str(path)
    except Phi4EdgeError as error:
        print(f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else ""), file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
