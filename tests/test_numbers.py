"""Numbers in README and docs are those of the shipped results, or stand beside the command that prints them.

Tables of policies are compared with BENCHMARK.md cell by cell; sentences stand in `claims.md` with the names of the
numbers in them, are filled in from `leaderboard.json`, and must stand on their page as they come out. That both files
are what the shipped rows say is held by `test_results.py`.
"""

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest

from experiments.common.config import CONF
from experiments.measures.metrics import LEVELS as COMPARED
from experiments.reporting.tables import number, with_interval
from tests.pages import cells

ROOT = CONF.parent
RESULTS = ROOT / "experiments" / "results"
TRACKS = json.loads((RESULTS / "leaderboard.json").read_text())["tracks"]
CORE = "arithmetic"
"""The track of BENCHMARK.md; the others have a page beside their rows."""
CLAIMS = dict(
    re.findall(r"^# (\S+)\n(.*?)(?=^# |\Z)", (ROOT / "tests" / "claims.md").read_text(), re.DOTALL | re.MULTILINE)
)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
ROWS_OF = ("policy (seeds)", "agent")
"""First columns of the tables of BENCHMARK.md."""
TRACK = re.compile(r"<!-- results: ([\w/]+) -->\n\n\Z")
"""Before a table, the track whose cells it has, where that is not the core's."""
LEFT_OUT = re.compile(r"```.*?```|<!--.*?-->|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|^#.*?$", re.DOTALL | re.MULTILINE)
"""Code, comments, where links lead, papers, headings."""
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*\.\d+(?![\w.]*\.\d)(?: ?%)?|(?<![\w.,-])\d[\d,]* ?%")
LEVELS = {f"{level}{space}%" for level in (90, 95, 99, 100) for space in (" ", "")}
"""Shares of the LLM's accuracy, and of intervals: defined, not measured."""
DEFINED = {
    "README.md": {"3.11", "3.12", "3.13"},  # Python
    "CONTRIBUTING.md": {"1.0"},  # the score of a reference
    "docs/agents/citer.md": {"0.95", "0.5"},  # thresholds of the released code and of the paper
    "docs/agents/collm.md": {"0.5", "40 %"},  # the rule of the paper, and etas to choose from
    "docs/agents/heuristics.md": {"0.5"},
    "docs/agents/query_routing.md": {"0.5"},
    "docs/agents/r2r.md": {"4.0 %"},  # weights of the router over those of the SLM, as in the paper
    "docs/agents/speculative.md": {"0.5"},
    "docs/checking.md": {"0.3"},  # the threshold of the example
    "docs/costs.md": {"1.0", "5 %"},  # the LLM's price, and an example
    "docs/evaluation.md": {
        "0.15",
        "0.25",
        "0.5",
        "1 %",
    },  # costs at which accuracies are compared; what is worth a threshold
    "docs/glossary.md": {"0.5"},  # a coin
    "docs/guides/traces.md": {"0.1", "0.5"},
    "docs/own/architectures.md": {"1 %"},  # the tolerance of the tests it names
    "docs/own/reward.md": {"0.01"},
    "docs/studies/benchmark.md": {"1.5"},  # parameters of the paper's SLM, in billions
    "docs/studies/whole_queries.md": {"0.01", "0.24", "0.5", "24.7", "50 %", "80 %"},  # prices among them
}
"""Numbers that are settings or definitions."""
PRINTED = {
    "CONTRIBUTING.md": "make bench",
    "docs/agents/citer.md": "python -m experiments.train experiment=demo agent=citer agent.sample.positions=500",
    "docs/evaluation.md": "tests/test_intervals.py",
    "docs/guides/clusters.md": "python plan.py",
    "docs/guides/traces.md": "python -m experiments.verify",
    "docs/real-pair.md": "python -m experiments.leaderboard experiment=real_pair launcher=basic",
    "docs/guides/large_pairs.md": "python -m pytest -m '' tests/test_large_pairs.py",
    "docs/studies/checking.md": "at_99_percent(replace(saved, **settings))",
}
"""Pages whose other numbers a command prints, or a test, which stands there: measured on machines and models that are
not here, but for those of checking and of CITER's labels, which `test_docs.py` prints again, and of named tests."""


