"""Checkpoints go from one format to another and back without a bit of difference, or not at all."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import time
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from golden_cases import GOLDEN, HF_CASES, SAT_CASES, batch_of, constants, model_of
from safetensors.torch import load_file, save_file

import mixformer.conversion.run as converting
from mixformer import BaseModel, from_pretrained, load_processor, save_pretrained
from mixformer.checkpoint import recognise
from mixformer.cli import console
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.contents import foreign_contents, own_contents
from mixformer.conversion import convert
from mixformer.mixins import LoRAMixin, PrefixTuningMixin
from mixformer.shard_writer import write_shards
from mixformer.shards import INDEX, SafetensorsFolder
from mixformer.testing import jitter
from models.cogvlm import CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.gpt2 import GPT2, GPT2Config
from models.llama import LLaMA, LLaMAConfig
from models.weights import HF_FORMATS

SMALL = LLaMAConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, inner_hidden_size=24, rope_base=500000.0
)
IDS = torch.tensor([[3, 1, 4, 1, 5]])
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    """What lies in the safetensors files of a folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(path))
    return found


def ranks_of(folder: Path) -> list[Tensors]:
    """What lies in the files of a SAT folder, as torch reads them."""
    home = folder / (folder / "latest").read_text().strip()
    return [torch.load(path, weights_only=False)["module"] for path in sorted(home.glob("*.pt"))]


def files_of(folder: Path) -> list[Tensors]:
    return ranks_of(folder) if (folder / "latest").is_file() else [tensors_of(folder)]


def config_of(folder: Path) -> dict[str, Any]:
    name = "model_config.json" if (folder / "latest").is_file() else "config.json"
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def assert_same(actual: list[Tensors], expected: list[Tensors]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
            assert torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (ours[name], tensor))), name


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small(**changes: Any) -> LLaMA:
    model = LLaMAConfig(**{**vars(SMALL), **changes}).build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    return model


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small LLaMA in HF's format, in several shards."""
    save_pretrained(small(), tmp_path / "hf", format="hf", max_shard_size="4KB")
    assert len(list((tmp_path / "hf").glob("model-*"))) > 2
    return tmp_path / "hf"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a conversion goes; the folder around it is to hold nothing else afterwards."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "target"


# ------------------------------------------------------------------------ released formats, there and back


@pytest.mark.parametrize("case", HF_CASES + SAT_CASES)
def test_golden_folders_go_to_the_other_format_and_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    there, back = ("sat", "hf") if case in HF_CASES else ("hf", "sat")
    report = convert(GOLDEN / case, tmp_path / "there", there, overrides=constants(case), verify=True)
    assert report.verified and report.target_format == recognise(tmp_path / "there")
    batch = batch_of(case, "a")
    assert torch.equal(from_pretrained(tmp_path / "there")(**batch), model_of(case)(**batch))
    convert(tmp_path / "there", tmp_path / "back", back, parts=len(files_of(GOLDEN / case)), verify=True)
    assert_same(files_of(tmp_path / "back"), files_of(GOLDEN / case))
    assert list(config_of(tmp_path / "back").items()) == list(config_of(GOLDEN / case).items())


@pytest.mark.parametrize("family", ["cogvlm", "cogagent"])
def test_names_are_those_that_the_released_code_asks_for(family: str, tmp_path: Path) -> None:
    convert(GOLDEN / f"{family}-hf", tmp_path / "sat", "sat", overrides=constants(f"{family}-hf"))
    assert sorted(ranks_of(tmp_path / "sat")[0]) == sorted(ranks_of(GOLDEN / f"{family}-sat")[0])
    made, released = config_of(tmp_path / "sat"), config_of(GOLDEN / f"{family}-sat")
    assert set(released) - {"use_neft_noise"} <= set(made) <= {*released, "mixformer", "mixformer_source"}
    assert set(made["eva_args"]) == set(released["eva_args"])
    convert(GOLDEN / f"{family}-sat", tmp_path / "hf", "hf", overrides=constants(f"{family}-sat"))
    names = set(tensors_of(GOLDEN / f"{family}-hf")) ^ set(tensors_of(tmp_path / "hf"))
    assert not [name for name in names if "inv_freq" not in name]


