"""Quantising a published checkpoint in bounded memory: SmoothQuant, then GPTQ, layer by layer."""
