"""Named prompt templates, as the released models spell them.

A family is one code base's spelling: ``hf-cogvlm``, ``hf-cogvlm2`` and ``hf-cogagent`` (Hugging Face remote
code), ``sat`` (the SwissArmyTransformer repositories), ``llama`` (text only), those of the systems that carry their
names (``llava``, ``vila``, ``mobilevlm``, ``internvl``, ``qwen-vl``, ``idefics2``), and ``caption``, an image and text
without any roles (GIT, Frozen, ClipCap, SimVLM, KOSMOS-1). A template is data: what opens the prompt, how a past turn
and the current one read, and what comes before the answer. A new template is a new row.

Sources: the remote code of CogVLM, CogVLM2 and CogAgent, and the text processors of THUDM/CogVLM; ``conversation.py``
of haotian-liu/LLaVA, Meituan-AutoML/MobileVLM and InternVL-Chat-V1-5; the tokenizer and ``finetune.py`` of Qwen-VL;
the chat templates in the Hugging Face folders of LLaVA-1.5, InternVL and Idefics2.
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
        question_lead: text before a question that does not begin with an image.
    """

    opening: str
    past: str | None
    current: str
    separator: str
    question_lead: str = ""

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
        image_line: what the first question begins with for each image whose place is not marked, with the slot and,
            where images are counted, ``{number}``; None where the slots open the prompt.
        image_open: text before the tokens of an image.
        image_close: text after them; one that equals `image_open` stands between adjacent images once.
        image_lead: what parts a word from an image before it, for tokenizers that do not begin words themselves.
        answer_lead: what parts the answer from the prompt, for such tokenizers.
        end: text of the token that ends an answer.
        end_slot: text in templates that becomes the id that ends an answer and is not tokenised.
    """

    templates: Mapping[str, Template]
    default: str
    image_slot: str | None = None
    image_line: str | None = None
    image_open: str = ""
    image_close: str = ""
    image_lead: str = ""
    answer_lead: str = ""
    end: str = "</s>"
    end_slot: str | None = None


_BASE = Template("", None, "{query}", "<unk>")
_INSTRUCTION = Template(" [INST] ", "{query} [/INST] {answer} [INST] ", "{query} [/INST] ", "[/INST]")


def _vicuna(person: str, end: str) -> Template:
    """Vicuna's roles; `end` closes a past turn."""
    return Template(
        f"A chat between a curious {person} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {person}'s questions. ",
        f"USER: {{query}} ASSISTANT: {{answer}}{end}",
        "USER: {query} ASSISTANT:",
        " ASSISTANT:",
    )


def _question(label: str, opening: str = "Question: ", history: bool = True) -> Template:
    past = f"{{query}} {label} {{answer}}\nQuestion: " if history else None
    return Template(opening, past, f"{{query}} {label}", f" {label}")


def _chatml(system: str, after: str) -> Template:
    """Roles between ``<|im_start|>`` and ``<|im_end|>``; `after` follows the latter."""
    question = f"<|im_start|>user\n{{query}}<|im_end|>{after}<|im_start|>assistant\n"
    opening = f"<|im_start|>system\n{system}<|im_end|>{after}" if system else ""
    return Template(opening, f"{question}{{answer}}<|im_end|>{after}", question, "assistant\n")


def _splice(templates: Mapping[str, Template], **options: str) -> Family:
    """A family of LLaVA's kind: ``<image>`` marks an image, and one on a line of its own opens the first question."""
    return Family(
        {"base": _BASE, **templates}, "chat", **{"image_slot": "<image>", "image_line": "<image>\n", **options}
    )


