"""One call of attention, as the kernels of prefill and decode take it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels.cuda.early_launch import early_launch
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens

# What products are of, where queries, keys and values agree.
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """How a program goes about its work: rows, keys a step, and Triton's two settings."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionCall:
    """Arguments as in `paged.attention_reference`, all contiguous, and where the result goes."""

    q: Tensor
    out: Tensor
    pages: KVPages
    page_table: Tensor
    query_lens: Lens
    kv_lens: Lens
    window: int | None

    @property
    def n_kv_heads(self) -> int:
        """Key heads."""
        return self.pages.keys.shape[1]

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.q.shape[1] // self.n_kv_heads

    @property
    def operand(self) -> tl.dtype:
        """What floating-point products are of: nothing is rounded to less than it came in."""
        if self.pages.keys.dtype == torch.int8:
            return tl.bfloat16
        return OPERANDS[self.q.dtype] if self.q.dtype == self.pages.keys.dtype else tl.float32

    def arguments(self) -> tuple[Any, ...]:
        """What both kernels begin with: q, out, pages … window, in this order."""
        device = self.q.device
        scale = math.log2(math.e) / math.sqrt(self.q.shape[2])
        return (
            self.q, self.out, self.pages, self.page_table, self.page_table.stride(0),
            self.query_lens.starts(device), self.kv_lens.on(device), scale, self.window,
        )  # fmt: skip

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        """What both kernels are compiled for, and Triton's settings."""
        return {
            "GROUP": self.group,
            "N_KV_HEADS": self.n_kv_heads,
            "HEAD_DIM": self.q.shape[2],
            "PAGE_SIZE": self.pages.page_size,
            "OPERAND": self.operand,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_KEYS": blocks.keys,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            "enable_fp_fusion": True,
            **early_launch(),
        }
