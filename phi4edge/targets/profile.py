"""What phi4edge knows of a device: one typed value. :mod:`phi4edge.targets.schema` reads it from a TOML file.

Units stand in the names. ``gb`` is 10⁹ bytes, except in ``ram_gb``, which is the size that the vendor prints on the
box (RAM comes in powers of two, so "8 GB" are 8.6 · 10⁹ bytes). Every other figure says where it comes from: a
number alone rests on the file's ``sources``, and a guess is printed as estimated, with its reason, wherever it appears.
"""

from __future__ import annotations

__all__ = [
    "ACCELERATORS",
    "ARCHITECTURES",
    "FOREIGN_SCHEMES",
    "FORMATS",
    "ISA",
    "KINDS",
    "KV_TYPES",
    "LOCAL",
    "MEMORY",
    "POWER_INTERFACES",
    "RUNTIMES",
    "TRANSPORTS",
    "Accelerator",
    "Anchor",
    "Compute",
    "Connection",
    "Efficiency",
    "Figure",
    "Gates",
    "Profile",
    "RuntimeOption",
]

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

KINDS = ("laptop", "desktop", "jetson", "phone", "board")
MEMORY = ("system", "unified", "vram")
ARCHITECTURES = ("x86_64", "aarch64")
ISA = ("avx2", "f16c", "fma", "avx512", "vnni", "amx", "fp16", "dotprod", "i8mm", "bf16", "sve", "sme")
ACCELERATORS = ("gpu", "igpu", "npu")
TRANSPORTS = ("local", "ssh", "adb", "browser")
POWER_INTERFACES = ("rapl", "tegrastats", "nvidia-smi", "powermetrics", "battery", "none")
KV_TYPES = ("f32", "f16", "q8_0", "q4_0")
# What exists in the world, so that a misspelt name is caught; which of them phi4edge makes is the registry's to say.
RUNTIMES = (
    "llama_cpp",
    "onnxruntime_genai",
    "transformers",
    "vllm",
    "openvino",
    "mlx",
    "mlc",
    "executorch",
    "tensorrt_edge_llm",
    "genie",
)
FORMATS = ("gguf", "gptq", "awq", "compressed_tensors", "onnx", "openvino_ir", "mlx", "mlc", "pte", "tensorrt", "qnn")
# Grids that devices are good at and that no scheme of phi4edge is solved for yet.
FOREIGN_SCHEMES = ("8da4w", "w4a16", "w8a16", "nvfp4", "fp8")
LOCAL = "local"  # the id of this machine, which has no file


@dataclass(frozen=True)
class Figure:
    """A number with its provenance. ``value`` None: not known, and ``reason`` says why."""

    value: float | None
    low: float | None = None  # where the truth lies, when that is a range; low ≤ value ≤ high
    high: float | None = None
    source: str | None = None  # None: the profile's ``sources``
    estimated: bool = False
    reason: str | None = None  # why it is a guess, or why there is no value

    def bounds(self, spread: float = 0.0) -> tuple[float, float] | None:
        """The range of the figure; one without a range of its own is taken ± ``spread``. None: not known."""
        if self.value is None:
            return None
        low = self.value * (1 - spread) if self.low is None else self.low
        return low, self.value * (1 + spread) if self.high is None else self.high

    def text(self, unit: str = "") -> str:
        """``"5.2 GB (5.2-6.3), estimated"``, or ``"not measured"`` / ``"not known"``."""
        if self.value is None:
            return "not measured" if self.reason and self.reason.startswith("not measured") else "not known"
        spread = "" if self.low is None and self.high is None else f" ({self.low:g}–{self.high:g})"
        return f"{self.value:g}{f' {unit}' if unit else ''}{spread}{', estimated' if self.estimated else ''}"


@dataclass(frozen=True)
class Accelerator:
    """A processor beside the CPU."""

    kind: str  # one of ACCELERATORS
    name: str
    api: str  # what programs it: "cuda sm_87", "metal", "opencl", "hexagon", …


@dataclass(frozen=True)
class RuntimeOption:
    """A runtime that serves well on the device; a profile lists them best first."""

    name: str  # one of RUNTIMES
    backend: str  # "cpu", "cuda", "metal", "npu", …
    formats: tuple[str, ...]  # what it loads, preferred first
    schemes: tuple[str, ...]  # what it runs fast, preferred first
    kv_types: tuple[str, ...]  # of the KV cache, its default first
    overhead_gb: Figure | None  # what the process takes beside weights, KV cache and compute buffers
    layer_us: Figure | None = None  # what a layer costs in a decode step beside its bytes, microseconds


@dataclass(frozen=True)
class Efficiency:
    """Share of the memory bandwidth that decoding reaches: tok/s × bytes read a token ÷ bandwidth."""

    runtime: str
    backend: str
    bits: int
    figure: Figure  # in (0, 1]
    scheme: str | None = None  # type of the weights it was measured with; None: whatever has these bits


