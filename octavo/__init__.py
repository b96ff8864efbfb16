"""octavo: Ministral in 8 bits, at its full context, on one small machine.

What users import is looked up when it is asked for: `octavo --help` does without PyTorch, and a
model without a tokenizer does without the tokenizers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from octavo.errors import OctavoError
from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.engine.generate import generate
    from octavo.engine.llm import LLM
    from octavo.engine.sampling_params import SamplingParams
    from octavo.engine.structured_outputs import StructuredOutputsParams
    from octavo.model import Transformer
    from octavo.quantize.quantize import quantize
else:
    _MODULES = {
        "LLM": "octavo.engine.llm",
        "SamplingParams": "octavo.engine.sampling_params",
        "StructuredOutputsParams": "octavo.engine.structured_outputs",
        "Transformer": "octavo.model",
        "generate": "octavo.engine.generate",
        "quantize": "octavo.quantize.quantize",
    }

    # A package becomes an attribute when it is first imported, and this one has the name of its
    # function. So that is done now, and the name taken back.
    import_module("octavo.quantize")
    del globals()["quantize"]

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'octavo' has no attribute {name!r}")
        found = getattr(import_module(_MODULES[name]), name)
        globals()[name] = found  # not asked for again
        return found


__all__ = [
    "LLM",
    "OctavoError",
    "SamplingParams",
    "StructuredOutputsParams",
    "Transformer",
    "__version__",
    "generate",
    "quantize",
]
