"""Conversations and shared prefixes, compared with running everything from the beginning without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.words import box_text
from mixformer import BaseModel, KVCache, TransformerConfig, from_pretrained, generate, load_processor
from mixformer.conversation import Conversation
from mixformer.data import processor as processing
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.prefix import share_prefix
from mixformer.testing import collate, sample_row
from mixformer.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = load_tokenizer(ROOT / "tests" / "golden" / "prompts")
EOS = TOKENIZER.eos_id
RED, BLUE, GREEN = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue", "green"))
KINDS = ["llama", "cogvlm", "cogvlm2", "cogagent"]
PICTURED = KINDS[1:]
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "template": "vicuna"},
    "cogvlm": {"family": "hf-cogvlm", "image_size": 28},
    "cogvlm2": {"family": "hf-cogvlm2", "image_size": 28, "downsample": 2},
    "cogagent": {"family": "hf-cogagent", "image_size": 28, "cross_image_size": 42},
}
Make = Callable[..., tuple[BaseModel, Processor]]


@pytest.fixture
def pair(make: Callable[..., BaseModel]) -> Make:
    """pair(kind, **processor settings) -> a tiny model and its processor."""

    def build(kind: str, **changes: Any) -> tuple[BaseModel, Processor]:
        model = make(kind, vocab_size=TOKENIZER.vocab_size)
        return model, Processor(ProcessorConfig(**{**SETTINGS[kind], **changes}), TOKENIZER)

    return build


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


class Script:
    """A logits processor that makes the model say given tokens and keeps the logits it had."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.logits = ids, list[torch.Tensor]()

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits[0])
        return torch.nn.functional.one_hot(torch.tensor([self.ids[tokens.shape[1]]]), logits.shape[1]).float()


@torch.no_grad()
def recomputed(
    model: BaseModel, processor: Processor, prompt: str, images: Any, history: Any, said: Sequence[int], **options: Any
) -> torch.Tensor:
    """Logits before each token of what is said, from one forward over everything, without a cache."""
    batch = processor(prompt, images, history=history, **options)
    width = batch["input_ids"].shape[1]
    before = torch.tensor([said[:-1]], dtype=torch.long)
    batch["input_ids"] = torch.cat([batch["input_ids"], before], 1)
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in batch:
            batch[name] = torch.nn.functional.pad(batch[name], (0, before.shape[1]), value=fill)
    return model(**batch)[0, width - 1 :]


def ids_of(processor: Processor, prompt: str, images: Any, history: Any = None, **options: Any) -> list[int]:
    ids: list[int] = processor(prompt, images, history=history, **options)["input_ids"][0].tolist()
    return ids


