"""Every transport keeps the contract: this machine, ssh to OpenSSH's sshd, and ssh to asyncssh's server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_support import AsyncSsh, Keys, OpenSsh, Server, need
from transport_contract import CONTRACT, REMOTE, Claim, Given, named

from phi4edge.transports import local, ssh
from phi4edge.transports._api import Address


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """One server of each kind, for all claims."""
    need("ssh", "ssh-keygen")
    folder = tmp_path_factory.mktemp("ssh")
    keys = Keys(folder / "keys")
    running: dict[str, Server] = {}
    yield Starting(running, keys, folder)
    for server in running.values():
        server.kill()


class Starting(dict[str, Server]):
    """Servers by kind, each started when it is first asked for."""

    def __init__(self, running: dict[str, Server], keys: Keys, folder: Path) -> None:
        super().__init__()
        self._running, self._keys, self._folder = running, keys, folder

    def __missing__(self, kind: str) -> Server:
        server = {"openssh": OpenSsh, "asyncssh": AsyncSsh}[kind](self._keys, self._folder / kind)
        server.start()
        self[kind] = self._running[kind] = server
        return server


@pytest.fixture(params=["local", "openssh", "asyncssh"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Given]:
    """A device in a folder of its own."""
    here = tmp_path / "here"
    here.mkdir()
    if request.param == "local":
        address = Address(folder=str(tmp_path / "device" / "our folder"))
        yield Given(local.open(address), lambda: local.open(address), here)
        return
    server = request.getfixturevalue("servers")[request.param]
    address = server.address()
    shutil.rmtree(server.folder / "device", ignore_errors=True)
    with ssh.open(address) as device:
        yield Given(device, lambda: ssh.open(address), here)


@pytest.mark.parametrize("claim", CONTRACT, ids=named)
def test_transport_keeps_the_contract(claim: Claim, given: Given) -> None:
    claim(given)


@pytest.mark.parametrize("given", ["openssh", "asyncssh"], indirect=True)
@pytest.mark.parametrize("claim", REMOTE, ids=named)
def test_remote_transport_keeps_the_contract(claim: Claim, given: Given) -> None:
    claim(given)
