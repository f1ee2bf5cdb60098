"""``python -m phi4edge``."""

from phi4edge.cli.main import entry

entry()
