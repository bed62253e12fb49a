"""Every setting, typed, with its unit and default."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

from megatron_dgpo.errors import shown

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 4096
"""NAME_MAX and PATH_MAX of Linux."""


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def _expand(path: Any) -> Any:
    """`~` is the user's home, as in the shell. Of the text: pathlib forgets the ./ of ./~ and takes "" for a folder."""
    if path == "":
        raise ValueError("expected a path")
    if not isinstance(path, str) or path[0] != "~":
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise ValueError(f"no home folder of that user; write ./{path} for a folder of that name")
    return expanded


def _check_path(path: Path) -> Path:
    """What no file system could hold is refused before anyone asks one."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None
    if b"\0" in encoded:
        raise ValueError("holds a NUL character")
    if len(encoded) >= _MOST_PATH_BYTES or any(len(name) > _MOST_NAME_BYTES for name in encoded.split(b"/")):
        raise ValueError(
            f"longer than file systems allow, {_MOST_NAME_BYTES} bytes a name and {_MOST_PATH_BYTES} in all"
        )
    return path


def _listed(paths: Any) -> Any:
    """One path is a list of one, null of none."""
    return [] if paths is None else paths if isinstance(paths, list | tuple) else [paths]


def _check_stems(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    stems = [path.stem for path in paths]
    doubled = next((stem for stem in stems if stems.count(stem) > 1), None)
    if doubled is not None:
        raise ValueError(f"two sets have the name {shown(doubled)}, their file's: give one of the files another")
    return paths


def _named(weights: Any) -> Any:
    """Null is no name."""
    return {} if weights is None else weights


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    """Names become names of metrics."""
    wrong = next((name for name in weights if not re.fullmatch("[A-Za-z0-9_]+", name)), None)
    if wrong is not None:
        raise ValueError(f"a reward cannot be named {shown(wrong)}: use letters, digits and _")
    if weights and not any(weights.values()):
        raise ValueError("all weights are 0: nothing would be trained for; give one, such as {right: 1, format: 0.2}")
    return weights


Text = Annotated[str, AfterValidator(_check_text)]
FilePath = Annotated[Path, BeforeValidator(_expand), AfterValidator(_check_path)]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_listed), AfterValidator(_check_stems)]
Weights = Annotated[dict[str, float], BeforeValidator(_named), AfterValidator(_check_weights)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Bytes = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=2_000_000)]
"""At most 23 days: poll(2) counts milliseconds in 31 bits."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Run(Section):
    dir: FilePath = Path("runs/default")
    """Checkpoints, logs, metrics and plots go here; the same folder continues the same run."""
    steps: Count = 100
    """Training steps; one step samples, updates and pushes the new weights to the engines."""
    seed: int = Field(1, ge=0, lt=2**31)
    """Of the order of problems, of sampling and of Megatron's generators."""
    restarts: int = Field(0, ge=0, lt=1000)
    """Times that a SLURM job begins again by itself after a failure, if it wrote a checkpoint since it began."""
    collective_timeout_s: Seconds = 600
    """Longest wait of a rank for the others, where none of them waits for a server or writes: so long may one that is
    stopped or hangs go unnoticed, or a replica compute longer than another."""
    trace_steps: tuple[Count, ...] = ()
    """Training steps of which PyTorch's profiler writes a trace, to run.dir/traces."""
    trace_rank: int = Field(0, ge=0, lt=2**31)
    """Whose."""
    wandb: Text | None = None
    """A project of Weights & Biases that gets metrics and settings, too; needs its package (pip install wandb). Key,
    host and mode are the environment's: WANDB_API_KEY, WANDB_MODE=offline and the like."""
    check_finite: bool = False
    """Stop at the first NaN or infinity that reaches the loss, naming tensor and token; for debugging, slower."""


class Model(Section):
    path: FilePath
    """The starting policy: a Hugging Face directory (config, tokenizer, safetensors), or what
    tools/convert_checkpoint.py makes of one for Megatron."""
    reference: FilePath | None = None
    """The frozen reference, of either format; null: the starting policy itself."""
    start: FilePath | None = None
    """What the student started from, of either format, for algorithm.teacher_extrapolation; null: model.path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; master weights and gradients are float32."""
    layer_spec: Literal["auto", "te", "portable"] = "auto"
    """te: Transformer Engine layers; portable: PyTorch only; auto: te where it is installed."""
    fusions: bool = False
    """Transformer Engine's: weight gradients added to their float32 sums in the product itself, and a mixture's
    permutations in one kernel each. Needs its layers."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations the backward pass computes again."""
    reference_offload: bool = False
    """Keep the reference in host memory between uses."""


