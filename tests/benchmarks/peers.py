"""The competitors of the language cases, all with the weights of one model of ours."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer import KVCache
from mixformer.testing import jitter
from models.llama import LLaMA, LLaMAConfig

from .floor import Cache, FloorLLaMA, floor_name, load_floor
from .sat_peer import SATLLaMA, load_sat

FULL: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "inner_hidden_size": 1376,
    "max_positions": 2048,
}
QUICK: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40,
    "max_positions": 2048,
}
_LAYER = {
    "attention_norm": "input_layernorm", "attention.dense": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}


@dataclass
class Peers:
    """The same weights several times.

    Attributes:
        ours: composed out of mixins.
        floor: hand-written.
        hf: of transformers, or None.
        sat: of SwissArmyTransformer, or None.
        skipped: why there is no `hf` or no `sat`.
    """

    ours: LLaMA
    floor: FloorLLaMA
    hf: Any
    sat: SATLLaMA | None
    skipped: dict[str, str]


def make_peers(sizes: dict[str, Any]) -> Peers:
    """All of them, in eval mode."""
    ours = LLaMA(LLaMAConfig(**sizes), generator=torch.Generator().manual_seed(0))
    jitter(ours, scale=0.01)
    ours.eval()
    hf, no_hf = load_hf(ours)
    sat, no_sat = load_sat(ours)
    return Peers(ours, load_floor(ours.config, ours.state_dict()), hf, sat, {**no_hf, **no_sat})


def load_hf(ours: LLaMA) -> tuple[Any, dict[str, str]]:
    """LlamaForCausalLM with our weights, or None and the reason."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("transformers") is None:
        return None, {"HF": "transformers is not installed"}
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**hf_sizes(ours.config), attn_implementation="sdpa"))
    model.load_state_dict(to_hf(ours.state_dict(), ours.config))
    return model.eval(), {}


def hf_sizes(config: LLaMAConfig) -> dict[str, Any]:
    """Options of transformers' LlamaConfig."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.inner_size, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base,
        "max_position_embeddings": config.max_positions, "tie_word_embeddings": False, "eos_token_id": None,
    }


def _hf_names(config: LLaMAConfig) -> dict[str, list[str]]:
    names = {
        "transformer.word_embeddings.weight": ["model.embed_tokens.weight"],
        "transformer.final_norm.weight": ["model.norm.weight"],
        "mixins.head.linear.weight": ["lm_head.weight"],
    }
    for index in range(config.num_layers):
        ours, theirs = f"transformer.layers.{index}.", f"model.layers.{index}."
        names[f"{ours}attention.qkv.weight"] = [f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"]
        names |= {f"{ours}{own}.weight": [f"{theirs}{other}.weight"] for own, other in _LAYER.items()}
    return names


def to_hf(state: Mapping[str, torch.Tensor], config: LLaMAConfig) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names."""
    kv = config.kv_heads * config.head_width
    found: dict[str, torch.Tensor] = {}
    for own, others in _hf_names(config).items():
        parts = state[own].split((config.num_heads * config.head_width, kv, kv)) if len(others) == 3 else [state[own]]
        found |= dict(zip(others, parts, strict=True))
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients, under the model's own names."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def floor_gradients(peers: Peers) -> dict[str, torch.Tensor]:
    """The floor's, under our names."""
    found = gradients(peers.floor)
    return {name: found[floor_name(name)] for name, _ in peers.ours.named_parameters()}


def hf_gradients(peers: Peers) -> dict[str, torch.Tensor]:
    """Those of transformers' model, under our names."""
    found = gradients(peers.hf)
    return {own: torch.cat([found[x] for x in others]) for own, others in _hf_names(peers.ours.config).items()}


def loss_of(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


class Mark:
    """A place in a cache of ours to come back to, so that a step can be timed again and again."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.length = cache, cache.length

    def back(self) -> None:
        """Forget what was added since."""
        self.cache.crop(self.length)


class FloorMark:
    """The same for the floor's cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.length = cache, cache.length
        cache.position.fill_(cache.length)

    def back(self) -> None:
        """Forget what was added since."""
        self.cache.length = self.length
        self.cache.position.fill_(self.length)
