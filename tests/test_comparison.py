"""A policy beside each model alone: the figures of an evaluation, in one call."""

import pytest

from agents.common.comparison import compare
from agents.common.rollout import decode, decode_alone
from agents.heuristics import Always, Uncertainty
from envs.costs import Flops
from envs.models.loading import embedded_pool
from envs.tasks.arithmetic import ArithmeticTask
from experiments.evaluation.answers import Answers


def test_a_comparison_says_what_an_evaluation_says():
    pool, task, policy = embedded_pool(), ArithmeticTask("easy"), Uncertainty("margin")
    examples = task.examples("validation", 4)
    compared = compare(pool, task, examples, {"margin": policy, "all": Always(slm=False)}, threshold=0.8)
    assert list(compared) == ["embedded/slm", "embedded/llm", "margin", "all"]
    llm = Answers.of(decode_alone(pool.models[-1], task, examples, pool=pool), pool)
    expected = Answers.of(decode(pool, task, examples, policy, 0.8), pool, policy).row(llm)
    found = compared["margin"]
    assert 0 < found.llm_share < 1
    assert (found.accuracy, found.llm_share) == pytest.approx((expected["accuracy"], expected["llm_share"]), abs=1e-5)
    assert found.cost == pytest.approx(expected["cost_bytes"], abs=1e-5)
    assert (compared["embedded/llm"].cost, compared["embedded/llm"].llm_share) == (1, 1)
    assert compared["embedded/slm"].llm_share == 0
    # a router that always asks the LLM has the SLM read along
    assert compared["all"].cost > 1
    assert f"{compared}".splitlines()[3].startswith("margin ")
    [*_, flops] = compare(pool, task, examples[:1], policy, cost=Flops()).items()
    assert flops[0] == "policy"
    assert flops[1].cost > 0
    with pytest.raises(ValueError, match="called embedded/slm, as a model"):
        compare(pool, task, examples, {"embedded/slm": policy})
