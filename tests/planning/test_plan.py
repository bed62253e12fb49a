"""The search: what it lists is consistent, and what it chooses is the best of it."""

from dataclasses import asdict, replace

import pytest

from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import job_ranks
from megatron_dgpo.planning import memory
from megatron_dgpo.planning.hardware import GPUS, Cluster, Efficiencies
from megatron_dgpo.planning.plan import EQUAL, Planner, choose, sides_of, workload_of
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide, Workload, rollout_sides
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.planning.step_time import (
    Seconds,
    forward_time,
    head_time,
    old_logprobs_time,
    reference_time,
    rollout_time,
    update_time,
)
from megatron_dgpo.weights.architectures import Architecture
from tests.layouts import make_config

SEVEN = Architecture("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False, True, False, 1e-6, 1e6, None, 131072, None)
WORK = Workload(64, 8, 200, 900, 512, 3072)
H100 = Cluster(GPUS["h100"], 8)


@pytest.fixture(scope="module")
def plans():
    return Planner(Sizes(SEVEN), WORK, H100).search(8)


def test_what_runs_fits_and_what_does_not_says_why(plans):
    running = [plan for plan in plans if plan.problem is None]
    assert running and len(running) < len(plans)
    for plan in running:
        assert plan.gpus == 8
        for stage in range(plan.trainer.pipeline):
            assert max(plan.peaks(stage).values()) <= H100.gpu.memory_bytes
        assert plan.server.concurrent >= 1 and plan.step_s > 0
    assert {plan.rollout.shared for plan in running} == {True, False}


def test_the_chosen_is_as_fast_as_any(plans):
    chosen = choose(plans, H100)
    assert chosen.step_s <= EQUAL * min(plan.step_s for plan in plans if plan.problem is None)
    assert choose([plan for plan in plans if plan.problem], H100) is None


def test_sleeping_servers_have_more_cache_than_waking_ones(plans):
    """Both on the trainer's GPUs: what the trainer needs only while it trains is theirs while they sample."""
    shared = [plan for plan in plans if plan.problem is None and plan.rollout.shared]
    assert shared and all(plan.rollout.sleep for plan in shared)
    planner = Planner(Sizes(SEVEN), WORK, H100)
    for plan in shared[:20]:
        awake = replace(plan.rollout, sleep=False)
        other = planner.evaluate(plan.trainer, awake, plan.server.fraction, plan.server.concurrent)
        peaks = [max(found.peaks(0).values()) for found in (plan, other) if found.stages]
        assert peaks[0] <= H100.gpu.memory_bytes and peaks[-1] >= peaks[0]


def test_servers_of_a_shared_machine_are_whole_machines_servers():
    """Machines of six GPUs: a server of four would have two of another."""
    found = [rollout for rollout, _ in rollout_sides(SEVEN, 12, 6, shared=True)]
    assert [(rollout.tensor, rollout.servers) for rollout in found] == [(1, 12), (2, 6), (3, 4), (6, 2)]


def test_a_config_whose_servers_sleep_shares_all_gpus():
    servers = {"sleep": True, "tensor": 2, "count": 4}
    trainer, rollout = sides_of(make_config("unused", {"tensor": 2}, servers=servers), 32, 8)
    assert trainer.world_size == rollout.num_workers == 32 and rollout.shared and rollout.sleep
    assert job_ranks(make_config("unused", {"tensor": 2}, servers=servers), 32, 0) == 32
    with pytest.raises(UsageError, match=r"of --gpus=32 the trainer takes 30 .* 32: either must take all"):
        sides_of(make_config("unused", {"tensor": 3}, servers=servers), 32, 8)


def test_time_follows_its_causes():
    sizes, side = Sizes(SEVEN), TrainerSide(2, 2, 2, sequence=True)
    base = update_time(sizes, WORK, side, H100)
    # Twice the prompts are twice the micro-batches, but for ramp and optimizer.
    twice = update_time(sizes, Workload(128, 8, 200, 900, 512, 3072), side, H100)
    assert 1.8 < twice.total / base.total < 2.0
    assert update_time(sizes, WORK, TrainerSide(2, 2, 2, sequence=True, recompute="full"), H100).total > base.total
    # Interleaving divides the ramp, with more messages.
    interleaved = update_time(sizes, WORK, TrainerSide(2, 2, 2, 2, sequence=True), H100)
    assert interleaved.bubble == pytest.approx(base.bubble / 2) and interleaved.network > base.network
    # Tensor parallelism across machines goes over the network.
    far = update_time(sizes, WORK, side, Cluster(GPUS["h100"], 1))
    assert far.network > 5 * base.network


@pytest.mark.parametrize(
    "algorithm, minibatches, old, reference",
    [
        ({}, 1, 0, 1),
        ({}, 4, 1, 1),
        ({"old_logprobs": "sampled"}, 4, 0, 1),
        ({"scored_by": "old"}, 1, 0, 1),
        ({"scored_by": "old"}, 4, 1, 1),
        ({"credit": "uniform"}, 4, 1, 0),
        ({"credit": "uniform", "kl": "reward"}, 1, 1, 1),
        ({"kl": "reward"}, 1, 1, 2),
        ({"kl": "reward", "old_logprobs": "sampled"}, 4, 1, 2),
    ],
)
def test_passes_are_planned_as_they_are_made(algorithm, minibatches, old, reference):
    """Those that `update` makes: times what one takes where only that one is made."""
    config = make_config("unused", algorithm=algorithm, batch={"minibatches": minibatches})
    work, plain = (
        workload_of(config, 32, 64),
        workload_of(make_config("unused", batch={"minibatches": minibatches}), 32, 64),
    )
    setting = TrainerSide(2, 2, 2), H100
    one = forward_time(Sizes(SEVEN), plain, *setting, head_time(Sizes(SEVEN), plain, *setting, False))
    assert old_logprobs_time(Sizes(SEVEN), work, *setting) == (one if old else Seconds())
    assert reference_time(Sizes(SEVEN), work, *setting) == reference_time(Sizes(SEVEN), plain, *setting) * reference


def test_plans_with_different_efficiencies_in_one_process():
    """Neither changes the other, and no time forgets them: half of every rate is twice as long, to the bit."""
    halved = {name: value * 2 if name.endswith("_s") else value / 2 for name, value in asdict(Efficiencies()).items()}
    sizes, work = Sizes(SEVEN), replace(WORK, minibatches=2)
    slow_cluster = replace(H100, efficiencies=Efficiencies(**halved))
    usual_planner, slow_planner = (Planner(sizes, work, cluster) for cluster in (H100, slow_cluster))
    trainer = TrainerSide(2, 2, 2, recompute="selective", reference="host", distributed_optimizer=True)
    layout = trainer, RolloutSide(2, 4, shared=True, sleep=True), 0.5, 64
    usual, slow, again = (planner.evaluate(*layout) for planner in (usual_planner, slow_planner, usual_planner))
    assert len(usual.phases) == 6
    assert slow.phases == {name: phase * 2 for name, phase in usual.phases.items()}
    assert again == usual


def test_decoding_is_bound_by_memory_until_the_batch_is_large():
    sizes, rollout = Sizes(SEVEN), RolloutSide(1, 4)
    _, few = rollout_time(sizes, WORK, rollout, H100, 16)
    _, many = rollout_time(sizes, WORK, rollout, H100, 128)
    assert few.bound == "memory" and few.total > 2 * many.total
    with pytest.raises(ValueError):
        rollout_time(sizes, WORK, rollout, H100, 0)


def test_a_weight_update_has_its_memory():
    """NCCL's communicator on both sides; on a shared GPU gathered tensors and copies, in the cache's place."""
    sizes = Sizes(SEVEN)
    planner = Planner(sizes, WORK, H100)
    assert memory.trainer_memory(sizes, WORK, TrainerSide(2, 2, 2), 0)["weight transfer's NCCL"] == 2**29
    for shared in (True, False):
        rollout = RolloutSide(8, 1, shared=shared, sleep=shared)
        items = planner.server(rollout, 0.5).memory
        assert items["weight transfer's NCCL"] == 2**29
        update = memory.ipc_update(sizes, 8, 2)
        # Embedding, twice whole and in two buffers, and once more with an eighth of it.
        assert update == pytest.approx(5.125 * 152064 * 3584 * 2, rel=0.01)
        fraction = (sum(items.values()) - items["vLLM KV cache"] + 0.9 * update) / H100.gpu.memory_bytes
        problem = planner.server(rollout, fraction).problem
        assert "the buffers of a weight update" in problem if shared else problem is None
