"""Seconds of one training step, phase by phase. Every formula of time is here, with its source.

[K]  Korthikanti et al. 2022, arXiv 2205.05198: operations and traffic of a layer, recomputation.
[N]  Narayanan et al. 2021, arXiv 2104.04473: pipeline bubble, data-parallel traffic.
[P]  Pope et al. 2022, arXiv 2211.05102: decoding reads all weights and the cache once a token.
[D]  megatron_dgpo/statistics/vocab_parallel.py: the loss's products.

A phase is a sum of computing, reading memory and communicating, none hidden behind another, as this trainer runs them;
its bound is the largest of these. Rates are the data sheet's times what is reached of them (hardware.py). Grading,
batching and checkpoints are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dgpo.planning import memory
from megatron_dgpo.planning.hardware import Cluster
from megatron_dgpo.planning.sides import RolloutSide, TrainerSide, Workload, micro_batches
from megatron_dgpo.planning.sizes import Sizes

# Points at which the shrinking batch of a rollout is evaluated.
_POINTS = 64


@dataclass(frozen=True)
class Seconds:
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    bubble: float = 0.0
    """Waiting for other pipeline stages."""

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.compute + other.compute,
            self.memory + other.memory,
            self.network + other.network,
            self.bubble + other.bubble,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.compute * factor, self.memory * factor, self.network * factor, self.bubble * factor)

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.network + self.bubble

    @property
    def bound(self) -> str:
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network, "pipeline": self.bubble}
        return max(parts, key=parts.__getitem__)


def layer_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster, backward: bool) -> Seconds:
    """One decoder layer's forward or backward pass for one micro-batch on one rank ([K], appendix A and §4.2)."""
    t, h, e = trainer.tensor, sizes.h, work.element_bytes
    n = micro_batches(work, trainer).positions / trainer.context
    mine, gpu, reached = n / t, cluster.gpu, cluster.efficiencies
    # Multiplications and additions: 2 a weight and position, and 2 in each of attention's two products.
    attention = 2 * 2 * attention_pairs(work, trainer) * sizes.a * sizes.d / t
    products = 2 * n * sizes.attention_weights / t / (gpu.flops * reached.gemm)
    mlp_share = reached.grouped_gemm if sizes.experts else reached.gemm
    products += 2 * n * sizes.active_mlp_weights / t / (gpu.flops * mlp_share)
    # FlashAttention's backward pass has five products for two.
    attending = attention * (2.5 if backward else 1) / (gpu.flops * reached.attention)
    compute = products * (2 if backward else 1) + attending
    # Reads and writes of unfused kernels: two norms and two residual sums on h, rotation of queries and keys (8),
    # SwiGLU in three kernels (7); experts' tokens are permuted twice and weighted. Backward does twice as many.
    split = mine if trainer.sequence else n
    touched = 10 * split * h + 8 * n * (sizes.a + sizes.g) * sizes.d / t
    touched += (mine * sizes.top_k * (11 * sizes.f + 8 * h)) if sizes.experts else 7 * n * sizes.f / t
    reading = e * touched * (2 if backward else 1) / (gpu.memory_bandwidth * reached.memory)
    # Two all-reduces, or two pairs of all-gather and reduce-scatter; with sequence parallelism backward gathers the
    # inputs of both column-parallel layers again [K, §4.2.2]. A mixture has them around attention only.
    rings = (2 if not sizes.experts else 1) * 2 * (1 + (0.5 if backward and trainer.sequence else 0))
    network = rings * e * n * h * (t - 1) / t / cluster.bandwidth(t)
    if trainer.expert > 1:
        reach = trainer.expert
        away = (reach - 1) / reach
        network += 2 * e * mine * sizes.top_k * h * away / cluster.bandwidth(reach)
    # Keys and values of the other context-parallel ranks; in backward their gradients, too.
    keys = 2 * n * sizes.g * sizes.d / t * (trainer.context - 1)
    network += e * keys * (2 if backward else 1) / cluster.bandwidth(t * trainer.context)
    return Seconds(compute, reading, network)


