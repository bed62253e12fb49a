"""What is planned: the work of a step, and one way to lay it out over GPUs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

from megatron_dgpo import legality
from megatron_dgpo.config import Parallel
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.weights.architectures import Architecture

Recompute = Literal["none", "selective", "full"]
ReferencePlace = Literal["device", "host", "none"]


@dataclass(frozen=True)
class Workload:
    """One step of training. Lengths in tokens."""

    prompts: int
    group: int
    prompt_tokens: int
    """Mean."""
    response_tokens: int
    """Mean."""
    max_prompt_tokens: int
    max_response_tokens: int
    minibatches: int = 1
    reference: bool = True
    padded: bool = True
    """Rows are padded to the longest, as this trainer does; False: packed end to end, as others do."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def row_tokens(self) -> int:
        """Of one row in training."""
        return self.context if self.padded else self.prompt_tokens + self.response_tokens

    @property
    def element_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class TrainerSide(Layout):
    """The trainer's ranks, and what they keep where."""

    distributed_optimizer: bool = False
    recompute: Recompute = "none"
    reference: ReferencePlace = "device"
    micro_batch: int = 1

    @functools.cached_property
    def layout(self) -> Layout:
        """The sizes alone: what depends on nothing else is kept by them."""
        return Layout(**{field.name: getattr(self, field.name) for field in fields(Layout)})

    def parallel(self) -> Parallel:
        """The trainer's settings."""
        return Parallel(**self.settings(), distributed_optimizer=self.distributed_optimizer)

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}{'+SP' if self.sequence else ''}", f"PP{self.pipeline}"]
        parts += [f"VP{self.chunks}"] if self.chunks > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"DP{self.data}{' sharded' if self.distributed_optimizer else ''}", f"mbs{self.micro_batch}"]
        parts += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        parts += ["reference on host"] if self.reference == "host" else []
        return " ".join(parts)


@dataclass(frozen=True)
class RolloutSide(ServerLayout):
    """The vLLM servers, on the trainer's GPUs (shared) or on their own. sleep: shared ones leave while it trains."""

    shared: bool = False
    sleep: bool = False

    def __str__(self) -> str:
        place = ("asleep in training" if self.sleep else "shared") if self.shared else "separate"
        return f"{self.servers} × TP{self.tensor} {place}"


def refusal(
    architecture: Architecture, trainer: TrainerSide, work: Workload, gpus_per_node: int, name: str = "the model"
) -> str | None:
    """Why the trainer or Megatron-Core would not accept the layout, or the planner plan it; None: they do."""
    step = work.prompts, work.group, work.minibatches, trainer.micro_batch
    return legality.first(
        itertools.chain(
            legality.of_model(architecture, trainer, name),
            legality.of_machine("parallel.tensor", trainer.tensor, gpus_per_node),
            legality.of_step(trainer, *step),
        )
    )


def rollout_refusal(architecture: Architecture, rollout: RolloutSide, gpus_per_node: int) -> str | None:
    """Why vLLM would not accept the server's layout, or the planner plan it; None: they do."""
    machine = legality.of_machine("servers.tensor", rollout.tensor, gpus_per_node)
    return legality.first(itertools.chain(legality.of_server(architecture, rollout), machine))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def trainer_sides(
    architecture: Architecture,
    work: Workload,
    gpus: int,
    gpus_per_node: int,
    micro_batches: tuple[int, ...] = (1, 2, 4),
) -> Iterator[tuple[TrainerSide, str | None]]:
    """Every layout of the trainer over `gpus` GPUs that differs in a way that matters, and why it is refused.

    Sizes that divide nothing of the model are left out; what is left may still be refused by others' rules.
    """
    places: tuple[ReferencePlace, ...] = ("device", "host") if work.reference else ("none",)
    for layout in _layouts(architecture, gpus, gpus_per_node):
        for sharded, micro_batch in itertools.product((False, True) if layout.data > 1 else (False,), micro_batches):
            fixed = vars(layout) | {"distributed_optimizer": sharded, "micro_batch": micro_batch}
            trainer = TrainerSide(**fixed)
            reason = refusal(architecture, trainer, work, gpus_per_node)
            if reason:
                yield trainer, reason
                continue
            for recompute, reference in itertools.product(get_args(Recompute), places):
                yield TrainerSide(**fixed, recompute=recompute, reference=reference), None


def _layouts(architecture: Architecture, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Sizes of which each divides `gpus`, and layers or experts of the model where they are split."""
    experts = architecture.num_experts
    for tensor in divisors(gpus):
        if tensor > max(gpus_per_node, architecture.num_query_groups):
            continue
        for pipeline in divisors(gpus // tensor):
            if pipeline > architecture.num_layers:
                continue
            data = gpus // tensor // pipeline
            for chunks in _chunk_counts(architecture.num_layers, pipeline):
                for expert in [n for n in divisors(tensor * data) if experts % n == 0] if experts else [1]:
                    for sequence in (False, True) if tensor > 1 else (False,):
                        yield Layout(tensor, pipeline, data, chunks, expert, sequence)


def undominated_sides(
    architecture: Architecture, work: Workload, gpus: int, gpus_per_node: int
) -> Iterator[TrainerSide]:
    """The legal layouts of trainer_sides() that no other beats by the formulas of memory and time.

    Larger micro-batches need more memory and fill a pipeline less well; a whole optimizer on every replica needs more
    memory and moves at least as many bytes.
    """
    for trainer, reason in trainer_sides(architecture, work, gpus, gpus_per_node, (1,)):
        if reason is None and trainer.distributed_optimizer == (trainer.data > 1):
            yield trainer


def _chunk_counts(layers: int, pipeline: int) -> list[int]:
    """No finer than one layer a chunk; more than eight chunks only cost messages."""
    if pipeline == 1 or layers % pipeline:
        return [1]
    return [n for n in divisors(layers // pipeline) if n <= 8]


def rollout_sides(
    architecture: Architecture, gpus: int, gpus_per_node: int, shared: bool
) -> Iterator[tuple[RolloutSide, str | None]]:
    for tensor in divisors(gpus):
        if tensor <= gpus_per_node:
            rollout = RolloutSide(tensor, gpus // tensor, shared=shared, sleep=shared)
            yield rollout, rollout_refusal(architecture, rollout, gpus_per_node)
