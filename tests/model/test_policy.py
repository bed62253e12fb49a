"""Optimizer steps: master weights, the distributed optimizer, skipped steps, the reference kept on the host."""

import pytest
import torch

from tests.layouts import LAYOUTS, make_config
from tests.packs import micro_batches
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "tiny", "qwen3")


def build(model_dir, parallel, optimizer=None, **model):
    """(config, architecture, policy, micro-batches of n sequences each, a log-likelihood loss) on this rank."""
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.sft import mean_negative_logprob
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_config(
        model_dir, parallel, model=model, optimizer={"lr": 1e-3, "warmup_steps": 2} | (optimizer or {})
    )
    architecture = read_architecture(model_dir)
    initialize_parallel(config.parallel, 1)
    policy = Policy(config, architecture, 10)
    policy.load(model_dir)
    rows = torch.randint(3, 131, (8, 20), generator=torch.Generator().manual_seed(7)).tolist()
    pairs = [(row[:5], row[5:]) for row in rows]
    return (
        config,
        architecture,
        policy,
        lambda size: micro_batches(pairs, size, config.parallel),
        mean_negative_logprob(131),
    )


def after_three_steps(model_dir, parallel, dtype):
    _, _, policy, batches, loss = build(model_dir, parallel, dtype=dtype)
    results = [policy.step(batches(2), loss) for _ in range(3)]
    weights = {n: p.detach().float().clone() for m in policy.modules for n, p in m.named_parameters()}
    return [(r.metrics["loss"] / r.metrics["tokens"], r.grad_norm, r.lr, r.skipped) for r in results], weights


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_data_parallel_steps_do_not_depend_on_the_layout(model, dtype, tolerance):
    [(single, expected)] = run_ranks(after_three_steps, 1, model, {}, dtype)
    assert [lr for _, _, lr, _ in single] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert single[2][0] < single[0][0]
    for distributed in (False, True):
        for steps, weights in run_ranks(after_three_steps, 2, model, {"distributed_optimizer": distributed}, dtype):
            for (loss, norm, _, skipped), (want_loss, want_norm, _, _) in zip(steps, single, strict=True):
                assert not skipped
                assert loss == pytest.approx(want_loss, rel=max(tolerance, 1e-5))
                assert norm == pytest.approx(want_norm, rel=10 * max(tolerance, 1e-5))
            for name, value in weights.items():
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=20 * tolerance)


def seconds_of_steps(model_dir):
    """Rank 1 takes its time over every loss."""
    import time

    import torch.distributed as dist

    _, _, policy, batches, loss = build(model_dir, {})

    def slow(*arguments):
        time.sleep(0.5 * dist.get_rank())
        return loss(*arguments)

    found = []
    for _ in range(2):
        start = time.monotonic()
        found.append((policy.step(batches(2), slow).busy_s, time.monotonic() - start))
    return found


def test_waiting_for_a_slow_replica_is_not_being_busy(model):
    # Of two ranks' eight sequences each has two micro-batches.
    for (mine, whole), (slow, slow_whole) in zip(*run_ranks(seconds_of_steps, 2, model), strict=True):
        assert 1 <= slow <= slow_whole and min(whole, slow_whole) > 1
        assert mine < slow - 0.5


def small_updates(model_dir, dtype):
    """How far a weight moves over steps of which each is too small for bfloat16."""
    _, _, policy, batches, loss = build(model_dir, {}, dtype=dtype)
    for group in policy.optimizer.param_groups:
        group["max_lr"] = group["min_lr"] = 2e-5
    weight = policy.modules[0].decoder.layers[0].mlp.linear_fc2.weight
    before = weight.detach().float().clone()
    for _ in range(9):
        policy.step(batches(4), loss)
    return (weight.detach().float() - before).abs().mean().item(), weight.dtype


def test_bfloat16_has_float32_master_weights(model):
    [(moved, dtype)] = run_ranks(small_updates, 1, model, "bfloat16")
    [(expected, _)] = run_ranks(small_updates, 1, model, "float32")
    assert dtype == torch.bfloat16
    # Rounded each time, steps below half a unit in the last place would be lost; summed first, they are not.
    assert moved > expected / 3


def skipped_step(model_dir, parallel):
    from megatron.core import parallel_state

    _, _, policy, batches, loss = build(model_dir, parallel)
    good = policy.step(batches(2), loss)
    before = [p.detach().clone() for m in policy.modules for p in m.parameters()]

    micro_batches = batches(2)

    def poisoned(part, hidden_states, head_weight):
        total, count, metrics = loss(part, hidden_states, head_weight)
        # Only one replica sees it.
        factor = float("nan") if parallel_state.get_data_parallel_rank() == 0 and part is micro_batches[1] else 1.0
        return total * factor, count, metrics

    bad = policy.step(micro_batches, poisoned)
    unchanged = all(
        torch.equal(a, b) for a, b in zip(before, [p for m in policy.modules for p in m.parameters()], strict=True)
    )
    again = policy.step(batches(2), loss)
    return good.skipped, bad.skipped, unchanged, again.skipped, again.metrics["loss"] < good.metrics["loss"]


