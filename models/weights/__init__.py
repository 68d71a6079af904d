"""Key tables of foreign checkpoint formats, both ways. One file per family; a format is an entry in a list below."""

from models.weights import (
    bert,
    clip,
    cogagent,
    cogvlm,
    eva2_clip,
    git,
    gpt2,
    idefics2,
    intern_vit,
    internvl,
    llama,
    llava,
    resnet,
    sat,
    siglip,
    visual_bert,
    vit,
)
from models.weights.eva2_clip import resize_positions
from models.weights.rules import Format, Rule, Source
from models.weights.sat import settings_from, tables
from models.weights.sat_folder import SATFolder

HF_FORMATS: list[Format] = [
    cogagent.HF, cogvlm.HF, *llama.FORMATS, gpt2.HF, bert.HF, eva2_clip.TOWER_L, eva2_clip.TOWER_E,
    clip.HF, clip.TOWER_HF, idefics2.HF, git.HF, intern_vit.HF, internvl.HF, llava.HF, resnet.HF, siglip.HF, vit.HF,
    visual_bert.HF,
]
SAT_FORMATS: list[Format] = sat.FORMATS

__all__ = [
    "HF_FORMATS", "SAT_FORMATS", "Format", "Rule", "SATFolder", "Source", "resize_positions", "settings_from", "tables",
]
