"""The model that comes with Shoal, so that a mesh has something to serve before anyone fetches weights.

A four-million-parameter Llama that completes Python code, trained on the standard library's sources by
`tools/train_embedded_model.py`, which says everything about it. This package knows only where the files lie.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["NAME", "path"]

NAME = "embedded"


def path() -> Path:
    """The Hugging Face directory: config.json, model.safetensors (bf16), tokenizer.json and their kin."""
    return Path(str(files(__name__) / "model"))
