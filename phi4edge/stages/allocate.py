"""Bit allocation: a type for every matrix, so that predicted KLD is least under a budget of bytes.

Every candidate type is tried on every linear by rounding to nearest on searched scales, and on head and embedding by
the rounding that a GGUF gives them. What its error would cost in KLD is predicted from :mod:`sensitivity`; the choice
is exact (:mod:`phi4edge.quant.knapsack`). The figures are predictions: of the mix that comes out, `drift` measures KLD.

    RUN/allocation/      a run directory of its own, a step a block; the last one holds the choice
"""

from __future__ import annotations

__all__ = ["ALLOCATION", "Allocation", "allocate", "check_budget"]

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import TargetError
from phi4edge.core.events import Progress
from phi4edge.core.memory import format_bytes
from phi4edge.core.recipe import MixRecipe
from phi4edge.core.workdir import Workdir
from phi4edge.model.block import LINEARS
from phi4edge.quant.ggml import BLOCK_TYPES, block_type_of, dequantize, packing_refusal
from phi4edge.quant.ggml_rounding import quantize_q6_k, quantize_q8_0
from phi4edge.quant.knapsack import Option, choose_options
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import rtn
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.stages.job import Job
from phi4edge.stages.sensitivity import measure_sensitivity, predicted_kld, sensitivity_costs
from phi4edge.stages.tuning_state import cost, total_cost

ALLOCATION = "allocation"
_TABLES = {"head": "lm_head", "embedding": "model.embed_tokens"}
_TABLE_TYPES = ("q6_k", "q8_0", "f16")  # never below 6 bits
_PIECE = 1 << 22  # weights of a table in RAM at a time


@dataclass(frozen=True)
class Allocation:
    """The chosen mix."""

    types: dict[str, str]  # scheme of every linear
    tables: dict[str, str]  # type of "head" and "embedding" in a GGUF
    summary: dict[str, Any]  # for the manifest
    performance: dict[str, float]  # seconds and peak_rss_bytes, sensitivity included

    @property
    def base(self) -> str:
        """The scheme that most linears have."""
        return Counter(self.types.values()).most_common(1)[0][0]


def allocate(job: Job, run: Path, key: str, progress: Progress) -> Allocation:
    """Choose a type for every linear, the head and the embedding within the recipe's budget.

    Raises:
        TargetError: even the smallest candidates exceed the budget.
        ResumeError: another process works here.
    """
    mix = job.recipe.mix
    assert mix is not None
    sensitivity = measure_sensitivity(job, run, key, min(mix.samples, job.recipe.kept), progress)
    config = job.checkpoint.config
    with Workdir.open(run / ALLOCATION, {"kind": "allocate", "run": key}) as work:
        progress.start(ALLOCATION, config.num_layers + 1, "block", min(len(work.records), config.num_layers + 1))
        for layer in range(len(work.records), config.num_layers):
            progress.status(f"block {layer}")
            started = time.monotonic()
            costs = _block_costs(job, mix, layer, sensitivity)
            work.commit({"costs": costs, "performance": cost(time.monotonic() - started)}, [])
            progress.advance()
        if len(work.records) == config.num_layers:
            started = time.monotonic()
            costs = _table_costs(job, sensitivity)
            work.commit({"costs": costs, "performance": cost(time.monotonic() - started)}, [])
            progress.advance()
        progress.finish()
        costs = {name: found for record in work.records for name, found in record["costs"].items()}
        spent = total_cost([*sensitivity_costs(run), *(record["performance"] for record in work.records)])
    return _choose(config, mix, costs, spent)


