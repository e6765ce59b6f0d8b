import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from agents.common.rollout import Scheduling
from agents.heuristics import Random, Uncertainty
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.models.loading import embedded_pool
from envs.models.pool import models_manifest
from envs.tasks.arithmetic import ArithmeticTask
from experiments.common.config import CONF, build, build_settings, register_schemas
from experiments.common.tracking import Tracker
from experiments.evaluation.answers import Answers
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.merge import gather
from experiments.evaluation.runner import Evaluation, evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.evaluation.summary import summarize
from experiments.reporting.figures import plot_curves
from tests.programs import call

ROOT = Path(__file__).parent.parent
SCRIPTS = ("demo", "train", "collect", "evaluate", "queries", "leaderboard", "speed", "pretrain", "verify")
QUICK = [
    "threads=1", "examples=4", "threshold_examples=3", "llm_shares=[0.1,0.5]", "bootstrap=20", "transcripts=2",
    "max_new_tokens=48", "oracle_budget=20", "draft_tokens=8",
    "refine=0",
    "refine_curve=null",
]  # fmt: skip


SUITES = ("decode", "env", "collect", "rl", "latency")
SLOW_SUITES = ("env", "collect", "latency")


PAIR_WAYS = ("llm_only_int8", "checked_entropy", "speculative_adaptive")


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def config_of(script, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(script, overrides=list(overrides))


def run(script, *overrides, check=True):
    command = [sys.executable, "-m", f"experiments.{script}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_composes(script):
    assert config_of(script)


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("agent", "task", "models", "track") for n in options(g)])
def test_every_option_composes_and_names_its_target(group, name):
    assert config_of("train", f"{group}={name}")[group]._target_


@pytest.mark.parametrize("name", [n for n in options("task") if n.startswith("arithmetic")])
def test_generated_tasks_build(name):
    task = build(config_of("train", f"task={name}"), "task")
    example = task.example("test", 0)
    assert task.is_correct(example, example.reference)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.ronds=3", "ronds"),
        ("agent.rounds=many", "rounds"),
        ("agent.training.epoch=3", "epoch"),
        ("task.levle=easy", "levle"),
        ("agent=citter", "citter"),
        ("models.dtyp=float32", "dtyp"),
        ("sed=1", "sed"),
        ("evaluation.exmples=3", "exmples"),
        ("evaluation.scheduling.gather=some", "gather"),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_is_named(override, message):
    with pytest.raises(HydraException, match=message):
        config_of("train", override)


@pytest.mark.parametrize(
    ("key", "override", "message"),
    [
        ("agent", "agent.rounds=0", "rounds"),
        ("agent", "agent.labels.case_3=perhaps", "perhaps"),
        ("task", "task.level=medium", "medium"),
        ("track", "track=jsonl", None),
        ("models", "models.names=[embedded/slm]", "at least two"),
        ("models", "models.names=[embedded/slm,embedded/xl]", "embedded/xl"),
        ("models", "models.dtype=float8", "float8"),
        ("models", "models.device=cuda", "device"),
        ("models", "models.rows=1000000000", "lower rows"),
    ],
)
def test_a_setting_out_of_range_is_named(key, override, message):
    config = config_of("train", override)
    if message is None:
        assert build(config, key)
    else:
        with pytest.raises(ValueError, match=f"{key}: .*{message}"):
            build(config, key)


def test_a_pool_given_as_mappings_builds():
    names = "[{name: embedded/slm, dtype: float32, device_map: null}, {name: embedded/llm, revision: null}]"
    assert build(config_of("train", f"models.names={names}"), "models").names == ["embedded/slm", "embedded/llm"]


