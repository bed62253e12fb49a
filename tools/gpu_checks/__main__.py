"""One check in this process: `python -m tools.gpu_checks MODULE:FUNCTION DEVICE FOLDER RESULTS [ARGUMENT ...]`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tools.gpu_checks.line import Task, write


def main(place: str, device: str, folder: str, results: str, *arguments: str) -> None:
    module, _, name = place.partition(":")
    check = getattr(importlib.import_module(module), name)
    task = Task(device, Path(folder), int(os.environ.get("WORLD_SIZE", 1)))
    for line in check(task, *arguments):
        # All ranks come to the same lines; one of them tells.
        if os.environ.get("RANK", "0") == "0":
            write(line, Path(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
