"""The tensors of SwissArmyTransformer folders: model-parallel ranks are merged when read, and split to be written."""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.weights.rules import Shape

EVA = "mixins.eva."
SPLIT_VOCABULARY = 1000
"""SAT keeps the word embedding of a smaller vocabulary whole on every rank (sat/model/transformer.py)."""

# how model-parallel ranks split a tensor: "q;k;v" and "k;v" inside each of these row blocks, "rows", or "columns";
# what no pattern names is the same on every rank
_EVA_OR_LM = r"(mixins\.eva\.vit_model\.)?transformer\.layers\.\d+\."
_SPLITS = {
    _EVA_OR_LM + r"attention\.query_key_value\.(weight|bias)": "q;k;v",
    r"mixins\.rotary\.vision_query_key_value_list\.\d+\.(weight|bias)": "q;k;v",
    r"transformer\.layers\.\d+\.cross_attention\.key_value\.(weight|bias)": "k;v",
    r"transformer\.layers\.\d+\.cross_attention\.query\.(weight|bias)": "rows",
    _EVA_OR_LM + r"mlp\.dense_h_to_4h(_gate)?\.(weight|bias)": "rows",
    r"mixins\.mlp\.(gate_proj|vision_gate_proj|vision_dense_h_to_4h_list)\.\d+\.(weight|bias)": "rows",
    r"mixins\.lm\.lm_head\.weight": "head",
    r"transformer\.word_embeddings\.weight": "vocabulary",
    _EVA_OR_LM + r"(attention|cross_attention)\.dense\.weight": "columns",
    _EVA_OR_LM + r"mlp\.dense_4h_to_h\.weight": "columns",
    r"mixins\.rotary\.vision_dense_list\.\d+\.weight": "columns",
    r"mixins\.mlp\.vision_dense_4h_to_h_list\.\d+\.weight": "columns",
}
_UPDATE = re.compile(r"(.+)\.matrix_([AB])\.\d+")