@dataclass(frozen=True)
class Compute:
    """What a prompt is computed at: 2 · weights · tokens ÷ seconds."""

    runtime: str
    backend: str
    bits: int
    figure: Figure  # 10⁹ operations a second
    scheme: str | None = None  # as an efficiency's


@dataclass(frozen=True)
class Connection:
    """Where the user's own device is found; None: what the transport finds by itself."""

    transport: str | None = None
    address: str | None = None
    folder: str | None = None  # ours, on the device
    options: tuple[str, ...] = ()  # for the transport's client


@dataclass(frozen=True)
class Anchor:
    """A published measurement on the device."""

    model: str
    decode_tps: float
    runtime: str  # as the source says; "unknown" where it does not
    precision: str  # as the source says
    source: str


@dataclass(frozen=True)
class Gates:
    """What an artifact for the device must keep, by the names of ``phi4edge drift``; None: nothing is asked."""

    max_kld: float | None = None  # nat
    max_ppl_ratio: float | None = None
    min_top1: float | None = None  # a fraction
    max_task_drop: float | None = None  # accuracy, a fraction
    min_reference_share: float | None = None  # of the full-precision model's accuracy; MLPerf asks for 0.99

    def given(self) -> dict[str, float]:
        """The limits that are asked for, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Profile:
    """One device."""

    id: str
    name: str
    kind: str
    sources: tuple[str, ...]
    notes: str
    ram_gb: float  # as sold (of `local`: 10⁹ bytes, as the system counts)
    memory: str  # "system", "unified" (CPU and GPU share it), "vram" (a graphics card's own: all figures are its)
    usable_ram_gb: Figure  # what one process can take, 10⁹ bytes
    bandwidth_gb_s: Figure  # peak of that memory, 10⁹ bytes a second
    arch: str
    cpu: str
    cores: int | None
    isa: tuple[str, ...]
    accelerators: tuple[Accelerator, ...]
    transports: tuple[str, ...]  # how it is reached, preferred first
    power_interface: str
    default_context: int  # tokens
    min_decode_tps: float | None  # a scheme is chosen so that this is kept, where it can be estimated
    runtimes: tuple[RuntimeOption, ...]  # preferred first
    efficiency: tuple[Efficiency, ...]
    anchors: tuple[Anchor, ...]
    gates: Gates = Gates()
    compute: tuple[Compute, ...] = ()
    connection: Connection = Connection()

    @property
    def usable_bytes(self) -> int:
        """Memory that weights, KV cache, buffers and the process may take together."""
        assert self.usable_ram_gb.value is not None  # the schema and the detection of `local` give one
        return int(self.usable_ram_gb.value * 1e9)

    def efficiency_of(self, option: RuntimeOption, scheme: str, bits: int) -> Efficiency | None:
        """The efficiency of a runtime for ``scheme``, else at the nearest bit width; None when none is known."""
        return _nearest(self.efficiency, option, scheme, bits)

    def compute_of(self, option: RuntimeOption, scheme: str, bits: int) -> Compute | None:
        """The compute rate of a runtime for ``scheme``, else at the nearest bit width; None when none is known."""
        return _nearest(self.compute, option, scheme, bits)

    def estimates(self) -> list[tuple[str, Figure]]:
        """Every figure that is a guess, with its place in the file."""
        figures = [("usable_ram_gb", self.usable_ram_gb), ("bandwidth_gb_s", self.bandwidth_gb_s)]
        figures += [(f"efficiency {e.runtime} {e.backend} {e.bits} bit", e.figure) for e in self.efficiency]
        figures += [(f"compute {c.runtime} {c.backend} {c.bits} bit", c.figure) for c in self.compute]
        figures += [(f"overhead_gb {r.name}", r.overhead_gb) for r in self.runtimes if r.overhead_gb]
        figures += [(f"layer_us {r.name}", r.layer_us) for r in self.runtimes if r.layer_us]
        return [(place, figure) for place, figure in figures if figure.estimated]

    def as_dict(self) -> dict[str, Any]:
        """The profile as a JSON object, figures with their provenance."""
        return asdict(self)


Rate = TypeVar("Rate", Efficiency, Compute)


def _nearest(entries: Sequence[Rate], option: RuntimeOption, scheme: str, bits: int) -> Rate | None:
    """The entry measured with ``scheme``, else that of the nearest bits, a general one before another scheme's."""
    known = [e for e in entries if (e.runtime, e.backend) == (option.name, option.backend)]
    exact = [e for e in known if e.scheme == scheme]
    return exact[0] if exact else min(known, key=lambda e: (abs(e.bits - bits), e.scheme is not None), default=None)
