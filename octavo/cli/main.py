"""`octavo`: the commands, and how errors reach the user."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from octavo.cli.stdout import checked_stdout
from octavo.errors import OctavoError, is_out_of_memory
from octavo.version import __version__

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# Each is the function of its name in the module of its name, with the first line of its own help.
COMMANDS = {
    "demo": "Quantise the bundled model; both models answer the model card's four kinds of prompt.",
    "chat": "Chat with a model; it answers as it writes and keeps the conversation.",
    "generate": "Answer a prompt (-p), or every line of a JSONL file (-i).",
    "serve": "Serve a model behind the OpenAI API.",
    "inspect": "Print a model's architecture, parameters, and bytes of weights and KV cache.",
    "download": "Download a model; run it again to go on where it was cut off.",
    "bench": "Measure prefill, decode and memory with random weights, beside the machine's limits.",
    "quantize": "Quantise a model; run the same command again to go on where it stopped.",
}
EVALUATIONS = {
    "passkey": "Hide a number in texts of given lengths, and ask one model or several for it.",
}


class Commands(TyperGroup):
    """Commands that are listed by their lines above, and imported when one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and isinstance(command, TyperCommand):  # and not a group of them
            command = load_command(name)
        return name, command, rest


def load_command(name: str) -> TyperCommand:
    """A command as it runs; its module may have a `Command`, a class of its own for it."""
    module = import_module(f"octavo.cli.{name}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(cls=getattr(module, "Command", TyperCommand))(getattr(module, name))
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


def _listed() -> None:
    """Stands for a command in the list of them."""


app = typer.Typer(
    name="octavo",
    cls=Commands,
    help="Ministral in 8 bits, at its full context, on one small machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(cls=Commands, help="Measure what a model can do.", no_args_is_help=True)
for group, commands in ((app, COMMANDS), (evaluate, EVALUATIONS)):
    for name, line in commands.items():
        group.command(name, help=line)(_listed)
app.add_typer(evaluate, name="eval")


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        print(f"octavo {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error a user can cause is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        with checked_stdout():
            app()
    except OctavoError as error:
        print(f"octavo: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has gone
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "octavo: out of memory; try a shorter prompt or --max-tokens, or give less --memory, "
            "--max-num-batched-tokens or, of bench, --chunk or --batch",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)