def test_tensors_of_several_dtypes_keep_them(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    kinds = {name: tensor.to(torch.float32 if "norm" in name else torch.bfloat16) for name, tensor in tensors.items()}
    kinds["model.vision.boi"] = kinds["model.vision.boi"].half()
    save_file(kinds, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "own", "own", max_shard_size="50KB", verify=True)
    convert(tmp_path / "own", tmp_path / "sat", "sat", verify=True)
    convert(tmp_path / "sat", tmp_path / "back", "hf", verify=True)
    assert_same([tensors_of(tmp_path / "back")], [kinds])
    model = from_pretrained(tmp_path / "hf", "float32")
    save_pretrained(model, tmp_path / "saved", "hf")
    convert(tmp_path / "sat", tmp_path / "wide", "hf", dtype="float32")
    assert_same([tensors_of(tmp_path / "wide")], [tensors_of(tmp_path / "saved")])


@pytest.mark.parametrize("case", ["cogvlm-sat-mp2", "cogagent-sat", "cogagent-hf"])
def test_golden_folders_go_through_the_own_format_in_any_order(case: str, tmp_path: Path) -> None:
    there, back = ("sat", "hf") if case in HF_CASES else ("hf", "sat")
    convert(GOLDEN / case, tmp_path / "own", "own", overrides=constants(case), verify=True)
    batch = batch_of(case, "a")
    assert torch.equal(from_pretrained(tmp_path / "own")(**batch), model_of(case)(**batch))
    convert(tmp_path / "own", tmp_path / "there", there)
    convert(tmp_path / "there", tmp_path / "again", "own", max_shard_size="100KB")
    convert(tmp_path / "again", tmp_path / "back", back, parts=len(files_of(GOLDEN / case)), verify=True)
    assert_same(files_of(tmp_path / "back"), files_of(GOLDEN / case))
    assert config_of(tmp_path / "back") == config_of(GOLDEN / case)


@pytest.mark.parametrize("format", ["own", "hf"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("case", ["llama-hf", "cogagent-hf", "cogvlm2-hf"])
def test_a_conversion_writes_what_loading_and_saving_writes(
    case: str, dtype: str | None, format: str, tmp_path: Path
) -> None:
    model = from_pretrained(GOLDEN / case, dtype, overrides=constants(case))
    save_pretrained(model, tmp_path / "saved", format, max_shard_size="100KB")
    convert(GOLDEN / case, tmp_path / "out", format, dtype=dtype, max_shard_size="100KB", overrides=constants(case))
    (tmp_path / "out" / "README.md").unlink()
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "saved")


def test_the_released_names_and_sizes_of_cogvlm2_are_written(tmp_path: Path) -> None:
    config = CogVLMConfig(
        vocab_size=128256, num_kv_heads=8, inner_hidden_size=14336, rope_base=500000.0, expert_qkv_bias=True,
        vision=EVA2CLIPEConfig(image_size=1344), adapter=GLUAdapterConfig(downsample=2),
    )
    model = config.build(device="meta", dtype=torch.bfloat16)
    contents = foreign_contents(model, HF_FORMATS, "HF")
    language, tower = "model.layers.{i}.", "model.vision.transformer.layers.{i}."
    released = {
        32: [
            f"{language}{name}.weight" for name in (
                "input_layernorm", "post_attention_layernorm", "self_attn.language_expert_query_key_value",
                "self_attn.language_expert_dense", "self_attn.vision_expert_query_key_value",
                "self_attn.vision_expert_dense", "mlp.language_mlp.gate_proj", "mlp.language_mlp.up_proj",
                "mlp.language_mlp.down_proj", "mlp.vision_mlp.gate_proj", "mlp.vision_mlp.up_proj",
                "mlp.vision_mlp.down_proj",
            )
        ] + [f"{language}self_attn.{name}" for name in (
            "rotary_emb.inv_freq", "vision_expert_query_key_value.bias"
        )],
        63: [
            f"{tower}{name}.{kind}" for kind in ("weight", "bias") for name in (
                "input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
                "mlp.fc1", "mlp.fc2",
            )
        ],
        1: [
            "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.vision.boi", "model.vision.eoi",
            *(f"model.vision.patch_embedding.{name}" for name in (
                "cls_embedding", "proj.weight", "proj.bias", "position_embedding.weight"
            )),
            *(f"model.vision.linear_proj.{name}" for name in (
                "linear_proj.weight", "norm1.weight", "norm1.bias", "dense_h_to_4h.weight", "gate_proj.weight",
                "dense_4h_to_h.weight",
            )),
            "model.vision.conv.weight", "model.vision.conv.bias",
        ],
    }
    names = [name.format(i=i) for count, patterns in released.items() for name in patterns for i in range(count)]
    assert len(names) == 1221 and sorted(contents.parts) == sorted(names)
    folder = tmp_path / "sparse"  # as large as the release, of holes
    folder.mkdir()
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    own_contents(model).write_config(folder)
    report = convert(folder, tmp_path / "out", "hf", dry_run=True)
    assert (report.tensors, report.bytes) == (1221, 39_006_214_656)  # as the released index says
    assert len(report.files) == 8 and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ SAT's files


@pytest.mark.parametrize("case", ["cogvlm-sat-mp2", "cogagent-sat"])
def test_sat_files_are_plain_archives_that_torch_maps_and_loads_safely(case: str, tmp_path: Path) -> None:
    parts = len(ranks_of(GOLDEN / case))
    convert(GOLDEN / case, tmp_path / "sat", "sat", parts=parts, overrides=constants(case))
    paths = sorted((tmp_path / "sat" / (GOLDEN / case / "latest").read_text().strip()).glob("*"))
    assert [path.name for path in paths] == [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(parts)]
    for path, expected in zip(paths, ranks_of(GOLDEN / case), strict=True):
        for mapped in (True, False):
            content = torch.load(path, weights_only=True, mmap=mapped)
            assert list(content) == ["module"]
            assert_same([content["module"]], [expected])
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        reader = torch._C.PyTorchFileReader(str(path))
        assert all(reader.get_record_offset(name) % 64 == 0 for name in reader.get_all_records())
        tables = [name for name in content["module"] if "rope.freqs_cos" in name]
        assert len({content["module"][name].untyped_storage().data_ptr() for name in tables}) == bool(tables)


def test_parts_are_merged_and_split_as_sat_splits_its_layers(tmp_path: Path) -> None:
    """The expected pieces follow sat/mpu/layers.py: every row block of a fused projection is divided by itself."""
    model = small(rope_base=10000.0, num_kv_heads=None)
    save_pretrained(model, tmp_path / "own")
    grouped = small()
    save_pretrained(grouped, tmp_path / "grouped")
    for name, source, kv in (("own", model, 16), ("grouped", grouped, 8)):
        convert(tmp_path / name, tmp_path / f"{name}-sat", "sat", parts=2, verify=True)
        state = source.state_dict()
        for rank, found in enumerate(ranks_of(tmp_path / f"{name}-sat")):
            qkv = state["transformer.layers.1.attention.qkv.weight"].split([16, kv, kv])
            expected = torch.cat([block.chunk(2)[rank] for block in qkv])
            assert torch.equal(found["transformer.layers.1.attention.query_key_value.weight"], expected)
            dense = state["transformer.layers.1.attention.dense.weight"].chunk(2, dim=1)[rank]
            assert torch.equal(found["transformer.layers.1.attention.dense.weight"], dense)
            gate = state["transformer.layers.0.mlp.gate.weight"].chunk(2)[rank]
            assert torch.equal(found["mixins.mlp.gate_proj.0.weight"], gate)
            words = state["transformer.word_embeddings.weight"]  # fewer than 1,000: whole on every rank
            assert torch.equal(found["transformer.word_embeddings.weight"], words)
            assert torch.equal(found["mixins.lm.lm_head.weight"], state["mixins.head.linear.weight"].chunk(2)[rank])
        assert config_of(tmp_path / f"{name}-sat")["model_parallel_size"] == 2
        convert(tmp_path / f"{name}-sat", tmp_path / f"{name}-back", "own")
        assert torch.equal(from_pretrained(tmp_path / f"{name}-back")(IDS), source(IDS))


def test_released_parts_are_what_merging_and_splitting_again_gives(tmp_path: Path) -> None:
    convert(GOLDEN / "cogvlm-sat-mp2", tmp_path / "one", "sat", parts=1)
    merged = ranks_of(tmp_path / "one")
    assert len(merged) == 1 and merged[0]["transformer.word_embeddings.weight"].shape == (1024, 32)
    convert(tmp_path / "one", tmp_path / "two", "sat", parts=2)
    assert_same(ranks_of(tmp_path / "two"), ranks_of(GOLDEN / "cogvlm-sat-mp2"))
    assert config_of(tmp_path / "two") == config_of(GOLDEN / "cogvlm-sat-mp2")


def test_frequencies_that_sat_asks_for_are_those_of_the_model(hf: Path, target: Path) -> None:
    convert(hf, target, "sat")
    expected = 500000.0 ** (-torch.arange(0, 4, 2) / 4)
    torch.testing.assert_close(ranks_of(target)[0]["mixins.rotary.rotary_emb.inv_freq"], expected)
    assert from_pretrained(target).config == SMALL


def test_rotary_tables_that_sat_asks_for_are_those_of_the_released_code(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "cogagent-hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    prefix = "model.cross_vision.vit.model.rope.freqs_"
    tables = {kind: tensors.pop(prefix + kind) for kind in ("cos", "sin")}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "sat", "sat", overrides=constants("cogagent-hf"))
    found = ranks_of(tmp_path / "sat")[0]
    for place in ("rope", *(f"blocks.{i}.attn.rope" for i in range(4))):
        for kind, table in tables.items():
            made = found[f"mixins.encoder.vit.model.{place}.freqs_{kind}"]
            torch.testing.assert_close(made, table, atol=1e-6, rtol=0)
    convert(tmp_path / "sat", tmp_path / "back", "hf")
    assert_same([tensors_of(tmp_path / "back")], [tensors])


@pytest.mark.parametrize(("parts", "message"), [(3, "num_attention_heads is 4"), (4, "num_multi_query_heads is 2")])
def test_heads_that_do_not_divide_are_refused(hf: Path, target: Path, parts: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}, which does not divide among {parts} ranks"):
        convert(hf, target, "sat", parts=parts)


def test_rows_that_do_not_divide_are_named(tmp_path: Path, target: Path) -> None:
    save_pretrained(small(inner_hidden_size=25), tmp_path / "own")
    with pytest.raises(ValueError, match=r"'transformer\.layers\.0\.mlp\.dense_h_to_4h\.weight' has 25 rows"):
        convert(tmp_path / "own", target, "sat", parts=2)
    assert list(target.parent.iterdir()) == []


# ------------------------------------------------------------------------ LoRA


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def with_sat_lora(
    source: Path, folder: Path, rank: int = 3, alpha: float = 1.0, layers: tuple[int, ...] = (0, 1),
    dtype: torch.dtype = torch.float32,
) -> list[Tensors]:
    """A SAT folder with an un-merged LoRA, as SAT's `LoraMixin` leaves it, and its weights as SAT's `merge_lora` does.

    The formulas are those of sat/model/finetune/lora2.py.
    """
    shutil.copytree(source, folder)
    home = folder / (folder / "latest").read_text().strip()
    merged = []
    for number, path in enumerate(sorted(home.glob("*.pt"))):
        stored = torch.load(path, weights_only=False)["module"]
        module = {name: tensor.to(dtype) for name, tensor in stored.items()}
        plain, seed = dict(module), 1000 * number
        for name in [name for name in module if re.search(r"attention\.\w+\.weight$", name)]:
            layer = int(re.search(r"layers\.(\d+)", name)[1])  # type: ignore[index]
            if layer not in layers:
                continue
            seed += 1
            weight, stem = module.pop(name), name.removesuffix(".weight")
            module[f"{stem}.original.weight"] = weight
            if f"{stem}.bias" in module:
                module[f"{stem}.original.bias"] = module.pop(f"{stem}.bias")
            count = {"query_key_value": 3, "key_value": 2}.get(stem.rpartition(".")[2], 1)
            by_columns = stem.endswith("dense")
            updates = []
            for k in range(count):
                same_on_all_ranks = 17 * seed + k if by_columns else 17 * (seed % 1000) + k
                a = random(rank, weight.shape[1], seed=same_on_all_ranks).to(dtype)
                b = random(weight.shape[0] // count, rank, seed=17 * seed + k + 7).to(dtype)
                module[f"{stem}.matrix_A.{k}"], module[f"{stem}.matrix_B.{k}"] = a, b
                updates.append(b.float() @ a.float() * (alpha / rank))
            plain[name] = (weight + torch.cat(updates)).to(weight.dtype)
        torch.save({"module": module}, path)
        merged.append(plain)
    return merged


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("cogagent-sat", torch.bfloat16), ("cogvlm-sat", torch.float32), ("cogvlm-sat-mp2", torch.float32)],
)
def test_an_unmerged_sat_lora_is_merged_as_sat_merges_it(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    merged = with_sat_lora(GOLDEN / case, tmp_path / "lora", alpha=2.0, dtype=dtype)
    with pytest.raises(ValueError, match=r"un-merged SAT LoRA.*mixformer convert"):
        from_pretrained(tmp_path / "lora")
    options: dict[str, Any] = {"lora": "merge", "lora_alpha": 2.0, "overrides": constants(case), "verify": True}
    convert(tmp_path / "lora", tmp_path / "merged", "sat", parts=len(merged), **options)
    for ours, theirs in zip(ranks_of(tmp_path / "merged"), merged, strict=True):
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            if len(merged) == 1:
                assert torch.equal(ours[name], tensor), name
            torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    convert(tmp_path / "lora", tmp_path / "hf", "hf", **options)
    batch = batch_of(case, "a", dtype)
    again = from_pretrained(tmp_path / "merged", overrides=constants(case))
    assert torch.equal(from_pretrained(tmp_path / "hf")(**batch), again(**batch))


@pytest.mark.parametrize("case", ["cogagent-sat", "cogvlm-sat-mp2"])
def test_an_unmerged_sat_lora_is_kept_as_mixins(case: str, tmp_path: Path) -> None:
    merged = with_sat_lora(GOLDEN / case, tmp_path / "lora", alpha=2.0, layers=(1,))
    convert(tmp_path / "lora", tmp_path / "own", "own", lora_alpha=2.0, overrides=constants(case), verify=True)
    model = from_pretrained(tmp_path / "own")
    for owner in (model, model.get_mixin("image").tower):
        assert isinstance(owner.get_mixin("lora"), LoRAMixin) and owner.scopes["lora"] == [1]
    convert(tmp_path / "own", tmp_path / "merged", "sat", lora="merge")
    plain = from_pretrained(tmp_path / "merged")
    batch = batch_of(case, "a")
    torch.testing.assert_close(model(**batch), plain(**batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(**batch), model_of(case)(**batch), atol=1e-2)
    if len(merged) == 1:
        convert(tmp_path / "own", tmp_path / "back", "sat", lora_alpha=2.0, verify=True)
        assert_same(ranks_of(tmp_path / "back"), ranks_of(tmp_path / "lora"))
    else:
        with pytest.raises(ValueError, match="does not sum un-merged updates over several parts"):
            convert(tmp_path / "own", tmp_path / "back", "sat", lora_alpha=2.0, parts=2)


def test_a_lora_of_ours_is_merged_as_the_mixin_merges_it(tmp_path: Path) -> None:
    model = small()
    lora = LoRAMixin(["qkv:q", "qkv:v", "gate", "head"], rank=2)
    model.add_mixin("lora", lora)
    jitter(model, scale=0.3)
    save_pretrained(model, tmp_path / "own")
    with pytest.raises(ValueError, match=r"There is a LoRA \('lora'\), and HF's formats hold none.*--lora merge"):
        convert(tmp_path / "own", tmp_path / "hf", "hf")
    convert(tmp_path / "own", tmp_path / "hf", "hf", lora="merge", verify=True)
    lora.merge(model)
    again = from_pretrained(tmp_path / "hf")
    assert "lora" not in again.mixins and torch.equal(again(IDS), model(IDS))
    convert(tmp_path / "own", tmp_path / "half", "own", lora="merge", dtype="bfloat16")
    state = model.state_dict()
    for name, tensor in from_pretrained(tmp_path / "half").state_dict().items():
        assert torch.equal(tensor, state[name].bfloat16()), name


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (["gate"], {}, r"no place for the update of 'transformer\.layers\.0\.mlp\.gate'"),
        (["qkv:q", "dense"], {"alpha": 1.0}, r"adapts 'transformer\.layers\.0\.attention\.query_key_value' in part"),
        (["qkv"], {"alpha": 1.0}, r"no place for the update of 'transformer\.layers\.0\.attention\.qkv'"),
        (["dense"], {"alpha": 1.0}, r"adapts 'transformer\.layers\.0' in part"),
        (["qkv:q", "qkv:k", "qkv:v", "dense"], {}, r"has alpha 16, which SAT's files do not record.*--lora-alpha 16"),
    ],
)
def test_a_lora_that_sat_does_not_make_is_refused(
    sites: list[str], options: dict[str, Any], message: str, tmp_path: Path, target: Path
) -> None:
    model = small()
    model.add_mixin("lora", LoRAMixin(sites, rank=2, **options))
    save_pretrained(model, tmp_path / "own")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "own", target, "sat")
    assert list(target.parent.iterdir()) == []


