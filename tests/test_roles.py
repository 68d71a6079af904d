"""Roles: what selectors choose, what tables say, what is cast, frozen and without gradients; LoRA while training."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixformer import BaseModel
from mixformer.mixins import LoRAMixin
from mixformer.train import TrainConfig, train
from mixformer.train.roles import (
    Role,
    cast_parameters,
    missing_gradients,
    parameter_groups,
    role_table,
    select_parameters,
    trainable_names,
)
from models.cogagent import CogAgent
from models.llama import LLaMA, LLaMAConfig

Make = Callable[..., BaseModel]
LANGUAGE = {
    "mixins.head.linear.weight", "transformer.word_embeddings.weight", "transformer.final_norm.weight",
    *(
        f"transformer.layers.{index}.{name}.weight"
        for index in range(2)
        for name in ("attention_norm", "attention.qkv", "attention.dense", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")
    ),
}
EXPERTS = {
    f"transformer.layers.{index}.mixins.{name}.weight"
    for index in range(2)
    for name in (
        "vision_expert.qkv", "vision_expert.dense", "vision_expert_mlp.gate", "vision_expert_mlp.up",
        "vision_expert_mlp.down",
    )
}


def quiet(**options: Any) -> TrainConfig:
    return TrainConfig(**{"progress": False, "warmup_steps": 2, "learning_rate": 1e-2, **options})


def starting(model: BaseModel, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def names_of(model: BaseModel, group: dict[str, Any]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


# ------------------------------------------------------------------- selectors


def test_language_is_the_backbone_and_its_head_without_what_the_vision_mixins_own(make: Make) -> None:
    for kind in ("cogvlm", "cogagent"):
        assert select_parameters(make(kind), ["language"]) == LANGUAGE


def test_mixin_names_paths_and_globs_select_what_they_say(make: Make) -> None:
    model = make("cogagent")
    assert select_parameters(model, ["vision_expert*"]) == EXPERTS
    assert select_parameters(model, ["vision_expert"]) == {name for name in EXPERTS if "_mlp" not in name}
    for path in ("image.projector", "image.tower", "image.boi"):
        assert select_parameters(model, [path]) == starting(model, f"mixins.{path}") != set()
    image = starting(model, "mixins.image.")
    assert select_parameters(model, ["image"]) == image
    layers = [f"transformer.layers.{index}.mixins.cross." for index in range(2)]
    assert select_parameters(model, ["cross"]) == starting(model, "mixins.cross.", *layers)
    assert select_parameters(model, ["transformer.layers.0"]) == starting(model, "transformer.layers.0.")
    assert select_parameters(model, ["*.mlp.up.weight"]) == {
        name for name, _ in model.named_parameters() if name.endswith(".mlp.up.weight")
    }
    model.add_mixin("image.tower/lora", LoRAMixin(["dense"], rank=1), layers=[0])
    assert select_parameters(model, ["image.tower/lora"]) == {
        f"mixins.image.tower.transformer.layers.0.mixins.lora.dense.all.{half}" for half in "ab"
    }


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [
        ("vision_exprt", "vision_expert"), ("image.projecter", "image.projector"), ("cross.twer", "cross.tower"),
        ("languge", "language"), ("transformer.layer.1", "transformer.layers.1"),
    ],
)
def test_a_selector_that_matches_nothing_is_an_error_that_names_the_nearest(
    selector: str, nearest: str, make: Make
) -> None:
    model, said = make("cogagent"), rf"selector '{selector}' matches none .*Did you mean '{nearest}'\?"
    for config in (quiet(trainable=[selector]), quiet(roles=[Role([selector], trainable=False)])):
        with pytest.raises(ValueError, match=said):
            parameter_groups(model, config)


def test_a_tower_has_no_language(make: Make) -> None:
    tower: Any = make("cogagent").get_mixin("image").tower
    with pytest.raises(ValueError, match="'language' matches none"):
        select_parameters(tower, ["language"])


# ------------------------------------------------------------------- groups


def test_groups_are_those_of_a_list_written_by_hand(make: Make) -> None:
    model = make("cogagent")
    config = quiet(
        weight_decay=0.05, frozen=["image.tower"], rate_factors={"*.head.*": 0.5},
        roles=[
            Role("language", rate_factor=0.1), Role("transformer.word_embeddings", trainable=False),
            Role(["vision_expert*", "image.projector"], weight_decay=0.2), Role("cross", trainable=False),
            Role("cross.tower", trainable=True, rate_factor=2.0),
        ],
    )
    found: dict[tuple[float, float], set[str]] = {}
    for group in parameter_groups(model, config):
        key = group["weight_decay"], group["factor"]
        assert set(group) == {"params", "weight_decay", "factor"} and key not in found
        found[key] = names_of(model, group)
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    projector, tower = starting(model, "mixins.image.projector."), starting(model, "mixins.cross.tower.")
    language, others = LANGUAGE - {"transformer.word_embeddings.weight"}, {"mixins.image.boi", "mixins.image.eoi"}

    def of(names: set[str], matrices: bool) -> set[str]:
        return {name for name in names if (shapes[name] > 1) == matrices}

    assert found == {
        (0.05, 0.1): of(language, True),
        (0.0, 0.1): of(language, False),
        (0.2, 1.0): of(EXPERTS | projector, True),
        (0.0, 1.0): of(EXPERTS | projector | others, False),
        (0.05, 2.0): of(tower, True),
        (0.0, 2.0): of(tower, False),
    }
    assert trainable_names(model, config) == set().union(*found.values())


def test_later_roles_win_and_leave_what_they_do_not_say(make: Make) -> None:
    model = make("cogvlm")
    roles = [Role("*", False, 0.5, 0.3), Role("vision_expert", trainable=True), Role("*.dense", rate_factor=0.25)]
    groups = parameter_groups(model, quiet(roles=roles))
    assert {(group["factor"], group["weight_decay"]) for group in groups} == {(0.5, 0.3), (0.25, 0.3)}
    for group in groups:
        kind = "dense" if group["factor"] == 0.25 else "qkv"
        assert names_of(model, group) == {f"transformer.layers.{i}.mixins.vision_expert.{kind}.weight" for i in (0, 1)}


def test_roles_that_freeze_all_are_an_error(make: Make) -> None:
    with pytest.raises(ValueError, match="Nothing is left to train: the roles and `frozen` cover all"):
        parameter_groups(make(), quiet(roles=[Role("*", trainable=False)]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select": []}, "selects nothing"), ({"select": "a", "rate_factor": -1.0}, r"rate_factor of 'a' is -1\.0"),
        ({"select": ["a", "b"], "weight_decay": float("nan")}, "weight_decay of 'a, b' is nan"),
        ({"select": "a", "dtype": "bfloat"}, "Did you mean 'bfloat16'"),
    ],
)
def test_roles_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Role(**options)


# ------------------------------------------------------------------- tables


def test_the_table_counts_every_parameter_once_under_its_role(make: Make) -> None:
    model = make("cogagent")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    roles = [Role("*", trainable=False), Role("vision_expert*", trainable=True, rate_factor=0.1, dtype="bfloat16")]
    rows = [line.split("  ") for line in role_table(model, quiet(weight_decay=0.05, roles=roles)).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    experts, total = sum(sizes[name] for name in EXPERTS), sum(sizes.values())
    assert cells == [
        ["role", "parameters", "trainable", "rate", "decay", "dtype"],
        ["*", f"{total - experts:,}", "no", "-", "-", "float32"],
        ["vision_expert*", f"{experts:,}", "yes", "0.001", "0.05", "bfloat16"],
        ["all", f"{total:,}", f"{experts:,}"],
    ]


def test_without_roles_the_table_has_the_parts_of_the_model_at_their_published_sizes() -> None:
    table = role_table(CogAgent(device="meta"), quiet(frozen=["language"]))
    found = {line.split()[0]: line.split()[1:3] for line in table.splitlines()[1:]}
    count = {part: int(cells[0].replace(",", "")) for part, cells in found.items()}
    assert list(found) == [
        "language", "image", "image.tower", "image.projector", "cross", "cross.tower", "vision_expert",
        "vision_expert_mlp", "all",
    ]
    assert count["language"] == 6_738_415_616 and found["language"][1] == "no"
    assert count["vision_expert"] + count["vision_expert_mlp"] == 6_476_005_376
    assert count["cross"] + count["cross.tower"] == 652_625_600


# ------------------------------------------------------------------- dtypes, freezing, gradients


def test_roles_cast_and_two_trainable_dtypes_in_one_layer_are_refused(make: Make) -> None:
    model = make("cogvlm")
    with pytest.raises(
        ValueError,
        match=r"layer 'transformer\.layers\.0' have 2 dtypes: .*float32 \(transformer\.layers\.0\.attention_norm\.wei.*"
        r"bfloat16 \(transformer\.layers\.0\.mixins\.vision_expert\.qkv",
    ):
        cast_parameters(model, quiet(roles=[Role("vision_expert*", dtype="bfloat16")]))
    with pytest.raises(ValueError, match=r"outside the layers have 2 dtypes: .*\(mixins\.image\.projector"):
        cast_parameters(model, quiet(roles=[Role("image.projector", dtype="bfloat16")]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    roles = [Role("*", trainable=False, dtype="bfloat16"), Role("vision_expert*", trainable=True, dtype="float32")]
    cast_parameters(model, quiet(roles=roles))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == EXPERTS
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def small_model() -> LLaMA:
    config = LLaMAConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
    return LLaMA(config, generator=torch.Generator().manual_seed(3))


def counting_batches(seed: int = 5) -> Iterator[torch.Tensor]:
    """Rows that count up modulo 11 from a random start."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(11, (8, 1), generator=generator)
        yield (start + torch.arange(6)) % 11


