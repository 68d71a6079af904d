"""LLaVA beside HF's; and the HF parts that VILA and MobileVLM, which HF does not have, are put together from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mixformer import generate
from mixformer.objectives import LanguageObjective
from tests.zoo.harness import Size, System, copy_weights, difference, jittered, reloaded

IMAGE = 96
VOCABULARY = 97
Tensors = dict[str, torch.Tensor]


def llama_config(**changes: Any) -> Any:
    """A small HF LLaMA's, with grouped heads."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "eos_token_id": None,
    }
    return LlamaConfig(**{**sizes, **changes})


def clip_config(**changes: Any) -> Any:
    """A small HF CLIP vision tower's: 16 patches, three layers."""
    from transformers import CLIPVisionConfig

    sizes = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }
    return CLIPVisionConfig(**{**sizes, **changes})


def tiny_hf(text: Any = None, vision: Any = None, **changes: Any) -> Any:
    """A small HF LLaVA with noise on every parameter."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text or llama_config(), vision_config=vision or clip_config(),
        **{"image_token_index": IMAGE, "image_seq_length": 16, **changes},
    )
    return jittered(LlavaForConditionalGeneration(config))


def spliced_batch(size: int, side: int, image_id: int = IMAGE) -> Tensors:
    """Three rows: a picture after padding, two adjacent ones and a third, and none.

    Args:
        size: tokens of a picture.
        side: of a picture in pixels.
        image_id: of its tokens.

    Returns:
        input_ids, attention_mask and labels (-100 on pictures, padding and the first text) [3, s]; images [4, 3, y, x].
    """
    generator = torch.Generator().manual_seed(size)
    length = 3 * size + 8
    ids, mask = torch.randint(3, IMAGE, (3, length), generator=generator), torch.ones(3, length, dtype=torch.int64)
    ids[0, -size - 4 : -4] = image_id
    ids[1, 2 : 2 + 2 * size] = ids[1, 2 * size + 4 : 3 * size + 4] = image_id
    mask[0, : length - size - 6] = mask[2, :3] = 0
    labels = ids.masked_fill((ids == image_id) | (mask == 0), -100)
    labels[:, :-6] = -100
    labels[2, 8:] = ids[2, 8:]
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels,
        "images": torch.randn(4, 3, side, side, generator=generator),
    }


def inputs(batch: Tensors) -> Tensors:
    """A batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def foreign(batch: Tensors) -> Tensors:
    """A batch as HF names it."""
    return {"pixel_values" if name == "images" else name: tensor for name, tensor in batch.items()}


