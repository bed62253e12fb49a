"""What is planned: the work of a step, and one way to lay it out over GPUs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

from megatron_dgpo import legality
from megatron_dgpo.balance import fit
from megatron_dgpo.config import Parallel
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.weights.architectures import Architecture

Recompute = Literal["none", "selective", "full"]
ReferencePlace = Literal["device", "host", "none"]

BUDGETS = (4096, 8192, 16384, 32768, 65536)
"""Of TrainerSide.micro_batch_tokens, to choose from: fewer positions make matrix products inefficient."""
# Sequences of a replica that are fitted into micro-batches, where there are more, for all of them.
_FITTED = 128


@dataclass(frozen=True)
class Workload:
    """One step of training. Lengths in tokens.

    Prompts are of their mean length; responses such that the share of them still running after k of R tokens is
    1 − (k/R)^c, with c set by their mean. Where the mean is R, all have that length.
    """

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
    start: bool = False
    """A second frozen model, from which the reference is extrapolated."""
    policy_before: bool | None = None
    """Of the policy there is a pass before the first update; None: with several minibatches."""
    reference_passes: int = 1
    """Of each frozen model over all sequences."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def mean_tokens(self) -> int:
        """Of a prompt with its response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def exponent(self) -> float:
        """c; infinite where all responses are as long."""
        ahead = self.max_response_tokens - self.response_tokens
        return self.response_tokens / ahead if ahead else math.inf

    @property
    def mean_square_tokens(self) -> float:
        """E[L²] of a prompt with its response: attention meets L²/2 pairs of a position and one before it."""
        square = self.max_response_tokens**2 / (1 + 2 / self.exponent)
        return self.prompt_tokens**2 + 2 * self.prompt_tokens * self.response_tokens + square

    def longest_of(self, sequences: float) -> float:
        """Expected tokens of the longest of so many prompts with their responses."""
        return self.prompt_tokens + self.max_response_tokens / (1 + 1 / (sequences * self.exponent))

    def lengths(self, sequences: int) -> list[int]:
        """Of so many prompts with their responses, spread evenly over the distribution."""
        places = ((number + 0.5) / sequences for number in range(sequences))
        return [self.prompt_tokens + round(self.max_response_tokens * x ** (1 / self.exponent)) for x in places]

    @property
    def element_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class TrainerSide(Layout):
    """The trainer's ranks, and what they keep where."""

    distributed_optimizer: bool = False
    recompute: Recompute = "none"
    reference: ReferencePlace = "device"
    micro_batch_tokens: int = 8192
    """Most of a rank's micro-batch; a longer sequence runs alone."""

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
        parts += [f"CP{self.context}"] if self.context > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"DP{self.data}{' sharded' if self.distributed_optimizer else ''}"]
        parts += [f"{self.micro_batch_tokens:,} tokens"]
        parts += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        parts += ["reference on host"] if self.reference == "host" else []
        return " ".join(parts)


@dataclass(frozen=True)
class MicroBatches:
    """Those of an optimizer step on one replica. Positions and tokens are of all context-parallel ranks together."""

    count: int
    sequences: float
    """Mean of one, as are the next two."""
    tokens: float
    positions: float
    """Computed in the layers: the tokens, or in a pipeline as many as the longest micro-batch has."""
    most: int
    """Positions that memory must hold."""


@functools.lru_cache(2**12)
def micro_batches(work: Workload, trainer: TrainerSide) -> MicroBatches:
    """As balance.share_out makes them and packed.pack_micro_batches fills them, of lengths spread evenly."""
    budget = trainer.micro_batch_tokens * trainer.context
    sequences = work.rows / work.minibatches / trainer.data
    count, positions = _fitted(work, math.ceil(sequences), budget, trainer.micro_batches_multiple)
    tokens = sequences * work.mean_tokens / count
    if trainer.pipeline == 1:
        positions = tokens
    else:
        positions = max(positions, work.longest_of(work.rows / work.minibatches))
    return MicroBatches(count, sequences / count, tokens, positions, max(budget, work.context))


