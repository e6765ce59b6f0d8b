"""Answers to multiple-choice questions: the label a response decides for."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

LETTERS, DIGITS = "ABCDEFGHIJ", "123456789"

_EMPHASIS = str.maketrans({"*": "", "`": "", '"': "", "“": "", "”": "", "$": "", "’": "'", "‘": "'", "：": ":"})
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|bf|rm)\s*\{([^{}]*)\}")
_TAG = re.compile(r"</?(?:b|strong|i|em|u|p|mark)>|<br\s*/?>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_FLAGS = re.IGNORECASE | re.VERBOSE

_BE = r"(?:is(?!n't)|(?:would|should|must|could|might|will|can\s+only|has\s+to|have\s+to|seems\s+to)\s+be)"
# A label may follow this after words of its choice: "the answer is a library (b)".
_ANSWER_IS = re.compile(r"\banswer(?:\s+(?:choice|option|letter|label))?\s*(?:\bis\b(?!n't)|:)", re.IGNORECASE)
# It follows this at once: "I choose (B)", "clearly B."
_CUE = re.compile(
    rf"""(?:
      \b(?:answer|solution)\b (?:[\w' ,]{{0,40}}?\b{_BE}\b | \s*[-=:>→–—]+ | \s)
    | \b(?:correct|right|best|only|final|likely|plausible|appropriate|logical|suitable)
      \s+(?:option|choice|letter|label|one)\b (?:[\w' ]{{0,30}}?\b{_BE}\b | \s*[:=])
    | \b(?:option|choice|letter|label)\s*(?:is|:)
    | \b(?:choose|chose|choosing|pick|picked|select|selected|go\s+with|going\s+with|went\s+with|opt\s+for
        |i'd\s+say|i\s+say|i\s+would\s+say|guess(?:\s+is)?)\b
    | \b(?:it|this|that)(?:'s|\s+{_BE})
    | \b(?:must|has\s+to|can\s+only)\s+be\b
    | \b(?:clearly|obviously|definitely|surely|certainly|probably|likely|therefore|thus|hence|so|leaves
        |leaving|left\s+with|but(?:\s+rather)?|namely|conclusion|points\s+to|corresponds\s+to)\b
    | \b(?:ans|correct)\s*[.:] | \#\#\#\# | => | -> | [→⇒]
    )
    (?:\s*\b(?:probably|likely|clearly|definitely|simply|actually|now)\b)?
    [\s:,>–—-]* (?:\b(?:option|choice|letter|label|answer|either|both)\s+)? $""",
    _FLAGS,
)
_IS_RIGHT = re.compile(
    rf"\s*(?:{_BE}|seems|looks|appears)\s+(?:(?!not\b|never\b)[\w-]+\s+){{0,4}}?(?:correct|right|best|better|answer|true|appropriate)\b",
    _FLAGS,
)
_IS_WRONG = re.compile(
    r"""\s*(?:
      (?:is|are|was|were|seems?|looks?|would\s+be|can\s+be|must\s+be)\s+(?:\w+\s+)?
      (?:wrong|incorrect|false|not|out|impossible|unlikely|implausible|eliminated|ruled|excluded|invalid|irrelevant|too|less)\b
    | (?:isn't|aren't|wasn't|doesn't|don't|can't|cannot|couldn't|won't|wouldn't)(?!\w)
    | (?:does|do|can|could|would|will)\s+not\b
    | (?:fails?|makes?\s+no\s+sense)\b )""",
    _FLAGS,
)
# Ends where a rejected label begins: "not a river (A)", "unlike (A)".
_REJECTED = re.compile(
    r"""(?: \b(?:not|neither|nor|unlike|except|cannot|never|rather\s+than|instead\s+of|other\s+than|rul\w+\s+out)
          | n't | \b(?:eliminat|exclud|reject|discard)\w* )
    (?:\s+(?:be|an?|the|either|options?|choices?|answers?|in|at|for|on))*
    (?:\s+(?!(?:but|so|sure|because|only)\b)[\w'-]+){0,2} \s*$""",
    _FLAGS,
)
_ARTICLE = re.compile(r"^\s*(?:(?:an?|the)\s+)?|\s+$", re.IGNORECASE)
_ENDS = re.compile(r"[.!?][\s)'\]]*$")
_DENIES = re.compile(r"n't\b|\b(?:not|no|never|neither|nor|cannot|unlike|except|instead|rather|but)\b", re.IGNORECASE)
# The choice may be one of what is not: "the answer is not dry (e)".
_ANSWER_IS_NOT = re.compile(
    r"\banswer\s+is\s+(?:should\s+not\s+|not\s+(?!(?:an?|the|in|at|either|option|choice)\b)(?:[\w'-]+\s+){1,4})$",
    re.IGNORECASE,
)
# What may follow a label that is the answer: a reason, or the choice it stands for.
_LEADS = re.compile(
    r"\s*(?:\Z|\n|[.:!)–—,-](?!\w)|(?:because|since|as|for)\b|(?:an?|the)\s+(?:[\w'-]+\s?){1,4}(?:\.|\n|\Z))",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\b(?:option|choice)\s+$", re.IGNORECASE)
_BEGINS = re.compile(r"(?:\A|[.;,:\n])[\s(\[>#-]*$")
_LIST = re.compile(
    r"\s*(?:,\s*(?:and\s+|or\s+|nor\s+|maybe\s+)?|(?:and|or|nor|and/or)\s+|[/&]\s*)(?:(?:options?|choices?|maybe|perhaps)\s+)?",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r",?\s*\bor\s+(?:[\w'-]+\s+){0,4}", re.IGNORECASE)


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    label: str
    in_parentheses: bool


@dataclass(frozen=True)
class _Patterns:
    """What names a label out of some."""

    in_parentheses: re.Pattern[str]
    bare: re.Pattern[str]
    after_answer: re.Pattern[str]
    in_box: re.Pattern[str]
    at_start: re.Pattern[str]


@lru_cache(maxsize=8)
def _patterns(labels: str) -> _Patterns:
    one = f"[{labels}]"
    # "A" and "I" are words, too.
    closed = r"(?=\s*(?:[;:!?)\]}<]|\.(?!\w)|\n|\Z))"
    words = r"because|since|as|for|and|or|nor|not|but|is|seems|looks|appears|would|must|has|fits|[-–—&]"
    opened = rf"(?=\s*[,/]|\s+(?:{words})(?!\w))"
    return _Patterns(
        in_parentheses=re.compile(rf"(?<!\w)[(\[]\s*({one})\s*[)\]]", re.IGNORECASE),
        bare=re.compile(rf"(?<![\w'(\[\\^-])(?:({one}){closed}|((?!I){one}){opened})"),
        # Not the article of "a bank", nor that of a text cut off behind it, nor the start of "e.g."
        after_answer=re.compile(
            rf"[\s:>-]*(?:(?:option|choice)\s+)?(?!(?-i:a)\s*\Z)({one})(?=\s*(?:[,;:!)]|\.(?!\w)|\n|\Z))", re.IGNORECASE
        ),
        in_box=re.compile(
            rf"\s*(?:(?:option|choice|answer)\s*:?\s*)?({one})\s*(?:[.:)–—-](?!\w).*)?", re.IGNORECASE | re.DOTALL
        ),
        at_start=re.compile(rf"[^\w(\[]*({one})\)", re.IGNORECASE),
    )


def find_label(response: str, labels: str = LETTERS) -> str | None:
    r"""The label `response` decides for, in upper case; None if it names none, or several without deciding.

    A label counts in parentheses, in `\boxed{}`, or bare where it cannot be a word. The first of these that the
    response has decides:

    1. its last `\boxed{}` with a label;
    2. what it last says to be the answer, in one of many ways ("the answer is a library (b)", "clearly B.", "option B
       is correct"), without what it rejects ("not (A), but (B)");
    3. the label it begins with ("B", "(B) because ...");
    4. the last label in parentheses that it does not reject; if these are several, then only at its end.

    Args:
        response: what a model wrote.
        labels: those a question may have.
    """
    text, patterns = _plain(response), _patterns(labels)

    for content in reversed(_BOX.findall(text)):
        if match := patterns.in_box.fullmatch(content):
            return str(match[1]).upper()
        boxed = {mention.label for mention in _mentions(content, patterns)}
        if boxed:
            return boxed.pop() if len(boxed) == 1 else None

    every_group = _groups(text, patterns)
    groups = [group for group in every_group if not _is_rejected(text, group)]
    decisions = list(_decisions(text, groups))
    if not decisions:
        text_has_not = [group for group in every_group if _before(_ANSWER_IS_NOT, text, group)]
        decisions = list(_decisions(text, text_has_not))
    if decisions:
        _, decision = max(decisions, key=lambda placed: placed[0])
        return _one(decision)

    if groups and (label := _leading(text, groups)):
        return label
    named = [group for group in groups if group[-1].in_parentheses or _before(_OPTION, text, group)]
    if not named:
        return None
    several = len({mention.label for group in named for mention in group}) > 1
    at_end = not re.search(r"[^\s.,!)\]]", text[named[-1][-1].end :])
    return None if several and not at_end else _one(named[-1])


def find_choice(response: str, choices: Mapping[str, str]) -> str | None:
    """The label `response` decides for, by `find_label`, or by what the choice says where it names no label at all.

    Without a label its last sentence counts, if it ends in what one choice says ("the answer is to make peace."), says
    nothing of another one, and denies nothing.

    Args:
        response: what a model wrote.
        choices: what each choice says, by its label.
    """
    labels = DIGITS if all(label in DIGITS for label in choices) else LETTERS
    if (label := find_label(response, labels)) is not None:
        return label
    text = _plain(response)
    if _mentions(text, _patterns(labels)):
        return None  # several, without deciding
    sentence = re.split(r"(?<=[.!?])\s+|\n+", text.strip())[-1]
    if not _ENDS.search(sentence) or _DENIES.search(sentence):
        return None
    said = {
        label: places[-1]
        for label, choice in choices.items()
        if (
            places := list(re.finditer(rf"(?<!\w){re.escape(_ARTICLE.sub('', choice))}(?!\w)", sentence, re.IGNORECASE))
        )
    }
    # "an orchestra" is no choice of its own inside "a symphony orchestra"
    whole = [
        label
        for label, place in said.items()
        if not any(other.start() <= place.start() and place.end() <= other.end() and other.span() != place.span()
                   for other in said.values())
    ]  # fmt: skip
    alone = whole[0] if len(whole) == 1 else None
    return alone if alone is not None and not re.search(r"\w", sentence[said[alone].end() :]) else None


def _plain(response: str) -> str:
    """A response without what only emphasises."""
    text = _TAG.sub("", response.translate(_EMPHASIS))
    for _ in range(2):
        text = _LATEX_TEXT.sub(r"\1", text)
    text = re.sub(r"(?<!\w)'(\w)'(?!\w)", r"\1", text)
    return re.sub(r"\\[()\[\]]|(?<!\w)_+|_+(?!\w)", " ", text)


def _mentions(text: str, patterns: _Patterns) -> list[_Mention]:
    """Every label of the text, in order."""
    mentions = {
        match.start(): _Mention(match.start(), match.end(), match[1].upper(), True)
        for match in patterns.in_parentheses.finditer(text)
    }
    for match in patterns.bare.finditer(text):
        mentions[match.start()] = _Mention(match.start(), match.end(), match[1] or match[2], False)
    # Lower-case letters are labels at the start, "b)", and behind "answer is" alone.
    after_cues = [patterns.after_answer.match(text, cue.end()) for cue in _ANSWER_IS.finditer(text)]
    for lower in (patterns.at_start.match(text), *after_cues):
        if lower is not None:
            mentions[lower.start(1)] = _Mention(lower.start(1), lower.end(1), lower[1].upper(), False)
    return [mentions[start] for start in sorted(mentions)]


def _groups(text: str, patterns: _Patterns) -> list[list[_Mention]]:
    """The labels of the text, those of a list such as "(A), (B) or (C)" together."""
    groups: list[list[_Mention]] = []
    for mention in _mentions(text, patterns):
        if groups:
            previous = groups[-1][-1]
            between = text[previous.end : mention.start]
            if mention.in_parentheses and previous.in_parentheses and not between.strip():
                groups.pop()  # of "both (a) and (b) (c)", these are a choice's text
            elif mention.label in [earlier.label for earlier in groups[-1]]:
                pass  # "of (A) and (B), (B) is better"
            elif _LIST.fullmatch(between) or (mention.in_parentheses and _ALTERNATIVE.fullmatch(between)):
                groups[-1].append(mention)
                continue
        groups.append([mention])
    return groups


def _before(pattern: re.Pattern[str], text: str, group: Sequence[_Mention]) -> re.Match[str] | None:
    """Where `pattern`, which ends in `$`, ends at the group; it is searched for in the last words before it alone."""
    return pattern.search(text, max(0, group[0].start - 120), group[0].start)


def _is_rejected(text: str, group: Sequence[_Mention]) -> bool:
    return bool(_before(_REJECTED, text, group) or _IS_WRONG.match(text, group[-1].end))


def _decisions(text: str, groups: Sequence[list[_Mention]]) -> Iterator[tuple[int, list[_Mention]]]:
    """What is said to be the answer, and where."""
    for group in groups:
        if _before(_CUE, text, group) or _IS_RIGHT.match(text, group[-1].end):
            yield group[0].start, group
    in_parentheses = [group for group in groups if group[0].in_parentheses]
    starts = [group[0].start for group in in_parentheses]
    cues = list(_ANSWER_IS.finditer(text))
    for cue, following in zip_longest(cues, cues[1:]):
        first = bisect_left(starts, cue.end())
        if first < len(starts) and (following is None or starts[first] < following.start()):
            yield cue.end(), in_parentheses[first]


def _leading(text: str, groups: Sequence[Sequence[_Mention]]) -> str | None:
    """The label the text begins with, unless it goes through several."""
    first = groups[0]
    at_start = not re.search(r"\w", re.sub(r"^\W*(?:option|choice)\b", "", text[: first[0].start], flags=re.IGNORECASE))
    through = {mention.label for group in groups for mention in group if _before(_BEGINS, text, [mention])}
    alone = at_start and len(through) == 1 and _LEADS.match(text[first[-1].end :])
    return _one(first) if alone else None


def _one(group: Sequence[_Mention]) -> str | None:
    """The label of a group, if it has but one."""
    return group[0].label if len({mention.label for mention in group}) == 1 else None
