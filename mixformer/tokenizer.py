"""Tokenizers: text to ids and back, and decoding while tokens still arrive.

Two kinds are read: sentencepiece models (``tokenizer.model``: LLaMA, Vicuna, CogVLM, CogAgent), and what the
package ``tokenizers`` runs (optional extra ``[bpe]``): its own files (``tokenizer.json``: CogVLM2 and other LLaMA-3
models), the byte pairs of GPT-2, Qwen2 and CLIP (``vocab.json`` and ``merges.txt``) and the word pieces of BERT
(``vocab.txt``). Anything else that has the attributes of `Tokenizer` serves as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import sentencepiece

if TYPE_CHECKING:
    import tokenizers

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"
BYTE_PAIR_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
WORD_PIECE_FILE = "vocab.txt"
_MASK_TOKENS = ("<mask>", "[MASK]")
_BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
_GPT2_TOKENS = {"eos": "<|endoftext|>"}
_CLIP_TOKENS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
# How Qwen2 parts text before it joins bytes (arXiv:2309.16609, section 2.2; the expression is in its released files).
_QWEN2_PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How CLIP parts text (its released tokenizer); what lies between the parts is left out.
_CLIP_PARTS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
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
    Control symbols written out in the text (``</s>``) stay ordinary characters. Tokens that a folder adds to the
    model (``<image>`` in LLaVA, ``<|im_start|>`` in InternLM2) become one id where they are written out, and the text
    on each side of them is encoded by itself.

    Args:
        path: the ``tokenizer.model`` file.
        added: ids of tokens that the model does not have; None to read them from ``added_tokens.json`` and
            ``tokenizer_config.json`` beside it.

    Raises:
        ValueError: the file is missing or is no sentencepiece model.
    """

    def __init__(self, path: str | Path, added: Mapping[str, int] | None = None) -> None:
        path = Path(path)
        data = _read(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except Exception as error:
            raise ValueError(
                f"{path} is not a sentencepiece model ({len(data)} bytes): copy the file again, or give a "
                f"{BPE_FILE} if this model comes with one (LLaMA-3 and CogVLM2 do)"
            ) from error
        if added is None:
            added = {text: number for number, (text, _) in _added_tokens(path.parent).items()}
        size = int(self._model.vocab_size())
        own = {text for text, i in added.items() if i < size and self._model.id_to_piece(i) == text}
        self._added = {text: int(i) for text, i in added.items() if text not in own}
        self._pad = self._added.get(str(_token_text(_read_json(path.parent / "tokenizer_config.json"), "pad_token")))

    @property
    def vocab_size(self) -> int:
        return max(int(self._model.vocab_size()), *(i + 1 for i in self._added.values()), 0)

    @property
    def bos_id(self) -> int | None:
        bos = int(self._model.bos_id())
        return bos if bos >= 0 else None

    @property
    def eos_id(self) -> int:
        return int(self._model.eos_id())

    @property
    def pad_id(self) -> int:
        """The added pad token, else the model's pad id; its unknown id where it has none, as LLaMA does."""
        if self._pad is not None:
            return self._pad
        pad = int(self._model.pad_id())
        return pad if pad >= 0 else int(self._model.unk_id())

    @property
    def mask_id(self) -> int | None:
        """Id of ``<mask>`` or ``[MASK]``, or None."""
        for text in _MASK_TOKENS:
            found = self._added.get(text, int(self._model.piece_to_id(text)))
            if found != self._model.unk_id():
                return found
        return None

    def encode(self, text: str) -> list[int]:
        if not self._added:
            return list(self._model.encode(text))
        longest_first = sorted(self._added, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        silent = set(self._added.values())
        checked = [i for i in _check_ids(ids, self.vocab_size) if i not in silent]
        return str(self._model.decode(checked)) if checked else ""

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / SENTENCEPIECE_FILE).write_bytes(self._model.serialized_model_proto())
        if self._added:
            _write_json(target / "added_tokens.json", self._added)
        if self._pad is not None:
            pad = next(text for text, i in self._added.items() if i == self._pad)
            _write_json(target / "tokenizer_config.json", {"pad_token": pad})


class BPETokenizer:
    """A tokenizer of the package `tokenizers`: GPT-2's, BERT's, CLIP's, Qwen2's, LLaMA-3's.

    Such files do not say which token opens a sequence or ends it. What is not given here is looked up in the
    files beside it: ``tokenizer_config.json``, ``special_tokens_map.json``, then the ids of ``config.json``. BERT's
    ``[CLS]`` opens a sequence and its ``[SEP]`` ends one. A token that opens and ends alike, as GPT-2's, opens none
    unless the configuration says ``add_bos_token``.

    Args:
        path: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt`` beside it, or ``vocab.txt``.
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
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'{path} needs the package tokenizers, which is not installed: pip install "mixformer[bpe]"'
            ) from error
        path = Path(path)
        readers = {BYTE_PAIR_FILE: _read_byte_pairs, WORD_PIECE_FILE: _read_word_pieces}
        settings = _read_json(path.parent / "tokenizer_config.json")
        self._model, defaults = readers.get(path.name, _read_fast)(path, settings)
        self._ids: dict[str, int | None] = {}
        for role, token in (("bos", bos_token), ("eos", eos_token), ("pad", pad_token), ("mask", None)):
            self._ids[role] = self._find(path, role, token, defaults.get(role))
        asked = settings.get("add_bos_token")
        alike = self._ids["bos"] == self._ids["eos"]
        none = "cls_token" not in settings and settings.get("bos_token", "") is None
        if bos_token is None and (none or asked is False or (alike and not asked)):
            self._ids["bos"] = None
        if self._ids["eos"] is None:
            raise ValueError(
                f"{path} does not say which token ends an answer, nor do the files beside it: "
                f"give eos_token=..., or put tokenizer_config.json beside it"
            )

    def _find(self, path: Path, role: str, token: str | None, default: str | None) -> int | None:
        keys = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token")}.get(role, (f"{role}_token",))
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            content = _read_json(path.parent / name)
            for key in keys:
                token = _token_text(content, key) if token is None else token
        if token is not None:
            found = self._model.token_to_id(token)
            if found is None:
                raise ValueError(f"{path} has no token {token!r}, which is named as its {role} token")
            return int(found)
        number = _read_json(path.parent / "config.json").get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < self.vocab_size:
            return number
        return None if default is None else self._model.token_to_id(default)

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

    @property
    def mask_id(self) -> int | None:
        """Id of the token that masks others (BERT), or None."""
        return self._ids["mask"]

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        text = str(self._model.decode(_check_ids(ids, self.vocab_size), skip_special_tokens=True))
        end = getattr(self._model.model, "end_of_word_suffix", None)
        return text.replace(end, " ").strip() if end else text

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / BPE_FILE).write_text(self._model.to_str(), encoding="utf-8")
        roles = {f"{role}_token": self._model.id_to_token(i) for role, i in self._ids.items() if i is not None}
        bos = {"bos_token": None} if self.bos_id is None else {"add_bos_token": True}
        _write_json(target / "tokenizer_config.json", {**roles, **bos})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a ``tokenizer.model``, ``tokenizer.json``, ``vocab.json`` or ``vocab.txt`` file, or a folder that holds
            one (the first of these is preferred).

    Raises:
        ValueError: nothing there, or a file that is no tokenizer.
        ImportError: any but the first without the package `tokenizers`.
    """
    path = Path(path)
    if path.is_dir():
        for name in (SENTENCEPIECE_FILE, BPE_FILE, BYTE_PAIR_FILE, WORD_PIECE_FILE):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise ValueError(
            f"{path} holds no tokenizer ({SENTENCEPIECE_FILE}, {BPE_FILE}, {BYTE_PAIR_FILE} or {WORD_PIECE_FILE}): "
            f"copy the one the model was trained with into it, or name it (CogVLM and CogAgent use that of "
            f"lmsys/vicuna-7b-v1.5)"
        )
    kinds: dict[str, Any] = {".model": SentencePieceTokenizer, ".json": BPETokenizer}
    kind = BPETokenizer if path.name == WORD_PIECE_FILE else kinds.get(path.suffix)
    if kind is None:
        raise ValueError(
            f"{path} is no tokenizer: expected a folder, {SENTENCEPIECE_FILE}, {BPE_FILE}, {BYTE_PAIR_FILE} or "
            f"{WORD_PIECE_FILE}"
        )
    tokenizer: Tokenizer = kind(path)
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


def _read_fast(path: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A file of the package, and the tokens that play the usual roles where nothing names others."""
    from tokenizers import Tokenizer, models

    data = _read(path)
    try:
        model = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:
        raise ValueError(f"{path} is not a file of the tokenizers package ({error}): copy the file again") from error
    return model, _BERT_TOKENS if isinstance(model.model, models.WordPiece) else {}


def _read_byte_pairs(path: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Vocabulary and merges of CLIP, which marks the ends of words; of Qwen2 where the files name it; else of GPT-2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    clip = _WORD_END.encode() in _read(path)
    unknown = {"unk_token": _CLIP_TOKENS["eos"], "end_of_word_suffix": _WORD_END} if clip else {}
    merges = path.with_name(MERGES_FILE)
    if not merges.is_file():
        raise ValueError(f"{path} needs {MERGES_FILE} beside it: copy that file too, or {BPE_FILE} instead of both")
    try:
        model = Tokenizer(models.BPE.from_file(str(path), str(merges), **unknown))
    except Exception as error:
        raise ValueError(f"{path} and {MERGES_FILE} are no byte pairs ({error}): copy both files again") from error
    if clip:
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        parts = pre_tokenizers.Split(Regex(_CLIP_PARTS), behavior="removed", invert=True)
        joined = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.normalizer, model.pre_tokenizer = normalizers.Sequence(steps), pre_tokenizers.Sequence([parts, joined])
        model.decoder = decoders.ByteLevel()
        _add_tokens(model, path, settings, _CLIP_TOKENS)
        return model, _CLIP_TOKENS
    space = bool(settings.get("add_prefix_space", False))
    kinds = (settings.get("tokenizer_class"), _read_json(path.parent / "config.json").get("model_type"))
    if any(str(kind).lower().startswith("qwen2") for kind in kinds):
        parts = pre_tokenizers.Split(Regex(_QWEN2_PARTS), behavior="isolated")
        joined = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        model.normalizer, model.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([parts, joined])
    else:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    model.decoder = decoders.ByteLevel()
    _add_tokens(model, path, settings, _GPT2_TOKENS)
    return model, _GPT2_TOKENS


def _read_word_pieces(path: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The vocabulary of BERT: one piece a line, a piece inside a word marked by ``##``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        lines = _read(path).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}): copy the file again") from error
    vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    unknown = _token_text(settings, "unk_token") or _BERT_TOKENS["unk"]
    if unknown not in vocabulary:
        raise ValueError(f"{path} is no vocabulary of word pieces: it has no token {unknown!r}. Copy the file again")
    model = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    model.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    model.pre_tokenizer, model.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    _add_tokens(model, path, settings, _BERT_TOKENS)
    return model, _BERT_TOKENS


def _add_tokens(
    model: tokenizers.Tokenizer, path: Path, settings: dict[str, Any], defaults: Mapping[str, str]
) -> None:
    """Make tokens that the files beside a vocabulary add or name special: they are never cut, and give no text."""
    from tokenizers import AddedToken

    options = ("lstrip", "rstrip", "normalized", "single_word", "special")
    for number, (text, entry) in sorted(_added_tokens(path.parent).items()):
        chosen = {"normalized": False, "special": True, **{name: entry[name] for name in options if name in entry}}
        token = AddedToken(text, **chosen)
        (model.add_special_tokens if chosen["special"] else model.add_tokens)([token])
        if model.token_to_id(text) != number:
            raise ValueError(
                f"{path} and the files beside it do not fit: {text!r} is to be token {number}, but the vocabulary "
                f"makes it {model.token_to_id(text)}. Copy all files of the tokenizer again"
            )
    named = {key.removesuffix("_token"): _token_text(settings, key) for key in settings if key.endswith("_token")}
    texts = {**defaults, **{role: text for role, text in named.items() if text is not None}}.values()
    model.add_special_tokens([text for text in texts if model.token_to_id(text) is not None])


def _added_tokens(folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Tokens that a folder adds to its vocabulary: {id: (text, options)}."""
    plain = _read_json(folder / "added_tokens.json")
    found: dict[int, tuple[str, dict[str, Any]]] = {int(i): (text, {}) for text, i in plain.items()}
    listed = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for i, entry in (listed if isinstance(listed, dict) else {}).items():
        found[int(i)] = (entry["content"], entry)
    return found


def _token_text(content: Mapping[str, Any], key: str) -> str | None:
    entry = content.get(key)
    return entry.get("content") if isinstance(entry, dict) else entry if isinstance(entry, str) else None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