@functools.lru_cache(2**16)
def _fitted(work: Workload, sequences: int, budget: int, multiple_of: int) -> tuple[int, float]:
    """(micro-batches, positions of the longest) of the trainer's own way to fit sequences into them."""
    lengths = work.lengths(min(sequences, _FITTED))
    if sequences <= _FITTED:
        parts = fit(lengths, budget, multiple_of)
        count = len(parts)
    else:
        parts = fit(lengths, budget)
        count = math.ceil(len(parts) * sequences / _FITTED)
    longest = max(sum(lengths[place] for place in part) for part in parts)
    return -(-count // multiple_of) * multiple_of, longest


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
    step = work.prompts, work.group, work.minibatches
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


def contexts(work: Workload, most: int) -> list[int]:
    """Context-parallel sizes up to `most` that leave a rank at least the least budget of the longest sequence."""
    return [n for n in divisors(most) if n == 1 or (n & (n - 1) == 0 and work.context >= n * BUDGETS[0])]


def budgets(work: Workload, layout: Layout) -> list[int]:
    """Micro-batches' tokens that differ in what matters for the formulas of memory and time.

    Memory must hold the longest sequence whatever the budget. In a pipeline more tokens have less padding to the
    longest, and fill it less well; elsewhere they gain nothing.
    """
    share = work.context // layout.context
    least = max([budget for budget in BUDGETS if budget <= share], default=BUDGETS[0])
    if layout.pipeline == 1:
        return [least]
    all_tokens = work.rows / work.minibatches / layout.data * work.mean_tokens / layout.context
    return [budget for budget in BUDGETS if budget == least or least < budget <= all_tokens]


def trainer_sides(
    architecture: Architecture, work: Workload, gpus: int, gpus_per_node: int, undominated: bool = False
) -> Iterator[tuple[TrainerSide, str | None]]:
    """Every layout of the trainer over `gpus` GPUs that differs in a way that matters, and why it is refused.

    Sizes that divide nothing of the model are left out; what is left may still be refused by others' rules.
    undominated: without a whole optimizer on every copy of the weights, which needs more memory and moves at least as
    many bytes.
    """
    places: tuple[ReferencePlace, ...] = ("device", "host") if work.reference else ("none",)
    for layout in _layouts(architecture, work, gpus, gpus_per_node):
        several = layout.copies > 1
        sharding = (several,) if undominated or not several else (False, True)
        for sharded, budget in itertools.product(sharding, budgets(work, layout)):
            fixed = vars(layout) | {"distributed_optimizer": sharded, "micro_batch_tokens": budget}
            trainer = TrainerSide(**fixed)
            reason = refusal(architecture, trainer, work, gpus_per_node)
            if reason:
                yield trainer, reason
                continue
            for recompute, reference in itertools.product(get_args(Recompute), places):
                yield TrainerSide(**fixed, recompute=recompute, reference=reference), None


def _layouts(architecture: Architecture, work: Workload, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Sizes of which each divides `gpus`, and layers or experts of the model where they are split."""
    experts = architecture.num_experts
    for tensor in divisors(gpus):
        if tensor > max(gpus_per_node, architecture.num_query_groups):
            continue
        for pipeline in divisors(gpus // tensor):
            if pipeline > architecture.num_layers:
                continue
            copies = gpus // tensor // pipeline
            sizes = itertools.product(
                contexts(work, copies),
                _chunk_counts(architecture.num_layers, pipeline),
                [n for n in divisors(tensor * copies) if experts % n == 0] if experts else [1],
                (False, True) if tensor > 1 else (False,),
            )
            for context, chunks, expert, sequence in sizes:
                yield Layout(tensor, pipeline, copies // context, chunks, expert, sequence, context)


def _chunk_counts(layers: int, pipeline: int) -> list[int]:
    """No finer than one layer a chunk; more than eight chunks only cost messages."""
    if pipeline == 1 or layers % pipeline:
        return [1]
    return [n for n in divisors(layers // pipeline) if n <= 8]


def rollout_sides(
    architecture: Architecture, gpus: int, gpus_per_node: int, shared: bool
) -> Iterator[tuple[RolloutSide, str | None]]:
    for tensor in divisors(min(gpus, gpus_per_node)):
        if gpus % tensor == 0:
            rollout = RolloutSide(tensor, gpus // tensor, shared=shared, sleep=shared)
            yield rollout, rollout_refusal(architecture, rollout, gpus_per_node)
