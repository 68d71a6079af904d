"""Checkpoints come back as they were, and damaged or foreign ones are refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import yaml
from golden_cases import GOLDEN, HF_CASES, batch_of, constants, model_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixformer.checkpoint as checkpoint
from mixformer import BaseMixin, BaseModel, wrap
from mixformer.checkpoint import from_pretrained, recognise, save_pretrained, source_of
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.mixins import LMHeadMixin, LoRAMixin, PrefixTuningMixin
from mixformer.shards import INDEX, SafetensorsFolder, parse_size
from models.cogagent import CogAgentConfig
from models.cogvlm import CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.llama import LLaMA, LLaMAConfig
from models.weights import HF_FORMATS
from models.weights.rules import Rule

SMALL = LLaMAConfig(vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


class Doubling(BaseMixin):
    """A mixin outside the trusted packages."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    @wrap
    def final_forward(self, hidden_states: torch.Tensor, ctx: Any, old_impl: Any) -> torch.Tensor:
        return old_impl(hidden_states) * self.factor


@dataclass
class HalvedConfig(LLaMAConfig):
    """Options of Halved."""

    by: int = 2


class Halved(LLaMA):
    """A model outside the trusted packages."""

    Config = HalvedConfig
    config: HalvedConfig

    def compose(self) -> None:
        super().compose()
        self.add_mixin("scale", Doubling(1 / self.config.by))


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_same_model(actual: BaseModel, expected: BaseModel) -> None:
    assert type(actual) is type(expected) and actual.config == expected.config
    assert str(actual.hooks) == str(expected.hooks)
    assert_same_tensors(actual.state_dict(), expected.state_dict())
    assert list(actual.state_dict()) == list(expected.state_dict())


