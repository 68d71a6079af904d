"""The backbone: every option against formulas written out here; building, running, copying."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from mixformer import BaseMixin, BaseModel, Output, TransformerConfig, replace
from mixformer.sites import RMSNorm
from mixformer.testing import jitter, sample_row, tiny_model

Make = Callable[..., BaseModel]
IDS = torch.tensor([[5, 3, 8, 1, 7], [2, 9, 4, 6, 0]])
SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "inner_hidden_size": 24,
}
KINDS = ["llama", "cogvlm", "cogvlm2", "cogagent"]


def backbone(**options: Any) -> BaseModel:
    model = BaseModel(TransformerConfig(**{**SIZES, **options}), generator=torch.Generator().manual_seed(0))
    jitter(model)
    return model.eval()


def norm(x: torch.Tensor, weights: Any) -> torch.Tensor:
    if hasattr(weights, "bias"):
        scaled = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
        return scaled * weights.weight + weights.bias
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights.weight


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp_min(0),
}


def reference(model: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    """The whole backbone by hand, one row, one head at a time."""
    config, transformer = model.config, model.transformer
    weights: Any = transformer
    out = []
    for row in ids:
        x = weights.word_embeddings.weight[row] * config.embedding_scale
        if config.positions == "learned":
            x = x + weights.position_embeddings.weight[: len(row)]
        if config.embedding_norm:
            x = norm(x, weights.embedding_norm)
        for layer in weights.layers:
            for sublayer, before, after, scale in (
                (attention, layer.attention_norm, layer.attention_output_norm, layer.attention_scale),
                (mlp, layer.mlp_norm, layer.mlp_output_norm, layer.mlp_scale),
            ):
                scale = 1 if scale is None else scale
                if config.norm_order == "pre":
                    x = x + scale * sublayer(layer, norm(x, before))
                elif config.norm_order == "post":
                    x = norm(x + scale * sublayer(layer, x), before)
                elif config.norm_order == "sandwich":
                    x = x + scale * norm(sublayer(layer, norm(x, before)), after)
                else:
                    x = x + scale * norm(sublayer(layer, x), before)
        if config.final_norm:
            x = norm(x, weights.final_norm)
        out.append(x @ weights.word_embeddings.weight.T if config.tied_head else x)
    return torch.stack(out)


def affine(x: torch.Tensor, linear: Any) -> torch.Tensor:
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def attention(layer: Any, x: torch.Tensor) -> torch.Tensor:
    config, size = layer.config, layer.config.head_width
    fused = affine(x, layer.attention.qkv)
    heads, groups = config.num_heads, config.kv_heads
    outs = []
    for head in range(heads):
        group = head // (heads // groups)
        q = fused[:, head * size : (head + 1) * size]
        k = fused[:, (heads + group) * size : (heads + group + 1) * size]
        v = fused[:, (heads + groups + group) * size : (heads + groups + group + 1) * size]
        if config.qk_norm:
            q, k = norm(q, layer.attention.q_norm), norm(k, layer.attention.k_norm)
        scores = q @ k.T / math.sqrt(size)
        if config.causal:
            scores = scores + torch.triu(torch.full_like(scores, -1e30), 1)
        outs.append(torch.softmax(scores, -1) @ v)
    return affine(torch.cat(outs, -1), layer.attention.dense)


def mlp(layer: Any, x: torch.Tensor) -> torch.Tensor:
    activation = ACTIVATIONS[layer.config.activation]
    if layer.config.gated_mlp:
        inner = activation(affine(x, layer.mlp.gate)) * affine(x, layer.mlp.up)
    else:
        inner = activation(affine(x, layer.mlp.up))
    return affine(inner, layer.mlp.down)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"norm": "rmsnorm"},
        {"norm_order": "post"},
        {"norm_order": "sandwich"},
        {"norm_order": "res_post"},
        {"norm_order": "sandwich", "norm": "rmsnorm", "layer_scale": 0.3},
        {"final_norm": False},
        {"embedding_norm": True},
        {"bias": "none"},
        {"bias": "qkv"},
        {"bias": "except_qkv"},
        *({"activation": name} for name in ACTIVATIONS),
        {"gated_mlp": True, "activation": "silu"},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "qk_norm": True},
        {"head_size": 6},
        {"qk_norm": True},
        {"layer_scale": 0.1},
        {"positions": "learned", "max_positions": 8},
        {"tied_head": False},
        {"embedding_scale": 4.0},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_every_option_gives_what_its_formula_says(options: dict[str, Any]) -> None:
    model = backbone(**options)
    with torch.no_grad():
        expected = reference(model, IDS)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_casts_of_the_two_rms_norms_in_bf16() -> None:
    x, weight = torch.randn(3, 16).bfloat16(), (1 + 0.3 * torch.randn(16)).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    found = {}
    for cast in ("last", "first"):
        layer = RMSNorm(16, cast=cast).bfloat16()
        layer.weight.data = weight
        found[cast] = layer(x)
    assert torch.equal(found["last"], (weight.float() * wide).bfloat16())
    assert torch.equal(found["first"], weight * wide.bfloat16())
    assert not torch.equal(found["last"], found["first"])


# ------------------------------------------------------------------- building


@pytest.mark.parametrize("kind", KINDS)
def test_building_touches_no_random_state_and_no_process_group(kind: str) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    tiny_model(kind)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.distributed.is_initialized()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("kind", ["llama", "cogagent"])
def test_the_generator_determines_the_weights(kind: str) -> None:
    config = tiny_model(kind).config

    def weights(seed: int) -> dict[str, torch.Tensor]:
        return config.build(generator=torch.Generator().manual_seed(seed)).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(
        first["transformer.word_embeddings.weight"], other["transformer.word_embeddings.weight"]
    )
    torch.manual_seed(5)
    seeded = config.build().state_dict()
    torch.rand(3)
    later = config.build().state_dict()
    assert all(torch.equal(value, later[key]) for key, value in seeded.items()), (
        "the seed is read, not the state"
    )


def test_a_generator_moves_on_so_that_two_models_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (TransformerConfig(**SIZES).build(generator=generator) for _ in range(2))
    assert not torch.equal(
        first.transformer.word_embeddings.weight, second.transformer.word_embeddings.weight
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_models_give_finite_logits_of_sane_scale(kind: str) -> None:
    model = tiny_model(kind, num_layers=8, hidden_size=64)
    row = sample_row(model, 2, 12, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.run(**row, hidden_layers=[0, 7])
    assert out.logits.isfinite().all()
    assert 1e-3 < out.logits.std().item() < 10
    assert out.hidden[7].std().item() < 10 * out.hidden[0].std().item() + 1
    for key, value in model.state_dict().items():
        assert value.isfinite().all() and (not value.numel() or value.abs().max() < 10), key
    loss = F.cross_entropy(out.logits[0, :-1], row["input_ids"][0, 1:]).item()
    assert abs(loss - math.log(61)) < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_device_are_those_asked_for(kind: str) -> None:
    config = tiny_model(kind).config
    assert {p.dtype for p in config.build(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    model = config.build(device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.device.type == "meta" and model.dtype == torch.float32


def test_mixins_join_a_model_on_its_device_and_dtype(make: Make) -> None:
    from mixformer.mixins import LoRAMixin

    model = make().to(torch.float64)
    model.train()
    lora = model.add_mixin("lora", LoRAMixin(["qkv", "head"], rank=1))
    parts = [lora, *(layer.mixins["lora"] for layer in model.transformer.layers)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float64}
    assert all(part.training for part in parts)


# ------------------------------------------------------------------- running


def test_run_returns_the_hidden_states_asked_for(make: Make) -> None:
    model = make("llama", num_layers=3)
    with torch.no_grad():
        out = model.run(IDS, hidden_layers=["embeddings", 0, 2, "final"])
        assert isinstance(out, Output) and list(out.hidden) == ["embeddings", 0, 2, "final"]
        assert torch.equal(out.hidden["embeddings"], model.transformer.word_embeddings(IDS))  # type: ignore[misc]
        assert torch.equal(out.logits, out.hidden["final"] @ model.get_mixin("head").linear.weight.T)  # type: ignore[union-attr,operator]
        assert torch.equal(out.logits, model(IDS))
        assert not model.run(IDS).hidden
        last = model.run(IDS, last_only=True, hidden_layers=[2])
        torch.testing.assert_close(last.logits, out.logits[:, -1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(last.hidden[2], out.hidden[2])


class MeanPool(BaseMixin):
    """A head that looks at the whole sequence."""

    whole_sequence = True

    @replace
    def final_forward(self, hidden_states: Any, ctx: Any) -> Any:
        return hidden_states.mean(1)


def test_a_head_that_pools_gets_the_whole_sequence() -> None:
    model = backbone(tied_head=False)
    with torch.no_grad():
        expected = model(IDS).mean(1)
        model.add_mixin("pool", MeanPool())
        assert model.whole_sequence
        torch.testing.assert_close(model.run(IDS, last_only=True).logits, expected)
        model.del_mixin("pool")
        assert not model.whole_sequence


def test_a_plan_made_before_gives_the_same(make: Make) -> None:
    model = make("cogagent")
    row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
    plan = model.plan(**row)
    images = {key: row[key] for key in ("images", "cross_images")}
    with torch.no_grad():
        expected = model(**row)
        for _ in range(2):
            assert torch.equal(model(row["input_ids"], plan=plan, **images), expected)


def test_layers_not_run_are_stored_and_do_nothing() -> None:
    model = backbone(num_layers=3, num_layers_run=2)
    expected = model(IDS)
    jitter(model.transformer.layers[2])
    assert torch.equal(model(IDS), expected)
    assert len(model.transformer.layers) == 3


def test_parameters_of_layers_not_run_are_frozen_when_a_mixin_brings_them() -> None:
    from mixformer.mixins import LoRAMixin

    model = backbone(num_layers=3, num_layers_run=2)
    model.add_mixin("lora", LoRAMixin(["qkv"], rank=1))
    trained = [
        all(p.requires_grad for p in layer.mixins["lora"].parameters()) for layer in model.transformer.layers
    ]
    assert trained == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_plain_ones(make: Make, kind: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = make(kind, checkpoint_activations=recomputed)
        row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
        model(**row).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_give_the_same_model(make: Make, kind: str) -> None:
    model = make(kind)
    row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(**row)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**row), expected)
            assert str(twin.hooks) == str(model.hooks)


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"norm": "batchnorm"}, "TransformerConfig.norm is 'batchnorm'; choose one of layernorm, rmsnorm"),
        ({"norm_order": "middle"}, "choose one of pre, post, sandwich, res_post"),
        (
            {"hidden_size": 18},
            "hidden_size 18 does not divide into 4 heads. Change num_heads, or set head_size",
        ),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_layers": -1}, "num_layers is -1; it must be at least 0"),
        ({"num_layers_run": 3}, "num_layers_run 3 is not within num_layers 2"),
        ({"positions": "learned"}, "positions 'learned' needs max_positions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TransformerConfig(**{**SIZES, **options})


def test_token_ids_must_be_there_and_have_two_axes(make: Make) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"input_ids must be \[b, s\]; got shape \(5,\)"):
        model(IDS[0])
    with pytest.raises(ValueError, match=r"input_ids are missing: model\(input_ids, ...\)"):
        backbone()()


def test_a_tower_without_patches_says_what_is_missing() -> None:
    model = BaseModel(TransformerConfig(vocab_size=0, hidden_size=8, num_heads=2))
    with pytest.raises(ValueError, match="no word embedding; a mixin must replace 'word_embedding_forward'"):
        model()


class Doubled(torch.nn.Module):
    """A parametrization: twice the value."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


@pytest.mark.parametrize(("part", "name"), [("mlp.up", "weight"), ("mlp.up", "bias"), ("attention_norm", "weight")])
def test_parametrized_weights_are_used(make: Make, part: str, name: str) -> None:
    model, ids = make("llama", num_layers=1, bias="all"), torch.tensor([[1, 4, 2, 8]])
    module = model.get_submodule(f"transformer.layers.0.{part}")
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.get_parameter(f"transformer.layers.0.{part}.{name}").mul_(2)
        parametrize.register_parametrization(module, name, Doubled())
        assert torch.equal(model(ids), doubled(ids))
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        assert torch.equal(model(ids), doubled(ids))


@pytest.mark.parametrize(("ids", "position"), [([1, 40], [0, 1]), ([1, 2], [0, 9])])
def test_ids_and_positions_that_no_table_has_a_row_for_are_named(ids: list[int], position: list[int]) -> None:
    model = TransformerConfig(vocab_size=31, hidden_size=16, num_heads=2, positions="learned", max_positions=8).build()
    with pytest.raises(ValueError, match=r"Ids from \d to (40 .* 31|9 .* 8) rows"):
        model(torch.tensor([ids]), position_ids=torch.tensor([position]))
