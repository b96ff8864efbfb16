"""How much an engine takes at once where nothing else is asked for."""

MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 1024
