"""ClipCap beside numbers of its released code, and beside HF's CLIP and GPT-2."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mixformer.connectors import ConnectorConfig, ProjectorConfig
from mixformer.mixins import ImageMixin
from models.clipcap import ClipCap, ClipCapConfig
from models.clipcap_transformer import ClipCapTransformerConfig
from models.gpt2 import GPT2
from tests.zoo.gpt2 import tiny_gpt2
from tests.zoo.harness import ROOT, Size, System, copy_weights, difference, jittered, reloaded

GOLDEN = ROOT / "tests" / "golden" / "zoo"
PROJECTOR = "mixins.image.projector."
LAYER = {
    "attention_norm": "norm1", "attention.query": "attn.to_queries", "attention.dense": "attn.project",
    "mlp_norm": "norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}
Tensors = dict[str, torch.Tensor]


def gpt2(reference: Any) -> GPT2:
    """Our GPT-2 of an HF one."""
    with tempfile.TemporaryDirectory() as folder:
        model: GPT2 = reloaded(reference, Path(folder))
    return model


def connector(theirs: Tensors) -> tuple[ConnectorConfig, Tensors]:
    """The recorded mapper's options, and its weights by our names."""
    if "prefix_const" not in theirs:
        renamed = {"model.0.": "linears.0.", "model.2.": "linears.1."}
        found = {renamed[name[:8]] + name[8:]: tensor for name, tensor in theirs.items()}
        return replace(ClipCapConfig().adapter, tokens_per_feature=3), found
    found = {"constants": theirs["prefix_const"]}
    for kind in ("weight", "bias"):
        found[f"projector.linears.0.{kind}"] = theirs[f"linear.{kind}"]
        for i in range(2):
            own, foreign = f"layers.{i}", f"transformer.layers.{i}"
            for name, other in LAYER.items():
                if f"{foreign}.{other}.{kind}" in theirs:
                    found[f"{own}.{name}.{kind}"] = theirs[f"{foreign}.{other}.{kind}"]
            key, value = theirs[f"{foreign}.attn.to_keys_values.weight"].split(32)
            found |= {f"{own}.attention.key.weight": key, f"{own}.attention.value.weight": value}
    return replace(ClipCapTransformerConfig().adapter, num_prefix=3, tokens_per_feature=4, depth=2), found


def recorded(case: str) -> dict[str, float]:
    """Prefix, logits and loss of the released training code, from the vector of a picture."""
    weights = load_file(GOLDEN / case / "weights.safetensors")
    io = load_file(GOLDEN / case / "io.safetensors")
    reference = tiny_gpt2(vocab_size=61, n_inner=64, n_positions=24, eos_token_id=60)
    language = {name.removeprefix("gpt."): x for name, x in weights.items() if name.startswith("gpt.")}
    reference.load_state_dict({**language, "lm_head.weight": language["transformer.wte.weight"]})
    model, mapper = gpt2(reference), "clip_project."
    config, tensors = connector({n.removeprefix(mapper): x for n, x in weights.items() if n.startswith(mapper)})
    image = ImageMixin(None, config, marks=False, position_ids="counted", feature_size=20)
    model.add_mixin("image", image)
    copy_weights(model, {**model.state_dict(), **{PROJECTOR + name: x for name, x in tensors.items()}})
    found = {}
    for name in ("a", "b"):
        given = {key[len("a.in.") :]: x for key, x in io.items() if key.startswith(f"{name}.in.")}
        vectors, captions = given["clip"][:, None], given["ids"]
        ids = torch.cat([torch.zeros(len(captions), 3, dtype=captions.dtype), captions], 1)
        types = torch.zeros_like(ids)
        types[:, :3] = 1
        mask = given.get("mask", torch.ones_like(ids)).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "images": vectors}
        labels = ids.masked_fill(types == 1, -100)
        loss = ClipCap.objective(model, {**batch, "labels": labels})  # type: ignore[misc]
        real = mask.bool()
        found |= {
            f"{case}, {name}: prefix": difference(image.encode(vectors), io[f"{name}.out.prefix"]),
            f"{case}, {name}: logits": difference(model(**batch)[real], io[f"{name}.out.logits"][real]),
            f"{case}, {name}: loss": difference(loss["language"], io[f"{name}.out.loss"]),
        }
    return found


