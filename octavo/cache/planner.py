"""From a memory budget to the sequences and tokens that fit, before any of it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from octavo import kernels
from octavo.cache.layout import CacheLayout
from octavo.config import ModelConfig, format_bytes
from octavo.device import CPU
from octavo.errors import ConfigError

SHARE_OF_FREE = 0.9  # of the free memory that is taken by default
RUNTIME_BYTES = 400 * 2**20  # Python, PyTorch, their thread pools, the tokenizer
# On a GPU: CUDA's context, kernels and cuBLAS's workspaces, what lies idle between the allocator's
# blocks. An estimate.
DEVICE_RUNTIME_BYTES = 768 * 2**20
FP32 = 4
LOGPROB_ROWS = 64  # prompt rows whose [rows, vocab] log-probabilities are in memory at a time
# Of each logit of a step that is sampled on a GPU: itself, as given and as a weight (12), sorted
# with its place (12) and the sort's second copy of both, in whose room probabilities and their
# sums are later (12). Bytes.
LOGIT_BYTES = 36
_CGROUP = Path("/sys/fs/cgroup")

logger = logging.getLogger("octavo")


@dataclass(frozen=True)
class CachePlan:
    """How a memory budget is shared out.

    Attributes:
        layout: of the cache.
        memory: the whole budget in bytes.
        weight_bytes, working_bytes: what of it weights, and one forward pass, take.
        n_pages: what is left, in pages.
        max_model_len: tokens of the longest sequence.
        max_num_seqs: answers in the making at once.
        chunk: tokens of one forward pass.
    """

    layout: CacheLayout
    memory: int
    weight_bytes: int
    working_bytes: int
    n_pages: int
    max_model_len: int
    max_num_seqs: int
    chunk: int

    @property
    def cache_bytes(self) -> int:
        return self.n_pages * self.layout.page_bytes

    def n_sequences(self, n_tokens: int) -> int:
        """How many sequences of this length fit at once."""
        return self.n_pages // self.layout.pages_needed(n_tokens, self.chunk)

    def longest(self, n_sequences: int) -> int:
        """Tokens of each of `n_sequences` that fit at once, at most max_model_len."""
        share = self.n_pages // n_sequences
        return min(self.max_model_len, longest_fitting(self.layout, share, self.chunk))

    def describe(self) -> str:
        """What fits, in a line."""
        whole = self.n_sequences(self.max_model_len)
        together = min(whole, self.max_num_seqs)
        fits = f"{together} x {self.max_model_len:,} tokens"
        if whole < self.max_num_seqs:
            fits += f", or {self.max_num_seqs} x {self.longest(self.max_num_seqs):,}"
        return (
            f"memory {format_bytes(self.memory)}: weights {format_bytes(self.weight_bytes)}, "
            f"working memory {format_bytes(self.working_bytes)}, "
            f"KV cache {format_bytes(self.cache_bytes)} in {self.n_pages:,} "
            f"pages of {str(self.layout.dtype).removeprefix('torch.')}; at once fit {fits}"
        )


def plan_cache(
    config: ModelConfig,
    layout: CacheLayout,
    *,
    memory: int,
    weight_bytes: int,
    max_model_len: int | None,
    max_num_seqs: int,
    chunk: int,
    device: torch.device = CPU,
    decode_bytes: int = 0,
) -> CachePlan:
    """Share out a memory budget.

    Args:
        config: the model's.
        layout: of the cache.
        memory: bytes for weights, working memory and cache together.
        weight_bytes: of the weights as they run.
        max_model_len: tokens of one sequence that must fit; None takes the model's context, or as
            much of it as fits.
        max_num_seqs: answers in the making at once.
        chunk: tokens of one forward pass.
        device: whose memory it is.
        decode_bytes: of working memory that replayed steps keep to themselves.

    Raises:
        ConfigError: not even the weights fit, or no sequence of max_model_len; with the figures
            that would.
    """
    working = working_bytes(config, max_num_seqs, chunk, device, layout.dtype) + decode_bytes
    fixed = weight_bytes + working
    wanted = max_model_len or config.max_seq_len
    needed = layout.pages_needed(wanted, min(chunk, wanted))
    enough = format_bytes(fixed + needed * layout.page_bytes, up=True)
    n_pages = (memory - fixed) // layout.page_bytes
    longest = longest_fitting(layout, n_pages, chunk)
    if longest == 0:
        raise ConfigError(
            f"memory: {format_bytes(memory)} is too little: weights take "
            f"{format_bytes(weight_bytes)}, a pass of {chunk:,} tokens {format_bytes(working)}; "
            f"for {wanted:,} tokens of context give {enough}"
        )
    if max_model_len is not None and longest < max_model_len:
        raise ConfigError(
            f"max_model_len: {max_model_len:,} tokens do not fit in {format_bytes(memory)} of "
            f"memory; {longest:,} do, or give {enough} (--memory)"
        )
    if longest < wanted:
        logger.warning(
            "octavo: %s of memory hold %s tokens of context, not the whole %s; give %s (--memory)",
            format_bytes(memory),
            f"{longest:,}",
            f"{wanted:,}",
            enough,
        )
    return CachePlan(
        layout, memory, weight_bytes, working, n_pages, min(wanted, longest), max_num_seqs, chunk
    )


def longest_fitting(layout: CacheLayout, n_pages: int, chunk: int) -> int:
    """Tokens of the longest sequence that fits into `n_pages`; 0 if there is none."""
    low, high = 0, max(n_pages, 0) * layout.page_size
    while low < high:
        middle = (low + high + 1) // 2
        if layout.pages_needed(middle, min(chunk, middle)) <= n_pages:
            low = middle
        else:
            high = middle - 1
    return low


def working_bytes(
    config: ModelConfig,
    max_num_seqs: int,
    chunk: int,
    device: torch.device = CPU,
    kept: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes beside weights and cache: the program, and one forward pass; an upper estimate.

    What the program takes of the host's memory counts where the model runs there.

    Args:
        kept: of keys and values.
    """
    attention = kernels.attention_bytes(device, kept)
    if device.type == "cpu":
        runtime, per_word = RUNTIME_BYTES, 4 * max_num_seqs * FP32
    else:
        runtime, per_word = DEVICE_RUNTIME_BYTES, max(max_num_seqs, LOGPROB_ROWS) * LOGIT_BYTES
    logits = per_word * config.vocab_size
    return runtime + activation_bytes(config, chunk) + logits + attention


