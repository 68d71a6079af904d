"""Tokenizers: text to ids and back, and decoding while tokens still arrive.

Two kinds are read: sentencepiece models (``tokenizer.model``: LLaMA, Vicuna, CogVLM, CogAgent) and the files
of the ``tokenizers`` package (``tokenizer.json``: CogVLM2 and other LLaMA-3 models; optional extra
``[bpe]``). Anything else that has the attributes of `Tokenizer` serves as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import sentencepiece

if TYPE_CHECKING:
    import tokenizers

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"
_REPLACEMENT_CHARACTER = "\ufffd"  # what decoders put in the place of an unfinished UTF-8 sequence


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
        vocab_size: number of ids.
        bos_id: id that opens a sequence, or None where the model has none.
        eos_id: id that ends an answer.
        pad_id: id that fills a batch.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without bos and eos."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; bos, eos and pad give no text."""

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer(folder)` makes the same tokenizer."""


class SentencePieceTokenizer:
    """A sentencepiece model, as LLaMA, Vicuna, CogVLM and CogAgent use it.

    Text is encoded in one piece: the model's own dummy prefix space applies, nothing is added or stripped.
    Control symbols written out in the text (``</s>``) stay ordinary characters.

    Args:
        path: the ``tokenizer.model`` file.

    Raises:
        ValueError: the file is missing or is no sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        data = _read(Path(path))
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except Exception as error:
            raise ValueError(
                f"{path} is not a sentencepiece model ({len(data)} bytes): copy the file again, or give a "
                f"{BPE_FILE} if this model comes with one (LLaMA-3 and CogVLM2 do)"
            ) from error

    @property
    def vocab_size(self) -> int:
        return int(self._model.vocab_size())

    @property
    def bos_id(self) -> int | None:
        bos = int(self._model.bos_id())
        return bos if bos >= 0 else None

    @property
    def eos_id(self) -> int:
        return int(self._model.eos_id())

    @property
    def pad_id(self) -> int:
        """The model's pad id; its unknown id where it has none, as LLaMA does."""
        pad = int(self._model.pad_id())
        return pad if pad >= 0 else int(self._model.unk_id())

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        checked = _check_ids(ids, self.vocab_size)
        return str(self._model.decode(checked)) if checked else ""

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / SENTENCEPIECE_FILE).write_bytes(self._model.serialized_model_proto())


class BPETokenizer:
    """A ``tokenizer.json`` of the `tokenizers` package, as CogVLM2 uses it.

    That file does not say which token opens a sequence or ends it. What is not given here is looked up in the
    files beside it: ``tokenizer_config.json``, ``special_tokens_map.json``, then the ids of ``config.json``.

    Args:
        path: the ``tokenizer.json`` file.
        bos_token: token that opens a sequence; a model may have none.
        eos_token: token that ends an answer.
        pad_token: token that fills a batch; without one, eos does.

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: the file is missing or malformed, or no eos token is known.
    """

    def __init__(
        self,
        path: str | Path,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise ImportError(
                f'{path} needs the package tokenizers, which is not installed: pip install "mixformer[bpe]"'
            ) from error
        path = Path(path)
        data = _read(path)
        try:
            self._model: tokenizers.Tokenizer = FastTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:
            raise ValueError(
                f"{path} is not a file of the tokenizers package ({error}): copy the file again"
            ) from error
        self._ids: dict[str, int | None] = {}
        for role, token in (("bos", bos_token), ("eos", eos_token), ("pad", pad_token)):
            self._ids[role] = self._find(path, role, token)
        if self._ids["eos"] is None:
            raise ValueError(
                f"{path} does not say which token ends an answer, nor do the files beside it: "
                f"give eos_token=..., or put tokenizer_config.json beside it"
            )

    def _find(self, path: Path, role: str, token: str | None) -> int | None:
        if token is None:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                entry = _read_json(path.parent / name).get(f"{role}_token")
                token = entry.get("content") if isinstance(entry, dict) else entry
                if token is not None:
                    break
        if token is not None:
            found = self._model.token_to_id(token)
            if found is None:
                raise ValueError(f"{path} has no token {token!r}, which is named as its {role} token")
            return int(found)
        number = _read_json(path.parent / "config.json").get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if isinstance(number, int) and 0 <= number < self.vocab_size else None

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        return self._ids["bos"]

    @property
    def eos_id(self) -> int:
        eos = self._ids["eos"]
        assert eos is not None
        return eos

    @property
    def pad_id(self) -> int:
        pad = self._ids["pad"]
        return self.eos_id if pad is None else pad

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(_check_ids(ids, self.vocab_size), skip_special_tokens=True))

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / BPE_FILE).write_text(self._model.to_str(), encoding="utf-8")
        roles = {f"{role}_token": self._model.id_to_token(i) for role, i in self._ids.items() if i is not None}
        (target / "tokenizer_config.json").write_text(json.dumps(roles, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a ``tokenizer.model`` or ``tokenizer.json`` file, or a folder that holds one (the first is
            preferred).

    Raises:
        ValueError: nothing there, or a file that is no tokenizer.
        ImportError: a ``tokenizer.json`` without the package `tokenizers`.
    """
    path = Path(path)
    if path.is_dir():
        for name in (SENTENCEPIECE_FILE, BPE_FILE):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise ValueError(
            f"{path} holds no tokenizer ({SENTENCEPIECE_FILE} or {BPE_FILE}): copy the one the model was "
            f"trained with into it, or name it (CogVLM and CogAgent use that of lmsys/vicuna-7b-v1.5)"
        )
    kinds: dict[str, Any] = {".model": SentencePieceTokenizer, ".json": BPETokenizer}
    if path.suffix not in kinds:
        raise ValueError(f"{path} is no tokenizer: expected a folder, {SENTENCEPIECE_FILE} or {BPE_FILE}")
    tokenizer: Tokenizer = kinds[path.suffix](path)
    return tokenizer


class IncrementalDecoder:
    """Text of tokens that arrive one at a time.

    A character may be spread over several tokens, and what a token reads as depends on the one before it. So
    each token is decoded beside the last ones already given out, and nothing is given out while a character
    is incomplete. All pieces together are exactly the text of all ids.

    Args:
        tokenizer: what decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # so many of _ids have been given out; they stay as context for the next ones

    def push(self, token: int) -> str:
        """Add one id; return the text that it completes, which may be empty."""
        self._ids.append(int(token))
        text = self._text_after_context()
        if not text or text.endswith(_REPLACEMENT_CHARACTER):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text

    def finish(self) -> str:
        """Return what is left, incomplete characters as U+FFFD; afterwards the decoder is as new."""
        text = self._text_after_context()
        self._ids, self._given = [], 0
        return text

    def _text_after_context(self) -> str:
        context = self.tokenizer.decode(self._ids[: self._given])
        return self.tokenizer.decode(self._ids)[len(context) :]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` piece by piece, each piece made of whole characters."""
    decoder = IncrementalDecoder(tokenizer)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.finish():
        yield rest


def _check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"id {i} is outside the tokenizer's vocabulary of {vocab_size}: decode generated ids only, "
                f"without image placeholders and without -100 labels"
            )
    return checked


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no tokenizer file at {path}: name an existing file, or the folder that holds it")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from error
    return content if isinstance(content, dict) else {}
