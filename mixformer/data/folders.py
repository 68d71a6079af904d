"""The settings of a processor from the files of a checkpoint folder, ours or a released one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mixformer.data.processor_config import ProcessorConfig
from mixformer.prompts import get_family
from mixformer.tokenizer import Tokenizer

PROCESSOR_FILE = "processor.yaml"
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def settings_file(folder: Path) -> Path:
    """The file of a folder that says how prompts are written.

    Raises:
        ValueError: no such folder, or none of the known layouts.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}: name the folder of a checkpoint")
    for name in _READERS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} is no checkpoint folder: it holds none of {', '.join(_READERS)}")


def read_settings(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of `ProcessorConfig` from one of the files that `settings_file` knows.

    Raises:
        ValueError: an unreadable file, a model whose prompts are not known, a setting that is missing.
    """
    return _READERS[file.name](_read_content(file), file, tokenizer)


def _read_content(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({error}): write or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings: expected names and values")
    return content


def _read_own(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(ProcessorConfig)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"{file} has an unknown setting {name!r}: did you mean {near[0]!r}?")
    return content


def _token_ids(content: dict[str, Any], tokenizer: Tokenizer, pad: int, end: str = "") -> dict[str, Any]:
    """Ids as the released code takes them: bos and eos of the tokenizer, the rest of the configuration.

    `end` is the token that ends an answer, where it is a token of the tokenizer.
    """
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    found = content.get("pad_token_id")
    spelt = tokenizer.encode(end) if end else []
    eos = spelt[0] if len(spelt) == 1 else tokenizer.eos_id
    return {
        "bos_id": tokenizer.bos_id,
        "eos_id": eos,
        "pad_id": pad if found is None else found,
        "stop_ids": tuple(dict.fromkeys([eos, tokenizer.eos_id, *ends])),
    }


def _read_hf(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    vision = content.get("vision_config")
    if vision is None:
        return {"family": "llama", **_token_ids(content, tokenizer, tokenizer.pad_id)}
    reader = _HF_READERS.get(content.get("model_type", ""))
    if reader is not None:
        return reader(content, file, tokenizer)
    architectures = content.get("architectures") or ["CogVLMForCausalLM"]
    if architectures[0] not in ("CogVLMForCausalLM", "CogAgentForCausalLM"):
        raise ValueError(
            f"{file} describes {architectures[0]}, whose prompts are not known here (CogVLM, CogVLM2, "
            f"CogAgent, {', '.join(_HF_READERS)} and text models are): write {PROCESSOR_FILE} with the settings of "
            f"ProcessorConfig beside it, or build Processor(ProcessorConfig(...), tokenizer)"
        )
    # CogVLM2 marks images with 128002 whatever the tokenizer says, the others with the pad token.
    second = "num_multi_query_heads" in content
    ids = _token_ids(content, tokenizer, 128002 if second else 0)
    cross = content.get("cross_image_size")
    return {
        "family": "hf-cogvlm2" if second else "hf-cogagent" if cross else "hf-cogvlm",
        "template": content.get("template_version"),
        "image_size": _required(vision, "image_size", file),
        "patch_size": _required(vision, "patch_size", file),
        "downsample": 2 if second else 1,
        "cross_image_size": cross,
        "placeholder_id": ids["pad_id"],
        **ids,
    }


def _read_splice(
    family: str, content: dict[str, Any], file: Path, tokenizer: Tokenizer, defaults: dict[str, Any]
) -> dict[str, Any]:
    """What the Hugging Face folders of all systems have that put picture tokens among the others."""
    spelling, text = get_family(family), content.get("text_config") or {}
    placeholder = content.get("image_token_id", content.get("image_token_index"))
    if placeholder is None:
        raise ValueError(f"{file} lacks 'image_token_id': write it there, or write {PROCESSOR_FILE} beside it")
    sizes = _vision_sizes(content["vision_config"], file)
    names = ("eos_token_id", "pad_token_id")
    numbers = {name: content.get(name, text.get(name)) for name in names}
    return {
        "family": family,
        "template": "hf" if "hf" in spelling.templates else None,
        **sizes,
        "image_marks": False,
        "placeholder_id": placeholder,
        **_token_ids(numbers, tokenizer, tokenizer.pad_id, spelling.end),
        **_image_settings(file.parent, defaults, sizes["image_size"]),
    }


def _read_llava(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = _read_splice("llava", content, file, tokenizer, {"image_fit": "crop"})
    kept = content.get("vision_feature_select_strategy", "default") != "default"
    side = settings["image_size"] // settings["patch_size"]
    return {**settings, "num_image_tokens": side * side + kept}


def _read_internvl(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = _read_splice("internvl", content, file, tokenizer, _IMAGENET)
    sizes = {"downsample": round(1 / content.get("downsample_ratio", 0.5))}
    images = _image_content(file.parent)
    if images.get("crop_to_patches"):
        sizes["tiles"] = {"min_tiles": images.get("min_patches", 1), "max_tiles": images.get("max_patches", 12)}
    return {**settings, **sizes}


def _read_idefics2(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = _read_splice("idefics2", content, file, tokenizer, _HALF)
    images, perceiver = _image_content(file.parent), content.get("perceiver_config") or {}
    sides = images.get("size") or {}
    settings.update({
        "image_fit": "native", "image_filter": _FILTERS.get(images.get("resample", 2), "bilinear"),
        "image_size": sides.get("longest_edge", 980), "shortest_side": sides.get("shortest_edge", 378),
        "num_image_tokens": perceiver.get("resampler_n_latents", 64),
        "quarters": bool(images.get("do_image_splitting", False)),
    })  # fmt: skip
    return settings


def _read_clip(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Pictures as CLIP prepares them, beside texts."""
    sizes = _vision_sizes(content["vision_config"], file)
    return {
        "family": "caption",
        **sizes,
        "image_marks": False,
        "placeholder_id": tokenizer.pad_id,
        **_token_ids(content, tokenizer, tokenizer.pad_id),
        **_image_settings(file.parent, {"image_fit": "crop"}, sizes["image_size"]),
    }


def _read_git(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    if content.get("num_image_with_embedding"):
        raise ValueError(f"{file} describes a GIT that reads videos; a processor is known for single pictures only")
    vision = {"image_size": 224, "patch_size": 16, **content.get("vision_config", {})}  # released files leave these out
    settings = _read_clip({**content, "vision_config": vision}, file, tokenizer)
    tokens = (settings["image_size"] // settings["patch_size"]) ** 2 + 1
    return {**settings, "num_image_tokens": tokens, "image_place": "front"}


def _vision_sizes(vision: dict[str, Any], file: Path) -> dict[str, int]:
    found = {}
    for name in ("image_size", "patch_size"):
        value = _required(vision, name, file)
        found[name] = value[0] if isinstance(value, list) else value
    return found


def _image_content(folder: Path) -> dict[str, Any]:
    """How a Hugging Face folder prepares pictures; empty where it does not say."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = _read_content(folder / name)
            content = content.get("image_processor", content)
            if "image_mean" in content or "size" in content:
                return dict(content)
    return {}


def _image_settings(folder: Path, defaults: dict[str, Any], side: int) -> dict[str, Any]:
    """Fit, filter and normalisation of pictures, as far as the folder says, else those of the released model.

    Raises:
        ValueError: pictures that are prepared in a way that is not known here, or not for a tower of this `side`.
    """
    content, found = _image_content(folder), dict(defaults)
    skipped = [name for name in ("do_resize", "do_rescale", "do_normalize") if content.get(name) is False]
    if abs((content.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        skipped.append("rescale_factor")
    if skipped:
        odd = ", ".join(f"{name}: {content[name]}" for name in skipped)
        raise ValueError(
            f"{folder} prepares pictures with {odd}, which is not known here (they are resized, divided by 255 and "
            f"normalised): write {PROCESSOR_FILE} beside it"
        )
    size, crop = _sides(content.get("size")), _sides(content.get("crop_size"))
    cropped = bool(content.get("do_center_crop"))
    named = [*size.values(), *(crop.values() if cropped else ())] if "longest_edge" not in size else []
    if any(number != side for number in named):
        raise ValueError(
            f"{folder} prepares pictures of size {content.get('size')} and crop_size {content.get('crop_size')}, but "
            f"the tower reads {side}: make them equal, or write {PROCESSOR_FILE} beside it"
        )
    found.update({name: tuple(content[name]) for name in ("image_mean", "image_std") if content.get(name)})
    if "resample" in content:
        if content["resample"] not in _FILTERS:
            raise ValueError(
                f"{folder} resizes pictures with Pillow's filter {content['resample']}, which is not known here "
                f"({_FILTERS} are): write {PROCESSOR_FILE} beside it"
            )
        found["image_filter"] = _FILTERS[content["resample"]]
    if "do_center_crop" in content:
        cropped = cropped and "shortest_edge" in size
        found["image_fit"] = "pad" if content.get("do_pad") else "crop" if cropped else "stretch"
    return found


def _sides(size: Any) -> dict[str, int]:
    """Sides of pictures by name; a number, as the first files have it, is that of the shortest."""
    if isinstance(size, list):
        return dict(zip(("height", "width"), size, strict=True))
    return {"shortest_edge": size} if isinstance(size, int) else dict(size or {})


def _read_sat(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = _token_ids(content, tokenizer, tokenizer.pad_id)
    tower = content.get("eva_args")
    if tower is None:
        return {"family": "llama", **ids}
    size, patch_size = _required(tower, "image_size", file), _required(tower, "patch_size", file)
    size = size[0] if isinstance(size, list) else size
    cross = content.get("cross_image_pix")
    return {
        "family": "sat",
        # The repository's table: cogagent-chat is "chat", the CogVLM chat models are "chat_old".
        "template": content.get("text_processor_version", "chat" if cross else "chat_old"),
        "image_size": size,
        "patch_size": patch_size,
        "num_image_tokens": content.get("image_length"),
        "cross_image_size": cross,
        "placeholder_id": 0,
        **ids,
    }


def _required(content: dict[str, Any], name: str, file: Path) -> Any:
    if name not in content:
        raise ValueError(
            f"{file} lacks {name!r} of the vision tower: is it the file of a model with pictures? Copy it again, or "
            f"write {PROCESSOR_FILE} beside it"
        )
    return content[name]


_Reader = Callable[[dict[str, Any], Path, Tokenizer], dict[str, Any]]
_READERS: dict[str, _Reader] = {
    PROCESSOR_FILE: _read_own, "config.json": _read_hf, "model_config.json": _read_sat,
}  # fmt: skip
_HF_READERS: dict[str, _Reader] = {
    "llava": _read_llava, "internvl": _read_internvl, "idefics2": _read_idefics2, "git": _read_git,
    "clip": _read_clip,
}  # fmt: skip
