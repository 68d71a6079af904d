"""Conversations that keep their cache, so that a further question runs only what is new."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from mixformer.cache import KVCache
from mixformer.data.processor import Images, Processor, join_picture_inputs
from mixformer.generate import LogitsProcessor, stream
from mixformer.images import ImageSource, load_image
from mixformer.model import BaseModel
from mixformer.prompts import Turn
from mixformer.tokenizer import stream_text


@dataclass(frozen=True)
class _Picture:
    """A picture of a conversation.

    Attributes:
        content: equal for equal pixels.
        inputs: {"images": [k, 3, y, x], "cross_images": ...}, what the model reads.
    """

    content: bytes
    inputs: dict[str, torch.Tensor]

    @property
    def num_images(self) -> int:
        """k, the images of the model that the picture becomes: its tiles, or one."""
        return len(self.inputs["images"])


class Conversation:
    """Questions and answers in turn, over one cache: a question runs only the tokens that are new.

    Every turn, the processor writes the whole conversation down. As many leading tokens as are in the cache already,
    with the same pictures, stay there; the cache is cropped behind them and the rest is run, so an answer that reads
    back as other tokens than were generated is run again. The answers are those of recomputing everything. The
    conversation starts anew by itself when tokens before a picture change, and, in models with cross attention, when
    a picture is added, since there every token sees every picture.

    A turn counts once its answer is complete: a stream that was broken off, or an error, leaves `history` as it was.
    After changing the model (weights, mixins, device), call `reset`.

    Args:
        model: a language model that runs token by token.
        processor: of the model.
        template: name of the prompt template; None for the processor's.

    Attributes:
        history: past (question, answer) turns. It may be edited; what changed is run again.
        tokens_run: tokens of the last prompt that the model ran.

    Raises:
        ValueError: a model that reads whole sequences only.
    """

    def __init__(self, model: BaseModel, processor: Processor, template: str | None = None) -> None:
        if not model.config.causal or model.whole_sequence:
            raise ValueError(
                f"{type(model).__name__} reads whole sequences only, so turns cannot go on from a cache. Use a causal "
                f"language model."
            )
        self.model, self.processor, self.template = model, processor, template
        self.history: list[Turn] = []
        self.tokens_run = 0
        self._pictures: list[_Picture] = []  # of the turns in `history`
        self._cache: KVCache | None = None
        self._cached: list[tuple[int, int]] = []  # ids and token types; the first `_cache.length` are in the cache
        self._cached_pictures: list[_Picture] = []
        self._turn = 0

    def ask(
        self,
        prompt: str,
        images: Images = None,
        max_new_tokens: int = 256,
        sample: dict[str, float] | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        generator: torch.Generator | None = None,
    ) -> str:
        """Answer a question; arguments as of `stream`."""
        pieces = self.stream(prompt, images, max_new_tokens, sample, processors=processors, generator=generator)
        return "".join(pieces).rstrip()

    def stream(
        self,
        prompt: str,
        images: Images = None,
        max_new_tokens: int = 256,
        sample: dict[str, float] | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """Yield the answer to a question in pieces of text, as it is generated.

        Args:
            prompt: the question.
            images: pictures that come with it and join those of the turns before. One that the conversation has
                already is not added again, unless the prompt marks a place for it.
            max_new_tokens: the answer ends after so many tokens, or where learned positions end.
            sample: as of `mixformer.generate.stream`.
            processors: as of `mixformer.generate.stream`.
            generator: of the draws.

        Raises:
            ValueError: what the processor or the model refuses; a stream that is read on after another question.
        """
        self._turn += 1
        turn = self._turn
        pictures = [*self._pictures, *self._new_pictures(prompt, images)]
        # Of the pictures only the number counts here; their tensors are made already.
        contents, spans = [picture.content for picture in pictures], [picture.num_images for picture in pictures]
        row = self.processor._row(prompt, contents, self.template, self.history, spans)
        prompt_tokens = list(zip(row.ids, row.types, strict=True))
        max_new_tokens = self._limited(prompt_tokens, max_new_tokens)
        batch = self._prepare(prompt_tokens, pictures, max_new_tokens)
        tokens = self._generate(batch, max_new_tokens, sample=sample, processors=processors, generator=generator)
        answer = ""
        for piece in stream_text(self.processor.tokenizer, tokens):
            piece = piece if answer else piece.lstrip()
            answer += piece
            yield piece
            if turn != self._turn:
                raise ValueError("Another question was asked meanwhile. Read an answer to its end, or leave it there.")
        self._pictures = pictures
        self.history.append((prompt, answer.rstrip()))

    def reset(self) -> None:
        """Forget everything; the next question starts a new conversation."""
        self.history, self._pictures = [], []
        self._cache, self._cached, self._cached_pictures = None, [], []
        self.tokens_run = 0
        self._turn += 1

    def _new_pictures(self, prompt: str, images: Images) -> list[_Picture]:
        config, processor = self.processor.config, self.processor
        sources: list[ImageSource] = []
        if images is not None:
            sources = list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
        slot = config.spelling.image_slot if config.place == "slot" else None
        known = {picture.content: picture for picture in self._pictures}
        pictures = []
        for source in sources:
            picture = load_image(source)
            content = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            if content not in known:
                pictures.append(_Picture(content, processor.picture_inputs(processor.split(picture))))
            elif slot is not None and slot in prompt:
                pictures.append(known[content])
        return pictures

    def _prepare(
        self, tokens: list[tuple[int, int]], pictures: list[_Picture], max_new_tokens: int
    ) -> dict[str, torch.Tensor]:
        """Crop the cache to what stays, make room, and return the inputs of the rest."""
        kept, needed = self._reusable(tokens, pictures), len(tokens) + max_new_tokens
        if self._cache is None:
            self._cache = KVCache(self.model, 1, needed + needed // 2)
        self._cache.crop(kept)
        if self._cache.capacity < needed:
            self._cache.grow(needed + needed // 2)
        self._cached, self._cached_pictures = list(tokens), pictures
        self.tokens_run = len(tokens) - kept
        device = self.model.device
        ids, types = torch.tensor(tokens[kept:], device=device).unbind(1)
        batch = {"input_ids": ids[None]}
        if self.processor.config.prefix_lm:
            batch["prefix_lengths"] = torch.tensor([len(tokens)], device=device)
        num_kept = self._num_whole(tokens[:kept], pictures)
        if pictures[num_kept:]:
            batch["token_type_ids"] = types[None]
            joined = join_picture_inputs([picture.inputs for picture in pictures[num_kept:]])
            batch.update({name: value.to(device) for name, value in joined.items()})
        return batch

    @property
    def _span(self) -> int:
        """Tokens of one image of the model, boi and eoi included."""
        return self.processor.config.span_length

    def _num_whole(self, tokens: list[tuple[int, int]], pictures: list[_Picture]) -> int:
        """How many of the pictures have all their tokens among these, which begin the conversation."""
        marked = sum(kind for _, kind in tokens)
        lengths = accumulate(picture.num_images * self._span for picture in pictures)
        return sum(length <= marked for length in lengths)

    def _limited(self, tokens: list[tuple[int, int]], max_new_tokens: int) -> int:
        """`max_new_tokens`, or as many as learned positions leave room for."""
        config = self.model.config
        if config.positions != "learned":
            return max_new_tokens
        patches = self.processor.config.image_length
        kinds = {getattr(mixin, "position_ids", None) for mixin in self.model.mixins.values()}
        saved = patches - 1 if "shared" in kinds else self._span if "none" in kinds else 0
        shared = sum(kind for _, kind in tokens) // max(1, self._span) * saved
        needed = len(tokens) - shared
        if needed > config.max_positions:
            raise ValueError(
                f"The conversation takes {needed} positions, but the model has {config.max_positions}. Start a new one "
                f"with reset(), or shorten its history."
            )
        return min(max_new_tokens, config.max_positions - needed + 1)  # the last token is not run

    def _reusable(self, tokens: list[tuple[int, int]], pictures: list[_Picture]) -> int:
        """How many leading tokens of the cache can stay; 0 to start anew."""
        if self._cache is None or self.processor.config.prefix_lm:  # every token of a prefix sees all of it
            return 0
        pairs = zip(self._cached_pictures, pictures, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old.content != new.content), None)
        same = min(len(self._cached_pictures), len(pictures)) if same is None else same
        if self.processor.config.cross_image_size is not None:
            if not same == len(pictures) == len(self._cached_pictures):
                return 0
        cached = self._cached[: self._cache.length]
        most = min(len(cached), len(tokens) - 1)  # one token must run, for its logits
        kept = next((place for place in range(most) if cached[place] != tokens[place]), most)
        # The span of a picture stays as a whole and with the same picture, or not at all.
        marked = [place for place, (_, kind) in enumerate(tokens) if kind]
        same = min(same, self._num_whole(tokens[:kept], pictures))
        whole = self._span * sum(picture.num_images for picture in pictures[:same])
        if whole < len(marked):
            kept = min(kept, marked[whole])
        return 0 if any(kind for _, kind in cached[kept:]) else kept

    def _generate(self, batch: dict[str, torch.Tensor], max_new_tokens: int, **options: Any) -> Iterator[int]:
        """Yield the tokens of the answer, without the one that stops it."""
        config, cache = self.processor.config, self._cache
        assert cache is not None
        steps = stream(
            self.model, batch, max_new_tokens, cache, stop_tokens=config.stop_ids, pad_token=config.pad_id, **options
        )
        while True:
            try:
                token = next(steps, None)
            except BaseException:
                self._cache = None  # interrupted anywhere, its parts may not fit each other
                raise
            if token is None:
                return
            number = int(token[0])
            self._cached.append((number, 0))
            if number in config.stop_ids:
                return
            yield number
