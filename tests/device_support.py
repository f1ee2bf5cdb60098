"""A device for tests that is this machine over the ``local`` transport, and programs to lie on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from phi4edge.measurement.on_device import Site, open_site
from phi4edge.targets.local import detect_local
from phi4edge.transports import local
from phi4edge.transports._api import Address

# What llama-bench of llama-cpp-python 0.3.36's sources printed for a small model, with the fields that are read.
BENCH_JSON = """[
  {
    "build_commit": "unknown",
    "build_number": 0,
    "cpu_info": "AMD EPYC",
    "backends": "CPU",
    "model_filename": "/home/somebody/tiny-f16.gguf",
    "model_type": "phi3 ?B F16",
    "model_size": 279808,
    "model_n_params": 139584,
    "n_batch": 512,
    "n_ubatch": 512,
    "n_threads": 2,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": 0,
    "flash_attn": -1,
    "n_prompt": 32,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ns": 5619818,
    "samples_ns": [ 6202328, 8506069, 6017222, 1753653 ],
    "samples_ts": [ 5159.35, 3762.02, 5318.07, 18247.6 ]
  },
  {
    "build_commit": "unknown",
    "build_number": 0,
    "n_threads": 2,
    "model_size": 279808,
    "model_n_params": 139584,
    "n_prompt": 0,
    "n_gen": 8,
    "n_depth": 0,
    "samples_ns": [ 8953033, 15102172, 16044652, 3735443 ]
  }
]
"""
BENCH_HELP = """usage: llama-bench [options]
  -r, --repetitions <n>                       number of times to repeat each test (default: 5)
  --no-warmup                                 skip warmup runs before benchmarking
  -b, --batch-size <n>                              (default: 2048)
  -ctk, --cache-type-k <t>                          (default: f16)
  -ctv, --cache-type-v <t>                          (default: f16)
  -ngl, --n-gpu-layers <n>                          (default: -1)
  -fa, --flash-attn <on|off|auto>                   (default: auto)
"""
PERPLEXITY_HELP = """
-b,    --batch-size N                   logical maximum batch size (default: 2048)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-ctk,  --cache-type-k TYPE              KV cache data type for K
-ctv,  --cache-type-v TYPE              KV cache data type for V
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
--kl-divergence                         computes KL-divergence to logits provided via --kl-divergence-base
--save-all-logits, --kl-divergence-base FNAME
"""
# What llama-perplexity of the same sources printed for that model in half precision: all of it behind the chunks.
PERPLEXITY_OUTPUT = """
====== Perplexity statistics ======
Mean PPL(Q)                   : 4954.702485 ± 656.965567
Mean PPL(base)                : 4955.839619 ± 657.148497
Cor(ln(PPL(Q)), ln(PPL(base))): 100.00%
Mean ln(PPL(Q)/PPL(base))     :  -0.000229 ±   0.000140
Mean PPL(Q)/PPL(base)         :   0.999771 ±   0.000140
Mean PPL(Q)-PPL(base)         :  -1.137135 ±   0.714959

====== KL divergence statistics ======
Mean    KLD:   0.000002 ±   0.000000
Maximum KLD:   0.000032
99.9%   KLD:   0.000030
99.0%   KLD:   0.000016
95.0%   KLD:   0.000005
90.0%   KLD:   0.000004
Median  KLD:   0.000001
10.0%   KLD:   0.000000
 5.0%   KLD:  -0.000000
 1.0%   KLD:  -0.000000
 0.1%   KLD:  -0.000001
Minimum KLD:  -0.000001

====== Token probability statistics ======
Mean    Δp: -0.000 ± 0.000 %
Maximum Δp:  0.004%
99.9%   Δp:  0.003%
99.0%   Δp:  0.001%
95.0%   Δp:  0.000%
90.0%   Δp:  0.000%
75.0%   Δp:  0.000%
Median  Δp:  0.000%
25.0%   Δp: -0.000%
10.0%   Δp: -0.000%
 5.0%   Δp: -0.000%
 1.0%   Δp: -0.002%
 0.1%   Δp: -0.003%
Minimum Δp: -0.004%
RMS Δp    :  0.000 ± 0.000 %
Same top p: 100.000 ± 0.000 %
"""


def program(folder: Path, name: str, *, says: str = "", help: str = "", then: str = "exit 0") -> Path:
    """A program of that name in ``folder``: its help, or what a real one was recorded to say, and then a shell line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.help").write_text(help)
    (folder / f"{name}.says").write_text(says)
    path = folder / name
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--help) cat "$0.help"; exit 0 ;;\n'
        '--version) echo "version: 4567 (abc1234)" >&2; exit 0 ;;\nesac\n'
        f'printf "%s\\n" "$@" > "$0.arguments"\ncat "$0.says"\n{then}\n'
    )
    path.chmod(0o755)
    return path


def arguments_of(path: Path) -> list[str]:
    """What the program was started with."""
    return path.with_name(f"{path.name}.arguments").read_text().splitlines()


@contextmanager
def this_machine(folder: Path, *runners: Path | str, **changes: Any) -> Iterator[Site]:
    """This machine as a device with our folder at ``folder``; ``changes`` are of its profile."""
    with (
        local.open(Address(folder=str(folder))) as device,
        open_site(device, replace(detect_local(), **changes), runners=[str(runner) for runner in runners]) as site,
    ):
        yield site


def lies_there(site: Site) -> set[PurePosixPath]:
    """What of ours is on the device, by its place in our folder."""
    root = Path(str(site.device.folder))
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {PurePosixPath(path.as_posix()) for path in files if path.parts[0] != ".phi4edge"}
