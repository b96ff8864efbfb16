"""What is measured: the options of `octavo bench`, checked."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError


@dataclass(frozen=True)
class BenchSettings:
    """One measurement.

    Attributes:
        shape: the architecture's name, as `find_shape` takes it.
        layers: how many of its layers; None takes all.
        scheme: `w8a8` or `bf16`, of all linears but the head.
        head: `bf16` or `int8`.
        kv: the KV cache's dtype, as `Transformer.new_caches` takes it.
        prompt: tokens of each sequence's prompt.
        decode: tokens that are then generated for each, one a step.
        batch: sequences at once.
        context: tokens that each holds before its prompt, random keys and values.
        chunk: most tokens of one forward pass over the prompts.
        rounds: times that the prompts are read, of which the fastest counts; the first is cold.
        threads: None takes PyTorch's own number.
        device: as `choose_device` takes it.
        seed: of weights, tokens, keys and values.

    Raises:
        ConfigError: a number that is too small, naming its flag.
    """

    shape: str = "ministral-8b"
    layers: int | None = None
    scheme: str = "w8a8"
    head: str = "bf16"
    kv: str = "auto"
    prompt: int = 512
    decode: int = 32
    batch: int = 1
    context: int = 0
    chunk: int = 1024
    rounds: int = 2
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "decode", "batch", "chunk", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: {value} is not a positive number")
        if self.context < 0:
            raise ConfigError(f"--context: {self.context} is not a number of tokens")

    @property
    def length(self) -> int:
        """Tokens of each sequence at the end."""
        return self.context + self.prompt + self.decode
