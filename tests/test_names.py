"""What users import from `octavo`, however late it is looked up."""

from __future__ import annotations

import subprocess
import sys

import pytest

import octavo


def test_every_name_that_is_offered_is_there() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert octavo.LLM is octavo.LLM


def test_a_name_that_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'octavo' has no attribute 'Llm'"):
        octavo.Llm  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("before", ["octavo.quantize.recipe", "octavo.quantize.quantize"])
def test_quantize_is_the_function_whatever_was_imported_before(before: str) -> None:
    code = f"import {before}; from octavo import quantize; assert quantize.__name__ == 'quantize'"
    subprocess.run([sys.executable, "-c", code], check=True)
