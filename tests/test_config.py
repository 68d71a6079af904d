"""Configuration files and overrides: what they make, and what is said about mistakes in them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mixformer import BaseMixin, save_pretrained
from mixformer.cli import main
from mixformer.config import ChatConfig, make, read_settings
from mixformer.connectors import PrefixMapperConfig, ProjectorConfig
from mixformer.mixins import CrossAttentionMixin, LoRAMixin
from mixformer.train import Task
from models.clipcap import ClipCap, PrefixConfig
from models.cogagent import CogAgent
from models.cogvlm import CogVLM
from models.eva2_clip import EVA2CLIPLConfig
from models.llama import LLaMA, LLaMAConfig

TINY = """
model_class: models.llama:LLaMA
seed: 3
model: {vocab_size: 20, hidden_size: 16, num_layers: 2, num_heads: 2, inner_hidden_size: 24}
"""


class PrefixGPT2(ClipCap):
    """ClipCap whose adapter may be of any kind."""

    Config = PrefixConfig


@dataclass
class Sizes:
    """Options of `Sized`."""

    width: int = 4
    names: list[str] = field(default_factory=list)


class Sized(BaseMixin):
    """A mixin with a nested option."""

    def __init__(self, sizes: Sizes, factor: float = 1.0) -> None:
        super().__init__()
        self.sizes, self.factor = sizes, factor


class Reading(Task):
    """A task with an option."""

    def __init__(self, letters: bool = False) -> None:
        self.letters = letters


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def error_of(model_class: type | None, file: Path | None, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        settings = read_settings(model_class, file, overrides)
        settings.build_model("meta")
    return str(caught.value)


def test_the_file_sets_what_it_names_and_the_rest_keeps_the_class_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {hidden_size: 64, vision: {image_size: 28}, adapter: {downsample: 2}}")
    config = read_settings(CogVLM, file).model
    assert (config.hidden_size, config.vision.image_size, config.adapter.downsample) == (64, 28, 2)
    assert (config.num_layers, config.vision.num_layers, config.norm) == (32, 63, "rmsnorm")
    assert config.vision.max_positions == 5  # (28 / 14)^2 patches and cls


def test_overrides_win_over_the_file_and_take_both_spellings(tmp_path: Path) -> None:
    file = write(tmp_path, TINY)
    config = read_settings(None, file, ["--model.num_layers", "5", "--model.rope_base=500", "--seed=9"])
    assert (config.model.num_layers, config.model.rope_base, config.model.hidden_size, config.seed) == (5, 500.0, 16, 9)


def test_text_on_the_command_line_stays_text() -> None:
    overrides = ["--chat.prompt", "Where is: the button?", "--chat.template=12"]
    chat = read_settings(LLaMA, None, overrides).chat
    assert (chat.prompt, chat.template) == ("Where is: the button?", "12")


def test_floats_may_be_written_in_scientific_notation(tmp_path: Path) -> None:
    assert read_settings(LLaMA, write(tmp_path, "model: {norm_eps: 1e-6}")).model.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("model.vision.patchsize", "'patch_size'"), ("model.hiden_size", "'hidden_size'"), ("chatt.prompt", "'chat'"),
        ("chat.max_tokens", "'max_new_tokens'"), ("cross_vision.image_size", "'model.cross_vision'"),
        ("model.patch_size", "'model.vision.patch_size'"), ("mixins.lora.clas_path", "'class_path'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(tmp_path: Path, key: str, right: str) -> None:
    section, *rest = key.split(".")
    text = section + ":" + "".join(f" {{{part}:" for part in rest) + " 1" + "}" * len(rest)
    in_file, on_line = error_of(CogAgent, write(tmp_path, text)), error_of(CogAgent, None, f"--{key}=1")
    assert str(tmp_path / "config.yaml") in in_file and "command line" in on_line
    for message in (in_file, on_line):
        assert f"Did you mean {right}?" in message
        assert "unknown" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {hidden_size: wide}", "model.hidden_size"), ("model: {vision: 3}", "model.vision"),
        ("model: [1]", "model"), ("seed: 1.5", "seed"), ("dtype: float8", "dtype"), ("device: toaster", "device"),
        ("chat: {max_new_tokens: many}", "chat.max_new_tokens"), ("chat: {temperature: -1}", "chat.temperature"),
        ("mixins: [lora]", "mixins"), ("mixins: {lora: {init_args: {rank: 1}}}", "mixins.lora: class_path"),
        ("model: {norm: rms}", "choose one of layernorm, rmsnorm"), ("model: {num_heads: 7}", "7 heads"),
        ("just text", "no sections"), ("model: {", "no YAML"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_file_and_the_key(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, text)
    message = error_of(CogAgent, file)
    assert str(file) in message and said in message


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert "nothing.yaml" in error_of(LLaMA, tmp_path / "nothing.yaml")


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    assert "python -m models.llama" in error_of(CogVLM, write(tmp_path, TINY))


def test_mixins_are_added_in_the_order_of_the_file_and_null_removes(tmp_path: Path) -> None:
    file = write(tmp_path, TINY + """
