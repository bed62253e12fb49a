"""The metrics of a run at Weights & Biases, whose package is imported only where `run.wandb` asks for it."""

from __future__ import annotations

import contextlib
import importlib.util
import uuid
from typing import Any

from megatron_dgpo.config import Config
from megatron_dgpo.config_file import plain_settings
from megatron_dgpo.errors import UsageError
from megatron_dgpo.json_file import replace_text

# For the last rows to get there; what does not stays in run.dir/wandb, for `wandb sync`.
_FINISH_S = 30.0


def check_installed(config: Config) -> None:
    """Raise UsageError where the package is asked for and is not there."""
    if not config.run.wandb:
        return
    found = importlib.util.find_spec("wandb")
    # It calls the folders that it writes wandb, too, and a folder can be imported.
    if found is None or found.origin is None:
        raise UsageError(
            f"run.wandb={config.run.wandb}, but the package wandb is not installed: install it (pip install wandb), or "
            "set run.wandb=null"
        )


class WandbRun:
    """Of one command in `run.dir`, where it keeps its id: a run that goes on is the same one there. One rank's.

    A step that comes again after a crash is drawn twice: what was sent cannot be taken back.
    """

    def __init__(self, config: Config, command: str) -> None:
        self._config, self._command = config, command
        self._run: Any = None

    def start(self) -> str | None:
        """Returns why there is no run at W&B, if there is none; that is no reason to end this one."""
        try:
            self._run = self._started()
            return None
        except Exception as error:
            return f"Weights & Biases gets nothing of this start: {type(error).__name__}: {error}"

    def _started(self) -> Any:
        import wandb

        settings = self._config.run
        id_file = settings.dir / "wandb" / f"{self._command}.id"
        if not id_file.is_file():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(id_file, uuid.uuid4().hex)
        run = wandb.init(
            project=settings.wandb,
            dir=str(settings.dir),
            id=id_file.read_text(),
            name=f"{settings.dir.absolute().name} {self._command}",
            resume="allow",
            config=plain_settings(self._config),
            # Standard output is the progress table's.
            settings={"console": "off", "finish_timeout": _FINISH_S},
        )
        run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, values: dict[str, float]) -> str | None:
        """Returns why it gets nothing more from here on, when that is so.

        No reason to end a run: the signal by which SLURM asks it to stop ends W&B's process at once, before the step
        and its checkpoint are done.
        """
        if not self._run:
            return None
        try:
            # Not by W&B's own count of steps, which takes none again: a checkpoint's seconds come after their step.
            self._run.log({"step": step, **values})
            return None
        except Exception as error:
            self._run = None
            return f"Weights & Biases gets nothing from step {step} on: {type(error).__name__}: {error}"

    def close(self, failed: bool) -> None:
        if self._run:
            with contextlib.suppress(Exception):
                self._run.finish(exit_code=int(failed))