class Parallel(Section):
    tensor: Count = 1
    """Ranks that a layer's matrices, and the vocabulary, are cut over."""
    pipeline: Count = 1
    """Stages, each with its share of the layers."""
    chunks_per_stage: Count = 1
    """Model chunks per pipeline stage; above 1 the schedule is interleaved 1F1B."""
    context: Count = 1
    """Ranks that share each sequence's tokens: for sequences whose activations one rank cannot hold."""
    expert: Count = 1
    """Ranks, out of the tensor × context × data ranks of a pipeline stage, that share a layer's experts between them;
    each expert is whole on one of them."""
    data: Count | None = None
    """Replicas; null: what the number of ranks leaves. Where this command starts these: 1, or in a job whose servers
    sleep or have nodes of their own as many as the GPUs hold."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data- and context-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over those ranks while the last micro-batch's backward pass runs."""
    overlap_param_gather: bool = False
    """With batch.minibatches: gather updated weights while the next optimizer step's forward pass runs. Needs the two
    settings above."""


class Batching(Section):
    micro_batch_tokens: Count = 8192
    """Most tokens, of prompts and responses, that a rank runs through the model at once. A longer sequence runs alone;
    with parallel.context each of those ranks has its share."""
    forward_micro_batches: Count = 1
    """Micro-batches that run through the model as one where no activations are kept: in the passes of the reference and
    for old log-probs. In a pipeline always one."""
    minibatches: Count = 1
    """Optimizer steps made from one step's responses."""


class Optimizer(Section):
    lr: PositiveFloat = 1e-6
    """AdamW's learning rate, after the warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Where a cosine or linear schedule ends."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate, from the end of the warm-up to the run's last optimizer step."""
    warmup_steps: int = Field(0, ge=0, lt=2**31)
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's, of matrices; biases and norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean of squared gradients."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    max_skipped_steps: Count = 3
    """Optimizer steps in a row with a non-finite loss or gradient after which training stops."""


