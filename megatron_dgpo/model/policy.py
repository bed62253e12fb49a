"""The policy: Megatron's data-parallel wrapper, pipeline schedule and optimizer around the model chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dgpo.config import Config
from megatron_dgpo.config import Optimizer as OptimizerSettings
from megatron_dgpo.micro_batch import MicroBatch
from megatron_dgpo.model import device
from megatron_dgpo.model.collectives import broadcast_from_last_stage
from megatron_dgpo.model.gpt import HiddenStatesModel, build_chunks, fuse_weight_gradients
from megatron_dgpo.model.layer_specs import PackedAttention
from megatron_dgpo.model.packed import packed_seq_params
from megatron_dgpo.model.parallel import copies_group, is_last_stage, tensor_place, trainer_layout
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.load import load_weights

# (micro-batch, packed hidden states [N, H], head weight [V_padded / tp, H]) ->
#   (loss sum, integer normaliser, metrics that add up over micro-batches, replicas and context, or largest_ values)
LossFunction = Callable[
    [MicroBatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
]

LARGEST = "largest_"
"""Metrics of this prefix are merged by their maximum; all others are sums."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank but for `busy_s`.

    `metrics` are sums over the step's micro-batches and replicas, or maxima where their names start with `largest_`;
    `metrics["loss"]` is the sum of the losses.
    """

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool
    """The loss or the gradient was not finite; the weights are as before."""
    busy_s: float = field(default=0.0, compare=False)
    """From the first micro-batch until the gradients are to be reduced over the replicas: what this one needs for its
    own share, before it waits for others. Its ranks wait for each other meanwhile, and for their experts' ranks."""


class Policy:
    """The model that is trained. All methods are collective over all ranks."""

    def __init__(self, config: Config, architecture: Architecture, optimizer_steps: int) -> None:
        """optimizer_steps: length of the learning-rate schedule. Weights are to be loaded."""
        self.architecture = architecture
        self.layout = trainer_layout(config.parallel)
        self.modules: list[HiddenStatesModel] = build_chunks(config, architecture)
        if config.model.fusions:
            for module in self.modules:
                fuse_weight_gradients(module)
        megatron = self.modules[0].config
        ddp = _ddp_config(config)
        self.chunks = [
            DistributedDataParallel(megatron, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(self.modules)
        ]
        for chunk in self.chunks:
            chunk.train()
            for group in _bucket_groups(chunk):
                # Every rank loads its parameters whole: there is nothing to gather before the first step.
                group.param_gather_dispatched = True
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.chunks)
        self.scheduler = _scheduler(self.optimizer, config.optimizer, optimizer_steps)
        megatron.finalize_model_grads_func = self._reduce
        if ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._gathers_beside_forward = ddp.overlap_param_gather
        self._together = forward_together(config)
        megatron.grad_scale_func = self.optimizer.scale_loss

    def load(self, model_dir: Path) -> None:
        """The weights of a model directory, of either format. Collectives: none."""
        load_weights(self.modules, self.architecture, model_dir, *tensor_place())
        self.reload_master_weights()

    def reload_master_weights(self) -> None:
        """Make the optimizer's float32 copies follow the parameters; after weights were loaded from outside."""
        self.optimizer.reload_model_params()

    @torch.no_grad()
    def forward(self, batches: list[MicroBatch], function: Callable) -> list:
        """`function(micro-batch, hidden states [N, H], head weight)` of every micro-batch, on the last stage.

        Elsewhere an empty list. Keep results small: all stay alive until the last micro-batch is done.
        """
        return run_schedule(self.chunks, batches, function, together=self._together)

    def step(self, batches: list[MicroBatch], loss_function: LossFunction, more: bool = False) -> StepResult:
        """One optimizer step on Σ loss / Σ normaliser over micro-batches, data- and context-parallel ranks.

        more: the next call is another step. With `overlap_param_gather` the weights are then still being gathered when
        this one returns: nothing but that step may look at them.

        Collectives: those of Megatron's schedule and gradient reduction, one all-reduce of the metrics over replicas
        and context and one broadcast of them over the pipeline, one norm of the gradients, and the optimizer's gather
        of weights.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        collected: list[dict[str, torch.Tensor]] = []

        def compute_loss(batch, hidden_states, head_weight):
            loss, normaliser, metrics = loss_function(batch, hidden_states, head_weight)
            # Whether to skip is decided by the loss itself, whatever the function reports of it.
            collected.append({**metrics, "loss": loss.detach()})
            return loss, normaliser

        start = device.mark()
        run_schedule(self.chunks, batches, compute_loss, backward=True)
        metrics = broadcast_from_last_stage(_over_replicas(collected) if is_last_stage() else {})
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = not (math.isfinite(grad_norm) and math.isfinite(metrics["loss"]))
        if not skipped:
            # Before the update: at step 1 of a warm-up the rate is lr / warmup_steps, not 0.
            self.scheduler.step(increment=1)
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        if self._gathers_beside_forward:
            self._gather_weights(wait=not more)
        busy_s = device.seconds_between(start, self._computed)
        return StepResult(metrics, grad_norm, self.optimizer.param_groups[0]["lr"], skipped, busy_s)

    def _reduce(self, *args, **kwargs) -> None:
        """What Megatron's schedule calls behind the last micro-batch."""
        self._computed = device.mark()
        finalize_model_grads(*args, **kwargs)

    def _clip(self, grad_norm: float) -> None:
        """As the optimizer's own `step`, which would go through all gradients for their norm once more."""
        largest = self.optimizer.config.clip_grad
        for optimizer in self.optimizer.chained_optimizers if largest > 0 else ():
            parameters = optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, largest, grad_norm)

    def _gather_weights(self, wait: bool) -> None:
        """Start the gathers of all buckets, in the order of the forward pass, whose modules wait for their own.

        Megatron would start each one when a module of the bucket before it is called. Which experts are called depends
        on the data: ranks could differ in the order of their collectives.
        """
        groups = [group for chunk in self.chunks for group in reversed(_bucket_groups(chunk))]
        for group in groups:
            _wait_for_weights(group)
            group.start_param_sync()
        for group in groups if wait else ():
            _wait_for_weights(group)


