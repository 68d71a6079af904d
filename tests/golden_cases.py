"""Read the recorded cases under tests/golden and run models on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mixformer import BaseModel, KVCache
from mixformer.checkpoint import from_pretrained

GOLDEN = Path(__file__).parent / "golden"
HF_CASES = ["llama-hf", "cogvlm-hf", "cogvlm2-hf", "cogagent-hf"]
SAT_CASES = ["cogvlm-sat", "cogvlm-sat-mp2", "cogagent-sat"]
WORST: dict[str, float] = {}


@cache
def case(name: str) -> dict[str, Any]:
    """case.json."""
    content: dict[str, Any] = json.loads((GOLDEN / name / "case.json").read_text())
    return content


def constants(name: str) -> dict[str, Any] | None:
    """What the case's format does not record."""
    found: dict[str, Any] | None = case(name).get("cross_tower", case(name).get("tower"))
    return found


@cache
def model_of(name: str) -> Any:
    """The case's model, read from its folder."""
    return from_pretrained(GOLDEN / name, overrides=constants(name))


@cache
def tensors(name: str, file: str) -> dict[str, torch.Tensor]:
    """`inputs` or `expected` of a case."""
    return load_file(GOLDEN / name / f"{file}.safetensors")


def letters(name: str) -> list[str]:
    """The inputs of a case: a, b, ..."""
    return sorted({key.split(".")[0] for key in tensors(name, "inputs") if key.endswith(".input_ids")})


def batch_of(name: str, letter: str, device_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Forward inputs for one input of a case; position ids are left to the model."""
    given = tensors(name, "inputs")
    pictures = given if "images" in given else {}
    batch = {"input_ids": given[f"{letter}.input_ids"]}
    if f"{letter}.attention_mask" in given:
        batch["attention_mask"] = given[f"{letter}.attention_mask"]
    for types in ("token_type_ids", "image_embed_mask"):
        if f"{letter}.{types}" in given:
            batch["token_type_ids"] = given[f"{letter}.{types}"]
    if f"{letter}.image_index" in given:
        chosen = given[f"{letter}.image_index"]
        chosen = chosen[chosen >= 0]
        for images in ("images", "cross_images"):
            if images in pictures and chosen.numel():
                batch[images] = pictures[images][chosen].to(device_dtype)
    return batch


def check(name: str, key: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare within the case's tolerances, and remember the worst difference."""
    atol, rtol = case(name)["atol"], case(name)["rtol"]
    WORST[name] = max(WORST.get(name, 0.0), float((actual - expected).abs().max()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{name} {key}: {text}")


@torch.no_grad()
def greedy(model: BaseModel, batch: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """[b, steps] most likely next tokens, with a cache and one token per step."""
    rows, length = batch["input_ids"].shape
    kv_cache = KVCache(model, rows, length + steps)
    tokens = [model(**batch, cache=kv_cache, last_only=True)[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        tokens.append(model(tokens[-1][:, None], cache=kv_cache, last_only=True)[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)
