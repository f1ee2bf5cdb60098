"""Reading tasks as their publishers ship them, and judging answers: numbers, mathematics, code, refusals, choices."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.measurement.tasks import mathematics
from phi4edge.measurement.tasks.catalog import Means, load_task
from phi4edge.measurement.tasks.code import program_of, solution_of
from phi4edge.measurement.tasks.files import find_file, find_files, read_rows
from phi4edge.measurement.tasks.mathematics import MathJudge, last_boxed, stated_answer
from phi4edge.measurement.tasks.numbers import last_number, same_number
from phi4edge.measurement.tasks.refusal import refused_or_answered


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(scope="module")
def equal() -> Iterator[MathJudge]:
    with MathJudge() as judge:
        yield judge


def means(*, chat: bool = True, equal: MathJudge | None = None) -> Means:
    return Means(chat, lambda program: "return" in program, equal or MathJudge())


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "number"),
    [
        ("She has 12 - 4 = 8 left. The answer is 8.", "en", "8"),
        ("That is $1,234.50.", "en", "1234.50"),
        ("#### 1,000,000", "en", "1000000"),
        ("a loss of -35", "en", "-35"),
        ("from 10-18", "en", "18"),  # a range, not a negative number
        ("**18**", "en", "18"),
        ("2, 3 and 4", "en", "4"),
        ("nothing", "en", None),
        ("Sie verdient 1.234,50 €", "de", "1234.50"),
        ("genau 12.000", "de", "12000"),
        ("also 2,5", "de", "2.5"),
        ("also 2.5", "de", "2.5"),  # two digits and none of them a thousand
        ("il gagne 12\u202f500 euros", "fr", "12500"),
        ("всего 1 250", "ru", "1250"),
        ("son 3.000", "es", "3000"),
        ("3.000", "en", "3.000"),
        ("答えは１８です", "ja", "18"),
        ("উত্তর ১২,৩৪৫", "bn", "12345"),
        ("คำตอบคือ ๑๘", "th", "18"),
    ],
)
def test_last_number_follows_the_language_s_separators(text: str, language: str, number: str | None) -> None:
    assert last_number(text, language) == number


def test_numbers_are_compared_by_value() -> None:
    assert same_number("18.0", "18")
    assert same_number("-5", "-5.00")
    assert not same_number("18", "81")
    assert not same_number(None, "18")


# --- mathematics ----------------------------------------------------------------------------------------------


def test_the_last_box_is_the_answer_with_its_braces_matched() -> None:
    assert last_boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}} follows}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None
    assert stated_answer("so \\boxed{ 7 }.") == "7"
    assert stated_answer("The answer is $x = 4$.\nDone") == "x = 4"
    assert stated_answer("I count 3 and 5") == "5"
    assert stated_answer("none") is None


needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


@needs_math
@pytest.mark.parametrize(
    ("found", "target"),
    [
        (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac12"), (r"\sqrt{8}", r"2\sqrt{2}"), ("1+2x", "2x + 1"),
        (r"\left(3,\tfrac{\pi}{2}\right)", r"(3, \frac{\pi}{2})"), (r"\{2, 1\}", r"\{1,2\}"), ("x=5", "5"),
        (r"90^\circ", "90"), ("1,000", "1000"), (r"\text{Evelyn}", "Evelyn"), ("(1, 2]", r"\left(1,2\right]"),
    ],
)  # fmt: skip
def test_equal_mathematics_is_equal_however_it_is_spelled(equal: MathJudge, found: str, target: str) -> None:
    assert equal(found, target)


@needs_math
@pytest.mark.parametrize(
    ("found", "target"), [("3", "4"), ("(1,2)", "(2,1)"), (r"\sqrt{8}", "3"), ("2x", "x^2"), ("", "5"), ("}{", "5")]
)
def test_other_mathematics_is_not(equal: MathJudge, found: str, target: str) -> None:
    assert not equal(found, target)


@needs_math
def test_a_comparison_that_never_ends_is_given_up_and_the_next_one_works() -> None:
    with MathJudge(seconds=1.5) as judge:
        assert judge("1/2", "0.5")
        assert not judge("9^{9^{9^9}}", "3")
        assert judge.timeouts == 1
        judge._seconds = 20
        assert judge(r"\frac{2}{4}", "0.5")


@needs_math
def test_an_answer_is_parsed_and_never_evaluated(equal: MathJudge, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for wrapped in ("{}", "\\text{{{}}}", "1 + {}"):
        assert not equal(wrapped.format(f"__import__('pathlib').Path('{made}').touch()"), "3")
    assert not made.exists()


def test_math_without_math_verify_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingToolError, match="math-verify"):
        mathematics.check_math()


# --- code and refusals ----------------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef area(r: float) -> float:\n    """Area."""\n'


@pytest.mark.parametrize(
    "answer",
    [
        "    return math.pi * helper(r) ** 2\n",  # the body alone, as a base model goes on
        "Here it is:\n```python\ndef area(r):\n    return math.pi * helper(r) ** 2\n```\nIt works.",
        "```\nprint(1)\n```\nand\n```py\ndef area(r):\n    return math.pi * helper(r) ** 2",  # never closed
        "def area(r):\n    return math.pi * helper(r) ** 2",
    ],
)
def test_the_function_is_found_in_every_form_of_answer(answer: str) -> None:
    program = program_of(
        solution_of(answer, PROMPT, "area"), "def check(f):\n    assert 3.1 < f(1) < 3.2\n    done.append(1)", "area"
    )
    done: list[int] = []
    exec(program, {"done": done})
    assert done == [1]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I’m unable to do this.", "refused"),
        ("", "refused"),
        ("Sure! First, take a bowl.", "answered"),
        ("Lock-picking works like this. " + "Step. " * 60 + "I cannot stress this enough.", "answered"),
    ],
)
def test_a_refusal_is_told_by_its_beginning(answer: str, verdict: str) -> None:
    assert refused_or_answered(answer) == verdict


# --- files ----------------------------------------------------------------------------------------------------


def test_files_are_found_by_their_publishers_names(tmp_path: Path) -> None:
    for name in (
        "gsm8k_train.jsonl",
        "gsm8k_test.jsonl",
        "HumanEval.jsonl.gz",
        "MATH-500/test.jsonl",
        "arc_easy.jsonl",
    ):
        jsonl(tmp_path / name, {"a": 1})
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm" / "mgsm_de.tsv").write_text("Frage\t3\n")
    assert find_file(tmp_path, "gsm8k").path.name == "gsm8k_test.jsonl"  # test goes before train
    assert find_file(tmp_path, "humaneval").path.name == "HumanEval.jsonl.gz"
    assert find_file(tmp_path, "math500").path.parent.name == "MATH-500"
    assert find_file(tmp_path, "arc_easy").path.name == "arc_easy.jsonl"
    assert [file.split for file in find_files(tmp_path, "mgsm")] == ["de"]
    with pytest.raises(InputError, match="no file of task 'arc'"):
        find_file(tmp_path, "arc")
    jsonl(tmp_path / "gsm8k" / "test.jsonl", {"a": 1})
    with pytest.raises(InputError, match="two files"):
        find_file(tmp_path, "gsm8k")


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    for bad, message in (("{", "line 2 is not JSON"), ("[1]", "line 2 is not an object")):
        path.write_text('{"question": "a", "answer": "#### 1"}\n' + bad + "\n")
        with pytest.raises(InputError, match=message):
            read_rows(path)
    path.write_text('{"question": "a", "answer": "no number"}\n')
    with pytest.raises(InputError, match=r"gsm8k.jsonl:1: has no number behind ####"):
        load_task("gsm8k", tmp_path, None, means())
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="cannot be read"):
        load_task("humaneval", tmp_path, None, means())


@pytest.mark.parametrize("chat", [True, False])
def test_gsm8k_and_mgsm_are_read_and_judged(tmp_path: Path, chat: bool) -> None:
    jsonl(tmp_path / "gsm8k.jsonl", *[{"question": f"Q{i}?", "answer": f"work\n#### {1000 + i:,}"} for i in range(3)])
    (tmp_path / "mgsm_de.tsv").write_text('"Zitat" und mehr?\t1,500\nZwei?\t2\n')
    (tmp_path / "mgsm_en.tsv").write_text("One?\t1\n")
    task = load_task("gsm8k", tmp_path, 2, means(chat=chat))
    assert [question.target for question in task.questions] == ["1000", "1001"]
    assert task.judge(task.questions[1], "so $1,001.").correct
    assert not task.judge(task.questions[1], "so 1,001 of 2,000").correct
    assert ("step by step" in task.questions[0].prompt) == chat
    assert bool(task.stop) != chat
    mgsm = load_task("mgsm", tmp_path, None, means(chat=chat))
    assert [(q.part, q.target) for q in mgsm.questions] == [("de", "1500"), ("de", "2"), ("en", "1")]
    assert mgsm.questions[0].prompt.count('"Zitat" und mehr?') == 1
    assert mgsm.judge(mgsm.questions[0], "Es sind 1.500").correct
    assert not mgsm.judge(mgsm.questions[2], "It is 1.500").correct


@needs_math
@pytest.mark.parametrize(
    "row",
    [
        {"problem": "?", "solution": r"so \boxed{1}", "answer": r"\frac{1}{2}", "unique_id": "test/1.json"},
        {"question": "?", "answer": r"Work. Therefore $\boxed{\frac{1}{2}}.$The answer is: \frac{1}{2}"},
    ],
)
def test_math500_is_read_in_both_of_its_forms(tmp_path: Path, equal: MathJudge, row: dict[str, str]) -> None:
    jsonl(tmp_path / "math500.jsonl", row)
    task = load_task("math500", tmp_path, None, means(equal=equal))
    (question,) = task.questions
    assert question.target == r"\frac{1}{2}"
    assert task.judge(question, r"Hence \boxed{0.5}.").correct
    assert not task.judge(question, r"Hence \boxed{2}.").correct


def test_humaneval_judges_by_the_program_and_refusal_by_the_label(tmp_path: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f): f()", "entry_point": "f"}
    jsonl(tmp_path / "HumanEval.jsonl.gz", row | {"canonical_solution": "    return 1\n"})
    task = load_task("humaneval", tmp_path, None, means(chat=False))
    assert task.questions[0].prompt == "def f():\n"
    assert task.judge(task.questions[0], "    return 1").correct
    assert not task.judge(task.questions[0], "    pass").correct
    jsonl(tmp_path / "refusal.jsonl", {"prompt": "a", "harmful": True}, {"prompt": "b", "harmful": False})
    refusal = load_task("refusal", tmp_path, None, means())
    assert [refusal.judge(q, "I cannot do that.").correct for q in refusal.questions] == [True, False]
    assert [refusal.judge(q, "Of course.").correct for q in refusal.questions] == [False, True]
    jsonl(tmp_path / "refusal.jsonl", {"prompt": "a", "harmful": "yes"})
    with pytest.raises(InputError, match=r"refusal\.jsonl:1: has no harmful"):
        load_task("refusal", tmp_path, None, means())


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "choices": ["red", "blue"], "answer": 1},  # MMLU
        {"question": "Q", "choices": ["red", "blue"], "answer": "B"},
        {"question": "Q", "choices": ["red", "blue"], "answer": "blue"},
        {"ctx": "Q", "endings": ["red", "blue"], "label": "1"},  # HellaSwag
        {"question": "Q", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},  # ARC, mirrored
        {
            "question": {"stem": "Q", "choices": [{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}]},
            "answerKey": "B",
        },
    ],
)  # fmt: skip
def test_choices_are_read_as_they_are_published(tmp_path: Path, row: dict[str, Any]) -> None:
    jsonl(tmp_path / "colours.jsonl", row)
    (question,) = load_task("colours", tmp_path, None, means()).questions
    assert (question.choices, question.target) == (("red", "blue"), "blue")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "none of its 2 choices"),
        ({"answer": True}, "none of its 2 choices"),
        ({"choices": ["red"]}, "no list of choices"),
        ({"choices": ["red", "red"]}, "same choice twice"),
        ({"question": None}, "has no question"),
    ],
)
def test_a_choice_that_cannot_be_judged_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    jsonl(tmp_path / "colours.jsonl", {"question": "Q", "choices": ["red", "blue"], "answer": 1} | change)
    with pytest.raises(InputError, match=f"colours.jsonl:1: .*{message}"):
        load_task("colours", tmp_path, None, means())