@pytest.fixture
def small() -> LLaMA:
    return LLaMA(SMALL, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def saved(small: LLaMA, tmp_path: Path) -> Path:
    save_pretrained(small, tmp_path / "saved")
    return tmp_path / "saved"


# ------------------------------------------------------------------------ HF files


@pytest.mark.parametrize("name", HF_CASES)
def test_hf_files_are_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    save_pretrained(model_of(name), tmp_path / "out", format="hf")
    assert_same_tensors(files_of(tmp_path / "out"), files_of(GOLDEN / name))
    folders = (tmp_path / "out", GOLDEN / name)
    written, original = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert written == original and list(written) == list(original)


@pytest.mark.parametrize("name", ["llama-hf", "cogagent-hf"])
def test_hf_files_survive_the_way_through_the_own_format(name: str, tmp_path: Path) -> None:
    save_pretrained(model_of(name), tmp_path / "own")
    again = from_pretrained(tmp_path / "own")
    assert_same_model(again, model_of(name))
    save_pretrained(again, tmp_path / "hf", format="hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert_same_tensors(files_of(tmp_path / "hf"), files_of(GOLDEN / name))
    assert_same_model(from_pretrained(tmp_path / "hf", overrides=constants(name)), model_of(name))


@pytest.mark.parametrize("name", ["eva2-clip-e", "eva2-clip-l"])
def test_towers_alone_are_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    save_pretrained(model_of(name), tmp_path / "out", format="hf")
    assert_same_tensors(files_of(tmp_path / "out"), files_of(GOLDEN / name))


@pytest.mark.parametrize("copies", [0, 25])
def test_cogagent_files_may_have_any_number_of_rope_tables(copies: int, tmp_path: Path) -> None:
    tensors, prefix = load_file(GOLDEN / "cogagent-hf" / "model.safetensors"), "model.cross_vision.vit.model."
    tables = {kind: tensors.pop(f"{prefix}rope.freqs_{kind}") for kind in ("cos", "sin")}
    if copies:
        homes = ["rope", *(f"blocks.{i}.attn.rope" for i in range(4))]
        tensors |= {f"{prefix}{home}.freqs_{kind}": table.clone() for home in homes for kind, table in tables.items()}
    shutil.copytree(GOLDEN / "cogagent-hf", tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    model = from_pretrained(tmp_path / "in", overrides=constants("cogagent-hf"))
    batch = batch_of("cogagent-hf", "a")
    assert torch.equal(model(**batch), model_of("cogagent-hf")(**batch))
    save_pretrained(model, tmp_path / "out", format="hf")
    assert_same_tensors(files_of(tmp_path / "out"), tensors)


def test_frequencies_that_a_file_lacks_are_computed_and_not_written_back(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "cogvlm-hf" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    model = from_pretrained(tmp_path / "in")
    expected = 10000.0 ** (-torch.arange(0, 12, 2) / 12)
    torch.testing.assert_close(model.get_mixin("rotary").inv_freq, expected)
    save_pretrained(model, tmp_path / "out", format="hf")
    assert_same_tensors(files_of(tmp_path / "out"), tensors)


def test_frequencies_that_differ_between_layers_are_an_error(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "cogvlm-hf" / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] += 1
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq' differs"):
        from_pretrained(tmp_path / "in")


def test_a_sat_checkpoint_can_be_written_as_hf(tmp_path: Path) -> None:
    model = model_of("cogagent-sat")
    save_pretrained(model, tmp_path / "out", format="hf")
    assert recognise(tmp_path / "out") == "hf-cogagent"
    names = set(files_of(tmp_path / "out"))
    assert names == {name for name in files_of(GOLDEN / "cogagent-hf") if "rope.freqs" not in name}
    again = from_pretrained(tmp_path / "out")
    batch = batch_of("cogagent-sat", "a")
    assert torch.equal(again(**batch), model(**batch))


def test_cross_tower_constants_follow_the_tables_shape_and_the_released_values() -> None:
    plain, told = from_pretrained(GOLDEN / "cogagent-hf"), model_of("cogagent-hf")
    assert plain.config == told.config


@pytest.mark.parametrize(
    "overrides",
    [{"blocks_run": 2}, {"cross_vision.num_layers_run": 2}, {"cross_vision": {"num_layers_run": 2}},
     {"cross_tower": {"blocks_run": 2}}, {"cross_vision": {"blocks_run": 2}}],
)
def test_overrides_may_be_spelled_as_paths_or_as_the_reference_does(overrides: dict[str, Any]) -> None:
    assert from_pretrained(GOLDEN / "cogagent-hf", overrides=overrides).config.cross_vision.num_layers_run == 2


def test_an_unknown_override_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'blocks_run'"):
        from_pretrained(GOLDEN / "cogagent-hf", overrides={"block_run": 2})


def test_dtype_is_converted_on_the_way_and_kept_without_one(tmp_path: Path) -> None:
    low = from_pretrained(GOLDEN / "cogvlm-hf", dtype="bfloat16")
    assert {tensor.dtype for tensor in low.state_dict().values()} == {torch.bfloat16}
    for (name, tensor), full in zip(low.state_dict().items(), model_of("cogvlm-hf").state_dict().values(), strict=True):
        assert torch.equal(tensor, full.bfloat16()), name
    save_pretrained(low, tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_tensors(from_pretrained(tmp_path / "hf").state_dict(), low.state_dict())


def test_tied_llama_is_read_and_written(tmp_path: Path) -> None:
    config = deepcopy(SMALL)
    config.tied_head = True
    model = LLaMA(config, generator=torch.Generator().manual_seed(1)).eval()
    save_pretrained(model, tmp_path / "hf", format="hf")
    assert_same_model(from_pretrained(tmp_path / "hf"), model)


def test_a_model_changed_in_sizes_that_hf_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = deepcopy(SMALL)
    config.embedding_scale = 2.0
    with pytest.raises(ValueError, match="embedding_scale"):
        save_pretrained(LLaMA(config), tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


def test_added_mixins_are_refused_by_the_hf_format(small: LLaMA, tmp_path: Path) -> None:
    small.add_mixin("lora", LoRAMixin(["qkv"]))
    with pytest.raises(ValueError, match=r"differs in: lora.*format='own'"):
        save_pretrained(small, tmp_path / "hf", format="hf")


@pytest.mark.parametrize(
    "rule",
    [
        Rule("own", ("a", "b", "c"), rows=(4, 2, 2)),
        Rule("own", ("a",), leading=2),
        Rule("own", ("a", "b"), copies=True),
        Rule("own", ("a",)),
    ],
)
def test_rules_are_their_own_inverse(rule: Rule) -> None:
    tensor = torch.arange(24.0).view(8, 3)
    foreign = rule.to_foreign(tensor)
    assert tuple(foreign) == rule.foreign
    assert rule.shape([tuple(part.shape) for part in foreign.values()]) == (8, 3)
    assert torch.equal(rule.to_own(list(foreign.values())), tensor)


def test_old_and_new_sat_llama_dialects_are_read_alike(small: LLaMA, tmp_path: Path) -> None:
    names = {
        "transformer.word_embeddings.weight": "transformer.word_embeddings.weight",
        "transformer.final_norm.weight": "transformer.final_layernorm.weight",
        "mixins.head.linear.weight": "mixins.lm.lm_head.weight",
    }
    parts = {
        "attention_norm.weight": "input_layernorm.weight",
        "attention.qkv.weight": "attention.query_key_value.weight",
        "attention.dense.weight": "attention.dense.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.up.weight": "mlp.dense_h_to_4h.weight",
        "mlp.down.weight": "mlp.dense_4h_to_h.weight",
    }
    for i in range(2):
        names |= {f"transformer.layers.{i}.{own}": f"transformer.layers.{i}.{sat}" for own, sat in parts.items()}
    config = {
        "model_class": "LLaMAModel", "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20,
        "inner_hidden_size": 24, "max_sequence_length": 4096, "use_bias": False,
    }
    state, read = small.state_dict(), []
    for dialect in ("old", "new"):
        module = {sat: state[own] for own, sat in names.items()}
        for i in range(2):
            gate = state[f"transformer.layers.{i}.mlp.gate.weight"]
            old, new = f"mixins.mlp.gate_proj.{i}.weight", f"transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight"
            module[old if dialect == "old" else new] = gate
        rotary = "mixins.rotary.rotary_emb.inv_freq" if dialect == "old" else "transformer.position_embeddings.inv_freq"
        module[rotary] = torch.ones(4)
        folder = tmp_path / dialect
        (folder / "release").mkdir(parents=True)
        (folder / "latest").write_text("release\n")
        torch.save({"module": module}, folder / "release" / "mp_rank_00_model_states.pt")
        (folder / "model_config.json").write_text(json.dumps(config))
        read.append(from_pretrained(folder))
    for model in read:
        assert_same_model(model, small)


# ------------------------------------------------------------------------ the own format


def test_a_changed_composition_comes_back_the_same(tmp_path: Path) -> None:
    model = deepcopy(model_of("cogagent-hf"))
    model.del_mixin("vision_expert_mlp")
    model.replace_mixin("head", LMHeadMixin(bias=True))
    model.add_mixin("prefix", PrefixTuningMixin(3), layers=[1])
    lora = LoRAMixin(["qkv:q", "cross.query", "head"], rank=2)
    model.add_mixin("lora", lora)
    model.add_mixin("image.tower/lora", LoRAMixin(["qkv", "up"], rank=3), layers=[0])
    for parameter in model.parameters():
        parameter.data += 0.01
    save_pretrained(model, tmp_path / "saved", max_shard_size="200KB")
    again = from_pretrained(tmp_path / "saved")
    assert_same_model(again, model)
    assert again.scopes == model.scopes
    tower = again.get_mixin("image").tower
    assert tower.scopes["lora"] == [0] and list(tower.mixins) == ["patches", "lora"]
    batch = batch_of("cogagent-hf", "a")
    assert torch.equal(again(**batch), model(**batch))


def test_a_merged_lora_is_saved_unmerged_and_stays_merged(small: LLaMA, tmp_path: Path) -> None:
    plain = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    lora = LoRAMixin(["qkv"])
    small.add_mixin("lora", lora)
    for layer in small.transformer.layers:
        for parameter in layer.mixins["lora"].parameters():
            parameter.data += 0.1
    lora.merge(small)
    merged = small.transformer.layers[0].attention.qkv.weight.clone()
    save_pretrained(small, tmp_path / "saved")
    assert lora.merged and torch.equal(small.transformer.layers[0].attention.qkv.weight, merged)
    stored = files_of(tmp_path / "saved")
    for name, tensor in plain.items():
        assert torch.equal(stored[name], tensor), name


def test_classes_elsewhere_must_be_given_or_trusted(small: LLaMA, tmp_path: Path) -> None:
    small.add_mixin("doubling", Doubling(3.0))
    save_pretrained(small, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"test_checkpoint\.Doubling.*outside the trusted.*mixins=\{'doubling'"):
        from_pretrained(tmp_path / "saved")
    for again in (
        from_pretrained(tmp_path / "saved", mixins={"doubling": Doubling}),
        from_pretrained(tmp_path / "saved", mixins={"Doubling": Doubling}),
        from_pretrained(tmp_path / "saved", trust=True),
    ):
        assert again.get_mixin("doubling").factor == 3.0
        assert torch.equal(again(IDS), small(IDS))


def test_a_model_class_elsewhere_is_given_like_a_mixin(tmp_path: Path) -> None:
    model = Halved(HalvedConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24, by=4))
    save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"test_checkpoint\.Halved'.*trusted"):
        from_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", mixins={"Halved": Halved, "Doubling": Doubling})
    assert_same_model(again, model)
    assert again.get_mixin("scale").factor == 0.25


def test_classes_of_functions_are_refused_with_the_remedy(small: LLaMA, tmp_path: Path) -> None:
    class Local(BaseMixin):
        pass

    small.add_mixin("local", Local())
    with pytest.raises(ValueError, match=r"Local is defined in a function.*my_mixins\.py"):
        save_pretrained(small, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["os.system", "mixformer.checkpoint.os.system", "mixformer.model.BaseModel", "nowhere"]
)
def test_class_paths_that_are_no_mixins_are_refused(saved: Path, path: str) -> None:
    content = yaml.safe_load((saved / "config.yaml").read_text())
    content["mixins"]["rotary"]["class_path"] = path
    (saved / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"outside the trusted|is refused|names no class path"):
        from_pretrained(saved)


def test_options_that_a_mixin_does_not_take_are_named(saved: Path) -> None:
    content = yaml.safe_load((saved / "config.yaml").read_text())
    content["mixins"]["rotary"]["init_args"]["basis"] = 1
    (saved / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"'rotary'.*basis"):
        from_pretrained(saved)


def test_loading_leaves_random_state_alone_and_no_tensor_without_memory(saved: Path) -> None:
    before = torch.get_rng_state()
    model = from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training and model.device == torch.device("cpu")
    model.add_mixin("lora", LoRAMixin(["qkv"]))
    assert not any(tensor.is_meta for tensor in model.parameters())


@pytest.mark.parametrize("name", ["cogagent-hf", "cogagent-sat"])
def test_on_the_meta_device_files_are_checked_and_not_read(name: str) -> None:
    model = from_pretrained(GOLDEN / name, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {key: tensor.shape for key, tensor in model_of(name).state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_frozen_parameters_come_back_frozen() -> None:
    stored = model_of("cogagent-hf").get_mixin("cross").tower.get_mixin("stored")
    assert not any(parameter.requires_grad for parameter in stored.parameters())


def test_tied_parameters_come_back_tied(small: LLaMA, tmp_path: Path) -> None:
    small.get_mixin("head").linear.weight = small.transformer.word_embeddings.weight
    save_pretrained(small, tmp_path / "saved")
    stored = files_of(tmp_path / "saved")
    assert len(stored) == len(list(small.parameters()))
    again = from_pretrained(tmp_path / "saved")
    assert again.get_mixin("head").linear.weight is again.transformer.word_embeddings.weight
    assert torch.equal(again(IDS), small(IDS))


def test_harmless_options_can_be_overridden_and_mixins_cannot(saved: Path) -> None:
    assert from_pretrained(saved, overrides={"checkpoint_activations": True}).config.checkpoint_activations
    with pytest.raises(ValueError, match="replace_mixin"):
        from_pretrained(saved, overrides={"rope_base": 5.0})
    with pytest.raises(ValueError, match="no option 'rope_basis'"):
        from_pretrained(saved, overrides={"rope_basis": 5.0})


def test_processor_files_lie_beside_the_weights(small: LLaMA, tmp_path: Path) -> None:
    class Words:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.model").write_text("words")

    save_pretrained(small, tmp_path / "saved", processor=Words())
    assert (tmp_path / "saved" / "tokenizer.model").read_text() == "words"


# ------------------------------------------------------------------------ writing safely


def test_a_checkpoint_is_replaced_and_other_files_in_it_stay(small: LLaMA, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "logs").mkdir()
    small.transformer.final_norm.weight.data += 1
    save_pretrained(small, saved)
    assert_same_model(from_pretrained(saved), small)
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "logs").is_dir()
    assert [item.name for item in saved.parent.iterdir()] == ["saved"]


def test_a_failed_save_changes_nothing(small: LLaMA, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(small, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [item.name for item in saved.parent.iterdir()] == ["saved"]


def test_weights_can_be_read_by_whoever_can_read_the_config(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("format", ["own", "hf"])
def test_a_folder_of_something_else_is_not_overwritten(small: LLaMA, tmp_path: Path, format: str) -> None:
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(ValueError, match="left as it is"):
        save_pretrained(small, tmp_path, format=format)
    downloaded = tmp_path / "downloaded"
    shutil.copytree(GOLDEN / "llama-hf", downloaded)
    with pytest.raises(ValueError, match="left as it is"):
        save_pretrained(small, downloaded, format=format)
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(small, tmp_path / "thesis.txt", format=format)
    assert (tmp_path / "thesis.txt").read_text() == "chapter one"


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(LLaMA(SMALL, device="meta"), tmp_path / "saved")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2MiB", 2 * 2**20), ("17", 17), (9, 9)])
def test_shard_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


# ------------------------------------------------------------------------ bad input


def test_every_flipped_bit_of_a_shard_is_found(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in (0, 9, 60, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors.*(damaged|truncated)"):
            from_pretrained(saved)
    path.write_bytes(content)
    from_pretrained(saved)


@pytest.mark.parametrize("length", [0, 5, 200, 5000])
@pytest.mark.parametrize("name", ["own", "hf"])
def test_a_truncated_file_is_found(saved: Path, small: LLaMA, tmp_path: Path, name: str, length: int) -> None:
    folder = saved
    if name == "hf":
        folder = tmp_path / "hf"
        save_pretrained(small, folder, format="hf")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        from_pretrained(folder)


def test_a_damaged_header_is_found(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "hf", format="hf")
    path = tmp_path / "hf" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20] = 0
    path.write_bytes(content)
    with pytest.raises(ValueError, match="header is damaged"):
        from_pretrained(tmp_path / "hf")


def test_a_pointer_of_git_lfs_is_named(saved: Path) -> None:
    (saved / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        from_pretrained(saved)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    shutil.copytree(GOLDEN / "cogvlm2-hf", folder)
    return folder


def edit_index(folder: Path, edit: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        from_pretrained(shards)


def test_an_index_that_lists_absent_tensors_is_refused(shards: Path) -> None:
    edit_index(shards, lambda names: names.update({"model.ghost.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"lists 1 tensor.*model\.ghost\.weight"):
        from_pretrained(shards)


def test_an_index_that_leaves_tensors_out_is_refused(shards: Path) -> None:
    edit_index(shards, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 tensor.*does not list.*model\.norm\.weight"):
        from_pretrained(shards)


def test_an_index_may_not_point_outside_its_folder(shards: Path) -> None:
    edit_index(shards, lambda names: names.update({"model.norm.weight": "../elsewhere.safetensors"}))
    with pytest.raises(ValueError, match="outside its folder"):
        from_pretrained(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    second = shards / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    with safe_open(shards / "model-00001-of-00002.safetensors", "pt") as file:
        tensors["model.embed_tokens.weight"] = file.get_tensor("model.embed_tokens.weight")
    save_file(tensors, second)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is in two files"):
        from_pretrained(shards)


def test_missing_unexpected_and_misshaped_tensors_are_told_together_by_mixin(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(GOLDEN / "cogvlm-hf", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.vision_mlp.gate_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit CogVLM") as error:
        from_pretrained(folder)
    text = str(error.value)
    assert "1 missing, mixin 'vision_expert_mlp' (VisionExpertFCMixin)" in text
    assert "model.layers.1.mlp.vision_mlp.gate_proj.weight" in text
    assert "1 unexpected" in text and "model.layers.0.self_attn.q_norm.weight" in text
    assert "1 of another shape, mixin 'head' (LMHeadMixin)" in text
    assert "the model has [400, 36], the file lm_head.weight [399, 36]" in text


def test_weights_of_another_composition_are_told_by_mixin(small: LLaMA, saved: Path, tmp_path: Path) -> None:
    small.add_mixin("lora", LoRAMixin(["qkv"]))
    save_pretrained(small, tmp_path / "lora")
    shutil.copy(saved / "config.yaml", tmp_path / "lora" / "config.yaml")
    with pytest.raises(ValueError, match=r"4 unexpected, mixin 'lora'"):
        from_pretrained(tmp_path / "lora")


def test_folders_that_are_no_checkpoint_say_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(ValueError, match=r"is no checkpoint.*holiday\.jpg"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        from_pretrained(tmp_path / "holiday.jpg")
    (tmp_path / "config.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    with pytest.raises(ValueError, match=r"FalconForCausalLM.*hf-cogagent.*hf-llama"):
        recognise(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        recognise(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match="not the config of a checkpoint"):
        from_pretrained(tmp_path)


def test_a_config_that_lacks_a_key_names_it(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama-hf", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["intermediate_size"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json lacks the key 'intermediate_size'"):
        from_pretrained(tmp_path / "in")


def test_unknown_scaling_of_rotary_positions_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama-hf", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "longrope", "factor": 8.0}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="scaled in a way \\('longrope'\\)"):
        from_pretrained(tmp_path / "in")


def test_weights_that_are_a_pickle_only_say_how_to_convert(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "llama-hf" / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        from_pretrained(tmp_path)


# ------------------------------------------------------------------------ SAT folders


@pytest.fixture
def sat(tmp_path: Path) -> Path:
    folder = tmp_path / "sat"
    shutil.copytree(GOLDEN / "cogvlm-sat-mp2", folder)
    return folder


def rank(folder: Path, number: int) -> Path:
    return folder / "1" / f"mp_rank_{number:02d}_model_states.pt"


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("payload-ran",)


def test_a_pickle_with_code_is_refused_and_not_run(
    sat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = torch.load(rank(sat, 0), weights_only=True)["module"]
    torch.save({"module": module, "client_state": Payload()}, rank(sat, 0))
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt is refused.*mkdir"):
        from_pretrained(sat)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("length", [0, 100, 20000])
def test_a_truncated_pickle_is_found(sat: Path, length: int) -> None:
    rank(sat, 1).write_bytes(rank(sat, 1).read_bytes()[:length])
    with pytest.raises(ValueError, match=r"mp_rank_01_model_states\.pt is (truncated|damaged)"):
        from_pretrained(sat)


def test_a_missing_rank_or_iteration_is_named(sat: Path) -> None:
    rank(sat, 0).rename(sat / "1" / "kept")
    with pytest.raises(ValueError, match=r"lacks mp_rank_00_model_states\.pt of 2 ranks"):
        from_pretrained(sat)
    (sat / "latest").write_text("7")
    with pytest.raises(ValueError, match="names '7'"):
        from_pretrained(sat)
    (sat / "latest").unlink()
    with pytest.raises(ValueError, match="no file 'latest'"):
        from_pretrained(sat)
    with pytest.raises(ValueError, match="one iteration of a SAT checkpoint"):
        from_pretrained(sat / "1")


def test_replicated_tensors_that_differ_between_ranks_are_an_error(sat: Path) -> None:
    content = torch.load(rank(sat, 1), weights_only=True)
    content["module"]["transformer.final_layernorm.weight"] += 1
    torch.save(content, rank(sat, 1))
    with pytest.raises(ValueError, match=r"'transformer\.final_layernorm\.weight' should be the same on every rank"):
        from_pretrained(sat)


def test_unmerged_lora_of_sat_is_named(sat: Path) -> None:
    for number in range(2):
        content = torch.load(rank(sat, number), weights_only=True)
        name = "transformer.layers.0.attention.dense"
        content["module"][f"{name}.original.weight"] = content["module"].pop(f"{name}.weight")
        content["module"][f"{name}.matrix_A.0"] = torch.zeros(2, 32)
        torch.save(content, rank(sat, number))
    with pytest.raises(ValueError, match=r"un-merged SAT LoRA.*merge_lora"):
        from_pretrained(sat)


# ------------------------------------------------------------------------ odds


def test_a_mixin_with_tensors_that_no_file_holds_is_built_for_real(small: LLaMA, tmp_path: Path) -> None:
    small.add_mixin("scaling", Scaling())
    save_pretrained(small, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", mixins={"scaling": Scaling})
    assert torch.equal(again.get_mixin("scaling").scale, torch.tensor([2.0]))
    assert torch.equal(again(IDS), small(IDS))


class Scaling(BaseMixin):
    """Holds a buffer that is not saved."""

    def build(self, model: Any) -> None:
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    @wrap
    def final_forward(self, hidden_states: torch.Tensor, ctx: Any, old_impl: Any) -> torch.Tensor:
        return old_impl(hidden_states) * self.scale


def test_a_copied_model_keeps_what_its_file_carried(tmp_path: Path) -> None:
    model = deepcopy(model_of("llama-hf"))
    assert isinstance(model, nn.Module) and source_of(model) is not None
    save_pretrained(model, tmp_path / "out", format="hf")
    assert_same_tensors(files_of(tmp_path / "out"), files_of(GOLDEN / "llama-hf"))


def test_shards_are_hashed_unless_asked_not_to(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    SafetensorsFolder(saved, verify=False).close()
    with pytest.raises(ValueError, match="SHA-256"):
        SafetensorsFolder(saved)


COGVLM2 = CogVLMConfig(
    vocab_size=128256, num_kv_heads=8, inner_hidden_size=14336, rope_base=500000.0, expert_qkv_bias=True,
    vision=EVA2CLIPEConfig(image_size=1344), adapter=GLUAdapterConfig(downsample=2),
)


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_bytes"),
    [
        (LLaMAConfig(), 291, 2 * 6_738_415_616),
        (CogVLMConfig(), 1155 + 32, 35_275_901_952),
        (CogVLMConfig(vision=EVA2CLIPEConfig(image_size=490)), 1155 + 32, 35_279_374_848),
        (COGVLM2, 1221, 39_006_214_656),  # as the released index says
        (CogAgentConfig(), 1797 + 32, 36_582_070_656),
    ],
    ids=["llama-7b", "cogvlm-224", "cogvlm-490", "cogvlm2", "cogagent"],
)
def test_full_size_tables_have_as_many_tensors_and_bytes_as_released(
    config: LLaMAConfig, num_tensors: int, num_bytes: int
) -> None:
    model = config.build(device="meta")
    found = next(found for found in HF_FORMATS if found.model is type(model))
    state = model.state_dict()
    tensors = {}
    for rule in found.rules(config):
        tensors.update(rule.to_foreign(state.pop(rule.own)))
    assert not state
    assert len(tensors) == num_tensors
    assert 2 * sum(tensor.numel() for tensor in tensors.values()) == num_bytes


def test_tensors_of_every_kind_are_read_as_they_were_written_and_kept_apart_from_the_file(tmp_path: Path) -> None:
    written = {
        "wide": torch.randn(3, 4, dtype=torch.float64), "half": torch.randn(2, 5).bfloat16(),
        "number": torch.tensor(3.5), "none": torch.zeros(0, 4), "flags": torch.tensor([True, False]),
        "ids": torch.arange(5), "eighths": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(written, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    for name, expected in written.items():
        for _ in range(2):  # what is read may be changed
            found = source.read(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
            found.zero_()
    source.close()


def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(300, 4)}, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(ValueError, match="ended while 'weight' was read"):
        source.read("weight")
    source.close()