def test_a_sat_lora_that_lacks_a_half_is_named(tmp_path: Path, target: Path) -> None:
    with_sat_lora(GOLDEN / "cogvlm-sat", tmp_path / "lora")
    path = next((tmp_path / "lora").rglob("*.pt"))
    module = torch.load(path, weights_only=False)["module"]
    del module["transformer.layers.1.attention.query_key_value.matrix_B.2"]
    torch.save({"module": module}, path)
    with pytest.raises(ValueError, match=r"lacks 'transformer\.layers\.1\.attention\.query_key_value\.matrix_B\.2'"):
        convert(tmp_path / "lora", target, "own")


# ------------------------------------------------------------------------ other models, dtypes, shards


def test_what_was_composed_here_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = small()
    save_pretrained(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", "hf", max_shard_size="4KB", verify=True)
    theirs, report = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model(IDS), theirs.eval()(IDS).logits, atol=2e-5, rtol=0)


def test_a_llava_goes_from_sat_and_back_to_transformers(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    from tests.zoo.llava import tiny_hf

    reference = tiny_hf()
    reference.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "own", "own", verify=True)
    convert(tmp_path / "own", tmp_path / "back", "hf", max_shard_size="20KB", verify=True)
    assert_same([tensors_of(tmp_path / "back")], [tensors_of(tmp_path / "hf")])
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.tensor([[1, *[96] * 16, 5, 6]]), "pixel_values": pixels}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, reference(**inputs).logits)
    with pytest.raises(ValueError, match=r"sat-llama holds a LLaMA .* and this LLaVA differs in: image"):
        convert(tmp_path / "hf", tmp_path / "sat", "sat")


