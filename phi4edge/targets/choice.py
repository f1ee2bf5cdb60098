"""Which runtime, format and scheme a model gets on a target: by rule, each step said.

1. Runtimes and their formats are tried in the profile's order; a format that this version cannot write is passed
   over, and so is a type of KV cache that the runtime does not have.
2. Of the runtime's schemes the one with the most bytes comes first: quality grows with them.
3. The first that fits the usable memory at the context asked for is taken, provided that its estimated decode speed
   keeps the target's ``min_decode_tps`` (a speed that cannot be estimated is no reason to refuse).
4. If some fit and none keeps the speed, the fastest of them is taken, and that is said.
"""

from __future__ import annotations

__all__ = [
    "Choice",
    "DoesNotFitError",
    "Wish",
    "choose",
    "context_for",
    "gb",
    "known_schemes",
    "process_bytes",
    "refusal",
]

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.targets.fit import (
    LAYOUTS,
    PROCESS_BYTES,
    Fit,
    Request,
    Suggestion,
    check_context,
    largest_that_fits,
    memory_needed,
)
from phi4edge.targets.profile import Profile, RuntimeOption
from phi4edge.targets.roofline import SpeedEstimate, estimate_decode, estimate_prefill, traffic_of

TIGHT = 0.05  # share of the usable memory below which what is left is called tight


@dataclass(frozen=True)
class Wish:
    """What the user asks of every target; None: as the target's profile says."""

    context: int | None = None
    kv: str | None = None
    head: str = "q8_0"
    embedding: str = "q8_0"
    min_decode_tps: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was taken, and the steps that led there."""

    runtime: RuntimeOption
    fit: Fit
    decode: SpeedEstimate
    prefill: SpeedEstimate
    steps: tuple[str, ...]


class DoesNotFitError(TargetError):
    """Nothing fits; ``fit`` is the sum that came nearest."""

    def __init__(self, message: str, hint: str, fit: Fit) -> None:
        super().__init__(message, hint)
        self.fit = fit


def gb(nbytes: float) -> str:
    """Bytes in the unit of target files: ``"3.26 GB"``, 10⁹ bytes."""
    return f"{nbytes / 1e9:.2f} GB"


def known_schemes(option: RuntimeOption) -> tuple[Scheme, ...]:
    """The schemes of a runtime that phi4edge solves for, in the profile's order."""
    found = []
    for name in option.schemes:
        try:
            found.append(parse_scheme(name))
        except UsageError:
            continue
    return tuple(found)


def process_bytes(option: RuntimeOption) -> int:
    """What the runtime's process takes on the target."""
    figure = option.overhead_gb
    return PROCESS_BYTES if figure is None or figure.value is None else int(figure.value * 1e9)


def context_for(profile: Profile, config: ModelConfig, wish: Wish) -> int:
    """The context asked for, else the target's default, within the model's.

    Raises:
        InputError: the context asked for is beyond the model's.
    """
    context = wish.context or min(profile.default_context, config.context_length)
    check_context(config, context)
    return context


def _combinations(
    profile: Profile, wish: Wish, writable: Collection[str], steps: list[str]
) -> Iterator[tuple[RuntimeOption, str, str]]:
    """Runtime, format and KV type that can be had, in order; the others are told in ``steps``."""
    for option in profile.runtimes:
        kv = wish.kv or option.kv_types[0]
        if kv not in option.kv_types:
            steps.append(f"{option.name}: passed over, its KV cache is {' or '.join(option.kv_types)}, not {kv}")
            continue
        for layout in option.formats:
            if layout not in writable:
                steps.append(f"{option.name}: {layout} passed over, this version of phi4edge does not write it")
            elif layout == "onnx" and option.backend != "cpu":
                steps.append(f"{option.name}: onnx passed over, it is written for the CPU, not {option.backend}")
            elif layout not in LAYOUTS:
                steps.append(f"{option.name}: {layout} passed over, its size in memory is not modelled")
            elif not known_schemes(option):
                steps.append(f"{option.name}: passed over, none of {', '.join(option.schemes)} is solved for yet")
            else:
                yield option, layout, kv


def _candidates(
    config: ModelConfig, option: RuntimeOption, requests: Iterable[Request], usable: int, steps: list[str]
) -> list[Fit]:
    """What the runtime could be given, most bytes first; what its format cannot hold is told in ``steps``."""
    fits = []
    for request in requests:
        scheme = request.scheme
        try:
            fit = memory_needed(config, request, usable_bytes=usable, process_bytes=process_bytes(option))
        except InputError as error:
            steps.append(f"{option.name}: {scheme.name} passed over ({error.message})")
            continue
        fits.append(fit)
    return sorted(fits, key=lambda fit: -fit.needed_bytes)


