"""Does transformers, with GPTQModel's kernels, take our GPTQ checkpoints for what they are?

    python benchmarks/formats/gptq_interop.py

Makes an environment of its own under build/peers (GPTQModel wants another NumPy than the rest; the first
time takes minutes), writes small checkpoints of both kinds in several schemes, loads each folder there with
``AutoModelForCausalLM.from_pretrained`` and compares, here, what came out with our own reader's weights:

- the weights, as GPTQModel's modules dequantize them. It multiplies in float16, so they are compared bit for
  bit with ours rounded to float16, and the distance to the unrounded ones is given too;
- the logits of the plain torch kernel in float32, against ours from the same float16 weights (this must agree)
  and from the exact ones (this shows what the float16 product costs);
- the logits of the kernel that GPTQModel chooses by itself, in the checkpoint's own bfloat16;
- a folder with one zero point table off by one, which must not agree.

Exit 0 when all agree, 8 when one does not, 5 when the environment cannot be made; only then nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "gptq_interop.json"
TOLERANCE = 1e-5  # relative, of float32 logits from the same weights
LENGTH = 40
PINS = ["torch==2.13.0", "transformers==5.23.0", "optimum==2.3.0", "accelerate", "safetensors"]
STEPS = [
    ["pip", "setuptools>=77", "wheel", "ninja", "packaging"],
    PINS,
    ["--no-build-isolation", "gptqmodel<=7.6.0"],  # its build looks at the torch that is there
]
CASES = [  # folder name, kind, scheme, fault
    ("phi4-w4g32", "phi4", "w4g32", None),
    ("phi4-w4g128", "phi4", "w4g128", None),
    ("phi4-w8g32", "phi4", "w8g32", None),
    ("phi4-q4_0", "phi4", "q4_0", None),
    ("phi4-q8_0", "phi4", "q8_0", None),
    ("phi4-w4g32-asym-v1", "phi4", "w4g32-asym", None),
    ("phi4-w4g32-asym-v2", "phi4", "w4g32-asym", "zero"),
    ("mini-w4g32", "mini", "w4g32", None),
    ("mini-w8g32", "mini", "w8g32", None),
    ("mini-w4g32-asym-v1", "mini", "w4g32-asym", None),
    ("phi4-w4g32-zeros-off-by-one", "phi4", "w4g32", "off-by-one"),
]


def peer(folder: Path) -> None:
    """Runs in the other environment: load every case, leave weights, logits and facts beside it."""
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM, GPTQConfig

    os.chdir(folder)  # short relative names in the peer's messages
    torch.set_num_threads(2)
    tokens = torch.from_numpy(np.load("tokens.npy"))

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return model(tokens).logits[0].float().numpy()

    for case in sorted(path.name for path in Path().iterdir() if path.is_dir()):
        bits = json.loads(Path(case, "config.json").read_text())["quantization_config"]["bits"]
        plain = AutoModelForCausalLM.from_pretrained(
            case, dtype=torch.float32, quantization_config=GPTQConfig(bits=bits, backend=BACKEND.TORCH.value)
        )
        modules = {name: m for name, m in plain.named_modules() if hasattr(m, "dequantize_weight")}
        weights = {name: m.dequantize_weight().t().contiguous().numpy() for name, m in modules.items()}
        chosen = AutoModelForCausalLM.from_pretrained(case, dtype=torch.bfloat16)
        np.savez(f"{case}.npz", torch_kernel=logits(plain), chosen_kernel=logits(chosen), **weights)
        names = [type(m.model.layers[0].mlp.gate_up_proj).__name__ for m in (plain, chosen)]
        try:
            GPTQModel.load(case, device="cpu", dtype=torch.bfloat16)
            direct = "loads"
        except Exception as error:  # noqa: BLE001 (whatever it says is the result)
            direct = f"refused: {str(error).splitlines()[0]}"
        facts = {"torch_kernel": names[0], "chosen_kernel": names[1], "gptqmodel_load": direct}
        Path(f"{case}.facts.json").write_text(json.dumps(facts))


def make_environment(folder: Path) -> Path:
    """The Python of the peer's environment, made if it is not there yet."""
    python, done = folder / "bin" / "python", folder / "installed.json"
    if done.is_file() and json.loads(done.read_text()) == STEPS:
        return python
    print(f"installing the peer into {folder.relative_to(ROOT)} (minutes)", file=sys.stderr)
    venv.create(folder, with_pip=True, symlinks=True, clear=True)
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "BUILD_CUDA_EXT": "0"}
    for step in STEPS:
        command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", *step]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            tail = "\n".join(ran.stderr.strip().splitlines()[-15:])
            print(f"not measured: pip install {' '.join(step)} failed\n{tail}", file=sys.stderr)
            sys.exit(5)
    done.write_text(json.dumps(STEPS))
    return python


