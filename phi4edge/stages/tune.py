"""Tune: group scales, minima and norm gains of a finished set of codes, end to end, on KLD(full precision ‖ quantized).

A step takes a batch of calibration samples forward through all blocks, keeping only what goes into each, and backward
again, block by block; a block's parameters move as soon as its gradient is there. So one block's weights are in RAM at
a time, and states, codes and what lies between blocks are in RAM or on disk as the budget asks; where there is room
for it, blocks stay as they were on the way forward. The bytes are the same, and so they are after a kill, on a machine
with as many threads: matrix products of a few rows may add up in another order on another number of them. The samples
kept aside by the guard say whether it helps: the state that does best on them is the one that is kept.

What a step knows of a value is mostly noise, and small steps of Adam are as long as certain ones. What they have in
common grows with the number of steps, what is noise with its root; where that is too far, all changes are halved at
the end, as long as it lowers KLD on the samples kept aside: the loss from noise falls to a quarter, the gain to a half.

    RUN/tuning/          a run directory of its own: teacher, state after the last committed step, result
"""

from __future__ import annotations

__all__ = ["tune"]

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.calibration.blockpass import put_embeddings
from phi4edge.calibration.budget import TUNING_PIECE_TOKENS
from phi4edge.calibration.store import ActivationStore
from phi4edge.core.events import Progress
from phi4edge.core.memory import format_bytes, release_memory, rss_bytes
from phi4edge.core.parts import PartTimes
from phi4edge.core.workdir import Workdir
from phi4edge.distillation.adam import adam_step, learning_rate, new_state
from phi4edge.distillation.block import BlockRunner
from phi4edge.distillation.codes import code_step, codes_of, latent_state
from phi4edge.distillation.parameters import (
    Continuous,
    QuantizedBlock,
    continuous_of,
    gradients_of_theta,
    values_of,
)
from phi4edge.model.block import forward_block, load_block, rms_norm
from phi4edge.model.rope import rotary_table
from phi4edge.quant.grid import grid_for
from phi4edge.stages.head import open_head
from phi4edge.stages.job import Job
from phi4edge.stages.run_reader import read_block, read_norms, tuned_file
from phi4edge.stages.tuning_account import Tuned, account
from phi4edge.stages.tuning_state import TUNING, TuningStates, best_step, cost, put_tensors, score

_COMMIT_SECONDS = 30.0  # work that a kill may cost, where states are in RAM
_EVALUATIONS = 3  # on held-out samples after the start
_LOST = 0.1  # of ln KLD above its start. While the rate is high KLD may rise; most of the gain comes as it falls.
_HALVINGS = 3  # of what all steps have changed, at the most
_THETA = 2  # what θ stands for; 1: no scale took its minimum along. States of another are not gone on with.
_FINAL_NORM = "model.norm.weight"
_TEACHER = "teacher.bin"


def tune(job: Job, run: Path, key: str, progress: Progress) -> Tuned:
    """Tune the committed blocks of ``run``; a process that starts again goes on after the last committed step.

    Raises:
        ResumeError: another process works here.
    """
    assert job.recipe.tuning is not None
    inputs = {"kind": "tune", "run": key, "theta": _THETA}
    with Workdir.open(run / TUNING, inputs) as work:
        if not (work.records and "best" in work.records[-1]):
            _Tuner(job, run, work, progress).run()
        return account(job.recipe.tuning, work)


