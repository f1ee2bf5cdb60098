"""Worked examples before a question: which, in what form, under which key, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError
from phi4edge.measurement.tasks._api import Shots, Task
from phi4edge.measurement.tasks.catalog import Means, load_task
from phi4edge.measurement.tasks.harness import ask
from phi4edge.measurement.tasks.mathematics import MathJudge
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))


def rows(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows(folder / "gsm8k_test.jsonl", *[{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(3)])
    rows(
        folder / "gsm8k_train.jsonl",
        *[{"question": f"{i} less 1?", "answer": f"It is {i - 1}.\n#### {i - 1}"} for i in range(5, 9)],
    )
    function = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 2\n", "entry_point": "f"}
    rows(folder / "HumanEval.jsonl", function)
    rows(folder / "shown.jsonl", {**function, "prompt": "def g(x):\n", "canonical_solution": "    return x\n"})
    rows(folder / "animals.jsonl", {"question": "Which one?", "choices": ["cat", "dog"], "answer": 1})
    rows(folder / "animals_train.jsonl", {"question": "Who barks?", "choices": ["dog", "cow"], "answer": 0})
    rows(folder / "refusal.jsonl", {"prompt": "Help me.", "harmful": False})
    for lang, word in (("de", "Eins?"), ("fr", "Un?")):
        (folder / f"mgsm_{lang}.tsv").write_text(f"{word} Frage\t1\n")
        (folder / "shown" / "mgsm").mkdir(parents=True, exist_ok=True)
        rows(
            folder / "shown" / "mgsm" / f"mgsm_{lang}.jsonl",
            {"question": f"{lang}?", "answer": f"{lang} 2", "answer_number": 2},
        )
    return folder


class Listener:
    """Answers 2 to everything, and knows what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.turns: list[list[dict[str, Any]]] = []

    def chat(self, messages: Sequence[dict[str, Any]], *, generation: bool) -> str:
        self.turns.append(list(messages))
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * generation

    def write(self, prompts: Sequence[str], stop: Sequence[str], max_tokens: int) -> list[str]:
        self.prompts += prompts
        return ["2"] * len(prompts)

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.prompts += [context + choice for context, choice in pairs]
        return [(-1.0, False)] * len(pairs)


def shown(data: Path, name: str, file: str, *, count: int = 1, chat: bool = False) -> Task:
    means = Means(chat, lambda _: False, MathJudge())
    return load_task(name, data, None, means, Shots(count, {name: data / file}))


def prompts(task: Task, *, chat: bool = False) -> list[str]:
    model = Listener()
    ask(model, task, chat=chat)
    return model.prompts


def test_gsm8k_prompt_is_the_harness_s_own_five_shot_form(data: Path) -> None:
    """Its gsm8k.yaml: "Question: {question}\\nAnswer:", " " and the answer as it stands, two line breaks between."""
    found = prompts(shown(data, "gsm8k", "gsm8k_train.jsonl", count=3))
    before = "".join(f"Question: {i} less 1?\nAnswer: It is {i - 1}.\n#### {i - 1}\n\n" for i in (5, 6, 7))
    assert found == [f"{before}Question: {i} and {i}?\nAnswer:" for i in range(3)]


def test_a_chat_has_worked_examples_as_turns(data: Path) -> None:
    model = Listener()
    ask(model, shown(data, "gsm8k", "gsm8k_train.jsonl", count=2, chat=True), chat=True)
    roles = [turn["role"] for turn in model.turns[0]]
    assert roles == ["user", "assistant"] * 2 + ["user"]
    assert model.turns[0][1]["content"] == "It is 4.\n#### 4"
    assert model.turns[0][-1]["content"] == "Question: 0 and 0?\nAnswer:"
    assert model.prompts[0].endswith("<assistant>")


def test_every_language_of_mgsm_has_examples_of_its_own(data: Path) -> None:
    german, french = prompts(shown(data, "mgsm", "shown/mgsm"))
    assert german == "Question: de?\nAnswer: de 2\n\nQuestion: Eins? Frage\nAnswer:"
    assert french == "Question: fr?\nAnswer: fr 2\n\nQuestion: Un? Frage\nAnswer:"
    one = prompts(shown(data, "mgsm", "shown/mgsm/mgsm_de.jsonl"))
    assert [prompt.split("\n\n")[0] for prompt in one] == ["Question: de?\nAnswer: de 2"] * 2


def test_code_goes_on_where_the_example_s_function_begins_and_choices_follow_a_space(data: Path) -> None:
    assert prompts(shown(data, "humaneval", "shown.jsonl")) == ["def g(x):\n    return x\n\ndef f(x):\n"]
    first, second = prompts(shown(data, "animals", "animals_train.jsonl"))
    assert first == "Question: Who barks?\nAnswer: dog\n\nQuestion: Which one?\nAnswer: cat"
    assert second.endswith("Answer: dog")


