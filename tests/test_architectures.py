"""The page of checkpoints says which classes of transformers are read, and it is so."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from golden_cases import GOLDEN

from mixformer import from_pretrained
from mixformer.checkpoint import recognise
from models.weights import HF_FORMATS
from tests.zoo import (
    bert,
    clip,
    git,
    gpt2,
    idefics2,
    intern_vit,
    internvl,
    llama,
    llava,
    resnet,
    siglip,
    visual_bert,
    vit,
)

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
TABLE = {
    name: (re.findall(r"[A-Z]\w+", classes.split(" (")[0].removeprefix("none")), model)
    for name, classes, model in re.findall(r"^\| `([\w-]+)` \| (.+) \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
}
SMALL: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama.reference_of("LLaMA"), "mistral": lambda: llama.reference_of("Mistral"),
    "qwen2": lambda: llama.reference_of("Qwen2"), "gpt2": gpt2.tiny_gpt2, "bert": bert.tiny_bert, "vit": vit.reference,
    "clip": clip.reference, "siglip-vision": siglip.reference, "resnet": resnet.tiny_hf,
    "internvl-vision": lambda: intern_vit.reference("6B"), "llava": llava.tiny_hf,
    "internvl": internvl.tiny_hf, "idefics2": idefics2.tiny_hf, "git": git.tiny_git,
    "visual-bert": visual_bert.tiny_visual_bert, "clip-vision": clip.reference,
}
RELEASED = {"cogvlm": ["cogvlm-hf", "cogvlm2-hf"], "cogagent": ["cogagent-hf"]}
TOWERS = ["eva2-clip-e", "eva2-clip-l"]


@cache
def config_of(name: str) -> Any:
    config = SMALL[name]().config
    return config.vision_config if name == "clip-vision" else config


def test_every_type_has_its_row_and_its_model() -> None:
    assert {name: model for name, (_, model) in TABLE.items()} == {
        found.name.removeprefix("hf-"): found.model.__name__ for found in HF_FORMATS
    }
    assert set(TABLE) == {*SMALL, *RELEASED, *TOWERS}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SMALL for kind in TABLE[name][0]])
def test_listed_classes_are_read(name: str, kind: str, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, kind)(copy.deepcopy(config_of(name))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind]
    assert recognise(tmp_path) == f"hf-{name}"
    assert type(from_pretrained(tmp_path, device="meta")).__name__ == TABLE[name][1]


@pytest.mark.parametrize("name", [*RELEASED, *TOWERS])
def test_listed_classes_of_released_code_are_those_of_the_golden_folders(name: str) -> None:
    kinds, model = TABLE[name]
    for folder in RELEASED.get(name, [name]):
        assert (json.loads((GOLDEN / folder / "config.json").read_text()).get("architectures") or []) == kinds
        assert recognise(GOLDEN / folder) == f"hf-{name}"
        assert type(from_pretrained(GOLDEN / folder, device="meta")).__name__ == model


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "BertModel"), ("bert", "BertForSequenceClassification"), ("llama", "LlamaForSequenceClassification"),
     ("gpt2", "GPT2DoubleHeadsModel"), ("vit", "ViTForMaskedImageModeling")],
)
def test_other_heads_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    import transformers

    assert kind not in TABLE[name][0]
    getattr(transformers, kind)(copy.deepcopy(config_of(name))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        from_pretrained(tmp_path, device="meta")
