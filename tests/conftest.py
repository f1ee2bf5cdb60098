"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import write_checkpoint

if TYPE_CHECKING:
    from phi4edge.report.build import Report

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


os.environ.setdefault("PHI4EDGE_COMPUTE", "float32")  # of commands in processes of their own


@pytest.fixture(scope="session", autouse=True)
def float32_products() -> Iterator[None]:
    """Tests compare with float32 arithmetic; on CPUs with bfloat16 units "auto" would choose these."""
    from phi4edge.model import compute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "measure_compute", lambda: compute.Speeds(1.0, 1.0, 0.0))
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep reference stores and other cached things of tests out of the user's cache."""
    os.environ["PHI4EDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def phi4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of Phi-4's kind: plain rope, untied head, GQA, two shards. Do not write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("phi4"), "phi4", shards=2)


@pytest.fixture(scope="session")
def phi4_gguf(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in F16."""
    from phi4edge.checkpoint.reader import open_checkpoint
    from phi4edge.writers._api import WriteOptions
    from phi4edge.writers.gguf import write_f16

    return write_f16(
        open_checkpoint(phi4_checkpoint), tmp_path_factory.mktemp("gguf") / "f16.gguf", WriteOptions()
    ).path


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of Phi-4-mini's kind: longrope, partial rotary, tied head. Do not write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("mini"), "mini")


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows suit blocks of 256."""
    return write_checkpoint(tmp_path_factory.mktemp("wide"), "phi4", hidden_size=256, num_hidden_layers=1)


@pytest.fixture(scope="session")
def toy_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of six artifacts, as they are measured."""
    from report_support import write_results

    return write_results(tmp_path_factory.mktemp("results") / "in")


@pytest.fixture(scope="session")
def toy_report(toy_results: Path) -> Report:
    """The report on them."""
    from report_support import BASELINE

    from phi4edge.report.build import build_report

    return build_report([toy_results], baseline=BASELINE)


@pytest.fixture(scope="session")
def toy_files(toy_report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its files by kind."""
    from phi4edge.report.build import write_report

    return write_report(toy_report, tmp_path_factory.mktemp("out"))