@pytest.mark.parametrize("parallel, world", [({}, 2), ({"tensor": 2}, 2), ({"pipeline": 2}, 2)], ids=["dp", "tp", "pp"])
def test_non_finite_step_is_skipped_everywhere(model, parallel, world):
    for result in run_ranks(skipped_step, world, model, parallel):
        assert result == (False, True, True, False, True)


def offloaded_reference(model_dir):
    from megatron_dgpo.model.reference import Reference

    config, architecture, _, batches, _ = build(model_dir, {"tensor": 2}, reference_offload=True)
    offloaded = Reference(config, architecture)
    kept = Reference(make_config(model_dir, {"tensor": 2}), architecture)
    first, second, expected = (
        [part.reference_states for part in reference.attach(batches(4))] for reference in (offloaded, offloaded, kept)
    )
    gradient_free = not any(p.requires_grad for m in offloaded._model.modules for p in m.parameters())
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, expected, strict=True))
    return same, gradient_free, torch.equal(offloaded.head_weight, kept.head_weight)


def test_reference_on_the_host(model):
    assert run_ranks(offloaded_reference, 2, model) == [(True, True, True)] * 2


def gradient_norms(model_dirs, parallel):
    """Of one step for each model, from the same eight rows, whoever holds them."""
    from megatron.core import parallel_state

    found = []
    for model_dir in model_dirs:
        _, _, policy, batches, loss = build(model_dir, parallel)
        found.append(policy.step(batches(2), loss).grad_norm)
        parallel_state.destroy_model_parallel()
    return found


def dense_gradient_norm(model_dir) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    rows = torch.randint(3, 131, (8, 20), generator=torch.Generator().manual_seed(7))
    logprobs = torch.log_softmax(model(rows).logits[:, 4:-1], -1).gather(-1, rows[:, 5:, None])
    (-logprobs.mean()).backward()
    # A tied head is one parameter.
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


@pytest.fixture(scope="module")
def untied_and_tied(model, tmp_path_factory):
    return model, make_tiny_model(tmp_path_factory.mktemp("tied") / "tiny", "qwen2")


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed-optimizer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_norm_is_the_dense_one(untied_and_tied, layout, distributed):
    """What clipping divides by: each part of a split weight counts, each copy of another counts once."""
    world_size, parallel = LAYOUTS[layout]
    expected = [dense_gradient_norm(model_dir) for model_dir in untied_and_tied]
    for norms in run_ranks(
        gradient_norms, world_size, untied_and_tied, parallel | {"distributed_optimizer": distributed}
    ):
        assert norms == pytest.approx(expected, rel=1e-4)


def steps_around_a_skipped_one(model_dir, parallel, dtype, poison):
    """Weights after two good steps, with a bad one between them unless `poison` is None; and the good results."""
    _, _, policy, batches, loss = build(model_dir, parallel, dtype=dtype)

    def poisoned(batch, hidden_states, head_weight):
        if poison == "gradient":
            hidden_states.register_hook(lambda gradient: gradient * float("inf"))
        total, count, metrics = loss(batch, hidden_states, head_weight)
        return total + (float("nan") if poison == "loss" else 0.0), count, metrics

    results = [policy.step(batches(2), loss)]
    if poison:
        assert policy.step(batches(2), poisoned).skipped
    results.append(policy.step(batches(2), loss))
    return results, [p.detach().clone() for m in policy.modules for p in m.parameters()]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(
    "parallel, dtype",
    [({"distributed_optimizer": True}, "bfloat16"), ({"tensor": 2, "sequence": True}, "float32")],
    ids=["dp2-distributed-bfloat16", "tp2-sp-float32"],
)
def test_skipped_step_leaves_no_trace(model, parallel, dtype, poison):
    """Neither in weights, moments, step counts nor learning rate. A bad loss is seen though its gradient is finite."""
    without = run_ranks(steps_around_a_skipped_one, 2, model, parallel, dtype, None)
    around = run_ranks(steps_around_a_skipped_one, 2, model, parallel, dtype, poison)
    for (results, weights), (expected_results, expected) in zip(around, without, strict=True):
        assert results == expected_results
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def recomputed_steps(model_dir, parallel, recompute):
    _, _, policy, batches, loss = build(model_dir, parallel, recompute=recompute)
    results = [policy.step(batches(2), loss) for _ in range(2)]
    return results, [p.detach().clone() for m in policy.modules for p in m.parameters()]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_are_the_same(model, recompute):
    parallel = {"tensor": 2, "sequence": True}
    kept = run_ranks(recomputed_steps, 2, model, parallel, "none")
    for (results, weights), (expected_results, expected) in zip(
        run_ranks(recomputed_steps, 2, model, parallel, recompute), kept, strict=True
    ):
        assert results == expected_results
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


