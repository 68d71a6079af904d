"""Weights go from files into models: as they were, within memory, with errors that name the file and the tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file

import mixformer.filling as filling
import mixformer.shards as shards
from mixformer import from_pretrained, save_pretrained
from mixformer.shards import INDEX, SafetensorsFolder, check_safetensors
from models.llama import LLaMA, LLaMAConfig

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40}


@pytest.fixture
def small() -> LLaMA:
    return LLaMAConfig(**SIZES).build(generator=torch.Generator().manual_seed(3))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "llama-hf", folder)
    return folder


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_with(path: Path, header: dict[str, Any] | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# ------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("size", ["200", "5KB", "1GB"])
@pytest.mark.parametrize("format", ["own", "hf"])
@pytest.mark.parametrize("ahead", [0, 3000, 10**9])
def test_shards_of_any_size_give_the_same_weights_whatever_is_read_ahead(
    small: LLaMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, format: str, ahead: int
) -> None:
    monkeypatch.setattr(filling, "READ_AHEAD", ahead)
    save_pretrained(small, tmp_path / "saved", format, max_shard_size=size)
    again, stored = from_pretrained(tmp_path / "saved").state_dict(), small.state_dict()
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def test_conversion_on_the_way_is_that_of_the_whole_model(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved")
    found, expected = from_pretrained(tmp_path / "saved", dtype="bfloat16").state_dict(), small.state_dict()
    assert all(torch.equal(found[name], expected[name].to(torch.bfloat16)) for name in expected)


def test_many_threads_read_one_file_each_at_its_own_place(tmp_path: Path) -> None:
    tensors = {f"{index:03d}": torch.randn(50, 7 + index) for index in range(60)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tensors, pool.map(source.read, list(tensors) * 5), strict=False))
    source.close()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_systems_without_reads_at_a_place_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    test_many_threads_read_one_file_each_at_its_own_place(tmp_path)


@pytest.mark.parametrize(
    ("progress", "limit", "shown"), [(None, 10**9, 0), (None, 1, 1), (True, 10**9, 1), (False, 1, 0)]
)
def test_long_reading_shows_a_bar_on_the_error_output(
    small: LLaMA, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    progress: bool | None, limit: int, shown: bool,
) -> None:
    monkeypatch.setattr(filling, "PROGRESS_FROM", limit)
    save_pretrained(small, tmp_path / "saved")
    from_pretrained(tmp_path / "saved", progress=progress)
    printed = capsys.readouterr()
    assert ("Reading weights" in printed.err) == shown and not printed.out


LOAD = """
import json, sys
from pathlib import Path
import torch
import models.weights
from mixformer import from_pretrained
from tests.benchmarks.loading import Peak
torch.set_num_threads(1)
folder, quantise = sys.argv[1], sys.argv[2] or None
warm = from_pretrained(Path(folder).parent / "tiny", quantise=quantise, dtype=torch.bfloat16)
peak = Peak()
model = from_pretrained(folder, quantise=quantise, dtype=torch.bfloat16)
size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(json.dumps({"peak": peak.added(), "weights": size}))
"""


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in HF's format, fp32, of shards of 60 MB, and a tiny one beside it."""
    folder = tmp_path_factory.mktemp("memory")
    wide = {**SIZES, "vocab_size": 4000, "hidden_size": 1024, "num_layers": 8, "inner_hidden_size": 2816}
    for name, sizes in (("tiny", SIZES), ("large", wide)):
        model = LLaMAConfig(**sizes).build(device="meta").to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        save_pretrained(model, folder / name, "hf", max_shard_size="60MB")
    return folder / "large"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("quantise", ["", "int4"])
def test_loading_never_holds_more_than_the_weights_and_a_few_tensors(half_a_gigabyte: Path, quantise: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(half_a_gigabyte), quantise], env=environment, capture_output=True, text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    in_files = sum(path.stat().st_size for path in half_a_gigabyte.glob("*.safetensors"))
    assert found["weights"] < in_files * {"": 0.51, "int4": 0.18}[quantise]
    # A few tensors at a time, and what rounding holds beside. The promise is a shard and 300 MB, too much to see here.
    assert found["peak"] < found["weights"] + 150e6 < in_files * 0.85, found


# ------------------------------------------------------------------------ what is refused


