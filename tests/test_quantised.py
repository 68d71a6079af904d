"""Quantised Linears: what codes stand for, products and gradients, choices by part, loading, saving, LoRA on top."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.nn as nn
from benchmarks import at_size
from benchmarks.quantised import compare, difference
from golden_cases import GOLDEN, batch_of
from safetensors.torch import load_file, save_file

import mixformer.quantised as quantised
from mixformer import KVCache, from_pretrained, generate, save_pretrained
from mixformer.cli import main
from mixformer.config import read_settings
from mixformer.merge import merge_loras
from mixformer.mixins import LoRAMixin
from mixformer.model import BaseModel
from mixformer.quantised import Kind, QuantisedLinear, choose, dequantise, quantise, quantise_linear, quantised_table
from mixformer.shards import INDEX
from mixformer.sites import Linear
from mixformer.testing import jitter
from mixformer.train import TrainConfig, train
from models.gpt2 import GPT2Config
from models.llama import LLaMA, LLaMAConfig

pytest.importorskip("torchao", reason="the extra `quantised` has it")

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 96}
IDS = torch.tensor([[1, 5, 9, 33, 70, 2, 8]])


def make_llama(seed: int = 3) -> LLaMA:
    model = LLaMAConfig(**SIZES).build(generator=torch.Generator().manual_seed(seed))
    jitter(model)
    return model.eval()


def make_cogagent(dtype: torch.dtype = torch.float32) -> BaseModel:
    model = at_size.config_of("cogagent", small=True).build(generator=torch.Generator().manual_seed(3), dtype=dtype)
    jitter(model)
    return model.eval()


def stir_lora(model: nn.Module) -> None:
    """Move LoRA's parameters off zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def a_linear(rows: int, columns: int, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """A quantised Linear with a bias, and the weight that it was made of."""
    torch.manual_seed(rows * columns)
    linear = Linear(columns, rows).to(dtype)
    weight = torch.randn(rows, columns).to(dtype)
    nn.init.normal_(linear.bias)
    quantise_linear(linear, weight, Kind.of(kind).fitted(columns))
    return linear, weight


def meaning(codes: torch.Tensor, scale: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The weight, number by number, as the module's documentation says."""
    if codes.dim() == 2:
        return codes.double() * scale.double()[:, None]
    blocks, columns, half = codes.shape
    weight, group = torch.zeros(blocks * 2 * half, columns, dtype=torch.float64), columns // scale.shape[0]
    for block in range(blocks):
        for j in range(half):
            weight[block * 2 * half + j] = (codes[block, :, j] % 16).double()
            weight[block * 2 * half + half + j] = (codes[block, :, j] // 16).double()
    numbers = scale.double().repeat_interleave(group, 0).permute(2, 1, 0)
    return ((weight - 8) * numbers[0] + numbers[1])[:num_rows]


# ------------------------------------------------------------------------ one Linear


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (37, 96), (130, 70)])
def test_codes_stand_for_the_nearest_numbers_that_there_are(rows: int, columns: int, kind: str) -> None:
    linear, weight = a_linear(rows, columns, kind)
    expected = meaning(linear.codes, linear.scale, rows)
    assert torch.allclose(linear.dequantised().double(), expected, atol=1e-6)
    if linear.kind.bits == 8:
        step = weight.abs().amax(1, keepdim=True).double() / 127.5
    else:
        groups = weight.double().unflatten(1, (-1, linear.kind.group))
        spans = groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)
        step = (spans / 15).repeat_interleave(linear.kind.group, 1)
    errors = (expected - weight.double()) / step
    assert errors.abs().max() < 1.01  # half a step, and another half where the offset was rounded to a code
    assert errors.square().mean().sqrt() < 0.33  # evenly spread errors have 0.289


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (37, 96), (130, 70)])
@pytest.mark.parametrize("num_inputs", [1, 5, 200])
def test_products_are_those_of_what_the_codes_stand_for(
    rows: int, columns: int, kind: str, dtype: torch.dtype, num_inputs: int
) -> None:
    linear, _ = a_linear(rows, columns, kind, dtype)
    x = torch.randn(num_inputs, columns).to(dtype)
    expected = x.double() @ meaning(linear.codes, linear.scale, rows).T + linear.bias.double()
    found = linear(x[None, :, None])[0, :, 0].double()
    exact = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (found - expected).abs().max() < exact * expected.abs().max()


