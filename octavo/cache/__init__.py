"""Where keys and values are kept between forward passes."""

from octavo.cache.ragged import RaggedCache

__all__ = ["RaggedCache"]
