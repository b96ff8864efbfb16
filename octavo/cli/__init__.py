"""The command line: one file a command, which only parses and prints."""

from octavo.cli.main import main

__all__ = ["main"]
