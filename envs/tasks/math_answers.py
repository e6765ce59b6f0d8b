r"""Answers to math problems: where a response has its own, and whether two have the same value."""

from __future__ import annotations

import re
from functools import lru_cache

from envs.tasks.grading import GRADING_POOL
from envs.tasks.quantities import read_quantity, strip_markdown

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>-?\d[\d.,/]*))")
# Chat models write headings, too: "#### Final answer", and the answer on a line below.
_HASHES = re.compile(
    r"####[ \t]*(?:(?:\*\*)?(?:final[ \t]+)?answer[ \t]*:?[ \t]*(?:\*\*)?:?\s*)?([^\n]*)", re.IGNORECASE
)
# What would run into the time limit. Untrained models write such things often, and each would take all of it.
_UNBOUNDED = re.compile(
    r"""(?:\^|\*\*) [\s{(]* -?\d{4,}                      # 9^{9999}
      | (?:\^|\*\*) [\s{(]* \d+ [\s)}]* (?:\^|\*\*)       # 9^{9^{9}}
      | \) \s* (?:\^|\*\*) [\s{(]* \d{2,}                 # (x + y + z)^{99}
      | (?: \d{4,} | [)}!] ) \s* !                        # 99999!, (9^9)!, 9!!
      | binom \s* \{ \s* \d{4,}
      | \\int""",
    re.VERBOSE,
)
_LONGEST_EVALUATED = 300


def find_answer(response: str) -> str | None:
    r"""The content of the last complete `\boxed{}` that is not empty; else what follows the last `####`; else None."""
    for content in reversed(_boxes(response)):
        if content.strip():
            return content.strip()
    for content in reversed(_HASHES.findall(response)):
        if content.strip():
            return str(content.strip())
    return None


def _boxes(response: str) -> list[str]:
    r"""The contents of the complete boxes, in the order in which these begin. `\{` and `\}` are no braces."""
    contents = {}
    begins = set()
    for box in _BOX.finditer(response):
        if box["bare"]:
            contents[box.start()] = str(box["bare"])
        else:
            begins.add(box.end())
    opened: list[int] = []  # where the contents of braces begin: one pass, however many never close
    for brace in re.finditer(r"\\.|[{}]", response):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened and (begin := opened.pop()) in begins:
            contents[begin] = response[begin : brace.start()]
    return [contents[begin] for begin in sorted(contents)]


@lru_cache(maxsize=2**16)  # one sweep over thresholds asks about the same few answers again and again
def same_value(gold: str, answer: str) -> bool:
    """Whether two answers in LaTeX or plain notation have the same value, by math-verify.

    Equal spellings and numbers, whatever unit or markdown is around them, are compared at once, all else in a process
    that is killed after 5 seconds. An answer that cannot be evaluated, in that time and 2 GiB of memory, only equals
    one that is spelt the same. What is sure to take longer is not tried.

    Raises:
        GradingError: that process cannot be started.
    """
    gold_quantity, quantity = read_quantity(gold), read_quantity(answer)
    if gold_quantity is not None and quantity is not None:
        return gold_quantity.equals(quantity)
    gold, answer = _plain(gold), _plain(answer)
    if gold == answer:
        return True
    if not gold or any(len(side) > _LONGEST_EVALUATED or _UNBOUNDED.search(side) for side in (gold, answer)):
        return False
    return GRADING_POOL.same_value(gold, answer)


def _plain(answer: str) -> str:
    """`answer` without what does not change its value: markdown, dollar and percent signs, a closing full stop."""
    answer = strip_markdown(answer).rstrip(".").strip().strip("$").strip()
    return answer.removeprefix("\\$").removesuffix("%").removesuffix("\\").strip()
