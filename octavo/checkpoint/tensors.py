"""The tensors of a folder's safetensors files: what is there, memory-mapped, checked first."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.checkpoint.json_file import JsonObject
from octavo.errors import CheckpointError

UNFINISHED = Path(".cache") / "octavo"  # where a download into a folder keeps its parts
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its file's header says of it.

    Attributes:
        file: which.
        name: in that file.
        shape: of the tensor.
        dtype: safetensors' name of it.
        offset: of its first byte in the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """The tensor, memory-mapped: its pages are read when they are used."""
        with _open(self.file) as file:
            return file.get_tensor(self.name)


def find_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one layout: `stem.safetensors`, or all shards of `stem-…`.

    Raises:
        CheckpointError: no weights, pickled weights only, or a shard missing.
    """
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = JsonObject(index).values.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: the field weight_map is missing or empty")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder:
                raise CheckpointError(f"{index}: {file.name!r} lies outside the folder")
            if not file.is_file():
                raise CheckpointError(f"{folder}: the shard {file.name} is missing")
        return files
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if shards:
        _require_all(folder, shards)
        return shards
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds pickled weights ({pickles[0]}) and no {stem}.safetensors; octavo "
            "never unpickles (it would run code from the file): convert them to safetensors"
        )
    if any((folder / UNFINISHED).glob("*.part")):
        raise CheckpointError(
            f"{folder}: its download is unfinished; run `octavo download` again, and it goes on"
        )
    raise CheckpointError(f"{folder}: no weights, neither {stem}.safetensors nor its shards")


def has_files(folder: Path, stem: str) -> bool:
    """Whether the folder has weights in this layout, whole or not."""
    return any(folder.glob(f"{stem}.safetensors*")) or any(
        folder.glob(f"{stem}-*-of-*.safetensors")
    )


def is_unfinished_quantisation(folder: Path) -> bool:
    """Whether `octavo quantize` was stopped while it wrote this folder."""
    return folder.suffix == ".unfinished" and (folder / "progress.json").is_file()


def list_tensors(files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor in the files, by name, from their headers alone.

    Raises:
        CheckpointError: a truncated or corrupt file, or a tensor that two files hold.
    """
    found: dict[str, TensorInfo] = {}
    for path in files:
        with _open(path) as file:
            offsets = _offsets(path)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in found:
                    raise CheckpointError(
                        f"{path}: the tensor {name} is also in {found[name].file.name}"
                    )
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                found[name] = TensorInfo(path, name, shape, view.get_dtype(), offsets[name])
    return found


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a file that safetensors opens begins, which it does not tell."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    try:
        return {name: 8 + size + fields["data_offsets"][0] for name, fields in header.items()}
    except TypeError:  # safetensors takes a list of the fields too, and never writes one
        raise CheckpointError(f"{path}: {_corrupt_header(path)}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_diagnose(path)} ({error})") from None


def _diagnose(path: Path) -> str:
    """What is wrong with a file that safetensors does not open."""
    if not path.is_file():
        return "is gone"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            return "a Git LFS pointer and not the weights; run `git lfs pull`"
        header_size = int.from_bytes(head, "little")
        if size < 8 or 8 + header_size > size:
            return (
                "truncated or not a safetensors file: its header does not fit "
                f"{size} bytes; {_remedy(path)}"
            )
        try:
            header = json.loads(file.read(header_size))
            ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
            expected = 8 + header_size + max(ends)
        except Exception:  # a header of another form surfaces as whatever this makes of it
            return _corrupt_header(path)
    if expected > size:
        return f"truncated: {size} bytes of {expected}; {_remedy(path)}"
    return f"corrupt: header and data disagree; {_remedy(path)}"


def _corrupt_header(path: Path) -> str:
    return f"corrupt: its header is not what safetensors writes; {_remedy(path)}"


def _remedy(path: Path) -> str:
    """What to do about a damaged file: a shard that was quantised here is not to be had again."""
    if is_unfinished_quantisation(path.parent):
        return f"remove {path.parent} and start again"
    return "download it again"


def _require_all(folder: Path, shards: list[Path]) -> None:
    numbers = [_SHARD.search(p.name) for p in shards]
    present = {int(m[1]) for m in numbers if m}
    totals = {int(m[2]) for m in numbers if m}
    if len(totals) != 1:
        raise CheckpointError(f"{folder}: shards of different sets: {', '.join(map(str, totals))}")
    missing = sorted(set(range(1, totals.pop() + 1)) - present)
    if missing:
        raise CheckpointError(f"{folder}: shard {missing[0]} of {shards[0].name} is missing")
