"""Megatron's logits equal those of transformers, for every family in every layout."""

import json

import pytest
import torch

from tests.layouts import LAYOUTS, MIXTURE_LAYOUTS, make_config
from tests.packs import micro_batches
from tests.ranks import run_ranks
from tools.tiny_models import FAMILIES, MIXTURES, make_tiny_model

# float32 rounding over four layers, with sums split differently by each layout.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {family: make_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES | MIXTURES}
    # Weights of the chosen experts that do not add up to 1.
    found["qwen3_moe-softmax"] = make_tiny_model(tmp_path_factory.mktemp("softmax"), "qwen3_moe", norm_topk_prob=False)
    return found


def sequences() -> torch.Tensor:
    return torch.randint(0, 131, (4, 24), generator=torch.Generator().manual_seed(1))


def whole(logits, batch):
    """[N, columns] of this rank's tokens -> [M, columns] of all context-parallel ranks'."""
    from megatron_dgpo.algorithm.objective import of_whole_responses
    from megatron_dgpo.model.parallel import context_group

    return of_whole_responses(logits.t().contiguous(), batch, context_group()).t()


def megatron_logits(model_dirs, parallel):
    """{family: this rank's [rows, S - 1, columns] logits, or None off the last stage}."""
    from megatron.core import parallel_state

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import run_schedule
    from megatron_dgpo.weights.architectures import read_architecture
    from megatron_dgpo.weights.load import load_weights

    init_device()
    found = {}
    for family, model_dir in model_dirs.items():
        config = make_config(model_dir, parallel)
        architecture = read_architecture(model_dir)
        if not parallel_state.model_parallel_is_initialized():
            initialize_parallel(config.parallel, 1)
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        chunks = build_chunks(config, architecture)
        load_weights(chunks, architecture, model_dir, rank, size)
        batches = micro_batches([(row[:1], row[1:]) for row in sequences().tolist()], 2, config.parallel)
        with torch.no_grad():
            parts = run_schedule(chunks, batches, lambda b, hidden, head: whole(hidden @ head.t(), b))
        found[family] = torch.cat(parts).unflatten(0, (-1, 23)) if parts else None
    return found, parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(models, layout):
    check({family: models[family] for family in FAMILIES}, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_logits_of_mixtures_equal_transformers(models, layout):
    check({name: path for name, path in models.items() if name not in FAMILIES}, *MIXTURE_LAYOUTS[layout])


def test_windows_of_older_configs_equal_transformers(tmp_path):
    """Without layer_types: a window in every layer, and, where nothing switches it on, in none."""
    models = {}
    for family, switch in (("qwen2", True), ("qwen2", None), ("qwen3", False), ("qwen3_moe", True), ("mistral", None)):
        model = make_tiny_model(tmp_path / f"{family}-{switch}", family)
        config = json.loads((model / "config.json").read_text())
        for key in ("layer_types", "use_sliding_window"):
            config.pop(key, None)
        config |= {"sliding_window": 8, "max_window_layers": 0}
        config |= {} if switch is None else {"use_sliding_window": switch}
        (model / "config.json").write_text(json.dumps(config))
        models[model.name] = model
    check(models, *LAYOUTS["tp1"])


def check(models, world_size, parallel):
    from transformers import AutoModelForCausalLM

    results = run_ranks(megatron_logits, world_size, models, parallel)
    for family, model_dir in models.items():
        with torch.no_grad():
            reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)(sequences()).logits[:, :-1]
        replicas = max(dp for _, dp, _ in results) + 1
        for replica in range(replicas):
            shards = {tp: found[family] for found, dp, tp in results if dp == replica and found[family] is not None}
            logits = torch.cat([shards[tp] for tp in sorted(shards)], -1)[..., :131]
            difference = (logits - reference[replica::replicas]).abs().max().item()
            assert difference < TOLERANCE, f"{family}: {difference:.2e}"
