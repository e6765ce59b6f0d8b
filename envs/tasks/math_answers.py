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
    for match in reversed(list(_BOX.finditer(response))):
        content = match["bare"] or _until_brace_closes(response[match.end() :])
        if content and content.strip():
            return content.strip()
    for content in reversed(_HASHES.findall(response)):
        if content.strip():
            return str(content.strip())
    return None


def _until_brace_closes(rest: str) -> str | None:
    r"""`rest` up to the brace that closes one opened before it; None if none does. `\{` and `\}` do not count."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()]
    return None


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