def common(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def count_pictures(model: BaseModel, mixin: str = "image") -> list[int]:
    """A list that gets the number of pictures of each call of a tower."""
    calls: list[int] = []
    tower = model.get_mixin(mixin).tower
    tower.register_forward_hook(lambda module, args, kwargs, out: calls.append(len(kwargs["images"])), with_kwargs=True)
    return calls


class Checked:
    """A conversation whose every turn is compared with recomputing, and the tokens it runs with plain lists."""

    def __init__(self, model: BaseModel, processor: Processor, template: str | None = None) -> None:
        self.model, self.processor, self.template = model, processor, template
        self.conversation = Conversation(model, processor, template)
        self.images: list[Any] = []
        self.cached: list[int] = []

    def ask(self, prompt: str, said: Sequence[int], image: Any = None, max_new_tokens: int = 20) -> int:
        """Ask, have the model say something, check it; the tokens that a cache of ids alone could not save."""
        history = list(self.conversation.history)
        script = Script(said)
        answer = self.conversation.ask(prompt, image, max_new_tokens, processors=[script])
        self.images += [] if image is None else [image]
        images = self.images or None
        said = said[:max_new_tokens]
        expected = recomputed(self.model, self.processor, prompt, images, history, said, template=self.template)
        close(torch.stack(script.logits), expected)
        assert answer == self.processor.decode(said).strip()
        assert self.conversation.history == [*history, (prompt, answer)]
        ids = ids_of(self.processor, prompt, images, history, template=self.template)
        new = len(ids) - common(self.cached, ids)
        self.cached = [*ids, *said[:-1]]  # the last token is not run
        return new


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize("kind", KINDS)
def test_follow_ups_equal_recomputing_and_run_only_new_tokens(pair: Make, kind: str) -> None:
    model, processor = pair(kind)
    image = None if kind == "llama" else RED
    chat = Checked(model, processor)
    whole = chat.ask("What is this?", [*TOKENIZER.encode("A thing."), EOS], image)
    assert chat.conversation.tokens_run == whole == len(ids_of(processor, "What is this?", image))
    for question, answer in (("Where?", "There."), ("And why is it there?", "It is so.")):
        history = list(chat.conversation.history)
        new = chat.ask(question, [*TOKENIZER.encode(answer), EOS])
        assert chat.conversation.tokens_run == new
        total = len(ids_of(processor, question, image, history))
        assert total - new >= whole - 2  # the first prompt stays, but for a mark at its end


def test_a_follow_up_runs_the_question_alone_where_the_answer_reads_back_as_it_was_said(pair: Make) -> None:
    model, processor = pair("cogvlm")
    first = ids_of(processor, "What is this?", RED)
    second = ids_of(processor, "Where?", RED, [("What is this?", "A thing.")])
    said = second[len(first) : len(first) + len(TOKENIZER.encode("A thing."))]
    assert processor.decode(said).strip() == "A thing." and second[: len(first)] == first
    chat = Checked(model, processor)
    chat.ask("What is this?", [*said, EOS], RED)
    chat.ask("Where?", [7, EOS])
    assert chat.conversation.tokens_run == len(second) - len(first) - len(said)


def test_an_answer_that_reads_back_as_other_tokens_is_run_again_from_there_on(pair: Make) -> None:
    model, processor = pair("cogvlm")
    chat = Checked(model, processor)
    letters = [token for letter in "thing" for token in TOKENIZER.encode(letter)[-1:]]
    chat.ask("What?", [*letters, EOS], RED)
    second = ids_of(processor, "Where?", RED, [("What?", "thing")])
    first = ids_of(processor, "What?", RED)
    assert second[len(first) : len(first) + len(letters)] != letters
    new = chat.ask("Where?", [7, EOS])
    assert chat.conversation.tokens_run == new > len(second) - len(first) - len(letters)


@pytest.mark.parametrize("kind", ["cogvlm", "cogagent"])
def test_a_cut_answer_and_a_free_one_are_gone_on_from(pair: Make, kind: str) -> None:
    model, processor = pair(kind)
    chat = Checked(model, processor)
    chat.ask("What?", [5, 9, 300, 301, 302], RED, max_new_tokens=3)
    chat.ask("Where?", [310] * 60 + [EOS], max_new_tokens=80)  # more room than the first turn made
    chat.ask("Why?", [7], max_new_tokens=1)
    new = chat.ask("How?", [8, EOS])
    assert chat.conversation.tokens_run == new
    free, answers = Conversation(model, processor), []
    for seed, prompt in enumerate(("What?", "Where?")):
        drawn: dict[str, Any] = {"sample": {"temperature": 1.0}}
        batch = processor(prompt, RED, history=list(free.history))
        alone = generate(
            model, batch, 12, cache=False, stop_tokens=EOS, generator=torch.Generator().manual_seed(seed), **drawn
        )
        images = None if free.history else RED
        answers.append(free.ask(prompt, images, 12, generator=torch.Generator().manual_seed(seed), **drawn))
        assert answers[-1] == processor.decode(alone[0]).strip()
    assert len(set(answers)) == 2


@pytest.mark.parametrize("kind", ["llama", "cogagent"])
def test_templates_without_past_turns_keep_the_picture_only(pair: Make, kind: str) -> None:
    model, processor = pair(kind)
    image = None if kind == "llama" else RED
    chat = Checked(model, processor, "base")
    chat.ask("Is it red?", [5, 6, EOS], image)
    new = chat.ask("Is it blue, or is it not?", [7, EOS])
    assert chat.conversation.tokens_run == new < len(TOKENIZER.encode("Is it blue, or is it not?"))
    chat.ask("Is it", [7, EOS])  # all of it is in the cache: its last token runs again
    assert chat.conversation.tokens_run == 1
    if image is not None:  # a picture comes last: it is not cut
        chat.ask("", [8, EOS])
        assert chat.conversation.tokens_run == len(ids_of(processor, "", image, template="base"))


@pytest.mark.parametrize("kind", PICTURED)
def test_a_picture_is_read_and_encoded_once(pair: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair(kind)
    made: list[int] = []
    real = processing.preprocess_image
    monkeypatch.setattr(processing, "preprocess_image", lambda source, size, *rest: made.append(size) or real(
        source, size, *rest
    ))
    towers = [count_pictures(model, name) for name in ("image", "cross") if name in model.mixins]
    conversation = Conversation(model, processor)
    for question, image in (("What?", RED), ("Where?", None), ("Why?", RED.copy())):
        conversation.ask(question, image, 3)
    assert made == [28, 42][: len(towers)]
    assert towers == [[1]] * len(towers)
    assert len(conversation.history) == 3


def test_another_picture_starts_anew_where_all_tokens_see_all_pictures(pair: Make) -> None:
    model, processor = pair("cogagent")
    chat = Checked(model, processor)
    calls = count_pictures(model, "cross")
    chat.ask("What?", [5, EOS], RED)
    chat.ask("And this?", [6, EOS], BLUE)
    assert calls == [1, 1, 2, 2]  # every second one is the comparison's
    whole = ids_of(processor, "And this?", [RED, BLUE], chat.conversation.history[:1])
    assert chat.conversation.tokens_run == len(whole)


def test_a_picture_behind_those_that_stay_is_encoded_alone(pair: Make) -> None:
    model, processor = pair("cogvlm")
    chat = Checked(model, processor)
    calls = count_pictures(model)
    chat.ask("What?", [5, EOS], RED)
    chat.ask("And this?", [6, EOS], BLUE)
    assert calls == [1, 1, 1, 2]  # every second one is the comparison's
    whole = ids_of(processor, "And this?", [RED, BLUE], chat.conversation.history[:1])
    assert chat.conversation.tokens_run == len(whole) - 1 - 6  # bos and the first picture's boi, patches and eoi


@pytest.mark.parametrize("kind", ["cogvlm", "cogagent"])
def test_pictures_in_marked_places_come_with_their_question(pair: Make, kind: str) -> None:
    model, processor = pair(kind, family="sat", template="chat")
    chat = Checked(model, processor)
    calls = count_pictures(model)
    chat.ask("What is <EOI>?", [5, EOS], RED)
    new = chat.ask("And <EOI>, is it the same?", [6, EOS], RED)
    assert calls[::2] == ([1, 1] if kind == "cogvlm" else [1, 2])
    if kind == "cogvlm":
        assert chat.conversation.tokens_run == new
    with pytest.raises(ValueError, match=r"marks 2 image place\(s\).*comes with 3"):
        chat.conversation.ask("And this?", BLUE)
    chat.ask("Well?", [7, EOS])


@pytest.mark.parametrize("kind", ["llama", "cogagent"])
def test_a_stream_that_is_broken_off_leaves_the_conversation_right(pair: Make, kind: str) -> None:
    model, processor = pair(kind)
    image = None if kind == "llama" else RED
    calls = count_pictures(model) if image is not None else []
    chat = Checked(model, processor)
    pieces = chat.conversation.stream("What is that?", image, processors=[Script([300, 301, 302, 303, EOS])])
    next(pieces)
    next(pieces)
    pieces.close()
    assert chat.conversation.history == []
    chat.ask("What is this?", [5, 6, EOS], image)
    if image is not None:
        assert calls == [1, 1]  # the second is the comparison's
    next(chat.conversation.stream("Where is it, and what is it?", processors=[Script([300, 301, EOS])]))
    chat.ask("Where?", [8, 9, EOS])
    assert [question for question, _ in chat.conversation.history] == ["What is this?", "Where?"]


def test_another_picture_after_a_broken_stream_is_the_only_one(pair: Make) -> None:
    model, processor = pair("cogvlm")
    chat = Checked(model, processor)
    next(chat.conversation.stream("What?", RED))
    chat.ask("What?", [5, EOS], BLUE)
    assert chat.conversation.tokens_run == len(ids_of(processor, "What?", BLUE))


@pytest.mark.parametrize("turn", [0, 1])
def test_an_error_in_a_forward_leaves_the_conversation_right(pair: Make, turn: int) -> None:
    model, processor = pair("cogagent")
    chat = Checked(model, processor)
    if turn:
        chat.ask("What is this?", [5, EOS], RED)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        chat.conversation.ask("Where?", None if turn else RED)
    handle.remove()
    assert len(chat.conversation.history) == turn
    chat.ask("Where?", [6, EOS], None if turn else RED)


def test_an_interruption_between_two_statements_of_the_cache_leaves_the_conversation_right(
    pair: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Checked(*pair("llama"))
    chat.ask("What is this?", [5, EOS])

    def interrupted(self: KVCache, num_tokens: int, next_position: torch.Tensor | None) -> None:
        self._length += num_tokens
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KVCache, "advance", interrupted)
        chat.conversation.ask("Where?")
    chat.ask("Where is it?", [6, EOS])


def test_wrong_questions_leave_the_conversation_right(pair: Make) -> None:
    model, processor = pair("cogvlm")
    chat = Checked(model, processor)
    chat.ask("What?", [5, EOS], RED)
    for options, message in (
        ({"images": "missing.png"}, "missing.png"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sample": {"temprature": 1.0}}, "temprature"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.conversation.ask("Where?", **options)  # type: ignore[arg-type]
        chat.ask("Where?", [6, EOS])
    with pytest.raises(ValueError, match="reads text only"):
        Conversation(*pair("llama")).ask("What?", RED)


def test_a_stream_read_on_after_another_question_is_an_error(pair: Make) -> None:
    model, processor = pair("llama")
    conversation = Conversation(model, processor)
    first = conversation.stream("What?", processors=[Script([300, 301, 302, EOS])])
    next(first)
    answer = conversation.ask("Where?", max_new_tokens=3)
    with pytest.raises(ValueError, match="Another question was asked meanwhile"):
        next(first)
    assert conversation.history == [("Where?", answer)]


def test_history_can_be_edited_and_reset_forgets_everything(pair: Make) -> None:
    model, processor = pair("cogagent")
    chat = Checked(model, processor)
    for prompt, image in (("What?", RED), ("Where?", None), ("Why?", None)):
        chat.ask(prompt, [5, 300, EOS], image)
    chat.conversation.history[1] = ("Where is it?", "There.")
    chat.ask("How?", [6, EOS])
    chat.conversation.reset()
    chat.images.clear()
    assert chat.conversation.history == [] and chat.conversation.tokens_run == 0
    chat.ask("What?", [5, EOS], BLUE)


def test_draws_repeat_with_a_seed_and_pieces_make_the_answer(pair: Make) -> None:
    model, processor = pair("cogvlm")
    answers = []
    for seed in (1, 1, 2):
        conversation = Conversation(model, processor)
        generator = torch.Generator().manual_seed(seed)
        pieces = list(conversation.stream("What?", RED, 8, {"temperature": 1.0}, generator=generator))
        assert "".join(pieces).rstrip() == conversation.history[0][1] and len(pieces) > 3
        answers.append(pieces)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("kind", ["llama", "cogvlm"])
def test_learned_positions_end_an_answer_and_then_the_conversation(
    make: Callable[..., BaseModel], kind: str
) -> None:
    model = make(kind, vocab_size=TOKENIZER.vocab_size, positions="learned", max_positions=70)
    processor = Processor(ProcessorConfig(**{**SETTINGS[kind], "template": "base"}), TOKENIZER)
    image = None if kind == "llama" else RED
    chat = Checked(model, processor)
    chat.ask("What is this?", [300, 301, EOS], image)
    length = len(ids_of(processor, "Where?", image)) - (0 if image is None else 3)  # four patches, one position
    script = Script([300] * 90)
    answer = chat.conversation.ask("Where?", max_new_tokens=90, processors=[script])
    assert len(script.logits) == 71 - length and answer == TOKENIZER.decode([300] * (71 - length)).strip()
    history = list(chat.conversation.history)
    long = "Where? " * 40
    taken = len(ids_of(processor, long, image)) - (0 if image is None else 3)
    with pytest.raises(ValueError, match=f"takes {taken} positions, but the model has 70.*reset"):
        chat.conversation.ask(long)
    assert chat.conversation.history == history
    chat.ask("Why?", [300] * 20)


def test_a_model_that_sees_ahead_is_refused() -> None:
    model = TransformerConfig(vocab_size=TOKENIZER.vocab_size, causal=False).build()
    with pytest.raises(ValueError, match="BaseModel reads whole sequences only"):
        Conversation(model, Processor(ProcessorConfig(family="llama"), TOKENIZER))


def test_the_mini_reads_and_finds_widgets_in_one_conversation_as_it_does_one_by_one() -> None:
    folder, picture = ROOT / "examples" / "cogagent-mini", ROOT / "examples" / "screenshot.png"
    model, processor = from_pretrained(folder, dtype=torch.float32).eval(), load_processor(folder)
    (_, word, box), (_, other, _) = json.loads(picture.with_suffix(".json").read_text())[:2]
    calls = count_pictures(model, "cross")
    conversation, read = Conversation(model, processor), f"Read {box_text(box)}"
    answers = [conversation.ask(f"Where is {word}", picture, 12)]
    length = conversation.tokens_run
    assert length == len(ids_of(processor, f"Where is {word}", picture))
    for question in (read, f"Where is {other}"):
        answers.append(conversation.ask(question, max_new_tokens=12))
        assert conversation.tokens_run <= len(processor.tokenizer.encode(question)) < length / 8
    assert calls == [1]
    for question, answer in zip((f"Where is {word}", read, f"Where is {other}"), answers, strict=True):
        alone = generate(model, processor(question, picture), 12, cache=False, stop_tokens=processor.config.stop_ids)
        assert answer == processor.decode(alone[0]).strip()
    assert answers[1] == word and answers[0] != answers[2]


# ---------------------------------------------------------------- shared prefixes


def check_shared(model: BaseModel, batch: dict[str, torch.Tensor], shared: int) -> dict[str, torch.Tensor]:
    """Compare with the whole batch, run without a cache; `shared` tokens are to be shared. The rest of the batch."""
    cache, rest = share_prefix(model, batch, 6)
    assert cache.length == shared and cache.batch_size == len(batch["input_ids"])
    with torch.no_grad():
        first = model(**{**rest}, cache=cache.copy(), last_only=True)[:, -1]
        close(first, model(**batch)[:, -1])
    found = generate(model, rest, 6, cache=cache)
    assert found.tolist() == generate(model, batch, 6, cache=False).tolist()
    return rest


QUESTIONS = ["What is this?", "What is that, and where is it?", "Why?"]


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_shares_a_picture_on_demand(pair: Make, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda each, **options: real_compile(each, backend="eager", **options))
    model, processor = pair("cogvlm")
    calls, batch = count_pictures(model), processor(QUESTIONS, [RED] * 3)
    found = generate(model, batch, 6, share_prefix=True, compile=compiled)
    assert calls == [1]
    assert torch.equal(found, generate(model, batch, 6, cache=False))
    with pytest.raises(ValueError, match="leave `cache` at True"):
        generate(model, batch, 6, cache=False, share_prefix=True)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_about_one_image_run_it_once(pair: Make, kind: str) -> None:
    model, processor = pair(kind)
    image = None if kind == "llama" else RED
    rows = [ids_of(processor, question, image) for question in QUESTIONS]
    shared = min(common(rows[0], row) for row in rows[1:])
    assert shared > (0 if image is None else processor.config.image_length + 2)
    batch = processor(QUESTIONS, None if image is None else [image] * 3)
    towers = [count_pictures(model, name) for name in ("image", "cross") if name in model.mixins]
    rest = share_prefix(model, batch)[1]
    assert towers == [[1]] * len(towers)
    assert not {"images", "cross_images"} & set(rest)
    assert rest["attention_mask"].sum(1).tolist() == [len(row) - shared for row in rows]
    for row, ids, mask in zip(rows, rest["input_ids"], rest["attention_mask"].bool(), strict=True):
        assert ids[mask].tolist() == row[shared:] and bool(mask[-1])
    check_shared(model, batch, shared)


def test_rows_with_different_images_share_what_comes_before_them(pair: Make) -> None:
    model, processor = pair("cogvlm")
    batch = processor(QUESTIONS, [RED, BLUE, RED])
    assert len(check_shared(model, batch, 1)["images"]) == 3
    marked, processor = pair("cogvlm", family="sat", template="base")
    batch = processor(["Look at this: <EOI> " + question for question in QUESTIONS], [RED, RED, BLUE])
    before = len(ids_of(processor, "Look at this: ", None))
    check_shared(marked, batch, before)
    assert len(check_shared(marked, processor(["", "What?"], [RED] * 2), 1)["images"]) == 2  # a picture is not cut


def test_the_first_of_two_images_is_shared_and_the_others_remain(pair: Make) -> None:
    model, processor = pair("cogvlm")
    batch = processor(QUESTIONS, [[RED, GREEN], [RED, BLUE], [RED, GREEN, BLUE]])
    calls = count_pictures(model)
    rest = share_prefix(model, batch)[1]
    assert calls == [1] and torch.equal(rest["images"], batch["images"][[1, 3, 5, 6]])
    check_shared(model, batch, 1 + 6)


def test_images_that_only_some_rows_have_remain(pair: Make) -> None:
    model, processor = pair("cogvlm")
    check_shared(model, processor(QUESTIONS, [RED, None, [RED, BLUE]]), 1)


def test_with_cross_attention_rows_share_nothing_unless_all_pictures_and_their_places_are_the_same(pair: Make) -> None:
    model, processor = pair("cogagent", family="sat", template="base")
    for prompts, images in (
        (QUESTIONS, [RED, BLUE, RED]),
        (QUESTIONS, [RED, None, RED]),
        (QUESTIONS, [[RED, BLUE], [RED, GREEN], [RED, BLUE]]),
        (["Is <EOI> like <EOI>?", "Is <EOI> not like <EOI>?"], [[RED, BLUE]] * 2),
    ):
        batch = processor(prompts, images)
        rest = check_shared(model, batch, 0)
        assert rest.keys() == batch.keys() and all(torch.equal(rest[name], batch[name]) for name in batch)
    batch = processor(QUESTIONS, [RED] * 3)
    batch["cross_images"][1, :, 0, 0] += 1  # differs in the fine picture only
    check_shared(model, batch, 0)
    batch = processor(["Is <EOI> like <EOI>?", "Is <EOI> like <EOI>, or not?"], [[RED, BLUE]] * 2)
    same = common(*(ids_of(processor, f"Is <EOI> like <EOI>{end}", [RED, BLUE]) for end in ("?", ", or not?")))
    assert same > 2 * 6
    check_shared(model, batch, same)
    texts = [ids_of(processor, question, None) for question in QUESTIONS]
    check_shared(model, processor(QUESTIONS), min(common(texts[0], text) for text in texts[1:]))


def test_a_row_keeps_its_last_token_and_a_batch_of_one_shares_nothing(pair: Make) -> None:
    model, processor = pair("cogagent")
    length = len(ids_of(processor, "What?", RED))
    check_shared(model, processor(["What?"] * 3, [RED] * 3), length - 1)
    check_shared(model, processor(["What?"], [RED]), 0)
    ids = torch.tensor([[0, 5, 6], [5, 6, 7]])
    rest = check_shared(pair("llama")[0], {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1] * 3])}, 1)
    assert rest["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_what_has_nothing_in_common_is_left_as_it_is(pair: Make) -> None:
    model, _ = pair("llama")
    check_shared(model, {"input_ids": torch.tensor([[5, 6, 7], [6, 6, 7]])}, 0)
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    moved = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2], [0, 3, 4]])}
    cache, rest = share_prefix(model, moved, 4)
    assert cache.length == 1
    with torch.no_grad():
        close(model(**rest, cache=cache), model(**moved)[:, 1:])
    cache, rest = share_prefix(model, {"input_ids": ids, "speaker": torch.tensor([1, 2])}, 4)
    assert cache.length == 0 and cache.capacity == 7 and rest["speaker"].tolist() == [1, 2]


