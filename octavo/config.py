"""What a checkpoint says of itself: the architecture, its attention pattern, its quantisation.

Names are those of Mistral's `params.json`. Readers of the files are in `octavo.checkpoint`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from octavo.errors import ConfigError
from octavo.schemes import Scheme

MAX_LAYERS = 1000  # a damaged config must not fill the memory with layers
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+)\s*([km]?)", re.IGNORECASE)


def parse_size(text: str, what: str) -> int:
    """A count of tokens such as `32768`, `32k` (times 1024) or `1m`; `what` names it in errors."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{what}: {text!r} is not a size; write 32768, 32k or 1m")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def parse_bytes(value: int | str, what: str) -> int:
    """Bytes from a number or a text such as `8G`, `512M` or `8 GiB` (powers of 1024)."""
    match = _BYTES.fullmatch(str(value).strip())
    unit = 0 if match is None else 1024 ** "_kmgt".index((match[2] or "_").lower())
    n_bytes = 0 if match is None else int(float(match[1]) * unit)
    if n_bytes <= 0:
        raise ConfigError(f"{what}: {value!r} is no amount of memory; write 8G or 512M")
    return n_bytes


def format_bytes(n_bytes: int, up: bool = False) -> str:
    """As `parse_bytes` reads it, `1.50G` or `512M`; rounded up where it must suffice."""
    rounded = math.ceil if up else round
    if n_bytes < 2**20:
        return f"{n_bytes}B"
    if n_bytes < 2**30:
        return f"{rounded(n_bytes / 2**20)}M"
    return f"{rounded(n_bytes * 100 / 2**30) / 100:.2f}G"


def format_size(tokens: int) -> str:
    """The shortest exact form: 131072 is `128k`, 1000 is `1,000`."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


@dataclass(frozen=True)
class AttentionPattern:
    """One window a layer, given as a group that repeats over the layers.

    A window of `w` lets a query see the keys less than `w` positions behind it, itself included;
    None is full attention. Ministral-8B's pattern is `(None, 32768, 32768, 32768)`.
    """

    windows: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        if not self.windows:
            raise ConfigError("attention pattern: empty; give at least one window")
        for window in self.windows:
            valid = window is None or (type(window) is int and window > 0)
            if not valid:
                raise ConfigError(
                    f"attention pattern: window {window!r} is neither a positive integer nor null"
                )

    @classmethod
    def parse(cls, text: str, max_seq_len: int) -> AttentionPattern:
        """Read `128k,32k,32k,32k`; `full`, or a window that covers the context, is full attention.

        Args:
            text: comma-separated windows in tokens (`k` is times 1024).
            max_seq_len: the model's context in tokens.

        Raises:
            ConfigError: an entry that is no size.
        """
        windows: list[int | None] = []
        for entry in text.split(","):
            if entry.strip().lower() in ("full", "none", "null"):
                windows.append(None)
            else:
                window = parse_size(entry, "--attention-pattern")
                windows.append(None if window >= max_seq_len else window)
        return cls(tuple(windows))

    def per_layer(self, n_layers: int, what: str = "attention pattern") -> tuple[int | None, ...]:
        """The pattern repeated over all layers; `what` names it in errors.

        Raises:
            ConfigError: it does not divide the layers, or there are too many.
        """
        if n_layers > MAX_LAYERS:
            raise ConfigError(f"n_layers {n_layers} is more than the {MAX_LAYERS} any model has")
        if n_layers % len(self.windows):
            raise ConfigError(
                f"{what}: its {len(self.windows)} entries do not divide "
                f"the model's {n_layers} layers"
            )
        return self.windows * (n_layers // len(self.windows))

    @classmethod
    def of_layers(cls, windows: tuple[int | None, ...]) -> AttentionPattern:
        """The shortest group that repeats to `windows`."""
        n = len(windows)
        for size in range(1, n + 1):
            if n % size == 0 and windows[:size] * (n // size) == windows:
                return cls(windows[:size])
        return cls(windows)

    def describe(self, max_seq_len: int) -> str:
        """As the model card writes it: `Ragged (128k,32k,32k,32k)`."""
        sizes = ",".join(format_size(w or max_seq_len) for w in self.windows)
        distinct = set(self.windows)
        if len(distinct) > 1:
            return f"Ragged ({sizes})"
        return "Full" if distinct == {None} else f"Sliding window ({sizes})"


@dataclass(frozen=True)
class Quantization:
    """Which linears are quantised, and how.

    Attributes:
        scheme: the same for all of them.
        linears: the quantised modules, by their names in `octavo.model`.
    """

    scheme: Scheme
    linears: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Mistral-family decoder. Sizes are counts of elements or tokens."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads"):
            _positive(name, getattr(self, name))
        _positive("vocab_size", self.vocab_size)
        _positive("max_seq_len", self.max_seq_len)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if not (self.rope_theta > 0 and self.norm_eps > 0):
            raise ConfigError("rope_theta and norm_eps must be positive")
        if len(self.windows) != self.n_layers:
            raise ConfigError(f"{len(self.windows)} windows for {self.n_layers} layers")

    @property
    def attention_pattern(self) -> AttentionPattern:
        return AttentionPattern.of_layers(self.windows)

    def linear_names(self) -> list[str]:
        """Every linear of the model, in the order the data meets them; the head comes last."""
        inner = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")]
        inner += [f"feed_forward.{w}" for w in ("w1", "w3", "w2")]
        names = [f"layers.{i}.{name}" for i in range(self.n_layers) for name in inner]
        return [*names, "output"]

    def n_parameters(self) -> int:
        """Parameters from the shape alone (scales of a quantised checkpoint are not counted)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q + 2 * self.dim * kv
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return self.n_layers * layer + self.dim + embeddings

    def weight_bytes(self, element_size: int = 2) -> int:
        """Bytes of all weights, `element_size` for each that is not quantised."""
        total = self.n_parameters() * element_size
        if self.quantization is not None:
            for name in self.quantization.linears:
                out_features, in_features = self.linear_shape(name)
                total -= out_features * in_features * element_size
                total += self.linear_bytes(name, element_size)
        return total

    def linear_bytes(self, name: str, element_size: int = 2) -> int:
        """Bytes of one linear as it runs, `element_size` for each weight if it is not quantised."""
        out_features, in_features = self.linear_shape(name)
        if self.quantization is not None and name in self.quantization.linears:
            return self.quantization.scheme.weight_bytes(out_features, in_features)
        return out_features * in_features * element_size

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of the linear with this name."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "wq": (q, self.dim),
            "wk": (kv, self.dim),
            "wv": (kv, self.dim),
            "wo": (self.dim, q),
            "w1": (self.hidden_dim, self.dim),
            "w3": (self.hidden_dim, self.dim),
            "w2": (self.dim, self.hidden_dim),
            "output": (self.vocab_size, self.dim),
        }[name.rsplit(".", 1)[-1]]

    def kv_bytes(self, seq_len: int, element_size: int = 2, scale_size: int = 0) -> tuple[int, int]:
        """Bytes of one sequence's keys and values at `seq_len` tokens: (full, windowed layers).

        Args:
            element_size: bytes of an element.
            scale_size: bytes of the scale that each token's key, and value, has in each head.
        """
        token = 2 * self.n_kv_heads * (self.head_dim * element_size + scale_size)
        full = sum(token * seq_len for w in self.windows if w is None)
        windowed = sum(token * min(w, seq_len) for w in self.windows if w is not None)
        return full, windowed


def _positive(name: str, value: object) -> None:
    if type(value) is not int or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}")