def next_token_loss(model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(batch[:, :-1])
    return {"next_token": F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())}


def test_what_a_role_freezes_stays_bit_for_bit_and_the_rest_moves() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    roles = [Role("language", trainable=False), Role(["transformer.layers.1", "head"], trainable=True)]
    train(model, counting_batches(), quiet(steps=3, roles=roles), next_token_loss)
    for name, value in model.state_dict().items():
        moved = name.startswith(("transformer.layers.1.", "mixins.head."))
        assert torch.equal(value, before[name]) != moved, name


def test_a_frozen_role_in_bfloat16_trains_the_rest_in_float32_under_autocast() -> None:
    model = small_model()
    model.add_mixin("lora", LoRAMixin(["language"], rank=2))
    roles = [Role("language", trainable=False, dtype="bfloat16")]
    with torch.no_grad():
        first = float(next_token_loss(model, next(counting_batches(9)))["next_token"])
    config = quiet(steps=40, roles=roles, autocast="bfloat16")
    train(model, counting_batches(), config, next_token_loss)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora." not in name} == {torch.bfloat16}
    with torch.no_grad():
        assert float(next_token_loss(model, next(counting_batches(9)))["next_token"]) < 0.8 * first


def test_trainable_parameters_without_a_gradient_are_listed() -> None:
    model = small_model()
    model.transformer.layers[0].requires_grad_(False)
    hidden = model.run(next(counting_batches()), hidden_layers=["final"]).hidden["final"]
    hidden.sum().backward()
    assert missing_gradients(model) == ["mixins.head.linear.weight"]


