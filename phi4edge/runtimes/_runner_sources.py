"""llama.cpp's sources: out of the sdist of llama-cpp-python, which pip fetches by name, or from where the user says.

The sdist has llama.cpp whole, tools and all, at the commit that the installed package was compiled from: a runner of
the same version computes with the same code as this machine does.
"""

from __future__ import annotations

__all__ = ["CHANGE", "ORIGIN", "PACKAGE", "commit_of", "flush_at_the_end", "identify", "installed_version", "unpack"]

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from phi4edge.core.archives import extract_all
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.core.hashing import sha256_file

PACKAGE = "llama-cpp-python"
ORIGIN = "origin.json"
_INSIDE = PurePosixPath("vendor/llama.cpp")
_COMPILED = ("CMakeLists.txt", "cmake", "common", "ggml", "include", "src", "tools", "vendor")
_KEPT = (*_COMPILED, "LICENSE", "licenses")
_NEEDED = (
    "LICENSE",
    "CMakeLists.txt",
    "common/CMakeLists.txt",
    "ggml/CMakeLists.txt",
    "src/CMakeLists.txt",
    "tools/llama-bench/CMakeLists.txt",
    "tools/completion/CMakeLists.txt",
    "tools/perplexity/CMakeLists.txt",
)
# llama.cpp's log is written by a thread of its own that nobody waits for at the end (common/log.h says so): on a busy
# machine what a program said last was lost, and of llama-completion all of it.
CHANGE = "main() flushes the log before it returns"
_CHANGED = ("tools/completion/main.cpp", "tools/perplexity/main.cpp")
_MAIN = re.compile(
    r"\s*int (llama_\w+)\(int argc, char \*\* argv\);\s*int main\(.*?\) \{\s*return \1\(argc, argv\);\s*\}\s*"
)
_FLUSHED = """#include "log.h"

int {name}(int argc, char ** argv);

int main(int argc, char ** argv) {{
    const int code = {name}(argc, argv);
    common_log_flush(common_log_main());
    return code;
}}
"""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OFFLINE = f"or give --sources: {PACKAGE}'s sdist (.tar.gz), or a folder of llama.cpp"


def installed_version() -> str:
    """The version of llama-cpp-python: of the installed package, else the one that phi4edge pins.

    Raises:
        MissingToolError: neither is known.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        pins = importlib.metadata.requires("phi4edge") or []
    except importlib.metadata.PackageNotFoundError:
        pins = []
    for pin in pins:
        if match := re.match(rf"{PACKAGE}==([^;\s]+)", pin):
            return match[1]
    raise MissingToolError(
        f"{PACKAGE} is not installed, so its version is not known", f'pip install "phi4edge[llama]", {_OFFLINE}'
    )


def identify(given: Path | None) -> tuple[tuple[str, str], ...]:
    """What tells the sources apart in a runner's key; nothing is fetched for it.

    Raises:
        InputError: ``given`` is not there, or has no llama.cpp in it.
        MissingToolError: without ``given``, no version is known.
    """
    if given is None:
        return (("package", PACKAGE), ("version", installed_version()))
    if given.is_file():
        return (("archive", sha256_file(given)),)
    if not given.is_dir():
        raise InputError(f"--sources {given}: no such file or folder", _OFFLINE)
    root = _root_in(given)
    digest = hashlib.sha256()
    for name in _COMPILED:
        place = root / name
        for file in sorted(p for p in (place, *place.rglob("*")) if p.is_file()):
            digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return (("folder", digest.hexdigest()),)


def unpack(given: Path | None, folder: Path) -> None:
    """Put llama.cpp's sources into ``folder``, which is not there yet and appears only when it is whole.

    ``ORIGIN`` in it says where they came from, ``{"origin", "archive_sha256", "llama_cpp_commit"}``, null if unknown,
    and ``"changed"``: the files to which ``CHANGE`` was done, where they are as we know them.

    Raises:
        InputError: ``given`` is damaged or lacks a part of llama.cpp.
        MissingToolError: pip did not get the sdist.
    """
    scratch = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "kept").mkdir(parents=True)
    try:
        digest = None
        if given is not None and given.is_dir():
            root, origin = _root_in(given), str(given.resolve())
        else:
            archive = given or _download(scratch)
            origin = str(given.resolve()) if given else f"sdist of {PACKAGE} {installed_version()}"
            digest = sha256_file(archive)
            root = _extract(archive, scratch / "all")
        for name in _KEPT:
            if (root / name).is_dir():
                shutil.copytree(root / name, scratch / "kept" / name)
            elif (root / name).is_file():
                shutil.copy2(root / name, scratch / "kept" / name)
        changed = [name for name in _CHANGED if flush_at_the_end(scratch / "kept" / name)]
        found = {"origin": origin, "archive_sha256": digest, "llama_cpp_commit": commit_of(root), "changed": changed}
        write_json(scratch / "kept" / ORIGIN, found)
        (scratch / "kept").replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def flush_at_the_end(main: Path) -> bool:
    """Do ``CHANGE`` to a program's ``main``; whether it was of the form that is known."""
    known = _MAIN.fullmatch(main.read_text(encoding="utf-8")) if main.is_file() else None
    if known is None:
        return False
    main.write_text(_FLUSHED.format(name=known[1]), encoding="utf-8")
    return True


def commit_of(root: Path) -> str | None:
    """The commit that ``root``'s own git folder names, read without git: no repository around it is asked."""
    entry = root / ".git"
    try:
        if entry.is_file():
            entry = (root / entry.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (entry / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref:"):
            head = (entry / head.removeprefix("ref:").strip()).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return head if _COMMIT.fullmatch(head) else None


def _root_in(folder: Path) -> Path:
    """llama.cpp in ``folder``: that itself, or an unpacked sdist's."""
    roots = [folder, folder / _INSIDE]
    root = next((each for each in roots if (each / "ggml").is_dir()), folder)
    for name in _NEEDED:
        if not (root / name).is_file():
            raise InputError(
                f"{root}: {name} is missing, so these are not llama.cpp's whole sources",
                f"fetch them again, {_OFFLINE}",
            )
    return root


def _download(folder: Path) -> Path:
    """The sdist of the wanted version, by pip as the user has set it up."""
    wanted = f"{PACKAGE}=={installed_version()}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise MissingToolError(
            f"pip did not get the sources of {wanted}: {said[-1] if said else done.returncode}",
            f"look at the network, {_OFFLINE}",
        )
    return found[0]


def _extract(archive: Path, folder: Path) -> Path:
    """Everything of ``archive`` in ``folder``, which is new; where llama.cpp is in it."""
    try:
        with tarfile.open(archive) as file:
            extract_all(file, folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{archive}: not a whole archive ({error})", f"fetch it again, {_OFFLINE}") from error
    inside = [each for each in folder.iterdir() if each.is_dir()]
    return _root_in(inside[0] if len(inside) == 1 else folder)
