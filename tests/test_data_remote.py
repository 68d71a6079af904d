"""Tar files behind URLs, from a real server: the records of local ones, in an order that can be gone on with."""

import gc
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tqdm import tqdm

from mixformer.data import remote
from mixformer.data.check import check
from mixformer.data.readers import Source, open_records
from mixformer.data.records import Record, RecordError
from mixformer.data.show import show
from mixformer.data.stream import Reading, Stream
from mixformer.train.tasks import TextTask

pytest.importorskip("webdataset")
pytestmark = [
    pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]
SIZES = (3, 5, 4, 1, 6)
TOTAL = sum(SIZES)


def write_shard(path: Path, rows: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in rows:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def write_shards(folder: Path) -> None:
    """Shards of `SIZES` samples, numbered on, each with a text, a conversation and a picture."""
    number = 0
    for shard, size in enumerate(SIZES):
        rows = []
        for place in range(size):
            picture = io.BytesIO()
            Image.new("RGB", (number + 1, 2)).save(picture, "PNG")
            said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{number}"}]
            text = json.dumps({"text": f"{number}", "messages": said}).encode()
            rows += [(f"a/{place}.json", text), (f"a/{place}.png", picture.getvalue())]
            number += 1
        write_shard(folder / f"s-{shard:03d}.tar", rows)


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; connections of those that are named in `dying` end in the middle, so many times."""

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server: Any = self.server
        name = self.path.lstrip("/")
        server.asked.append(name)
        if server.dying.get(name, 0) > 0:
            server.dying[name] -= 1
            content = Path(self.directory, name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1500])
            return
        super().do_GET()


class Web:
    """What is served, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_shards(folder)
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.dying: dict[str, int] = {}
        self.server.asked, self.server.dying = self.asked, self.dying
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, name: str = "s-{000..004}.tar") -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def file(self, name: str = "s-{000..004}.tar") -> str:
        """The same by a URL of files, which takes no program."""
        return f"file://{self.folder}/{name}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    (tmp_path / "served").mkdir()
    made = Web(tmp_path / "served")
    yield made
    made.stop()


def make_numbers(records: list[Record], draws: list[Any]) -> dict[str, Any]:
    return {"numbers": [int(r.content["text"]) for r in records], "draws": [d.random() for d in draws]}


def stream_of(source: Source | str, batch_size: int = 4, rank: int = 0, ranks: int = 1, **options: Any) -> Stream:
    source = Source(source) if isinstance(source, str) else source
    stream = Stream([open_records(source)], make_numbers, batch_size, 3, reading=Reading(**options))
    stream.shard(rank, ranks)
    return stream


def numbers_of(stream: Stream, batches: int) -> list[list[int]]:
    return [batch["numbers"] for batch in islice(stream, batches)]


def rows_of(stream: Stream, batches: int) -> list[list[tuple[int, float]]]:
    return [list(zip(batch["numbers"], batch["draws"], strict=True)) for batch in islice(stream, batches)]


def spooled(stream: Stream) -> list[str]:
    return sorted(path.name for path in stream.remote[0]._folder.glob("*.tar"))


# ---------------------------------------------------------------- records and order


def test_the_records_are_those_of_the_files_that_are_served(web: Web) -> None:
    found = [record for part in open_records(web.url()).files() for record in part]
    local = [record for name in sorted(web.folder.iterdir()) for record in open_records(name)]
    assert len(found) == len(local) == TOTAL
    for ours, theirs in zip(found, local, strict=True):
        assert ours.content == theirs.content and ours.messages and isinstance(ours.images[0], bytes)
        assert ours.where == theirs.where.replace(f"{web.folder}/", web.url(""))
    assert found[3].where == web.url("s-001.tar/a/0.json:1")
    assert web.asked == [f"s-{shard:03d}.tar" for shard in range(5)]


