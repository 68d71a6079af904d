"""Key tables of foreign checkpoint formats, both ways. One file per family; a format is an entry in a list below."""

from models.weights import cogagent, cogvlm, eva2_clip, llama, sat
from models.weights.eva2_clip import resize_positions
from models.weights.rules import Format, Rule, Source
from models.weights.sat import SATFolder

HF_FORMATS: list[Format] = [cogagent.HF, cogvlm.HF, llama.HF, eva2_clip.TOWER_L, eva2_clip.TOWER_E]
SAT_FORMATS: list[Format] = sat.FORMATS

__all__ = ["HF_FORMATS", "SAT_FORMATS", "Format", "Rule", "SATFolder", "Source", "resize_positions"]
