"""Changes to what an evaluation has written, each of which a verification must find."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from envs.costs import COLUMNS, SECONDS
from envs.models.loading import embedded_pool
from experiments.evaluation.answers import Answers
from experiments.traces.trace import read_trace, write_trace


class NothingToChangeError(Exception):
    """A run has nothing that can be corrupted in a way."""


def copied(source, target):
    """A copy of a run, whose files can be changed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def corrupt(folder, kind, rng, traced=None):
    """Change one thing of a run, drawn with `rng`; the name of the file in which it is.

    Where traces ship of the first `traced` problems alone, what is kept is changed of these.
    """
    if kind.startswith("a kept") and traced is not None:
        return CORRUPTIONS[kind](folder, rng, traced)
    return CORRUPTIONS[kind](folder, rng)


def traces_of(folder, *, decided=None, decoding=None):
    found = []
    for path in sorted(folder.glob("runs/**/*.parquet")):
        head = read_trace(path).head
        if decoding in (None, head.decoding) and decided in (None, head.policy_fingerprint is not None):
            found.append(path)
    return found


def of_episode(change, **chosen):
    """A corruption of one episode of one trace."""

    def corruption(folder, rng):
        paths = traces_of(folder, **chosen)
        for path in rng.permutation([str(path) for path in paths]):
            trace = read_trace(Path(path))
            for number in rng.permutation(len(trace.episodes)):
                changed = change(trace.episodes[number], rng, trace.head)
                if changed is not None:
                    episodes = [*trace.episodes]
                    episodes[number] = changed
                    write_trace(Path(path), replace(trace, episodes=episodes))
                    return Path(path).name
        raise NothingToChangeError

    return corruption


def of_trace(change):
    """A corruption of one whole trace."""

    def corruption(folder, rng):
        path = Path(rng.choice([str(path) for path in traces_of(folder)]))
        write_trace(path, change(read_trace(path), rng))
        return path.name

    return corruption


def other(array, rng, high):
    """A copy of an array of numbers below `high`, in which one is another."""
    array, at = array.copy(), rng.integers(len(array))
    array[at] = (array[at] + rng.integers(1, high)) % high
    return array


def flipped_token(one, rng, head):
    return replace(one, response=other(one.response, rng, 60))


def unknown_token(one, rng, head):
    response = one.response.copy()
    response[rng.integers(len(response))] = rng.choice([-1, 10_000_000])
    return replace(one, response=response)


def flipped_writer(one, rng, head):
    return replace(one, writers=other(one.writers, rng, len(head.models)))


def score_over_threshold(one, rng, head):
    scores, at = one.scores.copy(), rng.integers(len(one.scores))
    scores[at] = 0.0 if scores[at] >= head.threshold else 1.0
    # one decision that stands for all of them has one score
    return replace(one, scores=np.full_like(scores, scores[at]) if head.per_response else scores)


def score_on_its_side(one, rng, head):
    if head.threshold in (0.0, 0.5):
        return None
    scores, at = one.scores.copy(), rng.integers(len(one.scores))
    scores[at] = scores[at] + (1 - scores[at]) / 2 if scores[at] >= head.threshold else scores[at] / 2
    return None if abs(scores[at] - one.scores[at]) < 0.002 else replace(one, scores=scores)


def ledger_entry(one, rng, head):
    ledger = one.ledger.copy()
    column = rng.choice([column for column in range(COLUMNS) if column != SECONDS])
    ledger[rng.integers(len(ledger)), column] += rng.choice([-1, 1])
    return replace(one, ledger=ledger)


def ledger_seconds(one, rng, head):
    ledger = one.ledger.copy()
    ledger[rng.integers(len(ledger)), SECONDS] += 1e-3
    # seconds of the oracle's answers and of an evaluation through a tree are part of nothing
    return replace(one, ledger=ledger) if head.settings["timed"] and head.decoding != "search" else None


def ended_otherwise(one, rng, head):
    return replace(one, terminated=not one.terminated)


def token_and_text(one, rng, head):
    """As a forger would, who writes the text along."""
    response = other(one.response, rng, 60)
    return replace(one, response=response, text=embedded_pool().decode(response))


def draft(one, rng, head):
    if not one.taken_back:
        return None
    back, at = [*one.taken_back], rng.integers(len(one.taken_back))
    back[at] = back[at]._replace(tokens=other(back[at].tokens, rng, 60))
    return replace(one, taken_back=back)


def lost_draft(one, rng, head):
    back = [*one.taken_back]
    return replace(one, taken_back=back[1:]) if back else None


def dropped(trace, rng):
    gone = rng.integers(len(trace.episodes))
    return replace(trace, episodes=[one for number, one in enumerate(trace.episodes) if number != gone])


def duplicated(trace, rng):
    episodes = [*trace.episodes]
    one, two = rng.choice(len(episodes), 2, replace=False)
    episodes[one] = episodes[two]
    return replace(trace, episodes=episodes)


def swapped(trace, rng):
    """The responses of two problems in each other's place, with all that belongs to them."""
    episodes = [*trace.episodes]
    one, two = rng.choice(len(episodes), 2, replace=False)
    kept = ("episode", "example", "example_hash", "prompt")
    for here, there in ((one, two), (two, one)):
        stays = {name: getattr(trace.episodes[here], name) for name in kept}
        episodes[here] = replace(trace.episodes[there], **stays)
    return replace(trace, episodes=episodes)


def reordered(trace, rng):
    episodes = [*trace.episodes]
    one, two = rng.choice(len(episodes), 2, replace=False)
    episodes[one], episodes[two] = episodes[two], episodes[one]
    return replace(trace, episodes=episodes)


