"""What a run was asked to do: everything that decides its codes, as one value.

Settings come, strongest first, from a flag, a ``PHI4EDGE_*`` variable, a recipe TOML, and these defaults.
"""

from __future__ import annotations

__all__ = [
    "BFLOAT16",
    "COMPUTES",
    "EFFORTS",
    "FLOAT32",
    "ROTATIONS",
    "CorpusRecipe",
    "MixRecipe",
    "Recipe",
    "RoundingRecipe",
    "TuningRecipe",
    "solving_recipe",
]

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from phi4edge.core.errors import UsageError

FLOAT32, BFLOAT16 = "float32", "bfloat16"
COMPUTES = ("auto", FLOAT32, BFLOAT16)  # auto: the faster one on this machine
ROTATIONS = ("none", "residual", "heads", "residual+heads", "auto")  # auto: residual+heads where that can be folded


@dataclass(frozen=True)
class CorpusRecipe:
    """Which text is run through the model, and how much of it."""

    corpus: str = "builtin"  # a name, a recipe, a text or a JSONL file; or several, NAME=SHARE,…
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    chat_template: bool | None = None  # None: as the corpus says of its parts

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.samples < 1:
            raise UsageError(f"samples {self.samples} is not positive")
        if self.sequence_length < 2:
            raise UsageError(f"sequence_length {self.sequence_length} is too short", "use at least 2")

    @property
    def tokens(self) -> int:
        """Calibration tokens in all."""
        return self.samples * self.sequence_length


@dataclass(frozen=True)
class TuningRecipe:
    """How scales, minima and norm gains are tuned end to end once the codes are solved."""

    passes: float = 2.0  # over the calibration samples
    learning_rate: float = 1e-3  # peak of the one-cycle schedule, relative to each value
    batch: int = 2  # samples a step
    code_rate: float = 0.0  # peak rate, in codes a step, at which codes move too; 0: they stay
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not self.passes > 0:
            raise UsageError(f"tuning passes {self.passes} is not positive", "leave tuning out with --tune-passes 0")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"tuning learning_rate {self.learning_rate} is not between 0 and 1")
        if not 0 <= self.code_rate < 1:
            raise UsageError(f"tuning code_rate {self.code_rate} is not between 0 and 1")
        if self.batch < 1:
            raise UsageError(f"tuning batch {self.batch} is not positive")


