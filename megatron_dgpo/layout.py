"""Parallel sizes: how many ranks share the model and how they are numbered; the same for vLLM's workers.

Every size, product, rank and stage is worked out here. Which sizes are legal is legality.py's. Needs no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dgpo.config import Config, Parallel, Servers

# vLLM pads its vocabulary to a multiple of this before it splits it (DEFAULT_VOCAB_PADDING_SIZE).
_VLLM_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Layout:
    """The trainer's ranks. Megatron numbers them tensor parallel fastest, then context, data and pipeline.

    Example, two replicas of a model on four ranks each:

    >>> layout = Layout(tensor=2, pipeline=2, data=2)
    >>> layout.model_size, layout.stage_size, layout.world_size
    (4, 4, 8)
    >>> layout.rank(tensor=1, pipeline=1, copy=0), layout.coordinates(5)
    (5, (1, 1, 0))
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    """Replicas."""
    chunks: int = 1
    """Model chunks of each pipeline stage."""
    expert: int = 1
    """Neighbouring ranks of a pipeline stage that share its layers' experts."""
    sequence: bool = False
    context: int = 1
    """Ranks that share each sequence's tokens; all of them hold the same weights."""

    @classmethod
    def from_config(cls, parallel: Parallel, world_size: int | None = None) -> Layout:
        """Of `world_size` ranks; None: of as many replicas as the settings have, or one."""
        model = parallel.tensor * parallel.context * parallel.pipeline
        return cls(
            parallel.tensor,
            parallel.pipeline,
            (parallel.data or 1) if world_size is None else world_size // model,
            parallel.chunks_per_stage,
            parallel.expert,
            parallel.sequence,
            parallel.context,
        )

    def settings(self) -> dict[str, int | bool]:
        """Of config.Parallel."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "context": self.context,
            "chunks_per_stage": self.chunks,
            "data": self.data,
            "expert": self.expert,
            "sequence": self.sequence,
        }

    @property
    def model_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.context * self.pipeline

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, those of experts aside: of all replicas, and of each the context's."""
        return self.context * self.data

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, all replicas together."""
        return self.tensor * self.copies

    @property
    def world_size(self) -> int:
        return self.model_size * self.data

    @property
    def total_chunks(self) -> int:
        """Model chunks of all stages."""
        return self.pipeline * self.chunks

    @property
    def micro_batches_multiple(self) -> int:
        """What the micro-batches of a call are a multiple of: an interleaved pipeline takes them in rounds."""
        return self.pipeline if self.chunks > 1 else 1

    def rank(self, tensor: int, pipeline: int, copy: int) -> int:
        """copy: which of the `copies`, numbered context parallel fastest."""
        return tensor + self.tensor * (copy + self.copies * pipeline)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, pipeline, copy) of a rank."""
        return rank % self.tensor, rank // self.stage_size, rank // self.tensor % self.copies

    def ranks_of_stage(self, stage: int) -> range:
        return range(stage * self.stage_size, (stage + 1) * self.stage_size)

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Chunks are dealt to the stages in turn."""
        return layer // (num_layers // self.total_chunks) % self.pipeline

    def expert_rank(self, rank: int) -> int:
        """Among those that share its layers' experts."""
        return rank % self.stage_size % self.expert

    def ranks_of_expert(self, stage: int, expert: int, num_experts: int) -> range:
        """The ranks of a stage that hold one of its layers' experts, whole."""
        return self.ranks_of_stage(stage)[expert * self.expert // num_experts :: self.expert]


@dataclass(frozen=True)
class ServerLayout:
    """vLLM's workers, numbered server by server."""

    tensor: int
    servers: int = 1
    expert_parallel: bool = False
    """Every expert is whole on one of a server's workers; otherwise each is cut over all of them."""

    @classmethod
    def from_config(cls, servers: Servers, count: int | None = None) -> ServerLayout:
        """Of `count` servers; None: of those that one machine starts."""
        return cls(servers.tensor, servers.count if count is None else count, servers.expert_parallel)

    @property
    def num_workers(self) -> int:
        return self.tensor * self.servers

    def first_worker(self, server: int) -> int:
        return server * self.tensor


def own_servers(command: str, config: Config) -> int:
    """Servers that `megatron-dgpo COMMAND` starts beside the ranks of a machine."""
    given = command == "sft" or config.rollout.replay or config.servers.addresses
    return 0 if given else config.servers.count


def job_ranks(config: Config, gpus: int, rollout_nodes: int) -> int:
    """Trainer ranks of a job whose trainer nodes have `gpus` GPUs together; 0: they compute on CPUs.

    Where parallel.data is null and no server keeps a GPU for itself there, one on each.
    """
    free = config.parallel.data is None and (rollout_nodes or config.servers.sleep)
    return gpus if gpus and free else Layout.from_config(config.parallel).world_size


def vllm_vocab_size(vocab_size: int) -> int:
    """Rows of vLLM's embedding and head over all of a server's workers, padding included."""
    return -(-vocab_size // _VLLM_VOCAB_MULTIPLE) * _VLLM_VOCAB_MULTIPLE
