"""Named prompt templates, as the released models spell them.

A family is one code base's spelling: ``hf-cogvlm``, ``hf-cogvlm2`` and ``hf-cogagent`` (Hugging Face remote
code), ``sat`` (the SwissArmyTransformer repositories) and ``llama`` (text only). A template is data: what
opens the prompt, how a past turn and the current one read, and what comes before the answer. A new template
is a new row.

Sources: the remote code of CogVLM, CogVLM2 and CogAgent, and the text processors of THUDM/CogVLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Turn = tuple[str, str]
"""A past question and its answer."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written down for a model.

    Attributes:
        opening: text before the first question.
        past: one past turn, with ``{query}`` and ``{answer}``; None if past turns are left out.
        current: the question to answer, with ``{query}``.
        separator: what the last occurrence of which the answer follows, in the text of prompt and answer
            together.
    """

    opening: str
    past: str | None
    current: str
    separator: str

    def render(self, query: str, history: Sequence[Turn] = ()) -> str:
        """Write `query` down after the turns of `history`."""
        turns = [] if self.past is None else [self.past.format(query=q, answer=a) for q, a in history]
        return self.opening + "".join(turns) + self.current.format(query=query)


@dataclass(frozen=True)
class Family:
    """The templates of one code base.

    Attributes:
        templates: by name.
        default: the template used where a checkpoint names none.
        image_slot: text that marks the place of an image and is not tokenised; None where images always come
            first.
    """

    templates: Mapping[str, Template]
    default: str
    image_slot: str | None = None


_BASE = Template("", None, "{query}", "<unk>")
_INSTRUCTION = Template(" [INST] ", "{query} [/INST] {answer} [INST] ", "{query} [/INST] ", "[/INST]")
_VICUNA = Template(
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
    "USER: {query} ASSISTANT: {answer}\n",
    "USER: {query} ASSISTANT:",
    " ASSISTANT:",
)


def _question(label: str, opening: str = "Question: ", history: bool = True) -> Template:
    past = f"{{query}} {label} {{answer}}\nQuestion: " if history else None
    return Template(opening, past, f"{{query}} {label}", f" {label}")


_COGVLM = {"base": _BASE, "chat": _question("Answer:"), "vqa": _question("Short answer:"), "vicuna": _VICUNA}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "hf-cogvlm": Family(_COGVLM, "chat"),
        "hf-cogvlm2": Family(_COGVLM, "chat"),
        # This code writes <EOI> into two of its prompts and tokenises it like any other characters.
        "hf-cogagent": Family(
            {
                "base": _BASE,
                "chat": _INSTRUCTION,
                "chat_old": _question("Answer:", opening="<EOI>Question: "),
                "vqa": _question("Short answer:", opening="<EOI>Question: ", history=False),
            },
            "chat",
        ),
        "sat": Family(
            {
                "base": _BASE,
                "chat": _INSTRUCTION,
                "chat_old": _question("Answer:"),
                "vqa": _question("Short answer:", history=False),
            },
            "chat",
            image_slot="<EOI>",
        ),
        "llama": Family({"base": _BASE, "vicuna": _VICUNA}, "base"),
    }
)


def get_family(name: str) -> Family:
    """Look a family up.

    Raises:
        ValueError: no family of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"no prompt family {name!r}: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def get_template(family: str, name: str | None = None) -> Template:
    """Look a template up; without a name, the family's default.

    Raises:
        ValueError: no family or no template of that name.
    """
    templates = get_family(family).templates
    name = get_family(family).default if name is None else name
    if name not in templates:
        raise ValueError(f"family {family!r} has no template {name!r}: choose one of {', '.join(templates)}")
    return templates[name]


def render_prompt(
    query: str,
    template: str | None = None,
    family: str = "hf-cogvlm",
    history: Sequence[Turn] = (),
    num_images: int = 0,
) -> str:
    """Write a prompt down, before tokenising.

    Args:
        query: the question. In a family with image slots it may hold its own (``<EOI>``); otherwise all slots
            open the prompt.
        template: name of the template; None for the family's default.
        family: whose spelling.
        history: past questions and answers, oldest first.
        num_images: how many images belong to the prompt.

    Returns:
        The text. Image slots appear in it only in families that have them.

    Raises:
        ValueError: unknown names, or explicit slots that differ in number from the images.
    """
    text = get_template(family, template).render(query, history)
    slot = get_family(family).image_slot
    if slot is None:
        return text
    if slot not in text:
        return slot * num_images + text
    if text.count(slot) != num_images:
        raise ValueError(
            f"the prompt marks {text.count(slot)} image place(s) with {slot} but comes with {num_images} "
            f"image(s): write {slot} once per image, or leave it out to put all images first"
        )
    return text


def extract_answer(text: str, template: str | None = None, family: str = "hf-cogvlm", end: str = "</s>") -> str:
    """Take the answer out of a model's text, which may repeat the prompt.

    Args:
        text: what was generated, with or without the prompt before it.
        template: name of the template of the prompt; None for the family's default.
        family: whose spelling.
        end: written-out end token; the answer stops there.

    Returns:
        What follows the last separator of the template, up to `end`, without spaces around it. The base
        template has no separator that ordinary text contains, so there a repeated prompt stays.
    """
    return text.rpartition(get_template(family, template).separator)[2].split(end)[0].strip()
