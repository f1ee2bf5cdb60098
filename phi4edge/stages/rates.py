"""What this machine does at a model's shapes, measured in seconds: a few pieces of each kind of work, run for real.

Products are measured on the widths that the model has, with fewer rows (what a row costs does not hang on how many
there are); H, D and the factorisation on at most 4,096 channels; the solver on the rows that its threads take at a time
and a few hundred columns. The checkpoint is read at places drawn anew each time, so that a second measurement does not
find what the first one left in the page cache; what is written to the run's disk has no name and is gone at once.
"""

from __future__ import annotations

__all__ = ["Clock", "estimate", "estimate_shapes", "measure_rates", "work_of"]

import hashlib
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.calibration.blockpass import COMPUTED_TOKENS, samples_together
from phi4edge.calibration.budget import TUNING_PIECE_TOKENS, MemoryPlan, head_rows, plan_memory
from phi4edge.calibration.statistics import InputMoments
from phi4edge.calibration.store import ActivationStore
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.digest import check_piece
from phi4edge.checkpoint.reader import CheckpointReader, finite_values, read_tensor
from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import InputError
from phi4edge.core.hashing import HashedFile
from phi4edge.core.recipe import BFLOAT16, Recipe
from phi4edge.core.registry import load as load_plugin
from phi4edge.distillation.loss import Head
from phi4edge.distillation.rounding import Latent
from phi4edge.model.block import LINEARS, down_input, o_input, rms_norm
from phi4edge.model.compute import choose_compute, computing, prepared, product
from phi4edge.model.crossed import Part, add_products, over_tokens
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import WeightSource
from phi4edge.model.tiles import TILE, in_pairs, tiles
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces, run_parallel
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.solvers import gptq, rtn
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._refine import refine
from phi4edge.stages.inputs import FILES_AT_ONCE
from phi4edge.stages.job import Job
from phi4edge.stages.predict import LinearRates, Prediction, Rates, Work, predict, solver_products

Clock = Callable[[], float]

_WIDEST = 4096  # channels of a Hessian that is measured
_VALUES = 2**23  # weights of a product that is measured
_PRODUCT = 1024  # rows and columns of one that solvers make
_SOLVED = 2**21  # weights that the solver is measured on
_CORRELATED = 256  # directions in which the solver's columns hang together
_FEW = 8  # rows
_VERY_LONG, _LONG, _REPEATED = 1.0, 0.1, 0.03  # seconds: made once, made twice; spent on what is shorter
_TOKENS = 512  # in a product, where no corpus says how many
_WRITTEN = 2**25  # bytes
_READS = 3  # tensors
_PUBLISHED = 2  # bytes a weight, where no checkpoint says: bfloat16


def estimate(job: Job, folder: Path, preparing: float = 0.0, clock: Clock = time.perf_counter) -> Prediction:
    """How long ``job`` will take on this machine, its run in ``folder`` (which need not be there yet).

    ``preparing`` is what it took to make the job; ``clock`` gives seconds: those of a wall, or of this process's CPUs
    where the machine is shared.

    Raises:
        InputError: the disk cannot be written to.
    """
    stored = job.checkpoint.stored_dtype(f"model.layers.0.{LINEARS[0]}.weight").itemsize
    work = work_of(job.checkpoint.config, job.recipe, job.scheme, stored, job.memory)
    work = replace(work, files=min(FILES_AT_ONCE, len(job.checkpoint.index.shards)))
    return predict(work, measure_rates(work, folder, job.checkpoint, job.source, clock), preparing)


def estimate_shapes(config: ModelConfig, recipe: Recipe, folder: Path) -> Prediction:
    """The same for a model of which no weight is at hand: reading it is left out, and said to be."""
    recipe = replace(recipe, compute=choose_compute(recipe.compute))
    work = work_of(config, recipe, parse_scheme(recipe.scheme), _PUBLISHED, plan_memory(config, recipe, None))
    return predict(work, measure_rates(work, folder))


