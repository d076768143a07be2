"""Facts: records, the synthetic world and where the embedded model lies."""

from pathlib import Path

from .errors import DataError
from .gqa_flow import read_gqa_flow
from .records import FlowRecord, VQARecord
from .world import World

__all__ = ["DataError", "FlowRecord", "VQARecord", "World", "read_gqa_flow", "tiny_vlm_path"]


def tiny_vlm_path() -> Path:
    """The folder of the embedded vision-language model, an ordinary Hugging Face directory."""
    return Path(__file__).resolve().parent / "tiny_vlm"
