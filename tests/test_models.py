"""The released sizes: parameter totals, key names, and files that only compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixformer import BaseModel
from mixformer.connectors.glu import GLUAdapterConfig
from models.cogagent import CogAgent
from models.cogvlm import CogVLM, CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.llama import LLaMA

ROOT = Path(__file__).parents[1]
COGVLM2: dict[str, Any] = {
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "inner_hidden_size": 14336,
    "rope_base": 500000.0,
    "max_positions": 8192,
    "vision": EVA2CLIPEConfig(image_size=1344),
    "expert_qkv_bias": True,
}


@pytest.mark.parametrize(
    ("build", "total"),
    [
        (lambda: LLaMA(device="meta"), 6_738_415_616),
        (lambda: CogVLM(device="meta"), 17_637_948_928),
        (lambda: CogVLM(CogVLMConfig(vision=EVA2CLIPEConfig(image_size=490)), device="meta"), 17_639_685_376),
        (
            lambda: CogVLM(
                CogVLMConfig(**COGVLM2, adapter=GLUAdapterConfig(inner_hidden_size=14336, downsample=2)),
                device="meta",
            ),
            19_503_105_280,
        ),
        (lambda: CogAgent(device="meta"), 18_291_033_280),
    ],
    ids=["llama-7b", "cogvlm-224", "cogvlm-490", "cogvlm2", "cogagent"],
)
def test_the_full_size_has_the_published_number_of_parameters(build: Any, total: int) -> None:
    model: BaseModel = build()
    assert sum(p.numel() for p in model.parameters()) == total
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.num_layers == 32


def test_the_mixins_of_each_model_are_what_its_name_says() -> None:
    cogagent = CogAgent(device="meta")
    assert list(LLaMA(device="meta").mixins) == ["rotary", "head"]
    assert list(cogagent.mixins) == ["rotary", "head", "image", "vision_expert", "vision_expert_mlp", "cross"]
    assert [path for path, _ in cogagent.nested_models()] == ["image.tower", "cross.tower"]
    layers = dict(cogagent.nested_models())["cross.tower"].config
    assert (layers.num_layers, layers.layers_run) == (24, 23)


def test_flagships_become_one_another_by_adding_and_removing() -> None:
    from mixformer.mixins import CrossAttentionMixin
    from mixformer.testing import sample_row, tiny_model

    cogagent = tiny_model("cogagent")
    cross: Any = cogagent.get_mixin("cross")
    cogvlm = tiny_model("cogvlm", vision=cogagent.config.vision, adapter=cogagent.config.adapter)  # type: ignore[attr-defined]
    assert isinstance(cross, CrossAttentionMixin)
    cogvlm.add_mixin("cross", CrossAttentionMixin(**cross.options))
    cogvlm.load_state_dict(cogagent.state_dict())
    row = sample_row(cogagent, 1, 6)
    with torch.no_grad():
        assert torch.equal(cogvlm(**row), cogagent(**row))
    cogvlm.del_mixin("cross")
    for name in ("vision_expert_mlp", "vision_expert", "image"):
        cogvlm.del_mixin(name)
    language = tiny_model("llama", norm_cast="last")
    language.load_state_dict(cogvlm.state_dict())
    with torch.no_grad():
        assert torch.equal(cogvlm(row["input_ids"]), language(row["input_ids"]))


def written_lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.name)
def test_model_files_only_compose(path: Path) -> None:
    assert written_lines(path) <= 80


@pytest.mark.parametrize(
    "path", sorted((ROOT / "mixformer" / "mixins").glob("*.py")), ids=lambda path: path.name
)
def test_mixin_files_are_one_behaviour_each(path: Path) -> None:
    assert written_lines(path) <= 140