def test_every_round_has_every_sample_once_shard_after_shard_in_a_new_order(web: Web) -> None:
    numbers = numbers_of(stream_of(web.file(), 1), 4 * TOTAL)
    rounds = [[number for (number,) in numbers[start : start + TOTAL]] for start in range(0, 4 * TOTAL, TOTAL)]
    assert all(sorted(order) == list(range(TOTAL)) for order in rounds) and len(set(map(tuple, rounds))) == 4
    shard_of = [shard for shard, size in enumerate(SIZES) for _ in range(size)]
    orders = [[shard for shard, _ in groupby(shard_of[number] for number in order)] for order in rounds]
    assert all(sorted(order) == list(range(len(SIZES))) for order in orders) and len(set(map(tuple, orders))) > 1
    plain = numbers_of(stream_of(web.file(), 1, shuffle=False), 2 * TOTAL)
    assert [number for (number,) in plain] == [*range(TOTAL), *range(TOTAL)]


def test_batches_are_the_same_whatever_the_processes_and_workers(web: Web) -> None:
    alone = rows_of(stream_of(web.url()), 12)
    for ranks, workers in ((1, 2), (2, 0), (3, 1)):
        parts = [rows_of(stream_of(web.file(), 4, rank, ranks, num_workers=workers), 12) for rank in range(ranks)]
        for number, expected in enumerate(alone):
            assert sorted(row for part in parts for row in part[number]) == sorted(expected)
            assert [part[number] for part in parts] == [expected[rank::ranks] for rank in range(ranks)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cursor_goes_on_with_the_batches_that_follow(web: Web, workers: int) -> None:
    expected = rows_of(stream_of(web.file()), 14)
    for taken in (0, 3, 9):
        stream = stream_of(web.file(), num_workers=workers)
        assert rows_of(stream, taken) == expected[:taken]
        state = json.loads(json.dumps(stream.state_dict()))
        web.asked.clear()
        resumed = stream_of(web.url())
        resumed.load_state_dict(state)
        assert rows_of(resumed, 1) == expected[taken : taken + 1]
        assert len(set(web.asked)) <= 3  # that which was stopped in, one that the batch goes on in, and one ahead
        assert rows_of(resumed, 13 - taken) == expected[taken + 1 :]


def test_a_shard_of_another_size_cannot_be_gone_on_with(web: Web) -> None:
    stream = stream_of(web.url(), shuffle=False)
    next(iter(stream))
    state = stream.state_dict()
    shutil.copy(web.folder / "s-004.tar", web.folder / "s-001.tar")
    with pytest.raises(ValueError, match=r"Shard 1 of http.* has 6 samples, but 5 when the state was saved"):
        stream_of(web.url(), shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="has 4 shards, but 5 when the state was saved"):
        stream_of(web.url("s-{001..004}.tar"), shuffle=False).load_state_dict(state)


def test_sources_mix_by_weight_and_not_without(web: Web, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(f'{{"text": "{100 + number}"}}\n' for number in range(7)), encoding="utf-8")
    sources = [open_records(web.url()), open_records(file)]
    with pytest.raises(ValueError, match="is not known before it is read, so it takes a weight"):
        Stream(sources, make_numbers, 4)
    stream = Stream(sources, make_numbers, 4, weights=[3.0, 1.0])
    numbers = [number for numbers in numbers_of(stream, 19) for number in numbers]
    assert sorted(number for number in numbers if number < 100)[: 3 * TOTAL : 3] == list(range(TOTAL))
    assert sum(number >= 100 for number in numbers) == TOTAL


def test_fetched_shards_go_when_they_were_read(web: Web) -> None:
    for workers in (0, 2):
        stream = stream_of(web.file(), 1, num_workers=workers)
        batches, most = iter(stream), 0
        for _ in range(3 * TOTAL):
            next(batches)
            most = max(most, len(spooled(stream)))
        folder = stream.remote[0]._folder
        assert 0 < most <= 4 and folder.exists()
        for thread in threading.enumerate():
            if thread.daemon and "_run" in thread.name:
                thread.join()
        del batches, stream
        gc.collect()
        assert not folder.exists()


def test_kept_shards_are_fetched_once_by_all(web: Web, tmp_path: Path) -> None:
    source = Source(web.url(), keep=str(tmp_path / "kept"))
    expected = rows_of(stream_of(web.file()), 15)
    found: dict[int, Any] = {}

    def read(number: int) -> None:
        found[number] = rows_of(stream_of(source), 15)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected for number in range(3)}
    assert sorted(web.asked) == [f"s-{shard:03d}.tar" for shard in range(5)]
    assert not list((tmp_path / "kept").glob("*.partial")) and len(list((tmp_path / "kept").glob("*.tar"))) == 5


