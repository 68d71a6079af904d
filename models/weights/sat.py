"""SwissArmyTransformer folders: LLaMA, CogVLM, CogVLM2 and CogAgent; read, with model-parallel ranks merged."""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.cogagent import CogAgent
from models.cogvlm import CogVLM
from models.llama import LLaMA
from models.weights import cogagent, cogvlm
from models.weights.eva2_clip import L_ROPE_TABLES
from models.weights.rules import Format, Rule, Shape, Shapes, frequencies, rules_of, with_bias

TOP = {
    "transformer.word_embeddings.weight": "transformer.word_embeddings.weight",
    "transformer.final_norm.weight": "transformer.final_layernorm.weight",
}
HEAD = {"mixins.head.linear.weight": "mixins.lm.lm_head.weight"}
LAYER = {
    "attention_norm.weight": "transformer.layers.{i}.input_layernorm.weight",
    "attention.qkv.weight": "transformer.layers.{i}.attention.query_key_value.weight",
    "attention.dense.weight": "transformer.layers.{i}.attention.dense.weight",
    "mlp_norm.weight": "transformer.layers.{i}.post_attention_layernorm.weight",
    "mlp.up.weight": "transformer.layers.{i}.mlp.dense_h_to_4h.weight",
    "mlp.down.weight": "transformer.layers.{i}.mlp.dense_4h_to_h.weight",
}
GATE = "mlp.gate.weight"
GATES = ("mixins.mlp.gate_proj.{i}.weight", "transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight")
FREQUENCIES = ("mixins.rotary.rotary_emb.inv_freq", "transformer.position_embeddings.inv_freq")
EXPERT = {
    "mixins.vision_expert.qkv.weight": "mixins.rotary.vision_query_key_value_list.{i}.weight",
    "mixins.vision_expert.dense.weight": "mixins.rotary.vision_dense_list.{i}.weight",
    "mixins.vision_expert_mlp.gate.weight": "mixins.mlp.vision_gate_proj.{i}.weight",
    "mixins.vision_expert_mlp.up.weight": "mixins.mlp.vision_dense_h_to_4h_list.{i}.weight",
    "mixins.vision_expert_mlp.down.weight": "mixins.mlp.vision_dense_4h_to_h_list.{i}.weight",
}
EXPERT_BIAS = {"mixins.vision_expert.qkv.bias": "mixins.rotary.vision_query_key_value_list.{i}.bias"}
CROSS = {
    "mixins.cross.norm.weight": "transformer.layers.{i}.post_cross_attention_layernorm.weight",
    "mixins.cross.query.weight": "transformer.layers.{i}.cross_attention.query.weight",
    "mixins.cross.key_value.weight": "transformer.layers.{i}.cross_attention.key_value.weight",
    "mixins.cross.dense.weight": "transformer.layers.{i}.cross_attention.dense.weight",
}
TOWER = {
    "transformer.position_embeddings.weight": "transformer.position_embeddings.weight",
    **with_bias({"mixins.patches.conv": "mixins.patch_embedding.proj"}),
}
TOWER_LAYER = with_bias({
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
})
EVA, ENCODER = "mixins.eva.", "mixins.encoder."

# how model-parallel ranks split a tensor: "q;k;v" and "k;v" inside each of these row blocks, "rows", or "columns";
# what no pattern names is the same on every rank
_EVA_OR_LM = r"(mixins\.eva\.vit_model\.)?transformer\.layers\.\d+\."
SPLITS = {
    _EVA_OR_LM + r"attention\.query_key_value\.(weight|bias)": "q;k;v",
    r"mixins\.rotary\.vision_query_key_value_list\.\d+\.(weight|bias)": "q;k;v",
    r"transformer\.layers\.\d+\.cross_attention\.key_value\.(weight|bias)": "k;v",
    r"transformer\.layers\.\d+\.cross_attention\.query\.(weight|bias)": "rows",
    _EVA_OR_LM + r"mlp\.dense_h_to_4h(_gate)?\.(weight|bias)": "rows",
    r"mixins\.mlp\.(gate_proj|vision_gate_proj|vision_dense_h_to_4h_list)\.\d+\.(weight|bias)": "rows",
    r"mixins\.lm\.lm_head\.weight": "vocabulary",
    r"transformer\.word_embeddings\.weight": "vocabulary",
    _EVA_OR_LM + r"(attention|cross_attention)\.dense\.weight": "columns",
    _EVA_OR_LM + r"mlp\.dense_4h_to_h\.weight": "columns",
    r"mixins\.rotary\.vision_dense_list\.\d+\.weight": "columns",
    r"mixins\.mlp\.vision_dense_4h_to_h_list\.\d+\.weight": "columns",
}


