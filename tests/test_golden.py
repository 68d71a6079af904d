"""Models read from released formats give the numbers that the released implementations gave."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from golden_cases import (
    GOLDEN,
    HF_CASES,
    SAT_CASES,
    batch_of,
    case,
    check,
    constants,
    greedy,
    letters,
    model_of,
    tensors,
)

from mixformer import generate
from mixformer.checkpoint import from_pretrained, source_of
from models.weights import SATFolder, resize_positions

CASES = HF_CASES + SAT_CASES
WITH_IMAGES = [name for name in CASES if name != "llama-hf"]
INPUTS = [(name, letter) for name in CASES for letter in letters(name)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_recorded_activation_is_reproduced(name: str) -> None:
    model, expected = model_of(name), tensors(name, "expected")
    layers = range(model.config.num_layers)
    out = model.run(**batch_of(name, "a"), hidden_layers=("embeddings", "final", *layers))
    check(name, "embeds", out.hidden["embeddings"], expected["a.embeds"])
    for i in layers:
        check(name, f"hidden.{i}", out.hidden[i], expected[f"a.hidden.{i}"])
    check(name, "norm", out.hidden["final"], expected["a.norm"])
    check(name, "logits", out.logits, expected["a.logits"])


@pytest.mark.parametrize("name", WITH_IMAGES)
@torch.no_grad()
def test_towers_and_connectors_are_reproduced(name: str) -> None:
    model, expected, batch = model_of(name), tensors(name, "expected"), batch_of(name, "a")
    image = model.get_mixin("image")
    features = image.tower(images=batch["images"])
    check(name, "vision.tower", features, expected["a.vision.tower"])
    if "a.vision.conv" in expected:
        grid = round(features.shape[1] ** 0.5)
        square = features.transpose(1, 2).unflatten(2, (grid, grid))
        conv = image.projector.conv(square).flatten(2).transpose(1, 2)
        check(name, "vision.conv", conv, expected["a.vision.conv"])
    encoded = image.encode(batch["images"])
    check(name, "vision.adapter", encoded[:, 1:-1], expected["a.vision.adapter"])
    assert torch.equal(encoded[0, 0], image.boi) and torch.equal(encoded[0, -1], image.eoi)
    if "a.cross.tower" in expected:
        cross = model.get_mixin("cross")
        check(name, "cross.tower", cross.tower(images=batch["cross_images"]), expected["a.cross.tower"])
        check(name, "cross.features", cross.encode(batch["cross_images"]), expected["a.cross.features"])


@pytest.mark.parametrize("given", [False, True], ids=["own positions", "recorded positions"])
@pytest.mark.parametrize(("name", "letter"), INPUTS)
@torch.no_grad()
def test_logits_of_every_input_are_reproduced(name: str, letter: str, given: bool) -> None:
    expected, inputs, batch = tensors(name, "expected"), tensors(name, "inputs"), batch_of(name, letter)
    if given:
        batch["position_ids"] = inputs[f"{letter}.position_ids"]
    logits = model_of(name)(**batch)
    if f"{letter}.logits" in expected:
        real = batch["attention_mask"][..., None] if "attention_mask" in batch else 1
        check(name, f"{letter}.logits", logits * real, expected[f"{letter}.logits"])
    if f"{letter}.logits_tail" in expected:
        tail = expected[f"{letter}.logits_tail"]
        lengths = inputs.get(f"{letter}.length", torch.tensor([logits.shape[1]] * len(logits)))
        rows = [row[end - tail.shape[1] : end] for row, end in zip(logits, lengths.tolist(), strict=True)]
        check(name, f"{letter}.logits_tail", torch.stack(rows), tail)
    if f"{letter}.loss" in expected:
        labels = inputs[f"{letter}.labels"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        expected_loss = expected[f"{letter}.loss"].squeeze()
        torch.testing.assert_close(loss, expected_loss, atol=case(name)["loss_atol"], rtol=0)


@pytest.mark.parametrize(
    ("name", "letter"), [(name, letter) for name, letter in INPUTS if f"{letter}.greedy" in tensors(name, "expected")]
)
def test_greedy_tokens_are_reproduced_with_a_cache(name: str, letter: str) -> None:
    expected = tensors(name, "expected")[f"{letter}.greedy"]
    model, batch, steps = model_of(name), batch_of(name, letter), expected.shape[1]
    assert torch.equal(greedy(model, batch, steps), expected)
    assert torch.equal(generate(model, batch, max_new_tokens=steps), expected)


@pytest.mark.parametrize(("name", "letter"), INPUTS)
def test_own_positions_are_the_recorded_ones_but_for_the_shift_of_left_padding(name: str, letter: str) -> None:
    inputs, batch = tensors(name, "inputs"), batch_of(name, letter)
    own = model_of(name).plan(**batch).position_ids
    recorded = inputs[f"{letter}.position_ids"]
    mask = batch.get("attention_mask", torch.ones_like(own)).bool()
    for row, other, real in zip(own, recorded, mask, strict=True):
        first = int(real.nonzero()[0])
        shift = other[first]  # the released code counts the padded prefix as one position
        assert shift == (first > 0 and name != "llama-hf")
        assert torch.equal(row[real] + shift, other[real])


@pytest.mark.parametrize(("name", "letter"), [pair for pair in INPUTS if pair[0] in WITH_IMAGES])
def test_image_tokens_are_routed_to_the_expert_as_recorded(name: str, letter: str) -> None:
    inputs, expected = tensors(name, "inputs"), tensors(name, "expected")
    recorded = expected.get(f"{letter}.expert_mask", inputs.get(f"{letter}.vision_expert_mask"))
    if recorded is None:  # boi and patches: this token and the next are both of the picture
        types = inputs[f"{letter}.token_type_ids"]
        recorded = torch.zeros_like(types)
        recorded[:, :-1] = types[:, :-1] & types[:, 1:]
    groups = model_of(name).plan(**batch_of(name, letter)).routes.groups
    mask = torch.zeros(recorded.numel(), dtype=torch.bool)
    mask[groups.get("image", torch.empty(0, dtype=torch.int64))] = True
    assert torch.equal(mask, recorded.flatten().bool())


def test_merged_model_parallel_ranks_are_the_unsplit_tensors_bit_for_bit() -> None:
    folder = GOLDEN / "cogvlm-sat-mp2"
    recorded = json.loads((folder / "merged_sha256.json").read_text())
    files = SATFolder(folder, json.loads((folder / "model_config.json").read_text()))
    assert set(files.shapes) == set(recorded)
    for name, facts in recorded.items():
        tensor = files.read(name)
        assert files.shapes[name] == tuple(tensor.shape) == tuple(facts["shape"])
        assert str(tensor.dtype) == f"torch.{facts['dtype']}"
        assert hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() == facts["sha256"], name


# ------------------------------------------------------------------------ bf16


@pytest.fixture(scope="module")
def low_precision() -> torch.nn.Module:
    model: torch.nn.Module = from_pretrained(GOLDEN / "cogvlm-hf", dtype=torch.bfloat16)
    return model


def test_rope_tables_in_bf16_are_the_released_ones_exactly(low_precision: torch.nn.Module) -> None:
    expected = tensors("cogvlm-hf-bf16", "expected")
    rotary = low_precision.get_mixin("rotary")
    angles = rotary.angles(torch.arange(len(expected["rope.cos"]))[None])[0]
    assert torch.equal(angles.cos(), expected["rope.cos"]) and torch.equal(angles.sin(), expected["rope.sin"])


@torch.no_grad()
def test_logits_in_bf16_stay_within_bf16_noise(low_precision: torch.nn.Module) -> None:
    base, name, expected = "cogvlm-hf", "cogvlm-hf-bf16", tensors("cogvlm-hf-bf16", "expected")
    a = batch_of(base, "a", torch.bfloat16)
    long = batch_of(name, "long")
    long["images"] = tensors(base, "inputs")["images"][tensors(name, "inputs")["long.image_index"]].bfloat16()
    tail = expected["long.logits_tail"]
    limits = case(name)["tolerance"]
    for batch, target in ((a, expected["a.logits"]), (long, tail)):
        difference = (low_precision(**batch)[:, -target.shape[1] :].float() - target.float()).abs()
        assert difference.mean() < limits["mean_abs"] and difference.max() < limits["max_abs"]


@torch.no_grad()
def test_bf16_weights_read_as_fp32_keep_their_rounded_frequencies(low_precision: torch.nn.Module) -> None:
    from copy import deepcopy

    base, name, expected = "cogvlm-hf", "cogvlm-hf-bf16", tensors("cogvlm-hf-bf16", "expected")
    model = deepcopy(low_precision).float()
    long = batch_of(name, "long")
    images = tensors(base, "inputs")["images"]
    long["images"] = images[tensors(name, "inputs")["long.image_index"]]
    for batch, key in ((batch_of(base, "a"), "a.logits_loaded_as_fp32"), (long, "long.logits_tail_loaded_as_fp32")):
        target = expected[key]
        logits = model(**batch)[:, -target.shape[1] :]
        torch.testing.assert_close(logits, target, atol=2e-5, rtol=1e-5)


# ------------------------------------------------------------------------ towers alone


@torch.no_grad()
def test_eva2_clip_e_alone() -> None:
    name = "eva2-clip-e"
    model, expected = model_of(name), tensors(name, "expected")
    images = tensors(name, "inputs")["images"]
    layers = range(model.config.num_layers)
    out = model.run(images=images, hidden_layers=("embeddings", *layers))
    check(name, "embeds", out.hidden["embeddings"], expected["embeds"])
    for i in layers:
        check(name, f"layer.{i}", out.hidden[i], expected[f"layer.{i}"])
    check(name, "features", out.logits, expected["features"])


@torch.no_grad()
def test_eva2_clip_l_alone() -> None:
    name = "eva2-clip-l"
    model, expected = model_of(name), tensors(name, "expected")
    images = tensors(name, "inputs")["images"]
    layers = range(model.config.layers_run)
    assert len(layers) == constants(name)["blocks_run"]
    out = model.run(images=images, hidden_layers=layers)
    for i in layers:
        check(name, f"block.{i}", out.hidden[i], expected[f"block.{i}"])
    check(name, "tower", out.logits, expected["tower"])
    check(name, "features", out.logits + source_of(model).tensors["pos_embed"], expected["features"])
    patches = model.get_mixin("patches").conv(images).flatten(2).transpose(1, 2)
    check(name, "patches", patches, expected["patches"])
    angles = model.get_mixin("rotary").angles(model.config.head_width)
    check(name, "rope.cos", angles.cos(), expected["rope.cos"])
    check(name, "rope.sin", angles.sin(), expected["rope.sin"])


def test_position_tables_are_resized_as_sat_does() -> None:
    name = "eva2-clip-e"
    resized = resize_positions(tensors(name, "inputs")["resize.in"], case(name)["resize"]["to_grid"])
    expected = tensors(name, "expected")["resize.out"]
    check(name, "resize", resized, expected)
    assert torch.equal(resized[0], expected[0])


def test_a_position_table_resized_to_its_own_grid_is_itself() -> None:
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_positions(table, 3), table)


