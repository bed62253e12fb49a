"""How a model's training step changes with the number of GPUs: one row for every model, cluster size and scaling.

strong: the same work whatever the GPUs. weak: work in proportion to the GPUs; both are the same at 64 GPUs. 64k and
128k: the same number of responses, of at most so many tokens and a quarter of them on average, on one number of GPUs.

Useful operations are 2 a weight and token and those of causal attention ([N], appendix; no padding, no recomputation),
three times as many with the backward pass. MFU is their share of the data sheet's rate: of the update, on the trainer's
GPUs and its time; of the step, with sampling and the reference pass, on all GPUs and the whole time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_dgpo.planning.hardware import GPUS, Cluster, Efficiencies
from megatron_dgpo.planning.memory import GIB
from megatron_dgpo.planning.plan import Plan, Planner
from megatron_dgpo.planning.sides import TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.planning.step_time import Seconds
from tools.scaling.models import ARCHITECTURES, sizes_of

Scaling = Literal["strong", "weak", "64k", "128k"]
SCALINGS: tuple[Scaling, ...] = ("strong", "weak")
GPU_COUNTS = tuple(8 * 2**n for n in range(10))
# Machines of eight; and for models whose vLLM server needs more GPUs than such a machine, NVLink domains of 64 (of an
# NVL72), made of many hosts: servers that are larger than a host are started apart.
CLUSTERS = {"h100": Cluster(GPUS["h100"], 8), "b200-nvl64": Cluster(GPUS["b200"], 64)}
ONLY_LARGEST = {"b200-nvl64": ("Llama-3.1-405B", "671B-mixture")}
# 128 prompts of 16 responses, tools/plan_parallelism.py's defaults; weak scaling has as many at BASE_GPUS.
BASE = Workload(128, 16, 200, 2000, 1024, 8192)
BASE_GPUS = 64
# Tokens of the longest response, and GPUs of each model that is asked for them.
LONG: dict[Scaling, int] = {"64k": 65536, "128k": 131072}
LONG_GPUS = {"Qwen2.5-32B": 128, "Qwen3-235B-A22B": 512}
# Weak scaling's work with servers that sample ahead: GPUs of each model, at the most so many steps ahead.
AHEAD_GPUS = {
    **dict.fromkeys(("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B"), 64),
    **dict.fromkeys(("Qwen3-30B-A3B", "Qwen2.5-32B", "Qwen2.5-72B"), 64),
    "Qwen3-235B-A22B": 128,
}
MOST_STALENESS = 4
PLACEMENTS = {"h100": ("separate", "shared"), "b200-nvl64": ("separate",)}
PHASES = {
    "rollout": ("rollout: prefill", "rollout: decode"),
    "reference": ("reference",),
    "policy": ("policy: old log-probs",),
    "update": ("policy: update",),
    "sync": ("weight sync",),
}
BOUNDS = {"compute": "compute", "memory": "memory", "network": "network", "pipeline": "bubble"}


@dataclass(frozen=True)
class Row:
    """None: no layout runs, and `reason` says why."""

    cluster: str
    model: str
    scaling: Scaling
    gpus: int
    prompts: int
    reason: str = ""
    gpus_used: int | None = None
    """Fewer than gpus where a smaller number is as fast: the others are idle."""
    trainer: str | None = None
    servers: str | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    """Prompt and response tokens."""
    tokens_per_gpu_s: float | None = None
    """Idle GPUs count."""
    mfu_update: float | None = None
    mfu_step: float | None = None
    headroom_gib: float | None = None
    """That the trainer leaves on its fullest GPU while it trains; a sleeping server keeps 3 of it."""
    share_rollout: float | None = None
    share_reference: float | None = None
    share_policy: float | None = None
    """Old log-probs, with more than one minibatch."""
    share_update: float | None = None
    share_sync: float | None = None
    bound_compute: float | None = None
    """Share of the step's time, as are the next."""
    bound_memory: float | None = None
    bound_network: float | None = None
    bound_pipeline: float | None = None
    over_grpo_with_kl: float | None = None
    """Seconds that DGPO adds to GRPO with the same reference pass in the same layout, by the latter's."""
    over_grpo: float | None = None
    """The same over GRPO without a reference."""

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: getattr(self, f"bound_{name}"))


@dataclass(frozen=True)
class Ahead:
    """The fastest plan of separate servers that sample ahead of the training (rollout.max_staleness), on H100."""

    model: str
    gpus: int
    staleness: int
    """The least that is as fast as any, to 3 %."""
    step_s: float
    """Of the simulation of groups in flight."""
    tokens_per_gpu_s: float
    ranks_wait: float
    """Part of the time."""
    servers_busy: float
    trainer: str
    servers: str


TEXTS = ("cluster", "model", "scaling", "reason", "trainer", "servers")
WHOLE = ("gpus", "prompts", "gpus_used")
COLUMNS = [field.name for field in fields(Row)]


def all_series(models: Iterable[str], clusters: Iterable[str]) -> list[tuple[str, str, Scaling]]:
    """In the order of the table's rows."""
    return [
        (cluster, model, scaling)
        for cluster in clusters
        for model in models
        if model in ONLY_LARGEST.get(cluster, ARCHITECTURES)
        for scaling in SCALINGS
    ]


def long_series() -> list[tuple[str, str, Scaling]]:
    return [("h100", model, scaling) for model in LONG_GPUS for scaling in LONG]


