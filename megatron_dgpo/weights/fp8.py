"""ModelOpt's FP8 checkpoints, made a tensor at a time.

Of ModelOpt's FP8 formats that vLLM loads this is FP8_PER_CHANNEL_PER_TOKEN: a scale for every row of a weight, while
vLLM finds those of activations anew for every token. So no calibration data is needed, which per-tensor FP8 would want
for its static activation scales, and ModelOpt's own exporter, which holds the whole model, is not either. What is
quantised is what ModelOpt's default settings quantise: every linear layer but the head and routers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_dgpo.errors import UsageError

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def is_linear(name: str, dim: int) -> bool:
    """Whether a Hugging Face tensor is the weight of a linear layer that is quantised."""
    return dim == 2 and name.startswith("model.layers.") and not _is_router(name)


def _is_router(name: str) -> bool:
    return name.endswith(".gate.weight")


def quantize(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what stands for a Hugging Face tensor: weight[O, I] float8 and weight_scale[O] float32."""
    from modelopt.torch.export.model_config import QUANTIZATION_FP8_PC_PT
    from modelopt.torch.export.quant_utils import to_quantized_weight

    if not is_linear(name, weight.dim()):
        yield name, weight
        return
    scale = weight.abs().amax(1).float() / _LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    yield f"{name}_scale", scale
    yield name, to_quantized_weight(weight, scale, QUANTIZATION_FP8_PC_PT)


def write_config(folder: Path, names: list[str]) -> None:
    """Tell vLLM how the model with the Hugging Face tensors `names` in `folder` is quantised, as ModelOpt does."""
    import modelopt
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    routers = [name.removesuffix(".weight") for name in names if _is_router(name)]
    quantization: dict[str, str | list[str] | None]
    quantization = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": None}
    quantization["exclude_modules"] = ["lm_head", *routers]
    settings = {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings, indent=4) + "\n")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": convert_hf_quant_config_format(settings)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def check_installed() -> None:
    """Raise UsageError unless ModelOpt is there."""
    try:
        with warnings.catch_warnings():
            # Of Megatron, TE and Apex, which ModelOpt imports or looks for and which are not used here.
            warnings.simplefilter("ignore")
            import modelopt.torch.export  # noqa: F401
    except ImportError:
        raise UsageError("FP8 export needs NVIDIA ModelOpt: pip install nvidia-modelopt") from None
