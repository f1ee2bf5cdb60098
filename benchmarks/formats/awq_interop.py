"""Do AutoAWQ's own unpacking, and transformers with GPTQModel, take our AWQ checkpoints for what they are?

    python benchmarks/formats/awq_interop.py

Writes small checkpoints of both kinds in several schemes, and one with a planted fault, and holds against our reader:

- AutoAWQ 0.2.9's ``dequantize_gemm``, from its source package: bit for bit, with the scales in float32;
- what GPTQModel's linears give for an identity matrix, loaded with ``AutoModelForCausalLM.from_pretrained`` in the
  environment that benchmarks/quality makes for it (minutes, once). Its kernel on a CPU multiplies in bfloat16, so
  this is a relative distance: 2^-8 is what rounding both factors to bfloat16 may cost.

Exit 0 when all agree, 8 when one does not, 5 when a peer cannot be had; only then nothing is recorded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "awq_interop.json"
AUTOAWQ = "0.2.9"
TOLERANCE = 2.0**-8  # relative, of products in bfloat16
SCHEMES = ("w4g32", "w4g64", "w4g128", "w4g32-asym", "w4g128-asym", "q4_0")
FAULT = "phi4-w4g32-asym-order"


def peer(folder: Path) -> None:
    """Runs in GPTQModel's environment: every linear's weight as its kernel gives it."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    os.chdir(folder)
    for case in sorted(path.name for path in Path().iterdir() if path.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(case, dtype=torch.bfloat16)
        linears = {name: m for name, m in model.named_modules() if ".layers." in name and hasattr(m, "qweight")}
        weights = {}
        with torch.inference_mode():
            for name, module in linears.items():
                identity = torch.eye(module.in_features, dtype=torch.bfloat16)
                weights[name] = module(identity).t().float().numpy()
        np.savez(f"{case}.npz", **weights)
        Path(f"{case}.kernel").write_text(type(next(iter(linears.values()))).__name__)


def autoawq(folder: Path) -> Any:
    """AutoAWQ's module ``packing_utils``, out of its source package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    ran = subprocess.run([*command, f"autoawq=={AUTOAWQ}"], capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"not measured: autoawq cannot be downloaded\n{ran.stderr[-800:]}", file=sys.stderr)
        sys.exit(5)
    with tarfile.open(folder / f"autoawq-{AUTOAWQ}.tar.gz") as archive:
        archive.extract(member := f"autoawq-{AUTOAWQ}/awq/utils/packing_utils.py", folder, filter="data")
    spec = importlib.util.spec_from_file_location("packing_utils", folder / member)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Write all folders; the weights that our reader gives, by folder name and linear."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from packed_support import edit_tensors
    from rounded import quantized_model
    from support import write_checkpoint

    from phi4edge.writers import awq
    from phi4edge.writers._api import WriteOptions

    def exchange(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("qzeros")]:
            tensors[name] = tensors[name].flip(1).contiguous()

    half = 12  # head_dim 32 × 0.75 / 2
    factors = {"short_factor": [1 + 0.02 * i for i in range(half)], "long_factor": [1 + 1.5 * i for i in range(half)]}
    wider = {"phi4": {}, "mini": {"rope_scaling": {"type": "longrope", **factors}}}
    expected: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as models:
        for kind, changes in wider.items():
            base = write_checkpoint(Path(models) / kind, kind, hidden_size=128, intermediate_size=256, **changes)
            for scheme in SCHEMES:
                model = quantized_model(base, scheme)
                names = [f"{kind}-{scheme}", *([FAULT] if f"{kind}-{scheme}" == FAULT.removesuffix("-order") else [])]
                for name in names:
                    path = awq.write(model, folder / name, WriteOptions()).path
                    reader = awq.read(path)
                    expected[name] = {linear: reader.tensor(f"{linear}.weight").numpy() for linear in model.linears}
                    if name == FAULT:
                        edit_tensors(exchange)(path)
    return expected


def compare(folder: Path, name: str, ours: Mapping[str, Any], packing: Any) -> dict[str, Any]:
    """One row of the result."""
    import numpy as np
    from safetensors.torch import load_file

    tensors = load_file(folder / name / "model.safetensors")
    group_size = json.loads((folder / name / "config.json").read_text())["quantization_config"]["group_size"]
    theirs = np.load(folder / f"{name}.npz")
    equal, farthest = True, 0.0
    for linear, weight in ours.items():
        packed = (tensors[f"{linear}.{field}"] for field in ("qweight", "qzeros", "scales"))
        qweight, qzeros, scales = packed
        unpacked = packing.dequantize_gemm(qweight, qzeros, scales.float(), 4, group_size).t().numpy()
        equal &= bool(np.array_equal(unpacked, weight))
        farthest = max(farthest, float(np.linalg.norm(theirs[linear] - weight) / np.linalg.norm(weight)))
    return {
        "case": name,
        "linears": len(ours),
        "kernel": (folder / f"{name}.kernel").read_text(),
        "autoawq_weights_equal": equal,
        "gptqmodel_relative_difference": farthest,
        "agrees": equal and farthest <= TOLERANCE,
        "should_agree": name != FAULT,
    }


def table(document: Mapping[str, Any]) -> str:
    """The README's table of a result file."""
    lines = ["| case | AutoAWQ's weights = ours | GPTQModel's kernel, bf16 | farthest linear |", "|---|---|---|---|"]
    for row in document["results"]["cases"]:
        fault = "" if row["should_agree"] else " (planted fault)"
        equal = "yes" if row["autoawq_weights_equal"] else "**no**"
        figure = f"{row['gptqmodel_relative_difference']:.1e}"
        lines.append(f"| {row['case']}{fault} | {equal} | {row['kernel']} | {figure} |")
    cpu = document["machine"]["cpu"]
    cpu = cpu["model"] if isinstance(cpu, dict) else cpu
    versions = ", ".join(f"{name} {version}" for name, version in document["results"]["versions"].items())
    return "\n".join([*lines, "", f"{versions}; {cpu}."])


def main() -> int:
    """Run everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer)
        return 0
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "quality")]
    from environments import environment
    from record import record, update_readme

    python = environment("gptqmodel_gptq")
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch) / "autoawq"
        sources.mkdir()
        packing = autoawq(sources)
        folder = Path(scratch) / "cases"
        folder.mkdir()
        expected = write_cases(folder)
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        command = [str(python), str(Path(__file__).resolve()), "--peer", str(folder)]
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if ran.returncode:
            tail = "\n".join(ran.stderr.strip().splitlines()[-15:])
            print(f"not measured: the peer ended with {ran.returncode}\n{tail}", file=sys.stderr)
            return 5
        cases = [compare(folder, name, ours, packing) for name, ours in expected.items()]
    script = "from importlib.metadata import version as v; print(*map(v, ('gptqmodel', 'transformers', 'torch')))"
    ran = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    versions = {
        "autoawq": AUTOAWQ,
        **dict(zip(("gptqmodel", "transformers", "torch"), ran.stdout.split(), strict=True)),
    }
    sources_run = (
        "tests/support.py",
        "tests/rounded.py",
        "tests/packed_support.py",
        "benchmarks/formats/awq_interop.py",
    )
    results = {"tolerance": TOLERANCE, "versions": versions, "cases": cases}
    document = record(RESULT, "python benchmarks/formats/awq_interop.py", results, sources_run)
    update_readme(HERE / "README.md", "awq_interop", table(document))
    print(table(document))
    return 0 if all(row["agrees"] == row["should_agree"] for row in cases) else 8


if __name__ == "__main__":
    sys.exit(main())