class SATFolder:
    """The tensors of `{latest}/mp_rank_*_model_states.pt`, model-parallel ranks merged.

    Args:
        folder: with `latest` and the iteration's folder.
        config: content of `model_config.json`.

    Raises:
        ValueError: a missing or damaged file, a pickle that holds more than data, ranks that do not fit each other.
    """

    gives_own = False

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.where = str(folder)
        self._config = config
        self._ranks = [_module(path) for path in rank_files(folder)]
        first = self._ranks[0]
        for number, rank in enumerate(self._ranks[1:], start=1):
            other = sorted(set(rank) ^ set(first))
            if other:
                raise ValueError(
                    f"{folder}: '{other[0]}' is on rank 0 or rank {number}, but not on both. The mp_rank files do not "
                    f"belong together: fetch them again."
                )
        lora = _unmerged_lora(first)
        if lora:
            raise ValueError(
                f"{folder} holds un-merged SAT LoRA weights, such as '{lora}'. Merge them where the checkpoint was "
                f"trained (model.get_mixin('lora').merge_lora(), then save it), and read the result."
            )
        self.shapes: dict[str, Shape] = {name: self._merged_shape(name) for name in first}
        self.num_bytes = sum(tensor.nbytes for rank in self._ranks for tensor in rank.values())

    def _kind(self, name: str) -> str:
        if len(self._ranks) == 1:
            return ""
        kind = next((kind for pattern, kind in SPLITS.items() if re.fullmatch(pattern, name)), "")
        if kind == "vocabulary":  # SAT keeps small vocabularies whole
            whole = self._ranks[0][name].shape[0] == self._config.get("vocab_size")
            return "" if whole else "rows"
        return kind

    def _merged_shape(self, name: str) -> Shape:
        shapes = [tuple(rank[name].shape) for rank in self._ranks]
        kind = self._kind(name)
        if not kind:
            return shapes[0]
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
                blocks = [piece.split(self._blocks(name, kind, len(piece))) for piece in pieces]
                return torch.cat([torch.cat(block) for block in zip(*blocks, strict=True)])
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

    def _blocks(self, name: str, kind: str, height: int) -> list[int]:
        heads, kv_heads = self._config.get("num_attention_heads"), self._config.get("num_multi_query_heads")
        if kind == "q;k;v" and kv_heads and not name.startswith(EVA):
            kv = height * kv_heads // (heads + 2 * kv_heads)
            return [height - 2 * kv, kv, kv]
        parts = len(kind.split(";"))
        return [height // parts] * parts

    def close(self) -> None:
        """Let go of the files."""
        self._ranks = []


def rank_files(folder: Path) -> list[Path]:
    """The mp_rank files of the checkpoint that `latest` names.

    Raises:
        ValueError: there are none, or one is missing.
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder} has no file 'latest' that names the iteration. Write its folder's name into one.")
    home = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
    if home.parent != folder or not home.is_dir():
        raise ValueError(f"{latest} names '{home.name}', but {folder} has no such folder. Fetch it.")
    found = {}
    for path in home.glob("mp_rank_*_model_states.pt"):
        match = re.fullmatch(r"mp_rank_(\d+)_model_states\.pt", path.name)
        if match:
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


def _unmerged_lora(names: Any) -> str | None:
    marks = (".original.weight", ".matrix_A.", ".matrix_B.")
    return next((name for name in names if any(mark in name for mark in marks)), None)


def language_rules(config: Any) -> list[Rule]:
    """Key table of the language model, in both dialects: gate and frequencies in mixins (old) or in the backbone."""
    found = rules_of(TOP) + ([] if config.tied_head else rules_of(HEAD))
    for i in range(config.num_layers):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in LAYER.items()}, f"transformer.layers.{i}.")
        found.append(Rule(f"transformer.layers.{i}.{GATE}", tuple(name.format(i=i) for name in GATES), copies=True))
    return found


def cogvlm_rules(config: Any) -> list[Rule]:
    """Key table of CogVLM and CogVLM2."""
    found = language_rules(config) + cogvlm.projector_rules(config, EVA)
    found.append(Rule("mixins.rotary.inv_freq", FREQUENCIES, copies=True, default=frequencies))
    expert = {**EXPERT, **(EXPERT_BIAS if config.expert_qkv_bias else {})}
    for i in cogvlm.expert_layers(config):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in expert.items()}, f"transformer.layers.{i}.")
    own, foreign = "mixins.image.tower.", f"{EVA}vit_model."
    found.append(Rule(f"{own}mixins.patches.cls", (f"{foreign}transformer.word_embeddings.weight",), leading=1))
    found += rules_of(TOWER, own, foreign)
    for i in range(config.vision.num_layers):
        found += rules_of(TOWER_LAYER, f"{own}transformer.layers.{i}.", f"{foreign}transformer.layers.{i}.")
    return found


def cogagent_rules(config: Any) -> list[Rule]:
    """Key table of CogAgent."""
    found = cogvlm_rules(config) + cogagent.tower_rules(config, ENCODER)
    for i in cogagent.cross_layers(config):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in CROSS.items()}, f"transformer.layers.{i}.")
    return found


def read_llama(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `LLaMAConfig` from model_config.json; it records what differs from SAT's defaults only.

    Raises:
        ValueError: biases in the Linears, which this family does not have.
    """
    if config.get("use_bias", True):
        raise ValueError("its Linears have biases ('use_bias' is not false), which no LLaMA has.")
    heads, kv_heads = config["num_attention_heads"], config.get("num_multi_query_heads")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads in (None, 0, heads) else kv_heads,
        "inner_hidden_size": config.get("inner_hidden_size"),
        "norm_eps": config.get("layernorm_epsilon", 1e-5),
        "max_positions": config.get("max_sequence_length", 2048),
        "rope_base": float(config.get("rope_theta", cogvlm.BASES[2 if kv_heads else 1])),
    }


