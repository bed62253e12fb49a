"""The study's runs: which there are, with what settings, and how far each has come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_dgpo.config import Config
from megatron_dgpo.config_file import load_config
from megatron_dgpo.errors import UsageError, shown
from megatron_dgpo.manifest import newest, step_of

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
RUNS = EXAMPLES.parent / "runs" / "comparison"
BASE = EXAMPLES / "arithmetic" / "config.yaml"
STUDY = HERE / "study.yaml"

# Each arm's settings over those of the study, in the order in which they run.
ARMS = {
    "grpo": EXAMPLES / "algorithms" / "grpo.yaml",
    "uniform": HERE / "arms" / "uniform.yaml",
    "dapo": EXAMPLES / "algorithms" / "dapo.yaml",
    "fipo": EXAMPLES / "algorithms" / "fipo.yaml",
    "dgpo": EXAMPLES / "algorithms" / "dgpo.yaml",
    "dgpo_e80": EXAMPLES / "algorithms" / "dgpo_calibrated.yaml",
    "dgpo_e50": HERE / "arms" / "dgpo_e50.yaml",
    "no_gate_e80": HERE / "arms" / "no_gate_e80.yaml",
    "kl_e80": HERE / "arms" / "kl_e80.yaml",
    "entropy_e80": HERE / "arms" / "entropy_e80.yaml",
    "decoupled_gradient": EXAMPLES / "algorithms" / "decoupled_gradient.yaml",
}
# Those of the registration: README.md.
SEEDS = (1, 2, 3, 4, 5)
STEPS = 40


@dataclass(frozen=True)
class PlannedRun:
    arm: str
    seed: int
    steps: int
    root: Path
    """Folder of the study: the runs, and the data and the start that they have in common."""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def arguments(self) -> list[str]:
        """Of `megatron-dgpo train`."""
        reference = [f"model.reference={self.root / 'flat'}"] if self.arm == "entropy_e80" else []
        return [
            *(str(BASE), str(STUDY), str(ARMS[self.arm])),
            *(f"model.path={self.root / 'sft' / 'hf'}", *reference),
            *(f"data.train={self.root / 'data' / 'train.jsonl'}", f"data.eval={self.root / 'data' / 'held_out.jsonl'}"),
            *(f"run.dir={self.folder}", f"run.seed={self.seed}", f"run.steps={self.steps}", *self.overrides),
        ]

    @cached_property
    def config(self) -> Config:
        base, *more = self.arguments
        return load_config(base, more)

    @property
    def steps_saved(self) -> int:
        """Of its newest checkpoint, from which the same command goes on."""
        checkpoint = newest(self.folder / "checkpoints")
        return step_of(checkpoint) if checkpoint else 0

    @property
    def finished(self) -> bool:
        """The model is exported last of all."""
        return self.steps_saved >= self.steps and (self.folder / "hf").is_dir()


def plan(
    arms: list[str], seeds: list[int], steps: int, root: Path = RUNS, overrides: tuple[str, ...] = ()
) -> list[PlannedRun]:
    """Seed by seed, so that what is done at any time is as many seeds of every arm, and a part of the next."""
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        raise UsageError(f"--arms: no arm {shown(unknown[0])}; expected some of {', '.join(ARMS)}")
    return [PlannedRun(arm, seed, steps, root, overrides) for seed in seeds for arm in arms]


def is_registered(runs: list[PlannedRun]) -> bool:
    """Whether these are the study of README.md, no arm or seed of it left out."""
    whole = {(arm, seed) for arm in ARMS for seed in SEEDS}
    return (
        {(run.arm, run.seed) for run in runs} == whole
        and all(run.steps == STEPS for run in runs)
        and not any(run.overrides for run in runs)
    )