def test_tensors_of_every_kind_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "ids": torch.arange(5), "half": torch.randn(2, 5).bfloat16(), "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(3, 4, dtype=torch.float64), "number": torch.tensor(3.5), "none": torch.zeros(0, 4),
        "turned": torch.randn(3, 5).T, "bytes": torch.arange(7, dtype=torch.uint8), "short": torch.randn(3).half(),
        "eighths": torch.randn(3).to(torch.float8_e4m3fn),
    }
    write_shards(tmp_path, {name: tensor.to("meta") for name, tensor in tensors.items()}, read=tensors.__getitem__)
    assert_same([load_file(tmp_path / "model.safetensors")], [tensors])
    header = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    for name, entry in json.loads(header[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


@pytest.mark.parametrize("format", ["own", "hf", "sat"])
def test_few_tensors_are_in_memory_at_a_time(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(num_layers=6)
    save_pretrained(model, tmp_path / "hf", format="hf", max_shard_size="10KB")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = [0]
    plain = SafetensorsFolder.read

    def counted(self: SafetensorsFolder, name: str) -> torch.Tensor:
        tensor = plain(self, name)
        alive.add(tensor)
        most[0] = max(most[0], sum(each.nbytes for each in alive))
        return tensor

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    convert(tmp_path / "hf", tmp_path / "out", format)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert largest <= most[0] <= 2 * largest
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) > 8 * largest


def test_a_changed_composition_stays_and_is_refused_elsewhere(tmp_path: Path, target: Path) -> None:
    model = small()
    model.add_mixin("prefix", PrefixTuningMixin(2), layers=[1])
    jitter(model)
    save_pretrained(model, tmp_path / "own")
    for format in ("hf", "sat"):
        with pytest.raises(ValueError, match=r"differs in: prefix.*format='own'"):
            convert(tmp_path / "own", target, format)
    convert(tmp_path / "own", target, "own", max_shard_size="3KB", verify=True)
    assert len(list(target.glob("model-*"))) > 2
    assert torch.equal(from_pretrained(target)(IDS), model(IDS))


def test_options_that_sat_cannot_hold_are_named(tmp_path: Path, target: Path) -> None:
    save_pretrained(small(sliding_window=3), tmp_path / "own")
    with pytest.raises(ValueError, match=r"sat-llama.*differs in: window|cannot hold the value of sliding_window"):
        convert(tmp_path / "own", target, "sat")
    save_pretrained(small(activation="relu"), tmp_path / "relu")
    with pytest.raises(ValueError, match="sat-llama cannot hold the value of activation"):
        convert(tmp_path / "relu", target, "sat")


def test_tied_weights_are_kept_tied_or_refused(tmp_path: Path, target: Path) -> None:
    model = small()
    model.get_mixin("head").linear.weight = model.transformer.word_embeddings.weight
    save_pretrained(model, tmp_path / "own")
    convert(tmp_path / "own", target, "own", dtype="bfloat16", verify=True)
    again = from_pretrained(target)
    assert again.get_mixin("head").linear.weight is again.transformer.word_embeddings.weight
    with pytest.raises(ValueError, match=r"'transformer\.word_embeddings\.weight' is tied to 'mixins\.head"):
        convert(tmp_path / "own", tmp_path / "hf", "hf")


# ------------------------------------------------------------------------ files beside the weights


def test_tokenizers_and_settings_go_along(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "cogvlm-hf", tmp_path / "hf")
    shutil.copy(GOLDEN / "prompts" / "tokenizer.model", tmp_path / "hf")
    for name in ("generation_config.json", "modeling_cogvlm.py", "LICENSE", "notes.txt", "optimizer.pt"):
        (tmp_path / "hf" / name).write_text(f"{name}\n")
    convert(tmp_path / "hf", tmp_path / "own", "own")
    convert(tmp_path / "own", tmp_path / "back", "hf")
    for folder in ("own", "back"):
        for name in ("tokenizer.model", "generation_config.json", "modeling_cogvlm.py", "LICENSE"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
        assert not (tmp_path / folder / "notes.txt").exists() and not (tmp_path / folder / "optimizer.pt").exists()
    expected = load_processor(tmp_path / "hf")
    for folder in ("own", "back"):
        found = load_processor(tmp_path / folder)
        assert found.config == expected.config
        assert torch.equal(found("what is it?")["input_ids"], expected("what is it?")["input_ids"])


def test_a_processor_may_be_named(tmp_path: Path) -> None:
    report = convert(GOLDEN / "cogvlm-hf", tmp_path / "without", "own")
    assert "No processor goes with the weights" in report.notes[0]
    convert(GOLDEN / "cogvlm-hf", tmp_path / "own", "own", processor=GOLDEN / "prompts")
    expected = load_processor(GOLDEN / "cogvlm-hf", tokenizer=GOLDEN / "prompts")
    assert load_processor(tmp_path / "own").config == expected.config
    with pytest.raises(ValueError, match="There is no processor at"):
        convert(GOLDEN / "cogvlm-hf", tmp_path / "other", "hf", processor=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_templates_are_translated_between_hf_and_sat(tmp_path: Path) -> None:
    for case, template, expected in (("cogvlm-hf", "base", "base"), ("cogvlm-hf", "chat", "chat_old")):
        shutil.copytree(GOLDEN / case, tmp_path / template)
        content = {**config_of(tmp_path / template), "template_version": template, "eos_token_id": [7, 8]}
        (tmp_path / template / "config.json").write_text(json.dumps(content))
        convert(tmp_path / template, tmp_path / f"{template}-sat", "sat")
        written = config_of(tmp_path / f"{template}-sat")
        assert (written["text_processor_version"], written["eos_token_id"]) == (expected, 7)
    convert(GOLDEN / "cogvlm-sat", tmp_path / "hf", "hf")
    assert config_of(tmp_path / "hf")["template_version"] == "chat"  # the question-and-answer form, in both


# ------------------------------------------------------------------------ whole or not at all


def pausing(folder: Path, source: str, goal: str, format: str) -> None:
    """Convert, and wait for ever in the middle of the weights."""
    written = [0]

    def pause(tensor: torch.Tensor) -> memoryview:
        written[0] += 1
        if written[0] == 8:
            (folder / "marker").write_text("now")
            time.sleep(600)
        return plain(tensor)

    import mixformer.shard_writer
    import models.weights.sat_writer

    plain = mixformer.shard_writer.bytes_of
    mixformer.shard_writer.bytes_of = models.weights.sat_writer.bytes_of = pause
    convert(source, goal, format, max_shard_size="4KB")


@pytest.mark.parametrize("format", ["own", "hf", "sat"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    format: str, hf: Path, target: Path, tmp_path: Path
) -> None:
    before, there = everything_in(hf), tmp_path / "process"
    group = forks.shared().start("test_convert.pausing", there, str(hf), str(target), format, world_size=1)
    deadline = time.monotonic() + 60
    while not (there / "marker").exists():
        assert time.monotonic() < deadline, group.output()
        time.sleep(0.01)
    group.kill()
    assert group.wait() == [-signal.SIGKILL]
    left = list(target.parent.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".target.new-") and list(left[0].rglob("*model*"))
    with pytest.raises(ValueError, match="is no checkpoint"):
        recognise(left[0])
    assert everything_in(hf) == before
    report = convert(hf, target, format)
    assert str(left[0]) in report.notes[0] and "Remove it" in report.notes[0]
    assert torch.equal(from_pretrained(target)(IDS), from_pretrained(hf)(IDS))


def test_free_space_is_looked_at_first(hf: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(hf)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60 * 10**6))
    with pytest.raises(OSError, match=r"target takes 67\.1 MB, and the file system of .*out has 60\.0 MB free"):
        convert(hf, target, "own")
    assert "67.1 MB" in convert(hf, target, "own", dry_run=True).notes[0]
    assert list(target.parent.iterdir()) == []


def limited(folder: Path, source: str, goal: str, format: str) -> None:
    """Convert while files may not grow beyond a few kilobytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    try:
        convert(source, goal, format)
    except OSError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.parametrize("format", ["own", "hf", "sat"])
def test_a_disk_that_becomes_full_leaves_nothing(format: str, hf: Path, target: Path, tmp_path: Path) -> None:
    before, there = everything_in(hf), tmp_path / "process"
    forks.shared().run("test_convert.limited", there, str(hf), str(target), format, world_size=1)
    said = (there / "said").read_text()
    assert "target could not be written" in said and "is as it was" in said
    assert list(target.parent.iterdir()) == [] and everything_in(hf) == before


@pytest.mark.parametrize("format", ["own", "hf", "sat"])
def test_verifying_finds_one_wrong_bit(
    format: str, hf: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mixformer.shard_writer
    import models.weights.sat_writer

    plain, seen = mixformer.shard_writer.bytes_of, [0]

    def flipped(tensor: torch.Tensor) -> memoryview:
        seen[0] += 1
        content = bytearray(plain(tensor))
        if seen[0] == 5:
            content[-1] ^= 1
        return memoryview(content)

    monkeypatch.setattr(mixformer.shard_writer, "bytes_of", flipped)
    monkeypatch.setattr(models.weights.sat_writer, "bytes_of", flipped)
    with pytest.raises(ValueError, match=r"Verifying failed: '[\w.]+' was not written as it was read"):
        convert(hf, target, format, verify=True)
    assert seen[0] >= 5 and list(target.parent.iterdir()) == []


def test_what_is_there_is_not_touched(hf: Path, tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "own")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    (tmp_path / "file").write_text("two")
    before = everything_in(tmp_path)
    for place in ("own", "thesis", "file"):
        with pytest.raises(ValueError, match="exists and is left as it is"):
            convert(hf, tmp_path / place, "own")
    for place in (hf, hf / "inside", tmp_path):
        with pytest.raises(ValueError, match="one lies in the other"):
            convert(hf, place, "own")
    assert everything_in(tmp_path) == before
    (tmp_path / "empty").mkdir()
    convert(hf, tmp_path / "empty", "sat")
    assert recognise(tmp_path / "empty") == "sat-llama"


def test_a_target_that_appears_meanwhile_is_not_replaced(
    hf: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = converting.write_shards

    def slow(*args: Any) -> None:
        plain(*args)
        target.mkdir()
        (target / "other").write_text("mine")

    monkeypatch.setattr(converting, "write_shards", slow)
    with pytest.raises(ValueError, match="exists and is left as it is"):
        convert(hf, target, "own")
    assert everything_in(target.parent) == {"target/other": b"mine"}


# ------------------------------------------------------------------------ bad input


def edit_tensors(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a folder, all in one file."""
    tensors = tensors_of(folder)
    for path in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-of-*"))


NORM = "model.layers.1.input_layernorm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two formats": (
        lambda f: (f / "model_config.json").write_text("{}"),
        r"checkpoints of 2 formats: config\.json and model_config\.json",
    ),
    "a missing shard": (lambda f: first_shard(f).unlink(), r"model-00001-of-\d+\.safetensors is missing"),
    "a doubled shard": (
        lambda f: shutil.copy(first_shard(f), f / "model-00001-of-00099.safetensors"),
        r"model-00001-of-00099\.safetensors",
    ),
    "a whole file beside shards": (
        lambda f: shutil.copy(first_shard(f), f / "model.safetensors"), r"holds model\.safetensors, which",
    ),
    "a tensor in two shards": (
        lambda f: shutil.copy(first_shard(f), min(f.glob("model-00002-of-*"))), r"'[\w.]+' is in two files",
    ),
    "an index that names absent tensors": (
        lambda f: edit_index(f, lambda names: names.update({"model.ghost.weight": first_shard(f).name})),
        r"index\.json lists 1 tensor.*'model\.ghost\.weight'",
    ),
    "an index that leaves a tensor out": (
        lambda f: edit_index(f, lambda names: names.pop(NORM)), rf"'{re.escape(NORM)}'",
    ),
    "a shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(17)})),
        rf"{re.escape(NORM)} \[17\] \(in model\.safetensors\)",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})),
        rf"floating-point numbers there, '{re.escape(NORM)}' is int8 \(in model\.safetensors\)",
    ),
    "two dtypes in one projection": (
        lambda f: edit_tensors(f, lambda t: t.update({
            "model.layers.0.self_attn.k_proj.weight": t["model.layers.0.self_attn.k_proj.weight"].half()
        })),
        r"self_attn\.q_proj\.weight float32, .*self_attn\.k_proj\.weight float16,.*\(in model\.safetensors\)",
    ),
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), re.escape(NORM)),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.odd": torch.ones(2)})),
        r"1 unexpected, .*: model\.odd \(in model\.safetensors\)",
    ),
    "a config of another size": (lambda f: edit_config(f, vocab_size=41), r"has \[41, 16\], the file .* \[40, 16\]"),
    "a config of another model": (lambda f: edit_config(f, model_type="falcon"), r"config\.json describes 'falcon'"),
    "a config without a key": (lambda f: edit_config(f, model_type="gpt2"), r"config\.json lacks the key 'n_\w+'"),
    "a damaged header": (
        lambda f: first_shard(f).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 40),
        r"model-00001-of-\d+\.safetensors: its header is damaged",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_bad_hf_folders_are_refused_with_the_file_and_the_tensor(what: str, hf: Path, target: Path) -> None:
    damage, message = BROKEN[what]
    damage(hf)
    before = everything_in(hf)
    with pytest.raises(ValueError, match=message):
        convert(hf, target, "own")
    assert list(target.parent.iterdir()) == [] and everything_in(hf) == before