def test_workers_wait_for_no_lock_that_is_held_while_they_are_forked_off(web: Web, tmp_path: Path) -> None:
    def give_up(*values: Any) -> None:
        raise TimeoutError("a worker waits for a lock that nobody gives back to it")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    try:
        kept = Source(web.file(), keep=str(tmp_path / "kept"))
        with tqdm.get_lock():  # as the thread that fetches, or the one that redraws bars, may hold it
            (found,) = rows_of(stream_of(kept, num_workers=1), 1)
        with remote._alone(tmp_path / "x", True):
            child = os.fork()
            if not child:  # has the lock's file open, and keeps it
                time.sleep(60)
                os._exit(0)
        with remote._alone(tmp_path / "x", True):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert len(found) == 4


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_rows_are_skipped_and_named_with_url_and_member(
    web: Web, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(web.folder / "s-001.tar", [("x/0.json", b'{"text": "3"}'), ("x/1.json", b"{")])
    stream = stream_of(web.url("s-{000..001}.tar"), 5, broken="skip", num_workers=workers)
    assert sorted(numbers_of(stream, 1)[0]) == [0, 1, 2, 3]
    assert f"skipped broken sample {web.url('s-001.tar/x/1.json:1')} " in caplog.text
    with pytest.raises(ValueError, match=re.escape(web.url("s-001.tar/x/1.json, line 1 is not valid JSON"))):
        numbers_of(stream_of(web.url("s-{000..001}.tar"), num_workers=workers), 3)


def truncate(web: Web) -> None:
    path = web.folder / "s-001.tar"
    path.write_bytes(path.read_bytes()[: 2 * 1024])


def refuse(web: Web) -> None:
    (web.folder / "s-001.tar").unlink()


def die(web: Web) -> None:
    web.dying["s-001.tar"] = 1000


def answer_otherwise(web: Web) -> None:
    (web.folder / "s-001.tar").write_text("<html>Please log in</html>" * 50, encoding="utf-8")


def pack(web: Web) -> None:
    os.system(f"gzip -f {web.folder}/s-001.tar && mv {web.folder}/s-001.tar.gz {web.folder}/s-001.tar")


BREAKING: list[tuple[Callable[[Web], None], str, int]] = [
    (truncate, "s-001.tar is cut off or damaged behind its member a/0.png", 1),
    (refuse, "s-001.tar cannot be fetched (exit code 22: the server refused it)", 1),
    (die, "s-001.tar cannot be fetched (exit code 18: the connection ended early, tried 3 times)", 3),
    (answer_otherwise, "s-001.tar is no plain tar file", 1),
    (pack, "s-001.tar is compressed, and must be a plain tar file; write pipe:curl", 1),
]


@pytest.mark.parametrize(("damage", "message", "times"), BREAKING)
def test_a_shard_that_does_not_arrive_whole_is_an_error_or_one_skip(
    web: Web, damage: Callable[[Web], None], message: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage(web)
    with pytest.raises(RecordError, match=re.escape(web.url("") + message)):
        numbers_of(stream_of(web.url()), 10)
    for rank in range(2):
        with pytest.raises(RecordError, match=re.escape(message)):
            numbers_of(stream_of(web.url(), 4, rank, 2, broken="skip"), 10)
    web.asked.clear()
    for workers in (0, 1):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stream = stream_of(web.url(), 1, broken="skip", num_workers=workers)
            numbers = [number for (number,) in numbers_of(stream, TOTAL - SIZES[1])]
        assert sorted(numbers) == [number for number in range(TOTAL) if not 3 <= number < 8]
        assert len(caplog.records) <= 1 or workers  # a worker may have begun the next round
        numbers_of(stream, 1)
        assert stream.skipped["broken"] >= 1
        assert f"skipped broken sample {web.url('s-001.tar')} (1 so far): {web.url('')}{message}" in caplog.text
    assert web.asked.count("s-001.tar") >= 2 * times
    assert len([problem for problem in check(web.url()) if problem.line == 0 and message[10:40] in str(problem)]) == 1


def test_a_transfer_that_breaks_off_is_begun_again(web: Web) -> None:
    expected = rows_of(stream_of(web.file()), 10)
    web.dying.update({"s-001.tar": 2, "s-004.tar": 1})
    web.asked.clear()
    assert rows_of(stream_of(web.url()), 10) == expected
    assert web.asked.count("s-001.tar") >= 3 and web.asked.count("s-004.tar") >= 2


def test_data_of_which_nothing_arrives_stops_the_run(web: Web) -> None:
    with pytest.raises(ValueError, match="No sample of the data can be used"):
        numbers_of(stream_of(web.url("none-{0..2}.tar"), broken="skip"), 1)
    with pytest.raises(RecordError, match=r"none-\d\.tar cannot be fetched"):
        numbers_of(stream_of(web.url("none-{0..2}.tar")), 1)


def test_no_room_for_a_shard_is_no_broken_sample(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="Not a directory"):
        numbers_of(stream_of(Source(web.url(), keep=str(tmp_path / "file" / "kept")), broken="skip"), 1)


def test_commands_write_shards_too(web: Web) -> None:
    command = f"pipe:cat {web.folder}/s-{{000..004}}.tar"
    assert rows_of(stream_of(command), 12) == rows_of(stream_of(web.file()), 12)
    with pytest.raises(RecordError, match=r"pipe:exit 3 cannot be fetched \(exit code 3, tried 3 times\)"):
        numbers_of(stream_of("pipe:exit 3"), 1)
    with pytest.raises(RecordError, match=r"pipe:head -c 900 .* is no plain tar file, or cut off"):
        numbers_of(stream_of(f"pipe:head -c 900 {web.folder}/s-000.tar"), 1)


def test_what_cannot_be_done_with_urls_says_so(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"webdataset cannot fetch s3://b/x\.tar: it knows .*https.* Write pipe:"):
        open_records("s3://b/x.tar")
    with pytest.raises(ValueError, match="is to be read as jsonl, but of URLs only tar files"):
        open_records(Source(web.url("x.jsonl"), format="jsonl"))
    with pytest.raises(ValueError, match=r"How many samples .* is not known before it is read"):
        len(open_records(web.url()))
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ValueError, match=r'which takes webdataset: pip install "mixformer\[webdataset\]"'):
        open_records(web.url())
    assert len(open_records(web.folder / "s-000.tar")) == SIZES[0]  # local files need nothing


def test_samples_behind_urls_are_checked_and_shown(web: Web) -> None:
    write_shard(web.folder / "s-001.tar", [("0.json", b"["), ("1.json", b'{"text": "x"}')])
    (problem,) = check(web.url())
    assert str(problem).startswith(web.url("s-001.tar/0.json:1: is not valid JSON"))
    texts = list(show([web.url()], number=2, first=3))
    assert texts[0].startswith("sample 3 cannot be used") and texts[1] == f"{web.url('s-001.tar/1.json:1')}\n⟦x⟧"


def test_tasks_learn_from_urls(web: Web) -> None:
    task = TextTask(web.url(), 4)
    assert [len(samples.files().__next__()) for samples in task.samples()] == [3]  # type: ignore[attr-defined]
