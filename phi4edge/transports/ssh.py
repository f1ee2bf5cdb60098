"""A device that is reached by ssh, with the user's own OpenSSH client and configuration.

One connection carries everything, where the server allows several sessions on one (ssh itself opens further connections
where it does not). Passwords are never asked for, and host keys are the user's to accept. Words for ssh's own command
line are ``Address.options``: ``-F FILE``, ``-i FILE``, ``-p PORT``, ``-o KEY=VALUE``, ``-J HOST``.
"""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS", "SshDevice", "open"]

from pathlib import Path, PurePosixPath
from types import TracebackType

from phi4edge.core.events import SILENT, Progress
from phi4edge.transports import _files
from phi4edge.transports._api import Address
from phi4edge.transports._posix import PosixDevice
from phi4edge.transports._ssh_client import Client, SshKeeper
from phi4edge.transports._ssh_files import SshCarrier

DESCRIPTION = "a machine reached by ssh"
TOOLS: tuple[str, ...] = ("ssh",)  # programs that the transport needs on this side


class SshDevice(PosixDevice):
    """See :class:`phi4edge.transports._api.Device`."""

    transport = "ssh"

    def __init__(self, client: Client, keeper: SshKeeper) -> None:
        super().__init__(client.place, client.start, keeper)
        self._client, self._has_rsync = client, keeper.rsync

    def push(self, local: Path, remote: PurePosixPath, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`; goes on from where an interrupted one stopped."""
        _files.push(self, self._carrier, local, self.folder / remote, progress)

    def pull(self, remote: PurePosixPath, local: Path, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`; goes on from where an interrupted one stopped."""
        _files.pull(self, self._carrier, self.folder / remote, local, progress)

    @property
    def _carrier(self) -> SshCarrier:
        return SshCarrier(self, self._client.rsync_shell if self._has_rsync else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs there, and the connection."""
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._client.close()


def open(address: Address) -> SshDevice:
    """Connect to ``address.place``; its folder is ``address.folder`` or ``phi4edge`` in the user's cache there.

    Raises:
        MissingToolError: no ssh here, or the device does not answer, or lets nobody in: the message says which.
        UsageError: there is no such address.
    """
    client = Client(address)
    try:
        keeper = SshKeeper(client, address.folder)
    except BaseException:
        client.close()
        raise
    return SshDevice(client, keeper)
