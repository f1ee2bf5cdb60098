"""Programs outside the package, as modules: ``load_script("benchmarks/demo/make_model.py")``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> ModuleType:
    """Import ``path`` (from the repository's top) by its own name, its folder in sight as when it is run."""
    script = ROOT / path
    if str(script.parent) not in sys.path:
        sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem)
