"""`octavo download REPO`: fetch a model from the hub, only the files that are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.checkpoint import hub


def download(
    repo: Annotated[str, typer.Argument(help="Hub id: mistralai/Ministral-8B-Instruct-2410.")],
    local_dir: Annotated[
        Path | None,
        typer.Option(
            "--local-dir", "--local_dir", help="Where to put it; default the hub's cache."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download a model; run it again to go on where it was cut off."""
    hub.require_repo_id(repo)
    fetched = hub.download(repo, local_dir, revision)
    print(fetched.folder)
    print(f"Licence: {fetched.license or 'not named on its page; look there before use'}")
