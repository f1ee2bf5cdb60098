"""A device that something is measured on: what of ours lies on it, and who computes there.

Everything goes through :mod:`phi4edge.transports._api`; which transport it is makes no difference here.
"""

from __future__ import annotations

__all__ = ["Site", "device_host", "open_site", "time_limit"]

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from phi4edge.core.errors import Phi4EdgeError, TargetError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_bytes
from phi4edge.measurement.artifact import describe
from phi4edge.measurement.fingerprint import fingerprint
from phi4edge.measurement.host import Host
from phi4edge.runtimes._api import Session, Settings
from phi4edge.runtimes._remote import RUNNER_FOLDER, Found, Program, how_to_get, look, missing
from phi4edge.runtimes._remote_python import PlacedRuntime, archive, placed_runtime, start_worker
from phi4edge.runtimes._runner_cache import built
from phi4edge.runtimes._worker import Place
from phi4edge.targets.profile import Profile
from phi4edge.transports._api import Device
from phi4edge.transports._folder import clean as clean_folder
from phi4edge.transports._folder import send

_ASK_S = 60.0
_ALL_LAYERS = 999
# A program that is slower than this has hung: a slow phone reads 10 · 10⁹ bytes of weights a second to decode.
_START_S, _LOAD_BYTES_S, _PROMPT_BYTES_S, _DECODE_BYTES_S = 120.0, 20e6, 4e9, 1e9


