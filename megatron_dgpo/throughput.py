"""What a step's time was good for: tokens/s of a GPU, the model's FLOP/s, and their share of what the GPU can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dgpo.config import Config
from megatron_dgpo.layout import ServerLayout
from megatron_dgpo.planning.hardware import known_gpu
from megatron_dgpo.rollout import server

FORWARDS_OF_UPDATE = 3
"""What an optimizer step needs, in forward passes: one, and twice as much backward. What is computed again to save
memory is not counted (PaLM, arXiv 2204.02311, appendix B)."""

# Phases in which the ranks compute what `policy/model_tflop` counts.
_TRAINING = ("time/reference_s", "time/policy_s")


@dataclass(frozen=True)
class Throughput:
    ranks: int
    gpus: int = 0
    """Of ranks and servers, those that they share counted once; 0: all is on the CPU."""
    peak_flops: float | None = None
    """Of a rank's GPU, in dense bfloat16, if it is one of planning/hardware.py."""

    @classmethod
    def of_run(cls, config: Config, command: str) -> Throughput:
        ranks = dist.get_world_size()
        if not torch.cuda.is_available():
            return cls(ranks)
        unserved = command == "sft" or config.rollout.replay or config.servers.sleep
        count = 0 if unserved else len(server.addresses(config))
        workers = ServerLayout.from_config(config.servers, count).num_workers
        gpu = known_gpu(torch.cuda.get_device_name())
        return cls(ranks, ranks + workers, gpu.flops if gpu else None)

    def rates(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of a step, from its metrics and its phases' seconds; empty where it trained on nothing.

        >>> step = {"rollout/tokens": 8e4, "policy/model_tflop": 9e3, "time/policy_s": 6, "time/step_s": 20}
        >>> Throughput(ranks=3, gpus=4, peak_flops=1e15).rates(step) == {
        ...     "time/tokens_per_s": 4e3, "time/tokens_per_s_per_gpu": 1e3,
        ...     "time/tflops_per_rank": 500.0, "time/mfu": 0.5, "time/mfu_of_step": 0.15}
        True
        """
        found, step_s = {}, metrics["time/step_s"]
        if "rollout/tokens" in metrics:
            found["time/tokens_per_s"] = metrics["rollout/tokens"] / step_s
            if self.gpus:
                found["time/tokens_per_s_per_gpu"] = found["time/tokens_per_s"] / self.gpus
        training_s = sum(metrics.get(name, 0.0) for name in _TRAINING)
        if training_s and "policy/model_tflop" in metrics:
            tflop = metrics["policy/model_tflop"] / self.ranks
            found["time/tflops_per_rank"] = tflop / training_s
            if self.peak_flops:
                peak = self.peak_flops / 1e12
                found |= {"time/mfu": tflop / training_s / peak, "time/mfu_of_step": tflop / step_s / peak}
        return found
