"""What differs between versions of the packages below, and which of them do not work here.

Megatron-Core 0.16.1 (Python 3.11) to 0.19 (Python 3.12 and newer). Megatron-Core is imported inside the functions:
preflight calls this file before any process is started, where the import would only take time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from megatron_dgpo.config import Model
from megatron_dgpo.errors import UsageError

_OLDEST_TORCH_ON_GPU = (2, 10)
# Exit status 0: usable. Megatron-Core swallows a ModuleNotFoundError and goes on with stand-ins that fail when they are
# built; with any other error its own import ends, whichever layers are asked for.
_PROBE = """
from megatron.core.extensions.transformer_engine import HAVE_TE
if {needed} and not HAVE_TE:
    import transformer_engine.pytorch.fp8
    raise ModuleNotFoundError("it can be imported, but not by this version of Megatron-Core")
"""


@contextlib.contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """Around the first import of Megatron-Core: what it marks for `torch.compile` is compiled when it is called.

    The marks alone import PyTorch's compiler, a third of what a rank does before its first line; the layers that are
    used here call none of it.
    """
    compile_now = torch.compile

    def mark(function: Callable | None = None, **options) -> Callable:
        if function is None:
            return functools.partial(mark, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = mark
    try:
        yield
    finally:
        torch.compile = compile_now


def moe_submodules(spec):
    """The `MoESubmodules` of what get_moe_module_spec returns: a ModuleSpec, from 0.17 on a functools.partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def uses_transformer_engine(layer_spec: str) -> bool:
    """What `model.layer_spec` means here."""
    if layer_spec == "auto":
        return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return layer_spec == "te"


def check_packages(model: Model) -> None:
    """Raise UsageError if PyTorch or Transformer Engine cannot do what these settings and this machine ask of them.

    Where Transformer Engine is installed it is imported once, in a process of its own: of a build for another PyTorch
    nobody knows how it ends.
    """
    if torch.cuda.is_available() and _version(torch.__version__) < _OLDEST_TORCH_ON_GPU:
        raise UsageError(
            f"PyTorch {torch.__version__}: on a GPU the loss needs {'.'.join(map(str, _OLDEST_TORCH_ON_GPU))} or newer "
            "(torch.addmm that adds a product of bfloat16 to a float32 sum); install requirements/gpu.txt in a fresh "
            "virtual environment"
        )
    needed = uses_transformer_engine(model.layer_spec)
    if model.fusions and not needed:
        raise UsageError(
            "model.fusions=true needs Transformer Engine's layers, but without a GPU, without that package, or by "
            f"model.layer_spec={model.layer_spec}, PyTorch's are used here: set it to false"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        if needed:
            raise UsageError(
                f"model.layer_spec={model.layer_spec}, but Transformer Engine is not installed: install "
                "requirements/transformer-engine.txt as it says, or use model.layer_spec=portable"
            )
        return
    probe = subprocess.run([sys.executable, "-c", _PROBE.format(needed=needed)], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip() or f"exit status {probe.returncode}").splitlines()[-1]
        way_out = "use model.layer_spec=portable" if reason.startswith("ModuleNotFoundError") else "uninstall it"
        raise UsageError(
            f"Transformer Engine is installed, but does not work with PyTorch {torch.__version__} ({reason}): build it "
            f"again as requirements/transformer-engine.txt says, or {way_out}"
        )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
