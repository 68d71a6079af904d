"""SimVLM beside HF's ResNet and GPT-2, whose layers are given the mask and the positions of its formula."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from models.simvlm import SimVLM, SimVLMConfig
from tests.zoo.clipcap import gpt2
from tests.zoo.gpt2 import tiny_gpt2
from tests.zoo.harness import Size, System, copy_weights, difference, jittered, reloaded

IMAGE, SIDE, NUM_HEADS, TEXT = 96, 2, 4, 40
Tensors = dict[str, torch.Tensor]


def tiny_config(**changes: Any) -> SimVLMConfig:
    """A small one: pictures of 16 x 16 pixels are 2 x 2 features."""
    vision = replace(SimVLMConfig().vision, image_size=16, channels=[8, 12, 16], depths=[1, 2])
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": NUM_HEADS, "max_positions": TEXT,
        "image_token_id": IMAGE, "vision": vision,
    }
    return SimVLMConfig(**{**sizes, **changes})


def rows() -> Tensors:
    """A picture after padding, two in a row with text before them, and text alone; -100 up to the end of the prefix."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(2, IMAGE, (3, 16), generator=generator), torch.ones(3, 16, dtype=torch.int64)
    ids[0, 3:7] = ids[1, 2:10] = IMAGE
    mask[0, :3] = mask[2, 14:] = 0
    lengths = torch.tensor([6, 10, 5])
    starts = mask.argmax(1) + lengths
    labels = ids.masked_fill((torch.arange(16) < starts[:, None]) | (mask == 0), -100)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "prefix_lengths": lengths, "labels": labels, "images": images}


def allowed(mask: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[b, s, s]: what each token of each row may see, token by token."""
    found = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for row, length in enumerate(lengths):
        real = [slot for slot, there in enumerate(mask[row].tolist()) if there]
        prefix = set(real[:length])
        for i in range(mask.shape[1]):
            found[row, i, i] = True
            for j in real:
                found[row, i, j] |= i in real and (j <= i or (i in prefix and j in prefix))
    return found


def relative(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[b, n, s, s]: what one layer adds to scores, pair by pair of one picture."""
    found, size, width = torch.zeros(len(ids), NUM_HEADS, ids.shape[1], ids.shape[1]), SIDE * SIDE, 2 * SIDE - 1
    for row, line in enumerate(ids):
        slots = (line == IMAGE).nonzero().flatten().tolist()
        for start in range(0, len(slots), size):
            for i in range(size):
                for j in range(size):
                    down, across = i // SIDE - j // SIDE, i % SIDE - j % SIDE
                    offset = (down + SIDE - 1) * width + across + SIDE - 1
                    found[row, :, slots[start + i], slots[start + j]] = table[offset]
    return found


class Reference:
    """HF's parts, and a small SimVLM with their weights."""

    def __init__(self) -> None:
        from transformers import ResNetConfig, ResNetModel

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2]}
        self.vision = jittered(ResNetModel(ResNetConfig(**sizes)))
        options = {"activation_function": "gelu", "layer_norm_epsilon": 1e-6, "n_positions": TEXT + SIDE * SIDE}
        self.language = tiny_gpt2(**options)
        self.model = jittered(SimVLM(tiny_config()))
        text = gpt2(self.language).state_dict()
        self.positions = text["transformer.position_embeddings.weight"]
        text["transformer.position_embeddings.weight"] = self.positions[:TEXT]
        with tempfile.TemporaryDirectory() as folder:
            tower = reloaded(self.vision, Path(folder)).state_dict()
        weights = {**self.model.state_dict(), **text, "mixins.positions.table": self.positions[TEXT:]}
        copy_weights(self.model, {**weights, **{f"mixins.image.tower.{name}": x for name, x in tower.items()}})

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int], images: torch.Tensor) -> Any:
        """[b, s, v] logits."""
        language, linear = self.language, self.model.get_mixin("image").projector.linears[0]
        embeddings, text = language.transformer.wte(ids).clone(), (ids != IMAGE) & (mask == 1)
        if len(images):
            features = self.vision(images).last_hidden_state.flatten(2).mT
            embeddings[ids == IMAGE] = (features @ linear.weight.T + linear.bias).flatten(0, 1)
        places = (text.cumsum(1) - 1).clamp_min(0)
        places[ids == IMAGE] = TEXT + torch.arange(SIDE * SIDE).repeat(len(images))
        seen = torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1])
        seen.masked_fill_(~allowed(mask, lengths)[:, None], float("-inf"))
        hooks = [
            block.attn.register_forward_pre_hook(
                partial(_with_bias, relative(ids, layer.mixins["relative"]["table"])), with_kwargs=True
            )
            for block, layer in zip(language.transformer.h, self.model.transformer.layers, strict=True)
        ]
        out = language(inputs_embeds=embeddings, position_ids=places, attention_mask=seen)
        for hook in hooks:
            hook.remove()
        return out.logits