def test_padding_on_the_right_or_inside_is_refused(pair: Make) -> None:
    model, _ = pair("llama")
    for mask in ([1, 1, 0], [1, 0, 1]):
        with pytest.raises(ValueError, match="padding that is not on the left"):
            ids = torch.ones(2, 3, dtype=torch.long)
            share_prefix(model, {"input_ids": ids, "attention_mask": torch.tensor([mask] * 2)})


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(
    make: Callable[..., BaseModel], kind: str, static: bool
) -> None:
    model = make(kind)
    generator = torch.Generator().manual_seed(0)
    rows = [sample_row(model, count, length, generator) for count, length in ((1, 5), (0, 9), (2, 6))]
    batch = collate(rows)
    used = batch["input_ids"].shape[1]
    wrong, right = torch.randint(61, (2, 3, 4), generator=generator)
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        expected = KVCache(model, 3, 40, static=static)
        model(**batch, cache=expected)
        cropped = KVCache(model, 3, 40, static=static)
        model(**batch, cache=cropped)
        model(wrong, padded, cache=cropped)
        model(wrong, cache=cropped)
        cropped.crop(used)
        assert cropped.length == used and torch.equal(cropped.next_position, expected.next_position)
        assert torch.equal(cropped.lengths, expected.lengths)
        model(wrong[:, :2], cache=cropped)
        cropped.crop(used + 1)
        model(wrong[:, :1], cache=expected)
        close(model(right, padded, cache=cropped), model(right, padded, cache=expected))
        close(model(right, cache=cropped), model(right, cache=expected))
        cropped.crop(0)
        assert cropped.length == 0 and not cropped.memo and not cropped.next_position.any()
        close(model(**batch, cache=cropped), model(**batch))