class SATFolder:
    """The tensors of `{latest}/mp_rank_*_model_states.pt`, model-parallel ranks merged.

    An un-merged LoRA (sat/model/finetune/lora2.py) has `X.original.weight`, read as `X.weight`, and for each block of
    its rows `X.matrix_A.{k}` [r, in] and `X.matrix_B.{k}` [rows, r]. On several ranks, Linears that are split by their
    inputs have an update per rank, which SAT's own merging adds to that rank's columns alone: they are read as one
    update of rank r times ranks.

    Args:
        folder: with `latest` and the iteration's folder.
        config: content of `model_config.json`.
        lora: whether an un-merged LoRA may be there.

    Attributes:
        dtypes: {name: dtype}.
        files: {name: files that hold it}, for messages.
        adapted: {X: number of its updates} of an un-merged LoRA.
        num_ranks: files that were merged.
        iteration: name of the folder they are in.

    Raises:
        ValueError: a missing or damaged file, a pickle that holds more than data, ranks that do not fit each other.
    """

    gives_own = False

    def __init__(self, folder: Path, config: dict[str, Any], lora: bool = False) -> None:
        self.where = str(folder)
        self._config = config
        paths = rank_files(folder)
        self.num_ranks, self.iteration = len(paths), paths[0].parent.name
        wanted = config.get("model_parallel_size")
        if isinstance(wanted, int) and wanted > self.num_ranks:
            raise ValueError(
                f"{paths[0].parent} lacks mp_rank_{self.num_ranks:02d}_model_states.pt: model_config.json says that "
                f"there are {wanted} ranks (model_parallel_size). Fetch it; if the ranks were merged, correct the "
                f"number to {self.num_ranks}."
            )
        self._ranks = [_plainly_named(_module(path), path) for path in paths]
        first = self._ranks[0]
        for number, rank in enumerate(self._ranks[1:], start=1):
            other = sorted(set(rank) ^ set(first))
            if other:
                raise ValueError(
                    f"{folder}: '{other[0]}' is on rank 0 or rank {number}, but not on both. The mp_rank files do not "
                    f"belong together: fetch them again."
                )
        updates = [match for name in first if (match := _UPDATE.fullmatch(name))]
        self.adapted = {match[1]: 0 for match in updates}
        for match in updates:
            self.adapted[match[1]] += match[2] == "A"
        if updates and not lora:
            raise ValueError(
                f"{folder} holds un-merged SAT LoRA weights, such as '{updates[0][0]}'. Convert it: mixformer convert "
                f"{folder} NEW_FOLDER --format own --lora keep makes a mixin of it, --lora merge adds it to the "
                f"weights, as merge_lora does in SAT."
            )
        self.shapes: dict[str, Shape] = {name: self._merged_shape(name) for name in first}
        self.dtypes = {name: tensor.dtype for name, tensor in first.items()}
        self.files = dict.fromkeys(first, f"{self.iteration}/{'mp_rank_*.pt' if self.num_ranks > 1 else paths[0].name}")
        self.num_bytes = sum(tensor.nbytes for rank in self._ranks for tensor in rank.values())

    def _kind(self, name: str) -> str:
        if self.num_ranks == 1:
            return ""
        update = _UPDATE.fullmatch(name)
        if update is not None:
            by_columns = split_of(f"{update[1]}.weight") == "columns"
            return {"A": "diagonal", "B": "columns"}[update[2]] if by_columns else {"A": "", "B": "rows"}[update[2]]
        kind = split_of(name)
        if kind in ("vocabulary", "head"):
            whole = self._ranks[0][name].shape[0] == self._config.get("vocab_size")
            return "" if whole else "rows"
        return kind

    def _merged_shape(self, name: str) -> Shape:
        shapes = [tuple(rank[name].shape) for rank in self._ranks]
        kind = self._kind(name)
        if not kind:
            return shapes[0]
        if kind == "diagonal":
            return tuple(map(sum, zip(*shapes, strict=True)))
        dimension = 1 if kind == "columns" else 0
        total = sum(shape[dimension] for shape in shapes)
        return (*shapes[0][:dimension], total, *shapes[0][dimension + 1 :])

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, in its stored dtype.

        Raises:
            ValueError: ranks that do not fit each other.
        """
        pieces = [rank[name] for rank in self._ranks]
        kind = self._kind(name)
        try:
            if kind in ("q;k;v", "k;v"):
                blocks = [piece.split(block_heights(name, kind, len(piece), self._config)) for piece in pieces]
                return torch.cat([torch.cat(block) for block in zip(*blocks, strict=True)])
            if kind == "diagonal":
                return torch.block_diag(*pieces)
            if kind:
                return torch.cat(pieces, dim=1 if kind == "columns" else 0)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces)
            raise ValueError(f"{self.where}: the ranks' pieces of '{name}' do not fit together ({shapes}).") from error
        for number, piece in enumerate(pieces[1:], start=1):
            if not torch.equal(pieces[0], piece):
                raise ValueError(
                    f"{self.where}: '{name}' should be the same on every rank, but rank {number} differs from rank 0. "
                    f"The mp_rank files do not belong together: fetch them again."
                )
        return pieces[0]

    def close(self) -> None:
        """Let go of the files."""
        self._ranks = []


def split_of(name: str) -> str:
    """How ranks split a tensor: `q;k;v`, `k;v`, `rows`, `columns`, `head`, `vocabulary`, or empty: not at all."""
    return next((kind for pattern, kind in _SPLITS.items() if re.fullmatch(pattern, name)), "")


def block_heights(name: str, kind: str, height: int, config: dict[str, Any]) -> list[int]:
    """Heights of the row blocks of a fused projection [height, ...], whole or a rank's piece."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_multi_query_heads")
    if kind == "q;k;v" and heads and kv_heads and not name.startswith(EVA):
        kv = height * kv_heads // (heads + 2 * kv_heads)
        return [height - 2 * kv, kv, kv]
    parts = len(kind.split(";"))
    return [height // parts] * parts


def pieces_of(tensor: torch.Tensor, name: str, num_ranks: int, config: dict[str, Any]) -> list[torch.Tensor]:
    """What each rank holds of a tensor; views where that is possible.

    Raises:
        ValueError: it does not divide among the ranks.
    """
    kind = split_of(name)
    if num_ranks == 1 or not kind or (kind == "vocabulary" and len(tensor) < SPLIT_VOCABULARY):
        return [tensor] * num_ranks
    if kind not in ("q;k;v", "k;v"):
        dimension = 1 if kind == "columns" else 0
        return _divided(tensor, name, num_ranks, dimension)
    blocks = tensor.split(block_heights(name, kind, len(tensor), config))
    divided = [_divided(block, name, num_ranks, 0) for block in blocks]
    return [torch.cat(piece) for piece in zip(*divided, strict=True)]


def _divided(tensor: torch.Tensor, name: str, num_ranks: int, dimension: int) -> list[torch.Tensor]:
    if tensor.shape[dimension] % num_ranks:
        raise ValueError(
            f"'{name}' has {tensor.shape[dimension]} {'columns' if dimension else 'rows'} to divide among {num_ranks} "
            f"ranks, which does not come out even. Choose another number of parts."
        )
    return list(tensor.chunk(num_ranks, dimension))


def rank_files(folder: Path) -> list[Path]:
    """The mp_rank files of the checkpoint that `latest` names.

    Raises:
        ValueError: there are none, one is missing, or one is there twice.
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder} has no file 'latest' that names the iteration. Write its folder's name into one.")
    home = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
    if home.parent != folder or not home.is_dir():
        raise ValueError(f"{latest} names '{home.name}', but {folder} has no such folder. Fetch it.")
    found: dict[int, Path] = {}
    for path in sorted(home.glob("mp_rank_*_model_states*.pt")):
        match = re.fullmatch(r"mp_rank_(\d+)_model_states(.*)\.pt", path.name)
        if match is None:
            continue
        if match[2] or int(match[1]) in found:
            first = found.get(int(match[1]), home / f"mp_rank_{int(match[1]):02d}_model_states.pt")
            raise ValueError(
                f"{home} has {path.name} beside {first.name}: one rank twice. Files of two downloads may have been "
                f"mixed; remove the one that does not belong there."
            )
        found[int(match[1])] = path
    if not found:
        zero = next(home.glob("*zero*"), None) or next(home.glob("z3_rank*"), None)
        hint = f" It has {zero.name}: a ZeRO-3 save, which SAT must merge first." if zero else ""
        raise ValueError(f"{home} has no mp_rank_*_model_states.pt.{hint} Fetch the checkpoint again.")
    missing = [number for number in range(max(found) + 1) if number not in found]
    if missing:
        raise ValueError(f"{home} lacks mp_rank_{missing[0]:02d}_model_states.pt of {max(found) + 1} ranks. Fetch it.")
    return [found[number] for number in sorted(found)]


def _module(path: Path) -> dict[str, torch.Tensor]:
    # training saves hold numpy's random state, whose arrays are rebuilt by names of numpy 1 or of numpy 2
    core = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"
    multiarray = importlib.import_module(f"{core}.multiarray")
    allowed: list[Any] = [np.ndarray, np.dtype]
    for package in ("numpy.core", "numpy._core"):
        allowed += [(getattr(multiarray, name), f"{package}.multiarray.{name}") for name in ("_reconstruct", "scalar")]
    allowed += [type(np.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8", "?")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path} is damaged: it holds no plain data ({error}). Fetch it again.") from error
        raise ValueError(
            f"{path} is refused: its pickle asks for '{found[1]}', which is not data and could run code. Save only the "
            f"tensors, under 'module', where you trust the file: torch.save({{'module': state_dict}}, path)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}). Fetch it again.") from error
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        raise ValueError(f"{path} has no tensors under 'module', as SAT saves them. Is it a model checkpoint?")
    return {name: value for name, value in module.items() if isinstance(value, torch.Tensor)}


def _plainly_named(module: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """A rank's tensors, with `X.original.weight` called `X.weight`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in module.items():
        plain = re.sub(r"\.original\.(weight|bias)$", r".\1", name)
        if plain in found:
            raise ValueError(f"{path} has '{plain}' twice, with and without a LoRA on it. Save it again.")
        found[plain] = tensor
    return found
