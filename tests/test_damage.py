"""Random damage to a checkpoint's files ends in octavo's own errors, or in a model that loads."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from octavo import LLM
from octavo.errors import OctavoError
from tests.checkpoints import small_config, write_hugging_face, write_w8a8

FILES = {
    "params.json": 80,
    "consolidated.safetensors": 80,
    "config.json": 120,
    "model.safetensors": 80,
    "model.safetensors.index.json": 80,
    "tekken.json": 12,
}


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """The content with a few bytes replaced, removed or doubled, mostly near its start."""
    content = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        reach = chance.choice((16, 400, 5000, len(content)))
        at = chance.randrange(min(reach, len(content)))
        kind = chance.randrange(5)
        if kind == 0:
            content[at] = chance.randrange(256)
        elif kind == 1:
            content[at] = ord(chance.choice('0123456789-.eE"[]{},:nul'))
        elif kind == 2:
            del content[at : at + chance.randint(1, 40)]
        elif kind == 3:
            content[at:at] = content[at : at + chance.randint(1, 40)]
        else:
            del content[at:]
        if not content:
            break
    return bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused_or_loads(name: str, tmp_path: Path, text_model: Path) -> None:
    folder = tmp_path / "model"
    if (text_model / name).exists():
        shutil.copytree(text_model, folder)
    else:
        write = write_w8a8 if name == "config.json" else write_hugging_face
        write(folder, small_config(vocab_size=2048), shards=2 if "index" in name else 1)
        shutil.copy(text_model / "tekken.json", folder)
    whole = (folder / name).read_bytes()
    LLM(folder)
    chance = random.Random(name)
    refused = 0
    for _ in range(FILES[name]):
        (folder / name).write_bytes(damaged(whole, chance))
        try:
            LLM(folder)
        except OctavoError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert refused > FILES[name] / 4