class Algorithm(Section):
    credit: Literal["distribution_guided", "uniform", "future_kl", "none"] = "distribution_guided"
    """distribution_guided: DGPO (arXiv 2605.03327); uniform: every token alike, which is GRPO; future_kl: FIPO (arXiv
    2603.19835); none: rewards count for nothing, beside `teacher`."""
    deviation: Literal["hellinger2", "alpha", "kl"] = "hellinger2"
    """Of policy and reference, which credit is given for: squared Hellinger distance; 1 - sum of π^α ρ^(1-α), α being
    deviation_alpha; KL(π to ρ), which has no bound."""
    deviation_alpha: float = Field(0.5, gt=0, lt=1)
    """See deviation; 0.5 is the squared Hellinger distance."""
    tau_mode: Literal["absolute", "effective_share"] = "absolute"
    """absolute: tau for every response; effective_share: each has the temperature that gives its weights that share."""
    tau: PositiveFloat = 0.5
    """Temperature of the softmax that turns gated scores into credit weights."""
    effective_share: float = Field(0.8, gt=0, le=1)
    """(Σw)²/(T·Σw²) of a response's T weights; 1: all tokens alike."""
    tau_min: PositiveFloat = 1e-4
    """Least temperature for it: scores of float32 noise, of a policy that is the reference, remain noise."""
    kappa: float = Field(1.0, ge=0)
    """Exponent of the entropy gate; 0 switches it off."""
    entropy_norm: Literal["log_vocab", "response_max"] = "log_vocab"
    """What entropies are divided by: log V, or the largest entropy of the same response."""
    scored_by: Literal["current", "old"] = "current"
    """Policy whose deviation and entropy are scored: the one being updated, or that before the step's first update."""
    old_logprobs: Literal["auto", "recomputed", "sampled"] = "auto"
    """Of the ratio: the trainer's own before the step's first update, with batch.minibatches by a forward pass more; or
    what the servers reported, of the weights that sampled and rounded differently. auto: recomputed, unless
    rollout.max_staleness is above 0 and batch.minibatches is 1."""
    correction: Literal["auto", "none", "truncate", "mask"] = "auto"
    """Weights of the tokens' policy loss for the sampler, q = π_old / π of the sampler: truncate: min(q,
    correction_high); mask: q, and 0 outside [correction_low, correction_high]. auto: truncate where
    rollout.max_staleness is above 0 and old log-probs are recomputed, else none."""
    correction_low: float = Field(0.5, ge=0, le=1)
    """See correction."""
    correction_high: float = Field(2.0, ge=1)
    """See correction."""
    future_half_life: PositiveFloat = 32
    """future_kl: tokens after which a later token's log-ratio counts half."""
    future_low: float = Field(1.0, gt=0, le=1)
    """future_kl: its weights are clipped to [future_low, future_high]."""
    future_high: float = Field(1.2, ge=1)
    """See future_low."""
    future_safety: PositiveFloat = 4.0
    """future_kl: ratio above which a token of negative advantage is not weighted up."""
    teacher: float = Field(0.0, ge=0)
    """Coefficient of log ρ(a) - log π_old(a), which is added to a token's advantage: model.reference is then a teacher
    to be imitated (on-policy distillation), or, with a small one, what the policy is held to."""
    teacher_extrapolation: float = Field(1.0, ge=0)
    """λ: instead of the teacher's log ρ(a) it is log ρ_0(a) + λ (log ρ(a) - log ρ_0(a)), ρ_0 being model.start: above
    1 the student goes beyond its teacher (ExOPD, arXiv 2602.12125)."""
    advantage: Literal[
        "mean_std", "mean", "rloo", "mean_mad", "batch_std", "best_of_group", "length_baseline", "decoupled"
    ] = "mean_std"
    """Of a response in its group: (r - mean) / (std + advantage_eps); r - mean; r - mean of the others; (r - mean) /
    (mean absolute deviation + advantage_eps); (r - mean) / (std over the step + advantage_eps); how far the best is
    ahead of the second, / (std + advantage_eps), and 0 for the others; r - mean weighted by lengths; the mean_std of
    each of reward.weights, weighted and added, / (its std over the step + advantage_eps) (GDPO, arXiv 2601.05242)."""
    advantage_eps: PositiveFloat = 1e-6
    """Added to the deviation of rewards."""
    conflict: float = Field(0.0, ge=0, le=1)
    """decoupled: a response whose terms a of single rewards have both signs, and |sum of a| below this part of the sum
    of |a|, has no loss, and the others of its group are multiplied by their share of it (GD²PO, with 0.2)."""
    group_weight: Literal["none", "difficulty"] = "none"
    """What advantages are multiplied by. difficulty: groups with fewer right responses weigh more, and those whose
    rewards are all equal have no loss (MathForge, arXiv 2601.20614)."""
    difficulty_temperature: PositiveFloat = 2.0
    """difficulty: of the softmax over the step's groups, by their shares of right responses."""
    policy_loss: Literal["ppo_clip", "decoupled_gradient", "sequence_clip", "clipped_weight"] = "ppo_clip"
    """Of a token. ppo_clip: no gradient outside the clip range; decoupled_gradient: one that decays there (arXiv
    2603.14389); sequence_clip: ppo_clip of the response's mean log-ratio (GSPO, arXiv 2507.18071); clipped_weight:
    log-probs weighted with clipped ratios (CISPO, arXiv 2506.13585)."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The probability ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.2, ge=0)
    """See clip_low."""
    dual_clip: float | None = Field(None, gt=1)
    """Largest ratio that a negative advantage is multiplied with, in ppo_clip and sequence_clip; in future_kl, what
    future tokens' ratios must not exceed to count; null: none."""
    decay_low: float = Field(1.0, ge=0)
    """decoupled_gradient: below the range the gradient is multiplied by (r / (1 - clip_low)) to this power."""
    decay_high: float = Field(2.0, gt=0)
    """decoupled_gradient: above the range it is multiplied by the root of this order of (1 + clip_high) / r."""
    kl: Literal["none", "k2", "k3", "reward"] = "none"
    """Distance to the reference. k2, k3: of a token, in the loss: half the squared difference of log-probs, or ρ/π - 1
    - log ρ/π (GRPO). reward: sum of log π_old/ρ over a response, taken off its reward before responses are compared
    (RLOO), for a forward pass more."""
    kl_coefficient: float = Field(0.001, ge=0)
    """Of kl in the loss or in the reward."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Mean over all tokens of the step; over its responses of each one's token mean; or of each one's token sum divided
    by rollout.max_response_tokens (Dr. GRPO)."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Coefficient of the mean token entropy added to the objective."""


