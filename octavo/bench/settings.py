"""What is measured: the options of `octavo bench`, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass

from octavo.errors import ConfigError

THREADS_PER_CPU = 4  # more only wait for each other, and many more end OpenMP with a crash


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
        ConfigError: a number out of range, naming its flag.
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
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        if self.threads is not None and self.threads > most:
            raise ConfigError(
                f"--threads: {self.threads} is too many for this machine's {os.cpu_count()} CPUs; "
                f"give at most {most}"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"--seed: {self.seed} does not fit in 64 bits")

    @property
    def length(self) -> int:
        """Tokens of each sequence at the end."""
        return self.context + self.prompt + self.decode