@pytest.mark.skipif(quantised.NATIVE_TILE is None, reason="torch has no kernel for this processor's layout")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_inputs_take_the_kernel_and_many_do_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _ = a_linear(64, 128, kind, torch.bfloat16)
    few = quantised.FEW_ROWS[linear.kind.bits]
    monkeypatch.setattr(quantised, "spelled_out", lambda *arguments: pytest.fail("spelled out"))
    linear(torch.randn(few, 128, dtype=torch.bfloat16))
    with pytest.raises(pytest.fail.Exception):
        linear(torch.randn(few + 1, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_pass_through_and_no_weight_is_kept_for_them(kind: str) -> None:
    linear, _ = a_linear(130, 96, kind)
    weight = meaning(linear.codes, linear.scale, 130)
    x, wanted = torch.randn(9, 96, requires_grad=True), torch.randn(9, 130)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = linear(x)
    (y * wanted).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad.double(), wanted.double() @ weight, atol=1e-4)
    assert torch.equal(linear.bias.grad, wanted.sum(0)) and linear.codes.grad is None and linear.scale.grad is None
    own = {linear.codes.data_ptr(), linear.scale.data_ptr()}
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in own) <= x.nbytes


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_taken_piece_by_piece_give_what_whole_ones_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = a_linear(300, 96, kind)
    monkeypatch.setattr(quantised, "_CHUNK", 1)  # a row or a block of rows each
    linear, _ = a_linear(300, 96, kind)
    assert torch.equal(linear.codes, whole.codes) and torch.equal(linear.scale, whole.scale)
    weight = meaning(linear.codes, linear.scale, 300)
    x, wanted = torch.randn(9, 96, requires_grad=True), torch.randn(9, 300)
    y = linear(x)
    assert torch.allclose(y.double(), x.double() @ weight.T + linear.bias.double(), atol=1e-4)
    (y * wanted).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad.double(), wanted.double() @ weight, atol=1e-4)
    assert torch.allclose(linear.dequantised().double(), weight, atol=1e-6)


def test_autocast_computes_in_its_dtype() -> None:
    linear, _ = a_linear(64, 128, "int4")
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 128)).dtype == torch.bfloat16


def test_weights_of_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="give dtype bfloat16"):
        quantise_linear(Linear(64, 64), torch.zeros(64, 64, dtype=torch.float64), Kind(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.013), ("int4", 0.11)])
def test_small_weights_are_rounded_as_well_as_large_ones(kind: str, error: float, dtype: torch.dtype) -> None:
    for size in (1e-4, 1.0):
        weight = (size * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))).to(dtype)
        linear = Linear(256, 64).to(dtype)
        quantise_linear(linear, weight, Kind.of(kind))
        found = meaning(linear.codes, linear.scale, 64) - weight.double()
        assert found.norm() < error * weight.double().norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_numbers_that_are_not_finite_are_refused_and_named_with_their_file(
    tmp_path: Path, kind: str, bad: float
) -> None:
    model, name = make_llama(), "transformer.layers.1.mlp.down"
    model.get_submodule(name).weight.data[3, 40] = bad
    save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"saved: '{name}\.weight' \(in model\.safetensors\): .* not finite in"):
        from_pretrained(tmp_path / "saved", quantise=kind)
    with pytest.raises(ValueError, match=rf"'{name}\.weight': some of its numbers are not finite in torch\.float32"):
        quantise(model, kind)
    assert kinds_of(model)[name] == "plain"


