"""The results of other commands as typed values: drift, bench, quantize, export, and commands that failed."""

from __future__ import annotations

__all__ = [
    "Artifact",
    "Bench",
    "Document",
    "Drift",
    "Export",
    "Failure",
    "GreedyText",
    "HeldOut",
    "HeldOutKld",
    "LearnedBlock",
    "Linear",
    "Mix",
    "Quantization",
    "Reference",
    "Runtime",
    "TaskScore",
    "Text",
    "Tuning",
]

from dataclasses import dataclass
from typing import Any

from phi4edge.report.drift_parts import Attribution, Domain, Greedy, PositionBin
from phi4edge.report.fields import Metric

# What llama.cpp says of a model that it loaded, among the details of its settings.
_OF_ARTIFACT = {"model", "weight_bytes", "parameters", "file_type", "buffers", "load_mode"}


@dataclass(frozen=True)
class Artifact:
    """What was measured."""

    sha256: str
    name: str
    format: str | None
    scheme: str | None
    bytes: int | None
    bits_per_weight: float | None  # of the whole file where its parameters are known, else of the scheme's linears
    bits_of_linears: bool  # which of the two


@dataclass(frozen=True)
class Runtime:
    """What it was measured in."""

    name: str
    version: str | None
    settings: dict[str, Any]  # what it was set up with, and what that came to

    @property
    def conditions(self) -> dict[str, Any]:
        """The settings that are not facts about the artifact."""
        return {key: value for key, value in self.settings.items() if key not in _OF_ARTIFACT}

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}" if self.version else self.name


@dataclass(frozen=True)
class Reference:
    """The full-precision logits that drift is measured against."""

    model: str
    fingerprint: str
    dtype: str | None
    encoding: str | None
    noise_floor_kld: float | None
    tail_mass: float | None = None  # of the tokens that the store left out, which makes KLD a lower bound


@dataclass(frozen=True)
class Text:
    """The evaluation text."""

    name: str
    sha256: str
    context: int  # tokens a chunk
    chunks: int | None
    positions: int | None  # scored


@dataclass(frozen=True)
class Drift:
    """One artifact against the full-precision model on one text."""

    file: str
    artifact: Artifact
    runtime: Runtime
    reference: Reference
    text: Text
    metrics: dict[str, Metric]
    per_chunk_kld: tuple[float, ...]
    gates: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    domains: tuple[Domain, ...] = ()
    per_position: tuple[PositionBin, ...] = ()
    attribution: Attribution | None = None
    greedy: Greedy | None = None


@dataclass(frozen=True)
class GreedyText:
    """After how many tokens greedy texts part, where nothing was measured on a text beside it."""

    file: str
    artifact: Artifact
    runtime: Runtime
    reference: str  # the full-precision model
    greedy: Greedy


@dataclass(frozen=True)
class TaskScore:
    """Answers of an artifact and of the full-precision model to the same questions."""

    file: str
    artifact: Artifact
    runtime: Runtime
    reference: str  # model and runtime
    task: str
    n: int
    accuracy: float
    accuracy_reference: float
    difference: float
    low: float  # of the difference, 95 % over pairs
    high: float
    lost: int
    gained: int
    mcnemar_p: float
    conditions: dict[str, Any]  # how it was asked
    gates: tuple[dict[str, Any], ...]  # that the task was held against


@dataclass(frozen=True)
class Bench:
    """The speed of one artifact on one device."""

    file: str
    artifact: Artifact
    runtime: Runtime
    target: str
    transport: str | None
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    estimates: dict[str, Metric]  # names end in _estimated
    environment: dict[str, Any]
    implausible: str | None = None  # why the decode speed cannot be right


@dataclass(frozen=True)
class HeldOut:
    """Relative output error of a linear on calibration samples that no Hessian has seen."""

    rest: float  # all positions, or those after the first where the first is apart
    first: float | None  # the first position of each sample


@dataclass(frozen=True)
class Linear:
    """One solved linear; ``method`` is whose weights were taken."""

    name: str
    method: str
    loss: float | None
    heldout_error: HeldOut | None
    heldout_error_rtn: HeldOut | None


@dataclass(frozen=True)
class HeldOutKld:
    """Mean KLD on held-out samples of one domain."""

    kld: float
    se: float | None
    samples: int


@dataclass(frozen=True)
class Tuning:
    """What tuning did to a run."""

    steps: int
    kept_step: int
    kept_halvings: int  # how often what these steps changed was halved
    codes: bool  # whether codes moved too
    before: dict[str, HeldOutKld]
    after: dict[str, HeldOutKld]  # at the step that was kept


@dataclass(frozen=True)
class LearnedBlock:
    """What learned rounding did to one block: its relative error on held-out samples, and the codes that turned."""

    before: float
    after: float  # as it was kept: the same, where learning did not help
    codes_moved: float  # share


@dataclass(frozen=True)
class Mix:
    """The types that a run chose for its tensors."""

    nbytes: int
    bits_per_weight: float
    predicted_kld: float
    types: dict[str, str]
    tables: dict[str, str]


@dataclass(frozen=True)
class Quantization:
    """A finished run."""

    file: str
    run: str
    key: str | None
    model: str
    method: str
    scheme: str
    corpus: dict[str, Any] | None
    quantized_fraction: float
    seconds: float | None
    peak_rss_bytes: int | None
    events: tuple[dict[str, Any], ...]
    linears: tuple[Linear, ...]
    rounding: tuple[LearnedBlock, ...] = ()
    tuning: Tuning | None = None
    mix: Mix | None = None


@dataclass(frozen=True)
class Export:
    """An artifact that was written from a run."""

    file: str
    name: str
    format: str
    scheme: str | None
    quantized_fraction: float | None
    files: dict[str, str]  # file name → sha256


@dataclass(frozen=True)
class Failure:
    """A command that ended in an error."""

    file: str
    command: str
    code: int | None
    message: str
    hint: str | None


Document = Drift | GreedyText | Bench | Quantization | Export | Failure | TaskScore
