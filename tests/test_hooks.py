"""Hooks: order of chains, scope, nesting, and errors that change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixformer import BaseMixin, BaseModel, TransformerConfig, replace, wrap
from mixformer.hooks import HOOKS, HookPoints
from mixformer.mixins import LMHeadMixin, LoRAMixin, PrefixTuningMixin, RotaryMixin, VisionExpertFCMixin

Make = Callable[..., BaseModel]
IDS = torch.tensor([[5, 3, 8, 1]])


class Times(BaseMixin):
    """Wraps: multiplies what the MLP gives."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) * self.factor


class Plus(BaseMixin):
    """Wraps: adds to what the MLP gives."""

    def __init__(self, term: float = 1.0) -> None:
        super().__init__()
        self.term = term

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(hidden_states) + self.term


class Constant(BaseMixin):
    """Replaces the MLP by a number."""

    def __init__(self, value: float = 3.0) -> None:
        super().__init__()
        self.value = value

    @replace
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any) -> Any:
        return torch.full_like(hidden_states, self.value)


def mlp_of(model: BaseModel, index: int = 0) -> float:
    """What the MLP hook of a layer gives, where Constant lies at the bottom."""
    layer: Any = model.transformer.layers[index]
    with torch.no_grad():
        return layer.hooks.mlp_forward(torch.zeros(1, 32), layer, None).mean().item()


def snapshot(model: BaseModel) -> tuple[Any, ...]:
    with torch.no_grad():
        state = {key: value.clone() for key, value in model.state_dict().items()}
        return list(state), str(model.hooks), list(model.mixins), dict(model.scopes), state, model(IDS)


def same(model: BaseModel, before: tuple[Any, ...]) -> bool:
    now = snapshot(model)
    tensors = all(torch.equal(value, before[4][key]) for key, value in now[4].items())
    return now[:4] == before[:4] and tensors and torch.equal(now[5], before[5])


# ------------------------------------------------------------------- class definition


def test_an_unknown_hook_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(
        TypeError,
        match=r"Bad.mlp_foward is decorated with @wrap, but there is no hook.*Did you mean 'mlp_forward'",
    ):

        class Bad(BaseMixin):
            @wrap
            def mlp_foward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any: ...


def test_a_wrong_signature_is_refused_with_the_right_one() -> None:
    with pytest.raises(
        TypeError,
        match=r"wrong arguments for @wrap. Write: def mlp_forward\(self, hidden_states, layer, ctx, old_impl\)",
    ):

        class Bad(BaseMixin):
            @wrap
            def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"Write: def position_fn\(self, q, k, layer, ctx\)"):

        class Worse(BaseMixin):
            @replace
            def position_fn(self, query: Any, key: Any, layer: Any, ctx: Any) -> Any: ...


def test_a_hook_name_without_decorator_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Bad.mlp_forward has the name of a hook but no decorator.*@replace.*@wrap"
    ):

        class Bad(BaseMixin):
            def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any) -> Any: ...


def test_hooks_are_the_documented_ones_and_each_says_what_it_does() -> None:
    expected = {
        "word_embedding_forward",
        "position_embedding_forward",
        "embedding_norm_forward",
        "attention_mask_forward",
        "layer_forward",
        "attention_forward",
        "qkv_forward",
        "position_fn",
        "attention_fn",
        "attention_output_forward",
        "cross_attention_forward",
        "mlp_forward",
        "linear_forward",
        "norm_forward",
        "final_forward",
    }
    assert set(HOOKS) == expected
    assert all("Default:" in getattr(HookPoints, name).__doc__ for name in expected)


# ------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    "order", [("constant", "times", "plus"), ("times", "constant", "plus"), ("times", "plus", "constant")]
)
def test_the_replacement_is_innermost_and_wraps_follow_in_the_order_added(
    make: Make, order: tuple[str, ...]
) -> None:
    model = make()
    makers = {"constant": Constant, "times": Times, "plus": Plus}
    for name in order:
        model.add_mixin(name, makers[name]())
    assert mlp_of(model) == 3.0 * 2.0 + 1.0


