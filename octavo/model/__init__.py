"""The transformer as one would write it on a board."""

from octavo.model.transformer import Transformer

__all__ = ["Transformer"]
