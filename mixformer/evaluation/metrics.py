"""Scores of one answer, 0 to 1, against what people answered or marked; and perplexity.

A metric takes the model's answer and the reference answers of the question, one or more. Metrics of boxes read them
from the texts, as ``[[x0,y0,x1,y1]]`` in thousandths of the picture (see `mixformer.data.grounding`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from mixformer.data.grounding import Box, Point, intersection_over_union, parse_boxes, parse_points

Metric = Callable[[str, Sequence[str]], float]

MIN_OVERLAP = 0.5
"""Intersection over union from which on a box counts as found."""

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_SPACED = ";/[]\"{}()=+\\_-><@`,?!"
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(text: str) -> list[str]:
    return [text[:place] + text[place + 1 :] for place, letter in enumerate(text) if letter == "'"]


_SPELLED = {short: word for word in _CONTRACTIONS.split() for short in _without_one_apostrophe(word)}
_SPELLED["somebody'd"] = "somebodyd"  # the official table has this pair the other way round


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, after `normalised`; else 0."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def normalised(text: str) -> str:
    """A text as exact match compares it: NFKC, case folded, without punctuation, articles and spaces too many.

    As for SQuAD (arXiv:1606.05250), but a mark between two digits stays, so that 1.5 is not 15.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", folded)
    return " ".join(word for word in bare.split() if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (arXiv:1505.00468, section 3.1): min(people who said so / 3, 1), 10 people as a rule.

    As in the official evaluation it is the mean over all subsets that leave one person out: with 10 people an answer
    that 1, 2, 3, 4 of them gave has 0.3, 0.6, 0.9, 1. Answer and references are both brought to `vqa_normalised`.

    Raises:
        ValueError: fewer than two references, so that none is left when one is left out.
    """
    total = len(references)
    if total < 2:
        raise ValueError(f"VQA accuracy compares with the answers of several people, 10 in VQA, not {total}.")
    said = vqa_normalised(answer)
    same = sum(vqa_normalised(reference) == said for reference in references)
    return (same * min(1.0, (same - 1) / 3) + (total - same) * min(1.0, same / 3)) / total


def vqa_normalised(text: str) -> str:
    """A text as VQA accuracy compares it; the rules of the official evaluation, in its order.

    Line ends and tabs become spaces. Each punctuation mark is removed where one stands beside a space or the text has a
    comma between digits, otherwise it becomes a space; apostrophes and colons stay. A full stop goes unless a digit
    follows. Then: lower case, none and zero to ten become digits, articles go, and contractions that lack an apostrophe
    get it.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _SPACED:
        bare = bare.replace(mark, "" if has_number or f"{mark} " in text or f" {mark}" in text else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def box_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the first box of the answer overlaps a reference box with an intersection over union of at least 0.5."""
    found = parse_boxes(answer)
    overlaps = [intersection_over_union(found[0], box) for box in reference_boxes(references)] if found else []
    return float(max(overlaps, default=0.0) >= MIN_OVERLAP)


def centre_in_box(answer: str, references: Sequence[str]) -> float:
    """1 if the centre of the answer's first box, or else its first point, lies in a reference box, edges included."""
    found: Sequence[Box | Point] = parse_boxes(answer) or parse_points(answer)
    if not found:
        return 0.0
    place = found[0]
    x, y = ((place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2) if isinstance(place, Box) else (place.x, place.y)
    boxes = reference_boxes(references)
    return float(any(box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1 for box in boxes))


def reference_boxes(references: Sequence[str]) -> list[Box]:
    """The boxes in all references."""
    return [box for reference in references for box in parse_boxes(reference)]


def perplexity(loss: float, num_tokens: int) -> float:
    """e to the mean loss per supervised token.

    Args:
        loss: negative log-likelihood in nats, summed over all supervised tokens of all samples.
        num_tokens: how many tokens these are.

    Raises:
        ValueError: no tokens.
    """
    if num_tokens < 1:
        raise ValueError("Perplexity is per supervised token, and there is none.")
    try:
        return math.exp(loss / num_tokens)
    except OverflowError:
        return math.inf


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "exact_match": exact_match,
        "vqa_accuracy": vqa_accuracy,
        "box_accuracy": box_accuracy,
        "centre_in_box": centre_in_box,
    }
)
"""The metrics of answers, by name."""


BOX_METRICS = ("box_accuracy", "centre_in_box")
"""Those that need boxes in the references."""


def applies(metric: str, references: Sequence[str]) -> bool:
    """Whether a metric can judge a question with these references: people's answers, or boxes."""
    if metric == "vqa_accuracy":
        return len(references) > 1
    return bool(reference_boxes(references)) if metric in BOX_METRICS else bool(references)
