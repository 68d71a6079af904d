"""EVA2-CLIP towers as HF CogVLM and CogAgent files name them, and their position tables at another size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from models.eva2_clip import EVA2CLIPE, EVA2CLIPL
from models.weights.rules import (
    Format,
    Rule,
    Shapes,
    activation,
    count,
    extent,
    foreign_activation,
    rules_of,
    with_bias,
)

E_PATCHES = {
    "mixins.patches.conv.weight": "patch_embedding.proj.weight",
    "mixins.patches.conv.bias": "patch_embedding.proj.bias",
    "transformer.position_embeddings.weight": "patch_embedding.position_embedding.weight",
}
E_LAYER = with_bias({
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
})
L_PATCHES = with_bias({"mixins.patches.conv": "patch_embed.proj"})
L_LAYER = {
    **with_bias({
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "attention.dense": "attn.proj",
        "mixins.sub_norm.dense": "attn.inner_attn_ln",
        "mlp.gate": "mlp.w1",
        "mlp.up": "mlp.w2",
        "mlp.down": "mlp.w3",
        "mixins.sub_norm.down": "mlp.ffn_ln",
    }),
    "mixins.qv_bias.q": "attn.q_bias",
    "mixins.qv_bias.v": "attn.v_bias",
}
L_QKV = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
L_STORED = with_bias({"mixins.stored.norm": "norm", "mixins.stored.head": "head"})
L_ROPE_TABLES = r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"

# names of EVA-CLIP's own configuration; sizes that shapes tell may be given as well, and must then agree with them
L_ALIASES = {
    "blocks_run": "num_layers_run", "rope_pretrain_grid": "pretraining_grid", "pt_hw_seq_len": "pretraining_grid",
    "layers": "num_layers", "width": "hidden_size", "mlp_hidden": "inner_hidden_size", "patch_size": "patch_size",
    "embed_dim": "stored_head_size", "head_width": "head_size", "mlp_ratio": "", "rope_tables_in_file": "", "grid": "",
}
HEAD_WIDTH = 64


def e_rules(config: Any, own: str = "", foreign: str = "") -> list[Rule]:
    """Key table of EVA2-CLIP-E."""
    rules = [Rule(f"{own}mixins.patches.cls", (f"{foreign}patch_embedding.cls_embedding",), leading=1)]
    rules += rules_of(E_PATCHES, own, foreign)
    for i in range(config.num_layers):
        rules += rules_of(E_LAYER, f"{own}transformer.layers.{i}.", f"{foreign}transformer.layers.{i}.")
    return rules


def e_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of EVA2-CLIP-E from a `vision_config`."""
    return {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_heads"],
        "inner_hidden_size": config["intermediate_size"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_channels": config.get("in_channels", 3),
        "norm_eps": config.get("layer_norm_eps", 1e-6),
        "activation": activation(config.get("hidden_act", "gelu")),
    }


def e_config(config: Any) -> dict[str, Any]:
    """The `vision_config` of EVA2-CLIP-E."""
    return {
        "dropout_prob": 0.0, "hidden_act": foreign_activation(config.activation), "hidden_size": config.hidden_size,
        "image_size": config.image_size, "in_channels": config.in_channels, "intermediate_size": config.inner_size,
        "layer_norm_eps": config.norm_eps, "num_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "num_positions": config.grid**2 + 1, "patch_size": config.patch_size,
    }


def l_rules(config: Any, own: str = "", foreign: str = "") -> list[Rule]:
    """Key table of EVA2-CLIP-L; `foreign` ends where `cls_token` begins."""
    rules = [
        Rule(f"{own}mixins.patches.cls", (f"{foreign}cls_token",), leading=2),
        Rule(f"{own}transformer.position_embeddings.weight", (f"{foreign}pos_embed",), leading=1),
        *rules_of(L_PATCHES, own, foreign),
    ]
    widths = (config.hidden_size,) * 3
    for i in range(config.num_layers):
        layer, block = f"{own}transformer.layers.{i}.", f"{foreign}blocks.{i}."
        rules.append(Rule(f"{layer}attention.qkv.weight", tuple(block + name for name in L_QKV), rows=widths))
        rules += rules_of(L_LAYER, layer, block)
    return rules + (rules_of(L_STORED, own, foreign) if config.stored_head_size else [])


def l_options(shapes: Shapes, prefix: str, image_size: int) -> dict[str, Any]:
    """Options of EVA2-CLIP-L as far as shapes tell; the rest are the released constants.

    Args:
        shapes: of the tensors in the file.
        prefix: of the tower's names, up to `cls_token`.
        image_size: side of its pictures.
    """
    width, layers = extent(shapes, f"{prefix}cls_token", -1), count(shapes, prefix + "blocks.{i}.norm1.weight")
    tables = shapes.get(f"{prefix}rope.freqs_cos") or shapes.get(f"{prefix}blocks.0.attn.rope.freqs_cos")
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_layers_run": max(layers - 1, 1),
        "head_size": HEAD_WIDTH if tables is None else tables[-1],
        "inner_hidden_size": extent(shapes, f"{prefix}blocks.0.mlp.w1.weight", 0),
        "patch_size": extent(shapes, f"{prefix}patch_embed.proj.weight", -1),
        "in_channels": extent(shapes, f"{prefix}patch_embed.proj.weight", 1),
        "image_size": image_size,
        "stored_head_size": shapes[f"{prefix}head.weight"][0] if f"{prefix}head.weight" in shapes else 0,
    }