class Rollout(Section):
    prompts_per_step: Count = 32
    """Prompts whose groups a step trains on."""
    group_size: Count = 8
    """Responses per prompt."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and so of the policy that is trained."""
    max_response_tokens: Count = 1024
    """Longest response; what is longer is cut off there."""
    context_tokens: Count = 2048
    """Longest prompt plus response, in tokens."""
    max_staleness: int = Field(0, ge=0, lt=1000)
    """Weight versions (training steps) that a token may be older than the policy it trains. 0: a step samples, then
    trains; above, servers sample for so many steps more while the policy trains."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal are left out, and the next prompts in order take their places."""
    dynamic_limit: float = Field(4.0, ge=1)
    """Prompts that dynamic sampling asks for a step, at most, in multiples of prompts_per_step; then groups with equal
    rewards fill it up."""
    request_timeout_s: Seconds = 1800
    """Longest wait for one response."""
    record: bool = False
    """Keep every response with its log-probs under run.dir/rollouts, for inspection and replay."""
    replay: FilePath | None = None
    """Folder of recorded responses to train on instead of sampling; no server is used."""


class Servers(Section):
    count: Count = 1
    """vLLM servers that a command starts on this machine, or on each node of a job that runs any."""
    tensor: Count = 1
    """Tensor-parallel size of each server."""
    expert_parallel: bool = False
    """Experts whole on one of a server's workers each, instead of all cut over all workers."""
    addresses: tuple[Text, ...] = ()
    """Running servers (http://host:port), instead of starting any; their secret in MEGATRON_DGPO_SECRET."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of their weights; auto: model.dtype."""
    max_concurrent: Count = 128
    """Sequences a server decodes at once."""
    memory_bytes: Bytes = 256 * 2**20
    """KV cache of a CPU server."""
    gpu_memory_fraction: float = Field(0.85, gt=0, le=1)
    """Part of a GPU that a server may take."""
    sleep: bool = False
    """They free their GPUs' memory while the policy trains, for servers on the ranks' own GPUs (transport ipc), with as
    many workers as ranks: servers.count × tensor on each machine."""
    enforce_eager: bool | None = None
    """No torch.compile and CUDA graphs in the server; null: only on CPU."""
    start_timeout_s: Seconds = 600
    """Longest wait for a server to be up, at the start or, with fewer than min_serving left, again."""
    max_restarts: int = Field(3, ge=0, lt=2**31)
    """Times an hour that a server that ended is started anew; then, and with 0, its end is the run's. One that sleeps
    never is: the trainer has its memory."""
    min_serving: Count = 1
    """Servers that a weight update must reach; with fewer the run waits start_timeout_s for a restart, then ends."""
    stall_timeout_s: Seconds = 120
    """A server whose requests get no token for so long is ended, and its requests are asked of others."""


class WeightUpdates(Section):
    transport: Literal["auto", "memory", "shards", "ipc"] = "auto"
    """How weights travel. memory: workers on this machine read their shards in place, on a CPU; shards: the ranks that
    hold them send them, over gloo or NCCL; ipc: vLLM's own, of gathered tensors, to servers on the ranks' GPUs. auto:
    memory on CPU, on GPUs shards, or ipc if the servers sleep."""
    bucket_bytes: Bytes = 256 * 2**20
    """Most bytes that a worker receives at once. shards: both sides hold two such buckets; ipc: both hold one, or as
    much as the largest tensor needs."""
    timeout_s: Seconds = 600
    """Longest wait for each step of an update, and before the first for all workers to be there."""
    bucket_timeout_s: Seconds = 30
    """shards: longest wait for the other side to take or to give a bucket."""
    check_all: bool = False
    """Compare every parameter's checksum after each update, instead of a sixteenth of them in turn."""
    canary_tolerance: PositiveFloat | None = None
    """Mean |trainer - server| log-prob of the server's greedy text that stops training; null: 1e-3 in float32,
    otherwise 0.2 at the first update, and then 3 times what it was there, or 0.1."""


