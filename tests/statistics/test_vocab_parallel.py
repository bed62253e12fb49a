"""Every tier against the float64 definition: values, gradients, collectives, memory, error messages.

Without a GPU the Triton tier runs in Triton's interpreter, which is slow: it is left out of the largest case.
"""

import contextlib
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dgpo.statistics import dense_statistics, token_statistics
from tests.ranks import run_ranks

TIERS = ["chunked", "triton"]
TEMPERATURE = 0.7


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Asked for at every call, too; conftest.py has imported the kernels with it."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def inputs(n, hidden, vocab, padded, seed=0, dtype=torch.float32):
    """Policy states, head, reference states, reference head; and targets."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn(n, hidden, generator=generator) for _ in range(2))
    heads = [torch.randn(padded, hidden, generator=generator) / hidden**0.5 for _ in range(2)]
    targets = torch.randint(0, vocab, (n,), generator=generator)
    tensors = (policy, heads[0], policy + 0.3 * reference, heads[0] + 0.1 * heads[1])
    return [t.to(dtype) for t in tensors], targets


def compared(n):
    """Tokens that the dense definition is worked out for: all would not fit where the vocabulary is large."""
    return torch.linspace(0, n - 1, min(n, 40)).long() if n else torch.zeros(0, dtype=torch.long)


def objective(values, n):
    """Uses both differentiable outputs, with different weights for every compared token and none for the others."""
    tokens = compared(n)
    weights = torch.linspace(0.5, 1.5, len(tokens), dtype=values[0].dtype)
    chosen = (value[tokens] if len(value) == n else value for value in values[:2])
    logprobs, entropy = chosen
    return (logprobs * weights).sum() + 0.3 * (entropy * weights.flip(0)).sum()


def dense(n, hidden, vocab, padded, dtype):
    """Values, and gradients of states and head, of the compared tokens."""
    (policy, head, reference, reference_head), targets = inputs(n, hidden, vocab, padded, dtype=dtype)
    tokens = compared(n)
    policy, head = (t.double().requires_grad_() for t in (policy[tokens], head))
    x = policy @ head[:vocab].T
    y = reference[tokens].double() @ reference_head[:vocab].double().T
    values = dense_statistics(x / TEMPERATURE, targets[tokens], y / TEMPERATURE)
    objective(values, len(tokens)).backward()
    return [v.detach() for v in values], policy.grad, head.grad


def _counting(function, calls):
    def call(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


def of_shard(hidden, head, targets, vocab, reference_hidden, reference_head, **settings):
    """What one of the ranks that share the vocabulary says, of its rows of both heads."""
    import torch.distributed as dist

    return token_statistics(
        hidden,
        head,
        targets,
        temperature=TEMPERATURE,
        vocab_size=vocab,
        tp_group=dist.group.WORLD,
        reference_hidden_states=reference_hidden,
        reference_head_weight=reference_head,
        **settings,
    )


def sharded(cases, tier):
    """On one rank, for each case: values, gradients of states (summed over ranks) and head shard, calls."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for n, hidden, vocab, padded, dtype, tile_bytes in cases:
        tensors, targets = inputs(n, hidden, vocab, padded, dtype=dtype)
        policy, head, reference, reference_head = tensors
        rows = slice(rank * padded // world, (rank + 1) * padded // world)
        policy.requires_grad_()
        shard = head[rows].clone().requires_grad_()
        calls = []
        with contextlib.ExitStack() as stack:
            for name in ("all_gather_into_tensor", "all_reduce", "all_gather"):
                stack.enter_context(mock.patch.object(dist, name, _counting(getattr(dist, name), calls)))
            reference_rows = reference, reference_head[rows]
            values = of_shard(policy, shard, targets, vocab, *reference_rows, tier=tier, tile_bytes=tile_bytes)
            objective(values, n).backward()
        total = policy.grad.float().clone()
        dist.all_reduce(total)
        results.append(([v.detach() for v in values], total, shard.grad, calls))
    return results


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("vocab", [3, 97, 1000, 32000, 152064])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_equal_the_definition(world, vocab, tier):
    """V = 97: no group size divides it. V = 3: the last of four ranks holds padding only. 152,064: Qwen2.5's."""
    sizes = [0, 1, 7, 4096]
    if tier == "triton" and vocab > 1000:
        # The interpreter takes a minute for what a GPU does in a millisecond.
        sizes = [0, 1, 7] if vocab < 10**5 else [7]
    padded = -(-vocab // world) * world
    cases = []
    for n in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            # The largest cases in one dtype each: they take seconds. Tiles that divide neither tokens nor columns.
            if n * vocab < 10**8 or dtype == (torch.bfloat16 if world == 2 else torch.float32):
                cases.append((n, 8, vocab, padded, dtype, 4 * 3001 * 37 if n < 4096 else None))
    results = run_ranks(sharded, world, cases, tier)
    for index, (n, hidden, _, _, dtype, _) in enumerate(cases):
        expected, grad_policy, grad_head = dense(n, hidden, vocab, padded, dtype)
        tokens = compared(n)
        # The values come from the same rounded inputs; only gradients are rounded once more.
        rounding = dict(rtol=1e-3, atol=4e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        for values, grad, _, calls in (found[index] for found in results):
            # One collective, whatever the number of tiles; alone a rank needs none.
            assert calls == (["all_gather_into_tensor"] if world > 1 else [])
            for got, want in zip(values, expected, strict=True):
                torch.testing.assert_close(got[tokens].double(), want, rtol=2e-5, atol=2e-5)
            assert (values[2] >= 0).all() and (values[2] <= 1).all()
            torch.testing.assert_close(grad[tokens].double(), grad_policy, **rounding)
            others = torch.ones(n, dtype=torch.bool)
            others[tokens] = False
            assert (grad[others] == 0).all()
        got = torch.cat([found[index][2] for found in results]).double()
        torch.testing.assert_close(got, grad_head, **rounding)


def deviations(cases):
    """On one rank, [7] for each (vocab, tier, alpha); tiles that divide neither tokens nor columns."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for vocab, tier, alpha in cases:
        padded = -(-vocab // world) * world
        (policy, head, reference, reference_head), targets = inputs(7, 8, vocab, padded)
        rows = slice(rank * padded // world, (rank + 1) * padded // world)
        shards = head[rows], targets, vocab, reference, reference_head[rows]
        values = of_shard(policy, *shards, alpha=alpha, tier=tier, tile_bytes=4 * 31 * 3)
        found.append(values.deviation)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_other_deviations_equal_the_definition(world):
    """1 − Σ π^α ρ^(1−α), and KL(π ‖ ρ). V = 3: the last of four ranks holds padding only."""
    cases = [(v, tier, alpha) for v in (3, 97) for tier in TIERS for alpha in (0.2, 0.9, None)]
    results = run_ranks(deviations, world, cases)
    for (vocab, _, alpha), *of_ranks in zip(cases, *results, strict=True):
        (policy, head, reference, reference_head), targets = inputs(7, 8, vocab, -(-vocab // world) * world)
        x, y = policy @ head[:vocab].T / TEMPERATURE, reference @ reference_head[:vocab].T / TEMPERATURE
        expected = dense_statistics(x, targets, y, alpha)[2]
        assert expected.mean() > 1e-3
        for got in of_ranks:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def from_logits(x, y, targets, vocab, tier, alpha=0.5):
    """Statistics of given logits: an identity head passes hidden states through."""
    eye = torch.eye(vocab)
    return token_statistics(
        x,
        eye,
        targets,
        temperature=1.0,
        vocab_size=vocab,
        reference_hidden_states=y,
        reference_head_weight=eye,
        alpha=alpha,
        tier=tier,
        # A few columns a tile: most responses meet several.
        tile_bytes=4 * 16,
    )


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    vocab=st.integers(2, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["random", "one-hot", "equal"]),
)
def test_extreme_logits(tier, n, vocab, scale, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, vocab, generator=generator) * scale for _ in range(2))
    if kind == "one-hot":
        x = torch.zeros(n, vocab).scatter_(1, torch.randint(0, vocab, (n, 1), generator=generator), 1e4)
    if kind == "equal":
        y = x.clone()
    targets = torch.randint(0, vocab, (n,), generator=generator)
    values = from_logits(x, y, targets, vocab, tier)
    expected = dense_statistics(x, targets, y)
    # float32 has 1e-3 of room between neighbours near 1e4.
    large = scale > 100 or kind == "one-hot"
    for got, want in zip(values, expected, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-3 if large else 2e-5)
    assert (values.entropy >= 0).all()
    assert (values.deviation >= 0).all() and (values.deviation <= 1).all()
    if kind == "equal":
        assert (values.deviation < 1e-6).all()
    # Symmetric, and blind to a constant added to all logits of a position.
    swapped = from_logits(y, x, targets, vocab, tier)
    torch.testing.assert_close(swapped.deviation, values.deviation, rtol=1e-4, atol=2e-3 if large else 2e-6)
    shifted = from_logits(x + 3.0, y - 5.0, targets, vocab, tier)
    torch.testing.assert_close(shifted.deviation, values.deviation, rtol=1e-3, atol=4e-3 if large else 4e-6)
    for alpha in (0.9, None):
        deviation = from_logits(x, y, targets, vocab, tier, alpha).deviation
        assert torch.isfinite(deviation).all() and (deviation >= 0).all()
        wanted = dense_statistics(x, targets, y, alpha)[2]
        torch.testing.assert_close(deviation.double(), wanted, rtol=1e-4, atol=2e-3 if large else 2e-5)
        if kind == "equal":
            assert (deviation < 1e-6).all()


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        address = storage.data_ptr()
        if not storage.nbytes() or address in self._known:
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address, size):
        self._known.discard(address)
        self.live -= size


def extra_peak_bytes(n, vocab, hidden, tier, dtype=torch.float32):
    """Forward and backward, above inputs, the per-token results and the gradients that are asked for."""
    (policy, head, reference, reference_head), targets = inputs(n, hidden, vocab, vocab, dtype=dtype)
    policy.requires_grad_(), head.requires_grad_()
    # Megatron's buffer: the head's gradient needs no memory of its own.
    head.main_grad, head.grad_added_to_main_grad = torch.zeros(head.shape), False
    with _LiveBytes() as memory:
        values = token_statistics(
            policy,
            head,
            targets,
            temperature=1.0,
            vocab_size=vocab,
            reference_hidden_states=reference,
            reference_head_weight=reference_head,
            tier=tier,
        )
        values.logprobs.sum().backward()
    assert head.grad_added_to_main_grad and head.main_grad.abs().sum() > 0
    per_token = 8 * 4 + 5 * 4 + 8 + 8 + 3 * 4
    return memory.peak - n * per_token - policy.numel() * policy.element_size()


def test_peak_memory_is_a_few_tiles_at_full_size():
    """N = 16,384 and Qwen2.5's vocabulary: float32 logits alone would take 10 GB."""
    assert extra_peak_bytes(16384, 152064, 4, "chunked") < 32 * 2**20


@pytest.mark.parametrize("tier", TIERS)
def test_peak_memory_does_not_grow_with_tokens(tier):
    sizes = [extra_peak_bytes(n, 5000, 4, tier) for n in (2048, 8192)]
    assert abs(sizes[1] - sizes[0]) < 2**20


def test_gradients_go_to_main_grad_once():
    """Where Megatron's DDP owns the gradient it is added to what other micro-batches left there."""
    (policy, head, *_), targets = inputs(6, 8, 11, 11)
    head.requires_grad_()
    token_statistics(policy, head, targets, temperature=1.0, vocab_size=11).logprobs.sum().backward()
    owned = head.detach().clone().requires_grad_()
    owned.main_grad, owned.grad_added_to_main_grad = torch.ones(11, 8), False
    token_statistics(policy, owned, targets, temperature=1.0, vocab_size=11).logprobs.sum().backward()
    assert owned.grad_added_to_main_grad
    torch.testing.assert_close(owned.main_grad, head.grad + 1)


@pytest.mark.parametrize(
    "place, index, message",
    [
        (0, (3, 2), r"hidden_states holds nan at token 3 \(1 of 6"),
        (1, (9, 0), r"head_weight holds nan at vocabulary row 9"),
        (2, (0, 1), r"reference_hidden_states holds nan at token 0"),
        (3, (10, 0), r"reference_head_weight holds nan at vocabulary row 10"),
    ],
)
def test_check_finite_names_tensor_and_place(place, index, message):
    tensors, targets = inputs(6, 8, 11, 11)
    tensors[place][index] = torch.nan
    policy, head, reference, reference_head = tensors[:4]
    with pytest.raises(FloatingPointError, match=message):
        token_statistics(
            policy,
            head,
            targets,
            temperature=1.0,
            vocab_size=11,
            reference_hidden_states=reference,
            reference_head_weight=reference_head,
            check_finite=True,
        )


def test_reference_gets_no_gradient():
    (policy, head, reference, reference_head), targets = inputs(6, 8, 11, 11)
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
    assert not values.deviation.requires_grad and not values.reference_logprobs.requires_grad
    objective(values, 6).backward()
    assert policy.grad is not None and reference.grad is None and reference_head.grad is None
