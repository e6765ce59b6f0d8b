"""Fill the numbers of README and docs in anew: python -m tests.fill_numbers, after `make benchmark`.

Tables of policies get the cells that BENCHMARK.md has, or the page of another track; sentences of `claims.md` get their
numbers. Whether a sentence is still true is for its reader: it is printed where a number in it changed.
"""

import re

from tests.pages import cells
from tests.test_numbers import CLAIMS, PAGES, ROOT, checked_tables, name_of, names, page_of, plain

FIELD = re.compile(r"\{[\w.]+\}")
NUMBER = r"(?:none|-?\d[\d,]*(?:\.\d+)?)(?:\s%)?(?:\s+\[[^\]]*\])?"
"""As claims have them: perhaps a percentage, perhaps an interval behind it."""


def filled_tables(text):
    """The text of a page with the cells of today."""
    done = 0
    for whole, header, _, track in checked_tables(text):
        said = page_of(track)
        lines = whole.splitlines()
        for number, line in enumerate(lines[2:], start=2):
            old = cells(line)
            new = [
                cell if column in (header[0], "what it is") else said.get((header[0], name_of(old[0]), column), "")
                for column, cell in zip(header, old, strict=True)
            ]
            seeds = re.search(r" \(\d+\)", said.get((header[0], name_of(old[0]), header[0]), ""))
            new[0] = re.sub(r" \(\d+\)", seeds[0] if seeds else "", old[0])
            lines[number] = f"| {' | '.join(new)} |"
        begin, new = text.index(whole, done), "\n".join(lines) + "\n"
        text, done = text[:begin] + new + text[begin + len(whole) :], begin + len(new)
    return text


def filled_claims(text, page):
    """The text of a page with the numbers of its claims, and the claims that changed."""
    said, changed = names(), []
    for claim in CLAIMS.get(page, "").strip().split("\n\n"):
        if not claim:
            continue
        pattern = r"\s+".join(NUMBER.join(re.escape(part) for part in FIELD.split(word)) for word in claim.split())
        found = re.search(pattern, text, re.DOTALL)
        if found is None:
            raise SystemExit(f"{page} does not say: {claim}")
        if plain(found[0]) != plain(claim.format(**said)):
            text = text.replace(found[0], claim.format(**said))
            changed.append(plain(claim.format(**said)))
    return text, changed


def main():
    for page in PAGES:
        text, changed = filled_claims(filled_tables(PAGES[page]), page)
        if text != PAGES[page]:
            (ROOT / page).write_text(text)
            print(f"{page}: filled in")
        for claim in changed:
            print(f"  {claim}")


if __name__ == "__main__":
    main()
