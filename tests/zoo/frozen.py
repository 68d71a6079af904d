"""Frozen beside the formula of its encoder in front of HF's LLaMA, and of HF's GPT-2."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixformer.connectors import ProjectorConfig
from mixformer.mixins import ImageMixin
from mixformer.objectives import LanguageObjective
from models.frozen import Frozen, FrozenConfig
from models.nf_resnet import NFResNetConfig
from tests.zoo.clipcap import gpt2
from tests.zoo.gpt2 import tiny_gpt2
from tests.zoo.harness import Size, System, copy_weights, difference, jittered, reloaded
from tests.zoo.llava import IMAGE, Spliced, beside, hf, llama_config, spliced_batch
from tests.zoo.resnet import normalizer_free

DEPTHS = [2, 1]
Tensors = dict[str, torch.Tensor]


def encoder() -> NFResNetConfig:
    """A small encoder of 16 x 16 pixels."""
    return replace(FrozenConfig().vision, image_size=16, channels=[8, 16, 24], depths=DEPTHS)


def tokens(images: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """[m, 3, y, x] -> [m, 2, h]: the mean of the places and one Linear, cut in two; weights as of the image mixin."""
    tower = {name.removeprefix("tower."): x for name, x in weights.items() if name.startswith("tower.")}
    vectors = normalizer_free(images, tower, DEPTHS).mean((2, 3))
    both = vectors @ weights["projector.linears.0.weight"].T + weights["projector.linears.0.bias"]
    return torch.stack(both.chunk(2, dim=1), 1)


def tiny(language: Any) -> Frozen:
    """A small one over an HF LLaMA."""
    with tempfile.TemporaryDirectory() as folder:
        text = reloaded(language, Path(folder))
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "inner_hidden_size": 48, "max_positions": 512,
    }
    model = jittered(Frozen(FrozenConfig(**sizes, vision=encoder(), image_token_id=IMAGE)))
    copy_weights(model, {**model.state_dict(), **text.state_dict()})
    return model


@torch.no_grad()
def before_gpt2() -> dict[str, float]:
    """The same encoder put before GPT-2, whose positions count on over picture and text."""
    reference = tiny_gpt2()
    model = gpt2(reference)
    adapter = ProjectorConfig(tokens_per_feature=2)
    image: Any = model.add_mixin("image", ImageMixin(encoder(), adapter, marks=False, position_ids="counted"))
    jittered(image, 4)
    generator = torch.Generator().manual_seed(3)
    images, ids = torch.randn(2, 3, 16, 16, generator=generator), torch.randint(1, 97, (2, 9), generator=generator)
    types, labels = torch.zeros_like(ids), ids.clone()
    types[:, :2], labels[:, :2] = 1, -100
    prefix, text = tokens(images, image.state_dict()), reference.transformer.wte(ids[:, 2:])
    theirs = reference(inputs_embeds=torch.cat([prefix, text], 1), labels=labels)
    batch = {"input_ids": ids, "token_type_ids": types, "images": images}
    loss = LanguageObjective()(model, {**batch, "labels": labels})["language"]
    return {"GPT-2, logits": difference(model(**batch), theirs.logits), "GPT-2, loss": difference(loss, theirs.loss)}


@torch.no_grad()
def parity() -> dict[str, float]:
    """Tokens of pictures; logits, the loss and generation with one picture, several in a row and none."""
    language, batch = hf(llama_config()), spliced_batch(2, 16)
    model = tiny(language)
    image: Any = model.get_mixin("image")
    weights = image.state_dict()
    reference = Spliced(language, lambda images: tokens(images, weights))
    found = {"tokens of pictures": difference(image.encode(batch["images"]), tokens(batch["images"], weights))}
    return {**found, **beside(model, reference, batch), **before_gpt2()}


NF_RESNET_50 = 25_557_032 - (2048 * 1000 + 1000)
LLAMA_7B = 6_738_415_616

SYSTEM = System(
    name="Frozen",
    key="frozen",
    family="learned prefix",
    paper="2106.13884",
    model="models.frozen:Frozen",
    loss="next token of the caption",
    reference="the encoder's formula before HF LLaMA and HF GPT-2",
    parity=parity,
    sizes={
        "NF-ResNet-50 and LLaMA-7B": Size(
            LLAMA_7B + NF_RESNET_50 + 2048 * 8192 + 8192,
            "LLaMA-7B's and NF-ResNet-50's counts and one Linear; the paper's own language model is not published",
        )
    },
    chats=True,
    images=True,
)
