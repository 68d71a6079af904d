"""Compose a variant of LLaMA, look at its hooks, save it and load it again: python examples/compose_variant.py"""

from __future__ import annotations

import tempfile

import torch
from gate_mixin import GateMixin

from mixformer import from_pretrained, save_pretrained
from mixformer.mixins import LoRAMixin
from models.llama import LLaMA, LLaMAConfig


def main() -> None:
    """Run the example."""
    sizes = LLaMAConfig(vocab_size=100, hidden_size=64, num_layers=4, num_heads=4, inner_hidden_size=128)
    model = LLaMA(sizes)
    input_ids = torch.tensor([[1, 5, 9, 2]])
    plain = model(input_ids)

    model.add_mixin("mlp_gate", GateMixin(), layers=[1, 3])
    model.add_mixin("lora", LoRAMixin(["qkv:q", "qkv:v", "mlp_gate"], rank=4))
    print(model.hooks)
    logits = model(input_ids)

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again = from_pretrained(folder, mixins={"mlp_gate": GateMixin})
    print("loaded again, same logits:", torch.equal(again(input_ids), logits))

    model.del_mixin("lora")
    model.del_mixin("mlp_gate")
    print("both removed, plain again:", torch.equal(model(input_ids), plain))


if __name__ == "__main__":
    main()