def activation_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Bytes of what the layers make of so many tokens in one pass, at its fullest moment.

    That is the gate in PyTorch's own operators and fp32. A W8A8 linear whose sums are stored in
    int32 before they are scaled takes less: 4 bytes an output beside 2 a number of three results.
    """
    widest = max(config.hidden_dim, config.n_heads * config.head_dim, config.dim)
    return n_tokens * (6 * widest + 4 * config.dim) * FP32


def check_budget(memory: int, device: torch.device) -> None:
    """Refuse a budget that a GPU does not have. Of a CPU's, weights may be mapped, and swap counts.

    Raises:
        ConfigError: naming what was asked and what is free.
    """
    if device.type == "cuda" and memory > (free := free_bytes(device)):
        raise ConfigError(
            f"memory: {format_bytes(memory)} are more than the {format_bytes(free)} that are free "
            f"on {device}; give less (--memory), or end what else runs there"
        )


def default_memory(device: torch.device = CPU) -> int:
    """The budget where none was given: most of what is free."""
    return int(free_bytes(device) * SHARE_OF_FREE)


def free_bytes(device: torch.device = CPU) -> int:
    """Memory that can be had: on a CPU without swapping, within the limit of a container."""
    if device.type == "cuda":
        # What PyTorch's allocator keeps for later is not free to others, and is to this process.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit here
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used + _file_bytes()))


def _file_bytes() -> int:
    """Of a container's used memory, what files fill: the system takes it back when it is needed."""
    try:
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0
