"""Quantising a published checkpoint in bounded memory: SmoothQuant, then GPTQ, layer by layer."""

from octavo.quantize.quantize import quantize
from octavo.quantize.recipe import Recipe
from octavo.quantize.report import Report

__all__ = ["Recipe", "Report", "quantize"]