def test_weights_too_wide_for_the_dtype_are_named_with_their_file(tmp_path: Path) -> None:
    save_pretrained(make_llama().double(), tmp_path / "saved", "hf")
    with pytest.raises(ValueError, match=r"saved: '.+\.weight' \(in model\.safetensors\): Weights of torch\.float64"):
        from_pretrained(tmp_path / "saved", quantise="int8")
    assert from_pretrained(tmp_path / "saved", quantise="int8", dtype="float32").dtype == torch.float32


# ------------------------------------------------------------------------ parts of a model


def kinds_of(model: nn.Module) -> dict[str, str]:
    """{path of every Linear: its kind, or `plain`}."""
    return {
        path: str(linear.kind) if isinstance(linear, QuantisedLinear) else "plain"
        for path, linear in model.named_modules() if isinstance(linear, Linear)
    }


def is_language(path: str) -> bool:
    return path == "mixins.head.linear" or (path.startswith("transformer.") and ".mixins." not in path)


def test_each_part_gets_the_kind_that_is_chosen_for_it() -> None:
    model = make_cogagent()
    quantise(model, {"language": "int4", "vision_expert*": "int8", "image.tower": "int4/32"})
    for path, kind in kinds_of(model).items():
        if is_language(path):
            assert kind in ("int4/64", "int4/32"), path  # groups of 64 where they divide
        elif ".mixins.vision_expert" in path:
            assert kind == "int8", path
        else:
            assert kind == ("int4/32" if path.startswith("mixins.image.tower.") else "plain"), path


def test_later_choices_win_and_none_leaves_a_part_alone() -> None:
    model = make_cogagent()
    quantise(model, {"*": "int8", "cross": "none", "image.tower": None, "*.mlp.up": "int4"})
    for path, kind in kinds_of(model).items():
        inside = path.startswith(("mixins.cross.", "mixins.image.tower.")) or ".mixins.cross." in path
        if path.endswith(".mlp.up"):
            assert kind.startswith("int4"), path
        else:
            assert kind == ("plain" if inside else "int8"), path


def test_what_is_no_linear_stays_bit_for_bit() -> None:
    model = make_cogagent()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantise(model, "int4")
    after = model.state_dict()
    linears = set(kinds_of(model))
    kept = [name for name in before if name.rpartition(".")[0] not in linears or name.endswith(".bias")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert set(after) - set(kept) == {f"{path}.{part}" for path in linears for part in ("codes", "scale")}


def test_inputs_that_no_group_divides_fall_back_to_8_bits_and_a_warning_says_so() -> None:
    model = LLaMAConfig(**{**SIZES, "inner_hidden_size": 90}).build()
    with pytest.warns(UserWarning, match=r"2 Linear\(s\) take int8 .*layers\.0\.mlp\.down': their 90 inputs"):
        quantise(model, {"*.mlp": "int4"})
    kinds = kinds_of(model)
    assert kinds["transformer.layers.1.mlp.down"] == "int8" and kinds["transformer.layers.1.mlp.up"] == "int4/64"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"languge": "int4"}, r"'languge' matches none .*Did you mean 'language'"),
        ({"rotary": "int4"}, "'rotary' "),
        ({"*norm*": "int8"}, r"'\*norm\*' chooses no Linear"),
        ({"language": "int3"}, r"'int3' is no kind .*int8, int4, int4/128"),
        ("4bit", "'4bit' is no kind"),
    ],
)
def test_choices_that_mean_nothing_are_refused(choices: Any, message: str) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match=rf"quantise: .*{message}"):
        quantise(model, choices)
    assert set(kinds_of(model).values()) == {"plain"}


