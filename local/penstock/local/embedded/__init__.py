"""The model that ships with Penstock: a Llama of 3.8 million parameters that writes Python. See README.md."""

from pathlib import Path


def path() -> Path:
    """The folder with its weights, configuration and tokenizer: a MODEL_DIR like any other."""
    return Path(__file__).resolve().parent
