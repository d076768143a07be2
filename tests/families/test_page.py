"""The page says what the tests know."""

from pathlib import Path

from .page import page
from .table import KNOWN

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_the_page_is_the_one_that_the_table_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_page_names_every_family_and_every_reason() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(known.title in text and known.why in text for known in KNOWN.values())
