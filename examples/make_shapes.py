"""Draw the small data set that the zoo's tiny models are trained on: `python -m examples.make_shapes FOLDER`.

48 pictures, most of them 32 x 32 pixels, show two coloured shapes each. `train.jsonl` has one line per picture: its
file, a question and the answer, a caption that no other picture has, and the class of the picture (which shape is
left of or above which). `tokenizer.model` knows every word as one piece, and the special tokens of the zoo's prompts.
"""

import io
import itertools
import json
import random
import string
import sys
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

NUM_PICTURES = 48
SEED = 7
COLOURS = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (245, 200, 30)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 4, "large": 7}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
QUESTIONS = ("What is this?", "Where is the {}?", "What is {} the {}?")
SPECIAL_TOKENS = (
    "<mask>", "<image>", "</image>", "<img>", "</img>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>",
    "<fake_token_around_image>", "<mask:0>", "<mask:1>", "<mask:2>",
)  # fmt: skip
CHARACTERS = "▁" + string.ascii_letters + string.digits + ".,:;?!'\"()[]<>|/_-=\n"


def draw_shape(canvas: np.ndarray, shape: str, colour: str, centre: tuple[int, int], size: int) -> None:
    """Paint a shape whose half width is `size` onto [y, x, 3] pixels."""
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    dx, dy = np.abs(x - centre[0]), y - centre[1]
    inside = {
        "circle": dx**2 + dy**2 <= size**2,
        "square": np.maximum(dx, np.abs(dy)) <= size,
        "triangle": (np.abs(dy) <= size) & (2 * dx <= dy + size),
    }
    canvas[inside[shape]] = COLOURS[colour]


def draw_picture(source: random.Random, objects: list[tuple[str, str, str]], relation: str) -> np.ndarray:
    """[y, x, 3] pixels of two objects (size, colour, shape), the first one `relation` the second."""
    dx, dy = RELATIONS[relation]
    wide = source.random() < 0.15
    width, height = (64 if wide and dx else 32), (64 if wide and dy else 32)
    shade = source.randrange(225, 250)
    canvas = np.full((height, width, 3), shade, np.uint8)
    shift = source.randint(-1, 0)
    for sign, (size, colour, shape) in zip((1, -1), objects, strict=True):
        across = width // 2 + sign * dx * width // 4 + shift
        down = height // 2 + sign * dy * height // 4 + shift
        draw_shape(canvas, shape, colour, (across, down), SIZES[size])
    return canvas


def make_line(source: random.Random, objects: list[tuple[str, str, str]], relation: str) -> dict[str, object]:
    """A line of the data without its picture."""
    first, second = (" ".join(names) for names in objects)
    caption = f"a {first} {relation} a {second}"
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    question, answer = source.choice([
        (QUESTIONS[0], caption),
        (QUESTIONS[1].format(first), f"{relation} the {second}"),
        (QUESTIONS[2].format(opposite, first), f"a {second}"),
    ])  # fmt: skip
    shapes = [SHAPES.index(shape) for _, _, shape in objects]
    ordered = shapes if sum(RELATIONS[relation]) < 0 else shapes[::-1]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "label": ordered[0] * len(SHAPES) + ordered[1], "text": caption}


def train_tokenizer(texts: list[str]) -> bytes:
    """A serialised sentencepiece model with unk 0, bos 1, eos 2, pad 3 and then `SPECIAL_TOKENS`."""
    model = io.BytesIO()
    words = sorted({f"▁{word}" for text in texts for word in text.replace("?", " ").split()})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 4), model_writer=model, model_type="bpe", character_coverage=1.0,
        vocab_size=200, hard_vocab_limit=False, required_chars=CHARACTERS,
        user_defined_symbols=[*SPECIAL_TOKENS, *words], unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_shapes(folder: str | Path) -> None:
    """Write the pictures, `train.jsonl` and `tokenizer.model`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(SEED)
    names = [list(pair) for pair in itertools.permutations(itertools.product(SIZES, COLOURS, SHAPES), 2)]
    lines = []
    for number, objects in enumerate(source.sample(names, NUM_PICTURES), start=1):
        relation, file = source.choice(list(RELATIONS)), f"{number:04d}.png"
        Image.fromarray(draw_picture(source, objects, relation)).save(folder / file, optimize=True)
        lines.append({**make_line(source, objects, relation), "images": [file]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    contents = [message["content"] for line in lines for message in line["messages"]]  # type: ignore[attr-defined]
    (folder / "tokenizer.model").write_bytes(train_tokenizer([*contents, *(str(line["text"]) for line in lines)]))


if __name__ == "__main__":
    write_shapes(sys.argv[1])
