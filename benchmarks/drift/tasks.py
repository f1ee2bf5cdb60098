"""GSM8K and HumanEval from end to end on a model and an artifact of it, with questions of our own making.

The problems have the form of the publishers' files and are generated: arithmetic in a sentence or two with a worked
answer behind ####, and functions of a line or two with a docstring, a solution and tests. Three rounds, each one
``phi4edge drift``: gsm8k without and with worked examples, humaneval. Then what the sandbox is for: every solution
must pass its tests, every solution broken on purpose must not, and each hostile program must do no harm.

So few questions decide nothing: what is recorded is that the machinery runs, how long a question takes,
and where both models differ. ``--data`` takes a folder with the publishers' files in place of ours.

    python benchmarks/drift/tasks.py MODEL ARTIFACT [--questions 12] [--tokens 96] [--data DIR]
"""

from __future__ import annotations

__all__ = ["main", "write_questions"]

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from phi4edge.measurement.tasks.code import program_of
from phi4edge.measurement.tasks.sandbox import SandboxLimits, check_sandbox, run_program

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import record, update_readme  # noqa: E402

NAMES, THINGS = ("Ana", "Bela", "Chidi", "Dora", "Emil", "Farid"), ("pears", "stamps", "nails", "cards", "shells")
SHOTS = 4
FUNCTIONS: list[tuple[str, str, str, str, str]] = [  # name, arguments, what it does, body, tests
    ("double", "x", "Return twice x.", "return 2 * x", "f(3) == 6 and f(-1) == -2"),
    ("last_of", "items", "Return the last item of a list.", "return items[-1]", "f([1, 2, 9]) == 9"),
    ("is_even", "n", "Return whether n is even.", "return n % 2 == 0", "f(4) and not f(7)"),
    ("shout", "text", "Return text in capitals.", "return text.upper()", "f('ab c') == 'AB C'"),
    ("total", "numbers", "Return the sum of the numbers.", "return sum(numbers)", "f([1, 2, 4]) == 7 and f([]) == 0"),
    ("largest", "numbers", "Return the largest number of a list.", "return max(numbers)", "f([3, 8, 1]) == 8"),
    ("count_a", "text", "Return how often the letter a is in text.", "return text.count('a')", "f('banana') == 3"),
    ("backwards", "text", "Return text from its end to its start.", "return text[::-1]", "f('abc') == 'cba'"),
    ("clip", "x, low, high", "Return x, but low if below it and high if above.",
     "return max(low, min(x, high))", "f(5, 0, 3) == 3 and f(-1, 0, 3) == 0 and f(2, 0, 3) == 2"),
    ("mean", "numbers", "Return the mean of a list of numbers.",
     "return sum(numbers) / len(numbers)", "f([1, 2, 6]) == 3"),
    ("unique", "items", "Return the items once each, in the order of their first time.",
     "return list(dict.fromkeys(items))", "f([2, 1, 2, 3, 1]) == [2, 1, 3]"),
    ("factorial", "n", "Return the product of the numbers from 1 to n.",
     "result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result", "f(5) == 120 and f(0) == 1"),
]  # fmt: skip
# Each ends well only where it could do what it should not be able to.
HOSTILE = {
    "writes a file outside": "open('{place}/harm', 'w').write('x')",
    "deletes a file": "import os\nos.remove('{place}/kept')",
    "opens a connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "kills its parent": "import os, signal\nos.kill({pid}, signal.SIGKILL)",
    "takes four gigabytes": "x = bytearray(4 * 2**30)",
    "never ends": "while True:\n    pass",
    "forks without end": "import os\nfor _ in range(200):\n    os.fork()",
    "exits as if it had passed": "import os\nos._exit(0)",
}


