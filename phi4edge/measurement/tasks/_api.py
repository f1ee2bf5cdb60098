"""What a task is made of: questions, a rule that judges an answer, and the answers."""

from __future__ import annotations

__all__ = ["Answer", "Judge", "Question", "Shots", "Task", "Verdict"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question."""

    name: str  # its publisher's, or file and line
    prompt: str  # what is said to the model
    target: str  # the right answer, as it is compared
    choices: tuple[str, ...] = ()  # among which the most likely one is the answer; none: the answer is written
    part: str = ""  # of the task: a language, harmful or harmless
    worked: str = ""  # the answer as a worked example shows it, where the file has one
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)  # more that the judge needs


@dataclass(frozen=True)
class Verdict:
    """What was found in an answer."""

    extracted: str | None  # None: nothing that could be an answer
    correct: bool


@dataclass(frozen=True)
class Shots:
    """Worked examples that are shown before a question."""

    count: int  # taken from the front of the file, in its order
    files: Mapping[str, Path]  # by task; a task that is not in here is asked without. Of mgsm a folder, or one file

    def of(self, task: str) -> Path | None:
        """The file for ``task``; None: it gets none."""
        return self.files.get(task) if self.count else None


Judge = Callable[[Question, str], Verdict]


@dataclass(frozen=True)
class Task:
    """Questions of one kind."""

    name: str
    questions: tuple[Question, ...]
    judge: Judge
    stop: tuple[str, ...] = ()  # strings that end an answer; they are no part of it
    max_tokens: int = 512  # of an answer
    sources: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by the name of the file
    delimiter: str = " "  # between a question and its answer, where both are shown or an answer is weighed
    shots: tuple[Question, ...] = ()  # worked examples, of every part so many
    shot_sources: Mapping[str, str] = field(default_factory=dict)  # as ``sources``

    def shots_for(self, question: Question) -> tuple[Question, ...]:
        """What is shown before ``question``: examples of its part, or those that are of none."""
        return tuple(shot for shot in self.shots if shot.part in ("", question.part))

    @property
    def shot_key(self) -> dict[str, Any]:
        """The number of examples and the files they are from; empty without any."""
        if not self.shots:
            return {}
        return {"count": len(self.shots_for(self.questions[0])), "files": dict(self.shot_sources)}

    @property
    def by_choice(self) -> bool:
        """Whether choices are compared and nothing is written."""
        return bool(self.questions[0].choices)


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question."""

    prompt: str  # as the model read it, chat template applied
    output: str  # what it wrote, or the choice that it took
    extracted: str | None
    correct: bool
    log_likelihoods: tuple[float, ...] = ()  # of the choices, nat
