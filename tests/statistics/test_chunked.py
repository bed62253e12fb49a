"""The chunked tier against the float64 definition: values, gradients, collectives, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dgpo.statistics import dense_statistics, token_statistics
from tests.ranks import run_ranks


def inputs(n, hidden, vocab, padded, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn(n, hidden, generator=generator) for _ in range(2))
    heads = [torch.randn(padded, hidden, generator=generator) * scale / hidden**0.5 for _ in range(2)]
    targets = torch.randint(0, vocab, (n,), generator=generator)
    return [t.to(dtype) for t in (policy, heads[0], policy + 0.3 * reference, heads[0] + 0.1 * heads[1])] + [targets]


def dense(policy, head, reference, reference_head, targets, temperature, vocab):
    x = policy.double() @ head[:vocab].double().T / temperature
    y = reference.double() @ reference_head[:vocab].double().T / temperature
    return dense_statistics(x, targets, y)


def objective(values):
    """Uses both differentiable outputs, with different weights for every token."""
    weights = torch.linspace(0.5, 1.5, len(values[0]), dtype=values[0].dtype)
    return (values[0] * weights).sum() + 0.3 * (values[1] * weights.flip(0)).sum()


def sharded(n, hidden, vocab, padded, dtype, chunk_bytes):
    """On one rank: the statistics, and gradients of the hidden states (summed over ranks) and of its head shard."""
    import torch.distributed as dist

    policy, head, reference, reference_head, targets = inputs(n, hidden, vocab, padded, dtype=dtype)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * padded // world, (rank + 1) * padded // world)
    policy.requires_grad_()
    shard = head[rows].clone().requires_grad_()
    calls = []
    original = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *a, **k: (calls.append("forward"), original(*a, **k))[1]
    try:
        values = token_statistics(
            policy,
            shard,
            targets,
            temperature=0.7,
            vocab_size=vocab,
            tp_group=dist.group.WORLD,
            reference_hidden_states=reference,
            reference_head_weight=reference_head[rows],
            chunk_bytes=chunk_bytes,
        )
        objective(values).backward()
    finally:
        dist.all_gather_into_tensor = original
    total = policy.grad.float().clone()
    dist.all_reduce(total)
    return [v.detach() for v in values], total, shard.grad, len(calls)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "n, hidden, vocab, dtype, tolerance",
    [
        (0, 8, 97, torch.float32, 2e-5),  # no response token at all
        (1, 8, 97, torch.float32, 2e-5),  # 97 is a multiple of no group size
        (7, 16, 3, torch.float32, 2e-5),  # of four ranks the last holds padding only
        (4096, 8, 97, torch.float32, 2e-5),
        (64, 16, 32000, torch.float32, 2e-5),
        (5, 8, 152064, torch.float32, 2e-5),  # Qwen2.5's vocabulary
        (129, 32, 1000, torch.bfloat16, 2e-2),
    ],
)
def test_values_and_gradients_equal_the_definition(world, n, hidden, vocab, dtype, tolerance):
    padded = -(-vocab // world) * world
    chunk_bytes = 4 * padded // world * 50  # several chunks where there are more than 50 tokens
    policy, head, reference, reference_head, targets = inputs(n, hidden, vocab, padded, dtype=dtype)
    policy, head = policy.double().requires_grad_(), head.double().requires_grad_()
    expected = dense(policy, head, reference, reference_head, targets, 0.7, vocab)
    objective(expected).backward()
    results = run_ranks(sharded, world, n, hidden, vocab, padded, dtype, chunk_bytes)
    for values, grad_hidden, _, calls in results:
        # One collective, whatever the number of chunks; alone a rank needs none.
        assert calls == (1 if world > 1 else 0)
        for got, want in zip(values, expected, strict=True):
            torch.testing.assert_close(got.double(), want.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad_hidden.double(), policy.grad, rtol=20 * tolerance, atol=20 * tolerance)
    grad_head = torch.cat([shard for _, _, shard, _ in results]).double()
    torch.testing.assert_close(grad_head, head.grad, rtol=20 * tolerance, atol=20 * tolerance * max(1, n) ** 0.5)


def from_logits(x, y, targets, vocab):
    """Statistics of given logits: an identity head passes hidden states through."""
    eye = torch.eye(vocab)
    return token_statistics(
        x, eye, targets, temperature=1.0, vocab_size=vocab, reference_hidden_states=y, reference_head_weight=eye
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    vocab=st.integers(2, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["random", "one-hot", "equal"]),
)
def test_extreme_logits(n, vocab, scale, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, vocab, generator=generator) * scale for _ in range(2))
    if kind == "one-hot":
        x = torch.zeros(n, vocab).scatter_(1, torch.randint(0, vocab, (n, 1), generator=generator), 1e4)
    if kind == "equal":
        y = x.clone()
    targets = torch.randint(0, vocab, (n,), generator=generator)
    values = from_logits(x, y, targets, vocab)
    expected = dense_statistics(x, targets, y)
    # float32 has 1e-3 of room between neighbours near 1e4.
    large = scale > 100 or kind == "one-hot"
    for got, want in zip(values, expected, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-3 if large else 2e-5)
    assert (values.entropy >= 0).all()
    assert (values.hellinger2 >= 0).all() and (values.hellinger2 <= 1).all()
    if kind == "equal":
        assert (values.hellinger2 < (1e-6 if scale <= 1 else 1e-6 * scale)).all()
    # Symmetric, and blind to a constant added to all logits of a position.
    swapped = from_logits(y, x, targets, vocab)
    torch.testing.assert_close(swapped.hellinger2, values.hellinger2, rtol=1e-4, atol=2e-3 if large else 2e-6)
    shifted = from_logits(x + 3.0, y - 5.0, targets, vocab)
    torch.testing.assert_close(shifted.hellinger2, values.hellinger2, rtol=1e-3, atol=4e-3 if large else 4e-6)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("n", [1000, 4000])
def test_no_tensor_grows_with_tokens_times_vocabulary(n):
    vocab, hidden, chunk = 4096, 4, 64
    policy, head, reference, reference_head, targets = inputs(n, hidden, vocab, vocab)
    policy.requires_grad_(), head.requires_grad_()
    with _Largest() as largest:
        values = token_statistics(
            policy,
            head,
            targets,
            temperature=1.0,
            vocab_size=vocab,
            reference_hidden_states=reference,
            reference_head_weight=reference_head,
            chunk_bytes=4 * vocab * chunk,
        )
        objective(values).backward()
    # One chunk of logits, or the per-token sums and gradients: never N × V.
    assert largest.elements == max(chunk * vocab, 9 * n, n * hidden)


def test_reference_gets_no_gradient():
    policy, head, reference, reference_head, targets = inputs(6, 8, 11, 11)
    for tensor in (policy, head, reference, reference_head):
        tensor.requires_grad_()
    values = token_statistics(
        policy,
        head,
        targets,
        temperature=1.0,
        vocab_size=11,
        reference_hidden_states=reference,
        reference_head_weight=reference_head,
    )
    assert not values.hellinger2.requires_grad and not values.reference_logprobs.requires_grad
    objective(values).backward()
    assert policy.grad is not None and reference.grad is None and reference_head.grad is None