# ------------------------------------------------------------------- LoRA while training


def lora_model(dropout: float = 0.0) -> tuple[LLaMA, Any]:
    model = small_model()
    lora = model.add_mixin("lora", LoRAMixin(["qkv:q", "qkv:v", "down", "head"], rank=2, alpha=6.0, dropout=dropout))
    return model, lora


def step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    next_token_loss(model, batch)["next_token"].backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: BaseModel, trainable: list[str]) -> torch.optim.AdamW:
    config = quiet(trainable=trainable)
    names = trainable_names(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return torch.optim.AdamW(parameter_groups(model, config), lr=1e-2)


def test_merging_and_unmerging_at_every_step_changes_neither_losses_nor_optimizer_state() -> None:
    (plain, _), (merged, lora) = lora_model(), lora_model()
    optimizers, batches = [adamw(plain, ["lora"]), adamw(merged, ["lora"])], counting_batches()
    probe = next(counting_batches(8))
    for index in range(5):
        batch = next(batches)
        for model, optimizer in zip((plain, merged), optimizers, strict=True):
            step(model, optimizer, batch)
        with torch.no_grad():
            expected = merged(probe)
            assert index == 0 or not torch.allclose(expected, small_model()(probe), atol=1e-3)
            before = {name: value.clone() for name, value in merged.state_dict().items()}
            state = copy.deepcopy(optimizers[1].state_dict())
            lora.merge(merged)
            torch.testing.assert_close(merged(probe), expected, rtol=0, atol=2e-6)
            lora.unmerge()
            assert torch.equal(merged(probe), expected)
        assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())
        for key, values in optimizers[1].state_dict()["state"].items():
            assert all(torch.equal(values[name], state["state"][key][name]) for name in values)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), merged.parameters(), strict=True))


