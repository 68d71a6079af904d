"""First lessons for a vision tower: which letter, which word and whose box is at every place of a page.

The heads are a mixin on the nested tower; they are taken out again when the stage ends.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from examples.screen_source import training_screens
from examples.screens import Screen
from examples.words import CHARACTERS, PAGE_SIZE, WORDS
from mixformer import BaseMixin, Context, wrap
from mixformer.images import preprocess_image
from mixformer.train import Task

LETTER_STRIDE = 4
LETTER_IDS = {letter: index + 1 for index, letter in enumerate(CHARACTERS)}
WORD_IDS = {word: index + 1 for index, word in enumerate(WORDS)}


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """[n] pixel positions -> [n, size]: sines and cosines with wavelengths from 6 to 448 pixels."""
    ratios = torch.arange(size // 2) / (size // 2 - 1)
    angles = positions[:, None].float() * (2 * math.pi / (6 * (2 * PAGE_SIZE / 6) ** ratios))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sinusoid_table(grid: int, size: int) -> torch.Tensor:
    """[grid * grid, size]: each cell's column in the first half, its row in the second; cells are row-major."""
    axis = sinusoids((torch.arange(grid) + 0.5) * (PAGE_SIZE / grid), size // 2)
    return torch.cat([axis.expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)], -1).flatten(0, 1)


def soft_positions(pixels: torch.Tensor) -> torch.Tensor:
    """[...] pixel positions -> [..., 224] a Gaussian of one pixel around each, summing to one."""
    return (-0.5 * (torch.arange(PAGE_SIZE) - pixels[..., None]) ** 2).softmax(-1)


