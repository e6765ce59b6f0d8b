"""What an evaluation leaves for people: a table that fits."""

from hydra import compose, initialize_config_dir

from experiments.common.config import CONF, register_schemas
from experiments.reporting.tables import (
    WIDTH,
    markdown,
    measured_width,
    most_wanted,
    narrowed,
    query_table,
    table,
    write_table,
)

LONG = "routellm_classifier learning_rate=0.0003"


def config_of(script, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(script, overrides=list(overrides))


def interval(value):
    return {"value": value, "interval": [value - 0.01, value + 0.01]}


def summary_of(*names):
    """The summary of an evaluation, as far as tables show it."""
    measures = {"over_speculative_at_0.99": 0.9, "area_above_random": 0.1, "oracle_share": 0.8}
    policy = {
        "seeds": 3,
        "cost_at": {"0.90": 0.18, "0.95": 0.2, "0.99": None},
        "cost_at_interval": {level: [0.1, None] for level in ("0.90", "0.95", "0.99")},
        "cost_at_by_unit": {"llm_tokens": {"0.95": 0.14}},
        "measures": {name: interval(value) for name, value in measures.items()},
        f"against_{names[0]}": {"ratio_at_0.95": interval(1.1), "largest_gain": interval(0.05)},
    }
    curve = {
        "curve": [],
        "cost_at_by_unit": {"bytes": policy["cost_at"], "llm_tokens": policy["cost_at"]},
    }
    return {
        "task": "arithmetic",
        "examples": 300,
        "split": "test",
        "cost": "bytes",
        "first": names[0],
        "models": {"slm": {"accuracy": 0.38, "cost": 0.06}, "llm": {"accuracy": 0.97, "cost": 1.0}},
        "limits": {"random": curve, "query_oracle": curve, "speculative": {"accuracy": 0.97, "cost_bytes": 0.18}},
        "policies": dict.fromkeys(names, policy),
    }


def test_the_printed_table_fits_and_names_are_whole(capsys, tmp_path):
    full = table(summary_of("citer", LONG))
    assert measured_width(full) > 150
    write_table(full, tmp_path / "table.md", most_wanted(full), notes=["So it is."])
    *lines, note, more = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for name in (f"{LONG} (3)", "speculative decoding", "oracle, per query", "random routing", "slm only"):
        assert any(line.startswith(name + " ") for line in lines)
    assert any("0.200 [0.100, none]" in line for line in lines)
    assert note == "So it is."
    left_out = len(full.columns) - len(narrowed(full, most_wanted(full)).columns)
    assert more == f"{tmp_path / 'table.md'} holds {left_out} more columns"
    written = (tmp_path / "table.md").read_text()
    assert written == markdown(full) + "\nSo it is.\n"
    assert "share of the oracle's" in written


def test_all_columns_are_printed_where_they_are_asked_for(capsys, tmp_path):
    full = table(summary_of("citer", LONG))
    write_table(full, tmp_path / "table.md", most_wanted(full), "all")
    printed = capsys.readouterr().out
    for header in ("accuracy", "most above", "share of the", "LLM tokens"):
        assert header in printed
    assert "more columns" not in printed


def test_columns_are_left_out_by_what_they_are_worth_and_stay_in_order():
    full = table(summary_of("citer"))
    order = most_wanted(full)
    assert sorted(order) == list(range(len(full.columns)))
    headers = [[str(column.header) for column in narrowed(full, order, width).columns] for width in (1, 45, 10_000)]
    assert headers[0] == ["policy (seeds)"]
    assert headers[1] == ["policy (seeds)", "cost at 95% of\nthe LLM's accuracy"]
    assert headers[2] == [str(column.header) for column in full.columns]


def test_the_table_of_queries_fits_too():
    agents = {
        name: {
            "measures": {
                key: interval(0.5) for key in ("area_above_random", "aiq", "qnc", "apgr", "cpt_0.50", "cpt_0.80")
            },
            "less_knn": {key: interval(0.1) for key in ("qnc", "aiq")},
        }
        for name in ("knn", "uniroute_learned")
    }
    summary = {"task": "pool", "splits": 5, "examples": 96, "first": "knn", "policies": agents}
    full = query_table(summary)
    printed = narrowed(full, range(len(full.columns)))
    assert measured_width(printed) <= WIDTH < measured_width(full)
    assert [str(column.header) for column in printed.columns][:2] == ["agent", "area above\nrandom"]
