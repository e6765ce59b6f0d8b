"""Numbers as people and models write them in answers: with units, currencies, separators, fractions, markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": "x", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ", "’": "'"}
)
_VULGAR_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|~|\\quad"), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)"), r" \1/\2 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), " x "),
    (re.compile(r"\\approx(?![A-Za-z])"), "≈"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree|°"), " degrees "),
    (re.compile(r"\\([$%#€£])"), r"\1"),
    (re.compile(r"\\[()\[\]]"), ""),
)
_MARKDOWN = re.compile(r"(?<![\w*)])(\*\*|__|[*_`])(?=\S)([^*_`]+?)(?<=\S)\1(?![\w*(])")

# What may stand before a number. An equation has it on its right: "8 * 9 = 72", "x = 5", but not "x = 5, y = 6".
_SAYING = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?(?:answer|total|result)\s*(?:is|:|=)\s*", re.I
)
_EQUATION = re.compile(r"(?!.*\b(?:and|or)\b)[^=,;≈<>]{1,80}=\s*(?=[^=]*\Z)", re.I)
_ABOUT = re.compile(r"(?:about|approximately|approx\.?|around|roughly|exactly|a\s+total\s+of|≈|=)\s*", re.I)
_CURRENCY = re.compile(r"(?:(?:US|AU|CA)?[$€£¥₹]|(?:USD|EUR|GBP|Rs\.?)(?=[\s\d]))\s*")
_NUMBER = re.compile(
    r"""(?:(?P<mixed>\d{1,20})\s+(?P<part>\d{1,20}/0*[1-9]\d{0,19})(?![\d.,/])
      | (?P<ratio>\d{1,20}\s?/\s?0*[1-9]\d{0,19})(?!\.?\d|/)
      | (?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+(?!\d)|\d{1,40})(?:\.\d{0,5}(?!\d))?|\.\d{1,5})
        (?![\d/]|,\d)
        (?: (?:[eE](?P<exponent>[-+]?\d{1,2}) | \s*[x*]\s*10\s*(?:\^|\*\*)\s*[{(]?(?P<power>[-+]?\d{1,2})[)}]?)(?!\d) )?
    )""",
    re.VERBOSE | re.ASCII,
)
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_MULTIPLE = re.compile(rf"\s*({'|'.join(_MULTIPLES)})s?\b", re.I)
_PERCENT = re.compile(r"\s*(?:%|percent\b)", re.I)
# Words after a number are its unit, unless they make another number of it. One letter is rather a variable.
_NO_UNIT = (
    "or|and|plus|minus|times|to|not|no|is|isn't|was|pi|sqrt|than|if|but|mod|by|over|divided|through|squared|cubed|half|"
    "quarters?|thirds?|trillion|unless|nor|versus|vs|between|sin|cos|tan|log|ln|exp"
)
_UNIT = re.compile(
    rf"(?:\s+|\s*[/-]\s*)(?!(?:{_NO_UNIT})\b)(?:[A-Za-z][A-Za-z'-]+\.?|[mghslLCFK]\b|[€£¥$₹])(?:\^\{{?[23]\}}?)?", re.I
)
_ATTACHED_UNIT = re.compile(
    r"(?:[kcm]?m|k?g|mg|lbs?|oz|ft|in|h|hrs?|min|s|sec|ms|mph|kph|m[lL]|L|[CFK]|yd|mi|am|pm|[¢€£¥$₹])(?![\w])(?:\^\{?[23]\}?)?"
)
_REMARK = re.compile(r"\s*\([A-Za-z ,']{1,40}\)")
_END = re.compile(
    r"(?:\s+is\s+the\s+(?:final\s+)?answer)?\s*(?:[.!;]?|[.!;]\s[^\d]*|,\s+(?!(?:or|and)\b)[A-Za-z]{2,}[^\d]*)",
    re.I,
)


@dataclass(frozen=True)
class Quantity:
    """A number and whether it was written in percent.

    Attributes:
        value: the number before the percent sign.
        percent: whether there is one.
    """

    value: Fraction
    percent: bool = False

    def equals(self, other: Quantity) -> bool:
        """Whether both say the same; where one alone is in percent, 50 % is 50 as well as 0.5."""
        if self.percent == other.percent or self.value == other.value:
            return self.value == other.value
        written, plain = (self, other) if self.percent else (other, self)
        return written.value == 100 * plain.value


def simplify(answer: str) -> str:
    """`answer` without markdown, spacing commands and text commands around words."""
    answer = answer.translate(_CHARACTERS)
    for sign, fraction in _VULGAR_FRACTIONS.items():
        answer = answer.replace(sign, f" {fraction}")
    for _ in range(2):
        answer = strip_markdown(answer)
        for pattern, replacement in _LATEX:
            answer = pattern.sub(replacement, answer)
    return answer.strip()


def strip_markdown(answer: str) -> str:
    """`answer` without emphasis; `2*3*4` and `2**3` are none."""
    return _MARKDOWN.sub(r"\2", answer).strip("*_` \n\t")


def read_quantity(answer: str) -> Quantity | None:
    r"""The number an answer consists of, with what may stand around it; None where it is, or may be, something else.

    Read as 72: `72 dollars`, `**72**`, `$72`, `72.0`, `x = 72`, `8 * 9 = 72`, `\text{72 cm}^2`, `about 72 (rounded)`.
    Not read: `72x`, `72 or 73`, `(72)`, more than five decimals.
    """
    if len(answer) > 200:
        return None
    text = simplify(answer)
    if text.startswith("$") and text.endswith("$") and len(text) > 1:
        text = text[1:-1].strip()
    for prefix in (_SAYING, _EQUATION, _ABOUT):
        text = prefix.sub("", text, count=1) if prefix.match(text) else text
    text, sign = _signed(text)
    if match := _CURRENCY.match(text):
        text, inner = _signed(text[match.end() :])
        sign *= inner
    number = _NUMBER.match(text)
    if number is None or text.startswith("!", number.end()):  # a factorial
        return None
    value, rest = sign * _value(number), text[number.end() :]
    percent = False
    if match := _PERCENT.match(rest):
        percent, rest = True, rest[match.end() :]
    elif match := _MULTIPLE.match(rest):
        value, rest = value * _MULTIPLES[match[1].lower()], rest[match.end() :]
    elif match := _ATTACHED_UNIT.match(rest):
        rest = rest[match.end() :]
    for _ in range(6):
        if match := _UNIT.match(rest) or _REMARK.match(rest):
            if re.match(r"\s+is\b", rest):
                break
            rest = rest[match.end() :]
    return Quantity(value, percent) if _END.fullmatch(rest) else None


def _signed(text: str) -> tuple[str, int]:
    sign = -1 if text.startswith("-") else 1
    return text.removeprefix("-").removeprefix("+").lstrip(), sign


def _value(number: re.Match[str]) -> Fraction:
    if number["mixed"]:
        return Fraction(number["mixed"]) + Fraction(number["part"])
    if number["ratio"]:
        return Fraction(re.sub(r"\s", "", number["ratio"]))
    digits = re.sub(r"[, ]", "", number["decimal"])
    return Fraction(digits.removesuffix(".")) * Fraction(10) ** int(number["exponent"] or number["power"] or 0)