def rank_file(folder: Path, number: int) -> Path:
    return folder / "1" / f"mp_rank_{number:02d}_model_states.pt"


def edit_rank(folder: Path, number: int, edit: Callable[[Tensors], Any]) -> None:
    module = torch.load(rank_file(folder, number), weights_only=False)["module"]
    edit(module)
    torch.save({"module": module}, rank_file(folder, number))


WORDS, FINAL = "transformer.word_embeddings.weight", "transformer.final_layernorm.weight"
BROKEN_SAT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the last rank missing": (
        lambda f: rank_file(f, 1).unlink(), r"lacks mp_rank_01_model_states\.pt: .*there are 2 ranks",
    ),
    "a rank twice": (
        lambda f: shutil.copy(rank_file(f, 0), f / "1" / "mp_rank_00_model_states (1).pt"),
        r"mp_rank_00_model_states \(1\)\.pt beside mp_rank_00_model_states\.pt: one rank twice",
    ),
    "a number twice": (
        lambda f: shutil.copy(rank_file(f, 0), f / "1" / "mp_rank_0_model_states.pt"), "one rank twice",
    ),
    "a rank cut short": (
        lambda f: rank_file(f, 1).write_bytes(rank_file(f, 1).read_bytes()[:5000]), r"mp_rank_01.*(truncated|damaged)",
    ),
    "integers": (
        lambda f: [edit_rank(f, n, lambda m: m.update({FINAL: torch.ones(32, dtype=torch.uint8)})) for n in (0, 1)],
        rf"floating-point numbers there, '{re.escape(FINAL)}' is uint8 \(in 1/mp_rank_\*\.pt\)",
    ),
    "another shape": (
        lambda f: [edit_rank(f, n, lambda m: m.update({FINAL: torch.ones(30)})) for n in (0, 1)],
        rf"{re.escape(FINAL)} \[30\] \(in 1/mp_rank_\*\.pt\)",
    ),
    "a tensor on one rank only": (
        lambda f: edit_rank(f, 1, lambda m: m.pop(WORDS)), rf"'{re.escape(WORDS)}' is on rank 0 or rank 1",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN_SAT))
