"""All start-up checks of the C++ library's kernels at once; each is made but once."""

from octavo.kernels.cpu import append, attention, linear, rows


def check_kernels() -> None:
    """Compare the kernels with their definitions now, and not when each is first used."""
    for kernel in (append, attention, linear, rows):
        kernel.best_isa()
