"""Many prompts and many turns: batches of unequal prompts, continuous slots, conversations, shared prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mixformer import BaseModel, generate
from mixformer.conversation import Conversation
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.slots import generate_queue
from mixformer.testing import collate, jitter
from models.cogvlm import CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig

from .floor import Cache, FloorLLaMA
from .harness import Group, Options, Run, case
from .peers import FULL, QUICK, make_peers

Prompt = torch.Tensor


def random_prompts(vocab_size: int, lengths: list[int]) -> list[Prompt]:
    """[1, s] token ids each."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocab_size, (1, length), generator=generator) for length in lengths]


def spaced(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from first to last, in a mixed order."""
    numbers = [first + (last - first) * index // (count - 1) for index in range(count)]
    return [numbers[index * 5 % count] for index in range(count)]


@torch.no_grad()
def floor_generate(model: FloorLLaMA, prompt: Prompt, num_new: int) -> torch.Tensor:
    """[1, s] -> [new], greedily."""
    cache = Cache(model, 1, prompt.shape[1] + num_new)
    tokens = [model(prompt, cache, last_only=True)[:, -1].argmax(-1)]
    while len(tokens) < num_new:
        tokens.append(model(tokens[-1][:, None], cache)[:, -1].argmax(-1))
    return torch.cat(tokens)


def fixed_batches(model: BaseModel, prompts: list[Prompt], numbers: list[int], size: int) -> list[torch.Tensor]:
    """Answers of batches of `size` prompts, each batch as long as its longest answer."""
    answers = []
    for first in range(0, len(prompts), size):
        part = numbers[first : first + size]
        batch = collate([{"input_ids": prompt} for prompt in prompts[first : first + size]])
        found = generate(model, batch, max(part))
        answers += [row[:number] for row, number in zip(found, part, strict=True)]
    return answers


@case("batch", "Batches of unequal prompts")
@torch.no_grad()
def batch(options: Options) -> Iterator[Group]:
    """Greedy generation; all tokens must be equal. First 8 prompts of 20 to 200 tokens, 32 new tokens each, padded into
    one batch or one after another. Then a queue of 24 prompts of 20 to 200 tokens with 4 to 64 new tokens, 4 at a time:
    in slots that take the next prompt as soon as an answer ends, or in fixed batches of 4 that last as long as their
    longest answer. The floor runs every prompt alone."""
    peers = make_peers(options.pick(FULL, QUICK))
    num_new = options.pick(32, 3)
    vocab_size = peers.ours.config.vocab_size
    prompts = random_prompts(vocab_size, spaced(*options.pick((20, 200), (3, 9)), 8))
    padded = collate([{"input_ids": prompt} for prompt in prompts])
    runs = {
        "floor, one at a time": Run(lambda: torch.stack([floor_generate(peers.floor, p, num_new) for p in prompts])),
        "mixformer, one batch": Run(lambda: generate(peers.ours, padded, num_new)),
        "mixformer, one at a time": Run(
            lambda: torch.cat([generate(peers.ours, {"input_ids": p}, num_new) for p in prompts])
        ),
    }
    if peers.hf is not None:
        from transformers import GenerationConfig

        how = GenerationConfig(max_new_tokens=num_new, do_sample=False, pad_token_id=0, eos_token_id=None)
        width = padded["input_ids"].shape[1]
        runs["HF, one batch"] = Run(lambda: peers.hf.generate(**padded, generation_config=how)[:, width:])
    yield Group(
        f"8 prompts, {num_new} new tokens each", runs, ("floor, one at a time",), rounds=8, warmup=1,
        skipped=peers.skipped,
    )
    count = options.pick(24, 6)
    prompts = random_prompts(vocab_size, spaced(*options.pick((20, 200), (3, 9)), count))
    numbers = spaced(*options.pick((4, 64), (1, 6)), count)[::-1]
    queue = [{"input_ids": prompt} for prompt in prompts]

    def in_slots() -> list[torch.Tensor]:
        found = dict(generate_queue(peers.ours, queue, num_slots=4, max_new_tokens=numbers))
        return [found[index] for index in range(count)]

    runs = {
        "mixformer, fixed batches of 4": Run(lambda: fixed_batches(peers.ours, prompts, numbers, 4)),
        "mixformer, 4 slots": Run(in_slots),
        "floor, one at a time": Run(
            lambda: [floor_generate(peers.floor, p, number) for p, number in zip(prompts, numbers, strict=True)]
        ),
    }
    yield Group(
        f"{count} prompts, {min(numbers)} to {max(numbers)} new tokens", runs,
        ("mixformer, fixed batches of 4", "floor, one at a time"), rounds=6, warmup=1,
        facts={"new tokens in all": sum(numbers)},
    )


class LetterTokenizer:
    """One token for each letter, and no end: answers and prompts of known lengths without a tokenizer's files."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [3 + (ord(letter) - 32) % (self.vocab_size - 3) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(32 + int(number) - 3) for number in ids)

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


def cogvlm_490(options: Options) -> tuple[BaseModel, Processor, Image.Image]:
    """CogVLM-17B at 490, an eighth as wide and a quarter as deep; its processor; a picture."""
    sizes = options.pick(FULL, QUICK)
    tower: dict[str, Any] = options.pick(
        {"hidden_size": 224, "num_layers": 15, "num_heads": 14, "inner_hidden_size": 1920, "image_size": 490},
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 28},
    )
    config = CogVLMConfig(**sizes, vision=EVA2CLIPEConfig(**tower))
    model = config.build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model, scale=0.01)
    side = tower["image_size"]
    settings = ProcessorConfig(image_size=side, placeholder_id=0, stop_ids=())
    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return model, Processor(settings, LetterTokenizer(config.vocab_size)), Image.fromarray(pixels.numpy())