def test_bad_sat_folders_are_refused_with_the_file_and_the_tensor(what: str, tmp_path: Path, target: Path) -> None:
    damage, message = BROKEN_SAT[what]
    shutil.copytree(GOLDEN / "cogvlm-sat-mp2", tmp_path / "sat")
    damage(tmp_path / "sat")
    before = everything_in(tmp_path / "sat")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "sat", target, "hf")
    assert list(target.parent.iterdir()) == [] and everything_in(tmp_path / "sat") == before


def test_ranks_that_differ_are_found_while_converting(tmp_path: Path, target: Path) -> None:
    shutil.copytree(GOLDEN / "cogvlm-sat-mp2", tmp_path / "sat")
    edit_rank(tmp_path / "sat", 1, lambda module: module.update({FINAL: module[FINAL] + 1}))
    with pytest.raises(ValueError, match=rf"'{re.escape(FINAL)}' should be the same on every rank"):
        convert(tmp_path / "sat", target, "own")
    assert list(target.parent.iterdir()) == []


def test_an_own_folder_with_a_flipped_bit_or_another_config_is_refused(tmp_path: Path, target: Path) -> None:
    save_pretrained(small(), tmp_path / "own")
    config = (tmp_path / "own" / "config.yaml").read_text()
    (tmp_path / "own" / "config.yaml").write_text(config.replace("inner_hidden_size: 24", "inner_hidden_size: 26"))
    with pytest.raises(ValueError, match=r"has \[26, 16\], the file transformer\.layers\.0\.mlp"):
        convert(tmp_path / "own", target, "hf")
    (tmp_path / "own" / "config.yaml").write_text(config)
    path = tmp_path / "own" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256"):
        convert(tmp_path / "own", target, "hf")
    assert list(target.parent.iterdir()) == []


