"""Tasks from end to end: the reference's answers, the artifact's, pairs, gates, and a line for every question.

The reference is the full-precision checkpoint in a runtime of its own. PyTorch reads all weights for every token, so
where llama.cpp is installed it answers instead, from a GGUF with the checkpoint's weights as they are (bfloat16 stays
bfloat16), made when an answer is missing and removed again. Which runtime it was is recorded.
"""

from __future__ import annotations

__all__ = ["TaskRequest", "check_tasks", "measure_tasks", "task_gates"]

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phi4edge import __version__
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.core.atomic import write_bytes
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_bytes, sha256_json
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.gates import Gate, Limits, gate_between
from phi4edge.measurement.reference import cache_folder, fingerprint, is_store
from phi4edge.measurement.tasks._api import Answer, Shots, Task
from phi4edge.measurement.tasks.answers import AnswerStore
from phi4edge.measurement.tasks.asking import AskedModel
from phi4edge.measurement.tasks.catalog import CODE, Means, load_task
from phi4edge.measurement.tasks.harness import ask, check_harness, harness_version
from phi4edge.measurement.tasks.mathematics import MathJudge, check_math
from phi4edge.measurement.tasks.pairing import Pairing, pair, paired_interval
from phi4edge.measurement.tasks.refusal import REFUSED
from phi4edge.measurement.tasks.sandbox import check_sandbox, run_program
from phi4edge.model.source import WeightSource
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer
from phi4edge.runtimes._api import Session, Settings, default_settings, load_runtime
from phi4edge.runtimes._threads import physical_cores
from phi4edge.runtimes.torch_ref import TorchSession
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._onnx_names import GENAI_CONFIG
from phi4edge.writers.gguf import write_f16

CONTEXT = 4096  # tokens of question and answer, where nobody says; less where the model has less
_ONE_SIDED = 1.644854  # as gates compare


@dataclass(frozen=True)
class TaskRequest:
    """What is asked."""

    names: tuple[str, ...]
    folder: Path
    limit: int | None = None  # questions of a task, and of each language
    context: int | None = None
    max_tokens: int | None = None  # of an answer, instead of the task's own
    chat: bool | None = None  # None: where the model has a chat template
    allow_code: bool = False
    reference_runtime: str | None = None  # None: llama_cpp where it is installed, else torch_ref
    shots: Shots = field(default_factory=lambda: Shots(0, {}))

    def __post_init__(self) -> None:
        """Refuse what asks for nothing."""
        if not self.names or len(set(self.names)) < len(self.names):
            raise UsageError(f"--tasks {','.join(self.names)}: names none, or one twice", "--tasks gsm8k,mgsm")
        if (self.shots.count > 0) != bool(self.shots.files):
            raise UsageError("--shots and --shots-file go together", "--shots 5 --shots-file gsm8k=gsm8k_train.jsonl")
        for name in self.shots.files:
            if name not in self.names:
                raise UsageError(
                    f"--shots-file {name}=…: {name} is not among --tasks", f"asked: {', '.join(self.names)}"
                )


def check_tasks(request: TaskRequest, reference: str) -> str | None:
    """Refuse what cannot be measured before anything is computed; how code is isolated, where it is to run.

    Raises:
        UsageError: a store as reference, or code without permission.
        InputError: a missing or malformed file.
        MissingToolError: lm_eval, math-verify or isolation is missing.
    """
    if is_store(Path(reference)):
        raise UsageError(
            f"--reference {reference} is a store of logits, and tasks need answers", "give the checkpoint itself"
        )
    check_harness()
    if "math500" in request.names:
        check_math()
    isolation = None
    if CODE in request.names:
        if not request.allow_code:
            raise UsageError(
                f"task {CODE} runs code that the models write",
                "--allow-code-execution allows it, in a sandbox without network, in which nothing can be written",
            )
        isolation = check_sandbox()
    for name in request.names:
        load_task(name, request.folder, request.limit, Means(False, lambda _: False, MathJudge()), request.shots)
    return isolation


