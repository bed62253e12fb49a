"""Checks this package on the GPUs of this machine, in about ten minutes; one GPU is enough.

    python tools/check_gpu.py --json gpu.json         # everything that this environment allows
    python tools/check_gpu.py --only server           # checks whose name has that in it
    python tools/check_gpu.py --device cpu            # the same on a CPU, smaller

Each check runs in its own process with a time limit: one that crashes or hangs costs its line only. What is not
installed is skipped, and named. The JSON file says the same with all figures, machine and versions; please send it.
Exit status: 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; its checks are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo import process  # noqa: E402
from megatron_dgpo.rollout.server import free_port  # noqa: E402
from tools.gpu_checks.line import FAILED, SKIPPED, Line, read  # noqa: E402

DTYPES = ("float32", "bfloat16")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
# Of them, those that are cut over several ranks, too.
SPLIT_FAMILIES = ("qwen2", "qwen3_moe")
COLOURS = {"passed": "green", FAILED: "bold red", SKIPPED: "yellow"}
_POLL_S = 0.1
_ERROR_LINES = 12


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    place: str
    """module:function"""
    arguments: tuple[str, ...] = ()
    limit_s: float = 120
    ranks: int = 0
    """Processes that are ranks of one group, each with a GPU where there are any; 0: one process on its own."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    gpus: int = 0
    """Without as many it is skipped, on a CPU too."""
    only_cpu: bool = False


def catalogue() -> list[Check]:
    """All checks, the cheapest first."""
    statistics, models, commands = (f"tools.gpu_checks.{name}:" for name in ("statistics", "models", "commands"))
    checks = [Check(f"statistics {dtype}", statistics + "against_float64", (dtype,)) for dtype in DTYPES]
    checks.append(Check("speed", statistics + "speed", limit_s=240))
    for family in FAMILIES:
        checks.append(Check(f"model {family} portable", models + "model", (family, "portable"), ranks=1))
    for family in FAMILIES:
        te = dict(ranks=1, needs=("transformer_engine",), gpus=1)
        checks.append(Check(f"model {family} te", models + "model", (family, "te"), **te))
    for ranks in (2, 4):
        for family in SPLIT_FAMILIES:
            checks.append(Check(f"model {family} on {ranks} ranks", models + "model", (family, "auto"), 180, ranks))
    for family in SPLIT_FAMILIES:
        name = f"model {family} on 2 context-parallel ranks"
        checks.append(Check(name, models + "model", (family, "auto", "2"), 180, 2))
    checks.append(Check("resume", commands + "resume", limit_s=240))
    vllm = dict(limit_s=400, needs=("vllm",))
    for name, transport, sleep, where in (
        ("server, weights in place", "memory", "sleep", dict(only_cpu=True)),
        ("server, weights over gloo", "shards", "awake", dict(only_cpu=True)),
        ("server, weights over NCCL", "shards", "awake", dict(gpus=2)),
        ("server, weights by CUDA IPC", "ipc", "sleep", dict(gpus=1)),
    ):
        checks.append(Check(name, commands + "server", (transport, sleep), **vllm, **where))
    return checks


def obstacle(check: Check, device: str, num_gpus: int) -> str | None:
    """Why `check` cannot run here, or None."""
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if device == "cpu" and check.gpus:
        return "needs a GPU" if check.gpus == 1 else f"needs {check.gpus} GPUs"
    if device == "cuda" and check.only_cpu:
        return "is for CPUs"
    gpus = max(check.ranks, check.gpus)
    if device == "cuda" and gpus > num_gpus:
        return f"needs {gpus} GPUs, this machine has {num_gpus}"
    return f"{', '.join(missing)} is not installed" if missing else None


def run(check: Check, device: str, folder: Path, patience: float = 1) -> list[Line]:
    """Its lines; one that says what went wrong is added where a process crashed, or the time was up.

    folder: to be made. patience: what time limits are multiplied by.
    """
    return [_without_paths(line, folder) for line in _run(check, device, folder, patience)]


