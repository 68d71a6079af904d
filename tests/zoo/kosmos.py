"""KOSMOS-1 beside torchscale's recorded decoder, HF's CLIP tower, and the formulas of decoder and resampler."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer import BaseMixin, replace
from mixformer.connectors import PerceiverResamplerConfig, ProjectorConfig
from mixformer.testing import jitter
from models.clip_vision import CLIPVisionConfig
from models.kosmos import Kosmos, KosmosConfig
from tests.zoo.harness import ROOT, Size, System, difference, jittered, reloaded

GOLDEN = ROOT / "tests" / "golden" / "zoo" / "torchscale-decoder"
HEADS = 4
IMAGE = 60
Tensors = dict[str, torch.Tensor]

# {our module: torchscale's}, within a layer
LAYER = {
    "attention_norm": "self_attn_layer_norm",
    "mixins.sub_norm.dense": "self_attn.inner_attn_ln",
    "attention.dense": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "ffn.fc1",
    "mixins.sub_norm.down": "ffn.ffn_layernorm",
    "mlp.down": "ffn.fc2",
}


def tiny(depth: int = 2, **changes: Any) -> Kosmos:
    """A jittered Kosmos of the recorded decoder's sizes, with a tower of `depth` layers."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, num_layers=depth, num_heads=4, inner_hidden_size=48, image_size=16, patch_size=4,
        output="tokens", output_norm=True,
    )
    resampler = PerceiverResamplerConfig(
        num_latents=5, depth=2, num_heads=2, head_size=8, output_projector=ProjectorConfig(bias=False)
    )
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": HEADS, "inner_hidden_size": 64,
        "vision": vision, "adapter": resampler, "image_token_id": IMAGE,
    }
    model = Kosmos(KosmosConfig(**{**sizes, **changes}))
    jitter(model, 3)
    return model.eval()


