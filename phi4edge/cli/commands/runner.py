"""``phi4edge runner build | list | fetch-web``: llama.cpp's programs for a device, and what a browser runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from phi4edge.cli.fetch_web import fetch_web
from phi4edge.cli.options import common, dry_run_option, force_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, table
from phi4edge.core.atomic import atomic_directory
from phi4edge.core.errors import InputError
from phi4edge.runtimes._runner_build import Plan, plan
from phi4edge.runtimes._runner_build import build as build_runner
from phi4edge.runtimes._runner_cache import MANIFEST, Runner, interrupted, runners
from phi4edge.runtimes._runner_recipe import ARCHITECTURES, DEFAULT_MARCH, PROGRAMS

_UNMEASURED = "That these programs run on a real phone or Jetson is likely, and not measured on hardware."


@click.group("runner")
def command() -> None:
    """llama.cpp's own programs for a device: built here, carried there, run without installing anything.

    A runner is a folder with llama-bench, llama-completion and llama-perplexity, linked statically, for Linux and
    Android of one processor; macOS and iOS run none of it. That it runs on a real phone or Jetson is likely, and not
    measured on hardware: what was run is the aarch64 programs under qemu, whose speed is never a device's.
    """


@command.command("build")
@click.option("--arch", required=True, type=click.Choice(ARCHITECTURES), help="The device's processor.")
@click.option(
    "--march",
    metavar="NAME",
    help="Instruction set: of aarch64 as GCC's -march has it, of x86_64 the level x86-64-v2, -v3 or -v4.  "
    f"[default: {', '.join(f'{march} ({arch})' for arch, march in DEFAULT_MARCH.items())}]",
)
@click.option(
    "--compiler",
    type=click.Choice(["auto", "gcc", "zig"]),
    default="auto",
    show_default=True,
    help="gcc: a cross compiler of the distribution; zig: PyPI's ziglang, slower to compile; auto: gcc before zig.",
)
@click.option(
    "--sources",
    type=click.Path(path_type=Path),
    help="An sdist of llama-cpp-python, an archive or a folder of llama.cpp.  "
    "[default: pip fetches the sdist of the installed version]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also put a copy into this folder.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at a time.  [default: one a processor]")
@force_option
@dry_run_option
@common
def build(
    arch: str,
    march: str | None,
    compiler: str,
    sources: Path | None,
    out: Path | None,
    jobs: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compile llama.cpp's programs for a device, statically, once for each version, compiler and instruction set.

    The sources are those that the installed llama-cpp-python was made from. It takes about eight minutes of one
    processor; the result is kept in $XDG_CACHE_HOME/phi4edge/runners/ARCH/KEY with a manifest and the licences. A
    build that was killed goes on where it was. --march armv8.2-a+dotprod+fp16+i8mm is faster on phones since 2022 and
    dies on older ones and on Jetson Orin; the default runs on all of them.

    That the programs run on a real phone or Jetson is likely, and not measured on hardware.
    """
    made = plan(arch, march=march, compiler=compiler, sources=sources)
    if out is not None and out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists", "choose another --out, or pass --force to replace it")
    if dry_run:
        emit("runner", {"plan": _plan_document(made)}, _plan_text(made), as_json=as_json)
        return
    runner, fresh = build_runner(made, jobs=jobs, progress=progress_for(quiet))
    folder = runner.folder
    if out is not None:
        with atomic_directory(out, replace=force) as scratch:
            for path in sorted(runner.folder.iterdir()):
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, scratch / path.name)
        folder = out
    data = {"runner": _document(runner), "folder": str(folder), "built": fresh}
    head = "built" if fresh else "was built before"
    text = f"{head}: {folder}\n{_programs(runner)}\n\n{_UNMEASURED}"
    emit("runner", data, text, as_json=as_json)


@command.command("list")
@common
def list_runners(as_json: bool, verbose: int, quiet: bool) -> None:
    """Show the runners in the cache: processor, instruction set, compiler, llama.cpp, and whether they are whole."""
    found, wrong = runners()
    states = [runner.faults() for runner in found]
    headers = ("processor", "instruction set", "compiler", "sources", "commit", "MB", "state", "folder")
    rows = [
        (
            runner.arch,
            runner.march,
            runner.manifest["compiler"]["kind"],
            _source(runner.manifest["source"]),
            (runner.manifest["llama_cpp_commit"] or "unknown")[:9],
            f"{runner.nbytes / 1e6:.1f}",
            "; ".join(faults) or "whole",
            str(runner.folder),
        )
        for runner, faults in zip(found, states, strict=True)
    ]
    unfinished = interrupted()
    lines = [
        table(headers, rows, numeric=(5,)) if rows else "no runner was built; phi4edge runner build --arch aarch64"
    ]
    lines += [f"damaged: {text}" for text in wrong]
    lines += [f"not finished: {path}; the same build goes on there" for path in unfinished]
    lines += ["", _UNMEASURED] if rows else []
    data = {
        "runners": [_document(r) | {"faults": faults} for r, faults in zip(found, states, strict=True)],
        "damaged": wrong,
        "unfinished": [str(path) for path in unfinished],
    }
    emit("runner", data, "\n".join(lines), as_json=as_json)


def _document(runner: Runner) -> dict[str, Any]:
    return {"folder": str(runner.folder), **runner.manifest}


def _source(source: dict[str, str]) -> str:
    if "version" in source:
        return f"{source['package']} {source['version']}"
    return " ".join(f"{kind} {digest[:9]}" for kind, digest in source.items())


def _programs(runner: Runner) -> str:
    files = runner.manifest["files"]
    return "\n".join(
        f"  {name}  {files[name]['bytes'] / 1e6:.1f} MB  sha256 {files[name]['sha256']}" for name in PROGRAMS
    )


def _plan_document(made: Plan) -> dict[str, Any]:
    return {
        **made.recipe.as_dict(),
        "key": made.recipe.key,
        "folder": str(made.folder),
        "manifest": str(made.folder / MANIFEST),
        "cached": made.finished() is not None,
        "resumes": made.partial.is_dir(),
        "sources": str(made.sources) if made.sources else None,
        "cmake_program": made.tools.cmake,
        "ninja_program": made.tools.ninja,
        "compiler_program": made.tools.compiler.cxx,
    }


def _plan_text(made: Plan) -> str:
    recipe = made.recipe
    state = "is there already" if made.finished() else "goes on" if made.partial.is_dir() else "would be built"
    rows = [
        ("runner", f"{recipe.arch}, {recipe.march}: {', '.join(PROGRAMS)}"),
        ("compiler", f"{recipe.compiler_version} ({made.tools.compiler.cxx})"),
        ("sources", str(made.sources) if made.sources else f"{_source(dict(recipe.source))}, fetched by pip"),
        ("flags", " ".join(made.flags)),
        ("folder", f"{made.folder} ({state})"),
    ]
    return "\n".join(f"{key:<9} {value}" for key, value in rows)


command.add_command(fetch_web)
