"""`megatron-dgpo launch --dry-run`: what it prints is what bash and sbatch would read. tests/slurm/ submits it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgpo.cli import main
from megatron_dgpo.cluster import DEVICE

CONFIG = Path(__file__).parents[1] / "examples" / "arithmetic" / "config.yaml"


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")


def printed(capsys, *arguments: str) -> str:
    assert main(["launch", str(CONFIG), "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    return text


def components(text: str) -> list[dict[str, str]]:
    """The #SBATCH options, one dict for each component of the job."""
    found: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        if line == "#SBATCH hetjob":
            found.append({})
        elif line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[-1][name] = value
    return found


def test_one_node(capsys):
    [options] = components(printed(capsys, "--gpus-per-node=8", "--time=1:00:00"))
    assert options["nodes"] == "1" and options["gpus-per-node"] == "8" and options["time"] == "1:00:00"
    assert options["signal"].startswith("B:USR1@") and options["open-mode"] == "append" and "requeue" in options


def test_gpus_are_asked_for_unless_the_job_computes_on_cpus(capsys, monkeypatch):
    text = printed(capsys)
    [options] = components(text)
    assert "gpus-per-node" not in options and f"\nexport {DEVICE}=cpu\n" in text
    [options] = components(text := printed(capsys, "--gpus-per-node=4"))
    assert options["gpus-per-node"] == "4" and options["mem"] == "0" and DEVICE not in text
    monkeypatch.delenv(DEVICE)
    assert main(["launch", str(CONFIG), "--dry-run"]) == 2
    assert "--gpus-per-node is missing: without it SLURM gives the job none" in capsys.readouterr().err


def test_nodes_that_run_their_own_servers_make_one_component(capsys):
    [options] = components(
        text := printed(capsys, "--nodes=4", "--gpus-per-node=8", "servers.sleep=true", "servers.count=8")
    )
    assert options["nodes"] == "4" and "ROLLOUT_NODES=" not in text


def test_equal_nodes_make_one_component(capsys):
    text = printed(capsys, "--nodes=4", "--rollout-nodes=2", "--gpus-per-node=8", "--sbatch=--partition=h100")
    [options] = components(text)
    assert options["nodes"] == "6" and options["partition"] == "h100"
    assert "\nROLLOUT_NODES=2\n" in text


def test_different_nodes_make_two(capsys):
    sizes = ("--nodes=4", "--gpus-per-node=8", "--rollout-nodes=16", "--rollout-gpus-per-node=1")
    trainer, rollout = components(printed(capsys, *sizes))
    assert trainer | {"nodes": "16", "gpus-per-node": "1"} == rollout
    assert trainer["nodes"] == "4" and trainer["gpus-per-node"] == "8"


def test_the_command_line_survives_the_shell(capsys):
    overrides = ['data.template=it\'s "$HOME" `now`:\n{prompt}', "run.seed=%a"]
    [line] = [part for part in printed(capsys, *overrides).split("\n[[") if "\nset -- " in part]
    script = line[line.index("\nset -- ") :] + '\nprintf "%s\\0" "$@"'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split("\0")[:-1] == [str(CONFIG), *overrides]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--nodes=2", "--gpus-per-node=4"], "= 4 and servers.count × servers.tensor = 1 GPUs are more than the 4"),
        (
            ["--gpus-per-node=8", "servers.sleep=true", "servers.count=9"],
            "but servers.count × servers.tensor = 9 workers",
        ),
        (["--gpus-per-node=8", "servers.sleep=true", "servers.count=4"], "let servers.count × servers.tensor be 8"),
        (
            ["--nodes=3", "--rollout-nodes=1"],
            "8 ranks do not divide over --nodes=3",
        ),
        (["--nodes=2", "--rollout-nodes=1", "--gpus-per-node=2"], "8 ranks, and the nodes have 4 GPUs"),
        (["--rollout-nodes=1", "--gpus-per-node=8", "servers.count=9"], "servers.count × servers.tensor = 9 GPUs"),
        (["--rollout-nodes=1", "--gpus-per-node=8", "servers.sleep=true"], "those of rollout nodes have others"),
        (["--rollout-nodes=1", "--gpus-per-node=3", "parallel.data=null"], "2 does not divide the nodes' 3 GPUs"),
        (["algorithm.tua=1"], "did you mean 'algorithm.tau'"),
    ],
)
def test_sizes_that_do_not_fit(capsys, arguments, expected):
    given = arguments if "parallel.data=null" in arguments else ["parallel.data=4", *arguments]
    assert main(["launch", str(CONFIG), "--dry-run", *given]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and not captured.out


def test_without_slurm(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(CONFIG)]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_needs_no_torch():
    """Login nodes may have none."""
    code = "import sys; sys.modules['torch'] = None; from megatron_dgpo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "launch", str(CONFIG), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and str(CONFIG) in result.stdout, result.stderr
