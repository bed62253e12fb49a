"""Which layouts are refused and why: every rule of the trainer, Megatron-Core, vLLM and the machines, written once.

Each function yields its refusals, sentences that name the setting, its value and what to do; one may make sense only
where those before it do not hold, so that readers take the first: preflight, launcher and sbatch raise it, the planner
keeps it beside the layout. Needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from megatron_dgpo.config import Parallel
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import Layout, ServerLayout, vllm_vocab_size
from megatron_dgpo.weights.architectures import Architecture

PROCESSES_PER_CORE = 16
"""More ranks and servers' workers than that, each a Python process with PyTorch, a CPU only swaps."""
_RANKS = "parallel.tensor × context × pipeline × data"
_WORKERS = "servers.count × servers.tensor"


def check(refusals: Iterable[str]) -> None:
    """Raise UsageError with the first."""
    if refusal := first(refusals):
        raise UsageError(refusal)


def first(refusals: Iterable[str]) -> str | None:
    return next(iter(refusals), None)


# The trainer's sizes


def of_world(parallel: Parallel, world_size: int) -> Iterator[str]:
    """Ranks that are no whole number of replicas, or not as many as asked for."""
    layout = Layout.from_config(parallel)
    sizes = f"parallel.tensor={layout.tensor} × parallel.pipeline={layout.pipeline}"
    sizes += f" × parallel.context={layout.context}" if layout.context > 1 else ""
    if parallel.data is not None and layout.world_size != world_size:
        yield (
            f"{sizes} × parallel.data={parallel.data} = {layout.world_size} ranks, but {world_size} were started; "
            f"start {layout.world_size}, or leave parallel.data out"
        )
    if world_size % layout.model_size:
        yield (
            f"{sizes} = {layout.model_size} ranks do not fill {world_size} ranks; start a multiple of "
            f"{layout.model_size}, or change the sizes"
        )


def of_model(architecture: Architecture, layout: Layout, name: object) -> Iterator[str]:
    """Sizes that do not divide the model, or are not for its kind. name: what the sentences call it."""
    heads = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
    }
    if not architecture.num_experts:
        heads["intermediate_size"] = architecture.ffn_hidden_size
    yield from _undivided("parallel.tensor", layout.tensor, heads, name)
    if architecture.num_experts:
        yield from _of_mixture(architecture, layout, name)
    elif layout.expert > 1:
        yield f"parallel.expert={layout.expert}, but {name} has no mixture of experts; set parallel.expert=1"
    if layout.chunks > 1 and layout.pipeline == 1:
        yield (
            f"parallel.chunks_per_stage={layout.chunks} needs parallel.pipeline above 1; "
            "set parallel.chunks_per_stage=1"
        )
    layers = {"num_hidden_layers": architecture.num_layers}
    yield from _undivided("parallel.pipeline × chunks_per_stage", layout.total_chunks, layers, name)
    if layout.sequence and layout.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor above 1; set parallel.sequence=false"


def _of_mixture(architecture: Architecture, layout: Layout, name: object) -> Iterator[str]:
    yield from _undivided("parallel.expert", layout.expert, {"number of experts": architecture.num_experts}, name)
    if layout.stage_size % layout.expert:
        yield (
            f"parallel.expert={layout.expert} does not divide parallel.tensor × context × data = {layout.stage_size}, "
            "the ranks of a pipeline stage"
        )
    if layout.tensor > 1 and not layout.sequence:
        yield "a mixture of experts with parallel.tensor above 1 needs parallel.sequence=true; set it"


def _undivided(setting: str, size: int, counts: dict[str, int], name: object) -> Iterator[str]:
    common = math.gcd(*counts.values())
    for what, count in counts.items():
        if count % size:
            *most, last = [str(n) for n in range(1, common + 1) if common % n == 0]
            legal = f"{', '.join(most)} or {last}" if most else last
            yield f"{setting}={size} does not divide {what}={count} of {name}; use {legal}"


def of_step(layout: Layout, prompts: int, group: int, minibatches: int) -> Iterator[str]:
    """A training step's prompts that replicas do not share evenly, or its responses that optimizer steps do not."""
    if prompts % layout.data:
        yield f"rollout.prompts_per_step={prompts} is not a multiple of the {layout.data} data-parallel replicas"
    if prompts * group % minibatches:
        yield (
            f"batch.minibatches={minibatches} does not divide the {prompts * group} responses of a step "
            "(rollout.prompts_per_step × group_size)"
        )


# A server's sizes


def of_server(architecture: Architecture, server: ServerLayout) -> Iterator[str]:
    """Sizes by which vLLM would not cut the model."""
    size, heads, groups = server.tensor, architecture.num_attention_heads, architecture.num_query_groups
    if heads % size:
        yield f"servers.tensor={size} does not divide num_attention_heads={heads}"
    if groups % size and size % groups:
        yield f"servers.tensor={size} and num_key_value_heads={groups}: neither divides the other"
    ffn = architecture.expert_ffn_hidden_size or architecture.ffn_hidden_size
    if server.expert_parallel:
        if not architecture.num_experts or architecture.num_experts % size:
            yield (
                f"servers.expert_parallel=true, but servers.tensor={size} does not divide {architecture.num_experts} "
                "experts; set it to false"
            )
    elif ffn % size:
        hint = "; set servers.expert_parallel=true" if architecture.num_experts else ""
        yield f"servers.tensor={size} does not divide the intermediate size {ffn}{hint}"
    vocab = vllm_vocab_size(architecture.vocab_size)
    if vocab % size:
        yield f"servers.tensor={size} does not divide the padded vocabulary {vocab}"


