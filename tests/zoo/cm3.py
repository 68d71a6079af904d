"""CM3 beside XGLM, the HF port of the fairseq decoders whose architecture it has."""

from __future__ import annotations

from typing import Any

import torch

from models.cm3 import CM3, CM3Config
from tests.zoo.harness import Size, System, copy_weights, difference, jittered

LAYER = {
    "attention_norm": "self_attn_layer_norm",
    "attention.dense": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}


def from_xglm(reference: Any) -> CM3:
    """Our model with the weights of an XGLM."""
    config, tensors = reference.config, reference.state_dict()
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_layers": config.num_layers,
        "num_heads": config.attention_heads, "inner_hidden_size": config.ffn_dim,
        "embedding_scale": config.d_model**0.5,
    }
    ours = {"transformer.word_embeddings.weight": tensors["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        ours[f"transformer.final_norm.{kind}"] = tensors[f"model.layer_norm.{kind}"]
        for i in range(config.num_layers):
            own, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
            for name, foreign in LAYER.items():
                ours[f"{own}.{name}.{kind}"] = tensors[f"{theirs}.{foreign}.{kind}"]
            fused = [tensors[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{own}.attention.qkv.{kind}"] = torch.cat(fused)
    model = CM3(CM3Config(**sizes)).eval()
    copy_weights(model, ours)
    return model


def tiny_xglm() -> Any:
    """A small XGLM with noise on every parameter."""
    from transformers import XGLMConfig, XGLMForCausalLM

    torch.manual_seed(0)
    config = XGLMConfig(
        vocab_size=97, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, pad_token_id=1,
    )
    return jittered(XGLMForCausalLM(config))


@torch.no_grad()
def parity() -> dict[str, float]:
    """Logits, with padding too, and the loss."""
    reference = tiny_xglm()
    model = from_xglm(reference)
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    theirs, padded = reference(ids), reference(ids, attention_mask=mask, labels=labels)
    losses = CM3.objective(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    real = mask.bool()
    return {
        "logits": difference(model(ids), theirs.logits),
        "logits of padded rows": difference(model(ids, mask)[real], padded.logits[real]),
        "loss": difference(losses["language"], padded.loss),
    }


_SOURCE = "HF XGLM of the sizes in appendix A.1, with the vocabulary of the dense models of arXiv:2112.10684"

SYSTEM = System(
    name="CM3",
    key="cm3",
    family="joint",
    paper="2201.07520",
    model="models.cm3:CM3",
    loss="next token of documents with spans moved to the end, sentinels not learnt",
    reference="HF XGLM (fairseq's decoder)",
    parity=parity,
    sizes={"CM3-Medium": Size(2_646_320_640, _SOURCE), "CM3-Large": Size(12_842_920_960, _SOURCE, "large.yaml")},
    chats=True,
)
