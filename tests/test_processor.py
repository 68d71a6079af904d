"""The processor: recorded sequences, batches of all mixtures, training, checkpoint folders, errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from mixformer.data.processor import Processor, ProcessorConfig, TrainingSample, load_processor
from mixformer.images import preprocess_image
from mixformer.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "prompts")
ENTRIES = json.loads((GOLDEN / "prompts" / "prompts.json").read_text(encoding="utf-8"))
RED, BLUE = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue"))


def make_processor(entry: dict[str, Any]) -> Processor:
    """The processor that an entry of prompts.json was recorded with."""
    family = entry["family"].removesuffix("-train")
    return Processor(
        ProcessorConfig(
            family=family,
            image_size=entry.get("image_size") or {4: 28, 9: 42}[entry["image_length"]],
            downsample=2 if family == "hf-cogvlm2" else 1,
            pad_id=entry.get("pad_token_id", 0),
            placeholder_id=entry.get("placeholder_id", 0),
        ),
        TOKENIZER,
    )


def small_processor(**settings: Any) -> Processor:
    """Four patches per image."""
    return Processor(ProcessorConfig(**{"image_size": 28, **settings}), TOKENIZER)


def expert_mask(types: list[int]) -> list[int]:
    """boi and patches, not eoi: image tokens that another image token follows (spans here never touch)."""
    return [int(here and there) for here, there in zip(types, [*types[1:], 0], strict=True)]


def test_every_recorded_prompt_gives_the_recorded_tensors() -> None:
    recorded = [entry for entry in ENTRIES if entry["family"] != "sat-train"]
    assert len(recorded) == 288
    for entry in recorded:
        batch = make_processor(entry)(
            entry["query"], RED if entry["image"] else None, entry["template"], entry["history"]
        )
        # Entries with an answer hold it after the prompt.
        prompt_length = entry["labels"].count(-100) if "labels" in entry else None
        types = entry.get("token_type_ids", entry.get("image_embed_mask"))
        assert batch["input_ids"].tolist() == [entry["input_ids"][:prompt_length]]
        assert batch["token_type_ids"].tolist() == [types[:prompt_length]]
        assert batch["attention_mask"].tolist() == [[1] * len(entry["input_ids"][:prompt_length])]
        assert expert_mask(types) == entry.get("expert_mask", entry.get("vision_expert_mask"))
        assert ("images" in batch) == entry["image"]


def test_every_recorded_answer_gives_the_recorded_labels() -> None:
    recorded = [entry for entry in ENTRIES if "answer" in entry]
    assert len(recorded) == 84
    for entry in recorded:
        batch = make_processor(entry).training_batch(
            [
                {
                    "prompt": entry["query"],
                    "answer": entry["answer"],
                    "images": RED if entry["image"] else None,
                    "history": entry["history"],
                    "template": entry["template"],
                }
            ]
        )
        for name in ("input_ids", "token_type_ids", "attention_mask", "labels"):
            assert batch[name].tolist() == [entry[name]]


def test_every_recorded_training_sample_is_padded_and_labelled_alike() -> None:
    recorded = [entry for entry in ENTRIES if entry["family"] == "sat-train"]
    assert len(recorded) == 32
    for entry in recorded:
        sample = TrainingSample(entry["prompt"], entry["caption"], images=RED, template=entry["template"])
        processor, length = make_processor(entry), entry["max_target_length"]
        batch = processor.training_batch([sample], length, pad_to_max_length=True)
        assert batch["input_ids"].tolist() == [entry["input_ids"]]
        assert batch["labels"].tolist() == [entry["labels"]]
        assert batch["token_type_ids"].tolist() == [entry["image_embed_mask"]]


@pytest.mark.parametrize("case", ["cogvlm-hf", "cogagent-hf", "cogvlm-sat", "cogagent-sat", "cogvlm-sat-mp2"])
def test_checkpoint_folders_give_the_recorded_batches(case: str) -> None:
    folder = GOLDEN / case
    texts = json.loads((folder / "case.json").read_text(encoding="utf-8"))["texts"]
    processor = load_processor(folder, tokenizer=GOLDEN / "prompts")
    checked = 0
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}
    for case_name, value in texts.items():
        rows = value if isinstance(value, list) else [value]
        if "query" not in rows[0]:
            continue
        batch = processor(
            [row["query"] for row in rows],
            [None if row["image"] is None else folder / row["image"] for row in rows],
            history=[row["history"] for row in rows],
        )
        types = f"{case_name}.token_type_ids"
        types = types if types in recorded else f"{case_name}.image_embed_mask"
        assert torch.equal(batch["input_ids"], recorded[f"{case_name}.input_ids"])
        assert torch.equal(batch["token_type_ids"], recorded[types])
        if f"{case_name}.attention_mask" in recorded:
            assert torch.equal(batch["attention_mask"], recorded[f"{case_name}.attention_mask"])
        chosen = [i for i in recorded[f"{case_name}.image_index"].tolist() if i >= 0]
        for kind in ("images", "cross_images"):
            assert (kind in batch) == (kind in recorded and bool(chosen))
            if kind in batch:
                torch.testing.assert_close(batch[kind], recorded[kind][chosen], atol=1e-6, rtol=0)
        checked += 1
    assert checked


@pytest.mark.parametrize("case", ["cogvlm-sat", "cogagent-sat"])
def test_sat_training_batches_are_the_recorded_ones(case: str) -> None:
    folder = GOLDEN / case
    content = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    samples = [
        {"prompt": row["prompt"], "answer": row["caption"], "images": folder / row["image"]}
        for row in content["texts"]["c"]
    ]
    processor = load_processor(folder, tokenizer=TOKENIZER)
    batch = processor.training_batch(samples, content.get("max_target_length", 56), pad_to_max_length=True)
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        for name, recorded in (("input_ids",) * 2, ("labels",) * 2, ("token_type_ids", "image_embed_mask")):
            assert torch.equal(batch[name], file.get_tensor(f"c.{recorded}"))
        assert batch["attention_mask"].sum(1).tolist() == file.get_tensor("c.length").tolist()


def test_a_mixed_batch_holds_each_row_as_it_is_alone_padded_left() -> None:
    processor = small_processor(cross_image_size=56)
    prompts, images = ["x", "How many lamps are there?", "Open the menu"], [[RED, BLUE], None, RED]
    batch = processor(prompts, images)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "token_type_ids": torch.int64,
        "images": torch.float32,
        "cross_images": torch.float32,
    }
    width = batch["input_ids"].shape[1]
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = processor(prompt, image)
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][index].tolist() == [0] * (width - length) + [1] * length
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(batch[name][index, width - length :], alone[name][0])
            assert not batch[name][index, : width - length].any()
    assert batch["token_type_ids"].sum(1).tolist() == [12, 0, 6]
    for name, size in (("images", 28), ("cross_images", 56)):
        expected = torch.stack([preprocess_image(picture, size) for picture in (RED, BLUE, RED)])
        assert torch.equal(batch[name], expected)


def test_images_stand_where_the_prompt_marks_them() -> None:
    processor = small_processor(family="sat")
    batch = processor("<EOI> like <EOI>?", [RED, BLUE], template="base")
    like, mark = TOKENIZER.encode(" like "), TOKENIZER.encode("?")
    span = [0] * 6
    assert batch["input_ids"].tolist() == [[1, *span, *like, *span, *mark]]
    assert batch["token_type_ids"].tolist() == [[0, *[1] * 6, *[0] * len(like), *[1] * 6, *[0] * len(mark)]]
    assert torch.equal(batch["images"], torch.stack([preprocess_image(p, 28) for p in (RED, BLUE)]))


def test_text_alone_brings_no_images_and_no_image_tokens() -> None:
    batch = small_processor(cross_image_size=56)("Open the menu")
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert not batch["token_type_ids"].any()


def test_a_text_processor_makes_no_token_types_and_refuses_images() -> None:
    processor = Processor(ProcessorConfig(family="llama"), TOKENIZER)
    batch = processor(["x", "Open the menu"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1].tolist() == [1, *TOKENIZER.encode("Open the menu")]
    with pytest.raises(ValueError, match="reads text only"):
        processor("x", RED)


def test_a_conversation_equals_a_question_with_its_history() -> None:
    processor = small_processor()
    conversation = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "near the top"},
        {"role": "user", "content": "Open it"},
    ]
    expected = processor("Open it", RED, history=[("Where?", "near the top")])["input_ids"]
    assert torch.equal(processor(conversation, RED)["input_ids"], expected)
    prompts: list[Any] = [conversation, "x"]
    several = processor(prompts, [RED, None])["input_ids"]
    assert torch.equal(several[:1], expected)
    learnt = processor.training_batch(
        [{"prompt": [*conversation, {"role": "assistant", "content": "done"}], "images": RED}]
    )
    assert torch.equal(learnt["input_ids"][:, : expected.shape[1]], expected)
    assert learnt["labels"][0, expected.shape[1] :].tolist() == [*TOKENIZER.encode("done"), 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_rows_are_padded_on_the_side_asked_for(side: str) -> None:
    processor = small_processor(pad_id=3)
    samples = [TrainingSample("x", "y", RED), TrainingSample("How many lamps are there?", "three", BLUE)]
    batch = processor.training_batch(samples, padding_side=side)  # type: ignore[arg-type]
    short, width = processor.training_batch(samples[:1]), batch["input_ids"].shape[1]
    length = short["input_ids"].shape[1]
    kept = slice(width - length, width) if side == "left" else slice(0, length)
    padding = slice(0, width - length) if side == "left" else slice(length, width)
    for name, fill in {"input_ids": 3, "attention_mask": 0, "token_type_ids": 0, "labels": -100}.items():
        assert torch.equal(batch[name][0, kept], short[name][0])
        assert batch[name][0, padding].tolist() == [fill] * (width - length)


def test_a_long_answer_is_cut_so_that_eos_still_fits() -> None:
    # The released training code keeps max_length - patches - 5 ids, an image counting as one of them, and adds eos:
    # max_length - 4 tokens of context and answer, then eos.
    processor = small_processor()
    answer = "The bottle is green. " * 9
    context = processor("x", RED)["input_ids"].shape[1]
    batch = processor.training_batch([TrainingSample("x", answer, RED)], max_length=40)
    expected = [*TOKENIZER.encode(answer)[: 40 - 4 - context], 2]
    assert batch["labels"].tolist() == [[-100] * context + expected]
    assert batch["input_ids"].shape == (1, 37)


def test_an_empty_answer_teaches_the_end_alone() -> None:
    labels = small_processor().training_batch([TrainingSample("x", "", RED)])["labels"]
    assert labels[labels != -100].tolist() == [2]


def test_samples_that_cannot_be_learnt_from_are_refused() -> None:
    processor = small_processor()
    good = TrainingSample("x", "y", RED)
    too_long = TrainingSample("How many lamps are there? " * 3, "y", RED)
    with pytest.raises(ValueError, match=r"sample 1: its prompt of .* tokens leaves no room"):
        processor.training_batch([good, too_long], max_length=40)
    with pytest.raises(ValueError, match=r"sample 0: its image span\(s\) of 12 tokens do not fit"):
        processor.training_batch([TrainingSample("x", "y", [RED, BLUE])], max_length=15)
    with pytest.raises(ValueError, match="sample 0: nothing to learn"):
        processor.training_batch([TrainingSample("x")])
    with pytest.raises(ValueError, match="unknown field 'image'"):
        processor.training_batch([{"prompt": "x", "answer": "y", "image": RED}])
    with pytest.raises(ValueError, match="no prompt"):
        processor.training_batch([{"answer": "y"}])
    with pytest.raises(ValueError, match="no samples"):
        processor.training_batch([])
    with pytest.raises(ValueError, match="needs max_length"):
        processor.training_batch([good], pad_to_max_length=True)
    with pytest.raises(ValueError, match="padding_side"):
        processor.training_batch([good], padding_side="top")  # type: ignore[arg-type]


def test_decode_gives_the_text_without_padding_images_and_what_follows_eos() -> None:
    processor = small_processor(pad_id=2)
    batch = processor(["What colour is the bottle?", "x"], [RED, BLUE])
    assert processor.decode(batch["input_ids"][1]) == "Question: x Answer:"
    assert processor.decode([*TOKENIZER.encode("a cat"), 2, 310, 310]) == "a cat"
    text = processor.decode([*batch["input_ids"][1].tolist(), *TOKENIZER.encode("a cat"), 2])
    assert processor.answer(text) == "a cat"
    with pytest.raises(ValueError, match="one row"):
        processor.decode(batch["input_ids"])


def test_a_saved_processor_comes_back_equal(tmp_path: Path) -> None:
    settings = {"family": "hf-cogagent", "template": "vqa", "cross_image_size": 56}
    processor = small_processor(**settings, stop_ids=(2, 7), bos_id=None)
    processor.save(tmp_path)
    for other in (load_processor(tmp_path), pickle.loads(pickle.dumps(processor))):
        assert other.config == processor.config
        for name, tensor in processor("Open the menu", RED).items():
            assert torch.equal(other("Open the menu", RED)[name], tensor)
    assert load_processor(tmp_path, template="chat").config.template == "chat"


def test_released_folders_are_recognised() -> None:
    found = {
        case: load_processor(GOLDEN / case, tokenizer=TOKENIZER).config
        for case in ("cogvlm-hf", "cogvlm2-hf", "cogagent-hf", "llama-hf", "cogvlm-sat", "cogagent-sat")
    }
    summary = {
        case: (c.family, c.template, c.image_size, c.image_length, c.cross_image_size, c.placeholder_id)
        for case, c in found.items()
    }
    assert summary == {
        "cogvlm-hf": ("hf-cogvlm", "chat", 42, 9, None, 0),
        "cogvlm2-hf": ("hf-cogvlm2", "chat", 56, 4, None, 202),
        "cogagent-hf": ("hf-cogagent", "chat", 28, 4, 56, 0),
        "llama-hf": ("llama", None, None, 0, None, 0),
        "cogvlm-sat": ("sat", "chat_old", 42, 9, None, 0),
        "cogagent-sat": ("sat", "chat", 28, 4, 56, 0),
    }
    assert found["cogvlm2-hf"].stop_ids == (2, 201)


@pytest.mark.parametrize(("size", "downsample", "expected"), [(224, 1, 256), (490, 1, 1225), (1344, 2, 2304)])
def test_the_published_sizes_give_the_published_lengths(size: int, downsample: int, expected: int) -> None:
    assert ProcessorConfig(image_size=size, downsample=downsample).image_length == expected
    assert ProcessorConfig(image_size=size, num_image_tokens=32).image_length == 32


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at"):
        load_processor(tmp_path / "absent")
    with pytest.raises(ValueError, match="no checkpoint folder"):
        load_processor(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_processor(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_processor(tmp_path, TOKENIZER)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OtherModel"], "vision_config": {}}))
    with pytest.raises(ValueError, match="describes OtherModel"):
        load_processor(tmp_path, TOKENIZER)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 14}}))
    with pytest.raises(ValueError, match="lacks 'image_size'"):
        load_processor(tmp_path, TOKENIZER)
    content = {"vision_config": {"patch_size": 14, "image_size": 28}, "template_version": "talk"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: family 'hf-cogvlm' has no template 'talk'"):
        load_processor(tmp_path, TOKENIZER)
    assert load_processor(tmp_path, TOKENIZER, template="vqa").config.template == "vqa"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_sise": 28}, "did you mean 'image_size'"),
        ({"image_size": "28"}, "image_size must be a positive whole number"),
        ({"image_size": 30}, "does not divide into patches of 14"),
        ({"image_size": 42, "downsample": 2}, "multiple of 28"),
        ({"cross_image_size": 28}, "comes beside image_size"),
        ({"eos_id": None}, "eos_id must be a token id"),
        ({"family": "sats"}, "no prompt family 'sats'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    (tmp_path / "processor.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=rf"processor\.yaml.*{reason}"):
        load_processor(tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["x", "y"], "images": [RED]}, r"2 prompt\(s\) in a list, but images is a list of 1"),
        ({"prompts": ["x", "y"], "images": RED}, "but images is Image"),
        ({"prompts": ["x"], "history": [None, None]}, "but history is a list of 2"),
        ({"prompts": "x", "history": ["Where?"]}, r"prompt 0: history must be \(question, answer\) pairs"),
        ({"prompts": "x", "template": "talk"}, "has no template 'talk'"),
        ({"prompts": [{"role": "assistant", "content": "x"}]}, "message 0 must be .*'user'"),
        ({"prompts": [{"role": "user", "content": "x"}] * 2}, "message 1 must be .*'assistant'"),
        ({"prompts": [{"role": "user", "content": "x"}], "history": [("a", "b")]}, "brings its own history"),
        (
            {"prompts": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "must end with the user's message",
        ),
        ({"prompts": "x", "images": b"no picture"}, "image of 10 bytes is not a picture"),
    ],
)
def test_calls_that_make_no_sense_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small_processor()(**arguments)


def test_arguments_of_a_wrong_type_are_named() -> None:
    with pytest.raises(TypeError, match="prompts must be text"):
        small_processor()(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images of a prompt must be"):
        small_processor()("x", 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a TrainingSample"):
        small_processor().training_batch(["x"])  # type: ignore[list-item]


def test_coordinates_are_rounded_to_the_grid_in_past_turns_as_well() -> None:
    processor, (off, on) = small_processor(coordinate_grid=10), ("[[123,207,311,489]]", "[[100,200,300,500]]")
    past = {box: [(f"Read {box}", f"It is {box}")] for box in (off, on)}
    rounded, plain = (processor("Why?", history=past[box])["input_ids"] for box in (off, on))
    assert torch.equal(rounded, plain)
    assert not torch.equal(rounded, small_processor()("Why?", history=past[off])["input_ids"])