_ROLES = {"answer_lead": " ", "end_slot": "</s>"}
_CHATML = {"image_open": "<img>", "image_close": "</img>", "end": "<|im_end|>"}
_COGVLM = {
    "base": _BASE,
    "chat": _question("Answer:"),
    "vqa": _question("Short answer:"),
    "vicuna": _vicuna("user", "\n"),
}

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
        "llama": Family({"base": _BASE, "vicuna": _vicuna("user", "\n")}, "base"),
        "llava": _splice(
            {
                "chat": _vicuna("human", "</s>"),
                "vicuna": _vicuna("user", "</s>"),
                "hf": Template("", "USER: {query} ASSISTANT: {answer} ", "USER: {query} ASSISTANT:", " ASSISTANT:"),
            },
            **_ROLES,
        ),
        "vila": _splice({"chat": _vicuna("user", "</s>")}, **_ROLES),
        "mobilevlm": _splice({"chat": _vicuna("user", "</s>")}, **_ROLES),
        "internvl": _splice(
            {
                "chat": _chatml("You are an AI assistant whose name is InternLM (书生·浦语).", ""),
                "hf": _chatml("", "\n"),
            },
            **_CHATML,
        ),
        "qwen-vl": _splice(
            {"chat": _chatml("You are a helpful assistant.", "\n")},
            **{**_CHATML, "image_line": "Picture {number}: <image>\n"},
        ),
        "idefics2": _splice(
            {
                "chat": Template(
                    "",
                    "User:{query}<end_of_utterance>\nAssistant: {answer}<end_of_utterance>\n",
                    "User:{query}<end_of_utterance>\nAssistant:",
                    "\nAssistant:",
                    question_lead=" ",
                ),
            },
            image_line="<image>",
            image_open="<fake_token_around_image>",
            image_close="<fake_token_around_image>",
            image_lead=" ",
            answer_lead=" ",
            end="<end_of_utterance>",
        ),
        "caption": Family(
            {"base": _BASE, "vqa": Template("", None, "Question: {query} Answer:", " Answer:")}, "base", answer_lead=" "
        ),
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
    slots: bool = True,
) -> str:
    """Write a prompt down, before tokenising.

    Args:
        query: the question. In a family with image slots it may hold its own (``<EOI>``, ``<image>``); otherwise all
            slots open the prompt, or the first question where the family writes them there.
        template: name of the template; None for the family's default.
        family: whose spelling.
        history: past questions and answers, oldest first.
        num_images: how many images belong to the prompt.
        slots: whether places are marked at all; if not, the text is written as for a family without slots.

    Returns:
        The text. Image slots appear in it only in families that have them.

    Raises:
        ValueError: unknown names, or explicit slots that differ in number from the images.
    """
    chosen, spelling = get_template(family, template), get_family(family)
    slot = spelling.image_slot if slots else None
    questions = [question for question, _ in history] if chosen.past is not None else []
    questions.append(query)
    if slot is not None and spelling.image_line is not None and not any(slot in question for question in questions):
        lines = [spelling.image_line.replace("{number}", str(number + 1)) for number in range(num_images)]
        questions[0] = "".join(lines) + questions[0]
    marked = [slot is not None and question.startswith(slot) for question in questions]
    questions = [q if image else chosen.question_lead + q for q, image in zip(questions, marked, strict=True)]
    answers = [answer if slot is None else answer.replace(slot, "") for _, answer in history]  # no images are in them
    turns = list(zip(questions[:-1], answers, strict=False))
    text = chosen.render(questions[-1], turns)
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


def extract_answer(text: str, template: str | None = None, family: str = "hf-cogvlm", end: str | None = None) -> str:
    """Take the answer out of a model's text, which may repeat the prompt.

    Args:
        text: what was generated, with or without the prompt before it.
        template: name of the template of the prompt; None for the family's default.
        family: whose spelling.
        end: written-out end token; the answer stops there. None for the family's.

    Returns:
        What follows the last separator of the template, up to `end`, without spaces around it. The base
        template has no separator that ordinary text contains, so there a repeated prompt stays.
    """
    answer = text.rpartition(get_template(family, template).separator)[2]
    return answer.split(get_family(family).end if end is None else end)[0].strip()
