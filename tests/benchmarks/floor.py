"""The floor: a LLaMA as one would write it by hand, with nothing but what it needs. It is the yardstick."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.llama import LLaMAConfig


class RMSNorm(nn.Module):
    """[..., h] -> [..., h]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.shape, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Root mean square norm."""
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Cache:
    """Preallocated keys and values, written in place: one [b, g, capacity, d] each per layer."""

    def __init__(self, model: FloorLLaMA, batch_size: int, capacity: int) -> None:
        config = model.config
        shape = (batch_size, config.kv_heads, capacity, config.head_width)
        self.keys = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.length = 0
        self.position = torch.zeros(1, dtype=torch.int64)
        self.slots = torch.arange(capacity)


class Attention(nn.Module):
    """One fused projection for q, k and v; rotary; grouped heads where configured."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_width
        self.grouped = self.kv_heads != self.num_heads
        rows = (self.num_heads + 2 * self.kv_heads) * self.head_size
        self.qkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_size, config.hidden_size, bias=False)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[b, s, h] -> q [b, n, s, d], k and v [b, g, s, d], turned by their positions: q and k in one go."""
        fused = self.qkv(x).view(*x.shape[:2], -1, self.head_size).transpose(1, 2)
        turning, v = fused.split((self.num_heads + self.kv_heads, self.kv_heads), dim=1)
        first, second = turning.chunk(2, dim=-1)
        turned = (turning * cos).addcmul_(torch.cat((second, first), dim=-1), sin)
        q, k = turned.split((self.num_heads, self.kv_heads), dim=1)
        return q, k, v

    def join(self, attended: torch.Tensor) -> torch.Tensor:
        """[b, n, s, d] -> [b, s, h]."""
        return self.out(attended.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None, layer: int
    ) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; with a cache, an empty one or a single new token."""
        q, k, v = self.project(x, cos, sin)
        causal = x.shape[1] > 1
        if cache is not None:
            start, end = cache.length, cache.length + x.shape[1]
            keys, values = cache.keys[layer], cache.values[layer]
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            if start:
                k, v = keys[:, :, :end], values[:, :, :end]
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.grouped))

    def step(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, cache: Cache, layer: int
    ) -> torch.Tensor:
        """[b, 1, h] -> [b, 1, h] over all slots of the cache."""
        q, k, v = self.project(x, cos, sin)
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(2, cache.position, k)
        values.index_copy_(2, cache.position, v)
        return self.join(
            F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=self.grouped)
        )


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None, index: int
    ) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, index)
        return x + self.mlp(self.mlp_norm(x))

    def step(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, cache: Cache, index: int
    ) -> torch.Tensor:
        """[b, 1, h] -> [b, 1, h]."""
        x = x + self.attention.step(self.attention_norm(x), cos, sin, mask, cache, index)
        return x + self.mlp(self.mlp_norm(x))


class FloorLLaMA(nn.Module):
    """LLaMA with a head of its own.

    Args:
        config: the sizes of our LLaMA.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.vocab_size, config.hidden_size
        # Without initial values: `normal_` of a tensor without memory imports the compiler, which takes a second.
        self.embedding = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.device("cpu"):
            half = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
            angles = torch.arange(config.max_positions, dtype=torch.float32)[:, None] / config.rope_base**half
            self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), dim=-1), persistent=False)
            self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)

    def forward(
        self, input_ids: torch.Tensor, cache: Cache | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """[b, s] -> logits [b, s, v], or [b, 1, v] with `last_only`."""
        num_tokens, start = input_ids.shape[1], 0 if cache is None else cache.length
        assert start == 0 or num_tokens == 1
        cos, sin = self.cos[start : start + num_tokens], self.sin[start : start + num_tokens]
        x = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, index)
        if cache is not None:
            cache.length = start + num_tokens
        if last_only:
            x = x[:, -1:]
        return self.head(self.norm(x))

    def step(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """[b, 1] -> logits [b, 1, v]: one token with fixed shapes, for compiling."""
        cos, sin = self.cos[cache.position], self.sin[cache.position]
        mask = (cache.slots <= cache.position)[None, None, None]
        x = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer.step(x, cos, sin, mask, cache, index)
        cache.position.add_(1)
        return self.head(self.norm(x))


TOP = {
    "transformer.word_embeddings.weight": "embedding.weight",
    "transformer.final_norm.weight": "norm.weight",
    "mixins.head.linear.weight": "head.weight",
}


def floor_name(name: str) -> str:
    """The floor's name of a parameter of our LLaMA."""
    return TOP.get(name) or name.removeprefix("transformer.").replace("attention.dense", "attention.out")


def load_floor(config: LLaMAConfig, state: dict[str, torch.Tensor]) -> FloorLLaMA:
    """A floor with copies of the weights of our LLaMA."""
    model = FloorLLaMA(config)
    model.load_state_dict({floor_name(name): tensor for name, tensor in state.items()})
    return model.eval()
