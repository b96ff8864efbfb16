"""The tests; each file guards one thing, and slow ones are marked."""
