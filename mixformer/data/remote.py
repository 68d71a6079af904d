"""Tar files behind URLs, fetched through webdataset (``pip install "mixformer[webdataset]"``).

A shard, which is one tar file, is fetched whole into a folder, and the next one while it is read. Then it is read as a
local file is. So the records are the same, and whether a shard is whole is known before a sample of it is used.

Shards are the unit of shuffling: their order is new in every round, and so is that of the samples in each, but samples
of different shards do not mix. Every process fetches every shard, because batches do not depend on how many processes
and workers there are; with `Source.keep` those of one machine fetch each shard once.

The cursor of a stream is the round, the shard and the place in it. A resumed run fetches the shard that it stopped in
and goes on behind the last sample; a shard that has another number of samples by then is an error.

A shard that cannot be fetched, or is not whole, is an error. With `broken: skip` it is left out as a whole, counted as
one sample and named; several processes would then no longer agree on the order, so among them it is always an error.

Shards lie in a folder of the system's temporary one (``TMPDIR``), three or so at a time. It goes with its process,
unless that is killed.

What is fetched how is webdataset's matter (`webdataset.gopen`): ``http:`` and ``https:`` take the program curl, and
``pipe:`` runs a command of the shell.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, overload
from urllib.parse import urlparse

from mixformer.data.readers import Records, Source, TarRecords, byte_bar, is_packed
from mixformer.data.records import Record, RecordError

TRIES = 3
"""How often a transfer that breaks off is begun."""

PAUSE = 2.0
"""Seconds before it is begun again; twice as many before the third time."""

fcntl: Any
try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

_SHARD = 1 << 32  # numbers of samples: shard * _SHARD + place in it
_CHUNK = 1 << 20
_NUM_OPEN = 4
_EXITS = {
    6: "there is no such host", 7: "nothing answers there", 18: "the connection ended early",
    22: "the server refused it", 28: "it took too long", 35: "no secure connection", 52: "the answer was empty",
    56: "the connection broke",
}  # fmt: skip
_FINAL = (22, 127)  # exit codes that another try does not change: refused, no such command


class RemoteRecords(Records):
    """Samples of tar files behind URLs.

    Args:
        source: its file is a URL or a command, or several.

    Attributes:
        urls: of the shards.
        strict: a shard that cannot be read is an error; without, it is one sample that cannot be read.

    Raises:
        ValueError: webdataset is not installed, does not know how to fetch this, or it is no tar file by its format.
    """

    def __init__(self, source: Source) -> None:
        if source.format not in (None, "tar"):
            raise ValueError(f"{source.file} is to be read as {source.format}, but of URLs only tar files are read.")
        self.source, self.name, self.strict = source, source.file, False
        self.urls: list[str] = _module("shardlists", source.file).expand_urls(source.file)
        known = {"file", *_module("gopen", source.file).gopen_schemes} - {"__default__"}
        for url in self.urls:
            if urlparse(url).scheme not in known:
                raise ValueError(
                    f"webdataset cannot fetch {url}: it knows {', '.join(sorted(known))}. Write pipe: and a command "
                    f"that writes the file to its standard output."
                )
        self._sizes: dict[int, int] = {}
        self._open: dict[int, Records] = {}
        self._pending: dict[int, _Fetching] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="mixformer-shards-"))  # goes with the process that made it
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": {}, "_open": {}}

    # ---------------------------------------------------------------- as a sequence

    def __len__(self) -> int:
        raise ValueError(
            f"How many samples {self.name} has is not known before it is read, and must be known here: fetch the files."
        )

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return super().__getitem__(index)
        shard, place = divmod(index, _SHARD)
        return self.shard(shard)[place]

    def files(self) -> Iterator[Records]:
        for number in range(self.num_shards):
            yield self.shard(number)
            self.release({number + 1})

    # ---------------------------------------------------------------- as shards

    @property
    def num_shards(self) -> int:
        """How many tar files."""
        return len(self.urls)

    @property
    def known_size(self) -> int | None:
        """How many samples, once all shards were seen; None before."""
        return sum(self._sizes.values()) if len(self._sizes) == self.num_shards else None

    def size(self, shard: int) -> int:
        """How many samples a shard has; it is fetched to know."""
        return len(self.shard(shard))

    def number(self, shard: int, index: int) -> int:
        """The number of a sample, for `self[number]`."""
        return shard * _SHARD + index

    def beside(self, number: int) -> list[int]:
        """The numbers of the samples of the same shard."""
        shard = number // _SHARD
        return [self.number(shard, index) for index in range(self.size(shard))]

    def shard(self, shard: int) -> Records:
        """The samples of a shard; it is fetched if it is not there.

        Raises:
            RecordError: it cannot be read, and `strict` is set.
            OSError: there is no room for it.
        """
        if shard not in self._open:
            fetching = self._pending.pop(shard, None)
            try:
                records = self._fetched(shard) if fetching is None else fetching.result()
            except RecordError as error:
                if self.strict:
                    raise
                records = _Broken(error)
                if not self._failure(shard).exists():  # workers ask for it
                    self._failure(shard).write_text(error.reason, encoding="utf-8")
            self._open[shard], self._sizes[shard] = records, len(records)
            while len(self._open) > _NUM_OPEN:
                del self._open[next(iter(self._open))]
        return self._open[shard]

    def ahead(self, shard: int) -> None:
        """Begin to fetch a shard that is needed soon."""
        if shard not in self._open and shard not in self._pending:
            self._pending[shard] = _Fetching(self, shard)

    def release(self, shards: set[int]) -> None:
        """Remove what was fetched of other shards than these, apart from what is kept."""
        for shard in [shard for shard in self._open if shard not in shards]:
            del self._open[shard]
        for path in self._folder.glob("*.*"):
            if path.suffix in (".tar", ".failed") and int(path.stem) not in shards | self._pending.keys():
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- fetching

    def _failure(self, shard: int) -> Path:
        return self._folder / f"{shard}.failed"

    def _fetched(self, shard: int) -> Records:
        """The samples of a shard; its file is there afterwards."""
        url = self.urls[shard]
        if self._failure(shard).exists():
            raise RecordError(url, 0, self._failure(shard).read_text(encoding="utf-8"))
        if self.source.keep is None:
            path = self._folder / f"{shard}.tar"
        else:
            path = Path(self.source.keep) / f"{sha256(url.encode()).hexdigest()[:16]}-{_file_name(url)}"
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with _alone(path, self.source.keep is not None):
                if not path.exists():  # still, once it is this one's turn
                    self._fetch(url, path)
        return self._read(path, url)

    def _fetch(self, url: str, path: Path) -> None:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            _copy(url, partial)
            self._read(partial, url)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, path: Path, url: str) -> Records:
        if is_packed(path):
            command = f"; write pipe:curl -sfL {url} | gunzip" if url.startswith("http") else ""
            raise RecordError(url, 0, f" is compressed, and must be a plain tar file{command}.")
        try:
            records = TarRecords(path, self.source, url)
        except ValueError as error:
            raise RecordError(url, 0, str(error).removeprefix(url)) from error
        if not len(records):
            raise RecordError(url, 0, " is empty.")
        return records


class _Broken(Records):
    """A shard that cannot be read, as one sample that cannot."""

    def __init__(self, error: RecordError) -> None:
        self.name, self.error = error.file, error

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Record:
        raise self.error


class _Fetching:
    """A shard that is fetched beside other work."""

    def __init__(self, records: RemoteRecords, shard: int) -> None:
        self.found: Records | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=(records, shard), daemon=True)
        self.thread.start()

    def _run(self, records: RemoteRecords, shard: int) -> None:
        try:
            self.found = records._fetched(shard)
        except Exception as error:  # raised where the shard is needed
            self.error = error

    def result(self) -> Records:
        """Wait for it."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found