def test_a_replaced_mixin_keeps_its_place_in_the_chain(make: Make) -> None:
    model = make()
    for name, mixin in (("constant", Constant()), ("times", Times()), ("plus", Plus())):
        model.add_mixin(name, mixin)
    old = model.get_mixin("times")
    assert model.replace_mixin("times", Times(10.0)) is old and old.name == ""
    assert mlp_of(model) == 3.0 * 10.0 + 1.0
    assert list(model.mixins)[-3:] == ["constant", "times", "plus"]
    model.replace_mixin("constant", Constant(1.0))
    assert mlp_of(model) == 11.0


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent"])
def test_a_mixin_swapped_for_one_with_its_weights_changes_nothing(make: Make, kind: str) -> None:
    model = make(kind)
    before = snapshot(model)
    for name in list(model.mixins):
        old = model.get_mixin(name)
        model.replace_mixin(name, type(old)(**old.options))
        model.load_state_dict(before[4])
        assert same(model, before), name


def test_replacing_keeps_the_layers_unless_told(make: Make) -> None:
    model = make(num_layers=4)
    model.add_mixin("times", Times(), layers=[1, 3])
    model.replace_mixin("times", Times(3.0))
    assert model.scopes["times"] == [1, 3]
    model.replace_mixin("times", Times(3.0), layers=range(2))
    assert model.scopes["times"] == [0, 1]


def test_layers_limit_layer_hooks_and_parameters_but_not_model_hooks(make: Make) -> None:
    class Both(Times):
        def build_layer(self, layer: Any) -> Any:
            return torch.nn.Linear(1, 1)

        @wrap
        def final_forward(self, hidden_states: Any, ctx: Any, old_impl: Any) -> Any:
            return old_impl(hidden_states) * 0

    model = make(num_layers=3)
    model.add_mixin("constant", Constant())
    model.add_mixin("both", Both(), layers=range(0, 3, 2))
    assert [mlp_of(model, index) for index in range(3)] == [6.0, 3.0, 6.0]
    assert [key.split(".")[2] for key in model.state_dict() if "both" in key] == ["0", "0", "2", "2"]
    assert not model(IDS).any()


def test_the_printed_table_shows_who_does_what_where(make: Make) -> None:
    model = make("cogvlm", num_layers=4)
    model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=1), layers=[0, 2])
    model.add_mixin("times", Times(), layers=[1])
    assert str(model.hooks).splitlines() == [
        "word_embedding_forward      model          default <- image",
        "position_embedding_forward  model          default",
        "embedding_norm_forward      model          default",
        "attention_mask_forward      model          default",
        "final_forward               model          head",
        "layer_forward               all layers     default",
        "attention_forward           all layers     default",
        "qkv_forward                 all layers     default <- vision_expert",
        "position_fn                 all layers     rotary",
        "attention_fn                all layers     default",
        "attention_output_forward    all layers     default <- vision_expert",
        "cross_attention_forward     all layers     default",
        "mlp_forward                 layers 0, 2-3  default <- vision_expert_mlp",
        "mlp_forward                 layers 1       default <- vision_expert_mlp <- times",
        "linear_forward qkv          layers 0, 2    default <- lora",
    ]


