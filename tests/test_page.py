"""The page of an evaluation, and its pictures: what they say, that names do not overlap, that lines reach the end."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agents.common.rollout import decode
from agents.heuristics import Uncertainty
from experiments.reporting import figures
from experiments.reporting.figures import NAMED, curves_svg, learning_svg, named_policies, plot_curves, plot_learning
from experiments.reporting.labels import Label, place_labels
from experiments.reporting.page import PageParts, Training, page
from experiments.reporting.transcripts import transcripts

EPOCHS = [
    {"run": f"round {number}", "epoch": epoch, "loss": 0.2 / (epoch + 1), "validation_loss": 0.3 / (epoch + 1)}
    for number in (1, 2)
    for epoch in range(3)
]


def interval(value):
    return {"value": value, "interval": [value - 0.01, value + 0.01]}


def policy(steepness, trained=True, seconds=None):
    """A policy whose curve ends at a quarter of the LLM's cost."""
    costs = np.linspace(0.05, 0.25, 6)
    curve = [[float(cost), float(0.4 + 0.55 * min(1, steepness * (cost - 0.05) / 0.2))] for cost in costs]
    grid = np.linspace(0.05, 1, 10)
    at = {"0.90": 0.18, "0.95": 0.2 / steepness, "0.99": None}
    return {
        "seeds": 1,
        "trained": trained,
        "curve": curve,
        "band": [[float(cost), 0.4, 0.97] for cost in grid],
        "cost_at": at,
        "cost_at_interval": {level: [0.1, None] for level in at},
        "cost_at_by_unit": {"llm_tokens": at, **({} if seconds is None else {"seconds": {"0.95": seconds}})},
        "measures": {},
        "operating_points": {"0.95": {"cost_bytes": interval(0.19), "accuracy": interval(0.91)}},
        "against_citer": {"ratio_at_0.95": interval(1.1), "gain_at_0.25": interval(0.05)},
    }


def summary_of(**policies):
    at = {"0.90": 0.5, "0.95": 0.6, "0.99": 0.7}
    costs = {"bytes": at, "llm_tokens": at}
    return {
        "task": "arithmetic",
        "pool": ["small", "large"],
        "parameters": [71_000, 1_520_000],
        "split": "test",
        "examples": 300,
        "max_new_tokens": 128,
        "cost": "bytes",
        "first": "citer",
        "models": {"slm": {"accuracy": 0.4, "cost": 0.05}, "llm": {"accuracy": 0.96, "cost": 1.0}},
        "limits": {
            "line": {"curve": [[0.05, 0.4], [1.0, 0.96]], "cost_at_by_unit": costs},
            "oracle": {"curve": [[0.05, 0.4], [0.08, 1.0]], "cost_at_by_unit": costs},
            "speculative": {"accuracy": 0.96, "cost_bytes": 0.185},
        },
        "policies": policies,
        "thresholds": {name: [[0.1, 0.5, 0.9]] for name in policies},
        "notes": [],
    }


