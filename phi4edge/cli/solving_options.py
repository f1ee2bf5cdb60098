"""Options that say how codes are solved for, and the recipe that they make."""

from __future__ import annotations

__all__ = ["read_types", "recipe_from_options", "recipe_text", "solving_options"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.jsonfile import read_object
from phi4edge.core.memory import parse_bytes
from phi4edge.core.recipe import (
    BFLOAT16,
    COMPUTES,
    EFFORTS,
    ROTATIONS,
    CorpusRecipe,
    MixRecipe,
    Recipe,
    RoundingRecipe,
    TuningRecipe,
    solving_recipe,
)
from phi4edge.core.registry import names
from phi4edge.quant.scheme import parse_scheme, scheme_from_options

F = TypeVar("F", bound=Callable[..., Any])
Pairs = tuple[tuple[str, str], ...]
CANDIDATES = "q4_0,q4_1,q5_0,q5_1,q4_k,q5_k,q6_k,q8_0"


def _preset(key: str) -> str:
    """What each effort sets for ``key``, for a help text."""
    return (
        "[default by effort: " + ", ".join(f"{name} {values.get(key, 0):g}" for name, values in EFFORTS.items()) + "]"
    )


_OPTIONS = (
    click.option(
        "--method",
        type=click.Choice(names("phi4edge.solvers")),
        default="gptq",
        show_default=True,
        envvar="PHI4EDGE_METHOD",
        help="gptq compensates rounding errors; rtn rounds to nearest on searched scales; awq is rtn with --awq.",
    ),
    click.option(
        "--effort",
        type=click.Choice(list(EFFORTS)),
        default="default",
        show_default=True,
        envvar="PHI4EDGE_EFFORT",
        help="How much time drift is worth: low solves, default refines and aims at full precision, high learns its "
        "rounding and tunes too.",
    ),
    click.option("--bits", type=int, help="4 or 8.  [default: 4]"),
    click.option(
        "--scheme", envvar="PHI4EDGE_SCHEME", help="w4g32, w4g128-asym, w8row, q4_0, q5_1, q8_0, q4_k, q6_k, …"
    ),
    click.option(
        "--target-bpw", type=float, help="Choose a scheme for each tensor: bits a parameter of the whole file."
    ),
    click.option("--target-size", metavar="SIZE", help="The same by the size of all tensors, e.g. 2.3GiB."),
    click.option(
        "--candidates", metavar="SCHEMES", help=f"Schemes to choose from then, with commas.  [default: {CANDIDATES}]"
    ),
    click.option(
        "--types",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A mix given back: the manifest of a run, or JSON with `types` and `tables`.",
    ),
    click.option("--group-size", type=int, help="Input channels that share a scale; -1: a whole row.  [default: 32]"),
    click.option(
        "--symmetric/--asymmetric", default=None, help="Grid with or without zero points.  [default: symmetric]"
    ),
    click.option("--act-order", is_flag=True, help="Most excited columns first; groups stay in place (static groups)."),
    click.option("--group-aware", is_flag=True, help="Most excited groups first; scales searched as each is reached."),
    click.option(
        "--damp-percent",
        type=float,
        default=Recipe.damp_percent,
        show_default=True,
        help="Share of the mean of diag H added to the diagonal.",
    ),
    click.option(
        "--sink-share",
        type=float,
        default=Recipe.sink_share,
        show_default=True,
        help="Share of the Hessian given to first positions (attention sinks).",
    ),
    click.option(
        "--shrinkage",
        type=float,
        default=Recipe.shrinkage,
        show_default=True,
        help="How far H is drawn to its diagonal: more carries over better to other text.",
    ),
    click.option(
        "--refit/--no-refit",
        default=None,
        help="Least squares for the steps, given the codes.  [default by effort: low no, default and high yes]",
    ),
    click.option(
        "--sweeps",
        type=click.IntRange(0),
        help="Passes of coordinate descent over the codes, at most.  " + _preset("sweeps"),
    ),
    click.option(
        "--full-precision-targets",
        metavar="ALPHA",
        type=float,
        help="Aim at what full precision computes: 0 not at all, 1 wholly.  " + _preset("full_precision_targets"),
    ),
    click.option(
        "--output-curvature",
        metavar="STRENGTH",
        type=float,
        help="Let rows of o_proj and down_proj answer for each other's errors by what the model makes of them "
        "together: 0 not at all, 1 wholly.  " + _preset("output_curvature"),
    ),
    click.option(
        "--curvature-samples",
        type=click.IntRange(1),
        default=Recipe.curvature_samples,
        show_default=True,
        help="Calibration samples that this is measured on, at most.",
    ),
    click.option(
        "--awq/--no-awq",
        default=False,
        help="Scale input channels by their activations before rounding, with any method.  [default: off]",
    ),
    click.option(
        "--rotation",
        type=click.Choice(ROTATIONS),
        help="Rotate the residual stream, the value heads or both, folded into the weights; auto: both, if the head is "
        "not tied.  [default by effort: low none, default and high auto; none with awq]",
    ),
    click.option("--rotation-seed", type=int, default=Recipe.rotation_seed, show_default=True, help="Which rotation."),
    click.option(
        "--compute",
        type=click.Choice(COMPUTES),
        default=Recipe.compute,
        show_default=True,
        envvar="PHI4EDGE_COMPUTE",
        help="Matrix products of forward passes and Hessians: float32, or the CPU's bfloat16 units; auto: the faster "
        "one here, measured. A resumed run keeps what it began with.",
    ),
    click.option(
        "--guard/--no-guard", default=True, help="Compare each linear with rtn on samples kept aside.  [default: on]"
    ),
    click.option(
        "--round-passes",
        type=float,
        help="Learn the rounding of each block on what full precision puts out of it, so often over the samples; 0: "
        "the solver's codes stay.  " + _preset("round_passes"),
    ),
    click.option(
        "--round-rate",
        type=float,
        help=f"Peak rate of it, in codes a step.  [default: {RoundingRecipe.code_rate:g}]",
    ),
    click.option(
        "--tune-passes",
        type=float,
        help="Tune scales and norm gains on KLD to full precision, so often over the samples; 0: not at all.  "
        + _preset("tune_passes"),
    ),
    click.option("--tune-rate", type=float, help=f"Peak learning rate of it.  [default: {TuningRecipe.learning_rate}]"),
    click.option("--tune-batch", type=int, help=f"Samples a step of it.  [default: {TuningRecipe.batch}]"),
    click.option(
        "--tune-codes",
        metavar="RATE",
        type=float,
        help=f"Peak rate, in codes a step, at which tuning moves codes too; 0: they stay. Experimental: see "
        f"benchmarks/quality.  [default: {TuningRecipe.code_rate:g}]",
    ),
)


def solving_options(function: F) -> F:
    """Every option of the solver. The command takes them as ``**options`` and hands them to recipe_from_options."""
    for decorator in reversed(_OPTIONS):
        function = decorator(function)
    return function


def recipe_from_options(options: Mapping[str, Any], corpus: CorpusRecipe | None) -> Recipe:
    """The recipe that values of :func:`solving_options` make, with calibration text ``corpus``.

    Raises:
        UsageError, InputError: values that are impossible or contradict each other.
    """
    given = dict(options)
    scheme = scheme_from_options(*(given.pop(key) for key in ("scheme", "bits", "group_size", "symmetric")))
    bpw, size, candidates = (given.pop(key) for key in ("target_bpw", "target_size", "candidates"))
    if bpw is not None or size is not None:
        chosen = tuple(parse_scheme(name.strip()).name for name in (candidates or CANDIDATES).split(","))
        given["mix"] = MixRecipe(chosen, bpw, parse_bytes(size) if size else None)
    elif candidates is not None:
        raise UsageError("--candidates are for a mix", "give --target-bpw or --target-size too")
    types = given.pop("types")
    if types is not None:
        given["types"], given["tables"] = read_types(types)
    return solving_recipe({**given, "scheme": scheme.name}, corpus)


def read_types(path: Path) -> tuple[Pairs, Pairs]:
    """The linears' schemes and the tables' types of a mix, from a manifest or from JSON of the same shape.

    Raises:
        InputError: something else is in the file.
    """
    document = read_object(path, "give the manifest.json of a run with a mix")
    data = document.get("data", document)
    allocation = data.get("allocation") or data
    found: list[Pairs] = []
    for key in ("types", "tables"):
        table = allocation.get(key, {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise InputError(f"{path}: {key} is not a table of names")
        found.append(tuple(table.items()))
    if not found[0]:
        raise InputError(f"{path}: no types in it", "give the manifest.json of a run with a mix")
    return found[0], found[1]


def recipe_text(recipe: Recipe) -> str:
    """The recipe in a line."""
    corpus, mix, tuning = recipe.corpus, recipe.mix, recipe.tuning
    text = "data-free" if corpus is None else f"{corpus.corpus}, {corpus.samples} × {corpus.sequence_length} tokens"
    scheme = recipe.scheme if mix is None else f"a mix of {', '.join(mix.candidates)}"
    scaled = " with awq scales" if recipe.awq else ""
    turned = "" if recipe.rotation == "none" else f", rotation {recipe.rotation}"
    codes = "" if tuning is None or not tuning.code_rate else ", codes too"
    tuned = "" if tuning is None else f", tuned {tuning.passes:g} × over the samples{codes}"
    coupled = "" if not recipe.output_curvature else f", output curvature {recipe.output_curvature:g}"
    rounding = recipe.rounding
    products = ", products in bfloat16" if recipe.compute == BFLOAT16 else ""
    rounded = "" if rounding is None else f", rounding learned {rounding.passes:g} × over the samples"
    return f"{recipe.method} {scheme}{scaled}{turned}{coupled}, calibration: {text}{products}{rounded}{tuned}"
