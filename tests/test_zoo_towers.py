"""Transformer towers: their files both ways, what comes out of them, pooling, and the contrastive head."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mixformer import BaseMixin, TransformerConfig, from_pretrained, save_pretrained, wrap
from mixformer.config import VisionTowerConfig, read_settings
from mixformer.mixins import (
    AttentionPoolHeadMixin,
    ContrastiveHeadMixin,
    PatchEmbeddingMixin,
    PoolHeadMixin,
    StoredNormMixin,
)
from mixformer.objectives import ContrastiveObjective
from mixformer.testing import check_mixin, collate, jitter
from models.clip import CLIP, CLIPConfig, CLIPVision, CLIPVisionConfig
from models.intern_vit import InternViT, InternViTConfig
from models.siglip import SigLIP, SigLIPConfig
from models.vit import ViT, ViTConfig
from models.weights import resize_positions
from tests.zoo import clip, intern_vit, siglip, vit
from tests.zoo.harness import TOLERANCE, difference, jittered, reloaded, systems

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 48, "image_size": 16, "patch_size": 4,
}
LAYER_NORMS: dict[str, Any] = {"norm": "layernorm", "qk_norm": False, "bias": "all"}
VISION = CLIPVisionConfig(**SIZES, output="projected", projection_size=20)
TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 64, "max_positions": 24,
}


def fresh(config: Any) -> Any:
    """A jittered model, weights from a seed."""
    model = config.build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def vit_model() -> Any:
    from transformers import ViTConfig as Config
    from transformers import ViTModel

    return jittered(ViTModel(Config(**vit.TINY)))


def clip_vision(kind: str) -> Any:
    import transformers

    return jittered(getattr(transformers, kind)(transformers.CLIPVisionConfig(**vit.TINY, projection_dim=20)))


# what HF saves: {what: (reference, class of ours)}
REFERENCES: dict[str, tuple[Callable[[], Any], type]] = {
    "vit": (vit.reference, ViT),
    "vit without a class head": (vit_model, ViT),
    "clip": (clip.reference, CLIP),
    "clip tower": (lambda: clip_vision("CLIPVisionModel"), CLIPVision),
    "clip tower with projection": (lambda: clip_vision("CLIPVisionModelWithProjection"), CLIPVision),
    "siglip": (siglip.reference, SigLIP),
    "intern_vit 6B": (lambda: intern_vit.reference("6B"), InternViT),
    "intern_vit 300M": (lambda: intern_vit.reference("300M"), InternViT),
}


@pytest.mark.parametrize("what", REFERENCES)
def test_a_folder_is_written_back_as_it_was(what: str, tmp_path: Path) -> None:
    reference, kind = REFERENCES[what][0](), REFERENCES[what][1]
    model = reloaded(reference, tmp_path / "theirs")
    assert type(model) is kind
    save_pretrained(model, tmp_path / "ours", format="hf")
    assert equal(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    texts = [(tmp_path / name / "config.json").read_text(encoding="utf-8") for name in ("ours", "theirs")]
    assert json.loads(texts[0]) == json.loads(texts[1])


def first_output(out: Any) -> torch.Tensor:
    """The features of an HF vision model."""
    found: torch.Tensor = out.last_hidden_state
    return found


# what we write: {what: (config, HF's class, its output for pictures)}
WRITTEN: dict[str, tuple[Any, str, Callable[[Any], torch.Tensor]]] = {
    "vit": (ViTConfig(**SIZES, num_classes=7), "ViTForImageClassification", lambda out: out.logits),
    "vit tokens": (ViTConfig(**SIZES, bias="except_qkv", output="tokens"), "ViTModel", first_output),
    "clip tower": (CLIPVisionConfig(**SIZES, output="tokens"), "CLIPVisionModel", first_output),
    "clip tower with projection": (VISION, "CLIPVisionModelWithProjection", lambda out: out.image_embeds),
    "siglip": (
        SigLIPConfig(**{**SIZES, "image_size": 18}, output="pooled"), "SiglipVisionModel",
        lambda out: out.pooler_output,
    ),
    "siglip without a head": (SigLIPConfig(**SIZES), "SiglipVisionModel", first_output),
    "intern_vit 6B": (InternViTConfig(**SIZES, output="tokens"), "InternVLVisionModel", first_output),
    "intern_vit 300M": (
        InternViTConfig(**SIZES, **LAYER_NORMS, output="tokens"), "InternVLVisionModel", first_output,
    ),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_written_runs_in_transformers_and_reads_back(what: str, tmp_path: Path) -> None:
    import transformers

    config, kind, output = WRITTEN[what]
    model, images = fresh(config), vit.picture(side=config.image_size)
    save_pretrained(model, tmp_path, format="hf")
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again = from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    assert equal(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert difference(model(images=images), output(theirs.eval()(images))) <= TOLERANCE


@pytest.mark.parametrize("eos_token_id", [None, clip.EOS])
def test_a_clip_that_is_written_runs_in_transformers_and_reads_back(eos_token_id: int | None, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model, images = fresh(CLIPConfig(**TEXT, vision=VISION, eos_token_id=eos_token_id)), vit.picture()
    save_pretrained(model, tmp_path, format="hf")
    theirs, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert from_pretrained(tmp_path).config == model.config
    batch = clip.texts()
    with torch.no_grad():
        ours, expected = model.run(**batch, images=images), theirs.eval()(**batch, pixel_values=images)
    assert difference(ours.outputs["logits_per_text"], expected.logits_per_text) <= TOLERANCE


def test_the_published_spelling_of_a_clip_tower_is_read_and_written_back(tmp_path: Path) -> None:
    reference, images = clip_vision("CLIPVisionModel"), vit.picture()
    reference.save_pretrained(tmp_path / "new")
    tensors = {f"vision_model.{name}": tensor for name, tensor in stored(tmp_path / "new").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "new" / "config.json").rename(tmp_path / "old" / "config.json")
    model = from_pretrained(tmp_path / "old", overrides={"output": "pooled"})
    with torch.no_grad():
        assert difference(model(images=images), reference(images).pooler_output) <= TOLERANCE
    save_pretrained(model, tmp_path / "written", format="hf")
    assert equal(stored(tmp_path / "written"), tensors)


@pytest.mark.parametrize("tower", ["vit", "siglip"])
def test_a_resized_position_table_equals_the_references_interpolation(tower: str, tmp_path: Path) -> None:
    theirs = vit_model() if tower == "vit" else siglip.reference(image_size=16)
    theirs.save_pretrained(tmp_path)
    model, images = from_pretrained(tmp_path, overrides={"output": "patches"}), vit.picture(side=24)
    weights = model.state_dict()
    name, num_kept = "transformer.position_embeddings.weight", int(model.config.cls_token)
    weights[name] = resize_positions(weights[name], 6, num_kept)
    larger = type(model)(replace(model.config, image_size=24)).eval()
    larger.load_state_dict(weights)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state[:, num_kept:]
        assert difference(larger(images=images), expected) <= TOLERANCE


# -------------------------------------------------------------------- what comes out

CONFIGS = [ViTConfig, CLIPVisionConfig, SigLIPConfig, InternViTConfig]


@pytest.mark.parametrize("output_norm", [True, False])
@pytest.mark.parametrize(
    ("kind", "output"),
    [pytest.param(kind, output, id=f"{kind.__name__}-{output}") for kind in CONFIGS for output in kind.outputs],
)
def test_the_config_tells_the_shape_of_the_features(kind: Any, output: str, output_norm: bool) -> None:
    config = kind(**SIZES, output=output, output_norm=output_norm)
    found = config.build()(images=vit.picture(2))
    pooled = output not in ("patches", "tokens")
    assert found.shape == ((2, config.feature_size) if pooled else (2, config.num_features, config.feature_size))
    assert not pooled or config.num_features == 1


def test_stored_layers_and_the_stored_norm_are_frozen_and_change_nothing() -> None:
    model, images = fresh(CLIPVisionConfig(**SIZES, num_layers_run=1)), vit.picture()
    unused = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert unused and all(name.startswith(("transformer.layers.1.", "transformer.final_norm.")) for name in unused)
    before = model(images=images)
    with torch.no_grad():
        for name in unused:
            model.get_parameter(name).add_(1.0)
    assert torch.equal(model(images=images), before)
    before.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name not in unused)


def test_the_stored_norm_runs_again_without_its_mixin() -> None:
    model, images = fresh(CLIPVisionConfig(**SIZES)), vit.picture()
    norm = model.transformer.final_norm
    with torch.no_grad():
        expected = F.layer_norm(model(images=images), (24,), norm.weight, norm.bias, 1e-5)
        model.del_mixin("stored_norm")
        assert difference(model(images=images), expected) <= 1e-6


# -------------------------------------------------------------------- pooling


ENCODER: dict[str, Any] = {**TEXT, "positions": "learned", "tied_head": False}


def text_model() -> Any:
    return fresh(TransformerConfig(**ENCODER))


def ragged_rows() -> list[dict[str, torch.Tensor]]:
    """Texts of three lengths; the highest id and the end-of-text id stand in their midst and come twice."""
    texts = [[5, 96, 7, clip.EOS, 3, 96], [clip.EOS, 96, 4, clip.EOS], [8, 9, 10, 11, clip.EOS, 12, 96, 2]]
    return [{"input_ids": torch.tensor([ids])} for ids in texts]


EXPECTED_PLACES = {None: [1, 1, 6], clip.EOS: [3, 0, 4]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eos_token_id", EXPECTED_PLACES)
def test_a_text_is_pooled_at_its_first_end_wherever_the_padding_is(eos_token_id: int | None, side: str) -> None:
    model, rows = text_model(), ragged_rows()
    model.add_mixin("pool", PoolHeadMixin("eot", result="pooled", eos_token_id=eos_token_id))
    batch = collate(rows, side)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, eos_token_id or 96)
    with torch.no_grad():
        found = model.run(**batch).outputs["pooled"]
        hidden = [model(**row)[0] for row in rows]
    expected = torch.stack([row[place] for row, place in zip(hidden, EXPECTED_PLACES[eos_token_id], strict=True)])
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("pool", ["cls", "mean", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_head_over_a_padded_batch_equals_the_formula_on_each_row(pool: str, side: str) -> None:
    model, rows = text_model(), ragged_rows()
    head: Any = model.add_mixin("pool", PoolHeadMixin(pool, norm=True, dense=True, size=3, result="pooled"))
    jitter(head, 5)
    reduce = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[pool]
    with torch.no_grad():
        expected = []
        for row in rows:
            x = F.layer_norm(reduce(model(**row)[0]), (32,), head.norm.weight, head.norm.bias, 1e-5)
            x = torch.tanh(head.dense.weight @ x + head.dense.bias)
            expected.append(head.linear.weight @ x + head.linear.bias)
        out = model.run(**collate(rows, side))
    assert difference(out.outputs["pooled"], torch.stack(expected)) <= TOLERANCE


def test_a_head_without_a_result_is_what_the_model_returns() -> None:
    named, returned = text_model(), text_model()
    named.add_mixin("pool", PoolHeadMixin("cls", size=3, result="pooled"))
    returned.add_mixin("pool", PoolHeadMixin("cls", size=3))
    returned.load_state_dict(named.state_dict())
    row = ragged_rows()[0]
    with torch.no_grad():
        out = named.run(**row)
        assert torch.equal(returned(**row), out.outputs["pooled"])
        named.del_mixin("pool")
        assert torch.equal(named(**row), out.logits)


def test_a_cache_leaves_named_results_out_and_is_refused_where_the_pooled_value_is_returned() -> None:
    from mixformer.cache import KVCache

    model, row = text_model(), ragged_rows()[0]
    model.add_mixin("pool", PoolHeadMixin("cls", result="pooled"))
    with torch.no_grad():
        assert "pooled" not in model.run(**row, cache=KVCache(model, 1, 8)).outputs
    model.replace_mixin("pool", PoolHeadMixin("cls"))
    with pytest.raises(ValueError, match=r"'pool' pools whole sequences.*Leave `cache` out"):
        model(**row, cache=KVCache(model, 1, 8))


def test_a_row_without_an_end_is_named() -> None:
    model = text_model()
    model.add_mixin("pool", PoolHeadMixin("eot", result="pooled", eos_token_id=77))
    ids = torch.tensor([[1, 77, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"Rows \[1\] of input_ids have no end-of-text token 77"):
        model(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "first"}, "pool is 'first'; choose one of cls, mean, max, eot"),
        ({"pool": "mean", "eos_token_id": 2}, "only looked for with pool 'eot', not 'mean'"),
    ],
)
def test_options_of_a_head_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoolHeadMixin(**options)


# -------------------------------------------------------------------- the contrastive head


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_the_contrastive_loss_equals_the_formula() -> None:
    model, batch, images = fresh(CLIPConfig(**TEXT, vision=VISION)), clip.texts(), vit.picture()
    head = model.get_mixin("contrast")
    tower: Any = CLIPVision(replace(VISION, output="pooled")).eval()
    weights = head.tower.state_dict()
    projection = weights.pop("mixins.projection.linear.weight")
    tower.load_state_dict(weights)
    ends = batch["input_ids"].argmax(1)
    with torch.no_grad():
        pooled = torch.stack([row[end] for row, end in zip(model(**batch), ends, strict=True)])
        texts = unit(pooled @ head.linear.weight.T)
        pictures = unit(tower(images=images) @ projection.T)
        logits = (math.exp(float(head.logit_scale)) * texts @ pictures.T).tolist()
        found = model.objective(model, {**batch, "images": images})["contrastive"]
    count, loss = len(logits), 0.0
    for i in range(count):
        row, column = logits[i], [logits[j][i] for j in range(count)]
        for values in (row, column):
            loss -= (values[i] - math.log(math.fsum(math.exp(value) for value in values))) / (2 * count)
    assert float(found) == pytest.approx(loss, abs=TOLERANCE)


def test_texts_and_pictures_can_be_encoded_alone() -> None:
    model, batch, images = fresh(CLIPConfig(**TEXT, vision=VISION)), clip.texts(), vit.picture(2)
    with torch.no_grad():
        both, alone = model.run(**batch, images=images).outputs, model.run(**batch).outputs
        assert torch.equal(model.get_mixin("contrast").encode(images), both["image_features"])
    assert both["logits_per_text"].shape == (3, 2) and set(alone) == {"text_features"}
    assert torch.equal(alone["text_features"], both["text_features"])
    with pytest.raises(ValueError, match="gives no result 'logits_per_text', only text_features"):
        ContrastiveObjective()(model, batch)


def test_the_scale_is_cut_down_while_training_only() -> None:
    model, batch = fresh(CLIPConfig(**TEXT, vision=VISION)), clip.texts()
    scale = model.get_mixin("contrast").logit_scale
    with torch.no_grad():
        scale.fill_(5.0)
    model(**batch)
    assert float(scale.detach()) == 5.0
    model.train()(**batch)
    assert float(scale.detach().exp()) == pytest.approx(100.0, rel=1e-6)
    model.objective(model, {**batch, "images": vit.picture()})["contrastive"].backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


def test_a_fresh_scale_is_that_of_the_paper() -> None:
    scale = CLIP(CLIPConfig(**TEXT, vision=VISION)).get_mixin("contrast").logit_scale
    assert float(scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-6)


def test_a_tower_that_does_not_pool_cannot_be_compared_with_texts() -> None:
    with pytest.raises(ValueError, match=r"output 'patches' has 16\. Take one that pools: pooled, projected"):
        ContrastiveHeadMixin(replace(VISION, output="patches"))


# -------------------------------------------------------------------- the property matrix


class ReturnedSentence(PoolHeadMixin):
    """Returns its named result, so that the matrix sees it."""

    @wrap
    def final_forward(self, hidden_states: torch.Tensor, ctx: Any, old_impl: Any) -> torch.Tensor:
        super().final_forward(hidden_states, ctx, old_impl)
        assert self.result is not None
        return ctx.outputs[self.result]


class ReturnedFeatures(ContrastiveHeadMixin):
    """Returns what it makes of each row, so that the matrix sees it; the scale too, so that it is learned."""

    inputs = ("pictures",)

    def before_forward(self, ctx: Any) -> None:
        ctx.inputs["images"] = ctx.require("pictures")
        super().before_forward(ctx)

    @wrap
    def final_forward(self, hidden_states: torch.Tensor, ctx: Any, old_impl: Any) -> torch.Tensor:
        super().final_forward(hidden_states, ctx, old_impl)
        both = torch.cat([ctx.outputs["text_features"], ctx.outputs["image_features"]], -1)
        return both * self.logit_scale.exp()


SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 28, "patch_size": 14,
}
SMALL_VISION = CLIPVisionConfig(**SMALL, output="projected", projection_size=8)


def pictures_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A picture that follows from a row's ids."""
    return {"pictures": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(int(ids.sum())))}