def test_a_policy_pays_for_its_own_parameters():
    pool, task = embedded_pool(), ArithmeticTask()
    decoder = ExampleDecoder(pool, task, task.examples("test", 2), 128, Scheduling(rows=2))
    policy = RouterPolicy(RouterNetwork(pool.slm.width).eval(), models_manifest(pool))
    run = decoder.decode(policy, 0.5, "router")
    paid, unpaid = Answers.of(run, pool, policy).costs, Answers.of(run, pool).costs
    decisions = np.array([len(episode.tokens) for episode in run])
    size = sum(p.numel() for p in policy.network.parameters())
    np.testing.assert_allclose(paid["bytes"] - unpaid["bytes"], decisions * size * 4)
    np.testing.assert_allclose(paid["flops"] - unpaid["flops"], decisions * size * 2)
    np.testing.assert_array_equal(paid["llm_tokens"], unpaid["llm_tokens"])
    assert (paid["seconds"] > unpaid["seconds"]).all()


def test_llm_only_decoding_costs_one_and_the_slm_is_not_free(tmp_path):
    pool, task = embedded_pool(), ArithmeticTask()
    settings = EvaluationSettings(
        examples=4, threshold_examples=3, oracle=0, draft_tokens=4, max_new_tokens=72, scheduling=Scheduling(rows=4)
    )
    evaluation = Evaluation(pool, task, settings, tmp_path)
    baselines = evaluation.baselines()
    slm, llm = baselines.slm, baselines.llm
    row = llm.row(llm)
    assert {value for key, value in row.items() if key.startswith("cost_")} == {1.0}
    assert row["llm_share"] == 1.0
    row = slm.row(llm)
    assert 0 < row["cost_bytes"] < 0.2
    assert row["cost_llm_tokens"] == 0
    lengths = np.array([len(pool.encode(example.prompt)) for example in evaluation.examples])
    size, cached = pool.models[1].profile, llm.tokens + lengths - 1
    read = llm.tokens * (size.body_parameters + size.head_parameters) * 4
    assert (llm.costs["bytes"] > read).all()
    assert (llm.costs["bytes"] < read + size.kv_bytes_per_token * cached * (llm.tokens + 1)).all()
    kept = Evaluation(pool, task, settings, tmp_path).baselines()
    np.testing.assert_array_equal(kept.llm.costs["seconds"], llm.costs["seconds"])
    with pytest.raises(ValueError, match="made with draft_tokens 4, this run has 5"):
        Evaluation(pool, task, replace(settings, draft_tokens=5), tmp_path).baselines()


