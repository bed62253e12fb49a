"""Groups in flight, simulated: a step's time when servers sample up to s steps ahead of the training.

The rules are the trainer's own (rollout/source.py): groups start in order, those of step j once version j − 1 − s is
served; a step trains when all of its groups are done; a push pauses the servers, which then compute the caches of what
they run anew. Servers are alike, and so is their work: one is simulated, event by event, with its share of each step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dgpo.planning import step_time
from megatron_dgpo.planning.hardware import Cluster
from megatron_dgpo.planning.sides import RolloutSide, Workload
from megatron_dgpo.planning.sizes import Sizes

# Steps until the start is forgotten, and those that are measured.
_WARM_UP, _MEASURED = 6, 12
# Tokens after which the cost of decoding, which grows with the context, is looked up again.
_TOKENS = 128
# Of a step's time: less is no reason for older weights.
_GAIN = 0.03


@dataclass(frozen=True)
class InFlight:
    """What a staleness brings, by the step."""

    staleness: int
    step_s: float
    ranks_wait: float
    """Part of the time in which the ranks have nothing to train on."""
    servers_busy: float
    """Part of the time in which servers decode at all."""


def simulate(
    sizes: Sizes,
    work: Workload,
    rollout: RolloutSide,
    cluster: Cluster,
    concurrent: int,
    train_s: float,
    sync_s: float,
    staleness: int,
) -> InFlight:
    """Seconds a step with separate servers. train_s: of reference, old log-probs and update; sync_s: of a push."""
    own = max(1, round(work.rows / rollout.servers))
    lengths = _lengths(work, own)
    active_weights = sizes.layers * (sizes.attention_weights + sizes.active_mlp_weights)
    prefill_s = 2 * active_weights / rollout.tensor / (cluster.gpu.flops * cluster.efficiencies.gemm)
    left, done = np.zeros(0), np.zeros(0)
    step_of: np.ndarray = np.zeros(0, int)
    missing = np.full(_WARM_UP + _MEASURED + staleness + 2, own)
    now = busy = waited = 0.0
    started = version = 0
    train_until: float | None = None
    begin = (0.0, 0.0, 0.0)
    while version < _WARM_UP + _MEASURED:
        fresh = min((version + 1 + staleness) * own - started, concurrent - len(left))
        if fresh > 0:
            numbers = np.arange(started, started + fresh)
            left = np.append(left, lengths[numbers % len(lengths)])
            done, step_of = np.append(done, np.zeros(fresh)), np.append(step_of, numbers // own)
            started += fresh
        if train_until is None and not missing[version]:
            train_until = now + train_s
        a_token = (
            step_time.decode_time(sizes, rollout, cluster, len(left), work.prompt_tokens + done.mean()).total
            if len(left)
            else 0.0
        )
        ahead_s = min(left.min(), _TOKENS) * a_token if len(left) else float("inf")
        passed = min(ahead_s, train_until - now if train_until is not None else float("inf"))
        now, busy = now + passed, busy + passed * bool(len(left))
        waited += passed * (train_until is None)
        if len(left):
            left, done = left - passed / a_token, done + passed / a_token
            ended = left <= 1e-6
            np.subtract.at(missing, step_of[ended], 1)
            left, done, step_of = left[~ended], done[~ended], step_of[~ended]
        if train_until is not None and now >= train_until:
            train_until, version = None, version + 1
            # Nothing is decoded meanwhile; the caches are made anew by the servers alone.
            again_s = (done.sum() + len(done) * work.prompt_tokens) * prefill_s
            now += sync_s + again_s
            waited += again_s
            if version == _WARM_UP:
                begin = now, busy, waited
    seconds, busy_s, waited_s = (end - start for end, start in zip((now, busy, waited), begin, strict=True))
    return InFlight(staleness, float(seconds) / _MEASURED, float(waited_s / seconds), float(busy_s / seconds))


def recommended(found: Sequence[InFlight]) -> InFlight:
    """The least staleness whose step is as good as the fastest."""
    fastest = min(one.step_s for one in found)
    return min((one for one in found if one.step_s <= fastest * (1 + _GAIN)), key=lambda one: one.staleness)


def _lengths(work: Workload, own: int) -> np.ndarray:
    """Of one server's responses, step after step, in an order of its own."""
    found = []
    for step in range(_WARM_UP):
        lengths = [length - work.prompt_tokens for length in work.lengths(own)]
        random.Random(step).shuffle(lengths)
        found += lengths
    return np.maximum(np.array(found, float), 1.0)
