"""Where a target's device is found: what its file says under ``[connection]``; what the user says is stronger."""

from __future__ import annotations

__all__ = ["connection_of", "machine_of"]

from phi4edge.core.errors import UsageError
from phi4edge.targets.profile import LOCAL, Profile
from phi4edge.transports._api import Address

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "[::1]")


def connection_of(profile: Profile, place: str | None = None) -> tuple[str, Address] | None:
    """The transport and the address of the target's device; None where nobody said which device it is.

    ``place`` is the user's --address. A target without a word about its device is not looked for: the one phone that
    happens to be plugged in need not be it.

    Raises:
        UsageError: a transport that does not reach the target, or an address for one that is this machine.
    """
    said = profile.connection
    address = place or said.address
    if profile.id == LOCAL and address is not None:
        raise UsageError(f"--address {LOCAL}={address}: {LOCAL} is this machine", "name the target that lies there")
    if profile.id == LOCAL:
        return LOCAL, Address()
    transport = said.transport
    if transport is None:
        if address is None:
            return None
        transport = next((name for name in profile.transports if name != LOCAL), LOCAL)
    if transport not in profile.transports:
        reached = ", ".join(profile.transports)
        raise UsageError(f"target {profile.id!r} is reached over {reached}, not {transport}", "see its [connection]")
    return transport, Address(address, said.folder, said.options)


def machine_of(transport: str, address: Address) -> str:
    """What two connections have in common that end at one machine, as far as their words tell."""
    place = (address.place or "").rsplit("@", 1)[-1].lower()
    return LOCAL if transport == LOCAL or place in _THIS_MACHINE else f"{transport} {place}"
