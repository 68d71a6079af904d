"""LLaVA, VILA, MobileVLM and InternVL-Chat beyond parity: folders, places of pictures, tiles, stages, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mixformer import from_pretrained, load_processor, save_pretrained
from mixformer.composition import make_config
from mixformer.connectors import ProjectorConfig
from mixformer.images import preprocess_image
from mixformer.mixins import ImageMixin
from mixformer.testing import check_mixin, jitter, tiny_model
from mixformer.train import Stage, Task, TrainConfig, run_stages
from models.clip import CLIPVisionConfig
from models.internvl import InternVLConfig
from models.llama import LLaMA
from models.llava import LLaVAConfig
from models.weights import internvl as internvl_format
from models.weights import llava as llava_format
from tests.zoo import internvl, llava, mobilevlm, vila
from tests.zoo.harness import CONFIGS, System, difference

SYSTEMS = {system.key: system for system in (llava.SYSTEM, vila.SYSTEM, *mobilevlm.SYSTEMS, internvl.SYSTEM)}
each_system = pytest.mark.parametrize("system", [pytest.param(system, id=key) for key, system in SYSTEMS.items()])
TOWER = CLIPVisionConfig(
    hidden_size=16, num_layers=2, num_layers_run=1, num_heads=2, inner_hidden_size=24, image_size=16, patch_size=8
)
SHAPES = CONFIGS / "shapes"


def tiny(system: System) -> Any:
    """The tiny model with noise on every parameter."""
    model = system.build_tiny()
    jitter(model)
    return model.eval()


def row(model: Any, *pieces: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of text tokens (so many each) with a picture between each two pieces."""
    generator, size = torch.Generator().manual_seed(seed), model.get_mixin("image").num_features
    ids: list[int] = []
    for index, count in enumerate(pieces):
        ids += [model.config.image_token_id] * (size if index else 0)
        ids += torch.randint(20, 100, (count,), generator=generator).tolist()
    side = model.config.vision.image_size
    images = torch.randn(len(pieces) - 1, 3, side, side, generator=generator)
    return {"input_ids": torch.tensor([ids]), "images": images}


# ------------------------------------------------------------------- places of pictures


@pytest.mark.parametrize("position_ids", ["counted", "none", "shared"])
def test_every_property_holds_without_marks(position_ids: str) -> None:
    options = (TOWER, ProjectorConfig(depth=2), False, position_ids, 60)
    check_mixin(lambda: ImageMixin(*options), lambda: tiny_model("llama"), name="image")


@each_system
def test_every_property_holds(system: System) -> None:
    def again() -> ImageMixin:
        return ImageMixin(**system.build_tiny().get_mixin("image").options)

    check_mixin(again, system.build_tiny, replacing="image")


