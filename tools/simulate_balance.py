"""How long a step's training takes beside an even split of the useful work: padded rows, and `balance.share_out`.

    python tools/simulate_balance.py

A 32B model's 128 groups of 16 responses: log-normal lengths of mean 4,200, cut at 20,000, half of their log-variance a
group's own; prompts of 200 to 2,000 tokens; micro-batches of 32,768 tokens. A replica's time is the multiplications of
its sequences (`balance.sequence_cost`); the slowest replica is the step's. With a pipeline, 1F1B of four stages whose
micro-batches are padded to the longest of the optimizer step, beside the same schedule with even micro-batches.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_dgpo.balance import sequence_cost, share_out
from tools.scaling.models import ARCHITECTURES

PROMPTS, GROUP, LONGEST = 128, 16, 20_000
BUDGET = 32_768
STAGES = 4
REPLICAS = (1, 2, 4, 8, 16, 32, 64)
_SIGMA, _MEAN = 0.9, 4200
COST = sequence_cost(ARCHITECTURES["Qwen2.5-32B"])


def lengths(seed: int) -> list[range]:
    """Of a step's sequences; ranges, which have a length and nothing else."""
    draw, found = random.Random(seed), []
    for _ in range(PROMPTS):
        prompt = int(math.exp(draw.uniform(math.log(200), math.log(2000))))
        group = draw.gauss(0, _SIGMA * math.sqrt(0.5))
        for _ in range(GROUP):
            log = math.log(_MEAN) - _SIGMA**2 / 2 + group + draw.gauss(0, _SIGMA * math.sqrt(0.5))
            found.append(range(prompt + max(16, min(LONGEST, int(math.exp(log))))))
    return found


def total(sequences: Sequence[range]) -> float:
    return sum(map(COST, sequences))


def padded(sequences: Sequence[range], replicas: int) -> float:
    """Rows of the longest's length, as many on each replica."""
    return len(sequences) / replicas * COST(max(sequences, key=len))


def balanced(sequences: Sequence[range], replicas: int) -> float:
    shares = share_out(sequences, COST, replicas, BUDGET)
    return max(sum(map(total, share)) for share in shares)


def pipelined(sequences: Sequence[range], replicas: int) -> tuple[float, float]:
    """(time of the slowest replica's schedule, what its bubble alone would make of an even split)."""
    shares = share_out(sequences, COST, replicas, BUDGET)
    longest = max(sum(map(len, part)) for share in shares for part in share)
    times = []
    for share in shares:
        fill = [range(longest - sum(map(len, part))) for part in share]
        times.append(one_f_one_b([total([*part, rest]) for part, rest in zip(share, fill, strict=True)]))
    count, even = len(shares[0]), total(sequences) / replicas
    return max(times), one_f_one_b([even / count] * count)


def one_f_one_b(costs: Sequence[float]) -> float:
    """Duration of 1F1B over STAGES stages that share each cost evenly, a third of it forward; messages take no time."""
    ends: dict[tuple[str, int, int], float] = {}
    programs = []
    for stage in range(STAGES):
        warm = min(STAGES - stage - 1, len(costs))
        steady = [(kind, i + (warm if kind == "f" else 0)) for i in range(len(costs) - warm) for kind in "fb"]
        last = [("b", i) for i in range(len(costs) - warm, len(costs))]
        programs.append([("f", i) for i in range(warm)] + steady + last)
    clock, place = [0.0] * STAGES, [0] * STAGES
    while any(at < len(program) for at, program in zip(place, programs, strict=True)):
        for stage, program in enumerate(programs):
            if place[stage] == len(program):
                continue
            kind, index = program[place[stage]]
            before = stage - 1 if kind == "f" else stage + 1
            if 0 <= before < STAGES and (kind, before, index) not in ends:
                continue
            ready = ends.get((kind, before, index), 0.0)
            clock[stage] = max(clock[stage], ready) + costs[index] / STAGES * (1 / 3 if kind == "f" else 2 / 3)
            ends[kind, stage, index] = clock[stage]
            place[stage] += 1
    return max(clock)


def ratios(replicas: int, minibatches: int, draws: int) -> dict[str, float]:
    """Means over draws and optimizer steps, as multiples of an even split; a pipeline's, of that with its bubble."""
    found: dict[str, list[float]] = {"padded": [], "balanced": [], "in a pipeline": []}
    for seed in range(draws):
        sequences = lengths(seed)
        size = len(sequences) // minibatches
        for first in range(0, len(sequences), size):
            part = sequences[first : first + size]
            even = total(part) / replicas
            slowest, schedule = pipelined(part, replicas)
            found["padded"].append(padded(part, replicas) / even)
            found["balanced"].append(balanced(part, replicas) / even)
            found["in a pipeline"].append(slowest / schedule)
    return {name: statistics.mean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    draws = parser.parse_args().draws
    table = Table("steps", "rows", *(f"DP {replicas}" for replicas in REPLICAS), title="times of an even split")
    for minibatches in (1, 4):
        columns = [ratios(replicas, minibatches, draws) for replicas in REPLICAS]
        for name in columns[0]:
            table.add_row(str(minibatches), name, *(f"{column[name]:.3f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