def l_heads(options: dict[str, Any]) -> dict[str, Any]:
    """The number of heads from their width, which is what EVA-CLIP configures.

    Raises:
        ValueError: the width does not divide.
    """
    options = dict(options)
    head_size = options.pop("head_size", None)
    if head_size is not None and "num_heads" not in options:
        if options["hidden_size"] % head_size:
            raise ValueError(
                f"the high-resolution tower is {options['hidden_size']} wide, which heads of {head_size} do not "
                f"divide. The format does not record their width: pass overrides={{'head_width': ...}}."
            )
        options["num_heads"] = options["hidden_size"] // head_size
    return options


def resize_positions(table: torch.Tensor, grid: int, num_kept: int = 1) -> torch.Tensor:
    """A learned position table for another number of patches per side, by bicubic interpolation in fp32.

    CogVLM's 490 table was made so from its 224 one.

    Args:
        table: [num_kept + g * g, c].
        grid: patches per side of the new table.
        num_kept: leading rows (cls) that are kept as they are.

    Returns:
        [num_kept + grid * grid, c], in the table's dtype.

    Raises:
        ValueError: the rows are no square grid.
    """
    kept, patches = table[:num_kept], table[num_kept:]
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise ValueError(f"A position table of {len(table)} rows is no square grid and {num_kept} row(s) before it.")
    square = patches.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)[0]
    return torch.cat([kept, resized.permute(1, 2, 0).flatten(0, 1).to(table.dtype)])


def _read_l(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    vision = config["vision_cfg"]
    options = l_options(shapes, "vit.model.", vision["image_size"])
    told = {"head_size": vision.get("head_width"), "pretraining_grid": vision.get("pt_hw_seq_len")}
    return {**options, **{name: value for name, value in told.items() if value is not None}}


def _l_config(config: Any) -> dict[str, Any]:
    return {
        "embed_dim": config.stored_head_size,
        "vision_cfg": {
            "image_size": config.image_size, "layers": config.num_layers, "width": config.hidden_size,
            "drop_path_rate": 0, "head_width": config.head_width, "mlp_ratio": config.inner_size / config.hidden_size,
            "patch_size": config.patch_size, "eva_model_name": "eva-clip-l-14-336", "xattn": True, "fusedLN": True,
            "rope": True, "pt_hw_seq_len": config.pretraining_grid, "intp_freq": True, "naiveswiglu": True,
            "subln": True,
        },
    }


TOWER_E = Format(
    "hf-eva2-clip-e", EVA2CLIPE,
    claims=lambda config: "num_positions" in config and "architectures" not in config,
    read_config=lambda config, shapes: e_options(config),
    rules=e_rules,
    write_config=e_config,
)
TOWER_L = Format(
    "hf-eva2-clip-l", EVA2CLIPL,
    claims=lambda config: isinstance(config.get("vision_cfg"), dict),
    read_config=_read_l,
    rules=lambda config: l_rules(config, foreign="vit.model."),
    ignored=(rf"vit\.model\.{L_ROPE_TABLES}", "pos_embed"),
    write_config=_l_config,
    lacks=("num_layers_run",),
    aliases=L_ALIASES,
    finish=l_heads,
)
