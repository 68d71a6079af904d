"""Recipes: what they train at full size, and that each of them runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mixformer.config import Settings, read_settings
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.mixins import LoRAMixin
from mixformer.tokenizer import load_tokenizer
from mixformer.train import run, select_parameters
from mixformer.train.loop import learning_rate_factor
from models.cogagent import CogAgent, CogAgentConfig
from models.cogvlm import CogVLM, CogVLMConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SHAPES = EXAMPLES / "zoo" / "shapes"
IDS = [recipe.stem for recipe in RECIPES]

EXPERTS, ADAPTER, MARKS = 6_476_005_376, 142_614_528, 2 * 4096
TOWER = 63 * (4 * 1792**2 + 4 * 1792 + 2 * 1792 * 15360 + 15360 + 1792 + 4 * 1792)
TOWER += 1792 + 3 * 14 * 14 * 1792 + 1792 + 257 * 1792  # cls, patches, positions


def recipe_settings(name: str, *overrides: str) -> Settings:
    settings = read_settings(None, EXAMPLES / "recipes" / f"{name}.yaml", overrides)
    settings.weights = None
    return settings


def trained(model: Any, settings: Settings) -> dict[str, torch.nn.Parameter]:
    """The parameters that the one stage of a recipe trains."""
    (stage,) = settings.train.stages
    loop = stage.options(model)
    chosen = select_parameters(model, loop.trainable) - select_parameters(model, loop.frozen)
    return {name: parameter for name, parameter in model.named_parameters() if name in chosen}


def full_size(name: str, *overrides: str) -> int:
    """How many parameters a recipe trains in the published model."""
    settings = recipe_settings(name, *overrides)
    return sum(parameter.numel() for parameter in trained(settings.build_model("meta"), settings).values())


# ---------------------------------------------------------------- full size, on the meta device


def test_the_visual_expert_has_6_476_005_376_parameters() -> None:
    model = CogVLM(CogVLMConfig(), device="meta")
    chosen = select_parameters(model, ["*.mixins.vision_expert*"])
    assert sum(p.numel() for name, p in model.named_parameters() if name in chosen) == EXPERTS


@pytest.mark.parametrize("name", ["cogvlm-stage1", "cogvlm-stage2", "cogvlm-stage2-490"])
def test_both_stages_of_cogvlm_train_the_expert_the_adapter_and_boi_and_eoi(name: str) -> None:
    assert full_size(name) == EXPERTS + ADAPTER + MARKS == 6_618_628_096


def test_experts_in_every_fourth_layer_and_the_adapter_have_1_76_billion() -> None:
    layers = str(list(range(0, 32, 4)))
    number = full_size("cogvlm-stage1", "--model.expert_layers", layers)
    assert number == EXPERTS // 4 + ADAPTER + MARKS and round(number / 1e9, 2) == 1.76


def test_an_expert_in_the_mlp_alone_and_the_adapter_have_4_47_billion() -> None:
    number = full_size("cogvlm-stage1", "--mixins.vision_expert", "null")
    assert number == 32 * 3 * 4096 * 11008 + ADAPTER + MARKS and round(number / 1e9, 2) == 4.47


def test_the_adapter_alone_has_142_6_million_with_and_without_boi_and_eoi() -> None:
    model = CogVLM(CogVLMConfig(), device="meta")
    assert sum(p.numel() for p in model.get_mixin("image").projector.parameters()) == ADAPTER
    assert full_size("cogvlm-align") == ADAPTER + MARKS and round(ADAPTER / 1e6, 1) == 142.6


def test_fine_tuning_cogvlm_trains_the_tower_as_well_and_no_language_model() -> None:
    assert full_size("cogvlm-sft") == EXPERTS + ADAPTER + MARKS + TOWER


def test_what_cogagent_adds_has_652_625_600_parameters_and_comes_first() -> None:
    assert full_size("cogagent-cross") == 652_625_600
    assert full_size("cogagent-joint") == 652_625_600 + EXPERTS
    model = CogAgent(CogAgentConfig(), device="meta")
    assert full_size("cogagent-tune") == sum(p.numel() for p in model.parameters()) == 18_291_033_280


def test_lora_trains_its_updates_of_both_attentions_and_nine_mlps_of_the_tower() -> None:
    language = 32 * 10 * 4 * (4096 + 4096)
    tower = 63 * 10 * 4 * (1792 + 1792)
    assert full_size("cogvlm-lora") == language + tower + 9 * (2 * 1792 * 15360 + 15360 + 1792)


# ---------------------------------------------------------------- published numbers

PUBLISHED = {  # steps, samples a step, rate, weight decay (arXiv:2311.03079, arXiv:2312.08914; the released script)
    "cogvlm-align": (6_000, 8_192, 1e-4, 0.05),
    "cogvlm-stage1": (120_000, 8_192, 1e-4, 0.05),
    "cogvlm-stage2": (30_000, 1_024, 1e-5, 0.05),
    "cogvlm-stage2-490": (30_000, 1_024, 1e-5, 0.05),
    "cogvlm-sft": (6_000, 1_024, 1e-5, 0.1),
    "cogvlm-lora": (800, 16, 1e-5, 0.05),
    "cogagent-cross": (20_000, 4_608, 2e-5, 0.05),
    "cogagent-joint": (40_000, 4_608, 2e-5, 0.05),
    "cogagent-tune": (10_000, 1_024, 2e-5, 0.05),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipes_have_the_published_steps_batch_rate_and_decay(recipe: Path) -> None:
    (stage,) = yaml.safe_load(recipe.read_text(encoding="utf-8"))["train"]["stages"]
    loop, batch = stage["loop"], stage["task"]["init_args"]["batch_size"]
    found = loop["steps"], batch * loop.get("accumulate", 1), loop["learning_rate"], loop["weight_decay"]
    assert found == PUBLISHED[recipe.stem]
    assert loop["betas"] == [0.9, 0.95]


def test_warm_up_and_the_rate_of_the_tower_are_the_published_ones() -> None:
    loops = {recipe.stem: recipe_settings(recipe.stem).train.stages[0].loop for recipe in RECIPES}
    assert loops["cogvlm-stage1"].warmup_steps == 12_000 and loops["cogvlm-stage2"].warmup_steps == 1_200
    (factor,) = [role.rate_factor for role in loops["cogvlm-sft"].roles if role.select == "image.tower"]
    assert factor == 0.1
    assert loops["cogvlm-lora"].warmup_steps == 0.02 * 800 and loops["cogvlm-lora"].clip == 0.1


def test_the_two_halves_of_stage_2_share_one_schedule_of_60_000_steps() -> None:
    first, second = (recipe_settings(name).train.stages[0].loop for name in ("cogvlm-stage2", "cogvlm-stage2-490"))
    assert first.steps == second.schedule_start == 30_000
    assert first.schedule_steps == second.schedule_start + second.steps == 60_000
    last, then = learning_rate_factor(first.steps - 1, first), learning_rate_factor(0, second)
    assert then == pytest.approx(0.5 * (1 + math.cos(math.pi * 28_800 / 58_800))) and 0 < last - then < 1e-4


def test_pretraining_drops_a_tenth_as_published() -> None:
    rates = {recipe.stem: recipe_settings(recipe.stem).train.stages[0].loop.dropout for recipe in RECIPES}
    assert {name for name, rate in rates.items() if rate == 0.1} == set(PUBLISHED) - {"cogvlm-sft", "cogvlm-lora"}
    assert rates["cogvlm-sft"] == rates["cogvlm-lora"] == 0


# ---------------------------------------------------------------- mini size

TOWER_SIZES = {"hidden_size": 16, "num_heads": 2, "inner_hidden_size": 24, "num_layers": 55, "image_size": 28}
SIZES = {"vocab_size": 119, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40}
CROSS_SIZES = {**TOWER_SIZES, "num_layers": 2, "num_layers_run": 1, "image_size": 42, "stored_head_size": 8}


def overrides(settings: Settings) -> list[str]:
    sizes = {**SIZES, **{f"vision.{name}": value for name, value in TOWER_SIZES.items()}}
    if settings.model_class is CogAgent:
        sizes.update({f"cross_vision.{name}": value for name, value in CROSS_SIZES.items()})
        sizes["vision.num_layers"] = 2
    return [f"--model.{name}={value}" for name, value in sizes.items()]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipes_run_two_steps_and_change_what_they_train_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    settings = recipe_settings(recipe.stem, *overrides(recipe_settings(recipe.stem)))
    (stage,) = settings.train.stages
    mini: dict[str, Any] = {"steps": 2, "schedule_start": 0, "schedule_steps": None, "accumulate": 2, "warmup_steps": 0}
    stage.loop = dataclasses.replace(stage.loop, **mini, learning_rate=1e-2, progress=False)
    stage.task = type(stage.task)(str(SHAPES / "train.jsonl"), batch_size=2, max_length=128)
    cross = 42 if settings.model_class is CogAgent else None
    config = ProcessorConfig("hf-cogvlm", image_size=28, cross_image_size=cross, pad_id=3, placeholder_id=5)
    Processor(config, load_tokenizer(SHAPES)).save(tmp_path / "processor")
    settings.processor = tmp_path / "processor"
    settings.train.output, settings.train.dtype = str(tmp_path / "trained"), None
    model = settings.build_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen = trained(model, settings)
    result = run(model, settings.load_processor(), settings)
    assert 0 < result[stage.name]["language"] < 10
    after = dict(model.named_parameters())
    assert {after[name].dtype for name in chosen} == {torch.float32}  # bf16 would round small steps away
    changed = {name for name, parameter in after.items() if not torch.equal(parameter.float(), before[name].float())}
    assert changed <= set(chosen)
    unused = ("mixins.stored.", "mixins.cross.tower.transformer.layers.1.")  # kept as released, and not run
    still = {name for name in set(chosen) - changed if not any(part in name for part in unused)}
    assert not still, f"trained but not changed: {sorted(still)[:5]}"
    if recipe.stem == "cogvlm-lora":
        assert isinstance(model.get_mixin("image.tower/lora"), LoRAMixin)
        assert any(name.startswith("mixins.image.tower") and "mixins.lora" in name for name in changed)


def test_pretraining_averages_the_weights_as_published() -> None:
    averaged = {recipe.stem for recipe in RECIPES if recipe_settings(recipe.stem).train.stages[0].loop.ema is not None}
    assert averaged == {"cogvlm-align", "cogvlm-stage1", "cogvlm-stage2", "cogvlm-stage2-490"}


def test_every_recipe_names_the_command_that_runs_it() -> None:
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        module = yaml.safe_load(text)["model_class"].partition(":")[0]
        assert f"-m {module} --config examples/recipes/{recipe.name} --job train" in text
