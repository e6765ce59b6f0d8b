"""What people see of checked drafts: struck through is what the trace says was taken back, the rest is the answer."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import groupby

import numpy as np
import pytest

from agents.checking.entropy import CheckedEntropy
from agents.checking.speculative import Speculative
from agents.common.rollout import decode
from agents.heuristics import Uncertainty
from envs.decoding.judges import FirstDisagreement, Gap
from envs.decoding.observation import TakenBack
from envs.environments.checked_routing import CheckedRoutingEnv
from envs.environments.picture import STANDS_COLOUR, STRIKE_COLOUR, picture
from envs.environments.render import (
    ANSI_COLOURS,
    ANSI_STANDS,
    ANSI_TAKEN_BACK,
    END,
    HTML_COLOURS,
    PROMPT,
    STANDS,
    Checked,
    Stretch,
    ansi,
    gained,
    stretches_of,
)  # fmt: skip
from experiments.reporting.transcripts import STOOD, call_by_call, markup, transcripts
from tests.pages import ROOT, blocks

THRESHOLD = 0.2
POLICIES = {
    "entropy": CheckedEntropy(),
    "strict": CheckedEntropy(FirstDisagreement()),
    "lenient": CheckedEntropy(Gap(float("inf"))),
    "speculative": Speculative(6),
}


@pytest.fixture(scope="module")
def answers(pool, task):
    """Answers by policy, some of them cut."""
    examples = task.examples("validation", 12)
    return {
        name: decode(pool, task, examples, policy, THRESHOLD, max_new_tokens=40) for name, policy in POLICIES.items()
    }


def calls_of(episode):
    """Calls by the decisions that led to them, told from nothing but scores: (drafted tokens, whole draft stands)."""
    found, drafted, back = [], 0, list(episode.taken_back)
    length = 0
    for score in episode.scores:
        if score >= np.float32(THRESHOLD):
            drafted += 1
            continue
        stands = not (back and length <= back[0].position < length + drafted)
        found.append((drafted, stands))
        length = length + drafted + 1 if stands else back.pop(0).position + 1
        drafted = 0
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_struck_through_is_what_was_taken_back_and_the_rest_is_the_answer(pool, answers, name):
    for episode in answers[name]:
        checked = Checked.of(episode.taken_back, episode.ledger)
        shown = list(stretches_of(pool, episode.tokens, episode.writers, checked))
        assert "".join(one.text for one in shown if not one.taken_back) == episode.text
        struck = [place for place, one in enumerate(shown) if one.taken_back]
        assert len(struck) == len(episode.taken_back)
        for place, back in zip(struck, episode.taken_back, strict=True):
            front = episode.tokens[: back.position]
            before = "".join(one.text for one in shown[:place] if not one.taken_back)
            assert before == pool.decode(front)
            end = END if back.tokens[-1] in pool.end_tokens else ""
            assert before + shown[place].text == pool.decode(np.append(front, back.tokens)) + end
            assert shown[place].writer == back.writer
            assert shown[place + 1].writer == episode.writers[back.position] > 0
        calls = calls_of(episode)
        assert checked.calls == len(calls)
        assert sum(one.writer == STANDS for one in shown) == sum(stands and drafted > 0 for drafted, stands in calls)
    backs = sum(len(one.taken_back) for one in answers[name])
    assert backs == 0 if name == "lenient" else backs > 3


def test_all_that_is_shown_of_an_answer_is_in_its_markup(pool, answers):
    for name, some in json.loads(json.dumps(transcripts(pool, answers, list(answers)))).items():
        for episode, answer in zip(answers[name], some, strict=True):
            page = Read(markup(answer["stretches"]))
            backs = [gained(pool, episode.tokens[: back.position], back.tokens) for back in episode.taken_back]
            assert page.texts["del"] == backs
            assert page.standing == episode.text
            assert page.calls == sum(stretch[3:] == [STOOD] for stretch in answer["stretches"])
            assert answer["calls"] == len(calls_of(episode))
            assert answer["taken_back"] == sum(len(back.tokens) for back in episode.taken_back)


def test_call_by_call_each_token_is_where_it_was_drafted(pool, answers):
    lines = 0
    for some in answers.values():
        for episode in some:
            page = Read(call_by_call(pool, episode))
            backs = [[gained(pool, front, back[i : i + 1]) for front, back, i in each] for each in in_front(episode)]
            assert page.texts["del"] == ["".join(texts).replace("\n", "↵") for texts in backs]
            own = [
                gained(pool, episode.tokens[:at], episode.tokens[at : at + 1]) for at in np.flatnonzero(episode.writers)
            ]
            assert page.texts["mark"] == [text.replace("\n", "↵") for text in own]
            calls = [drafted for drafted, _ in calls_of(episode)]
            said = [text for text in page.texts["small"] if text != "accepted, not checked"]
            assert [int(text.split()[2]) if text[0].isdigit() else 0 for text in said] == calls
            kept = [int(text.split()[0]) for text in said if text[0].isdigit()]
            gone = sum(len(back.tokens) for back in episode.taken_back)
            assert sum(kept) == sum(calls) - gone
            lines += len(page.texts["small"])
    assert lines > 50


def in_front(episode):
    """Of each token that was taken back what stood in front of it, its draft, and its place there."""
    for back in episode.taken_back:
        yield [
            (np.append(episode.tokens[: back.position], back.tokens[:i]), back.tokens, i)
            for i in range(len(back.tokens))
        ]


class Read(HTMLParser):
    """The texts inside each kind of element, the text outside `del`, and how many thin lines there are."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.standing, self.calls = [], {"del": [], "mark": [], "small": []}, "", 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.calls += ("class", "call") in attributes
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in {*self.open} & self.texts.keys():
            self.texts[tag][-1] += data
        self.standing += "" if "del" in self.open else data


