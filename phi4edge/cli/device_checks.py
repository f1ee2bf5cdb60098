"""What is on a device, as lines of ``phi4edge doctor``."""

from __future__ import annotations

__all__ = ["check_device"]

from typing import TYPE_CHECKING

from phi4edge.core.memory import format_bytes

if TYPE_CHECKING:
    from phi4edge.measurement.on_device import Site

Line = tuple[str, str, str, bool, str | None]  # name, status, detail, required, hint


def check_device(site: Site) -> list[Line]:
    """The device, what it has, and whether drift and speed can be measured on it; nothing is sent there."""
    from phi4edge.core.errors import TargetError
    from phi4edge.runtimes._llama_tools import help_of
    from phi4edge.runtimes._remote import BENCH, PERPLEXITY
    from phi4edge.runtimes._runner_cache import built

    cpu, environment, found, name = site.environment["cpu"], site.environment, site.found, site.profile.id
    words = [f"{cpu['architecture']} {cpu['model']}, {cpu['physical_cores']} cores", environment["distribution"]]
    ram, free = environment["ram_bytes"], environment["disk_free_bytes"]
    room = format_bytes(free) if free else "unknown"
    lines: list[Line] = [
        (name, "ok", f"answers over {site.device.transport} as {site.device.name}", True, None),
        (f"{name} cpu", "info", "; ".join(filter(None, [*words, environment["system"]])), False, None),
        (f"{name} memory", "info", format_bytes(ram) if ram else "unknown", False, None),
        (f"{name} disk", "info", f"{room} free for {site.device.folder}", False, None),
    ]
    static, works = built(site.arch), set()
    for tool, purpose in ((BENCH, "speed"), (PERPLEXITY, "drift")):
        program = found.programs.get(tool)
        if program is not None:
            try:
                help_of(site.device, program)
                works.add(tool)
                lines.append((f"{name} {tool}", "ok", program.path, False, None))
            except TargetError as error:
                lines.append((f"{name} {tool}", "broken", error.message, False, error.hint))
        elif static is not None and (static / tool).is_file():
            works.add(tool)
            lines.append((f"{name} {tool}", "ok", f"will be sent: {static / tool}", False, None))
        else:
            lines.append((f"{name} {tool}", "missing", f"for {purpose}", False, None))
    packages = ", ".join(f"{package} {version}" for package, version in sorted(found.packages.items()))
    if found.python is not None:
        detail = f"{found.python_version} at {found.python}, with {packages or 'no package that measures'}"
        lines.append((f"{name} python", "ok", detail, False, None))
    else:
        detail = f"{found.python_version} is too old" if found.python_version else "for drift with all its figures"
        lines.append((f"{name} python", "missing", detail, False, None))
    runtimes = [runtime for runtime in ("llama_cpp", "onnxruntime_genai") if found.has_python(runtime)]
    hint = site.hint("llama_cpp")
    for work, tool in (("speed", BENCH), ("drift", PERPLEXITY)):
        able = [f"{tool} (GGUF)"] * (tool in works) + [f"Python with {runtime}" for runtime in runtimes]
        status, detail = ("ok", "; ".join(able)) if able else ("missing", "nothing there can measure it")
        lines.append((f"{name} {work}", status, detail, True, None if able else hint))
    return lines
