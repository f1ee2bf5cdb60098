"""Speed of every artifact on its target's device: this machine, and those that the user says how to reach."""

from __future__ import annotations

__all__ = ["SpeedOrder", "check_places", "measure_speeds"]

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phi4edge.core.errors import Phi4EdgeError, UsageError, closest
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.connection import connection_of, machine_of
from phi4edge.measurement.device_speed import measure_speed_on
from phi4edge.measurement.on_device import open_site
from phi4edge.measurement.plausible import assess
from phi4edge.measurement.speed import measure_speed
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.stages.fleet import Visit, Visited, first_failure, visit_all
from phi4edge.targets.catalog import Catalog
from phi4edge.targets.profile import LOCAL, Profile
from phi4edge.transports._api import Address, load_transport


@dataclass(frozen=True)
class SpeedOrder:
    """What shall be timed, and where the devices are."""

    artifacts: Mapping[str, Path]  # target → its artifact
    catalog: Catalog
    request: SpeedRequest = field(default_factory=SpeedRequest)
    places: Mapping[str, str] = field(default_factory=dict)  # target → --address, stronger than its file's


def check_places(catalog: Catalog, targets: Sequence[str], places: Mapping[str, str]) -> None:
    """Refuse, before any work, an address for a target that is not asked for, or that its transports do not reach.

    Raises:
        UsageError: such an address, or a [connection] that contradicts its file's transports.
    """
    for target in places:
        if target not in targets:
            near = closest(target, targets)
            raise UsageError(
                f"--address {target}={places[target]}: {target!r} is none of the targets",
                f"did you mean {near!r}?" if near else f"targets: {', '.join(targets)}",
            )
    for target in targets:
        found = connection_of(catalog.profile(target), places.get(target))
        if found is not None:
            load_transport(found[0])


def measure_speeds(
    order: SpeedOrder, results: Path, *, anew: bool = False, progress: Progress = SILENT
) -> tuple[dict[str, dict[str, Any]], Phi4EdgeError | None]:
    """What came of each target, and the error of the first device that failed; a bench document each in ``results``."""
    hashes = {path: str(describe(path)["sha256"]) for path in set(order.artifacts.values())}
    reached: dict[str, tuple[Profile, str, Address]] = {}
    told: dict[str, dict[str, Any]] = {}
    visits = []
    for target, path in order.artifacts.items():
        profile = order.catalog.profile(target)
        found = connection_of(profile, order.places.get(target))
        if found is None:
            told[target] = _unmeasured(
                f"nobody said where it is: --address {target}=PLACE, or [connection] in its file"
            )
        elif default_runtime(path) == "torch_ref":
            told[target] = _unmeasured("no runtime here serves its format")
        else:
            transport, address = found
            reached[target] = profile, transport, address
            asked = {"request": asdict(order.request), "transport": transport, "address": asdict(address)}
            visits.append(Visit(target, path, hashes[path], machine_of(transport, address), asked))

    def bench(visit: Visit, progress: Progress) -> dict[str, Any]:
        profile, transport, address = reached[visit.target]
        data = _time(visit.artifact, profile, transport, address, order.request, progress)
        return data | assess(data, profile, visit.artifact)

    visited = visit_all(visits, {"bench": bench}, results, anew=anew, progress=progress)
    told |= {each.visit.target: _told(each) for each in visited}
    return {target: told[target] for target in order.artifacts}, first_failure(visited)


def _time(
    artifact: Path, profile: Profile, transport: str, address: Address, request: SpeedRequest, progress: Progress
) -> dict[str, Any]:
    if transport == LOCAL and address == Address():
        return measure_speed(artifact, target=profile.id, request=request)
    with load_transport(transport).open(address) as device, open_site(device, profile, progress=progress) as site:
        return measure_speed_on(site, artifact, request=request)


def _unmeasured(reason: str) -> dict[str, Any]:
    return {"measured": False, "reason": reason}


def _told(visited: Visited) -> dict[str, Any]:
    if visited.error is not None:
        failure = {"code": visited.error.exit_code, "message": visited.error.message, "hint": visited.error.hint}
        return _unmeasured(visited.error.message) | {"error": failure}
    data = visited.data["bench"]
    return {
        "measured": True,
        "kept": "bench" in visited.kept,  # from an earlier run
        "metrics": data["metrics"],
        "implausible": data.get("roofline", {}).get("implausible"),
    }
