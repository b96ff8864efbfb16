"""The bundled model: a tiny Ministral in Mistral's own format."""

from pathlib import Path

FOLDER = Path(__file__).parent
