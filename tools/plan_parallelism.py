"""Plan a run before GPU hours are spent: which layouts fit, how long a step takes, which one to choose.

    python tools/plan_parallelism.py Qwen2.5-32B --gpus 32 --gpu h100 --prompts 128 --group 16 \\
        --response-tokens 3000 --max-response-tokens 8192 --write plan
    megatron-dgpo train config.yaml $(cat plan/overrides.txt)                        # or: sbatch plan/job.sbatch
    python tools/plan_parallelism.py Qwen2.5-32B --gpus 32 --config config.yaml      # this config's own layout
    python tools/plan_parallelism.py --validate                                      # against published figures

The model is a Hugging Face config.json or its directory; weights are not needed. Memory and time are formulas
(megatron_dgpo/planning/memory.py, step_time.py) with their sources beside them. A GPU may be a file of the fields of
megatron_dgpo/planning/hardware.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.config_file import load_config  # noqa: E402
from megatron_dgpo.errors import UsageError  # noqa: E402
from megatron_dgpo.planning import report  # noqa: E402
from megatron_dgpo.planning.hardware import Cluster, read_gpu  # noqa: E402
from megatron_dgpo.planning.plan import Plan, Planner, choose, sides_of, workload_of  # noqa: E402
from megatron_dgpo.planning.sides import Workload, refusal, rollout_refusal  # noqa: E402
from megatron_dgpo.planning.sizes import Sizes  # noqa: E402
from megatron_dgpo.weights.architectures import Architecture, read_architecture  # noqa: E402
from tools.scaling import published  # noqa: E402

# Wide enough for the longest layout; the same in a file as in a terminal.
_WIDTH = 120


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(width=_WIDTH, highlight=False, soft_wrap=False)
    try:
        if options.validate:
            published.print_comparison(console)
            return 0
        return _plan(options, console)
    except (UsageError, OSError) as error:
        print(f"plan_parallelism: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="Hugging Face config.json or its directory")
    parser.add_argument("--gpus", type=_positive, help="all of them, trainer and vLLM together")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200, b200 or a file; default: h100")
    parser.add_argument("--gpus-per-node", type=_positive, default=8)
    parser.add_argument("--config", type=Path, help="plan this config's layout; its sizes and lengths are used")
    parser.add_argument("--prompts", type=_positive, default=128, help="prompts a step; default: 128")
    parser.add_argument("--group", type=_positive, default=16, help="responses a prompt; default: 16")
    parser.add_argument("--prompt-tokens", type=_positive, default=200, help="mean; default: 200")
    parser.add_argument("--response-tokens", type=_positive, default=2000, help="mean; default: 2000")
    parser.add_argument("--max-prompt-tokens", type=_positive, default=1024)
    parser.add_argument("--max-response-tokens", type=_positive, default=8192)
    parser.add_argument("--minibatches", type=_positive, default=1, help="optimizer steps a step")
    parser.add_argument("--method", choices=("dgpo", "grpo"), default="dgpo", help="grpo has no reference")
    parser.add_argument("--placement", choices=("any", "shared", "separate"), default="any")
    parser.add_argument(
        "--max-staleness", type=_positive, help="also plan servers that sample up to so many steps ahead; 4 is usual"
    )
    parser.add_argument("--rows", type=_positive, default=8, help="layouts listed; default: 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every layout")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write settings, overrides and an sbatch file")
    parser.add_argument("--validate", action="store_true", help="compare with published step times")
    options = parser.parse_args(arguments)
    if not options.validate and (options.model is None or options.gpus is None):
        parser.error("give a model and --gpus, or --validate")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of 1 or more")
    return int(text)


def _plan(options: argparse.Namespace, console: Console) -> int:
    folder = options.model.parent if options.model.is_file() else options.model
    if options.model.is_file() and options.model.name != "config.json":
        raise UsageError(f"{options.model}: expected a file named config.json, or its directory")
    architecture = read_architecture(folder)
    sizes, cluster = Sizes(architecture), Cluster(read_gpu(options.gpu), options.gpus_per_node)
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise UsageError(
            f"--gpus={options.gpus} are not whole machines of --gpus-per-node={options.gpus_per_node}: change either"
        )
    work = _workload(options, architecture)
    planner = Planner(sizes, work, cluster)
    report.print_job(console, sizes, work, cluster, options.gpus)
    if options.config:
        plans = [_configured(options, planner, folder)]
        chosen = plans[0]
    else:
        placements = ("shared", "separate") if options.placement == "any" else (options.placement,)
        plans = planner.search(options.gpus, placements)
        report.print_layouts(console, plans, work, cluster, options.rows)
        chosen = choose(plans, cluster)
        if options.max_staleness and (ahead := planner.best_ahead(plans, options.max_staleness)):
            chosen = ahead if ahead.ahead.step_s < chosen.step_s else chosen
    if chosen:
        report.print_plan(console, chosen, sizes, work, cluster)
        if chosen.in_flight:
            report.print_in_flight(console, chosen, work)
    if options.json:
        runs = chosen if chosen and chosen.problem is None else None
        options.json.write_text(json.dumps(report.as_json(plans, runs, sizes, work, cluster)) + "\n")
    if chosen is None or chosen.problem:
        advice = "" if options.config else ": use more GPUs, shorter responses or fewer prompts a step"
        print(f"plan_parallelism: no layout runs{advice}", file=sys.stderr)
        return 1
    if options.write:
        config = options.config or Path("config.yaml")
        for path in report.write_settings(options.write, chosen, work, cluster, config):
            console.print(f"wrote {path}")
    return 0


def _workload(options: argparse.Namespace, architecture: Architecture) -> Workload:
    if options.config:
        work = workload_of(load_config(options.config), options.prompt_tokens, options.response_tokens)
    else:
        work = Workload(
            options.prompts,
            options.group,
            options.prompt_tokens,
            options.response_tokens,
            options.max_prompt_tokens,
            options.max_response_tokens,
            options.minibatches,
            options.method == "dgpo",
        )
    for name, mean, most in (
        ("prompt", work.prompt_tokens, work.max_prompt_tokens),
        ("response", work.response_tokens, work.max_response_tokens),
    ):
        if mean > most:
            raise UsageError(f"--{name}-tokens={mean} is the mean: it cannot exceed the longest {name}, {most}")
    if work.context > architecture.max_positions:
        raise UsageError(
            f"prompts and responses of up to {work.context} tokens are more than max_position_embeddings="
            f"{architecture.max_positions} of the model; lower --max-response-tokens or --max-prompt-tokens"
        )
    return work


def _configured(options: argparse.Namespace, planner: Planner, folder: Path) -> Plan:
    config = load_config(options.config)
    trainer, rollout = sides_of(config, options.gpus, options.gpus_per_node)
    architecture = planner.sizes.architecture
    reason = refusal(architecture, trainer, planner.work, options.gpus_per_node, str(folder))
    reason = reason or rollout_refusal(architecture, rollout, options.gpus_per_node)
    if reason:
        raise UsageError(f"{options.config}: {reason}")
    plan = planner.evaluate(trainer, rollout, config.servers.gpu_memory_fraction, config.servers.max_concurrent)
    most = max(options.max_staleness or 0, config.rollout.max_staleness)
    if most and plan.problem is None and not rollout.shared:
        plan = planner.sampling_ahead(plan, most, config.rollout.max_staleness)
    return plan


if __name__ == "__main__":
    sys.exit(main())
