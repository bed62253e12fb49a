"""All layouts of a model over some GPUs: which are legal, which fit, how long a step takes, and the one to choose."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dgpo import legality
from megatron_dgpo.algorithm.passes import Passes
from megatron_dgpo.config import Config
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.planning import in_flight, memory, sides, step_time
from megatron_dgpo.planning.hardware import Cluster
from megatron_dgpo.planning.in_flight import InFlight, recommended
from megatron_dgpo.planning.memory import GIB
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.planning.step_time import Seconds

# servers.gpu_memory_fraction of a server that has its GPUs for itself.
OWN_FRACTION = 0.90
# More sequences at once than this gain nothing: decoding is bound by computing.
MOST_SEQUENCES = 1024
# Steps this close to the fastest count as equal: the formulas are no better than that. Of those, more memory left than
# COMFORT is no reason to choose one.
EQUAL = 1.03
COMFORT = 8 * GIB
# Plans whose groups in flight are simulated, a second each.
_SIMULATED = 4
# Of a shared GPU that neither side may plan with: both grow in their own time.
SHARED_MARGIN = 0.02


@dataclass(frozen=True)
class Server:
    """What a vLLM server can do in the memory it is given."""

    memory: dict[str, float]
    """Bytes by item of one worker."""
    fraction: float
    concurrent: int
    problem: str | None = None
    """Why it cannot run; None: it can."""


@dataclass(frozen=True)
class Plan:
    """One layout with its memory and time."""

    trainer: TrainerSide
    rollout: RolloutSide | None = None
    stages: tuple[dict[str, float], ...] = ()
    """Bytes by item of one GPU of each pipeline stage."""
    server: Server | None = None
    phases: dict[str, Seconds] | None = None
    problem: str | None = None
    """Why it is refused or does not fit; None: it runs."""
    in_flight: tuple[InFlight, ...] = ()
    """Its steps when servers sample ahead, by staleness; empty: they do not."""
    staleness: int | None = None
    """The one that a config has set."""

    @property
    def step_s(self) -> float:
        """One phase after the other."""
        return sum(phase.total for phase in self.phases.values())

    @property
    def sampling_s(self) -> float:
        """Of these, the servers' own."""
        return sum(phase.total for name, phase in self.phases.items() if name.startswith("rollout"))

    @property
    def ahead(self) -> InFlight:
        """What the config has set of those that were looked at, or else what to choose."""
        return recommended(self.in_flight) if self.staleness is None else self.in_flight[self.staleness]

    @property
    def gpus(self) -> int:
        return self.trainer.world_size + (0 if self.rollout.shared else self.rollout.num_workers)

    def tokens_per_gpu_s(self, work: Workload, step_s: float | None = None) -> float:
        """Prompt and response tokens of a step, by its time, or `step_s`, and all GPUs."""
        return work.rows * work.mean_tokens / (step_s or self.step_s) / self.gpus

    def peaks(self, stage: int) -> dict[str, float]:
        """{phase: bytes of one GPU of the stage}, a server that shares it included."""
        own, server = sum(self.stages[stage].values()), sum(self.server.memory.values())
        if not self.rollout.shared:
            return {"training": own}
        if not self.rollout.sleep:
            return {"both on one GPU": own + server}
        return {
            "training, server asleep": own + memory.ASLEEP_BYTES,
            "sampling": memory.resident(self.stages[stage]) + server,
        }

    def trainer_headroom(self, cluster: Cluster) -> float:
        """Bytes that the trainer leaves on its fullest GPU."""
        return cluster.gpu.memory_bytes - max(sum(items.values()) for items in self.stages)