class Data(Section):
    train: FilePath
    """JSONL or Parquet file of problems."""
    eval: FilePaths = ()
    """The same, of problems held out for evaluations: a path, or several as [a.jsonl, b.jsonl], each a set with its
    file's name; null: none are made."""
    prompt_field: Text = "question"
    """Field of a row that holds the problem."""
    answer_field: Text = "answer"
    """Field of a row that holds the answer that graders compare with."""
    template: Text = "{prompt}"
    """Text around a problem; {prompt} is replaced."""
    chat: bool = False
    """Wrap the problem as a user message in the tokenizer's chat template."""
    shuffle: bool = True
    """A new order of the problems in each epoch, from run.seed; otherwise the file's."""


class Reward(Section):
    grader: Text = "math"
    """math (math-verify), exact, or module:function taking (response: str, answer: str, row: dict) -> float, or what
    weights says."""
    weights: Weights = {}
    """{name: weight} of several rewards: the grader, one of your own, returns {name: number} with these names, and a
    response's reward is the weighted sum; 0 makes a metric only. Empty or null: the grader returns one number."""
    timeout_s: Seconds = 10
    """Time that one grading may compute (of the processor) or wait (of the clock) before its sample gets reward 0."""
    workers: Count = 2
    """Grader processes per data-parallel replica."""
    overlong: Literal["none", "filter", "punish"] = "none"
    """Responses that rollout.max_response_tokens cut off. filter: they have no loss, but are compared with; punish:
    their reward is lower by 1, and by less the earlier in overlong_buffer_tokens a response ends (both DAPO's)."""
    overlong_buffer_tokens: Count | None = None
    """Last tokens of the limit that punish begins in; null: a fifth of it."""


class Checkpoint(Section):
    every: Count = 20
    """Steps between checkpoints; the last step is always saved."""
    timeout_s: Seconds = 1800
    """Longest wait of ranks for the one that writes most, beyond run.collective_timeout_s."""
    every_minutes: PositiveFloat | None = None
    """Most minutes between checkpoints, to the end of a step; null: however long `every` steps take."""
    keep: Count = 2
    """Newest checkpoints kept."""
    keep_every: Count | None = None
    """Checkpoints of every so many steps, a multiple of `every`, are kept for good; null: of none."""
    asynchronous: bool = False
    """Training goes on while a process beside each rank writes a copy of what the rank holds, in host memory. Until all
    have, a run that is killed goes on from the checkpoint before."""


class Eval(Section):
    every: int = Field(0, ge=0, lt=2**31)
    """Steps between evaluations on data.eval; 0: only before the first and after the last step."""
    samples: Count = 1
    """Responses per problem (k of avg@k and pass@k)."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest that together have this probability. Of evaluations alone: training needs
    the whole distribution."""
    problems: Count | None = None
    """The first so many of each set of data.eval; null: all."""


class Sft(Section):
    data: FilePath | None = None
    """JSONL or Parquet file with prompts (data.prompt_field) and solutions (response_field)."""
    response_field: Text = "response"
    """Field of a row that holds the solution."""
    steps: Count = 100
    """Optimizer steps."""
    batch_size: Count = 64
    """Sequences per optimizer step."""


class Config(Section):
    """All of them. `run.dir/config.yaml` holds those that a run was started with."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    batch: Batching = Batching()
    optimizer: Optimizer = Optimizer()
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    servers: Servers = Servers()
    weight_sync: WeightUpdates = WeightUpdates()
    data: Data
    reward: Reward = Reward()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    sft: Sft = Sft()

    @property
    def needs_reference(self) -> bool:
        """Whether any term of the objective asks for the frozen model."""
        settings = self.algorithm
        return settings.credit == "distribution_guided" or settings.kl != "none" or settings.teacher > 0

    @property
    def needs_start(self) -> bool:
        """Whether a second frozen model is asked for."""
        return self.algorithm.teacher > 0 and self.algorithm.teacher_extrapolation != 1
