"""Groups in flight, simulated: between the two sides' own times, and as the trainer runs them."""

from pathlib import Path

import pytest

from megatron_dgpo.planning import step_time
from megatron_dgpo.planning.hardware import GPUS, Cluster
from megatron_dgpo.planning.in_flight import InFlight, recommended, simulate
from megatron_dgpo.planning.plan import Planner, settings_of
from megatron_dgpo.planning.sides import RolloutSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.weights.architectures import read_architecture

SIZES = Sizes(read_architecture(Path(__file__).parents[2] / "examples" / "qwen2.5-32b" / "model"))
H100 = Cluster(GPUS["h100"], 8)
# Of the paper's run, a quarter of its prompts.
WORK = Workload(64, 16, 200, 4200, 2048, 20480, minibatches=8)
SERVERS = RolloutSide(8, 4, False)
CONCURRENT, SYNC_S = 200, 1.0


def steps(train_s, work=WORK, most=4):
    return [simulate(SIZES, work, SERVERS, H100, CONCURRENT, train_s, SYNC_S, s) for s in range(most + 1)]


def sampling_s(work=WORK):
    return sum(s.total for s in step_time.rollout_time(SIZES, work, SERVERS, H100, CONCURRENT))


def test_without_staleness_one_side_waits_for_the_other():
    sampling, train_s = sampling_s(), 150.0
    [alone] = steps(train_s, most=0)
    assert alone.step_s == pytest.approx(sampling + train_s + SYNC_S, rel=0.15)
    assert alone.ranks_wait == pytest.approx(1 - (train_s + SYNC_S) / alone.step_s, abs=0.01)
    assert alone.servers_busy == pytest.approx(alone.ranks_wait, abs=0.01)


@pytest.mark.parametrize("train_s", [30.0, 250.0, 900.0])
def test_a_step_takes_no_less_than_the_ranks_and_no_longer_with_more_staleness(train_s):
    found = steps(train_s)
    for fewer, more in zip(found, found[1:], strict=False):
        assert more.step_s <= fewer.step_s * 1.02
    assert all(one.step_s >= train_s + SYNC_S for one in found)
    if train_s == 900:
        # The ranks are the slower side: one step ahead is all that helps, and they hardly wait.
        assert found[1].ranks_wait < 0.01 and recommended(found).staleness == 1
        assert found[1].step_s == pytest.approx(train_s + SYNC_S, rel=0.02)
    if train_s == 30:
        # The servers are: they pause for pushes alone, and to make their caches anew.
        assert found[4].servers_busy > 0.85 and found[4].ranks_wait > 0.5


def test_responses_of_equal_length_need_one_step_ahead():
    """There is no tail whose end a step would wait for, where a server decodes all of its own at once."""
    work = Workload(50, 16, 200, 4000, 2048, 4000, minibatches=8)
    sampling = sampling_s(work)
    found = steps(sampling, work)
    assert found[0].step_s == pytest.approx(2 * sampling + SYNC_S, rel=0.1)
    assert found[1].step_s == pytest.approx(sampling, rel=0.15)
    assert recommended(found).staleness == 1


def test_the_least_of_what_is_as_good_is_recommended():
    found = [InFlight(s, step_s, 0, 0) for s, step_s in enumerate((100.0, 60.0, 51.4, 50.0, 50.0))]
    assert recommended(found).staleness == 2


def test_a_plan_has_the_staleness_that_is_recommended():
    planner = Planner(SIZES, WORK, H100)
    plans = planner.search(32, ("separate",))
    plan = planner.best_ahead(plans, 2)
    assert plan.in_flight[0].step_s > plan.ahead.step_s and len(plan.in_flight) == 3
    assert plan.ahead.step_s < min(p.step_s for p in plans if p.problem is None)
    assert settings_of(plan, WORK, 8)["rollout"]["max_staleness"] == plan.ahead.staleness >= 1
    assert planner.best_ahead([], 2) is None
