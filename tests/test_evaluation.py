"""Metrics against numbers worked out by hand; evaluations of files: what they ask, record, repeat and refuse."""

import hashlib
import json
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mixformer import generate, save_pretrained
from mixformer.config import read_settings
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.evaluation import FileEvaluation, checkpoint_hash, lmms, run
from mixformer.evaluation.metrics import (
    METRICS,
    box_accuracy,
    centre_in_box,
    exact_match,
    normalised,
    perplexity,
    vqa_accuracy,
    vqa_normalised,
)
from mixformer.testing import jitter, tiny_model
from mixformer.tokenizer import load_tokenizer
from mixformer.train import EvaluateSection, evaluate

SHAPES = Path(__file__).parents[1] / "examples" / "zoo" / "shapes"
LINES = [json.loads(line) for line in (SHAPES / "train.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Red.", "red", 1.0),
        ("  The red\n circle! ", "a red circle", 1.0),
        ("red circle", "red circles", 0.0),
        ("1.5", "15", 0.0),
        ("ﬁve", "FIVE", 1.0),  # a ligature
        ("[[012,034,560,789]]", "012 034 560 789", 0.0),  # commas between digits stay
        ("Straße", "STRASSE", 1.0),
    ],
)
def test_exact_match_ignores_case_articles_and_outer_punctuation(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, [reference]) == exact_match(answer, ["else", reference]) == score


def test_punctuation_between_words_parts_them_and_between_digits_stays() -> None:
    assert normalised("left/right, 3.5 m (the end)") == "left right 3.5 m end"


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_averages_over_leaving_each_of_ten_people_out(same: int, score: float) -> None:
    # 3 of 10: leaving one of the 3 out leaves 2/3, leaving one of the 7 out leaves 1: (3 * 2/3 + 7) / 10 = 0.9.
    people = ["yes"] * same + [f"other {index}" for index in range(10 - same)]
    assert vqa_accuracy("yes", people) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("A cat on the mat", "cat on mat"),
        ("dont know", "don't know"),
        ("couldnt've, couldn'tve", "couldn't've couldn't've"),
        ("1,000", "1000"),  # a comma between digits: marks vanish
        ("red/blue", "red blue"),  # otherwise a mark inside of words parts them
        ("red, blue", "red blue"),  # and beside a space it vanishes
        ("3.5 m.", "3.5 m"),
        ("it's 5:30", "it's 5:30"),  # apostrophes and colons stay
        ("twas\n\tnice", "'twas nice"),
        ("somebody'd", "somebodyd"),  # as in the official table
        ("t-shirt", "t shirt"),
    ],
)
def test_vqa_normalisation_follows_the_official_rules(text: str, expected: str) -> None:
    assert vqa_normalised(text) == expected


def test_vqa_accuracy_normalises_the_answer_and_what_people_said() -> None:
    assert vqa_accuracy("The 2.", ["two", "Two", "2", "a 2"] + ["three"] * 6) == 1.0
    with pytest.raises(ValueError, match="several people"):
        vqa_accuracy("yes", ["yes"])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[[000,000,100,100]]", 1.0),
        ("the box is at [[000,000,100,050]]", 1.0),  # half of it: 5000 / 10000, exactly 0.5
        ("[[000,000,100,049]]", 0.0),
        ("[[050,000,150,100]]", 0.0),  # 5000 / 15000
        ("[[500,500,600,600]]", 0.0),
        ("no box", 0.0),
        ("[[500,500,600,600]] or [[000,000,100,100]]", 0.0),  # the first counts
    ],
)
def test_a_box_counts_from_an_overlap_of_one_half(answer: str, score: float) -> None:
    assert box_accuracy(answer, ["it is at [[000,000,100,100]]"]) == score


def test_with_several_reference_boxes_the_best_counts() -> None:
    assert box_accuracy("[[500,500,600,600]]", ["[[000,000,100,100;500,500,600,600]]"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[[040,040,060,060]]", 1.0),
        ("[[000,000,200,200]]", 1.0),  # its centre is the corner (100, 100)
        ("[[000,000,201,200]]", 0.0),
        ("[[100,000]]", 1.0),
        ("[[101,000]]", 0.0),
        ("nowhere", 0.0),
    ],
)
def test_a_centre_counts_inside_the_reference_box_and_on_its_edge(answer: str, score: float) -> None:
    assert centre_in_box(answer, ["[[000,000,100,100]]"]) == score


