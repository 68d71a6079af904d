"""KOSMOS-1, Qwen-VL and Idefics2 beyond parity: positions, padding of pictures, initial weights, folders, stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixformer import BaseMixin, BaseModel, KVCache, from_pretrained, generate, save_pretrained
from mixformer.composition import make_config
from mixformer.config import TransformerConfig
from mixformer.connectors import PerceiverResamplerConfig, ProjectorConfig
from mixformer.mixins import LoRAMixin, NativePatchesMixin, ResizedPositionsMixin, SubNormMixin, XPosMixin
from mixformer.testing import check_mixin, jitter, tiny_model
from models.idefics2 import Idefics2, Idefics2Config, Idefics2VisionConfig
from models.kosmos import Kosmos, KosmosConfig
from models.qwen_vl import QwenVisionConfig, QwenVL, QwenVLConfig
from models.weights.idefics2 import HF
from tests.zoo import idefics2, kosmos, qwen_vl

TOWER: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "patch_size": 4}
NATIVE = Idefics2VisionConfig(**TOWER, image_size=24)
RESIZED = QwenVisionConfig(**TOWER, image_size=24, position_grid=4)


def fresh(config: TransformerConfig, seed: int = 0) -> Any:
    """A jittered model in evaluation mode."""
    model = config.build(generator=torch.Generator().manual_seed(seed))
    jitter(model, seed)
    return model.eval()


def tiny_idefics2() -> Idefics2:
    """A fresh small one of ours."""
    projector = ProjectorConfig(depth=2, gated=True, activation="silu", bias=False)
    resampler = PerceiverResamplerConfig(
        num_latents=3, depth=2, num_heads=4, head_size=6, num_kv_heads=2, norm="rmsnorm", activation="silu", gated=True,
        input_projector=projector,
    )
    model: Idefics2 = fresh(Idefics2Config(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, inner_hidden_size=48,
        max_positions=128, vision=NATIVE, adapter=resampler, image_token_id=96,
    ))  # fmt: skip
    return model


# ------------------------------------------------------------------- every property


@pytest.mark.parametrize(("make_mixin", "model", "replacing"), [
    pytest.param(lambda: XPosMixin(centre=4), lambda: tiny_model("llama"), "rotary", id="xpos"),
    pytest.param(lambda: XPosMixin(scale_base=8.0), lambda: tiny_model("cogagent"), "rotary", id="xpos-cogagent"),
    pytest.param(lambda: NativePatchesMixin(24, 4), lambda: fresh(NATIVE), "patches", id="native"),
    pytest.param(lambda: ResizedPositionsMixin(4), lambda: fresh(RESIZED), "positions", id="resized"),
    pytest.param(SubNormMixin, kosmos.tiny, "sub_norm", id="kosmos"),
    pytest.param(lambda: LoRAMixin(["*"], rank=2), qwen_vl.tiny, None, id="qwen_vl"),
    pytest.param(lambda: LoRAMixin(["*"], rank=2), tiny_idefics2, None, id="idefics2"),
])  # fmt: skip
def test_every_property_holds(
    make_mixin: Callable[[], BaseMixin], model: Callable[[], BaseModel], replacing: str | None
) -> None:
    report = check_mixin(make_mixin, model, replacing=replacing)
    assert sum(not isinstance(value, str) for value in report.values()) >= 7, str(report)


# ------------------------------------------------------------------- xPos


@torch.no_grad()
@pytest.mark.parametrize("centre", [0, 1024])
def test_xpos_depends_on_distances_alone_however_far_the_positions_are(centre: int) -> None:
    model = kosmos.tiny(max_positions=2 * centre)
    ids = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids)
    for start in (1, 1900, 4000):
        found = model(ids, position_ids=torch.arange(start, start + 40)[None])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    stretched = model(ids, position_ids=torch.arange(40)[None] * 2)
    assert (stretched - expected).abs().max() > 0.1


@torch.no_grad()
def test_xpos_makes_far_tokens_count_less() -> None:
    model = kosmos.tiny()
    mixin: Any = model.get_mixin("xpos")
    ctx = model.plan(torch.zeros(1, 1500, dtype=torch.int64))
    mixin.before_forward(ctx)
    ones = torch.ones(1, 1, 1500, 8)
    q, k = mixin.position_fn(ones, ones, None, ctx)
    norms = q[0, 0, -1].unflatten(0, (4, 2)).norm(dim=-1) * k[0, 0, 0].unflatten(0, (4, 2)).norm(dim=-1)
    expected = [2 * ((2 * i + 0.4 * 8) / (1.4 * 8)) ** (1499 / 512) for i in range(4)]
    torch.testing.assert_close(norms, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cached_steps_equal_one_forward_at_far_positions() -> None:
    model = kosmos.tiny()
    ids = torch.randint(60, (2, 1700), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :300] = 0
    expected = model(ids, mask)[:, -8:]
    cache = KVCache(model, 2, 1700)
    model(ids[:, :1692], mask[:, :1692], cache=cache)
    found = [model(ids[:, [slot]], cache=cache) for slot in range(1692, 1700)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-5)


def test_xpos_refuses_a_scale_base_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="scale_base is 0; it must be above 0"):
        XPosMixin(scale_base=0)


# ------------------------------------------------------------------- initial weights


def test_the_initial_weights_are_those_of_magneto() -> None:
    config = KosmosConfig(
        vocab_size=32, hidden_size=96, num_layers=12, num_heads=4, inner_hidden_size=256, max_positions=64,
        vision=kosmos.tiny().config.vision, adapter=kosmos.tiny().config.adapter,
    )
    model = Kosmos(config, generator=torch.Generator().manual_seed(0))
    gain = math.sqrt(math.log(24))
    square, oblong = math.sqrt(2 / (96 + 96)), math.sqrt(2 / (96 + 256))
    for layer in (model.transformer.layers[0], model.transformer.layers[11]):
        q, k, v = layer.attention.qkv.weight.chunk(3)
        expected = {
            q: square, k: square, v: gain * square, layer.attention.dense.weight: gain * square,
            layer.mlp.up.weight: gain * oblong, layer.mlp.down.weight: gain * oblong,
        }
        for weight, std in expected.items():
            assert weight.std().item() == pytest.approx(std, rel=0.04)
    assert model.transformer.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_initial_weights_are_no_change_to_loaded_ones(tmp_path: Path) -> None:
    model = kosmos.tiny()
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------- pictures of any size


@torch.no_grad()
def test_a_padded_picture_gives_what_it_gives_alone_whatever_the_padding_holds() -> None:
    tower = fresh(NATIVE)
    images, mask = idefics2.padded()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    filled = torch.where(mask[:, None].bool(), images, noise)
    plan = tower.plan(images=filled, pixel_attention_mask=mask)
    found = tower(plan=plan, images=filled, pixel_attention_mask=mask)
    assert plan.valid is not None
    for i, (height, width) in enumerate(idefics2.PICTURES):
        alone = tower(images=images[i : i + 1, :, :height, :width])[0]
        valid = plan.valid[i]
        assert int(valid.sum()) == (height // 4) * (width // 4) == len(alone)
        torch.testing.assert_close(found[i][valid], alone, atol=2e-6, rtol=1e-5)


def test_positions_are_the_places_of_patches_as_fractions_of_the_sides() -> None:
    tower = fresh(NATIVE)
    mask = torch.zeros(1, 20, 16)
    mask[:, :8, :13] = 1  # 2 x 3 whole patches of a table of 6 x 6
    ctx = tower.plan(images=torch.zeros(1, 3, 20, 16), pixel_attention_mask=mask)
    rows, columns = [0, 3], [0, 2, 4]
    grid = torch.zeros(5, 4, dtype=torch.int64)
    grid[:2, :3] = torch.tensor([[6 * row + column for column in columns] for row in rows])
    assert torch.equal(ctx.position_ids, grid.flatten()[None])
    assert torch.equal(ctx.valid, (torch.arange(20).view(5, 4) % 4 < 3).flatten()[None] & (torch.arange(20) < 8))


@pytest.mark.parametrize(("rows", "columns"), [(70, 70), (25, 49), (50, 55), (1, 3)])
def test_positions_of_the_full_table_are_hfs_where_rounding_decides(rows: int, columns: int) -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig as HFConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    reference = Idefics2VisionEmbeddings(HFConfig(hidden_size=1, image_size=140, patch_size=2, num_attention_heads=1))
    for parameter in reference.parameters():
        torch.nn.init.zeros_(parameter)
    reference.position_embedding.weight.data = torch.arange(4900.0)[:, None]
    images = torch.zeros(1, 3, 2 * rows, 2 * columns)
    expected = reference(images, torch.ones(1, rows, columns, dtype=torch.bool))[..., 0].long()
    tower = Idefics2VisionConfig(**{**TOWER, "patch_size": 2}, image_size=140).build(device="meta")
    assert torch.equal(tower.plan(images=images).position_ids, expected)


@pytest.mark.parametrize(("images", "mask", "message"), [
    ((1, 3, 3, 24), None, "at least 4 x 4 pixels"),
    ((1, 1, 24, 24), None, r"must be \[m, 3, y, x\]"),
    ((1, 3, 24, 24), torch.ones(1, 24), r"shape of images without their channels, \(1, 24, 24\); got \(1, 24\)"),
    ((1, 3, 8, 8), torch.eye(8)[None].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :8, :8], "one rectangle from"),
])  # fmt: skip
def test_pictures_that_a_native_tower_cannot_read_are_refused(
    images: tuple[int, ...], mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(NATIVE)(images=torch.zeros(images), pixel_attention_mask=mask)


def test_the_pixel_mask_is_an_input_of_the_whole_model_and_of_no_other() -> None:
    assert tiny_idefics2().declared["pixel_attention_mask"] == "image"
    with pytest.raises(TypeError, match="QwenVL has no input 'pixel_attention_mask'"):
        qwen_vl.tiny()(torch.zeros(1, 4, dtype=torch.int64), pixel_attention_mask=torch.ones(1, 24, 24))


@torch.no_grad()
def test_answers_with_a_cache_are_those_without() -> None:
    model = tiny_idefics2()
    images, own = idefics2.padded()
    ids, mask = idefics2.batch()
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == 96).long()}
    batch |= {"images": images, "pixel_attention_mask": own}
    with_cache, without = (generate(model, batch, max_new_tokens=6, cache=cache) for cache in (True, False))
    assert torch.equal(with_cache, without)


# ------------------------------------------------------------------- resized positions


def test_weights_of_one_image_size_fit_another() -> None:
    small, large = (
        QwenVLConfig(vision=QwenVisionConfig(image_size=size)).build(device="meta").state_dict() for size in (224, 448)
    )
    assert {name: t.shape for name, t in small.items()} == {name: t.shape for name, t in large.items()}


@torch.no_grad()
def test_positions_of_the_stored_grid_are_not_changed() -> None:
    tower = QwenVisionConfig(**TOWER, image_size=16, position_grid=4).build()
    table = tower.get_mixin("positions").table
    empty = tower.get_mixin("patches").conv.weight
    empty.zero_()
    embeddings = tower.run(images=torch.zeros(1, 3, 16, 16), hidden_layers=("embeddings",)).hidden["embeddings"]
    torch.testing.assert_close(embeddings[0], torch.nn.functional.layer_norm(table, (16,), eps=1e-6), atol=1e-6, rtol=0)


def test_a_table_is_refused_beside_the_models_own() -> None:
    config = QwenVisionConfig(**TOWER, image_size=24, positions="learned")
    with pytest.raises(ValueError, match="set positions to 'none', not 'learned'"):
        config.build()


# ------------------------------------------------------------------- folders


@torch.no_grad()
def test_an_hf_folder_is_written_back_as_it_was(tmp_path: Path) -> None:
    reference = idefics2.tiny_hf()
    reference.save_pretrained(tmp_path / "hf")
    model = from_pretrained(tmp_path / "hf")
    assert isinstance(model, Idefics2)
    save_pretrained(model, tmp_path / "again", format="hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert configs[0] == configs[1]


@torch.no_grad()
def test_hf_reads_what_we_write(tmp_path: Path) -> None:
    from transformers import Idefics2ForConditionalGeneration

    model = tiny_idefics2()
    save_pretrained(model, tmp_path / "hf", format="hf")
    reference = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    images, own = idefics2.padded()
    ids, mask = idefics2.batch()
    theirs = reference(
        ids, mask, pixel_values=idefics2.by_row(images), pixel_attention_mask=idefics2.by_row(own)
    ).logits
    ours = model(ids, mask, images=images, pixel_attention_mask=own)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=2e-5, rtol=0)
    again = from_pretrained(tmp_path / "hf")
    assert again.config == model.config


@torch.no_grad()
def test_resamplers_of_first_files_have_the_texts_epsilon(tmp_path: Path) -> None:
    reference = idefics2.tiny_hf()
    reference.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    assert from_pretrained(tmp_path / "hf").config.adapter.norm_eps == 1e-2
    del config["perceiver_config"]["rms_norm_eps"]
    file.write_text(json.dumps(config))
    assert from_pretrained(tmp_path / "hf").config.adapter.norm_eps == 2e-3


def test_a_configuration_as_short_as_the_published_one_is_the_default() -> None:
    content = {
        "model_type": "idefics2", "image_token_id": 32001, "perceiver_config": {"model_type": "idefics2"},
        "text_config": {
            "max_position_embeddings": 32768, "model_type": "mistral", "pad_token_id": 0, "rms_norm_eps": 1e-5,
            "vocab_size": 32003,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "idefics2",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
        },
    }  # fmt: skip
    assert make_config(Idefics2Config, HF.read_config(content, {})) == Idefics2Config()


def test_what_hf_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_idefics2()
    model.config.adapter.num_frames = 2
    with pytest.raises(ValueError, match=r"cannot hold the value of adapter\.num_frames"):
        save_pretrained(model, tmp_path / "hf", format="hf")


def test_a_folder_with_another_language_model_is_refused(tmp_path: Path) -> None:
    idefics2.tiny_hf().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["model_type"] = "gemma"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="language model is of type 'gemma'"):
        from_pretrained(tmp_path / "hf")


# ------------------------------------------------------------------- stages


def trained(model_class: Any, stage: str, config: TransformerConfig) -> set[str]:
    """Names of the parameters that a stage trains."""
    part = model_class.stages[stage]
    names = [name for name, _ in config.build(device="meta").named_parameters()]
    return {
        name for name in names
        if any(fnmatchcase(name, p) for p in part.trainable) and not any(fnmatchcase(name, p) for p in part.frozen)
    }


def test_kosmos_trains_everything_but_the_tower_and_of_it_the_last_layer() -> None:
    config = KosmosConfig()
    tower = "mixins.image.tower."
    names = trained(Kosmos, "train", config)
    rest = {name for name, _ in config.build(device="meta").named_parameters() if not name.startswith(tower)}
    assert {name for name in names if not name.startswith(tower)} == rest
    of_tower = {name for name in names if name.startswith(tower)}
    last = config.vision.num_layers - 1
    assert len(of_tower) == 12 and all(f".layers.{last}." in name for name in of_tower)


def test_qwen_vl_trains_the_language_model_last_and_then_without_the_tower() -> None:
    config = qwen_vl.tiny().config
    everything = {name for name, _ in config.build(device="meta").named_parameters()}
    pictures = {name for name in everything if name.startswith("mixins.image.")}
    tower = {name for name in everything if name.startswith("mixins.image.tower.")}
    assert pictures and tower and trained(QwenVL, "pretrain", config) == pictures
    assert trained(QwenVL, "multitask", config) == everything
    assert trained(QwenVL, "tune", config) == everything - tower


def test_idefics2_trains_the_new_modules_then_loras_as_well() -> None:
    model = tiny_idefics2()
    for place in ("lora", "image.tower/lora"):
        model.add_mixin(place, LoRAMixin(["qkv", "dense"], rank=2))
    names = {name for name, _ in model.named_parameters()}
    part = Idefics2.stages["adapt"]
    found = {name for name in names if any(fnmatchcase(name, pattern) for pattern in part.trainable)}
    projector = {name for name in names if name.startswith("mixins.image.projector.")}
    loras = {name for name in names if ".mixins.lora." in name}
    assert any("tower" in name for name in loras) and any("tower" not in name for name in loras)
    assert found == projector | loras and Idefics2.stages["align"].trainable == ["mixins.image.projector.*"]
