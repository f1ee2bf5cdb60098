"""What can measure on a device, found by looking: llama.cpp's programs, a Python with a runtime, or what is sent there.

    llama-bench         speed            on the PATH, in our folder, in --runner, where people build it
    llama-perplexity    drift            the same
    Python              both, with all figures: llama-cpp-python for GGUF, onnxruntime-genai for its folders

One script in the POSIX shell that a device has looks for all of them; nothing is run that loads a model.
"""

from __future__ import annotations

__all__ = ["BENCH", "PERPLEXITY", "RUNNER_FOLDER", "Found", "Program", "how_to_get", "look", "missing"]

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phi4edge.core.errors import MissingToolError, TargetError
from phi4edge.transports._api import Device

BENCH, PERPLEXITY = "llama-bench", "llama-perplexity"
RUNNER_FOLDER = "runner"  # in our folder on the device: programs that we sent
_LOOK_S = 60.0
_PYTHON_S = 120.0

# Non-interactive shells know little of what a login adds to the PATH: Homebrew, and what was built from source.
_PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "~/.local/bin", "~/llama.cpp/build/bin", "~/llama.cpp")
_LOOK = """
everywhere=$1; shift
for name in llama-bench llama-perplexity python3 python; do
  found=
  for folder in "$@"; do
    case $folder in '~/'*) folder=$HOME/${folder#??} ;; esac
    if [ -f "$folder/$name" ] && [ -x "$folder/$name" ]; then found=$folder/$name; break; fi
  done
  [ -n "$found" ] || [ "$everywhere" = no ] || found=$(command -v "$name" 2>/dev/null)
  [ -z "$found" ] || echo "$name=$found"
done
"""
_KIND = """
for place in "$@"; do
  case $place in '~/'*) place=$HOME/${place#??} ;; esac
  if [ -d "$place" ]; then echo "folder $place"
  elif [ -x "$place" ]; then echo "program $place"
  else echo "nothing $place"; fi
done
"""
_PYTHON = """
import importlib.util, json, sys
from importlib import metadata
found = {"version": ".".join(map(str, sys.version_info[:3])), "packages": {}}
for name, package in %r.items():
    if importlib.util.find_spec(name):
        try:
            found["packages"][name] = metadata.version(package)
        except metadata.PackageNotFoundError:  # it lies there without its records
            found["packages"][name] = "unknown"
print("phi4edge:" + json.dumps(found))
"""
# What the worker imports → its distribution.
_PACKAGES = {"numpy": "numpy", "llama_cpp": "llama-cpp-python", "onnxruntime_genai": "onnxruntime-genai"}
_PYTHON_NEEDED = (3, 10)


@dataclass(frozen=True)
class Program:
    """A program of llama.cpp on the device."""

    path: str
    environment: Mapping[str, str] = field(default_factory=dict)  # its libraries may lie beside it


@dataclass(frozen=True)
class Found:
    """What is there."""

    programs: Mapping[str, Program]
    python: str | None = None  # a Python that the worker can run in
    python_version: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)  # of that Python: import name → version

    def has_python(self, runtime: str) -> bool:
        """Whether our worker of ``runtime`` can run there."""
        return self.python is not None and {"numpy", runtime} <= set(self.packages)


def look(device: Device, runners: Sequence[str] = ()) -> Found:
    """What of :data:`BENCH`, :data:`PERPLEXITY` and Python is on ``device``; ``runners`` are the user's own places.

    A place is a folder, or one program in it: a Python, or a program of llama.cpp. Where places are named, nothing else
    on the device is used.

    Raises:
        MissingToolError: a place of the user's has none of them.
        TargetError: the device is gone.
    """
    own_folders, named = _named(device, runners)
    where = ["no", *own_folders] if runners else ["yes", str(device.folder / RUNNER_FOLDER), *_PLACES]
    lines = _lines(device, ["sh", "-c", _LOOK, "sh", *where], _LOOK_S)
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    if own_folders and not found:
        raise MissingToolError(
            f"{device.name}: --runner {' '.join(own_folders)} has neither {BENCH}, {PERPLEXITY} nor python3",
            "name the folder on the device that holds them, or the program itself",
        )
    found |= named
    programs = {name: _program(found[name]) for name in (BENCH, PERPLEXITY) if name in found}
    interpreter = found.get("python3") or found.get("python")
    if interpreter is None:
        return Found(programs)
    version, packages = _ask_python(device, interpreter)
    usable = version is not None and tuple(int(part) for part in version.split(".")[:2]) >= _PYTHON_NEEDED
    return Found(programs, interpreter if usable else None, version, packages)


