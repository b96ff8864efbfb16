"""octavo: Ministral in 8 bits, at its full context, on one small machine."""

from octavo.engine.generate import generate
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.structured_outputs import StructuredOutputsParams
from octavo.errors import OctavoError
from octavo.model import Transformer
from octavo.quantize import quantize
from octavo.version import __version__

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
