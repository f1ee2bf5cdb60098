"""How a device is reached and what measures on it: the options of the commands that go there."""

from __future__ import annotations

__all__ = ["NO_SHELL", "DeviceOptions", "check_place", "device_options", "site_for", "transport_for"]

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import Progress
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.profile import LOCAL, Profile
from phi4edge.transports._api import Address, load_transport

if TYPE_CHECKING:
    from phi4edge.measurement.on_device import Site

F = TypeVar("F", bound=Callable[..., Any])
ADDRESS = "PHI4EDGE_ADDRESS"
NO_SHELL = ("browser",)  # transports that run no programs: nothing can be looked for there


@dataclass(frozen=True)
class DeviceOptions:
    """What the user said of the device."""

    transport: str | None  # None: the target's first
    address: Address
    runners: tuple[str, ...]
    timeout_s: float | None
    clean: bool

    @property
    def given(self) -> bool:
        """Whether anything was said that measuring in this machine's own Python has no use for."""
        return self.address != Address() or bool(self.runners or self.clean) or self.timeout_s is not None


_OPTIONS = (
    click.option(
        "--transport", metavar="NAME",
        help="How the device is reached: local, ssh, adb, or browser, a link to open.  [default: the target's first]",
    ),
    click.option(
        "--address", metavar="PLACE",
        help=f"Where: a host of your ssh config or user@host; a serial of adb devices.  [default: ${ADDRESS}, or the "
        "only one]",
    ),
    click.option(
        "--transport-option", "transport_options", multiple=True, metavar="KEY=VALUE",
        help="For the transport's client, as ssh's -o takes them; may be repeated.",
    ),
    click.option(
        "--device-folder", metavar="PATH", help="Our folder on the device.  [default: the transport's choice]"
    ),
    click.option(
        "--runner", "runners", multiple=True, metavar="PATH",
        help="On the device: a folder with llama.cpp's programs, one of them, or a Python; nothing else there is used. "
        "May be repeated.  [default: what is found]",
    ),
    click.option(
        "--device-timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
        help="End a program on the device after so long.  [default: from the artifact's size and the tokens]",
    ),
    click.option(
        "--clean/--keep", default=False, show_default=True,
        help="Remove our folder on the device at the end; kept, a second run sends nothing again.",
    ),
)  # fmt: skip


def device_options(function: F) -> F:
    """``--transport``, ``--address`` and the others; the command receives ``device: DeviceOptions``."""

    @wraps(function)
    def called(
        *args: Any,
        transport: str | None,
        address: str | None,
        transport_options: tuple[str, ...],
        device_folder: str | None,
        runners: tuple[str, ...],
        device_timeout: float | None,
        clean: bool,
        **kwargs: Any,
    ) -> Any:
        where = Address(address, device_folder, transport_options)
        return function(*args, device=DeviceOptions(transport, where, runners, device_timeout, clean), **kwargs)

    for decorator in reversed(_OPTIONS):
        called = decorator(called)
    return cast(F, called)


def check_place(target: str, device: DeviceOptions, folders: tuple[Path, ...] = ()) -> tuple[Profile, str]:
    """The target's profile and the transport that reaches it.

    Where that is "local" and no option of a device was given, this machine is measured in its own Python.

    Raises:
        UsageError: an unknown target or transport, or a transport that does not reach the target.
    """
    profile = open_catalog(folders).profile(target)
    name = transport_for(profile, device)
    load_transport(name)
    if name not in profile.transports:
        reached = ", ".join(profile.transports)
        hint = (
            "name the device: --target ID; phi4edge targets list shows them"
            if profile.id == LOCAL
            else f"--transport {profile.transports[0]}; a device of your own needs a file in a --target-path"
        )
        raise UsageError(f"target {target!r} is reached over {reached}, not {name}", hint)
    return profile, name


def transport_for(profile: Profile, device: DeviceOptions) -> str:
    """The transport that was asked for, else its file's or the target's first; with an address not "local"."""
    said = profile.connection
    away = [name for name in profile.transports if name != LOCAL]
    placed = device.address.place is not None or said.address is not None
    return device.transport or said.transport or (away if placed and away else profile.transports)[0]


def _address(profile: Profile, given: Address) -> Address:
    """What the user said, then the environment, then the target's file."""
    said = profile.connection
    return Address(
        given.place or os.environ.get(ADDRESS) or said.address,
        given.folder or said.folder,
        (*given.options, *said.options),  # ssh takes the first value that it is told
    )


@contextmanager
def site_for(
    profile: Profile, transport: str, device: DeviceOptions, progress: Progress, artifact: Path | None = None
) -> Iterator[Site]:
    """Connect, and look at what is there; ``artifact`` shall be measured on it.

    Raises:
        InputError: there is no such artifact here, which is said before a device is bothered.
        MissingToolError: no device answers, a program is missing here, or --runner has nothing that measures.
        TargetError: the device is gone, or is of another kind than the target.
    """
    from phi4edge.measurement.on_device import open_site

    if transport in NO_SHELL:
        raise UsageError(f"nothing can be sent to or run on a device over {transport}", "use its own options")
    if artifact is not None and not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    address = device.address
    if transport != LOCAL:
        address = _address(profile, address)
    with (
        load_transport(transport).open(address) as connected,
        open_site(
            connected,
            profile,
            runners=device.runners,
            timeout_s=device.timeout_s,
            clean=device.clean,
            progress=progress,
        ) as site,
    ):
        yield site
