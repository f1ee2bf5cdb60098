"""Build a runner: sources, cmake, ninja, a look at what came out, and one rename into the cache.

Everything happens in ``<key>.partial`` beside the place where the runner will lie. Killed at any instant, a build
leaves that folder and no other; the next one goes on in it with what ninja's log holds as compiled, or begins cmake
anew where cmake had not ended. The lock is passed on to cmake and ninja: where only phi4edge was killed, the next build
waits until they have ended.
"""

from __future__ import annotations

__all__ = ["Plan", "build", "plan"]

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import PARTIAL, fsync_directory, write_json
from phi4edge.core.errors import InputError, Phi4EdgeError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.runtimes._runner_cache import MANIFEST, SCHEMA, Runner, read_runner, runners_folder
from phi4edge.runtimes._runner_elf import check_program
from phi4edge.runtimes._runner_recipe import PROGRAMS, Recipe, cmake_flags, march_of
from phi4edge.runtimes._runner_sources import ORIGIN, identify, unpack
from phi4edge.runtimes._runner_tools import Tools, find_tools, toolchain_flags

# What would change a build and is not in its key.
_NOT_INHERITED = re.compile(r"(C|CXX|CPP|LD|AS)FLAGS|CC|CXX|AR|RANLIB|CMAKE_.*|NINJA_STATUS|CPATH|C_INCLUDE_PATH")
_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_CONFIGURED = "configured"
_C_LIBRARY = {"gcc": "glibc", "zig": "musl"}  # inside the programs: who passes them on keeps its licence too


@dataclass(frozen=True)
class Plan:
    """What a build would do."""

    recipe: Recipe
    tools: Tools
    sources: Path | None  # None: pip fetches them
    folder: Path  # where the runner will lie

    @property
    def partial(self) -> Path:
        """Where it is built."""
        return self.folder.with_name(self.folder.name + PARTIAL)

    @property
    def flags(self) -> list[str]:
        """cmake's, without the compiler's."""
        return [*cmake_flags(self.recipe.arch, self.recipe.march, self.recipe.compiler)]

    def finished(self) -> Runner | None:
        """The runner, where it was built before and all its files are as they were."""
        try:
            runner = read_runner(self.folder)
        except InputError:
            return None
        return None if runner.faults() else runner


def plan(arch: str, *, march: str | None = None, compiler: str = "auto", sources: Path | None = None) -> Plan:
    """Find the tools and the sources, and fix what will be built; nothing is fetched or written.

    Raises:
        UsageError: ``march`` is none of ``arch``.
        InputError: ``sources`` are not llama.cpp's.
        MissingToolError: no compiler, cmake or ninja.
    """
    wanted = march_of(arch, march)
    source = identify(sources)
    tools = find_tools(arch, compiler)
    recipe = Recipe(arch, wanted, tools.compiler.kind, tools.compiler.version, source)
    return Plan(recipe, tools, sources, runners_folder(arch) / recipe.key)


def build(made: Plan, *, jobs: int | None = None, progress: Progress = SILENT) -> tuple[Runner, bool]:
    """The runner of ``made``, and whether it was built now, with ``jobs`` compilers at a time, or lay in the cache.

    Raises:
        InputError: the sources are damaged.
        MissingToolError: pip did not get them.
        Phi4EdgeError: cmake or the compiler failed; the log's place is in the hint.
    """
    made.folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(made.folder.with_name(made.folder.name + ".lock"), progress) as lock:
        work = made.partial
        if (runner := made.finished()) is not None:
            shutil.rmtree(work, ignore_errors=True)  # of a build that was killed after its rename
            return runner, False
        if not (work / "sources").is_dir():
            progress.note("fetching llama.cpp's sources" if made.sources is None else f"reading {made.sources}")
            unpack(made.sources, work / "sources")
        origin = json.loads((work / "sources" / ORIGIN).read_text(encoding="utf-8"))
        _compile(made, origin, jobs or os.cpu_count() or 1, lock, progress)
        result = _gather(made, origin)
        if made.folder.exists():  # damaged, else it had been returned
            shutil.rmtree(made.folder)
        result.replace(made.folder)
        fsync_directory(made.folder.parent)
        shutil.rmtree(work)
        return read_runner(made.folder), True


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress.note("another process builds this runner; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _compile(made: Plan, origin: dict[str, Any], jobs: int, lock: int, progress: Progress) -> None:
    work = made.partial
    build_folder, marker = work / "build", work / _CONFIGURED
    commit = origin["llama_cpp_commit"]
    if not marker.exists():  # cmake was killed midway, or never began
        shutil.rmtree(build_folder, ignore_errors=True)
        command = [made.tools.cmake, "-G", "Ninja", "-S", str(work / "sources"), "-B", str(build_folder)]
        command += [f"-DCMAKE_MAKE_PROGRAM={made.tools.ninja}", *made.flags]
        command += [f"-DLLAMA_BUILD_COMMIT={commit[:9] if commit else 'unknown'}", "-DLLAMA_BUILD_NUMBER=0"]
        _call([*command, *toolchain_flags(made.tools.compiler, made.recipe, work / "toolchain")], work, lock, progress)
        marker.touch()
    _call([made.tools.ninja, "-C", str(build_folder), f"-j{jobs}", *PROGRAMS], work, lock, progress)


def _call(command: list[str], work: Path, lock: int, progress: Progress) -> None:
    """Run cmake or ninja; its lines go to the log, its steps to ``progress``."""
    environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
    # ccache, where it is installed, shares what two runners have in common, though their folders differ.
    environment |= {"CCACHE_BASEDIR": str(work), "CCACHE_NOHASHDIR": "1"}
    last: deque[str] = deque(maxlen=200)
    began = done = 0
    with (
        (work / "build.log").open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                last.append(line.strip())
                if step := _STEP.match(line):
                    if not began:
                        began = int(step[2])
                        progress.start("build", began, "step")
                    progress.advance(int(step[1]) - done)
                    done = int(step[1])
                    progress.status(step[3].rsplit("/", 1)[-1].strip())
        except BaseException:
            process.terminate()  # ninja ends its compilers, and removes what they had half written
            raise
    if began:
        progress.finish()
    if process.returncode:
        words = next((line for line in last if re.search(r"\b[Ee]rror\b", line)), last[-1] if last else "")
        raise Phi4EdgeError(
            f"{Path(command[0]).name} ended with exit status {process.returncode}: {words}",
            f"all it said is in {work / 'build.log'}",
        )


def _gather(made: Plan, origin: dict[str, Any]) -> Path:
    """The finished folder, still inside the partial one: programs, licences, manifest, all on the disk."""
    result = made.partial / "result"
    shutil.rmtree(result, ignore_errors=True)
    (result / "licences").mkdir(parents=True)
    for name in PROGRAMS:
        check_program(made.partial / "build" / "bin" / name, made.recipe.arch)
        shutil.copy2(made.partial / "build" / "bin" / name, result / name)
    sources = made.partial / "sources"
    shutil.copy2(sources / "LICENSE", result / "licences" / "llama.cpp")
    for path in (*sources.glob("licenses/*"), *sources.glob("vendor/*/LICENSE*")):
        name = path.parent.name if path.parent.parent.name == "vendor" else path.name.removeprefix("LICENSE-")
        shutil.copy2(path, result / "licences" / name)
    files = {}
    for path in sorted(p for p in result.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(result).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {
        "schema": SCHEMA,
        "key": made.recipe.key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **made.recipe.as_dict(),
        **origin,
        "c_library": _C_LIBRARY[made.recipe.compiler],
        "files": files,
    }
    write_json(result / MANIFEST, manifest)
    return result
