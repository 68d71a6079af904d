"""Train the mini's sentencepiece tokenizer: `python -m examples.make_tokenizer OUTPUT.model`.

Every interface word is one piece, and so is every coordinate with its punctuation, `[[012` `,345,` `678` `,901]]`: a
box is answered in four steps and a word in one.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from examples.words import CHARACTERS, COORDINATES, WORDS

QUESTION_WORDS = ("Where", "is", "Read", "Question:", "Answer:", "Short", "answer:", "[INST]", "[/INST]")


def training_text() -> Iterator[str]:
    """Yield the lines the tokenizer is trained on: every piece that it must know, often."""
    for _ in range(20):
        yield from WORDS
        yield from QUESTION_WORDS
        yield from ("[[" + ",".join(COORDINATES[i : i + 4]) + "]]" for i in range(0, len(COORDINATES), 4))
    yield from CHARACTERS


def train_tokenizer() -> bytes:
    """Return a serialised sentencepiece model with LLaMA's special ids (unk 0, bos 1, eos 2).

    Raises:
        ValueError: if a word or a coordinate did not become one piece.
    """
    pieces = [f"▁{word}" for word in (*QUESTION_WORDS, *WORDS)]
    pieces += [shape.format(text) for shape in ("▁[[{}", ",{},", "{}", ",{}]]") for text in COORDINATES]
    characters = "▁" + CHARACTERS + "0123456789,[].:;?!'\"()/-"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(), model_writer=model, model_type="bpe", character_coverage=1.0,
        vocab_size=1148, required_chars=characters,
        user_defined_symbols=pieces, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in (*WORDS, *QUESTION_WORDS):
        if len(tokenizer.encode(text)) != 1:
            raise ValueError(f"{text!r} is not one piece but {tokenizer.encode(text, out_type=str)}")
    if len(tokenizer.encode("[[" + ",".join(COORDINATES[:4]) + "]]")) != 4:
        raise ValueError("a box is not four pieces: the coordinates did not become pieces")
    return model.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(train_tokenizer())