@each_system
@torch.no_grad()
def test_text_alone_equals_the_language_model_bit_for_bit(system: System) -> None:
    model = tiny(system)
    plain = LLaMA(model.config).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mixins.image.")})
    ids = torch.randint(20, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(model(ids, mask), plain(ids, mask))


@each_system
@torch.no_grad()
def test_the_order_of_pictures_matters_and_each_is_seen_from_its_place_on(system: System) -> None:
    model = tiny(system)
    batch = row(model, 3, 2, 4)
    logits = model(**batch)
    second = 5 + model.get_mixin("image").num_features  # three and two tokens, and the first picture
    other = batch["images"].clone()
    other[1] += 1.0
    changed = (model(batch["input_ids"], images=other) - logits).abs().amax((0, 2))
    assert changed[:second].max() == 0 and changed[second:].min() > 0
    swapped = (model(batch["input_ids"], images=batch["images"].flip(0)) - logits).abs().amax((0, 2))
    assert swapped[:3].max() == 0 and swapped[3:].min() > 0


@torch.no_grad()
def test_places_are_told_by_the_token_or_by_token_types_which_count_where_both_are_there() -> None:
    model = tiny(SYSTEMS["llava"])
    batch = row(model, 3, 4, 2)
    types = (batch["input_ids"] == model.config.image_token_id).long()
    expected = model(**batch)
    assert torch.equal(model(**batch, token_type_ids=types), expected)
    masked = batch["input_ids"].masked_fill(types.bool(), 7)
    assert torch.equal(model(masked, images=batch["images"], token_type_ids=types), expected)
    longer = torch.cat([batch["input_ids"], torch.full((1, 1), model.config.image_token_id)], dim=1)
    types = torch.cat([types, torch.zeros(1, 1, dtype=torch.int64)], dim=1)
    assert torch.equal(model(longer, images=batch["images"], token_type_ids=types)[:, :-1], expected)


def _without_one(batch: dict[str, torch.Tensor], image: int) -> dict[str, torch.Tensor]:
    ids = batch["input_ids"].clone()
    ids[0, int((ids[0] == image).nonzero()[0])] = 7
    return {**batch, "input_ids": ids}


def _with_a_gap(batch: dict[str, torch.Tensor], image: int) -> dict[str, torch.Tensor]:
    ids = _without_one(batch, image)["input_ids"]
    ids[0, 0] = image
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize(("break_it", "message"), [
    pytest.param(_without_one, "Row 0 marks 31 image tokens in token_type_ids; each image takes 16", id="too-few"),
    pytest.param(
        lambda batch, image: {**batch, "input_ids": batch["input_ids"][:, :20]},
        r"room for 1 image\(s\) \(16 tokens each\), but 2 were given", id="one-place-for-two",
    ),
    pytest.param(
        lambda batch, image: {**batch, "images": batch["images"][:1]},
        r"room for 2 image\(s\) \(16 tokens each\), but 1 were given", id="two-places-for-one",
    ),
    pytest.param(
        lambda batch, image: {**batch, "input_ids": batch["input_ids"].clamp(min=20)},
        r"2 image\(s\) were given, but token_type_ids mark no place", id="no-place",
    ),
    pytest.param(_with_a_gap, "the image span that starts at slot 0 is not 16 tokens in one piece", id="gap"),
])  # fmt: skip
def test_wrong_places_are_refused(break_it: Callable[..., dict[str, torch.Tensor]], message: str) -> None:
    model = tiny(SYSTEMS["llava"])
    batch = break_it(row(model, 3, 4, 2), model.config.image_token_id)
    with pytest.raises(ValueError, match=message):
        model(**batch)


# ------------------------------------------------------------------- tiles, from the picture on


@torch.no_grad()
def test_a_picture_in_tiles_gives_one_span_each_the_whole_last_and_hfs_logits(tmp_path: Path) -> None:
    reference = internvl.tiny_hf(
        llava.llama_config(vocab_size=119), internvl.vision_config(image_size=32, patch_size=8), image_token_id=5
    )
    reference.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    processor = load_processor(CONFIGS / "internvl", tokenizer=SHAPES / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    tall, square = Image.fromarray(pixels), Image.fromarray(pixels[:32])
    batch = processor(["What is this?", "What is below?"], [tall, [square]])
    settings = processor.config
    parts = [tall.crop((0, 0, 32, 32)), tall.crop((0, 32, 32, 64)), tall, square]
    expected = [preprocess_image(part, 32, settings.image_mean, settings.image_std) for part in parts]
    assert torch.equal(batch["images"], torch.stack(expected))
    opened, closed = processor.tokenizer.encode("<img>")[-1], processor.tokenizer.encode("</img>")[-1]
    for ids, num_tiles in zip(batch["input_ids"].tolist(), (3, 1), strict=True):
        first = ids.index(opened) + 1
        assert ids[first : first + 4 * num_tiles + 1] == [5] * (4 * num_tiles) + [closed]
        assert ids.count(5) == 4 * num_tiles and ids.count(opened) == 1
    theirs = reference(batch["input_ids"], batch["images"], batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    assert difference(model(**batch)[real], theirs[real]) < 2e-5


@torch.no_grad()
def test_pictures_stand_where_the_prompt_marks_them_and_the_logits_are_hfs(tmp_path: Path) -> None:
    vision = llava.clip_config(image_size=32, patch_size=8)
    reference = llava.tiny_hf(llava.llama_config(vocab_size=119), vision, image_token_index=5)
    reference.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    processor = load_processor(CONFIGS / "llava", tokenizer=SHAPES / "tokenizer.model")
    pictures = [SHAPES / f"{number:04}.png" for number in (1, 2, 3)]
    prompts = ["Is <image> left of <image>?", "What is this?"]
    batch = processor(prompts, [pictures[:2], pictures[2]])
    spans = (batch["input_ids"] == 5).long()
    assert torch.equal(spans, batch["token_type_ids"])
    starts = spans.diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.int64)).clamp(min=0).sum(1)
    assert spans.sum(1).tolist() == [32, 16] and starts.tolist() == [2, 1]
    theirs = reference(batch["input_ids"], batch["images"], batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    assert difference(model(**batch)[real], theirs[real]) < 2e-5


# ------------------------------------------------------------------- HF folders


FORMS: dict[str, Callable[[], Any]] = {
    "llava": llava.tiny_hf,
    "llava-qwen2": lambda: llava.tiny_hf(internvl.qwen2_config()),
    "llava-without-biases": lambda: llava.tiny_hf(multimodal_projector_bias=False, projector_hidden_act="relu"),
    "internvl": internvl.tiny_hf,
    "internvl-qwen2-tied": lambda: internvl.tiny_hf(internvl.qwen2_config(), tie_word_embeddings=True),
}
SPELLINGS = {
    "written by 5.23": lambda name: name,
    "published": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "in memory": lambda name: {"language_model.lm_head.weight": "lm_head.weight"}.get(
        name, f"model.{name.replace('language_model.model.', 'language_model.')}"
    ),
}


def logits_of(reference: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch, and HF's logits of it."""
    size, side = {"llava": (16, 16), "internvl": (9, 24)}[reference.config.model_type]
    batch = {name: x for name, x in llava.spliced_batch(size, side).items() if name in ("input_ids", "images")}
    return batch, reference(**llava.foreign(batch)).logits


@pytest.mark.parametrize("kept", [True, False], ids=["as-it-was", "as-a-new-one"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_is_written_loads_in_transformers_with_the_same_logits(form: str, kept: bool, tmp_path: Path) -> None:
    reference = FORMS[form]()
    batch, theirs = logits_of(reference)
    reference.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    if not kept:
        weights, model = model.state_dict(), type(model)(model.config).eval()
        model.load_state_dict(weights)
    save_pretrained(model, tmp_path / "ours", format="hf")
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.eval()(**llava.foreign(batch)).logits, theirs)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    if kept:
        assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


@pytest.mark.parametrize(("form", "spelling"), [
    ("llava", "written by 5.23"), ("llava", "published"), ("llava", "in memory"), ("internvl", "in memory"),
])  # fmt: skip
@torch.no_grad()
def test_each_spelling_of_a_file_is_read_and_written_back(form: str, spelling: str, tmp_path: Path) -> None:
    reference = FORMS[form]()
    batch, theirs = logits_of(reference)
    reference.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {SPELLINGS[spelling](name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model = from_pretrained(tmp_path / "theirs")
    assert difference(model(**batch), theirs) < 2e-5
    save_pretrained(model, tmp_path / "ours", format="hf")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert before == after
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(**llava.foreign(batch)).logits, theirs)


def test_tensors_that_old_files_carry_are_carried_along(tmp_path: Path) -> None:
    llava.tiny_hf().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    unused = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(4),
    }
    save_file({**{SPELLINGS["published"](k): v for k, v in load_file(file).items()}, **unused}, file)
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours", format="hf")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in unused.items())


@pytest.mark.parametrize(("layer", "num_layers_run"), [(-2, 2), (2, 2), (-1, 3), (-3, 1)])
def test_layers_that_do_not_run_and_the_last_norm_are_kept_and_frozen(
    layer: int, num_layers_run: int, tmp_path: Path
) -> None:
    llava.tiny_hf(vision_feature_layer=layer).save_pretrained(tmp_path)
    tower = from_pretrained(tmp_path).get_mixin("image").tower
    assert (len(tower.transformer.layers), tower.config.layers_run) == (3, num_layers_run)
    unread = ("final_norm", *(f"layers.{index}" for index in range(num_layers_run, 3)))
    for name, parameter in tower.named_parameters():
        assert parameter.requires_grad != name.removeprefix("transformer.").startswith(unread), name


PUBLISHED_LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False, "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}


def test_a_config_that_leaves_out_what_is_usual_is_read_as_the_default() -> None:
    shapes = {llava_format.HEAD: (32064, 4096)}
    options = llava_format.HF.read_config(PUBLISHED_LLAVA, shapes)
    assert make_config(LLaVAConfig, options) == LLaVAConfig()


def _llava_head() -> dict[str, Any]:
    return {llava_format.HEAD: (97, 32)}


@pytest.mark.parametrize(("changes", "message"), [
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]; supported is one layer"),
    ({"vision_feature_layer": 0}, "vision_feature_layer 0; supported is one layer, from -24"),
    ({"vision_feature_layer": -26}, "vision_feature_layer -26"),
    ({"vision_feature_select_strategy": "cls_patch"}, "strategy is 'cls_patch'. Known: default, full"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower is of type 'siglip_vision_model'"),
    ({"text_config": {"model_type": "gemma"}}, "language model is of type 'gemma'. Readable: llama"),
    ({"projector_hidden_act": "mish"}, "activation 'mish' is not known"),
])  # fmt: skip
def test_variants_that_cannot_be_read_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_format.HF.read_config({**PUBLISHED_LLAVA, **changes}, _llava_head())


@pytest.mark.parametrize(("ratio", "merge"), [(0.5, 2), (1, 1), (0.25, 4)])
def test_the_downsample_ratio_says_how_many_patches_merge(ratio: float, merge: int) -> None:
    config = {"downsample_ratio": ratio, "text_config": {"model_type": "llama"}}
    options = make_config(InternVLConfig, internvl_format.HF.read_config(config, _llava_head()))
    assert options.adapter == ProjectorConfig(depth=2, norm="pre", merge=merge)


def test_a_downsample_ratio_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"downsample_ratio is 0.4; supported are 1, 1/2, 1/3"):
        internvl_format.HF.read_config({"downsample_ratio": 0.4}, {})


@pytest.mark.parametrize(("top", "inner", "has_head", "tied"), [
    (None, None, True, False), (None, True, True, True), (False, True, True, False), (True, None, True, True),
    (None, None, False, True), (False, None, False, False), (False, True, False, True),
])  # fmt: skip
def test_whether_the_head_is_the_word_embedding(top: Any, inner: Any, has_head: bool, tied: bool) -> None:
    said = {"tie_word_embeddings": top, "text_config": {"model_type": "llama", "tie_word_embeddings": inner}}
    content = {key: value for key, value in said.items() if value is not None}
    shapes = _llava_head() if has_head else {}
    assert internvl_format.HF.read_config(content, shapes)["tied_head"] is tied


@pytest.mark.parametrize("key", ["vila", "mobilevlm", "mobilevlm_v2"])
def test_systems_that_hf_does_not_have_are_not_written_as_llava(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The HF format of LLaVA holds a CLIPVision and the projector that LLaVA has"):
        save_pretrained(tiny(SYSTEMS[key]), tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("changes", [{"bias": False}, {"merge_version": "v1"}, {"depth": 1}, {"norm": "none"}])
def test_projectors_that_hfs_internvl_does_not_have_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    config = SYSTEMS["internvl"].build_tiny().config
    config.adapter = replace(config.adapter, **changes)
    with pytest.raises(ValueError, match="the projector that InternVL has, and this model differs"):
        save_pretrained(config.build(), tmp_path / "hf", format="hf")


@pytest.mark.parametrize("key", ["llava", "internvl"])
def test_a_model_without_a_token_for_pictures_is_not_written(key: str, tmp_path: Path) -> None:
    model = tiny(SYSTEMS[key])
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="this model has no image_token_id"):
        save_pretrained(model, tmp_path / "hf", format="hf")


# ------------------------------------------------------------------- stages


class Repeated(Task):
    """One batch, again and again."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.batch


TRAINED = {
    "llava": {"align": {"projector"}, "tune": {"projector", "language"}},
    "vila": {
        "align": {"projector"}, "pretrain": {"projector", "language"}, "tune": {"projector", "language"},
        "tune_all": {"tower", "projector", "language"},
    },
    "mobilevlm": {"align": {"projector"}, "tune": {"projector", "language"}},
    "mobilevlm_v2": {"pretrain": {"projector", "language"}, "tune": {"projector", "language"}},
    "internvl": {
        "pretrain": {"tower", "projector"}, "tune": {"tower", "projector", "language"},
        "adapt": {"projector", "language"},
    },
}


@pytest.mark.parametrize(("key", "stage"), [(key, stage) for key, stages in TRAINED.items() for stage in stages])
def test_a_stage_changes_every_parameter_of_its_parts_and_none_of_the_others(key: str, stage: str) -> None:
    model = tiny(SYSTEMS[key])
    assert set(type(model).stages) == set(TRAINED[key])
    batch = row(model, 3, 4, 6)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    task = Repeated({**batch, "labels": batch["input_ids"]})
    run_stages(model, [Stage("stage", task, TrainConfig(steps=1, learning_rate=1e-2), trains=stage)])
    for name, parameter in model.named_parameters():
        part = next((part for part in ("tower", "projector") if name.startswith(f"mixins.image.{part}.")), "language")
        unused = part == "tower" and not _is_read(model, name)
        assert torch.equal(parameter, before[name]) == (unused or part not in TRAINED[key][stage]), name


def _is_read(model: Any, name: str) -> bool:
    """Whether a tower's parameter has a part in what the language model reads."""
    names = {name for name, x in model.get_mixin("image").tower.named_parameters() if x.requires_grad}
    return name.removeprefix("mixins.image.tower.") in names


# ------------------------------------------------------------------- published sizes


def test_the_published_sizes_are_hfs_own_count() -> None:
    from transformers import CLIPVisionModel, InternVLForConditionalGeneration, LlamaForCausalLM
    from transformers import InternVLConfig as HFInternVLConfig
    from transformers import LlavaConfig as HFLlavaConfig
    from transformers import LlavaForConditionalGeneration as HFLlava

    def text(hidden: int, layers: int, heads: int, inner: int, **more: int) -> Any:
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        return llava.llama_config(**{
            **sizes, "intermediate_size": inner, "num_key_value_heads": heads, "vocab_size": 32000, **more
        })

    clip = llava.clip_config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
        patch_size=14,
    )
    large: dict[str, Any] = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25}
    pictures = {"image_size": 448, "patch_size": 14}
    intern_6b = internvl.vision_config(**large, **pictures, intermediate_size=12800)
    intern_300m = internvl.vision_config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **pictures,
        norm_type="layer_norm", use_qk_norm=False, attention_bias=True,
    )
    extra: dict[str, int] = {"vocab_size": 32064}
    words, own = {"vocab_size": 92553, "num_key_value_heads": 8}, {"tie_word_embeddings": False}
    with torch.device("meta"):
        models = {
            "1.5-7B": HFLlava(HFLlavaConfig(vision_config=clip, text_config=text(4096, 32, 32, 11008, **extra))),
            "1.5-13B": HFLlava(HFLlavaConfig(vision_config=clip, text_config=text(5120, 40, 40, 13824, **extra))),
            "26B": InternVLForConditionalGeneration(HFInternVLConfig(
                text_config=text(6144, 48, 48, 16384, **words), vision_config=intern_6b, **own
            )),
            "Mini 2B": InternVLForConditionalGeneration(HFInternVLConfig(
                text_config=text(2048, 24, 16, 8192, **words), vision_config=intern_300m, **own
            )),
        }  # fmt: skip
        tower, language = CLIPVisionModel(clip), LlamaForCausalLM(text(4096, 32, 32, 11008))

    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    sizes = {**llava.SYSTEM.sizes, **internvl.SYSTEM.sizes}
    assert {name: count(model) for name, model in models.items()} == {name: sizes[name].parameters for name in models}
    assert count(tower) == llava.vision_count()
    assert count(language) == llava.language_count(4096, 11008, 32)


def test_the_published_projectors_have_the_papers_size() -> None:
    assert round(mobilevlm.ldp_count(2048) / 1e6, 2) == 18.94
    assert round(mobilevlm.ldp_v2_count(2048) / 1e6, 2) == 6.32
    for system, count in zip(mobilevlm.SYSTEMS, (mobilevlm.ldp_count, mobilevlm.ldp_v2_count), strict=True):
        with torch.device("meta"):
            model = system.model_class(system.model_class.Config(), device="meta")
        assert sum(x.numel() for x in model.get_mixin("image").projector.parameters()) == count(2048)


@pytest.mark.parametrize(("key", "num_tokens"), [
    ("llava", 576), ("vila", 576), ("mobilevlm", 144), ("mobilevlm_v2", 144), ("internvl", 256),
])  # fmt: skip
def test_a_picture_takes_the_published_number_of_tokens(key: str, num_tokens: int) -> None:
    config = SYSTEMS[key].model_class.Config()
    assert ImageMixin(config.vision, config.adapter, False, "counted").num_features == num_tokens


def test_vila_one_and_a_half_takes_196_tokens_of_729_patches() -> None:
    assert ProjectorConfig(depth=2, norm="pre", merge=2, pad=True).num_tokens(729) == 196
    assert ProjectorConfig(depth=2, norm="pre", merge=3, pad=True, narrow=3).num_tokens(729) == 81