def test_a_weight_that_an_embedding_shares_stays() -> None:
    model = make_llama()
    model.get_mixin("head").linear.weight = model.transformer.word_embeddings.weight
    with pytest.raises(ValueError, match=r"only 'mixins\.head\.linear', which shares its weight"):
        choose(model, {"head": "int4"})
    assert "mixins.head.linear" not in choose(model, "int4")
    assert all("embed" not in path for path in choose(GPT2Config(**SIZES).build(device="meta"), "int8"))


def test_quantising_twice_is_refused() -> None:
    model = make_llama()
    quantise(model, {"language": "int4"})
    with pytest.raises(ValueError, match="is quantised already"):
        quantise(model, "int8")


def test_without_torchao_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    save_pretrained(model, tmp_path / "plain")
    quantise(model, "int8")
    save_pretrained(model, tmp_path / "quantised")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r'pip install "mixformer\[quantised\]"'):
        from_pretrained(tmp_path / "plain", quantise="int8")
    assert torch.equal(from_pretrained(tmp_path / "quantised")(IDS), model(IDS))


def test_the_table_counts_every_linear_once() -> None:
    model = make_cogagent()
    before = sum(linear.weight.numel() for linear in model.modules() if isinstance(linear, Linear))
    quantise(model, {"language": "int4", "vision_expert*": "int8"})
    rows = [line.split() for line in quantised_table(model).splitlines()[1:]]
    assert sum(int(row[3].replace(",", "")) for row in rows) == before
    assert sum(int(row[2]) for row in rows) == len(kinds_of(model))
    assert {(row[0], row[1]) for row in rows} >= {("vision_expert", "int8"), ("cross.tower", "float32")}


# ------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["cogvlm-hf", "cogvlm2-hf", "cogvlm-sat", "llama-hf"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*take int8 instead")
def test_quantising_while_reading_gives_what_quantising_the_whole_model_gives(
    name: str, dtype: torch.dtype | None
) -> None:
    whole = from_pretrained(GOLDEN / name, dtype=dtype)
    quantise(whole, {"*": "int8", "language": "int4/32"})
    read = from_pretrained(GOLDEN / name, dtype=dtype, quantise={"*": "int8", "language": "int4/32"})
    expected, found = whole.state_dict(), read.state_dict()
    assert expected.keys() == found.keys() and any(name.endswith(".codes") for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert torch.equal(whole(**batch_of(name, "a")), read(**batch_of(name, "a")))


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_saved_model_comes_back_as_it_was(tmp_path: Path, size: str) -> None:
    model = make_cogagent(torch.bfloat16)
    quantise(model, {"language": "int4", "vision_expert*": "int8", "image.tower": "int8"})
    model.add_mixin("lora", LoRAMixin(["qkv", "vision_expert.*"], rank=2))
    stir_lora(model)
    save_pretrained(model, tmp_path / "saved", max_shard_size=size)
    again = from_pretrained(tmp_path / "saved")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert kinds_of(again) == kinds_of(model) and torch.equal(again(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"quantised already, so `quantise` cannot be given"):
        from_pretrained(tmp_path / "saved", quantise="int8")


def test_shapes_are_known_without_reading(tmp_path: Path) -> None:
    save_pretrained(make_llama(), tmp_path / "plain", "hf")
    loaded = from_pretrained(tmp_path / "plain", quantise={"language": "int4", "*.down": "int8"}, dtype="bfloat16")
    save_pretrained(loaded, tmp_path / "quantised")
    for folder, options in (("plain", {"quantise": {"language": "int4", "*.down": "int8"}}), ("quantised", {})):
        shapes = from_pretrained(tmp_path / folder, device="meta", dtype="bfloat16", **options)
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.state_dict().items()}
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in shapes.state_dict().items()}
        assert {n: f for n, f in found.items() if n.endswith(".codes")}
        assert {n: s for n, (s, _) in found.items()} == {n: s for n, (s, _) in expected.items()}


