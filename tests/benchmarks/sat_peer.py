"""SwissArmyTransformer's LLaMA with our weights, on a CPU.

Its rotary positions need Triton, so a plain rotary module stands in their place; what it imports and does not use here
(downloads, data sets, Triton) may be absent.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from models.llama import LLaMA

UNUSED = ("requests", "boto3", "webdataset", "braceexpand", "triton", "triton.language", "tensorboardX", "einops")


class _Nothing:
    """Any name of an absent module: it can be called, decorate, be inherited from, and has any attribute."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


class _Absent(types.ModuleType):
    """Stands for a module that is imported and not used."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def import_sat() -> str | None:
    """Import it; the reason if that does not work."""
    if importlib.util.find_spec("sat") is None:
        return "SwissArmyTransformer is not installed"
    importlib.import_module("torch._inductor.compile_fx")  # asks for Triton, and must not find the stand-in
    made = [name for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: _Absent(name) for name in made})
    try:
        with _silence():
            importlib.import_module("sat.model.official.llama_model")
            importlib.import_module("sat.generation.autoregressive_sampling")
    except Exception as error:
        return f"importing it fails: {type(error).__name__}: {error}"
    finally:
        for name in made:
            del sys.modules[name]
    return None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class PlainRotary(nn.Module):
    """What its Triton kernel computes: tables kept, looked up by position."""

    def __init__(self, head_width: int, base: float, max_positions: int) -> None:
        super().__init__()
        half = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] / base**half
        self.cos, self.sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles, angles), -1).sin()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, max_seqlen: Any, layer_id: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [b, n, s, d], turned."""
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        size = q.shape[-1] // 2
        return q * cos + q.roll(size, -1) * sin, k * cos + k.roll(size, -1) * sin


class SATLLaMA:
    """Calls its LLaMA as its own generation code does.

    Args:
        ours: gives sizes and weights.
    """

    def __init__(self, ours: LLaMA) -> None:
        from sat.model.cached_autoregressive_model import CachedAutoregressiveMixin
        from sat.model.official.llama_model import LLaMAModel

        config = ours.config
        arguments = argparse.Namespace(
            num_layers=config.num_layers, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads, inner_hidden_size=config.inner_size, layernorm_order="pre",
            max_sequence_length=config.max_positions, layernorm_epsilon=config.norm_eps, use_bias=False,
            skip_init=True, model_parallel_size=1,
        )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
        with _silence():
            self.model = LLaMAModel(arguments)
        self.model.mixins["rotary"].rotary_emb = PlainRotary(config.head_width, config.rope_base, config.max_positions)
        head = self.model.mixins["lm"].lm_head
        # It computes logits of every token; here it is spared those, as everyone is.
        self.model.mixins["lm"].final_forward = lambda x, last_only=False, **kwargs: head(x[:, -1:] if last_only else x)
        self.model.collect_hooks_()
        self.model.load_state_dict({self.name(key): value for key, value in ours.state_dict().items()}, strict=True)
        self.cached = CachedAutoregressiveMixin
        self.model.eval()

    @staticmethod
    def name(own: str) -> str:
        """Its name of one of our parameters."""
        index = own.split(".")[2] if own.startswith("transformer.layers.") else ""
        for part, theirs in (
            ("attention.qkv", "attention.query_key_value"), ("attention.dense", "attention.dense"),
            ("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
            ("mlp.up", "mlp.dense_h_to_4h"), ("mlp.down", "mlp.dense_4h_to_h"),
        ):
            if f".{part}." in own:
                return own.replace(f".{part}.", f".{theirs}.")
        if ".mlp.gate." in own:
            return f"mixins.mlp.gate_proj.{index}.weight"
        return {
            "transformer.word_embeddings.weight": "transformer.word_embeddings.weight",
            "transformer.final_norm.weight": "transformer.final_layernorm.weight",
            "mixins.head.linear.weight": "mixins.lm.lm_head.weight",
        }[own]

    def keep_keys(self) -> None:
        """Have forwards return keys and values, as its generation needs."""
        if "auto-regressive" not in self.model.mixins:
            self.model.add_mixin("auto-regressive", self.cached())

    def logits(self, input_ids: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """[b, s] -> [b, s, v], or [b, 1, v]."""
        positions = torch.arange(input_ids.shape[1])[None]
        found: torch.Tensor = self.model(input_ids, positions, -1, last_only=last_only)[0]
        return found

    def remembered(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, s] -> logits [b, 1, v] and memory, as its generation makes it."""
        from sat.generation.autoregressive_sampling import update_mems

        self.keep_keys()
        positions = torch.arange(input_ids.shape[1])[None]
        logits, *layers = self.model(input_ids, positions, -1, last_only=True, mems=None)
        return logits, update_mems([layer["mem_kv"] for layer in layers], None, 10**6)

    def step(self, token: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """[b, 1] -> logits [b, 1, v]; makes the memory of the next step too."""
        from sat.generation.autoregressive_sampling import update_mems

        length = memory.shape[2]
        mask = torch.ones(1, 1, 1, length + 1)
        logits, *layers = self.model(token, torch.tensor([[length]]), mask, last_only=True, mems=memory)
        update_mems([layer["mem_kv"] for layer in layers], memory, 10**6)
        found: torch.Tensor = logits
        return found


def load_sat(ours: LLaMA) -> tuple[SATLLaMA | None, dict[str, str]]:
    """SAT's model with our weights, or None and the reason."""
    reason = import_sat()
    if reason is None:
        try:
            return SATLLaMA(ours), {}
        except Exception as error:
            reason = f"building it fails: {type(error).__name__}: {error}"
    return None, {"SAT": reason}


def sat_gradients(peer: SATLLaMA, ours: LLaMA) -> dict[str, torch.Tensor]:
    """Copies of its gradients."""
    found = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    return {name: found[peer.name(name)].clone() for name, _ in ours.named_parameters()}