@dataclass(frozen=True)
class RoundingRecipe:
    """How the rounding of each block is learned on what full precision puts out of it, before the next is solved."""

    passes: float = 2.0  # over the calibration samples
    code_rate: float = 0.005  # peak of the one-cycle schedule, in codes a step
    learning_rate: float = 1e-3  # that of scales and minima, relative to each value
    batch: int = 2  # samples a step
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not self.passes > 0:
            raise UsageError(f"rounding passes {self.passes} is not positive", "leave it out with --round-passes 0")
        for name in ("code_rate", "learning_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"rounding {name} {getattr(self, name)} is not between 0 and 1")
        if self.batch < 1:
            raise UsageError(f"rounding batch {self.batch} is not positive")


@dataclass(frozen=True)
class MixRecipe:
    """A type for every tensor, chosen from predicted KLD under a budget of bytes."""

    candidates: tuple[str, ...]  # schemes that a linear may have
    target_bpw: float | None = None  # bits a parameter, all tensors of the file counted
    target_bytes: int | None = None  # of all tensors
    samples: int = 16  # that sensitivity is measured on

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if (self.target_bpw is None) == (self.target_bytes is None):
            raise UsageError("a mix needs a budget", "give either --target-bpw or --target-size")
        if not self.candidates:
            raise UsageError("a mix needs candidates", "name schemes, e.g. --candidates q4_k,q5_k,q6_k")

    def budget(self, parameters: int) -> int:
        """Bytes that all tensors together may take."""
        if self.target_bytes is not None:
            return self.target_bytes
        assert self.target_bpw is not None
        return int(self.target_bpw * parameters / 8)


@dataclass(frozen=True)
class Recipe:
    """How codes are solved for."""

    method: str = "gptq"
    scheme: str = "w4g32"
    corpus: CorpusRecipe | None = CorpusRecipe()  # None: data-free
    damp_percent: float = 0.01
    act_order: bool = False
    group_aware: bool = False  # the other order of columns: whole groups
    refit: bool = False  # least squares for the steps, given the codes
    sweeps: int = 0  # passes of coordinate descent over the codes, at most
    sink_share: float | None = 0.05  # share of H's trace given to first positions; None: what they have
    shrinkage: float = 0.25  # how far H is drawn towards its diagonal
    full_precision_targets: float = 0.0  # how far to aim at what full precision computes: 0 not at all, 1 wholly
    output_curvature: float = 0.0  # how far writers' rows answer for each other: 0 not at all, 1 by all that F says
    curvature_samples: int = 24  # that F is measured on, at most
    guard: bool = True  # compare every linear with RTN on samples kept aside
    awq: bool = False  # scale input channels by activation, whatever the method; the method "awq" always does
    rotation: str = "none"  # what is rotated before anything is rounded: one of ROTATIONS
    rotation_seed: int = 0
    compute: str = "auto"  # matrix products of forward passes and Hessians: one of COMPUTES
    mix: MixRecipe | None = None  # None: every linear on ``scheme``
    types: tuple[tuple[str, str], ...] = ()  # linears that have another scheme, by name: a mix given back
    tables: tuple[tuple[str, str], ...] = ()  # types of "head" and "embedding" that such a mix has in a GGUF
    imatrix_sha256: str | None = None  # of a given importance matrix, in place of calibration text
    rounding: RoundingRecipe | None = None  # None: the solver's codes
    tuning: TuningRecipe | None = None  # None: the codes' own scales and the checkpoint's gains

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 <= self.damp_percent <= 1:
            raise UsageError(f"damp_percent {self.damp_percent} is not between 0 and 1")
        if self.sink_share is not None and not 0 <= self.sink_share < 1:
            raise UsageError(f"sink_share {self.sink_share} is not between 0 and 1")
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"shrinkage {self.shrinkage} is not between 0 and 1")
        if self.mix is not None and (self.corpus is None or self.types):
            raise UsageError("a mix is chosen from calibration text, or given, not both", "give a --corpus or --types")
        if self.tuning is not None and (self.corpus is None or not self.guard):
            raise UsageError(
                "tuning needs calibration text, some of it kept aside", "give a --corpus, and not --no-guard"
            )
        if self.rounding is not None and not self.full_precision_targets > 0:
            raise UsageError(
                "rounding is learned on what full precision puts out, which only full-precision targets keep at hand",
                "give --full-precision-targets 0.5, or --round-passes 0",
            )
        if self.rounding is not None and not (self.guard and self.method == "gptq" and not self.awq):
            raise UsageError(
                "rounding is learned from gptq's codes of the checkpoint's own weights, with samples kept aside",
                "use --method gptq without --awq and without --no-guard, or --round-passes 0",
            )
        if self.act_order and self.group_aware:
            raise UsageError("act_order and group_aware are two orders of the same columns", "give one of both")
        if self.tuning is not None and self.tuning.code_rate and self.scales_inputs:
            raise UsageError(
                "tuning that moves codes starts from the checkpoint's own weights, which awq scales",
                "leave out awq, or --tune-codes",
            )
        if self.sweeps < 0:
            raise UsageError(f"sweeps {self.sweeps} is negative")
        if not 0 <= self.full_precision_targets <= 1:
            raise UsageError(f"full_precision_targets {self.full_precision_targets} is not between 0 and 1")
        if self.corpus is None and self.whole_hessian:
            raise UsageError(
                "refit, sweeps, full-precision targets and output curvature need calibration text", "name a --corpus"
            )
        if not 0 <= self.output_curvature <= 1:
            raise UsageError(f"output_curvature {self.output_curvature} is not between 0 and 1")
        if self.curvature_samples < 1:
            raise UsageError(f"curvature_samples {self.curvature_samples} is not positive")
        if self.output_curvature and self.method != "gptq":
            raise UsageError(
                f"output curvature hands errors on from row to row, which --method {self.method} does not",
                "use --method gptq, or --output-curvature 0",
            )
        if self.corpus is not None and self.guard and self.corpus.samples < 2:
            raise UsageError("the held-out guard needs at least 2 samples", "give more --samples, or --no-guard")
        if self.rotation not in ROTATIONS:
            raise UsageError(f"unknown rotation {self.rotation!r}", f"one of {', '.join(ROTATIONS)}")
        if self.compute not in COMPUTES:
            raise UsageError(f"unknown compute {self.compute!r}", f"one of {', '.join(COMPUTES)}")
        if self.imatrix_sha256 is not None and (self.method != "rtn" or self.corpus is not None):
            what = "calibration text" if self.method == "rtn" else f"--method {self.method}"
            raise UsageError(
                f"an imatrix says how much an input channel counts, and {what} measures more than that",
                "give --imatrix with --method rtn and no --corpus",
            )
        if self.imatrix_sha256 is not None and self.rotation != "none":
            raise UsageError("an imatrix is of the channels as they are, not as rotated", "leave out --rotation")
        if self.corpus is None and self.scales_inputs:
            raise UsageError("awq needs calibration text", "name a --corpus, or use --method rtn without --awq")

    @property
    def scales_inputs(self) -> bool:
        """Whether input channels are scaled before a linear is rounded."""
        return self.awq or self.method == "awq"

    @property
    def by_rows(self) -> bool:
        """Whether a weight is rounded as its rows are read, so that no whole one need be in RAM."""
        return self.corpus is None and self.rotation == "none"

    @property
    def held_out(self) -> int:
        """Samples kept aside from the Hessians: an eighth, at least one."""
        return 0 if self.corpus is None or not self.guard else max(1, self.corpus.samples // 8)

    @property
    def refined(self) -> bool:
        """Whether codes or steps are gone over once more after the solver."""
        return self.refit or self.sweeps > 0

    @property
    def whole_hessian(self) -> bool:
        """Whether the whole of H is needed whatever the solver makes of it."""
        return self.refined or self.full_precision_targets > 0 or self.output_curvature > 0

    @property
    def hessian_used_up(self) -> bool:
        """Whether nothing asks for a linear's H once it is factored."""
        coupled = self.output_curvature > 0
        return self.method == "gptq" and not (self.refined or coupled or self.rounding is not None)

    @property
    def kept(self) -> int:
        """Samples that Hessians are made of and tuning learns from."""
        return 0 if self.corpus is None else self.corpus.samples - self.held_out

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return asdict(self)


# What an effort sets where nothing else is said; benchmarks/quality shows what each is worth, and what it costs.
_DEFAULT = {"full_precision_targets": 0.5, "refit": True, "sweeps": 3, "rotation": "auto"}
EFFORTS: dict[str, dict[str, Any]] = {
    "low": {"full_precision_targets": 0.0, "refit": False, "sweeps": 0},
    "default": _DEFAULT,
    "high": {**_DEFAULT, "round_passes": 2.0, "tune_passes": 2.0},
}
_FEWEST_TO_LEARN = 32  # samples; with fewer, what is learned fits them and little else
_ROUNDING = {"round_passes": "passes", "round_rate": "code_rate"}
_TUNING = {"tune_passes": "passes", "tune_rate": "learning_rate", "tune_batch": "batch", "tune_codes": "code_rate"}


def solving_recipe(given: Mapping[str, Any], corpus: CorpusRecipe | None) -> Recipe:
    """A recipe from flat settings as the command line and a recipe's [quantize] have them; None is not given.

    Keys are those of :class:`Recipe`, ``effort`` (one of EFFORTS), ``round_passes`` and ``round_rate``, and
    ``tune_passes``, ``tune_rate``, ``tune_batch`` and ``tune_codes``. An effort asks for tuning and learned rounding
    only where there is calibration text of which some is kept aside, for the latter only from gptq's codes of unscaled
    weights, and for rotation only where awq does not scale channels, which a rotation leaves no outliers in.

    Raises:
        UsageError: an unknown effort, or values that contradict each other.
    """
    settings = {key: value for key, value in given.items() if value is not None}
    effort = settings.pop("effort", "default")
    if effort not in EFFORTS:
        raise UsageError(f"unknown effort {effort!r}", f"one of {', '.join(EFFORTS)}")
    learned = {key: settings.pop(key) for key in _ROUNDING if key in settings}
    asked = {key: settings.pop(key) for key in _TUNING if key in settings}
    preset = dict(EFFORTS[effort])
    rounded, tuned = ({key: preset.pop(key) for key in keys if key in preset} for keys in (_ROUNDING, _TUNING))
    scaled = settings.get("awq") or settings.get("method") == "awq"
    if scaled:
        preset.pop("rotation", None)
    if corpus is not None and settings.get("method") != "rtn":
        settings = {**preset, **settings}
    can_learn = corpus is not None and settings.get("guard", True) and corpus.samples >= _FEWEST_TO_LEARN
    aims = settings.get("method", "gptq") == "gptq" and not scaled and settings.get("full_precision_targets", 0) > 0
    rounding = {**(rounded if can_learn and aims else {}), **learned}
    if rounding.get("round_passes", 0) > 0:
        settings["rounding"] = RoundingRecipe(**{_ROUNDING[key]: value for key, value in rounding.items()})
    elif learned.keys() - {"round_passes"}:
        raise UsageError("learned rounding is set up but not asked for", "give --round-passes, or --effort high")
    if can_learn or asked:
        tuning = {**(tuned if can_learn else {}), **asked}
        if tuning.get("tune_passes", 0) > 0:
            settings["tuning"] = TuningRecipe(**{_TUNING[key]: value for key, value in tuning.items()})
        elif asked.keys() - {"tune_passes"}:
            raise UsageError("tuning is set up but not asked for", "give --tune-passes, or --effort high")
    return Recipe(corpus=corpus, **settings)
