"""The embedded vision-language model, which comes with the package."""

from pathlib import Path


def tiny_vlm_path() -> Path:
    """Return the folder of the embedded vision-language model, an ordinary Hugging Face directory."""
    return Path(__file__).resolve().parent / "tiny_vlm"
