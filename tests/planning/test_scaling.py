"""The scaling study: what is committed is what the planner says today, and what cannot be is not."""

import csv
import importlib.util
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dgpo.errors import UsageError
from megatron_dgpo.planning.hardware import Efficiencies, read_calibration
from megatron_dgpo.planning.plan import Planner, choose
from tools.scaling import measured, page, study
from tools.scaling.models import ARCHITECTURES, sizes_of
from tools.scaling.study import BOUNDS, CLUSTERS, COLUMNS, GPU_COUNTS, PHASES, SCALINGS

ROOT = Path(__file__).parents[2]
TABLE, RECORD = ROOT / "benchmarks/scaling.csv", ROOT / "benchmarks/scaling_measured.json"
AHEAD = ROOT / "benchmarks/scaling_ahead.json"
STALE = "the planner has changed: run python tools/scaling_study.py"
# Billions, from the models' cards.
PARAMETERS = {
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.77,
    "Qwen3-30B-A3B": 30.5,
    "Qwen2.5-32B": 32.76,
    "Qwen2.5-72B": 72.7,
    "Qwen3-235B-A22B": 235.0,
    "Llama-3.1-405B": 405.9,
}


@pytest.fixture(scope="module")
def rows():
    return page.read_csv(TABLE)


@pytest.fixture(scope="module")
def running(rows):
    found = [row for row in rows if not row.reason]
    assert found
    return found


@pytest.mark.parametrize("model", PARAMETERS)
def test_shapes_have_the_published_parameters(model):
    assert sizes_of(model).parameters / 1e9 == pytest.approx(PARAMETERS[model], rel=5e-3)


def test_the_mixture_is_as_large_as_it_says():
    sizes = sizes_of("671B-mixture")
    active = sizes.layers * (sizes.attention_weights + sizes.active_mlp_weights) + 2 * sizes.vocab * sizes.h
    assert sizes.parameters / 671e9 == pytest.approx(1, abs=0.04)
    assert active / 37e9 == pytest.approx(1, abs=0.04)


def test_a_row_for_every_model_and_size_with_figures_or_a_reason(rows):
    expected = [(*series, gpus) for series in study.all_series(ARCHITECTURES, CLUSTERS) for gpus in GPU_COUNTS]
    expected += [(*series, study.LONG_GPUS[series[1]]) for series in study.long_series()]
    assert [(row.cluster, row.model, row.scaling, row.gpus) for row in rows] == expected
    for row in rows:
        figures = [getattr(row, name) for name in COLUMNS[COLUMNS.index("gpus_used") :]]
        assert all(value is None for value in figures) if row.reason else None not in figures, row
    # Every model runs somewhere.
    assert {row.model for row in rows if not row.reason} == set(ARCHITECTURES)


def test_a_failing_row_says_what_is_too_much(rows):
    failing = [row for row in rows if row.reason]
    assert failing
    for row in failing:
        assert "GiB available" in row.reason or "no layout divides" in row.reason, row
    largest = next(row for row in failing if (row.model, row.cluster, row.gpus) == ("671B-mixture", "h100", 4096))
    assert "vLLM at TP 8 needs" in largest.reason


def test_more_gpus_never_give_fewer_tokens_of_the_same_work(running):
    strong = [row for row in running if row.scaling == "strong"]
    for _, series in itertools.groupby(strong, key=lambda row: (row.cluster, row.model)):
        rates = [row.tokens_per_s for row in series]
        assert rates == sorted(rates)


def test_gpus_that_would_slow_a_step_down_stay_idle(monkeypatch):
    best = Planner.best

    def slower_with_more(self, gpus, placements):
        plan = best(self, 8, placements)
        return replace(plan, phases={name: phase * (gpus / 8) for name, phase in plan.phases.items()})

    monkeypatch.setattr(Planner, "best", slower_with_more)
    eight, sixteen = study.series_rows("h100", "Qwen2.5-0.5B", "strong", (8, 16), Efficiencies())
    assert sixteen.gpus == 16 and sixteen.gpus_used == eight.gpus_used == 8
    assert sixteen.tokens_per_s == eight.tokens_per_s
    assert sixteen.tokens_per_gpu_s == pytest.approx(eight.tokens_per_gpu_s / 2)


def test_shares_add_up_to_one(running):
    for row in running:
        for kind, names in (("share", PHASES), ("bound", BOUNDS)):
            shares = [getattr(row, f"{kind}_{name}") for name in names]
            assert min(shares) >= 0 and sum(shares) == pytest.approx(1, abs=1e-4), row


def test_figures_are_possible(running):
    for row in running:
        assert 0 < row.mfu_step and 0 < row.mfu_update < Efficiencies.gemm, row
        assert row.headroom_gib >= 0 and row.gpus_used <= row.gpus, row
        assert row.tokens_per_s == pytest.approx(row.tokens_per_gpu_s * row.gpus, rel=1e-4), row


def test_long_responses_run_with_context_parallelism(rows):
    long = [row for row in rows if row.scaling in study.LONG]
    assert len(long) == 4
    for row in long:
        assert not row.reason and " CP" in row.trainer, row


def test_dgpo_costs_little_over_grpo_with_the_same_reference(running):
    for row in running:
        # The paper's 3.6 % has everything in it.
        assert 0 <= row.over_grpo_with_kl < 0.036, row
        assert row.over_grpo > row.over_grpo_with_kl, row


