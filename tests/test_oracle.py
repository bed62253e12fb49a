"""A full DGPO step in every layout equals the dense float64 oracle: loss, every token's weight, all gradients."""

from dataclasses import replace

import pytest
import torch

from megatron_dgpo.config import Algorithm
from tests.layouts import LAYOUTS, MIXTURE_LAYOUTS, make_config
from tests.ranks import run_ranks
from tools.oracle import dense_step
from tools.tiny_models import MIXTURES, make_tiny_model

VOCAB = 131
TEMPERATURE = 0.8
ALGORITHMS = {
    "paper": dict(tau=0.02),
    "grpo": dict(credit="uniform"),
    "gate-off, sequence mean": dict(kappa=0.0, tau=0.1, aggregation="sequence_mean"),
    "response max, entropy bonus, clip": dict(
        entropy_norm="response_max", tau=0.05, entropy_bonus=0.01, clip_low=0.1, clip_high=0.3
    ),
}


def rows():
    """Eight responses of different lengths; their advantages, and old log-probs that leave the clip range."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(8):
        prompt = torch.randint(3, VOCAB, (4 + index % 3,), generator=generator).tolist()
        response = torch.randint(3, VOCAB, (5 + 3 * index % 11,), generator=generator).tolist()
        advantage = torch.randn((), generator=generator).item()
        found.append((prompt, response, advantage))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """[policy, reference, policy that sampled], with and without a tied head and q/k norms."""
    folder = tmp_path_factory.mktemp("oracle")
    return {
        family: [
            make_tiny_model(folder / f"{family}-{seed}", family, vocab_size=VOCAB, seed=seed) for seed in (1, 2, 3)
        ]
        for family in ("qwen2", "qwen3", *MIXTURES)
    }


def megatron_step(policy_dir, reference_dir, old_dir, parallel, algorithm, old_logprobs):
    """(loss, {row: weights}, this rank's part of all gradients by Hugging Face name).

    old_dir: the policy before the first update, where it is not the current one. old_logprobs: its, otherwise made up.
    """
    from megatron.core import parallel_state

    from megatron_dgpo.algorithm.objective import Objective
    from megatron_dgpo.batch import Batch
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.model.reference import Reference
    from megatron_dgpo.weights.architectures import read_architecture
    from tests.full_tensors import write_slices

    init_device()
    config = make_config(
        policy_dir,
        parallel,
        model={"reference": reference_dir},
        algorithm=algorithm,
        rollout={"temperature": TEMPERATURE},
        # Clipping would scale the gradients that are compared.
        optimizer={"clip_grad": 0.0},
    )
    architecture = read_architecture(policy_dir)
    initialize_parallel(config.parallel, 1)
    policy, reference = Policy(config, architecture, 10), Reference(config, architecture)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = list(range(8))[replica::replicas]
    table = rows()
    batch = Batch.from_sequences(
        [table[i][0] for i in mine],
        [table[i][1] for i in mine],
        [table[i][2] for i in mine],
        [old_logprobs[i] for i in mine] if old_logprobs else None,
        multiple_of=config.parallel.tensor,
    )
    micro_batches = reference.attach(batch.split(2))
    tp_group = parallel_state.get_tensor_model_parallel_group()
    objective = Objective(config, architecture.vocab_size, reference.head_weight, tp_group)
    if old_logprobs:
        micro_batches = [replace(part, old_logprobs=part.packed_generator_logprobs) for part in micro_batches]
    if old_dir:
        policy.load(old_dir)
        micro_batches = objective.freeze(policy.forward, micro_batches)
    policy.load(policy_dir)

    def credit(part, hidden_states, head_weight):
        return objective.signal(part, hidden_states, head_weight).credit.split(part.cu_seqlens.diff().tolist())

    found = [row for part in policy.forward(micro_batches, credit) for row in part]
    # On the last pipeline stage alone.
    weights = dict(zip(mine, found, strict=True)) if found else {}
    result = policy.step(micro_batches, objective)
    # After the step the buffers still hold the reduced gradients: read them out as if they were weights.
    for module in policy.modules:
        for parameter in module.parameters():
            parameter.data = parameter.main_grad.float().clone()
    gradients = {name: torch.zeros(shape) for name, shape in architecture.hf_shapes.items()}
    write_slices(policy.modules, architecture, gradients)
    return result.metrics["loss"] / result.metrics["normaliser"], weights, gradients


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_equals_the_oracle(models, layout, family):
    names = ALGORITHMS if layout in ("tp1", "tp2-pp2") else ["paper"]
    for name in names:
        check(*models[family][:2], None, layout, ALGORITHMS[name], with_old=name != "grpo")


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_step_of_a_mixture_equals_the_oracle(models, layout, family):
    check(*models[family][:2], None, layout, ALGORITHMS["paper"], with_old=True)


@pytest.mark.parametrize("scored_by", ["old", "current"])
@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2"])
def test_a_later_minibatch_equals_the_oracle(models, layout, scored_by):
    """The current policy has moved away from the one that sampled; either may score the deviation."""
    check(*models["qwen2"], layout, dict(tau=0.02, scored_by=scored_by), with_old=False)


def check(policy_dir, reference_dir, old_dir, layout, algorithm, with_old):
    world_size, parallel = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    table = rows()
    generator = torch.Generator().manual_seed(4)
    # Near -log V, as a random model's are, so that ratios fall inside and outside the clip range.
    old = [(-5 + torch.randn(len(r), generator=generator)).tolist() for _, r, _ in table] if with_old else None
    oracle = dense_step(
        policy_dir,
        reference_dir,
        [(*row, old[i] if old else None) for i, row in enumerate(table)],
        Algorithm(**algorithm),
        TEMPERATURE,
        VOCAB,
        old_dir,
    )
    arguments = policy_dir, reference_dir, old_dir, parallel, algorithm, old
    results = run_ranks(megatron_step, world_size, *arguments)
    for loss, _, _ in results:
        assert loss == pytest.approx(oracle.loss, rel=1e-4, abs=1e-6)
    weights = {row: w for _, found, _ in results for row, w in found.items()}
    assert sorted(weights) == list(range(8))
    for row, w in weights.items():
        torch.testing.assert_close(w.double(), oracle.weights[row], rtol=1e-4, atol=1e-5)
    for name in results[0][2]:
        gradient = sum(parts[name] for _, _, parts in results).double()
        error = (gradient - oracle.gradients[name]).norm() / oracle.gradients[name].norm()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
