"""What a model is made of and costs, against published figures, arithmetic, real caches and real files."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixformer import BaseMixin, KVCache, save_pretrained, wrap
from mixformer.accounting import Workload, compare, describe, description
from mixformer.accounting.forward import count_forward
from mixformer.accounting.html import page
from mixformer.accounting.parameters import part_sizes, total_size
from mixformer.accounting.workload import meta_twin
from mixformer.cli import console
from mixformer.config import read_settings
from mixformer.mixins import LoRAMixin, PrefixTuningMixin, VisionExpertFCMixin
from mixformer.quantised import choose, resolve_hooks, shape_linear
from mixformer.shards import SafetensorsFolder
from mixformer.testing import collate, sample_row, tiny_model

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
GOLDEN = ROOT / "tests" / "golden"


def part(summary: dict[str, Any], name: str) -> dict[str, Any]:
    owner, _, rest = name.partition(".")
    return next(row for row in summary["parts"] if (row["owner"], row["part"]) == (owner, rest))


DESCRIBE = """
import sys
from mixformer.cli import console
from tests.benchmarks.at_size import peak
console(["describe", sys.argv[1], "--json"])
print(peak(), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def cogagent() -> dict[str, Any]:
    """The 18B model, described by its command in a process of its own; what that took is beside it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", DESCRIBE, str(CONFIGS / "cogagent-18b.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout), "seconds": seconds, "bytes of memory": int(done.stderr.split()[-1])}


# ---------------------------------------------------------------- published figures


def test_the_18b_model_is_described_in_10_seconds_and_1_5_gb(cogagent: dict[str, Any]) -> None:
    assert cogagent["seconds"] < 10  # of the processor's time: others may use it as well
    assert cogagent["bytes of memory"] < 1.5e9


def test_parts_of_the_18b_model_have_their_published_sizes(cogagent: dict[str, Any]) -> None:
    sizes = {name: sum(entry["parts"].values()) for name, entry in cogagent["mixins"].items()}
    assert cogagent["parameters"] == 18_291_033_280
    assert cogagent["bytes"] == {"bfloat16": 2 * 18_291_033_280}
    assert part(cogagent, "cross.layers")["parameters"] == 335_675_392
    assert part(cogagent, "cross.tower")["parameters"] + 6400 * 1024 == 316_950_208
    assert part(cogagent, "image.projector")["parameters"] == 142_614_528 + 256 * 1792  # with CogAgent's positions
    assert sizes["vision_expert"] + sizes["vision_expert_mlp"] == 6_476_005_376
    layers = sum(part(cogagent, f"transformer.{name}")["parameters"] for name in ("attention", "mlp", "norms"))
    assert layers + sizes["vision_expert"] + sizes["vision_expert_mlp"] == 12_952_272_896
    assert cogagent["stages"]["cross"] == 652_625_600
    assert cogagent["nested"]["image.tower"]["parameters"] == 4_279_387_392 + 257 * 1792 + 1792 + 1792 * (3 * 14**2 + 1)


def configured(name: str, *overrides: str) -> Any:
    return read_settings(None, CONFIGS / f"{name}.yaml", overrides, ()).build_model("meta")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("cogvlm-17b-224", 17_637_948_928),
        ("cogvlm-17b-490", 17_639_685_376),
        ("cogvlm2-19b", 19_503_105_280),
        ("cogagent-18b", 18_291_033_280),
    ],
)
def test_totals_are_those_of_the_released_models(name: str, parameters: int) -> None:
    sizes = part_sizes(configured(name))
    assert total_size(sizes.values()).parameters == parameters


def trained_parts(*overrides: str) -> tuple[int, int, int]:
    """Parameters of the visual experts, of the projector, and of boi and eoi."""
    sizes = {str(part): size.parameters for part, size in part_sizes(configured("cogvlm-17b-224", *overrides)).items()}
    experts = sum(number for name, number in sizes.items() if name.startswith("vision_expert"))
    return experts, sizes["image.projector"], sizes["image.boi"] + sizes["image.eoi"]


def test_the_experts_and_their_ablations_have_the_published_sizes() -> None:
    experts, adapter, marks = trained_parts()
    assert (experts, adapter, experts + adapter + marks) == (6_476_005_376, 142_614_528, 6_618_628_096)
    every_fourth = trained_parts("--model.expert_layers", str(list(range(0, 32, 4))))[0]
    assert every_fourth + adapter == pytest.approx(1.76e9, abs=0.005e9)
    mlp_only = trained_parts("--mixins.vision_expert=null")[0]
    assert mlp_only + adapter == pytest.approx(4.47e9, abs=0.005e9)
    assert 6_738_415_616 + adapter == pytest.approx(6.88e9, abs=0.005e9)


FLOPS = {
    ("cogvlm-17b-224", ()): ({0: 5.76, 128: 7.49, 512: 12.80}, 7.46),
    ("cogvlm-17b-490", ()): ({0: 28.54, 128: 30.40, 512: 36.10}, 29.72),
    ("cogagent-18b", ("--model.cross_vision.image_size=756",)): ({0: 8.88, 128: 10.73, 512: 16.39}, 9.90),
    ("cogagent-18b", ()): ({0: 14.55, 128: 16.46, 512: 22.29}, 12.57),
    ("cogvlm-17b-490", ("--model.vision.image_size=1120",)): ({0: 181.2, 128: 183.8, 512: 191.6}, 165.3),
}
"""{model: (T operations for tokens of text, and for 128 of them without the attention products of towers)}."""


@pytest.mark.parametrize(("name", "overrides"), FLOPS)
def test_operations_are_those_recomputed_for_the_papers_by_both_rules(name: str, overrides: tuple[str, ...]) -> None:
    counted, without = FLOPS[name, overrides]
    model = configured(name, *overrides)
    for tokens, expected in counted.items():
        flops = count_forward(model, Workload(tokens, 1, 1)).flops
        digit = 0.01 if expected < 100 else 0.1  # the last one that is given
        assert flops.total / 1e12 == pytest.approx(expected, abs=0.6 * digit), tokens
        if tokens == 128:
            assert (flops.total - flops.tower_attention) / 1e12 == pytest.approx(without, abs=0.6 * digit)


def test_operations_of_the_18b_model_and_the_terms_that_dominate_them(cogagent: dict[str, Any]) -> None:
    flops = cogagent["forward"]["flops"]
    assert flops["total"] / 1e12 == pytest.approx(16.46, abs=0.006)
    assert flops["without_tower_attention"] / 1e12 == pytest.approx(12.57, abs=0.006)
    largest = [(term["part"], term["operator"]) for term in flops["terms"][:2]]
    assert set(largest) == {("cross.tower", "attention"), ("cross.tower", "weights")}
    attention = 23 * 4 * 6401**2 * 1024  # layers that run, two products, all patches and cls
    assert part(cogagent, "cross.tower")["flops"]["attention"] == attention
    assert sum(term["share"] for term in flops["terms"]) == pytest.approx(1)
    assert "multiply-add is 2" in flops["rule"]


def test_the_cache_of_the_18b_model(cogagent: dict[str, Any]) -> None:
    cache, layers = cogagent["forward"]["cache"], 32
    assert cache["per_token"] == 2 * layers * 4096 * 2
    assert cache["per_image"] == 2 * layers * 6400 * 1024 * 2 + 6400  # and which of the features are real
    assert cache["dtype"] == "bfloat16"


# ---------------------------------------------------------------- arithmetic


def test_operations_belong_to_the_part_that_has_the_weights_or_runs_the_products() -> None:
    model = tiny_model("cogagent")  # h 32, inner 40, 2 layers, 4 heads, 4 features a picture, 9 cross features of 16
    batch, text, images = 2, 9, 2
    summary = describe(model, Workload(text, images, batch))
    row = 1 + text + images * 6
    image, language = batch * images * 5, batch * (row - images * 5)
    layers, hidden, inner = 2, 32, 40
    assert summary["forward"]["row_length"] == row
    assert part(summary, "transformer.mlp")["flops"] == {"weights": 2 * layers * 3 * hidden * inner * language}
    assert part(summary, "vision_expert_mlp.layers")["flops"] == {"weights": 2 * layers * 3 * hidden * inner * image}
    assert part(summary, "vision_expert.layers")["flops"] == {"weights": 2 * layers * 4 * hidden**2 * image}
    assert part(summary, "transformer.attention")["flops"] == {
        "weights": 2 * layers * 4 * hidden**2 * language, "attention": layers * 2 * 2 * batch * row**2 * hidden,
    }
    keys, width = images * 9, 24
    assert part(summary, "cross.layers")["flops"] == {
        "weights": layers * (2 * 2 * hidden * width * batch * row + 2 * 16 * 2 * width * batch * keys),
        "attention": layers * 2 * 2 * batch * row * keys * width,
    }
    assert part(summary, "head.linear")["flops"] == {"weights": 2 * hidden * 61 * batch * row}
    tower = part(summary, "image.tower")["flops"]
    assert tower["attention"] == batch * images * 2 * 2 * 5**2 * 16
    assert tower["convolution"] == 2 * batch * images * 4 * 3 * 14**2 * 16
    assert summary["nested"]["image.tower"]["parts"][-1]["flops"] == {"convolution": tower["convolution"]}
    inside = sum(sum(row["flops"].values()) for row in summary["nested"]["image.tower"]["parts"])
    assert inside == sum(tower.values())
    assert summary["forward"]["flops"]["total"] == sum(sum(row["flops"].values()) for row in summary["parts"])


def test_low_rank_updates_are_counted_as_their_own() -> None:
    model = tiny_model("llama")
    before = describe(model, Workload(7, 0, 1))["forward"]["flops"]["total"]
    model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=3))
    summary = describe(model, Workload(7, 0, 1))
    assert part(summary, "lora.layers")["flops"] == {"weights": 2 * 2 * 8 * 3 * (32 + 32)}
    assert summary["forward"]["flops"]["total"] == before + 2 * 2 * 8 * 3 * (32 + 32)


def test_a_tied_head_is_counted_once_as_parameters_and_its_product_as_the_tables() -> None:
    summary = of_config_tiny("gpt2")
    hidden, vocabulary = summary["config"]["hidden_size"], summary["config"]["vocab_size"]
    table = part(summary, "transformer.word_embeddings")
    assert table["parameters"] == hidden * vocabulary
    assert table["flops"] == {"weights": 2 * hidden * vocabulary * summary["forward"]["row_length"]}


def of_config_tiny(name: str) -> dict[str, Any]:
    settings = read_settings(None, ROOT / "examples" / "zoo" / name / "tiny.yaml", [], ())
    return describe(settings.build_model("meta"))


@pytest.mark.parametrize("kind", ["cogvlm", "cogvlm2", "cogagent"])
def test_cache_bytes_are_those_of_a_real_cache(kind: str) -> None:
    model = tiny_model(kind)
    rows = [sample_row(model, 2, 6) for _ in range(3)]
    batch = {name: value for name, value in collate(rows).items() if name != "attention_mask"}
    length = batch["input_ids"].shape[1]
    cache = KVCache(model, 3, length)
    model(**batch, cache=cache)
    found = describe(model, Workload(5, 2, 3))["forward"]["cache"]
    assert found["per_token"] * 3 * length == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    kept = sum(value.nbytes for value in cache.memo.values() if isinstance(value, torch.Tensor))
    assert found["per_image"] * 6 == kept
    assert (kept > 0) == (kind == "cogagent")


# ---------------------------------------------------------------- what is shown


def test_sizes_of_parts_are_told_with_what_trains_and_in_which_dtype() -> None:
    model = tiny_model("cogvlm").bfloat16()
    model.mixins["image"].projector.float().requires_grad_(False)
    summary = describe(model)
    projector = sum(parameter.numel() for parameter in model.mixins["image"].projector.parameters())
    row = part(summary, "image.projector")
    assert (row["parameters"], row["trainable"], row["bytes"]) == (projector, 0, {"float32": 4 * projector})
    assert summary["trainable"] == summary["parameters"] - projector
    assert summary["bytes"] == {"bfloat16": 2 * summary["trainable"], "float32": 4 * projector}
    assert summary["mixins"]["image"]["bytes"]["float32"] == 4 * projector


def test_the_grid_says_for_every_layer_who_owns_a_hook() -> None:
    model = tiny_model("cogvlm", num_layers=4, expert_layers=[1, 3])
    model.add_mixin("lora", LoRAMixin(["up"]), layers=[2])
    rows = {row["hook"]: row for row in describe(model)["grid"]}
    expert = ["default", "vision_expert_mlp"]
    assert rows["mlp_forward"]["chains"] == [["default"], expert, ["default"], expert]
    assert rows["linear_forward up"]["chains"] == [["default"], ["default"], ["default", "lora"], ["default"]]
    assert rows["final_forward"] == {"hook": "final_forward", "of_layers": False, "chains": [["head"]]}


def test_a_real_model_is_left_as_it_is() -> None:
    model = tiny_model("cogagent").train()
    model.mixins["head"].requires_grad_(False)
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    text = str(model.hooks)
    describe(model)
    twin = meta_twin(model)
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert twin.config is not model.config and twin.config == model.config
    assert model.training and str(model.hooks) == text
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter) and before[name][2] == parameter.requires_grad
        assert torch.equal(before[name][1], parameter)


def test_a_quantised_model_does_as_many_operations_and_takes_fewer_bytes(tmp_path: Path) -> None:
    model = tiny_model("cogagent")
    before = describe(model, Workload(8, 1, 1))
    quantised = meta_twin(model)
    for path, kind in choose(quantised, "int8").items():
        shape_linear(quantised.get_submodule(path), kind)
    resolve_hooks(quantised)
    after = describe(quantised, Workload(8, 1, 1))
    assert after["forward"]["flops"]["total"] == before["forward"]["flops"]["total"]
    assert after["forward"]["flops"]["terms"] == before["forward"]["flops"]["terms"]
    assert after["parameters"] == before["parameters"] and after["trainable"] < before["trainable"]
    assert part(after, "transformer.mlp")["bytes"] == {"int8": 2 * 3 * 32 * 40, "float32": 4 * 2 * (40 + 40 + 32)}


class LooksAtValues(BaseMixin):
    """Does what cannot be done without values."""

    @wrap
    def layer_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Callable[..., Any]) -> Any:
        return old_impl(hidden_states) if hidden_states.sum().item() > 0 else hidden_states


def test_a_model_that_looks_at_values_has_sizes_and_a_reason_instead_of_operations() -> None:
    model = tiny_model("llama")
    model.add_mixin("looks", LooksAtValues())
    summary = describe(model)
    assert "problem" in summary["forward"] and summary["parameters"] > 0
    assert "could not be counted" in "\n".join(description(summary))
    assert "could not be counted" in page([summary], ["it"])


def test_text_names_the_dominating_terms_and_the_rule() -> None:
    text = "\n".join(description(describe(tiny_model("cogagent"), Workload(8, 1, 2))))
    assert "A forward of 2 rows of 15 tokens: 8 of text, 1 image:" in text
    assert re.search(r"\n  total +\d+,\d+ +\d+,\d+ +[\d.]+ kB float32 +[\d.]+ [MG]\n", text)
    plain = "\n".join(description(describe(tiny_model("llama"))))
    assert "FLOPs\n" in plain and "towers" not in plain  # it has none
    assert re.search(r"most of it: \w+\.\w+ \w+ \d+%", text) and "A multiply-add is 2 operations" in text
    assert re.search(r"cache: 512 B per token, and 3\.4\d+ kB per image, in float32", text)


# ---------------------------------------------------------------- two models


def test_the_difference_of_two_compositions() -> None:
    first, second = tiny_model("cogvlm"), tiny_model("cogvlm")
    second.del_mixin("vision_expert")
    second.add_mixin("prefix", PrefixTuningMixin(num_prefix=4), layers=[1])
    second.replace_mixin("vision_expert_mlp", VisionExpertFCMixin(), layers=[0])
    second.add_mixin("lora", LoRAMixin(["down"]), layers=[1])
    found = compare(describe(first, Workload(8, 1, 1)), describe(second, Workload(8, 1, 1)))
    changed = {"removed": ["vision_expert"], "added": ["prefix", "lora"], "changed": ["vision_expert_mlp"]}
    assert found["mixins"] == changed
    rows = {row["part"]: row for row in found["parts"]}
    assert rows["vision_expert.layers"]["parameters"] == [2 * 4 * 32**2, 0]
    assert rows["vision_expert_mlp.layers"]["parameters"] == [2 * 3 * 32 * 40, 3 * 32 * 40]
    assert "head.linear" not in rows
    hooks = {(row["hook"], *row["layers"]): (row["first"], row["second"]) for row in found["hooks"]}
    assert hooks["attention_fn", 1] == ("default", "default <- prefix")
    assert hooks["mlp_forward", 1] == ("default <- vision_expert_mlp", "default")
    assert hooks["qkv_forward", 0, 1] == ("default <- vision_expert", "default")
    assert hooks["linear_forward down", 1] == ("default", "default <- lora")
    assert ("linear_forward down", 0) not in hooks  # there it is by default in both
    totals = found["totals"]["parameters"]
    assert totals == [sum(p.numel() for p in model.parameters()) for model in (first, second)]
    assert found["config"] == {}


def test_two_targets_of_the_command_are_compared_and_overrides_are_the_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "examples" / "zoo" / "llava" / "tiny.yaml")
    console(["describe", config, config])
    assert capsys.readouterr().out.endswith("They do not differ.\n")
    console(["describe", config, config, "--model.num_layers", "5"])
    text = capsys.readouterr().out
    assert re.search(r"num_layers +\d -> 5\n", text) and re.search(r"layer_forward +layers 2-4 +-  ->  default\n", text)
    console(["describe", config, "--json", config, "--model.vision.image_size=64"])
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["vision.image_size"] == [32, 64] and found["first"]["parameters"] > 0


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["cogvlm2-hf", "cogagent-hf", "cogvlm-sat-mp2", "own"])
def test_a_folder_is_described_without_reading_its_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GOLDEN / name
    if name == "own":
        folder = tmp_path / "own"
        model = tiny_model("cogagent").bfloat16()
        model.mixins["cross"].float()
        save_pretrained(model, folder)
    read = SafetensorsFolder.read
    monkeypatch.setattr(
        SafetensorsFolder, "read", lambda self, name: read(self, name) if is_table(name) else unread(name)
    )
    monkeypatch.setattr("mixformer.shards.sha256", unread)
    console(["describe", str(folder), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["forward"]["flops"]["total"] > 0
    if "sat" not in name:
        sizes: dict[str, int] = {}
        stored = [item for file in sorted(folder.glob("model*.safetensors")) for item in load_file(file).items()]
        for key, tensor in stored:
            if not is_table(key):
                dtype = str(tensor.dtype).removeprefix("torch.")
                sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
        assert summary["bytes"] == sizes


def is_table(name: str) -> bool:
    """Whether a released file has it beside the weights: positions that the model computes."""
    return "inv_freq" in name or ".rope." in name


def unread(*arguments: Any) -> Any:
    raise AssertionError(f"weights were read: {arguments}")


# ---------------------------------------------------------------- the page


class Reader(HTMLParser):
    """Checks that tags are closed, and keeps what a page refers to and what its cells say."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag == "i" and "title" in given:
            self.titles.append(given["title"] or "")
        if tag not in ("meta", "link", "img", "br", "wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_from_outside_and_says_who_owns_every_layer(tmp_path: Path) -> None:
    config = ROOT / "examples" / "zoo" / "llava" / "tiny.yaml"
    target = tmp_path / "page.html"
    console(["describe", str(config), "--html", str(target), "--model.num_layers", "6"])
    text = target.read_text(encoding="utf-8")
    reader = read_page(text)
    assert reader.references == [] and "url(" not in text and "@import" not in text and "<script" not in text
    layers = [title for title in reader.titles if title.startswith("position_fn, layer")]
    assert layers[:6] == [f"position_fn, layer {index}: rotary" for index in range(6)]
    assert "final_forward, once per forward: head" in reader.titles
    assert "6 layers" in reader.text and "hooks by default everywhere: position_embedding_forward" in reader.text
    assert "<details><summary>" in text and "prefers-color-scheme: dark" in text
    folded = text[text.index("<details>") : text.index("</details>")]
    assert "mlp_forward, layer 5: default" in folded and "position_fn, layer" not in folded
    assert "Without the attention products of towers" in reader.text and "image.projector" in reader.text


def test_the_page_shows_a_tower_that_both_models_have_once_and_mixins_without_a_hook() -> None:
    first, second = tiny_model("cogagent"), tiny_model("cogagent")
    first.del_mixin("cross")
    summaries = [describe(model, Workload(8, 1, 1)) for model in (first, second)]
    text = read_page(page(summaries, ["a", "b"], compare(*summaries))).text
    assert text.count("As in the first.") == 1
    assert re.search(r"stored StoredHeadMixin, no hook", text)


def test_the_page_of_two_models_marks_what_differs() -> None:
    first, second = tiny_model("cogvlm"), tiny_model("cogagent")
    summaries = [describe(model, Workload(8, 1, 1)) for model in (first, second)]
    names = ["<first> & co", "second"]
    text = page(summaries, names, compare(*summaries))
    reader = read_page(text)
    assert text.count('class="changed"') == 2 * 2  # cross attention of two layers, in both
    assert "<first> & co" in reader.text and "Mixins added" in reader.text


# ---------------------------------------------------------------- mistakes


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        console(list(arguments))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.yaml").write_text("model_class: models.llama:LLaMA\nmodel: {hiden_size: 8}\n")
    (tmp_path / "no.txt").write_text("words")
    (tmp_path / "lost.yaml").write_text("model_class: models.llama:LLaMA\nweights: gone\n")
    save_pretrained(tiny_model("llama"), tmp_path / "two")
    (tmp_path / "other.yaml").write_text("model_class: models.llama:LLaMA\nweights: two\nmodel: {num_layers: 7}\n")
    (tmp_path / "bare").mkdir()
    shutil.copy(GOLDEN / "cogagent-hf" / "config.json", tmp_path / "bare")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("config.json", "model_config.json"):
        (mixed / name).write_text("{}")
    gpt2 = str(ROOT / "examples" / "zoo" / "gpt2" / "tiny.yaml")
    for arguments, said in {
        (str(tmp_path / "nowhere"),): "does not exist",
        (str(tmp_path / "nowhere.yaml"),): "nowhere.yaml cannot be read",
        (str(tmp_path / "wrong.yaml"),): "Did you mean 'hidden_size'",
        (str(tmp_path / "no.txt"),): "no.txt",
        (str(tmp_path / "lost.yaml"),): "--weights null",
        (str(tmp_path / "other.yaml"),): "num_layers is 7, but the checkpoint",
        (str(tmp_path / "bare"),): "weights are missing",
        (gpt2, "--html", str(tmp_path / "no" / "page.html")): "page.html cannot be written",
        (str(mixed),): "config.json and model_config.json",
        (gpt2, "--images", "1"): "takes no images",
        (gpt2, "--text-tokens", "5000"): "longer than the model's table of 64 positions",
        (gpt2, "--batch", "0"): "batch is 0",
        (gpt2, gpt2, gpt2): "was not expected",
        ("models.vit:ViT", "--images", "0"): "pictures only",
    }.items():
        assert said in failed(capsys, "describe", *arguments), arguments
