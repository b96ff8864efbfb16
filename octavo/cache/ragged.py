"""The ragged KV cache of one sequence: full layers keep everything, windowed layers a ring."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from octavo.config import ModelConfig
from octavo.errors import RequestError


class LayerCache(ABC):
    """One layer's keys and values.

    Attributes:
        keys, values: [slots, n_kv_heads, head_dim]. On a CPU the pages of an empty tensor are
            taken from the system only when written, so a slot costs nothing until it is used.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    @abstractmethod
    def extend(self, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk, and give what its queries need to see.

        Args:
            position: of the chunk's first token.
            k, v: [T, n_kv_heads, head_dim].

        Returns:
            Keys and values [n, n_kv_heads, head_dim], ending with the chunk's own.
        """

    def copy(self, length: int) -> LayerCache:
        """A twin with slots of its own and the same `length` tokens."""
        used = slice(0, min(length, self.keys.shape[0]))
        keys, values = torch.empty_like(self.keys), torch.empty_like(self.values)
        keys[used], values[used] = self.keys[used], self.values[used]
        return type(self)(keys, values)


class FullLayerCache(LayerCache):
    """Every position, in order."""

    def extend(self, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stop = position + k.shape[0]
        self.keys[position:stop] = k
        self.values[position:stop] = v
        return self.keys[:stop], self.values[:stop]


class WindowedLayerCache(LayerCache):
    """A ring of the last `window` positions: position p lives in slot p mod window."""

    def extend(self, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As the base says; at most window - 1 + T keys, in order of position.

        One token alone is the exception: it gets the ring as it lies, unordered, since it sees all
        of it and attention does not ask for the order of what it sees in full.
        """
        window = self.keys.shape[0]
        n_new = k.shape[0]
        if n_new == 1:
            self.keys[position % window] = k[0]
            self.values[position % window] = v[0]
            stored = min(position + 1, window)
            return self.keys[:stored], self.values[:stored]
        # The chunk's first query sees window - 1 positions before its own.
        past = torch.arange(max(0, position - window + 1), position, device=k.device) % window
        keys = torch.cat((self.keys[past], k))
        values = torch.cat((self.values[past], v))
        kept = min(n_new, window)
        slots = torch.arange(position + n_new - kept, position + n_new, device=k.device) % window
        self.keys[slots] = k[-kept:]
        self.values[slots] = v[-kept:]
        return keys, values


class RaggedCache:
    """All layers' keys and values for one sequence.

    Attributes:
        length: tokens stored so far; `Transformer` moves it on after each pass.
        capacity: tokens that fit.
        layers: one `LayerCache` a layer.
    """

    def __init__(self, capacity: int, layers: list[LayerCache], length: int = 0) -> None:
        self.capacity = capacity
        self.layers = layers
        self.length = length

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> RaggedCache:
        """An empty cache: `capacity` slots in full layers, the window's in windowed ones."""

        def empty(slots: int) -> Tensor:
            return torch.empty(
                slots, config.n_kv_heads, config.head_dim, dtype=dtype, device=device
            )

        layers: list[LayerCache] = [
            FullLayerCache(empty(capacity), empty(capacity))
            if window is None or window >= capacity
            else WindowedLayerCache(empty(window), empty(window))
            for window in config.windows
        ]
        return cls(capacity, layers)

    def copy(self) -> RaggedCache:
        """A twin with memory of its own and the same contents."""
        return RaggedCache(
            self.capacity, [layer.copy(self.length) for layer in self.layers], self.length
        )

    def require_room(self, n_new: int) -> None:
        """Raise RequestError if `n_new` more tokens do not fit."""
        if self.length + n_new > self.capacity:
            raise RequestError(
                f"KV cache: {self.length} tokens are stored and {n_new} more do not fit "
                f"in its capacity of {self.capacity}"
            )

    def n_bytes(self) -> int:
        """Bytes of all keys and values at full capacity."""
        return sum(2 * layer.keys.nbytes for layer in self.layers)