class _Tuner:
    """The loop over steps, and what it holds between them."""

    def __init__(self, job: Job, run: Path, work: Workdir, progress: Progress) -> None:
        assert job.corpus is not None
        assert job.recipe.tuning is not None
        self._job, self._run, self._work, self._progress = job, run, work, progress
        self._recipe, self._config = job.recipe.tuning, job.checkpoint.config
        self._tokens = job.corpus.tokens
        self._train = self._tokens.shape[0] - job.recipe.held_out
        self._steps = max(1, math.ceil(self._recipe.passes * self._train / self._recipe.batch))
        self._rotary = rotary_table(self._config.rope, self._tokens.shape[1])
        self._per_piece = max(1, TUNING_PIECE_TOKENS // self._tokens.shape[1])
        self._held: dict[int, QuantizedBlock] = {}
        self._parts = PartTimes()
        self._dtype = job.checkpoint.stored_dtype(_FINAL_NORM)
        final = continuous_of(job.source.tensor(_FINAL_NORM), self._dtype)
        self._final = Continuous(read_norms(run, None).get(_FINAL_NORM, final.start), final.unit, self._dtype)
        self._states = TuningStates(work, self._config.num_layers, in_ram=not job.memory.spill_tuning)

    def run(self) -> None:
        """From the last committed step to the end."""
        step, committed = self._states.resume(), time.monotonic()
        with self._parts.part("teacher"):
            committed = self._teach(committed)
        progress = self._progress
        progress.start("tune", self._steps, "step", step)
        losses: list[float] = []
        if not self._evaluated(0):
            record: dict[str, Any] = {"heldout": self._evaluate()}
            committed = self._commit(0, record, committed)
        marks = {round(self._steps * (i + 1) / _EVALUATIONS) for i in range(_EVALUATIONS)}
        while step < self._steps and not self._exhausted() and not self._halvings():
            losses.append(self._step(step))
            step += 1
            progress.advance()
            progress.status(f"KLD {losses[-1]:.4f} · RSS {format_bytes(rss_bytes())}")
            due = step in marks
            if due or not self._states.in_ram or time.monotonic() - committed > _COMMIT_SECONDS:
                record = {"losses": losses}
                if due:
                    record["heldout"] = self._evaluate()
                losses, committed = [], self._commit(step, record, committed)
        while self._worth_halving():
            self._halve()
            step += 1
            committed = self._commit(step, {"halvings": self._halvings() + 1, "heldout": self._evaluate()}, committed)
        self._write_result()
        progress.finish()

    def _commit(self, step: int, record: dict[str, Any], began: float) -> float:
        """Keep the state; when the commit began, as what it takes itself is in the next one's seconds and parts."""
        parts, now = self._parts.take(), time.monotonic()
        with self._parts.part("write"):
            self._states.commit(step, record, cost(now - began) | {"parts": parts})
        return now

    # --- the model -------------------------------------------------------------------------------------------

    def _base(self, layer: int) -> QuantizedBlock:
        """Block ``layer`` as it was solved."""
        if layer in self._held:
            return self._held[layer]
        prefix = f"model.layers.{layer}."
        names = (f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight")
        changed = read_norms(self._run, layer)
        gains = {name: changed.get(name, self._job.source.tensor(name)) for name in names}
        block = QuantizedBlock(tuple(read_block(self._run, layer, self._job.scheme_of)), gains, self._dtype)
        if self._states.in_ram:
            self._held[layer] = block
        return block

    def _block(self, layer: int) -> tuple[QuantizedBlock, dict[str, Continuous], dict[str, Tensor]]:
        """Block ``layer`` with what was tuned so far, what of it is tuned, and the optimizer's state of that."""
        base = self._base(layer)
        continuous = base.continuous
        state = self._states.load(layer) or self._new_state(base, continuous)
        values = values_of(continuous, {name: state[name][0] for name in continuous})
        codes = {}
        if self._recipe.code_rate:
            codes = {linear.name: codes_of(linear, state[_latent(linear.name)][0]) for linear in base.linears}
        return base.with_values(values, codes), continuous, state

    def _new_state(self, base: QuantizedBlock, continuous: dict[str, Continuous]) -> dict[str, Tensor]:
        state = {name: new_state(c.start) for name, c in continuous.items()}
        if self._recipe.code_rate:
            for linear in base.linears:
                weight = self._job.source.tensor(f"{linear.name}.weight")
                state[_latent(linear.name)] = latent_state(linear, weight)
        return state

    def _runner(self, layer: int) -> BlockRunner:
        return BlockRunner(self._block(layer)[0], self._rotary, self._config)

    def _forward(self, hidden: list[Tensor]) -> None:
        """Send pieces through all blocks, in place, keeping nothing."""
        for layer in range(self._config.num_layers):
            runner = self._runner(layer)
            hidden[:] = [runner.forward(x) for x in hidden]
            del runner  # its weights go before the next block's come

    def _forward_of_a_step(self, hidden: list[Tensor]) -> list[BlockRunner]:
        """The same; each block's graph is kept where the budget allows it, otherwise what goes into the block."""
        runners = []
        for layer in range(self._config.num_layers):
            with self._parts.part("read"):
                runner = self._runner(layer)
            if self._job.memory.keep_graphs:
                with self._parts.part("forward"):
                    hidden[:] = [runner.forward_kept(x) for x in hidden]
                runners.append(runner)
                continue
            at = layer * self._recipe.batch
            for i, x in enumerate(hidden):
                with self._parts.part("write"):
                    self._between.write(at, x)
                at += x.shape[0]
                with self._parts.part("forward"):
                    hidden[i] = runner.forward(x)
            del runner  # its weights go before the next block's come
        return runners

    def _final_state(self) -> Tensor:
        held = self._states.load(self._config.num_layers)
        return held[_FINAL_NORM] if held else new_state(self._final.start)

    # --- a step ----------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> list[int]:
        """Samples of a step: every pass in an order of its own, batches running on across passes."""
        first, size = step * self._recipe.batch, self._recipe.batch
        orders: dict[int, list[int]] = {}
        for i in range(first, first + size):
            turn = i // self._train
            if turn not in orders:
                generator = torch.Generator().manual_seed(1_000_003 * self._recipe.seed + turn)
                orders[turn] = torch.randperm(self._train, generator=generator).tolist()
        return [orders[i // self._train][i % self._train] for i in range(first, first + size)]

    def _step(self, step: int) -> float:
        batch = self._batch(step)
        config = self._config
        rate = learning_rate(step, self._steps, self._recipe.learning_rate)
        pieces = [batch[i : i + self._per_piece] for i in range(0, len(batch), self._per_piece)]
        hidden = [self._inputs(piece) for piece in pieces]
        runners = self._forward_of_a_step(hidden)
        parts = self._parts
        with parts.part("head"):
            loss, slopes, gain_gradient = self._head_backward(hidden, pieces)
            state = adam_step(self._final_state(), gain_gradient * self._final.unit, step, rate)
            self._states.store(config.num_layers, {_FINAL_NORM: state})
        for layer in reversed(range(config.num_layers)):
            slopes = self._backward_of_a_block(step, layer, slopes, runners.pop() if runners else None)
        return loss

    def _backward_of_a_block(
        self, step: int, layer: int, slopes: list[Tensor], kept: BlockRunner | None
    ) -> list[Tensor]:
        """Move what is tuned of a block; the gradients of its inputs, from those of its outputs, ``slopes``.

        ``kept`` has the block's graph, if that was kept. Nothing of the block is in RAM when this returns.
        """
        parts, rate = self._parts, learning_rate(step, self._steps, self._recipe.learning_rate)
        with parts.part("read"):
            block, continuous, states = self._block(layer)
            inputs, at = [], layer * self._recipe.batch
            for slope in slopes if kept is None else ():
                inputs.append(self._between.read(at, at + slope.shape[0]))
                at += slope.shape[0]
            runner = BlockRunner(block, self._rotary, self._config) if kept is None else kept
        with parts.part("backward"):
            arriving, gradients, of_weights = runner.backward(slopes, inputs if kept is None else None)
        with parts.part("update"):
            found = gradients_of_theta(continuous, gradients)
            moved = {name: adam_step(states[name], found[name], step, rate) for name in continuous}
            if self._recipe.code_rate:
                code_rate = learning_rate(step, self._steps, self._recipe.code_rate)
                for linear in block.linears:
                    latent = _latent(linear.name)
                    moved[latent] = code_step(linear, states[latent], of_weights[linear.name], code_rate)
        with parts.part("write"):
            self._states.store(layer, moved)
        return arriving

    def _head_backward(self, hidden: list[Tensor], pieces: list[list[int]]) -> tuple[float, list[Tensor], Tensor]:
        """Mean KLD, its gradients for the last block's outputs, and for the final norm's gain."""
        count = sum(x.shape[0] * x.shape[1] for x in hidden)
        gain = self._final.value(self._final_state()[0]).requires_grad_()
        total, slopes = 0.0, []
        for x, samples in zip(hidden, pieces, strict=True):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                normed = rms_norm(leaf, gain, self._config.rms_norm_eps)
            values, slope = self._divergence(normed.detach(), samples, gradient=True)
            assert slope is not None
            normed.backward(slope.reshape(normed.shape) / count)  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            slopes.append(leaf.grad)
            total += float(values.sum())
        assert gain.grad is not None
        return total / count, slopes, gain.grad

    def _divergence(self, normed: Tensor, samples: list[int], *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        reference = torch.cat([self._teacher.read(i, i + 1) for i in samples])
        width = self._config.hidden_size
        return self._head.divergence(normed.reshape(-1, width), reference.reshape(-1, width), gradient=gradient)

    # --- held-out samples ------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        """Mean KLD and its standard error (between samples) on held-out samples, a domain at a time."""
        with self._parts.part("evaluate"):
            return self._held_out_kld()

    def _held_out_kld(self) -> dict[str, dict[str, Any]]:
        assert self._job.corpus is not None
        by_domain: dict[str, list[float]] = {}
        gain = self._final.value(self._final_state()[0])
        samples = list(range(self._train, self._tokens.shape[0]))
        groups = [samples[i : i + self._per_piece] for i in range(0, len(samples), self._per_piece)]
        hidden = [self._inputs(group) for group in groups]
        self._forward(hidden)
        for x, group in zip(hidden, groups, strict=True):
            values, _ = self._divergence(rms_norm(x, gain, self._config.rms_norm_eps), group, gradient=False)
            for sample, kld in zip(group, values.reshape(len(group), -1).mean(1).tolist(), strict=True):
                by_domain.setdefault(self._job.corpus.domains[sample], []).append(kld)
        return {domain: _mean(values) for domain, values in sorted(by_domain.items())}

    def _evaluated(self, step: int) -> bool:
        return any(r.get("step") == step and "heldout" in r for r in self._work.records)

    def _exhausted(self) -> bool:
        """Whether held-out KLD has been well above its start for two evaluations: more than the way down mends."""
        scores = [score(r["heldout"]) for r in self._work.records if "heldout" in r]
        return len(scores) > 2 and min(scores[-2:]) > scores[0] + _LOST

    def _halvings(self) -> int:
        """How often all changes have been halved."""
        return int(self._work.records[-1].get("halvings", 0)) if self._work.records else 0

    def _worth_halving(self) -> bool:
        """Whether halving has not been tried, or helped the last time; codes that moved are not moved half the way."""
        scores = [score(r["heldout"]) for r in self._work.records if "heldout" in r]
        done = self._halvings()
        return not self._recipe.code_rate and done < _HALVINGS and (not done or scores[-1] < scores[-2])

    def _halve(self) -> None:
        """Every value half-way back to where it began."""
        for layer in range(self._config.num_layers + 1):
            state = {name: values.clone() for name, values in self._states.load(layer).items()}
            for values in state.values():
                values[0] *= 0.5
            self._states.store(layer, state)

    # --- begin and end ---------------------------------------------------------------------------------------

    def _inputs(self, samples: list[int]) -> Tensor:
        return torch.cat([self._embedded.read(i, i + 1) for i in samples])

    def _store(self, count: int, name: str) -> ActivationStore:
        return ActivationStore(count, self._tokens.shape[1], self._config.hidden_size, self._scratch(name))

    def _scratch(self, name: str) -> Path | None:
        """Where a store keeps its values, None for RAM."""
        return self._work.path / f"{name}.scratch" if self._job.memory.spill_tuning else None

    def _teach(self, began: float) -> float:
        """The full-precision model's final hidden states, after its last norm, computed once; and all embeddings.

        Returns from when on seconds are still to be committed, which begin at ``began``.
        """
        source, config = self._job.source, self._config
        count = self._tokens.shape[0]
        self._embedded = self._store(count, "embedded")
        put_embeddings(self._embedded, source, self._tokens)
        self._teacher = self._store(count, "teacher")
        self._between = self._store(config.num_layers * self._recipe.batch, "between")
        self._head = open_head(self._job, self._scratch("head"))
        path = self._work.path / _TEACHER
        known = next((r["files"][_TEACHER] for r in self._work.records if _TEACHER in r["files"]), None)
        if known is not None and self._teacher.load(path, known):
            return began
        for i in range(count):
            self._teacher.write(i, self._embedded.read(i, i + 1))
        self._progress.start("teacher", config.num_layers, "block")
        for layer in range(config.num_layers):
            block = load_block(source, layer)
            for i in range(count):
                self._teacher.write(i, forward_block(block, self._teacher.read(i, i + 1).clone(), self._rotary, config))
            self._progress.advance()
        gain = source.tensor(_FINAL_NORM)
        for i in range(count):
            self._teacher.write(i, rms_norm(self._teacher.read(i, i + 1), gain, config.rms_norm_eps))
        self._teacher.save(path)
        if known is None:
            now = time.monotonic()
            self._work.commit({"performance": cost(now - began)}, [_TEACHER])
            began = now
        release_memory()
        return began

    def _write_result(self) -> None:
        """The values of the best state, as the run's reader takes them; then everything else can go."""
        best = best_step(self._work.records)
        self._states.go_to(best)
        files = []
        for layer in range(self._config.num_layers):
            block = self._block(layer)[0]
            tensors = {name: gain.to(self._dtype) for name, gain in block.gains.items()}
            for linear in block.linears:
                stored = linear.to_tensors()
                fields = [*grid_for(linear.scheme).tunable, *(("codes",) if self._recipe.code_rate else ())]
                tensors |= {f"{linear.name}.{field}": stored[f"{linear.name}.{field}"] for field in fields}
            files.append(put_tensors(self._run / tuned_file(layer), tensors))
        final = self._final.value(self._final_state()[0]).to(self._dtype)
        files.append(put_tensors(self._run / tuned_file(None), {_FINAL_NORM: final}))
        self._work.commit({"best": best, "performance": cost(0.0)}, files)
        self._states.clear()
        (self._work.path / _TEACHER).unlink(missing_ok=True)


def _latent(linear: str) -> str:
    """The name under which a linear's latent positions are kept."""
    return f"{linear}.latent"


def _mean(values: list[float]) -> dict[str, Any]:
    n = len(values)
    mean = sum(values) / n
    spread = sum((v - mean) ** 2 for v in values)
    return {"kld": mean, "se": math.sqrt(spread / (n * (n - 1))) if n > 1 else None, "samples": n}
