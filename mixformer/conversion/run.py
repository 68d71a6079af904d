"""Checkpoints from one format to another, tensor by tensor: the model is never in memory.

    convert("cogagent-chat-sat", "cogagent-chat-hf", "hf", verify=True)

Everything is known before a byte is read: which tensors the target holds, how large they are, and whether the format
has a place for all of them. The target is written beside its place and takes it when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from mixformer.checkpoint import replacing, set_source, source_of
from mixformer.config import split_overrides
from mixformer.contents import Contents, Part, foreign_contents, own_contents
from mixformer.conversion.beside import files_beside, write_beside
from mixformer.conversion.opened import Opened, retype
from mixformer.conversion.target import check_fresh, check_places, in_words, lacking_space, leftovers, told
from mixformer.conversion.updates import Merged, updates_of, without_lora
from mixformer.filling import PROGRESS_FROM, find_dtype, slots_of
from mixformer.model import BaseModel
from mixformer.shard_writer import bytes_of, plan_shards, write_shards

if TYPE_CHECKING:
    from models.weights import Rule

FORMATS = ("own", "hf", "sat")


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        source, source_format, target, target_format: the folders and their formats.
        tensors, bytes: number and size of the tensors in the target's files.
        files: of weights.
        beside: files that went along.
        verified: whether every tensor was read back and compared.
        notes: what a reader should know, such as why there is no processor.
    """

    source: str
    source_format: str
    target: str
    target_format: str
    tensors: int
    bytes: int
    files: list[str]
    beside: list[str] = field(default_factory=list)
    verified: bool = False
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str = "own",
    *,
    parts: int = 1,
    lora: str = "keep",
    lora_alpha: float = 1.0,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    processor: str | os.PathLike[str] | None = None,
    verify: bool = False,
    overrides: Mapping[str, Any] | None = None,
    mixins: Mapping[str, type] | None = None,
    trust: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a checkpoint in another format, or in the same one with another dtype, size of shards or number of parts.

    Args:
        source: folder of a checkpoint; it is only read.
        target: a new or empty folder.
        format: `own`, `hf` or `sat`, as far as the model has it.
        parts: model-parallel ranks of a SAT target.
        lora: `keep` LoRA updates, where the format holds them, or `merge` them into the weights.
        lora_alpha: as SAT's `LoraMixin` was given it, or will be; its files do not record it.
        dtype: of floating-point tensors; None keeps each one's.
        max_shard_size: such as "5GB"; SAT has a file per rank.
        processor: a folder with the tokenizer, or with a whole processor, that goes with the target.
        verify: read every tensor back and compare it before the target takes its place.
        overrides: constants that the source's format lacks; see `from_pretrained`.
        mixins: classes outside `mixformer` and `models`; see `from_pretrained`.
        trust: import such classes; see `from_pretrained`.
        dry_run: check and count, and write nothing.

    Raises:
        ValueError: the source is damaged or does not fit its config, the target exists, or its format has no place for
            what the source holds; nothing is written then.
        OSError: the disk is or becomes full; nothing is left of the target.
    """
    folder, goal, wanted = Path(source).resolve(), Path(target).resolve(), find_dtype(dtype)
    _check_options(format, parts, lora, wanted)
    check_places(folder, goal)
    with Opened(folder, overrides, mixins, trust, verify=not dry_run, lora_alpha=lora_alpha) as opened:
        reading = _Reading(opened, wanted, lora == "merge")
        contents = _contents(opened.model, format, parts, lora_alpha)
        tensors = contents.tensors(reading.shape)
        shared = _shared(contents) if contents.kind == "sat" else {}
        home = getattr(opened, "iteration", "release")
        ranks = [f"{home}/mp_rank_{rank:02d}_model_states.pt" for rank in range(parts)]
        size = sum(tensor.nbytes for name, tensor in tensors.items() if name not in shared)
        report = Report(
            str(source), opened.format, str(target), contents.format, len(tensors), size,
            ranks if contents.kind == "sat" else list(plan_shards(tensors, max_shard_size)), notes=leftovers(goal),
        )
        beside = files_beside(folder)
        room = lacking_space(goal, size + sum(path.stat().st_size for path in beside))
        if dry_run:
            report.notes += room
            return report
        if room:
            raise OSError(" ".join([*room, "Nothing was written.", *report.notes]))
        with told(folder, goal), replacing(goal) as new:
            report.notes += write_beside(folder, new, beside, processor, contents.kind)
            report.beside = sorted(path.name for path in new.iterdir())
            with _bar(size, "Converting") as bar:
                if contents.kind == "sat":
                    from models.weights.sat_writer import write_ranks

                    write_ranks(new / home, tensors, _Getter(contents, reading), contents.config, shared, bar.update)
                    (new / "latest").write_text(f"{home}\n", encoding="utf-8")
                else:
                    get = _Getter(contents, reading)
                    write_shards(new, tensors, max_shard_size, contents.kind == "own", get, bar.update)
            contents.write_config(new)
            if verify:
                again = Opened(new, None if contents.kind == "own" else overrides, mixins, trust, lora_alpha=lora_alpha)
                with again, _bar(size, "Verifying") as bar:
                    _compare(again, contents, reading, bar.update)
                report.verified = True
            opened.close()
            check_fresh(goal)
    return report


class _Reading:
    """The tensors of an opened checkpoint by the rules of the target, with LoRA merged and dtypes converted.

    The last one is kept, because its parts follow each other in a file.
    """

    def __init__(self, opened: Opened, dtype: torch.dtype | None, merge: bool) -> None:
        self._model, self._dtype = opened.model, dtype
        self.slots = slots_of(opened.model)
        if dtype is not None:
            for slots in self.slots.values():
                if slots[0][2].is_floating_point():
                    retype(slots, dtype)
            self.slots = slots_of(opened.model)
            kept = source_of(opened.model)
            set_source(opened.model, None if kept is None else replace(kept, dtype=""))
        self._read: Callable[[str], torch.Tensor] = lambda own: opened.read(own, dtype)
        if merge:
            self._read = Merged(opened.model, self._read)
        self._last: tuple[str, torch.Tensor] | None = None

    def shape(self, rule: Rule) -> torch.Tensor:
        """Ours, on the meta device."""
        if rule.own in self.slots:
            return self.slots[rule.own][0][2].detach()
        return self(rule).to("meta")

    def __call__(self, rule: Rule) -> torch.Tensor:
        """Ours, whole."""
        if self._last is not None and self._last[0] == rule.own:
            return self._last[1]
        self._last = None
        if rule.own in self.slots:
            tensor = self._read(rule.own)
            if self._dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._dtype)
        else:
            assert rule.default is not None, rule.own
            tensor = rule.default(self._model)
        self._last = rule.own, tensor
        return tensor


@dataclass(frozen=True)
class _Getter:
    """Gives the tensors of a target's files by their names."""

    contents: Contents
    reading: _Reading

    def __call__(self, name: str) -> torch.Tensor:
        return self.contents.parts[name].tensor(self.reading)