def workload(scaling: Scaling, gpus: int) -> Workload:
    if scaling in LONG:
        return replace(BASE, response_tokens=LONG[scaling] // 4, max_response_tokens=LONG[scaling])
    return BASE if scaling == "strong" else replace(BASE, prompts=max(1, BASE.prompts * gpus // BASE_GPUS))


def series_rows(
    cluster_name: str, model: str, scaling: Scaling, counts: Iterable[int], efficiencies: Efficiencies
) -> list[Row]:
    """One model over growing numbers of GPUs. With fixed work, GPUs that make a step slower stay idle."""
    sizes, cluster = sizes_of(model), replace(CLUSTERS[cluster_name], efficiencies=efficiencies)
    rows, fastest = [], None
    for gpus in counts:
        work = workload(scaling, gpus)
        plan = Planner(sizes, work, cluster).best(gpus, PLACEMENTS[cluster_name])
        if scaling == "strong":
            if fastest and (plan.problem or plan.step_s > fastest.step_s):
                plan = fastest
            fastest = None if plan.problem else plan
        head = cluster_name, model, scaling, gpus, work.prompts
        rows.append(Row(*head, reason=plan.problem) if plan.problem else _row(head, plan, sizes, work, cluster))
    return rows


def ahead(model: str, efficiencies: Efficiencies) -> Ahead:
    gpus, cluster = AHEAD_GPUS[model], replace(CLUSTERS["h100"], efficiencies=efficiencies)
    work = workload("weak", gpus)
    planner = Planner(sizes_of(model), work, cluster)
    plan = planner.best_ahead(planner.search(gpus, ("separate",)), MOST_STALENESS)
    assert plan, model
    one = plan.ahead
    rate = plan.tokens_per_gpu_s(work, one.step_s)
    waits = round(one.ranks_wait, 4), round(one.servers_busy, 4)
    sides = str(plan.trainer), f"{plan.rollout} on {plan.rollout.num_workers}"
    return Ahead(model, gpus, one.staleness, round(one.step_s, 2), round(rate, 1), *waits, *sides)


def _row(head: tuple, plan: Plan, sizes: Sizes, work: Workload, cluster: Cluster) -> Row:
    gpus, step_s = head[3], plan.step_s
    tokens_per_s = work.rows * work.mean_tokens / step_s
    shares = {
        f"share_{name}": sum(plan.phases[part].total for part in parts if part in plan.phases) / step_s
        for name, parts in PHASES.items()
    }
    bounds = {
        f"bound_{name}": sum(getattr(phase, part) for phase in plan.phases.values()) / step_s
        for name, part in BOUNDS.items()
    }
    update, sampling, reference = useful_operations(sizes, work)
    rate = cluster.gpu.flops
    own_s = plan.phases["policy: update"].total
    grpo_s = without_reference_s(plan, sizes, work, cluster)
    credit_s = credit_time(sizes, work, plan.trainer, cluster).total
    return Row(
        *head,
        gpus_used=plan.gpus,
        trainer=str(plan.trainer),
        servers=str(plan.rollout),
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        tokens_per_gpu_s=tokens_per_s / gpus,
        mfu_update=update / (plan.trainer.world_size * rate * own_s),
        mfu_step=(update + sampling + reference) / (gpus * rate * step_s),
        headroom_gib=plan.trainer_headroom(cluster) / GIB,
        **shares,
        **bounds,
        over_grpo_with_kl=credit_s / step_s,
        over_grpo=(step_s + credit_s) / grpo_s - 1,
    )


def useful_operations(sizes: Sizes, work: Workload) -> tuple[float, float, float]:
    """(update, rollout, reference pass) of a step. A group's prompt is computed once in sampling; logits are made of
    response tokens only."""
    weights = sizes.layers * (sizes.attention_weights + sizes.active_mlp_weights)
    # Each position meets half of the others of its sequence on average, in two products.
    attention = 2 * sizes.layers * sizes.a * sizes.d * work.mean_square_tokens
    head = 2 * sizes.h * sizes.vocab * work.response_tokens
    row = work.mean_tokens * 2 * weights + attention
    shared_prompts = (work.rows - work.prompts) * work.prompt_tokens * 2 * weights
    sampling = work.rows * (row + head) - shared_prompts
    # The reference's logits are made in the loss.
    reference = work.rows * (row + head) if work.reference else 0.0
    return 3 * work.rows * (row + head), sampling, reference


def credit_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> Seconds:
    """What DGPO computes on the last stage and GRPO with a KL term to the same reference does not: the midpoint's sums.

    The KL term needs log ρ(a), and with it the reference's pass and its logits. Counted as one more reading of both
    models' float32 tiles of logits, which an unfused implementation has and the Triton kernel has not (statistics/),
    and four more sums a token in the one all-gather: an upper bound. With several minibatches old log-probs cost it
    again.
    """
    tokens = work.rows / trainer.copies * work.response_tokens * (1 if work.minibatches == 1 else 2)
    t = trainer.tensor
    touched = tokens * sizes.vocab / t * 2 * 4
    return Seconds(
        memory=touched / (cluster.gpu.memory_bandwidth * cluster.efficiencies.memory),
        network=tokens * 4 * 4 * (t - 1) / cluster.bandwidth(t),
    )


def without_reference_s(plan: Plan, sizes: Sizes, work: Workload, cluster: Cluster) -> float:
    """Seconds of GRPO's step without a reference, in the same layout."""
    trainer = replace(plan.trainer, reference="none")
    planner = Planner(sizes, replace(work, reference=False), cluster)
    return sum(phase.total for phase in planner.phases(trainer, plan.rollout, plan.server).values())
