"""The package's version, in a file that needs no import of torch to be read."""

__version__ = "0.1.0"
