"""Tasks in lm-evaluation-harness: its requests, its scoring loop; our questions, judges and runtimes.

A task becomes a ``ConfigurableTask`` whose dataset is in memory (``custom_dataset``), a runtime an ``LM``. Nothing is
looked for on a hub. The harness is imported here, on demand, and nowhere else; its classes are made inside of
functions, so that this module can be imported without it.
"""

from __future__ import annotations

__all__ = ["INSTALL", "ask", "check_harness", "harness_version"]

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.measurement.tasks._api import Answer, Task, Verdict
from phi4edge.measurement.tasks.asking import Answering, DoesNotFitError

INSTALL = 'pip install "phi4edge[tasks]"'


def check_harness() -> None:
    """Refuse to begin what could not be measured.

    Raises:
        MissingToolError: lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingToolError("--tasks needs the Python package lm_eval, which is not installed", INSTALL)


def harness_version() -> str:
    """Version of lm_eval."""
    return importlib.metadata.version("lm_eval")


def ask(model: Answering, task: Task, *, chat: bool) -> list[Answer]:
    """The answers of ``model`` to all questions of ``task``, judged, in their order.

    Raises:
        MissingToolError: lm-evaluation-harness is not installed.
        InputError: a prompt that does not fit the context, with its question's name; and as the model's methods.
        TargetError: as the model's methods.
    """
    check_harness()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are on options that we do not use
    with contextlib.redirect_stderr(io.StringIO()):  # its import, and progress bars that cannot be turned off
        from lm_eval.evaluator import evaluate

        made, verdicts = _harness_task(task)
    found = evaluate(
        _harness_model(model, task),
        {"tasks": {task.name: made}},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        confirm_run_unsafe_code=True,  # judged in our sandbox, and only where the user allowed it
    )
    answers: list[Answer] = []
    for sample in sorted(found["samples"][task.name], key=lambda sample: sample["doc"]["index"]):
        verdict, output = verdicts[sample["doc"]["index"]]
        likelihoods = tuple(reply[0][0] for reply in sample["resps"]) if task.by_choice else ()
        prompt = sample["arguments"][0][0]
        answers.append(Answer(prompt, output, verdict.extracted, verdict.correct, likelihoods))
    share = found["results"][task.name]["correct,none"]
    assert abs(share - sum(a.correct for a in answers) / len(answers)) < 1e-9, "the harness counted otherwise"
    return answers


def _harness_task(task: Task) -> tuple[Any, dict[int, tuple[Verdict, str]]]:
    """A task of the harness, and where its verdicts and outputs will be, by the question's place."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    questions, verdicts = task.questions, dict[int, tuple[Verdict, str]]()

    class Quiet(ConfigurableTask):  # type: ignore[misc]
        def build_all_requests(self, **options: Any) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                super().build_all_requests(**options)

        def fewshot_context(self, doc: dict[str, Any], *given: Any, **options: Any) -> Any:
            if task.shots:
                part = questions[doc["index"]].part
                self.sampler.replace_df([{"index": i} for i, s in enumerate(task.shots) if s.part in ("", part)])
            return super().fewshot_context(doc, *given, **options)

    def judged(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
        question = questions[doc["index"]]
        if task.by_choice:
            weights = [result[0] for result in results]
            output = question.choices[weights.index(max(weights))]
        else:
            output = results[0]
        verdict = task.judge(question, output)
        verdicts[doc["index"]] = (verdict, output)
        return {"correct": float(verdict.correct)}

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"index": i} for i in range(len(questions))])},
        "test_split": "test",
        "doc_to_text": lambda doc: questions[doc["index"]].prompt,
        "doc_to_target": lambda doc: questions[doc["index"]].target,
        "process_results": judged,
        "metric_list": [{"metric": "correct", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": task.shot_key.get("count", 0),
        "target_delimiter": task.delimiter,
    }
    if task.shots:
        config["fewshot_config"] = {
            "sampler": "first_n",
            "samples": [{"index": i} for i in range(len(task.shots))],
            "doc_to_text": lambda doc: task.shots[doc["index"]].prompt,
            "doc_to_target": lambda doc: task.shots[doc["index"]].worked,
            "doc_to_choice": (lambda doc: list(task.shots[doc["index"]].choices)) if task.by_choice else None,
        }
    if task.by_choice:
        config |= {"output_type": "multiple_choice", "doc_to_choice": lambda doc: list(questions[doc["index"]].choices)}
    else:
        generation = {"until": list(task.stop), "max_gen_toks": task.max_tokens, "do_sample": False}
        config |= {"output_type": "generate_until", "generation_kwargs": generation}
    return Quiet(config=config), verdicts


def _harness_model(model: Answering, task: Task) -> Any:
    """``model`` as the harness asks for one."""
    from lm_eval.api.model import LM

    @contextlib.contextmanager
    def naming(requests: Sequence[Any]) -> Iterator[None]:
        try:
            yield
        except DoesNotFitError as error:
            question = task.questions[requests[error.place].doc["index"]]
            raise InputError(f"{task.name}, question {question.name}: {error.message}", error.hint) from error

    class Model(LM):  # type: ignore[misc]
        tokenizer_name = ""

        def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
            return model.chat(chat_history, generation=add_generation_prompt)

        def generate_until(self, requests: list[Any]) -> list[str]:
            settings = requests[0].args[1]  # a task's requests have all the same
            with naming(requests):
                return model.write([r.args[0] for r in requests], settings["until"], settings["max_gen_toks"])

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            with naming(requests):
                return model.weigh([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [weight for weight, _ in model.weigh([("", request.args[0]) for request in requests])]

    return Model()
