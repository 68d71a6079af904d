"""PEFT adapter folders, against PEFT itself on HF's models."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixformer import BaseModel, from_pretrained, save_pretrained
from mixformer.cli import console
from mixformer.mixins import LoRAMixin
from mixformer.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from mixformer.train.roles import select_parameters
from models.gpt2 import GPT2, GPT2Config
from models.llama import LLaMA, LLaMAConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[5, 3, 8, 1, 7], [2, 9, 4, 6, 0]])
TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}
PICTURES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "projection_dim": 8,
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def jitter(module: torch.nn.Module, seed: int = 0) -> None:
    source = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter.dtype) * 0.1


def hf_model(kind: str) -> Any:
    import transformers

    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "llava":
        vision = transformers.CLIPVisionConfig(**PICTURES)
        text = transformers.LlamaConfig(**TEXT)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
        config = getattr(transformers, f"{names[kind]}Config")(**TEXT)
        model = getattr(transformers, f"{names[kind]}ForCausalLM")(config)
    jitter(model)
    return model.eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind != "llava":
        return {"input_ids": IDS}
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[5, 39, 39, 39, 39, 7, 3]]), "images": images}


def hf_logits(model: Any, kind: str) -> torch.Tensor:
    given = inputs(kind)
    if "images" in given:
        given["pixel_values"] = given.pop("images")
    logits: torch.Tensor = model(**given, use_cache=False).logits
    return logits


TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 7},
    "mistral": {"target_modules": "all-linear", "r": 2, "lora_alpha": 4},
    "qwen2": {"target_modules": ["k_proj", "o_proj", "gate_proj"], "r": 4, "lora_alpha": 5, "use_rslora": True},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj", "c_fc"], "r": 3, "lora_alpha": 6, "fan_in_fan_out": True},
    "llava": {"target_modules": ["q_proj", "k_proj", "linear_1", "fc2"], "r": 2, "lora_alpha": 6},
}


def peft_folder(kind: str, folder: Path, **options: Any) -> tuple[Path, Path, Any]:
    """(base, adapter, PeftModel) of a model whose adapter is not zero."""
    peft = pytest.importorskip("peft", reason="the test extra has it")

    base = hf_model(kind)
    base.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(**{**TARGETS[kind], **options})).eval()
    source = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
        elif ".modules_to_save." in name:
            parameter += torch.randn(parameter.shape, generator=source) * 0.3
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", adapted


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", TARGETS)
def test_an_imported_adapter_gives_the_logits_of_peft(kind: str, tmp_path: Path) -> None:
    base, adapter, adapted = peft_folder(kind, tmp_path)
    model = from_pretrained(base)
    before, expected = model(**inputs(kind)), hf_logits(adapted, kind)
    names = load_adapter(model, adapter)
    same(model(**inputs(kind)), expected)
    assert float((before - expected).abs().max()) > 1e-2
    for name in names:
        model.get_mixin(name).merge(model if "/" not in name else dict(model.nested_models())[name.split("/")[0]])
    same(model(**inputs(kind)), expected)
    for name in reversed(names):
        model.del_mixin(name)
    assert torch.equal(model(**inputs(kind)), before)


@pytest.mark.parametrize("kind", TARGETS)
def test_import_and_export_give_peft_the_same_tensors_bit_for_bit(kind: str, tmp_path: Path) -> None:
    base, adapter, _ = peft_folder(kind, tmp_path)
    model = from_pretrained(base)
    load_adapter(model, adapter)
    save_adapter(model, tmp_path / "written", base_model=str(base))
    theirs, ours = load_file(adapter / WEIGHTS), load_file(tmp_path / "written" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    written = json.loads((tmp_path / "written" / CONFIG).read_text())
    asked = json.loads((adapter / CONFIG).read_text())
    for name in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias"):
        assert written[name] == asked[name], name
    assert written["base_model_name_or_path"] == str(base)


SITES: dict[str, list[str]] = {
    "llama": ["qkv", "gate", "head"], "qwen2": ["qkv:q", "qkv:v", "down"], "gpt2": ["qkv:q", "qkv:v", "dense", "up"],
    "llava": ["qkv:k", "image.projector.*", "down"],
}


@pytest.mark.parametrize("kind", SITES)
def test_peft_loads_an_export_and_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the test extra has it")

    base = hf_model(kind)
    base.save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    model.add_mixin("lora", LoRAMixin(SITES[kind], rank=3, alpha=5.0))
    model.add_mixin("more", LoRAMixin(["dense"], rank=2, alpha=9.0), layers=[1])
    if kind == "llava":
        model.add_mixin("image.tower/lora", LoRAMixin(["qkv:v"], rank=2, alpha=1.0))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora." in name or ".more." in name:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    same(hf_logits(adapted, kind), model(**inputs(kind)))
    again = from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    same(again(**inputs(kind)), model(**inputs(kind)))


WHOLE = {"llava": ["linear_2", "patch_embedding"], "llama": ["k_proj", "lm_head", "norm"], "qwen2": ["v_proj"]}


@pytest.mark.parametrize("kind", WHOLE)
def test_modules_that_peft_trained_as_a_whole_take_the_place_of_the_models(kind: str, tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"]
    base, adapter, adapted = peft_folder(kind, tmp_path, modules_to_save=WHOLE[kind], target_modules=targets)
    model = from_pretrained(base)
    names = load_adapter(model, adapter)
    same(model(**inputs(kind)), hf_logits(adapted, kind))
    without = from_pretrained(base)
    before = {name: parameter.clone() for name, parameter in without.named_parameters()}
    for name in names:
        model.del_mixin(name)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # LLaVA's linear_2 has a bias, as Qwen2's qkv; PEFT takes all that ends with "norm", five of them.
    assert len(changed) == {"llava": 3, "llama": 1 + 5 + 2, "qwen2": 2 * 2}[kind]


CHOSEN = {"llava": ["image.projector"], "llama": ["head", "transformer.layers.1.mlp", "*final_norm*"]}


@pytest.mark.parametrize("kind", CHOSEN)
def test_what_was_trained_as_a_whole_goes_with_an_adapter_to_peft_and_back(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the test extra has it")

    base = hf_model(kind)
    base.save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    model.add_mixin("lora", LoRAMixin(["qkv:q", "dense"], rank=3, alpha=5.0))
    chosen = select_parameters(model, CHOSEN[kind])
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora." in name or name in chosen:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3
    save_adapter(model, tmp_path / "adapter", whole=CHOSEN[kind])
    size = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter" / WEIGHTS).values())
    assert size == sum(p.numel() for name, p in model.named_parameters() if ".lora." in name or name in chosen)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    same(hf_logits(adapted, kind), model(**inputs(kind)))
    again = from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(**inputs(kind)), model(**inputs(kind)))


def test_the_command_puts_what_was_trained_as_a_whole_beside_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = from_pretrained_llava(tmp_path)
    model = from_pretrained(tmp_path / "llava")
    model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=2))
    for name, parameter in model.named_parameters():
        if ".lora." in name or "projector" in name:
            parameter += torch.randn(parameter.shape) * 0.3
    save_pretrained(model, tmp_path / "trained")
    folders = [str(tmp_path / name) for name in ("trained", "merged")]
    with pytest.raises(SystemExit):
        console(["merge", *folders, "--whole", "image.projector"])
    assert "--whole is what goes with the adapter: give --adapter" in capsys.readouterr().err
    console(["merge", *folders, "--adapter", str(tmp_path / "adapter"), "--whole", "image.projector"])
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(**inputs("llava")), model(**inputs("llava")))
    same(from_pretrained(tmp_path / "merged")(**inputs("llava")), model(**inputs("llava")))


def test_what_is_no_whole_module_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, folder = written(tmp_path, lambda content: content.update(modules_to_save=["norm"]))
    model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=2))
    for whole, said in (
        (["hed"], r"'hed' .*head"), (["*layers.0.attention.qkv*"], r"self_attn\.q_proj' has a LoRA and is to be kept"),
        (["lora"], r"mixins\.lora\..*' is no parameter of its own"),
    ):
        with pytest.raises(ValueError, match=said):
            save_adapter(model, tmp_path / "new", whole=whole)
    assert not (tmp_path / "new").exists()
    model.del_mixin("lora")
    tensors, before = load_file(folder / WEIGHTS), model.transformer.final_norm.weight.clone()
    for key, tensor, said in (
        ("model.norm.weight", torch.zeros(15), r"'model\.norm\.weight' is \[15\]; this model has \[16\]"),
        ("model.other.norm.weight", torch.zeros(16), r"'model\.other\.norm\.weight', which this hf-llama model lacks"),
    ):
        save_file({**tensors, f"base_model.model.{key}": tensor}, folder / WEIGHTS)
        with pytest.raises(ValueError, match=said):
            load_adapter(model, folder)
        assert list(model.mixins) == ["rotary", "head"]
    assert torch.equal(model.transformer.final_norm.weight, before)
    llava = from_pretrained_llava(tmp_path)
    llava.add_mixin("lora", LoRAMixin(["qkv:q"], rank=2))
    with pytest.raises(ValueError, match=r"projector\.linear_1', which has '.*\.linear_1\.bias' and 0 more"):
        save_adapter(llava, tmp_path / "new", whole=["image.projector.*weight"])


def from_pretrained_llava(tmp_path: Path) -> BaseModel:
    hf_model("llava").save_pretrained(tmp_path / "llava")
    model: BaseModel = from_pretrained(tmp_path / "llava")
    return model


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_the_base_weight_that_peft_writes_beside_an_adapted_head_is_checked(tmp_path: Path) -> None:
    base, adapter, adapted = peft_folder("llama", tmp_path, target_modules=["lm_head", "q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    (key,) = [key for key in tensors if "lora_" not in key]
    model = from_pretrained(base)
    load_adapter(model, adapter)
    same(model(IDS), hf_logits(adapted, "llama"))
    save_file({**tensors, key: tensors[key] + 1}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=r"base weight .*lm_head.* differs"):
        load_adapter(from_pretrained(base), adapter)


def test_ranks_alphas_and_layers_of_their_own_are_kept(tmp_path: Path) -> None:
    options = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 11},
        "layers_to_transform": None,
    }
    base, adapter, adapted = peft_folder("llama", tmp_path, **options)
    model = from_pretrained(base)
    names = load_adapter(model, adapter, "mine")
    assert names[0] == "mine" and len(names) == len({*names}) > 2
    same(model(**inputs("llama")), hf_logits(adapted, "llama"))
    save_adapter(model, tmp_path / "written")
    theirs, ours = load_file(adapter / WEIGHTS), load_file(tmp_path / "written" / WEIGHTS)
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_of_some_layers_is_one_mixin_on_those(tmp_path: Path) -> None:
    base, adapter, adapted = peft_folder("llama", tmp_path, layers_to_transform=[1])
    model = from_pretrained(base)
    assert load_adapter(model, adapter) == ["lora"]
    assert model.scopes["lora"] == [1]
    same(model(**inputs("llama")), hf_logits(adapted, "llama"))


def test_an_imported_adapter_is_trainable_and_survives_an_own_checkpoint(tmp_path: Path) -> None:
    base, adapter, _ = peft_folder("llama", tmp_path, lora_dropout=0.25)
    model = from_pretrained(base)
    load_adapter(model, adapter)
    lora: Any = model.get_mixin("lora")
    assert lora.dropout == 0.25
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora." in name)
    save_pretrained(model, tmp_path / "own")
    assert torch.equal(from_pretrained(tmp_path / "own")(IDS), model(IDS))


def test_an_adapter_wider_than_the_model_keeps_its_dtype(tmp_path: Path) -> None:
    base, adapter, adapted = peft_folder("llama", tmp_path)
    model = from_pretrained(base, dtype="bfloat16")
    load_adapter(model, adapter)
    assert {p.dtype for name, p in model.named_parameters() if ".lora." in name} == {torch.float32}
    found, expected = model(IDS), hf_logits(adapted.to(torch.bfloat16), "llama")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def written(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[BaseModel, Path]:
    """A model, and an adapter of it whose config was changed."""
    model = LLaMA(LLaMAConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, inner_hidden_size=24))
    model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=2))
    save_adapter(model, tmp_path)
    model.del_mixin("lora")
    content = json.loads((tmp_path / CONFIG).read_text())
    change(content)
    (tmp_path / CONFIG).write_text(json.dumps(content))
    return model, tmp_path


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("use_dora", True, "DoRA"), ("bias", "all", "trains biases"),
        ("peft_type", "IA3", "'IA3' adapter; only LoRA"), ("init_lora_weights", "pissa_niter_4", "changes the base"),
    ],
)
def test_other_kinds_of_adapters_are_refused(option: str, value: Any, said: str, tmp_path: Path) -> None:
    model, folder = written(tmp_path, lambda content: content.update({option: value}))
    with pytest.raises(ValueError, match=said):
        load_adapter(model, folder)
    assert list(model.mixins) == ["rotary", "head"]


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    model, folder = written(tmp_path, dict)
    tensors = load_file(folder / WEIGHTS)

    def refused(changed: dict[str, torch.Tensor], said: str) -> None:
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ValueError, match=said):
            load_adapter(model, folder)
        assert list(model.mixins) == ["rotary", "head"]

    refused({key.replace("q_proj", "query"): t for key, t in tensors.items()}, r"adapts 'model.layers.0.self_attn.que")
    refused({key.replace("layers.1", "layers.9"): t for key, t in tensors.items()}, r"layers\.9.*Did you mean")
    refused({key: tensor[:, :1].clone() for key, tensor in tensors.items()}, "another size of model")
    refused({key: t for key, t in tensors.items() if "lora_A" in key}, r"one half .*\(lora_A\)")
    refused({**tensors, "base_model.model.model.norm.lora_B.bias": torch.ones(16)}, "no part of a LoRA update")
    refused({**tensors, "base_model.model.model.norm.weight": torch.zeros(16)}, r"model\.norm\.weight.*differs")
    refused({**tensors, "base_model.model.score.weight": torch.zeros(16)}, r"score\.weight.*neither an update nor")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, folder)


def test_a_load_that_fails_half_way_takes_out_what_it_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = peft_folder("llama", tmp_path, rank_pattern={"q_proj": 5})
    model = from_pretrained(base)
    add, keys = model.add_mixin, list(model.state_dict())

    def failing(name: str, *arguments: Any) -> Any:
        if name == "lora_2":
            raise MemoryError("no room")
        return add(name, *arguments)

    monkeypatch.setattr(model, "add_mixin", failing)
    with pytest.raises(MemoryError, match="no room"):
        load_adapter(model, adapter)
    assert list(model.state_dict()) == keys


def test_a_resampler_and_tower_are_adapted_under_the_names_that_hf_gives_their_modules(tmp_path: Path) -> None:
    import transformers

    config = transformers.Idefics2Config(
        vision_config={**PICTURES, "image_size": 16}, text_config={**TEXT, "model_type": "mistral"}, image_token_id=39,
        perceiver_config={
            "hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
    )
    hf = transformers.Idefics2ForConditionalGeneration(config)
    hf.save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    for name in ("lora", "image.tower/lora"):
        model.add_mixin(name, LoRAMixin(["*"], rank=1))
    save_adapter(model, tmp_path / "adapter")
    modules = {name for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear)}
    written = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {key.removeprefix("base_model.model.").rpartition(".lora_A")[0] for key in written if "_A" in key} == modules


def test_what_peft_cannot_hold_is_not_written(make: Callable[..., BaseModel], tmp_path: Path) -> None:
    model = make()
    with pytest.raises(ValueError, match="no LoRA mixin, so there is no adapter"):
        save_adapter(model, tmp_path / "none")
    model.add_mixin("lora", LoRAMixin(["qkv"]))
    with pytest.raises(ValueError, match=r"no LoRA mixin 'lra'\. Did you mean 'lora'\?"):
        save_adapter(model, tmp_path / "none", ["lra"])
    model.add_mixin("other", LoRAMixin(["dense"], dropout=0.5))
    with pytest.raises(ValueError, match="differ in dropout"):
        save_adapter(model, tmp_path / "none")
    save_adapter(model, tmp_path / "one", ["lora"])
    assert not any("o_proj" in key for key in load_file(tmp_path / "one" / WEIGHTS))
    assert not (tmp_path / "none").exists()


def test_tied_heads_and_unknown_families_are_refused(tmp_path: Path) -> None:
    from models.clip import CLIP
    from models.lenet import LeNet5

    for cls in (CLIP, LeNet5):
        model = cls(device="meta")
        with pytest.raises(ValueError, match=r"Adapters of hf-clip are not written|No HF format holds a LeNet5"):
            save_adapter(model, tmp_path)
    gpt2 = GPT2(GPT2Config(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, max_positions=16))
    gpt2.add_mixin("lora", LoRAMixin(["qkv"], rank=2))
    save_adapter(gpt2, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key.replace("transformer.h.0.attn.c_attn", "lm_head"): t for key, t in tensors.items()},
              tmp_path / WEIGHTS)
    gpt2.del_mixin("lora")
    with pytest.raises(ValueError, match="'lm_head', which is no Linear here"):
        load_adapter(gpt2, tmp_path)


def test_a_merged_adapter_is_exported_with_the_same_numbers(make: Callable[..., BaseModel], tmp_path: Path) -> None:
    model = make()
    lora: Any = model.add_mixin("lora", LoRAMixin(["qkv:q", "up"], rank=2))
    jitter(model)
    save_adapter(model, tmp_path / "apart")
    lora.merge(model)
    save_adapter(model, tmp_path / "merged")
    assert (tmp_path / "apart" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()
