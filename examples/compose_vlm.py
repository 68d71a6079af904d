"""A variant no paper has: LLaVA with visual experts in every 4th layer and gated attention to a second, sharper tower.

python examples/compose_vlm.py
"""

import dataclasses

import torch

from mixformer import BaseMixin, wrap
from mixformer.accounting import describe, description
from mixformer.config import read_settings
from mixformer.data import Processor
from mixformer.mixins import CrossAttentionMixin, VisionExpertAttentionMixin, VisionExpertFCMixin
from mixformer.train import Stage, TrainConfig, run_stages
from mixformer.train.tasks import ConversationTask
from models.clip import CLIPVisionConfig


class CrossGateMixin(BaseMixin):
    """Open cross attention slowly: times tanh of a number that starts at zero (arXiv:2204.14198, section 3.1.2)."""

    def build_layer(self, layer):
        return torch.nn.ParameterList([torch.zeros(())])

    @wrap
    def cross_attention_forward(self, hidden_states, layer, ctx, old_impl):
        out = old_impl(hidden_states)
        return None if out is None else layer.mixins[self.name][0].tanh() * out


def main() -> None:
    """Run the example."""
    settings = read_settings(file="examples/zoo/llava/tiny.yaml", overrides=["--model.num_layers", "8"])
    model, plain = settings.build_model(), settings.load_processor()
    sharp = CLIPVisionConfig(hidden_size=32, num_layers=2, num_heads=2, image_size=64, patch_size=8, output="patches")
    model.add_mixin("expert", VisionExpertAttentionMixin(), layers=range(0, 8, 4))
    model.add_mixin("expert_mlp", VisionExpertFCMixin(), layers=range(0, 8, 4))
    model.add_mixin("cross", CrossAttentionMixin(sharp))
    model.add_mixin("cross_gate", CrossGateMixin())

    processor = Processor(dataclasses.replace(plain.config, cross_image_size=64), plain.tokenizer)
    task = ConversationTask("examples/zoo/shapes/train.jsonl", batch_size=8)
    print(run_stages(model, [Stage("all", task, TrainConfig(steps=20, warmup_steps=5))], processor))
    print("\n".join(description(describe(model))))


if __name__ == "__main__":
    main()
