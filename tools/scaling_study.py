"""How training scales from 0.5B to 671B parameters and from 8 to 4,096 GPUs, by the planner's formulas.

    python tools/scaling_study.py                                  # predictions: about ten minutes on two cores
    python tools/scaling_study.py --measure                        # and real steps of small models on this machine
    python tools/scaling_study.py --calibration cluster.json       # with efficiencies measured on your cluster

Writes benchmarks/scaling.csv and scaling_ahead.json, docs/scaling.md and docs/scaling_*.png below --out, and with
--measure benchmarks/scaling_measured.json, which later runs without it show again. A calibration is a JSON object of
fields of Efficiencies in megatron_dgpo/planning/hardware.py, for example {"gemm": 0.61, "network": 0.7,
"collective_s": 9e-6}.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.errors import UsageError  # noqa: E402
from megatron_dgpo.planning.hardware import Efficiencies, read_calibration  # noqa: E402
from tools.scaling import measured as measured_study  # noqa: E402
from tools.scaling import page, study  # noqa: E402

_COMMAND = "python tools/scaling_study.py"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        efficiencies = read_calibration(options.calibration) if options.calibration else Efficiencies()
        tables, docs = options.out / "benchmarks", options.out / "docs"
        for folder in (tables, docs):
            folder.mkdir(parents=True, exist_ok=True)
        record = tables / "scaling_measured.json"
        if options.measure:
            # First: the predictions would take its cores.
            record.write_text(json.dumps(measured_study.measure(options.rounds), indent=1) + "\n")
        measured = json.loads(record.read_text()) if record.is_file() else None
        start = time.perf_counter()
        found, ahead = _study(efficiencies, options.workers)
        page.write_csv(tables / "scaling.csv", found)
        (tables / "scaling_ahead.json").write_text(json.dumps([asdict(row) for row in ahead], indent=1) + "\n")
        # From the file: the page says what the table says.
        rows = page.read_csv(tables / "scaling.csv")
        command = _COMMAND + (" --measure" if measured else "")
        command += f" --calibration {options.calibration.name}" if options.calibration else ""
        (docs / "scaling.md").write_text(page.page(rows, ahead, efficiencies, measured, command))
        page.draw(docs, rows, measured)
    except (UsageError, OSError) as error:
        print(f"scaling_study: {error}", file=sys.stderr)
        return 2
    running = sum(not row.reason for row in rows)
    seconds = time.perf_counter() - start
    print(f"{running} of {len(rows)} rows run, the others say why not; {seconds:.0f} s; {docs / 'scaling.md'}")
    if measured:
        deviation, model, curve, ranks = measured_study.deviations(measured)[0]
        print(
            f"measured beside predicted: largest deviation of shape {deviation:+.0%} ({model}, {curve}, {ranks} ranks)"
        )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="default: here")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="JSON of measured efficiencies")
    parser.add_argument("--measure", action="store_true", help="take real steps of small models, 1 to 4 ranks")
    parser.add_argument("--rounds", type=_positive, default=3, help="of --measure; the best of all counts; default: 3")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=_positive, default=cores, help="processes; default: one a core")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of 1 or more")
    return int(text)


def _study(efficiencies: Efficiencies, workers: int) -> tuple[list[study.Row], list[study.Ahead]]:
    """Rows in study.all_series' order, then long_series', one process for each model, cluster and scaling at a time;
    and of servers that sample ahead, model by model."""
    series = [(*item, study.GPU_COUNTS) for item in study.all_series(study.ARCHITECTURES, study.CLUSTERS)]
    series += [(*item, (study.LONG_GPUS[item[1]],)) for item in study.long_series()]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        # The largest models, at the end, take longest: they go first.
        started = [pool.submit(study.series_rows, *item, efficiencies) for item in reversed(series)]
        ahead = [pool.submit(study.ahead, model, efficiencies) for model in study.AHEAD_GPUS]
        rows = [row for future in reversed(started) for row in future.result()]
        return rows, [future.result() for future in ahead]


if __name__ == "__main__":
    sys.exit(main())