@pytest.mark.parametrize(("model", "gpus"), (("Qwen2.5-0.5B", 8), ("Qwen2.5-7B", 16), ("Qwen3-30B-A3B", 16)))
def test_the_quick_search_finds_what_the_whole_one_chooses(model, gpus):
    cluster = CLUSTERS["h100"]
    planner = Planner(sizes_of(model), study.workload("weak", gpus), cluster)
    best, chosen = planner.best(gpus), choose(planner.search(gpus), cluster)
    assert best.step_s == pytest.approx(chosen.step_s, rel=1e-9)
    assert best.trainer_headroom(cluster) == pytest.approx(chosen.trainer_headroom(cluster))
    assert best.gpus == gpus
    for stage in range(best.trainer.pipeline):
        assert max(best.peaks(stage).values()) <= cluster.gpu.memory_bytes


@pytest.mark.parametrize("model", ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-72B", "Qwen3-30B-A3B"))
def test_the_committed_table_is_what_the_planner_says(model, tmp_path):
    # Thousands of GPUs take the search most of its time.
    counts = (8, 64)
    found = [row for scale in SCALINGS for row in study.series_rows("h100", model, scale, counts, Efficiencies())]
    page.write_csv(tmp_path / "rows.csv", found)
    committed = list(csv.reader(io.StringIO(TABLE.read_text())))
    wanted = [line for line in committed[1:] if line[:2] == ["h100", model] and int(line[3]) in counts]
    wanted = [line for line in wanted if line[2] in SCALINGS]
    assert list(csv.reader(io.StringIO((tmp_path / "rows.csv").read_text())))[1:] == wanted, STALE


def committed_ahead():
    return [study.Ahead(**row) for row in json.loads(AHEAD.read_text())]


def test_the_committed_figures_of_sampling_ahead_are_what_the_planner_says():
    # Half a minute for each model.
    assert study.ahead("Qwen2.5-1.5B", Efficiencies()) in committed_ahead(), STALE


def test_sampling_ahead_hides_the_shorter_side():
    found = committed_ahead()
    assert [(row.model, row.gpus) for row in found] == list(study.AHEAD_GPUS.items())
    for row in found:
        # One side is busy nearly always.
        assert 1 <= row.staleness <= study.MOST_STALENESS and max(1 - row.ranks_wait, row.servers_busy) > 0.85, row


def test_the_committed_page_comes_from_the_table(rows):
    record = json.loads(RECORD.read_text())
    text = page.page(rows, committed_ahead(), Efficiencies(), record, "python tools/scaling_study.py --measure")
    assert (ROOT / "docs/scaling.md").read_text() == text, STALE
    for picture in page.PICTURES:
        assert f"]({picture})" in text and (ROOT / "docs" / picture).stat().st_size > 10_000


def test_measured_steps_and_their_predictions():
    record = json.loads(RECORD.read_text())
    assert {(s["model"], s["curve"], s["ranks"]) for s in record["steps"]} == {
        (model, point.curve, point.ranks) for model in measured.MODELS for point in measured.POINTS
    }
    assert min(step["measured_s"] for step in record["steps"]) > 0
    before = [step.pop("predicted_s") for step in record["steps"]]
    measured.predict(record)
    assert [step["predicted_s"] for step in record["steps"]] == pytest.approx(before, rel=1e-6), (
        "the formulas have changed: run python tools/scaling_study.py"
    )


def test_deviation_of_shape_forgets_the_scale():
    steps = [
        dict(model=model, curve=curve, ranks=ranks, measured_s=m, predicted_s=p)
        for model in measured.MODELS
        for curve, ranks, m, p in (("one rank", 1, 10.0, 1.0), ("TP", 2, 6.0, 0.5), ("DP", 2, 4.0, 0.5))
    ]
    (first, _, curve, ranks), *_, last = measured.deviations({"steps": steps})
    assert (curve, ranks) == ("TP", 2) or curve == "DP"
    assert abs(first) == pytest.approx(0.2) and abs(last[0]) == pytest.approx(0.2)


def test_a_calibration_takes_the_place_of_the_built_in_efficiencies(tmp_path):
    file = tmp_path / "cluster.json"
    file.write_text('{"gemm": 0.5, "decode_step_s": 0}')
    values = read_calibration(file)
    assert (values.gemm, values.decode_step_s, values.network) == (0.5, 0.0, Efficiencies.network)
    (usual,) = study.series_rows("h100", "Qwen2.5-7B", "weak", (8,), Efficiencies())
    (slower,) = study.series_rows("h100", "Qwen2.5-7B", "weak", (8,), values)
    assert slower.mfu_update < usual.mfu_update


@pytest.mark.parametrize(
    ("text", "named"),
    (
        (None, "not readable"),
        ("{", "not valid JSON"),
        ("[0.6]", "JSON object"),
        ("{}", "JSON object"),
        ('{"GEMM": 0.6}', "GEMM is not one of gemm"),
        ('{"gemm": 65}', "gemm=65, expected a share"),
        ('{"gemm": 0}', "gemm=0, expected a share"),
        ('{"gemm": true}', "gemm=True, expected a share"),
        ('{"memory": "0.8"}', "memory='0.8', expected a share"),
        ('{"network": NaN}', "network=nan, expected a share"),
        ('{"decode_step_s": -1}', "decode_step_s=-1, expected seconds"),
        ('{"pcie_bandwidth": 0}', "pcie_bandwidth=0, expected bytes"),
    ),
)
def test_a_bad_calibration_is_one_clear_error(text, named, tmp_path, capsys):
    file = tmp_path / "cluster.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match="--calibration="):
        read_calibration(file)
    assert _tool().main(["--calibration", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _tool():
    spec = importlib.util.spec_from_file_location("scaling_study", ROOT / "tools/scaling_study.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool
