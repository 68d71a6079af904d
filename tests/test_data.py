"""Reading samples: formats, order, cursor, splitting, skipping, labels, and what is said about mistakes."""

import argparse
import bz2
import gzip
import io
import json
import logging
import lzma
import math
import re
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixformer.config import read_settings
from mixformer.data.check import Problem, add_arguments, check, check_command
from mixformer.data.grounding import Box, draw_boxes
from mixformer.data.processor import Processor, ProcessorConfig, TrainingSample, UnusableSampleError
from mixformer.data.readers import (
    ChangedFileError,
    JoinedRecords,
    ListRecords,
    Source,
    open_records,
)
from mixformer.data.records import Record, canonical, place_images
from mixformer.data.show import add_arguments as add_show_arguments
from mixformer.data.show import marked_tokens, show, show_command
from mixformer.data.stream import Order, Reading, Stream
from mixformer.tokenizer import load_tokenizer
from mixformer.train.tasks import ConversationTask, FileTask, MaskedTextTask, PairTask, TextTask

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
SHAPES = Path(__file__).parents[1] / "examples" / "zoo" / "shapes"
TOKENIZER = load_tokenizer(SHAPES)
EOS, IGNORED = 2, -100


class Model:
    """What a task asks of a model."""

    device = torch.device("cpu")
    declared = ()


def make_processor(**settings: Any) -> Processor:
    common = {"family": "llava", "image_size": 28, "image_marks": False, "pad_id": 3, "placeholder_id": 5}
    return Processor(ProcessorConfig(**{**common, **settings}), TOKENIZER)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def write_lines(folder: Path, *lines: Any, name: str = "data.jsonl") -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(folder / name)


def picture_bytes(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 20 % 256, 7, 9)).save(file, "PNG")
    return file.getvalue()


def write_texts(folder: Path, count: int, name: str = "data.jsonl") -> str:
    return write_lines(folder, *({"text": f"{number}"} for number in range(count)), name=name)


def numbers_of(batch: dict[str, Any]) -> list[int]:
    return list(batch["numbers"])


def make_numbers(records: list[Record], draws: list[Any]) -> dict[str, Any]:
    return {"numbers": [int(r.content["text"]) for r in records], "draws": [d.random() for d in draws]}


def number_stream(file: str, batch_size: int, seed: int = 3, **options: Any) -> Stream:
    return Stream([open_records(file)], make_numbers, batch_size, seed, reading=Reading(**options))


# ---------------------------------------------------------------- formats

CONVERSATIONS = [("What is this?", "a red circle"), ("Where is it?", "above", "And now?", "below"), ("Hm?", "no")]


def write_formats(folder: Path) -> dict[str, str]:
    """The same samples in every format."""
    (folder / "pictures").mkdir()
    for number in range(len(CONVERSATIONS)):
        (folder / "pictures" / f"{number}.png").write_bytes(picture_bytes(number))
    lines = [{"messages": talk(*texts), "images": [f"{n}.png"]} for n, texts in enumerate(CONVERSATIONS)]
    files = {"jsonl": write_lines(folder / "pictures", *lines)}
    marks = ("<image>\n{}", "{}\n<image>", "<image> {}")
    llava = []
    for n, texts in enumerate(CONVERSATIONS):
        said = [marks[n].format(texts[0]), *texts[1:]]
        turns = [{"from": "gpt" if k % 2 else "human", "value": text} for k, text in enumerate(said)]
        llava.append({"id": f"{n}", "image": f"{n}.png", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(llava, indent=1), encoding="utf-8")
    files["llava"] = str(folder / "llava.json")
    for name in ("images", "labels_en"):
        (folder / "sft" / "multi" / name).mkdir(parents=True)
    for n, texts in enumerate(CONVERSATIONS):
        (folder / "sft" / "multi" / "images" / f"{n:08d}.png").write_bytes(picture_bytes(n))
        label = folder / "sft" / "multi" / "labels_en" / f"{n:08d}.json"
        label.write_text(json.dumps({"conversations": talk(*texts)}), encoding="utf-8")
    files["cogvlm-sft"] = str(folder / "sft")
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for n, texts in enumerate(CONVERSATIONS):
            members = {"json": json.dumps({"messages": talk(*texts)}).encode(), "png": picture_bytes(n)}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"part/{n}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    files["tar"] = str(folder / "shard.tar")
    return files


def test_all_formats_give_the_same_records(tmp_path: Path) -> None:
    files = write_formats(tmp_path)
    for form, file in files.items():
        records = open_records(Source(file, images=str(tmp_path / "pictures") if form == "llava" else None))
        assert len(records) == len(CONVERSATIONS)
        for number, (record, texts) in enumerate(zip(records, CONVERSATIONS, strict=True)):
            assert record.messages == talk(*texts), form
            (image,) = record.images
            assert (image if isinstance(image, bytes) else Path(image).read_bytes()) == picture_bytes(number)


def test_captions_of_folders_and_tar_files_are_asked_for(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "7.jpg").write_bytes(picture_bytes(7))
    caption = {"captions": [{"role": "caption", "content": "a beach"}]}
    (tmp_path / "labels" / "7.json").write_text(json.dumps(caption), encoding="utf-8")
    (record,) = open_records(Source(str(tmp_path), question="What?"))
    assert record.messages == talk("What?", "a beach") and record.images == [tmp_path / "images" / "7.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, content in (("0.txt", b"a beach\n"), ("0.0.png", b"first"), ("0.1.png", b"second")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    (record,) = open_records(tmp_path / "x.tar")
    assert record.messages == talk("Describe this image.", "a beach") and record.images == [b"first", b"second"]
    assert record.content["text"] == "a beach" and record.where == f"{tmp_path}/x.tar/0.txt:1"


def test_marks_that_say_nothing_are_dropped_and_others_kept() -> None:
    def first(text: str, count: int) -> str:
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
        message: str = canonical({"image": ["x"] * count, "conversations": turns})["messages"][0]["content"]
        return message

    assert first("<image>\nWhat?", 1) == first("What?\n<image>", 1) == "What?"
    assert first("<image><image>\nWhat?", 2) == "What?"
    assert first("Is <image> like <image>?", 2) == "Is <image> like <image>?"
    assert first("<image>\nIs it like <image>?", 2) == "<image>\nIs it like <image>?"
    assert first("<image>\nWhat?", 2) == "<image>\nWhat?"
    placed = place_images(talk("<image>\nIs it like <image>?", "yes"), None)
    assert placed == talk("Is it like ?", "yes")
    assert place_images(talk("<image>x", "y"), "<EOI>") == talk("<EOI>x", "y")


@pytest.mark.parametrize("size", [1, 7, 64])
def test_elements_of_a_list_are_found_whatever_the_pieces(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixformer.data.readers._CHUNK", size)
    texts = ['a "quoted" ] } text', "back\\slash\\\\", "{[", "ünï", 'ends with "']
    elements = [{"text": text, "list": [{"a": [1, -2.5e3]}, None]} for text in texts]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(elements, indent=2, ensure_ascii=False), encoding="utf-8")
    records = open_records(file)
    assert [record.content for record in records] == elements
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [record.line for record in records] == [n for n, line in enumerate(lines, 1) if line == "  {"]


def test_files_by_pattern_come_one_behind_the_other(tmp_path: Path) -> None:
    for part in range(3):
        write_lines(tmp_path, {"text": f"{part}a"}, {"text": f"{part}b"}, name=f"part-{part}.jsonl")
    records = open_records(str(tmp_path / "part-*.jsonl"))
    assert [record.content["text"] for record in records] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert records[-1].where == f"{tmp_path}/part-2.jsonl:2" and [r.line for r in records[1:4]] == [2, 1, 2]
    assert isinstance(records, JoinedRecords)
    with pytest.raises(IndexError):
        records[6]
    with pytest.raises(ValueError, match="No file matches"):
        open_records(str(tmp_path / "none-*"))


def test_lines_may_be_indented_and_end_in_any_way(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'  {"text": "a"}\r\n\r\n\t{"text": "\xc3\xbc"}  \n{"text": "c"}')
    records = open_records(tmp_path / "x.jsonl")
    assert [(r.content["text"], r.line) for r in records] == [("a", 1), ("ü", 3), ("c", 4)]


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def write_tar(path: Path, *members: tuple[str, bytes | tuple[bytes, str]]) -> Path:
    """Members of a name and their content, or of the kind and target of a link."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                shard.addfile(member)
            else:
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def test_byte_order_marks_are_no_part_of_the_text(tmp_path: Path) -> None:
    one, two = b'{"text": "a"}', b'{"text": "b"}'
    for name in ("images", "labels"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    (tmp_path / "sft" / "images" / "1.png").write_bytes(picture_bytes(1))
    (tmp_path / "sft" / "labels" / "1.json").write_bytes(BYTE_ORDER_MARK + b'{"text": "a", "captions": ["b"]}')
    (tmp_path / "x.jsonl").write_bytes(BYTE_ORDER_MARK + one + b"\r\n" + two)
    (tmp_path / "x.json").write_bytes(BYTE_ORDER_MARK + b"[" + one + b",\n" + two + b"]")
    (tmp_path / "x.txt").write_bytes(BYTE_ORDER_MARK + b"a\nb\n")
    (tmp_path / "empty.txt").write_bytes(BYTE_ORDER_MARK + b"\r\n")
    write_tar(tmp_path / "x.tar", ("1.json", BYTE_ORDER_MARK + one), ("2.txt", BYTE_ORDER_MARK + b"b"))
    for name in ("x.jsonl", "x.json", "x.txt", "x.tar"):
        records = open_records(tmp_path / name)
        assert [record.content["text"] for record in records] == ["a", "b"], name
        assert [record.line for record in records] == ([1, 1] if name == "x.tar" else [1, 2]), name
    assert open_records(tmp_path / "sft")[0].content["text"] == "a"
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        open_records(tmp_path / "empty.txt")


@pytest.mark.parametrize("count", [2, 12])
def test_pictures_of_a_tar_sample_come_by_number_wherever_they_lie(tmp_path: Path, count: int) -> None:
    names = [f"0.{number}.png" for number in range(count)]
    members = [(name, name.encode()) for name in reversed(names)]
    file = write_tar(tmp_path / "x.tar", *members[:1], ("0.JSON", b'{"text": "x"}'), ("1.txt", b"y"), *members[1:])
    (record, other) = open_records(file)
    assert record.images == [name.encode() for name in names] and other.images == []


def test_members_of_a_tar_file_may_have_any_name(tmp_path: Path) -> None:
    long = "\u00e4" * 70 + "/" + "x" * 130
    members = [(f"{stem}.{suffix}", content) for stem in (long, "./a/1", "b/1")
               for suffix, content in (("json", b'{"text": "x"}'), ("png", stem.encode()))]  # fmt: skip
    records = open_records(write_tar(tmp_path / "x.tar", ("b/._1.json", b"junk"), *members))
    assert [record.images for record in records] == [[stem.encode()] for stem in (long, "./a/1", "b/1")]
    assert records[0].where == f"{tmp_path}/x.tar/{long}.json:1"


def test_a_caption_beside_metadata_is_the_answer(tmp_path: Path) -> None:
    # what img2dataset writes: 00000.jpg, 00000.txt and 00000.json with url, width, ...
    meta = json.dumps({"url": "http://x/y.jpg", "caption": "a beach", "status": "success", "width": 8}).encode()
    file = write_tar(tmp_path / "x.tar", ("0.jpg", picture_bytes(0)), ("0.json", meta), ("0.txt", b"a beach\n"))
    (record,) = open_records(file)
    assert record.messages == talk("Describe this image.", "a beach") and record.content["width"] == 8
    assert record.images == [picture_bytes(0)] and check(file) == []
    write_tar(file, ("0.json", b'{"text": "a"}'), ("0.txt", b"b"))
    assert [problem.reason for problem in check(file)] == ["has 'text' and a .txt beside it: keep one of them."]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_file_is_no_picture_and_not_overlooked(tmp_path: Path, kind: bytes) -> None:
    file = write_tar(tmp_path / "x.tar", ("0.txt", b"a"), ("0.png", picture_bytes(0)), ("1.txt", b"b"),
                     ("1.png", (kind, "0.png")))  # fmt: skip
    (problem,) = check(file)
    assert problem.file.endswith("/1.txt") and "1.png is no plain file but a link" in problem.reason


def test_a_tar_file_that_is_cut_off_anywhere_is_never_a_smaller_one(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", *((f"{number}.txt", b"x" * 600 * number) for number in range(1, 4)))
    content = file.read_bytes()
    members = 3 * 512 + 1024 + 1536 + 2048
    assert content[members:].strip(b"\0") == b""
    for length in range(0, members + 512, 128):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.tar is (no plain tar file, or )?cut off"):
            open_records(file)
    for length in (members + 512, members + 1024, len(content)):
        file.write_bytes(content[:length])
        assert len(open_records(file)) == 3
    file.write_bytes(content + content)
    with pytest.raises(ValueError, match="goes on behind its end"):
        open_records(file)
    damaged = bytearray(content)
    damaged[512 + 1024 : 512 + 1024 + 100] = b"?" * 100  # the header of the second member
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut off or damaged behind its member 1\.txt"):
        open_records(file)


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    file = Path(write_texts(tmp_path, 20))
    for workers in (0, 1):
        stream = iter(number_stream(str(file), 2, broken="skip", shuffle=False, num_workers=workers))
        assert numbers_of(next(stream)) == [0, 1]
        with file.open("a", encoding="utf-8") as longer:
            longer.write('{"text": "20"}\n')
        assert numbers_of(next(stream)) == [2, 3]  # what was added is not missed
        content = file.read_text(encoding="utf-8")
        file.write_text(content[7:], encoding="utf-8")
        with pytest.raises(ChangedFileError, match=r"data\.jsonl has changed since it was opened: line \d+ is not"):
            list(islice(stream, 10))
        file.write_text(content, encoding="utf-8")
    listed = tmp_path / "x.json"
    listed.write_text('[{"text": "a"}, {"text": "b"}]', encoding="utf-8")
    shard = write_tar(tmp_path / "x.tar", ("1.txt", b"x" * 600), ("2.txt", b"y"))
    for path in (listed, shard):
        records = open_records(path)
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ChangedFileError, match="has become shorter"):
            records[1]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.tar", "x.txt"])
def test_compressed_files_are_refused_whatever_their_name(tmp_path: Path, name: str) -> None:
    for pack, suffix in ((gzip.compress, ".gz"), (bz2.compress, ".bz2"), (lzma.compress, ".xz")):
        for file in (tmp_path / name, tmp_path / (name + suffix)):
            file.write_bytes(pack(b'{"text": "a"}\n'))
            with pytest.raises(ValueError, match="unpack it to a plain file"):
                open_records(file)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow", ".tsv"])
def test_tables_are_not_taken_for_plain_text(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_text("text,label\na,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is a table, which is not read: write its rows as JSON lines"):
        open_records(file)
    assert len(open_records(Source(str(file), format="text"))) == 2


def test_files_of_unknown_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unpack it to a plain"):
        (tmp_path / "x.tar.gz").write_bytes(b"")
        open_records(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match=r"no file .*\{0\.\.1\}\.tar .* several files write \* in the name"):
        open_records(tmp_path / "x-{0..1}.tar")
    with pytest.raises(ValueError, match=r"no plain tar file, or cut off"):
        (tmp_path / "x.tar").write_bytes(b"nothing" * 200)
        open_records(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="has no `images` and `labels` folders"):
        open_records(tmp_path)
    for name in ("labels_en", "labels_zh"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="labels in labels_en, labels_zh: name one"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="no folder labels_de"):
        open_records(Source(str(tmp_path), format="cogvlm-sft", labels="labels_de"))
    with pytest.raises(ValueError, match="has labels but no folder"):
        open_records(Source(str(tmp_path), labels="labels_en"))
    with pytest.raises(ValueError, match="choose one of jsonl"):
        Source("x", format="csv")
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            Source("x", weight=weight)


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_big_file_is_not_read_whole(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"big.{form}"
    line = json.dumps({"text": "7", "padding": "x" * 9_900})
    with file.open("w", encoding="utf-8") as out:
        out.write("[\n" if form == "json" else "")
        for number in range(4_000):
            out.write(line + (",\n" if form == "json" and number < 3_999 else "\n"))
        out.write("]\n" if form == "json" else "")
    assert file.stat().st_size > 39_000_000
    tracemalloc.start()
    try:
        records = open_records(file)
        stream = Stream([records], make_numbers, 8)
        assert len(records) == 4_000 and numbers_of(next(iter(stream))) == [7] * 8
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_has_every_sample_once_whatever_the_processes_and_workers(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    file = write_texts(tmp_path, 30)
    parts = []
    for rank in range(ranks):
        stream = number_stream(file, 6, num_workers=workers)
        stream.shard(rank, ranks)
        parts.append(list(islice(stream, 10)))
    seen = [number for batches in parts for batch in batches[:5] for number in numbers_of(batch)]
    assert sorted(seen) == list(range(30))
    again = [number for batches in parts for batch in batches[5:] for number in numbers_of(batch)]
    assert sorted(again) == list(range(30))


def test_a_batch_is_the_same_whatever_the_processes_and_workers(tmp_path: Path) -> None:
    file = write_texts(tmp_path, 17)
    alone = list(islice(number_stream(file, 6), 9))
    for ranks, workers in ((1, 2), (2, 0), (3, 1), (6, 0)):
        parts = []
        for rank in range(ranks):
            stream = number_stream(file, 6, num_workers=workers)
            stream.shard(rank, ranks)
            parts.append(list(islice(stream, 9)))
        for number, batch in enumerate(alone):
            rows: dict[int, float] = {}
            for rank in range(ranks):
                part = parts[rank][number]
                rows.update(zip(part["numbers"], part["draws"], strict=True))
            assert rows == dict(zip(batch["numbers"], batch["draws"], strict=True))
    assert list(islice(number_stream(file, 6, seed=4), 9)) != alone


def test_rounds_differ_unless_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    file = write_texts(tmp_path, 8)
    rounds = [numbers_of(batch) for batch in islice(number_stream(file, 8), 4)]
    assert len({tuple(numbers) for numbers in rounds}) == 4 and all(sorted(n) == list(range(8)) for n in rounds)
    plain = [numbers_of(batch) for batch in islice(number_stream(file, 8, shuffle=False), 3)]
    assert plain == [list(range(8))] * 3


def test_draws_of_a_sample_differ_between_rounds(tmp_path: Path) -> None:
    batches = list(islice(number_stream(write_texts(tmp_path, 4), 4), 3))
    draws = [dict(zip(batch["numbers"], batch["draws"], strict=True)) for batch in batches]
    assert all(len({draw[number] for draw in draws}) == 3 for number in range(4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 11])
def test_the_cursor_goes_on_with_the_batches_that_follow(tmp_path: Path, taken: int, workers: int) -> None:
    file = write_texts(tmp_path, 10)
    expected = list(islice(number_stream(file, 4), 20))
    stream = number_stream(file, 4, num_workers=workers)
    assert list(islice(stream, taken)) == expected[:taken]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = number_stream(file, 4, num_workers=0)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 20 - taken)) == expected[taken:]
    assert list(islice(stream, 20 - taken)) == expected[taken:]  # batches made ahead are not lost


def test_the_cursor_of_other_data_is_refused(tmp_path: Path) -> None:
    state = number_stream(write_texts(tmp_path, 10), 4).state_dict()
    with pytest.raises(ValueError, match="has 9 samples, but 10 when the state was saved"):
        number_stream(write_texts(tmp_path, 9), 4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.jsonl has 11 samples, but 10 when the state was saved: resume with"):
        number_stream(write_texts(tmp_path, 11), 4).load_state_dict(state)
    two = Stream([open_records(write_texts(tmp_path, 10))] * 2, make_numbers, 4, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="has 2 sources, but 1"):
        two.load_state_dict(state)
    order = Order([10, 5], [1.0, 1.0], 4, 0)
    with pytest.raises(ValueError, match="has 2 weighted sources, but 1"):
        order.load_state_dict(state["order"])
    with pytest.raises(ValueError, match="batch_size 4 is less than the 5 processes"):
        number_stream(write_texts(tmp_path, 10), 4).shard(0, 5)


def test_a_file_that_was_mended_is_gone_on_with_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = number_stream(write_texts(tmp_path, 10), 4)
    expected = [numbers_of(batch) for batch in islice(stream, 5)]
    stream = number_stream(write_texts(tmp_path, 10), 4)
    next(iter(stream))
    state = json.loads(json.dumps(stream.state_dict()))
    file = write_lines(tmp_path, *({"text": f"{number}", "more": "words"} for number in range(10)))
    resumed = number_stream(file, 4)
    resumed.load_state_dict(state)
    assert [numbers_of(batch) for batch in islice(resumed, 4)] == expected[1:]
    (message,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"data\.jsonl has \d+ bytes, but \d+ when the state was saved\. It has as many samples", message)
    caplog.clear()
    number_stream(file, 4).load_state_dict({"order": state["order"]})  # of a version that did not write sizes down
    assert not caplog.records


def test_weights_say_how_often_sources_come() -> None:
    order = Order([10, 1000, 30], [1.0, 2.5, 0.5], 8, 5)
    drawn = [place for _ in range(100) for place in order.next()]
    assert Counter(place.source for place in drawn) == {0: 200, 1: 500, 2: 100}
    for number in range(1, len(drawn) + 1):
        assert all(
            abs(sum(p.source == source for p in drawn[:number]) - number * share) <= 1
            for source, share in enumerate((0.25, 0.625, 0.125))
        ) or number > 60
    small = [place.number for place in drawn if place.source == 0]
    assert all(sorted(small[start : start + 10]) == list(range(10)) for start in range(0, 200, 10))
    state = order.state_dict()
    follow = [order.next() for _ in range(9)]
    other = Order([10, 1000, 30], [1.0, 2.5, 0.5], 8, 5)
    other.load_state_dict(state)
    assert [other.next() for _ in range(9)] == follow


def test_sources_without_weights_are_one_round_together(tmp_path: Path) -> None:
    files = [write_texts(tmp_path, count, f"{count}.jsonl") for count in (3, 7, 2)]
    order = Order([3, 7, 2], None, 4, 1)
    places = [place for _ in range(3) for place in order.next()]
    assert sorted((p.source, p.number) for p in places) == [(s, n) for s, c in enumerate((3, 7, 2)) for n in range(c)]
    task = TextTask([Source(file) for file in files], 4)
    assert task.weights is None and len(files) == 3
    with pytest.raises(ValueError, match=r"and .*7\.jsonl has none: give one to all"):
        TextTask([Source(files[0], 2.0), Source(files[1])])
    with pytest.raises(ValueError, match="no file to learn from"):
        TextTask([])


# ---------------------------------------------------------------- samples that cannot be used


def broken_folder(folder: Path) -> str:
    """Ten conversations: line 3 has a picture that is none, line 6 no JSON, line 8 nothing to learn."""
    lines: list[Any] = []
    for number in range(10):
        (folder / f"{number}.png").write_bytes(picture_bytes(number))
        lines.append({"messages": talk(f"what is {number}?", "a circle"), "images": [f"{number}.png"]})
    (folder / "2.png").write_bytes(b"no picture")
    lines[5] = "{"
    lines[7] = {"messages": talk("what?"), "images": ["7.png"]}
    return write_lines(folder, *lines)


def conversations(file: str, batch_size: int, model: Any = None, **options: Any) -> ConversationTask:
    task = ConversationTask(file, batch_size, reading=Reading(**options))
    task.prepare(model or Model(), make_processor())
    task.shard(0, 1)
    return task


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_skipped_counted_and_named(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = broken_folder(tmp_path)
    task = conversations(file, 5, broken="skip", unusable="skip", num_workers=workers)
    with caplog.at_level(logging.WARNING):
        names = [name for batch in islice(task.batches(), 2) for name in batch["_samples"]]
    assert sorted(names) == sorted(f"{file}:{line}" for line in (1, 2, 4, 5, 7, 9, 10))
    assert task.stream().skipped == {"broken": 2, "unusable": 1}
    messages = [record.getMessage() for record in caplog.records]
    for line, kind, reason in (
        (3, "broken", "cannot"), (6, "broken", "not valid JSON"), (8, "unusable", "nothing to learn"),
    ):
        (found,) = (message for message in messages if f"{kind} sample {file}:{line} " in message)
        assert reason in found or "picture" in found


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_is_a_sample_that_cannot_be_read(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"messages": talk("What?", "a circle"), "images": [f"{number}.png"]} for number in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture_bytes(number))
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("/proc/self/mem")  # there, opens, and fails when it is read
    file = write_lines(tmp_path, *lines)
    task = conversations(file, 3, broken="skip", num_workers=workers)
    assert sorted(next(iter(task.batches()))["_samples"]) == [f"{file}:1", f"{file}:3"]
    assert f"skipped broken sample {file}:2 " in caplog.text and "Input/output error" in caplog.text
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: .*Input/output error"):
        next(iter(conversations(file, 3, num_workers=workers).batches()))
    (problem,) = check(file)
    assert problem.line == 2 and "Input/output error" in problem.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_stop_the_run_by_default(tmp_path: Path, workers: int) -> None:
    file = broken_folder(tmp_path)
    with pytest.raises(UnusableSampleError, match=r"data\.jsonl, line 8: nothing to learn"):
        list(islice(conversations(file, 1, broken="skip", num_workers=workers).batches(), 20))
    for lines in ((3, 6),):
        with pytest.raises(ValueError, match=rf"data\.jsonl, line [{lines[0]}{lines[1]}]"):
            list(islice(conversations(file, 1, unusable="skip", num_workers=workers).batches(), 20))
    with pytest.raises(ValueError, match=r"line [368]"):
        list(islice(conversations(file, 10, num_workers=workers).batches(), 20))
    with pytest.raises(ValueError, match="choose error or skip"):
        Reading(broken="ignore")
    with pytest.raises(ValueError, match="must be 0 or more"):
        Reading(num_workers=-1)


def test_answers_that_are_empty_or_hold_a_picture_are_not_learnt(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture_bytes(0))
    said = [talk("a?", " "), talk("a?", "", "b?", "a circle"), talk("a?", "<image> a circle"), talk("a?", "a square")]
    file = write_lines(tmp_path, *({"messages": messages, "images": ["0.png"]} for messages in said))
    for supervise, unusable in (("last", {1}), ("all", {1, 2})):
        task = ConversationTask(file, 4, supervise=supervise, reading=Reading(broken="skip", unusable="skip"))
        task.prepare(Model(), make_processor(image_place="first"))
        task.shard(0, 1)
        lines = {int(name.rpartition(":")[2]) for name in next(iter(task.batches()))["_samples"]}
        assert lines == {1, 2, 4} - unusable
        assert task.stream().skipped == {"unusable": len(unusable), "broken": 1}


def test_a_process_without_a_usable_sample_learns_nothing_but_does_not_stop(tmp_path: Path) -> None:
    file = broken_folder(tmp_path)
    rows: dict[int, list[str]] = {}
    for rank in range(2):
        task = ConversationTask(file, 2, reading=Reading(broken="skip", unusable="skip", shuffle=False))
        task.prepare(Model(), make_processor())
        task.shard(rank, 2)
        batches = list(islice(task.batches(), 5))
        assert len(batches) == 5
        for number, batch in enumerate(batches):
            learnt = (batch["labels"] != IGNORED).any(1).tolist()
            pairs = zip(batch["_samples"], learnt, strict=True)
            rows.setdefault(number, []).extend(name for name, yes in pairs if yes)
    assert [sorted(int(name.rpartition(":")[2]) for name in rows[n]) for n in range(5)] == [
        [1, 2], [4], [5], [7], [9, 10]
    ]  # fmt: skip


def test_data_without_a_usable_sample_stops_the_run(tmp_path: Path) -> None:
    file = write_lines(tmp_path, "{", "[", "{")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="No sample of the data can be used"):
            next(conversations(file, 2, broken="skip", num_workers=workers).batches())


def test_contrastive_batches_keep_their_size_limit_and_tasks_their_cursor(tmp_path: Path) -> None:
    lines = [{"text": f"a red circle {number}", "images": [f"{number}.png"]} for number in range(9)]
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(picture_bytes(number))
    file = write_lines(tmp_path, *lines)

    def make(kind: Any, **options: Any) -> FileTask:
        task: FileTask = kind(file, 4, seed=2, **options)
        task.prepare(Model(), make_processor(family="caption", image_place="last"))
        return task

    for kind, options in (
        (PairTask, {}), (TextTask, {"random_prefix": True}), (MaskedTextTask, {"pictures": "images"}),
    ):
        expected = list(islice(make(kind, **options).batches(), 7))
        task = make(kind, **options)
        for _ in islice(task.batches(), 3):
            pass
        resumed = make(kind, **options)
        resumed.load_state_dict(task.state_dict())
        for ours, theirs in zip(resumed.batches(), expected[3:], strict=False):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert "_samples" not in expected[0]


# ---------------------------------------------------------------- labels


def learnt_spans(batch: dict[str, torch.Tensor], row: int = 0) -> list[str]:
    """The supervised runs of a row as text, each with the ids that are learnt."""
    spans: list[list[int]] = []
    inside = False
    for label in batch["labels"][row].tolist():
        if label != IGNORED:
            if not inside:
                spans.append([])
            spans[-1].append(label)
        inside = label != IGNORED
    return [TOKENIZER.decode([i for i in span if i != EOS]) + ("$" if span[-1] == EOS else "") for span in spans]


TURNS = ("What is this?", "a red circle", "Where is it?", "above", "What is left of it?", "a blue square")


def test_all_answers_and_their_ends_are_learnt_and_nothing_else() -> None:
    for family, template in (("llava", "chat"), ("hf-cogagent", "chat"), ("hf-cogvlm", "chat"), ("internvl", "chat")):
        processor = make_processor(family=family, template=template, image_size=None)
        last, every = (
            processor.training_batch([TrainingSample(talk(*TURNS), supervise=which)]) for which in ("last", "all")
        )
        assert learnt_spans(last) == ["a blue square$"]
        assert learnt_spans(every) == ["a red circle$", "above$", "a blue square$"]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def test_labels_are_those_of_spans_written_out_by_hand() -> None:
    opening = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. "
    )
    sample = TrainingSample(talk(*TURNS[:4]), images=picture_bytes(1), supervise="all")
    batch = make_processor().training_batch([sample])
    before_image = [1, *encode(opening + "USER: ")]
    first, second = encode("a red circle"), encode("above")
    middle = encode("USER: Where is it? ASSISTANT:")
    question = encode("\nWhat is this? ASSISTANT:")
    ids = [*before_image, *[5] * 4, *question, *first, EOS, *middle, *second, EOS]
    labels = [IGNORED] * (len(before_image) + 4 + len(question)) + [*first, EOS]
    labels += [IGNORED] * len(middle) + [*second, EOS]
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


def test_where_a_template_has_no_end_it_is_learnt_while_the_text_goes_on() -> None:
    processor = make_processor(family="hf-cogvlm", image_size=None)
    batch = processor.training_batch([TrainingSample(talk(*TURNS[:4]), supervise="all")])
    prompt, first, second = encode("Question: What is this? Answer:"), encode("a red circle"), encode("above")
    whole = encode("a\nQuestion: Where is it? Answer:")
    middle = whole[len(encode("a")) :]
    assert batch["input_ids"][0].tolist() == [1, *prompt, *first, *middle, *second, EOS]
    expected = [IGNORED] * (1 + len(prompt)) + first + [EOS] + [IGNORED] * (len(middle) - 1) + [*second, EOS]
    assert batch["labels"][0].tolist() == expected
    # up to its answer, the second turn reads what it reads when it is asked
    history = processor("Where is it?", history=[("What is this?", "a red circle")])["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist()[: len(history)] == history


def test_turns_that_do_not_fit_are_left_out_from_the_end() -> None:
    processor = make_processor(family="hf-cogvlm", image_size=None)
    sample = TrainingSample(talk(*TURNS), supervise="all")
    whole = processor.training_batch([sample])["input_ids"].shape[1]
    spans = {}
    for length in range(12, whole + 6):
        try:
            batch = processor.training_batch([sample], length)
        except UnusableSampleError:
            spans[length] = None
            continue
        assert batch["input_ids"].shape[1] <= length
        assert batch["input_ids"][0, -1] == EOS == batch["labels"][0, -1]
        spans[length] = len(learnt_spans(batch))
    assert set(spans.values()) == {None, 1, 2, 3} and spans[whole + 3] == 3
    assert [spans[n] or 0 for n in sorted(spans)] == sorted(spans[n] or 0 for n in spans)


def test_an_image_of_a_later_turn_is_never_cut_off() -> None:
    messages = talk("<image> What is this?", "a red circle", "And <image>?", "a blue square")
    sample = TrainingSample(messages, images=[picture_bytes(1), picture_bytes(2)], supervise="all")
    processor = make_processor()
    whole = processor.training_batch([sample])
    assert whole["images"].shape[0] == 2 and int(whole["token_type_ids"].sum()) == 8
    assert learnt_spans(whole) == ["a red circle$", "a blue square$"]
    length = int((whole["labels"][0] == EOS).nonzero()[0]) + 6
    with pytest.raises(UnusableSampleError, match=r"sample 0: 1 image\(s\) of later turns do not fit"):
        processor.training_batch([sample], length)
    with pytest.raises(UnusableSampleError, match="image span"):
        processor.training_batch([sample], 6)


def test_templates_without_history_cannot_teach_all_answers() -> None:
    processor = make_processor(family="hf-cogvlm", template="base", image_size=None)
    with pytest.raises(ValueError, match="leaves past turns out"):
        processor.training_batch([TrainingSample(talk(*TURNS), supervise="all")])
    batch = processor.training_batch([TrainingSample(talk(*TURNS[:2]), supervise="all")])
    assert learnt_spans(batch) == ["a red circle$"]
    with pytest.raises(ValueError, match="choose last or all"):
        TrainingSample("x", "y", supervise="first")
    with pytest.raises(ValueError, match="choose last or all"):
        ConversationTask("x", supervise="first")


def test_conversations_teach_all_answers_where_asked(tmp_path: Path) -> None:
    file = write_lines(tmp_path, {"messages": talk(*TURNS)})
    for supervise, count in (("last", 1), ("all", 3)):
        task = ConversationTask(file, 1, supervise=supervise)
        task.prepare(Model(), make_processor(image_size=None))
        assert len(learnt_spans(next(task.batches()))) == count


def test_sources_and_reading_are_options_of_configuration_files(tmp_path: Path) -> None:
    files = [write_lines(tmp_path, {"text": "a red circle"}, name=f"{name}.jsonl") for name in "ab"]
    config = tmp_path / "train.yaml"
    options = {"file": [{"file": files[0], "weight": 2.0}, {"file": files[1], "weight": 1.0}],
               "reading": {"num_workers": 1, "broken": "skip"}}  # fmt: skip
    task = {"class_path": "mixformer.train.tasks.TextTask", "init_args": options}
    stages = [{"name": "text", "task": task}]
    config.write_text(json.dumps({"model_class": "models.llama:LLaMA", "train": {"stages": stages}}), encoding="utf-8")
    found = read_settings(None, config, [], ("train",)).train.stages[0].task
    assert found.sources == [Source(files[0], 2.0), Source(files[1], 1.0)] and found.weights == [2.0, 1.0]
    assert found.reading == Reading(1, broken="skip")


# ---------------------------------------------------------------- check and show

GOOD = {"messages": talk("What?", "a circle"), "images": ["0.png"]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not valid JSON"),
        ('{"messages": "\udcff"}', "is not valid UTF-8"),
        ("[1]", "is no JSON object"),
        ({"message": []}, "has no 'messages' .*only message"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": "x"}, "'messages' must be a list of messages"),
        ({"messages": ["x"]}, "message 0 must have a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 must have a role .* content"),
        ({"messages": [{"role": "system", "content": "x"}, *talk("a", "b")]}, "message 0 must have a role"),
        ({"messages": talk("a", "b", "c")}, "the last message is the user's: nothing to learn"),
        ({"messages": talk("a", "b")[::-1]}, "message 0 is the assistant's; messages alternate"),
        ({"messages": talk("a", " ")}, "message 1 is an empty answer"),
        ({**GOOD, "images": "0.png"}, "'images' must be a list of file names"),
        ({**GOOD, "images": ["absent.png"]}, r"names the picture absent\.png, which is not in"),
        ({**GOOD, "images": ["broken.png"]}, "picture 0 cannot be read"),
        ({**GOOD, "messages": talk("<image> and <image>?", "b")}, r"mark 2 place\(s\) with <image> but there are 1"),
        ({**GOOD, "objects": {}}, "'objects' must be a list"),
        ({**GOOD, "objects": ["x"]}, "object 0: must be"),
        ({**GOOD, "objects": [{"box": [1, 2, 3]}]}, r"object 0: 'box' must be \[x0, y0, x1, y1\]"),
        ({**GOOD, "objects": [{"box": [1, 2, 3, 1000]}]}, "object 0: a box needs whole thousandths"),
        ({**GOOD, "objects": [{"box": [5, 2, 3, 9]}]}, "object 0: a box runs from its upper left"),
        ({**GOOD, "objects": [{"box": [1, 2, 3, 4], "label": 3}]}, "object 0: 'label' must be text"),
        ({**GOOD, "objects": [{"box": [1, 2, 3, 4], "image": 1}]}, "object 0: is in picture 1, but there are 1"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0 is said by 'robot'"),
        ({"conversations": [{"from": "human"}]}, "turn 0 must be {'from'"),
        ({"conversations": {}}, "'conversations' must be a list"),
        ({"captions": ["a", "b"]}, "'captions' must hold one text"),
        ({**GOOD, "image": "0.png"}, "it has 'images' and 'image', which say the same"),
        ({**GOOD, "conversations": []}, "it has 'messages' and 'conversations', which say the same"),
        ({**GOOD, "images": [""]}, "'images' has an empty name"),
        ({**GOOD, "images": ["https://x/0.png"]}, r"https://x/0\.png, which would have to be downloaded"),
        ({**GOOD, "images": ["x" * 300]}, r"names the picture x+, which cannot be looked up \(File name too long\)"),
        ({**GOOD, "images": ["."]}, r"names the picture \., which is not in"),
        ({**GOOD, "images": ["empty.png"]}, r"picture 0 cannot be read: .*zero bytes"),
        ({**GOOD, "images": ["cut.jpg"]}, r"picture 0 cannot be read: .*truncated or damaged"),
        ({**GOOD, "messages": talk("What?", "<image> a circle")}, "message 1 is an answer with <image> in it"),
        ({**GOOD, "objects": [{"box": [100, 2, -3, 4]}]}, "object 0: a box needs whole thousandths"),
        ({"text": "half \ud83d"}, "half of a pair of surrogates"),
        ('[{"text": "a"},', r"is not valid JSON .* the name of a JSON list ends with \.json"),
        ('{"text": "a"', "is not valid JSON"),
    ],
)
def test_every_mistake_is_found_with_its_line(tmp_path: Path, line: Any, reason: str) -> None:
    (tmp_path / "0.png").write_bytes(picture_bytes(0))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    text = line if isinstance(line, str) else json.dumps(line)
    file = tmp_path / "data.jsonl"
    lines = [json.dumps(GOOD), "", text, json.dumps(GOOD)]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    (problem,) = check(file)
    assert (problem.file, problem.line) == (str(file), 3)
    assert re.search(reason, problem.reason), problem.reason
    assert str(problem) == f"{file}:3: {problem.reason}"


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture_bytes(0))
    rows = [{"messages": GOOD["messages"], "image": None}, {**GOOD, "image": None}, {"text": "\U0001f600 \\ud83d"},
            {"id": 1, "conversations": [{"from": "human", "value": "Is <image> red?"}, {"from": "gpt", "value": "no"}],
             "image": "0.png"}, {**GOOD, "id": 1}]  # fmt: skip
    assert check(write_lines(tmp_path, *rows)) == []
    files = write_formats(tmp_path)
    pictures = str(tmp_path / "pictures")
    assert check([files["jsonl"], Source(files["llava"], images=pictures), files["cogvlm-sft"], files["tar"]]) == []
    assert check(SHAPES / "train.jsonl", make_processor(), 200) == []


def test_mistakes_in_lists_have_the_line_they_stand_in(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    text = '[\n {"messages": [\n  {"role": "user" "content": 1}]},\n {"x": 1},\n 3,\n [4]\n]\n'
    file.write_text(text, encoding="utf-8")
    problems = check(file)
    assert [problem.line for problem in problems] == [3, 4, 5, 6]
    assert "not valid JSON" in problems[0].reason and "no JSON object" in problems[2].reason
    for text, line, reason in (
        ('{\n"a": 1}', 1, "is not the start of a JSON list"),
        ('[\n{"text": "a"},\n{"text": "b}\n]', 3, "a text begins here and does not end"),
        ('[\n{"text": "a"},\n{"text": "b"\n]', 4, "the list does not end"),
        ('[\n{"text": "a"}\n]\n{"text": "b"}', 4, "goes on after the end of the list"),
    ):
        file.write_text(text, encoding="utf-8")
        (problem,) = check(file)
        assert problem.line == line and reason in problem.reason, problem


def test_mistakes_in_folders_and_tar_files_name_the_member(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(picture_bytes(1))
    for name, text in (("1", "{}"), ("2", '{"captions": ["x"]}'), ("3", '{\n"a" 1}')):
        (tmp_path / "labels" / f"{name}.json").write_text(text, encoding="utf-8")
    found = [(Path(p.file).name, p.line, p.reason[:30]) for p in check(tmp_path)]
    assert found == [
        ("1.json", 1, "has neither 'conversations' no"),
        ("2.json", 1, "has no picture 2.jpg (or .png,"),
        ("3.json", 2, "is not valid JSON (Expecting '"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, content in (("1.png", b"x"), ("2.json", b"{"), ("3.json", b'{"images": ["3.png"], "text": "x"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    found = [(Path(p.file).name, p.line, p.reason[:25]) for p in check(tmp_path / "x.tar")]
    assert found == [
        ("1", 1, "has 0 members .json or .t"),
        ("2.json", 1, "is not valid JSON (Expect"),
        ("3.json", 1, "names 1 picture(s), but 0"),
    ]
    assert check(tmp_path / "absent.jsonl") == [
        Problem(str(tmp_path / "absent.jsonl"), 0, f"There is no file {tmp_path}/absent.jsonl to learn from. Files are "
                "relative to where the command runs.")
    ]  # fmt: skip


def test_rows_that_do_not_fit_are_found_with_a_processor(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture_bytes(0))
    file = write_lines(tmp_path, GOOD, {**GOOD, "messages": talk("What? " * 50, "a")})
    (row,) = make_processor().training_batch([TrainingSample(GOOD["messages"], images=picture_bytes(0))])["input_ids"]
    (problem,) = check(file, make_processor(), len(row) + 4)
    assert problem.line == 2 and problem.reason.startswith("its prompt of")
    assert [p.line for p in check(file, make_processor(), 7)] == [1, 2]
    assert all("image span" in p.reason for p in check(file, make_processor(), 7))


def test_the_commands_print_what_the_functions_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = broken_folder(tmp_path)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit) as stopped:
        check_command(parser.parse_args([file]))
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in lines[:-1]] == ["3", "6", "8"] and lines[-1] == "3 problem(s)"
    check_command(parser.parse_args([str(SHAPES / "train.jsonl")]))
    assert capsys.readouterr().out == "no problems\n"
    with pytest.raises(ValueError, match="give --processor"):
        check_command(parser.parse_args([file, "--max-length", "5"]))
    make_processor().save(tmp_path / "model")
    parser = argparse.ArgumentParser()
    add_show_arguments(parser)
    show_command(parser.parse_args([file, "--number", "3", "--processor", str(tmp_path / "model")]))
    shown = capsys.readouterr().out
    assert f"{file}:1\n" in shown and "<image: 4 tokens>" in shown and "⟦a circle</s>⟧" in shown.replace("⟦ ", "⟦")
    assert "sample 2 cannot be used" in shown and f"{file}:4" not in shown


def test_supervised_text_and_tokens_are_marked(tmp_path: Path) -> None:
    file = write_lines(tmp_path, {"messages": talk(*TURNS[:4])}, {"text": "a red circle"})
    (first, second) = show([file])
    assert first == f"{file}:1\nuser: What is this?\nassistant: a red circle\nuser: Where is it?\nassistant: ⟦above⟧"
    assert second == f"{file}:2\n⟦a red circle⟧"
    (every,) = show([file], 1, supervise="all")
    assert "assistant: ⟦a red circle⟧" in every
    record = open_records(file)[0]
    processor = make_processor(family="hf-cogvlm", image_size=None)
    text = marked_tokens(record, processor, supervise="all")
    assert "⟦ a red circle⟧⟦</s>⟧" in text and text.split("\n")[-1].endswith("6 supervised")
    (only,) = show([file], 1, first=1)
    assert only == second


def test_pictures_are_saved_with_the_boxes_of_objects_and_answers(tmp_path: Path) -> None:
    picture = Image.new("RGB", (100, 80), (200, 200, 200))
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png")
    objects = [{"label": "dog", "box": [100, 200, 500, 600]}, {"label": "cat", "box": [0, 0, 300, 300], "image": 1}]
    file = write_lines(tmp_path, {"messages": talk("Where?", "[[700,700,900,900]]"), "images": ["a.png", "b.png"],
                                  "objects": objects})  # fmt: skip
    lines = list(show([file], output=tmp_path / "out"))
    assert lines[1:] == [f"saved {tmp_path}/out/000000-{number}.png" for number in range(2)]
    answer = Box(700, 700, 900, 900)
    for number, (box, label) in enumerate(((Box(100, 200, 500, 600), "dog"), (Box(0, 0, 300, 300), "cat"))):
        expected = np.asarray(draw_boxes(picture, [box, answer], [label, ""]))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"000000-{number}.png")), expected)


def test_lists_keep_only_places(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"text": "x" * 1000}] * 50), encoding="utf-8")
    records = ListRecords(file, Source(str(file)))
    assert sum(len(value) * value.itemsize for value in vars(records).values() if hasattr(value, "itemsize")) == 50 * 24