def differing(ours: torch.Tensor, theirs: Sequence[Any] | torch.Tensor) -> float:
    """How many tokens differ."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    return float((ours != theirs).sum())


@torch.no_grad()
def beside(model: Any, reference: Any, batch: Tensors) -> dict[str, float]:
    """Logits of real tokens, the loss and eight greedy tokens of a model beside HF's; also logits of text alone."""
    real, plain = batch["attention_mask"].bool(), inputs(batch)
    theirs = reference(**foreign(batch))
    text = batch["input_ids"].clamp(max=IMAGE - 1)
    written = generate(model, plain, max_new_tokens=8)
    length = batch["input_ids"].shape[1]
    expected = reference.generate(
        **foreign(plain), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return {
        "logits": difference(model(**plain)[real], theirs.logits[real]),
        "loss": difference(LanguageObjective()(model, batch)["language"], theirs.loss),
        "greedy tokens that differ": differing(written[:, -8:], expected[:, length:]),
        "logits of text": difference(model(text), reference(text).logits),
    }


@torch.no_grad()
def parity() -> dict[str, float]:
    """Features, logits, the loss and generation; then the other layers and the cls token that HF can select."""
    reference, batch = tiny_hf(), spliced_batch(16, 16)
    with tempfile.TemporaryDirectory() as folder:
        model = reloaded(reference, Path(folder) / "hf")
        features = reference.get_image_features(batch["images"]).pooler_output
        found = {
            "image features": difference(model.get_mixin("image").encode(batch["images"]), torch.stack(features)),
            **beside(model, reference, batch),
        }
        for layer, strategy in ((-1, "default"), (1, "default"), (-2, "full")):
            reference = tiny_hf(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
            model = reloaded(reference, Path(folder) / f"{layer}{strategy}")
            other = batch if strategy == "default" else spliced_batch(17, 16)
            theirs, real = reference(**foreign(inputs(other))).logits, other["attention_mask"].bool()
            found[f"logits with layer {layer}, {strategy}"] = difference(model(**inputs(other))[real], theirs[real])
    return found


def hf(config: Any) -> Any:
    """A small HF LLaMA or CLIP vision tower with noise on every parameter."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    torch.manual_seed(0)
    return jittered({"llama": LlamaForCausalLM, "clip_vision_model": CLIPVisionModel}[config.model_type](config))


def assembled(model_class: Any, language: Any, vision: Any, adapter: Any, projector: Tensors) -> Any:
    """A system of ours with the weights of an HF LLaMA, an HF CLIP vision tower and a projector.

    Args:
        model_class: a subclass of LLaVA.
        language: the LLaMA.
        vision: the tower.
        adapter: config of the projector.
        projector: its weights, by our names within it.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, tower = reloaded(language, Path(folder) / "language"), reloaded(vision, Path(folder) / "vision")
    sizes = {field.name: getattr(text.config, field.name) for field in fields(text.config)}
    read = replace(tower.config, num_layers_run=tower.config.num_layers - 1)
    model = model_class(model_class.Config(**sizes, vision=read, adapter=adapter, image_token_id=IMAGE))
    inner = {"tower": tower.state_dict(), "projector": projector}
    image = {f"mixins.image.{part}.{name}": x for part, tensors in inner.items() for name, x in tensors.items()}
    copy_weights(model, {**text.state_dict(), **image})
    return model.eval()


@torch.no_grad()
def patches(vision: Any, images: torch.Tensor) -> torch.Tensor:
    """What language models read of an HF CLIP vision tower: the last layer but one without the cls token."""
    out: torch.Tensor = vision(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    return out


class Spliced:
    """An HF LLaMA that is given embeddings, with features in the places of pictures.

    Args:
        language: the LLaMA.
        features: makes the features [m, K, h] from pictures.
    """

    def __init__(self, language: Any, features: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.language, self.features = language, features

    def _embedded(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        embeddings: torch.Tensor = self.language.model.embed_tokens(input_ids).clone()
        if pixel_values is not None:
            embeddings[input_ids == IMAGE] = self.features(pixel_values).flatten(0, 1)
        return embeddings

    def __call__(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **given: Any) -> Any:
        return self.language(inputs_embeds=self._embedded(input_ids, pixel_values), **given)

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **given: Any) -> torch.Tensor:
        """The ids [b, s] and those that follow them."""
        written = self.language.generate(inputs_embeds=self._embedded(input_ids, pixel_values), **given)
        return torch.cat([input_ids, written], dim=1)


def vision_count() -> int:
    """Parameters of CLIP L/14 at 336, by their shapes."""
    width, inner = 1024, 4096
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return width * 3 * 14 * 14 + width + 577 * width + 4 * width + 24 * layer


def language_count(width: int, inner: int, num_layers: int, words: int = 32000) -> int:
    """Parameters of a LLaMA without grouped heads, by their shapes."""
    return 2 * words * width + num_layers * (4 * width * width + 3 * width * inner + 2 * width) + width


V1_13B = language_count(5120, 13824, 40) + vision_count() - (577 - 257) * 1024 + 1024 * 5120 + 5120

SYSTEM = System(
    name="LLaVA",
    key="llava",
    family="splice",
    paper="2304.08485, 2310.03744",
    model="models.llava:LLaVA",
    loss="next token of text, not at pictures",
    reference="HF Llava",
    parity=parity,
    sizes={
        "1.5-7B": Size(7_063_427_072, "HF's count"),
        "1.5-13B": Size(13_351_494_656, "HF's count", "13b.yaml"),
        "v1-13B": Size(V1_13B, "the shapes of Vicuna-13B, of CLIP L/14 at 224 and of one Linear", "v1_13b.yaml"),
    },
    chats=True,
    images=True,
)