def test_perplexity_of_tokens_that_are_one_in_eight_is_eight() -> None:
    assert perplexity(5 * math.log(8), 5) == pytest.approx(8)
    assert perplexity(1e9, 1) == math.inf
    with pytest.raises(ValueError, match="none"):
        perplexity(0.0, 0)


# ---------------------------------------------------------------- evaluations of files


def small_model() -> Any:
    made = tiny_model("cogvlm", vocab_size=119)
    jitter(made)
    return made.eval()


def small_processor() -> Processor:
    config = ProcessorConfig("hf-cogvlm", image_size=28, pad_id=3, placeholder_id=5)
    return Processor(config, load_tokenizer(SHAPES))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


def evaluation(tmp_path: Path, **options: Any) -> FileEvaluation:
    common: dict[str, Any] = {
        "files": [str(SHAPES / "train.jsonl")], "max_new_tokens": 6, "max_samples": 10, "batch_size": 3,
        "answers": str(tmp_path / "answers"), "progress": False,
    }  # fmt: skip
    return FileEvaluation(**{**common, **options})


def only(result: dict[str, Any]) -> dict[str, Any]:
    (found,) = result["files"].values()
    return dict(found)


def recorded(result: dict[str, Any]) -> list[dict[str, Any]]:
    lines = Path(only(result)["answers"]).read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda record: int(record["index"]))


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def asked(question: str = "What is this?", answer: str | None = "red", **more: Any) -> dict[str, Any]:
    said = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": question}, *said], **more}


def test_answers_are_those_of_one_question_alone(model: Any, processor: Processor, tmp_path: Path) -> None:
    result = evaluation(tmp_path)(model, processor)
    for record, line in zip(recorded(result), LINES[:10], strict=True):
        batch = processor(line["messages"][0]["content"], [SHAPES / line["images"][0]])
        tokens = generate(model, batch, max_new_tokens=6, stop_tokens=processor.config.stop_ids)
        assert record["answer"] == processor.decode(tokens[0]).strip()
        assert record["where"].endswith(f"train.jsonl, line {record['index'] + 1}")


