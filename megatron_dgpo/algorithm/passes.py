"""Which forward passes over a step's sequences its settings ask for, beside those of the updates themselves. Those of
the reference are made only where there is one."""

from __future__ import annotations

from typing import NamedTuple

from megatron_dgpo.algorithm.resolve import resolved_algorithm
from megatron_dgpo.config import Config


class Passes(NamedTuple):
    policy_before: bool
    """The policy's before its first update, for old log-probs, credit or its KL."""
    reference_before: bool
    """The reference's beside that pass."""
    reference: bool
    """The reference's beside the updates."""

    @classmethod
    def from_config(cls, config: Config) -> Passes:
        algorithm, several = resolved_algorithm(config), config.batch.minibatches > 1
        kl_in_reward = algorithm.kl == "reward"
        # With one optimizer step the policy that sampled is the one that is updated: nothing to compute twice.
        scored_before = algorithm.scored_by == "old" and (several or kl_in_reward)
        reference_before = scored_before or kl_in_reward
        # Of what is known before, all but a deviation from the current policy serves the updates, too.
        again = algorithm.credit == "distribution_guided" and not scored_before
        return cls(
            policy_before=reference_before or (several and algorithm.old_logprobs == "recomputed"),
            reference_before=reference_before,
            reference=again or not reference_before,
        )