def read_cogvlm(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogVLMConfig` from model_config.json and the shapes in the weights."""
    options, eva = read_llama(config, shapes), config["eva_args"]
    sizes = eva["image_size"]
    inner = options["inner_hidden_size"] or 4 * options["hidden_size"]
    return {
        **options,
        "vision": {
            "hidden_size": eva["hidden_size"],
            "num_layers": eva["num_layers"],
            "num_heads": eva["num_attention_heads"],
            "inner_hidden_size": eva.get("inner_hidden_size"),
            "image_size": sizes[0] if isinstance(sizes, list) else sizes,
            "patch_size": eva.get("patch_size", 14),
            "in_channels": eva.get("in_channels", 3),
            "norm_eps": eva.get("layernorm_epsilon", 1e-5),
        },
        "adapter": cogvlm.projector_options(shapes, EVA, inner),
        "expert_qkv_bias": any(re.fullmatch(r".*vision_query_key_value_list\.\d+\.bias", name) for name in shapes),
    }


def read_cogagent(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogAgentConfig` from model_config.json and the shapes in the weights."""
    options, decoders = read_cogvlm(config, shapes), config.get("is_decoder", True)
    layers = [i for i, crosses in enumerate(decoders) if crosses] if isinstance(decoders, list) else []
    query = f"transformer.layers.{layers[0] if layers else 0}.cross_attention.query.weight"
    cross = cogagent.cross_options(shapes, ENCODER, query, config.get("cross_image_pix", 1120))
    return {**options, **cross, "cross_layers": None if len(layers) in (0, options["num_layers"]) else layers}


def _is(*names: str) -> Any:
    return lambda config: str(config.get("model_class", "")).rpartition(".")[2] in names


FORMATS = [
    Format("sat-llama", LLaMA, _is("LLaMAModel", "RotaryLLaMAModel"), read_llama, language_rules, ignored=FREQUENCIES),
    Format(
        "sat-cogvlm", CogVLM, _is("CogVLMModel", "FineTuneTrainCogVLMModel", "FineTuneTestCogVLMModel"),
        read_cogvlm, cogvlm_rules, aliases=cogvlm.HF.aliases,
    ),
    Format(
        "sat-cogagent", CogAgent, _is("CogAgentModel", "FineTuneTrainCogAgentModel", "FineTuneTestCogAgentModel"),
        read_cogagent, cogagent_rules, ignored=(rf"mixins\.encoder\.vit\.model\.{L_ROPE_TABLES}",),
        aliases=cogagent.HF.aliases, finish=cogagent.finish,
    ),
]
