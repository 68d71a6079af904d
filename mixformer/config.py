"""Configuration: the options of the backbone as a typed dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_cast": ("last", "first"),
    "norm_order": ("pre", "post", "sandwich", "res_post"),
    "bias": ("all", "qkv", "except_qkv", "none"),
    "activation": ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu"),
    "positions": ("none", "learned"),
}


@dataclass
class TransformerConfig:
    """Options of the backbone.

    Attributes:
        vocab_size: rows of the word embedding; 0 for towers, which have none.
        hidden_size: h.
        num_layers: layers that exist.
        num_layers_run: layers that run (CogAgent's EVA2-CLIP-L stores 24 and runs 23); None for all.
        num_heads: n.
        num_kv_heads: g, a divisor of n; None for n.
        head_size: d; None for h / n.
        inner_hidden_size: of the MLP; None for 4 h.
        causal: whether tokens see only what comes before.
        norm: `layernorm` or `rmsnorm`.
        norm_eps: added to the variance.
        norm_cast: RMSNorm in low precision: multiply by the weight in fp32 and cast `last` (CogVLM), or cast `first`
            and multiply after (HF LLaMA).
        norm_order: `pre`; `post`: LN(x + f(x)); `sandwich`: x + LN(f(LN(x))); `res_post`: x + LN(f(x)) (EVA2-CLIP-E).
        final_norm: a norm after the last layer.
        embedding_norm: a norm before the first layer.
        bias: of Linears: `all`, `qkv` only, all `except_qkv`, or `none`.
        activation: of the MLP.
        gated_mlp: act(gate(x)) * up(x) instead of act(up(x)).
        qk_norm: RMSNorm over each head of q and k.
        layer_scale: initial value of a learned scale on what each sublayer adds; None for no such scale.
        positions: `learned` table or `none` (rotary is a mixin).
        max_positions: rows of the learned table; also the longest sequence a release was made for.
        tied_head: use the word embedding as output projection when no mixin replaces `final_forward`.
        embedding_scale: factor on word embeddings.
        init_std: of Linears and embeddings in a fresh model.
        checkpoint_activations: recompute layers in the backward pass instead of keeping their activations.
    """

    model_class: ClassVar[Any] = None

    vocab_size: int = 0
    hidden_size: int = 64
    num_layers: int = 2
    num_layers_run: int | None = None
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_size: int | None = None
    inner_hidden_size: int | None = None
    causal: bool = True
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_cast: str = "last"
    norm_order: str = "pre"
    final_norm: bool = True
    embedding_norm: bool = False
    bias: str = "all"
    activation: str = "gelu"
    gated_mlp: bool = False
    qk_norm: bool = False
    layer_scale: float | None = None
    positions: str = "none"
    max_positions: int = 0
    tied_head: bool = True
    embedding_scale: float = 1.0
    init_std: float = 0.02
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{name}.{field} is {getattr(self, field)!r}; choose one of {', '.join(choices)}.")
        for field in ("hidden_size", "num_layers", "num_heads", "inner_size", "kv_heads", "head_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{name}.{field} is {getattr(self, field)}; it must be at least 1.")
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"{name}: hidden_size {self.hidden_size} does not divide into {self.num_heads} heads. "
                f"Change num_heads, or set head_size."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"{name}: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}.")
        if not 0 < self.layers_run <= self.num_layers:
            raise ValueError(f"{name}: num_layers_run {self.num_layers_run} is not within num_layers {self.num_layers}.")
        if self.positions == "learned" and self.max_positions < 1:
            raise ValueError(f"{name}: positions 'learned' needs max_positions, the rows of the table.")

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return self.inner_hidden_size or 4 * self.hidden_size

    @property
    def head_width(self) -> int:
        """d."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """g."""
        return self.num_kv_heads or self.num_heads

    @property
    def layers_run(self) -> int:
        """Layers that run."""
        return self.num_layers if self.num_layers_run is None else self.num_layers_run

    def build(self, **options: Any) -> Any:
        """The model this configures (`BaseModel` itself for a plain backbone); options as of `BaseModel`."""
        return self.model_class(self, **options)