def _run(check: Check, device: str, folder: Path, patience: float) -> list[Line]:
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    results, logs = folder / "lines.jsonl", folder / "logs"
    command = [sys.executable, "-m", "tools.gpu_checks", check.place, device, str(folder), str(results)]
    # What libraries leave behind goes with the folder.
    variables = environment(device) | {"TMPDIR": str(temporary)}
    if check.ranks:
        variables |= {"WORLD_SIZE": str(check.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children: list[process.Child] = []
    limit_s = check.limit_s * patience
    try:
        for rank in range(max(1, check.ranks)):
            own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if check.ranks else {})
            children.append(process.start(check.name, [*command, *check.arguments], own, logs / f"{rank}.log"))
        failed = _wait(children, limit_s)
    except TimeoutError:
        return [*read(results), Line("time limit", FAILED, f"not done after {limit_s:g} s")]
    finally:
        process.stop(children, grace_s=5)
    lines = read(results)
    if failed:
        return [*lines, Line("process", FAILED, _ending(failed))]
    return lines or [Line("process", FAILED, "ended without a line")]


def _wait(children: list[process.Child], limit_s: float) -> process.Child | None:
    """Until all have ended well (None), or one has not: its peers wait for it in vain. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while True:
        statuses = [child.process.poll() for child in children]
        for child, status in zip(children, statuses, strict=True):
            if status:
                return child
        if None not in statuses:
            return None
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_S)


def _ending(child: process.Child) -> str:
    status = child.process.returncode
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    text = "\n".join(child.log.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:])
    return f"{how}: {text}"


def _without_paths(line: Line, folder: Path) -> Line:
    """The report is to be published."""
    detail = line.detail
    for path, name in ((folder, "CHECK"), (ROOT, "CHECKOUT"), (sys.prefix, "PYTHON"), (Path.home(), "~")):
        detail = detail.replace(str(path), name)
    return dataclasses.replace(line, detail=detail)


def environment(device: str) -> dict[str, str]:
    """Of a check: this package from this checkout, and no launcher's variables, which would make it a rank."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MEGATRON_DGPO_ADDRESSES")
    variables = {name: value for name, value in os.environ.items() if name not in launcher}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    # NVIDIA's images switch float32 products to TF32 by it: not what is compared with float64.
    variables["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def describe_machine(device: str, limit_s: float = 120) -> dict:
    """Of gpu_checks/machine.py. Raises SystemExit where even that fails."""
    command = [sys.executable, "-m", "tools.gpu_checks.machine"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(device), capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"PyTorch did not find its devices within {limit_s:g} s: is the driver well?") from None
    if done.returncode:
        raise SystemExit(f"PyTorch cannot use this machine's devices:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def choose_device(asked: str, machine: dict) -> str:
    device = asked if asked != "auto" else "cuda" if machine["gpus"] else "cpu"
    if device == "cuda" and not machine["gpus"]:
        raise SystemExit(
            f"--device cuda: PyTorch {machine['torch']} (CUDA {machine['cuda']}) sees no GPU here; "
            "--device cpu checks what a CPU can run"
        )
    return device


def show(console: Console, name: str, lines: list[Line], seconds: float) -> None:
    for line in lines:
        colour = COLOURS[line.status]
        text = f"[{colour}]{line.status:8}[/] {name}: {line.name}"
        console.print(text, highlight=False)
        if line.status == FAILED:
            console.print(line.detail, markup=False, highlight=False)
    if seconds > 1:
        console.print(f"         [dim]{seconds:.0f} s[/]", highlight=False)


def table(report: list[dict]) -> Table:
    found = Table("", "check", "", "s", show_lines=False)
    for entry in report:
        seconds = f"{entry['seconds']:.0f}" if entry["seconds"] else ""
        for line in entry["lines"]:
            # Of an error the last line says what it was.
            colour, detail = COLOURS[line["status"]], line["detail"].rpartition("\n")[2]
            text = f"{entry['check']}: {line['name']}"
            found.add_row(f"[{colour}]{line['status']}[/]", text, detail.replace("[", r"\["), seconds)
            seconds = ""
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--only", action="append", default=[], help="checks whose name contains this; may be repeated")
    parser.add_argument("--skip", action="append", default=[], help="not those; may be repeated")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument("--patience", type=float, default=1, help="multiplies all time limits, for a busy machine")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    machine = describe_machine(arguments.device)
    device = choose_device(arguments.device, machine)
    console.print(machine | {"device": device})
    chosen = [check for check in catalogue() if _wanted(check.name, arguments.only, arguments.skip)]
    if not chosen:
        raise SystemExit(f"no check of that name; there are: {', '.join(check.name for check in catalogue())}")
    report = {**machine, "device": device, "checks": []}
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        for index, check in enumerate(chosen):
            start = time.monotonic()
            reason = obstacle(check, device, len(machine["gpus"]))
            own = Path(folder) / str(index)
            lines = [Line("all", SKIPPED, reason)] if reason else run(check, device, own, arguments.patience)
            seconds = time.monotonic() - start
            show(console, check.name, lines, seconds)
            entry = {"check": check.name, "seconds": round(seconds, 1), "lines": [dataclasses.asdict(x) for x in lines]}
            report["checks"].append(entry)
            _write(arguments.json, report)
    console.print(table(report["checks"]))
    console.print(", ".join(f"{report[status]} {status}" for status in COLOURS))
    return 1 if report[FAILED] else 0


def _write(path: Path | None, report: dict) -> None:
    """After each check: what has been found stays, whatever ends this command."""
    statuses = [line["status"] for entry in report["checks"] for line in entry["lines"]]
    report |= {status: statuses.count(status) for status in COLOURS}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def _wanted(name: str, only: list[str], skip: list[str]) -> bool:
    return (not only or any(part in name for part in only)) and not any(part in name for part in skip)


if __name__ == "__main__":
    sys.exit(main())
