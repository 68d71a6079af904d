"""Tokenizers: ids and texts against the recorded ones, streaming, clear errors."""

import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

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


# ---------------------------------------------------------------- folders of other libraries


TEXTS = (
    "The small red circle's left of it.",
    "  two  spaces, a\ttab and a line\nanother\r\n\n  third line  ",
    "Ünïcode: naïve façade, 数字 and 漢字, 🙂👍🏽, café vs cafe\u0301, ½ №5 12345",
    "don't WE'LL they've; x=3.14e-5 [[012,345]] a_b#c ## @",
    "",
    " ",
)
CORPUS = [
    "the small red circle is left of the large blue square and the green triangle is above it",
    "don't we'll they've what is this? a line, another line; naïve façade 数字 12 345",
    "The Small Red Circle Is Left Of The Large Blue Square",
]


def byte_pairs(folder: Path) -> None:
    """vocab.json and merges.txt, learnt from the corpus, with <|endoftext|> at the end."""
    from tokenizers import ByteLevelBPETokenizer

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(CORPUS * 4, vocab_size=360, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(folder))


def word_pieces(folder: Path) -> None:
    """vocab.txt, learnt from the corpus."""
    from tokenizers import BertWordPieceTokenizer

    model = BertWordPieceTokenizer()
    model.train_from_iterator(CORPUS * 4, vocab_size=160, show_progress=False)
    model.save_model(str(folder))


def gpt2(folder: Path) -> Any:
    from transformers import GPT2TokenizerFast

    byte_pairs(folder)
    return GPT2TokenizerFast.from_pretrained(folder)


def qwen2(folder: Path) -> Any:
    from transformers import Qwen2TokenizerFast

    byte_pairs(folder)
    tokens = {
        str(360 + place): {"content": text, "special": True, "normalized": False}
        for place, text in enumerate(("<|im_start|>", "<|im_end|>"))
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "added_tokens_decoder": tokens,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Qwen2TokenizerFast.from_pretrained(folder)


def bert(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    word_pieces(folder)
    return BertTokenizerFast.from_pretrained(folder)


def cased_bert(folder: Path) -> Any:
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return bert(folder)


def clip(folder: Path) -> Any:
    """Byte pairs that mark the ends of words; the texts are lower case."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizerFast

    model = FastTokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    model.train_from_iterator([word for text in CORPUS * 4 for word in text.lower().split()], trainer)
    model.model.save(str(folder))
    return CLIPTokenizerFast.from_pretrained(folder)


def llama3(folder: Path) -> Any:
    """A tokenizer.json as LLaMA-3's: byte pairs, an expression of its own, a post-processor that adds bos."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    byte_pairs(folder)
    model = FastTokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    parts = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(parts), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    ])  # fmt: skip
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "eot_id")])
    bos = model.token_to_id("<|begin_of_text|>")
    model.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", bos)])
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    model.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return PreTrainedTokenizerFast.from_pretrained(folder)


SPECIAL = {
    "gpt2": ["<|endoftext|>"], "qwen2": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "bert": ["[MASK]", "[SEP]"],
    "cased_bert": ["[MASK]", "[SEP]"], "clip": ["<|startoftext|>", "<|endoftext|>"],
    "llama3": ["<|eot_id|>", "<|begin_of_text|>"],
}  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, qwen2, bert, cased_bert, clip, llama3])
def test_folders_encode_as_their_own_library_does_and_come_back_alike(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    reference = make(folder)
    ours = load_tokenizer(folder)
    ours.save(tmp_path / "saved")
    specials = SPECIAL[make.__name__]
    texts = [*TEXTS, f"a{specials[0]}The red {specials[-1]}\n circle"]
    for tokenizer in (ours, load_tokenizer(tmp_path / "saved")):
        assert isinstance(tokenizer, BPETokenizer)
        assert tokenizer.vocab_size == len(reference)
        for text in texts:
            ids = reference.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text) == ids
            expected = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids) == expected
            assert "".join(stream_text(tokenizer, ids)) == expected
        opened = reference.encode("The red circle")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert opened[: len(bos)] == bos
        assert len(bos) == (opened[0] != reference.encode("The red circle", add_special_tokens=False)[0])
        eos = reference.sep_token_id if "bert" in make.__name__ else reference.eos_token_id
        pad = eos if reference.pad_token_id is None else reference.pad_token_id
        assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (eos, pad, reference.mask_token_id)


def test_a_token_that_ends_sequences_opens_them_only_where_the_folder_says_so(tmp_path: Path) -> None:
    byte_pairs(tmp_path)
    end = json.loads((tmp_path / "vocab.json").read_text())["<|endoftext|>"]
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": end, "eos_token_id": end}))
    assert load_tokenizer(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert load_tokenizer(tmp_path).bos_id == load_tokenizer(tmp_path).eos_id == end


def test_incomplete_or_unfitting_folders_are_refused(tmp_path: Path) -> None:
    byte_pairs(tmp_path)
    settings = {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' is to be token 7, but the vocabulary makes it 360"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab\.json needs merges\.txt beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("the\nred\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is no vocabulary of word pieces"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_tokens_that_a_folder_adds_to_a_sentencepiece_model_are_one_id(tmp_path: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(str(GOLDEN / "tokenizer.model"))
    size = model.vocab_size()
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer.model").read_bytes())
    listed = {"2": {"content": "</s>"}, str(size): {"content": "<image>"}, str(size + 1): {"content": "<pad>"}}
    settings = {"added_tokens_decoder": listed, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>s": 259}))  # in the place of one that it has
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "saved")):
        assert (tokenizer.vocab_size, tokenizer.pad_id) == (size + 2, size + 1)
        text = "Where<image> is<image>s it </s>?"
        expected = [*model.encode("Where"), size, *model.encode(" is"), 259, *model.encode(" it </s>?")]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode([size, *model.encode("a cat"), size + 1]) == "a cat"


def test_masks_are_found_in_sentencepiece_models_that_have_one(tokenizer: SentencePieceTokenizer) -> None:
    shapes = SentencePieceTokenizer(Path(__file__).parents[1] / "examples" / "zoo" / "shapes" / "tokenizer.model")
    assert shapes.mask_id is not None and shapes.encode("<mask>")[-1] == shapes.mask_id
    assert tokenizer.mask_id is None
