"""Visual experts: what routing image tokens to weights of their own costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from mixformer import BaseMixin, Context, KVCache
from mixformer.mixins import VisionExpertAttentionMixin, VisionExpertFCMixin
from mixformer.mixins.vision_expert import copy_weights
from mixformer.testing import jitter, sample_row
from models.cogagent import CogAgentConfig
from models.cogvlm import CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig
from models.llama import LLaMA, LLaMAConfig

from .floor import FloorLLaMA, load_floor
from .harness import Group, Options, Run, case, require_equal
from .language import inference, random_ids
from .peers import FULL, QUICK, Mark, gradients, loss_of

DENSE, EXPERTS, WHOLE, SPLIT = "mixformer, dense", "mixformer, experts", "dense's products", "the same, split in two"
FLOOR = "split-GEMM floor"


class MarkedImagesMixin(BaseMixin):
    """Route what `token_type_ids` marks as `image`, without any picture."""

    inputs = ("token_type_ids",)

    def plan(self, ctx: Context) -> None:
        types = ctx.inputs.get("token_type_ids")
        if types is not None:
            ctx.routes.add("image", types.flatten().nonzero().flatten(), types.numel())


def with_experts(dense: LLaMA) -> LLaMA:
    """The same model with visual experts in every layer, copies of the language weights."""
    model: LLaMA = copy.deepcopy(dense)
    model.add_mixin("marked", MarkedImagesMixin())
    model.add_mixin("vision_expert", VisionExpertAttentionMixin())
    model.add_mixin("vision_expert_mlp", VisionExpertFCMixin())
    return model.eval()


def expert_parts(model: LLaMA) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(language part, its expert)."""
    for layer in model.transformer.layers:
        for name in ("qkv", "dense"):
            yield getattr(layer.attention, name), getattr(layer.mixins["vision_expert"], name)
        for name, linear in layer.mlp.named_children():
            yield linear, getattr(layer.mixins["vision_expert_mlp"], name)


def jitter_experts(model: LLaMA) -> None:
    """Make experts differ from the language weights."""
    for index, (_, expert) in enumerate(expert_parts(model)):
        jitter(expert, index, 0.02)


def summed_gradients(model: LLaMA) -> dict[str, torch.Tensor]:
    """Gradients of the language weights with those of their experts added: what dense weights get."""
    found = gradients(model)
    summed = {name: gradient for name, gradient in found.items() if "vision_expert" not in name}
    for name, gradient in found.items():
        if "vision_expert" in name:
            own = name.replace("mixins.vision_expert_mlp", "mlp").replace("mixins.vision_expert", "attention")
            summed[own] = summed[own] + gradient
    return summed


class Products:
    """The matrix products of every routed site, on all rows or on two groups with weights of their own.

    Args:
        model: gives the weights.
        counts: rows of each group.
        backward: also the products for the gradients of inputs and weights.
    """

    def __init__(self, model: LLaMA, counts: tuple[int, ...], backward: bool) -> None:
        self.backward, self.sites = backward, []
        made: dict[tuple[int, int], torch.Tensor] = {}
        for language, expert in expert_parts(model):
            for rows, module in zip(counts, (language, expert), strict=False):
                weight: Any = module.weight
                (height, width), weight = weight.shape, weight.detach()
                for size in (height, width):
                    made.setdefault((rows, size), torch.randn(rows, size))
                self.sites.append((weight, made[rows, width], made[rows, height]))

    def __call__(self) -> None:
        for weight, x, _ in self.sites:
            torch.mm(x, weight.t())
        if self.backward:
            for weight, x, gradient in reversed(self.sites):
                torch.mm(gradient, weight)
                torch.mm(gradient.t(), x)


