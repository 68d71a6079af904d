"""Measure every system against its reference and write docs/zoo.md: python -m tests.zoo [--print]"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from tests.zoo.harness import FAMILIES, ROOT, TOLERANCE, System, systems

PAGE = ROOT / "docs" / "zoo.md"
TITLES = {
    "base": "Language bases", "tower": "Towers", "learned prefix": "Learned prefix of a language model",
    "splice": "Splice", "joint": "Joint training",
}
INTRODUCTION = f"""# The zoo

Every system here is a short list of mixins on the one backbone. This page is made from the code: `python -m tests.zoo`
builds each system, counts it, and runs it beside its reference; `tests/zoo/` has one file a system that says how.

- *Lines* are those of the file that composes the system, comments and all.
- *Parameters* are counted on the meta device and compared with the number of the source given below each table.
- *Difference* is the largest absolute one of all outputs compared, in fp32, at a tiny size at which every parameter was
  moved away from its initial value. Tests allow {TOLERANCE:.0e}; what was compared is said in `tests/zoo/`.
- *Trained* are the stages of the paper (`trains: NAME` in a stage of a configuration file) as patterns over parameter
  names; `-` marks what stays frozen.

Run any of them at its tiny size, or describe a published one:

    python -m models.llava --config examples/zoo/llava/tiny.yaml --job train
    python -m models.llava --config examples/zoo/llava/tiny.yaml --weights runs/llava-tiny \\
        --image examples/zoo/shapes/0001.png --prompt "What is this?"
    python -m models.llava --job describe
"""


def composition(model: Any) -> str:
    """The mixins of a model in order, with what nested models are made of."""
    if not model.mixins:
        return "the backbone alone"
    parts = []
    for name, mixin in model.mixins.items():
        inside = [f"{type(child).__name__}: {composition(child)}" for child in _models_of(mixin)]
        inside += [type(child).__name__ for key, child in mixin.named_children() if key == "projector"]
        parts.append(f"`{name}` {type(mixin).__name__}" + (f" ({'; '.join(inside)})" if inside else ""))
    return ", ".join(parts)


def _models_of(mixin: Any) -> list[Any]:
    return [child for child in mixin.children() if hasattr(child, "has_own_sites")]


def trained(system: System) -> str:
    """The stages of a system in one cell."""
    stages = [
        f"{name}: {', '.join([f'`{p}`' for p in part.trainable] + [f'-`{p}`' for p in part.frozen])}"
        for name, part in system.model_class.stages.items()
    ]
    return "; ".join(stages)


def page(difference: Callable[[System], str], found: list[System] | None = None) -> str:
    """The whole page; `difference` gives the last column."""
    found = systems() if found is None else found
    lines = [INTRODUCTION]
    for family in FAMILIES:
        members = [system for system in found if system.family == family]
        lines += [f"## {TITLES[family]}", ""]
        lines += ["| system | lines | parameters | loss | reference | difference |", "|---|---|---|---|---|---|"]
        for system in members:
            sizes = "<br>".join(f"{name} {size.parameters:,}" for name, size in system.sizes.items())
            count = len(system.model_file.read_text(encoding="utf-8").splitlines())
            file = f"[{system.name}](../{system.model_file.relative_to(ROOT).as_posix()}) ({system.paper})"
            cells = [file, str(count), sizes, system.loss, system.reference, difference(system)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        for system in members:
            lines.append(f"- **{system.name}**: {composition(system.build_tiny())}. Trained: {trained(system)}.")
            sources = dict.fromkeys(f"{size.source}" for size in system.sizes.values())
            lines += [f"  Numbers of parameters: {'; '.join(sources)}."] if sources else []
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def measured(system: System) -> str:
    """The worst difference, measured now.

    Raises:
        AssertionError: it is above the tolerance.
    """
    worst = max(system.parity().values())
    assert worst <= TOLERANCE, f"{system.name}: {worst:.1e}"
    return f"{worst:.1e}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    options = parser.parse_args()
    found = systems()
    with tqdm(total=len(found)) as bar:

        def difference(system: System) -> str:
            bar.set_description(system.key)
            text = measured(system)
            bar.update()
            return text

        text = page(difference, found)
    if options.print:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