def attention_pairs(work: Workload, trainer: TrainerSide) -> float:
    """Pairs of a position and one before it, in its sequence, that one rank answers for in a micro-batch. Padding at
    the end of a pack is a sequence, too."""
    batches = micro_batches(work, trainer)
    pairs = batches.sequences * work.mean_square_tokens + (batches.positions - batches.tokens) ** 2
    return pairs / 2 / trainer.context


def imbalance(sizes: Sizes, work: Workload, trainer: TrainerSide) -> float:
    """The slowest replica's time over their mean: a replica has at least the longest sequence of an optimizer step. In
    a pipeline the positions of a micro-batch say so already."""
    if trainer.pipeline > 1:
        return 1.0
    sequences = work.rows / work.minibatches
    weights, width = sizes.attention_weights + sizes.active_mlp_weights, sizes.a * sizes.d
    longest = work.longest_of(sequences)
    mean = sequences / trainer.data * (weights * work.mean_tokens + width * work.mean_square_tokens)
    return max(1.0, longest * (weights + width * longest) / mean)


def head_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster, backward: bool) -> Seconds:
    """The loss's logits of one micro-batch [D]: 2·h·V a token for the policy, and in an update 2·h·V for a reference
    and 6·h·V backward, where the policy's are made again; each product's float32 tile is written and read."""
    tokens = micro_batches(work, trainer).sequences * work.response_tokens / trainer.context
    models = 1 + (work.reference and backward)
    columns = sizes.vocab / trainer.tensor
    operations = tokens * sizes.h * columns * (2 * models + 6 * backward)
    touched = tokens * columns * (8 * models + 14 * backward)
    gpu, reached = cluster.gpu, cluster.efficiencies
    return Seconds(operations / (gpu.flops * reached.gemm), touched / (gpu.memory_bandwidth * reached.memory))


def pipeline_time(micro_batch: Seconds, last: Seconds, trainer: TrainerSide, count: int, message: float) -> Seconds:
    """`count` micro-batches through all stages: the last, with the head, is the slowest; it waits for the others' ramp,
    divided by the model chunks of a stage ([N], §2.2). message: seconds of one transfer."""
    busy = (micro_batch + last) * count
    p, v = trainer.pipeline, trainer.chunks
    ramp = (p - 1) / v * micro_batch.total
    transfers = message * v * (count + p - 1) if p > 1 else 0.0
    return busy + Seconds(network=transfers, bubble=ramp)


