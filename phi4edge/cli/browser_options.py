"""``--transport browser``: its options, the link on the terminal, and what is said of a measurement there."""

from __future__ import annotations

__all__ = [
    "BROWSER",
    "announcer",
    "browser_options",
    "guest_for",
    "memory_line",
    "place_from",
    "place_of",
    "warning_lines",
]

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phi4edge.cli.device_options import DeviceOptions, check_place
from phi4edge.core.errors import UsageError
from phi4edge.core.memory import format_bytes
from phi4edge.targets.profile import Profile

if TYPE_CHECKING:
    from phi4edge.core.events import Progress
    from phi4edge.measurement.browser_guest import Guest
    from phi4edge.runtimes._api import Settings
    from phi4edge.transports.browser import Place

F = TypeVar("F", bound=Callable[..., Any])
BROWSER = "browser"


def browser_options(function: F) -> F:
    """``--host``, ``--port``, ``--tls``, ``--page-wait`` and ``--page-limit``, all of them of a page in a browser.

    The command receives ``page_host: str``, ``page_port: int``, ``page_tls: bool``, ``page_wait: float`` and
    ``page_limit: float``; :func:`place_from` takes them all.
    """
    for decorator in (
        click.option(
            "--page-limit", "page_limit", type=click.FloatRange(min=1), default=14400.0, show_default=True,
            metavar="SECONDS", help="In a browser: how long everything may take.",
        ),
        click.option(
            "--page-wait", "page_wait", type=click.FloatRange(min=1), default=600.0, show_default=True,
            metavar="SECONDS", help="In a browser: how long to wait until somebody opens the link.",
        ),
        click.option(
            "--tls/--no-tls", "page_tls", default=False, show_default=True,
            help="In a browser: https with a certificate made here. Only so does a phone compute with threads; it will "
            "say that the connection is not private, and lets you go on.",
        ),
        click.option(
            "--port", "page_port", type=click.IntRange(0, 65535), default=0, metavar="N",
            help="In a browser: the page's port.  [default: a free one]",
        ),
        click.option(
            "--host", "page_host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
            help="In a browser: where the page is served; 0.0.0.0 lets a phone on the network in. The link works once.",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


def place_from(options: Mapping[str, Any]) -> Place:
    """Where the page is served, from the options of :func:`browser_options`.

    Raises:
        UsageError: impossible values.
    """
    from phi4edge.transports.browser import Place

    return Place(
        host=options["page_host"],
        port=options["page_port"],
        tls=options["page_tls"],
        wait_s=options["page_wait"],
        limit_s=options["page_limit"],
    )


def place_of(target: str, device: DeviceOptions, folders: tuple[Path, ...]) -> tuple[Profile | None, str]:
    """The target's profile and transport; no profile where a page measures whatever opens it.

    Raises:
        UsageError: as :func:`phi4edge.cli.device_options.check_place`.
    """
    if target == BROWSER and device.transport == BROWSER:
        return None, BROWSER
    return check_place(target, device, folders)


def guest_for(
    artifact: Path, runtime: str | None, settings: Settings, options: Mapping[str, Any], progress: Progress
) -> Guest:
    """``artifact``, checked and ready to be served; its link will stand on stderr.

    Raises:
        UsageError: a ``runtime``, of which a browser has its own.
        As :func:`phi4edge.measurement.browser_guest.open_guest`.
    """
    from phi4edge.measurement.browser_guest import open_guest

    if runtime is not None:
        raise UsageError(f"--runtime {runtime} is none of a browser's, which runs wllama", "leave --runtime out")
    return open_guest(artifact, settings, place_from(options), announcer(), progress)


def announcer() -> Callable[[str, Sequence[str]], None]:
    """Prints the link, as a QR code too where ``segno`` is installed; on stderr, with ``--quiet`` as well."""

    def announce(link: str, notes: Sequence[str]) -> None:
        lines = [f"Open this in the browser that is to be measured:\n\n  {link}\n"]
        code = _qr_code(link)
        lines.append(code or "For a QR code: pip install 'phi4edge[browser]'")
        click.echo("\n".join([*lines, *(f"· {note}" for note in notes)]), err=True)

    return announce


def _qr_code(text: str) -> str | None:
    try:
        import segno
    except ImportError:
        return None
    drawn = io.StringIO()
    segno.make_qr(text, error="l").terminal(drawn, border=2, compact=True)
    return drawn.getvalue()


def memory_line(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Peak RSS, or why there is none."""
    peak, idle = metrics["peak_rss_bytes"], metrics["idle_rss_bytes"]
    if peak["value"] is None:
        return f"peak RSS not measured: {peak['reason']}"
    before = "" if idle["value"] is None else f" (of that {format_bytes(idle['value'])} before the model was loaded)"
    return f"peak RSS {format_bytes(peak['value'])}{before}"


def warning_lines(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the figures, loudly; an estimate's own words after it."""
    lines = [f"WARNING: {text}" for text in data.get("warnings", [])]
    estimate = data.get("estimate")
    if estimate:
        lines.append(f"KLD over the {estimate['kind']}, {estimate['detail']}; {estimate['left_out']}")
    return [*lines, ""] if lines else []
