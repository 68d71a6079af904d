"""Prompt templates: text of the recorded entries, answers, errors."""

import json
from pathlib import Path

import pytest

from mixformer.prompts import FAMILIES, extract_answer, get_template, render_prompt

GOLDEN = Path(__file__).parent / "golden" / "prompts"
ENTRIES = [
    entry
    for entry in json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
    if entry["family"] != "sat-train"
]


def test_every_recorded_prompt_is_spelt_exactly() -> None:
    assert len(ENTRIES) == 288
    for entry in ENTRIES:
        # Slots are written for images in the sat family alone, where every recorded entry has one image.
        text = render_prompt(entry["query"], entry["template"], entry["family"], entry["history"], int(entry["image"]))
        assert text == entry["text"]


def test_separators_are_the_recorded_ones() -> None:
    recorded = {(e["template"], e["separator"]) for e in ENTRIES if e["family"] == "sat"}
    assert recorded == {(name, template.separator) for name, template in FAMILIES["sat"].templates.items()}


@pytest.mark.parametrize("family", ["hf-cogvlm", "hf-cogagent", "sat"])
def test_the_answer_is_found_in_prompt_and_answer_together(family: str) -> None:
    for name in FAMILIES[family].templates:
        text = render_prompt("Where?", name, family, [("Open it", "done [[001,002,003,004]]")])
        prompt = "" if name == "base" else text
        assert extract_answer(f"{prompt} near the top</s>", name, family) == "near the top"


def test_the_answer_alone_is_kept_and_cut_at_the_end_token() -> None:
    assert extract_answer(" a cat </s> and more") == "a cat"
    assert extract_answer("a cat", "chat", "sat") == "a cat"


def test_vicuna_keeps_its_system_sentence_once() -> None:
    text = render_prompt("And now?", "vicuna", "llama", [("Hi", "Hello")])
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith(" USER: Hi ASSISTANT: Hello\nUSER: And now? ASSISTANT:")
    assert text.count("A chat between") == 1


def test_braces_in_a_question_stay_as_they_are() -> None:
    query = "What is {query} in {0}?"
    assert render_prompt(query, "chat", "hf-cogvlm", [("{a}", "{b}")]) == (
        f"Question: {{a}} Answer: {{b}}\nQuestion: {query} Answer:"
    )


def test_slots_open_the_prompt_or_stay_where_they_were_written() -> None:
    assert render_prompt("same?", "base", "sat", num_images=2) == "<EOI><EOI>same?"
    assert render_prompt("is <EOI> like <EOI>?", "base", "sat", num_images=2) == "is <EOI> like <EOI>?"
    assert render_prompt("hello", "chat_old", "sat") == "Question: hello Answer:"
    assert render_prompt("what is <EOI>?", "base", "hf-cogvlm", num_images=2) == "what is <EOI>?"


def test_slots_that_differ_from_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"marks 1 image place.* comes with 2 image"):
        render_prompt("is <EOI> one?", "base", "sat", num_images=2)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'talk': choose one of base, chat, chat_old, vqa"):
        get_template("sat", "talk")
    with pytest.raises(ValueError, match="no prompt family 'hf'"):
        get_template("hf")