def tiny(adapter: ProjectorConfig, language: Any, vision: Any) -> ClipCap:
    """A small one with the weights of an HF GPT-2 and of an HF CLIP tower."""
    with tempfile.TemporaryDirectory() as folder:
        tower = reloaded(vision, Path(folder))
    text = gpt2(language)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    model = jittered(ClipCap(ClipCapConfig(**sizes, vision=tower.config, adapter=adapter)))
    inner = {f"mixins.image.tower.{name}": x for name, x in tower.state_dict().items()}
    copy_weights(model, {**model.state_dict(), **text.state_dict(), **inner})
    return model


@torch.no_grad()
def from_pixels() -> dict[str, float]:
    """Pictures through HF's CLIP and the MLP's formula in front of HF's GPT-2."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = jittered(CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        projection_dim=20,
    )))  # fmt: skip
    language = tiny_gpt2()
    model = tiny(replace(ClipCapConfig().adapter, tokens_per_feature=3), language, vision)
    generator = torch.Generator().manual_seed(3)
    images, ids = torch.randn(2, 3, 16, 16, generator=generator), torch.randint(1, 97, (2, 9), generator=generator)
    types, labels = torch.zeros_like(ids), ids.clone()
    types[:, :3], labels[:, :3], labels[0, 5] = 1, -100, 0
    first, second = (model.get_mixin("image").projector.linears[i] for i in (0, 1))
    hidden = torch.tanh(vision(images).image_embeds @ first.weight.T + first.bias)
    prefix = (hidden @ second.weight.T + second.bias).view(2, 3, 32)
    embeddings = torch.cat([prefix, language.transformer.wte(ids[:, 3:])], 1)
    theirs = language(inputs_embeds=embeddings, labels=labels.masked_fill(labels == 0, -100))
    batch = {"input_ids": ids, "token_type_ids": types, "images": images}
    loss = ClipCap.objective(model, {**batch, "labels": labels})["language"]  # type: ignore[misc]
    return {
        "logits from pixels": difference(model(**batch), theirs.logits),
        "loss from pixels": difference(loss, theirs.loss),
    }


@torch.no_grad()
def parity() -> dict[str, float]:
    """The MLP as recorded, and the whole from pixels."""
    return {**recorded("clipcap-mlp"), **from_pixels()}


@torch.no_grad()
def transformer_parity() -> dict[str, float]:
    """The transformer as recorded."""
    return recorded("clipcap-mapper")


def mlp_count(vector: int, width: int, num_prefix: int) -> int:
    """Parameters of the MLP: two Linears, half as wide between them as what comes out."""
    inner, out = width * num_prefix // 2, width * num_prefix
    return vector * inner + inner + inner * out + out


def mapper_count(vector: int, width: int, num_prefix: int, length: int, depth: int) -> int:
    """Parameters of the transformer, whose shapes are recorded with `clipcap-mapper`."""
    attention = width * width + 2 * width * width + width * width + width
    mlp = 2 * (2 * width * width) + 2 * width + width
    return vector * length * width + length * width + num_prefix * width + depth * (attention + mlp + 4 * width)


CLIP_AND_GPT2 = 87_849_216 + 124_439_808
_SOURCE = "HF's counts of CLIP ViT-B/32's vision tower and of GPT-2, and the shapes of the released"

SYSTEMS = [
    System(
        name="ClipCap",
        key="clipcap",
        family="learned prefix",
        paper="2111.09734",
        model="models.clipcap:ClipCap",
        loss="next token of the caption, token 0 left out",
        reference="recorded numbers of the released code; HF CLIP and GPT-2",
        parity=parity,
        sizes={"ClipCap": Size(CLIP_AND_GPT2 + mlp_count(512, 768, 10), f"{_SOURCE} MLP")},
        chats=True,
        images=True,
    ),
    System(
        name="ClipCap with a transformer",
        key="clipcap_transformer",
        family="learned prefix",
        paper="2111.09734",
        model="models.clipcap_transformer:ClipCapTransformer",
        loss="next token of the caption, token 0 left out",
        reference="recorded numbers of the released code",
        parity=transformer_parity,
        sizes={"ClipCap": Size(CLIP_AND_GPT2 + mapper_count(512, 768, 10, 10, 8), f"{_SOURCE} mapper")},
        chats=True,
        images=True,
    ),
]
