"""Bytes of one GPU, item by item. Every formula of memory is here, with its source.

[K]  Korthikanti et al. 2022, arXiv 2205.05198: activations, recomputation, pipeline stages (here with grouped queries,
     SwiGLU and Megatron-Core's unfused element-wise operations, as this trainer runs them).
[M]  Megatron-Core 0.16: param_and_grad_buffer.py (buffers), distrib_optimizer.py (shards), schedules.py (1F1B).
[V]  vLLM 0.32: gpu_worker.py (memory), vocab_parallel_embedding.py and linear.py (shards).

Letters: n positions of a micro-batch on one rank, h hidden size, a heads, g query groups, d head dimension, f
intermediate size, e bytes of an element, t tensor-parallel size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from megatron_dgpo.config import WeightUpdates
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.micro_batch import ROTARY_TABLE_STEP
from megatron_dgpo.planning.sides import TrainerSide, Workload, micro_batches
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.statistics.vocab_parallel import TILE_BYTES, TILE_ROWS
from megatron_dgpo.weights.resharding import vllm_parameters, vllm_shape
from megatron_dgpo.weights.slices import padded_vocab_size

Kernels = Literal["fused", "composite"]
"""fused: Transformer Engine's. composite: the portable layers on a CPU, whose norms keep two float32 tensors of their
input's size, whose rotation keeps a cosine and a sine of every position, and whose context-parallel attention keeps all
keys that a rank meets."""

GIB = 2**30
# Of what a device's total memory cannot be used for: the CUDA context with its kernels (0.5 GiB of the driver's, 0.5 of
# cuBLAS, cuDNN and NCCL's kernels) and NCCL's channel buffers (4 MiB a channel and peer over a handful of groups).
RUNTIME_BYTES = 2.0 * GIB
# Blocks that PyTorch's allocator holds but cannot hand out.
FRAGMENTATION = 0.04
# A vLLM worker: context and NCCL as above, CUDA graphs of its piecewise compiled model (vLLM logs 0.5-1.5 GiB).
GRAPH_BYTES = 1.0 * GIB
# vLLM's --max-num-batched-tokens on GPUs of 80 GB and more, for an API server.
PREFILL_TOKENS = 8192
# Both sides of a weight update hold two.
BUCKET_BYTES = WeightUpdates.model_fields["bucket_bytes"].default
# NCCL's own of the one communicator of all trainer ranks and workers: the buffers that its network connections share
# (NCCL issue 2363 shows 512 MiB for NCCL 2.28 on 8 GPUs a node).
COMMUNICATOR_BYTES = 0.5 * GIB


# Static memory of the trainer


@dataclass(frozen=True)
class Static:
    """Bytes of one rank of a pipeline stage, the largest over its data-parallel ranks."""

    weights: int
    gradients: int
    optimizer: int
    numel: int
    """Parameters, without padding."""


@functools.cache
def static_memory(sizes: Sizes, stage: int, layout: Layout, sharded: bool, e: int) -> Static:
    """Weights (e bytes), gradients (float32 buffers) and optimizer: a float32 master copy beside bfloat16 weights, and
    Adam's two moments.

    Sharded, buffers are padded and the optimizer has this rank's range of each bucket [M]; ranks of a stage differ by
    padding only, and the largest is given. PyTorch's Adam also counts steps, 4 bytes for each tensor.
    """
    weights = gradients = total = 0
    owned = [0] * layout.stage_size
    for chunk in range(layout.chunks):
        shards = _chunk_shards(sizes, stage, chunk, layout)
        for of_expert in (False, True):
            part = [(numel, shared) for numel, is_expert, shared in shards if is_expert == of_expert]
            # Ranks of a stage are numbered tensor-parallel fastest; an expert's replicas are `expert` ranks apart.
            apart = layout.expert if of_expert else layout.tensor
            numel = sum(n for n, _ in part)
            padded, shares = _buffer(part, layout.stage_size // apart) if sharded else (numel, None)
            weights += padded * e
            gradients += padded * 4
            owned = [own + (shares[rank // apart] if shares else numel) for rank, own in enumerate(owned)]
            total += numel
    return Static(weights, gradients, max(owned) * (12 if e == 2 else 8), total)


def _chunk_shards(sizes: Sizes, stage: int, chunk: int, layout: Layout) -> list[tuple[int, bool, bool]]:
    """(elements, of an expert, a copy shared by first and last stage) of a model chunk's parameters, in order."""
    first, last = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pipeline - 1, layout.chunks - 1)
    vocab = padded_vocab_size(sizes.vocab, layout.tensor) // layout.tensor * sizes.h
    shared = sizes.tied and layout.pipeline > 1
    found = [(vocab, False, shared)] if first else []
    layer = [(numel, of_expert, False) for numel, of_expert in sizes.layer_shards(layout.tensor, layout.expert)]
    found += layer * (sizes.layers // layout.total_chunks)
    if last:
        found.append((sizes.h, False, False))
        # A tied head on the embedding's own stage is the embedding.
        found += [(vocab, False, shared)] if shared or not sizes.tied else []
    return found


def _buffer(params: list[tuple[int, bool]], replicas: int) -> tuple[int, list[int]]:
    """(padded elements, those that each replica's optimizer holds) of a buffer of (elements, shared) [M].

    Parameters lie in reverse order, each at a multiple of 64; a shared embedding has a bucket of its own; buckets end
    at a multiple of 128 and of the replicas; each replica owns an equal range of every bucket.
    """
    buckets: list[list[int]] = [[]]
    for numel, shared in reversed(params):
        if shared and buckets[-1]:
            buckets.append([])
        buckets[-1].append(numel)
        if shared:
            buckets.append([])
    total, owned = 0, [0] * replicas
    for bucket in filter(None, buckets):
        spans: list[list[int]] = []
        end = 0
        for numel in bucket:
            start = -(-end // 64) * 64
            end = start + numel
            if spans and spans[-1][1] == start:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        size = -(-end // math.lcm(replicas, 128)) * math.lcm(replicas, 128)
        total, share = total + size, size // replicas
        for rank in range(replicas):
            owned[rank] += sum(
                max(0, min(stop, (rank + 1) * share) - max(start, rank * share)) for start, stop in spans
            )
    return total, owned


# Activations


def layer_activations(sizes: Sizes, n: float, trainer: TrainerSide, e: int, kernels: Kernels = "fused") -> float:
    """Bytes that one decoder layer keeps for its backward pass without full recomputation ([K], equations 1-4).

    Tensor parallelism divides heads and intermediate size, sequence parallelism the norms' tensors. Counted tensor by
    tensor as autograd keeps them (tests/planning/test_activations.py). Experts get equal shares of the tokens: routing
    that is uneven needs more.
    """
    t, h, d = trainer.tensor, sizes.h, sizes.d
    mine = n / t if trainer.sequence else n
    queries, keys = n * sizes.a / t * d, n * sizes.g / t * d
    total = 2 * _norm(mine * h, mine, e, kernels) + 2 * e * mine * h
    # Norms of heads that keep their input keep the projection, of which the keys are a view, and the queries where they
    # lie together.
    views = sizes.qk_norm and (kernels == "fused" or e == 4)
    # Queries and keys after rotation, and attention's output.
    kept, projected = 2 * queries + keys, queries + 2 * keys
    if kernels == "composite":
        # Cosines and sines, for queries and for keys.
        kept += 4 * n * d
    if kernels == "composite" and trainer.recompute != "selective":
        # The output in pieces, one a sequence.
        kept += queries
        if trainer.context > 1:
            # In place of the own keys, and of the projection's values, those of all positions before each chunk.
            kept += 2 * trainer.context * keys - (0 if views else projected)
    total += e * (kept + projected)
    if sizes.qk_norm:
        total += _norm(queries, n * sizes.a / t, e, kernels) + _norm(keys, n * sizes.g / t, e, kernels)
        total -= views * e * (keys + (queries if sizes.a == sizes.g or sizes.g == t else 0))
    if trainer.recompute != "selective":
        total += 4 * n * sizes.a / t  # the softmax's log-sum-exp: FlashAttention keeps no S × S matrix
    if not sizes.experts:
        # fc1's output 2f, silu 1f, the other factor plus its offset 1f, their product 1f.
        return total + 5 * e * n * sizes.f / t
    routed = mine * sizes.top_k
    # Router: its input and logits in float32, the input a copy unless it is that already. An expert's input, fc1 to
    # product as above, the product times its weight.
    return total + 4 * mine * (h * (e == 2) + 3 * sizes.experts) + e * routed * (h + 6 * sizes.f)


def chunk_activations(
    sizes: Sizes, layers: int, n: float, trainer: TrainerSide, e: int, kernels: Kernels = "fused"
) -> float:
    """Bytes that one micro-batch leaves in `layers` layers; fully recomputed, each keeps its input ([K], §4.1)."""
    if trainer.recompute != "full":
        return layers * layer_activations(sizes, n, trainer, e, kernels)
    return layers * e * n / (trainer.tensor if trainer.sequence else 1) * sizes.h


def _norm(numel: float, rows: float, e: int, kernels: Kernels) -> float:
    """Bytes that an RMSNorm of rows keeps, its output left out."""
    return (e if kernels == "fused" else 8) * numel + 4 * rows


def in_flight(stage: int, trainer: TrainerSide, count: int) -> int:
    """Largest number of (micro-batch, model chunk) pairs whose activations a stage holds: 1F1B's warm-up and one ([K],
    §4.2.3; [M])."""
    p, v = trainer.pipeline, trainer.chunks
    if p == 1:
        return 1
    warm_up = p - stage - 1 if v == 1 else (p - stage - 1) * 2 + (v - 1) * p
    return min(warm_up, count * v) + (1 if count * v > warm_up else 0)


def activations(
    sizes: Sizes, work: Workload, trainer: TrainerSide, stage: int, kernels: Kernels = "fused"
) -> dict[str, float]:
    """Bytes by item of one rank in a training step, beside static memory."""
    e, h, t = work.element_bytes, sizes.h, trainer.tensor
    batches = micro_batches(work, trainer)
    n = batches.most / trainer.context
    mine = n / t if trainer.sequence else n
    per_chunk = sizes.layers // trainer.total_chunks
    kept = chunk_activations(sizes, per_chunk, n, trainer, e, kernels)
    # What backward recomputes of one layer.
    again = layer_activations(sizes, n, trainer, e, kernels) if trainer.recompute == "full" else 0
    pairs = in_flight(stage, trainer, batches.count)
    vocab = padded_vocab_size(sizes.vocab, t) // t
    # Backward of SwiGLU: gradients of all it kept; of the layer's input and output; one weight's before it is added to
    # the float32 buffer (gradient_accumulation_fusion is off).
    widest = n * sizes.f / t if not sizes.experts else mine * sizes.top_k * sizes.f
    weight = max(2 * sizes.f * h // (1 if sizes.experts else t), vocab * h if stage == 0 else 0)
    items = {
        "activations": pairs * kept + again,
        "backward's temporaries": e * (5 * widest + 3 * n * h + weight),
        "rotary angles": rotary_angles(sizes, work),
        "pipeline messages": 4 * e * mine * h if trainer.pipeline > 1 else 0.0,
        "weight buckets": 2.0 * BUCKET_BYTES,
    }
    if stage == trainer.pipeline - 1:
        # Final norm, states gathered over tensor-parallel ranks and packed, their gradient. Nearly all positions of a
        # micro-batch can be responses'.
        items["activations"] += _norm(mine * h, mine, e, kernels) + e * 2 * n * h
        # Two tiles of logits, sums of float32 over a tile's rows, the hidden states' gradient, 8 sums a token; the
        # reference's states, gathered.
        gathered = 2 if work.reference and t > 1 else 1
        items["loss chunk"] = 2 * TILE_BYTES["cuda"] + 4 * TILE_ROWS * h + n * (gathered * e * h + 8 * 4 * (t + 1))
        if work.reference:
            # reference.py keeps final states of one minibatch's responses, a share on each tensor-parallel rank.
            share = work.rows / work.minibatches / trainer.data * work.response_tokens
            held = max(share, work.max_response_tokens) / trainer.context / t
            items["reference's states"] = held * h * e
    return items


def rotary_angles(sizes: Sizes, work: Workload) -> float:
    """Bytes of the tables of float32 angles that Megatron keeps: of policy and reference, for each of the lengths that
    packed.py rounds to, the last 32 in all."""
    steps = -(-work.context // ROTARY_TABLE_STEP)
    return 4.0 * sizes.d * min(32, steps * (1 + work.reference + work.start)) * steps * ROTARY_TABLE_STEP


def reference_weights(sizes: Sizes, work: Workload, trainer: TrainerSide, stage: int) -> float:
    """Bytes on the GPU while the policy trains: all of the frozen models, or offloaded only the head that the loss
    needs of the reference."""
    if trainer.reference == "none":
        return 0
    if trainer.reference == "host":
        vocab = padded_vocab_size(sizes.vocab, trainer.tensor) // trainer.tensor
        return vocab * sizes.h * work.element_bytes if stage == trainer.pipeline - 1 else 0
    return (1 + work.start) * static_memory(sizes, stage, trainer.layout, False, work.element_bytes).weights


def kept(sizes: Sizes, work: Workload, trainer: TrainerSide, stage: int) -> dict[str, float]:
    """Bytes by item of one GPU of a pipeline stage, of what is there between steps, too."""
    static = static_memory(sizes, stage, trainer.layout, trainer.distributed_optimizer, work.element_bytes)
    return {
        "weights": float(static.weights),
        "gradients": float(static.gradients),
        "optimizer": float(static.optimizer),
        "reference": float(reference_weights(sizes, work, trainer, stage)),
    }


def trainer_memory(sizes: Sizes, work: Workload, trainer: TrainerSide, stage: int) -> dict[str, float]:
    """Bytes by item of one GPU of a pipeline stage at its peak, in the update."""
    items = kept(sizes, work, trainer, stage) | activations(sizes, work, trainer, stage)
    items["fragmentation"] = FRAGMENTATION * sum(items.values())
    items["weight transfer's NCCL"] = COMMUNICATOR_BYTES
    items["CUDA and NCCL"] = RUNTIME_BYTES
    return items


def resident(items: dict[str, float]) -> float:
    """Bytes that a GPU of `trainer_memory` keeps while servers sample: the rest goes when its step is over."""
    static = sum(items[name] for name in ("weights", "gradients", "optimizer", "reference"))
    return (1 + FRAGMENTATION) * static + items["CUDA and NCCL"]


def ipc_update(sizes: Sizes, tensor: int, e: int) -> float:
    """Bytes on a shared GPU in a weight update by `ipc`, where the server's cache, still asleep, will be.

    The rank gathers a Megatron parameter's shards, makes Hugging Face tensors of them, and packs these into a buffer.
    The worker copies them out of it in full, keeps them until a module is complete, and puts its shard together [V,
    packed_tensor.py, layerwise.py].
    """
    vocab, matrix = sizes.vocab * sizes.h, sizes.f * sizes.h
    module = 3 * matrix * sizes.experts or max(vocab, 2 * matrix)
    buffer = max(BUCKET_BYTES, e * max(vocab, matrix))
    return e * (2 * max(vocab, 2 * matrix) + module * (1 + 1 / tensor)) + 2 * buffer


@dataclass(frozen=True)
class CheckpointMemory:
    """Bytes that a rank needs for a while beside all else, on the pipeline stage that needs most."""

    saving_first: float
    """Of host memory, on a rank of the first replica, which writes."""
    saving_others: float
    """Of host memory, on any other."""
    loading: float
    """Of host memory, on every rank."""
    loading_device: float
    """Of its GPU; saving takes none of it."""


def checkpoint_memory(sizes: Sizes, work: Workload, trainer: TrainerSide) -> CheckpointMemory:
    """What checkpoint.py asks for ([M], get_parameter_state_dp_zero over gloo)."""
    e = work.element_bytes
    stages = [
        static_memory(sizes, stage, trainer.layout, trainer.distributed_optimizer, e)
        for stage in range(trainer.pipeline)
    ]
    n = max(static.numel for static in stages)
    # Replicas send each other what they have read, one float32 tensor at a time.
    device = 4.0 * padded_vocab_size(sizes.vocab, trainer.tensor) // trainer.tensor * sizes.h
    device = device if trainer.copies > 1 else 0.0
    if not trainer.distributed_optimizer:
        # The writer copies weights and optimizer to the host.
        held = float(e * n + max(static.optimizer for static in stages))
        return CheckpointMemory(held, 0.0, held, device)
    # Master weights and two moments, 4 bytes each: a rank's own share of all three goes to the first of those with the
    # same weights, which puts one after the other together out of what arrived, beside its concatenation and the one
    # before.
    share, whole = 12.0 * n / trainer.copies, 12.0 * n
    # Loading makes room twice. Measured with 20 M parameters on two replicas: 30.0, 6.0 and 27.8 bytes for each.
    return CheckpointMemory(whole + share + 3 * 4.0 * n, share, 2 * (whole + e * n), device)


# Memory of vLLM

# What a sleeping worker keeps of its GPU (level 1: weights go to the host, the cache is dropped).
ASLEEP_BYTES = GRAPH_BYTES + RUNTIME_BYTES


@functools.cache
def vllm_weights(sizes: Sizes, tensor: int) -> int:
    """Bytes of one worker's bfloat16 weights [V]; key and value heads are copied where workers outnumber them."""
    architecture, layout = sizes.architecture, ServerLayout(tensor)
    parameters = vllm_parameters(architecture).values()
    return 2 * sum(math.prod(vllm_shape(architecture, parameter, layout)) for parameter in parameters)


def vllm_kv_bytes(sizes: Sizes, tensor: int) -> float:
    """Of one token in one worker's cache."""
    return sizes.kv_bytes / sizes.g * max(1.0, sizes.g / tensor)


def vllm_fixed(sizes: Sizes, work: Workload, tensor: int, sequences: int) -> dict[str, float]:
    """Bytes by item of one worker, its cache left out."""
    # vLLM's profiling run: a prefill's widest layer, and float32 logits of all sequences with the sampler's copies.
    prefill = 2 * PREFILL_TOKENS * (3 * sizes.f * (sizes.top_k or 1) / tensor + 4 * sizes.h)
    logits = 4 * 3 * sequences * sizes.vocab
    return {
        "vLLM weights": float(vllm_weights(sizes, tensor)),
        "vLLM workspace": float(max(prefill, logits)),
        "vLLM CUDA graphs": GRAPH_BYTES,
        "vLLM weight buckets": 2.0 * BUCKET_BYTES,
        "weight transfer's NCCL": COMMUNICATOR_BYTES,
        "CUDA and NCCL": RUNTIME_BYTES,
    }
