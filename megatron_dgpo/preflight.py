"""Everything that can be known to be wrong before a process is started."""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from pathlib import Path

import torch

from megatron_dgpo import legality
from megatron_dgpo.config import Checkpoint, Config, Parallel
from megatron_dgpo.data import load_prompts, load_solutions, load_tokenizer, place_of
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.layout import Layout, ServerLayout, own_servers
from megatron_dgpo.manifest import check_architecture, check_origins, check_steps, newest, origins, read_manifest
from megatron_dgpo.model.compat import check_packages, uses_transformer_engine
from megatron_dgpo.planning import memory
from megatron_dgpo.planning.plan import trainer_of, workload_of
from megatron_dgpo.planning.sizes import Sizes
from megatron_dgpo.rewards.pool import GraderPool
from megatron_dgpo.rollout import server
from megatron_dgpo.wandb_run import check_installed
from megatron_dgpo.weights.architectures import Architecture, read_architecture
from megatron_dgpo.weights.load import check_weights
from megatron_dgpo.weights.vocabulary import check_token_ids

_LABEL = r"[A-Za-z0-9_-]{1,63}"
_ADDRESS = re.compile(rf"https?://(?:(?P<name>{_LABEL}(?:\.{_LABEL})*)|\[(?P<v6>[^\]]*)\])(?::(?P<port>[0-9]{{1,5}}))?")


