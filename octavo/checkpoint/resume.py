"""Large files from the hub, so that a download that was killed goes on where it stopped.

huggingface_hub resumes a broken connection, but throws a partly fetched file away when its process
ends (its pull request 4228). Of one 16 GB file that is everything. Here the part stays under a name
of its own, is continued, checked, and only then put where huggingface_hub looks for it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from octavo.checkpoint.tensors import UNFINISHED
from octavo.errors import CheckpointError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(repo: str, name: str, commit: str, local_dir: Path | None, timeout: float) -> None:
    """Bring one file of a repository into `local_dir`, or into the hub's cache if that is None.

    Args:
        repo: hub id.
        name: the file, as the repository names it.
        commit: which version of it.
        local_dir: where the file goes, or None.
        timeout: seconds to find out what the hub has.

    Raises:
        CheckpointError: the content is not what the hub says it is; it is thrown away.
        Exception: whatever huggingface_hub raises.
    """
    url = hf_hub_url(repo, name, revision=commit)
    metadata = get_hf_file_metadata(url, timeout=timeout)
    if local_dir is not None:
        target = local_dir / name
        part = local_dir / UNFINISHED / f"{name}.{metadata.etag}.part"
    else:
        repo_folder = repo_folder_name(repo_id=repo, repo_type="model")
        target = Path(constants.HF_HUB_CACHE) / repo_folder / "blobs" / str(metadata.etag)
        part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):  # a second download of the same file waits for the first
        if target.is_file() and target.stat().st_size == metadata.size:
            return
        # The file may lie on another host, which must not see the hub's token.
        same_host = urlsplit(metadata.location).netloc == urlsplit(url).netloc
        with part.open("ab") as file:
            http_get(
                metadata.location,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers() if same_host else build_hf_headers(token=False),
                expected_size=metadata.size,
                displayed_filename=name,
            )
        _verify(part, repo, name, str(metadata.etag))
        part.rename(target)


def _verify(part: Path, repo: str, name: str, etag: str) -> None:
    """The hub's tag of a large file is its SHA-256."""
    if not _SHA256.fullmatch(etag):
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != etag:
        part.unlink()
        raise CheckpointError(
            f"{repo}: {name} arrived damaged (SHA-256 {found[:12]}…, not {etag[:12]}…); "
            "run the same command again"
        )
