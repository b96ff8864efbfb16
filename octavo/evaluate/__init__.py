"""Measures of what a model still knows: passkey, recovery."""
