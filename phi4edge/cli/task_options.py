"""``--tasks``: its options, and its table."""

from __future__ import annotations

__all__ = ["task_options", "task_request", "task_table"]

from collections.abc import Callable, Mapping, Sequence
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
        "--shots", type=click.IntRange(min=0), metavar="N",
        help="Show N worked examples before each question, from the front of --shots-file; in a chat as turns. A "
        "prompt that does not fit the context is an error.  [default: 0]",
    ),
    click.option(
        "--shots-file", "shots_files", multiple=True, metavar="[TASK=]PATH",
        help="Where worked examples are, in the form of the task's own file (gsm8k=gsm8k_train.jsonl); for mgsm a "
        "folder with a file for each language. Tasks without one are asked without examples.",
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
    from phi4edge.measurement.tasks._api import Shots
    from phi4edge.measurement.tasks.run import TaskRequest

    if given["task_names"] is None:
        for name in ("task_data", "task_limit", "shots", "max_task_drop", "min_reference_share", "task_answers"):
            if given.get(name) is not None:
                raise UsageError(f"--{name.replace('task_limit', 'limit').replace('_', '-')} without --tasks")
        if given["shots_files"]:
            raise UsageError("--shots-file without --tasks")
        return None
    if given["task_data"] is None:
        raise UsageError("--tasks needs --task-data", "the folder with gsm8k_test.jsonl, HumanEval.jsonl.gz, …")
    names = tuple(name.strip() for name in given["task_names"].split(",") if name.strip())
    return TaskRequest(
        names=names,
        folder=given["task_data"],
        limit=given["task_limit"],
        context=given["task_context"],
        max_tokens=given["max_answer_tokens"],
        chat=given["task_chat"],
        allow_code=given["allow_code_execution"],
        reference_runtime=given["reference_runtime"],
        shots=Shots(given["shots"] or 0, _shots_files(given["shots_files"], names)),
    )


def _shots_files(specs: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Files of worked examples by task, from ``TASK=PATH``, or a path alone where one task is asked."""
    found: dict[str, Path] = {}
    for spec in specs:
        name, sign, path = spec.partition("=")
        if not sign or Path(spec).exists():
            if len(names) != 1:
                raise UsageError(f"--shots-file {spec}: of which task?", f"--shots-file {names[0]}={spec}")
            name, path = names[0], spec
        if name in found:
            raise UsageError(f"--shots-file: {name} has two files", "keep one")
        found[name] = Path(path)
    return found


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
    shown = [f"{name} {r['shots']['count']}" for name, r in tasks["results"].items() if r["shots"]["count"]]
    if shown:
        lines.append(f"worked examples before each question: {', '.join(shown)}")
    base = tasks["reference"]
    lines.append(
        f"reference in {base['runtime']} {base['version']}; chat template {'on' if tasks['chat_template'] else 'off'}; "
        f"[ ] are 95 % intervals, of the difference over pairs"
    )
    return "\n".join(lines)
