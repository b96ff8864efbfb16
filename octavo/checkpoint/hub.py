"""Where a MODEL argument points: a folder, the bundled model, or a repository on the hub."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from octavo.checkpoint import huggingface, mistral
from octavo.checkpoint.tensors import find_files
from octavo.errors import CheckpointError, ConfigError

DEMO = Path(__file__).resolve().parent.parent / "demo"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TIMEOUT_S = 10.0  # to find out whether the hub answers
_SMALL_FILES = ("params.json", "config.json", "tekken.json", "tokenizer.model*", "README.md")
_MISTRAL_WEIGHTS = ("consolidated*.safetensors", "consolidated.safetensors.index.json")
_HF_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Download:
    """What was fetched: the folder, and the licence that the repository names (or None)."""

    folder: Path
    license: str | None


def resolve_model(model: str | Path) -> Path:
    """The folder that a MODEL argument names; a hub id is found in the cache, or downloaded.

    Raises:
        ConfigError: no such folder, and no hub id either.
        CheckpointError: the hub cannot be reached and the model is not in the cache.
    """
    if str(model) == "demo":
        return DEMO
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{folder}: is a file; MODEL is a folder, a hub id or `demo`")
    if isinstance(model, str) and _REPO_ID.fullmatch(model):
        return _from_cache(model) or download(model).folder
    raise ConfigError(f"{model}: no such folder; MODEL is a folder, a hub id or `demo`")


def download(repo: str, local_dir: Path | None = None, revision: str | None = None) -> Download:
    """Fetch only the files octavo needs; a download that was cut off goes on where it stopped.

    Where a repository holds its weights in both layouts, Mistral's is taken, which carries the
    attention pattern.

    Args:
        repo: hub id, `mistralai/Ministral-8B-Instruct-2410`.
        local_dir: where to put the files; None is the hub's cache.
        revision: branch, tag or commit.

    Raises:
        CheckpointError: the repository does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    from octavo.checkpoint import resume

    target: dict[str, Any] = {"local_dir": local_dir} if local_dir is not None else {}
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
        files = [sibling.rfilename for sibling in info.siblings or []]
        for name in files:
            if any(fnmatch(name, p) for p in needed(files) if p.endswith(".safetensors")):
                resume.fetch(repo, name, str(info.sha), local_dir, TIMEOUT_S)
        # What is there already is only checked and linked.
        folder = snapshot_download(repo, revision=revision, allow_patterns=needed(files), **target)
    except CheckpointError:
        raise
    except Exception as error:  # huggingface_hub raises its transport's errors too
        raise CheckpointError(_explain(repo, error)) from None
    return Download(Path(folder), _license(info.card_data))


def require_repo_id(repo: str) -> None:
    """Raise ConfigError unless `repo` is written as a hub id."""
    if not _REPO_ID.fullmatch(repo):
        raise ConfigError(f"{repo}: not a hub id; write owner/name")


def needed(files: list[str]) -> list[str]:
    """Patterns of the files to fetch from a repository that holds `files`."""
    has_mistral = "params.json" in files and any(
        re.fullmatch(r"consolidated[\w.-]*\.safetensors", f) for f in files
    )
    return [*_SMALL_FILES, *(_MISTRAL_WEIGHTS if has_mistral else _HF_WEIGHTS)]


def _license(card: Any) -> str | None:
    """`name (link)` as a model card's header gives them, or None."""
    if card is None:
        return None
    name = card.get("license_name") or card.get("license")
    link = card.get("license_link")
    return f"{name} ({link})" if name and link else name


def _from_cache(repo: str) -> Path | None:
    """The repository's folder in the hub's cache if it is there whole, whatever its age."""
    from huggingface_hub import snapshot_download

    try:
        # Without patterns it would ask for every file of the repository.
        folder = Path(
            snapshot_download(repo, local_files_only=True, allow_patterns=list(_SMALL_FILES))
        )
    except Exception:
        return None
    for config, stem in (
        (mistral.PARAMS, mistral.WEIGHTS),
        (huggingface.CONFIG, huggingface.WEIGHTS),
    ):
        try:
            if (folder / config).is_file() and find_files(folder, stem):
                return folder
        except CheckpointError:  # a part of it: the download goes on
            pass
    return None


def _explain(repo: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return (
            f"{repo}: gated on the hub; accept its licence on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return f"{repo}: not found on the hub (or private; set HF_TOKEN)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{repo}: the disk is full; free some room and run the same command again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written: {error.strerror}"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else kind
    return (
        f"{repo}: not in the local cache, and the hub cannot be reached ({first_line}); "
        "connect and run the same command again, or give a folder"
    )