def _contents(model: BaseModel, format: str, parts: int, lora_alpha: float) -> Contents:
    """What the target holds."""
    from models.weights import HF_FORMATS, SAT_FORMATS
    from models.weights.sat import for_ranks
    from models.weights.sat_lora import lora_rules

    if format == "own":
        return own_contents(model)
    updates = updates_of(model)
    if updates and (format == "hf" or parts > 1):
        why = "HF's formats hold none" if format == "hf" else "SAT does not sum un-merged updates over several parts"
        raise ValueError(
            f"There is a LoRA ('{updates[0].mixin}'), and {why}. Merge it into the weights: --lora merge. Or keep it "
            f"apart: --format own, or mixformer.peft.save_adapter."
        )
    if format == "hf":
        return foreign_contents(model, HF_FORMATS, "HF")
    without_lora(model)
    contents = foreign_contents(model, SAT_FORMATS, "SAT")
    contents = replace(contents, config=for_ranks(contents.config, parts))
    if not updates:
        return contents
    found = next(found for found in SAT_FORMATS if found.name == contents.format)
    rules, adapted = lora_rules(updates, found.rules(model.config), lora_alpha)
    named = {}
    for name, part in contents.parts.items():
        module, _, kind = name.rpartition(".")
        named[f"{module}.original.{kind}" if module in adapted else name] = part
    named.update({rule.foreign[0]: Part(rule.foreign[0], rule) for rule in rules})
    return replace(contents, parts=named)


