"""Result documents as `drift`, `bench` and `quantize` write them, made of random numbers: they measure nothing."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from phi4edge.report.build import Report, build_report, write_report

CHUNKS, SCORED = 20, 255
BASELINE = "toy-q4_0-llamacpp"
NAMES = (  # name, scheme, MiB, level of the KLD, tokens a second
    ("toy-f16.gguf", "f16", 312.4, 2e-4, 30.0),
    ("toy-q8_0.gguf", "q8_0", 166.8, 0.004, 55.0),
    ("toy-q4_0-llamacpp.gguf", "q4_0", 102.7, 0.25, 90.0),
    ("toy-q4_0-imatrix.gguf", "q4_0", 102.8, 0.18, 89.5),
    ("toy-q4_0-rtn.gguf", "q4_0", 102.7, 0.20, 90.5),
    ("toy-q4_0-gptq.gguf", "q4_0", 102.7, 0.134, 90.2),
)
PARAMETERS = 162_826_560


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def measured(value: float, unit: str, n: int, se: float | None = None, **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": unit, "n": n, "se": se, **more}


def artifact(name: str, scheme: str | None = "q4_0", mebibytes: float = 100.0) -> dict[str, Any]:
    path = f"/somewhere/{name}"
    size = int(mebibytes * 2**20)
    return {"path": path, "name": name, "format": "gguf", "scheme": scheme, "sha256": sha(name), "bytes": size}


def environment(load: float = 1.0) -> dict[str, Any]:
    return {
        "cpu": {"model": "Example CPU 9000", "architecture": "x86_64", "flags": ["avx2", "fma"], "physical_cores": 2},
        "ram_bytes": 25276502016,
        "load_average": [load, 1.0, 0.9],
        "versions": {"phi4edge": "0.1.0", "llama_cpp": "0.3.36"},
    }


def positions(level: float, seed: int) -> np.ndarray:
    """KLD of every scored position [chunks, positions]; chunks are hard for all artifacts alike."""
    hardness = np.random.default_rng(7).normal(0.0, 0.25, (CHUNKS, 1))
    noise = np.random.default_rng(seed).normal(0.0, 1.25, (CHUNKS, SCORED))
    values: np.ndarray = level * np.exp(hardness + noise - 1.25**2 / 2)
    return values


def drift(
    name: str = "toy-q4_0-gptq.gguf",
    scheme: str | None = "q4_0",
    mebibytes: float = 102.7,
    level: float = 0.134,
    seed: int = 0,
    **data: Any,
) -> dict[str, Any]:
    """A drift document; keyword arguments replace parts of its data."""
    kld = positions(level, seed)
    flat, n = kld.reshape(-1), kld.size

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std() / math.sqrt(n - 1))

    nll = np.random.default_rng(99).gamma(1.2, 2.6, n)  # of the reference, the same for all
    rng = np.random.default_rng(seed + 1000)
    ratio = rng.normal(0.35 * level, 0.9 * math.sqrt(level), n)
    same = (rng.random(n) > min(0.6, 0.55 * math.sqrt(level))).astype(float)
    delta = rng.normal(-0.04 * math.sqrt(level), 0.2 * math.sqrt(level), n)
    ppl, reference, rms = math.exp(nll.mean() + ratio.mean()), math.exp(nll.mean()), math.sqrt((delta**2).mean())
    quantiles = {"p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5, "p10": 0.1}
    metrics = {
        "ppl": measured(ppl, "1", n, ppl * mean(nll)[1]),
        "ppl_reference": measured(reference, "1", n, reference * mean(nll)[1]),
        "ln_ppl_ratio": measured(mean(ratio)[0], "nat", n, mean(ratio)[1]),
        "ppl_ratio": measured(ppl / reference, "1", n, ppl / reference * mean(ratio)[1]),
        "kld": measured(mean(flat)[0], "nat", n, mean(flat)[1]),
        "kld_max": measured(float(flat.max()), "nat", n),
        **{f"kld_{key}": measured(float(np.quantile(flat, q)), "nat", n) for key, q in quantiles.items()},
        "mean_delta_p": measured(mean(delta)[0], "fraction", n, mean(delta)[1]),
        "rms_delta_p": measured(rms, "fraction", n, mean(delta**2)[1] / (2 * rms)),
        "same_top_p": measured(mean(same)[0], "fraction", n, mean(same)[1]),
    }
    size = int(mebibytes * 2**20)
    whole = {
        "artifact": artifact(name, scheme, mebibytes),
        "runtime": {
            "name": "llama_cpp",
            "version": "0.3.36",
            "settings": {
                "threads": 2,
                "kv_type": "f16",
                "flash_attention": "off",
                "model": f"phi3 {scheme}",
                "weight_bytes": size - 5_000_000,
                "parameters": PARAMETERS,
            },
        },
        "reference": {
            "model": "toy-model",
            "fingerprint": sha("toy-model"),
            "dtype": "float32",
            "encoding": "u16-fixed-32",
            "noise_floor_kld": 8.3e-9,
        },
        "text": {
            "name": "builtin:eval",
            "sha256": sha("text"),
            "context": 512,
            "chunks": CHUNKS,
            "positions": CHUNKS * SCORED,
        },
        "metrics": metrics,
        "per_chunk_kld": kld.mean(axis=1).tolist(),
        "gates": [],
        "environment": environment(1.0 + seed / 10),
        "seconds": 12.5,
    }
    return {"schema": "phi4edge/drift/1", "ok": True, "data": whole | data}


def bench(
    name: str = "toy-q4_0-gptq.gguf",
    scheme: str | None = "q4_0",
    mebibytes: float = 102.7,
    speed: float = 90.0,
    seed: int = 0,
    **data: Any,
) -> dict[str, Any]:
    """A bench document; keyword arguments replace parts of its data."""
    rng = np.random.default_rng(seed + 2000)

    def sampled(mean: float, unit: str) -> dict[str, Any]:
        samples = (mean * rng.normal(1.0, 0.02, 5)).tolist()
        se = float(np.std(samples, ddof=1) / math.sqrt(5))
        return measured(float(np.mean(samples)), unit, 5, se, samples=samples, median=float(np.median(samples)))

    whole = {
        "artifact": artifact(name, scheme, mebibytes),
        "target": "local",
        "transport": "local",
        "runtime": {"name": "llama_cpp", "version": "0.3.36", "details": {"threads": 2, "model": f"phi3 {scheme}"}},
        "settings": {
            "threads": 2,
            "kv_type": "f16",
            "prompt_tokens": 512,
            "gen_tokens": 128,
            "repetitions": 5,
            "warmup": 1,
            "seed": 0,
        },
        "metrics": {
            "prefill_tps": sampled(6 * speed, "token/s"),
            "ttft_s": sampled(85 / speed, "s"),
            "decode_tps": sampled(speed, "token/s"),
            "tpot_s": sampled(1 / speed, "s"),
            "load_s": measured(0.31, "s", 1),
            "peak_rss_bytes": measured(int((mebibytes + 160) * 2**20), "byte", 1),
            "idle_rss_bytes": measured(61 * 2**20, "byte", 1),
        },
        "environment": environment(2.0 + seed / 10),
    }
    return {"schema": "phi4edge/bench/1", "ok": True, "data": whole | data}


def manifest(blocks: int = 30, method: str = "gptq", **data: Any) -> dict[str, Any]:
    """A quantize document: a linear that loses to RTN anywhere has fallen back to it."""
    rng = np.random.default_rng(3)
    linears, events = [], []
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    for index in range(4 * blocks):
        name = f"model.layers.{index // 4}.{kinds[index % 4]}"
        rest, first = 0.55 * math.exp(rng.normal(0, 0.2)), 0.6 * math.exp(rng.normal(0, 0.35))
        fallen = max(rest, first) > 1
        if fallen:
            detail = "gptq loses to rtn on held-out first positions; rtn's weights are taken"
            events.append({"kind": "fallback_to_rtn", "where": name, "detail": detail, "values": {"first": first}})
        linears.append(
            {
                "name": name,
                "method": "rtn" if fallen else method,
                "loss": 0.001 * rest,
                "heldout_error": {"first": 0.002 * first, "rest": 0.003 * rest},
                "heldout_error_rtn": {"first": 0.002, "rest": 0.003},
            }
        )
    events.append({"kind": "few_calibration_tokens", "where": "corpus", "detail": "1024 tokens", "values": {}})
    corpus = {"name": "builtin", "samples": 128, "sequence_length": 512, "tokens": 65536}
    whole = {
        "model": "toy-model",
        "scheme": "q4_0",
        "method": method,
        "key": sha("run"),
        "corpus": corpus,
        "quantized_fraction": 0.652,
        "events": events,
        "linears": linears,
    }
    return {"schema": "phi4edge/quantize/1", "ok": True, "data": whole | data}


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def write_results(folder: Path) -> Path:
    """A folder with drift and speed of six artifacts, and one run."""
    for seed, (name, scheme, mebibytes, level, speed) in enumerate(NAMES):
        write(folder / f"drift-{name}.json", drift(name, scheme, mebibytes, level, seed))
        write(folder / f"bench-{name}.json", bench(name, scheme, mebibytes, speed, seed))
    write(folder / "run" / "manifest.json", manifest())
    write(folder / "run" / "performance.json", {"seconds": 82.5, "peak_rss_bytes": 612519936})
    return folder


def report_of(folder: Path, *documents: Any, **options: Any) -> Report:
    """The report on ``documents``, each written into ``folder``."""
    for number, document in enumerate(documents):
        write(folder / f"{number:02d}.json", document)
    return build_report([folder], **options)


class PageReader(HTMLParser):
    """Text, attributes and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.svg_text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data.replace("\u00a0", " "))
        if "text" in self.open:
            self.svg_text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(report: Report, out: Path) -> PageReader:
    return PageReader(write_report(report, out)["html"].read_text())


def rows_of(markdown: str, title: str) -> list[dict[str, str]]:
    """The first table after ``title``, a dict a row."""
    lines = markdown[markdown.index(title) :].splitlines()
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    head, _, *rows = table
    return [dict(zip(head, row, strict=True)) for row in rows]
