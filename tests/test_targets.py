"""Target files, the catalog and the detection of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.resources import data_folder
from phi4edge.targets import schema
from phi4edge.targets.catalog import TARGET_PATH, open_catalog
from phi4edge.targets.local import cgroup_limit, detect_local, instruction_sets
from phi4edge.targets.profile import Figure, Profile
from phi4edge.targets.schema import parse_profile, read_profile

SHIPPED = sorted(data_folder("targets").glob("*.toml"))
README = data_folder("targets") / "README.md"
SMALLEST = """
name = "A device"
kind = "board"
sources = ["its data sheet"]
ram_gb = 8
usable_ram_gb = 6
bandwidth_gb_s = 40
arch = "aarch64"
transports = ["ssh"]

[[runtimes]]
name = "llama_cpp"
formats = ["gguf"]
schemes = ["q4_0"]
"""


@pytest.fixture(autouse=True)
def _no_user_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TARGET_PATH, raising=False)


def parse(text: str) -> Profile:
    return parse_profile(tomllib.loads(text), "board", "board.toml")


def refusal(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        parse(text)
    return caught.value


def write(folder: Path, name: str, text: str = SMALLEST) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


# --- the files that travel with phi4edge


def test_twenty_two_devices_are_shipped() -> None:
    assert len(SHIPPED) == 22
    assert {"laptop-x86-ddr5", "jetson-orin-nano-super-8gb", "phone-snapdragon-8gen3-12gb"} <= {p.stem for p in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_figure_has_a_source_or_the_reason_of_a_guess(path: Path) -> None:
    profile = read_profile(path)
    figures = [profile.usable_ram_gb, profile.bandwidth_gb_s, *(e.figure for e in profile.efficiency)]
    figures += [option.overhead_gb for option in profile.runtimes if option.overhead_gb]
    for figure in figures:
        assert figure.value is not None
        assert figure.source or figure.reason or profile.sources, figure
        assert bool(figure.reason) == figure.estimated, figure
        if figure.source is None and not figure.estimated:
            assert profile.sources
    assert all(anchor.source for anchor in profile.anchors)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_figures_quoted_from_memory_are_marked_estimated(path: Path) -> None:
    for _, figure in read_profile(path).estimates():
        assert figure.reason
    for line in path.read_text().splitlines():
        if "from memory" in line or "rule of thumb" in line:
            assert "estimated = true" in line


def test_the_readme_names_every_key_of_the_schema_and_its_example_is_valid() -> None:
    text = README.read_text()
    keys = {
        *schema.KEYS,
        *schema.RUNTIME_KEYS,
        *schema.RATE_KEYS,
        *schema.CONNECTION_KEYS,
        *schema.ACCELERATOR_KEYS,
        *schema.ANCHOR_KEYS,
    }
    assert [key for key in sorted(keys) if not re.search(rf"\b{key}\b", text)] == []
    example = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    assert parse("\n".join(line[3:] for line in example[1].splitlines())).usable_ram_gb.estimated


def test_the_keys_are_the_fields_of_the_profile() -> None:
    assert set(schema.KEYS) == {field.name for field in fields(Profile)} - {"id"}
    assert set(schema.FIGURE_KEYS) == {field.name for field in fields(Figure)}


# --- the schema


def test_the_smallest_file_is_a_target_with_its_defaults() -> None:
    profile = parse(SMALLEST)
    assert profile.usable_bytes == 6_000_000_000
    assert (profile.memory, profile.power_interface, profile.default_context) == ("system", "none", 4096)
    assert profile.runtimes[0].kv_types == ("f16",)


def test_a_misspelt_key_is_named_with_its_file_and_the_closest_one() -> None:
    error = refusal(SMALLEST.replace("bandwidth_gb_s", "bandwith_gb_s"))
    assert "board.toml: bandwith_gb_s: unknown key" in error.message
    assert error.hint == "did you mean 'bandwidth_gb_s'?"


def test_a_misspelt_key_inside_a_table_says_which_table() -> None:
    error = refusal(SMALLEST.replace("formats", "format"))
    assert error.message.startswith("board.toml: runtimes[0].format: unknown key")
    assert "formats" in str(error.hint)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ram_gb = 8", 'ram_gb = "8"', "board.toml: ram_gb: is a string, expected a number"),
        ("ram_gb = 8", "ram_gb = true", "ram_gb: is true or false, expected a number"),
        ("ram_gb = 8", "ram_gb = -8", "ram_gb: is -8, expected a number above 0"),
        ("ram_gb = 8", "ram_gb = nan", "ram_gb: is nan"),
        ("ram_gb = 8\n", "\n", "ram_gb: missing, expected a number"),
        ('kind = "board"', 'kind = "bord"', "kind: 'bord' is not known"),
        ('["gguf"]', '["gguff"]', "runtimes[0].formats[0]: 'gguff' is not known"),
        ('["gguf"]', '"gguf"', "runtimes[0].formats: is a string, expected a list of strings"),
        ('["gguf"]', "[]", "runtimes[0].formats: is empty"),
        ('["gguf"]', '["gguf", "gguf"]', "names 'gguf' twice"),
        ('["q4_0"]', '["q4_9"]', "runtimes[0].schemes[0]: unknown scheme 'q4_9'"),
        ('"llama_cpp"', '"lama_cpp"', "runtimes[0].name: 'lama_cpp' is not known"),
        ('["ssh"]', "[]", "transports: is empty"),
        ("usable_ram_gb = 6", "usable_ram_gb = 60", "60 GB is more than ram_gb 8"),
        (
            "usable_ram_gb = 6",
            "usable_ram_gb = { value = 6, low = 7, high = 8 }",
            "6 is not between low 7 and high 8",
        ),
        ("usable_ram_gb = 6", "usable_ram_gb = { value = 6, low = 5 }", "has one of low and high"),
        ("usable_ram_gb = 6", "usable_ram_gb = { value = 6, estimated = true }", "usable_ram_gb.reason: missing"),
        ('sources = ["its data sheet"]', "", "usable_ram_gb: 6 has no source"),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(old: str, new: str, words: str) -> None:
    assert old in SMALLEST
    assert words in refusal(SMALLEST.replace(old, new)).message


def test_a_file_without_runtimes_is_refused() -> None:
    assert "runtimes: missing" in refusal(SMALLEST.split("[[runtimes]]")[0]).message


def test_an_efficiency_above_one_is_refused_since_memory_is_not_faster_than_itself() -> None:
    text = SMALLEST + '[[efficiency]]\nruntime = "llama_cpp"\nbits = 4\nvalue = 1.2\n'
    assert "efficiency[0].value: is 1.2, expected a number above 0 and at most 1" in refusal(text).message


def test_an_efficiency_of_a_runtime_that_is_not_there_is_refused() -> None:
    text = SMALLEST + '[[efficiency]]\nruntime = "mlx"\nbits = 4\nvalue = 0.5\n'
    assert "efficiency[0].runtime: 'mlx' is not known" in refusal(text).message


def test_a_bandwidth_left_out_is_not_known_and_says_why() -> None:
    figure = parse(SMALLEST.replace("bandwidth_gb_s = 40\n", "")).bandwidth_gb_s
    assert figure.value is None
    assert figure.text("GB/s") == "not known"
    assert "board.toml" in str(figure.reason)


def test_broken_toml_gives_the_parsers_line(tmp_path: Path) -> None:
    path = write(tmp_path, "board", "name = \n")
    with pytest.raises(InputError, match=r"board\.toml: not valid TOML .*line 1"):
        read_profile(path)


@pytest.mark.parametrize("name", ["My Phone", "phone_1", "Phone", "local"])
def test_a_file_name_that_cannot_be_an_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is not a target id|this machine"):
        read_profile(write(tmp_path, name))


# --- the catalog


def test_an_unknown_target_offers_the_closest_name() -> None:
    with pytest.raises(UsageError) as caught:
        open_catalog().profile("jetson-orin-nano-super")
    assert "did you mean 'jetson-orin-nano-super-8gb'" in str(caught.value.hint)


def test_a_users_file_takes_the_place_of_the_built_in_one_and_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "mine", "mac-m4")
    catalog = open_catalog([tmp_path / "mine"])
    assert catalog.profile("mac-m4").name == "A device"
    assert catalog.entry("mac-m4").user
    assert catalog.notes == (f"mac-m4: {path} takes the place of {data_folder('targets') / 'mac-m4.toml'}",)


def test_folders_of_the_option_come_before_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flag", "first", "second"):
        write(tmp_path / name, "mine", SMALLEST.replace("A device", name))
    write(tmp_path / "second", "only-here")
    monkeypatch.setenv(TARGET_PATH, os.pathsep.join(str(tmp_path / name) for name in ("first", "second")))
    assert open_catalog().profile("mine").name == "first"
    assert open_catalog([tmp_path / "flag"]).profile("mine").name == "flag"
    assert open_catalog().entry("only-here").user


def test_a_broken_user_file_hides_no_other_target(tmp_path: Path) -> None:
    write(tmp_path / "mine", "broken", "kind = 1")
    catalog = open_catalog([tmp_path / "mine"])
    assert catalog.profile("mac-m4").ram_gb == 16
    with pytest.raises(InputError, match="broken"):
        catalog.profile("broken")


def test_a_folder_that_is_not_there_or_holds_no_target_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no such folder \(from --target-path\)"):
        open_catalog([tmp_path / "nowhere"])
    monkeypatch.setenv(TARGET_PATH, str(tmp_path))
    with pytest.raises(InputError, match=rf"no \*\.toml in it \(from \${TARGET_PATH}\)"):
        open_catalog()


def test_this_machine_cannot_be_replaced_by_a_file(tmp_path: Path) -> None:
    write(tmp_path / "mine", "local")
    with pytest.raises(InputError, match="which is detected"):
        open_catalog([tmp_path / "mine"])


# --- this machine


def fake_system(root: Path, cgroup_line: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc of a machine with 16 GB, 12 of them available, and a cgroup tree."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n")
    (proc / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm\n")
    (proc / "self" / "cgroup").write_text(cgroup_line)
    for name, text in files.items():
        path = cgroup / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, cgroup


def usable(proc: Path, cgroup: Path) -> float:
    value = detect_local(proc=proc, cgroup=cgroup).usable_ram_gb.value
    assert value is not None
    return value


def test_without_a_limit_what_the_system_has_available_is_usable(tmp_path: Path) -> None:
    system = fake_system(tmp_path, "0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})
    assert cgroup_limit(*system) is None
    assert usable(*system) == pytest.approx(12.288)


def test_the_memory_limit_of_a_cgroup_is_respected_with_page_cache_counted_as_free(tmp_path: Path) -> None:
    files = {
        "box/memory.max": "4000000000\n",
        "box/memory.current": "1500000000\n",
        "box/memory.stat": "anon 500000000\ninactive_file 1000000000\nactive_file 7\n",
    }
    system = fake_system(tmp_path, "0::/box\n", files)
    limit = cgroup_limit(*system)
    assert limit is not None
    assert (limit.limit, limit.remaining, limit.path.name) == (4_000_000_000, 3_500_000_000, "box")
    assert usable(*system) == 3.5


def test_a_limit_of_a_parent_cgroup_counts_too(tmp_path: Path) -> None:
    files = {"a/memory.max": "2000000000", "a/memory.current": "0", "a/b/memory.max": "max", "a/b/memory.current": "0"}
    assert usable(*fake_system(tmp_path, "0::/a/b\n", files)) == 2.0


def test_in_a_container_the_root_of_the_mount_is_looked_at(tmp_path: Path) -> None:
    files = {"memory.max": "3000000000", "memory.current": "0"}
    assert usable(*fake_system(tmp_path, "0::/docker/of/the/host\n", files)) == 3.0


def test_version_one_cgroups_are_understood_and_their_no_limit_number_too(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/box/memory.limit_in_bytes": "1000000000\n",
        "memory/box/memory.usage_in_bytes": "300000000\n",
        "memory/box/memory.stat": "cache 5\ntotal_inactive_file 100000000\n",
    }
    assert usable(*fake_system(tmp_path, "4:memory:/box\n2:cpu:/\n", files)) == 0.8


def test_instruction_sets_are_read_in_the_words_of_target_files(tmp_path: Path) -> None:
    proc, _ = fake_system(tmp_path, "", {})
    assert instruction_sets(proc) == (("fp16", "dotprod", "i8mm"), "")
    (proc / "cpuinfo").write_text("model name\t: A CPU\nflags\t\t: sse avx2 fma f16c avx512f avx512_vnni amx_int8\n")
    assert instruction_sets(proc) == (("avx2", "f16c", "fma", "avx512", "vnni", "amx"), "A CPU")


def test_this_machine_has_memory_and_an_honest_bandwidth() -> None:
    profile = open_catalog().profile("local")
    assert 0 < profile.usable_bytes <= profile.ram_gb * 1e9
    assert profile.bandwidth_gb_s.value is None
    assert profile.bandwidth_gb_s.text("GB/s") == "not measured"
    assert profile.efficiency == ()


def test_targets_and_transports_start_without_torch() -> None:
    code = (
        "import sys, phi4edge.targets.choice, phi4edge.targets.catalog, phi4edge.targets.probe_llama,"
        " phi4edge.transports.local; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
