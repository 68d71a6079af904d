"""docs/zoo.md is what the code says."""

from __future__ import annotations

import re

import pytest

from tests.zoo.__main__ import PAGE, page
from tests.zoo.harness import TOLERANCE

DIFFERENCE = re.compile(r"\| (\d\.\de[-+]\d\d) \|$", re.MULTILINE)


def test_the_page_is_made_from_the_code() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert DIFFERENCE.sub("| ? |", written) == page(lambda system: "?")


def test_every_written_difference_is_within_the_tolerance() -> None:
    written = PAGE.read_text(encoding="utf-8")
    found = [float(text) for text in DIFFERENCE.findall(written)]
    assert len(found) == len(re.findall(r"^\| \[", written, re.MULTILINE)) > 0
    assert max(found) <= TOLERANCE


@pytest.mark.parametrize("word", ["GPT-2", "LLaVA", "GIT", "LeNet-5"])
def test_the_page_names_the_systems(word: str) -> None:
    assert word in PAGE.read_text(encoding="utf-8")