def test_routing_without_a_judge_looks_as_it_did(pool, task):
    episodes = decode(pool, task, task.examples("test", 6), Uncertainty(), 0.9, 40)
    for episode, answer in zip(episodes, transcripts(pool, {"entropy": episodes})["entropy"], strict=True):
        stretches, end = [], 0
        for writer, group in groupby(episode.writers.tolist()):
            begin, end = end, end + len(list(group))
            text = pool.decode(episode.tokens[:end])[len(pool.decode(episode.tokens[:begin])) :]
            stretches.append([writer, HTML_COLOURS[writer], text])
        assert {writer for writer, _, _ in stretches} == {0, 1}
        assert answer["stretches"] == stretches
        assert answer.keys() == {"id", "prompt", "right", "answer", "tokens", "llm_share", "stretches"}
        marked = [
            f'<mark style="background:#ffb3a7">{text}</mark>' if writer else text for writer, _, text in stretches
        ]
        assert markup(answer["stretches"]) == "".join(marked)
        coloured = [f"\033[1;31m{text}\033[0m" if writer else text for writer, _, text in stretches]
        assert ansi(stretches_of(pool, episode.tokens, episode.writers)) == "".join(coloured)


class Bytes:
    """A tokenizer whose tokens are bytes, and 0 the end."""

    end_tokens = (0,)

    def decode(self, tokens):
        return bytes(int(token) for token in tokens if token).decode(errors="replace")


def test_characters_of_several_tokens_stay_whole():
    tokens, back = np.frombuffer("né ö".encode() + b"\0", np.uint8), np.frombuffer("ö!".encode()[1:] + b"\0", np.uint8)
    for first in range(len(tokens)):
        writers = (np.arange(len(tokens)) >= first).astype(np.int8)
        checked = Checked([TakenBack(first, 0, back.astype(np.int64))], calls=len(tokens) - first)
        shown = list(stretches_of(Bytes(), tokens, writers, checked))
        assert "".join(one.text for one in shown if not one.taken_back) == "né ö"
        # a character is of the model that wrote its last byte
        own = [one.text for one in shown if one.writer == 0 and not one.taken_back]
        assert "".join(own) == bytes(tokens[:first].tolist()).decode(errors="ignore")
        assert [one.text.endswith("!<end>") for one in shown if one.taken_back] == [True]


def test_styles_of_terminals_and_pictures():
    stretches = [
        Stretch(PROMPT, "how many?\n"), Stretch(0, "so "), Stretch(0, "155", taken_back=True), Stretch(1, "1"),
        Stretch(0, "65"), Stretch(STANDS, ""),
    ]  # fmt: skip
    assert ansi(stretches) == "how many?\nso \033[2;9m155\033[0m\033[1;31m1\033[0m65\033[32m|\033[0m"
    for number, colour in ((2, STRIKE_COLOUR), (5, STANDS_COLOUR)):
        without = [*stretches[:number], *stretches[number + 1 :]]
        assert [(picture(some) == colour).all(-1).any() for some in (stretches, without)] == [True, False]


def test_an_environment_shows_what_its_steps_took_back_and_so_does_its_copy(pool, task):
    settings = {"pool": pool, "task": task, "max_new_tokens": 40, "judge": FirstDisagreement(), "render_mode": "ansi"}
    environment, other = CheckedRoutingEnv(**settings), CheckedRoutingEnv(**settings)
    backs = stood = 0
    for seed in range(3):
        _, info = environment.reset(seed=seed)
        ended, drafted, gone = False, 0, []
        while not ended:
            action = int(drafted == 7)
            *_, terminated, truncated, info = environment.step(action)
            ended = terminated or truncated
            gone += [info["taken_back"]] if info["taken_back"] else []
            stood += bool(action and not info["taken_back"])
            drafted = 0 if action else drafted + 1
            text = environment.render()
            assert text.count(ANSI_TAKEN_BACK) == len(gone)
        assert text.count(ANSI_STANDS) == stood
        other.set_state(environment.get_state())
        assert other.render() == text
        struck = re.findall(re.escape(ANSI_TAKEN_BACK) + r"(.*?)" + re.escape(ANSI_COLOURS[0]), text, re.DOTALL)
        for shown, tokens in zip(struck, gone, strict=True):
            assert shown.removesuffix(END).strip() == pool.decode(np.array(tokens)).strip()
        backs, stood = backs + len(gone), 0
    assert backs > 3


def test_the_figure_of_the_page_is_what_its_command_prints():
    page = "docs/checking.md"
    block = next(block for block in blocks(page) if "call_by_call" in block.text)
    printed, namespace = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec("import envs\n" + block.text, namespace)
    assert printed.getvalue() in (ROOT / page).read_text()
    answer = namespace["answer"]
    assert answer.correct
    calls = Checked.of(answer.taken_back, answer.ledger)
    assert calls.taken_back
    assert calls.stands(answer.writers)
