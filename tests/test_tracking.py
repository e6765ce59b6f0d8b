import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments.common.config import CONF, build, register_schemas
from experiments.common.tracking import Tracker, Wandb, comparable, labelled, read_rows
from tests.programs import call


def epochs(*numbers, run="round 1", **more):
    return [{"run": run, "epoch": number, "loss": 1 / (number + 1), **more} for number in numbers]


def tracked(folder, *rows):
    with Tracker(folder) as track:
        for row in rows:
            track(row)
    return read_rows(folder / "metrics.jsonl")


def test_a_run_that_goes_on_appends_and_reports_no_row_twice(tmp_path):
    begun = [{"run": "round 1", "tokens": 40}, *epochs(0, 1, 2)]
    assert tracked(tmp_path, *begun) == begun
    # a router reports all its epochs again, then new ones, its calibration, and the second round
    rest = [*epochs(3), {"run": "round 1", "ece": 0.1}, {"run": "round 2", "tokens": 7}, *epochs(0, 1, run="round 2")]
    assert tracked(tmp_path, *begun, *rest) == [*begun, *rest]
    assert tracked(tmp_path, *begun, *rest) == [*begun, *rest]


def test_rows_between_the_checkpoint_and_the_interruption_stand_once(tmp_path):
    def steps(*numbers, fps=1.0):
        return [{"run": "ppo", "time/total_timesteps": float(number), "time/fps": fps} for number in numbers]

    begun = steps(100, 200, 300)
    tracked(tmp_path, *begun)
    # it goes on from 150, and rows fall at steps of its own: those that were covered are skipped
    assert tracked(tmp_path, *steps(180, 280, 380, 480, fps=2.0)) == [*begun, *steps(380, 480, fps=2.0)]


def test_series_of_one_name_and_rows_that_count_nothing_are_told_apart(tmp_path):
    points = [{"run": "oracle", "threshold": None, "accuracy": number / 9} for number in range(4)]
    twice = [*epochs(0, 1, 2), *epochs(0, 1)]
    tracked(tmp_path, *twice, *points[:2])
    assert tracked(tmp_path, *epochs(0, 1, 2), *epochs(0, 1, 2), *points) == [
        *twice,
        *points[:2],
        *epochs(2),
        *points[2:],
    ]
    seen = []
    track = labelled(seen.append, split=3)
    labelled(track, agent="knn")({"run": "knn", "neighbours": 4})
    assert seen == [{"split": 3, "agent": "knn", "run": "knn", "neighbours": 4}]
    rows = [{**seen[0], "split": split} for split in (0, 1)]
    assert tracked(tmp_path / "other", *rows) == tracked(tmp_path / "other", *rows) == rows


