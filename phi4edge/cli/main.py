"""The ``phi4edge`` command: finds commands by file, prints results and errors, sets the exit code.

A command is one file in ``phi4edge/cli/commands/`` whose ``command`` is a click command; it is imported only
when it is called (or its help is listed from ``SUMMARIES``), so ``phi4edge --help`` starts without torch.
"""

from __future__ import annotations

__all__ = ["cli", "entry", "main"]

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

# Threads that spin while they wait cost a busy machine a factor of ten; read when the OpenMP runtime starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from phi4edge import __version__
from phi4edge.cli.render import emit_error
from phi4edge.core.disk import full_disk, is_full
from phi4edge.core.errors import Phi4EdgeError, UsageError, closest
from phi4edge.core.hugepages import use_huge_pages

# In the order in which a newcomer meets them; a test holds this table against the files.
SUMMARIES = {
    "inspect": "Show a checkpoint's family, shapes and sizes without reading a weight.",
    "targets": "List, show and check the devices that artifacts are made for.",
    "plan": "Say what fits a target, at which scheme and context, before any work.",
    "calibrate": "Tokenize a corpus and measure the inputs of every linear (imatrix).",
    "quantize": "Solve the integer codes of every linear, block by block, resumable.",
    "export": "Write a finished run's codes into an artifact: gguf, gptq, …",
    "verify": "Read an artifact back and compare it with its run, bit for bit.",
    "drift": "Measure PPL, KLD and top-1 agreement inside the runtime that serves.",
    "bench": "Measure prefill and decode speed, TTFT and memory on a device.",
    "runner": "Build llama.cpp's programs for a device, and get what a browser runs.",
    "report": "Put results side by side: JSON, Markdown and one HTML page.",
    "run": "The whole pipeline, from checkpoint to report.",
    "doctor": "Say which tools and runtimes are here, and how to get the others.",
}


_LARGE = ("calibrate", "quantize", "run")  # commands that compute on arrays of a model's size


class LazyGroup(click.Group):
    """A click group whose commands are modules, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        module = importlib.import_module(f"phi4edge.cli.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in SUMMARIES:
            near = closest(name, SUMMARIES)
            raise UsageError(f"no command {name!r}", f"did you mean {near!r}?" if near else "see phi4edge --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="phi4edge")
def cli() -> None:
    """Phi-4 on a machine of your own.

    Takes full-precision weights of the Phi-4 family, calibrates and quantizes them, writes the same integer
    codes into every edge format, and measures drift and speed in the runtime that will serve them.

    \b
    Exit codes: 0 ok · 1 unexpected · 2 usage · 3 bad input · 4 the target cannot hold or run it ·
    5 a tool or device is missing · 6 a gate failed (results still written) · 7 resume state does not match ·
    8 verify mismatch · 130 interrupted, resumable.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    name = next((a for a in args if not a.startswith("-")), "phi4edge")

    def fail(error: Phi4EdgeError, code: int | None = None) -> int:
        code = error.exit_code if code is None else code
        emit_error(name, error, as_json="--json" in args, code=code)
        if "-vv" in args:
            traceback.print_exc()
        return code

    try:
        with cli.make_context("phi4edge", args) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except Phi4EdgeError as error:
        return fail(error)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "phi4edge"
        return fail(UsageError(error.format_message(), f"see {where} --help"))
    except (KeyboardInterrupt, click.Abort):
        return fail(Phi4EdgeError("interrupted", "finished work is kept; the same command goes on from there"), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return fail(full_disk(error.filename or "a file", error) if is_full(error) else _unexpected(error))
    except Exception as error:  # noqa: BLE001  the outermost boundary: anything else is a defect of ours
        return fail(_unexpected(error))
    return 0


def _unexpected(error: Exception) -> Phi4EdgeError:
    return Phi4EdgeError(f"unexpected {type(error).__name__}: {error}", "-vv shows where")


def entry() -> None:
    """The console script, and ``python -m phi4edge``."""
    if any(name in sys.argv[1:2] for name in _LARGE):
        use_huge_pages([sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
