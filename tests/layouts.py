"""The parallel layouts that every distributed result is checked in."""

from megatron_dgpo.config import Config

LAYOUTS = {
    "tp1": (1, dict()),
    "tp2": (2, dict(tensor=2)),
    "tp2-sp": (2, dict(tensor=2, sequence=True)),
    "pp2": (2, dict(pipeline=2)),
    "pp2-interleaved": (2, dict(pipeline=2, chunks_per_stage=2)),
    "tp2-pp2": (4, dict(tensor=2, pipeline=2)),
    "dp2": (2, dict()),
    "cp2": (2, dict(context=2)),
    "cp4": (4, dict(context=4)),
    "cp2-tp2-sp": (4, dict(context=2, tensor=2, sequence=True)),
    "cp2-pp2": (4, dict(context=2, pipeline=2)),
    "cp2-pp2-interleaved": (4, dict(context=2, pipeline=2, chunks_per_stage=2)),
    "cp2-dp2": (4, dict(context=2)),
}
MIXTURE_LAYOUTS = {
    "tp1": (1, dict()),
    "ep2": (2, dict(expert=2)),
    "cp2-ep2": (2, dict(context=2, expert=2)),
    "tp2": (2, dict(tensor=2, sequence=True)),
    "tp2-ep2": (2, dict(tensor=2, sequence=True, expert=2)),
    "pp2-ep2": (4, dict(pipeline=2, expert=2)),
    "tp2-pp2-ep2": (4, dict(tensor=2, pipeline=2, sequence=True, expert=2)),
    "tp2-dp2-ep4": (4, dict(tensor=2, sequence=True, expert=4)),
}


def make_config(path, parallel: dict | None = None, **sections) -> Config:
    """Settings for a float32 model on the CPU; `sections` are dictionaries by name."""
    settings = {"model": {"path": path, "dtype": "float32"}, "data": {"train": "unused"}, "parallel": parallel or {}}
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return Config.model_validate(settings)
