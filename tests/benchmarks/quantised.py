"""What quantising changes: logits, answers, memory and speed, beside the same model in bf16.

    python -m tests.benchmarks.quantised              the mini, on held-out pages, and a random LLaMA of 194 million
    python -m tests.benchmarks.quantised --small      a tiny random model, to see that it runs

Each row is one choice of weights. `logits` is the root mean square difference from those of the bf16 model, relative to
their spread around the mean; `KL` the mean divergence of the next token's probabilities, in nats; `top 1` how often
the likeliest next token is the same; `answers` how many answers are the same, token by token. `fp32` shows what bf16
itself changes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
MINI = ROOT / "examples" / "cogagent-mini"
CHOICES: dict[str, Any] = {
    "fp32": None,
    "bf16": None,
    "int8": "int8",
    "int4/128": "int4/128",
    "int4": "int4",
    "int4/32": "int4/32",
    "int4, towers int8": {"*": "int4", "image.tower": "int8", "cross.tower": "int8"},
    "int4, towers bf16": {"*": "int4", "image.tower": "none", "cross.tower": "none"},
    "language int4": {"language": "int4"},
    "experts int4": {"vision_expert*": "int4"},
}
COLUMNS = ("weights", "MB", "logits", "KL", "top 1", "answers", "ms per token")


def difference(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How far logits [n, v] are from those of a reference."""
    found, wanted = logits.double(), reference.double()
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    rows = wanted.log_softmax(-1), found.log_softmax(-1)
    return {
        "logits": float((found - wanted).square().mean().sqrt() / spread),
        "KL": float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean()),
        "top 1": float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def outputs(
    model: Any, batches: list[dict[str, Any]], answers: list[torch.Tensor] | None, length: int, stops: tuple[int, ...]
) -> Any:
    """Logits of the answers' tokens, the answers themselves, and milliseconds per token after the first.

    Args:
        model: what answers.
        batches: prompts of one row each.
        answers: what the logits follow, those of the reference; None for the model's own.
        length: most tokens of an answer.
        stops: tokens that end one.
    """
    from mixformer import generate

    own, rows, spent, num_timed = [], [], 0.0, 0
    for index, batch in enumerate(batches):
        generate(model, batch, max_new_tokens=1)
        times = []
        for tokens in (1, length):
            start = time.process_time()
            answer = generate(model, batch, max_new_tokens=tokens, stop_tokens=stops)
            times.append(time.process_time() - start)
        spent, num_timed = spent + times[1] - times[0], num_timed + answer.shape[1] - 1
        own.append(answer)
        given = answer if answers is None else answers[index]
        size = batch["input_ids"].shape[1]
        whole = {**batch, "input_ids": torch.cat([batch["input_ids"], given], 1)}
        for name, value in (("token_type_ids", 0), ("attention_mask", 1)):
            if name in batch:
                whole[name] = torch.cat([batch[name], torch.full_like(given, value, dtype=batch[name].dtype)], 1)
        rows.append(model(**whole)[0, size - 1 : -1].float())
    return torch.cat(rows), own, 1e3 * spent / max(1, num_timed)


def compare(
    folder: Path, batches: list[dict[str, Any]], choices: dict[str, Any], length: int = 16, stops: tuple[int, ...] = ()
) -> Iterator[list[str]]:
    """A row of the table for each choice; `bf16` must be among them."""
    from mixformer import from_pretrained

    reference: Any = None
    for name in sorted(choices, key=lambda name: name != "bf16"):
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        model = from_pretrained(folder, dtype=dtype, quantise=choices[name])
        logits, answers, milliseconds = outputs(model, batches, reference and reference[1], length, stops)
        if reference is None:
            reference = logits, answers
        found = difference(logits, reference[0])
        same = sum(torch.equal(a, b) for a, b in zip(answers, reference[1], strict=True))
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        yield [
            name, f"{size / 1e6:.2f}", f"{found['logits']:.4f}", f"{found['KL']:.1e}", f"{found['top 1']:.3f}",
            f"{same} of {len(answers)}", f"{milliseconds:.1f}",
        ]


def questions(number: int) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Questions about the mini's held-out pages, one about each, and the tokens that end answers."""
    from examples.browser_pages import read_sheets
    from examples.screens import read_question, where_question
    from mixformer import load_processor

    processor, found = load_processor(MINI), []
    for index, screen in enumerate(read_sheets(MINI / "heldout", "page")[:number]):
        ask = (where_question, read_question)[index % 2]
        found.append(dict(processor(ask(screen.widgets[index % len(screen.widgets)]).text, screen.picture)))
    return found, tuple(processor.config.stop_ids)


def random_model(folder: Path, small: bool) -> list[dict[str, Any]]:
    """Write a random LLaMA in bf16; prompts for it."""
    from mixformer import save_pretrained
    from models.llama import LLaMAConfig

    sizes: dict[str, Any] = {
        "vocab_size": 8000, "hidden_size": 1024, "num_layers": 14, "num_heads": 16, "inner_hidden_size": 2752,
    }
    if small:
        sizes = {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 128}
    generator = torch.Generator().manual_seed(0)
    model = LLaMAConfig(**sizes, init_std=sizes["hidden_size"] ** -0.5).build(generator=generator)
    save_pretrained(model.to(torch.bfloat16), folder)
    ids = torch.randint(3, sizes["vocab_size"], (8, 1, 64), generator=generator)
    return [{"input_ids": row} for row in ids]


def table(rows: list[list[str]]) -> str:
    """The rows as Markdown."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantised")
    parser.add_argument("--small", action="store_true", help="a tiny random model only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not options.small:
            prompts, stops = questions(64)
            print("mini\n\n" + table(list(compare(MINI, prompts, CHOICES, stops=stops))) + "\n", flush=True)
        prompts = random_model(Path(folder) / "random", options.small)
        plain = {name: choice for name, choice in CHOICES.items() if choice is None or isinstance(choice, str)}
        print("random\n\n" + table(list(compare(Path(folder) / "random", prompts, plain))))


if __name__ == "__main__":
    main()
