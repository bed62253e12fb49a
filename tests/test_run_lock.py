"""One run a folder: whoever comes second is told by whom it is held, and nothing of the first one's is touched."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

from megatron_dgpo.errors import UsageError
from megatron_dgpo.run_lock import run_lock
from tools.tiny_models import make_tiny_model

_HOLDER = """
import subprocess, sys
from pathlib import Path
from megatron_dgpo.run_lock import run_lock
with run_lock(Path(sys.argv[1])) as held:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"], pass_fds=(held,))
    print(child.pid, flush=True)
    child.wait()
"""


def test_the_second_is_refused_and_told_by_whom(tmp_path):
    with run_lock(tmp_path / "run") as held:
        os.fstat(held)
        begin = time.monotonic()
        with pytest.raises(UsageError) as error, run_lock(tmp_path / "run", patience_s=60):
            pass
        # At once: whoever holds it runs here.
        assert time.monotonic() - begin < 30
    who = rf"in use by process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-"
    assert re.search(who, str(error.value)) and "end that run, or give another run.dir" in str(error.value)
    with run_lock(tmp_path / "run"):
        pass


def test_a_job_on_another_node_is_named(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text(json.dumps({"host": "node7", "pid": 1, "job": "123", "since": "today"}))
        with pytest.raises(UsageError, match="job 123, process 1 on node7 since today"), run_lock(tmp_path, 0.3):
            pass
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(UsageError, match="in use by another process"), run_lock(tmp_path, 0.3):
            pass


def test_a_killed_launcher_leaves_it_to_its_ranks_for_as_long_as_they_live(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        assert os.path.exists(f"/proc/{child}")
        with run_lock(tmp_path):
            # Nobody reaps it here: it has ended when it holds no file any more.
            assert not os.path.exists(f"/proc/{child}") or not os.listdir(f"/proc/{child}/fd")


def test_one_gets_it_of_many_that_start_at_once(tmp_path):
    got, refused, over = [], [], threading.Event()

    def start(number):
        try:
            with run_lock(tmp_path, 0.5):
                got.append(number)
                over.wait(30)
        except UsageError:
            refused.append(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(refused) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7


def test_a_command_on_a_folder_in_use_starts_nothing(tmp_path):
    model = make_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "data.jsonl").write_text('{"question": "1+1", "answer": "2", "response": "2"}\n')
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(tmp_path / "data.jsonl")},
        "rollout": {"context_tokens": 32, "max_response_tokens": 16},
        "sft": {"data": str(tmp_path / "data.jsonl"), "batch_size": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with run_lock(tmp_path / "run"):
        log = tmp_path / "run" / "logs" / "rank_0.log"
        log.parent.mkdir()
        log.write_text("of the run that is there")
        command = [sys.executable, "-m", "megatron_dgpo.cli", "sft", str(tmp_path / "config.yaml")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert log.read_text() == "of the run that is there"
    assert result.returncode == 2 and f"run.dir={tmp_path / 'run'} is in use by process {os.getpid()}" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "logs"]