def _named(device: Device, runners: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Of the user's places, the folders, and the programs by what they are."""
    if not runners:
        return [], {}
    folders, programs = [], {}
    kinds = _lines(device, ["sh", "-c", _KIND, "sh", *runners], _LOOK_S)
    for line in kinds:
        kind, _, place = line.partition(" ")
        base = posixpath.basename(place)
        if kind == "folder":
            folders.append(place.rstrip("/") or "/")
        elif kind == "program" and (base in (BENCH, PERPLEXITY) or base.startswith("python")):
            programs[base if base in (BENCH, PERPLEXITY) else "python3"] = place
        else:
            reason = "there is no such program" if kind == "nothing" else "it is no program that phi4edge knows"
            raise MissingToolError(
                f"{device.name}: --runner {place}: {reason}",
                f"name a folder on the device, a {BENCH}, a {PERPLEXITY} or a python3 there",
            )
    return folders, programs


def _program(path: str) -> Program:
    """A program that is not where a system keeps its own may have its libraries beside it."""
    folder = posixpath.dirname(path)
    system = folder.endswith("/bin") and not folder.endswith("build/bin")
    return Program(path) if system else Program(path, {"LD_LIBRARY_PATH": folder})


def _ask_python(device: Device, interpreter: str) -> tuple[str | None, dict[str, str]]:
    """Version of an interpreter and of the packages that matter; None where it does not run."""
    try:
        done = device.run([interpreter, "-c", _PYTHON % _PACKAGES], timeout_s=_PYTHON_S)
    except TargetError:
        return None, {}  # a launcher that only opens a shop, say; a device that is gone fails at the next step
    for line in done.text.splitlines():
        if line.startswith("phi4edge:"):
            answer = json.loads(line.removeprefix("phi4edge:"))
            return str(answer["version"]), dict(answer["packages"])
    return None, {}


def _lines(device: Device, argv: Sequence[str], timeout_s: float) -> list[str]:
    done = device.run(argv, timeout_s=timeout_s)
    if done.code:
        raise TargetError(
            f"{device.name}: its shell failed with exit code {done.code}: {done.last_words}",
            "phi4edge needs a POSIX shell there",
        )
    return done.text.splitlines()


def how_to_get(system: str, arch: str, kind: str, runtime: str) -> str:
    """How what measures comes onto a device: ``system`` as uname -s says (Android where it is), ``kind`` its profile's.

    ``runtime`` is the one that serves the artifact.
    """
    if runtime == "onnxruntime_genai":
        return "install on the device: pip install onnxruntime-genai numpy, in a Python that --runner then names"
    built = f"phi4edge runner build --arch {arch} makes static programs, which are then sent there"
    if system == "Android":
        return f"{built}; or, in Termux: pkg install llama-cpp, and reach it over its sshd"
    if system == "Darwin":
        return "install on the device: brew install llama.cpp, or pip install llama-cpp-python"
    if kind == "jetson":
        with_cuda = 'CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python'
        return f"install on the device: {with_cuda}, which computes on its GPU; or {built} (CPU only)"
    packaged = "apt install llama.cpp where it is packaged"
    return f"install on the device: pip install llama-cpp-python, or {packaged}; or {built}"


def missing(device: Device, found: Found, runtime: str, wanted: str, hint: str) -> MissingToolError:
    """What to raise where nothing on ``device`` can do the work; ``wanted`` is the program that could."""
    if found.python_version is None:
        python = "no Python"
    else:
        absent = [_PACKAGES[name] for name in ("numpy", runtime) if name in _PACKAGES and name not in found.packages]
        python = f"Python {found.python_version}" + (f" without {' and '.join(absent)}" if absent else "")
        if not absent and found.python is None:
            python += f", which is older than {'.'.join(map(str, _PYTHON_NEEDED))}"
    tool = f"neither {wanted} nor" if wanted else "no"
    return MissingToolError(
        f"{device.name}: has {tool} a Python with {_PACKAGES.get(runtime, runtime)} ({python} there)", hint
    )
