"""`octavo.quantize(...)`: a published checkpoint in, one in 8 bits (or 4) out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from octavo import kernels
from octavo.checkpoint import Checkpoint, open_checkpoint, resolve_model, writer
from octavo.checkpoint.checkpoint import parse_dtype
from octavo.config import parse_bytes
from octavo.device import choose_device, current
from octavo.engine.generate import generate
from octavo.errors import ConfigError, QuantizeError, is_out_of_memory
from octavo.model.streamed import streamed_transformer
from octavo.quantize.calibration import read_samples
from octavo.quantize.journal import FILE as JOURNAL
from octavo.quantize.journal import Journal
from octavo.quantize.recipe import Recipe
from octavo.quantize.report import Report
from octavo.quantize.streaming import OnProgress, StreamingQuantizer
from octavo.schemes import find_scheme
from octavo.tokenizer import Tokenizer
from octavo.version import __version__

SAMPLE_TOKENS = 100
LOCK = ".lock"


def quantize(
    model_id: str | Path,
    *,
    dataset_id: str | Path | None = None,
    dataset_split: str = "train",
    num_calibration_samples: int = 1024,
    max_sequence_length: int = 4096,
    scheme: str = "W8A8",
    output_dir: str | Path | None = None,
    ignore: Sequence[str] = ("lm_head",),
    smoothing_strength: float | None = 0.8,
    dampening_frac: float = 0.1,
    rounding: Literal["gptq", "nearest"] = "gptq",
    clipping: bool = True,
    inner_smoothing: bool = True,
    sample_prompt: str | None = "Hello my name is",
    tokenizer: str | Path | None = None,
    attention_pattern: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    max_memory: int | str = "8G",
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """Quantise a model with SmoothQuant and GPTQ, one layer in memory at a time.

    A run that is killed leaves `OUTPUT_DIR.unfinished`; the same call goes on from there, and gives
    the same bytes.

    Args:
        model_id: a folder, a hub id, or `demo`; in floating point.
        dataset_id: texts to calibrate on: a hub id, or a JSONL file of `messages` (and `tools`) or
            `text`. None takes the model's own `calibration.jsonl` if it brings one, else
            neuralmagic/LLM_compression_calibration.
        dataset_split: of the hub's dataset.
        num_calibration_samples: texts.
        max_sequence_length: tokens of one text; the rest is cut off.
        scheme: W8A8, W4A16, W4A8, FP8 or FP8_DYNAMIC.
        output_dir: the folder to make; None is MODEL_ID-SCHEME.
        ignore: linears that stay in floating point, by their Hugging Face names or `re:` and a
            pattern; none quantises the head too.
        smoothing_strength: SmoothQuant's alpha, 0 to 1; None leaves smoothing out.
        dampening_frac: GPTQ's dampening, of the Hessian's mean diagonal.
        rounding: `gptq`, or `nearest` for plain rounding.
        clipping: look for scales that cut off a row's largest weights where that lessens the error.
        inner_smoothing: smooth the inputs of o_proj and down_proj too.
        sample_prompt: a text that the quantised model goes on with at the end; None for none.
        tokenizer: a tokenizer file, in place of the model's own.
        attention_pattern: such as `128k,32k,32k,32k`, in place of the model's own.
        device: `auto`, `cpu`, `cuda` or `cuda:1`, where layers are computed.
        dtype: of the computation; `auto` is the checkpoint's where the processor is fast in it,
            else float32. The output has the checkpoint's, whatever this is.
        max_memory: bytes the process may take, or a text such as `8G`; activations past it are
            left on disk. On a GPU its memory and the host's may each take as much.
        on_progress: called with the steps done, parts of one included, and how many there are:
            the embedding, each layer, the head.

    Returns:
        What it cost and gained; also in the folder, as report.json and error_by_layer.png.

    Raises:
        OctavoError: in one line, what is wrong and what to do.
    """
    chosen = find_scheme(scheme)
    recipe = Recipe(
        chosen,
        tuple(ignore),
        smoothing_strength,
        dampening_frac,
        rounding,
        clipping,
        inner_smoothing,
    )
    budget = parse_bytes(max_memory, "max_memory")
    where = choose_device(device)
    source = resolve_model(model_id)
    checkpoint = open_checkpoint(source, attention_pattern=attention_pattern)
    if checkpoint.config.quantization is not None:
        raise ConfigError(
            f"{source}: is quantised already ({checkpoint.config.quantization.scheme.name}); "
            "give the original"
        )
    writer.require_expressible(checkpoint.config)
    recipe.quantization(checkpoint.config)
    computed_in = _compute_dtype(dtype, checkpoint.dtype, where)
    output = Path(output_dir or f"{str(model_id).rstrip('/')}-{chosen.name}")
    _require_free(output)
    encoder = Tokenizer.for_model(source, checkpoint.config, tokenizer)
    prompt = None if sample_prompt is None else encoder.encode(sample_prompt)
    if prompt is not None and len(prompt) + SAMPLE_TOKENS > checkpoint.config.max_seq_len:
        raise ConfigError(
            f"sample_prompt: its {len(prompt)} tokens and {SAMPLE_TOKENS} more do not fit the "
            f"model's context of {checkpoint.config.max_seq_len}"
        )
    samples = read_samples(
        source,
        encoder,
        dataset_id=None if dataset_id is None else str(dataset_id),
        dataset_split=dataset_split,
        num_samples=num_calibration_samples,
        max_length=min(max_sequence_length, checkpoint.config.max_seq_len),
    )
    settings = recipe.settings() | {
        "num_calibration_samples": num_calibration_samples,
        "max_sequence_length": max_sequence_length,
        "attention_pattern": list(checkpoint.config.attention_pattern.windows),
        "dtype": str(computed_in).removeprefix("torch."),
        "device": where.type,
        "octavo": __version__,
    }
    inputs = {"model": _fingerprint(checkpoint), "samples": samples.digest()}
    unfinished = output.with_name(f"{output.name}.unfinished")
    with _working_in(unfinished):
        _require_free(output)  # again: the process that held the folder until now may have made it
        journal = Journal.open(unfinished, settings | inputs)
        run = StreamingQuantizer(
            checkpoint,
            recipe,
            samples,
            unfinished,
            journal,
            dtype=computed_in,
            device=where,
            max_memory=budget,
            on_progress=on_progress,
        )
        with current(where):
            run.run()
        if _fingerprint(checkpoint) != inputs["model"]:
            raise QuantizeError(f"{source}: changed while it was read; start again")
        bytes_quantized = _complete(run, encoder)
        sample = "" if prompt is None else _continue(unfinished, encoder, prompt)
        journal.save()  # the peak of memory
        assert journal.divergence is not None
        report = Report(
            folder=output,
            settings=settings,
            source=samples.source,
            calibration_tokens=sum(map(len, samples.calibration)),
            held_out_tokens=sum(map(len, samples.held_out)),
            kl=journal.divergence.kl,
            perplexity_original=journal.divergence.perplexity_reference,
            perplexity_quantized=journal.divergence.perplexity,
            bytes_original=sum(info.n_bytes for info in checkpoint.tensors.values()),
            bytes_quantized=bytes_quantized,
            seconds=journal.seconds,
            peak_rss_bytes=journal.peak_rss_bytes,
            linears=journal.linears,
            notes=samples.notes,
            sample=sample,
        )
        report.write(unfinished)
        run.delete_activations()
        _rename(unfinished, output)  # still held: nobody may go on with what is whole
        for name in (JOURNAL, LOCK):  # until here, a killed run could go on
            (output / name).unlink()
    return report


def _complete(run: StreamingQuantizer, tokenizer: Tokenizer) -> int:
    """Make a model of the shards: tokenizer, index and configs. Gives the bytes of its tensors."""
    checkpoint, folder = run.checkpoint, run.folder
    writer.copy_tokenizer(checkpoint.folder, folder, tokenizer.path)
    n_bytes = writer.write_index(folder)
    special_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    writer.write_config(folder, run.config, checkpoint.dtype, run.recipe.ignore, special_ids)
    return n_bytes


def _compute_dtype(
    dtype: torch.dtype | str, stored: torch.dtype, device: torch.device
) -> torch.dtype:
    """What layers are computed in; a CPU without bfloat16 is several times faster in float32."""
    if dtype != "auto":
        return parse_dtype(dtype)
    if device.type == "cpu" and not (stored == torch.bfloat16 and kernels.multiplies_bfloat16()):
        return torch.float32
    return stored


def _fingerprint(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of every file with weights: hashing 16 GB would take longer than a layer."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    found = {file.name: file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _require_free(output: Path) -> None:
    """An empty folder may be taken."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise QuantizeError(f"{output}: exists already; remove it or give another --output_dir")


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Make and hold the folder of an unfinished quantisation; explain what the system refuses.

    A run that finishes no step takes away the folder that it made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK).acquire(timeout=0):
            try:
                yield
            except BaseException:
                if is_new and not (folder / JOURNAL).exists():
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except Timeout:
        raise QuantizeError(f"{folder}: another process is quantising into it") from None
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise QuantizeError(
                f"{folder}: the disk is full; free some room and run the same command again: "
                "it goes on from the last finished layer"
            ) from None
        raise QuantizeError(f"{folder}: cannot be written: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise QuantizeError(
            f"{folder}: out of memory; run the same command again with a smaller --max_memory or "
            "--max_sequence_length: it goes on from the last finished layer"
        ) from None


def _rename(unfinished: Path, output: Path) -> None:
    """Give the folder its name: from here on it is whole."""
    try:
        if output.is_dir():  # it was empty when this began
            output.rmdir()
        unfinished.rename(output)
    except OSError as error:
        raise QuantizeError(
            f"{unfinished}: is whole, but cannot be renamed to {output.name}: {error.strerror}"
        ) from None


def _continue(folder: Path, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The sample prompt as the quantised model goes on with it, greedily."""
    model = streamed_transformer(open_checkpoint(folder))
    [answer], _ = generate(
        [prompt], model, max_tokens=SAMPLE_TOKENS, temperature=0, eos_id=tokenizer.eos_id
    )
    return tokenizer.decode([*prompt, *answer])
