"""Step times that others published, beside what the formulas say for the same layout, and for the best one here.

Training: Korthikanti et al. 2022 (arXiv 2205.05198), tables 3 and 5, A100; GELU layers, here as SwiGLU of as many
operations. Mixture: Megatron-Bridge, docs/performance-summary.md, H100, bfloat16. RL: NeMo-RL v0.5, and v0.6 for
Qwen3-235B, docs/about/performance-summary.md and its recipes at these tags, H100, bfloat16, GRPO with a reference;
lengths are their measured means. Its sequences are packed as here, into as many tokens as the longest may have
(sequence_packing.train_mb_tokens = max_total_sequence_length × train_micro_batch_size). Rows with asynchronous sampling
are left out: this trainer has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_dgpo.planning import step_time
from megatron_dgpo.planning.hardware import GPUS, Cluster
from megatron_dgpo.planning.plan import Plan, Planner
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide, Workload
from megatron_dgpo.planning.sizes import Sizes
from tools.scaling.models import shape, sizes_of

# policy.generation.vllm_cfg.gpu_memory_utilization of NeMo-RL's recipes; training's memory is moved away meanwhile.
_NEMO_FRACTION = 0.6
# OpenMathInstruct-2's prompts in NeMo-RL's template; published lengths include them.
_NEMO_PROMPT = 150


@dataclass(frozen=True)
class Published:
    name: str
    seconds: float
    predict: Callable[[], float]
    plan: Callable[[], Plan] | None = None
    """The same work on as many GPUs, as this planner lays it out."""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predict() / self.seconds - 1


def _training(name, layers, hidden, heads, pipeline, chunks, batch, micro_batch, full, selective) -> list[Published]:
    """[K] at TP 8 and DP 1: everything recomputed without, and attention with sequence parallelism."""
    found = []
    for recompute, sequence, seconds in (("full", False, full), ("selective", True, selective)):

        def predict(recompute=recompute, sequence=sequence) -> float:
            sizes = Sizes(shape("llama", layers, hidden, hidden * 8 // 3, heads, heads, 51200, hidden // heads))
            work = Workload(batch, 1, 1, 2047, 1, 2047, reference=False)
            side = TrainerSide(
                8,
                pipeline,
                1,
                chunks,
                sequence=sequence,
                recompute=recompute,
                reference="none",
                micro_batch_tokens=2048 * micro_batch,
            )
            return step_time.update_time(sizes, work, side, Cluster(GPUS["a100"], 8)).total

        found.append(Published(f"Megatron {name}, {8 * pipeline} A100, recompute={recompute}", seconds, predict))
    return found


def _gpt_oss() -> float:
    """Windows of attention in every other layer are left out: 4,096 tokens make little of them."""
    sizes = Sizes(shape("mixtral", 36, 2880, 2880, 64, 8, 201088, 64, experts=(128, 4, 2880)))
    side = TrainerSide(1, 4, 16, expert=8, distributed_optimizer=True, reference="none", micro_batch_tokens=4096)
    work = Workload(1280, 1, 1, 4095, 1, 4095, reference=False)
    return step_time.update_time(sizes, work, side, Cluster(GPUS["h100"], 8)).total


def _nemo(name, sizes, gpus, mean, trainer, vllm_tensor, seconds, prompts=64, longest=4096, minibatches=4) -> Published:
    """32 responses a prompt. `longest` has the prompt, of at most 200 tokens, in it."""

    work = Workload(prompts, 32, _NEMO_PROMPT, mean - _NEMO_PROMPT, 200, longest - 200, minibatches)
    cluster = Cluster(GPUS["h100"], 8)

    def predict() -> float:
        planner = Planner(sizes(), work, cluster)
        rollout = RolloutSide(vllm_tensor, gpus // vllm_tensor, shared=True)
        server = planner.server(rollout, _NEMO_FRACTION)
        total = sum(phase.total for phase in planner.phases(trainer, rollout, server).values())
        if minibatches == 1:
            # It computes old log-probs whatever the number of optimizer steps.
            setting = planner.sizes, work, trainer, cluster
            total += step_time.forward_time(*setting, step_time.head_time(*setting, False)).total
        return total

    return Published(
        f"NeMo-RL {name}, {gpus} H100", seconds, predict, lambda: Planner(sizes(), work, cluster).best(gpus)
    )


PUBLISHED = [
    *_training("22B", 48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10),
    *_training("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    *_training("530B", 105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
    *_training("1T", 128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
    # 5,810 tokens/s/GPU, 1,280 rows of 4,096 tokens.
    Published("Megatron-Bridge GPT-OSS 120B, 64 H100", 1280 * 4096 / 64 / 5810, _gpt_oss),
    _nemo(
        "Llama-3.1-8B",
        lambda: Sizes(shape("llama", 32, 4096, 14336, 32, 8, 128256)),
        16,
        1019,
        TrainerSide(1, 2, 8, distributed_optimizer=True, recompute="full", micro_batch_tokens=4096),
        1,
        92.8,
    ),
    _nemo(
        "Qwen3-32B",
        lambda: Sizes(shape("qwen3", 64, 5120, 25600, 64, 8, 151936)),
        32,
        3251,
        TrainerSide(4, 4, 2, sequence=True, distributed_optimizer=True, micro_batch_tokens=4096),
        4,
        376,
    ),
    _nemo(
        "Qwen3-30B-A3B",
        lambda: sizes_of("Qwen3-30B-A3B"),
        32,
        3196,
        TrainerSide(1, 1, 32, expert=8, distributed_optimizer=True, micro_batch_tokens=4096),
        2,
        198,
    ),
    # Two of its layers less on the first and last stage, which have embedding and head: here all are as long.
    _nemo(
        "Qwen3-235B-A22B",
        lambda: sizes_of("Qwen3-235B-A22B"),
        128,
        5698,
        TrainerSide(
            2,
            8,
            4,
            expert=16,
            sequence=True,
            context=2,
            distributed_optimizer=True,
            recompute="full",
            micro_batch_tokens=4096,
        ),
        16,
        395,
        prompts=16,
        longest=8192,
        minibatches=1,
    ),
]


def print_comparison(console: Console) -> None:
    table = Table(title="Step times", title_justify="left")
    table.add_column("what")
    for name in ("published s", "predicted s", "error"):
        table.add_column(name, justify="right")
    for row in PUBLISHED:
        table.add_row(row.name, f"{row.seconds:.2f}", f"{row.predict():.2f}", f"{row.error:+.0%}")
    console.print(table)
    mean = sum(abs(row.error) for row in PUBLISHED) / len(PUBLISHED)
    console.print(f"mean absolute error {mean:.0%}; the same efficiencies for every row (planning/hardware.py)\n")
    table = Table(
        title="The same work as it would be laid out here, sampling and training in turn", title_justify="left"
    )
    table.add_column("what")
    for name in ("published s", "here s", "times"):
        table.add_column(name, justify="right")
    table.add_column("layout")
    for row in PUBLISHED:
        if row.plan:
            plan = row.plan()
            times = row.seconds / plan.step_s
            table.add_row(
                row.name,
                f"{row.seconds:.0f}",
                f"{plan.step_s:.0f}",
                f"{times:.2f}",
                f"{plan.trainer}; vLLM {plan.rollout}",
            )
    console.print(table)