OVERLAPS = {"overlap_grad_reduce": True}
DISTRIBUTED = {"distributed_optimizer": True}
BUCKET_SIZE = 2_000  # Parameters: a few in each of the tiny models' layers.


def overlapped_steps(model_dir, parallel):
    """Three steps, the second one skipped, with small buckets.

    Returns [(loss, norm, skipped)], weights, [reductions (all, begun in backward) and gathers (all, under way) a step].
    """
    from unittest import mock

    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from megatron_dgpo.model import policy as module

    begun = []
    start_grad_sync, ddp_config = _ParamAndGradBucketGroup.start_grad_sync, module._ddp_config

    def recorded(group, *args, **kwargs):
        waits = group.grad_reduce_handle is not None
        begun.append(waits or torch._C._current_graph_task_id() >= 0)
        return start_grad_sync(group, *args, **kwargs)

    def small_buckets(config):
        found = ddp_config(config)
        found.bucket_size = BUCKET_SIZE
        return found

    with mock.patch.object(module, "_ddp_config", small_buckets):
        # The norm's last bit depends on how parameters are cut into shards, and clipping would spread it.
        _, _, policy, batches, loss = build(model_dir, parallel, optimizer={"clip_grad": 0.0})
    results, counts = [], []
    with mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync", recorded):
        for step in range(3):
            begun.clear()

            def poisoned(*args, bad=step == 1):
                total, count, metrics = loss(*args)
                return total * (float("nan") if bad else 1.0), count, metrics

            result = policy.step(batches(2), poisoned, more=step < 2)
            results.append((result.metrics["loss"], result.grad_norm, result.skipped))
            handles = [group.param_gather_handle for chunk in policy.chunks for group in module._bucket_groups(chunk)]
            counts.append((len(begun), sum(begun), len(handles), sum(handle is not None for handle in handles)))
    return results, [p.detach().clone() for m in policy.modules for p in m.parameters()], counts


@pytest.mark.parametrize(
    "family, parallel, settings",
    [
        ("qwen2", {}, OVERLAPS),
        ("qwen3", DISTRIBUTED, OVERLAPS | {"overlap_param_gather": True}),
        ("qwen3_moe", DISTRIBUTED | {"expert": 2}, OVERLAPS | {"overlap_param_gather": True}),
        ("qwen2", DISTRIBUTED | LAYOUTS["pp2-interleaved"][1], OVERLAPS | {"overlap_param_gather": True}),
    ],
    ids=["dp2-tied", "dp2-distributed", "ep2-distributed", "pp2-interleaved-distributed"],
)
def test_overlaps_change_nothing(tmp_path, family, parallel, settings):
    """Losses and weights to the bit: reductions are begun in the backward pass, gathers last into the next forward."""
    model_dir = make_tiny_model(tmp_path / "model", family, num_hidden_layers=4)
    plain = run_ranks(overlapped_steps, 2, model_dir, parallel)
    overlapped = run_ranks(overlapped_steps, 2, model_dir, parallel | settings)
    for rank, ((steps, weights, counts), (expected_steps, expected, _)) in enumerate(
        zip(overlapped, plain, strict=True)
    ):
        for (loss, norm, skipped), (expected_loss, expected_norm, expected_skipped) in zip(
            steps, expected_steps, strict=True
        ):
            assert skipped == expected_skipped
            assert skipped or (loss == expected_loss and norm == pytest.approx(expected_norm, rel=1e-5))
        assert [skipped for _, _, skipped in steps] == [False, True, False]
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        # Megatron learns from the first step how often each parameter's gradient arrives. Only the pipeline's first
        # stage, where nothing else hides the reductions, has several buckets.
        reductions, in_backward, groups, _ = counts[2]
        assert reductions == in_backward == groups and (groups > 2 or (rank and "pipeline" in parallel))
        gathers = settings.get("overlap_param_gather", False)
        assert [under_way for *_, under_way in counts] == [groups * gathers, groups * gathers, 0]


def passes_over_gradients(model_dir, parallel):
    from unittest import mock

    from megatron.core.optimizer import optimizer

    _, _, policy, batches, loss = build(model_dir, parallel)
    norm, prepare = optimizer.get_grad_norm_fp32, policy.optimizer.prepare_grads
    with (
        mock.patch.object(optimizer, "get_grad_norm_fp32", side_effect=norm) as norms,
        mock.patch.object(policy.optimizer, "prepare_grads", side_effect=prepare) as prepared,
    ):
        policy.step(batches(2), loss)
    return norms.call_count, prepared.call_count


def test_a_step_takes_the_gradients_norm_once(model):
    assert run_ranks(passes_over_gradients, 1, model, {}) == [(1, 1)]