def choose(model: str, config: ModelConfig, profile: Profile, wish: Wish, writable: Collection[str]) -> Choice:
    """The runtime, format and scheme for ``config`` on the target.

    ``writable`` names the formats that can be made (the registry of writers).

    Raises:
        DoesNotFitError: nothing fits; the hint says what would.
        TargetError: nothing that the target runs can be made.
        InputError: the context is beyond the model's.
    """
    steps: list[str] = []
    wanted = wish.min_decode_tps or profile.min_decode_tps
    slow: list[Choice] = []
    tried: list[tuple[RuntimeOption, Fit]] = []
    context = context_for(profile, config, wish)
    for option, layout, kv in _combinations(profile, wish, writable, steps):
        schemes = known_schemes(option)
        requests = [Request(s, context, layout, kv, wish.head, wish.embedding) for s in schemes]
        for fit in _candidates(config, option, requests, profile.usable_bytes, steps):
            name = f"{option.name}, {layout}, {fit.request.scheme.name}"
            need = f"{gb(fit.needed_bytes)} of {gb(fit.usable_bytes)}"
            tried.append((option, fit))
            if not fit.fits:
                steps.append(f"{name}: does not fit, {need}")
                continue
            traffic = traffic_of(config, fit.request)
            decode, prefill = (estimate(profile, option, traffic) for estimate in (estimate_decode, estimate_prefill))
            if wanted and decode.typical is not None and decode.typical < wanted:
                steps.append(f"{name}: fits ({need}), but {decode.text()}, is below the {wanted:g} tok/s to keep")
                slow.append(Choice(option, fit, decode, prefill, ()))
                continue
            left = fit.usable_bytes - fit.needed_bytes
            tight = f", tight with {gb(left)} left" if left < TIGHT * fit.usable_bytes else ""
            steps.append(f"{name}: taken, {need}{tight}; decode {decode.text()}")
            return Choice(option, fit, decode, prefill, tuple(steps))
    if slow:
        best = max(slow, key=lambda choice: choice.decode.typical or 0.0)
        request = best.fit.request
        steps.append(f"{best.runtime.name}, {request.format}, {request.scheme.name}: taken as the fastest that fits")
        return Choice(best.runtime, best.fit, best.decode, best.prefill, tuple(steps))
    if not tried:
        raise TargetError(
            f"{profile.id}: phi4edge makes nothing yet that it runs",
            "; ".join(steps) + "; add a runtime with a format of phi4edge's to a target file of your own",
        )
    option, smallest = min(tried, key=lambda pair: pair[1].needed_bytes)
    raise refusal(model, config, profile, option, smallest)


def refusal(model: str, config: ModelConfig, profile: Profile, option: RuntimeOption, fit: Fit) -> DoesNotFitError:
    """The error for something that does not fit: both numbers, and in the hint the nearest thing that does."""
    request = fit.request
    suggestion = largest_that_fits(
        model,
        config,
        request,
        known_schemes(option) or (request.scheme,),
        usable_bytes=profile.usable_bytes,
        kv_types=option.kv_types,
        process_bytes=process_bytes(option),
    )
    figure = profile.usable_ram_gb
    hint = "nothing of the family fits" if suggestion is None else _suggestion_text(profile, suggestion)
    if figure.high is not None and fit.needed_bytes <= figure.high * 1e9:
        hint += f". Up to {figure.high:g} GB may be usable, which would do: {figure.reason or figure.source}"
    marked = " (estimated)" if figure.estimated else ""
    where = " of video memory" if profile.memory == "vram" else ""
    return DoesNotFitError(
        f"{profile.id}: {model} at {request.text()} needs {gb(fit.needed_bytes)},"
        f" and one process can use {gb(fit.usable_bytes)}{where}{marked}",
        hint,
        fit,
    )


def _suggestion_text(profile: Profile, suggestion: Suggestion) -> str:
    request = suggestion.fit.request
    flags = f"--model {suggestion.model} --scheme {request.scheme.name} --context {request.context} --kv {request.kv}"
    return (
        f"{suggestion.model} at {request.text()} needs {gb(suggestion.fit.needed_bytes)} and fits:"
        f" phi4edge targets check {profile.id} {flags}"
    )
