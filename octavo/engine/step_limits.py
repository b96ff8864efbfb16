"""What steps of few tokens are prepared for, before the first of them."""

from typing import NamedTuple


class StepLimits(NamedTuple):
    """The largest of an engine's steps of few tokens.

    Attributes:
        max_num_seqs: sequences.
        max_model_len: tokens of the longest sequence.
        speculate: whether sequences bring guesses, too.
    """

    max_num_seqs: int
    max_model_len: int
    speculate: bool
