"""Every mixin on every model has every property; and the check notices mixins that lack one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from mixformer import BaseMixin, BaseModel, Linear, TransformerConfig, replace, wrap
from mixformer.mixins import (
    CrossAttentionMixin,
    DropoutMixin,
    GatedMLPMixin,
    ImageMixin,
    LMHeadMixin,
    LoRAMixin,
    PatchEmbeddingMixin,
    PrefixTuningMixin,
    QVBiasMixin,
    Rotary2DMixin,
    RotaryMixin,
    StoredHeadMixin,
    SubNormMixin,
    VisionExpertAttentionMixin,
    VisionExpertFCMixin,
)
from mixformer.testing import Report, check_mixin, tiny_model
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig

LANGUAGE = ["llama", "cogvlm", "cogvlm2", "cogagent"]
VISION = LANGUAGE[1:]
TOWER = EVA2CLIPEConfig(hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24, image_size=28)
CROSS_TOWER = EVA2CLIPLConfig(
    hidden_size=16,
    num_layers=2,
    num_layers_run=1,
    num_heads=2,
    inner_hidden_size=24,
    image_size=42,
    stored_head_size=8,
)

# (name, what makes the mixin, models it goes on, the mixin of those models that it stands in for)
ON_LANGUAGE: list[tuple[str, Callable[[], BaseMixin], list[str], str | None]] = [
    ("rotary", RotaryMixin, LANGUAGE, "rotary"),
    ("rotary_released", lambda: RotaryMixin(500.0, "released"), LANGUAGE, "rotary"),
    ("head", lambda: LMHeadMixin(bias=True), LANGUAGE, "head"),
    ("lora", lambda: LoRAMixin(["qkv:q", "qkv:v", "dense", "gate"], rank=2), LANGUAGE, None),
    ("lora_everywhere", lambda: LoRAMixin(["*"], rank=2), LANGUAGE, None),
    ("prefix", lambda: PrefixTuningMixin(num_prefix=3), LANGUAGE, None),
    ("qv_bias", QVBiasMixin, LANGUAGE, None),
    ("sub_norm", SubNormMixin, LANGUAGE, None),
    ("stored", lambda: StoredHeadMixin(5), LANGUAGE, None),
    ("dropout", lambda: DropoutMixin(0.3), LANGUAGE, None),
    ("expert", VisionExpertAttentionMixin, VISION, "vision_expert"),
    ("expert_bias", lambda: VisionExpertAttentionMixin(True, from_language=False), VISION, "vision_expert"),
    ("expert_mlp", VisionExpertFCMixin, VISION, "vision_expert_mlp"),
    ("image_new", lambda: ImageMixin(TOWER), ["llama"], None),
    ("image", lambda: ImageMixin(TOWER), ["cogvlm", "cogvlm2"], "image"),
    ("cross_new", lambda: CrossAttentionMixin(CROSS_TOWER, 24), ["cogvlm", "cogvlm2"], None),
    ("cross", lambda: CrossAttentionMixin(CROSS_TOWER, num_heads=2), ["cogagent"], "cross"),
]
CASES = [
    pytest.param(make_mixin, model, replacing, id=f"{name}-{model}")
    for name, make_mixin, models, replacing in ON_LANGUAGE
    for model in models
]


@pytest.mark.parametrize(("make_mixin", "model", "replacing"), CASES)
def test_every_property_holds(make_mixin: Callable[[], BaseMixin], model: str, replacing: str | None) -> None:
    report = check_mixin(make_mixin, lambda: tiny_model(model), replacing=replacing)
    applied = [key for key, value in report.items() if not isinstance(value, str)]
    assert len(applied) >= 8, str(report)


ON_TOWERS: list[tuple[str, Callable[[], BaseMixin], TransformerConfig, str | None]] = [
    ("qv_bias-E", QVBiasMixin, TOWER, None),
    ("qv_bias-L", QVBiasMixin, CROSS_TOWER, "qv_bias"),
    ("rotary_2d-E", lambda: Rotary2DMixin(2, 16), TOWER, None),
    ("rotary_2d-L", lambda: Rotary2DMixin(3, 16), CROSS_TOWER, "rotary"),
    ("sub_norm-E", SubNormMixin, TOWER, None),
    ("sub_norm-L", SubNormMixin, CROSS_TOWER, "sub_norm"),
    ("stored-E", lambda: StoredHeadMixin(3), TOWER, None),
    ("lora-L", lambda: LoRAMixin(["qkv", "down"], rank=2), CROSS_TOWER, None),
    ("patches-E", lambda: PatchEmbeddingMixin(28, 14), TOWER, "patches"),
]


@pytest.mark.parametrize(
    ("make_mixin", "config", "replacing"), [pytest.param(*case[1:], id=case[0]) for case in ON_TOWERS]
)
def test_every_property_holds_on_towers(
    make_mixin: Callable[[], BaseMixin], config: TransformerConfig, replacing: str | None
) -> None:
    check_mixin(
        make_mixin, lambda: config.build(generator=torch.Generator().manual_seed(0)), replacing=replacing
    )


def test_every_property_of_a_gate_on_a_plain_backbone() -> None:
    config = TransformerConfig(
        vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, positions="learned", max_positions=64
    )
    check_mixin(GatedMLPMixin, lambda: config.build())


@pytest.mark.parametrize("model", LANGUAGE)
def test_layer_scope_has_every_property(model: str) -> None:
    check_mixin(lambda: LoRAMixin(["qkv"], rank=2), lambda: tiny_model(model, num_layers=3), layers=[0, 2])


@pytest.mark.parametrize("model", ["llama", "cogagent"])
def test_compiled_equals_eager(model: str) -> None:
    report = check_mixin(
        lambda: LoRAMixin(["qkv:k", "dense"], rank=2), lambda: tiny_model(model), compile=True
    )
    assert isinstance(report["compiled equals eager"], float)


class Shift(BaseMixin):
    """A mixin with a forward input of its own, as a researcher would write it."""

    inputs = ("shift",)

    def build_layer(self, layer: Any) -> nn.Module:
        return Linear(1, layer.config.hidden_size)

    @wrap
    def layer_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) + layer.mixins[self.name](ctx.require("shift"), ctx)[:, None]


def test_a_mixin_with_inputs_of_its_own_can_be_checked() -> None:
    check_mixin(Shift, extra_inputs=lambda ids: {"shift": ids[:, :1].float() / 61})


def test_the_example_of_the_documentation_holds() -> None:
    report = check_mixin(lambda: PrefixTuningMixin(num_prefix=3))
    assert isinstance(report, Report)
    assert report["a padded batch equals its rows"] < 1e-5  # type: ignore[operator]
    assert "compiled equals eager" in str(report)


def test_what_does_not_apply_is_said_in_the_report() -> None:
    report = check_mixin(QVBiasMixin, lambda: tiny_model("llama"))
    assert report["compiled equals eager"] == "does not apply: not asked for (compile=True)"
    assert (
        report["text alone gives what the language model gives"]
        == "does not apply: the model takes no images"
    )


def test_the_given_model_is_not_changed(make: Callable[..., BaseModel]) -> None:
    model = make("cogvlm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_mixin(VisionExpertFCMixin, model, replacing="vision_expert_mlp")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(model.mixins) == ["rotary", "head", "image", "vision_expert", "vision_expert_mlp"]


class Leak(BaseMixin):
    """Mixes the rows of a batch."""

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) + hidden_states.mean(0, keepdim=True)


class Forgetful(BaseMixin):
    """Normalises over the tokens of one call, so chunks differ."""

    @wrap
    def attention_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) / hidden_states.shape[1]


class Sticky(BaseMixin):
    """Changes the model and does not undo it."""

    def on_attach(self, model: Any) -> None:
        with torch.no_grad():
            model.transformer.word_embeddings.weight.mul_(2)


class Idle(BaseMixin):
    """Has parameters that nothing uses."""

    def build(self, model: Any) -> None:
        self.scale = nn.Parameter(torch.ones(3))


class Restless(BaseMixin):
    """Differs from call to call."""

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) * (1 + 0.01 * torch.rand(()))


class Loud(BaseMixin):
    """Changes text although it is about images."""

    inputs = ("images",)

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return 1.1 * old_impl(hidden_states)


class Unkept(BaseMixin):
    """Takes an option that is not part of its options."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.factor = Unkept.factor

    @replace
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any) -> Any:
        Unkept.factor = 2.0
        return layer.mlp(hidden_states, ctx) * self.factor


@pytest.mark.parametrize(
    ("mixin", "kind", "sentence"),
    [
        (Leak, "llama", "a padded batch equals its rows"),
        (Forgetful, "llama", "cached equals uncached at every step and chunking"),
        (Sticky, "llama", "adding and deleting restores keys, hooks and outputs"),
        (Idle, "llama", "nothing in it changed, so it does not learn"),
        (Restless, "llama", "must hold bit for bit"),
        (Loud, "cogvlm", "text alone gives what the language model gives"),
        (Unkept, "llama", "saving and loading gives the same composition and outputs"),
    ],
)
def test_a_broken_mixin_is_noticed(mixin: Callable[[], BaseMixin], kind: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_mixin(mixin, lambda: tiny_model(kind))


def test_an_unknown_tiny_model_is_named() -> None:
    with pytest.raises(ValueError, match="no tiny model 'gpt'; choose one of llama"):
        tiny_model("gpt")
