"""The soak: a run that is killed, starved and damaged, started again until it is finished, and compared byte by byte.

A small model with all that a run can be stopped in: GPTQ at default effort (two streams, refinement, guard), tuning,
the export. Each round is one run, in RAM or (every other round) with activations and states of tuning on disk:

    clock     SIGKILL at a random moment, drawn from the seed, counted from the process's first sign of life
    file      SIGKILL before a file operation drawn from the seed: opened for writing, renamed, removed, folder made
    faults    what a disk, a file system or a second process may do to a run (soak_faults.py)

A SIGKILL leaves what was written to the kernel, so it shows that steps stand in the right order, not that fsync works.

    python benchmarks/scale/soak.py [--kills 60] [--file-kills 40] [--seed 0]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT / "tests")]
from record import record, update_readme  # noqa: E402
from soak_faults import DAMAGES, damage, small_disk  # noqa: E402
from soak_lives import Life, Place, committed, outcome  # noqa: E402
from support import write_checkpoint  # noqa: E402

BLOCKS = 6
OPTIONS = ["--scheme", "q4_0", "--corpus", ROOT / "README.md", "--samples", "48", "--sequence-length", "128"]
OPTIONS += ["--tune-passes", "0.5", "--effort", "default"]
FULL_SIZES = 5  # of a disk that is too small
_LOST = 1.5  # blocks of work that a kill may cost: one, and what was solved while its files were being written
_ROOM = 256 * 2**20


class Soak:
    """The runs and the outcome that each must have."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self._scratch, self._rng, self._made = scratch, random.Random(seed), 0
        shape = {"num_hidden_layers": BLOCKS, "hidden_size": 64, "intermediate_size": 128}
        self._model = write_checkpoint(scratch / "model", shards=2, **shape)
        place = self.place()
        began = time.monotonic()
        life = place.live()
        self._expect(life.code == 0, f"an undisturbed run ended with {life.code}: {life.message}")
        self.seconds, self.operations = time.monotonic() - began, life.operations
        self.wanted = outcome(place.run, place.artifact)
        self.bytes = sum(p.stat().st_size for p in place.folder.rglob("*") if p.is_file())

    @staticmethod
    def _expect(holds: bool, otherwise: str) -> None:
        if not holds:
            raise SystemExit(otherwise)

    def place(self, *, spilling: bool = False, folder: Path | None = None) -> Place:
        """A new place for a run."""
        self._made += 1
        folder = folder or self._scratch / f"place-{self._made}"
        folder.mkdir(parents=True, exist_ok=True)
        logs = self._scratch / f"logs-{self._made}"
        logs.mkdir()
        return Place(folder, logs, [self._model, *OPTIONS], spilling)

    def finish(self, place: Place, *, first: int | None = None, extra: tuple[str, ...] = ()) -> dict[str, Any]:
        """See a run to its end; whether it came out the same, and what had to be done for it."""
        life = place.live(extra=extra)
        same = life.code == 0 and outcome(place.run, place.artifact) == self.wanted
        begun = life.blocks[0] if life.blocks else None
        return {
            "code": life.code,
            "same": same,
            "from_block": begun,
            "as_expected": same and (first is None or begun == first),
            "note": life.notes[0] if life.notes else life.message,
        }

    # --- kills -----------------------------------------------------------------------------------------------

    def round(self, seed: int, kinds: list[str], spilling: bool) -> dict[str, Any]:
        """One run, killed until it is finished; ``kinds`` are those of the kills still wanted, and used up."""
        rng, place = random.Random(seed), self.place(spilling=spilling)
        kills: list[dict[str, Any]] = []
        redone, steps_redone, late = 0.0, 0, 0
        while True:
            if not kinds:
                life, kill = place.live(), None
            elif kinds[-1] == "clock":  # moments up to two fifths of a whole run, so that it comes to an end
                moment = rng.uniform(0, self.seconds / 2.5)
                kill = {"kind": "clock", "seconds": round(moment, 3)}
                life = place.live(kill=lambda _, elapsed, moment=moment: elapsed >= moment)  # type: ignore[misc]
            else:
                stop = rng.randint(1, max(2, self.operations // 3))
                kill = {"kind": "file", "operation": stop}
                life = place.live(stop=stop)
            redone = max(redone, life.redone)
            if life.tuned_from is not None:
                steps_redone = max(steps_redone, life.steps - life.steps_committed)
            if life.code == 0:
                break
            self._expect(life.code == -9, f"seed {seed}: ended with {life.code}: {life.message}")
            assert kill is not None
            kills.append(kill)
            late += bool(life.tuned_from is not None)
            kinds.pop()
        same = outcome(place.run, place.artifact) == self.wanted
        shutil.rmtree(place.folder)
        return {
            "seed": seed,
            "on_disk": spilling,
            "kills": kills,
            "kills_while_tuning": late,
            "blocks_redone_at_most": max(0.0, redone),
            "steps_redone_at_most": steps_redone,
            "same": same,
        }

    # --- faults ----------------------------------------------------------------------------------------------

    def _stopped(self, *, spilling: bool = False, tuning: bool = False) -> Place:
        """A run that was killed in the middle of a block behind the third, or of tuning."""
        place, block = self.place(spilling=spilling), self._rng.randint(3, BLOCKS - 1)
        sign = "status KLD" if tuning else f"status block {block} mlp.gate_up_proj"
        needed = 4 if tuning else 1  # steps of tuning
        place.live(kill=lambda lines, _: sum(line.startswith(sign) for line in lines) >= needed)
        return place

    def damaged(self, name: str) -> dict[str, Any]:
        """Stop a run, do the damage, and let it go on."""
        place = self._stopped()
        first = damage(name, place.run, self._rng, committed(place.run))
        return {"fault": name, **self.finish(place, first=first)}

    def damaged_state(self) -> dict[str, Any]:
        """A bit of the optimizer's last state is flipped."""
        place = self._stopped(spilling=True, tuning=True)
        state = max((place.run / "tuning").glob("state-0*"))
        path = self._rng.choice(sorted(state.iterdir()))
        data = bytearray(path.read_bytes())
        data[self._rng.randrange(len(data))] ^= 1
        path.write_bytes(data)
        return {"fault": "bit flipped in the optimizer's state", **self.finish(place)}

    def damaged_inputs(self) -> list[dict[str, Any]]:
        """run.json is cut in half: refused, and begun anew when told to."""
        place = self._stopped()
        path = place.run / "run.json"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused = place.live()
        again = self.finish(place, first=0, extra=("--restart",))
        return [
            {"fault": "run.json half written", **_refusal(refused)},
            {"fault": "the same with --restart", **again},
        ]

    def finished_damaged(self) -> dict[str, Any]:
        """A bit of a finished run's block is flipped, and the command given again."""
        place = self.place()
        place.live()
        at = self._rng.randrange(BLOCKS)
        path = place.run / f"blocks/{at:05d}.safetensors"
        data = bytearray(path.read_bytes())
        data[self._rng.randrange(len(data))] ^= 1
        path.write_bytes(data)
        return {"fault": "bit flipped in a block of a finished run", **self.finish(place, first=at)}

    def second_process(self) -> list[dict[str, Any]]:
        """A second process on the same run while the first works."""
        place = self.place()
        other = Place(place.folder, self._scratch / "second", place.arguments, place.spilling)
        other.logs.mkdir()
        found: list[Life] = []

        def meanwhile(lines: list[str]) -> None:
            if not found and any(line.startswith("status block 1 ") for line in lines):
                found.append(other.live())

        life = place.live(meanwhile=meanwhile)
        same = life.code == 0 and outcome(place.run, place.artifact) == self.wanted
        return [
            {"fault": "second process on the run", **_refusal(found[0])},
            {"fault": "the first process meanwhile", "code": life.code, "same": same, "as_expected": same, "note": ""},
        ]

    def full_disk(self, share: float, spilling: bool) -> list[dict[str, Any]]:
        """A disk of ``share`` of what the run keeps in the end; then one that is large enough."""
        size = int(share * self.bytes) // 4096 * 4096
        name = f"disk of {size / 2**20:.2f} MiB" + (", activations on disk" if spilling else "")
        with small_disk(self._scratch / f"disk-{self._made}", size) as disk:
            if disk is None:
                return [{"fault": name, "code": None, "same": None, "as_expected": None, "note": "cannot mount here"}]
            place = self.place(folder=disk.path, spilling=spilling)
            starved = place.live()
            before = committed(place.run)
            disk.grow(_ROOM)
            return [
                {"fault": name, **_refusal(starved, None)},
                {"fault": "more room, started again", **self.finish(place, first=before if before < BLOCKS else None)},
            ]

    def small_files(self) -> list[dict[str, Any]]:
        """Files may not grow beyond a limit (RLIMIT_FSIZE), as on a disk that is full for large ones only."""
        place = self.place()
        place.limit = 2**20
        starved = place.live()
        place.limit = None
        return [
            {"fault": "files limited to 1 MiB", **_refusal(starved, None)},
            {"fault": "no limit, started again", **self.finish(place)},
        ]


def _refusal(life: Life, code: int | None = 7) -> dict[str, Any]:
    """A process that has to end with an error of its own, of a code if there is one for it, and not by a signal."""
    good = life.code == code if code is not None else life.code > 0 and bool(life.message)
    return {"code": life.code, "same": None, "as_expected": good, "note": life.message}


def _faults(soak: Soak) -> list[Callable[[], dict[str, Any] | list[dict[str, Any]]]]:
    def of(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: soak.damaged(name)

    def full(share: float, spilling: bool) -> Callable[[], list[dict[str, Any]]]:
        return lambda: soak.full_disk(share, spilling)

    shares = [(i + 0.5) / FULL_SIZES for i in range(FULL_SIZES)]
    return [
        *(of(name) for name in DAMAGES),
        soak.damaged_state,
        soak.damaged_inputs,
        soak.finished_damaged,
        soak.second_process,
        *(full(share, i % 2 == 1) for i, share in enumerate(shares)),
        soak.small_files,
    ]


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    said = {True: "yes", False: "**no**", None: "–"}
    lines = [
        "| seed | activations | kills by clock | before a file operation | of these while tuning or later | "
        "blocks of work redone a kill, at most | tuning steps redone, at most | bytes as undisturbed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rounds"]:
        clock = sum(kill["kind"] == "clock" for kill in row["kills"])
        lines.append(
            f"| {row['seed']} | {'disk' if row['on_disk'] else 'RAM'} | {clock} | {len(row['kills']) - clock} | "
            f"{row['kills_while_tuning']} | {row['blocks_redone_at_most']} | {row['steps_redone_at_most']} | "
            f"{said[row['same']]} |"
        )
    lines += ["", "| fault | exit code | gone on from block | bytes as undisturbed | as it should be | what it says |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in results["faults"]:
        block = row.get("from_block")
        lines.append(
            f"| {row['fault']} | {row['code']} | {'–' if block is None else block} | {said[row['same']]} | "
            f"{said[row['as_expected']]} | {row['note'].replace('|', '/')} |"
        )
    return "\n".join(lines)


def sound(results: dict[str, Any]) -> bool:
    """Whether all held: the same bytes, little redone after a kill, every fault answered as it should be."""
    rounds = all(row["same"] and row["blocks_redone_at_most"] <= _LOST for row in results["rounds"])
    return rounds and all(row["as_expected"] is not False for row in results["faults"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="by the clock, in all rounds together")
    parser.add_argument("--file-kills", type=int, default=40, help="before a file operation")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kinds = ["clock"] * a.kills + ["file"] * a.file_kills
    random.Random(a.seed).shuffle(kinds)
    rounds: list[dict[str, Any]] = []
    faults: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), a.seed)
        while kinds:
            number = len(rounds)
            rounds.append(soak.round(1000 * a.seed + number, kinds, number % 2 == 1))
            print(json.dumps(rounds[-1]), flush=True)
        for fault in _faults(soak):
            found = fault()
            faults += found if isinstance(found, list) else [found]
            print(json.dumps(found, ensure_ascii=False), flush=True)
        results = {
            "seed": a.seed,
            "blocks": BLOCKS,
            "file_operations": soak.operations,
            "undisturbed_seconds": soak.seconds,
            "files_compared": len(soak.wanted),
            "rounds": rounds,
            "faults": faults,
        }
    command = f"python benchmarks/scale/soak.py --kills {a.kills} --file-kills {a.file_kills} --seed {a.seed}"
    sources = tuple(f"benchmarks/scale/{name}.py" for name in ("soak", "soak_child", "soak_faults", "soak_lives"))
    record(HERE / "results" / "soak.json", command, results, sources)
    update_readme(HERE / "README.md", "soak", table(results))
    print(table(results))
    if not sound(results):
        raise SystemExit("something did not hold")


if __name__ == "__main__":
    main()
