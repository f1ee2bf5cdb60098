"""llama.cpp for WebAssembly: wllama's npm package, one version, known by its hashes, kept in the user's cache.

Version 2.4.0 is the last of its line, and chosen over 3.x on purpose: it decodes tokens that it is given and gives the
probabilities of the whole vocabulary (3.x wraps llama-server and has neither), and it runs in Safari as it is (3.x
loads another build from a content network there). Its addresses are 32 bits wide.

The package is not ours to ship: it is fetched once by npm, its archive is held against the hash that npm's registry
publishes, and its licence is kept beside it.
"""

from __future__ import annotations

__all__ = ["LICENCE", "NAME", "PACKAGE", "VERSION", "fetch", "installed"]

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from phi4edge.core.atomic import atomic_directory
from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.core.hashing import sha256_file

NAME = "wllama"
PACKAGE = "@wllama/wllama"
VERSION = "2.4.0"
LICENCE = "LICENCE"
_INTEGRITY = "sha512-KuVHeTUXcqHF01d85q3nWaRSVLpszULNGjO+nx4cyZ8sBjZvKSMViWNCfcs/1w2bqjyegERJzWsrdQSHSEoSlQ=="
_NPM_S = 300.0
_HOW = "phi4edge runner fetch-web"

# Name in our folder → place in the package, SHA-256.
_FILES: Mapping[str, tuple[str, str]] = {
    "wllama.js": ("esm/index.js", "08e0fad5c9efdf4414ca2e27d0d8d5bdfa54d91a8054b40d9d9c90c9ce870b9d"),
    "single-thread.wasm": (
        "esm/single-thread/wllama.wasm",
        "aced0c759f668e17d618114b8688bf55b32289dbdbd08b6e3254b0bc75838ad5",
    ),
    "multi-thread.wasm": (
        "esm/multi-thread/wllama.wasm",
        "f69f292f06d9c5c63ac447aac768c3d508fe7a56f0a7926bd12cc33370bc627d",
    ),
    LICENCE: ("LICENCE", "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720"),
}


def _folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "phi4edge" / "web" / f"{NAME}-{VERSION}"


def installed() -> dict[str, Path]:
    """The package's files by our names for them, each held against its hash.

    Raises:
        MissingToolError: they were not fetched, or one is not what was fetched.
    """
    found = {name: _folder() / name for name in _FILES}
    for name, path in found.items():
        if not path.is_file():
            raise MissingToolError(f"{PACKAGE} {VERSION}, which runs a GGUF in a browser, is not here", f"{_HOW}")
        if sha256_file(path) != _FILES[name][1]:
            raise MissingToolError(f"{path}: is not the file of {PACKAGE} {VERSION}", f"{_HOW} fetches it again")
    return found


def fetch(archive: Path | None = None) -> Path:
    """Put the package's files into the cache and return their folder; ``archive`` None: npm downloads it.

    Raises:
        MissingToolError: npm is missing, or did not get it.
        InputError: ``archive`` is not the package's, byte for byte.
    """
    with tempfile.TemporaryDirectory(prefix="phi4edge-web-") as scratch:
        source = archive or _download(Path(scratch))
        _check(source)
        with atomic_directory(_folder(), replace=True) as folder, tarfile.open(source) as tar:
            for name, (place, digest) in _FILES.items():
                packed = tar.extractfile(f"package/{place}")
                assert packed is not None, place
                with packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
                assert sha256_file(folder / name) == digest, place
    return _folder()


def _download(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingToolError(
            f"npm, which downloads {PACKAGE} {VERSION}, is not installed",
            f"install Node.js; or run `npm pack {PACKAGE}@{VERSION}` elsewhere, bring the file, and {_HOW} --from FILE",
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_S, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise MissingToolError(f"npm has not downloaded {PACKAGE} within {_NPM_S:.0f} s", "try again") from error
    found = sorted(folder.glob("*.tgz"))
    if done.returncode or not found:
        words = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
        raise MissingToolError(f"npm did not download {PACKAGE} {VERSION}: {words}", "is the registry reached?")
    return found[0]


def _check(archive: Path) -> None:
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise InputError(f"{archive}: cannot be read ({error.strerror})") from error
    found = f"sha512-{base64.b64encode(digest).decode()}"
    if found != _INTEGRITY:
        raise InputError(
            f"{archive}: its hash is {found}, that of {PACKAGE} {VERSION} is {_INTEGRITY}",
            f"fetch it with `npm pack {PACKAGE}@{VERSION}`",
        )
