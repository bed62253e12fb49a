"""What the settings of the algorithm that are `auto` stand for, and which of those that were changed change nothing."""

from __future__ import annotations

from megatron_dgpo.config import Algorithm, Config


def resolved_algorithm(config: Config) -> Algorithm:
    """The same settings without any `auto`.

    With one optimizer step a training step the trainer's own ratio is 1: tokens of older weights would be trained on as
    if the current policy had sampled them, and nothing would be clipped. Anchored at the sampler the clip bounds that;
    with several optimizer steps it holds around the policy before the first, and weights make up for the age.
    """
    algorithm, stale = config.algorithm, config.rollout.max_staleness > 0
    old_logprobs, correction = algorithm.old_logprobs, algorithm.correction
    if old_logprobs == "auto":
        old_logprobs = "sampled" if stale and config.batch.minibatches == 1 else "recomputed"
    if correction == "auto":
        correction = "truncate" if stale and old_logprobs == "recomputed" else "none"
    return algorithm.model_copy(update={"old_logprobs": old_logprobs, "correction": correction})


def uncorrected(config: Config) -> str | None:
    """A sentence if tokens of older weights are trained on as if the current policy had sampled them."""
    algorithm, staleness = resolved_algorithm(config), config.rollout.max_staleness
    if staleness == 0 or algorithm.old_logprobs == "sampled" or algorithm.correction != "none":
        return None
    return (
        f"rollout.max_staleness={staleness} with algorithm.correction=none and algorithm.old_logprobs=recomputed: "
        "nothing makes up for the age of tokens; leave both at auto"
    )


def without_effect(config: Config) -> list[str]:
    """A sentence for each choice that these settings leave without any effect on the weights."""
    algorithm, plain = resolved_algorithm(config), Algorithm()
    found = []
    if config.batch.minibatches == 1 and algorithm.old_logprobs == "recomputed":
        # The ratio is 1: every loss has the same gradient there.
        names = ["policy_loss", "clip_low", "clip_high", "dual_clip", "decay_low", "decay_high"]
        found += [f"algorithm.{n}={getattr(algorithm, n)}" for n in names if getattr(algorithm, n) != getattr(plain, n)]
        found += ["algorithm.credit=future_kl"] if algorithm.credit == "future_kl" else []
        found = [f"{name} has no effect with batch.minibatches=1: all ratios are 1" for name in found]
    if algorithm.old_logprobs == "sampled" and algorithm.correction != "none":
        found.append(f"algorithm.correction={algorithm.correction} has no effect with algorithm.old_logprobs=sampled")
    if algorithm.credit == "future_kl" and algorithm.scored_by == "old":
        found.append("algorithm.credit=future_kl has no effect with algorithm.scored_by=old: all ratios are 1")
    return found + _without_effect_of_frozen_models(config) + _without_effect_on_advantages(config)


def _without_effect_of_frozen_models(config: Config) -> list[str]:
    algorithm, found = config.algorithm, []
    if algorithm.teacher_extrapolation != 1 and not algorithm.teacher:
        extrapolation = algorithm.teacher_extrapolation
        found.append(f"algorithm.teacher_extrapolation={extrapolation} has no effect with algorithm.teacher=0")
    if config.model.start and not config.needs_start:
        found.append(f"model.start={config.model.start} has no effect but with algorithm.teacher_extrapolation")
    if algorithm.credit == "none" and algorithm.kl == "reward":
        found.append("algorithm.kl=reward has no effect with algorithm.credit=none: rewards count for nothing")
    if algorithm.kl != "none" and not algorithm.kl_coefficient:
        found.append(f"algorithm.kl={algorithm.kl} has no effect with algorithm.kl_coefficient=0")
    if algorithm.kl == "none" and algorithm.kl_coefficient != Algorithm().kl_coefficient:
        found.append(f"algorithm.kl_coefficient={algorithm.kl_coefficient} has no effect with algorithm.kl=none")
    return found


def _without_effect_on_advantages(config: Config) -> list[str]:
    algorithm, plain, weights = config.algorithm, Algorithm(), config.reward.weights
    found = []
    if algorithm.conflict and algorithm.advantage != "decoupled":
        found.append(f"algorithm.conflict={algorithm.conflict} has no effect but with algorithm.advantage=decoupled")
    elif algorithm.conflict and sum(weight != 0 for weight in weights.values()) == 1:
        found.append(f"algorithm.conflict={algorithm.conflict} has no effect: one reward is in no conflict with itself")
    temperature = algorithm.difficulty_temperature
    if temperature != plain.difficulty_temperature and algorithm.group_weight == "none":
        found.append(f"algorithm.difficulty_temperature={temperature} has no effect with algorithm.group_weight=none")
    return found