def _module(name: str, file: str) -> Any:
    try:
        return importlib.import_module(f"webdataset.{name}")
    except ImportError as error:
        raise ValueError(
            f'{file} has to be fetched, which takes webdataset: pip install "mixformer[webdataset]" ({error}).'
        ) from error


def _file_name(url: str) -> str:
    return re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:]


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a worker that was forked off
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(path: Path, shared: bool) -> Iterator[None]:
    """Keep other processes from making the same file at the same time, where the system can."""
    if not shared or fcntl is None:
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a worker that was forked off has it open as well


def _copy(url: str, path: Path) -> None:
    """Fetch a URL into a file.

    Raises:
        RecordError: it cannot be fetched.
        OSError: it cannot be written.
    """
    for attempt in range(1, TRIES + 1):
        try:
            _transfer(url, path)
            return
        except _TransferError as error:
            if attempt == TRIES or error.final:
                times = f", tried {attempt} times" if attempt > 1 else ""
                raise RecordError(url, 0, f" cannot be fetched ({error}{times}).") from error
        time.sleep(PAUSE * attempt)


def _transfer(url: str, path: Path) -> None:
    gopen = _module("gopen", url).gopen
    with byte_bar(_file_name(url)) as bar, path.open("wb") as file:
        stream = _asked(gopen, url, "rb")
        while piece := _asked(stream.read, _CHUNK):
            file.write(piece)
            bar.update(len(piece))
        _asked(stream.close)


def _asked(call: Any, *inputs: Any) -> Any:
    """What webdataset answers; an error of its own or of the program that it runs is one of the transfer."""
    try:
        return call(*inputs)
    except OSError as error:
        found = re.search(r": exit (-?\d+) \(", str(error))
        if found is None:
            raise _TransferError(str(error), isinstance(error, FileNotFoundError)) from error
        code = int(found[1])
        why = f": {_EXITS[code]}" if code in _EXITS and "curl" in str(error) else ""
        raise _TransferError(f"exit code {code}{why}", code in _FINAL) from error


class _TransferError(Exception):
    """A transfer that failed, and whether another try is of no use."""

    def __init__(self, reason: str, final: bool) -> None:
        super().__init__(reason)
        self.final = final
