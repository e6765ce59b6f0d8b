import re

import pytest

from tests.fill_numbers import FIELD, filled_claims, filled_tables
from tests.test_numbers import CLAIMS, PAGES, checked_tables, claims


@pytest.mark.parametrize("page", [page for page in PAGES if checked_tables(PAGES[page])])
def test_other_cells_become_those_of_the_benchmark(page):
    spoilt = PAGES[page]
    for whole, *_ in checked_tables(spoilt):
        spoilt = spoilt.replace(whole, re.sub(r"(?<=\| )0\.\d+", "7.777", whole))
    assert spoilt != PAGES[page] == filled_tables(spoilt)


@pytest.mark.parametrize("page", CLAIMS)
def test_other_numbers_of_claims_become_those_of_the_leaderboard(page):
    same, changed = filled_claims(PAGES[page], page)
    assert (same, changed) == (PAGES[page], [])
    old = FIELD.sub("0.777 [0.7, 0.8]", CLAIMS[page])
    filled, changed = filled_claims(old, page)
    assert changed == claims(page)
    assert filled_claims(filled, page) == (filled, [])


def test_a_claim_that_no_longer_stands_there_is_named():
    with pytest.raises(SystemExit, match=r"README\.md does not say"):
        filled_claims("Nothing.", "README.md")
