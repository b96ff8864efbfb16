"""`octavo`: the commands, and how errors reach the user."""

from __future__ import annotations

import logging
import os
import sys

import typer

from octavo.cli.bench import bench
from octavo.cli.chat import chat
from octavo.cli.demo import demo
from octavo.cli.download import download
from octavo.cli.generate import generate
from octavo.cli.inspect import inspect
from octavo.cli.passkey import passkey
from octavo.cli.quantize import QuantizeCommand, quantize
from octavo.cli.serve import serve
from octavo.errors import OctavoError, is_out_of_memory
from octavo.version import __version__

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="octavo",
    help="Ministral in 8 bits, at its full context, on one small machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, chat, generate, serve, inspect, download, bench):
    app.command()(command)
app.command(cls=QuantizeCommand)(quantize)
evaluate = typer.Typer(help="Measure what a model can do.", no_args_is_help=True)
evaluate.command()(passkey)
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
        app()
    except OctavoError as error:
        print(f"octavo: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