def test_a_site_wrap_goes_around_one_named_linear(make: Make) -> None:
    class Seen(BaseMixin):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        @wrap
        def linear_forward(self, site: Any, x: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
            self.names.append(f"{'' if layer is None else layer.index}{site.name}")
            return old_impl(x)

        @wrap
        def norm_forward(self, site: Any, x: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
            self.names.append(f"{'' if layer is None else layer.index}{site.name}")
            return old_impl(x)

    model = make(num_layers=1)
    expected = model(IDS)
    seen = Seen()
    model.add_mixin("seen", seen)
    assert torch.equal(model(IDS), expected)
    assert seen.names == [
        "0attention_norm",
        "0qkv",
        "0dense",
        "0mlp_norm",
        "0gate",
        "0up",
        "0down",
        "final_norm",
        "head",
    ]


def test_old_impl_takes_only_the_tensors(make: Make) -> None:
    class Doubled(BaseMixin):
        @wrap
        def position_fn(self, q: Any, k: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
            return old_impl(*old_impl(q, k))

    model = make()
    model.del_mixin("rotary")
    expected = model(IDS)
    model.add_mixin("doubled", Doubled())
    assert torch.equal(model(IDS), expected)


def test_nested_models_are_reached_by_path(make: Make) -> None:
    model = make("cogagent")
    assert [path for path, _ in model.nested_models()] == ["image.tower", "cross.tower"]
    lora = model.add_mixin("cross.tower/lora", LoRAMixin(["qkv"], rank=1), layers=[0])
    assert model.get_mixin("cross.tower/lora") is lora
    keys = [key for key in model.state_dict() if "lora" in key]
    assert keys == [f"mixins.cross.tower.transformer.layers.0.mixins.lora.qkv.all.{part}" for part in "ab"]
    other = model.replace_mixin("cross.tower/lora", LoRAMixin(["dense"], rank=1))
    assert other is lora
    model.del_mixin("cross.tower/lora")
    assert not [key for key in model.state_dict() if "lora" in key]


# ------------------------------------------------------------------- refusals, nothing changed


def refused(
    model: BaseModel, match: str, act: Callable[[], Any], error: type[Exception] = ValueError
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        act()
    assert same(model, before)


def test_two_replacements_are_refused_and_name_both_the_hook_the_layers_and_the_remedy(make: Make) -> None:
    model = make()
    model.add_mixin("first", Constant(), layers=[1])
    match = (
        r"'mlp_forward' of layer 1 is replaced by two mixins: 'first' \(Constant\) and 'second' \(Constant\).*"
        r"del_mixin\('first'\).*replace_mixin\('first'.*@wrap"
    )
    second = Constant()
    refused(model, match, lambda: model.add_mixin("second", second))
    model.add_mixin("second", second, layers=[0])


def test_a_taken_name_is_refused(make: Make) -> None:
    model = make()
    refused(
        model,
        r"LLaMA already has a mixin 'head' \(LMHeadMixin\).*replace_mixin\('head'",
        lambda: model.add_mixin("head", Times()),
    )


@pytest.mark.parametrize("name", ["a b", "1st", "", "pop", "x.y"])
def test_a_name_that_is_no_word_is_refused(make: Make, name: str) -> None:
    model = make()
    refused(model, "cannot name a mixin", lambda: model.add_mixin(name, Times()))


def test_a_missing_mixin_is_named_with_the_nearest(make: Make) -> None:
    model = make()
    for act in (model.get_mixin, model.del_mixin, lambda name: model.replace_mixin(name, Times())):
        refused(
            model,
            "LLaMA has no mixin 'rotari'. Did you mean 'rotary'. It has: rotary, head",
            lambda act=act: act("rotari"),
        )


def test_a_missing_nested_model_is_named(make: Make) -> None:
    model = make("cogvlm")
    refused(
        model,
        "has no nested model 'image.towr'. Did you mean 'image.tower'",
        lambda: model.add_mixin("image.towr/lora", LoRAMixin(["qkv"])),
    )


def test_a_mixin_of_another_model_is_refused(make: Make) -> None:
    model, other = make(), make()
    refused(
        model,
        r"This LMHeadMixin already belongs to a model, as 'head'. Make another one: LMHeadMixin",
        lambda: model.add_mixin("mine", other.get_mixin("head")),
    )
    assert other.get_mixin("head").name == "head"


@pytest.mark.parametrize("layers", [[2], [-1, 0], []])
def test_layers_out_of_range_are_refused(make: Make, layers: list[int]) -> None:
    model = make()
    refused(
        model,
        r"of mixin 'times': the layers of LLaMA are 0 to 1",
        lambda: model.add_mixin("times", Times(), layers=layers),
    )


def test_layers_are_refused_where_they_mean_nothing(make: Make) -> None:
    model = make()
    model.del_mixin("head")
    refused(
        model,
        "mean nothing to 'head': LMHeadMixin has no layer hooks",
        lambda: model.add_mixin("head", LMHeadMixin(), layers=[0]),
    )


def test_a_class_instead_of_an_instance_is_refused(make: Make) -> None:
    model = make()
    refused(
        model,
        "'times' must be a BaseMixin instance, not type",
        lambda: model.add_mixin("times", Times),
        TypeError,
    )  # type: ignore[arg-type]


def test_a_mixin_that_others_build_on_cannot_be_removed(make: Make) -> None:
    model = make("cogvlm")
    model.add_mixin("lora", LoRAMixin(["vision_expert.qkv"], rank=1))
    refused(
        model,
        r"Mixin 'lora' builds on 'vision_expert'. Remove it first",
        lambda: model.del_mixin("vision_expert"),
    )
    model.del_mixin("lora")
    model.del_mixin("vision_expert")


@pytest.mark.parametrize("method", ["build", "build_layer", "on_attach"])
def test_a_failing_replacement_puts_the_old_mixin_back(make: Make, method: str) -> None:
    def fail(self: Any, where: Any) -> None:
        raise RuntimeError("no luck")

    model = make()
    bad = type("Bad", (VisionExpertFCMixin,), {method: fail})
    model.add_mixin("expert", VisionExpertFCMixin())
    model.add_mixin("plus", Plus())
    refused(model, "no luck", lambda: model.replace_mixin("expert", bad()), RuntimeError)
    assert model.get_mixin("expert").name == "expert"


def test_inputs_that_nobody_declares_are_refused(make: Make) -> None:
    model = make("cogvlm")
    refused(
        model,
        r"CogVLM has no input 'image'. Did you mean 'images'. Its mixins declare: token_type_ids, images",
        lambda: model(IDS, image=torch.zeros(1, 3, 28, 28)),
        TypeError,
    )
    llama = make()
    refused(
        llama,
        "LLaMA has no input 'images'. Its mixins declare: none",
        lambda: llama(IDS, images=IDS),
        TypeError,
    )


def test_a_missing_input_is_named_with_the_mixin_that_needs_it(make: Make) -> None:
    model = make("cogvlm")
    types = torch.zeros(1, 8, dtype=torch.long)
    types[:, 1:7] = 1
    refused(
        model,
        r"The forward input 'images' is missing; mixin 'image' needs it here. Pass it: model\(..., images=...\)",
        lambda: model(torch.zeros(1, 8, dtype=torch.long), token_type_ids=types),
    )


def test_removed_and_kept_mixins_can_go_to_a_model_of_the_same_sizes_only(make: Make) -> None:
    model, larger = make(), make(num_layers=3)
    prefix = model.add_mixin("prefix", PrefixTuningMixin(2))
    model.del_mixin("prefix")
    refused(
        larger,
        "was built for other layers or another configuration. Make a new one",
        lambda: larger.add_mixin("prefix", prefix),
    )
    model.add_mixin("prefix", prefix)


def test_copies_do_not_share_hooks_with_the_original(make: Make) -> None:
    model = make()
    expected = model(IDS)
    twin = copy.deepcopy(model)
    twin.add_mixin("constant", Constant())
    assert torch.equal(model(IDS), expected) and not torch.equal(twin(IDS), expected)


def test_options_passed_on_by_name_are_enough_to_make_a_mixin_again() -> None:
    class Passing(RotaryMixin):
        def __init__(self, factor: float = 1.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.factor = factor

    mixin = Passing(2.0, base=500.0)
    assert mixin.options == {"factor": 2.0, "base": 500.0}
    assert Passing(**mixin.options).base == 500.0


def test_options_are_enough_to_make_a_mixin_again() -> None:
    mixin = RotaryMixin(500.0, tables="released")
    assert mixin.options == {"base": 500.0, "tables": "released"}
    assert RotaryMixin(**mixin.options).options == mixin.options


def test_a_plain_backbone_has_only_defaults() -> None:
    model = BaseModel(TransformerConfig(vocab_size=9, hidden_size=8, num_heads=2))
    assert {line.split()[-1] for line in str(model.hooks).splitlines()} == {"default"}
