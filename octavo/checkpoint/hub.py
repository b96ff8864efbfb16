"""Where a MODEL argument points: a folder, the bundled model, or a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError, ConfigError

DEMO = Path(__file__).resolve().parent.parent / "demo"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ("params.json", "config.json", "tekken.json", "tokenizer.model*", "README.md")
_MISTRAL_WEIGHTS = ("consolidated*.safetensors", "consolidated.safetensors.index.json")
_HF_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def resolve_model(model: str | Path) -> Path:
    """The folder that a MODEL argument names; a hub id is downloaded first, or found in the cache.

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
        return download(model)
    raise ConfigError(f"{model}: no such folder; MODEL is a folder, a hub id or `demo`")


def download(repo: str, local_dir: Path | None = None, revision: str | None = None) -> Path:
    """Fetch only the files octavo needs; a download that was cut off goes on where it stopped.

    Where a repository holds its weights in both layouts, Mistral's is taken, which carries the
    attention pattern.

    Args:
        repo: hub id, `mistralai/Ministral-8B-Instruct-2410`.
        local_dir: where to put the files; None is the hub's cache.
        revision: branch, tag or commit.

    Returns:
        The folder that holds them.

    Raises:
        CheckpointError: the repository does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    target: dict[str, Any] = {"local_dir": local_dir} if local_dir is not None else {}
    try:
        files = [str(f) for f in HfApi().list_repo_files(repo, revision=revision)]
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=needed(files), **target)
        )
    except Exception as error:  # huggingface_hub raises its transport's errors too
        cached = _from_cache(repo, revision) if local_dir is None else None
        if cached is not None:
            return cached
        raise CheckpointError(_explain(repo, error)) from None


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


def license_of(repo: str) -> str | None:
    """The licence that the repository's model card names, or None where it names none."""
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(repo).card_data
    except Exception:
        return None
    if card is None:
        return None
    name = card.get("license_name") or card.get("license")
    link = card.get("license_link")
    return f"{name} ({link})" if name and link else name


def _from_cache(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
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
    if isinstance(error, OSError) and error.errno == 28:
        return f"{repo}: the disk is full; free some room and run the same command again"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else kind
    return (
        f"{repo}: not in the local cache, and the hub cannot be reached ({first_line}); "
        "connect and run the same command again, or give a folder"
    )