def test_a_half_written_last_line_is_dropped_and_another_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    begun = epochs(0, 1)
    tracked(tmp_path, *begun)
    with path.open("a") as file:
        file.write('{"run": "round 1", "epo')
    assert read_rows(path) == begun
    assert tracked(tmp_path, *epochs(0, 1, 2)) == epochs(0, 1, 2)
    path.write_text('{"run": "round 1", "epo\n' + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1, is no row .* delete the line"):
        Tracker(tmp_path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="line 1, is no row"):
        Tracker(tmp_path)


def test_a_start_that_reports_nothing_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="refused"), Tracker(tmp_path / "new"):
        raise ValueError("refused")
    assert not (tmp_path / "new").exists()
    tracked(tmp_path, *epochs(0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("half")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="refused"), Tracker(tmp_path):
        raise ValueError("refused")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_agents_of_all_kinds_are_compared_under_one_name():
    played = {"rollout/ep_rew_mean": 0.5, "rollout/success_rate": 0.75, "rollout/llm_share": 0.25}
    searched = {"return": 0.5, "accuracy": 0.75, "llm_share": 0.25, "iteration": 3}
    same = {"training/return": 0.5, "training/accuracy": 0.75, "training/llm_share": 0.25, "training/cost": 0.25}
    assert comparable(played, "bytes") == comparable(searched, "bytes") == same
    evaluated = {"threshold": 0.4, "accuracy": 0.9, "llm_share": 0.1, "cost_bytes": 0.2, "cost_flops": 0.3}
    assert comparable(evaluated, "flops") == {
        "evaluation/accuracy": 0.9, "evaluation/llm_share": 0.1, "evaluation/cost": 0.3
    }  # fmt: skip
    # a baseline's row, one of several policies', and rows that measure none of it
    for row, cost in (({**evaluated, "threshold": None}, "bytes"), (evaluated, None), (epochs(0)[0], "bytes")):
        assert comparable(row, cost) == {}


def test_online_without_a_login_is_refused_when_settings_are_built(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", overrides=["track=wandb", "track.mode=online"])
    with pytest.raises(ValueError, match=r"track: .*needs a login.*`wandb login`.*track.mode=offline") as refused:
        build(config, "track")
    assert "\n" not in f"{refused.value}"


def inspected(folder):
    """The records of a start's .wandb file, as wandb's own reader prints them: (type, content)."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def files_of(folder):
    """What the starts of a run have left, in order: the records of each .wandb file by their type."""
    starts = sorted((folder / "wandb").glob("offline-run-*"))
    return [inspected(start) for start in starts]


def of_kind(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def logged(records):
    """What was logged at each step: wandb's own measurements left out."""
    return {
        record["step"].get("num", 0): {key: value for key, value in record["item"].items() if not key.startswith("_")}
        for record in of_kind(records, "history")
    }


def test_an_interrupted_run_goes_on_in_the_same_run_of_wandb(tmp_path):
    folder, picture = tmp_path / "multirun" / "ppo-seed0", tmp_path / "curve.png"
    Image.new("L", (2, 2)).save(picture)
    config = {"agent": {"steps": 400}, "evaluation": {"cost": "bytes"}}
    rows = [{"run": "ppo", "time/total_timesteps": 100.0 * n, "rollout/ep_rew_mean": n / 10} for n in range(1, 5)]
    rows.append({"run": "ppo", "threshold": 0.3, "accuracy": 0.5, "llm_share": 0.1, "cost_bytes": 0.2})
    measures = {"aiq": {"value": 0.9, "interval": [0.8, 0.95]}, "qnc": {"value": None, "interval": [None, None]}}
    policy = {"curve": [[0.1, 0.4], [1.0, 0.9]], "band": [[0.1, 0.3, 0.5]], "cost_at": {"0.95": 0.2}}

    def start(some, broken_off):
        with Wandb().open(folder, config, "train") as track:
            for row in some:
                track(row)
            if broken_off:
                raise KeyboardInterrupt
            track.summary({"seed": 7, "policies": {"ppo": {**policy, "measures": measures}}}, {"curve": picture})

    with pytest.raises(KeyboardInterrupt):
        start(rows[:3], broken_off=True)
    start(rows[1:], broken_off=False)  # from the checkpoint after the first
    first, second = files_of(folder)
    kept = json.loads((folder / "wandb_run.json").read_text())
    for records in (first, second):
        (run,) = of_kind(records, "run")
        assert (run["run_id"], run["display_name"], run["run_group"]) == (kept["id"], "ppo-seed0", "multirun")
        assert run["resume"] is True
        assert run["config"]["update"].items() >= config.items()
        metrics = of_kind(records, "metric")
        assert [one["step_metric"] for one in metrics if one.get("glob_name") == "*"] == ["seconds"]
    begun, rest = logged(first), logged(second)
    assert [begun[step]["ppo/time/total_timesteps"] for step in (0, 1, 2)] == [100, 200, 300]
    assert list(begun) == [0, 1, 2]
    assert list(rest) == [3, 4, 5]
    assert rest[3]["ppo/time/total_timesteps"] == 400
    assert rest[3]["training/return"] == pytest.approx(0.4)
    assert {key: rest[4][f"evaluation/{key}"] for key in ("accuracy", "llm_share", "cost")} == {
        "accuracy": 0.5, "llm_share": 0.1, "cost": 0.2
    }  # fmt: skip
    seconds = [step["seconds"] for step in (*begun.values(), *rest.values())]
    assert seconds == sorted(seconds)
    assert {"ppo/curve", "ppo/band", "curve", "table"} <= {key.split(".")[0] for key in rest[5]}
    (table,) = folder.glob(f"wandb/offline-run-*/files/{rest[5]['table.path']}")
    assert json.loads(table.read_text()) == {
        "columns": ["policy", "measure", "value", "low", "high"],
        "data": [["ppo", "aiq", 0.9, 0.8, 0.95], ["ppo", "qnc", None, None, None]],
    }
    ended = {key: value for update in of_kind(second, "summary") for key, value in update["update"].items()}
    assert ended["seed"] == 7
    assert [record["exit_code"] for records in (first, second) for record in of_kind(records, "exit")] == [1, 0]
    assert read_rows(folder / "metrics.jsonl") == rows


def test_what_was_tracked_before_wandb_was_asked_for_is_there_too(tmp_path):
    tracked(tmp_path / "run", *epochs(0, 1))
    with Wandb().open(tmp_path / "run", {}, "train") as track:
        for row in epochs(0, 1, 2):
            track(row)
    (records,) = files_of(tmp_path / "run")
    assert [(step, row["round 1/epoch"]) for step, row in logged(records).items()] == [(0, 0), (1, 1), (2, 2)]
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3


def test_jobs_of_a_multirun_are_one_group_named_as_their_folders(tmp_path):
    call("train", "-m", "agent=entropy,margin", f"hydra.sweep.dir={tmp_path / 'sweep'}", "track=wandb")
    folders = [path for path in (tmp_path / "sweep").iterdir() if (path / "summary.json").is_file()]
    assert len(folders) == 2
    for folder in folders:
        (records,) = files_of(folder)
        (run,) = of_kind(records, "run")
        assert (run["run_group"], run["display_name"]) == ("sweep", folder.name)
        assert run["config"]["update"]["seed"] == 0
        assert [record["exit_code"] for record in of_kind(records, "exit")] == [0]