def write_questions(folder: Path, count: int, seed: int = 0) -> None:
    """gsm8k_test.jsonl, gsm8k_train.jsonl and HumanEval.jsonl in ``folder``."""
    rng = random.Random(seed)

    def problem() -> dict[str, str]:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        have, times, lost = rng.randint(3, 30), rng.randint(2, 5), rng.randint(1, 3)
        bought = have * times
        question = (
            f"{name} has {have} {thing} and buys {times} times as many more. Then {name} loses {lost}. "
            f"How many {thing} does {name} have?"
        )
        steps = f"{name} buys {have} * {times} = {bought}.\n{have} + {bought} - {lost} = {have + bought - lost}."
        return {"question": question, "answer": f"{steps}\n#### {have + bought - lost}"}

    rows = {
        "gsm8k_train.jsonl": [problem() for _ in range(SHOTS)],
        "gsm8k_test.jsonl": [problem() for _ in range(count)],
    }
    rows["HumanEval.jsonl"] = [
        {
            "task_id": f"own/{i}",
            "entry_point": name,
            "prompt": f'def {name}({given}):\n    """{said}"""\n',
            "canonical_solution": f"    {body}\n",
            "test": f"def check(f):\n    assert {tests}\n",
        }
        for i, (name, given, said, body, tests) in enumerate(FUNCTIONS[:count])
    ]
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def drift(model: Path, artifact: Path, data: Path, tokens: int, *more: str) -> dict[str, Any]:
    """The ``tasks`` of one drift document, and the seconds that it took."""
    words = [
        "drift",
        artifact,
        "--reference",
        model,
        "--task-data",
        data,
        "--max-answer-tokens",
        tokens,
        "--json",
        "-q",
    ]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "phi4edge", *map(str, words), *more], capture_output=True, text=True)
    if done.returncode not in (0, 6):
        raise SystemExit(done.stdout + done.stderr)
    document = json.loads(done.stdout)
    return document["data"]["tasks"] | {"gates": document["data"]["gates"], "seconds": time.perf_counter() - began}


def sandbox(data: Path) -> dict[str, Any]:
    """What passes and what does not, of code that is known."""
    import os
    import socket

    rows = [json.loads(line) for line in (data / "HumanEval.jsonl").read_text().splitlines()]

    def passes(row: dict[str, str], solution: str) -> bool:
        return run_program(program_of(row["prompt"] + solution, row["test"], row["entry_point"]))

    solved = sum(passes(row, row["canonical_solution"]) for row in rows)
    broken = sum(passes(row, "    return object()\n") for row in rows)
    harm = {}
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        (Path(folder) / "kept").write_text("x")
        Path(folder).chmod(0o777)
        where = {"place": folder, "port": server.getsockname()[1], "pid": os.getpid()}
        for name, program in HOSTILE.items():
            harm[name] = run_program(program.format(**where), SandboxLimits(wall_s=8, cpu_s=2))
        assert [path.name for path in Path(folder).iterdir()] == ["kept"], "a program wrote or deleted"
    return {
        "isolation": check_sandbox(),
        "solutions": len(rows),
        "passed": solved,
        "broken_passed": broken,
        "harm": harm,
    }


def table(results: dict[str, Any]) -> str:
    """The rounds in Markdown."""

    def share(value: dict[str, Any]) -> str:
        return f"{value['correct']} [{100 * value['low']:.0f}, {100 * value['high']:.0f}] %"

    lines = [
        "| round | questions | full precision right | artifact right | difference, points | lost, gained | same text "
        "| s a question |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["rounds"].items():
        ((_, result),) = found["results"].items()
        change, flips = result["difference"], result["flips"]
        points = f"{100 * change['value']:+.0f} [{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
        lines.append(
            f"| {name} | {result['n']} | {share(result['reference'])} | {share(result['artifact'])} | {points} | "
            f"{flips['lost']}, {flips['gained']} | {100 * result['same_output']:.0f} % "
            f"| {found['seconds'] / 2 / result['n']:.1f} |"
        )
    box = results["sandbox"]
    contained = sum(not harmed for harmed in box["harm"].values())
    lines += [
        "",
        f"In the sandbox {box['passed']} of {box['solutions']} known solutions passed, {box['broken_passed']} broken "
        f"ones did, and {contained} of {len(box['harm'])} hostile programs were contained.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run all rounds, record them and bring TASKS.md up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = given.data or Path(folder)
        if given.data is None:
            write_questions(data, given.questions)
        ask = [given.model, given.artifact, data, given.tokens]
        limit = ("--limit", str(given.questions), "--min-reference-share", "0.99")
        shots = ("--shots", str(SHOTS), "--shots-file", str(data / "gsm8k_train.jsonl"))
        rounds = {
            "gsm8k, no examples": drift(*ask, "--tasks", "gsm8k", *limit),
            f"gsm8k, {SHOTS} examples": drift(*ask, "--tasks", "gsm8k", *limit, *shots),
            "humaneval": drift(*ask, "--tasks", "humaneval", *limit, "--allow-code-execution"),
        }
        results = {"model": given.model.name, "rounds": rounds, "sandbox": sandbox(data)}
    said = f"python benchmarks/drift/tasks.py {given.model.name} {given.artifact.name}"
    record(HERE / "results" / "tasks.json", f"{said} --questions {given.questions} --tokens {given.tokens}", results,
           ("benchmarks/drift/tasks.py",))  # fmt: skip
    update_readme(HERE / "TASKS.md", "tasks", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
