"""``phi4edge runner fetch-web``: what runs on a device, got here."""

from __future__ import annotations

import click

from phi4edge.cli.fetch_web import fetch_web


@click.group("runner")
def command() -> None:
    """What runs on a device, got here and brought there."""


command.add_command(fetch_web)