def relaid(codes: torch.Tensor, scale: torch.Tensor, rows: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers in tiles of another height."""
    half, blocks = codes.shape[2], -(-rows // tile)
    flat = torch.cat([codes & 15, codes >> 4], 2).transpose(1, 2).reshape(-1, codes.shape[1])[:rows]
    assert flat.shape[0] == rows and half
    padded = torch.zeros(blocks * tile, codes.shape[1], dtype=torch.uint8)
    padded[:rows] = flat
    new = torch.zeros(blocks, codes.shape[1], tile // 2, dtype=torch.uint8)
    for row in range(blocks * tile):
        place = row % tile
        new[row // tile, :, place % (tile // 2)] |= padded[row] << (4 if place >= tile // 2 else 0)
    numbers = torch.zeros(scale.shape[0], blocks * tile, 2, dtype=scale.dtype)
    numbers[:, :rows] = scale[:, :rows]
    return new, numbers


@pytest.mark.skipif(quantised.NATIVE_TILE is None, reason="torch has no kernel for this processor's layout")
def test_a_file_from_another_kind_of_processor_is_laid_out_anew(tmp_path: Path) -> None:
    model = make_llama()
    model.to(torch.bfloat16)
    quantise(model, "int4")
    save_pretrained(model, tmp_path / "saved")
    path, other = tmp_path / "saved" / "model.safetensors", 96 - (quantised.NATIVE_TILE or 0)
    tensors, heights = load_file(path), {name: linear.out_features for name, linear in model.named_modules()
                                         if isinstance(linear, Linear)}  # fmt: skip
    for name, rows in heights.items():
        made = relaid(tensors[f"{name}.codes"], tensors[f"{name}.scale"], rows, other)
        tensors[f"{name}.codes"], tensors[f"{name}.scale"] = made
    save_file(tensors, path)
    again = from_pretrained(tmp_path / "saved", verify=False)
    expected, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", lambda codes: codes[:, :-1]), ("codes", lambda codes: codes.to(torch.int16)),
        ("scale", lambda scale: scale[:-1]), ("scale", lambda scale: None),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_refused(
    tmp_path: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    model = make_llama()
    quantise(model, "int4")
    save_pretrained(model, tmp_path / "saved")
    path, name = tmp_path / "saved" / "model.safetensors", "transformer.layers.1.mlp.up"
    tensors = load_file(path)
    changed = change(tensors.pop(f"{name}.{part}"))
    save_file({**tensors, **({} if changed is None else {f"{name}.{part}": changed.contiguous()})}, path)
    (tmp_path / "saved" / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"does not fit LLaMA: '{name}\.codes' is .* no quantised weights of 96 out"):
        from_pretrained(tmp_path / "saved", verify=False)


def test_hf_has_no_place_for_quantised_weights(tmp_path: Path) -> None:
    model = make_llama()
    quantise(model, "int4")
    with pytest.raises(ValueError, match="hf-llama"):
        save_pretrained(model, tmp_path / "saved", "hf")
    dequantise(model)
    save_pretrained(model, tmp_path / "saved", "hf")
    assert torch.equal(from_pretrained(tmp_path / "saved")(IDS), model(IDS))


def test_copies_pickles_and_states_keep_the_codes() -> None:
    model = make_llama()
    quantise(model, {"*": "int4", "head": "int8"})
    expected = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make_llama(seed=8)
    quantise(other, {"*": "int4", "head": "int8"})
    assert not torch.equal(other(IDS), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(IDS), expected)


# ------------------------------------------------------------------------ running


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_logits_are_those_of_a_plain_model_with_the_same_weights(kind: str) -> None:
    model = make_cogagent()
    quantise(model, kind)
    plain = copy.deepcopy(model)
    dequantise(plain)
    assert set(kinds_of(plain).values()) == {"plain"}
    batch = at_size._question(model)
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    expected = plain(**batch)
    assert (model(**batch) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_cached_steps_equal_whole_runs() -> None:
    model = make_llama()
    quantise(model, "int4")
    whole, cache = model(IDS), KVCache(model, 1, 7)
    steps = torch.cat([model(token[:, None], cache=cache) for token in IDS.unbind(1)], 1)
    assert (steps - whole).abs().max() < 1e-5 * whole.abs().max()


def test_hooks_that_were_claimed_before_reach_the_quantised_linears() -> None:
    model = make_llama()
    model.add_mixin("lora", LoRAMixin(["qkv", "head"], rank=2))
    jitter(model)
    with_lora = copy.deepcopy(model)
    quantise(with_lora, "int8")
    without = copy.deepcopy(with_lora)
    without.del_mixin("lora")
    change = (with_lora(IDS) - without(IDS)).abs().max()
    assert change > 0.05 and (with_lora(IDS) - model(IDS)).abs().max() < 0.3 * change


# ------------------------------------------------------------------------ LoRA on quantised weights


def lora_on_quantised(kind: str) -> LLaMA:
    model = make_llama()
    quantise(model, kind)
    model.add_mixin("lora", LoRAMixin(["language"], rank=4))
    return model


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_lora_gets_the_gradients_that_it_gets_on_plain_weights_and_nothing_else_does(kind: str) -> None:
    model = lora_on_quantised(kind)
    stir_lora(model)
    plain = copy.deepcopy(model)
    dequantise(plain)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora" in name)
        loss_of(each, IDS).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys() and all("lora" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_lora_learns_and_the_quantised_weights_stay_bit_for_bit(tmp_path: Path) -> None:
    model = lora_on_quantised("int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    first = loss_of(model, ids).item()
    batches = [{"input_ids": ids, "labels": ids}] * 30
    train(model, batches, TrainConfig(30, 2e-2, warmup_steps=2, trainable=["lora"], progress=False))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora" in name for name in changed)
    assert loss_of(model.eval(), ids).item() < 0.5 * first
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(from_pretrained(tmp_path / "saved")(IDS), model(IDS))


def test_training_quantised_weights_is_refused() -> None:
    model = lora_on_quantised("int4")
    batches = [{"input_ids": IDS, "labels": IDS}]
    with pytest.raises(ValueError, match=r"Quantised weights cannot be trained.*trainable: \[lora\]"):
        train(model, batches, TrainConfig(1, progress=False))


def test_weights_that_hold_a_merged_lora_are_not_quantised() -> None:
    model = make_llama()
    model.add_mixin("lora", LoRAMixin(["qkv"], rank=2))
    stir_lora(model)
    expected = model(IDS)
    model.get_mixin("lora").merge(model)
    with pytest.raises(ValueError, match=r"'mixins\.lora' is merged .* unmerge\(\), or `merge_loras\(model\)`"):
        quantise(model, "int8")
    assert set(kinds_of(model).values()) == {"plain"}
    merge_loras(model)
    quantise(model, {"language": "int8"})
    assert (model(IDS) - expected).abs().max() < 0.1 * expected.abs().max()


def train_lora(folder: Path, choice: str) -> None:
    """Three steps of two rows, one a process if there are two; leave losses and LoRA weights."""
    from mixformer.train.parallel import engine_of

    engine, model = engine_of(choice, minutes=3), lora_on_quantised("int4/32")
    rows = [torch.cat([IDS, IDS.flip(1)]) + step for step in range(3)]
    own = [ids[engine.rank :: engine.world_size] for ids in rows]
    config = TrainConfig(
        steps=3, warmup_steps=1, trainable=["lora"], progress=False, log_every=1, log_path=str(folder / "log.jsonl")
    )
    train(model, [{"input_ids": ids, "labels": ids} for ids in own], config, engine=engine)
    with engine.whole(model) as whole:
        if whole is not None:
            torch.save(whole.state_dict(), folder / "weights.pt")
    engine.close()


@pytest.mark.parametrize("choice", ["ddp", "fsdp"])
def test_two_processes_train_a_lora_on_quantised_weights_as_one_does(choice: str, tmp_path: Path) -> None:
    forks.shared().run("test_quantised.train_lora", tmp_path / choice, choice)
    (tmp_path / "single").mkdir()
    train_lora(tmp_path / "single", "single")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in (choice, "single")]
    two, one = ([json.loads(line)["step_loss"] for line in log] for log in logs)
    assert len(one) == 3 and one[2] < one[0]
    assert two == pytest.approx(one, abs=1e-6, rel=0)
    found, expected = (torch.load(tmp_path / name / "weights.pt") for name in (choice, "single"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith((".codes", ".scale")):
            assert torch.equal(found[name], tensor)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_merging_into_quantised_weights_is_refused_and_works_on_what_they_stand_for() -> None:
    model = lora_on_quantised("int4")
    stir_lora(model)
    expected = model(IDS)
    with pytest.raises(ValueError, match=r"is quantised \(int4/64\) and cannot be .* changed.*dequantise\(model\)"):
        model.get_mixin("lora").merge(model)
    assert torch.equal(model(IDS), expected)
    dequantise(model)
    model.get_mixin("lora").merge(model)
    assert (model(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("merge", [lambda model: model.get_mixin("lora").merge(model), merge_loras])
def test_a_merge_that_one_quantised_linear_refuses_changes_none(merge: Callable[[Any], object]) -> None:
    model = make_llama()
    model.add_mixin("lora", LoRAMixin(["qkv", "up"], rank=4))
    stir_lora(model)
    quantise(model, {"*.layers.1.mlp.up": "int8"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be read or changed"):
        merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------ settings and benchmarks


def test_settings_take_one_kind_or_one_for_each_part(tmp_path: Path) -> None:
    save_pretrained(make_llama(), tmp_path / "saved")
    file = tmp_path / "quantised.yaml"
    file.write_text("model_class: models.llama:LLaMA\nweights: saved\nquantise: {language: int4, head: null}\n")
    model = read_settings(None, file).load_model()
    assert {kind for path, kind in kinds_of(model).items() if "head" not in path} == {"int4/64", "int4/32"}
    assert kinds_of(model)["mixins.head.linear"] == "plain"
    for text, kind in (("int8", "int8"), ("{'*': int4/32}", "int4/32"), ("null", "plain")):
        model = read_settings(None, file, ["--quantise", text]).load_model()
        assert set(kinds_of(model).values()) == {kind}
    file.write_text("model_class: models.llama:LLaMA\nquantise: int4\n")
    with pytest.raises(ValueError, match=r"quantised\.yaml: quantise is for the weights of a checkpoint"):
        read_settings(None, file)


def test_the_mini_still_finds_the_button(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = str(at_size.ROOT / "examples" / "configs" / "cogagent-mini.yaml")
    for kind in ("int8", "{'*': int4/32, cross.tower: int8}"):
        main("models.cogagent:CogAgent", ["--config", config, "--quantise", kind, "--chat.output", str(tmp_path)])
        text = capsys.readouterr().out.split("[[")[1].split("]]")[0]
        found, expected = [int(number) for number in text.split(",")], [250, 13, 558, 121]  # what fp32 answers
        assert all(abs(a - b) <= 12 for a, b in zip(found, expected, strict=True)), (kind, text)


def test_the_run_at_size_writes_loads_answers_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(options: Any, threads: int) -> Any:
        return json.loads(json.dumps(at_size._as_child(json.loads(json.dumps(options)))))

    monkeypatch.setattr(at_size, "_child", here)  # processes of their own take seconds to start
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = "--small --answer 3 --threads 1 --json --steps 2 --quantise int4"
    at_size.main(["cogagent", *options.split()])
    found = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    stages = ("writing", "loading", "encoding (image)", "encoding (cross)", "prefill", "per token", "tokens per second")
    assert all(found[stage] > 0 for stage in stages)
    assert found["peak of training"] >= found["peak"] >= found["peak of loading"] >= found["peak at start"] > 50e6
    assert found["losses"][1] < found["losses"][0] and found["seconds per step"] > 0
    assert found["weights in memory"] < 0.6 * found["bytes on disk"]
    assert 0.3 < found["spread of logits"] < 3


def test_folders_that_are_named_are_used_again_or_left_alone(tmp_path: Path) -> None:
    def write(folder: Path, quantise: Any = None) -> int:
        options = {"stage": "write", "name": "llama", "folder": str(folder), "part": 1, "small": True, "shown": False}
        return int(at_size._as_child({**options, "quantise": quantise})["bytes on disk"])

    folder, other = tmp_path / "new" / "llama", tmp_path / "other"
    with pytest.raises(ValueError, match="'int3' is no kind"):
        write(folder, {"language": "int3"})
    assert not folder.exists()
    size = write(folder)
    files = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert write(folder) == size and "unfinished" not in files
    assert files == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    (folder / "config.json").unlink()  # as if it had been killed
    (folder / "unfinished").touch()
    write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: old[1] for name, old in files.items()}
    save_pretrained(make_llama(), other, "hf")  # of the same sizes, in fp32
    with pytest.raises(ValueError, match="other holds another model"):
        write(other)
    (other / "config.json").unlink()
    with pytest.raises(ValueError, match="other holds something else and is left as it is"):
        write(other)
    assert [path.name for path in other.iterdir()] == ["model.safetensors"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"llama needs 0\.0 GB, and 0\.0 GB are free"):
        at_size.write("llama", tmp_path / "llama", small=True, shown=False)
    assert not list((tmp_path / "llama").glob("*.safetensors"))


def test_a_peak_above_the_limit_and_logits_that_are_not_finite_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_size, "measure", lambda *arguments, **options: {"peak": 2e9, "limit": 1e9})
    with pytest.raises(SystemExit) as error:
        at_size.main(["llama", "--small"])
    assert error.value.code == 1
    folder = tmp_path / "llama"
    expected = sum(tensor.nbytes for tensor in LLaMA(at_size.config_of("llama", small=True)).bfloat16().parameters())
    assert at_size.write("llama", folder, small=True, shown=False) == expected
    at_size.run(folder, None, answer=2, threads=1, shown=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FloatingPointError, match="not finite"):
        at_size.run(folder, None, answer=2, threads=1, shown=False)


def test_differences_are_counted_as_the_table_says(tmp_path: Path) -> None:
    reference = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    found = difference(reference + torch.tensor([[0.0, -4.0], [0.0, 0.0]]), reference)
    gap = torch.tensor([0.0, 2.0]).softmax(0)
    divergence = gap[0] * (gap[0] / gap[1]).log() + gap[1] * (gap[1] / gap[0]).log()
    assert found["top 1"] == 0.5 and found["logits"] == pytest.approx((16 / 4) ** 0.5 / 1.0)
    assert found["KL"] == pytest.approx(float(divergence) / 2, rel=1e-5)
    save_pretrained(make_llama(), tmp_path / "saved")
    rows = list(compare(tmp_path / "saved", [{"input_ids": IDS}], {"int8": "int8", "bf16": None}, 4))
    assert rows[0][:1] + rows[0][2:6] == ["bf16", "0.0000", "0.0e+00", "1.000", "1 of 1"]
    assert 0 < float(rows[1][2]) < 0.2 and float(rows[1][1]) < float(rows[0][1])
    shutil.rmtree(tmp_path / "saved")


def test_greedy_answers_of_8_bits_are_those_of_the_plain_model() -> None:
    model = make_llama()
    model.transformer.word_embeddings.weight.data *= 20  # so that one token is far likelier than the others
    expected = generate(model, {"input_ids": IDS}, max_new_tokens=6)
    quantise(model, "int8")
    assert torch.equal(generate(model, {"input_ids": IDS}, max_new_tokens=6), expected)