def check_budget(config: ModelConfig, mix: MixRecipe) -> None:
    """Whether any mix of the candidates can keep to the budget; from the shapes alone, before anything is read.

    Raises:
        TargetError: even the smallest candidates exceed the budget.
    """
    smallest = _fixed_bytes(config)
    for name, (rows, columns) in _matrices(config).items():
        kinds = _candidates(mix, rows, columns) if name not in _TABLES else _table_types(config)
        sizes = [_nbytes(kind, rows, columns) for kind in kinds]
        if not sizes:
            raise TargetError(f"{name}: no candidate fits rows of {columns} weights", "name others with --candidates")
        smallest += min(sizes)
    budget = mix.budget(config.parameters)
    if smallest > budget:
        least_bpw = math.ceil(800 * smallest / config.parameters) / 100
        raise TargetError(
            f"the smallest mix of {', '.join(mix.candidates)} takes {format_bytes(smallest)}, "
            f"the budget is {format_bytes(budget)}",
            f"give --target-size {-(-smallest // 2**20)}MiB or more, or --target-bpw {least_bpw:.2f}",
        )


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of everything that gets a type: linears by name, "head", and "embedding" where it is not the head too."""
    roles = ("head",) if config.tie_word_embeddings else tuple(_TABLES)
    return config.linears | dict.fromkeys(roles, (config.vocab_size, config.hidden_size))


def _candidates(mix: MixRecipe, rows: int, columns: int) -> list[str]:
    return [kind for kind in mix.candidates if packing_refusal(parse_scheme(kind), rows, columns) is None]


def _table_types(config: ModelConfig) -> list[str]:
    return [kind for kind in _TABLE_TYPES if config.hidden_size % BLOCK_TYPES[kind].weights == 0]


def _fixed_bytes(config: ModelConfig) -> int:
    """Bytes of the norms, which stay float32."""
    return sum(4 * shape[0] for shape in config.tensor_shapes().values() if len(shape) == 1)


def _block_costs(job: Job, mix: MixRecipe, layer: int, sensitivity: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Predicted KLD of every candidate for the linears of one block; candidates that do not fit are left out."""
    costs: dict[str, dict[str, float]] = {}
    for linear in LINEARS:
        name = f"model.layers.{layer}.{linear}"
        weight = job.source.tensor(f"{name}.weight")
        rows, columns = sensitivity[f"{name}.rows"], sensitivity[f"{name}.columns"]
        costs[name] = {}
        for candidate in _candidates(mix, *weight.shape):
            problem = Problem(name, weight, None, parse_scheme(candidate), columns)
            rounded = rtn.solve(problem, SolverOptions()).linear.dequantize()
            costs[name][candidate] = predicted_kld(weight - rounded, rows, columns)
    return costs


def _table_costs(job: Job, sensitivity: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The same for the embedding and the head; a tied one pays for both uses."""
    config = job.checkpoint.config
    tied = config.tie_word_embeddings
    costs: dict[str, dict[str, float]] = {}
    for role, name in _TABLES.items():
        if tied and role == "embedding":
            continue
        tensor = job.checkpoint.head_name if role == "head" else f"{name}.weight"
        uses = list(_TABLES.values()) if tied else [name]
        costs[role] = {}
        for kind in _table_types(config):
            total, step = 0.0, max(1, _PIECE // config.hidden_size)
            for start in range(0, config.vocab_size, step):
                piece = slice(start, min(start + step, config.vocab_size))
                weight = job.source.tensor(tensor, piece)
                error = weight - _rounded_table(weight, kind)
                total += sum(
                    predicted_kld(error, sensitivity[f"{use}.rows"][piece], sensitivity[f"{use}.columns"])
                    for use in uses
                )
            costs[role][kind] = total
    return costs


def _rounded_table(weight: Tensor, kind: str) -> Tensor:
    if kind == "f16":
        return weight.to(torch.float16).float()
    packed = quantize_q6_k(weight) if kind == "q6_k" else quantize_q8_0(weight)
    return dequantize(BLOCK_TYPES[kind], packed)


def _choose(
    config: ModelConfig, mix: MixRecipe, costs: dict[str, dict[str, float]], spent: dict[str, float]
) -> Allocation:
    shapes, fixed = _matrices(config), _fixed_bytes(config)
    options = [
        [Option(kind, _nbytes(kind, *shapes[name]), predicted) for kind, predicted in found.items()]
        for name, found in costs.items()
    ]
    budget = mix.budget(config.parameters)
    choice = choose_options(options, budget - fixed)
    assert choice is not None, "refused by check_budget"
    picked = {name: found[i] for name, found, i in zip(costs, options, choice.chosen, strict=True)}
    types = {name: option.name for name, option in picked.items() if name not in _TABLES}
    tables = {role: picked[role].name for role in _TABLES if role in picked}
    summary = {
        "budget_bytes": budget,
        "nbytes": choice.nbytes + fixed,
        "bits_per_weight": 8 * (choice.nbytes + fixed) / config.parameters,
        "predicted_kld": choice.cost,
        "unused_by_rounding": choice.slack,
        "types": types,
        "tables": tables,
        "predicted": costs,
    }
    return Allocation(types, tables, summary, spent)


def _nbytes(kind: str, rows: int, columns: int) -> int:
    block = BLOCK_TYPES.get(kind) or block_type_of(parse_scheme(kind))
    assert block is not None
    return rows * block.row_bytes(columns)
