"""Facts: records, the synthetic world and where the embedded model lies."""

from pathlib import Path

from .errors import DataError
from .records import VQARecord
from .world import World

__all__ = ["DataError", "VQARecord", "World", "tiny_vlm_path"]


def tiny_vlm_path() -> Path:
    """The folder of the embedded vision-language model, an ordinary Hugging Face directory."""
    return Path(__file__).resolve().parent / "tiny_vlm"