def name_of(cell):
    return re.sub(r" \(\d+\)( \*)?$", "", cell.replace("`", ""))


def tables(text):
    """Tables that begin with one of ROWS_OF: (the whole of it, names of columns, rows by name, their track)."""
    for found in TABLE.finditer(text):
        header, _, *lines = found[0].splitlines()
        if cells(header)[0] in ROWS_OF:
            track = TRACK.search(text[: found.start()])
            rows = {name_of(cells(line)[0]): cells(line) for line in lines}
            yield found[0], cells(header), rows, track[1] if track else CORE


@cache
def page_of(track):
    """What the page of a track says, by the first column of the table, the name of a row and of a column.

    Nothing of one that is not made yet: its numbers are then nobody's.
    """
    said = {}
    folder = RESULTS / track
    beside = folder / "README.md" if folder.is_dir() else folder.with_suffix(".md")
    path = ROOT / "BENCHMARK.md" if track == CORE else beside
    for _, header, rows, _ in tables(path.read_text() if path.is_file() else ""):
        for name, row in rows.items():
            for column, cell in zip(header, row, strict=True):
                said[header[0], name, column] = cell
    return said


def checked_tables(text):
    """Those whose columns the page of their track has, but for what a policy is."""
    return [table for table in tables(text) if {(table[1][0], column) for column in table[1]} <= _columns(table[3])]


@cache
def _columns(track):
    return {(first, column) for first, _, column in page_of(track)} | {("policy (seeds)", "what it is")}


@pytest.mark.parametrize("page", [page for page in PAGES if checked_tables(PAGES[page])])
def test_tables_are_those_of_the_benchmark(page):
    for _, header, rows, track in checked_tables(PAGES[page]):
        said = page_of(track)
        for name, row in rows.items():
            for column, cell in zip(header, row, strict=True):
                if column != "what it is":
                    assert cell.replace("`", "") == said.get((header[0], name, column), "").removesuffix(" *")


def estimate(measure):
    return with_interval(measure["value"], measure["interval"])


def against(row, other):
    """Ratios of costs to another agent's, and points of accuracy above it at half of the LLM's cost."""
    found, levels = row["against"].get(other, {}), [f"{level:.2f}" for level in COMPARED]
    gain = found.get("gain_at_0.50", {"value": None, "interval": [None, None]})
    above, low, high = ("none" if one is None else f"{100 * one:z.1f}" for one in (gain["value"], *gain["interval"]))
    return SimpleNamespace(
        points50=f"{above} [{low}, {high}]",
        **{f"hull{level[2:]}": estimate(found[f"ratio_at_{level}"]) for level in levels if found},
        **{f"chosen{level[2:]}": estimate(found[f"chosen_ratio_at_{level}"]) for level in levels if found},
    )


def share(value):
    return f"{value:.1%}".replace("%", " %")


def latency(file):
    """What the suite `latency` measured, by way to answer: milliseconds, and ratios to LLM-only decoding and others."""
    measured = json.loads((RESULTS / CORE / file).read_text())
    ratios, rates = measured["ratios"], measured["rates"]
    said = {}
    for way in (key.removesuffix("_ms_per_token") for key in rates if key.endswith("_ms_per_token")):
        told = {
            "ms_token": f"{rates[f'{way}_ms_per_token']:.1f}",
            "ms_response": f"{rates[f'{way}_ms_per_response']:.0f}",
        }
        for part in ("slm", "llm", "decisions"):
            if f"{way}_{part}_ms_per_response" in rates:
                told[f"{part}_ms"] = f"{rates[f'{way}_{part}_ms_per_response']:.0f}"
        for other in ("llm_only", "speculative", "speculative_adaptive"):
            key = f"{way}_seconds_over_{other}"
            if key in ratios:
                told[f"over_{other}"] = with_interval(ratios[key], [ratios[f"{key}_low"], ratios[f"{key}_high"]])
        if f"{way}_bytes_over_llm_only" in ratios:
            units = {"seconds": "seconds", "traffic": "bytes", "flops": "flops"}
            told |= {name: number(ratios[f"{way}_{unit}_over_llm_only"]) for name, unit in units.items()}
        said[way] = SimpleNamespace(**told)
    for model in ("slm", "llm"):
        passes = {f"of_{read}": f"{rates[f'{model}_pass_ms_of_{read}']:.0f}" for read in (1, 8, 44)}
        said[f"{model}_pass"] = SimpleNamespace(**passes)
    return SimpleNamespace(**said)


