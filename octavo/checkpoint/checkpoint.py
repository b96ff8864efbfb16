"""A checkpoint of either layout, opened: its config and every tensor's place, all checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from octavo.checkpoint import compressed, huggingface, mistral, tensors
from octavo.checkpoint.compressed import ExpectedTensor, expected_tensors
from octavo.checkpoint.ministral import MINISTRAL_8B, is_ministral_8b, with_true_pattern
from octavo.checkpoint.tensors import TensorInfo
from octavo.config import AttentionPattern, ModelConfig
from octavo.device import CPU
from octavo.errors import CheckpointError, ConfigError

FORMATS = ("auto", "mistral", "hf")
_DTYPE_NAMES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}
# Buffers that older exporters wrote beside the weights; they carry nothing.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rope.freqs")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors all have the names, shapes and dtypes that its config asks for.

    Attributes:
        folder: where it lies.
        config: the architecture, with the pattern and quantisation that will run.
        tensors: the place of every tensor, by its name in `octavo.model`.
        interleaved: whether the rows of wq and wk are in Mistral's rotary order.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    interleaved: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point weights: that of the embedding."""
        return tensors.DTYPES[self.tensors["tok_embeddings.weight"].dtype]

    def load(
        self,
        dtype: torch.dtype | str | None = None,
        prefix: str = "",
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """Every tensor by its name in `octavo.model`.

        On a CPU, weights that need no change stay memory-mapped. The others are copied one at a
        time, and the mapping that each was read through is let go before the next. To another
        device they go as they are stored and are changed there: the host has no copy of its own.

        Args:
            dtype: of the floating-point weights; None or "auto" keeps the file's.
            prefix: `layers.3.` loads that layer alone; names stay whole.
            device: where the tensors are to be.
        """
        target = self._target(dtype)
        return {
            name: self._load(name, info, target, device)
            for name, info in self.tensors.items()
            if name.startswith(prefix)
        }

    def stays_mapped(self, name: str, dtype: torch.dtype | str | None = None) -> bool:
        """Whether `load` gives this tensor as it lies in its file; else it reads all of it."""
        stored = tensors.DTYPES[self.tensors[name].dtype]
        floating = stored in _DTYPE_NAMES.values()
        if self._is_scale(name) or (floating and stored != self._target(dtype)):
            return False
        return not self._is_reordered(name)

    def _target(self, dtype: torch.dtype | str | None) -> torch.dtype:
        return self.dtype if dtype in (None, "auto") else parse_dtype(dtype)

    def _is_scale(self, name: str) -> bool:
        return self.config.quantization is not None and name.endswith("_scale")

    def _is_reordered(self, name: str) -> bool:
        return self.interleaved and name.rsplit(".", 2)[-2] in ("wq", "wk")

    def _load(
        self, name: str, info: TensorInfo, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        tensor = info.read().to(device)
        quantization = self.config.quantization
        if quantization is not None and self._is_scale(name):
            tensor = compressed.scale_as_run(tensor, quantization.scheme)
        elif tensor.dtype in _DTYPE_NAMES.values():  # the others are on a grid
            tensor = tensor.to(dtype)
        if self._is_reordered(name):
            tensor = mistral.half_split_from_interleaved(tensor, self.config.head_dim)
        return tensor


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from itself or its usual names. Raises ConfigError for any other."""
    if isinstance(dtype, torch.dtype) and dtype in _DTYPE_NAMES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPE_NAMES:
        return _DTYPE_NAMES[dtype.removeprefix("torch.")]
    raise ConfigError(f"dtype: {dtype!r} is not one of auto, bfloat16, float16, float32")


def read_config(
    folder: Path,
    *,
    config_format: str = "auto",
    load_format: str = "auto",
    attention_pattern: str | None = None,
) -> ModelConfig:
    """The architecture that a folder's files describe; needs no weights.

    Args:
        folder: the checkpoint's folder.
        config_format: `mistral` (params.json), `hf` (config.json), or `auto`: whichever belongs
            to the weights that are there.
        load_format: `mistral` (consolidated…), `hf` (model…), or `auto`: those that are there,
            Mistral's if both are.
        attention_pattern: as in `AttentionPattern.parse`, in place of the checkpoint's own.

    Raises:
        ConfigError, CheckpointError: naming the file and the field at fault.
    """
    config_format, load_format = _choose_formats(folder, config_format, load_format)
    reader = mistral if config_format == "mistral" else huggingface
    config = reader.read_config(folder)
    if attention_pattern is None:
        config = with_true_pattern(config)
    else:
        if is_ministral_8b(config):
            config = replace(config, max_seq_len=MINISTRAL_8B.max_seq_len)
        pattern = AttentionPattern.parse(attention_pattern, config.max_seq_len)
        windows = pattern.per_layer(config.n_layers, "--attention-pattern")
        config = replace(config, windows=windows)
    if load_format == "hf":
        config = replace(config, quantization=compressed.read_quantization(folder, config))
    return config


def open_checkpoint(
    folder: Path,
    *,
    config_format: str = "auto",
    load_format: str = "auto",
    attention_pattern: str | None = None,
) -> Checkpoint:
    """Read a checkpoint's config and headers, and check that they fit. Reads no weights.

    Args and errors as in `read_config`, and CheckpointError for the weights: naming the file and
    tensor.
    """
    config = read_config(
        folder,
        config_format=config_format,
        load_format=load_format,
        attention_pattern=attention_pattern,
    )
    _, load_format = _choose_formats(folder, config_format, load_format)
    stem = mistral.WEIGHTS if load_format == "mistral" else huggingface.WEIGHTS
    stored = tensors.list_tensors(tensors.find_files(folder, stem))
    found = _match(folder, config, stored, hugging_face=load_format == "hf")
    return Checkpoint(folder, config, found, interleaved=load_format == "mistral")


def has_weights(folder: Path) -> bool:
    """Whether the folder has weights in either layout, whole or not."""
    return any(tensors.has_files(folder, m.WEIGHTS) for m in (mistral, huggingface))


def _choose_formats(folder: Path, config_format: str, load_format: str) -> tuple[str, str]:
    """(config_format, load_format) with `auto` decided by what the folder holds."""
    for option, value in (("config_format", config_format), ("load_format", load_format)):
        if value not in FORMATS:
            raise ConfigError(f"{option}: {value!r} is not one of {', '.join(FORMATS)}")
    has_params = (folder / mistral.PARAMS).is_file()
    has_config = (folder / huggingface.CONFIG).is_file()
    if not has_config and tensors.is_unfinished_quantisation(folder):
        raise CheckpointError(
            f"{folder}: an unfinished quantisation; "
            "run the same `octavo quantize` command again, and it goes on"
        )
    if config_format == "auto" and not (has_params or has_config):
        raise ConfigError(
            f"{folder}: no model here, neither {mistral.PARAMS} nor {huggingface.CONFIG}"
        )
    has_mistral_weights = tensors.has_files(folder, mistral.WEIGHTS)
    has_hf_weights = tensors.has_files(folder, huggingface.WEIGHTS)
    if config_format == "auto":
        # A config that lies with its own weights speaks for them.
        params_speak = has_mistral_weights or not (has_config and has_hf_weights)
        config_format = "mistral" if has_params and params_speak else "hf"
        if not has_config:
            config_format = "mistral"
    file = mistral.PARAMS if config_format == "mistral" else huggingface.CONFIG
    if not (folder / file).is_file():
        raise ConfigError(
            f"{folder}: config_format {config_format} reads {file}, which is not there; try auto"
        )
    if load_format == "auto":
        load_format = config_format
        if has_mistral_weights != has_hf_weights:
            load_format = "mistral" if has_mistral_weights else "hf"
    return config_format, load_format


def _expected(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """Every tensor that the model needs, by its name."""

    def floats(*shape: int) -> ExpectedTensor:
        return ExpectedTensor((shape,), compressed.FLOATS)

    expected = {
        "tok_embeddings.weight": floats(config.vocab_size, config.dim),
        "norm.weight": floats(config.dim),
    }
    for i in range(config.n_layers):
        expected[f"layers.{i}.attention_norm.weight"] = floats(config.dim)
        expected[f"layers.{i}.ffn_norm.weight"] = floats(config.dim)
    for name in config.linear_names():
        if name == "output" and config.tied_embeddings:
            continue
        shape = config.linear_shape(name)
        if config.quantization is not None and name in config.quantization.linears:
            linear = expected_tensors(config.quantization.scheme, *shape)
            expected |= {f"{name}.{kind}": tensor for kind, tensor in linear.items()}
        else:
            expected[f"{name}.weight"] = floats(*shape)
    return expected


def _match(
    folder: Path, config: ModelConfig, stored: dict[str, TensorInfo], hugging_face: bool
) -> dict[str, TensorInfo]:
    """Find each expected tensor among those stored; every mismatch is an error."""
    found: dict[str, TensorInfo] = {}
    remaining = dict(stored)
    for name, expected in _expected(config).items():
        module, kind = name.rsplit(".", 1)
        stored_name = f"{huggingface.module_name(module)}.{kind}" if hugging_face else name
        info = remaining.pop(stored_name, None)
        if info is None:
            raise CheckpointError(f"{folder}: the tensor {stored_name} is missing")
        _require(info, expected)
        if kind == "weight_shape":  # says once more what the config says; the model needs it not
            _require_weight_shape(info, config.linear_shape(module))
        else:
            found[name] = info
    if config.tied_embeddings:  # some exporters write the shared matrix twice
        remaining.pop("lm_head.weight" if hugging_face else "output.weight", None)
    for info in remaining.values():
        if not info.name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(
                f"{info.file}: the tensor {info.name} is not part of this model; "
                "is the config the one that belongs to these weights?"
            )
    return found


def _require(info: TensorInfo, expected: ExpectedTensor) -> None:
    if info.shape not in expected.shapes:
        raise CheckpointError(
            f"{info.file}: the tensor {info.name} has shape {list(info.shape)}, "
            f"the config asks for {list(expected.shapes[0])}"
        )
    if info.dtype not in expected.dtypes:
        raise CheckpointError(
            f"{info.file}: the tensor {info.name} has dtype {info.dtype}, "
            f"expected {' or '.join(sorted(expected.dtypes))}"
        )


def _require_weight_shape(info: TensorInfo, shape: tuple[int, int]) -> None:
    stored = info.read().tolist()
    if stored != list(shape):
        raise CheckpointError(
            f"{info.file}: the tensor {info.name} holds {stored}, the config asks for {list(shape)}"
        )