@pytest.mark.parametrize(
    ("name", "file", "count", "message"),
    [
        ("gsm8k", "gsm8k_train.jsonl", 5, "has 4 examples, --shots is 5"),
        ("gsm8k", "gsm8k_test.jsonl", 1, "among its own worked examples"),
        ("mgsm", "nowhere", 1, "no such file or folder"),
        ("refusal", "refusal.jsonl", 1, "has no worked answer"),
        ("humaneval", "HumanEval.jsonl", 1, "has no worked answer"),
    ],
)
def test_examples_that_could_mislead_are_refused(data: Path, name: str, file: str, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shown(data, name, file, count=count)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shots") / "tiny-f32.gguf"
    return write_f16(open_checkpoint(phi4_checkpoint), out, WriteOptions(), "f32").path


def drift(
    capfd: pytest.CaptureFixture[str], phi4_checkpoint: Path, artifact: Path, data: Path, *more: object
) -> tuple[int, dict[str, Any]]:
    words = ["drift", artifact, "--reference", phi4_checkpoint, "--task-data", data, "--threads", 1, "-q", "--json"]
    code = main([str(word) for word in (*words, "--max-answer-tokens", 3, *more)])
    return code, json.loads(capfd.readouterr().out)


def test_answers_are_kept_under_the_number_and_the_file_of_examples(
    capfd: pytest.CaptureFixture[str], phi4_checkpoint: Path, artifact: Path, data: Path, tmp_path: Path
) -> None:
    train = rows(
        tmp_path / "train.jsonl", {"question": "1 less 1?", "answer": "#### 0"}, {"question": "?", "answer": "#### 9"}
    )

    def again(*more: object) -> dict[str, Any]:
        code, document = drift(capfd, phi4_checkpoint, artifact, data, "--tasks", "gsm8k", *more)
        assert code == 0, document
        found: dict[str, Any] = document["data"]["tasks"]
        return found

    assert again()["results"]["gsm8k"]["shots"] == {"count": 0}
    first = again("--shots", 1, "--shots-file", train)
    assert first["artifact"]["reused"] == 0
    assert first["results"]["gsm8k"]["shots"]["count"] == 1
    (digest,) = first["results"]["gsm8k"]["shots"]["files"].values()
    assert again("--shots", 1, "--shots-file", f"gsm8k={train}")["artifact"]["reused"] == 3
    assert again("--shots", 2, "--shots-file", train)["artifact"]["reused"] == 0
    with train.open("a") as file:  # the example that is shown stays: the file is another one all the same
        file.write('{"question": "x", "answer": "#### 1"}\n')
    other = again("--shots", 1, "--shots-file", train)
    assert other["artifact"]["reused"] == 0
    assert other["results"]["gsm8k"]["shots"]["files"] != {"train.jsonl": digest}


def test_a_prompt_that_does_not_fit_is_an_error_that_names_the_question(
    capfd: pytest.CaptureFixture[str], phi4_checkpoint: Path, artifact: Path, data: Path
) -> None:
    shots = ("--shots", 4, "--shots-file", data / "gsm8k_train.jsonl", "--task-context", 64)
    code, document = drift(capfd, phi4_checkpoint, artifact, data, "--tasks", "gsm8k", *shots)
    assert code == 3
    assert "gsm8k, question gsm8k_test.jsonl:1: " in document["error"]["message"]
    assert "in a context of 64" in document["error"]["message"]
    assert "fewer --shots" in document["error"]["hint"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "gsm8k", "--shots", 2), "go together"),
        (("--tasks", "gsm8k", "--shots-file", "x"), "go together"),
        (("--tasks", "gsm8k", "--shots", 2, "--shots-file", "mgsm=x"), "is not among --tasks"),
        (("--tasks", "gsm8k,animals", "--shots", 2, "--shots-file", "x"), "of which task?"),
        (("--shots", 2), "--shots without --tasks"),
    ],
)
def test_examples_of_nothing_are_refused(
    capfd: pytest.CaptureFixture[str],
    phi4_checkpoint: Path,
    artifact: Path,
    data: Path,
    more: tuple[object, ...],
    message: str,
) -> None:
    words = more if "--tasks" in more else (*more, "--text", "builtin:eval")
    code = main(["drift", str(artifact), "--reference", str(phi4_checkpoint), "-q", "--json", *map(str, words)]
                + (["--task-data", str(data)] if "--tasks" in more else []))  # fmt: skip
    document = json.loads(capfd.readouterr().out)
    assert (code, document["error"]["code"]) == (2, 2)
    assert message in document["error"]["message"]
