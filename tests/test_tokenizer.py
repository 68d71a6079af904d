"""Tokenizers: ids and texts against the recorded ones, streaming, clear errors."""

import builtins
import json
import pickle
from pathlib import Path

import pytest

from mixformer.tokenizer import (
    BPETokenizer,
    IncrementalDecoder,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    stream_text,
)

GOLDEN = Path(__file__).parent / "golden" / "prompts"
RECORDED = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(GOLDEN / "tokenizer.model")


@pytest.fixture
def bpe_folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json with the kinds of entries a LLaMA-3 one has."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|begin|>", "<|end|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})
    )
    return tmp_path


def test_sentencepiece_gives_the_recorded_ids_and_texts(tokenizer: SentencePieceTokenizer) -> None:
    assert len(RECORDED["texts"]) == 45
    for entry in RECORDED["texts"]:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]


def test_sentencepiece_special_ids_are_the_recorded_ones(tokenizer: SentencePieceTokenizer) -> None:
    expected = (RECORDED["vocab_size"], RECORDED["bos_id"], RECORDED["eos_id"], RECORDED["unk_id"])
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected
    assert isinstance(tokenizer, Tokenizer)


def test_special_ids_decode_to_no_text(tokenizer: SentencePieceTokenizer) -> None:
    entry = RECORDED["texts"][0]
    assert tokenizer.decode([1, *entry["ids"], 2]) == entry["decoded"]
    assert tokenizer.decode([]) == ""


def test_written_out_control_symbols_stay_text(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("stop </s> here")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "stop </s> here"


@pytest.mark.parametrize("entry", RECORDED["texts"], ids=range(45))
def test_streamed_pieces_join_to_the_text_and_break_no_character(
    tokenizer: SentencePieceTokenizer, entry: dict
) -> None:
    pieces = list(stream_text(tokenizer, entry["ids"]))
    assert "".join(pieces) == entry["decoded"]
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_arrives_whole(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("数🙂")
    decoder = IncrementalDecoder(tokenizer)
    arrived = [decoder.push(i) for i in ids]
    assert len(ids) > 6
    assert [piece for piece in arrived if piece] == ["数", "🙂"]
    assert decoder.finish() == ""


def test_an_unfinished_character_comes_at_the_end_and_a_decoder_can_be_used_again(
    tokenizer: SentencePieceTokenizer,
) -> None:
    ids = tokenizer.encode("x数")
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids[:-1]) == "x"
    assert decoder.finish().startswith("\ufffd")
    assert "".join(decoder.push(i) for i in tokenizer.encode("y")) == "y"


def test_saved_and_pickled_tokenizers_encode_alike(
    tokenizer: SentencePieceTokenizer, bpe_folder: Path, tmp_path: Path
) -> None:
    text = "Question: 数 🙂 7 Answer:"
    for original in (tokenizer, load_tokenizer(bpe_folder)):
        folder = tmp_path / type(original).__name__
        original.save(folder)
        for copy in (load_tokenizer(folder), pickle.loads(pickle.dumps(original))):
            assert copy.encode(text) == original.encode(text)
            assert copy.decode(copy.encode(text)) == text
            assert (copy.bos_id, copy.eos_id, copy.pad_id) == (original.bos_id, original.eos_id, original.pad_id)


def test_bpe_reads_its_roles_from_the_files_beside_it(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    assert isinstance(tokenizer, BPETokenizer) and isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 257)
    assert tokenizer.vocab_size == 258
    ids = tokenizer.encode("ä🙂")
    assert len(ids) == len("ä🙂".encode())
    assert list(stream_text(tokenizer, ids)) == ["ä", "🙂"]
    assert tokenizer.decode([256, *ids, 257]) == "ä🙂"


def test_bpe_falls_back_to_the_ids_of_the_model_configuration(bpe_folder: Path) -> None:
    (bpe_folder / "tokenizer_config.json").unlink()
    (bpe_folder / "config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257, 12]}))
    tokenizer = load_tokenizer(bpe_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)


def test_bpe_without_a_known_end_is_refused(bpe_folder: Path) -> None:
    (bpe_folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(bpe_folder)
    assert BPETokenizer(bpe_folder / "tokenizer.json", eos_token="<|end|>").bos_id is None
    with pytest.raises(ValueError, match="no token '<none>'"):
        BPETokenizer(bpe_folder / "tokenizer.json", eos_token="<none>")


def test_a_missing_package_names_the_extra(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_tokenizers(name: str, *args: object, **kwargs: object) -> object:
        if name == "tokenizers":
            raise ImportError(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match=r'pip install "mixformer\[bpe\]"'):
        BPETokenizer(bpe_folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer at all"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path / name)


def test_paths_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer file at"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="expected a folder"):
        load_tokenizer(tmp_path / "tokenizer.txt")


@pytest.mark.parametrize("wrong", [-100, 400])
def test_ids_outside_the_vocabulary_are_named(tokenizer: SentencePieceTokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"id {wrong} is outside"):
        tokenizer.decode([310, wrong])