# (mixin, config of the model, the mixin of that model that it stands in for)
CHECKED: dict[str, tuple[Callable[[], BaseMixin], TransformerConfig, str | None]] = {
    "contrastive head": (
        lambda: ReturnedFeatures(SMALL_VISION), TransformerConfig(**ENCODER), None,
    ),
    "sentence head": (
        lambda: ReturnedSentence("cls", dense=True, size=2, result="sentence"), TransformerConfig(**ENCODER), None,
    ),
    "mean head": (
        lambda: PoolHeadMixin("mean", norm=True, dense=True, size=5), TransformerConfig(**ENCODER), None,
    ),
    "end-of-text head": (lambda: PoolHeadMixin("eot", size=5), TransformerConfig(**ENCODER), None),
    "class head": (lambda: PoolHeadMixin("cls", size=5), ViTConfig(**SMALL), "head"),
    "largest of patches": (lambda: PoolHeadMixin("max", size=5), SigLIPConfig(**SMALL), None),
    "attention pooling": (AttentionPoolHeadMixin, SigLIPConfig(**SMALL, output="pooled"), "head"),
    "stored norm": (StoredNormMixin, CLIPVisionConfig(**SMALL), "stored_norm"),
    "patches alone": (
        lambda: PatchEmbeddingMixin(31, 14, cls_token=False, crop=True), SigLIPConfig(**{**SMALL, "image_size": 31}),
        "patches",
    ),
    "patches without bias": (lambda: PatchEmbeddingMixin(28, 14, bias=False), VisionTowerConfig(**SMALL), "patches"),
}


@pytest.mark.parametrize("what", CHECKED)
def test_every_property_holds(what: str) -> None:
    make_mixin, config, replacing = CHECKED[what]
    extra = pictures_of if what == "contrastive head" else None
    check_mixin(make_mixin, lambda: fresh(config), replacing=replacing, extra_inputs=extra)


@pytest.mark.parametrize("key", ["vit", "siglip", "intern_vit", "resnet", "nf_resnet", "lenet"])
def test_a_tower_in_low_precision_reads_pictures_in_full(key: str) -> None:
    system = next(system for system in systems() if system.key == key)
    model = system.build_tiny().to(torch.bfloat16).eval()
    side = getattr(model.config, "image_size", 32)  # LeNet-5 has one size
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found, expected = model(images=images), model(images=images.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_a_towers_folder_needs_no_processor(tmp_path: Path) -> None:
    save_pretrained(next(system for system in systems() if system.key == "vit").build_tiny(), tmp_path / "weights")
    settings = read_settings(ViT, None, [f"--weights={tmp_path / 'weights'}"], ())
    assert settings.load_processor() is None and isinstance(settings.load_model(), ViT)
