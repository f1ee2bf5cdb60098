"""``drift --tasks``: its options, and its table."""

from __future__ import annotations

__all__ = ["task_options", "task_request", "task_table"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phi4edge.cli.render import table
from phi4edge.core.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.measurement.tasks.run import TaskRequest

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = (
    click.option(
        "--tasks", "task_names", metavar="NAME,…",
        help="Tasks, answered by both models: gsm8k, math500, mgsm, humaneval, refusal; "
        "any other NAME is multiple choice from NAME.jsonl.",
    ),
    click.option("--task-data", type=click.Path(path_type=Path), metavar="DIR", help="Where the tasks' files are."),
    click.option(
        "--limit", "task_limit", type=click.IntRange(min=1), metavar="N",
        help="The first N questions of a task (in mgsm of each language).  [default: all]",
    ),
    click.option(
        "--task-context", type=click.IntRange(min=16), metavar="N",
        help="Tokens of a question and its answer.  [default: 4096, or what the model has]",
    ),
    click.option(
        "--max-answer-tokens", type=click.IntRange(min=1), metavar="N",
        help="End an answer here.  [default: the task's own, 128 to 1024]",
    ),
    click.option(
        "--chat-template/--no-chat-template", "task_chat", default=None,
        help="Ask in the model's chat template.  [default: where it has one]",
    ),
    click.option(
        "--allow-code-execution", is_flag=True,
        help="humaneval: run what the models write, in a sandbox without network (Linux).",
    ),
    click.option(
        "--reference-runtime", type=click.Choice(["llama_cpp", "torch_ref"]),
        help="Where the full-precision model answers.  [default: llama_cpp where it is installed; torch_ref is slow]",
    ),
    click.option(
        "--task-answers", type=click.Path(path_type=Path), metavar="FILE.jsonl",
        help="Every question with both answers.  [default: beside --out, as NAME.answers.jsonl]",
    ),
    click.option(
        "--max-task-drop", type=float, metavar="X",
        help="Gate: accuracy at most X below the reference's in every task, 0.02 for two points (exit 6).",
    ),
)  # fmt: skip


def task_options(function: F) -> F:
    """All options of ``--tasks``; :func:`task_request` takes them together."""
    for decorator in reversed(_OPTIONS):
        function = decorator(function)
    return function


def task_request(given: Mapping[str, Any]) -> TaskRequest | None:
    """What the options ask for; None without ``--tasks``.

    Raises:
        UsageError: no ``--task-data``, or an option of tasks without ``--tasks``.
    """
    from phi4edge.measurement.tasks.run import TaskRequest

    if given["task_names"] is None:
        for name in ("task_data", "task_limit", "max_task_drop", "task_answers"):
            if given[name] is not None:
                raise UsageError(f"--{name.replace('task_limit', 'limit').replace('_', '-')} without --tasks")
        return None
    if given["task_data"] is None:
        raise UsageError("--tasks needs --task-data", "the folder with gsm8k_test.jsonl, HumanEval.jsonl.gz, …")
    return TaskRequest(
        names=tuple(name.strip() for name in given["task_names"].split(",") if name.strip()),
        folder=given["task_data"],
        limit=given["task_limit"],
        context=given["task_context"],
        max_tokens=given["max_answer_tokens"],
        chat=given["task_chat"],
        allow_code=given["allow_code_execution"],
        reference_runtime=given["reference_runtime"],
    )


def task_table(tasks: Mapping[str, Any]) -> str:
    """Accuracies, differences and flips of the ``tasks`` part of a document."""

    def share(value: Mapping[str, float]) -> str:
        return f"{100 * value['accuracy']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"

    rows = []
    for name, result in tasks["results"].items():
        parts = result["parts"] if name == "mgsm" else {}
        for label, found in ((name, result), *((f"  {part}", value) for part, value in parts.items())):
            change, flips = found["difference"], found["flips"]
            rows.append(
                [
                    label, str(found["n"]), share(found["reference"]), share(found["artifact"]),
                    f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]",
                    f"-{flips['lost']} +{flips['gained']}", f"{found['mcnemar_p']:.3g}",
                ]
            )  # fmt: skip
    head = ("task", "n", "reference, %", "artifact, %", "difference, points", "flips", "McNemar p")
    lines = [table(head, rows, numeric=(1,))]
    for part, found in tasks["results"].get("refusal", {}).get("refusals", {}).items():
        lines.append(
            f"refusal, {part} {found['n']}: reference refused {found['reference_refused']}, artifact "
            f"{found['artifact_refused']}; refused before and answered now {found['refused_now_answered']}, "
            f"the other way {found['answered_now_refused']}"
        )
    base = tasks["reference"]
    lines.append(
        f"reference in {base['runtime']} {base['version']}; chat template {'on' if tasks['chat_template'] else 'off'}; "
        f"[ ] are 95 % intervals, of the difference over pairs"
    )
    return "\n".join(lines)