def measure_tasks(
    artifact: Path,
    reference: str,
    request: TaskRequest,
    *,
    runtime: str | None = None,
    settings: Settings | None = None,
    source: WeightSource | None = None,
    answers: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Ask both models every question; the ``tasks`` part of a drift document.

    ``answers`` is the file that gets one line of JSON a question.

    Raises:
        As :func:`check_tasks`, and as the runtimes' ``open``.
    """
    isolation = check_tasks(request, reference)
    checkpoint = open_checkpoint(reference)
    tokenizer = load_tokenizer(checkpoint.index.folder)
    tokenizer.check_vocabulary(checkpoint.config)
    chat = tokenizer.chat_template is not None if request.chat is None else request.chat
    context = _context(request, checkpoint, artifact)
    name = runtime or default_runtime(artifact)
    own = settings or default_settings(name)
    base_name = request.reference_runtime or ("torch_ref" if load_runtime("llama_cpp").available() else "llama_cpp")
    base_settings = replace(default_settings(base_name), threads=own.threads)

    def open_own() -> Session:
        if source is not None:
            return TorchSession(source, context, own)
        return load_runtime(name).open(artifact, context, own)

    own_model = describe(artifact)["sha256"]
    base_model = fingerprint(checkpoint.index)
    with MathJudge() as equal:
        means = Means(chat, run_program if request.allow_code else None, equal)
        tasks = [load_task(task, request.folder, request.limit, means, request.shots) for task in request.names]
        if request.max_tokens is not None:
            tasks = [replace(task, max_tokens=request.max_tokens) for task in tasks]

        def asked(
            title: str, model: str, where: str, how: Settings, opener: Callable[[], Session]
        ) -> tuple[list[list[Answer]], dict[str, Any]]:
            identity = _identity(model, where, how, context, tokenizer)
            with (
                AnswerStore(identity) as store,
                AskedModel(opener, tokenizer, store, context, title, progress) as model_asked,
            ):
                given = [ask(model_asked.about(task.shot_key), task, chat=chat) for task in tasks]
                facts = {"runtime": where, "version": identity["version"], "reused": store.reused}
                return given, facts | {"ended_by_context": model_asked.ended_by_context}

        with _reference_opener(checkpoint, base_name, base_settings, context, progress) as open_base:
            base, base_facts = asked(f"reference in {base_name}", base_model, base_name, base_settings, open_base)
        ours, own_facts = asked(f"artifact in {name}", own_model, name, own, open_own)
        given_up = equal.timeouts
    lines = [line for task, q, p in zip(tasks, ours, base, strict=True) for line in _lines(task, q, p)]
    if answers is not None:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        write_bytes(answers, text.encode())
    return {
        "harness": f"lm_eval {harness_version()}",
        "chat_template": chat,
        "context": context,
        "limit": request.limit,
        "code_isolation": isolation,
        "math_comparisons_given_up": given_up,
        "artifact": own_facts,
        "reference": base_facts | {"model": checkpoint.index.name, "fingerprint": base_model},
        "answers": None if answers is None else answers.name,
        "results": {task.name: _result(task, q, p) for task, q, p in zip(tasks, ours, base, strict=True)},
    }


def _context(request: TaskRequest, checkpoint: CheckpointReader, artifact: Path) -> int:
    """Tokens that question and answer share, the same for both models."""
    limits = {"the model": checkpoint.config.context_length}
    genai = artifact / GENAI_CONFIG
    if genai.is_file():
        held = json.loads(genai.read_text(encoding="utf-8"))["model"].get("context_length")
        if isinstance(held, int):
            limits["the artifact"] = held
    for owner, limit in limits.items():
        if request.context is not None and request.context > limit:
            raise InputError(
                f"a context of {request.context} exceeds {limit}, which {owner} has", f"at most --task-context {limit}"
            )
    return request.context or min(CONTEXT, *limits.values())


def _identity(model: str, runtime: str, settings: Settings, context: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides an answer beside the question."""
    resolved = replace(settings, threads=settings.threads or physical_cores())
    return {
        "model": model,
        "runtime": runtime,
        "version": load_runtime(runtime).version(),
        "settings": asdict(resolved),
        "context": context,
        "tokenizer": sha256_json(dict(tokenizer.raw)),
        "code": __version__,
    }


@contextmanager
def _reference_opener(
    checkpoint: CheckpointReader, runtime: str, settings: Settings, context: int, progress: Progress
) -> Iterator[Callable[[], Session]]:
    """What opens the checkpoint in ``runtime``; a GGUF that this takes is removed at the end."""
    if runtime == "torch_ref":
        yield lambda: TorchSession(checkpoint, context, settings)
        return
    if runtime != "llama_cpp":
        raise UsageError(f"--reference-runtime {runtime} does not read a checkpoint", "llama_cpp or torch_ref")
    written = checkpoint.config.raw.get("torch_dtype", checkpoint.config.raw.get("dtype"))
    dtype = {"bfloat16": "bf16", "float16": "f16"}.get(str(written), "f32")
    name = sha256_bytes(fingerprint(checkpoint.index).encode())[:32]
    path = cache_folder() / "answers" / f"{name}-{dtype}.gguf"

    def opened() -> Session:
        progress.note(f"writing the reference as {dtype} for llama.cpp: {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_f16(checkpoint, path, WriteOptions(force=True), dtype)
        return load_runtime(runtime).open(path, context, settings)

    try:
        yield opened
    finally:
        path.unlink(missing_ok=True)


def _lines(task: Task, ours: Sequence[Answer], base: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    for question, artifact, reference in zip(task.questions, ours, base, strict=True):
        assert artifact.prompt == reference.prompt, "the two models were asked differently"
        yield {
            "task": task.name,
            "question": question.name,
            "part": question.part or None,
            "prompt": artifact.prompt,
            "target": question.target,
            **{
                who: {
                    "output": answer.output,
                    "extracted": answer.extracted,
                    "correct": answer.correct,
                    **({"log_likelihoods": list(answer.log_likelihoods)} if answer.log_likelihoods else {}),
                }
                for who, answer in (("artifact", artifact), ("reference", reference))
            },
        }


def _result(task: Task, ours: Sequence[Answer], base: Sequence[Answer]) -> dict[str, Any]:
    def cells(part: str | None = None) -> Pairing:
        chosen = [i for i, question in enumerate(task.questions) if part in (None, question.part)]
        return pair([ours[i].correct for i in chosen], [base[i].correct for i in chosen])

    parts = list(dict.fromkeys(question.part for question in task.questions if question.part))
    same = sum(q.output == p.output for q, p in zip(ours, base, strict=True))
    found = {
        **cells().as_dict(),
        "same_output": same / len(ours),
        "max_tokens": None if task.by_choice else task.max_tokens,
        "sources": dict(task.sources),
        "shots": task.shot_key or {"count": 0},
        "parts": {part: cells(part).as_dict() for part in parts},
    }
    if task.name == "refusal":
        found["refusals"] = {part: _refusals(task, ours, base, part) for part in parts}
    return found


def _refusals(task: Task, ours: Sequence[Answer], base: Sequence[Answer], part: str) -> dict[str, Any]:
    """Who declined what, among the questions of ``part``."""
    pairs = [
        (q.extracted == REFUSED, p.extracted == REFUSED)
        for question, q, p in zip(task.questions, ours, base, strict=True)
        if question.part == part
    ]
    return {
        "n": len(pairs),
        "artifact_refused": sum(q for q, _ in pairs),
        "reference_refused": sum(p for _, p in pairs),
        "agreement": sum(q == p for q, p in pairs) / len(pairs),
        "refused_now_answered": pairs.count((False, True)),
        "answered_now_refused": pairs.count((True, False)),
    }


def task_gates(results: Mapping[str, Mapping[str, Any]], limits: Limits) -> list[Gate]:
    """Gates of ``limits`` on every task, by paired intervals at 95 % one-sided.

    ``max_task_drop`` bounds p − q, the accuracy that the artifact lost; ``min_reference_share`` s asks that q − s p is
    not below 0, q and p being the artifact's and the reference's accuracy (MLPerf asks for s = 0.99 or 0.999). Either
    fails where even the favourable bound misses the limit, passes where the other one keeps it, and is else undecided.
    """
    gates = []
    for name, result in results.items():
        n, flips = result["n"], result["flips"]
        both = result["reference"]["correct"] - flips["lost"]
        cells = Pairing(both, flips["lost"], flips["gained"], n - both - flips["lost"] - flips["gained"])
        found = []
        if (drop := limits.max_task_drop) is not None:
            low, high = paired_interval(cells, _ONE_SIDED)
            metric, bounds = f"accuracy lost in {name}", (-high, -low)
            value = -cells.difference
            found.append(gate_between("max_task_drop", metric, value, cells.se, bounds, drop, limits.undecided))
        if (share := limits.min_reference_share) is not None:
            metric, bounds = (
                f"accuracy in {name} less {share:g} of the reference's",
                paired_interval(cells, _ONE_SIDED, share),
            )
            value, se = cells.surplus(share), cells.surplus_se(share)
            gate = gate_between("min_reference_share", metric, value, se, bounds, 0.0, limits.undecided)
            found.append(replace(gate, share=share))
        gates += [replace(gate, task=name, target=limits.target) for gate in found]
    return gates
