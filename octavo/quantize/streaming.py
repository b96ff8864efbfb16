"""A whole model, quantised a layer at a time: read, quantised, written, let go.

Two streams of activations go along: that of all samples through the quantised layers, and that of
the held-out ones through the original layers, to measure by at the end. Each layer reads one pair
of files and writes another, and only a finished layer is entered in the journal: a run that is
killed goes on from the last one, with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.checkpoint import Checkpoint
from octavo.checkpoint.writer import shard_name, write_shard
from octavo.errors import CheckpointError, QuantizeError
from octavo.evaluate.divergence import Divergence
from octavo.model.linear import Linear
from octavo.model.rope import rotary_angles
from octavo.model.streamed import load_layer
from octavo.model.transformer import RMSNorm, Stream
from octavo.quantize.activations import Activations, Chunk, make_chunks
from octavo.quantize.calibration import Samples
from octavo.quantize.journal import Journal
from octavo.quantize.layer import PASSES_ALL, PASSES_CALIBRATION, quantize_layer
from octavo.quantize.linears import LinearQuantizer
from octavo.quantize.memory import HEAD_ROWS, LOGIT_ROWS, plan
from octavo.quantize.recipe import Recipe

OnProgress = Callable[[float, int], None]


class StreamingQuantizer:
    """Quantises a checkpoint into a folder, step by step.

    The steps are the embedding (copied), each layer, and norm and head, one shard each.

    Args:
        checkpoint: the original.
        recipe: what to do.
        samples: the texts.
        folder: where the shards, the activations and the journal go; it exists.
        journal: of that folder.
        dtype: of the computation.
        device: where layers are computed.
        max_memory: bytes that may be resident, and as many on the device.
        on_progress: called with the steps done, parts of one included, and how many there are.

    Raises:
        ConfigError: the recipe does not fit the model, or the model not the memory.
        QuantizeError: activations of a run that was stopped are gone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        samples: Samples,
        folder: Path,
        journal: Journal,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_memory: int,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.samples = samples
        self.folder = folder
        self.journal = journal
        self.dtype = dtype
        self.device = device
        self.on_progress = on_progress
        self.config = replace(
            checkpoint.config, quantization=recipe.quantization(checkpoint.config)
        )
        self.n_steps = self.config.n_layers + 2
        self.calibration = make_chunks([len(ids) for ids in samples.calibration])
        self.n_calibration = sum(chunk.n_tokens for chunk in self.calibration)
        self.held_out = make_chunks([len(ids) for ids in samples.held_out], self.n_calibration)
        self.n_tokens = self.held_out[-1].rows.stop
        longest = max(chunk.n_tokens for chunk in [*self.calibration, *self.held_out])
        row_bytes = self.config.dim * dtype.itemsize
        self.resident, self.room = plan(
            self.config,
            dtype,
            longest,
            2 * row_bytes * (2 * self.n_tokens - self.n_calibration),
            max_memory,
            device,
        )
        # A layer reads one pair and writes the other.
        self.streams = [self._open_streams(0), self._open_streams(1)]

    @torch.inference_mode()
    def run(self) -> None:
        """Do every step that is not done yet.

        Raises:
            OSError: the disk is full, or cannot be written.
            CheckpointError: weights or activations that are not finite.
        """
        for step in range(self.journal.steps_done, self.n_steps):
            started = time.perf_counter()
            self.on_progress(step, self.n_steps)
            if step == 0:
                tensors = self._embed()
            elif step <= self.config.n_layers:
                tensors = self._quantize_layer(step - 1)
            else:
                tensors = self._quantize_head()
            write_shard(self.folder / shard_name(step + 1, self.n_steps), tensors)
            self.journal.steps_done = step + 1
            self.journal.seconds += time.perf_counter() - started
            self.journal.save()
        self.on_progress(self.n_steps, self.n_steps)

    def delete_activations(self) -> None:
        """Remove all activations."""
        for streams in self.streams:
            for stream in streams:
                stream.delete()

    def _embed(self) -> dict[str, Tensor]:
        """The embedding as it is, and the residual streams that leave it."""
        [(name, embedding)] = self._load("tok_embeddings.").items()
        streams, originals = self.streams[0]
        ids = [*self.samples.calibration, *self.samples.held_out]
        tokens = torch.tensor([token for sequence in ids for token in sequence])
        for chunk in [*self.calibration, *self.held_out]:
            streams.write(chunk.rows, embedding[tokens[chunk.rows]].to(self.dtype))
        for chunk in self.held_out:
            originals.write(self._own_rows(chunk), embedding[tokens[chunk.rows]].to(self.dtype))
        streams.flush()
        originals.flush()
        return {name: embedding}

    def _quantize_layer(self, index: int) -> dict[str, Tensor]:
        """What goes to disk of one layer; all samples go through it."""
        source, source_original = self.streams[index % 2]
        target, target_original = self.streams[1 - index % 2]
        quantizer = self._quantizer(
            index + 1, PASSES_CALIBRATION * self.n_calibration + PASSES_ALL * self.n_tokens
        )
        self._require_finite(f"layers.{index}.")
        layer = load_layer(self.checkpoint, index, self.dtype).to(self.device)
        for chunk in self.held_out:
            rows = self._own_rows(chunk)
            stream = Stream(source_original.read(rows).to(self.device))
            layer(stream, self._angles(chunk), chunk.seqlens, None)
            target_original.write(rows, stream.total())
        quantize_layer(
            layer,
            index,
            quantizer,
            source,
            target,
            [*self.calibration, *self.held_out],
            self._angles,
            self.room,
        )
        target.flush()
        target_original.flush()
        self.journal.linears += quantizer.reports
        return quantizer.to_disk()

    def _quantize_head(self) -> dict[str, Tensor]:
        """What goes to disk of norm and head; measures the divergence on the held-out samples."""
        streams, originals = self.streams[self.config.n_layers % 2]
        [(name, weight)] = self._load("norm.").items()
        norm = RMSNorm(self.config.dim, self.config.norm_eps)
        norm.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        norm = norm.to(self.device)
        tied = self.config.tied_embeddings
        [head_weight] = self._load("tok_embeddings." if tied else "output.").values()
        original = Linear.of(head_weight.to(self.device))
        heads = nn.ModuleDict({"output": original})
        tensors = {name: weight}
        if not tied:
            quantizer = self._quantizer(self.n_steps - 1, self.n_calibration)
            quantizer.quantize(
                heads, ("output",), "", lambda chunk: norm(streams.read(chunk.rows).to(self.device))
            )
            tensors |= quantizer.to_disk()
            self.journal.linears += quantizer.reports
        divergence = Divergence()
        start = 0
        for ids in self.samples.held_out:
            targets = torch.tensor(ids[1:], device=self.device)
            for low in range(0, len(ids), LOGIT_ROWS):
                high = min(low + LOGIT_ROWS, len(ids))
                rows = slice(start + low, start + high)
                after = slice(rows.start + self.n_calibration, rows.stop + self.n_calibration)
                divergence.add(
                    _logits(original, norm(originals.read(rows).to(self.device))),
                    _logits(heads["output"], norm(streams.read(after).to(self.device))),
                    targets[low:high],
                )
            start += len(ids)
        self.journal.divergence = divergence
        return tensors

    def _quantizer(self, step: int, total: int) -> LinearQuantizer:
        """A quantizer that reports its progress; `total` tokens pass in this step."""
        done = 0

        def tick(n_tokens: int) -> None:
            nonlocal done
            done += n_tokens
            self.on_progress(step + min(done / total, 0.999), self.n_steps)

        return LinearQuantizer(
            self.config,
            self.recipe,
            self.checkpoint.dtype,
            self.calibration,
            self.held_out,
            tick,
        )

    def _open_streams(self, number: int) -> tuple[Activations, Activations]:
        """A pair of files: all samples' activations, and the held-out ones' original."""
        n_held_out = self.n_tokens - self.n_calibration
        streams = self._open("activations", number, self.n_tokens)
        return streams, self._open("original", number, n_held_out)

    def _open(self, name: str, number: int, n_rows: int) -> Activations:
        """One file; that of a run that goes on must be there, since a new one would be zeros."""
        path = self.folder / f"{name}-{number}.bin"
        n_bytes = n_rows * self.config.dim * self.dtype.itemsize
        goes_on = 0 < self.journal.steps_done < self.n_steps
        if goes_on and not (path.is_file() and path.stat().st_size == n_bytes):
            raise QuantizeError(
                f"{path}: is missing or damaged; remove {self.folder} and start again"
            )
        return Activations(path, n_rows, self.config.dim, self.dtype, self.resident)

    def _own_rows(self, chunk: Chunk) -> slice:
        """Where a held-out chunk lies in the stream that holds nothing else."""
        return slice(chunk.rows.start - self.n_calibration, chunk.rows.stop - self.n_calibration)

    def _angles(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """cos and sin of the chunk's positions; each sequence starts at 0."""
        positions = torch.cat([torch.arange(n, device=self.device) for n in chunk.seqlens])
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

    def _load(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of the original, as they are on disk, all of them finite."""
        self._require_finite(prefix)
        return self.checkpoint.load(None, prefix)

    def _require_finite(self, prefix: str) -> None:
        for name in self.checkpoint.tensors:
            if not name.startswith(prefix):
                continue
            for tensor in self.checkpoint.load(None, name).values():
                # A sum is not finite if one summand is not: no mask as large as the tensor.
                if not bool(tensor.sum(dtype=torch.float32).isfinite()):
                    info = self.checkpoint.tensors[name]
                    raise CheckpointError(
                        f"{info.file}: the tensor {info.name} holds NaN or infinity; "
                        "download it again"
                    )


def _logits(head: nn.Module, x: Tensor) -> Tensor:
    """[T, dim] to fp32 [T, vocab_size].

    The head stays in its file's dtype, and is brought to x's a block of rows at a time: in fp32, an
    8B model's would take 2 GB.
    """
    if not isinstance(head, Linear):
        return head(x).float()
    blocks = head.weight.split(HEAD_ROWS)
    return torch.cat([F.linear(x, block.to(x.dtype)) for block in blocks], dim=-1).float()