def test_formats_that_a_model_does_not_have_are_named(tmp_path: Path, target: Path) -> None:
    model: BaseModel = GPT2(GPT2Config(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, max_positions=8))
    save_pretrained(model, tmp_path / "own")
    with pytest.raises(ValueError, match=r"No SAT format holds a GPT2\. Those that can: LLaMA, CogVLM, CogAgent"):
        convert(tmp_path / "own", target, "sat")
    with pytest.raises(ValueError, match="format 'onnx' is not known"):
        convert(tmp_path / "own", target, "onnx")
    with pytest.raises(ValueError, match="parts is 2"):
        convert(tmp_path / "own", target, "hf", parts=2)
    with pytest.raises(ValueError, match="lora is 'drop'"):
        convert(tmp_path / "own", target, "hf", lora="drop")
    with pytest.raises(ValueError, match="dtype 'int33' is not known"):
        convert(tmp_path / "own", target, "hf", dtype="int33")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        convert(tmp_path / "own", target, "hf", dtype="int8")
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "nowhere", target, "hf")
    assert list(target.parent.iterdir()) == []


# ------------------------------------------------------------------------ the command


def test_the_command_converts_and_says_what_it_did(hf: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console(["convert", str(hf), str(target), "--format=sat", "--parts=2", "--dtype=bfloat16", "--verify"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{hf} (hf-llama) -> {target} (sat-llama)"
    assert re.fullmatch(r"18 tensors, 0\.0 MB in 2 files, verified", lines[1])
    assert {tensor.dtype for rank in ranks_of(target) for tensor in rank.values()} >= {torch.bfloat16}
    console(["convert", str(target), f"{target}-own", "--format=own", "--json", "--dry-run", "--max-shard-size=1KB"])
    report = json.loads(capsys.readouterr().out)
    assert report["source_format"] == "sat-llama" and len(report["files"]) > 5 and not Path(f"{target}-own").exists()


def test_the_command_takes_constants_and_reports_mistakes(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = str(GOLDEN / "cogagent-hf")
    console(["convert", case, str(target), "--format", "own", "--blocks_run", "2", "--verify"])
    assert from_pretrained(target).config.cross_vision.num_layers_run == 2
    for arguments, message in (
        (["--format=own"], "exists and is left as it is"),
        (["--format=own", "--block_run=2"], "Did you mean 'blocks_run'"),
        (["--format=onnx"], "invalid choice"),
        ([], "--format"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as failure:
            console(["convert", case, str(target if "exists" in message else f"{target}-2"), *arguments])
        assert failure.value.code == 2 and message in capsys.readouterr().err


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    commands = re.findall(r"^mixformer (convert .+)$", page, re.MULTILINE)
    assert len(commands) == 5
    shutil.copytree(GOLDEN / "cogvlm-sat-mp2", tmp_path / "cogvlm-sat")
    with_sat_lora(GOLDEN / "cogvlm-sat", tmp_path / "finetuned-sat")
    shutil.copytree(GOLDEN / "prompts", tmp_path / "vicuna-7b-v1.5")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        console(command.split())
    assert "nothing written" in capsys.readouterr().out and not Path("elsewhere").exists()
    assert len(ranks_of(Path("cogvlm-two"))) == 2 and "lora" in from_pretrained("finetuned").mixins
    merged = from_pretrained("finetuned-hf")
    assert "lora" not in merged.mixins and merged.dtype == torch.bfloat16
    assert load_processor("finetuned-hf").config.family == "hf-cogvlm"


def test_quantised_weights_stay_in_the_own_format(tmp_path: Path, target: Path) -> None:
    pytest.importorskip("torchao")
    save_pretrained(small(), tmp_path / "plain")
    model = from_pretrained(tmp_path / "plain", quantise="int8")
    model.add_mixin("lora", LoRAMixin(["dense"], rank=2))
    jitter(model.get_mixin("lora"))
    save_pretrained(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "again", "own", max_shard_size="2KB", verify=True)
    assert torch.equal(from_pretrained(tmp_path / "again")(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"LoRA 'lora' cannot be merged into '.*dense\.weight', which is quantised"):
        convert(tmp_path / "own", target, "own", lora="merge")
    model.del_mixin("lora")
    save_pretrained(model, tmp_path / "alone")
    for format in ("hf", "sat"):
        with pytest.raises(ValueError, match=r"'mixins\.head\.linear\.weight' is quantised, and the format"):
            convert(tmp_path / "alone", target, format)
    assert list(target.parent.iterdir()) == []
