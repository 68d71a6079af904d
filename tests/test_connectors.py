"""Connectors give the numbers that the published implementations gave, and count their tokens right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer.composition import Classes, decode, encode
from mixformer.config import make
from mixformer.connectors import (
    AttentionPoolerConfig,
    ConnectorConfig,
    GLUAdapterConfig,
    LDPConfig,
    LDPv2Config,
    PerceiverResamplerConfig,
    PrefixMapperConfig,
    ProjectorConfig,
    VisualAbstractorConfig,
)
from mixformer.connectors.pixel_shuffle import pixel_shuffle
from mixformer.connectors.sincos import sincos_1d, sincos_2d
from mixformer.testing import jitter

GOLDEN = Path(__file__).parent / "golden" / "zoo"
Tensors = dict[str, torch.Tensor]

INTERNVL = ProjectorConfig(depth=2, norm="pre", merge=2)
VILA = ProjectorConfig(depth=2, norm="pre", merge=2, pad=True)
VILA_3X3 = ProjectorConfig(depth=2, norm="pre", merge=3, pad=True, narrow=3)
GATED = ProjectorConfig(depth=2, gated=True, activation="silu", bias=False)
IDEFICS2 = PerceiverResamplerConfig(
    depth=3, num_heads=16, head_size=96, num_kv_heads=4, norm="rmsnorm", norm_eps=1e-6, activation="silu", gated=True,
    input_projector=GATED,
)
FLAMINGO = PerceiverResamplerConfig(num_latents=3, depth=2, num_heads=2, head_size=8, inner_hidden_size=48)
# one small connector of each kind, with features it can take
KINDS: dict[str, tuple[ConnectorConfig, int]] = {
    "linear": (ProjectorConfig(), 5),
    "mlp": (ProjectorConfig(depth=3, inner_hidden_size=7), 5),
    "gated": (GATED, 5),
    "post norm": (ProjectorConfig(norm="post"), 5),
    "several tokens": (ProjectorConfig(depth=2, activation="tanh", tokens_per_feature=3), 2),
    "pixel shuffle": (INTERNVL, 16),
    "padded": (VILA, 25),
    "3x3": (VILA_3X3, 25),
    "glu": (GLUAdapterConfig(downsample=2), 16),
    "resampler": (PerceiverResamplerConfig(3, 2, 2, 4, input_projector=GATED), 6),
    "frames": (PerceiverResamplerConfig(3, 2, 2, 4, num_frames=2, output_projector=ProjectorConfig()), 6),
    "pooler": (AttentionPoolerConfig(4, 2), 9),
    "mapper": (PrefixMapperConfig(3, 4, 2, 2), 1),
    "ldp": (LDPConfig(), 25),
    "ldp v2": (LDPv2Config(3), 36),
    "abstractor": (VisualAbstractorConfig(5, 2, 2, 12), 17),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@cache
def golden(case: str) -> tuple[Tensors, dict[str, Tensors]]:
    """Weights and {input set: tensors} of a recorded case."""
    letters = json.loads((GOLDEN / case / "case.json").read_text())["input_sets"]
    sets: dict[str, Tensors] = {letter: {} for letter in letters}
    for key, value in load_file(GOLDEN / case / "io.safetensors").items():
        letter, _, name = key.partition(".")
        sets[letter][name] = value
    return load_file(GOLDEN / case / "weights.safetensors"), sets


def fill(module: nn.Module, weights: Tensors, names: dict[str, str]) -> Any:
    """Load weights under {our prefix: their prefix}; every parameter must get one."""
    state = {
        ours + key.removeprefix(theirs): value
        for ours, theirs in names.items()
        for key, value in weights.items()
        if key == theirs or key.startswith(f"{theirs}.")
    }
    module.load_state_dict(state)
    return module.eval()


def split(weights: Tensors, fused: str, parts: dict[str, int]) -> Tensors:
    """The weights with rows of one tensor under names of their own."""
    rows = weights[fused].split(list(parts.values()))
    return {**weights, **dict(zip(parts, rows, strict=True))}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_internvls_pixel_shuffle_and_mlp_are_reproduced(version: str) -> None:
    weights, sets = golden(f"internvl-pixel-shuffle-{version}")
    config = ProjectorConfig(depth=2, norm="pre", merge=2, merge_version=version)
    names = {"norms.0": "mlp1.0", "linears.0": "mlp1.1", "linears.1": "mlp1.3"}
    projector = fill(config.build(6, 16, 99, 16), weights, names)
    for letter in "ac":
        close(projector(sets[letter]["in.features"][:, 1:]), sets[letter]["out.tokens"])
    assert torch.equal(pixel_shuffle(sets["b"]["in.map"], 2, version), sets["b"]["out.shuffled"])


@pytest.mark.parametrize(("case", "config", "linears"), [
    ("vila-downsample", VILA, {"norms.0": 1, "linears.0": 2, "linears.1": 4}),
    ("vila-downsample-3x3", VILA_3X3, {"norms.0": 1, "linears.0": 2, "norms.1": 4, "linears.1": 5, "linears.2": 7}),
])  # fmt: skip
@torch.no_grad()
def test_vilas_downsampling_projectors_are_reproduced(
    case: str, config: ProjectorConfig, linears: dict[str, int]
) -> None:
    weights, sets = golden(case)
    names = {ours: f"layers.{index}" for ours, index in linears.items()}
    projector = fill(config.build(6, 16, 99, 16), weights, names)
    for tensors in sets.values():
        close(projector(tensors["in.features"]), tensors["out.tokens"])


@torch.no_grad()
def test_clipcaps_mlp_is_reproduced() -> None:
    weights, sets = golden("clipcap-mlp")
    config = ProjectorConfig(depth=2, activation="tanh", tokens_per_feature=3)
    names = {"linears.0": "clip_project.model.0", "linears.1": "clip_project.model.2"}
    projector = fill(config.build(20, 32, 99, 1), weights, names)
    for tensors in sets.values():
        close(projector(tensors["in.clip"][:, None]), tensors["out.prefix"])


@torch.no_grad()
def test_clipcaps_mapper_is_reproduced() -> None:
    weights, sets = golden("clipcap-mapper")
    names = {"projector.linears.0": "clip_project.linear", "constants": "clip_project.prefix_const"}
    for index in range(2):
        ours, theirs = f"layers.{index}", f"clip_project.transformer.layers.{index}"
        parts = {f"{index}.k.weight": 32, f"{index}.v.weight": 32}
        weights = split(weights, f"{theirs}.attn.to_keys_values.weight", parts)
        names |= {
            f"{ours}.attention_norm": f"{theirs}.norm1", f"{ours}.attention.query": f"{theirs}.attn.to_queries",
            f"{ours}.attention.key": f"{index}.k", f"{ours}.attention.value": f"{index}.v",
            f"{ours}.attention.dense": f"{theirs}.attn.project", f"{ours}.mlp_norm": f"{theirs}.norm2",
            f"{ours}.mlp.up": f"{theirs}.mlp.fc1", f"{ours}.mlp.down": f"{theirs}.mlp.fc2",
        }  # fmt: skip
    mapper = fill(PrefixMapperConfig(3, 4, depth=2).build(20, 32, 99, 1), weights, names)
    for tensors in sets.values():
        close(mapper(tensors["in.clip"][:, None]), tensors["out.prefix"])


@torch.no_grad()
def test_mobilevlms_first_projector_is_reproduced() -> None:
    weights, sets = golden("mobilevlm-ldp-v1")
    names = {"projector.linears.0": "model.mlp.1", "projector.linears.1": "model.mlp.3"}
    parts = {
        "depthwise": "0.0", "depthwise_norm": "0.1", "squeeze": "1.fc1", "excite": "1.fc2", "pointwise": "2.0",
        "pointwise_norm": "2.1",
    }  # fmt: skip
    for index in range(2):
        names |= {f"blocks.{index}.{ours}": f"model.mb_block.{index + 1}.block.{at}" for ours, at in parts.items()}
    squeezed = {k: v.flatten(1) if v.shape[2:] == (1, 1) else v for k, v in weights.items()}
    ldp = fill(LDPConfig().build(24, 48, 99, 0), squeezed, names)
    for tensors in sets.values():
        grid = tensors["mid.model.mlp"].unflatten(1, (-1, math.isqrt(tensors["mid.model.mlp"].shape[1])))
        close(ldp.blocks[0](grid).permute(0, 3, 1, 2), tensors["mid.model.mb_block.1"])
        close(ldp(tensors["in.features"]), tensors["out.tokens"])


@pytest.mark.parametrize(("size", "squeezed"), [(16, 8), (44, 16), (72, 24), (316, 80), (2048, 512)])
def test_squeezed_channels_are_a_quarter_to_the_nearest_eight_without_losing_a_tenth(size: int, squeezed: int) -> None:
    ldp: Any = LDPConfig().build(4, size, 0, 0)
    assert ldp.blocks[0].squeeze.weight.shape == (squeezed, size)


@torch.no_grad()
def test_mobilevlms_second_projector_is_reproduced() -> None:
    weights, sets = golden("mobilevlm-ldp-v2")
    names = {"projector.linears.0": "mlp.mlp.0", "projector.linears.1": "mlp.mlp.2", "positions": "peg.peg.0"}
    ldp = fill(LDPv2Config().build(12, 16, 99, 0), weights, names)
    for tensors in sets.values():
        close(ldp(tensors["in.features"]), tensors["out.tokens"])


@pytest.mark.parametrize("case", ["perceiver-resampler", "perceiver-resampler-embs"])
@torch.no_grad()
def test_flamingos_resampler_is_reproduced(case: str) -> None:
    weights, sets = golden(case)
    tables = {"num_frames": 4, "num_media": 3} if case.endswith("embs") else {}
    config = replace(FLAMINGO, **tables)
    if tables:
        weights = {**weights, "media_time_embs": weights["media_time_embs"][:, 0]}
    names = {"latents": "latents", "norm": "norm"}
    names |= {"frame_embedding": "frame_embs", "media_embedding": "media_time_embs"}
    for index in range(2):
        ours = theirs = f"layers.{index}"
        weights = split(weights, f"{theirs}.0.to_kv.weight", {f"{index}.k.weight": 16, f"{index}.v.weight": 16})
        names |= {
            f"{ours}.latents_norm": f"{theirs}.0.norm_latents", f"{ours}.features_norm": f"{theirs}.0.norm_media",
            f"{ours}.attention.query": f"{theirs}.0.to_q", f"{ours}.attention.dense": f"{theirs}.0.to_out",
            f"{ours}.attention.key": f"{index}.k", f"{ours}.attention.value": f"{index}.v",
            f"{ours}.mlp_norm": f"{theirs}.1.0", f"{ours}.mlp.up": f"{theirs}.1.1", f"{ours}.mlp.down": f"{theirs}.1.3",
        }  # fmt: skip
    resampler = fill(config.build(24, 24, 99, 5), weights, names)
    for tensors in sets.values():
        features = tensors["in.features"]
        rows, num_media = features.shape[:2]
        media_ids = torch.arange(num_media).repeat(rows) if tables else None
        found = resampler(features.flatten(0, 1), media_ids=media_ids)
        close(found, tensors["out.latents"].flatten(0, 1))


@torch.no_grad()
def test_qwen_vls_resampler_is_reproduced() -> None:
    weights, sets = golden("qwen-vl-resampler")
    attention = "attn_pool.attn"
    for kind in ("weight", "bias"):
        weights = split(weights, f"{attention}.in_proj_{kind}", {f"{part}.{kind}": 16 for part in "qkv"})
    weights = {**weights, "proj.weight": weights["proj"].T}
    names = {
        "queries": "attn_pool.query", "features_projection": "attn_pool.kv_proj", "queries_norm": "attn_pool.ln_q",
        "features_norm": "attn_pool.ln_kv", "attention.query": "q", "attention.key": "k", "attention.value": "v",
        "attention.dense": f"{attention}.out_proj", "output_norm": "ln_post", "output.weight": "proj.weight",
    }  # fmt: skip
    pooler = fill(AttentionPoolerConfig(4, 2).build(24, 16, 99, 0), weights, names)
    for letter in "abc":
        close(pooler.pool(sets[letter]["in.features"]), sets[letter]["out.pooled"])
        close(pooler(sets[letter]["in.features"]), sets[letter]["out.tokens"])


@torch.no_grad()
def test_mplug_owl2s_abstractor_is_reproduced() -> None:
    weights, sets = golden("mplug-owl2-abstractor")
    weights = {**weights, "query_embeds": weights["query_embeds"][0], "vit_eos": weights["vit_eos"][0, 0]}
    names = {"queries": "query_embeds", "end": "vit_eos", "linear": "visual_fc"}
    parts = {
        "queries_norm": "norm1", "features_norm": "normk", "attention.query": "attention.query",
        "attention.key": "attention.key", "attention.value": "attention.value", "attention.dense": "output.out_proj",
        "mlp_norm": "output.norm2", "mlp.gate": "output.mlp.w1", "mlp.up": "output.mlp.w3",
        "mlp.norm": "output.mlp.ffn_ln", "mlp.down": "output.mlp.w2",
    }  # fmt: skip
    for index in range(2):
        theirs = f"encoder.layers.{index}.crossattention"
        names |= {f"layers.{index}.{part}": f"{theirs}.{at}" for part, at in parts.items()}
    abstractor = fill(VisualAbstractorConfig(5, 2, 4, 40).build(24, 32, 99, 17), weights, names)
    recorded = [weights[f"encoder.layers.0.crossattention.attention.{part}_pos_embed"] for part in "qk"]
    torch.testing.assert_close(abstractor.positions(17), torch.cat(recorded), atol=1e-6, rtol=0)
    for tensors in sets.values():
        close(abstractor(tensors["in.features"], mask=tensors.get("in.mask")), tensors["out.tokens"])


@torch.no_grad()
def test_idefics2s_connector_equals_transformers() -> None:
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    size = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1}
    reference = Idefics2Connector(Idefics2Config(
        vision_config={**size, "hidden_size": 24},
        text_config={"model_type": "mistral", **size, "num_key_value_heads": 2, "vocab_size": 8},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 6, "num_key_value_heads": 2,
        },
    )).eval()  # fmt: skip
    jitter(reference)
    names = {"latents": "perceiver_resampler.latents", "norm": "perceiver_resampler.norm"}
    for ours, theirs in {"linears.0": "up_proj", "gate": "gate_proj", "linears.1": "down_proj"}.items():
        names[f"input_projector.{ours}"] = f"modality_projection.{theirs}"
    parts = {
        "latents_norm": "input_latents_norm", "features_norm": "input_context_norm",
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.dense": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    for index in range(2):
        names |= {f"layers.{index}.{ours}": f"perceiver_resampler.layers.{index}.{at}" for ours, at in parts.items()}
    config = replace(IDEFICS2, num_latents=5, depth=2, num_heads=4, head_size=6, num_kv_heads=2)
    connector = fill(config.build(24, 32, 40, 0), reference.state_dict(), names)
    features, mask = torch.randn(3, 7, 24), torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:], mask[1, 1] = False, False
    expected = reference(features, mask)
    close(connector(features, mask=mask), expected)
    close(connector(features[:1, :4]), expected[:1])
    low = torch.randn(3, 7, 32).bfloat16()
    assert torch.equal(connector.bfloat16().norm(low), reference.bfloat16().perceiver_resampler.norm(low))


@torch.no_grad()
def test_cocas_pooler_equals_torchs_attention() -> None:
    pooler = AttentionPoolerConfig(6, 4, 1e-5, project_features=False, positions=False, output_projection=False)
    module = pooler.build(16, 24, 99, 7)
    jitter(module)
    assert module.output is None and module.features_projection is None
    reference = nn.MultiheadAttention(24, 4, kdim=16, vdim=16, batch_first=True)
    own = module.attention
    reference.load_state_dict({
        "q_proj_weight": own.query.weight, "k_proj_weight": own.key.weight, "v_proj_weight": own.value.weight,
        "in_proj_bias": torch.cat([own.query.bias, own.key.bias, own.value.bias]),
        "out_proj.weight": own.dense.weight, "out_proj.bias": own.dense.bias,
    })  # fmt: skip
    x = torch.randn(2, 7, 16)
    q = F.layer_norm(module.queries, (24,), module.queries_norm.weight, module.queries_norm.bias)
    kv = F.layer_norm(x, (16,), module.features_norm.weight, module.features_norm.bias)
    close(module(x), reference(q.expand(2, -1, -1), kv, kv, need_weights=False)[0])


@torch.no_grad()
def test_projectors_are_their_formulas() -> None:
    x = torch.randn(2, 5, 6)
    post = ProjectorConfig(norm="post", norm_eps=1e-3).build(6, 8, 99, 5)
    jitter(post)
    y = x @ post.linears[0].weight.T + post.linears[0].bias  # type: ignore[union-attr, operator]
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-3)
    close(post(x), y * post.output_norm.weight + post.output_norm.bias)  # type: ignore[union-attr]
    deep: Any = ProjectorConfig(depth=3, inner_hidden_size=7, activation="quick_gelu").build(6, 8, 99, 5)
    jitter(deep)
    y = x
    for index, linear in enumerate(deep.linears):
        y = y @ linear.weight.T + linear.bias
        y = y * torch.sigmoid(1.702 * y) if index < 2 else y
    close(deep(x), y)
    several: Any = ProjectorConfig(tokens_per_feature=2).build(6, 8, 99, 1)
    jitter(several)
    y = (x[:, :1] @ several.linears[0].weight.T + several.linears[0].bias).view(2, 2, 8)
    close(several(x[:, :1]), y)


@torch.no_grad()
def test_kosmos_projects_what_the_resampler_gives() -> None:
    config = replace(FLAMINGO, output_projector=ProjectorConfig(bias=False))
    whole: Any = config.build(24, 32, 99, 5)
    plain = FLAMINGO.build(24, 24, 99, 5)
    jitter(whole)
    plain.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("output_projector")})
    x = torch.randn(2, 5, 24)
    close(whole(x), plain(x) @ whole.output_projector.linears[0].weight.T)


@torch.no_grad()
def test_frames_of_a_video_are_told_apart() -> None:
    config = replace(FLAMINGO, num_frames=2)
    resampler: Any = config.build(24, 24, 99, 5)
    jitter(resampler)
    plain = FLAMINGO.build(24, 24, 99, 5)
    plain.load_state_dict({k: v for k, v in resampler.state_dict().items() if k != "frame_embedding"})
    x, mask = torch.randn(2, 2, 5, 24), torch.rand(2, 2, 5) > 0.3
    placed = x + resampler.frame_embedding[None, :, None]
    close(resampler(x, mask=mask), plain(placed.flatten(1, 2), mask=mask.flatten(1)))
    close(resampler(x[:, 0]), plain(placed[:, 0]))
    projecting: Any = replace(FLAMINGO, num_frames=2, input_projector=ProjectorConfig()).build(24, 24, 99, 5)
    projecting.input_projector.linears[0].weight.copy_(torch.eye(24))
    projecting.load_state_dict(resampler.state_dict(), strict=False)
    close(projecting(x, mask=mask), resampler(x, mask=mask))
    with pytest.raises(ValueError, match="3 frames, but num_frames is 2"):
        resampler(torch.randn(1, 3, 5, 24))


@pytest.mark.parametrize("config", [PerceiverResamplerConfig(3, 2, 2, 4), VisualAbstractorConfig(5, 2, 2, 12)])
@torch.no_grad()
def test_masked_features_are_not_looked_at(config: ConnectorConfig) -> None:
    connector = config.build(8, 8, 12, 17)
    jitter(connector)
    assert config.takes_mask
    x, mask = torch.randn(2, 17, 8), torch.rand(2, 17) > 0.4
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    assert torch.equal(connector(x, mask=mask), connector(other, mask=mask))
    assert not torch.equal(connector(x), connector(other))


def test_positions_of_a_line_and_of_a_grid_are_sines_and_cosines() -> None:
    line, grid = sincos_1d(torch.arange(5), 8), sincos_2d(3, 8)
    for position in range(5):
        for index in range(4):
            angle = position / 10000 ** (index / 4)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(line[position, [index, 4 + index]], expected)
    for row in range(3):
        for column in range(3):
            halves = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in (column, row)]
            torch.testing.assert_close(grid[3 * row + column], torch.tensor(halves).flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_as_many_as_counted_and_all_parameters_learn(kind: str) -> None:
    config, num_features = KINDS[kind]
    connector = config.build(8, 16, 12, num_features)
    jitter(connector)
    out = connector(torch.randn(2, num_features, 8))
    assert out.shape == (2, config.num_tokens(num_features), 16)
    out.square().sum().backward()
    unused = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [name for name in unused if not name.endswith("key.bias")] == []  # a softmax does not see that bias


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_low_precision_stays_low(kind: str) -> None:
    config, num_features = KINDS[kind]
    connector = config.build(8, 16, 12, num_features).bfloat16()
    x = torch.randn(2, num_features, 8)
    out = connector(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), connector.float()(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_holds_shapes_only(kind: str) -> None:
    config, num_features = KINDS[kind]
    with torch.device("meta"):
        connector = config.build(8, 16, 12, num_features)
        out = connector(torch.randn(2, num_features, 8))
    assert all(tensor.is_meta for tensor in connector.state_dict().values())
    assert out.is_meta and out.shape == (2, config.num_tokens(num_features), 16)


@pytest.mark.parametrize("kind", KINDS)
def test_configs_are_plain_data(kind: str) -> None:
    config, _ = KINDS[kind]
    text = json.dumps(encode(config, "adapter"))
    assert decode(json.loads(text), Classes()) == config


def test_a_configuration_file_can_nest_a_projector_in_a_resampler() -> None:
    made = make(
        PerceiverResamplerConfig, {"depth": 1, "input_projector": {"depth": 2, "gated": True, "bias": False}}, "adapter"
    )
    assert made.input_projector == ProjectorConfig(depth=2, gated=True, bias=False)


# counts: LLaVA-1.5's checkpoint; MobileVLM V2's 6.32 M and V1's 18.94 M as we remember the papers; the 0.08 B of
# Qwen-VL's adapter have no ln_post and proj, which are part of its ViT; others by their formulas
@pytest.mark.parametrize(("config", "sizes", "count"), [
    (ProjectorConfig(depth=2), (1024, 4096), 20_979_712),
    (LDPv2Config(), (1024, 2048), 6_316_032),
    (LDPConfig(), (1024, 2048), 18_936_832),
    (INTERNVL, (3200, 6144), 2 * 12800 + 12800 * 6144 + 6144 + 6144 * 6144 + 6144),
    (PrefixMapperConfig(), (512, 768), 513 * 7680 + 7680 + 8 * (6 * 768**2 + 8 * 768 + 2 * 768**2)),
])  # fmt: skip
def test_full_size_parameter_counts(config: ConnectorConfig, sizes: tuple[int, int], count: int) -> None:
    with torch.device("meta"):
        connector = config.build(*sizes, 0, 0)
    assert sum(p.numel() for p in connector.parameters()) == count


def test_qwen_vls_adapter_has_its_published_size() -> None:
    with torch.device("meta"):
        pooler: Any = AttentionPoolerConfig().build(1664, 4096, 0, 1024)
    counts = {name: p.numel() for name, p in pooler.named_parameters()}
    adapter = sum(size for name, size in counts.items() if not name.startswith("output"))
    assert adapter == 256 * 4096 + 1664 * 4096 + 4 * (4096**2 + 4096) + 4 * 4096
    assert round(adapter / 1e9, 2) == 0.08
    assert sum(counts.values()) == adapter + 2 * 4096 + 4096**2


def test_idefics2s_connector_has_the_parameters_of_transformers() -> None:
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336}
    with torch.device("meta"):
        reference = Idefics2Connector(Idefics2Config(vision_config=vision, text_config=text))
        connector = IDEFICS2.build(1152, 4096, 14336, 0)
    assert sum(p.numel() for p in connector.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(("act", "match"), [
    (lambda: INTERNVL.num_tokens(25), "25 patches are no square grid that merge=2 divides"),
    (lambda: INTERNVL.build(8, 16, 0, 0)(torch.zeros(1, 25, 8)), "25 patches are no square grid that merge=2"),
    (lambda: VILA.num_tokens(24), "24 patches are no square grid. Change image_size"),
    (lambda: VILA_3X3.build(2, 8, 0, 0)(torch.zeros(1, 8, 2)), "8 patches are no square grid"),
    (lambda: LDPConfig().num_tokens(17), "17 patches are no square grid"),
    (lambda: LDPv2Config().build(4, 8, 0, 0)(torch.zeros(1, 17, 4)), "17 patches are no square grid"),
    (lambda: AttentionPoolerConfig().num_tokens(17), "17 patches are no square grid"),
    (lambda: VisualAbstractorConfig().num_tokens(16), "15 patches are no square grid"),
    (lambda: AttentionPoolerConfig(5), "num_queries 5 is no square number"),
    (lambda: AttentionPoolerConfig().build(8, 96, 0, 0), "width 96 has no heads of 128 channels. Set num_heads"),
    (lambda: PrefixMapperConfig(num_heads=5).build(8, 16, 0, 1), "Width 16 does not divide into 5 heads"),
    (lambda: PerceiverResamplerConfig(num_kv_heads=3).build(8, 8, 0, 0), "num_heads 8 is not a multiple of num_kv"),
    (lambda: PerceiverResamplerConfig().build(8, 16, 0, 0), "latents have width 8, the language model 16"),
    (lambda: PerceiverResamplerConfig(hidden_size=16).build(8, 16, 0, 0), "width 16, the features 8. Set input_proj"),
    (lambda: PerceiverResamplerConfig(num_media=2).build(8, 8, 0, 0)(torch.zeros(1, 4, 8)), "needs media_ids"),
    (lambda: PerceiverResamplerConfig(norm="batchnorm"), "norm is 'batchnorm'; choose one of layernorm, rmsnorm"),
    (lambda: PerceiverResamplerConfig(activation="elu"), "activation is 'elu'; choose one of silu"),
    (lambda: ProjectorConfig(activation="elu"), "activation is 'elu'; choose one of silu"),
    (lambda: ProjectorConfig(norm="both"), "norm is 'both'; choose one of none, pre, post"),
    (lambda: ProjectorConfig(merge_version="v3"), "merge_version is 'v3'; choose one of v1, v2"),
    (lambda: PerceiverResamplerConfig(input_projector=INTERNVL), "input_projector must keep the number of features"),
    (lambda: ProjectorConfig(depth=0), "depth is 0; it must be at least 1"),
    (lambda: ProjectorConfig(depth=3, gated=True), "a gated projector has depth 2, not 3"),
    (lambda: ProjectorConfig(narrow=3).build(8, 16, 0, 0), "narrow 3 does not divide the features' width 8"),
    (lambda: sincos_1d(torch.arange(2), 3), "even number of channels; it is 3"),
    (lambda: sincos_2d(2, 6), "number of channels that 4 divides; it is 6"),
])  # fmt: skip
def test_what_cannot_work_is_said(act: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        act()