def test_a_crop_into_a_picture_or_beyond_what_is_used_is_refused(make: Callable[..., BaseModel]) -> None:
    model = make("cogvlm")
    row = sample_row(model, 2, 5)
    cache = KVCache(model, 1, 40)
    with torch.no_grad():
        model(**row, cache=cache)
    used, position = cache.length, cache.next_position.clone()
    for length in (-1, used + 1):
        with pytest.raises(ValueError, match=f"uses {used} slots per row and cannot be cropped to {length}"):
            cache.crop(length)
    with pytest.raises(ValueError, match="would cut into a picture"):
        cache.crop(5)
    assert cache.length == used and torch.equal(cache.next_position, position)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_grown_caches_and_copies_go_on_as_they_were(
    make: Callable[..., BaseModel], kind: str, static: bool
) -> None:
    model = make(kind)
    generator = torch.Generator().manual_seed(0)
    batch = collate([sample_row(model, count, length, generator) for count, length in ((1, 5), (0, 9))])
    used = batch["input_ids"].shape[1]
    following = torch.randint(61, (2, 3), generator=generator)
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        cache, expected = KVCache(model, 2, used, static=static), KVCache(model, 2, 40)
        model(**batch, cache=cache)
        model(**batch, cache=expected)
        copied = cache.copy(rows, used + 3)
        cache.grow(used + 1)
        cache.grow(used - 1)
        assert cache.capacity == used + 1
        cache.grow(used + 3)
        logits = model(following, cache=expected)
        close(model(following, cache=cache), logits)
        close(model(following[rows], cache=copied), logits[rows])
        whole = expected.copy()
        model(following, cache=whole)  # a copy is the original's no longer
        close(model(following, cache=expected), model(following, cache=cache.copy(capacity=40)))
    with pytest.raises(ValueError, match=f"{used + 3} tokens per row do not fit into a copy with capacity=2"):
        cache.copy(capacity=2)
