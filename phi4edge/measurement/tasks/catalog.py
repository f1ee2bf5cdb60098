"""The tasks by name: how each reads its publisher's file, what it says to the model and how it judges the answer.

    gsm8k       the last number of the answer; the target stands behind ####
    mgsm        the same in every language that the folder has, with its separators; a part for each language
    math500     the last \\boxed{…}, or else what follows "answer is", compared as mathematics
    humaneval   the code, run with the publisher's tests (see sandbox.py)
    refusal     whether the answer declines, held against ``harmful``
    any other   NAME.jsonl of questions with choices: the one with the largest log-likelihood is the answer

Without worked examples a chat model is asked for the form that is read, and a base model gets the question alone, for
humaneval the beginning of the function. With them (``Shots``) nothing is asked for: the examples show the form. They
stand as their file has them, behind "Question: " and "Answer:", which for gsm8k is what lm-evaluation-harness's own
task says; in a chat they are turns.
"""

from __future__ import annotations

__all__ = ["CODE", "TASKS", "Means", "load_task"]

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file
from phi4edge.measurement.tasks._api import Judge, Question, Shots, Task, Verdict
from phi4edge.measurement.tasks.code import STOP_CODE, program_of, solution_of
from phi4edge.measurement.tasks.files import TaskFile, find_file, find_files, read_rows
from phi4edge.measurement.tasks.mathematics import MathJudge, last_boxed, stated_answer
from phi4edge.measurement.tasks.numbers import last_number, same_number
from phi4edge.measurement.tasks.refusal import REFUSED, refused_or_answered

CODE = "humaneval"  # the task that runs what a model wrote
_STOP_PLAIN = ("\nQuestion:", "\nProblem:", "\n\n\n")
_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
_STEP_BY_STEP = "\n\nThink step by step. End your answer with a line that has the final number alone."
_BOXED = "\n\nThink step by step, and put the final answer in \\boxed{}."
_WRITE_CODE = "Complete this Python function. Reply with the whole function in one code block, imports included.\n\n"


@dataclass(frozen=True)
class Means:
    """What judges need beside the answer."""

    chat: bool
    run: Callable[[str], bool] | None  # a program: whether it ended well; None: nothing may be run
    equal: MathJudge
    shown: bool = False  # worked examples stand before the question