def _message(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> float:
    n = micro_batches(work, trainer).positions / trainer.context
    share = trainer.tensor if trainer.sequence else 1
    # The next stage is tensor × copies ranks away.
    away = trainer.stage_size >= cluster.gpus_per_node
    return work.element_bytes * n / share * sizes.h / cluster.bandwidth(cluster.gpus_per_node + 1 if away else 1)


def forward_time(
    sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster, head: Seconds | None = None
) -> Seconds:
    """All sequences of a step through the pipeline without gradients, one minibatch after the other."""
    layers = sizes.layers / trainer.pipeline
    stage = layer_time(sizes, work, trainer, cluster, False) * layers
    message, count = _message(sizes, work, trainer, cluster), micro_batches(work, trainer).count
    one = pipeline_time(stage, head or Seconds(), trainer, count, message)
    return one * (work.minibatches * imbalance(sizes, work, trainer))


def reference_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> Seconds:
    """Hidden states of all sequences; offloaded weights come over PCIe for every minibatch."""
    if not work.reference:
        return Seconds()
    loading = 0.0
    if trainer.reference == "host":
        weights = memory.static_memory(sizes, 0, trainer.layout, False, work.element_bytes).weights
        loading = work.minibatches * weights / cluster.efficiencies.pcie_bandwidth
    one = forward_time(sizes, work, trainer, cluster) + Seconds(memory=loading)
    if work.start:
        # Of the other frozen model log-probs are kept.
        head = head_time(sizes, work, trainer, cluster, False)
        one += forward_time(sizes, work, trainer, cluster, head) + Seconds(memory=loading)
    return one * work.reference_passes


def old_logprobs_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> Seconds:
    """The policy before its first update; by default with several minibatches: with one, the update's own forward pass
    serves."""
    asked = work.minibatches > 1 if work.policy_before is None else work.policy_before
    if not asked:
        return Seconds()
    head = head_time(sizes, work, trainer, cluster, False)
    return forward_time(sizes, work, trainer, cluster, head)


def update_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> Seconds:
    """Forward, backward, recomputation, gradient reduction and optimizer, of all minibatches."""
    forward = layer_time(sizes, work, trainer, cluster, False)
    layer = forward + layer_time(sizes, work, trainer, cluster, True)
    if trainer.recompute == "full":
        layer += forward
    elif trainer.recompute == "selective":
        # Attention's core once more.
        core = 2 * 2 * attention_pairs(work, trainer) * sizes.a * sizes.d / trainer.tensor
        layer += Seconds(core / (cluster.gpu.flops * cluster.efficiencies.attention))
    stage = layer * (sizes.layers / trainer.pipeline)
    head = head_time(sizes, work, trainer, cluster, True)
    message, count = 2 * _message(sizes, work, trainer, cluster), micro_batches(work, trainer).count
    one = pipeline_time(stage, head, trainer, count, message) * imbalance(sizes, work, trainer)
    return (one + optimizer_time(sizes, work, trainer, cluster)) * work.minibatches


def optimizer_time(sizes: Sizes, work: Workload, trainer: TrainerSide, cluster: Cluster) -> Seconds:
    """Reduction of float32 gradients over all copies of the weights, not overlapped (all-reduce, or reduce-scatter and
    all-gather of the weights), then Adam: gradients, master weights and moments read, all but the first written."""
    static = memory.static_memory(sizes, 0, trainer.layout, trainer.distributed_optimizer, work.element_bytes)
    ways = (trainer.copies - 1) / trainer.copies
    traffic = ways * (static.gradients + static.weights if trainer.distributed_optimizer else 2 * static.gradients)
    # Several tensor-parallel ranks of a machine each run their own ring: every one has its own network card.
    network = traffic / cluster.bandwidth(trainer.stage_size)
    touched = static.optimizer * 2 + static.gradients * 3
    reading = touched / (cluster.gpu.memory_bandwidth * cluster.efficiencies.memory)
    return Seconds(memory=reading, network=network)


def decode_time(sizes: Sizes, rollout: RolloutSide, cluster: Cluster, batch: float, context: float) -> Seconds:
    """One token of every sequence on one server [P]: reading weights and cache, or computing, whichever is longer."""
    t, gpu, reached = rollout.tensor, cluster.gpu, cluster.efficiencies
    weights = memory.vllm_weights(sizes, t)
    touched_share = 1.0
    if sizes.experts:
        # Experts that none of the batch's tokens is routed to are not read.
        touched = 1 - (1 - sizes.top_k / sizes.experts) ** max(batch, 1)
        experts = 2 * sizes.layers * sizes.experts * 3 * sizes.h * sizes.f / t
        touched_share = (weights - experts * (1 - touched)) / weights
    cache = batch * context * memory.vllm_kv_bytes(sizes, t)
    reading = (weights * touched_share + cache) / (gpu.memory_bandwidth * reached.decode_memory)
    # Logits and the sampler's passes over them: softmax, log-probs, draw.
    sampling = 8 * 4 * batch * sizes.vocab / t / (gpu.memory_bandwidth * reached.memory)
    active = sizes.layers * (sizes.attention_weights + sizes.active_mlp_weights) + sizes.vocab * sizes.h
    computing = 2 * batch * active / t / (gpu.flops * reached.gemm)
    network = 0.0
    if t > 1:
        volume = 2 * 2 * batch * sizes.h * (t - 1) / t / cluster.bandwidth(t)
        latency = reached.collective_s * (1 if t <= cluster.gpus_per_node else 4)
        network = 2 * sizes.layers * (latency + volume)
    gaps = sizes.layers * reached.kernel_gap_s + reached.decode_step_s
    if computing > reading:
        return Seconds(compute=computing, memory=sampling + gaps, network=network)
    return Seconds(memory=reading + sampling + gaps, network=network)


def rollout_time(
    sizes: Sizes, work: Workload, rollout: RolloutSide, cluster: Cluster, concurrent: int
) -> tuple[Seconds, Seconds]:
    """(prefill, decoding) of a step's responses, spread evenly over servers that decode `concurrent` sequences at once.

    While more wait, a server's batch is full; the last batch then shrinks to its longest response (the tail), by the
    distribution of lengths (sides.py). A group's prompt is computed once (prefix caching).
    """
    if concurrent < 1:
        raise ValueError("a server needs room for one sequence")
    sequences = work.rows / rollout.servers
    prompts = max(1.0, work.prompts / rollout.servers) * work.prompt_tokens
    active = sizes.layers * (sizes.attention_weights + sizes.active_mlp_weights)
    t = rollout.tensor
    prefill = Seconds(2 * prompts * active / t / (cluster.gpu.flops * cluster.efficiencies.gemm))
    if t > 1:
        prefill += Seconds(network=2 * sizes.layers * 2 * 2 * prompts * sizes.h * (t - 1) / t / cluster.bandwidth(t))
    mean, longest = work.response_tokens, work.max_response_tokens
    batch = min(sequences, concurrent)
    decoding = Seconds()
    if sequences > batch:
        steps = (sequences - batch) * mean / batch
        decoding += decode_time(sizes, rollout, cluster, batch, work.prompt_tokens + mean / 2) * steps
    for point in range(_POINTS):
        done = (point + 0.5) / _POINTS
        alive = 1 - done**work.exponent
        at = decode_time(sizes, rollout, cluster, max(1.0, batch * alive), work.prompt_tokens + done * longest)
        decoding += at * (longest / _POINTS)
    return prefill, decoding


def sync_time(sizes: Sizes, trainer: TrainerSide, rollout: RolloutSide, cluster: Cluster) -> Seconds:
    """New weights to all servers. separate (`shards`): every worker gets its own shard once, all ranks send; shared
    (`ipc`): tensors are gathered on every trainer rank and read there, bucket by bucket, of which rank 0 tells every
    server; a sleeping server's old ones go to the host and come back."""
    model, reached = 2 * sizes.parameters, cluster.efficiencies
    if rollout.shared:
        gathered = model / cluster.bandwidth(trainer.world_size)
        moved = 2 * memory.vllm_weights(sizes, rollout.tensor) / reached.pcie_bandwidth if rollout.sleep else 0.0
        copied = 2 * model / (cluster.gpu.memory_bandwidth * reached.memory)
        told = math.ceil(model / memory.BUCKET_BYTES) * rollout.servers * reached.request_s
        return Seconds(network=reached.sync_s + gathered + told, memory=moved + copied)
    received = memory.vllm_weights(sizes, rollout.tensor)
    sent = model * rollout.servers / trainer.world_size
    everything = trainer.world_size + rollout.num_workers
    return Seconds(network=reached.sync_s + max(received, sent) / cluster.bandwidth(everything))


def broadcast_sync_time(sizes: Sizes, trainer: TrainerSide, rollout: RolloutSide, cluster: Cluster) -> Seconds:
    """The same as others do it, separate: every tensor is gathered on trainer rank 0 and broadcast in full to every
    worker. A pipelined broadcast passes each byte over each link once."""
    model = 2 * sizes.parameters
    gathered = model / cluster.bandwidth(trainer.world_size)
    broadcast = model / cluster.bandwidth(trainer.world_size + rollout.num_workers)
    return Seconds(network=cluster.efficiencies.sync_s + gathered + broadcast)
