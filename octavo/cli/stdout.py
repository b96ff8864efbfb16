"""Standard output: what cannot be written there is an error that says so."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from octavo.errors import OctavoError


class Stdout(io.TextIOWrapper):
    """Raises OctavoError where the disk is full, and BrokenPipeError where the reader has gone."""

    def write(self, text: str, /) -> int:
        with self._errors_named():
            return super().write(text)

    def flush(self) -> None:
        with self._errors_named():
            super().flush()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python would complain once more when it flushes what is left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise OctavoError(
                f"standard output: cannot be written: {error.strerror}; free some room, or write "
                "elsewhere"
            ) from None


class Closed(io.TextIOBase):
    """Stands for a standard output that was closed before this began (`>&-`)."""

    encoding = "utf-8"

    def write(self, text: str, /) -> int:
        raise OctavoError("standard output: is closed; write to a file, or to /dev/null")


@contextmanager
def checked_stdout() -> Iterator[None]:
    """While it lasts, stdout is a `Stdout`; all that was written is out when it ends.

    Characters that its encoding has not are escaped, as they are on stderr.
    """
    given = sys.stdout
    if given is None:
        with redirect_stdout(Closed()):
            yield
        return
    if not isinstance(given, io.TextIOWrapper):  # a caller's own
        yield
        return
    given.flush()
    stdout = Stdout(
        given.buffer,
        encoding=given.encoding,
        errors="backslashreplace" if given.errors == "strict" else given.errors,
        line_buffering=given.line_buffering,
        write_through=given.write_through,
    )
    with redirect_stdout(stdout):
        try:
            yield
        finally:
            stdout.detach()
