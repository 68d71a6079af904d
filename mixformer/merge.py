"""Low-rank updates become part of the weights: `mixformer merge FOLDER OUTPUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixformer.checkpoint import from_pretrained, save_pretrained
from mixformer.data.processor import PROCESSOR_FILE, load_processor
from mixformer.hooks import did_you_mean
from mixformer.model import BaseModel
from mixformer.peft import _loras as loras
from mixformer.peft import save_adapter
from mixformer.sites import Linear, all_sites


@dataclass(frozen=True)
class Merged:
    """A LoRA mixin that became part of the weights.

    Attributes:
        name: what it was called, or its path in a nested model.
        linears: how many Linears, or named parts of them, it had updates of.
        parameters: how many it had.
    """

    name: str
    linears: int
    parameters: int

    def __str__(self) -> str:
        return f"merged {self.name}: {self.parameters:,} parameters into {self.linears} Linears"


@torch.no_grad()
def merge_loras(model: BaseModel, names: Sequence[str] | None = None) -> list[Merged]:
    """Add the updates of LoRA mixins to the weights for good, and take the mixins out.

    Sums are made in the wider of both dtypes and rounded to that of the weight. Unlike `LoRAMixin.merge`, it keeps no
    originals, so it takes no memory.

    Args:
        model: changed in place.
        names: of the mixins, or their paths such as `image.tower/lora`; None for all.

    Raises:
        ValueError: no such mixin, none at all, or a quantised weight below one; the model is left as it was.
    """
    known = dict(loras(model))
    for name in names or ():
        if name not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"There is no LoRA mixin '{name}'.{did_you_mean(name, list(known))} There are: {there}.")
    if not known:
        raise ValueError("The model has no LoRA mixin, so there is nothing to merge.")
    parts = {}  # of all, before one is changed: a quantised weight refuses
    for name in known if names is None else dict.fromkeys(names):
        mixin, owner = known[name]
        sites = [(layer, site) for layer, site in all_sites(owner) if isinstance(site.module, Linear)]
        parts[name] = [
            (site.module.weight, adapter)
            for layer, site in sites for adapter in mixin.adapters_of(site, layer).values()
        ]
    found = []
    for name, pairs in parts.items():
        mixin, number, size = known[name][0], len(pairs), 0
        for weight, adapter in pairs:
            if not mixin.merged:
                adapter.add_to(weight)
            size += sum(parameter.numel() for parameter in adapter.parameters())
        mixin.merged = False  # the sums are the model's own now, so taking the mixin out must not undo them
        model.del_mixin(name)
        found.append(Merged(name, number, size))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mixformer merge`."""
    parser.add_argument("folder", help="a checkpoint with LoRA mixins")
    parser.add_argument("output", help="folder of the merged checkpoint; an older one there is replaced")
    parser.add_argument(
        "--mixin", action="append", metavar="NAME", help="merge this one only, such as lora or image.tower/lora; may "
        "be repeated",
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="FOLDER", help="write the updates as a PEFT adapter as well")
    parser.add_argument(
        "--whole", action="append", default=[], metavar="SELECTOR", help="parameters that were trained as they are and "
        "go with the adapter, such as image.projector.mlp; may be repeated",
    )  # fmt: skip
    parser.add_argument("--base", metavar="NAME", help="weights that the adapter says it is for, a folder or hub name")
    parser.add_argument("--format", choices=("own", "hf"), default="own", help="of the output (default: own)")
    parser.add_argument("--trust", action="store_true", help="import classes of yours that the checkpoint names")


def merge_command(options: argparse.Namespace) -> None:
    """Merge, save, and say what was done.

    Raises:
        ValueError: a folder that cannot be read, the same one twice, no such mixin, or an adapter or format that cannot
            hold what the model has; no output is written then.
    """
    for name, meaning in (("base", "what the adapter is for"), ("whole", "what goes with the adapter")):
        if getattr(options, name) and options.adapter is None:
            raise ValueError(f"--{name} is {meaning}: give --adapter FOLDER as well.")
    folder = Path(options.folder)
    targets = [Path(target).resolve() for target in (options.output, options.adapter) if target is not None]
    if len({folder.resolve(), *targets}) <= len(targets):
        raise ValueError(f"{folder} stays as it is: name other folders for what is written, each its own.")
    model = from_pretrained(folder, trust=options.trust)
    processor = load_processor(folder) if (folder / PROCESSOR_FILE).is_file() else None
    if options.adapter is not None:
        save_adapter(model, options.adapter, options.mixin, options.base, options.whole)
        print(f"saved {options.adapter}")
    for merged in merge_loras(model, options.mixin):
        print(merged)
    save_pretrained(model, options.output, options.format, processor)
    print(f"saved {options.output}")