def test_what_the_weights_learn_while_merged_is_kept_when_unmerged() -> None:
    model, lora = lora_model()
    step(model, adamw(model, ["lora"]), next(counting_batches()))
    lora.merge(model)
    probe = next(counting_batches(8))
    step(model, adamw(model, ["language"]), next(counting_batches(2)))
    with torch.no_grad():
        expected = model(probe)
        lora.unmerge()
        torch.testing.assert_close(model(probe), expected, rtol=0, atol=2e-6)


def test_two_merged_loras_come_apart_in_either_order() -> None:
    for order in ((0, 1), (1, 0)):
        model, first = lora_model()
        second: Any = model.add_mixin("second", LoRAMixin(["qkv", "down"], rank=3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora." in name or ".second." in name:
                    parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        first.merge(model)
        second.merge(model)
        for index in order:
            (first, second)[index].unmerge()
        exact = order == (1, 0)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0 if exact else 1e-6)


def test_lora_takes_the_selectors_of_roles(make: Make) -> None:
    def adapted(*sites: str) -> set[str]:
        model = make("cogagent")
        model.add_mixin("lora", LoRAMixin(list(sites), rank=1))
        found = {name for name, _ in model.named_parameters() if "mixins.lora." in name}
        return {name.split("mixins.lora.")[1].rpartition(".")[0] for name in found if "layers.1" not in name}

    assert adapted("language") == {f"{site}.all" for site in ("qkv", "dense", "gate", "up", "down", "adapters.head")}
    assert adapted("language:q") == {"qkv.q"}
    assert adapted("vision_expert") == {"vision_expert-qkv.all", "vision_expert-dense.all"}
    assert adapted("vision_expert*:v") == {"vision_expert-qkv.v"}
    assert adapted("cross") == {f"cross-{site}.all" for site in ("query", "key_value", "dense")}
    assert adapted("image.projector") == {
        f"adapters.image-projector-{site}.all" for site in ("linear", "mlp-gate", "mlp-up", "mlp-down")
    }
    with pytest.raises(ValueError, match=r"add a LoRA to it as 'image\.tower/lora'"):
        adapted("image.tower")
    with pytest.raises(ValueError, match="Did you mean 'vision_expert'"):
        adapted("vision_exprt")


def test_a_rank_stabilized_lora_is_scaled_by_the_root_of_its_rank() -> None:
    model = small_model()
    lora: Any = model.add_mixin("lora", LoRAMixin(["head"], rank=4, alpha=6.0, rank_stabilized=True))
    head, adapter = model.get_mixin("head").linear, lora.adapters["head"]["all"]
    with torch.no_grad():
        adapter.b.normal_()
        x = torch.randn(3, 16)
        expected = x @ head.weight.T + (x @ adapter.a.T @ adapter.b.T) * 3.0
        torch.testing.assert_close(head(x), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        LoRAMixin(["head"], dropout=1.0)