def test_a_flipped_bit_in_any_shard_is_found_while_reading(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved", max_shard_size="9KB")
    files = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(files) > 3
    for path in (files[0], files[-1]):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged: its SHA-256"):
            from_pretrained(tmp_path / "saved")
        from_pretrained(tmp_path / "saved", verify=False)
        content[-1] ^= 1
        path.write_bytes(content)
    from_pretrained(tmp_path / "saved")


def test_damage_is_told_rather_than_the_misfit_that_follows_from_it(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"final_norm", b"fimal_norm"))
    index = tmp_path / "saved" / INDEX
    index.write_text(index.read_text().replace("final_norm", "fimal_norm"))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not fit LLaMA"):
        from_pretrained(tmp_path / "saved", verify=False)


def test_a_file_cut_off_while_threads_read_it_is_an_error(
    small: LLaMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(small, tmp_path / "saved", "hf")
    path = tmp_path / "saved" / "model.safetensors"

    def check_and_cut(file: Path) -> Any:
        found = check_safetensors(file)
        with file.open("r+b") as opened:
            opened.truncate(path.stat().st_size // 2)
        return found

    monkeypatch.setattr(shards, "check_safetensors", check_and_cut)
    with pytest.raises(ValueError, match=r"model\.safetensors ended while '.+' was read"):
        from_pretrained(tmp_path / "saved")


def test_shards_without_their_index_are_told_so(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"shards, such as model-00001-of-00002\.safetensors, and no model.*index"):
        from_pretrained(hf)


def test_a_shard_that_the_index_does_not_list_is_refused(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved", "hf", max_shard_size="9KB")
    first = next((tmp_path / "saved").glob("model-00001-of-*"))
    for name in ("model.safetensors", "model-00001-of-00099.safetensors"):
        shutil.copy(first, tmp_path / "saved" / name)
        with pytest.raises(ValueError, match=rf"holds {name}, which .*index\.json does not list"):
            from_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / name).unlink()
    from_pretrained(tmp_path / "saved")


def test_a_tensor_in_two_shards_is_named_with_both(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved", "hf", max_shard_size="9KB")
    first, second, *_ = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(ValueError, match=rf"'{name}' is in two files .*{first.name} and {second.name}"):
        from_pretrained(tmp_path / "saved")


def test_headers_that_contradict_themselves_are_refused(hf: Path) -> None:
    path = hf / "model.safetensors"
    header, body = header_of(path)
    name = "model.layers.1.input_layernorm.weight"
    first, last = header[name]["data_offsets"]
    assert 0 < first < last < len(body)
    for changed, message in (
        ({"shape": [2]}, rf"'{name}', F32 \[2\], cannot lie at bytes {first} to {last}"),
        ({"shape": None}, rf"'{name}', F32 None"),
        ({"data_offsets": [0, last - first]}, "cannot lie at bytes"),
        ({"data_offsets": [first, len(body)]}, "cannot lie at bytes"),
        ({"dtype": "F4"}, rf"model\.safetensors: '{name}' is stored as F4"),
    ):
        write_with(path, {**header, name: {**header[name], **changed}}, body)
        with pytest.raises(ValueError, match=message):
            from_pretrained(hf)
    text = json.dumps(header)
    write_with(path, f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}', body)
    with pytest.raises(ValueError, match=rf"'{name}' is there twice"):
        from_pretrained(hf)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_plain_numbers_are_named_with_their_file(hf: Path, dtype: torch.dtype) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, hf / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"1 of another dtype, mixin 'head'.*'lm_head.weight' is {name} \(in model"):
        from_pretrained(hf)


def test_parts_of_one_tensor_need_one_dtype(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].double()
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ValueError, match=r"one tensor, the file .*q_proj\.weight float32, .*k_proj\.weight float64"):
        from_pretrained(hf)


def test_a_misshaped_tensor_is_named_with_its_shard(small: LLaMA, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "saved", "hf", max_shard_size="9KB")
    path = next(file for file in (tmp_path / "saved").glob("model-*") if "lm_head.weight" in header_of(file)[0])
    save_file({**load_file(path), "lm_head.weight": torch.zeros(60, 32)}, path)
    with pytest.raises(ValueError, match=rf"\[61, 32\], the file lm_head\.weight \[60, 32\] \(in {path.name}\)"):
        from_pretrained(tmp_path / "saved")


def test_a_config_of_other_sizes_than_the_weights_names_the_tensors(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ValueError, match=r"7 missing, backbone: transformer\.layers\.3\.attention\.qkv\.weight \(a"):
        from_pretrained(hf)
    wider = {**config, "intermediate_size": config["intermediate_size"] + 8}
    (hf / "config.json").write_text(json.dumps(wider))
    with pytest.raises(ValueError, match=r"of another shape, backbone: .*gate_proj\.weight .*in model\.safetensors"):
        from_pretrained(hf)


def test_weights_that_another_program_quantised_are_refused(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says that the weights are quantised \(gptq\)"):
        from_pretrained(hf)
