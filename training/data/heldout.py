"""What training never sees: a stable hash decides, so every run agrees on it."""

from __future__ import annotations

from hashlib import blake2b

# The model card's own prompts are for users to try: no training text contains them.
CARD_PROMPTS = (
    "Do we need to think for 10 seconds to find the answer of 1 + 1?",
    "How often does the letter r occur in Mistral?",
    "What's the weather like today in Paris?",
)
CARD_KEY = "13005"


def held_out(key: str, percent: int = 10) -> bool:
    """Whether `key` belongs to the held-out share of its kind."""
    digest = blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100 < percent