def test_rows_are_on_disk_before_the_run_ends(tmp_path):
    with Tracker(tmp_path) as track:
        track({"loss": 1.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"loss": 1.5}


@pytest.fixture
def start(capsys):
    """Runs a program in this process, where a new Python would take seconds: its exit code, and what it prints."""

    def started(script, *overrides):
        capsys.readouterr()
        code = 0
        try:
            call(script, *overrides)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return started


def test_train_then_evaluate_writes_what_is_promised(tmp_path):
    trained, evaluated = tmp_path / "train", tmp_path / "evaluate"
    small = ["agent.examples=8", "agent.training.epochs=2", "agent.training.batch_size=64"]
    call("train", "agent=citer", *small, f"hydra.run.dir={trained}", "track=wandb")
    assert {"config.yaml", "metrics.jsonl", "summary.json", "policy", "wandb"} <= {p.name for p in trained.iterdir()}
    call("evaluate", f"+saved.citer={trained / 'policy'}", *QUICK[1:], f"hydra.run.dir={evaluated}")
    names = {path.name for path in evaluated.iterdir()}
    assert {"config.yaml", "results.jsonl", "summary.json", "curve.png", "table.md", "index.html"} <= names
    rows = [json.loads(line) for line in (evaluated / "results.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows} == {"slm", "llm", "speculative", "oracle", "citer", "random", "entropy"}
    assert all(
        {"accuracy", "threshold", "seed", "cost_bytes", "cost_seconds", "llm_share"} <= row.keys() for row in rows
    )
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["models"]["llm"]["cost"] == 1.0
    assert summary["models"]["slm"]["accuracy"] == rows[0]["accuracy"]
    for policy in summary["policies"].values():
        assert policy["cost_at"].keys() == {"0.90", "0.95", "0.99"}
        costs, accuracies = zip(*policy["curve"], strict=True)
        assert list(costs) == sorted(costs)
        assert list(accuracies) == sorted(accuracies)
    assert (evaluated / "index.html").read_text().count("<article") == 2
    assert (evaluated / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_an_evaluation_goes_on_after_the_last_threshold_and_refuses_other_settings(tmp_path, monkeypatch):
    pool, task = embedded_pool(), ArithmeticTask()
    # drawn elsewhere
    monkeypatch.setattr("experiments.evaluation.report.plot_curves", lambda *given: None)
    monkeypatch.setattr("experiments.evaluation.report.page", lambda *given: "")
    config = config_of("evaluate", *QUICK, "max_new_tokens=24", "scheduling.rows=8")
    policies = {"random": Random(seed=1), "entropy": Uncertainty()}

    def evaluated(folder, config=config):
        with Tracker(folder) as track:
            return evaluate(pool, task, policies, build_settings(config, EvaluationSettings), folder, track)

    def rows(folder):
        lines = (folder / "results.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "cost_seconds"} for line in lines]

    evaluated(tmp_path / "whole")
    count = [0]
    decode = ExampleDecoder.decode

    def counted(self, *args):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return decode(self, *args)

    monkeypatch.setattr(ExampleDecoder, "decode", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "halves")
    assert [row["policy"] for row in rows(tmp_path / "halves")][-2:] == ["oracle", "random"]
    evaluated(tmp_path / "halves")
    # scores, the models alone on both sets of problems, and one run before the one that was cut off (no answer is right
    # in so few tokens: no threshold is tried on validation); that one, two more and the transcripts after
    assert count[0] == 7 + 4
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    other = config_of("evaluate", *QUICK, "max_new_tokens=64")
    with pytest.raises(ValueError, match="made with max_new_tokens 24, this run has 64"):
        evaluated(tmp_path / "whole", other)


def test_five_lines_lead_from_a_pool_a_task_and_policies_to_a_curve(pool, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = EvaluationSettings(
        examples=6,
        threshold_examples=4,
        llm_shares=[0.1, 0.5],
        refine=0,
        refine_curve=None,
        oracle=5,
        draft_tokens=4,
        max_new_tokens=64,
        scheduling=Scheduling(rows=8),
    )
    evaluation = Evaluation(pool, task, settings)
    results = evaluation.run({"entropy": Uncertainty(), "random": Random()})
    summary = summarize(results, samples=20)
    plot_curves(summary, Path("curve.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert summary["examples"] == 6
    assert summary["first"] == "entropy"
    for name in ("entropy", "random"):
        assert len(results.policies[name][0]) == len(results.thresholds[name][0]) == 2
        # the dearer the threshold, the more the LLM writes
        fewer, more = (run.llm_tokens.sum() for run in results.policies[name][0])
        assert fewer < more
    assert len(evaluation.transcripts({"entropy": Uncertainty()}, results)["entropy"]) == 6


def test_settings_of_an_evaluation_are_those_of_its_yaml_in_both_commands():
    given = ["examples=7", "llm_shares=[0.1,0.2]", "shared=there", "scheduling.rows=3"]
    settings = EvaluationSettings(
        examples=7, llm_shares=(0.1, 0.2), shared=Path("there"), scheduling=Scheduling(rows=3)
    )
    assert build_settings(config_of("evaluate", *given), EvaluationSettings) == settings
    nested = config_of("train", *(f"evaluation.{one}" for one in given))
    assert build_settings(nested.evaluation, EvaluationSettings) == settings
    assert build_settings(config_of("evaluate"), EvaluationSettings) == EvaluationSettings()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("examples=many", "examples: .*many"),
        ("examples=2.5", "examples: .*2.5"),
        ("bootstrap=0", "bootstrap must be at least 1, is 0"),
        ("start=-1", "start must be at least 0"),
        ("draft_tokens=-2", "draft_tokens"),
        ("oracle=-2", "oracle"),
        ("llm_shares=[0.5,1]", "llm_shares"),
        ("llm_shares=[few]", "llm_shares.*few"),
        ("llm_shares=0.5", "llm_shares"),
        ("cost=euros", "unknown cost 'euros'"),
        ("split=tests", "unknown split 'tests'"),
        ("scheduling.rows=0", "scheduling: rows must be at least 1"),
        ("scheduling.rows=some", "scheduling: "),
        ("scheduling.gather=2", "gather"),
    ],
)
def test_a_bad_setting_of_an_evaluation_is_named_in_both_commands(override, message):
    with pytest.raises(ValueError, match=message):
        build_settings(config_of("evaluate", override), EvaluationSettings)
    with pytest.raises(ValueError, match=message):
        build_settings(config_of("train", f"evaluation.{override}").evaluation, EvaluationSettings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": "many"}, "examples must be a whole number, is 'many'"),
        ({"llm_shares": []}, "llm_shares"),
        ({"llm_shares": ["few"]}, "llm_shares"),
        ({"tree_memory": 0}, "tree_memory must be at least 1"),
        ({"transcripts": -1}, "transcripts must be at least 0"),
    ],
)
def test_a_bad_setting_is_named_without_hydra_too(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


@pytest.mark.slow
def test_a_multirun_ends_in_one_report(tmp_path):
    quick = ["threads=1", "agent.examples=20", "evaluate=true", *(f"evaluation.{key}" for key in QUICK[1:])]
    sweep = ["agent=citer_s,citer_agreement", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    callback = "+hydra.callbacks.report={_target_: experiments.report.ReportAfterMultirun, first: citer_s, samples: 20}"
    run("train", "-m", *quick, *sweep, callback)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["policies"]) == ["citer_s", "citer_agreement"]
    assert all(policy["seeds"] == 2 for policy in summary["policies"].values())
    assert {"curve.png", "table.md", "results.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["policy"], row["seed"]) for row in rows if row["threshold"] is not None} == {
        (policy, seed) for policy in summary["policies"] for seed in (0, 1)
    }
    with pytest.raises(ValueError, match="no policy 'citer'"):
        gather(tmp_path, "citer")
    (tmp_path / "citer_s-seed0" / "evaluation" / "runs" / "citer_s" / "00.safetensors").unlink()
    with pytest.raises(ValueError, match="interrupted; start it again"):
        gather(tmp_path)
    with pytest.raises(ValueError, match="holds no evaluations"):
        gather(tmp_path / "multirun")


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("collect", ["agent=entropy"], "Uncertainty collects nothing before it is trained"),
        ("train", ["evaluate=true", "evaluation.cost=euros"], "euros"),
        ("evaluate", ["+saved.citer=nowhere"], "nowhere"),
        ("evaluate", ["cost=euros"], "euros"),
        ("evaluate", ["llm_shares=[]"], "llm_shares"),
        ("evaluate", ["split=tests"], "tests"),
        ("speed", ["suite=swift"], "swift"),
    ],
)
def test_a_mistake_ends_a_program_with_one_line_and_no_traceback(script, overrides, message, tmp_path, start):
    code, out, err = start(script, *overrides, f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert message in out + err
    assert "Traceback" not in out + err


def test_the_old_name_of_speed_still_runs_and_says_so(tmp_path):
    done = run("benchmark", "suite=swift", f"hydra.run.dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert "unknown suite 'swift'" in done.stdout + done.stderr
    assert done.stderr.splitlines()[0] == "python -m experiments.benchmark is called python -m experiments.speed now"


@pytest.mark.parametrize(
    "suite",
    [pytest.param(suite, marks=pytest.mark.slow) if suite in SLOW_SUITES else suite for suite in SUITES],
)
def test_benchmarks_print_their_report_last(suite, tmp_path, start):
    tiny = "{hidden_size: 32, layers: 1, heads: 2, kv_heads: 2, mlp_size: 32}"
    sizes = [f"slm={tiny}", f"llm={tiny}", "vocab_size=64", "prompt_tokens=8", "new_tokens=8", "rate_tokens=4"]
    sizes += [
        "long_tokens=16",
        "samples=2",
        "repeats=1",
        "rows_in_flight=[1,2]",
        "envs=2",
        "env_steps=3",
        "env_repeats=1",
        "plain_examples=2",
        "collect_examples=3",
        "collect_repeats=1",
        "rl_envs=4",
        "rl_steps=3",
        "rl_known_examples=4",
        "rl_references=8",
        "rl_oracle_examples=3",
        "rl_ppo_steps=64",
        "rl_ppo_envs=2",
        "+latency_thresholds={entropy: 0.95, checked_entropy: 0.3}",
        "latency_problems=2",
        "latency_rows=2",
        "latency_repeats=1",
        "pair_problems=2",
        "pair_repeats=2",
        "models.rows=1",
    ]
    if suite == "pair":
        sizes += ["pair_llms=[int8]", "models.dtype=bfloat16"]
    code, out, err = start("speed", f"suite={suite}", *sizes, f"hydra.run.dir={tmp_path}")
    assert code == 0, out + err
    report = json.loads(out.strip().splitlines()[-1])
    assert report == json.loads((tmp_path / "speed.json").read_text())
    assert report["suite"] == suite
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["quiet"] is (not report["machine"]["why"])
    assert ("the machine was not quiet: " in out) is not report["machine"]["quiet"]
    names = {
        "decode": {
            "bare_forward_over_wall",
            "reread_loop_over_ours",
            "routed_over_llm_only_1",
            "routed_over_llm_only_2",
            "llm_only_over_generate",
        },
        "env": set(),
        "collect": {"plain_over_ours", "two_processes_over_one"},
        "rl": {"shortcut_over_live", "tree_over_live", "checked_over_tree"},
        "latency": {
            *(
                f"{way}_over_{other}{end}"
                for other, ways in (
                    ("llm_only", ("entropy", "checked_entropy", "speculative", "speculative_adaptive")),
                    ("speculative", ("entropy", "checked_entropy")),
                    ("speculative_adaptive", ("entropy", "checked_entropy")),
                )
                for way in (f"{one}_seconds" for one in ways)
                for end in ("", "_low", "_high")
            ),
            *(
                f"{way}_{unit}_over_llm_only"
                for way in ("entropy", "checked_entropy", "speculative", "speculative_adaptive")
                for unit in ("bytes", "flops")
            ),
        },
        "pair": {
            *(
                f"{way}_over_llm_only{end}"
                for way in ("bare_passes", *(f"{one}_seconds" for one in PAIR_WAYS))
                for end in ("", "_low", "_high")
            ),
            *(f"{way}_{unit}_over_llm_only" for way in PAIR_WAYS for unit in ("bytes", "flops")),
        },
    }[suite]
    assert report["ratios"].keys() == names
    changed = report["rates"].pop("llm_only_int8_changed_tokens", 0)
    assert 0 <= changed < report["rates"].get("llm_only_tokens", 1)
    assert all(value > 0 for value in [*report["ratios"].values(), *report["rates"].values()])
    rates = {
        "decode": set(),
        "env": {"vector_steps_per_second"},
        "collect": {"reference_tokens_per_second"},
        "rl": {"shortcut_steps_per_second", "tree_steps_per_second", "ppo_steps_per_second"},
        "latency": {
            f"{way}_{what}"
            for way in ("llm_only", "entropy", "checked_entropy", "speculative", "speculative_adaptive")
            for what in ("ms_per_token", "ms_per_response", "llm_ms_per_response", "tokens", "llm_tokens")
        },
        "pair": {
            f"{way}_{what}"
            for way in ("llm_only", *PAIR_WAYS)
            for what in ("ms_per_token", "tokens", "llm_tokens", "right")
        },
    }[suite]
    assert rates <= report["rates"].keys()