def check(
    command: str, config: Config, world_size: int, local_size: int, checkpoint: Path | None, from_model: bool
) -> None:
    """Raise UsageError for the first thing that `command` could not work with; leaves nothing behind.

    local_size: ranks of this machine, of `world_size` in all.
    """
    architecture = _check_model(config)
    legality.check(legality.of_world(config.parallel, world_size))
    check_layout(command, config, architecture, Layout.from_config(config.parallel, world_size))
    servers = own_servers(command, config)
    _check_devices(config, local_size, servers)
    _check_overlaps(config.parallel)
    check_packages(config.model)
    check_installed(config)
    tokenizer = load_tokenizer(config.model.path)
    check_token_ids(architecture, config.model.path, tokenizer)
    if command == "sft":
        load_solutions(config, tokenizer)
    else:
        _check_rollouts(config, world_size // local_size)
        _check_shaping(config)
        _check_evaluation(config)
        _check_rewards(config, command, tokenizer)
    if command == "train":
        if servers and config.servers.sleep and torch.cuda.is_available():
            gpu_bytes = torch.cuda.get_device_properties(0).total_memory
            check_shared_memory(config, architecture, world_size, gpu_bytes)
        _check_warmup(config)
        _check_advantages(config)
    if command == "eval" and not config.data.eval:
        raise UsageError("data.eval is missing: give the file of problems to evaluate on")
    _check_checkpoints(config.checkpoint)
    _check_run_dir(config.run.dir)
    found = checkpoint or newest(config.run.dir / "checkpoints")
    if command == "eval" and from_model:
        return
    if command == "eval" and found is None:
        raise UsageError(f"{config.run.dir}/checkpoints holds no checkpoint: give --checkpoint or --model")
    if found:
        manifest = read_manifest(found)
        if manifest is None:
            raise UsageError(f"{found} is not a checkpoint: it has no readable manifest.json")
        check_architecture(found, manifest, architecture)
        if command != "eval":
            check_origins(found, manifest, origins(config, command))
            check_steps(found, manifest, config, command)


def _check_model(config: Config) -> Architecture:
    architecture = read_architecture(config.model.path)
    check_weights(architecture, config.model.path)
    for setting, model in (("reference", config.model.reference), ("start", config.model.start)):
        if model is None:
            continue
        if read_architecture(model) != architecture:
            raise UsageError(
                f"model.{setting}={model} differs in architecture from model.path={config.model.path}: frozen models "
                "share the policy's layout"
            )
        check_weights(architecture, model)
    if architecture.sliding_window and config.parallel.context > 1 and uses_transformer_engine(config.model.layer_spec):
        raise UsageError(
            f"parallel.context={config.parallel.context} with sliding_window={architecture.sliding_window} of "
            f"{config.model.path}: Transformer Engine's attention of packed sequences over context-parallel ranks "
            "knows no window; set model.layer_spec=portable"
        )
    if config.rollout.context_tokens > architecture.max_positions:
        raise UsageError(
            f"rollout.context_tokens={config.rollout.context_tokens} is more than max_position_embeddings="
            f"{architecture.max_positions} of {config.model.path}"
        )
    return architecture


def check_layout(command: str, config: Config, architecture: Architecture, layout: Layout) -> None:
    """Raise UsageError for the first size, of the ranks or a server, that `command` could not work with."""
    legality.check(legality.of_model(architecture, layout, config.model.path))
    if command == "sft":
        return
    if command == "train":
        rollout = config.rollout
        step = rollout.prompts_per_step, rollout.group_size, config.batch.minibatches
        legality.check(legality.of_step(layout, *step))
    legality.check(legality.of_server(architecture, ServerLayout.from_config(config.servers)))


def check_shared_memory(config: Config, architecture: Architecture, ranks: int, gpu_bytes: float) -> None:
    """Raise UsageError if servers that wake find too little: vLLM would die of it, at the end of the first update."""
    sizes, work, trainer = Sizes(architecture), workload_of(config, 1, 1), trainer_of(config, ranks)
    kept = max(sum(memory.kept(sizes, work, trainer, stage).values()) for stage in range(trainer.pipeline))
    legality.check(legality.of_shared_memory(kept, config.servers.gpu_memory_fraction, gpu_bytes))


def _check_devices(config: Config, ranks: int, servers: int) -> None:
    """`ranks` and `servers` of this machine, which start together."""
    workers = ServerLayout.from_config(config.servers, servers).num_workers
    if not torch.cuda.is_available():
        legality.check(legality.of_cores(ranks, workers, len(os.sched_getaffinity(0))))
        return
    legality.check(legality.of_gpus(ranks, workers, torch.cuda.device_count(), config.servers.sleep))
    if servers and not config.servers.sleep and server.transport(config) == "ipc":
        raise UsageError(
            "weight_sync.transport=ipc is for servers on the ranks' own GPUs, and with servers.sleep=false these have "
            "others; use shards, or set servers.sleep=true"
        )


def _check_evaluation(config: Config) -> None:
    if config.data.eval and config.eval.samples > 1 and config.eval.temperature == 0:
        raise UsageError(
            f"eval.samples={config.eval.samples} with eval.temperature=0: greedy responses are all the same; set "
            f"eval.samples=1, or a temperature such as {config.rollout.temperature:g}"
        )
    if config.data.eval and config.eval.top_p < 1 and config.eval.temperature == 0:
        raise UsageError(
            f"eval.top_p={config.eval.top_p:g} with eval.temperature=0: greedy takes the likeliest token; set "
            f"eval.top_p=1, or a temperature such as {config.rollout.temperature:g}"
        )


def _check_overlaps(parallel: Parallel) -> None:
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        missing = "overlap_grad_reduce" if parallel.distributed_optimizer else "distributed_optimizer"
        raise UsageError(
            "parallel.overlap_param_gather=true gathers what the distributed optimizer has updated, in the buckets in "
            f"which gradients are reduced, but parallel.{missing}=false: set both to true"
        )


def _check_rollouts(config: Config, nodes: int) -> None:
    rollout, servers, transport = config.rollout, config.servers, config.weight_sync.transport
    if rollout.max_response_tokens >= rollout.context_tokens:
        raise UsageError(
            f"rollout.max_response_tokens={rollout.max_response_tokens} leaves no room for a prompt in "
            f"rollout.context_tokens={rollout.context_tokens}"
        )
    if servers.expert_parallel and not torch.cuda.is_available():
        raise UsageError("servers.expert_parallel=true: vLLM's experts on a CPU cannot do that; set it to false")
    if rollout.max_staleness:
        _check_staleness(config)
    if rollout.replay and not rollout.replay.is_dir():
        raise UsageError(f"rollout.replay={rollout.replay} is not a folder of recorded responses")
    if servers.sleep and torch.cuda.is_available() and server.transport(config) != "ipc":
        raise UsageError(
            f"servers.sleep is for servers on the ranks' own GPUs, which weight_sync.transport={transport} cannot "
            "reach; use ipc"
        )
    needed = {"memory": False, "ipc": True}.get(transport)
    if needed is not None and needed != torch.cuda.is_available():
        where = "GPUs, and there are none here" if needed else "the CPU, and here are GPUs"
        raise UsageError(f"weight_sync.transport={transport} is for {where}; use auto")
    if nodes > 1 and own_servers("train", config) and server.transport(config) == "memory":
        raise UsageError(
            f"weight_sync.transport={transport} shares memory on a CPU, with servers of one machine, and those of this "
            f"job are on {nodes}; use shards"
        )
    count = len(servers.addresses) or servers.count * nodes
    if servers.min_serving > count:
        raise UsageError(
            f"servers.min_serving={servers.min_serving} is more than the {count} servers; use {count} or fewer"
        )
    for address in servers.addresses:
        _check_address(config, address)
    if len(set(servers.addresses)) < len(servers.addresses):
        raise UsageError("servers.addresses names a server twice")


def _check_advantages(config: Config) -> None:
    """What decoupled rewards need."""
    if config.algorithm.advantage != "decoupled":
        return
    if not config.reward.weights:
        raise UsageError(
            "algorithm.advantage=decoupled compares several rewards, and reward.weights names none; give them, such as "
            "reward.weights={right: 1, format: 0.2}, and a grader that returns them"
        )
    if config.reward.overlong == "punish":
        raise UsageError(
            "reward.overlong=punish changes the sum of rewards, which algorithm.advantage=decoupled does not look at; "
            "use filter, or let the grader return a reward of its own for length"
        )
    if config.algorithm.kl == "reward":
        raise UsageError(
            "algorithm.kl=reward changes the sum of rewards, which algorithm.advantage=decoupled does not look at; use "
            "k2, whose gradient is the same KL's"
        )


def _check_shaping(config: Config) -> None:
    buffer, limit = config.reward.overlong_buffer_tokens, config.rollout.max_response_tokens
    if buffer and buffer > limit:
        raise UsageError(
            f"reward.overlong_buffer_tokens={buffer} is more than rollout.max_response_tokens={limit}, its end: every "
            "response would be punished"
        )


def _check_staleness(config: Config) -> None:
    staleness = config.rollout.max_staleness
    if config.servers.sleep:
        raise UsageError(
            f"rollout.max_staleness={staleness} lets servers sample while the policy trains, which with "
            "servers.sleep=true has their GPUs then; set one of them to 0 or false"
        )
    if config.rollout.replay:
        raise UsageError(
            f"rollout.max_staleness={staleness} with rollout.replay, whose responses are trained on as they are; set "
            "it to 0"
        )
    if staleness >= config.run.steps:
        raise UsageError(
            f"rollout.max_staleness={staleness} lets all of run.steps={config.run.steps} steps train on what the first "
            "policy sampled; 1 to 4 is usual"
        )


def _check_address(config: Config, address: str) -> None:
    host = _host_of(address)
    if host is None:
        raise UsageError(f"servers.addresses: {shown(address)} is not an address such as http://host:8000")
    if server.transport(config) == "memory" and not _is_loopback(host):
        raise UsageError(
            f"servers.addresses: {address} is another machine, but weight_sync.transport=memory shares memory with "
            "servers of this one; use weight_sync.transport=shards"
        )


def _host_of(address: str) -> str | None:
    """None where it is not an address and nothing more: paths are put behind it."""
    found = _ADDRESS.fullmatch(address)
    if not found or int(found["port"] or 0) > 65535:
        return None
    if found["v6"]:
        try:
            return str(ipaddress.IPv6Address(found["v6"]))
        except ValueError:
            return None
    return found["name"] if len(found["name"]) <= 253 else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_rewards(config: Config, command: str, tokenizer) -> None:
    """The grader must load, the problems must fit, and a response must be able to be right."""
    most = legality.PROCESSES_PER_CORE * len(os.sched_getaffinity(0))
    if config.reward.workers > most:
        raise UsageError(f"reward.workers={config.reward.workers}: at most {most} on the CPU cores of this machine")
    files = [("data.train", config.data.train)] if command == "train" else []
    files += [("data.eval", path) for path in config.data.eval]
    with GraderPool(config.reward) as graders:
        for setting, path in files:
            prompts = load_prompts(config, path, setting, tokenizer)
            unusable = graders.unusable([prompt.answer for prompt in prompts])
            for index, reason in unusable.items():
                others = f" ({len(unusable)} different answers are like that)" if len(unusable) > 1 else ""
                raise UsageError(
                    f"{place_of(path, setting, index)}: no response can be right, because reward.grader="
                    f"{config.reward.grader} cannot work with field '{config.data.answer_field}' (data.answer_field): "
                    f"{reason}{others}; correct such rows or take them out, or use another grader"
                )


def _check_warmup(config: Config) -> None:
    steps = config.run.steps * config.batch.minibatches
    if config.optimizer.warmup_steps >= steps:
        raise UsageError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is not below the {steps} optimizer steps of the "
            "run"
        )


def _check_checkpoints(settings: Checkpoint) -> None:
    if settings.keep_every and settings.keep_every % settings.every:
        raise UsageError(
            f"checkpoint.keep_every={settings.keep_every} is no multiple of checkpoint.every={settings.every}: no "
            "checkpoint is written at most of those steps"
        )


def _check_run_dir(folder: Path) -> None:
    """Try to write there, and remove whatever that created."""
    try:
        existing = folder
        # Links that lead nowhere exist, too: nothing could be made of them.
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        probe = existing / f".probe_{uuid.uuid4().hex}"
        with probe.open("w"):
            pass
        probe.unlink()
    except OSError as error:
        raise UsageError(f"run.dir={folder} cannot be written: {error.strerror or error}") from None
