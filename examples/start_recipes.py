"""What the recipes of CogVLM and CogAgent start from, put together out of folders of weights.

    python -m examples.start_recipes cogvlm vicuna-7b-v1.5 eva2-clip-e runs/cogvlm-start
    python -m examples.start_recipes resize runs/cogvlm-stage2-224 490 runs/cogvlm-stage2-490-start
    python -m examples.start_recipes cogagent runs/cogvlm-sft eva2-clip-l runs/cogagent-start

The tower may be a folder of its own, or that of a CogVLM or CogAgent which has it. Everything stays in the dtype that
it is stored in.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from mixformer import BaseModel, from_pretrained, load_processor, save_pretrained
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.data.processor import Processor
from mixformer.mixins import CrossAttentionMixin, ImageMixin, VisionExpertAttentionMixin, VisionExpertFCMixin
from models.cogagent import CogAgent, CogAgentConfig
from models.cogvlm import CogVLM, CogVLMConfig
from models.eva2_clip import EVA2CLIPE, EVA2CLIPL
from models.llama import LLaMA
from models.weights import resize_positions

POSITIONS = "mixins.image.tower.transformer.position_embeddings.weight"


def cogvlm_start(language: LLaMA, tower: EVA2CLIPE) -> CogVLM:
    """Compose a CogVLM around a language model: its tower, a new adapter, experts that copy the language layers.

    Args:
        language: changed in place; its weights become those of the result.
        tower: its weights are copied.
    """
    adapter, dtype = GLUAdapterConfig(), language.dtype
    language.add_mixin("image", ImageMixin(tower.config, adapter))
    language.add_mixin("vision_expert", VisionExpertAttentionMixin())
    language.add_mixin("vision_expert_mlp", VisionExpertFCMixin())
    dict(language.nested_models())["image.tower"].load_state_dict(tower.state_dict())
    config = CogVLMConfig(**_options(language.config), vision=tower.config, adapter=adapter)
    return _filled(CogVLM, config, language.to(dtype).state_dict())


def cogagent_start(base: CogVLM, tower: EVA2CLIPL) -> CogAgent:
    """Add the high-resolution branch to a CogVLM. The adapter's new position table is zero, as if it were not there.

    Args:
        base: changed in place; its weights become those of the result.
        tower: its weights are copied.
    """
    dtype = base.dtype
    cross = CrossAttentionMixin(tower.config)
    base.add_mixin("cross", cross)
    cross.tower.load_state_dict(tower.state_dict())
    options = {**_options(base.config), "vision": base.config.vision}
    adapter = replace(base.config.adapter, position_table=True)
    config = CogAgentConfig(**{**options, "adapter": adapter, "cross_vision": tower.config})
    return _filled(CogAgent, config, base.to(dtype).state_dict())


def resized(model: CogVLM, image_size: int) -> CogVLM:
    """The model for pictures of another size: the tower's learned positions are interpolated, as the authors did.

    Args:
        model: its weights become those of the result.
        image_size: side of the pictures, in pixels.
    """
    vision = replace(model.config.vision, image_size=image_size)
    weights = dict(model.state_dict())
    weights[POSITIONS] = resize_positions(weights[POSITIONS], vision.grid)
    return _filled(type(model), replace(model.config, vision=vision), weights)


def _options(config: Any) -> dict[str, Any]:
    """The options of a config that are no parts."""
    return {name: getattr(config, name) for name in asdict(config) if not hasattr(getattr(config, name), "__dict__")}


def _filled(model_class: type[Any], config: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A model that takes the tensors over; of what they lack, position tables are zero.

    Raises:
        ValueError: tensors that do not fit.
    """
    model = model_class(config, device="meta")
    lacking = set(model.state_dict()) - set(weights)
    zeros = {}
    for name in sorted(lacking):
        if "position" not in name:
            raise ValueError(f"{model_class.__name__} needs {name}, which the given weights do not have.")
        like = model.state_dict()[name]
        zeros[name] = torch.zeros(like.shape, dtype=next(iter(weights.values())).dtype)
    model.load_state_dict({**weights, **zeros}, assign=True)
    return model


def _tower(folder: str, kind: type[BaseModel]) -> Any:
    """The tower of a folder, or that inside of its model.

    Raises:
        ValueError: there is none of that kind.
    """
    model: Any = from_pretrained(folder)
    for found in (model, *(nested for _, nested in model.nested_models())):
        if isinstance(found, kind):
            return found
    raise ValueError(f"{folder} is a {type(model).__name__} and has no {kind.__name__}.")


def processor_for(model: CogVLM, source: Processor) -> Processor:
    """The processor of the weights that a model was made of, for the model's pictures and prompts."""
    config, pictures = model.config, {"image_size": model.config.vision.image_size}
    family = "hf-cogvlm"
    if isinstance(config, CogAgentConfig):
        family, pictures["cross_image_size"] = "hf-cogagent", config.cross_vision.image_size
    template = source.config.template if source.config.family == family else None
    options = {"family": family, "template": template, "patch_size": config.vision.patch_size, **pictures}
    return Processor(replace(source.config, **options), source.tokenizer)


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, given in (("cogvlm", "language tower"), ("resize", "model size"), ("cogagent", "model tower")):
        part = commands.add_parser(command)
        for name in (*given.split(), "output"):
            part.add_argument(name, type=int if name == "size" else str)
        part.add_argument("--tokenizer", help="file or folder of the tokenizer, where the first folder has none")
    options = parser.parse_args(arguments)
    source = options.language if options.command == "cogvlm" else options.model
    processor = load_processor(source, options.tokenizer)
    model: Any = from_pretrained(source)
    if options.command == "resize":
        model = resized(model, options.size)
    elif options.command == "cogvlm":
        model = cogvlm_start(model, _tower(options.tower, EVA2CLIPE))
    else:
        model = cogagent_start(model, _tower(options.tower, EVA2CLIPL))
    save_pretrained(model, options.output, processor=processor_for(model, processor))
    print(f"saved {options.output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
