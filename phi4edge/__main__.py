"""``python -m phi4edge``."""

import sys

from phi4edge.cli.main import main

sys.exit(main())
