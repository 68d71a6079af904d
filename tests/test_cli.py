"""Command lines: describe, chat, and how mistakes are reported."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mixformer import BaseMixin, Context, save_pretrained, wrap
from mixformer.accounting import describe
from mixformer.cli import JOBS, console, main
from mixformer.conversation import Conversation
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.tokenizer import load_tokenizer
from models.cogagent import CogAgent, CogAgentConfig
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
TOKENIZER = load_tokenizer(ROOT / "tests" / "golden" / "prompts")
ANSWER = "The button is at [[100,200,300,400]]."
TOTALS = {  # published totals; facts 1.5 of the released checkpoints, counted from their shapes
    "llama-7b": ("models.llama:LLaMA", 6_738_415_616),
    "cogvlm-17b-224": ("models.cogvlm:CogVLM", 17_637_948_928),
    "cogvlm-17b-490": ("models.cogvlm:CogVLM", 17_639_685_376),
    "cogvlm2-19b": ("models.cogvlm:CogVLM", 19_503_105_280),
    "cogagent-18b": ("models.cogagent:CogAgent", 18_291_033_280),
}


class ScriptedMixin(BaseMixin):
    """Makes a model say given tokens, whatever it reads."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.place = ids, 0

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        logits = torch.zeros_like(old_impl(hidden_states))
        logits[..., self.ids[self.place]] = 1.0
        self.place += 1
        return logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CogAgent, its processor, a picture, and a config whose model gives `ANSWER`."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "num_heads": 2, "inner_hidden_size": 24}
    model = CogAgent(CogAgentConfig(
        vocab_size=TOKENIZER.vocab_size, num_layers=2, rope_tables="fp32",
        vision=EVA2CLIPEConfig(num_layers=1, image_size=28, **sizes),
        cross_vision=EVA2CLIPLConfig(num_layers=2, num_layers_run=1, image_size=56, stored_head_size=0, **sizes),
        **sizes,
    ))
    settings = ProcessorConfig(family="hf-cogagent", image_size=28, cross_image_size=56)
    save_pretrained(model, folder / "weights", processor=Processor(settings, TOKENIZER))
    Image.new("RGB", (200, 100), "white").save(folder / "screen.png")
    ids = [*TOKENIZER.encode(ANSWER), TOKENIZER.eos_id]
    (folder / "config.yaml").write_text(f"""
model_class: models.cogagent:CogAgent
weights: weights
mixins:
  script: {{class_path: {__name__}.ScriptedMixin, init_args: {{ids: {ids}}}}}
chat: {{prompt: "Where is the button?", image: screen.png}}
""")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str, model: str = "models.cogagent:CogAgent") -> str:
    main(model, arguments)
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize("name", TOTALS)
def test_full_size_configurations_have_the_published_number_of_parameters(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, total = TOTALS[name]
    text = run(capsys, "--config", str(CONFIGS / f"{name}.yaml"), "--job", "describe", "--json", model=model)
    assert text.startswith(f'{{"parameters": {total}')
    assert json.loads(text)["parameters"] == total


def test_parts_add_up_to_the_total(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads(run(capsys, "--config", str(checkpoint / "config.yaml"), "--job", "describe", "--json"))
    mixins = summary["mixins"].values()
    assert summary["parameters"] == summary["transformer"] + sum(entry["parameters"] for entry in mixins)
    assert all(entry["parameters"] == sum(entry["parts"].values()) for entry in mixins)
    assert summary["mixins"]["cross"]["parts"].keys() == {"tower", "position_embedding", "layers"}
    tower = summary["nested"]["image.tower"]
    assert tower["parameters"] == summary["mixins"]["image"]["parts"]["tower"]
    assert ["final_forward", "model", "head <- script"] in summary["hooks"]


def test_describe_prints_what_the_model_prints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--config", str(checkpoint / "config.yaml"), "--job", "describe", "--mixins.script=null")
    model = CogAgent(CogAgentConfig(num_layers=2), device="meta")
    assert "CogAgent: " in text and "cross.tower: EVA2CLIPL: " in text
    assert [line.split() for line in str(model.hooks).splitlines()] == [
        line.split() for line in text.split("\n\n")[2].splitlines()
    ]


def test_the_console_describes_a_file_a_folder_and_a_class(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    totals = []
    for target in (str(checkpoint / "config.yaml"), str(checkpoint / "weights")):
        console(["describe", target, "--json"])
        totals.append(json.loads(capsys.readouterr().out)["parameters"])
    assert totals[0] == totals[1]
    console(["describe", "models.llama:LLaMA", "--json", "--model.num_layers=1"])
    embeddings, layer = 2 * 32000 * 4096, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert json.loads(capsys.readouterr().out)["parameters"] == embeddings + layer + 4096


def test_frozen_parameters_are_counted_apart() -> None:
    model = CogAgent(CogAgentConfig(num_layers=1), device="meta")
    model.requires_grad_(False)
    model.transformer.final_norm.requires_grad_(True)
    assert describe(model)["trainable"] == 4096


def test_chat_streams_the_answer_prints_its_boxes_and_saves_the_picture(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = run(capsys, "--config", str(checkpoint / "config.yaml"), f"--chat.output={tmp_path / 'out'}")
    saved = tmp_path / "out" / "screen.png"
    assert text.splitlines() == [ANSWER, "box [[100,200,300,400]]", f"saved {saved}"]
    with Image.open(saved) as drawn:
        assert drawn.size == (200, 100)
        changed = [(x, y) for x in range(200) for y in range(100) if drawn.getpixel((x, y)) != (255, 255, 255)]
    # The box is (20, 20) to (60, 40) in pixels; its frame lies around it, three or four pixels wide.
    assert 14 <= min(x for x, _ in changed) <= 20 and 60 <= max(x for x, _ in changed) <= 66
    assert 14 <= min(y for _, y in changed) <= 20 and 40 <= max(y for _, y in changed) <= 46


def test_the_answer_arrives_in_pieces(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("mixformer.cli._write", pieces.append)
    main("models.cogagent:CogAgent", ["--config", str(checkpoint / "config.yaml"), f"--chat.output={tmp_path}"])
    assert "".join(pieces) == ANSWER and len(pieces) > 10


def test_prompt_and_image_can_be_given_on_the_command_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (50, 50), "black").save(tmp_path / "other.png")
    asked = ("--prompt", "What: is?", "--image", str(tmp_path / "other.png"), f"--chat.output={tmp_path / 'out'}")
    result = json.loads(run(capsys, "--config", str(checkpoint / "config.yaml"), *asked, "--json"))
    assert result == {
        "answer": ANSWER, "boxes": [[100, 200, 300, 400]], "picture": str(tmp_path / "out" / "other.png"),
    }


def test_an_answer_about_no_picture_saves_none(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--config", str(checkpoint / "config.yaml"), "--chat.image=null")
    assert text.splitlines() == [ANSWER, "box [[100,200,300,400]]"]


def test_a_folder_in_the_hf_layout_answers_with_a_tokenizer_from_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    golden = ROOT / "tests" / "golden"
    picture = ("--prompt", "What is this?", "--image", str(golden / "cogvlm-hf" / "image.png"), "--json")
    places = (f"--weights={golden / 'cogvlm-hf'}", f"--tokenizer={golden / 'prompts'}", "--chat.max_new_tokens=4")
    result = json.loads(run(capsys, *places, *picture, model="models.cogvlm:CogVLM"))
    assert result.keys() == {"answer", "boxes", "picture"}
    console(["describe", str(golden / "cogvlm-hf"), "--json"])
    shapes = load_file(golden / "cogvlm-hf" / "model.safetensors")
    total = sum(tensor.numel() for name, tensor in shapes.items() if "inv_freq" not in name)
    assert json.loads(capsys.readouterr().out)["parameters"] == total


def test_drawing_with_a_seed_repeats_itself(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chat.temperature=1.0", "--chat.max_new_tokens=6", "--prompt=Where?", "--json"]
    weights = f"--weights={checkpoint / 'weights'}"
    first, second, other = (run(capsys, weights, *options, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == second != other


def test_further_questions_are_read_from_the_input_and_answered_about_the_same_picture(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Any, list[Any]]] = []
    real = Conversation.stream

    def watched(self: Conversation, prompt: str, images: Any = None, *rest: Any, **options: Any) -> Any:
        asked.append((prompt, images, list(self.history)))
        return real(self, prompt, images, *rest, **options)

    monkeypatch.setattr(Conversation, "stream", watched)
    script = [*TOKENIZER.encode(ANSWER), TOKENIZER.eos_id] * 3
    options = [
        "--config", str(checkpoint / "config.yaml"), "--chat.interactive", "true", f"--chat.output={tmp_path / 'out'}",
        f"--mixins.script.init_args.ids={script}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("And the link?\nWhat: else?\n\nNot read\n"))
    main("models.cogagent:CogAgent", options)
    out, err = capsys.readouterr()
    names = ["screen.png", "screen-2.png", "screen-3.png"]
    printed = [f"{ANSWER}\nbox [[100,200,300,400]]\nsaved {tmp_path / 'out' / name}\n" for name in names]
    assert out == "".join(printed) and err == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    first, second = ("Where is the button?", ANSWER), ("And the link?", ANSWER)
    assert asked == [
        (first[0], [str(checkpoint / "screen.png")], []), (second[0], None, [first]),
        ("What: else?", None, [first, second]),
    ]  # fmt: skip

    monkeypatch.setattr("sys.stdin", io.StringIO("And the link?"))
    turns = [json.loads(line) for line in run(capsys, *options, "--json").splitlines()]
    assert turns == [
        {"answer": ANSWER, "boxes": [[100, 200, 300, 400]], "picture": str(tmp_path / "out" / name)}
        for name in names[:2]
    ]


def test_all_questions_may_come_from_the_input_and_a_terminal_is_prompted(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO("What?\nWhere?\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    image = ("--image", str(checkpoint / "screen.png"))
    main("models.cogagent:CogAgent", [
        f"--weights={checkpoint / 'weights'}", "--chat.interactive=true", "--chat.max_new_tokens=3", "--json", *image,
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 2
    assert err == "> > > "


def test_the_input_is_not_read_unless_asked_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    text = run(capsys, "--config", str(checkpoint / "config.yaml"), "--chat.image=null")
    assert text.splitlines()[0] == ANSWER


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--model.hiden_size=3"], "Did you mean 'hidden_size'"),
        (["--weights=nowhere", "--prompt=x"], "nowhere"),
        (["--prompt=x"], "trained weights"),
        ([], "no question"),
        (["surplus"], "surplus"),
        (["--model.hidden_size"], "needs a value"),
        (["--job", "train"], "`train:` section"),
        (["--job", "evaluate"], "trained weights"),
        (["--job", "dance"], "dance"),
    ],
)
def test_mistakes_are_told_on_stderr_without_a_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failed(capsys, lambda: main("models.cogagent:CogAgent", arguments))


def test_a_traceback_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="Did you mean 'hidden_size'"):
        main("models.cogagent:CogAgent", ["--model.hiden_size=3", "--traceback"])


@pytest.mark.parametrize("prompt", ["null", "[1, 2]", "a: b", "1e3", "=x"])
def test_a_question_is_taken_as_it_is_written(
    prompt: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setitem(JOBS, "chat", lambda settings, as_json: asked.append(settings.chat.prompt))
    main("models.cogagent:CogAgent", ["--config", str(checkpoint / "config.yaml"), "--prompt", prompt])
    assert asked == [prompt]


def test_a_picture_that_cannot_be_read_is_told_without_a_traceback(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    for name in ("broken.png", "missing.png"):
        call = ["--config", str(checkpoint / "config.yaml"), "--image", str(tmp_path / name)]
        assert name in failed(capsys, lambda call=call: main("models.cogagent:CogAgent", call))


def test_train_and_evaluate_hand_model_processor_and_settings_on(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("mixformer.cli._training", lambda: _Training(calls))
    monkeypatch.setattr("mixformer.config._section_classes", dict)
    config = ["--config", str(checkpoint / "config.yaml"), "--json"]
    for job, section in (("train", "--train.steps=3"), ("evaluate", "--evaluate.pages=2")):
        assert json.loads(run(capsys, *config, "--job", job, section)) == {"score": 1.0}
    assert [name for name, *_ in calls] == ["run", "evaluate"]
    for _, model, processor, settings in calls:
        assert isinstance(model, CogAgent) and isinstance(processor, Processor)
        assert settings.weights == checkpoint / "weights"
    assert calls[0][3].train == {"steps": 3} and calls[1][3].evaluate == {"pages": 2}


class _Training:
    """Stands in for mixformer.train and records its calls."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def run(self, *arguments: Any) -> dict[str, float]:
        self.calls.append(("run", *arguments))
        return {"score": 1.0}

    def evaluate(self, *arguments: Any) -> dict[str, float]:
        self.calls.append(("evaluate", *arguments))
        return {"score": 1.0}


def test_help_names_every_kind_of_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--help")
    for name in ("--config", "--job", "--prompt", "--chat.top_p", "--model.vision.patch_size", "--mixins.NAME"):
        assert name in text
    assert "rows of the word embedding" in " ".join(text.split())


def test_the_console_finds_classes_where_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damping_of_mine.py").write_text(
        "from mixformer import BaseMixin, wrap\n\n\nclass Damp(BaseMixin):\n    @wrap\n"
        "    def mlp_forward(self, hidden_states, layer, ctx, old_impl):\n        return old_impl(hidden_states) / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a script's, which lacks it
    console(["describe", "models.llama:LLaMA", "--json", "--mixins.damp", "{class_path: damping_of_mine.Damp}"])
    assert "damp" in capsys.readouterr().out


def test_the_console_without_a_verb_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "VERB" in failed(capsys, lambda: console([]))
    assert "no class" in failed(capsys, lambda: console(["describe", "models.llama:LaMA"]))