@dataclass(frozen=True)
class Site:
    """A device, looked at: what is on it, and what the user said of it. :func:`open_site` makes one."""

    device: Device
    profile: Profile
    environment: Mapping[str, Any]
    found: Found
    timeout_s: float | None = None  # for one program; None: from what it has to do
    progress: Progress = SILENT
    described: dict[Path, dict[str, Any]] = field(default_factory=dict)  # a hash of gigabytes is made once

    @property
    def arch(self) -> str:
        """Its processor, as runners are named."""
        machine = str(self.environment["cpu"]["architecture"])
        return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)

    @property
    def system(self) -> str:
        """What uname says, or Android."""
        words = str(self.environment["distribution"] or "").split()
        return "Android" if words[:1] == ["Android"] else str(self.environment["system"]).split()[0]

    @property
    def threads(self) -> int:
        """Threads of a worker of ours where nobody says."""
        return int(self.environment["cpu"]["physical_cores"] or 1)

    @property
    def gpu_layers(self) -> int:
        """All of them where the target's best llama.cpp computes on an accelerator; a build without one ignores it."""
        backend = next((option.backend for option in self.profile.runtimes if option.name == "llama_cpp"), "cpu")
        return 0 if backend == "cpu" else _ALL_LAYERS

    def settings(self, settings: Settings, runtime: str) -> Settings:
        """``settings`` for the device: what it has an accelerator for is computed there."""
        return replace(settings, gpu_layers=self.gpu_layers) if runtime == "llama_cpp" else settings

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the device from sleeping while it is measured; one that refuses is measured all the same, and told."""
        with ExitStack() as held:
            try:
                held.enter_context(self.device.awake())
            except TargetError as error:
                self.progress.note(f"{error.message}; {error.hint}" if error.hint else error.message)
            yield

    def hint(self, runtime: str) -> str:
        """How what measures comes onto the device."""
        return how_to_get(self.system, self.arch, self.profile.kind, runtime)

    def program(self, name: str) -> Program | None:
        """llama.cpp's program of that name: the device's own, or the static one that was built here, sent there now."""
        if name in self.found.programs:
            return self.found.programs[name]
        folder = built(self.arch) if self.system in ("Linux", "Android") else None
        if folder is None or not (folder / name).is_file():
            return None
        where = PurePosixPath(RUNNER_FOLDER, folder.name, name)
        self.send({where: folder / name})
        path = str(self.device.folder / where)
        done = self.device.run(["chmod", "755", path], timeout_s=_ASK_S)
        if done.code:
            raise TargetError(f"{self.device.name}: {path} cannot be made executable: {done.last_words}")
        return Program(path)

    def send(self, files: Mapping[PurePosixPath, Path]) -> None:
        """Have ``files`` in our folder on the device, by their place in it; what is there already is not sent.

        Raises:
            TargetError: the device is full, refuses, or is gone.
        """
        send(self.device, {str(remote): local for remote, local in files.items()}, self.progress)

    def describe(self, artifact: Path) -> dict[str, Any]:
        """See :func:`phi4edge.measurement.artifact.describe`."""
        if artifact not in self.described:
            self.described[artifact] = describe(artifact)
        return self.described[artifact]

    def send_artifact(self, artifact: Path) -> str:
        """Have ``artifact`` on the device; where it lies there."""
        home = PurePosixPath("artifacts", str(self.describe(artifact)["sha256"])[:16])
        if artifact.is_dir():
            home /= artifact.resolve().name
            files = sorted(path for path in artifact.rglob("*") if path.is_file())
            self.send({home / path.relative_to(artifact).as_posix(): path for path in files})
            return str(self.device.folder / home)
        from phi4edge.writers._gguf_file import read_gguf

        self.send({home / path.name: path for path in read_gguf(artifact).files})
        return str(self.device.folder / home / artifact.name)

    def python(self, module: PlacedRuntime, artifact: Path, timeout_s: float) -> Place:
        """Where a worker of runtime ``module`` finds ``artifact``; both are sent first.

        Raises:
            MissingToolError: no Python there has the runtime.
        """
        interpreter = self.found.python
        if interpreter is None or not self.found.has_python(module.NAME):
            raise missing(self.device, self.found, module.NAME, "", self.hint(module.NAME))
        path = self.send_artifact(artifact)
        data = archive(module.WORKER)
        where = PurePosixPath("worker", f"{sha256_bytes(data)[:16]}.zip")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, where.name)
            file.write_bytes(data)
            self.send({where: file})
        return Place(
            start=lambda name: start_worker(self.device, interpreter, name, self.device.folder / where, timeout_s),
            path=path,
            threads=self.threads,
            version=self.found.packages[module.NAME],
            install=self.hint(module.NAME),
        )


@contextmanager
def open_site(
    device: Device,
    profile: Profile,
    *,
    runners: Sequence[str] = (),
    timeout_s: float | None = None,
    clean: bool = False,
    progress: Progress = SILENT,
) -> Iterator[Site]:
    """Look at ``device``, which is connected; with ``clean`` our folder there is removed at the end.

    Raises:
        MissingToolError: a place of ``runners`` has nothing that measures.
        TargetError: the device is gone, or it is none of the profile's kind.
    """
    progress.note(f"looking at {device.name}")
    site = Site(device, profile, fingerprint(device), look(device, runners), timeout_s, progress)
    if profile.transports != ("local",) and site.arch != profile.arch:
        raise TargetError(
            f"{device.name} is {site.arch}, and target {profile.id} is {profile.arch}",
            "is it another device? phi4edge targets list shows them",
        )
    try:
        yield site
    except BaseException:
        if clean:
            with suppress(Phi4EdgeError):  # the first error is the one to tell; the device may be gone
                clean_folder(device)
        raise
    if clean:
        clean_folder(device)


def device_host(site: Site, artifact: Path, runtime: str, settings: Settings) -> Host:
    """``artifact`` in our worker on the device."""

    def opened(context: int, tokens: int) -> Session:
        """Raises MissingToolError where no Python there has the runtime; else as the runtime's own ``open``."""
        limit = site.timeout_s or time_limit(site.describe(artifact)["bytes"], tokens, 0)
        module = placed_runtime(runtime)
        place = site.python(module, artifact, limit)
        return module.open(artifact, context, site.settings(settings, runtime), place=place)

    place = {"target": site.profile.id, "transport": site.device.transport}
    version = site.found.packages.get(runtime, "")
    return Host(
        artifact, runtime, version, opened, partial(site.describe, artifact), lambda: dict(site.environment), place
    )


def time_limit(nbytes: int, prompt_tokens: int, gen_tokens: int) -> float:
    """Seconds after which a program has hung that loads ``nbytes`` of weights and computes so many tokens."""
    return (
        _START_S
        + nbytes / _LOAD_BYTES_S
        + prompt_tokens * nbytes / _PROMPT_BYTES_S
        + gen_tokens * nbytes / _DECODE_BYTES_S
    )