def _shared(contents: Contents) -> dict[str, str]:
    """{name: name of an equal tensor before it}, for copies of one tensor."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, part in contents.parts.items():
        if part.carried is not None:
            content = hashlib.sha256(bytes_of(part.carried)).digest()
            key: Any = (tuple(part.carried.shape), part.carried.dtype, content)
        else:
            assert part.rule is not None
            key = part.rule.own if part.rule.copies else name
        if first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def _compare(again: Opened, contents: Contents, reading: _Reading, progress: Callable[[int], Any]) -> None:
    """Compare what was written with what it was made of, bit for bit.

    Raises:
        ValueError: a tensor differs, is missing, or is one too many.
    """
    stored = {_plain(name): name for name in contents.parts}
    files = getattr(again.weights, "names", {name: name for name in again.weights.shapes})
    odd = sorted(set(map(_plain, files.values())) ^ set(stored))
    if odd:
        raise ValueError(f"Verifying failed: '{odd[0]}' is not both in the plan and in the files that were written.")
    for name, file_name in files.items():
        part = contents.parts[stored[_plain(file_name)]]
        if part.rule is not None and part.rule.own in again.rules and part.rule.own in reading.slots:
            continue
        _check_equal(file_name, again.weights.read(name), part.tensor(reading))
    for own, rule in again.rules.items():
        if own in reading.slots:
            expected = reading(rule)
            _check_equal(own, again.read(own), expected)
            progress(expected.nbytes)
            del expected


def _plain(name: str) -> str:
    return name.replace(".original.", ".")


def _check_equal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    alike = (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if not alike or not torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (found, expected))):
        raise ValueError(
            f"Verifying failed: '{name}' was not written as it was read. Nothing was kept. The disk or the memory may "
            f"be at fault."
        )


def _check_options(format: str, parts: int, lora: str, dtype: torch.dtype | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format '{format}' is not known. Choose {', '.join(FORMATS)}.")
    if lora not in ("keep", "merge"):
        raise ValueError(f"lora is '{lora}'. Choose keep or merge.")
    if parts < 1 or (parts > 1 and format != "sat"):
        raise ValueError(f"parts is {parts}: it counts the model-parallel files of a SAT target, at least 1.")
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}. Choose float32, float16 or bfloat16; weights are quantised when loaded.")


def _bar(size: int, what: str) -> Any:
    return tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=size < PROGRESS_FROM)


# -------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `mixformer convert`."""
    parser.usage = "%(prog)s FROM TO --format own|hf|sat [options] [--constant value ...]"
    parser.description = (
        "Write a checkpoint in another format, tensor by tensor; it is never in memory as a whole. FROM is only read, "
        "TO appears when it is whole. Constants that FROM's format lacks are given by their names: --blocks_run 23."
    )
    parser.add_argument("source", metavar="FROM", help="folder of a checkpoint, of any format")
    parser.add_argument("target", metavar="TO", help="a new or empty folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of TO, as far as the model has it")
    parser.add_argument("--parts", type=int, default=1, help="model-parallel files of a SAT target (default: 1)")
    parser.add_argument(
        "--lora", choices=("keep", "merge"), default="keep", help="keep LoRA apart, or merge it into the weights"
    )
    parser.add_argument(
        "--lora-alpha", type=float, default=1.0, help="alpha of a SAT LoRA, which its files do not record (default: 1)"
    )
    parser.add_argument("--dtype", help="of floating-point tensors, such as bfloat16 (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", help="of own and HF targets (default: 5GB)")
    parser.add_argument("--processor", metavar="PATH", help="tokenizer, or folder of a processor, to put beside TO")
    parser.add_argument("--verify", action="store_true", help="read every tensor of TO back and compare it")
    parser.add_argument("--dry-run", action="store_true", help="check and count; write nothing")
    parser.add_argument("--trust", action="store_true", help="import classes that FROM names, which runs their code")
    parser.add_argument("--json", action="store_true", help="print JSON")


def convert_command(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run `mixformer convert`.

    Raises:
        ValueError: as `convert`, or an argument that is no constant of the format.
        OSError: as `convert`.
    """
    constants = {".".join(path): yaml.safe_load(text) for path, text in split_overrides(overrides)}
    report = convert(
        options.source, options.target, options.format, parts=options.parts, lora=options.lora,
        lora_alpha=options.lora_alpha, dtype=options.dtype, max_shard_size=options.max_shard_size,
        processor=options.processor, verify=options.verify, overrides=constants or None, trust=options.trust,
        dry_run=options.dry_run,
    )
    if options.json:
        print(json.dumps(asdict(report)))
        return
    files = f"{len(report.files)} file{'s' if len(report.files) > 1 else ''}"
    print(f"{report.source} ({report.source_format}) -> {report.target} ({report.target_format})")
    print(f"{report.tensors:,} tensors, {in_words(report.bytes)} in {files}", end="")
    print(", nothing written" if options.dry_run else ", verified" if report.verified else "")
    if report.beside:
        print(f"beside them: {', '.join(report.beside)}")
    for note in report.notes:
        print(note, file=sys.stderr)
