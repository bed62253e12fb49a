"""Traces of the steps and the rank that are named, and of no others."""

import gzip
import json

from megatron_dgpo.config import Run
from megatron_dgpo.metrics import MetricsLog
from megatron_dgpo.trace import traced
from tests.ranks import run_ranks


def three_steps(folder):
    import torch

    settings = Run(dir=folder, trace_steps=(1, 3), trace_rank=1)
    with MetricsLog(folder, "train", visible=False) as log:
        for step in (1, 2, 3):
            with traced(settings, step), log.phase("policy"):
                torch.ones(4, 4) @ torch.ones(4, 4)


def test_traces(tmp_path):
    run_ranks(three_steps, 2, tmp_path)
    files = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in files] == ["step_00000001.rank_1.json.gz", "step_00000003.rank_1.json.gz"]
    events = json.loads(gzip.decompress(files[1].read_bytes()))["traceEvents"]
    [phase] = [event for event in events if event["name"] == "policy" and event.get("ph") == "X"]
    [product] = [event for event in events if event["name"] == "aten::mm" and event.get("ph") == "X"]
    assert phase["ts"] <= product["ts"] and product["ts"] + product["dur"] <= phase["ts"] + phase["dur"]
