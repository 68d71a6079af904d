"""Constants of the published sizes that change the numbers and not the count of parameters, as their releases say."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from mixformer.config import read_settings
from tests.zoo.harness import CONFIGS, systems

MODELS = {system.key: system.model_class for system in systems()}
CLIP = {"norm_eps": 1e-5, "activation": "quick_gelu"}
CLIP_LARGE = {"vision.norm_eps": 1e-5, "vision.activation": "quick_gelu", "vision.num_heads": 16}
SPLICED = {**CLIP_LARGE, "vision.layers_run": 23, "vision.output_norm": False, "adapter.activation": "gelu"}
INTERN = {"norm_eps": 1e-6, "activation": "gelu", "layers_run": 45, "norm_order": "pre", "final_norm": False}
SO400M = {"norm_eps": 1e-6, "activation": "gelu_tanh", "num_heads": 16}

# {folder/file: {option: value}}, a folder alone for the defaults of the class
RELEASED: dict[str, dict[str, Any]] = {
    "bert": {"norm_eps": 1e-12, "activation": "gelu", "norm_order": "post", "causal": False},
    "clip": {**CLIP, "num_heads": 8, **{f"vision.{name}": value for name, value in CLIP.items()}},
    "clip/l14.yaml": {**CLIP, "num_heads": 12, **CLIP_LARGE},
    "clipcap": {"norm_eps": 1e-5, "activation": "gelu_tanh", "vision.activation": "quick_gelu"},
    "cm3": {"norm_eps": 1e-5, "activation": "gelu", "embedding_scale": 2560**0.5, "tied_head": True},
    "cm3/large.yaml": {"norm_eps": 1e-5, "embedding_scale": 5120**0.5},
    "frozen": {"rope_base": 1e4, "norm_eps": 1e-5},
    "git": {"norm_eps": 1e-12, "activation": "gelu", "norm_order": "post", "vision.norm_eps": 1e-5},
    "gpt2": {"norm_eps": 1e-5, "activation": "gelu_tanh", "tied_head": True},
    "idefics2": {
        "norm_eps": 1e-5, "rope_base": 1e4, "sliding_window": 4096, "adapter.norm_eps": 1e-5,
        "adapter.activation": "silu", "tied_head": False, **{f"vision.{name}": value for name, value in SO400M.items()},
    },
    "intern_vit": {**INTERN, "qk_norm_width": "all", "layer_scale": 0.1, "bias": "except_qkv"},
    "intern_vit/6b_48.yaml": {**INTERN, "num_layers": 48},
    "intern_vit/300m.yaml": {**INTERN, "layers_run": 24, "qk_norm": False, "bias": "all"},
    "internvl": {
        "rope_base": 1e6, "norm_eps": 1e-5, "adapter.norm_eps": 1e-5, "adapter.merge_version": "v2",
        **{f"vision.{name}": value for name, value in INTERN.items()},
    },
    "internvl/mini_2b.yaml": {"rope_base": 1e6, "norm_eps": 1e-5, "vision.norm_eps": 1e-6, "vision.layers_run": 24},
    "kosmos": {**CLIP_LARGE, "norm_eps": 1e-5, "activation": "gelu", "xpos_scale_base": 512.0, "vision.layers_run": 24},
    "llama": {"norm_eps": 1e-5, "rope_base": 1e4, "activation": "silu", "sliding_window": None},
    "llama/65b.yaml": {"norm_eps": 1e-5, "rope_base": 1e4},
    "llama/internlm2_7b.yaml": {"norm_eps": 1e-5, "rope_base": 1e6, "bias": "none"},
    "llama/llama2_70b.yaml": {"norm_eps": 1e-5, "rope_base": 1e4},
    "llama/llama3_8b.yaml": {
        "norm_eps": 1e-5, "rope_base": 5e5, "rope_scaling.kind": "llama3", "rope_scaling.factor": 8.0,
        "rope_scaling.low_frequency_factor": 1.0, "rope_scaling.high_frequency_factor": 4.0,
        "rope_scaling.original_positions": 8192,
    },
    "llama/mistral_7b.yaml": {"norm_eps": 1e-5, "rope_base": 1e4, "sliding_window": 4096},
    "llama/qwen2_7b.yaml": {"norm_eps": 1e-6, "rope_base": 1e6, "bias": "qkv"},
    "llama/qwen2_0.5b.yaml": {"norm_eps": 1e-6, "rope_base": 1e6, "tied_head": True},
    "llava": {**SPLICED, "norm_eps": 1e-5, "rope_base": 1e4, "vision.image_size": 336},
    "llava/v1_13b.yaml": {**CLIP_LARGE, "norm_eps": 1e-6, "vision.layers_run": 23, "vision.image_size": 224},
    "mobilevlm": {**CLIP_LARGE, "norm_eps": 1e-6, "rope_base": 1e4, "vision.layers_run": 23},
    "mobilevlm_v2": {**CLIP_LARGE, "norm_eps": 1e-6, "vision.layers_run": 23, "adapter.output_grid": 12},
    "qwen_vl": {
        "norm_eps": 1e-6, "rope_base": 1e4, "bias": "qkv", "vision.norm_eps": 1e-6, "vision.activation": "gelu",
        "vision.position_grid": 16, "adapter.norm_eps": 1e-6,
    },
    "siglip": SO400M,
    "simvlm": {"positions": "learned", "causal": True},
    "vila": {**SPLICED, "norm_eps": 1e-5, "adapter.depth": 1},
    "visual_bert": {"norm_eps": 1e-12, "norm_order": "post"},
    "vit": {"norm_eps": 1e-12, "activation": "gelu"},
}


@pytest.mark.parametrize("place", RELEASED)
def test_what_no_count_of_parameters_tells_is_as_released(place: str) -> None:
    key, _, file = place.partition("/")
    config = read_settings(MODELS[key], CONFIGS / key / file if file else None, [], ()).model
    found = {path: reduce(getattr, path.split("."), config) for path in RELEASED[place]}
    assert found == RELEASED[place]
