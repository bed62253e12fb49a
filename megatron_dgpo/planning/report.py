"""Plans as tables for a terminal, as JSON and as settings."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dgpo import sbatch
from megatron_dgpo.config import Config
from megatron_dgpo.planning.hardware import Cluster
from megatron_dgpo.planning.in_flight import recommended
from megatron_dgpo.planning.memory import GIB, CheckpointMemory, checkpoint_memory
from megatron_dgpo.planning.plan import Plan, settings_of
from megatron_dgpo.planning.sides import Workload
from megatron_dgpo.planning.sizes import Sizes

# Stages of a long pipeline that differ: the ends, and one of those between.
_MOST_STAGES = 4


def print_job(console: Console, sizes: Sizes, work: Workload, cluster: Cluster, gpus: int) -> None:
    console.print(
        f"{sizes.parameters / 1e9:.1f} B parameters on {gpus} × {cluster.gpu.name}, {cluster.gpus_per_node} a machine: "
        f"{work.prompts} prompts × {work.group} responses a step, prompts of {work.prompt_tokens} tokens (at most "
        f"{work.max_prompt_tokens}), responses of {work.response_tokens} (at most {work.max_response_tokens})"
    )


def print_layouts(console: Console, plans: list[Plan], work: Workload, cluster: Cluster, most: int) -> None:
    """The fastest layouts, and why others fail."""
    running = sorted((plan for plan in plans if plan.problem is None), key=lambda plan: plan.step_s)
    table = _table(f"{len(running)} of {len(plans)} layouts run; the fastest")
    for name in ("trainer", "vLLM servers"):
        table.add_column(name)
    for name in ("step s", "tokens/s/GPU", "trainer GiB", "at once"):
        table.add_column(name, justify="right")
    for plan in running[:most]:
        table.add_row(
            str(plan.trainer),
            str(plan.rollout),
            f"{plan.step_s:.1f}",
            f"{plan.tokens_per_gpu_s(work):.0f}",
            f"{(cluster.gpu.memory_bytes - plan.trainer_headroom(cluster)) / GIB:.1f}",
            str(plan.server.concurrent),
        )
    if running:
        console.print(table)
    else:
        console.print(f"none of {len(plans)} layouts runs\n")
    for title, failures in _failures(plans):
        if failures:
            console.print(title)
            for plan in failures[:most]:
                line = f"{plan.trainer} on {plan.trainer.world_size} GPUs: {plan.problem}"
                console.print(textwrap.fill(line, console.width - 2, initial_indent="  ", subsequent_indent="    "))
            console.print()


def print_in_flight(console: Console, plan: Plan, work: Workload) -> None:
    """What sampling ahead makes of a step, staleness by staleness."""
    table = _table("servers that sample ahead (rollout.max_staleness), simulated")
    for name in ("staleness", "step s", "tokens/s/GPU", "ranks wait", "servers decode"):
        table.add_column(name, justify="right")
    for one in plan.in_flight:
        rate = plan.tokens_per_gpu_s(work, one.step_s)
        cells = f"{one.step_s:.1f}", f"{rate:.0f}", f"{one.ranks_wait:.0%}", f"{one.servers_busy:.0%}"
        table.add_row(str(one.staleness), *cells)
    console.print(table)
    best = recommended(plan.in_flight)
    if plan.staleness is not None:
        console.print(
            f"With the config's rollout.max_staleness={plan.staleness}: {plan.ahead.step_s:.1f} s a step, "
            f"{plan.tokens_per_gpu_s(work, plan.ahead.step_s):.0f} tokens/s/GPU."
        )
    console.print(f"Recommended: rollout.max_staleness={best.staleness}; more gains less than 3 %.\n")


def print_plan(console: Console, plan: Plan, sizes: Sizes, work: Workload, cluster: Cluster) -> None:
    """Memory item by item and time phase by phase."""
    console.print(
        f"Plan: {plan.trainer} on {plan.trainer.world_size} GPUs; vLLM {plan.rollout} on {plan.rollout.num_workers}"
    )
    last = len(plan.stages) - 1
    stages = range(last + 1) if last < _MOST_STAGES else (0, 1, last)
    table = _table(f"GiB of one GPU ({cluster.gpu.memory_bytes / GIB:.1f} available)")
    table.add_column("item")
    for stage in stages:
        table.add_column(f"stage {stage}", justify="right")
    table.add_column("vLLM worker", justify="right")
    names = list(dict.fromkeys(name for stage in (*stages, last) for name in plan.stages[stage]))
    names += [name for name in plan.server.memory if name not in names]
    for name in names:
        own = [plan.stages[stage].get(name) for stage in stages]
        table.add_row(name, *map(_gib, own), _gib(plan.server.memory.get(name)))
    table.add_section()
    totals = [sum(plan.stages[stage].values()) for stage in stages]
    table.add_row("total", *map(_gib, totals), _gib(sum(plan.server.memory.values())))
    if plan.rollout.shared:
        for name in plan.peaks(0):
            table.add_row(name, *(_gib(plan.peaks(stage)[name]) for stage in stages), "")
    console.print(table)
    console.print(_checkpoint_line(checkpoint_memory(sizes, work, plan.trainer)) + "\n")
    if plan.problem:
        console.print(f"Does not run: {plan.problem}")
        return
    one_by_one = ", one phase after the other" if plan.in_flight else ""
    table = _table(f"{plan.step_s:.1f} s a step, {plan.tokens_per_gpu_s(work):.0f} tokens/s/GPU{one_by_one}")
    table.add_column("phase")
    for name in ("compute", "memory", "network", "bubble", "seconds", "share"):
        table.add_column(name, justify="right")
    table.add_column("bound")
    for name, seconds in plan.phases.items():
        parts = (seconds.compute, seconds.memory, seconds.network, seconds.bubble, seconds.total)
        table.add_row(name, *(f"{part:.1f}" for part in parts), f"{seconds.total / plan.step_s:.0%}", seconds.bound)
    console.print(table)
    console.print(
        f"A server decodes {plan.server.concurrent} sequences at once (servers.gpu_memory_fraction="
        f"{plan.server.fraction:.2f})."
    )


def _checkpoint_line(needs: CheckpointMemory) -> str:
    return (
        f"For checkpoints a rank needs, beside all that, {_gib(needs.saving_first)} GiB of host memory to save in the "
        f"first replica and {_gib(needs.saving_others)} in others, and no GPU memory; "
        f"to load {_gib(needs.loading)} GiB of host memory, and {_gib(needs.loading_device)} of its GPU's."
    )


def as_json(plans: list[Plan], chosen: Plan | None, sizes: Sizes, work: Workload, cluster: Cluster) -> dict:
    """Everything, in bytes and seconds."""
    return {
        "parameters": sizes.parameters,
        "cluster": asdict(cluster),
        "workload": asdict(work),
        "chosen": None
        if chosen is None
        else _plan_json(chosen, work)
        | {
            "settings": settings_of(chosen, work, cluster.gpus_per_node),
            "checkpoint": asdict(checkpoint_memory(sizes, work, chosen.trainer)),
        },
        "plans": [_plan_json(plan, work) for plan in plans],
    }


def write_settings(folder: Path, plan: Plan, work: Workload, cluster: Cluster, config: Path) -> list[Path]:
    """settings.yaml, sections for a config; overrides.txt, the same for the command line; job.sbatch, which trains from
    `config` with them on as many machines. Returns what was written."""
    settings = settings_of(plan, work, cluster.gpus_per_node)
    overrides = [f"{s}.{name}={_word(value)}" for s, values in settings.items() for name, value in values.items()]
    files = {
        "settings.yaml": f"# {plan.trainer}; vLLM {plan.rollout}\n" + yaml.safe_dump(settings, sort_keys=False),
        "overrides.txt": "\n".join(overrides) + "\n",
        "job.sbatch": _job(plan, settings, overrides, cluster, config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def _job(plan: Plan, settings: dict, overrides: list[str], cluster: Cluster, file: Path) -> str:
    sides = plan.trainer.world_size, plan.rollout.num_workers
    trainer, rollout = (max(1, gpus // cluster.gpus_per_node) for gpus in sides)
    if plan.rollout.shared or plan.gpus <= cluster.gpus_per_node:
        # The trainer's nodes' own.
        rollout = 0
    size = sbatch.Size(trainer, rollout, min(plan.gpus, cluster.gpus_per_node))
    # Paths are the config's own; the sizes alone are looked at.
    paths = {"model": settings["model"] | {"path": "model"}, "data": {"train": "data"}}
    return sbatch.write(Config.model_validate(settings | paths), file, overrides, size, None, [])


def _word(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plan_json(plan: Plan, work: Workload) -> dict:
    found = {"trainer": asdict(plan.trainer), "problem": plan.problem}
    if plan.stages:
        found["stages"] = [{name: round(size) for name, size in items.items()} for items in plan.stages]
    if plan.rollout:
        found["rollout"] = asdict(plan.rollout)
        found["vllm"] = {name: round(size) for name, size in plan.server.memory.items()} if plan.server else None
    if plan.problem is None:
        found |= {
            "step_s": plan.step_s,
            "tokens_per_gpu_s": plan.tokens_per_gpu_s(work),
            "concurrent": plan.server.concurrent,
            "gpu_memory_fraction": plan.server.fraction,
            "phases": {n: asdict(s) | {"total": s.total, "bound": s.bound} for n, s in plan.phases.items()},
        }
    return found


def _failures(plans: list[Plan]) -> list[tuple[str, list[Plan]]]:
    """(title, plans): of shapes that run, the plainest layout that does not; of others, the one that comes closest.

    A shape is the sizes of the parallel groups. What fails for memory comes first: it says more than what divides
    nothing.
    """
    shapes: dict[tuple, list[Plan]] = {}
    for plan in plans:
        trainer = plan.trainer
        shape = trainer.world_size, trainer.tensor, trainer.pipeline, trainer.context, trainer.expert
        shapes.setdefault(shape, []).append(plan)
    plainest, closest = [], []
    for members in shapes.values():
        failing = [plan for plan in members if plan.problem]
        running = [plan.step_s for plan in members if not plan.problem]
        if running and failing and failing[0].stages:
            plainest.append((min(running), failing[0]))
        elif not running:
            closest.append(min(failing, key=_needs))
    plainest.sort(key=lambda item: item[0])
    return [
        ("Plain layouts of the fastest shapes that fail, and what makes them fit:", [plan for _, plan in plainest]),
        (
            f"Shapes of which no layout runs, {len(closest)} in all, and why the closest fails:",
            sorted(closest, key=_needs),
        ),
    ]


def _needs(plan: Plan) -> float:
    return max((sum(items.values()) for items in plan.stages), default=float("inf"))


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.1f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