@cache
def names(track=CORE):
    """What claims may say: the numbers of a track as they are written, by agent and by limit.

    Those of the core stand alone, others behind the track: `arithmetic_hidden.expert.over_citer.hull95`.
    """
    board = TRACKS[track]
    units = {name: limit.get("cost_at_by_unit") for name, limit in board["limits"].items()}
    said = {
        name: SimpleNamespace(tokens=share(costs["llm_tokens"]["0.95"]), flops95=number(costs["flops"]["0.95"]))
        for name, costs in units.items()
        if costs
    }
    if "oracle" in said:
        said["oracle"].solved = share(board["limits"]["oracle"]["solved"])
        said["oracle"].ran_out = f"{board['limits']['oracle']['ran_out_of_budget']}"
    said |= {name: SimpleNamespace(accuracy=share(model["accuracy"])) for name, model in board["models"].items()}
    cheapest = board["agents"][0]["agent"]
    for row in board["agents"]:
        costs, labels = row["hull_cost_at_by_unit"], row["training"]["labels"] or {}
        said[row["agent"]] = SimpleNamespace(
            over=SimpleNamespace(**{other: against(row, other) for other in row["against"]}),
            over_citer=against(row, "citer"),
            over_cheapest=against(row, cheapest),
            tokens95=share(costs["llm_tokens"]["0.95"]),
            flops95=number(costs["flops"]["0.95"]),
            traffic95=number(costs["bytes"]["0.95"]),
            labels=SimpleNamespace(
                wording=share(sum(kinds.get("wording", 0) for kinds in labels.values())),
                **{case: share(sum(kinds.values())) for case, kinds in labels.items()},
            ),
        )
    if track == CORE:
        said["latency"], said["latency_batch8"] = latency("latency.json"), latency("latency_batch8.json")
    others = {} if track != CORE else {other: SimpleNamespace(**names(other)) for other in TRACKS if other != CORE}
    return said | others | {"test": SimpleNamespace(examples=f"{board['examples']:,}")}


def plain(text):
    """Words with one space between them, without bullets."""
    return " ".join(re.sub(r"^- ", "", text, flags=re.MULTILINE).split())


def prose(text):
    """The same without LEFT_OUT, but with names in code, which claims are found by."""
    return plain(LEFT_OUT.sub(lambda found: found[0] if re.match("`[^`]", found[0]) else " ", text))


def claims(page):
    said = names()
    return [plain(claim).format(**said) for claim in CLAIMS[page].strip().split("\n\n")]


@pytest.mark.parametrize("page", CLAIMS)
def test_what_is_said_is_what_was_measured(page):
    for claim in claims(page):
        assert claim in plain(PAGES[page]), claim


def test_claims_have_numbers():
    assert all("{" in claim for text in CLAIMS.values() for claim in text.strip().split("\n\n"))


@pytest.mark.parametrize("page", PAGES)
def test_every_other_number_is_defined_or_has_a_command(page):
    text = PAGES[page]
    for table, *_ in checked_tables(PAGES[page]):
        text = text.replace(table, "")
    text = re.sub(
        r"^\| (?:setting|argument|key|judge|`[\w.]+`) \|.*?$", "", text, flags=re.MULTILINE
    )  # tests of their own
    text = prose(text)
    for claim in claims(page) if page in CLAIMS else ():
        text = text.replace(prose(claim), "")
    left = set(NUMBER.findall(re.sub(r"`[^`]*`", "", text))) - LEVELS - DEFINED.get(page, set())
    if page in PRINTED:
        assert PRINTED[page] in PAGES[page]
        assert left, f"{page} needs no command"
    else:
        assert not left