def other_model(trace, rng):
    prints = [*trace.head.model_fingerprints]
    prints[rng.integers(len(prints))] = "0" * 16
    return replace(trace, head=replace(trace.head, model_fingerprints=prints))


def other_size(trace, rng):
    profiles = [*trace.head.profiles]
    at = rng.integers(len(profiles))
    profiles[at] = replace(profiles[at], body_parameters=profiles[at].body_parameters + 1)
    return replace(trace, head=replace(trace.head, profiles=profiles))


def damaged(folder, rng):
    """A bit of a file, one that says something: a few of the headers of its pages are read by nobody."""
    path = Path(rng.choice([str(path) for path in traces_of(folder)]))
    content = path.read_bytes()
    while True:
        changed = bytearray(content)
        changed[int(rng.integers(4, len(content) // 4))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        try:
            write_trace(path.with_name("read"), read_trace(path))
        except ValueError:
            return path.name
        same = path.with_name("read").read_bytes() == content
        path.with_name("read").unlink()
        if not same:
            return path.name


def missing(folder, rng):
    path = Path(rng.choice([str(path) for path in traces_of(folder)]))
    path.unlink()
    return path.name


def of_answers(change):
    def corruption(folder, rng, traced=None):
        paths = sorted(folder.glob("runs/**/*.safetensors"))
        if traced is not None:
            paths = [path for path in paths if path.with_suffix(".parquet").is_file()]
        path = Path(rng.choice([str(path) for path in paths]))
        change(Answers.load(path), rng, traced).save(path)
        return path.name

    return corruption


def kept_cost(answers, rng, traced):
    unit = rng.choice(list(answers.costs))
    cost = answers.costs[unit].copy()
    cost[rng.integers(traced or len(cost))] += 1e-6 * cost.max() + 1e-6
    return replace(answers, costs={**answers.costs, unit: cost})


def kept_array(name):
    def change(answers, rng, traced):
        array = getattr(answers, name).copy()
        at = rng.integers(traced or len(array))
        array[at] = array[at] + 1 if array.dtype == float else not array[at]
        return replace(answers, **{name: array})

    return change


def of_json(name, lines=False):
    """Another number in a JSON file, by 1 %, or one of a row of them."""

    def corruption(folder, rng):
        path = folder / name
        text = path.read_text()
        documents = [json.loads(line) for line in text.splitlines()] if lines else [json.loads(text)]
        numbers = [*_numbers(documents)]
        holder, key = numbers[rng.integers(len(numbers))]
        holder[key] = holder[key] * 1.01 + 0.001
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        return path.name

    return corruption


def _numbers(tree):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in ("seed", "parameters"):
            yield tree, key


def lost_row(folder, rng):
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    del lines[rng.integers(len(lines))]
    path.write_text("".join(lines))
    return path.name


def table_digit(folder, rng):
    path = folder / "table.md"
    text = path.read_text()
    digits = [at for at, letter in enumerate(text) if letter in "0123456789"]
    at = digits[rng.integers(len(digits))]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    return path.name


def other_threshold(folder, rng):
    path = folder / "runs" / str(rng.choice(["manifest.json", "thresholds.json"]))
    content = json.loads(path.read_text())
    thresholds = content["thresholds"] if path.stem == "manifest" else content
    own = thresholds[rng.choice(sorted(thresholds))]
    own[rng.integers(len(own))] += 1e-4
    path.write_text(json.dumps(content))
    return None  # what was decoded stands against it


def lower(one, rng, head):
    return replace(one, decisions=one.decisions + np.eye(COLUMNS)[0])


CORRUPTIONS = {
    "a token": of_episode(flipped_token),
    "an unknown token": of_episode(unknown_token),
    "a token, and its text": of_episode(token_and_text),
    "a writer": of_episode(flipped_writer),
    "a verdict": of_episode(lambda one, rng, head: replace(one, correct=not one.correct)),
    "a score over the threshold": of_episode(score_over_threshold, decided=True),
    "a score on its side of the threshold": of_episode(score_on_its_side, decided=True),
    "a ledger entry": of_episode(ledger_entry),
    "seconds": of_episode(ledger_seconds),
    "an end of sequence": of_episode(ended_otherwise),
    "a prompt id": of_episode(lambda one, rng, head: replace(one, prompt=other(one.prompt, rng, 60))),
    "a text": of_episode(lambda one, rng, head: replace(one, text=one.text[:-1])),
    "a problem": of_episode(lambda one, rng, head: replace(one, example_hash="0" * 32)),
    "the name of a problem": of_episode(lambda one, rng, head: replace(one, example=one.example + "0")),
    "the number of decisions": of_episode(lower),
    "a draft": of_episode(draft, decoding="speculative"),
    "a draft that is lost": of_episode(lost_draft, decoding="speculative"),
    "an episode that is lost": of_trace(dropped),
    "an episode in another's place": of_trace(duplicated),
    "two responses swapped": of_trace(swapped),
    "two episodes swapped": of_trace(reordered),
    "a model": of_trace(other_model),
    "the size of a model": of_trace(other_size),
    "a bit of a file": damaged,
    "a file": missing,
    "a kept cost": of_answers(kept_cost),
    "a kept verdict": of_answers(kept_array("correct")),
    "a kept ending": of_answers(kept_array("terminated")),
    "a kept number of tokens": of_answers(kept_array("tokens")),
    "a kept number of LLM tokens": of_answers(kept_array("llm_tokens")),
    "a number of a row": of_json("results.jsonl", lines=True),
    "a row": lost_row,
    "a number of the summary": of_json("summary.json"),
    "a digit of the table": table_digit,
    "a threshold": other_threshold,
}
"""By name: what changes one thing in a folder, drawn with a generator, and gives the name of the file it is in."""