def letter_targets(screen: Screen) -> np.ndarray:
    """[56, 56] the letter at each cell of 4 pixels, 0 for none."""
    cells = np.zeros((PAGE_SIZE // LETTER_STRIDE,) * 2, np.int64)
    for letter, (x0, y0, x1, y1) in screen.letters:
        height = y1 - y0
        top, bottom = _cells(y0 + 0.2 * height, y1 - 0.15 * height)
        left, right = _cells(x0, x1)
        cells[top:bottom, left:right] = LETTER_IDS[letter]
    return cells


def _cells(low: float, high: float) -> tuple[int, int]:
    first, last = (max(0, math.ceil(edge / LETTER_STRIDE - 0.5)) for edge in (low, high))
    if last <= first:
        first = max(0, int((low + high) / 2 / LETTER_STRIDE))
        last = first + 1
    return first, last


def widget_targets(screen: Screen, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """For each cell of a grid the word and the box of the widget that covers most of it.

    Returns:
        [grid, grid] word ids, 0 for none, and [grid, grid, 4] boxes in pixels, -1 where there is no widget.
    """
    side = PAGE_SIZE / grid
    edges = np.arange(grid) * side
    words, boxes = np.zeros((grid, grid), np.int64), np.full((grid, grid, 4), -1, np.float32)
    most = np.full((grid, grid), 0.08 * side * side)
    for widget in screen.widgets:
        x0, y0, x1, y1 = widget.box
        across = np.clip(np.minimum(edges + side, x1) - np.maximum(edges, x0), 0, None)
        down = np.clip(np.minimum(edges + side, y1) - np.maximum(edges, y0), 0, None)
        area = down[:, None] * across
        area[min(int((y0 + y1) / 2 / side), grid - 1), min(int((x0 + x1) / 2 / side), grid - 1)] += side * side
        larger = area > most
        words[larger], boxes[larger], most[larger] = WORD_IDS.get(widget.word, 0), widget.box, area[larger]
    return words, boxes


class DenseReadingMixin(BaseMixin):
    """Heads on a tower that name the letter, the word and the box at each place; losses go to `ctx.losses`.

    Args:
        letters: whether to read letters from the stem's second stage (stride 4).
        letter_channels: its width.
    """

    inputs = ("word_ids", "boxes", "letter_ids")
    whole_sequence = True

    def __init__(self, letters: bool = True, letter_channels: int = 64) -> None:
        super().__init__()
        self.letters, self.letter_channels = letters, letter_channels

    def build(self, model: Any) -> None:
        size, grid = model.config.hidden_size, model.config.grid
        self.positions = nn.Parameter(2.8 * sinusoid_table(grid, size))
        self.norm = nn.LayerNorm(size)
        self.words = nn.Linear(size, len(WORDS) + 1)
        self.edges = nn.Linear(size, 4 * size)
        self.letter_head = nn.Conv2d(self.letter_channels, len(CHARACTERS) + 1, 1) if self.letters else None
        self.register_buffer("pixels", sinusoids(torch.arange(PAGE_SIZE), size) / 8, persistent=False)

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        features = old_impl(hidden_states)
        words, boxes = ctx.inputs.get("word_ids"), ctx.inputs.get("boxes")
        if words is None or boxes is None:
            return features
        x = self.norm(features + self.positions)
        boxes = boxes.flatten(1, 2)
        covered = boxes[..., 0] >= 0
        loss = F.cross_entropy(self.words(x).float().flatten(0, 1), words.flatten(), reduction="none")
        weight = torch.where(covered.flatten(), 1.0, 0.15)
        ctx.losses["words"] = (loss * weight).sum() / weight.sum()
        edges = self.edges(x[covered]).unflatten(-1, (4, -1))
        chances = (edges @ self.pixels.to(edges.dtype).T).float().log_softmax(-1)
        ctx.losses["boxes"] = -0.5 * (soft_positions(boxes[covered]) * chances).sum(-1).mean()
        if self.letter_head is not None:
            letters = self.letter_head(ctx.shared["patches.stem"]).float().permute(0, 2, 3, 1).flatten(0, 2)
            targets = ctx.require("letter_ids").flatten()
            seen = (targets > 0) | (torch.rand(targets.shape) < 0.06)
            ctx.losses["letters"] = F.cross_entropy(letters[seen], targets[seen])
        return features


class DenseReadingTask(Task):
    """Teach a nested tower to read, then start what follows it from what it learned.

    When the stage ends, the positions that the heads used become the position table after the tower. With
    `align_words` the language model starts from what the heads learned: its output head from theirs, word embeddings
    from the word classifier, coordinate embeddings from sinusoids (the basis of the position tables), and cross
    attention from the identity, so that a word in a question finds its like on the page from the first step.

    Args:
        tower: path of the nested model.
        letters: whether to teach letters as well (towers with a stem).
        fresh: whether the tower's own position table starts from sinusoids, too.
        align_words: see above.
        batch_size: pages per batch.
        seed: of the pages.
        browser_pages, browser_fraction: see `training_screens`.
    """

    def __init__(
        self, tower: str, letters: bool, fresh: bool = True, align_words: bool = False, batch_size: int = 16,
        seed: int = 1, browser_pages: int = 6000, browser_fraction: float = 0.5,
    ) -> None:
        self.tower, self.letters, self.fresh, self.align_words = tower, letters, fresh, align_words
        self.batch_size, self.seed = batch_size, seed
        self.browser_pages, self.browser_fraction = browser_pages, browser_fraction

    def prepare(self, model: Any, processor: Any) -> None:
        self.tokenizer = processor.tokenizer if self.align_words else None
        tower = dict(model.nested_models())[self.tower]
        self.grid, self.image_size = tower.config.grid, tower.config.image_size
        if self.fresh:
            with torch.no_grad():
                table = tower.transformer.position_embeddings.weight
                table[1:] = 0.3 * sinusoid_table(self.grid, table.shape[1])
        channels = tower.config.stem_channels[1] if self.letters else 0
        tower.add_mixin("dense_reading", DenseReadingMixin(self.letters, channels))

    def batches(self) -> Iterator[dict[str, Any]]:
        screens = training_screens(self.seed, self.browser_pages, self.browser_fraction)
        while True:
            chosen = list(islice(screens, self.batch_size))
            words, boxes = zip(*(widget_targets(screen, self.grid) for screen in chosen), strict=True)
            batch = {
                "images": torch.stack([preprocess_image(screen.picture, self.image_size) for screen in chosen]),
                "word_ids": torch.from_numpy(np.stack(words)),
                "boxes": torch.from_numpy(np.stack(boxes)),
            }
            if self.letters:
                batch["letter_ids"] = torch.from_numpy(np.stack([letter_targets(screen) for screen in chosen]))
            yield batch

    def loss(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = dict(model.nested_models())[self.tower].run(**batch).losses
        return losses

    def finish(self, model: Any) -> None:
        tower = dict(model.nested_models())[self.tower]
        heads = tower.del_mixin("dense_reading")
        holder = model.get_mixin(self.tower.split(".")[0])
        table = getattr(holder, "projector", holder).position_embedding
        with torch.no_grad():
            table.copy_(heads.positions)
            if self.align_words:
                self._align(model, heads)

    def _align(self, model: Any, heads: DenseReadingMixin) -> None:
        # `kinds` are directions of a word, the four edges and the end: a head row has its own, an embedding that of
        # what usually follows.
        from examples.questions import EOS, coordinate_ids, word_ids

        size = model.config.hidden_size
        embedding, head = model.transformer.word_embeddings.weight, model.get_mixin("head").linear.weight
        words = _before_norm(heads.words.weight[1:], heads.norm)
        ids = word_ids(self.tokenizer)
        embedding[ids] = 0.7 * F.normalize(words, dim=1) * math.sqrt(size)
        head[ids] = words
        kinds = F.normalize(torch.randn(6, size, generator=torch.Generator().manual_seed(size)), dim=1)
        head[ids] += kinds[0]
        embedding[ids] += 4 * kinds[1]
        axis = sinusoids(torch.arange(PAGE_SIZE), size // 2)
        for edge, ids in enumerate(coordinate_ids(self.tokenizer)):
            embedding[ids] = F.pad(axis, (size // 2, 0) if edge % 2 else (0, size // 2))
            rows = heads.pixels @ heads.edges.weight[edge * size : (edge + 1) * size]
            head[ids] = 0.5 * _before_norm(rows, heads.norm) + kinds[edge + 1]
            embedding[ids] += 4 * kinds[edge + 2] if edge < 3 else 2 * (kinds[0] + kinds[5])
        head[EOS] += kinds[5]
        for layer in model.transformer.layers:
            if "cross" in layer.mixins:
                _start_matching(layer.mixins["cross"])


def _before_norm(rows: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Rows of a linear layer after a LayerNorm -> rows that give the same, up to scale, before it."""
    rows = rows * norm.weight
    return rows - rows.mean(1, keepdim=True)


def _start_matching(cross: Any) -> None:
    """Start cross attention as a comparison of what a token holds with what the tower saw, in the tower's own basis.

    Raises:
        ValueError: widths that differ.
    """
    size = cross.query.in_features
    if not size == cross.query.out_features == cross.key_value.in_features:
        raise ValueError("Aligned cross attention needs equal widths of the model, the tower and the cross attention.")
    same = torch.eye(size)
    for weight, factor in (
        (cross.query.weight, 0.9), (cross.key_value.weight[:size], 0.9), (cross.key_value.weight[size:], 0.5),
        (cross.dense.weight, 0.3),
    ):  # fmt: skip
        weight.add_(factor * same)