def recorded() -> tuple[Tensors, dict[str, Tensors]]:
    """The decoder's weights by our names, and {input set: tensors}."""
    weights, sets = load_file(GOLDEN / "weights.safetensors"), {}
    for name, tensor in load_file(GOLDEN / "io.safetensors").items():
        letter, _, what = name.partition(".")
        sets.setdefault(letter, {})[what] = tensor
    ours = {"transformer.word_embeddings.weight": weights["embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        ours[f"transformer.final_norm.{kind}"] = weights[f"layer_norm.{kind}"]
        for i in range(2):
            own, theirs = f"transformer.layers.{i}", f"layers.{i}"
            ours |= {f"{own}.{name}.{kind}": weights[f"{theirs}.{foreign}.{kind}"] for name, foreign in LAYER.items()}
            fused = [weights[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{own}.attention.qkv.{kind}"] = torch.cat(fused)
    return {**ours, "output_projection.weight": weights["output_projection.weight"]}, sets


def from_recording(weights: Tensors, **changes: Any) -> Kosmos:
    """Our model with the recorded decoder. Its head is not tied, so ours reads it from the word embeddings."""
    model = tiny(**changes)
    weights = {**weights, "transformer.word_embeddings.weight": weights["output_projection.weight"]}
    left = model.load_state_dict({k: v for k, v in weights.items() if k != "output_projection.weight"}, strict=False)
    assert not left.unexpected_keys and all(name.startswith("mixins.image.") for name in left.missing_keys)
    return model


def decode(model: Kosmos, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of a model from embeddings [b, s, h] in place of its words."""

    class Given(BaseMixin):
        @replace
        def word_embedding_forward(self, input_ids: torch.Tensor, ctx: Any) -> torch.Tensor:
            return embeddings

    model.add_mixin("given", Given())
    logits: torch.Tensor = model(torch.zeros(embeddings.shape[:2], dtype=torch.int64))
    model.del_mixin("given")
    return logits


def decoder_formula(weights: Tensors, x: torch.Tensor) -> torch.Tensor:
    """[b, s, h] -> [b, s, v], from our names; scores of xPos as a function of the distance alone, in fp64."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    num_tokens, size = x.shape[1], x.shape[2] // HEADS
    pairs = torch.arange(0, size, 2, dtype=torch.float64)
    zeta, angle = (pairs + 0.4 * size) / (1.4 * size), 10000 ** (-pairs / size)
    distance = (torch.arange(num_tokens)[:, None] - torch.arange(num_tokens))[..., None]
    turn = torch.polar(zeta ** (distance / 512), angle * distance)
    for i in range(2):
        layer = f"transformer.layers.{i}"
        y = linear(norm(x, f"{layer}.attention_norm"), f"{layer}.attention.qkv")
        q, k, v = (part.unflatten(-1, (HEADS, size)).transpose(1, 2) for part in y.chunk(3, -1))
        q, k = (torch.view_as_complex(part.double().unflatten(-1, (-1, 2)).contiguous()) for part in (q, k))
        scores = torch.einsum("bnsp,bntp,stp->bnst", q, k.conj(), turn).real / size**0.5
        scores = scores.masked_fill(distance[..., 0] < 0, float("-inf"))
        out = (scores.softmax(-1).float() @ v).transpose(1, 2).flatten(2)
        x = x + linear(norm(out, f"{layer}.mixins.sub_norm.dense"), f"{layer}.attention.dense")
        y = F.gelu(linear(norm(x, f"{layer}.mlp_norm"), f"{layer}.mlp.up"))
        x = x + linear(norm(y, f"{layer}.mixins.sub_norm.down"), f"{layer}.mlp.down")
    return norm(x, "transformer.final_norm") @ weights["transformer.word_embeddings.weight"].T


def resampler_formula(weights: Tensors, features: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """[m, N, c] -> [m, K, h]: latents look at [features; latents], then an MLP, twice; a norm; a Linear."""
    weights = {name.removeprefix("mixins.image.projector."): tensor for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def split(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ weights[f"{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)

    x = weights["latents"].expand(len(features), -1, -1)
    for i in range(2):
        layer = f"layers.{i}"
        y = norm(x, f"{layer}.latents_norm")
        seen = torch.cat([norm(features, f"{layer}.features_norm"), y], dim=1)
        q, k, v = (split(z, f"{layer}.attention.{part}") for z, part in ((y, "query"), (seen, "key"), (seen, "value")))
        out = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + out @ weights[f"{layer}.attention.dense.weight"].T
        y = F.gelu(norm(x, f"{layer}.mlp_norm") @ weights[f"{layer}.mlp.up.weight"].T)
        x = x + y @ weights[f"{layer}.mlp.down.weight"].T
    return norm(x, "norm") @ weights["output_projector.linears.0.weight"].T


def hf_tower(model: Kosmos) -> Any:
    """A small HF CLIP tower whose weights are put into ours."""
    from transformers import CLIPVisionConfig as HFConfig
    from transformers import CLIPVisionModel

    vision: Any = model.config.vision
    torch.manual_seed(1)
    reference = jittered(CLIPVisionModel(HFConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.inner_size, num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads, image_size=vision.image_size, patch_size=vision.patch_size,
    )))  # fmt: skip
    tower: Any = model.get_mixin("image").tower
    with tempfile.TemporaryDirectory() as folder:
        tower.load_state_dict(reloaded(reference, Path(folder) / "hf").state_dict())
    return reference


@torch.no_grad()
def parity() -> dict[str, float]:
    """The recorded decoder; then pictures through tower, resampler and decoder, and the loss."""
    weights, sets = recorded()
    decoder = from_recording(weights)
    found = {
        f"recorded decoder, {letter}": difference(decode(decoder, given["in.embeds"]), given["out.logits"])
        for letter, given in sets.items() if "in.embeds" in given
    }
    for letter, given in sets.items():
        if "in.ids" in given:
            embeddings = F.embedding(given["in.ids"], weights["transformer.word_embeddings.weight"])
            found[f"recorded decoder, {letter}"] = difference(decode(decoder, embeddings), given["out.logits"])
    model = tiny()
    reference, ours = hf_tower(model), model.state_dict()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    tokens = reference.post_layernorm(reference(images).last_hidden_state)
    pictures = resampler_formula(ours, tokens)
    ids = torch.randint(0, IMAGE, (2, 17), generator=torch.Generator().manual_seed(3))
    ids[0, 2:7] = ids[0, 7:12] = ids[1, 4:9] = IMAGE
    embeddings = F.embedding(ids, ours["transformer.word_embeddings.weight"])
    embeddings[ids == IMAGE] = pictures.flatten(0, 1)
    expected = decoder_formula(ours, embeddings)
    labels = ids.masked_fill(ids == IMAGE, -100)
    losses = Kosmos.objective(model, {"input_ids": ids, "images": images, "labels": labels})
    found["image features"] = difference(model.get_mixin("image").encode(images), pictures)
    found["logits"] = difference(model(ids, images=images), expected)
    found["loss"] = difference(losses["language"], F.cross_entropy(expected[:, :-1].mT, labels[:, 1:]))
    return found


def published() -> int:
    """Parameters from the table of sizes: 24 layers of 2048 and 8192, tied words, CLIP L/14, 2 layers of resampler."""
    size, inner, words = 2048, 8192, 64007
    layer = 4 * (size * size + size) + 2 * size * inner + inner + size
    layer += 3 * 2 * size + 2 * inner  # the norms before both parts, and the two of sub-LN
    decoder = words * size + 24 * layer + 2 * size
    size, inner, num_tokens = 1024, 4096, 16 * 16 + 1
    layer = 4 * (size * size + size) + 2 * size * inner + inner + size + 2 * 2 * size
    tower = size * 3 * 14 * 14 + size + num_tokens * size + 24 * layer + 2 * 2 * size
    layer = 4 * size * 512 + 2 * size * inner + 3 * 2 * size
    resampler = 64 * size + 2 * layer + 2 * size + size * 2048
    return decoder + tower + resampler


SYSTEM = System(
    name="KOSMOS-1",
    key="kosmos",
    family="splice",
    paper="2302.14045",
    model="models.kosmos:Kosmos",
    loss="next token of text, not at pictures",
    reference="torchscale's recorded decoder; HF CLIP; formulas of xPos, sub-LN and the resampler",
    parity=parity,
    sizes={"KOSMOS-1": Size(published(), "formula over the sizes in the paper, which says about 1.6B")},
    chats=True,
    images=True,
)