def write_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Write all folders and the tokens; what our reader takes them for, by folder name."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from dataclasses import replace

    import numpy as np
    import torch
    from rounded import quantized_model
    from safetensors.torch import load_file, save_file
    from support import write_checkpoint

    from phi4edge.model.forward import stream_logits
    from phi4edge.quant.linear import QuantizedLinear
    from phi4edge.writers import gptq
    from phi4edge.writers._api import WriteOptions
    from phi4edge.writers._packed_folder import PackedReader

    class RoundedToFloat16:
        """Our reader, its quantized weights rounded to float16 as GPTQModel's dequantization leaves them."""

        def __init__(self, reader: PackedReader) -> None:
            self.reader, self.config = reader, reader.config

        def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
            weight = self.reader.tensor(name, rows)
            return weight if self.reader.quantized(name.removesuffix(".weight")) is None else weight.half().float()

    def zero_somewhere(linear: QuantizedLinear) -> QuantizedLinear:
        zeros = linear.params["zeros"].clone()
        zeros[0, 0] = 0
        return replace(linear, params={**linear.params, "zeros": zeros})

    tokens = torch.randint(0, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    np.save(folder / "tokens.npy", tokens.numpy())
    expected: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as models:
        for name, kind, scheme, fault in CASES:
            base = Path(models) / kind
            if not base.exists():
                write_checkpoint(base, kind, hidden_size=128, intermediate_size=256, **_wider_heads(kind))
            model = quantized_model(base, scheme, zero_somewhere if fault == "zero" else None)
            reader = gptq.read(gptq.write(model, folder / name, WriteOptions()).path)
            expected[name] = {
                "scheme": scheme,
                "checkpoint_format": reader.format.checkpoint_format,
                "weights": {linear: reader.tensor(f"{linear}.weight").numpy() for linear in model.linears},
                "logits": next(stream_logits(reader, tokens)).numpy(),
                "logits_float16_weights": next(stream_logits(RoundedToFloat16(reader), tokens)).numpy(),
            }
            if fault == "off-by-one":
                file = folder / name / "model.safetensors"
                tensors = load_file(file)
                tensors["model.layers.1.mlp.down_proj.qzeros"] += 0x11111111
                save_file(tensors, file, metadata={"format": "pt"})
    return expected


def _wider_heads(kind: str) -> dict[str, Any]:
    if kind != "mini":
        return {}
    half = 12  # head_dim 32 × 0.75 / 2
    factors = {"short_factor": [1 + 0.02 * i for i in range(half)], "long_factor": [1 + 1.5 * i for i in range(half)]}
    return {"rope_scaling": {"type": "longrope", **factors}}


def compare(folder: Path, name: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the result: the peer's weights and logits of case ``name`` against ``ours``."""
    import numpy as np

    theirs = np.load(folder / f"{name}.npz")
    weights: Mapping[str, Any] = ours["weights"]
    missing = sorted(weights.keys() - set(theirs.files))
    present = [linear for linear in weights if linear not in missing]

    def relative(actual: Any, wanted: Any) -> float:
        return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))

    farthest = max(float(np.abs(theirs[n].astype(np.float32) - weights[n]).max()) for n in present)
    equal = all(np.array_equal(theirs[n].astype(np.float16), weights[n].astype(np.float16)) for n in present)
    to_rounded = relative(theirs["torch_kernel"], ours["logits_float16_weights"])
    return {
        "case": name,
        "scheme": ours["scheme"],
        "checkpoint_format": ours["checkpoint_format"],
        **json.loads((folder / f"{name}.facts.json").read_text()),
        "linears": len(weights),
        "linears_not_dequantized_there": missing,
        "weights_equal_ours_rounded_to_float16": equal,
        "weights_max_abs_difference_unrounded": farthest,
        "logits_relative_difference_same_float16_weights": to_rounded,
        "logits_relative_difference_exact_weights": relative(theirs["torch_kernel"], ours["logits"]),
        "logits_relative_difference_chosen_kernel_bfloat16": relative(theirs["chosen_kernel"], ours["logits"]),
        "agrees": equal and not missing and to_rounded <= TOLERANCE,
        "should_agree": not name.endswith("off-by-one"),
    }


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages in the peer's environment that matter."""
    script = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in ('gptqmodel', 'optimum', 'transformers', 'torch', 'numpy')}))"
    )
    ran = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


def table(document: Mapping[str, Any]) -> str:
    """The README's table of a result file."""
    lines = [
        "| case | format | kernel | weights = ours in fp16 | logits, same fp16 weights | logits, exact weights "
        "| logits, chosen kernel, bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["results"]["cases"]:
        figures = " | ".join(
            f"{row[f'logits_relative_difference_{key}']:.1e}"
            for key in ("same_float16_weights", "exact_weights", "chosen_kernel_bfloat16")
        )
        equal = "yes" if row["weights_equal_ours_rounded_to_float16"] else "**no**"
        fault = "" if row["should_agree"] else " (planted fault)"
        lines.append(
            f"| {row['case']}{fault} | {row['checkpoint_format']} | {row['torch_kernel']}, "
            f"{row['chosen_kernel']} | {equal} | {figures} |"
        )
    cpu = document["machine"]["cpu"]
    cpu = cpu["model"] if isinstance(cpu, dict) else cpu
    peer_versions = ", ".join(f"{name} {version}" for name, version in document["results"]["versions"].items())
    return "\n".join([*lines, "", f"{peer_versions}; {cpu}."])


def main() -> int:
    """Run everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "peers" / "gptqmodel")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer)
        return 0
    python = make_environment(arguments.environment.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        expected = write_cases(folder)
        environment = {
            **os.environ,
            "GPTQMODEL_CPU_WORKERS": "2",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
        }
        ran = subprocess.run(
            [str(python), str(Path(__file__).resolve()), "--peer", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            tail = "\n".join(ran.stderr.strip().splitlines()[-15:])
            print(f"not measured: the peer ended with {ran.returncode}\n{tail}", file=sys.stderr)
            return 5
        cases = [compare(folder, name, ours) for name, ours in expected.items()]
    results = {"tolerance": TOLERANCE, "tokens": LENGTH, "versions": versions(python), "cases": cases}
    sources = ("tests/support.py", "tests/rounded.py", "benchmarks/formats/gptq_interop.py")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from record import record, update_readme  # the peer's environment, which runs this file too, has no phi4edge

    document = record(RESULT, "python benchmarks/formats/gptq_interop.py", results, sources)
    update_readme(HERE / "README.md", "gptq_interop", table(document))
    print(table(document))
    return 0 if all(row["agrees"] == row["should_agree"] for row in cases) else 8


if __name__ == "__main__":
    sys.exit(main())