def _bucket_groups(chunk: DistributedDataParallel) -> list:
    """Of the parts of a chunk's buffers, the last layers' first."""
    return [*chunk.expert_parallel_bucket_groups, *chunk.bucket_groups]


def _wait_for_weights(group) -> None:
    """Until the parameters of the bucket group are there, if they are being gathered. Starts no collective."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _head_weight(chunk: torch.nn.Module) -> torch.nn.Parameter:
    """It is used without a call of its layer, which would wait for it."""
    weight = getattr(chunk, "module", chunk).head_weight
    group = getattr(chunk, "param_to_bucket_group", {}).get(weight)
    if group is not None:
        _wait_for_weights(group)
    return weight


def forward_together(config: Config) -> int:
    """Micro-batches that run through the model at once where no activations are kept. A pipeline is filled better by
    many small ones."""
    return config.batch.forward_micro_batches if config.parallel.pipeline == 1 else 1


def run_schedule(
    chunks: list[torch.nn.Module],
    batches: list[MicroBatch],
    function: Callable,
    backward: bool = False,
    together: int = 1,
) -> list:
    """Run all micro-batches through the pipeline; returns what `function` gave for each, on the last stage.

    With `backward`, function returns (loss sum, normaliser) and gradients are left in the chunks' buffers, divided by
    the normalisers' sum over micro-batches, data- and context-parallel ranks. In a pipeline all have the same T.
    together: how many run through the model as one, without `backward`; `function` sees them one by one.
    """
    results: list = []
    groups = [batches[first : first + together] for first in range(0, len(batches), together)]
    portable = any(isinstance(module, PackedAttention) for module in chunks[0].modules())

    def forward_step(iterator, chunk):
        group, params = next(iterator)
        tokens = torch.cat([batch.tokens for batch in group], 1)
        position_ids = torch.cat([batch.position_ids for batch in group], 1)
        hidden_states = chunk(tokens, position_ids, None, packed_seq_params=params)

        def compute(hidden_states):
            parts = zip(group, hidden_states.split([batch.tokens.shape[1] for batch in group]), strict=True)
            values = [function(batch, batch.predicting(states), _head_weight(chunk)) for batch, states in parts]
            if backward:
                [(loss, normaliser)] = values
                return loss, normaliser.to(torch.int), {}
            results.extend(values)
            return hidden_states.new_zeros(()), torch.ones((), dtype=torch.int, device=hidden_states.device), {}

        return hidden_states, compute

    # Every stage needs the boundaries, not only the first and the last.
    packed = [(group, packed_seq_params(group, portable)) for group in groups]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(packed) for _ in chunks] if len(chunks) > 1 else iter(packed),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(groups),
        # Megatron divides it by the context-parallel size.
        seq_length=batches[0].num_positions,
        micro_batch_size=1,
        forward_only=not backward,
    )
    return results


def _over_replicas(collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sums, and the maximum of each `largest_…`. Collectives: one all-reduce over replicas and context, or two."""
    names = sorted(collected[0])
    values = torch.stack([torch.stack([metrics[name].double() for name in names]) for metrics in collected])
    total, group = values.sum(0), copies_group()
    dist.all_reduce(total, group=group)
    largest = [place for place, name in enumerate(names) if name.startswith(LARGEST)]
    if largest:
        maxima = values[:, largest].amax(0)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        total[largest] = maxima
    return dict(zip(names, total.tolist(), strict=True))


def _ddp_config(config: Config) -> DistributedDataParallelConfig:
    parallel = config.parallel
    return DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # All gathers are started at once (`_gather_weights`); modules only wait.
        align_param_gather=parallel.overlap_param_gather,
    )


def _optimizer_config(config: Config) -> OptimizerConfig:
    settings = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=getattr(torch, config.model.dtype),
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def _scheduler(optimizer, settings: OptimizerSettings, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(steps, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A run that continues takes the settings that it is given now, and from its checkpoint the step alone.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