def load_task(name: str, folder: Path, limit: int | None, means: Means, shots: Shots | None = None) -> Task:
    """The first ``limit`` questions (of every part) of task ``name`` from its file in ``folder``.

    Raises:
        InputError: no such file, or one that does not have what the task needs; the line is named. Or too few worked
            examples, or one that is a question of the task too.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder", "--task-data is where the tasks' files are")
    load, path = TASKS.get(name, _choices), shots.of(name) if shots is not None else None
    if shots is None or path is None:
        return load(name, folder, limit, means)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", "--shots-file names worked examples for a task")
    means = replace(means, shown=True)
    task, shown = load(name, folder, limit, means), load(name, path, shots.count, means)
    for shot in shown.questions:
        if not shot.worked.strip():
            _refuse(f"{path}: {shot.name}", "has no worked answer to show")
    task = replace(task, shots=shown.questions, shot_sources=shown.sources)
    for question in task.questions:
        examples = task.shots_for(question)
        if len(examples) != shots.count:
            part = f" of part {question.part!r}" if question.part else ""
            raise InputError(
                f"{path}: has {len(examples)} examples{part}, --shots is {shots.count}",
                "give fewer --shots, or a longer file",
            )
        if question.prompt in {shot.prompt for shot in examples}:
            raise InputError(
                f"{path}: {question.name} of {name} is among its own worked examples", "take them from the train file"
            )
    return task


def _file(place: Path, name: str) -> TaskFile:
    """``place`` itself, or the file of task ``name`` in that folder."""
    return find_file(place, name) if place.is_dir() else TaskFile(place, "")


def _rows(file: TaskFile, limit: int | None, columns: tuple[str, ...] = ()) -> Iterable[tuple[str, dict[str, Any]]]:
    """The first rows of a file, each with what it is called in messages."""
    for number, row in enumerate(read_rows(file.path, columns)[:limit], start=1):
        yield f"{file.path.name}:{number}", row


def _text(row: Mapping[str, Any], place: str, *keys: str) -> str:
    for key in keys:
        if isinstance(row.get(key), str):
            return str(row[key])
    return _refuse(place, f"has no text under {' or '.join(keys)}")


def _refuse(place: str, reason: str) -> NoReturn:
    raise InputError(f"{place}: {reason}", "the files are read as their publishers ship them")


def _task(name: str, questions: list[Question], judge: Judge, files: list[TaskFile], **more: Any) -> Task:
    return Task(name, tuple(questions), judge, sources={f.path.name: sha256_file(f.path) for f in files}, **more)


# --- numbers --------------------------------------------------------------------------------------------------


def _gsm8k(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    file, questions = _file(folder, name), []
    for place, row in _rows(file, limit):
        target = last_number(_text(row, place, "answer").rpartition("####")[2])
        if target is None:
            _refuse(place, "has no number behind ####")
        prompt = _asked(_text(row, place, "question"), _STEP_BY_STEP, means)
        questions.append(Question(place, prompt, target, worked=_text(row, place, "answer")))
    return _task(name, questions, _number_judge, [file], stop=() if means.chat else _STOP_PLAIN, max_tokens=512)


def _mgsm(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    found = find_files(folder, name) if folder.is_dir() else []
    files = [file for file in found if file.split in _LANGUAGES] if folder.is_dir() else [TaskFile(folder, "")]
    if not files:
        raise InputError(f"{folder}: no file of task {name!r} in it", "MGSM has mgsm_en.tsv, mgsm_de.tsv, …")
    questions = []
    for file in files:
        for place, row in _rows(file, limit, ("question", "answer_number")):
            said = row.get("answer_number")
            target = last_number(str(said if said is not None else row.get("answer", "")))
            if target is None:
                _refuse(place, "has no number for an answer")
            prompt = _asked(_text(row, place, "question"), _STEP_BY_STEP, means)
            worked = row.get("answer")
            worked = worked if isinstance(worked, str) else str(said)
            questions.append(Question(place, prompt, target, part=file.split, worked=worked))
    return _task(name, questions, _number_judge, files, stop=() if means.chat else _STOP_PLAIN, max_tokens=512)


def _asked(question: str, wish: str, means: Means) -> str:
    return question + wish if means.chat and not means.shown else f"Question: {question}\nAnswer:"


def _number_judge(question: Question, answer: str) -> Verdict:
    found = last_number(answer, question.part or "en")
    return Verdict(found, same_number(found, question.target))


# --- mathematics, code, refusals ------------------------------------------------------------------------------


def _math500(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    file, questions = _file(folder, name), []
    for place, row in _rows(file, limit):
        said = _text(row, place, "answer", "solution")  # MATH itself has the solution alone
        target = last_boxed(said) or said
        prompt = _asked(_text(row, place, "problem", "question"), _BOXED, means)
        worked = str(row.get("solution") or "")
        questions.append(Question(str(row.get("unique_id", place)), prompt, target.strip(), worked=worked))

    def judge(question: Question, answer: str) -> Verdict:
        found = stated_answer(answer)
        return Verdict(found, found is not None and means.equal(found, question.target))

    return _task(name, questions, judge, [file], stop=() if means.chat else _STOP_PLAIN, max_tokens=1024)


def _humaneval(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    run = means.run
    assert run is not None, "the command refuses code that it may not run"
    file, questions = _file(folder, name), []
    for place, row in _rows(file, limit):
        beginning = _text(row, place, "prompt")
        data = {key: _text(row, place, key) for key in ("prompt", "test", "entry_point")}
        prompt = f"{_WRITE_CODE}```python\n{beginning}```" if means.chat else beginning
        worked = str(row.get("canonical_solution") or "").rstrip()
        worked = f"```python\n{beginning}{worked}\n```" if means.chat and worked else worked
        questions.append(Question(str(row.get("task_id", place)), prompt, "the tests pass", data=data, worked=worked))

    def judge(question: Question, answer: str) -> Verdict:
        code = solution_of(answer, question.data["prompt"], question.data["entry_point"])
        return Verdict(code, run(program_of(code, question.data["test"], question.data["entry_point"])))

    stop = () if means.chat else STOP_CODE
    return _task(name, questions, judge, [file], stop=stop, max_tokens=512, delimiter="")


def _refusal(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    file, questions = _file(folder, name), []
    for place, row in _rows(file, limit):
        harmful = row.get("harmful")
        if not isinstance(harmful, bool):
            _refuse(place, "has no harmful: true or false")
        target, part = (REFUSED, "harmful") if harmful else ("answered", "harmless")
        questions.append(Question(place, _text(row, place, "prompt"), target, part=part))

    def judge(question: Question, answer: str) -> Verdict:
        found = refused_or_answered(answer)
        return Verdict(found, found == question.target)

    return _task(name, questions, judge, [file], max_tokens=128)


# --- choices --------------------------------------------------------------------------------------------------


def _choices(name: str, folder: Path, limit: int | None, means: Means) -> Task:
    file, questions = _file(folder, name), []
    for place, row in _rows(file, limit):
        prompt, choices, right = _choice_row(row, place)
        text, answer = f"Question: {prompt}\nAnswer:", choices[right]
        questions.append(Question(place, text, answer, tuple(choices), worked=answer))
    return _task(name, questions, lambda q, answer: Verdict(answer, answer == q.target), [file])


def _choice_row(row: Mapping[str, Any], place: str) -> tuple[str, list[str], int]:
    """Question, choices and the place of the right one, as ARC, MMLU, HellaSwag and their copies spell them."""
    question: Any = row.get("question", row.get("ctx"))
    options: Any = row.get("choices", row.get("endings"))
    labels: Any = None
    if isinstance(question, dict):  # ARC as AI2 ships it
        question, options = question.get("stem"), question.get("choices")
    if isinstance(options, dict):  # and as it is mirrored
        options, labels = options.get("text"), options.get("label")
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options, labels = [option.get("text") for option in options], [option.get("label") for option in options]
    if not isinstance(question, str):
        _refuse(place, "has no question")
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(option, str) for option in options)):
        _refuse(place, "has no list of choices; a task of another name than the built-in ones is multiple choice")
    if len(set(options)) < len(options):
        _refuse(place, "has the same choice twice")
    right = row.get("answerKey", row.get("answer", row.get("label")))
    labels = labels or list(string.ascii_uppercase[: len(options)])
    if isinstance(right, str) and right in labels:
        return question, options, labels.index(right)
    if isinstance(right, str) and right in options:
        return question, options, options.index(right)
    if isinstance(right, str) and right.isdecimal():
        right = int(right)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        _refuse(place, f"has the answer {right!r}, which is none of its {len(options)} choices")
    return question, options, right


_Loader = Callable[[str, Path, "int | None", Means], Task]
TASKS: Mapping[str, _Loader] = {
    "gsm8k": _gsm8k, "mgsm": _mgsm, "math500": _math500, "humaneval": _humaneval, "refusal": _refusal,
}  # fmt: skip
