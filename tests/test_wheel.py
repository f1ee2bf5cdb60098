"""An installed wheel is whole: away from the checkout the command finds its targets and corpora."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command in a clean environment and return its stdout; a failure shows both streams."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PHI4EDGE_", "VIRTUAL_ENV"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and, behind it, the packages it depends on.

    Those come by path from the environment of the tests. A path that a ``.pth`` file adds is only searched: the
    ``.pth`` by which the checkout itself is installed there is not followed, so phi4edge can only be the wheel's.
    """
    environment = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_wheel_holds_code_data_and_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("targets", "calibration"):
        expected = {f"phi4edge/data/{folder}/{path.name}" for path in (ROOT / folder).glob("*.toml")}
        assert expected, f"{folder}/ has TOML files"
        assert expected <= set(names)
    assert "phi4edge/py.typed" in names
    page = {f"phi4edge/transports/page/{path.name}" for path in (ROOT / "phi4edge/transports/page").iterdir()}
    assert "phi4edge/transports/page/index.html" in page
    assert page <= set(names)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"phi4edge"}


def test_installed_command_lists_targets_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    document = json.loads(run(installed / "phi4edge", "targets", "list", "--json", cwd=tmp_path))
    assert document["schema"] == "phi4edge/targets/1"
    assert document["ok"] is True
    known = {path.stem for path in (ROOT / "targets").glob("*.toml")}
    assert known
    for target in known:
        assert target in json.dumps(document["data"])
    assert not list(tmp_path.iterdir())


def test_installed_package_is_the_wheel_and_finds_its_corpora(installed: Path, tmp_path: Path) -> None:
    question = "import phi4edge; from phi4edge.core.resources import data_folder; print(phi4edge.__file__)"
    question += "; print(*sorted(p.name for p in data_folder('calibration').iterdir()))"
    file, corpora = run(installed / "python", "-c", question, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert "builtin.toml" in corpora.split()
