"""In which settings arms differ, and which stage of the method each setting belongs to."""

from __future__ import annotations

from tools.comparison.runs import Arm

# Of each run its own.
_OWN = ("run.dir", "run.seed")
# Stages in the order of docs/method.md. With one of them changed, a difference has one cause.
METHOD = {
    "sampling": ("rollout",),
    "reward": ("reward",),
    "advantage": (
        *("algorithm.advantage", "algorithm.advantage_eps", "algorithm.conflict"),
        *("algorithm.group_weight", "algorithm.difficulty_temperature"),
    ),
    "credit": (
        *("algorithm.credit", "algorithm.deviation", "algorithm.deviation_alpha", "algorithm.tau_mode"),
        *("algorithm.tau", "algorithm.effective_share", "algorithm.tau_min", "algorithm.kappa"),
        *("algorithm.entropy_norm", "algorithm.scored_by", "algorithm.future_half_life", "algorithm.future_low"),
        *("algorithm.future_high", "algorithm.future_safety"),
    ),
    "policy loss": (
        *("algorithm.policy_loss", "algorithm.clip_low", "algorithm.clip_high", "algorithm.dual_clip"),
        *("algorithm.decay_low", "algorithm.decay_high"),
    ),
    "correction": (
        *("algorithm.old_logprobs", "algorithm.correction", "algorithm.correction_low", "algorithm.correction_high"),
    ),
    "divergence": ("algorithm.teacher", "algorithm.teacher_extrapolation", "algorithm.kl", "algorithm.kl_coefficient"),
    "aggregation": ("algorithm.aggregation",),
    "entropy bonus": ("algorithm.entropy_bonus",),
    "optimizer": ("optimizer", "batch.minibatches"),
    "length": ("run.steps",),
}
# What is to be the same beside the method, and what it means that it is not.
SURROUNDINGS = {
    "model": ("model",),
    "data": ("data",),
    "evaluation": ("eval",),
    # How it is computed, not what. `sft` is of another command.
    "execution": (
        *("run", "parallel", "batch", "servers", "weight_sync", "checkpoint", "sft", "model.layer_spec"),
        *("model.fusions", "model.recompute", "model.reference_offload", "rollout.request_timeout_s"),
        *("rollout.record", "reward.workers", "reward.timeout_s"),
    ),
}
_MEANING = {
    "model": "their start, reference or precision is not the same",
    "data": "they do not have the same problems",
    "evaluation": "they are not measured in the same way",
    "execution": "hours and seconds a step compare this, too",
}
_STAGE_OF = {name: stage for stage, names in (METHOD | SURROUNDINGS).items() for name in names}


def stage_of(setting: str) -> str:
    """A setting's own stage, or its section's."""
    return _STAGE_OF.get(setting) or _STAGE_OF[setting.split(".")[0]]


def values_of(arm: Arm, setting: str) -> list[str]:
    """The different ones of its runs, as text."""
    return list(dict.fromkeys(_text(run.settings[setting]) for run in arm.runs))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differing(arms: list[Arm]) -> list[str]:
    """Settings of which not all runs of the arms have the same value, by stage."""
    order = [*METHOD, *SURROUNDINGS]
    names = [name for name in arms[0].runs[0].settings if name not in _OWN]
    found = [name for name in names if len({value for arm in arms for value in values_of(arm, name)}) > 1]
    return sorted(found, key=lambda name: order.index(stage_of(name)))


def warnings(arms: list[Arm], baseline: Arm) -> list[str]:
    """What stands in the way of taking a difference for the effect of one stage."""
    found = []
    for arm in arms:
        if own := differing([arm]):
            found.append(f"{arm.name}: its runs differ among themselves in {', '.join(own)}, not in their seed alone")
        if arm is not baseline:
            found += _against(arm, baseline)
    return found


def _against(arm: Arm, baseline: Arm) -> list[str]:
    stages: dict[str, list[str]] = {}
    for name in differing([arm, baseline]):
        stages.setdefault(stage_of(name), []).append(name)
    if not stages:
        return [f"{arm.name} and {baseline.name} do not differ in any setting"]
    found = []
    method = {stage: names for stage, names in stages.items() if stage in METHOD}
    if len(method) > 1:
        parts = "; ".join(f"{stage} ({', '.join(names)})" for stage, names in method.items())
        found.append(
            f"{arm.name} and {baseline.name} differ in {len(method)} stages: {parts}; "
            "a difference between them may come from any of these"
        )
    found += [
        f"{arm.name} and {baseline.name} differ in {stage} ({', '.join(names)}): {_MEANING[stage]}"
        for stage, names in stages.items()
        if stage in SURROUNDINGS
    ]
    return found
