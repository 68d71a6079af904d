"""Qwen-VL beside its recorded tower, and beside torch's encoder layers and attention with HF's Qwen2 behind them."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer.connectors import AttentionPoolerConfig
from models.qwen_vl import QwenVisionConfig, QwenVL, QwenVLConfig
from tests.zoo.harness import ROOT, Size, System, copy_weights, difference, jittered, reloaded

GOLDEN = ROOT / "tests" / "golden" / "zoo" / "qwen-vl-resampler"
IMAGE = 96
Tensors = dict[str, torch.Tensor]

TOWER, PROJECTOR = "mixins.image.tower.", "mixins.image.projector."
BLOCK = {"attention_norm": "norm1", "attention.qkv": "self_attn.in_proj", "attention.dense": "self_attn.out_proj"}
BLOCK |= {"mlp_norm": "norm2", "mlp.up": "linear1", "mlp.down": "linear2"}


def sincos(side: int, size: int) -> torch.Tensor:
    """[side * side, size]: column, then row; of each the sines, then the cosines."""
    table = torch.zeros(side, side, size, dtype=torch.float64)
    for k in range(size // 4):
        rate = 10000 ** (-k / (size // 4))
        for place in range(side):
            angle = torch.tensor(place * rate, dtype=torch.float64)
            for axis, column in ((table[:, place], 0), (table[place], size // 2)):
                axis[:, column + k], axis[:, column + size // 4 + k] = angle.sin(), angle.cos()
    return table.flatten(0, 1).float()


def resized(table: torch.Tensor, side: int) -> torch.Tensor:
    """[s * s, c] -> [side * side, c]."""
    old = round(len(table) ** 0.5)
    grid = table.view(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side), mode="bicubic").permute(0, 2, 3, 1).reshape(side * side, -1)


class Oracle(nn.Module):
    """[m, 3, y, x] -> [m, K, h] out of torch's own layers."""

    def __init__(
        self, vision: QwenVisionConfig, size: int, num_queries: int, num_heads: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        width, norm = vision.hidden_size, partial(nn.LayerNorm, eps=eps)
        self.conv = nn.Conv2d(3, width, vision.patch_size, vision.patch_size, bias=False)
        self.positions = nn.Parameter(torch.randn(vision.position_grid**2, width))
        self.ln_pre = nn.LayerNorm(width, vision.norm_eps)
        layer = partial(
            nn.TransformerEncoderLayer, width, vision.num_heads, vision.inner_size, 0.0, "gelu", vision.norm_eps,
            batch_first=True, norm_first=True,
        )
        self.blocks = nn.ModuleList(layer() for _ in range(vision.num_layers))
        self.queries = nn.Parameter(torch.randn(num_queries, size))
        self.kv_proj, self.ln_q, self.ln_kv = nn.Linear(width, size, bias=False), norm(size), norm(size)
        self.attention = nn.MultiheadAttention(size, num_heads, batch_first=True)
        self.ln_post, self.proj = norm(size), nn.Linear(size, size, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images).flatten(2).mT
        side = round(x.shape[1] ** 0.5)
        x = self.ln_pre(x + resized(self.positions, side))
        for block in self.blocks:
            x = block(x)
        values = self.ln_kv(self.kv_proj(x))
        places = sincos(round(len(self.queries) ** 0.5), values.shape[-1])
        queries = (self.ln_q(self.queries) + places).expand(len(x), -1, -1)
        pooled = self.attention(queries, values + resized(places, side), values, need_weights=False)[0]
        return self.proj(self.ln_post(pooled))

    def ours(self) -> Tensors:
        """Its weights by our names."""
        theirs, size = self.state_dict(), self.queries.shape[1]
        query, key, value = (slice(i * size, (i + 1) * size) for i in range(3))
        found = {
            f"{TOWER}mixins.patches.conv.weight": theirs["conv.weight"],
            f"{TOWER}mixins.positions.table": theirs["positions"],
            f"{PROJECTOR}queries": theirs["queries"],
            f"{PROJECTOR}features_projection.weight": theirs["kv_proj.weight"],
            f"{PROJECTOR}output.weight": theirs["proj.weight"],
        }
        for kind in ("weight", "bias"):
            found |= {
                f"{TOWER}transformer.embedding_norm.{kind}": theirs[f"ln_pre.{kind}"],
                f"{PROJECTOR}queries_norm.{kind}": theirs[f"ln_q.{kind}"],
                f"{PROJECTOR}features_norm.{kind}": theirs[f"ln_kv.{kind}"],
                f"{PROJECTOR}output_norm.{kind}": theirs[f"ln_post.{kind}"],
                f"{PROJECTOR}attention.dense.{kind}": theirs[f"attention.out_proj.{kind}"],
            }
            for part, rows in (("query", query), ("key", key), ("value", value)):
                found[f"{PROJECTOR}attention.{part}.{kind}"] = theirs[f"attention.in_proj_{kind}"][rows]
            for i in range(len(self.blocks)):
                for ours, foreign in BLOCK.items():
                    name = f"blocks.{i}.{foreign}{'_' if foreign.endswith('in_proj') else '.'}{kind}"
                    found[f"{TOWER}transformer.layers.{i}.{ours}.{kind}"] = theirs[name]
        return found


def qwen2(config: QwenVLConfig) -> Any:
    """A small HF Qwen2, whose shape Qwen-7B has."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.inner_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
    ))  # fmt: skip


def language(reference: Any) -> Tensors:
    """The weights of a Qwen2 by our names."""
    with tempfile.TemporaryDirectory() as folder:
        found: Tensors = reloaded(reference, Path(folder) / "hf").state_dict()
    return found


def tiny(**changes: Any) -> QwenVL:
    """A small one: 36 patches with positions of a 4 x 4 grid become 4 tokens, and epsilons are large enough to show."""
    vision = QwenVisionConfig(
        hidden_size=24, num_layers=2, num_heads=2, inner_hidden_size=40, image_size=24, patch_size=4, position_grid=4,
        norm_eps=5e-3,
    )
    pooler = AttentionPoolerConfig(num_queries=4, num_heads=2, norm_eps=1e-2)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 48,
        "vision": vision, "adapter": pooler, "image_token_id": IMAGE, "norm_eps": 2e-3,
    }
    return QwenVL(QwenVLConfig(**{**sizes, **changes})).eval()


def recorded() -> tuple[QwenVL, Tensors]:
    """A model whose tower and pooler are the recorded ones, and the recorded set with pictures."""
    weights = load_file(GOLDEN / "weights.safetensors")
    vision = QwenVisionConfig(
        hidden_size=24, num_layers=1, num_heads=2, inner_hidden_size=48, image_size=16, patch_size=4
    )
    pooler = AttentionPoolerConfig(num_queries=4, num_heads=2)
    model = tiny(hidden_size=16, num_heads=2, vision=vision, adapter=pooler)
    oracle = Oracle(vision, 16, 4, 2)
    block, renamed = "transformer.resblocks.0", {"conv.weight": weights["conv1.weight"]}
    renamed |= {"positions": weights["positional_embedding"], "queries": weights["attn_pool.query"]}
    renamed |= {"kv_proj.weight": weights["attn_pool.kv_proj.weight"], "proj.weight": weights["proj"].T}
    for kind in ("weight", "bias"):
        per_head = weights[f"{block}.attn.in_proj.{kind}"].unflatten(0, (2, 3, 12))
        renamed[f"blocks.0.self_attn.in_proj_{kind}"] = per_head.transpose(0, 1).flatten(0, 2)
        renamed[f"attention.in_proj_{kind}"] = weights[f"attn_pool.attn.in_proj_{kind}"]
        for ours, theirs in {
            "ln_pre": "ln_pre", "ln_q": "attn_pool.ln_q", "ln_kv": "attn_pool.ln_kv", "ln_post": "ln_post",
            "attention.out_proj": "attn_pool.attn.out_proj", "blocks.0.norm1": f"{block}.ln_1",
            "blocks.0.norm2": f"{block}.ln_2", "blocks.0.self_attn.out_proj": f"{block}.attn.out_proj",
            "blocks.0.linear1": f"{block}.mlp.c_fc", "blocks.0.linear2": f"{block}.mlp.c_proj",
        }.items():
            renamed[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    oracle.load_state_dict(renamed)
    model.load_state_dict({**model.state_dict(), **oracle.ours()})
    io = load_file(GOLDEN / "io.safetensors")
    return model, {name: tensor for name, tensor in io.items() if name.startswith("d.")}


@torch.no_grad()
def parity() -> dict[str, float]:
    """The recorded tower and pooler; then pictures beside torch's layers, logits and the loss beside Qwen2."""
    model, given = recorded()
    encoded = model.get_mixin("image").encode(given["d.in.image"])
    found = {"recorded picture": difference(encoded, given["d.out.tokens"])}
    torch.manual_seed(0)
    model = tiny()
    config: Any = model.config
    oracle = jittered(Oracle(config.vision, 32, 4, 2, config.adapter.norm_eps))
    reference = jittered(qwen2(config), 1)
    copy_weights(model, {**oracle.ours(), **language(reference)})
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(0, IMAGE, (2, 18), generator=torch.Generator().manual_seed(3))
    ids[0, 2:6] = ids[0, 6:10] = ids[1, 5:9] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    pictures = oracle(images)
    embeddings = reference.model.embed_tokens(ids)
    embeddings[ids == IMAGE] = pictures.flatten(0, 1)
    theirs = reference(inputs_embeds=embeddings, attention_mask=mask, labels=labels)
    batch = {"input_ids": ids, "attention_mask": mask, "images": images}
    losses = QwenVL.objective(model, {**batch, "labels": labels})
    found["image features"] = difference(model.get_mixin("image").encode(images), pictures)
    found["logits"] = difference(model(**batch)[mask.bool()], theirs.logits[mask.bool()])
    found["loss"] = difference(losses["language"], theirs.loss)
    return found


def published() -> int:
    """Parameters of the released files, by their shapes, less the pooler's table of positions, which we compute."""
    width, inner, size, words = 1664, 8192, 4096, 151936
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    tower = width * 3 * 14 * 14 + 16 * 16 * width + 2 * width + 48 * block
    pooler = 256 * size + width * size + 4 * (size * size + size) + 3 * 2 * size + size * size
    layer = 4 * size * size + 3 * size + 3 * size * 11008 + 2 * size
    return tower + pooler + 2 * words * size + 32 * layer + size


_SOURCE = "the shapes of the release (9,656,935,168, the paper says 9.6B) less the pooler's fixed table"

SYSTEM = System(
    name="Qwen-VL",
    key="qwen_vl",
    family="splice",
    paper="2308.12966",
    model="models.qwen_vl:QwenVL",
    loss="next token of text, not at pictures",
    reference="Qwen-VL's recorded tower and pooler; torch's encoder layers and attention; HF Qwen2",
    parity=parity,
    sizes={"Qwen-VL": Size(published(), _SOURCE), "at 224": Size(published(), _SOURCE, "224.yaml")},
    chats=True,
    images=True,
)
