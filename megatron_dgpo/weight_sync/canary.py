"""Runs on global rank 0: what is asked of the servers after each update, and how far they may be from the policy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from megatron_dgpo.config import Config
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.response import Prompt
from megatron_dgpo.weight_sync.gathered import IpcSync
from megatron_dgpo.weight_sync.shards import ShardSync, StaleWeightsError, listed

_NEW_TOKENS = 24
_EXACT = 1e-3
# bfloat16 against float32, random models of 24 layers with logits of standard deviation 3, 6 and 12: the mean gap is
# 0.022, 0.031 and 0.040 on greedy text, and 0.040, 0.087 and 0.190 on random tokens, whose log-probs are about as large
# as the logits. Trainer and server both round, each in its own order. One matrix of the 24 layers with the wrong sign
# gives 0.46, misplaced heads 8.
_FIRST, _LEAST, _GROWTH = 0.2, 0.1, 3.0


class Canary:
    """Its memory is the first update's gap. Rank 0 only."""

    def __init__(self, config: Config) -> None:
        self._rollout, self._set = config.rollout, config.weight_sync.canary_tolerance
        self._exact = server.dtype(config) == "float32"
        self._first_gap: float | None = None

    def probes(self, engines: Engines, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Likely tokens: (prompts, the first server's own greedy text after each), to be scored together.

        Once a run, at the first update, when nothing else is asked: text of each update's own weights would be written
        beside the requests in flight, which takes as long as all their caches. The policy moves on from it by less than
        random tokens are away, which are below the tolerance, too, where logits are not extreme.
        """
        asked = [Prompt(index, token_ids, "", "") for index, token_ids in enumerate(prompts)]
        limit = min(_NEW_TOKENS, self._rollout.max_response_tokens)
        samples = engines.generate(asked, n=1, temperature=0.0, max_tokens=limit, seeds=[0] * len(asked))
        texts = [sample.token_ids for sample in samples]
        # Whoever scores them must make one token more.
        most = self._rollout.context_tokens - 1
        return [p[-(most - len(text)) :] for p, text in zip(prompts, texts, strict=True)], texts

    def check(self, engines: Engines, sync: ShardSync | IpcSync, version: int, probes: list, expected: list) -> float:
        """`check_servers` with the tolerance of the day; returns its gap."""
        gap = check_servers(engines, sync, version, probes, expected, self._tolerance())
        if self._first_gap is None:
            self._first_gap = gap
        return gap

    def _tolerance(self) -> float:
        if self._set:
            return self._set
        if self._exact:
            return _EXACT
        return _FIRST if self._first_gap is None else max(_LEAST, _GROWTH * self._first_gap)


def check_servers(
    engines: Engines,
    sync: ShardSync | IpcSync,
    version: int,
    probes: list[list[int]],
    expected: list[list[float]],
    tolerance: float,
) -> float:
    """Rank 0 only: resume the servers; raise StaleWeightsError unless each of them serves the policy's weights.

    probes: token sequences; expected: the policy's log-probs of each one's last tokens, at temperature 1. tolerance:
    mean |difference| of a server; returns the largest of these. Tiny updates move log-probs less than rounding does,
    so the version and the checksums of what each worker received are compared too.
    """
    scores, gaps = engines.resume(probes), []
    # All at once: a busy server answers between two steps of its engine.
    with ThreadPoolExecutor(len(engines.addresses)) as pool:
        versions = list(pool.map(engines.weight_version, engines.addresses))
        differing = list(pool.map(sync.differing_tensors, engines.addresses))
    for address, found, tensors, own in zip(engines.addresses, versions, differing, scores, strict=True):
        if found != str(version) or tensors:
            named = f"; tensors that differ: {listed(tensors)}" if tensors else ""
            raise StaleWeightsError(f"{address} serves weight version {found}, the policy is at {version}{named}")
        differences = [
            abs(ours - theirs)
            for score, logprobs in zip(own, expected, strict=True)
            for ours, theirs in zip(logprobs, score[-len(logprobs) :], strict=True)
        ]
        gaps.append(sum(differences) / len(differences))
        if not gaps[-1] <= tolerance:
            raise StaleWeightsError(
                f"{address} gives log-probs {gaps[-1]:.3g} from the policy's (at most {tolerance:.3g} expected) at "
                f"weight version {version}, although every tensor arrived as it was sent: the server loads or computes "
                "them differently. If this is rounding, raise weight_sync.canary_tolerance"
            )
    return max(gaps)