def _with_bias(bias: torch.Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + bias}


@torch.no_grad()
def parity() -> dict[str, float]:
    """Features; logits with pictures and without; the loss behind the prefix."""
    reference, batch = Reference(), rows()
    model, labels = reference.model, batch.pop("labels")
    ids, mask, lengths, images = batch["input_ids"], batch["attention_mask"], batch["prefix_lengths"], batch["images"]
    theirs = reference(ids, mask, lengths.tolist(), images)
    real, text = mask.bool(), ids.clamp(max=IMAGE - 1)
    loss = SimVLM.objective(model, {**batch, "labels": labels})["language"]  # type: ignore[misc]
    learnt = [(row, i) for row in range(3) for i in range(1, 16) if labels[row, i] >= 0]
    expected = torch.stack([-theirs[row, i - 1].log_softmax(-1)[ids[row, i]] for row, i in learnt]).mean()
    whole = torch.full((3,), 16)
    return {
        "logits": difference(model(**batch)[real], theirs[real]),
        "loss": difference(loss, expected),
        "logits of text": difference(
            model(text, prefix_lengths=lengths),
            reference(text, torch.ones_like(mask), lengths.tolist(), images[:0]),
        ),
        "logits, all prefix": difference(
            model(ids, images=images, prefix_lengths=whole),
            reference(ids, torch.ones_like(mask), whole.tolist(), images),
        ),
    }


def count(size: int, num_layers: int, num_heads: int, channels: Sequence[int], depths: Sequence[int]) -> int:
    """Parameters by their shapes, at 224 pixels: 14 x 14 features."""
    words, text, side = 32000, 512, 14
    vision = 3 * 49 * channels[0] + 2 * channels[0]
    for (before, after), depth in zip(pairwise(channels), depths, strict=True):
        inner = after // 4
        for width in [before] + [after] * (depth - 1):
            vision += width * inner + 9 * inner * inner + inner * after + 2 * (inner + inner + after)
        vision += before * after + 2 * after
    layer = 12 * size * size + 13 * size + (2 * side - 1) ** 2 * num_heads
    embeddings = (words + text + side * side) * size
    return vision + channels[-1] * size + size + embeddings + num_layers * layer + 2 * size


_SOURCE = "the shapes of the paper's ViT sizes and ResNet stages; texts of 512 tokens and the tied head are ours"

SYSTEM = System(
    name="SimVLM",
    key="simvlm",
    family="joint",
    paper="2108.10904",
    model="models.simvlm:SimVLM",
    loss="next token behind a random prefix",
    reference="HF ResNet and GPT-2 with the formula's mask",
    parity=parity,
    sizes={
        "base": Size(count(768, 12, 12, [64, 256, 512, 1024], [3, 4, 23]), _SOURCE),
        "large": Size(count(1024, 24, 16, [64, 256, 512, 1024], [3, 8, 36]), _SOURCE, "large.yaml"),
        "huge": Size(count(1280, 32, 16, [80, 320, 640, 1280], [3, 8, 36]), _SOURCE, "huge.yaml"),
    },
    chats=True,
    images=True,
)