mixins:
  prefix: {class_path: mixformer.mixins.PrefixTuningMixin, init_args: {num_prefix: 3}, layers: [1]}
  lora: {class_path: mixformer.mixins.LoRAMixin, init_args: {sites: ["qkv:q"], rank: 2}}
  head: null
""")
    model = read_settings(None, file).build_model()
    assert list(model.mixins) == ["rotary", "prefix", "lora"]
    assert model.scopes["prefix"] == [1]
    assert model.get_mixin("lora").options == {"sites": ["qkv:q"], "rank": 2}


def test_a_mixin_can_be_set_on_the_command_line_inside_a_nested_model() -> None:
    tower = ["--model.vision.num_layers=1", "--model.num_layers=1"]
    path = "--mixins.image.tower/lora"
    overrides = [*tower, f"{path}.class_path=mixformer.mixins.LoRAMixin", f"{path}.init_args.sites=[qkv]"]
    model = read_settings(CogVLM, None, overrides).build_model("meta")
    assert isinstance(model.get_mixin("image.tower/lora"), LoRAMixin)


@pytest.mark.parametrize(
    ("mixin", "said"),
    [
        ("{class_path: mixformer.mixins.LoRAMixn}", "Did you mean 'LoRAMixin'?"),
        ("{class_path: mixformer.nothing.LoRAMixin}", "cannot be imported"),
        ("{class_path: LoRA}", "no class path"),
        ("{class_path: mixformer.cache.KVCache}", "no mixin"),
        ("{class_path: mixformer.mixins.LoRAMixin, init_args: {sites: [qkv], rnk: 2}}", "Did you mean 'rank'?"),
        ("{class_path: mixformer.mixins.LoRAMixin, init_args: {sites: [qkv], rank: x}}", "init_args.rank"),
        ("{class_path: mixformer.mixins.LoRAMixin, init_args: {rank: 2}}", "sites"),
        ("{class_path: mixformer.mixins.LoRAMixin, init_args: {sites: [qkw]}}", "matches no Linear"),
        ("{class_path: mixformer.mixins.PrefixTuningMixin, layers: [7]}", "layers"),
        ("{class_path: mixformer.mixins.RotaryMixin}", "replaced by two mixins"),
    ],
)
def test_a_wrong_mixin_is_an_error_that_names_the_file_and_its_name(tmp_path: Path, mixin: str, said: str) -> None:
    file = write(tmp_path, f"{TINY}\nmixins: {{mine: {mixin}}}")
    message = error_of(None, file)
    assert said in message and "mixins.mine" in message and str(file) in message


def test_nested_options_of_a_mixin_are_mappings_or_class_paths() -> None:
    sized = make(Sized, {"sizes": {"width": 7, "names": ["a"]}, "factor": 2}, "mixins.sized")
    assert (sized.sizes, sized.factor) == (Sizes(7, ["a"]), 2.0)
    tower = {"class_path": "models.eva2_clip.EVA2CLIPLConfig", "init_args": {"image_size": 28, "hidden_size": 32}}
    cross = make(CrossAttentionMixin, {"tower": tower}, "mixins.cross")
    assert isinstance(cross.tower_config, EVA2CLIPLConfig) and cross.compute_size == 32
    with pytest.raises(ValueError, match=r"sizes\.widht: unknown key of Sizes. Did you mean 'width'"):
        make(Sized, {"sizes": {"widht": 7}}, "mixins.sized")
    with pytest.raises(ValueError, match=r"sizes\.width"):
        make(Sized, {"sizes": {"width": "x"}}, "mixins.sized")


def test_keys_inside_lists_are_checked(tmp_path: Path) -> None:
    file = write(tmp_path, f"{TINY}\ntrain: {{stages: [{{name: a, loop: {{stepz: 3}}}}]}}")
    message = error_of(None, file)
    assert "train.stages[0].loop.stepz" in message and "Did you mean 'steps'?" in message


def test_options_of_classes_in_sections_are_checked(tmp_path: Path) -> None:
    task = f"{{class_path: {__name__}.Reading, init_args: {{leters: true}}}}"
    file = write(tmp_path, f"{TINY}\ntrain: {{stages: [{{name: a, task: {task}}}]}}")
    message = error_of(None, file)
    assert "train.stages" in message and "Did you mean 'letters'?" in message


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state(tmp_path: Path) -> None:
    file = write(tmp_path, TINY)
    first = read_settings(None, file).build_model().state_dict()
    torch.manual_seed(11)
    second = read_settings(None, file).build_model().state_dict()
    other = read_settings(None, file, ["--seed=4"]).build_model().state_dict()
    name = "transformer.layers.0.mlp.up.weight"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first[name], other[name])


def test_paths_of_the_file_are_relative_to_it_and_those_of_the_command_line_are_not(tmp_path: Path) -> None:
    file = write(tmp_path, "{weights: ../w, processor: p, chat: {image: [a.png, b.png]}}")
    settings = read_settings(LLaMA, file)
    assert settings.weights == tmp_path / "../w" and settings.processor == tmp_path / "p"
    assert settings.chat.images == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    settings = read_settings(LLaMA, file, ["--weights=here", "--chat.image=c.png"])
    assert settings.weights == Path("here") and settings.chat.images == ["c.png"]


def test_drawing_options_without_drawing_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature above 0"):
        ChatConfig(top_k=3)


def test_classes_of_sections_that_are_not_asked_for_are_not_imported(tmp_path: Path) -> None:
    task = "{class_path: nowhere.Task}"
    file = write(tmp_path, f"{TINY}\ntrain: {{stages: [{{name: a, task: {task}}}]}}")
    assert read_settings(LLaMA, file, sections=()).train is None
    with pytest.raises(ValueError, match=r"config.yaml.*train\.stages.*nowhere"):
        read_settings(LLaMA, file, sections=("train",))


class TestWeights:
    """A checkpoint brings its own sizes and mixins."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, LLaMA]:
        model = LLaMA(LLaMAConfig(vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24))
        model.add_mixin("lora", LoRAMixin(["qkv:q"], rank=2))
        model.del_mixin("head")
        save_pretrained(model, tmp_path / "weights")
        return tmp_path, model

    def test_the_model_section_may_be_left_out(self, saved: tuple[Path, LLaMA]) -> None:
        folder, model = saved
        loaded = read_settings(LLaMA, write(folder, "weights: weights")).load_model()
        assert list(loaded.mixins) == ["rotary", "lora"] and loaded.config.hidden_size == 16
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())

    def test_mixins_that_the_checkpoint_already_has_or_lacks_so_are_no_conflict(
        self, saved: tuple[Path, LLaMA]
    ) -> None:
        folder, _ = saved
        lora = "{class_path: mixformer.mixins.LoRAMixin, init_args: {sites: ['qkv:q'], rank: 2}}"
        file = write(folder, f"{{weights: weights, model: {{num_layers: 2}}, mixins: {{head: null, lora: {lora}}}}}")
        assert list(read_settings(LLaMA, file).load_model().mixins) == ["rotary", "lora"]
        with pytest.raises(ValueError, match="no mixin 'hed'"):
            read_settings(LLaMA, file, ["--mixins.hed=null"]).load_model()

    def test_sizes_that_differ_from_the_checkpoint_are_an_error(self, saved: tuple[Path, LLaMA]) -> None:
        file = write(saved[0], "{weights: weights, model: {hidden_size: 32}}")
        with pytest.raises(ValueError, match=r"model.hidden_size is 32, but the checkpoint .* has 16"):
            read_settings(LLaMA, file).load_model()

    def test_nested_sections_that_name_a_class_are_compared_with_the_checkpoint(self, tmp_path: Path) -> None:
        sizes = "{vocab_size: 20, hidden_size: 16, num_layers: 1, num_heads: 2, max_positions: 8, %s}"
        vision = "vision: {hidden_size: 8, num_layers: 1, num_heads: 2, image_size: 28, patch_size: 14}"

        def settings(adapter: str, start: str = "") -> Any:
            chosen = f"{vision}, adapter: {{class_path: mixformer.connectors.{adapter}}}"
            return read_settings(PrefixGPT2, write(tmp_path, f"{{{start}model: {sizes % chosen}}}"))

        mapper = "ProjectorConfig, init_args: {tokens_per_feature: 3}"
        save_pretrained(settings(mapper).build_model(), tmp_path / "weights")
        loaded = settings(mapper, "weights: weights, ").load_model()
        assert loaded.config.adapter == ProjectorConfig(tokens_per_feature=3)
        with pytest.raises(ValueError, match=r"model.adapter.tokens_per_feature is 4, but the checkpoint .* has 3"):
            settings("ProjectorConfig, init_args: {tokens_per_feature: 4}", "weights: weights, ").load_model()
        with pytest.raises(ValueError, match=r"model.adapter is LDPConfig.*, but the checkpoint .* has Projector"):
            settings("LDPConfig", "weights: weights, ").load_model()

    def test_a_part_that_names_its_class_has_the_defaults_of_that_class(self, tmp_path: Path) -> None:
        file = write(tmp_path, "{model: {adapter: {class_path: mixformer.connectors.PrefixMapperConfig}}}")
        assert read_settings(PrefixGPT2, file).model.adapter == PrefixMapperConfig()

    def test_options_of_a_run_do_not_make_training_start_anew(
        self, saved: tuple[Path, LLaMA], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr("mixformer.train.run", lambda model, *rest: seen.append(model) or {})
        monkeypatch.setattr("mixformer.config.Settings.load_processor", lambda self: None)
        folder, model = saved
        sizes = "vocab_size: 20, hidden_size: 16, num_layers: 2, num_heads: 2, inner_hidden_size: 24"
        for options in ("checkpoint_activations: true", sizes):
            file = write(folder, f"{{weights: weights, model: {{{options}}}, seed: 8, train: {{stages: []}}}}")
            main("models.llama:LLaMA", ["--config", str(file), "--job", "train"])
        words = [each.transformer.word_embeddings.weight for each in seen]
        assert seen[0].config.checkpoint_activations
        assert torch.equal(words[0], model.transformer.word_embeddings.weight) and not torch.equal(words[0], words[1])

    def test_options_of_a_run_are_put_into_the_loaded_model(self, saved: tuple[Path, LLaMA]) -> None:
        file = write(saved[0], "{weights: weights, model: {checkpoint_activations: true}}")
        assert read_settings(LLaMA, file).load_model().config.checkpoint_activations

    def test_a_checkpoint_of_another_class_is_an_error(self, saved: tuple[Path, LLaMA]) -> None:
        with pytest.raises(ValueError, match="holds a LLaMA, not a CogVLM"):
            read_settings(CogVLM, write(saved[0], "weights: weights")).load_model()