class TwoHalves(nn.Module):
    """What one would write by hand if all image tokens came first: one module for each, then `cat`."""

    def __init__(self, language: nn.Module, expert: nn.Module, num_image: int) -> None:
        super().__init__()
        self.language, self.expert, self.num_image = language, expert, num_image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, o]."""
        return torch.cat((self.expert(x[:, : self.num_image]), self.language(x[:, self.num_image :])), dim=1)


def hand_written(dense: LLaMA, num_image: int) -> FloorLLaMA:
    """The floor with experts for the first `num_image` tokens of each row."""
    model = load_floor(dense.config, dense.state_dict())
    for layer in model.layers:
        layer.attention.qkv = TwoHalves(layer.attention.qkv, copy.deepcopy(layer.attention.qkv), num_image)
        layer.attention.out = TwoHalves(layer.attention.out, copy.deepcopy(layer.attention.out), num_image)
        layer.mlp = TwoHalves(layer.mlp, copy.deepcopy(layer.mlp), num_image)
    return model


@case("expert", "Visual expert over dense")
def expert(options: Options) -> Iterator[Group]:
    """LLaMA, and the same with visual experts in every layer; 2 rows of 384 tokens, of which the 257 behind the first
    are image tokens (no tower). The split-GEMM floor is the dense model's time, less that of its routed matrix products
    alone, plus that of the same products split into text rows and image rows with weights of their own. Once with
    8 layers of hidden size 512, once with 4 layers of 1024. Outputs are compared while experts are
    copies of the language weights; then these are changed. By hand: the floor with two modules for contiguous halves of
    each row and `cat`, which only works where all image tokens come first. Text alone and a decoding step follow; there
    experts should cost nothing."""
    for width, num_layers in options.pick(((512, 8), (1024, 4)), ((32, 2),)):
        sizes = {**options.pick(FULL, QUICK), "hidden_size": width, "num_layers": num_layers}
        sizes["inner_hidden_size"] = options.pick(width * 43 // 16, sizes["inner_hidden_size"])
        yield from expert_groups(options, LLaMAConfig(**sizes), first=width != 1024)


def expert_groups(options: Options, config: LLaMAConfig, first: bool) -> Iterator[Group]:
    """The groups of one width; text alone and decoding for the first only."""
    dense = LLaMA(config, generator=torch.Generator().manual_seed(0)).eval()
    experts = with_experts(dense)
    num_rows, num_tokens, num_image = options.pick((2, 384, 257), (2, 12, 7))
    ids = random_ids(dense.config, num_rows, num_tokens)
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + num_image] = 1
    by_hand = hand_written(dense, num_image)
    with torch.no_grad():
        in_front = torch.zeros_like(ids)
        in_front[:, :num_image] = 1
        require_equal(by_hand(ids), experts(ids, token_type_ids=in_front), 1e-4, "the hand-written experts")

    def runs(step: Callable[[Any, Callable[[], torch.Tensor]], Run], backward: bool) -> dict[str, Run]:
        total, image = num_rows * num_tokens, num_rows * num_image
        hand = step(by_hand, lambda: by_hand(ids))
        hand.compared = False
        return {
            DENSE: step(dense, lambda: dense(ids)),
            EXPERTS: step(experts, lambda: experts(ids, token_type_ids=types)),
            WHOLE: Run(inference(Products(experts, (total,), backward)), compared=False),
            SPLIT: Run(inference(Products(experts, (total - image, image), backward)), compared=False),
            "by hand": hand,
        }

    def forward(model: nn.Module, logits: Callable[[], torch.Tensor]) -> Run:
        return Run(inference(logits))

    def train(model: nn.Module, logits: Callable[[], torch.Tensor]) -> Run:
        def step() -> torch.Tensor:
            loss = loss_of(logits(), ids)
            loss.backward()
            return loss.detach()

        return Run(
            step, lambda: model.zero_grad(set_to_none=True),
            lambda: (step(), summed_gradients(model)),  # type: ignore[arg-type]
        )

    def split_floor(times: dict[str, float]) -> float:
        return times[DENSE] - times[WHOLE] + times[SPLIT]

    for title, step in (("forward", forward), ("training", train)):
        for language, own in expert_parts(experts):
            copy_weights(language, own)
        yield Group(
            f"{title}, hidden size {config.hidden_size}, {num_rows} x {num_tokens} tokens, {num_image} of them image",
            runs(step, step is train), (DENSE, FLOOR), {FLOOR: split_floor}, rounds=30 if step is forward else 15,
            prepare=lambda: jitter_experts(experts),
        )
    if not first:
        return
    yield Group(
        "text alone", {DENSE: forward(dense, lambda: dense(ids)), EXPERTS: forward(experts, lambda: experts(ids))},
        (DENSE,), rounds=15,
    )
    for language, own in expert_parts(experts):
        copy_weights(language, own)
    yield Group("one decoding step after them", decoding(dense, experts, ids, types), (DENSE,), rounds=40, calls=10)


@torch.no_grad()
def decoding(dense: LLaMA, experts: LLaMA, ids: torch.Tensor, types: torch.Tensor) -> dict[str, Run]:
    """A step of each model after a prompt with image tokens."""
    runs = {}
    for name, model, inputs in ((DENSE, dense, {}), (EXPERTS, experts, {"token_type_ids": types})):
        cache = KVCache(model, ids.shape[0], ids.shape[1] + 8)
        model(ids, cache=cache, last_only=True, **inputs)
        step = inference(lambda model=model, cache=cache: model(ids[:, -1:], cache=cache, last_only=True))  # type: ignore[misc]
        runs[name] = Run(step, Mark(cache).back)
    return runs


@case("cogagent", "CogAgent over CogVLM")
@torch.no_grad()
def cogagent(options: Options) -> Iterator[Group]:
    """The same language model, experts, picture at 224 (256 patches) and 32 tokens of text. CogAgent adds a
    high-resolution picture and cross attention in every layer. Towers are an eighth as wide as the released ones, as is
    the language model, with a quarter of the layers; the high-resolution picture has an eighth of the 6400 patches, so
    that attention keeps its share of the tower's work. Outputs are compared while the cross attention's last projection
    is zero; then it is changed."""
    sizes = options.pick(FULL, QUICK)
    wide: dict[str, Any] = options.pick(
        {"hidden_size": 224, "num_layers": 16, "num_heads": 14, "inner_hidden_size": 1920, "image_size": 224},
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 28},
    )
    cross: dict[str, Any] = options.pick(
        {"hidden_size": 128, "num_layers": 6, "num_heads": 4, "inner_hidden_size": 344, "image_size": 392},
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 42},
    )
    tower = EVA2CLIPEConfig(**wide)
    high = EVA2CLIPLConfig(**cross, num_layers_run=None, stored_head_size=0)
    seed = torch.Generator().manual_seed(0)
    cogvlm = CogVLMConfig(**sizes, vision=tower).build(generator=seed).eval()
    agent_config = CogAgentConfig(**sizes, vision=tower, cross_vision=high)
    agent_config.adapter = copy.deepcopy(cogvlm.config.adapter)
    agent = agent_config.build(generator=seed).eval()
    agent.load_state_dict(cogvlm.state_dict(), strict=False)
    projections = [layer.mixins["cross"].dense for layer in agent.transformer.layers]
    for projection in projections:
        nn.init.zeros_(projection.weight)
    row = sample_row(agent, 1, options.pick(33, 5), torch.Generator().manual_seed(0))
    models = {"CogVLM": (cogvlm, {k: v for k, v in row.items() if k != "cross_images"}), "CogAgent": (agent, row)}

    def change() -> None:
        for index, projection in enumerate(projections):
            jitter(projection, index, 0.02)

    runs = {
        name: Run(inference(lambda model=model, given=given: model(**given, last_only=True)))  # type: ignore[misc]
        for name, (model, given) in models.items()
    }
    yield Group("prefill", runs, ("CogVLM",), rounds=10, prepare=change)
    for projection in projections:
        nn.init.zeros_(projection.weight)
    length, token = row["input_ids"].shape[1], row["input_ids"][:, -1:]
    runs = {}
    for name, (model, given) in models.items():
        cache = KVCache(model, 1, length + 8)
        model(**given, cache=cache, last_only=True)
        step = inference(lambda model=model, cache=cache: model(token, cache=cache, last_only=True))  # type: ignore[misc]
        runs[name] = Run(step, Mark(cache).back)
    yield Group("one decoding step after it", runs, ("CogVLM",), rounds=40, calls=10, prepare=change)
