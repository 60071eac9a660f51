"""The command line. Each command reads its flags, calls the pipeline and prints; heavy imports are deferred."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Any

import click

from saap._version import __version__
from saap.cli.processes import leave, one_of_several
from saap.core.errors import SaapError, first_line, out_of_memory

COMMANDS = {
    "prune": ("prune", "Prune a model and write a smaller checkpoint."),
    "recover": ("recover", "Tune a pruned model on text, by default with quantised weights."),
    "eval": ("evaluate", "Measure perplexity, zero-shot tasks, generation, conversations and speed."),
    "compare": ("compare", "Compare pruning methods: same calibration, same pruning ratio, one table."),
    "export": ("export", "Write a model for llama.cpp or Ollama, or upload it."),
    "generate": ("generate", "Answer a prompt with a pruned model and its dense model."),
    "chat": ("chat", "Chat with a pruned model and its dense model, in the terminal or a web page."),
    "inspect": ("inspect", "Show the coupled structures of a model."),
    "report": ("report", "Write one self-contained HTML page about a pruned model or a comparison."),
    "run": ("run", "Run a recipe: prune, recover, eval, export and report in one file."),
    "demo": ("demo", "Prune a small real model by 20 % and show the result."),
}
"""Commands: the module, imported when the command is called, and the summary line."""
RESUMABLE = {"prune", "recover", "compare", "run"}
"""Commands that resume after an interrupt."""


class Commands(click.Group):
    """Command group that imports only the command that is called."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command. Raises click.Abort on an interrupt, without the empty line that click would print."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        gc.disable()  # imports create many objects and no garbage
        try:
            from saap.cli.flags import command

            return command(getattr(import_module(f"saap.cli.{module}"), module), cmd_name)
        finally:
            gc.enable()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


app = Commands(
    name="saap",
    help="Structured pruning of language models: a checkpoint in, a smaller one that opens everywhere out.",
    context_settings={"max_content_width": 110},
)
click.version_option(__version__, message="%(version)s", help="Print the version and exit.")(app)


def main() -> None:
    """Entry point. Exit codes: 0 success, 2 input that the user can fix, 130 interrupted."""
    try:
        with one_of_several(sys.argv[1:]):
            code = app(sys.argv[1:] or ["--help"], prog_name="saap", standalone_mode=False)
    except SaapError as error:
        leave(2, f"error: {error}")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "saap"
        leave(2, f"error: {error.format_message().rstrip('.')}. See `{command} --help`.")
    except (KeyboardInterrupt, click.Abort):
        resumes = not RESUMABLE.isdisjoint(sys.argv[1:2])
        kept = ": finished stages, if any, are kept; the same command resumes from there." if resumes else "."
        leave(130, f"interrupted{kept}")
    except OSError as error:
        if error.filename is None:
            raise
        leave(2, f"error: {error.filename} cannot be used ({error.strerror}). Choose another place.")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        remedy = "Free some, or lower what the run takes (prune: --max-memory; recover: --micro-batch-size)"
        leave(2, f"error: Out of memory: {first_line(error).rstrip('.')}. {remedy}.")
    sys.exit(code if isinstance(code, int) else 0)
