"""What each mixin computes, against formulas written out here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer import BaseMixin, BaseModel, KVCache, TransformerConfig, wrap
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.mixins import (
    CrossAttentionMixin,
    DropoutMixin,
    GatedMLPMixin,
    ImageMixin,
    LoRAMixin,
    PatchEmbeddingMixin,
    PrefixTuningMixin,
    QVBiasMixin,
    Rotary2DMixin,
    RotaryMixin,
    SubNormMixin,
    VisionExpertAttentionMixin,
    VisionExpertFCMixin,
)
from mixformer.sites import model_sites
from mixformer.testing import collate, jitter, sample_row
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig
from models.llama import LLaMA

Make = Callable[..., BaseModel]
IDS = torch.tensor([[5, 3, 8, 1, 7], [2, 9, 4, 6, 0]])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * max(expected.abs().max().item(), 1e-3)
    )


class Spy(BaseMixin):
    """Keeps what goes into and comes out of the hooks of the last layer run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    @wrap
    def attention_fn(self, q: Any, k: Any, v: Any, mask: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        out = old_impl(q, k, v, mask)
        self.seen |= {"q": q, "k": k, "v": v, "attention_fn": out}
        return out

    @wrap
    def qkv_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        self.seen["qkv_in"], self.seen["qkv"] = hidden_states, old_impl(hidden_states)
        return self.seen["qkv"]

    @wrap
    def position_fn(self, q: Any, k: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        self.seen["before"], self.seen["after"] = (q, k), old_impl(q, k)
        self.seen["position_ids"] = ctx.position_ids
        return self.seen["after"]

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        self.seen["mlp_in"], self.seen["mlp"] = hidden_states, old_impl(hidden_states)
        return self.seen["mlp"]

    @wrap
    def cross_attention_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        self.seen["cross_in"], self.seen["cross"] = hidden_states, old_impl(hidden_states)
        return self.seen["cross"]


def watched(model: BaseModel, **inputs: Any) -> dict[str, Any]:
    spy = Spy()
    model.add_mixin("spy", spy)
    model(**inputs)
    model.del_mixin("spy")
    return spy.seen


# ------------------------------------------------------------------- rotary


@pytest.mark.parametrize("tables", ["fp32", "released"])
def test_rotary_turns_each_pair_by_its_position_times_its_frequency(make: Make, tables: str) -> None:
    model = make("llama", num_layers=1, rope_base=100.0, rope_tables=tables)
    seen = watched(model, input_ids=IDS)
    size = 8
    for (x, y), row, head, slot, i in itertools.product(
        zip(seen["before"], seen["after"], strict=True), range(2), range(4), range(5), range(4)
    ):
        angle = slot * 100.0 ** (-2 * i / size)
        pair = complex(x[row, head, slot, i], x[row, head, slot, i + 4]) * complex(
            math.cos(angle), math.sin(angle)
        )
        assert y[row, head, slot, i].item() == pytest.approx(pair.real, abs=1e-5)
        assert y[row, head, slot, i + 4].item() == pytest.approx(pair.imag, abs=1e-5)


def test_attention_scores_depend_on_distance_alone(make: Make) -> None:
    model = make()
    close(model(IDS), model(IDS, position_ids=torch.arange(5)[None] + 1000), 1e-3)
    assert not torch.allclose(model(IDS), model(IDS, position_ids=torch.arange(5)[None] * 3), atol=1e-4)


def test_released_tables_are_rounded_with_the_model_and_fp32_ones_are_not() -> None:
    config = TransformerConfig(vocab_size=7, hidden_size=32, num_heads=2)
    models = {tables: BaseModel(config, dtype=torch.bfloat16) for tables in ("fp32", "released")}
    positions = torch.tensor([[300]])
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    for tables, model in models.items():
        mixin: Any = model.add_mixin("rotary", RotaryMixin(tables=tables))
        found = mixin.angles(positions)[0, 0, :8]
        if tables == "fp32":
            assert found.dtype == torch.float32
            close(found, 300 * frequencies)
        else:
            assert torch.equal(found, torch.tensor(300, dtype=torch.bfloat16) * frequencies.bfloat16())
    assert [key for key in models["released"].state_dict() if "rotary" in key] == ["mixins.rotary.inv_freq"]
    assert not [key for key in models["fp32"].state_dict() if "rotary" in key]


def test_two_dimensional_rotary_turns_by_row_and_column() -> None:
    size, grid, stretched = 8, 3, 16
    config = EVA2CLIPLConfig(
        hidden_size=16,
        num_layers=1,
        num_layers_run=1,
        num_heads=2,
        inner_hidden_size=24,
        image_size=42,
        stored_head_size=0,
    )
    tower = config.build()
    jitter(tower)
    seen = watched(tower, images=torch.randn(1, 3, 42, 42))
    x, y = seen["before"][0], seen["after"][0]
    assert torch.equal(x[:, :, 0], y[:, :, 0])
    for head, patch, pair in itertools.product(range(2), range(9), range(4)):
        place = (patch // grid if pair < 2 else patch % grid) / grid * stretched
        angle = place * 10000.0 ** (-(pair % 2) * 2 / (size // 2))
        a, b = x[0, head, 1 + patch, 2 * pair].item(), x[0, head, 1 + patch, 2 * pair + 1].item()
        turned = complex(a, b) * complex(math.cos(angle), math.sin(angle))
        assert y[0, head, 1 + patch, 2 * pair].item() == pytest.approx(turned.real, abs=1e-5)
        assert y[0, head, 1 + patch, 2 * pair + 1].item() == pytest.approx(turned.imag, abs=1e-5)


# ------------------------------------------------------------------- LoRA


def test_lora_adds_scaled_low_rank_rows_to_the_parts_it_names(make: Make) -> None:
    model = make("cogvlm2", num_layers=1)
    before = watched(model, input_ids=IDS)
    lora = LoRAMixin(["qkv:q", "qkv:v"], rank=3, alpha=12.0)
    model.add_mixin("lora", lora)
    layer: Any = model.transformer.layers[0]
    jitter(layer.mixins["lora"])
    after = watched(model, input_ids=IDS)
    adapters = layer.mixins["lora"]["qkv"]
    x = before["qkv_in"]
    for index, part in enumerate("qkv"):
        expected = before["qkv"][index]
        if part in adapters:
            expected = expected + (x @ adapters[part].a.T @ adapters[part].b.T) * (12.0 / 3)
        close(after["qkv"][index], expected)
    assert adapters.keys() == {"q", "v"}
    assert adapters["q"].b.shape == (32, 3) and adapters["v"].b.shape == (16, 3)


@pytest.mark.parametrize(
    "sites", [["qkv:q"], ["qkv", "dense", "down"], ["*"], ["head", "image.projector.*", "vision_expert*"]]
)
def test_lora_merges_to_rounding_and_unmerges_exactly(make: Make, sites: list[str]) -> None:
    model = make("cogvlm")
    row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
    state, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(**row)
    lora: Any = model.add_mixin("lora", LoRAMixin(sites, rank=2))
    assert torch.equal(model(**row), expected), "fresh updates are zero"
    for module in [
        lora,
        *(layer.mixins["lora"] for layer in model.transformer.layers if "lora" in layer.mixins),
    ]:
        jitter(module)
    adapted = model(**row)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    lora.merge(model)
    lora.merge(model)
    close(model(**row), adapted)
    lora.unmerge()
    assert torch.equal(model(**row), adapted)
    lora.merge(model)
    model.del_mixin("lora")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**row), expected)


def test_lora_refuses_patterns_that_match_nothing_and_names_the_sites(make: Make) -> None:
    with pytest.raises(
        ValueError,
        match=r"LoRA pattern 'query' matches no Linear here. Sites: dense, down, gate, head, qkv, up",
    ):
        make().add_mixin("lora", LoRAMixin(["qkv", "query"]))
    with pytest.raises(ValueError, match="'qkv:x' matches no Linear"):
        make().add_mixin("lora", LoRAMixin(["qkv:x"]))
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        LoRAMixin(["qkv"], rank=0)


def test_lora_dropout_acts_in_training_alone(make: Make) -> None:
    model = make()
    model.add_mixin("lora", LoRAMixin(["qkv"], rank=2, dropout=0.5))
    for layer in model.transformer.layers:
        jitter(layer.mixins["lora"])
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


# ------------------------------------------------------------------- prefix tuning, biases, norms, gate


@pytest.mark.parametrize("kind", ["llama", "cogvlm2"])
def test_prefix_tuning_attends_to_learned_keys_of_every_layer(make: Make, kind: str) -> None:
    model = make(kind, num_layers=1)
    model.add_mixin("prefix", PrefixTuningMixin(3))
    layer: Any = model.transformer.layers[0]
    jitter(layer.mixins["prefix"])
    seen = watched(model, input_ids=IDS)  # the spy lies outside and sees keys without prefix
    prefix, groups = layer.mixins["prefix"], seen["q"].shape[1] // seen["k"].shape[1]
    for row, head, query in itertools.product(range(2), range(4), range(5)):
        group = head // groups
        keys = torch.cat([prefix["k"][group], seen["k"][row, group, : query + 1]])
        values = torch.cat([prefix["v"][group], seen["v"][row, group, : query + 1]])
        weights = torch.softmax(keys @ seen["q"][row, head, query] / math.sqrt(8), 0)
        close(seen["attention_fn"][row, head, query], weights @ values)


def test_prefix_tuning_stays_outside_the_cache(make: Make) -> None:
    model = make()
    model.add_mixin("prefix", PrefixTuningMixin(4))
    expected, cache = model(IDS), KVCache(model, 2, 5)
    found = [model(IDS[:, :3], cache=cache), model(IDS[:, 3:4], cache=cache), model(IDS[:, 4:], cache=cache)]
    close(torch.cat(found, 1), expected)
    assert cache.length == cache.capacity == 5
    with pytest.raises(ValueError, match="a prefix needs at least one key"):
        PrefixTuningMixin(0)


def test_qv_bias_moves_q_and_v_and_leaves_k(make: Make) -> None:
    model = make("cogvlm2", num_layers=1)
    before = watched(model, input_ids=IDS)["qkv"]
    model.add_mixin("bias", QVBiasMixin())
    biases: Any = model.transformer.layers[0].mixins["bias"]
    jitter(biases)
    after = watched(model, input_ids=IDS)["qkv"]
    close(after[0], before[0] + biases["q"])
    assert torch.equal(after[1], before[1])
    close(after[2], before[2] + biases["v"])


def test_sub_norm_norms_what_enters_the_output_projections() -> None:
    model = BaseModel(
        TransformerConfig(vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24)
    )
    model.add_mixin("sub_norm", SubNormMixin())
    jitter(model)
    seen = watched(model, input_ids=IDS)
    layer: Any = model.transformer.layers[0]
    norm = layer.mixins["sub_norm"]["down"]
    inner = F.gelu(seen["mlp_in"] @ layer.mlp.up.weight.T + layer.mlp.up.bias)
    inner = (inner - inner.mean(-1, keepdim=True)) / torch.sqrt(
        inner.var(-1, correction=0, keepdim=True) + 1e-5
    )
    inner = inner * norm.weight + norm.bias
    close(seen["mlp"], inner @ layer.mlp.down.weight.T + layer.mlp.down.bias)
    assert norm.weight.shape == (24,)


def test_a_gate_multiplies_what_the_plain_mlp_has() -> None:
    model = BaseModel(
        TransformerConfig(vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, bias="none")
    )
    model.add_mixin("gate", GatedMLPMixin("silu"))
    seen = watched(model, input_ids=IDS)
    layer: Any = model.transformer.layers[0]
    x, gate = seen["mlp_in"], seen["mlp_in"] @ layer.mixins["gate"].weight.T
    close(
        seen["mlp"], (gate / (1 + torch.exp(-gate)) * (x @ layer.mlp.up.weight.T)) @ layer.mlp.down.weight.T
    )


def test_sites_outside_the_layers_are_named_by_mixin_and_path(make: Make) -> None:
    names = {site.name for site in model_sites(make("cogvlm"))}
    expected = {"final_norm", "head", "image.projector.linear", "image.projector.norm"}
    assert names == expected | {f"image.projector.mlp.{part}" for part in ("gate", "up", "down")}


def test_a_mixin_may_not_take_the_name_of_a_backbone_site(make: Make) -> None:
    model = make()
    for name in ("gate", "qkv", "final_norm"):
        with pytest.raises(ValueError, match=f"is the site '{name}' already. Take another name, such as 'my_{name}'"):
            model.add_mixin(name, GatedMLPMixin())
        assert name not in model.mixins


def test_a_second_gate_and_an_unknown_activation_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"gated already \(config.gated_mlp\)"):
        make().add_mixin("gated", GatedMLPMixin())
    with pytest.raises(ValueError, match="'swish': choose one of silu, gelu"):
        GatedMLPMixin("swish")


# ------------------------------------------------------------------- images and experts


def test_an_image_fills_its_span_with_boi_features_and_eoi(make: Make) -> None:
    model = make("cogvlm")
    row = sample_row(model, 2, 6, torch.Generator().manual_seed(0))
    image: Any = model.get_mixin("image")
    embeddings = model.run(**row, hidden_layers=["embeddings"]).hidden["embeddings"][0]
    words = model.transformer.word_embeddings.weight[row["input_ids"][0]]  # type: ignore[union-attr]
    features = image.projector(image.tower(images=row["images"]))
    expected = torch.cat(
        [words[:1], *(part for f in features for part in (image.boi[None], f, image.eoi[None])), words[13:]]
    )
    close(embeddings, expected)
    plan = model.plan(**row)
    assert plan.position_ids is not None
    # text 0; then boi, four features on one position, eoi; twice; then text
    assert plan.position_ids[0].tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11]
    assert plan.routes.index(("image",)).tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_pictures_follow_the_order_of_their_places(make: Make) -> None:
    model = make("cogvlm")
    rows = [sample_row(model, 2, 6, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    rows[1]["images"] = rows[1]["images"][:1]
    rows[1]["token_type_ids"][:, 7:] = 0
    batch = collate(rows)
    assert not torch.allclose(
        model(**{**batch, "images": batch["images"][[1, 0, 2]]})[0], model(**batch)[0], atol=1e-3
    )
    close(model(**{**batch, "images": batch["images"][[1, 0, 2]]})[1], model(**batch)[1])


def spans(*ranges: tuple[int, int], length: int = 20) -> torch.Tensor:
    types = torch.zeros(1, length, dtype=torch.long)
    for start, stop in ranges:
        types[0, start:stop] = 1
    return types


@pytest.mark.parametrize(
    ("types", "num_images", "match"),
    [
        (
            spans((1, 6)),
            1,
            r"Row 0 marks 5 image tokens in token_type_ids; each image takes 6 \(boi, 4 features, eoi\)",
        ),
        (
            spans((1, 4), (6, 9)),
            1,
            r"Row 0: the image span that starts at slot 1 is not 6 tokens in one piece",
        ),
        (spans((1, 7)), 2, r"token_type_ids have room for 1 image\(s\) \(6 tokens each\), but 2 were given"),
        (spans((1, 13)), 1, r"token_type_ids have room for 2 image\(s\).* but 1 were given"),
        (
            spans(),
            1,
            r"1 image\(s\) were given, but token_type_ids mark no place for them. Put 1 on the 6 tokens",
        ),
        (spans((1, 7))[:, :-1], 1, r"token_type_ids \(1, 19\) must have the shape of input_ids \(1, 20\)"),
    ],
)
def test_spans_that_do_not_match_are_refused(
    make: Make, types: torch.Tensor, num_images: int, match: str
) -> None:
    model = make("cogvlm")
    cache = KVCache(model, 1, 30)
    with pytest.raises(ValueError, match=match):
        model(
            torch.ones(1, 20, dtype=torch.long),
            token_type_ids=types,
            images=torch.zeros(num_images, 3, 28, 28),
            cache=cache,
        )
    assert cache.length == 0


def test_pictures_of_another_size_are_refused(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"images must be \[m, 3, 28, 28\] for this tower; got \(1, 3, 14, 28\)"
    ):
        make("cogvlm")(
            torch.ones(1, 20, dtype=torch.long),
            token_type_ids=spans((1, 7)),
            images=torch.zeros(1, 3, 14, 28),
        )


def with_language_experts(model: BaseModel) -> BaseModel:
    for name in ("vision_expert", "vision_expert_mlp"):
        old = model.get_mixin(name)
        model.replace_mixin(name, type(old)(**old.options))
        for layer in model.transformer.layers:
            for key, bias in layer.mixins[name].named_parameters():
                if key == "qkv.bias":
                    bias.zero_()
    return model


@pytest.mark.parametrize("kind", ["cogvlm", "cogvlm2", "cogagent"])
def test_experts_copied_from_the_language_weights_equal_the_language_model(make: Make, kind: str) -> None:
    model = with_language_experts(make(kind))
    row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
    found = model(**row)
    for name in ("vision_expert", "vision_expert_mlp"):
        model.del_mixin(name)
    close(found, model(**row))


def test_experts_act_on_boi_and_features_alone(make: Make) -> None:
    model = make("cogvlm", num_layers=1)
    row = sample_row(model, 1, 5, torch.Generator().manual_seed(0))
    seen = watched(model, **row)
    layer: Any = model.transformer.layers[0]
    for name, below, expert in (
        ("mlp", layer.mlp, layer.mixins["vision_expert_mlp"]),
        ("qkv", layer.attention.qkv, layer.mixins["vision_expert"].qkv),
    ):
        x = seen[f"{name}_in"][0]
        found = seen[name][0] if name == "mlp" else torch.cat(seen[name], -1)[0]
        for slot in range(x.shape[0]):
            close(found[slot], (expert if 1 <= slot <= 5 else below)(x[slot]))


def test_rotary_and_experts_compose_in_any_order(make: Make) -> None:
    reference = make("cogvlm")
    row = sample_row(reference, 1, 6, torch.Generator().manual_seed(0))
    expected, state = reference(**row), reference.state_dict()
    for order in itertools.permutations(["rotary", "image", "vision_expert", "vision_expert_mlp"]):
        model = LLaMA(reference.config)  # type: ignore[arg-type]
        model.del_mixin("rotary")
        for name in order:
            kind = reference.get_mixin(name)
            model.add_mixin(name, type(kind)(**kind.options))
        model.load_state_dict(state)
        close(model(**row), expected)


@pytest.mark.parametrize("kind", ["cogvlm", "cogagent"])
def test_text_alone_equals_the_language_model_bit_for_bit(make: Make, kind: str) -> None:
    model = make(kind)
    language = make("llama", rope_tables="fp32", norm_cast="last")
    language.load_state_dict(
        {key: value for key, value in model.state_dict().items() if key in language.state_dict()}
    )
    assert torch.equal(model(IDS), language(IDS))
    assert torch.equal(model(IDS, token_type_ids=torch.zeros_like(IDS)), language(IDS))


def test_cross_attention_is_softmax_over_the_pictures_of_the_row(make: Make) -> None:
    model = make("cogagent", num_layers=1)
    generator = torch.Generator().manual_seed(0)
    rows = [sample_row(model, count, 6, generator) for count in (0, 2, 1)]
    batch = collate(rows)
    seen = watched(model, **batch)
    cross: Any = model.get_mixin("cross")
    weights: Any = model.transformer.layers[0].mixins["cross"]
    features = cross.tower(images=batch["cross_images"]) + cross.position_embedding
    assert not seen["cross"][0].any()
    for row, pictures in ((1, features[:2].flatten(0, 1)), (2, features[2])):
        x = seen["cross_in"][row]
        x = weights.norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        q = (x @ weights.query.weight.T).view(-1, 4, 6).transpose(0, 1)
        k, v = (pictures @ weights.key_value.weight.T).view(-1, 2, 4, 6).unbind(1)
        scores = torch.softmax(q @ k.permute(1, 2, 0) / math.sqrt(6), -1)
        out = (scores @ v.transpose(0, 1)).transpose(0, 1).flatten(1) @ weights.dense.weight.T
        close(seen["cross"][row], out)


def test_cross_pictures_and_places_must_agree(make: Make) -> None:
    model = make("cogagent")
    row = sample_row(model, 1, 6)
    with pytest.raises(
        ValueError, match=r"2 cross_images were given for 1 image place\(s\). Pass one for each image"
    ):
        model(**{**row, "cross_images": row["cross_images"].repeat(2, 1, 1, 1)})
    row.pop("cross_images")
    with pytest.raises(ValueError, match="input 'cross_images' is missing; mixin 'cross' needs it"):
        model(**row)


def test_patches_are_cut_row_by_row_behind_a_cls_token() -> None:
    tower = EVA2CLIPEConfig(
        hidden_size=8, num_layers=1, num_heads=2, inner_hidden_size=8, image_size=28
    ).build()
    jitter(tower)
    patches: Any = tower.get_mixin("patches")
    images = torch.randn(2, 3, 28, 28)
    found = tower.run(images=images, hidden_layers=["embeddings"]).hidden["embeddings"]
    for index, (y, x) in enumerate(itertools.product(range(2), range(2))):
        part = images[:, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].flatten(1)
        expected = part @ patches.conv.weight.flatten(1).T + patches.conv.bias
        close(found[:, 1 + index], expected + tower.transformer.position_embeddings.weight[1 + index])
    close(found[:, 0], (patches.cls + tower.transformer.position_embeddings.weight[0]).expand(2, -1))
    assert tower(images=images).shape == (2, 4, 8)


@pytest.mark.parametrize("downsample", [1, 2])
def test_the_adapter_projects_and_gates(downsample: int) -> None:
    adapter = GLUAdapterConfig(inner_hidden_size=10, downsample=downsample, position_table=True).build(
        6, 8, 99, 4
    )
    jitter(adapter)
    x = torch.randn(1, 4, 6)
    y = x + adapter.position_embedding
    if downsample == 2:  # the four patches of one square, in reading order
        weight = adapter.conv.weight.permute(0, 2, 3, 1).reshape(6, -1)  # type: ignore[union-attr]
        y = y.reshape(1, 1, 24) @ weight.T + adapter.conv.bias  # type: ignore[union-attr]
    y = y @ adapter.linear.weight.T
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-5)
    y = F.gelu(y * adapter.norm.weight + adapter.norm.bias)
    mlp: Any = adapter.mlp
    y = (F.silu(y @ mlp.gate.weight.T) * (y @ mlp.up.weight.T)) @ mlp.down.weight.T
    close(adapter(x), y)
    assert GLUAdapterConfig(downsample=2).num_tokens(1024) == 256


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (
            lambda: GLUAdapterConfig(downsample=2).num_tokens(9),
            "9 patches are no square grid that downsample=2 divides",
        ),
        (lambda: GLUAdapterConfig().num_tokens(6), "6 patches are no square grid"),
        (lambda: PatchEmbeddingMixin(30, 14), "image_size 30 is not a multiple of patch_size 14"),
        (lambda: PatchEmbeddingMixin(28, 14, stem_channels=[4, 4]), "patch_size 14 cannot be halved 2 times"),
        (lambda: EVA2CLIPEConfig(image_size=225), "image_size 225 does not divide into patches of 14"),
        (lambda: RotaryMixin(tables="fp64"), "'fp32' or 'released', not 'fp64'"),
        (
            lambda: BaseModel(TransformerConfig(vocab_size=3, hidden_size=6, num_heads=2)).add_mixin(
                "r", RotaryMixin()
            ),
            "even head size; this model's is 3",
        ),
        (
            lambda: BaseModel(TransformerConfig(vocab_size=3, hidden_size=12, num_heads=2)).add_mixin(
                "r", Rotary2DMixin(2)
            ),
            "head size that 4 divides; it is 6",
        ),
        (
            lambda: BaseModel(TransformerConfig(vocab_size=3, hidden_size=12, num_heads=2)).add_mixin(
                "cross", CrossAttentionMixin(EVA2CLIPEConfig(hidden_size=8, num_heads=2, image_size=28), 15)
            ),
            "width 15 does not divide into 2 heads. Change compute_size or num_heads",
        ),
        (
            lambda: ImageMixin(EVA2CLIPEConfig(image_size=42), GLUAdapterConfig(downsample=2)),
            "9 patches are no square grid",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(act: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        act()


def test_a_scoped_expert_leaves_other_layers_alone(make: Make) -> None:
    model = make("cogvlm", num_layers=3, expert_layers=[1])
    keys = {key.split(".")[2] for key in model.state_dict() if "vision_expert" in key}
    assert keys == {"1"}
    assert model.scopes["vision_expert"] == model.scopes["vision_expert_mlp"] == [1]


def test_experts_start_as_the_language_model_unless_told(make: Make) -> None:
    model = make()
    layer: Any = model.transformer.layers[0]
    model.add_mixin("copied", VisionExpertFCMixin())
    model.add_mixin("fresh", VisionExpertFCMixin(from_language=False))
    model.add_mixin("attention", VisionExpertAttentionMixin())
    assert torch.equal(layer.mixins["copied"].up.weight, layer.mlp.up.weight)
    assert not torch.equal(layer.mixins["fresh"].up.weight, layer.mlp.up.weight)
    assert torch.equal(layer.mixins["attention"].qkv.weight, layer.attention.qkv.weight)
    assert isinstance(layer.mixins["attention"], nn.Module)


@pytest.mark.parametrize("tables", ["fp32", "released"])
def test_tables_of_a_model_of_shapes_are_not_those_of_a_real_one(make: Make, tables: str) -> None:
    shapes = make("llama", rope_base=777.0, rope_tables=tables).config.build(device="meta")
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert shapes(ids.to("meta")).is_meta
    model = make("llama", rope_base=777.0, rope_tables=tables)
    assert not model(ids).is_meta
    width = model.config.head_width
    expected = torch.tensor([777.0 ** (-2 * i / width) for i in range(width // 2)])
    torch.testing.assert_close(model.get_mixin("rotary").frequencies(torch.device("cpu")), expected)


# ------------------------------------------------------------------- dropout


def added_to_the_residual_stream(model: BaseModel, **inputs: Any) -> dict[str, torch.Tensor]:
    """What the hooks of the last layer give with dropout, after the same without."""
    whole = watched(model, **inputs)
    model.add_mixin("dropout", DropoutMixin(0.3))
    torch.manual_seed(0)
    dropped = watched(model, **inputs)
    model.del_mixin("dropout")
    return {"whole": whole["mlp"], "dropped": dropped["mlp"], "into": dropped["mlp_in"], "before": whole["mlp_in"]}


def test_dropout_zeroes_its_share_and_scales_the_rest_while_training(make: Make) -> None:
    model = make("llama", num_layers=1)
    ids = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    seen = added_to_the_residual_stream(model.train(), input_ids=ids)
    kept = seen["dropped"] != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert not torch.allclose(seen["into"], seen["before"])  # what attention added was dropped in part as well
    expected = model.transformer.layers[0].mlp(seen["into"], None) / 0.7
    close(seen["dropped"][kept], expected[kept])


def test_dropout_does_nothing_outside_of_training(make: Make) -> None:
    seen = added_to_the_residual_stream(make("llama").eval(), input_ids=IDS)
    assert torch.equal(seen["dropped"], seen["whole"]) and torch.equal(seen["into"], seen["before"])