# Machines


def of_machine(setting: str, size: int, gpus: int) -> Iterator[str]:
    """The planner's: both kinds of tensor parallelism stay inside a machine, where its formulas know the links."""
    if size > gpus:
        yield f"{setting}={size} is more than the {gpus} GPUs of a machine"


def of_cores(ranks: int, workers: int, cores: int) -> Iterator[str]:
    """Ranks and vLLM's workers that start together on a machine without GPUs."""
    if ranks + workers > PROCESSES_PER_CORE * cores:
        yield (
            f"{ranks} ranks ({_RANKS}) and {workers} vLLM workers (servers.count × tensor) are too many for the "
            f"{cores} CPU cores of this machine"
        )


def of_gpus(ranks: int, workers: int, gpus: int, sleep: bool) -> Iterator[str]:
    """The servers' GPUs are those of the ranks if they sleep, and otherwise the next ones."""
    if ranks > gpus:
        yield f"{_RANKS} = {ranks} ranks here, but this machine has {gpus} GPUs"
    # A worker takes weights out of the buffer of its GPU's rank; a buffer that nobody takes from is never freed
    # (PyTorch counts who has opened it).
    if sleep and workers and workers != ranks:
        yield (
            f"servers.sleep=true shares the ranks' GPUs, but {_WORKERS} = {workers} workers here, and {_RANKS} = "
            f"{ranks} ranks: each GPU must have one of both, for the worker takes the rank's weights; let "
            f"servers.count × servers.tensor be {ranks}"
        )
    if not sleep and ranks + workers > gpus:
        yield (
            f"{_RANKS} = {ranks} and {_WORKERS} = {workers} GPUs are more than the {gpus} of this machine; use "
            "fewer, or let the servers share the ranks' GPUs with servers.sleep=true"
        )


def of_shared_memory(kept: float, fraction: float, gpu_bytes: float) -> Iterator[str]:
    """kept: bytes of a GPU that stay a rank's while a server that shares it samples."""
    if kept + fraction * gpu_bytes > gpu_bytes:
        most = max(0, math.floor(100 * (1 - kept / gpu_bytes)))
        yield (
            f"servers.gpu_memory_fraction={fraction:g} is {fraction * gpu_bytes / 2**30:.1f} of a GPU's "
            f"{gpu_bytes / 2**30:.1f} GiB, of which the ranks keep {kept / 2**30:.1f} while servers sample (weights, "
            f"gradients, optimizer, reference): let it be {most / 100:g} or less"
        )


def of_server_gpus(server: ServerLayout, index: int, first_gpu: int, gpus: int) -> Iterator[str]:
    """Where server `index` begins at `first_gpu` of this machine."""
    last = first_gpu + server.tensor - 1
    if last >= gpus:
        yield (
            f"server {index} with servers.tensor={server.tensor} would be on GPUs {first_gpu} to {last}, but this "
            f"machine has {gpus}"
        )


# Jobs of several machines


def of_nodes(ranks: int, nodes: int, where: str) -> Iterator[str]:
    if ranks % nodes:
        yield f"{_RANKS} = {ranks} ranks do not divide over {where}; set parallel.data so that they do"


def of_trainer_nodes(parallel: Parallel, gpus: int) -> Iterator[str]:
    """gpus: of all trainer nodes together."""
    layout = Layout.from_config(parallel)
    if layout.world_size > gpus:
        yield f"{_RANKS} = {layout.world_size} ranks, and the nodes have {gpus} GPUs"
    if parallel.data is None and gpus % layout.model_size:
        yield f"parallel.tensor × context × pipeline = {layout.model_size} does not divide the nodes' {gpus} GPUs"


def of_sleep(sleep: bool, rollout_nodes: int) -> Iterator[str]:
    if sleep and rollout_nodes:
        yield (
            "servers.sleep=true is for servers on the ranks' own GPUs, and those of rollout nodes have others; set it "
            "to false, or run the job without rollout nodes"
        )


def of_rollout_node(server: ServerLayout, gpus: int) -> Iterator[str]:
    if server.num_workers > gpus:
        yield (
            f"{_WORKERS} = {server.num_workers} GPUs a node, but they have {gpus}: servers.count counts those of "
            "one node"
        )


def of_cluster(layout: Layout, server: ServerLayout, gpus: int, shared: bool, machines: int) -> Iterator[str]:
    """The planner's: trainer and `machines` machines with such servers each take all of the GPUs."""
    trainer, workers = layout.world_size, machines * server.num_workers
    fits = trainer == workers == gpus if shared else trainer + workers == gpus
    if not fits:
        yield (
            f"of --gpus={gpus} the trainer takes {trainer} ({_RANKS}), and {machines} machines of {server.num_workers} "
            f"GPUs (servers.tensor × count) {workers}: {'either' if shared else 'both together'} must take all of "
            "them; change these or --gpus"
        )