class Planner:
    """Works out plans of one model and workload on one cluster, keeping what many layouts have in common."""

    def __init__(self, sizes: Sizes, work: Workload, cluster: Cluster) -> None:
        self.sizes, self.work, self.cluster = sizes, work, cluster
        self._best_rollout = functools.cache(self._find_best_rollout)

    def evaluate(self, trainer: TrainerSide, rollout: RolloutSide, fraction: float, sequences: int) -> Plan:
        """Memory and time of one layout, with the server's part of a GPU and the most sequences it may decode."""
        stages = self._stages(trainer)
        server = self.server(rollout, fraction, sequences)
        plan = Plan(trainer, rollout, stages, server)
        problem = self.problem(trainer, self._reserved(rollout)) or server.problem
        most = max(max(plan.peaks(stage).values()) for stage in range(trainer.pipeline))
        if problem is None and most > self.cluster.gpu.memory_bytes:
            problem = (
                f"trainer and server need {most / GIB:.1f} GiB of a shared GPU: "
                f"{self.cluster.gpu.memory_bytes / GIB:.1f} GiB available; lower servers.gpu_memory_fraction"
            )
        phases = None if server.problem else self.phases(trainer, rollout, server)
        return replace(plan, phases=phases, problem=problem)

    def search(self, gpus: int, placements: tuple[str, ...] = ("separate", "shared")) -> list[Plan]:
        """A plan for every layout of the trainer that matters, with the best servers for it."""
        plans = []
        for shared, count in self._splits(gpus, placements):
            for trainer, reason in sides.trainer_sides(
                self.sizes.architecture, self.work, count, self.cluster.gpus_per_node
            ):
                plans.append(self._plan(trainer, reason, gpus, count, shared))
        return plans

    def best(self, gpus: int, placements: tuple[str, ...] = ("separate", "shared")) -> Plan:
        """What choose() takes of search(), seconds instead of minutes on large clusters; or a plan with the problem of
        the layout that comes closest.

        Layouts are worked out in the order of a lower bound of their time, until none can be as good as equal: servers
        have all that a shared GPU can give them, and memory is looked at last.
        """
        bounds = sorted(self._lower_bounds(gpus, placements), key=lambda bound: bound[0])
        running, fastest, closest = [], float("inf"), (float("inf"), None)
        for bound, trainer, count, shared in bounds:
            if bound > EQUAL * fastest:
                break
            needed = self._fullest(trainer)[0] + (memory.ASLEEP_BYTES if shared else 0.0)
            if needed <= self.cluster.gpu.memory_bytes:
                plan = self._plan(trainer, None, gpus, count, shared)
                if plan.problem is None:
                    running.append(plan)
                    fastest = min(fastest, plan.step_s)
                    continue
                # Where the trainer fits, and its servers do not, nothing else comes closer.
                needed = needed if plan.rollout is None else 0.0
            closest = min(closest, (needed, (trainer, count, shared)), key=lambda pair: pair[0])
        if running:
            return choose(running, self.cluster)
        if closest[1] is None:
            return Plan(TrainerSide(1, 1, gpus), problem="no layout divides the model and the batch over these GPUs")
        trainer, count, shared = closest[1]
        return self._plan(trainer, None, gpus, count, shared)

    def sampling_ahead(self, plan: Plan, most: int, staleness: int | None = None) -> Plan:
        """The plan, of separate servers, with what a staleness of 0 to `most` makes of its step; `staleness` is set."""
        setting = self.sizes, self.work, plan.rollout, self.cluster, plan.server.concurrent
        pushing = plan.phases["weight sync"].total
        training = plan.step_s - plan.sampling_s - pushing
        found = tuple(in_flight.simulate(*setting, training, pushing, staleness) for staleness in range(most + 1))
        return replace(plan, in_flight=found, staleness=staleness or None)

    def best_ahead(self, plans: list[Plan], most: int) -> Plan | None:
        """Of `search`'s the fastest with a staleness of at most `most`; None where servers are never separate.

        Simulated are those of which the slower side is fastest: neither side's step can take less.
        """

        def slower_side(plan: Plan) -> float:
            return max(plan.sampling_s, plan.step_s - plan.sampling_s)

        separate = [plan for plan in plans if plan.problem is None and not plan.rollout.shared]
        tried = [self.sampling_ahead(plan, most) for plan in sorted(separate, key=slower_side)[:_SIMULATED]]
        return min(tried, key=lambda plan: plan.ahead.step_s, default=None)

    def _lower_bounds(self, gpus: int, placements: tuple[str, ...]) -> Iterator[tuple[float, TrainerSide, int, bool]]:
        """(seconds that no plan of it goes below, trainer, its GPUs, whether they are shared)."""
        architecture, per_node = self.sizes.architecture, self.cluster.gpus_per_node
        for shared, count in self._splits(gpus, placements):
            rollout, server, problem = self._best_rollout(count if shared else gpus - count, shared, OWN_FRACTION)
            sampling = 0.0 if problem else sum(s.total for s in self._rollout_seconds(rollout, server))
            for trainer, reason in sides.trainer_sides(architecture, self.work, count, per_node, undominated=True):
                if reason is None:
                    yield sampling + self._trainer_seconds(trainer), trainer, count, shared

    def _trainer_seconds(self, trainer: TrainerSide) -> float:
        setting = self.sizes, self.work, trainer, self.cluster
        phases = step_time.reference_time(*setting), step_time.old_logprobs_time(*setting)
        return sum(phase.total for phase in (*phases, step_time.update_time(*setting)))

    def server(self, rollout: RolloutSide, fraction: float, sequences: int | None = None) -> Server:
        """A worker's memory with `fraction` of its GPU: what weights and workspace leave is the cache."""
        budget = fraction * self.cluster.gpu.memory_bytes
        wanted = min(-(-self.work.rows // rollout.servers), sequences or MOST_SEQUENCES)
        items = memory.vllm_fixed(self.sizes, self.work, rollout.tensor, wanted)
        cache = budget - sum(items.values())
        a_token = memory.vllm_kv_bytes(self.sizes, rollout.tensor)
        needed, what = a_token * self.work.context, "the cache of one sequence"
        update = memory.ipc_update(self.sizes, rollout.tensor, self.work.element_bytes) if rollout.shared else 0.0
        if update > needed:
            needed, what = update, "the buffers of a weight update"
        if cache < needed:
            problem = (
                f"vLLM at TP {rollout.tensor} needs {(sum(items.values()) + needed) / GIB:.1f} GiB with {what}: "
                f"{max(0.0, budget) / GIB:.1f} GiB available"
            )
            return Server(items | {"vLLM KV cache": max(0.0, cache)}, fraction, 0, problem)
        # Sequences grow while others end: on average each holds its prompt and all of a mean response.
        fitting = int(cache / a_token / (self.work.prompt_tokens + self.work.response_tokens))
        return Server(items | {"vLLM KV cache": cache}, fraction, max(1, min(wanted, fitting)))

    def _splits(self, gpus: int, placements: tuple[str, ...]) -> list[tuple[bool, int]]:
        """(shared, GPUs of the trainer): all of them, or whole machines on either side where there are several."""
        per_node = self.cluster.gpus_per_node
        found = [(True, gpus)] if "shared" in placements else []
        if "separate" in placements:
            unit = per_node if gpus > per_node and gpus % per_node == 0 else 1
            # Above eight units only every eighth of the cluster: finer steps change a plan by less than its error.
            step = max(1, gpus // unit // 8)
            found += [(False, unit * count) for count in range(step, gpus // unit, step)]
        return found

    def _plan(self, trainer: TrainerSide, reason: str | None, gpus: int, count: int, shared: bool) -> Plan:
        if reason:
            return Plan(trainer, problem=reason)
        stages = self._stages(trainer)
        problem = self.problem(trainer, memory.ASLEEP_BYTES if shared else 0.0)
        if problem:
            return Plan(trainer, stages=stages, problem=problem)
        rest = [memory.resident(items) if shared else sum(items.values()) for items in stages]
        fraction = OWN_FRACTION
        if shared:
            room = 1 - max(rest) / self.cluster.gpu.memory_bytes - SHARED_MARGIN
            fraction = min(OWN_FRACTION, max(0.0, int(room * 100) / 100))
        rollout, server, problem = self._best_rollout(count if shared else gpus - count, shared, fraction)
        if problem:
            where = f"beside the trainer's {max(rest) / GIB:.1f} GiB: " if shared else ""
            return Plan(trainer, rollout, stages, server, problem=where + problem)
        return Plan(trainer, rollout, stages, server, self.phases(trainer, rollout, server))

    def _reserved(self, rollout: RolloutSide) -> float:
        """Bytes of the trainer's GPUs that a sleeping server keeps."""
        return memory.ASLEEP_BYTES if rollout.shared and rollout.sleep else 0.0

    def _find_best_rollout(self, gpus: int, shared: bool, fraction: float):
        """(layout, server, None) that samples fastest, or the one that comes closest to running and its problem."""
        best, problem = None, None
        for rollout, reason in sides.rollout_sides(self.sizes.architecture, gpus, self.cluster.gpus_per_node, shared):
            server = None if reason else self.server(rollout, fraction)
            if reason or server.problem:
                # The largest tensor-parallel size comes last and needs least.
                problem = problem or (rollout, server, reason or server.problem)
                if not reason:
                    problem = rollout, server, server.problem
                continue
            seconds = sum(s.total for s in self._rollout_seconds(rollout, server))
            if best is None or seconds < best[0]:
                best = seconds, rollout, server
        return (best[1], best[2], None) if best else problem

    def _rollout_seconds(self, rollout: RolloutSide, server: Server) -> tuple[Seconds, Seconds]:
        return step_time.rollout_time(self.sizes, self.work, rollout, self.cluster, server.concurrent)

    def phases(self, trainer: TrainerSide, rollout: RolloutSide, server: Server) -> dict[str, Seconds]:
        prefill, decoding = self._rollout_seconds(rollout, server)
        setting = self.sizes, self.work, trainer, self.cluster
        phases = {
            "rollout: prefill": prefill,
            "rollout: decode": decoding,
            "reference": step_time.reference_time(*setting),
            "policy: old log-probs": step_time.old_logprobs_time(*setting),
            "policy: update": step_time.update_time(*setting),
            "weight sync": step_time.sync_time(self.sizes, trainer, rollout, self.cluster),
        }
        return {name: seconds for name, seconds in phases.items() if seconds.total}

    def _stages(self, trainer: TrainerSide) -> tuple[dict[str, float], ...]:
        return tuple(memory.trainer_memory(self.sizes, self.work, trainer, stage) for stage in range(trainer.pipeline))

    def problem(self, trainer: TrainerSide, reserved: float = 0.0) -> str | None:
        """What is too much where, and the changes that help most, one after the other until it fits; None: it fits.

        reserved: bytes of every GPU that are not the trainer's.
        """
        needed, stage = self._fullest(trainer)
        available = self.cluster.gpu.memory_bytes - reserved
        if needed <= available:
            return None
        text = f"needs {needed / GIB:.1f} GiB on stage {stage}: {available / GIB:.1f} GiB available"
        names: list[str] = []
        while needed > available:
            tried = [(self._fullest(changed)[0], name, changed) for name, changed in _changes(trainer, self.work)]
            if not tried:
                break
            least, name, changed = min(tried, key=lambda item: item[0])
            if least >= needed:
                break
            needed, trainer = least, changed
            names.append(name)
        if not names:
            return text
        verb, enough = "bring" if len(names) > 1 else "brings", "" if needed <= available else ", still too much"
        return f"{text}; {' and '.join(names)} {verb} it to {needed / GIB:.1f} GiB{enough}"

    def _fullest(self, trainer: TrainerSide) -> tuple[float, int]:
        """(bytes, stage) of the first stage, with the embedding and most activations, or the last, with the head and
        the loss: those between have neither, and fewer micro-batches than the first."""
        ends = (0, trainer.pipeline - 1)
        return max(
            (sum(memory.trainer_memory(self.sizes, self.work, trainer, stage).values()), stage) for stage in ends
        )


def _changes(trainer: TrainerSide, work: Workload) -> list[tuple[str, TrainerSide]]:
    """Settings that save memory and are not in use, with the layout that each makes."""
    found = []
    if trainer.recompute != "full":
        found.append(("recompute=full", replace(trainer, recompute="full")))
    if not trainer.sequence and trainer.tensor > 1:
        found.append(("sequence=true", replace(trainer, sequence=True)))
    if not trainer.distributed_optimizer and trainer.copies > 1:
        found.append(("distributed_optimizer=true", replace(trainer, distributed_optimizer=True)))
    if trainer.reference == "device":
        found.append(("reference_offload=true", replace(trainer, reference="host")))
    least = sides.budgets(work, trainer)[0]
    if trainer.micro_batch_tokens > least:
        found.append((f"micro_batch_tokens={least}", replace(trainer, micro_batch_tokens=least)))
    context = 2 * trainer.context
    if trainer.data % 2 == 0 and context in sides.contexts(work, context):
        found.append((f"context={context}", replace(trainer, context=context, data=trainer.data // 2)))
    return found


def choose(plans: list[Plan], cluster: Cluster) -> Plan | None:
    """The fastest; of those that are as good as equal, one that leaves COMFORT of its fullest GPU, or else the most.

    Less than a GiB is no difference.
    """
    running = [plan for plan in plans if plan.problem is None]
    if not running:
        return None
    fastest = min(plan.step_s for plan in running)
    close = [plan for plan in running if plan.step_s <= EQUAL * fastest]
    # A shared server takes what the trainer leaves: that is not held against the layout.
    return max(close, key=lambda plan: (min(plan.trainer_headroom(cluster), COMFORT) // GIB, -plan.step_s))


def sides_of(config: Config, gpus: int, gpus_per_node: int) -> tuple[TrainerSide, RolloutSide]:
    """The layout that a config describes on `gpus` GPUs. Raises UsageError where it does not fill them."""
    parallel, servers = config.parallel, config.servers
    # servers.count is of one machine.
    machine = ServerLayout.from_config(servers)
    asked = Layout.from_config(parallel)
    shared = servers.sleep if parallel.data is None else asked.world_size == gpus
    rest = gpus if shared else max(asked.model_size, gpus - machine.num_workers)
    trainer = trainer_of(config, asked.world_size if parallel.data else rest)
    serving = gpus if shared else gpus - trainer.world_size
    machines = max(1, serving // gpus_per_node)
    legality.check(legality.of_cluster(trainer, machine, gpus, shared, machines))
    rollout = RolloutSide.from_config(servers, machines * servers.count)
    return trainer, replace(rollout, shared=shared, sleep=shared and servers.sleep)


def trainer_of(config: Config, ranks: int) -> TrainerSide:
    """The trainer that a config describes on so many ranks."""
    place = "host" if config.model.reference_offload else "device"
    return replace(
        TrainerSide.from_config(config.parallel, ranks),
        distributed_optimizer=config.parallel.distributed_optimizer,
        recompute=config.model.recompute,
        reference=place if config.needs_reference else "none",
        micro_batch_tokens=config.batch.micro_batch_tokens,
    )


def workload_of(config: Config, prompt_tokens: int, response_tokens: int) -> Workload:
    """The work that a config describes; mean lengths are the data's."""
    rollout, passes = config.rollout, Passes.from_config(config)
    return Workload(
        rollout.prompts_per_step,
        rollout.group_size,
        prompt_tokens,
        response_tokens,
        rollout.context_tokens - rollout.max_response_tokens,
        rollout.max_response_tokens,
        config.batch.minibatches,
        config.needs_reference,
        config.needs_start,
        passes.policy_before,
        passes.reference_before + passes.reference,
        config.model.dtype,
    )


def settings_of(plan: Plan, work: Workload, gpus_per_node: int) -> dict[str, dict]:
    """The plan as settings of megatron_dgpo.config."""
    trainer, rollout = plan.trainer, plan.rollout
    machines = max(1, rollout.num_workers // gpus_per_node)
    parallel = trainer.parallel().model_dump()
    return {
        "model": {
            "dtype": work.dtype,
            "recompute": trainer.recompute,
            "reference_offload": trainer.reference == "host",
        },
        "parallel": parallel,
        "batch": {"micro_batch_tokens": trainer.micro_batch_tokens, "minibatches": work.minibatches},
        "algorithm": {"credit": "distribution_guided" if work.reference else "uniform"},
        "rollout": {
            "prompts_per_step": work.prompts,
            "group_size": work.group,
            "max_response_tokens": work.max_response_tokens,
            "context_tokens": work.context,
            **({"max_staleness": plan.ahead.staleness} if plan.in_flight else {}),
        },
        "servers": {
            # Of one machine.
            "count": rollout.servers // machines,
            "tensor": rollout.tensor,
            "gpu_memory_fraction": plan.server.fraction,
            "max_concurrent": plan.server.concurrent,
            **({"sleep": True} if rollout.sleep else {}),
        },
        # Two processes cannot be ranks of one NCCL group on the same GPU.
        "weight_sync": {"transport": "ipc" if rollout.shared else "shards"},
    }
