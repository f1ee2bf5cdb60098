"""`phi4edge runner`: what is built, under which key, and what a kill, a damage or a missing tool leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from runner_support import COMMIT, Commands, needs_a_compiler, programs_of, write_sdist, write_sources
from scripts import ROOT

from phi4edge.core.errors import Phi4EdgeError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.runtimes import _runner_sources as sources_module
from phi4edge.runtimes._runner_cache import built, read_runner
from phi4edge.runtimes._runner_elf import check_program
from phi4edge.runtimes._runner_recipe import DEFAULT_MARCH, PROGRAMS, Recipe, cmake_flags, march_of, zig_cpu
from phi4edge.runtimes._runner_sources import ORIGIN, commit_of, unpack


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Commands(tmp_path / "cache")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "llama.cpp")


# --- flags and keys -----------------------------------------------------------------------------------------

RECIPE = {
    "arch": "aarch64",
    "march": "armv8.2-a",
    "compiler": "gcc",
    "compiler_version": "12",
    "source": (("version", "1"),),
}


@pytest.mark.parametrize("path", sorted((ROOT / "targets").glob("*.toml")), ids=lambda path: path.stem)
def test_the_default_instruction_set_is_one_that_every_target_has(path: Path) -> None:
    profile = tomllib.loads(path.read_text())
    arch = profile.get("arch", "x86_64")
    has = set(profile["isa"])
    if arch == "aarch64":
        version, *extensions = DEFAULT_MARCH[arch].split("+")
        assert version == "armv8.2-a"
        assert set(extensions) <= has
    else:
        on = [flag for flag in cmake_flags(arch, DEFAULT_MARCH[arch], "gcc") if flag.endswith("=ON")]
        asked = {flag.removeprefix("-DGGML_").removesuffix("=ON").lower() for flag in on}
        assert asked - {"sse42", "avx", "bmi2"} <= has  # those came before AVX2, or with it


@pytest.mark.parametrize("arch", DEFAULT_MARCH)
def test_no_runner_is_tuned_to_the_machine_that_builds_it_or_asks_for_libraries(arch: str) -> None:
    flags = cmake_flags(arch, DEFAULT_MARCH[arch], "gcc")
    for flag in (
        "-DGGML_NATIVE=OFF",
        "-DGGML_OPENMP=OFF",
        "-DBUILD_SHARED_LIBS=OFF",
        f"-DCMAKE_SYSTEM_PROCESSOR={arch}",
    ):
        assert flag in flags
    assert any(flag.startswith("-DCMAKE_EXE_LINKER_FLAGS=-static") for flag in flags)


@pytest.mark.parametrize(
    "change",
    [{"march": "armv8.2-a+i8mm"}, {"compiler_version": "13"}, {"compiler": "zig"}, {"source": (("version", "2"),)}],
    ids=lambda change: next(iter(change)),
)
def test_a_key_is_the_same_for_the_same_recipe_only(change: dict[str, object]) -> None:
    assert Recipe(**RECIPE).key == Recipe(**RECIPE).key  # type: ignore[arg-type]
    assert Recipe(**RECIPE).key != Recipe(**RECIPE | change).key  # type: ignore[arg-type]


@pytest.mark.parametrize(("arch", "march"), [("x86_64", "x86-64-v9"), ("aarch64", "i8mm"), ("aarch64", "armv8-a; rm")])
def test_an_instruction_set_of_another_kind_is_refused(arch: str, march: str) -> None:
    with pytest.raises(UsageError) as caught:
        march_of(arch, march)
    assert march in caught.value.message


def test_zig_is_told_the_same_instruction_set_in_its_own_words() -> None:
    assert zig_cpu("armv8.2-a+dotprod+fp16+i8mm") == "generic+v8_2a+dotprod+fullfp16+i8mm"


# --- a build ------------------------------------------------------------------------------------------------


@needs_a_compiler
def test_a_build_leaves_programs_their_hashes_and_the_licences(
    commands: Commands, sources: Path, tmp_path: Path
) -> None:
    done = commands.build(sources, "--out", tmp_path / "copy")
    assert done["built"] is True
    manifest = done["runner"]
    folder = Path(manifest["folder"])
    assert programs_of(folder) == {name: f"{name} {COMMIT[:9]}\n" for name in PROGRAMS}
    assert programs_of(tmp_path / "copy") == programs_of(folder)
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "runner.json"
    }
    assert (folder / "licences" / "llama.cpp").read_text() == "MIT, in the test's words"
    assert {"licences/jsonhpp", "licences/cpp-httplib"} <= set(manifest["files"])
    assert manifest["llama_cpp_commit"] == COMMIT
    assert manifest["compiler"]["version"].split()[-1][0].isdigit()
    assert commands.folders() == [manifest["key"]]
    assert built("x86_64") == folder
    assert built("x86_64", "x86-64-v2") is None
    assert built("riscv64") is None
    assert read_runner(tmp_path / "copy").faults() == []


@needs_a_compiler
def test_a_runner_is_built_once_and_another_instruction_set_is_another(commands: Commands, sources: Path) -> None:
    plan = commands.build(sources, "--dry-run")["plan"]
    assert (plan["cached"], commands.folders()) == (False, [])
    first = commands.build(sources)
    assert first["runner"]["key"] == plan["key"]
    again = commands.build(sources)
    assert (again["built"], again["runner"]) == (False, first["runner"])
    older = commands.build(sources, "--march", "x86-64-v2")
    assert older["built"] is True
    listed = commands.run("list")["runners"]
    assert {entry["march"] for entry in listed} == {"x86-64-v2", "x86-64-v3"}
    assert built("x86_64") == Path(first["folder"])


@needs_a_compiler
def test_an_sdist_is_taken_and_its_llama_cpp_is_found(commands: Commands, sources: Path, tmp_path: Path) -> None:
    done = commands.build(write_sdist(tmp_path / "sdist.tar.gz", sources))
    assert done["runner"]["llama_cpp_commit"] == COMMIT
    assert done["runner"]["archive_sha256"] == sha256_file(tmp_path / "sdist.tar.gz")


def test_programs_are_made_to_wait_for_their_log(sources: Path, tmp_path: Path) -> None:
    known = "int llama_completion(int argc, char ** argv);\n\nint main(int argc, char ** argv) {\n"
    (sources / "tools/completion/main.cpp").write_text(known + "    return llama_completion(argc, argv);\n}\n")
    other = "int main() { return 0; }\n"  # of another form: left as it is, and not said to be changed
    (sources / "tools/perplexity/main.cpp").write_text(other)
    unpack(sources, tmp_path / "out")
    assert json.loads((tmp_path / "out" / ORIGIN).read_text())["changed"] == ["tools/completion/main.cpp"]
    changed = (tmp_path / "out/tools/completion/main.cpp").read_text()
    assert changed.index("= llama_completion(argc, argv);") < changed.index("common_log_flush(common_log_main());")
    assert (tmp_path / "out/tools/perplexity/main.cpp").read_text() == other
    assert known in (sources / "tools/completion/main.cpp").read_text(), "the user's own are not touched"


@needs_a_compiler
def test_flags_of_the_environment_do_not_enter(commands: Commands, tmp_path: Path) -> None:
    main = '#ifdef LEAKED\n#error leaked\n#endif\n#include <cstdio>\nint main() { std::puts(NAME " " COMMIT); }\n'
    sources = write_sources(tmp_path / "llama.cpp", main=main)
    commands.build(sources, CXXFLAGS="-DLEAKED", CMAKE_BUILD_TYPE="Debug")


@needs_a_compiler
def test_a_changed_program_is_not_handed_out_and_is_built_anew(commands: Commands, sources: Path) -> None:
    folder = Path(commands.build(sources)["folder"])
    with (folder / "llama-bench").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    assert built("x86_64") is None
    assert commands.run("list")["runners"][0]["faults"] == ["llama-bench is not the file that was built"]
    assert commands.build(sources)["built"] is True
    assert built("x86_64") == folder


@needs_a_compiler
def test_a_compiler_error_is_quoted_and_leaves_no_runner(commands: Commands, tmp_path: Path) -> None:
    error = commands.build(write_sources(tmp_path / "llama.cpp", main="int main() { nonsense; }"), code=1)
    assert "nonsense" in error["message"]
    log = Path(error["hint"].removeprefix("all it said is in "))
    assert "nonsense" in log.read_text()
    assert built("x86_64") is None


# --- killed, and two at once --------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"{path} never came"
        time.sleep(0.02)


@needs_a_compiler
def test_a_build_killed_in_the_middle_leaves_no_runner_and_the_next_goes_on(
    commands: Commands, sources: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    words = ("build", "--arch", "x86_64", "--compiler", "gcc", "--sources", sources)
    first = commands.start(*words, GATE=str(gate))
    wait_for(Path(f"{gate}.reached"))
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    (partial,) = commands.folders()
    assert partial.endswith(".partial")
    assert built("x86_64") is None
    assert commands.run("list")["unfinished"] == [str(commands.runners / partial)]
    bench = commands.runners / partial / "build" / "bin" / "llama-bench"
    compiled = bench.stat().st_mtime_ns

    second = commands.start(*words)
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()  # ninja is at work still: it holds the lock
    assert second.poll() is None
    gate.touch()
    done = commands.end(second)
    folder = Path(done["folder"])
    assert commands.folders() == [folder.name]
    assert programs_of(folder) == {name: f"{name} {COMMIT[:9]}\n" for name in PROGRAMS}
    assert (folder / "llama-bench").stat().st_mtime_ns == compiled  # copied with its time: it was not linked again


@needs_a_compiler
def test_a_build_killed_while_cmake_worked_begins_cmake_anew(commands: Commands, sources: Path) -> None:
    plan = commands.build(sources, "--dry-run")["plan"]
    partial = commands.runners / (plan["key"] + ".partial")
    (partial / "build").mkdir(parents=True)
    (partial / "build" / "CMakeCache.txt").write_text("CMAKE_GENERATOR:INTERNAL=Unix Makefiles\n")
    (partial / "sources.unpacking").mkdir()
    assert commands.build(sources)["built"] is True
    assert commands.folders() == [plan["key"]]
    partial.mkdir()  # as a kill between the rename and the end leaves it
    assert commands.build(sources)["built"] is False
    assert commands.folders() == [plan["key"]]


@needs_a_compiler
def test_two_builds_of_one_runner_do_the_work_once(commands: Commands, sources: Path) -> None:
    words = ("build", "--arch", "x86_64", "--compiler", "gcc", "--sources", sources)
    both = [commands.start(*words) for _ in range(2)]
    done = [commands.end(process) for process in both]
    assert sorted(each["built"] for each in done) == [False, True]
    assert done[0]["runner"] == done[1]["runner"]  # one manifest, with one time in it
    assert commands.folders() == [done[0]["runner"]["key"]]


# --- what is missing or damaged -----------------------------------------------------------------------------


def test_everything_that_is_missing_is_named_with_the_way_to_get_it(
    commands: Commands, sources: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    lone = tmp_path / "lone" / "python"  # cmake and ninja beside this Python would be found
    lone.parent.mkdir()
    code = f"import sys; sys.executable = {str(lone)!r}; from phi4edge.cli.main import entry; entry()"
    for compiler, way in (
        ("gcc", "apt install g++-aarch64-linux-gnu"),
        ("auto", "g++-aarch64-linux-gnu, or pip install"),
    ):
        words = ["runner", "build", "--arch", "aarch64", "--compiler", compiler, "--sources", str(sources), "--json"]
        if compiler == "auto":
            code = "import importlib.util as u; u.find_spec = lambda name: None; " + code
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=os.environ | {"PATH": str(empty)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 5, done.stdout + done.stderr
        error = json.loads(done.stdout)["error"]
        assert error["message"] == "a runner cannot be built: cmake, ninja, a compiler for aarch64 not found"
        assert error["hint"].startswith("pip install cmake ninja; ")
        assert way in error["hint"]
    assert not commands.cache.exists()


@needs_a_compiler
def test_damaged_sources_are_refused_and_leave_nothing_that_looks_whole(
    commands: Commands, sources: Path, tmp_path: Path
) -> None:
    whole = write_sdist(tmp_path / "sdist.tar.gz", sources)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-200])
    assert "not a whole archive" in commands.build(cut, code=3)["message"]
    (sources / "tools" / "perplexity" / "CMakeLists.txt").unlink()
    assert "tools/perplexity/CMakeLists.txt is missing" in commands.build(sources, code=3)["message"]
    lacking = write_sdist(tmp_path / "lacking.tar.gz", sources)
    assert "tools/perplexity/CMakeLists.txt is missing" in commands.build(lacking, code=3)["message"]
    assert "no such file" in commands.build(tmp_path / "nowhere", code=3)["message"]
    assert not list(commands.runners.glob("*/sources"))
    assert built("x86_64") is None


@needs_a_compiler
def test_without_the_network_the_hint_is_to_name_sources(commands: Commands, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "pip"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "__main__.py").write_text("raise SystemExit('no network: ' + ' '.join(__import__('sys').argv[1:]))")
    path = os.pathsep.join([str(broken.parent), str(ROOT)])
    error = commands.run("build", "--arch", "x86_64", "--compiler", "gcc", code=5, PYTHONPATH=path)
    assert "no network: download" in error["message"]
    assert "--no-binary llama-cpp-python" in error["message"]
    assert "--sources" in error["hint"]


def test_the_commit_is_the_sources_own_and_never_that_of_a_repository_around_them(tmp_path: Path) -> None:
    write_sources(tmp_path / "outer")
    inner = write_sources(tmp_path / "outer" / "llama.cpp", commit=None)
    assert commit_of(tmp_path / "outer") == COMMIT
    assert commit_of(inner) is None
    (inner / ".git" / "refs").mkdir(parents=True)
    (inner / ".git" / "HEAD").write_text("ref: refs/main\n")
    (inner / ".git" / "refs" / "main").write_text(COMMIT[::-1] + "\n")
    assert commit_of(inner) == COMMIT[::-1]


def test_the_version_is_the_pinned_one_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources_module.importlib.metadata, "version", absent)
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["llama"]
    assert [f"llama-cpp-python=={sources_module.installed_version()}"] == pins


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this Python is no ELF program")
def test_a_program_that_needs_a_loader_or_another_processor_is_no_runner(tmp_path: Path) -> None:
    python = Path(sys.executable).resolve()
    here = "aarch64" if os.uname().machine == "aarch64" else "x86_64"
    other = "x86_64" if here == "aarch64" else "aarch64"
    with pytest.raises(Phi4EdgeError, match="not linked statically"):
        check_program(python, here)
    with pytest.raises(Phi4EdgeError, match="for machine"):
        check_program(python, other)
    (tmp_path / "text").write_text("#!/bin/sh\n")
    with pytest.raises(Phi4EdgeError, match="not a 64-bit"):
        check_program(tmp_path / "text", here)
    with pytest.raises(Phi4EdgeError, match="was not built"):
        check_program(tmp_path / "nothing", here)
    assert shutil.which("sh")