@pytest.fixture(scope="module")
def summary():
    return summary_of(
        citer=policy(0.9, seconds=0.83), citer_slm=policy(0.92), entropy=policy(1, False), random=policy(0.1, False)
    )


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what is drawn, after all is on them, and boxes of the names."""
    seen = {}

    def kept(axes, labels):
        texts = place_labels(axes, labels)
        renderer = axes.figure.canvas.get_renderer()
        seen["names"] = {text.get_text(): text.get_window_extent(renderer) for text in texts}
        seen["frame"] = axes.get_window_extent(renderer)
        seen["lines"] = [(line.get_color(), line.get_xydata()) for line in axes.lines]
        seen["bands"] = [band.get_paths()[0].vertices for band in axes.collections]
        seen["title"], seen["legend"] = axes.get_title(), axes.get_legend()
        return texts

    monkeypatch.setattr(figures, "place_labels", kept)
    return seen


def overlapping(boxes):
    return [(one, other) for one in boxes for other in boxes if one < other and boxes[one].overlaps(boxes[other])]


def test_names_stand_at_their_curves_inside_the_picture_and_do_not_overlap(summary, drawn, tmp_path):
    plot_curves(summary, tmp_path / "curve.png")
    assert {*summary["policies"], "slm only", "llm only", "oracle", "speculative decoding"} <= drawn["names"].keys()
    assert "95 % of the LLM's accuracy" in drawn["names"]
    assert drawn["legend"] is None
    assert overlapping(drawn["names"]) == []
    for name, box in drawn["names"].items():
        inside = drawn["frame"]
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, name
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1, name


def test_lines_go_on_as_far_as_their_bands(summary, drawn, tmp_path):
    plot_curves(summary, tmp_path / "curve.png")
    ends = {float(vertices[:, 0].max()) for vertices in drawn["bands"]}
    assert ends == {1.0}
    colours = {color for color, points in drawn["lines"] if len(points) > 2 and points[-1, 0] == 1.0}
    assert len(colours) >= len(summary["policies"])


def test_operating_points_are_rings_in_the_colours_of_their_curves(summary, drawn, tmp_path):
    plot_curves(summary, tmp_path / "curve.png")
    rings = [color for color, points in drawn["lines"] if points.tolist() == [[0.19, 0.91]]]
    assert len(rings) == len({*rings}) == len(summary["policies"])


def test_at_most_eight_policies_are_named_the_first_and_the_cheapest(drawn, tmp_path):
    many = summary_of(citer=policy(0.5), **{f"p{number}": policy(0.6 + number / 40) for number in range(11)})
    named = named_policies(many)
    assert named == ["citer", *(f"p{number}" for number in range(4, 11))]
    plot_curves(many, tmp_path / "curve.png")
    assert len(drawn["names"].keys() & many["policies"].keys()) == NAMED
    assert "4 more" in drawn["title"]


def test_a_label_goes_where_nothing_is():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    line = np.array([[0.0, 0.0], [1.0, 1.0]])
    axes.plot(*line.T)
    texts = place_labels(axes, [Label(f"name {number}", line) for number in range(6)])
    boxes = {text.get_text(): text.get_window_extent(figure.canvas.get_renderer()) for text in texts}
    assert overlapping(boxes) == []


def test_the_same_drawing_has_the_same_bytes_and_no_ground(summary):
    one = curves_svg(summary)
    assert one == curves_svg(summary)
    assert "<svg" in one
    assert "#ffffff" not in one


def test_learning_curves_say_what_they_show(monkeypatch, tmp_path):
    panels, draw = [], figures._draw_learning

    def kept(panel, name, curve):
        draw(panel, name, curve)
        ticks = [tick for tick in panel.get_xticks() if panel.get_xlim()[0] <= tick <= panel.get_xlim()[1]]
        panels.append((panel.get_title(), panel.get_xlabel(), panel.get_ylabel(), ticks, panel.lines[0].get_xdata()))

    monkeypatch.setattr(figures, "_draw_learning", kept)
    assert plot_learning(EPOCHS, tmp_path / "learning.png")
    assert [panel[0] for panel in panels] == ["round 1", "round 2"]
    for _, across, up, ticks, epochs in panels:
        assert "epoch" in across
        assert "nats per token" in up
        assert all(tick == round(tick) for tick in ticks)
        assert list(epochs) == [1, 2, 3]
    assert learning_svg([{"loss": 1.0}]) == ""


class Page(HTMLParser):
    """What a page holds: ids, links, tags that were not closed, sources."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.words = [], set(), set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if "id" in given else set()
        self.links |= {given["href"]} if "href" in given else set()
        self.sources += [given["src"]] if "src" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_a_page_says_everything_and_needs_nothing_else(summary, pool, task):
    examples = task.examples("test", 2)
    episodes = {"citer": decode(pool, task, examples, Uncertainty(), 0.9, 24)}
    parts = PageParts(
        about={"citer": "CITER as <published>"},
        trainings=[Training("citer", 44.2, EPOCHS), Training("citer_slm", None, [])],
        transcripts=json.loads(json.dumps(transcripts(pool, episodes))),
        seconds_of=128,
        next=[("Evaluate it", "python -m experiments.evaluate +saved.citer=outputs/a&b")],
    )
    text = page(summary, parts)
    shown = Page(text)
    assert shown.open == []
    assert {link.removeprefix("#") for link in shown.links} <= shown.ids
    assert len(shown.sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in shown.sources)
    words = " ".join(shown.words.split())
    for said in (
        "71 thousand parameters",
        "1.52 million parameters",
        "right on 40 % of 300 test problems",
        "trained in 44 s; 3 thresholds",
        "CITER as <published>",
        "128 problems answered together",
        "python -m experiments.evaluate +saved.citer=outputs/a&b",
        "seconds at 95%",
        examples[0].prompt.split()[0],
    ):
        assert said in words, said
    assert "0.830" in words
    assert text.count("<article") == 2
    assert "prefers-color-scheme: dark" in text
    assert "walk" not in words


def test_what_is_written_by_a_model_is_escaped(summary, monkeypatch):
    monkeypatch.setattr(figures, "curves_svg", lambda summary: "<svg/>")
    answer = {"id": "<i>", "prompt": "<b>", "right": False, "answer": "<u>", "tokens": 1, "llm_share": 1.0}
    text = page(summary, PageParts(transcripts={"citer": [{**answer, "stretches": [[1, "#fff", "<script>"]]}]}))
    assert "<script>" not in text
    assert "wrong, the answer is &lt;u&gt;" in text
    assert Page(text).open == []


def test_costs_on_a_logarithmic_axis_keep_their_points(summary, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("experiments.reporting.figures.place_labels", lambda axes, labels: drawn.append((axes, labels)))
    plot_curves(summary, tmp_path / "curve.png", logarithmic=True)
    ((axes, labels),) = drawn
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel().endswith("logarithmic scale")
    low, high = axes.get_xlim()
    assert all(low < cost < high for label in labels for cost in label.points[:, 0])
    for policy in summary["policies"].values():  # a line goes through all it is made of, straight in accuracy over cost
        lines = [line.get_xydata() for line in axes.get_lines()]
        assert any({tuple(point) for point in policy["curve"]} <= {tuple(point) for point in line} for line in lines)