def test_scores_are_means_over_the_questions_that_a_metric_can_judge(
    model: Any, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = "[[000,000,100,100]]"
    said = ["[[000,000,100,060]]", "Two.", "a red circle", "no box"]
    people = ["two"] * 3 + ["three"] * 7
    file = write_lines(
        tmp_path / "q.jsonl", asked(answer=box), asked(answers=people), asked(answer="red circle"), asked(answer=box)
    )
    monkeypatch.setattr(run, "answers", lambda model, processor, asked, *_: ((q.index, said[q.index]) for q in asked))
    scores = only(evaluation(tmp_path, files=[file], metrics=list(METRICS))(model, processor))["scores"]
    assert scores["box_accuracy"] == {"score": 0.5, "count": 2}
    assert scores["centre_in_box"] == {"score": 0.5, "count": 2}
    assert scores["vqa_accuracy"] == {"score": pytest.approx(0.9), "count": 1}
    assert scores["exact_match"] == {"score": 0.5, "count": 4}


def test_perplexity_is_that_of_the_logits_whatever_the_batch(model: Any, processor: Processor, tmp_path: Path) -> None:
    total, number = 0.0, 0
    for line in LINES[:10]:
        row = {"prompt": line["messages"], "images": [SHAPES / line["images"][0]]}
        batch = processor.training_batch([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch)[0, :-1]
        for place in (labels != -100).nonzero()[:, 0].tolist():
            total -= float(F.log_softmax(logits[place].double(), -1)[labels[place]])
            number += 1
    found = [
        only(evaluation(tmp_path / str(size), metrics=["perplexity"], batch_size=size)(model, processor))["scores"]
        for size in (1, 4)
    ]
    for scores in found:
        assert scores["perplexity"]["count"] == number
        assert scores["perplexity"]["score"] == pytest.approx(math.exp(total / number), rel=1e-5)


def test_the_result_tells_how_to_run_it_again(model: Any, processor: Processor, tmp_path: Path) -> None:
    result = evaluation(tmp_path, template="vqa", sample={"temperature": 0.7}, seed=5)(model, processor)
    assert result == json.loads(json.dumps(result))
    assert result["seed"] == 5 and result["generation"] == {"max_new_tokens": 6, "sample": {"temperature": 0.7}}
    text = "Question: {question} Short answer:"
    assert result["prompt"] == {"family": "hf-cogvlm", "template": "vqa", "text": text}
    assert only(result)["samples"] == 10
    copies = [tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"]
    for copy, answer in zip(copies, ("red", "blue"), strict=True):
        copy.parent.mkdir()
        write_lines(copy, asked(answer=answer))
    first, second = (only(evaluation(tmp_path, files=[str(copy)])(model, processor)) for copy in copies)
    assert first["sha256"] != second["sha256"] and first["answers"] != second["answers"]


def test_the_hash_of_a_checkpoint_is_that_of_the_recorded_hashes_of_its_shards(model: Any, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "saved", max_shard_size="60KB")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{shard.name} {hashlib.sha256(shard.read_bytes()).hexdigest()}\n" for shard in shards)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert checkpoint_hash(tmp_path / "saved") == expected
    (tmp_path / "saved" / "model.safetensors.index.json").unlink()  # without recorded hashes the files are read
    assert checkpoint_hash(tmp_path / "saved") == expected
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint_hash(SHAPES)


def test_one_other_bit_in_the_weights_is_another_checkpoint(processor: Processor, tmp_path: Path) -> None:
    changed = tiny_model("cogvlm", vocab_size=119)
    hashes = [evaluation(tmp_path, max_samples=1)(changed, processor)["checkpoint"]]
    with torch.no_grad():
        changed.transformer.word_embeddings.weight[7, 3] += 1e-3
    hashes.append(evaluation(tmp_path, max_samples=1)(changed, processor)["checkpoint"])
    assert hashes[0] != hashes[1]
    assert len(list((tmp_path / "answers").iterdir())) == 2  # and answers of the two do not mix


SAMPLED: dict[str, Any] = {"sample": {"temperature": 2.0}, "seed": 3, "metrics": ["exact_match", "perplexity"]}


def evaluate_and_die(folder: Path, kill_at: int) -> None:
    """Evaluate, in a process of its own that is killed while it writes an answer."""
    add, done = run._Records.add, [0]

    def add_or_die(self: Any, *arguments: Any, **values: Any) -> None:
        done[0] += 1
        if done[0] == kill_at:
            os.write(self._file, b'{"index": 3, "wh')  # a line that was cut
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *arguments, **values)

    run._Records.add = add_or_die  # type: ignore[method-assign]
    evaluation(folder, **SAMPLED)(small_model(), small_processor())


@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    model: Any, processor: Processor, tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluation(tmp_path / "whole", **SAMPLED)(model, processor)
    group = forks.shared().start("test_evaluation.evaluate_and_die", tmp_path / "killed", kill_at, world_size=1)
    assert group.wait() == [-signal.SIGKILL], group.output()
    (file,) = (tmp_path / "killed" / "answers").iterdir()
    assert len(file.read_bytes().splitlines()) == kill_at
    counted: list[int] = []
    answers = run.answers

    def counting(model: Any, processor: Any, questions: Any, *more: Any) -> Any:
        for index, answer in answers(model, processor, questions, *more):
            counted.append(index)
            yield index, answer

    monkeypatch.setattr(run, "answers", counting)
    resumed = evaluation(tmp_path / "killed", **SAMPLED)(model, processor)
    assert len(counted) == 10 - (kill_at - 1)
    assert recorded(resumed) == recorded(whole)
    assert only(resumed)["scores"] == only(whole)["scores"]


def test_a_finished_run_asks_nothing_again_and_other_metrics_read_its_answers(
    model: Any, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluation(tmp_path)(model, processor)
    monkeypatch.setattr(run, "answers", lambda model, processor, questions, *_: iter([(-1, "x") for _ in questions]))
    assert evaluation(tmp_path)(model, processor) == first
    file = write_lines(tmp_path / "one.jsonl", asked(answers=["a red", "red"]))
    monkeypatch.undo()
    evaluation(tmp_path, files=[file])(model, processor)
    monkeypatch.setattr(run, "answers", lambda model, processor, questions, *_: iter([(-1, "x") for _ in questions]))
    scores = only(evaluation(tmp_path, files=[file], metrics=["vqa_accuracy"])(model, processor))["scores"]
    assert scores["vqa_accuracy"]["count"] == 1


def test_the_mode_of_the_model_is_left_as_it_was(model: Any, processor: Processor, tmp_path: Path) -> None:
    model.train()
    evaluation(tmp_path, max_samples=1)(model, processor)
    assert model.training
    model.eval()
    evaluation(tmp_path, max_samples=1)(model, processor)
    assert not model.training


def test_a_configuration_file_names_it(model: Any, processor: Processor, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
model_class: models.cogvlm:CogVLM
evaluate:
  output: {tmp_path}/scores.json
  evaluation:
    class_path: mixformer.evaluation.FileEvaluation
    init_args:
      files: [{SHAPES}/train.jsonl]
      metrics: [exact_match, perplexity]
      sample: {{temperature: 0.5}}
      max_samples: 2
      max_new_tokens: 2
      answers: {tmp_path}/answers
      progress: false
""",
        encoding="utf-8",
    )
    settings = read_settings(None, file)
    assert isinstance(settings.evaluate, EvaluateSection)
    result = evaluate(model, processor, settings)
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == result
    assert set(only(result)["scores"]) == {"exact_match", "perplexity"}


def test_boxes_of_objects_are_references_where_the_texts_have_none(
    model: Any, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = [{"label": "circle", "box": [0, 0, 100, 100]}]
    lines = [asked(answer=text, objects=objects) for text in ("here", "[[500,500,600,600]]")]
    file = write_lines(tmp_path / "q.jsonl", *lines)
    box = "[[000,000,100,090]]"
    monkeypatch.setattr(run, "answers", lambda model, processor, asked, *_: ((q.index, box) for q in asked))
    scores = only(evaluation(tmp_path, files=[file], metrics=["box_accuracy"])(model, processor))["scores"]
    assert scores["box_accuracy"] == {"score": 0.5, "count": 2}
    file = write_lines(tmp_path / "p.jsonl", asked(objects=[{"label": "circle"}]))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: 'objects' must have a `box`"):
        evaluation(tmp_path, files=[file], metrics=["box_accuracy"])(model, processor)


def test_marks_of_pictures_are_not_asked(model: Any, processor: Processor, tmp_path: Path) -> None:
    picture = [str(SHAPES / "0001.png")]
    files = [
        write_lines(tmp_path / f"{number}.jsonl", asked(question, images=picture))
        for number, question in enumerate(("<image>\nWhat is this?", "What is this?"))
    ]
    first, second = evaluation(tmp_path, files=files)(model, processor)["files"].values()
    assert first["sha256"] == second["sha256"]


# ---------------------------------------------------------------- refusals


def test_options_that_make_no_sense_are_refused(tmp_path: Path, processor: Processor, model: Any) -> None:
    with pytest.raises(ValueError, match="no 'accuracy': choose of exact_match"):
        evaluation(tmp_path, metrics=["accuracy"])
    with pytest.raises(ValueError, match="files is empty"):
        evaluation(tmp_path, files=[])
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="needs the model's processor"):
        evaluation(tmp_path)(model, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "line 2 has no 'messages'|line 2.*messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2 asks nothing"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: a message is"),
        (asked(answers="red"), "line 2: 'answers' must be a list of texts"),
    ],
)
def test_lines_that_ask_nothing_are_named(
    line: Any, message: str, model: Any, processor: Processor, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "q.jsonl", asked(), line)
    with pytest.raises(ValueError, match=message):
        evaluation(tmp_path, files=[file])(model, processor)


def test_a_metric_without_references_is_refused_before_anything_is_asked(
    model: Any, processor: Processor, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "q.jsonl", asked(), asked(answer=None))
    with pytest.raises(ValueError, match=r"q\.jsonl: vqa_accuracy can judge none of its 2 lines"):
        evaluation(tmp_path, files=[file], metrics=["vqa_accuracy"])(model, processor)
    with pytest.raises(ValueError, match="box_accuracy can judge none"):
        evaluation(tmp_path, files=[file], metrics=["box_accuracy"])(model, processor)
    with pytest.raises(ValueError, match="line 2 has no answer"):
        evaluation(tmp_path, files=[file], metrics=["perplexity"])(model, processor)
    assert not (tmp_path / "answers").exists()


def test_a_question_that_cannot_be_asked_is_named_by_file_and_line(
    model: Any, processor: Processor, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file = write_lines(tmp_path / "q.jsonl", asked(), asked(images=["broken.png"]))
    for metric in ("exact_match", "perplexity"):
        with pytest.raises(ValueError, match=r"q\.jsonl, line 2: .*broken\.png"):
            evaluation(tmp_path, files=[file], metrics=[metric])(model, processor)
    text_only = tiny_model("llama", vocab_size=119).eval()
    file = write_lines(tmp_path / "p.jsonl", asked(images=[str(SHAPES / "0001.png")]))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: LLaMA reads no pictures"):
        evaluation(tmp_path, files=[file])(text_only, processor)


def test_a_damaged_line_of_answers_is_an_error(model: Any, processor: Processor, tmp_path: Path) -> None:
    file = Path(only(evaluation(tmp_path, max_samples=2)(model, processor))["answers"])
    file.write_bytes(b"{]\n" + file.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        evaluation(tmp_path, max_samples=2)(model, processor)


# ---------------------------------------------------------------- lmms-eval

# The interface of its guide (docs/guides/model_guide.md) and, as of version 0.7.3, of its code (lmms_eval/api/model.py,
# api/instance.py, api/task.py, evaluator.py, models/registry_v2.py): models of the kind `simple`.


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lmms_eval as far as its model guide says what models see of it."""

    class Base:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_name = self.model_name  # type: ignore[attr-defined]

        @classmethod
        def create_from_arg_string(cls, text: str, more: dict[str, Any]) -> Any:
            return cls(**dict(pair.split("=") for pair in text.split(",")), **{k: v for k, v in more.items() if v})

    class ModelManifest:
        def __init__(self, model_id: str, simple_class_path: str) -> None:
            self.model_id, self.simple_class_path = model_id, simple_class_path

    class GenerationResult:
        def __init__(self, text: Any) -> None:
            self.text = text

    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance", "lmms_eval.models",
             "lmms_eval.models.registry_v2")  # fmt: skip
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    sys.modules["lmms_eval.api.instance"].GenerationResult = GenerationResult  # type: ignore[attr-defined]
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    lmms.model_class.cache_clear()
    yield Base
    lmms.model_class.cache_clear()


@pytest.fixture
def bridge(stub: Any, model: Any, processor: Processor, tmp_path: Path) -> Any:
    save_pretrained(model, tmp_path / "saved", processor=processor)
    manifest = lmms.model_manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "mixformer"
    cls = getattr(sys.modules[module], name)
    assert issubclass(cls, stub) and cls.is_simple
    made = cls.create_from_arg_string(
        f"pretrained={tmp_path / 'saved'}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    made.task_dict = {"shapes": {"test": LINES}}
    assert made.cache_name == str(tmp_path / "saved")
    return made


def visual(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(SHAPES / document["images"][0])]


def test_the_bridge_answers_in_order_what_the_model_answers(bridge: Any, model: Any, processor: Processor) -> None:
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 5}, {"max_new_tokens": 3, "temperature": 0, "do_sample": False, "num_beams": 1},
        {"max_new_tokens": 4, "temperature": 5.0, "do_sample": True, "until": ["\n\n"]}, {"max_new_tokens": 2},
    ]  # fmt: skip
    requests = [
        Request(f"<image>\n{LINES[i]['messages'][0]['content']}", options[i], visual, i, "shapes", "test")
        for i in range(4)
    ]
    found = bridge.generate_until(requests)
    for index in (0, 1, 3):
        batch = processor(LINES[index]["messages"][0]["content"], visual(LINES[index]))
        limit = options[index]["max_new_tokens"]
        tokens = generate(model, batch, max_new_tokens=limit, stop_tokens=processor.config.stop_ids)
        assert found[index] == processor.decode(tokens[0]).strip()
    assert bridge.generate_until(requests) == found
    stop = found[0][len(found[0]) // 2]
    stopped = Request(requests[0].args[0], {"max_new_tokens": 5, "until": [stop]}, *requests[0].args[2:])
    assert bridge.generate_until([stopped]) == [found[0].split(stop)[0].strip()]


def target_values(model: Any, processor: Processor, line: dict[str, Any], target: str) -> tuple[list[float], bool]:
    """Log-probabilities of the target's tokens, and whether they are the likeliest, from the logits."""
    batch = processor.training_batch([{"prompt": line["messages"][0]["content"], "answer": target,
                                       "images": visual(line)}])  # fmt: skip
    labels = batch.pop("labels")[0]
    places = (labels != -100).nonzero()[:-1, 0]  # without the end token
    with torch.no_grad():
        logits = model(**batch)[0].double().log_softmax(-1)[places - 1]
    return logits.gather(1, labels[places, None])[:, 0].tolist(), bool((logits.argmax(-1) == labels[places]).all())


def test_the_bridge_gives_the_log_probability_of_targets(bridge: Any, model: Any, processor: Processor) -> None:
    requests = [
        Request(LINES[i]["messages"][0]["content"], lambda document: "red circle", visual, i, "shapes", "test")
        for i in range(3)
    ]
    for result, line in zip(bridge.loglikelihood(requests), LINES[:3], strict=True):
        values, greedy = target_values(model, processor, line, "red circle")
        assert result.text == (pytest.approx(sum(values), abs=1e-4), greedy)


def test_the_likeliest_choice_has_the_least_number_as_lmms_eval_takes_it(
    bridge: Any, model: Any, processor: Processor
) -> None:
    # api/task.py of 0.7.3, multiple_choice: pred = np.argmin(lls); the target is "{target_delimiter}{choice}"
    choices = ("red circle", "a blue square", LINES[0]["messages"][1]["content"])
    asked = LINES[0]["messages"][0]["content"]
    requests = [Request(asked, f" {choice}", visual, 0, "shapes", "test") for choice in choices]
    found = [result.text[0] for result in bridge.loglikelihood(requests)]
    rows = [target_values(model, processor, LINES[0], choice)[0] for choice in choices]
    means = [sum(row) / len(row) for row in rows]
    assert found == pytest.approx([-mean for mean in means], abs=1e-4)
    assert found.index(min(found)) == means.index(max(means))


def test_pairs_come_plain_where_lmms_eval_has_no_type_for_them(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["lmms_eval.api.instance"], "GenerationResult")
    (result,) = bridge.loglikelihood([Request("What?", " red", None, 0, "shapes", "test")])
    assert isinstance(result, tuple) and result[0] > 0 and isinstance(result[1], bool)


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mixformer.from_pretrained", lambda *values: asked.append(values))
    monkeypatch.setattr("mixformer.load_processor", lambda folder: None)
    for device, rank, expected in (("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert lmms.model_class()(pretrained="x", device=device).device == expected == asked[-1][2]
    monkeypatch.delenv("LOCAL_RANK")
    assert lmms.model_class()(pretrained="x", device="cuda").device == "cuda:0"


def test_the_real_evaluator_takes_what_the_bridge_gives(model: Any, processor: Processor, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
    from lmms_eval.api.instance import Instance, unwrap_generation_output
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    lmms.model_class.cache_clear()
    save_pretrained(model, tmp_path / "saved", processor=processor)
    registry = ModelRegistryV2()
    registry.register_manifest(lmms.model_manifest())
    made = registry.get_model_class("mixformer").create_from_arg_string(f"pretrained={tmp_path / 'saved'}")
    made.task_dict = {"shapes": {"test": LINES}}
    about = {"metadata": {"task": "shapes", "doc_id": 0, "repeats": 1}, "idx": 0}
    options = {"max_new_tokens": 3, "until": ["\n"]}
    asked = Instance("generate_until", ("What?", options, visual, 0, "shapes", "test"), **about)
    chosen = Instance("loglikelihood", ("What?", " red", visual, 0, "shapes", "test"), **about)
    (answer,) = made.generate_until([asked])
    assert unwrap_generation_output(answer) == (answer, None)
    (number, greedy), _ = unwrap_generation_output(made.loglikelihood([chosen])[0])
    assert number > 0 and isinstance(greedy, bool)
    made.clean()
    lmms.model_class.cache_clear()


def test_the_bridge_refuses_beams_rounds_and_what_is_no_picture(bridge: Any) -> None:
    with pytest.raises(ValueError, match="shapes asks for 3 beams"):
        bridge.generate_until([Request("x", {"num_beams": 3}, visual, 0, "shapes", "test")])
    with pytest.raises(ValueError, match="comes with a str"):
        bridge.generate_until([Request("x", {}, lambda document: ["film.mp4"], 0, "shapes", "test")])
    with pytest.raises(ValueError, match="one round"):
        bridge.generate_until_multi_round([])


def test_without_lmms_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lmms_eval", "lmms_eval.api.model", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    lmms.model_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install mixformer\[lmms-eval\]"):
        _ = lmms.Mixformer
    with pytest.raises(ImportError, match=r"pip install mixformer\[lmms-eval\]"):
        lmms.model_manifest()
