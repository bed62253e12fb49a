"""Every setting, typed, with its unit and default: a YAML file plus dotted overrides (`algorithm.tau=0.3`)."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from megatron_dgpo.errors import UsageError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    dir: Path = Path("runs/default")
    """Checkpoints, logs, metrics and plots go here; the same folder continues the same run."""
    steps: PositiveInt = 100
    """Training steps; one step samples, updates and pushes the new weights to the engines."""
    seed: int = 1
    check_finite: bool = False
    """Stop at the first NaN or infinity that reaches the loss, naming tensor and token; for debugging, slower."""


class Model(Section):
    path: Path
    """The starting policy: a Hugging Face directory (config, tokenizer, safetensors), or what
    tools/convert_checkpoint.py makes of one for Megatron."""
    reference: Path | None = None
    """The frozen reference, of either format; null: the starting policy itself."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; master weights and gradients are float32."""
    layer_spec: Literal["auto", "te", "portable"] = "auto"
    """te: Transformer Engine layers; portable: PyTorch only; auto: te where it is installed."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations the backward pass computes again."""
    reference_offload: bool = False
    """Keep the reference in host memory between uses."""


class Parallel(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    chunks_per_stage: PositiveInt = 1
    """Model chunks per pipeline stage; above 1 the schedule is interleaved 1F1B."""
    expert: PositiveInt = 1
    """Ranks, out of the tensor × data ranks of a pipeline stage, that share a layer's experts between them; each expert
    is whole on one of them."""
    data: PositiveInt | None = None
    """Replicas; null: what the number of ranks leaves, or 1 when this command starts the ranks."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""


class Batching(Section):
    micro_batch_size: PositiveInt = 1
    """Responses a rank runs through the model at once."""
    minibatches: PositiveInt = 1
    """Optimizer steps made from one step's responses."""


class Optimizer(Section):
    lr: PositiveFloat = 1e-6
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    max_skipped_steps: PositiveInt = 3
    """Optimizer steps in a row with a non-finite loss or gradient after which training stops."""


class Algorithm(Section):
    credit: Literal["distribution_guided", "uniform"] = "distribution_guided"
    """distribution_guided: DGPO (arXiv 2605.03327); uniform: every token alike, which is GRPO."""
    tau: PositiveFloat = 0.5
    """Temperature of the softmax that turns gated scores into credit weights."""
    kappa: float = Field(1.0, ge=0)
    """Exponent of the entropy gate; 0 switches it off."""
    entropy_norm: Literal["log_vocab", "response_max"] = "log_vocab"
    """What entropies are divided by: log V, or the largest entropy of the same response."""
    scored_by: Literal["current", "sampling"] = "current"
    """Policy whose deviation and entropy are scored: the one being updated, or the one that sampled."""
    advantage: Literal["mean_std", "mean"] = "mean_std"
    """Group advantages: (r - mean) / (std + advantage_eps), or r - mean."""
    advantage_eps: PositiveFloat = 1e-6
    policy_loss: Literal["ppo_clip"] = "ppo_clip"
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    """The probability ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all tokens of the step, or over its responses of each one's token mean."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Coefficient of the mean token entropy added to the objective."""


class Rollout(Section):
    prompts_per_step: PositiveInt = 32
    group_size: PositiveInt = 8
    """Responses per prompt."""
    temperature: PositiveFloat = 1.0
    max_response_tokens: PositiveInt = 1024
    context_tokens: PositiveInt = 2048
    """Longest prompt plus response, in tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engine's weights; auto: model.dtype."""
    servers: PositiveInt = 1
    """vLLM servers that this command starts on this machine."""
    tensor: PositiveInt = 1
    """Tensor-parallel size of each server."""
    expert_parallel: bool = False
    """Experts whole on one of a server's workers each, instead of all cut over all workers."""
    addresses: tuple[str, ...] = ()
    """Running servers (http://host:port), instead of starting any; their secret in MEGATRON_DGPO_SECRET."""
    transport: Literal["auto", "memory", "shards", "ipc"] = "auto"
    """How weights travel. memory: workers on this machine read their shards in place, on a CPU; shards: the ranks that
    hold them send them, over gloo or NCCL; ipc: vLLM's own, of gathered tensors, to servers on the ranks' GPUs. auto:
    memory on CPU, on GPUs shards, or ipc if the servers sleep."""
    sleep: bool = False
    """Servers free their GPUs' memory while the policy trains, for servers on the ranks' own GPUs (transport ipc)."""
    bucket_bytes: PositiveInt = 256 * 2**20
    """shards: most bytes that a worker receives at once; both sides hold two such buckets."""
    transfer_timeout_s: PositiveFloat = 30
    """shards: longest wait for the other side."""
    check_all_weights: bool = False
    """Compare every parameter's checksum after each update, instead of a sixteenth of them in turn."""
    memory_bytes: PositiveInt = 256 * 2**20
    """KV cache of a CPU server."""
    gpu_memory_fraction: float = Field(0.85, gt=0, le=1)
    """Part of a GPU that a server may take."""
    max_concurrent: PositiveInt = 128
    """Sequences a server decodes at once."""
    enforce_eager: bool | None = None
    """No torch.compile and CUDA graphs in the server; null: only on CPU."""
    start_timeout_s: PositiveFloat = 600
    request_timeout_s: PositiveFloat = 1800
    """Longest wait for one step's responses."""
    update_timeout_s: PositiveFloat = 600
    """Longest wait for a weight update."""
    record: bool = False
    """Keep every response with its log-probs under run.dir/rollouts, for inspection and replay."""
    replay: Path | None = None
    """Folder of recorded responses to train on instead of sampling; no server is used."""
    canary_tolerance: PositiveFloat | None = None
    """Mean |trainer - server| log-prob of the server's greedy text that stops training; null: 1e-3 in float32,
    otherwise 0.2 at the first update, and then 3 times what it was there, or 0.1."""


class Data(Section):
    train: Path
    """JSONL or Parquet file of problems."""
    eval: Path | None = None
    prompt_field: str = "question"
    answer_field: str = "answer"
    template: str = "{prompt}"
    """Text around a problem; {prompt} is replaced."""
    chat: bool = False
    """Wrap the problem as a user message in the tokenizer's chat template."""
    shuffle: bool = True


class Reward(Section):
    grader: str = "math"
    """math (math-verify), exact, or module:function taking (response: str, answer: str, row: dict) -> float."""
    timeout_s: PositiveFloat = 10
    """Time one grading may take before its sample gets reward 0."""
    workers: PositiveInt = 2
    """Grader processes per data-parallel replica."""


class Checkpoint(Section):
    every: PositiveInt = 20
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Eval(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations on data.eval; 0: only before the first and after the last step."""
    samples: PositiveInt = 1
    """Responses per problem (k of avg@k and pass@k)."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    problems: PositiveInt | None = None
    """The first so many of data.eval; null: all."""


class Sft(Section):
    data: Path | None = None
    """JSONL or Parquet file with prompts (data.prompt_field) and solutions (response_field)."""
    response_field: str = "response"
    steps: PositiveInt = 100
    batch_size: PositiveInt = 64
    """Sequences per optimizer step."""


class Config(Section):
    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    batch: Batching = Batching()
    optimizer: Optimizer = Optimizer()
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    data: Data
    reward: Reward = Reward()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    sft: Sft = Sft()


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply `section.name=value` overrides; relative paths in the file are relative to it.

    Raises UsageError naming the file or setting, the value found and, for an unknown name, the nearest one.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected sections such as 'model:' and 'data:', found {type(settings).__name__}")
    _anchor_paths(settings, Config, path.parent)
    for override in overrides or []:
        _apply_override(settings, override)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UsageError(_explain(error, path)) from None


def _anchor_paths(settings: dict, section: type[Section], folder: Path) -> None:
    """Make the paths written in a config file relative to that file."""
    for name, field in section.model_fields.items():
        value = settings.get(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if isinstance(value, dict):
                _anchor_paths(value, field.annotation, folder)
        elif field.annotation in (Path, Path | None) and isinstance(value, str):
            settings[name] = str(folder / value)


def _apply_override(settings: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or len(keys) != 2 or not all(keys):
        raise UsageError(f"override '{override}': expected section.name=value, for example algorithm.tau=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    # YAML reads 1e-5 as text: the number grammar is pydantic's business, so text is passed on as it is.
    section = settings.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise UsageError(f"override '{override}': '{keys[0]}' is not a section of settings")
    section[keys[1]] = value


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{place}'{_nearest(place)}")
        elif problem["type"] == "missing":
            lines.append(f"setting '{place}' is missing: give it in the file or as {place}=VALUE")
        else:
            lines.append(f"{place}={problem['input']!r}: {problem['msg'].lower()}")
    return f"{path}: " + "; ".join(lines)


def setting_names() -> list[str]:
    """Every `section.name`."""
    return [f"{section}.{name}" for section, f in Config.model_fields.items() for name in f.annotation.model_fields]


def _nearest(place: str) -> str:
    candidates = setting_names() if "." in place else list(Config.model_fields)
    matches = difflib.get_close_matches(place, candidates, n=1, cutoff=0.5)
    if not matches and "." in place:
        leaf = place.rsplit(".", 1)[1]
        matches = [name for name in candidates if name.rsplit(".", 1)[1] == leaf][:1]
    return f"; did you mean '{matches[0]}'?" if matches else f"; expected one of {', '.join(candidates)}"
