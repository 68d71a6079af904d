"""What recipes start from: compositions of a language model, towers and new parts, made from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from examples.start_recipes import main
from mixformer import BaseModel, from_pretrained, load_processor, save_pretrained
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.testing import jitter
from mixformer.tokenizer import load_tokenizer
from models.eva2_clip import EVA2CLIPE, EVA2CLIPL, EVA2CLIPEConfig, EVA2CLIPLConfig
from models.llama import LLaMA, LLaMAConfig

TOKENIZER = Path(__file__).parents[1] / "examples" / "zoo" / "shapes"
TOWER = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "inner_hidden_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of a language model and of two towers, in bf16, and all that is made of them."""
    root = tmp_path_factory.mktemp("start")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40}
    language = LLaMA(LLaMAConfig(vocab_size=119, max_positions=256, norm_eps=1e-5, **sizes))
    tower_e = EVA2CLIPE(EVA2CLIPEConfig(image_size=28, patch_size=14, **TOWER))
    tower_l = EVA2CLIPL(EVA2CLIPLConfig(image_size=56, patch_size=14, stored_head_size=8, num_layers_run=1, **TOWER))
    config = ProcessorConfig("llama", bos_id=1, eos_id=2, pad_id=3, placeholder_id=5)
    processor = Processor(config, load_tokenizer(TOKENIZER))
    parts: list[tuple[str, BaseModel, Any]] = [
        ("language", language, processor), ("e", tower_e, None), ("l", tower_l, None)
    ]
    for name, model, kept in parts:
        jitter(model)
        save_pretrained(model.bfloat16(), root / name, processor=kept)
    main(["cogvlm", str(root / "language"), str(root / "e"), str(root / "cogvlm")])
    main(["resize", str(root / "cogvlm"), "56", str(root / "larger")])
    main(["cogagent", str(root / "cogvlm"), str(root / "l"), str(root / "cogagent")])
    return root


def read(path: Path) -> Any:
    return from_pretrained(path, dtype="float32").eval()


def batch_of(path: Path, question: str = "what colour", size: int = 60) -> dict[str, torch.Tensor]:
    picture = Image.effect_noise((size, size), 80).convert("RGB")
    batch: dict[str, torch.Tensor] = load_processor(path)(question, picture)
    return batch


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvlm", "larger", "cogagent"])
def test_text_alone_is_answered_as_by_the_language_model_bit_for_bit(folder: Path, name: str) -> None:
    ids = torch.tensor([[1, 7, 30, 12, 99]])
    assert torch.equal(read(folder / name)(ids), read(folder / "language")(ids))


def test_every_weight_is_that_of_a_part_and_experts_start_as_the_language_layers(folder: Path) -> None:
    found, language, tower = (read(folder / name).state_dict() for name in ("cogvlm", "language", "e"))
    parts = ("mixins.image.projector.", "mixins.image.boi", "mixins.image.eoi")
    new = {name for name in found if name.startswith(parts)}
    for name, value in found.items():
        if name in new:
            continue
        if name.startswith("mixins.image.tower."):
            expected = tower[name.removeprefix("mixins.image.tower.")]
        elif ".mixins.vision_expert" in name:
            own = name.replace("mixins.vision_expert_mlp.", "mlp.").replace("mixins.vision_expert.", "attention.")
            expected = language[own]
        else:
            expected = language[name]
        assert torch.equal(value, expected), name
    assert new and from_pretrained(folder / "cogvlm").dtype == torch.bfloat16


@torch.no_grad()
def test_new_cross_attention_adds_to_what_the_base_says_and_without_pictures_nothing(folder: Path) -> None:
    base, agent = read(folder / "cogvlm"), read(folder / "cogagent")
    batch = batch_of(folder / "cogagent")
    assert batch["images"].shape[-1] == 28 and batch["cross_images"].shape[-1] == 56
    known = {name: value for name, value in batch.items() if name in {"input_ids", *base.declared}}
    logits = agent(**known, cross_images=batch["cross_images"])
    assert logits.isfinite().all() and not torch.allclose(logits, base(**known), atol=1e-4)
    agent.del_mixin("cross")
    torch.testing.assert_close(agent(**known), base(**known), rtol=0, atol=1e-6)  # the new position table is zero
    assert agent.mixins["image"].projector.position_embedding.abs().sum() == 0


def test_a_larger_picture_has_more_places_with_positions_in_between(folder: Path) -> None:
    small, large = read(folder / "cogvlm"), read(folder / "larger")
    tables = [m.mixins["image"].tower.transformer.position_embeddings.weight.data for m in (small, large)]
    assert [len(table) for table in tables] == [1 + 2 * 2, 1 + 4 * 4]
    assert torch.equal(tables[1][0], tables[0][0])
    square = tables[0][1:].T.reshape(1, 16, 2, 2)
    expected = F.interpolate(square, scale_factor=2, mode="bicubic").reshape(16, 16).T
    torch.testing.assert_close(tables[1][1:], expected, rtol=0, atol=2**-7 * expected.abs().max().item())  # bf16
    batch = batch_of(folder / "larger")
    assert batch["images"].shape[-1] == 56 and int((batch["token_type_ids"] != 0).sum()) == 4 * 4 + 2
    with torch.no_grad():
        assert large(**{name: batch[name] for name in ("input_ids", *large.declared) if name in batch}).isfinite().all()


def test_a_folder_without_the_tower_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no EVA2CLIPE"):
        main(["cogvlm", str(folder / "language"), str(folder / "l"), str(folder / "never")])
    assert not (folder / "never").exists()


def test_a_tower_is_found_inside_of_a_model(folder: Path) -> None:
    main(["cogvlm", str(folder / "language"), str(folder / "cogagent"), str(folder / "again")])
    first, second = (read(folder / name).state_dict() for name in ("cogvlm", "again"))
    for name in first:
        if "tower" in name:
            assert torch.equal(first[name], second[name])