class Turns:
    """A conversation that has answered its first question, and new questions of equal length for it."""

    def __init__(self, model: BaseModel, processor: Processor, picture: Image.Image, answer_length: int) -> None:
        self.model, self.processor, self.picture = model, processor, picture
        self.conversation = Conversation(model, processor)
        self.conversation.ask("What is shown in this image?", picture, answer_length)
        self.history = list(self.conversation.history)
        self.numbers = itertools.count()

    def question(self) -> str:
        """One that was not asked before; it differs in its first letter from the last one."""
        number = next(self.numbers)
        return f"{'ABCDEFGH'[number % 8]}nd what is at its left, {number:06d}?"

    def first(self) -> str:
        """The first turn: picture, question, one token."""
        return Conversation(self.model, self.processor).ask("What is shown in this image?", self.picture, 1)

    def kept(self, question: str | None = None, num_new: int = 1) -> str:
        """A further turn with what is in the cache."""
        return self.conversation.ask(question or self.question(), None, num_new)

    def back(self) -> None:
        """Forget the further turn."""
        self.conversation.history[:] = self.history

    def recomputed(self, question: str | None = None, num_new: int = 1) -> str:
        """The same turn without a cache from before."""
        made = self.processor(question or self.question(), self.picture, history=self.history)
        return self.processor.decode(generate(self.model, made, num_new)[0]).strip()


@case("chat", "Chat turns and shared prefixes")
@torch.no_grad()
def chat(options: Options) -> Iterator[Group]:
    """At the proportions of CogVLM-17B at 490: an eighth of its width and a quarter of its depth, 1227 tokens for the
    picture, a tower that costs 0.63 of the language model per token; one letter is one token. Time to the first token
    of the first question about a picture (with reading the picture), and of a further question about it, after an
    answer of 24 tokens, with the cache kept or everything run again. Then 8 questions of unequal length about one
    picture in one batch, with what they share run once."""
    model, processor, picture = cogvlm_490(options)
    turns = Turns(model, processor, picture, options.pick(24, 3))
    asked = "What colour is the second thing from the left?"
    runs = {
        "first turn": Run(turns.first, compared=False),
        "further turn, cache kept": Run(turns.kept, turns.back, lambda: turns.kept(asked, 8).strip()),
        "further turn, recomputed": Run(turns.recomputed, None, lambda: turns.recomputed(asked, 8)),
    }
    turns.kept()
    facts = {"tokens run in a further turn": float(turns.conversation.tokens_run)}
    turns.back()
    yield Group(
        "time to first token of a turn", runs, ("first turn", "further turn, recomputed"), rounds=10, warmup=1,
        reference="further turn, recomputed", facts=facts,
    )
    num_new = options.pick(8, 2)
    questions = [f"Question {'?' * (3 * index)} what is this?" for index in range(8)]
    given = processor(questions, [picture] * len(questions))
    yield Group(
        "8 questions about one picture", shared_and_not(model, given, num_new), ("each row whole",), rounds=4, warmup=1
    )
    system = "You are a helpful assistant that answers in few words. " * options.pick(8, 1)
    given = processor([system + question for question in questions])
    yield Group(
        f"8 questions after a system prompt of {len(system)} tokens", shared_and_not(model, given, num_new),
        ("each row whole",), rounds=6, warmup=1,
    )


def shared_and_not(model: BaseModel, given: dict[str, Any], num_new: int) -> dict[str, Run]:
    """Generating for a batch whose rows begin alike, in both ways."""
    return {
        "each row whole": Run(lambda: generate(model, given, num_new)),
        "shared prefix run once": Run(lambda: generate(model, given, num_new, share_prefix=True)),
    }
