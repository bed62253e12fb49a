"""How sequences are packed, ordered, dealt to micro-batches and cut over ranks does not change loss or gradients."""

import itertools
import random

import pytest
import torch

from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

VOCAB = 131
ALGORITHMS = {
    "paper": dict(tau=0.02),
    "sequence mean": dict(tau=0.1, aggregation="sequence_mean"),
    "response max": dict(entropy_norm="response_max", tau=0.05, entropy_bonus=0.01),
    "effective share, sequence clip, KL": dict(
        tau_mode="effective_share", aggregation="fixed_length", policy_loss="sequence_clip", kl="k3", kl_coefficient=0.1
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    return [make_tiny_model(folder / str(seed), "qwen3", vocab_size=VOCAB, seed=seed) for seed in (1, 2)]


def table(shortest: bool) -> list[tuple]:
    """(prompt, response, advantage, generator's log-probs, counted). shortest: of one to four tokens in all."""
    draw = random.Random(5)
    found = []
    for _ in range(12):
        prompt = 1 if shortest else draw.randint(1, 6)
        response = draw.randint(1, 3) if shortest else draw.randint(1, 25)
        tokens = [draw.randrange(3, VOCAB) for _ in range(prompt + response)]
        logprobs = [-5 + draw.random() for _ in range(response)]
        found.append((tokens[:prompt], tokens[prompt:], draw.uniform(-1, 1), logprobs, draw.random() < 0.8))
    return found


def random_plans(count: int, seed: int) -> list[list[list[int]]]:
    """Of the table's rows, in any order and number of micro-batches, some of them empty."""
    draw, plans = random.Random(seed), []
    for _ in range(count):
        order = draw.sample(range(12), 12)
        cuts = sorted(draw.choices(range(13), k=draw.randint(0, 6)))
        plans.append([order[a:b] for a, b in itertools.pairwise([0, *cuts, 12])])
    return plans


def steps(model_dirs, parallel, rows, plans):
    """{algorithm: [(loss, metrics, all gradients as one vector)]} of an update after each plan, from the same weights.

    All in one process, whose start takes longer.
    """
    from megatron_dgpo.algorithm.objective import Objective
    from megatron_dgpo.micro_batch import TrainingSequence
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.packed import pack_micro_batches
    from megatron_dgpo.model.parallel import context_group, initialize_parallel, replica, tensor_group
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.model.reference import Reference
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    policy_dir, reference_dir = model_dirs
    configs = {
        name: make_config(
            policy_dir,
            parallel,
            model={"reference": reference_dir},
            algorithm=algorithm | {"old_logprobs": "sampled"},
            optimizer={"clip_grad": 0.0},
            batch={"forward_micro_batches": 3},
        )
        for name, algorithm in ALGORITHMS.items()
    }
    config = configs["paper"]
    architecture = read_architecture(policy_dir)
    initialize_parallel(config.parallel, 1)
    policy, reference = Policy(config, architecture, 10), Reference(config, architecture)
    sequences = [TrainingSequence.of(*row) for row in rows]
    number, replicas = replica()
    found = {name: [] for name in configs}
    for plan in plans:
        # As many micro-batches on every replica; which of them have sequences differs.
        mine = [[sequences[i] for i in part] if n % replicas == number else [] for n, part in enumerate(plan)]
        micro_batches = reference.attach(pack_micro_batches(mine, config.parallel))
        for name in configs:
            policy.load(policy_dir)
            objective = Objective(configs[name], VOCAB, reference.head_weight, tensor_group(), context_group())
            result = policy.step(micro_batches, objective)
            gradients = torch.cat([p.main_grad.flatten() for m in policy.modules for p in m.parameters()]).clone()
            found[name].append((result.metrics["loss"] / result.metrics["normaliser"], result.metrics, gradients))
    return found


def assert_same(found, expected, tolerance):
    """All updates of `found` and the first of `expected`."""
    for name, updates in found.items():
        loss, metrics, gradients = expected[name][0]
        for other_loss, other_metrics, other_gradients in updates:
            assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-7), name
            assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5), name
            assert (other_gradients - gradients).norm() <= tolerance * gradients.norm(), name


def test_any_packing_gives_the_same(models):
    rows, plans = table(shortest=False), random_plans(20, 1)
    [found] = run_ranks(steps, 1, models, {}, rows, [[list(range(12))], *plans])
    assert_same(found, found, 3e-6)
    for shared in run_ranks(steps, 3, models, {}, rows, plans[:4]):
        assert_same(shared, found, 3e-6)


@pytest.mark.parametrize("shortest", [True, False])
@pytest.mark.parametrize("context", [2, 4])
def test_sequences_of_any_length_may_be_cut(models, context, shortest):
    """Shorter than 2·cp, so that ranks hold no token of a sequence, or none of any response in a micro-batch."""
    rows, plans = table(shortest), random_plans(4, 2) + [[[i] for i in range(12)]]
    [alone] = run_ranks(steps, 1, models, {}, rows, [[list(range(12))]])
    for cut in run_ranks(steps, context, models, {"context": context}, rows, plans):
        assert_same(cut, alone, 3e-5)


@pytest.mark.parametrize("parallel, world", [({"context": 2}, 2), ({"pipeline": 2}, 2)], ids=["cp2", "pp2"])
def test_empty_micro_batches_change_no_bit(models, parallel, world):
    rows, plan = table(shortest=False), [part for part in random_plans(1, 3)[0] if part]
    for found in run_ranks(steps, world, models, parallel, rows, [plan, [[], *plan, [], []]]):
        for plain, padded in found.values():
            assert padded[:2] == plain[:2]
            assert torch.equal(padded[2], plain[2])
