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


# ---------------------------------------------------------------- families of other systems


SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {0}'s questions. "
)


@pytest.mark.parametrize(("family", "person"), [("llava", "human"), ("vila", "user"), ("mobilevlm", "user")])
def test_vicuna_families_are_spelt_as_their_conversation_files_do(family: str, person: str) -> None:
    text = render_prompt("And?", None, family, [("Hi", "Hello")], 2)
    assert text == SYSTEM.format(person) + "USER: <image>\n<image>\nHi ASSISTANT: Hello</s>USER: And? ASSISTANT:"
    assert extract_answer(text + " a cat</s>", None, family) == "a cat"


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_chat_templates_of_released_folders_are_spelt_exactly(num_images: int) -> None:
    # What the chat_template of llava-1.5-7b-hf, InternVL3-1B-hf and idefics2-8b make of this conversation.
    lines, slots = "<image>\n" * num_images, "<image>" * num_images
    expected = {
        ("llava", "hf"): f"USER: {lines}What is this? ASSISTANT: a cat USER: And? ASSISTANT:",
        ("internvl", "hf"): (
            f"<|im_start|>user\n{lines}What is this?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
            f"<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        ),
        ("idefics2", "chat"): (
            f"User:{slots or ' '}What is this?<end_of_utterance>\nAssistant: a cat<end_of_utterance>\n"
            f"User: And?<end_of_utterance>\nAssistant:"
        ),
    }
    for (family, template), text in expected.items():
        assert render_prompt("And?", template, family, [("What is this?", "a cat")], num_images) == text


def test_internvl_and_qwen_vl_are_spelt_as_their_code_does() -> None:
    asked = "<|im_start|>user\n{}<|im_end|>{}<|im_start|>assistant\n"
    name = "You are an AI assistant whose name is InternLM (书生·浦语)."
    text = render_prompt("And?", None, "internvl", [("Hi", "Hello")], 1)
    past = asked.format("<image>\nHi", "")
    assert text == f"<|im_start|>system\n{name}<|im_end|>{past}Hello<|im_end|>" + asked.format("And?", "")
    text = render_prompt("And?", None, "qwen-vl", [("Hi", "Hello")], 2)
    past = asked.format("Picture 1: <image>\nPicture 2: <image>\nHi", "\n")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == f"{system}{past}Hello<|im_end|>\n" + asked.format("And?", "\n")
    assert extract_answer(text + "a cat<|im_end|>\n", None, "qwen-vl") == "a cat"


def test_questions_may_place_their_images_themselves() -> None:
    text = render_prompt("Is <image> like <image>?", "hf", "llava", num_images=2)
    assert text == "USER: Is <image> like <image>? ASSISTANT:"
    assert render_prompt("And?", "hf", "llava", [("Is it <image>?", "no")], 1).count("<image>") == 1
    with pytest.raises(ValueError, match=r"marks 1 image place\(s\) with <image> but comes with 0"):
        render_prompt("Is it <image>?", "hf", "llava")
    assert render_prompt("Is it <image>?", "hf", "llava", slots=False) == "USER: Is it <image>? ASSISTANT:"


def test_a_dropped_history_leaves_its_images_with_the_question() -> None:
    assert render_prompt("And?", "base", "llava", [("Hi", "Hello")], 1) == "<image>\nAnd?"


def test_captions_have_no_roles() -> None:
    assert render_prompt("a cat", None, "caption", num_images=1) == "a cat"
    assert render_prompt("What?", "vqa", "caption", num_images=1) == "Question: What? Answer:"


def test_a_slot_in_an_answer_is_no_place_of_an_image() -> None:
    text = render_prompt("And?", "hf", "llava", [("Hi", "a <image>cat")], 1)
    assert text == "USER: <image>\nHi ASSISTANT: a cat USER: And? ASSISTANT:"
