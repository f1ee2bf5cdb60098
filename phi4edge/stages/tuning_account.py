"""What tuning did, from its journal alone: the manifest has the same of it whichever processes it took."""

from __future__ import annotations

__all__ = ["Tuned", "account"]

from dataclasses import asdict, dataclass
from typing import Any

from phi4edge.core.events import Event
from phi4edge.core.recipe import TuningRecipe
from phi4edge.core.workdir import Workdir
from phi4edge.stages.tuning_state import TUNING, total_cost


@dataclass(frozen=True)
class Tuned:
    """What tuning did, for the manifest; the same for every process that ends it."""

    summary: dict[str, Any]
    events: tuple[Event, ...]
    files: dict[str, str]  # within the run, with their SHA-256
    performance: dict[str, float]  # seconds and peak_rss_bytes, over all processes


def account(recipe: TuningRecipe, work: Workdir) -> Tuned:
    """The manifest's account, from the journal alone."""
    evaluated = [r for r in work.records if "heldout" in r]
    last = work.records[-1]
    best = next(r for r in evaluated if r["step"] == last["best"])
    first = evaluated[0]["heldout"]
    events = []
    for domain, figures in best["heldout"].items():
        if figures["kld"] > first[domain]["kld"]:
            values = {"before": first[domain]["kld"], "after": figures["kld"]}
            events.append(Event("tuning_domain_worse", domain, "held-out KLD of this domain rose by tuning", values))
    if last["best"] == 0:
        events.append(Event("tuning_without_gain", "tuning", "held-out KLD did not fall; nothing was tuned"))
    summary = {
        "recipe": asdict(recipe),
        "steps": max(r.get("step", 0) for r in work.records if "halvings" not in r),
        "kept_step": last["best"] - best.get("halvings", 0),
        "kept_halvings": best.get("halvings", 0),
        "losses": [loss for r in work.records for loss in r.get("losses", [])],
        "heldout": [_evaluation(r) for r in evaluated],
    }
    files = {f"{TUNING}/{name}": digest for name, digest in last["files"].items()}
    performance = total_cost([r["performance"] for r in work.records])
    return Tuned(summary, tuple(events), files, performance)


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of the journal, where every halving counts as a step, as the manifest has it."""
    halvings = record.get("halvings", 0)
    return {"step": record["step"] - halvings, "halvings": halvings, "domains": record["heldout"]}