def work_of(config: ModelConfig, recipe: Recipe, scheme: Scheme, stored: int, memory: MemoryPlan) -> Work:
    """What a recipe has to do, in the terms of a prediction; ``stored`` is bytes a weight."""
    return Work(config, recipe, scheme, stored, memory.spill, memory.spill_tuning, memory.keep_graphs)


def measure_rates(
    work: Work,
    folder: Path,
    checkpoint: CheckpointReader | None = None,
    source: WeightSource | None = None,
    clock: Clock = time.perf_counter,
) -> Rates:
    """Rates for ``work``; without a checkpoint, reading takes no time."""
    with torch.inference_mode():
        return _Measurement(work, folder, clock).rates(checkpoint, source)


class _Measurement:
    def __init__(self, work: Work, folder: Path, clock: Clock) -> None:
        self._work, self._recipe, self._config = work, work.recipe, work.config
        self._clock = clock
        while not folder.is_dir():
            folder = folder.parent
        self._folder = folder
        self._generator = torch.Generator().manual_seed(0)
        corpus = work.recipe.corpus
        self._length = corpus.sequence_length if corpus is not None else _TOKENS

    def rates(self, checkpoint: CheckpointReader | None, source: WeightSource | None) -> Rates:
        config, length = self._config, self._length
        by_width: dict[int, LinearRates] = {}
        heads = []
        for rows, n in sorted(set(config.linear_shapes.values()), reverse=True):
            if n not in by_width:  # by the tallest of a width: what a row costs does not hang on how many there are
                by_width[n] = self._linear(rows, n)
                # By itself each would be of a moment, and tuning is for the most part this.
                heads += [self._head()] if self._recipe.tuning is not None else []
        norm = attention = activation = scratch = head = 0.0
        if self._recipe.corpus is not None:
            hidden = self._draw(1, length, config.hidden_size)
            gain = torch.ones(config.hidden_size)
            norm = self._seconds(lambda: rms_norm(hidden, gain, config.rms_norm_eps))
            qkv = self._draw(1, length, config.q_size + 2 * config.kv_size)
            rotary = rotary_table(config.rope, length)
            attention = self._seconds(lambda: o_input(qkv, rotary, config))
            gate_up = self._draw(1, length, 2 * config.intermediate_size)
            activation = self._seconds(lambda: down_input(gate_up))
            scratch = self._scratch() if self._work.spill or self._work.spill_tuning else 1.0
            heads += [self._head()] if self._recipe.tuning is not None else []
            head = sorted(heads)[len(heads) // 2] if heads else 0.0
        read, disk, check = math.inf, math.inf, math.inf
        if checkpoint is not None and source is not None:
            read, disk, check = self._read(checkpoint, source)
        write, sync = self._write()
        threads = torch.get_num_threads()
        linears = {name: by_width[n] for name, (_, n) in config.linear_shapes.items()}
        return Rates(linears, norm, attention, activation, read, disk, check, write, sync, scratch, head, threads)

    # --- computing -------------------------------------------------------------------------------------------

    def _linear(self, rows: int, n: int) -> LinearRates:
        moments = crossed = factor = 1.0
        if self._recipe.corpus is not None:
            moments, crossed, factor = self._squares(n)
        with computing(self._recipe.compute):
            forward = self._forward(rows, n)
        dense = self._dense(rows, n)
        errors = self._errors(n, dense)
        solve, nearest, decode, learn = self._solver(rows, n, dense, errors)
        return LinearRates(forward, dense, errors, moments, crossed, factor, solve, nearest, decode, learn)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of ``call``, without the first, which finds no memory ready; a long one is made twice."""
        spent: list[float] = []
        while sum(spent) < _REPEATED or len(spent) < 3:
            began = self._clock()
            call()
            spent.append(self._clock() - began)
            if spent[0] > _VERY_LONG or (len(spent) > 1 and spent[1] > _LONG):
                break
        spent = spent[1:] or spent
        return max(sorted(spent)[len(spent) // 2], 1e-9)

    def _forward(self, rows: int, n: int) -> float:
        x = self._draw(samples_together(self._length, COMPUTED_TOKENS), self._length, n)
        rows = min(rows, max(256, _VALUES // n))
        weight = prepared(self._draw(rows, n))
        return 2 * x.numel() * rows / self._seconds(lambda: product(x, weight))

    def _dense(self, rows: int, n: int) -> float:
        W, H = self._draw(min(rows, _PRODUCT), n), self._draw(n, min(n, _PRODUCT))
        return 2 * W.numel() * H.shape[1] / self._seconds(lambda: W @ H)

    def _errors(self, n: int, dense: float) -> float:
        units = tiles() if self._recipe.compute == BFLOAT16 else None
        if units is None:
            return dense
        left, right = self._draw(TILE, n).bfloat16(), in_pairs(self._draw(n, TILE))
        threads = torch.get_num_threads()
        pieces = [partial(units.add, torch.zeros(TILE, TILE), left, right) for _ in range(threads)]
        return 2 * threads * left.numel() * TILE / self._seconds(lambda: run_parallel(pieces))

    def _squares(self, n: int) -> tuple[float, float, float]:
        """Rates of H's sum, of D's and of the factorisation."""
        n, length = min(n, _WIDEST), self._length
        x, away = self._draw(1, length, n), self._draw(length, n)
        moments = InputMoments(n, full=True)
        D = torch.zeros(n, n)
        with computing(self._recipe.compute):
            summed = length * n * n / self._seconds(lambda: moments.add(x))
            factor = over_tokens(x[0])
            crossed = 2 * length * n * n / self._seconds(lambda: add_products([Part(D)], over_tokens(away), factor))
        D.zero_().addmm_(away.T, away).diagonal().add_(float(length))
        problem = Problem("measured", D[:1], D, parse_scheme("w8row"), None)
        options = SolverOptions(self._recipe.damp_percent)
        return summed, crossed, n**3 / 3 / self._seconds(lambda: gptq.factor(problem, options))

    def _solver(self, rows: int, n: int, dense: float, errors: float) -> tuple[float, float, float, float]:
        """Seconds a weight in the solver's loops, in rounding to nearest, in decoding, and in learning its rounding."""
        scheme = self._work.scheme
        piece = row_pieces(rows, n)[0].stop
        together = piece * min(torch.get_num_threads(), -(-rows // piece))
        unit = scheme.unit if scheme.unit > 0 else 128
        columns = min(n, max(unit, _SOLVED // together // unit * unit))
        W = self._draw(together, columns)
        mean_square = self._draw(columns).square() + 0.1
        count = together * columns
        recipe = self._recipe
        options = SolverOptions(
            recipe.damp_percent,
            recipe.act_order,
            rows=piece,
            refit=recipe.refit,
            sweeps=recipe.sweeps,
            group_aware=recipe.group_aware,
            on_units=recipe.compute == BFLOAT16,
        )
        known = None if recipe.corpus is None and recipe.imatrix_sha256 is None else mean_square
        rounding = Problem("measured", W, None, scheme, known)
        rtn.solve(replace(rounding, weight=W[:_FEW]), options)  # what is compiled is loaded at its first use
        nearest = self._seconds(lambda: rtn.solve(rounding, options)) / count
        solution = rtn.solve(rounding, options)
        decode = self._seconds(solution.linear.dequantize) / count
        learn = 0.0 if recipe.rounding is None else self._learn(solution.linear, W) / count
        if recipe.method != "gptq" and not recipe.refined:
            return 0.0, nearest, decode, learn
        x = self._draw(min(columns, _CORRELATED), columns)
        H = (x.T @ x / x.shape[0]).add_(torch.diag(mean_square))
        problem = Problem("measured", W, H, scheme, None)
        solver = load_plugin("phi4edge.solvers", recipe.method)

        def solve() -> Solution:
            return refine(problem, solver.solve(problem, options), options)

        solver.solve(replace(problem, weight=W[:_FEW]), options)
        # Products are counted apart, as they grow with n².
        handed_on, others = solver_products(recipe, columns)
        products = 2 * together * columns**2 * (handed_on / errors + others / dense)
        seconds = self._seconds(solve)
        return max(seconds - products, 0.2 * seconds) / count, nearest, decode, learn

    def _learn(self, linear: QuantizedLinear, dW: Tensor) -> float:
        """Seconds of a step of learned rounding, products and dequantized weights left out."""
        latent = Latent(linear, torch.zeros(dW.shape, dtype=torch.float16))
        steps, _ = grid_for(linear.scheme).steps(linear.params)

        def step() -> Tensor:
            latent.move(steps, dW, 0, 0.0)
            return latent.codes()

        return self._seconds(step)

    def _head(self) -> float:
        """Seconds a position and word, of a slice of the head and a piece of a batch."""
        config = self._config
        rows, positions = min(config.vocab_size, head_rows(config)), max(self._length, TUNING_PIECE_TOKENS)
        weight = torch.full((rows, config.hidden_size), 0.01, dtype=torch.bfloat16)
        head = Head(lambda start, stop: weight[start:stop], rows, rows)
        hidden, other = self._draw(2, positions, config.hidden_size).unbind()
        with computing(self._recipe.compute):
            seconds = self._seconds(lambda: head.divergence(hidden, other, gradient=True))
        return seconds / (positions * rows)

    # --- disks -----------------------------------------------------------------------------------------------

    def _read(self, checkpoint: CheckpointReader, source: WeightSource) -> tuple[float, float, float]:
        """Bytes/s of the checkpoint through the recipe's source, from the disk, and as it is checked and hashed."""
        draw = random.SystemRandom()
        nbytes, fetching, reading, checking = 0, 0.0, 0.0, 0.0
        for _ in range(_READS):
            name = f"model.layers.{draw.randrange(self._config.num_layers)}.{LINEARS[1]}.weight"
            ref = checkpoint.place(name)
            nbytes += ref.nbytes
            around_cache = self._recipe.by_rows and checkpoint.outgrows_memory
            began = self._clock()
            stored = read_tensor(ref, around_cache=around_cache)
            fetched = self._clock() - began
            if around_cache:  # what is left is to widen what is there
                reading += self._once(partial(finite_values, ref, stored))
            else:
                fetched = max(fetched - self._once(partial(read_tensor, ref)), 0.0)
                reading += self._once(partial(source.tensor, name))
            fetching += fetched
            data = stored.reshape(-1).view(torch.uint8).numpy()
            checking += self._once(lambda data=data: hashlib.sha256(data.data))  # type: ignore[misc]  # mypy knows no defaults
            checking += self._once(partial(check_piece, ref, 0, data))
        return nbytes / max(reading, 1e-9), nbytes / max(fetching, 1e-9), nbytes / max(checking, 1e-9)

    def _once(self, call: Callable[[], object]) -> float:
        began = self._clock()
        call()
        return self._clock() - began

    def _write(self) -> tuple[float, float]:
        """Bytes/s of a file that is written, synced and hashed; seconds of one that holds nothing to speak of."""
        data = bytes(self._room())
        try:
            sync = min(self._written(b"\0") for _ in range(3))
            whole = self._written(data)
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written to ({error.strerror})", "choose another --out"
            ) from error
        return len(data) / max(whole - sync, 1e-9), sync

    def _room(self) -> int:
        """Bytes to write for a measurement: little beside what is free, so that no run fails for it."""
        return max(1, min(_WRITTEN, shutil.disk_usage(self._folder).free // 16))

    def _written(self, data: bytes) -> float:
        began = self._clock()
        with tempfile.TemporaryFile(dir=self._folder) as file:
            with HashedFile(file) as hashed:
                hashed.write(data)
            os.fsync(file.fileno())
        return self._clock() - began

    def _scratch(self) -> float:
        """Bytes/s of activations in a file, which loses its name as soon as it is open."""
        values = torch.zeros(1, max(1, self._room() // (4 * self._config.hidden_size * 4)), self._config.hidden_size)
        store = ActivationStore(4, values.shape[1], values.shape[2], self._folder / f"measured{PARTIAL}")
        began = self._clock()
        for i in range(4):
            store.write(i, values)
        for i in range(4):
            store.read(i, i + 1)
        seconds = self._clock() - began
        store.close()
        return 2 * store.nbytes / max(seconds, 1e-9)
