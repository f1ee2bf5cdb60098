"""Huge pages: asked for once, where the system leaves it to programs, and not on behalf of anything started later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phi4edge.core.hugepages import restarted_environment, take_tunable_back

ASK = "always [madvise] never"
SHOW = """
import os, sys
from phi4edge.core import hugepages
hugepages._SYSTEM = __import__("pathlib").Path(sys.argv[1])
hugepages.use_huge_pages([sys.executable, *sys.orig_argv[1:]])
given = open("/proc/self/environ").read().split(chr(0))
print([v for v in given if "GLIBC" in v], [v for v in os.environ if "GLIBC" in v or "PHI4EDGE" in v], sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("before", "system", "asks"),
    [
        ({}, ASK, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, ASK, "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, ASK, None),  # the user has decided
        ({}, "[always] madvise never", None),  # they come by themselves
        ({}, "always madvise [never]", None),
        ({}, None, None),  # no Linux
    ],
)
def test_they_are_asked_for_where_that_changes_something(
    before: dict[str, str], system: str | None, asks: str | None
) -> None:
    found = restarted_environment({"HOME": "/root", **before}, system)
    assert (found and found["GLIBC_TUNABLES"]) == asks
    if found is not None:
        assert restarted_environment(found, system) is None  # once
        take_tunable_back(found)
        assert found == {"HOME": "/root", **before}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has them")
@pytest.mark.parametrize("says", [ASK, "always madvise [never]"])
def test_a_process_starts_again_with_its_arguments_and_children_know_nothing_of_it(tmp_path: Path, says: str) -> None:
    (tmp_path / "system").write_text(says)
    command = [sys.executable, "-c", SHOW, str(tmp_path / "system"), "a b", "--c"]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    asked = "['GLIBC_TUNABLES=glibc.malloc.hugetlb=1']" if says == ASK else "[]"
    assert ran.stdout.strip() == f"{asked} [] ['a b', '--c']"
