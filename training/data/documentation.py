"""Plain English that may be shipped: the documentation inside CPython (PSF licence)."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from training.data.heldout import held_out

HELD_OUT_PERCENT = 3


def documents(unseen: bool = False) -> list[str]:
    """pydoc's topics and the standard library's docstrings, the held-out ones if `unseen`."""
    texts = [topics[name].strip() for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(parts):
            texts.extend(_docstrings(path))
    seen: set[str] = set()
    kept = []
    for document in texts:
        if document in seen or len(document) < 60 or not document.isascii():
            continue
        seen.add(document)
        if held_out(f"document {document}", HELD_OUT_PERCENT) == unseen:
            kept.append(document)
    return kept


def sentences(texts: list[str]) -> list[str]:
    """Plain sentences of the documents, as filler for the passkey task."""
    found: set[str] = set()
    for document in texts:
        flat = " ".join(document.split())
        found.update(re.findall(r"(?<=[.] )[A-Z][a-z]*(?: [a-z,'()-]+){4,24}[.](?= )", flat))
    return sorted(found)


def words(texts: list[str]) -> list[str]:
    """The distinct words of the documents, in lower case."""
    found = {
        word.lower() for text in texts for word in re.findall(r"\b[A-Za-z][a-z]{2,12}\b", text)
    }
    return sorted(found)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    raw = [
        ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)
    ]
    return [inspect.cleandoc(text).strip() for text in raw if text]
