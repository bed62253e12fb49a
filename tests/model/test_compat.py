"""What the installed PyTorch, Megatron-Core and Transformer Engine cannot do is said in a sentence, before a start."""

import functools

import pytest
import torch
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from megatron_dgpo import preflight
from megatron_dgpo.config import Model, Parallel
from megatron_dgpo.errors import UsageError
from megatron_dgpo.model.compat import check_packages, moe_submodules
from tests.layouts import make_config
from tools.tiny_models import make_tiny_model


def model(**settings):
    return Model(path="unused", **settings)


def install_transformer_engine(folder, monkeypatch, code):
    """A package of that name, for this process and those it starts."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


WITHOUT_TORCH = "raise ModuleNotFoundError('No module named transformer_engine_torch')"


@pytest.mark.parametrize(
    "code, layer_spec, expected",
    [
        (WITHOUT_TORCH, "te", r"does not work with PyTorch .*transformer_engine_torch.* use model.layer_spec=portable"),
        # Megatron-Core goes on without it, but cannot itself be imported beside what fails in another way.
        (WITHOUT_TORCH, "portable", None),
        ("raise ImportError('undefined symbol: _ZN3c10')", "portable", r"undefined symbol: _ZN3c10.* uninstall it"),
    ],
    ids=["te", "portable", "Megatron-Core fails too"],
)
def test_transformer_engine_that_does_not_import(tmp_path, monkeypatch, code, layer_spec, expected):
    install_transformer_engine(tmp_path, monkeypatch, code)
    if expected is None:
        return check_packages(model(layer_spec=layer_spec))
    with pytest.raises(UsageError, match=expected):
        check_packages(model(layer_spec=layer_spec))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"layer_spec": "te"}, "model.layer_spec=te, but Transformer Engine is not installed"),
        ({"fusions": True}, "model.fusions=true needs Transformer Engine's layers.*model.layer_spec=auto"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without Transformer Engine")
def test_settings_that_need_transformer_engine(settings, expected):
    with pytest.raises(UsageError, match=expected):
        check_packages(model(**settings))


@pytest.mark.parametrize("missing", ["distributed_optimizer", "overlap_grad_reduce"])
def test_gathers_overlap_only_with_the_distributed_optimizer_and_its_buckets(missing):
    settings = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    preflight._check_overlaps(Parallel(**settings))
    with pytest.raises(UsageError, match=f"but parallel.{missing}=false: set both to true"):
        preflight._check_overlaps(Parallel(**settings | {missing: False}))


def test_oldest_pytorch_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    check_packages(model(layer_spec="portable"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"PyTorch 2.9.1\+cu128: on a GPU the loss needs 2.10 or newer"):
        check_packages(model(layer_spec="portable"))
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+nv25.12")
    check_packages(model(layer_spec="portable"))


def test_both_forms_of_a_mixture_s_spec():
    submodules = MoESubmodules(experts=None)
    assert moe_submodules(ModuleSpec(module=MoELayer, submodules=submodules)) is submodules
    assert moe_submodules(functools.partial(MoELayer, submodules=submodules)) is submodules


def test_a_window_over_context_parallel_ranks_is_not_transformer_engines(tmp_path):
    def config(layer_spec, context):
        short = {"context_tokens": 128, "max_response_tokens": 64}
        return make_config(folder, {"context": context}, model={"layer_spec": layer_spec}, rollout=short)

    folder = make_tiny_model(tmp_path / "model", "mistral")
    for legal in (config("portable", 2), config("te", 1)):
        preflight._check_model(legal)
    with pytest.raises(UsageError, match="parallel.context=2 with sliding_window=8 .*set model.layer_spec=portable"):
        preflight._check_model(config("te", 2))
