"""A scaling study as CSV, as a page in Markdown and as pictures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from megatron_dgpo.planning.hardware import Efficiencies
from tools.scaling import measured as measured_study
from tools.scaling.models import sizes_of
from tools.scaling.study import (
    BASE,
    BASE_GPUS,
    BOUNDS,
    CLUSTERS,
    COLUMNS,
    LONG,
    MOST_STALENESS,
    PHASES,
    SCALINGS,
    TEXTS,
    WHOLE,
    Ahead,
    Row,
)

# Okabe and Ito's colours, which colour-blind readers tell apart; a second round is dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Phases and bounds over GPUs are drawn for these: a small, a middle and a large dense model, and a mixture.
_DRAWN = ("Qwen2.5-7B", "Qwen2.5-32B", "Qwen2.5-72B", "Qwen3-235B-A22B")
PICTURES = ("scaling_throughput.png", "scaling_phases.png", "scaling_bounds.png", "scaling_measured.png")
_NAMES = {"rollout": "rollout", "reference": "reference", "policy": "old log-probs", "update": "policy update"}
_NAMES |= {"sync": "weight sync"}


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(getattr(row, name)) for name in COLUMNS] for row in rows)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(**{name: _value(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]


def _cell(value) -> str:
    if value is None:
        return ""
    # Six digits: more say nothing, and the same on every machine.
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str):
    if name in ("cluster", "model", "scaling", "reason"):
        return text
    if text == "":
        return None
    return text if name in TEXTS else int(text) if name in WHOLE else float(text)


# The page


def page(rows: list[Row], ahead: list[Ahead], efficiencies: Efficiencies, measured: dict | None, command: str) -> str:
    """The whole page; without `measured` its part says how to get it. The same for the same arguments."""
    long = [row for row in rows if row.scaling in LONG]
    rows = [row for row in rows if row.scaling not in LONG]
    parts = [_introduction(rows, efficiencies, command), _fits(rows), _overview(rows), _strong(rows), _weak(rows)]
    parts += [
        _ahead(ahead, rows),
        _long(long),
        _phases(rows),
        _bounds(rows),
        _cost(rows),
        _layouts(rows),
        _approximations(),
    ]
    parts.append(_measured(measured))
    return "\n\n".join(parts) + "\n"


def _introduction(rows, efficiencies, command) -> str:
    changed = {name: value for name, value in asdict(efficiencies).items() if value != getattr(Efficiencies, name)}
    source = f"a calibration file ({', '.join(f'{n}={v:g}' for n, v in changed.items())})" if changed else "built in"
    clusters = "; ".join(
        f"`{name}`: {cluster.gpu.name}, {cluster.gpus_per_node} on one NVLink domain"
        for name, cluster in CLUSTERS.items()
        if any(row.cluster == name for row in rows)
    )
    return f"""# Scaling from 0.5B to 671B, 8 to 4,096 GPUs

**Everything but the last section is predicted by the planner's formulas** (`megatron_dgpo/planning/`), not measured: no
GPU has been used. How far the formulas are from published step times is what `python tools/plan_parallelism.py
--validate` prints. Efficiencies: {source}. Made by

    {command}

which also writes `benchmarks/scaling.csv`: all figures of the tables below, and those that they leave out.

**Work.** A step is {BASE.prompts} prompts × {BASE.group} responses (strong scaling: whatever the GPUs; weak scaling:
{BASE.prompts} prompts for every {BASE_GPUS} GPUs, so that both agree at {BASE_GPUS}). Prompts of {BASE.prompt_tokens}
tokens and responses of {BASE.response_tokens:,} on average, at most {BASE.max_prompt_tokens:,} and
{BASE.max_response_tokens:,}; one optimizer step; bfloat16. Clusters: {clusters}.

**Words.** tokens/s: prompt and response tokens of a step by its whole time. MFU (update): useful operations of the
policy update by its time on the trainer's GPUs; MFU (step): of sampling, reference and update by the whole step on all
GPUs; neither padding in a pipeline nor recomputation is useful. Headroom: GiB that the trainer leaves on its fullest
GPU while it trains (a sleeping vLLM server keeps 3 of them). A phase is a sum of computing, reading memory,
communicating and waiting for other pipeline stages, nothing hidden behind anything else; the bound is the largest over
the step."""


def _fits(rows: list[Row]) -> str:
    lines = []
    for cluster, model, scaling in _series(rows):
        series = _of(rows, cluster, model, scaling)
        least = next((row.gpus for row in series if not row.reason), None)
        failing = [row for row in series if row.reason]
        if failing:
            lines.append(
                [
                    model,
                    cluster,
                    scaling,
                    f"{least:,}" if least else "none",
                    f"{failing[-1].gpus:,}: {failing[-1].reason}",
                ]
            )
    text = """## What fits

Models that do not run on all numbers of GPUs: the least that do, and why the largest that does not fails (the layout
that comes closest). A vLLM server spans at most one machine, with bfloat16 weights."""
    return text + "\n\n" + _table(["model", "cluster", "scaling", "least GPUs", "why not"], lines)


def _overview(rows: list[Row]) -> str:
    text = f"""## Throughput, MFU, headroom

Weak scaling at the least number of GPUs that works, at {BASE_GPUS} and at the most.

![tokens/s and tokens/s/GPU, MFU and headroom against GPUs](scaling_throughput.png)"""
    lines = []
    for cluster, model in _models(rows):
        series = [row for row in _of(rows, cluster, model, "weak") if not row.reason]
        shown = {row.gpus: row for row in series if row in (series[0], series[-1]) or row.gpus == BASE_GPUS}
        for row in shown.values():
            lines.append(
                [model, cluster, f"{row.gpus:,}", f"{row.step_s:.0f}", f"{row.tokens_per_gpu_s:.0f}"]
                + [f"{row.mfu_update:.1%}", f"{row.mfu_step:.1%}", f"{row.headroom_gib:.0f}"]
            )
    names = ["model", "cluster", "GPUs", "step s", "tokens/s/GPU", "MFU (update)", "MFU (step)", "headroom GiB"]
    return text + "\n\n" + _table(names, lines)


def _strong(rows: list[Row]) -> str:
    text = """## Strong scaling: the same work

Thousands of tokens/s of all GPUs. Where more GPUs would make the step slower, some stay idle: *of N used*."""

    def cell(row: Row) -> str:
        idle = f" (of {row.gpus_used:,} used)" if row.gpus_used != row.gpus else ""
        return f"{row.tokens_per_s / 1e3:.1f}{idle}"

    return text + "\n\n" + _by_gpus(rows, "strong", cell)


def _weak(rows: list[Row]) -> str:
    text = """## Weak scaling: work in proportion

Tokens/s/GPU. Nearly flat, because the formulas know neither stragglers nor a network that is shared or oversubscribed,
and servers and replicas need not talk to each other while they sample: an upper bound."""
    return text + "\n\n" + _by_gpus(rows, "weak", lambda row: f"{row.tokens_per_gpu_s:.0f}")


def _ahead(ahead: list[Ahead], rows: list[Row]) -> str:
    text = f"""## Sampling ahead

Weak scaling's work with separate servers that sample up to {MOST_STALENESS} steps ahead of the training
(`rollout.max_staleness`), simulated group by group with the trainer's own rules
(`megatron_dgpo/planning/in_flight.py`); the staleness is the least that is as fast as any, to 3 %. Beside it the step
of the tables above, one phase after the other, in its own best layout."""
    alone = {(row.model, row.gpus): row for row in rows if (row.cluster, row.scaling) == ("h100", "weak")}
    lines = []
    for row in ahead:
        before = alone[row.model, row.gpus]
        lines.append(
            [row.model, f"{row.gpus:,}", f"{before.step_s:.0f}", f"{before.tokens_per_gpu_s:.0f}", str(row.staleness)]
            + [f"{row.step_s:.0f}", f"{row.tokens_per_gpu_s:.0f}", f"{before.step_s / row.step_s:.2f}"]
            + [f"{row.ranks_wait:.0%}", f"{row.servers_busy:.0%}", row.trainer, row.servers]
        )
    names = ["model", "GPUs", "step s", "tokens/s/GPU", "staleness", "step s", "tokens/s/GPU", "times as fast"]
    return text + "\n\n" + _table([*names, "ranks wait", "servers decode", "trainer", "vLLM servers"], lines)


def _long(rows: list[Row]) -> str:
    text = f"""## Long responses

{BASE.prompts} prompts × {BASE.group} responses of at most 65,536 or 131,072 tokens, and a quarter of that on average.
(Longer than these models were trained for: it is their sizes that are planned.) Phases as below, in percent."""
    lines = [
        [
            row.model,
            row.scaling,
            f"{row.gpus:,}",
            *([row.reason, "–", "–", "–", "–"] if row.reason else _long_cells(row)),
        ]
        for row in rows
    ]
    names = ["model", "longest", "GPUs", "step s", "tokens/s/GPU", "phases", "trainer", "vLLM servers"]
    return text + "\n\n" + _table(names, lines)


def _long_cells(row: Row) -> list[str]:
    return [f"{row.step_s:,.0f}", f"{row.tokens_per_gpu_s:.0f}", _shares(row), row.trainer, row.servers]


def _shares(row: Row) -> str:
    return " / ".join(f"{getattr(row, f'share_{name}'):.0%}"[:-1] for name in PHASES if name != "policy")


def _phases(rows: list[Row]) -> str:
    text = f"""## Share of each phase

Strong scaling, in percent: rollout / reference / policy update / weight sync. (Old log-probs are the update's own with
one optimizer step.) With more GPUs for the same work the update shrinks and the longest response remains:
{BASE.max_response_tokens:,} decoding steps one after the other.

![share of each phase against GPUs](scaling_phases.png)"""

    return text + "\n\n" + _by_gpus(rows, "strong", _shares)


def _bounds(rows: list[Row]) -> str:
    lines = []
    for cluster, model, scaling in _series(rows):
        series = [row for row in _of(rows, cluster, model, scaling) if not row.reason]
        if series:
            lines.append([model, cluster, scaling, _ranges(series)])
    text = """## Where each bound takes over

The largest part of a step's time: computing, reading memory (decoding, element-wise kernels, the optimizer), the
network (tensor-parallel, expert, data-parallel and weight traffic) or the pipeline's bubble.

![share of each bound against GPUs](scaling_bounds.png)"""
    return text + "\n\n" + _table(["model", "cluster", "scaling", "bound by number of GPUs"], lines)


def _ranges(series: list[Row]) -> str:
    """`compute 8–64, memory 128–4,096`."""
    runs: list[tuple[str, list[int]]] = []
    for row in series:
        if not runs or runs[-1][0] != row.bound:
            runs.append((row.bound, []))
        runs[-1][1].append(row.gpus)
    return ", ".join(f"{bound} {_span(gpus)}" for bound, gpus in runs)


def _span(gpus: list[int]) -> str:
    return f"{gpus[0]:,}" if len(gpus) == 1 else f"{gpus[0]:,}–{gpus[-1]:,}"


def _cost(rows: list[Row]) -> str:
    runs = [row for row in rows if not row.reason]
    most = max(row.over_grpo_with_kl for row in runs)
    text = f"""## What DGPO costs over GRPO

Time of a whole step, in the same layout, weak scaling at the least number of GPUs, at {BASE_GPUS} and at the most. GRPO
with a KL term pays for the reference pass and the reference's logits as well; DGPO adds the midpoint's sums, counted as
one more reading of both models' tiles of logits: an upper bound, {most:.2%} at most over all rows. Over GRPO without a
reference it is the reference's pass and logits, too. The paper reports 3.6 %. (GRPO without a reference could put the
memory it saves to use: not counted.)"""
    lines = []
    for cluster, model in _models(rows):
        series = [row for row in _of(rows, cluster, model, "weak") if not row.reason]
        shown = [row for row in series if row in (series[0], series[-1]) or row.gpus == BASE_GPUS]
        lines += [
            [model, cluster, f"{row.gpus:,}", f"{row.over_grpo_with_kl:+.2%}", f"{row.over_grpo:+.1%}"] for row in shown
        ]
    names = ["model", "cluster", "GPUs", "over GRPO with the same reference pass", "over GRPO without a reference"]
    return text + "\n\n" + _table(names, lines)


def _layouts(rows: list[Row]) -> str:
    text = """## Best layouts

Weak scaling. TP tensor (+SP sequence), PP pipeline, VP chunks a stage, CP context, EP expert, DP data parallel;
sharded: distributed optimizer; tokens: most of a rank's micro-batch. The CSV has strong scaling's."""
    lines = []
    for cluster, model in _models(rows):
        for row in _of(rows, cluster, model, "weak"):
            if not row.reason:
                lines.append([model, cluster, f"{row.gpus:,}", row.trainer, row.servers])
    return text + "\n\n" + _table(["model", "cluster", "GPUs", "trainer", "vLLM servers"], lines)


def _approximations() -> str:
    parameters = sizes_of("671B-mixture").parameters / 1e9
    return f"""## What is approximated

- `671B-mixture` has DeepSeek-V3's sizes as far as this trainer's model can express them ({parameters:.0f} B
  parameters): multi-head latent attention is grouped-query attention (128 heads of 128, 2 key/value groups: 512 numbers
  a token and layer in the cache for MLA's 576; tensor parallelism of at most 2 in training); the shared expert is a
  ninth routed one; the three dense layers are mixtures; 56 layers for 61, a prime number that no pipeline divides; no
  multi-token prediction; bfloat16 for FP8. It is not a model that this trainer can load.
- `b200-nvl64` is the planner's B200 with 64 GPUs on one NVLink domain, as of an NVL72, for models whose vLLM server
  does not fit a machine of eight H100. A GB200's own memory and rates differ by a few percent, and its domain is made
  of hosts with four GPUs: servers of more are not what this trainer's launcher starts today.
- Micro-batches are filled as the trainer fills them, of lengths spread evenly over their distribution; replicas share a
  step's sequences out so that none has more work than another, but for the longest sequence. Very small pieces of
  sequences, of many context-parallel ranks, are computed as efficiently as large ones.
- Experts get equal shares of the tokens. Rings of all sizes reach the same share of a link's bandwidth, and have no
  latency in training.
- Grading, batching, checkpoints and the start of a run are left out; rollouts overlap with training under *Sampling
  ahead* alone."""


def _measured(measured: dict | None) -> str:
    title = "## Measured beside predicted, on a CPU"
    if measured is None:
        return f"{title}\n\nNot measured yet: `python tools/scaling_study.py --measure`."
    largest, model, curve, ranks = measured_study.deviations(measured)[0]
    median = statistics.median(abs(item[0]) for item in measured_study.deviations(measured))
    machines = "; ".join(
        f"{n}: {m['flops'] / 1e9:.0f} GFLOP/s, copies {m['copy'] / 1e9:.1f} GB/s"
        + (f", all-reduces {m['activations'] / 1e9:.2f} and {m['gradients'] / 1e9:.2f} GB/s" if int(n) > 1 else "")
        for n, m in measured["machines"].items()
    )
    lines = [
        [name, curve_name, str(point["ranks"]), f"{point['measured']:.2f}", f"{point['predicted']:.2f}"]
        + [f"{point['measured'] / point['predicted'] - 1:+.0%}"]
        for name in measured_study.MODELS
        for curve_name, points in measured_study.curves(measured, name).items()
        for point in points[1:]
    ]
    one_rank = ", ".join(
        f"{step['model']} {step['measured_s']:.2f} s measured, {step['predicted_s']:.2f} s predicted"
        for step in measured["steps"]
        if step["ranks"] == 1
    )
    load = f"load {measured['least_load']:.0f} to {measured['most_load']:.0f}"
    text = f"""{title}

The trainer's own policy update (`Policy.step` with DGPO's loss) over gloo, one thread a rank, on {measured["cores"]}
cores: **four ranks share them**, and other work was on the machine ({load}). {measured_study.RESPONSES} responses of
{measured_study.RESPONSE_TOKENS} tokens after prompts of {measured_study.PROMPT_TOKENS}, micro-batches of one; "DP,
weak" has as many for every rank. The fastest step of {measured["rounds"]} rounds counts. The formulas get one rank's
rates, measured in the same run while all ranks are busy ({machines}).

Both are scaled to 1 at one rank: the shape is compared, not the time (one rank: {one_rank}). **The largest deviation of
shape is {largest:+.0%}** ({model}, {curve}, {ranks} ranks); the median is {median:.0%}.

![measured and predicted time of a step against ranks](scaling_measured.png)"""
    names = ["model", "curve", "ranks", "measured, of one rank's time", "predicted", "deviation"]
    return text + "\n\n" + _table(names, lines)


def _by_gpus(rows: list[Row], scaling: str, cell: Callable[[Row], str]) -> str:
    counts = sorted({row.gpus for row in rows})
    lines = []
    for cluster, model in _models(rows):
        found = {row.gpus: cell(row) for row in _of(rows, cluster, model, scaling) if not row.reason}
        lines.append([model, cluster, *(found.get(gpus, "–") for gpus in counts)])
    return _table(["model", "cluster", *(f"{gpus:,}" for gpus in counts)], lines)


def _table(names: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))


def _series(rows: list[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row.cluster, row.model, row.scaling) for row in rows))


def _models(rows: list[Row]) -> list[tuple[str, str]]:
    """(cluster, model) of which at least one row runs."""
    return list(dict.fromkeys((row.cluster, row.model) for row in rows if not row.reason))


def _of(rows: Iterable[Row], cluster: str, model: str, scaling: str) -> list[Row]:
    return [row for row in rows if (row.cluster, row.model, row.scaling) == (cluster, model, scaling)]


# Pictures


def draw(folder: Path, rows: list[Row], measured: dict | None) -> None:
    rows = [row for row in rows if row.scaling not in LONG]
    _draw_throughput(folder / PICTURES[0], rows)
    phases = [(f"share_{name}", _NAMES[name]) for name in PHASES if name != "policy"]
    _draw_shares(folder / PICTURES[1], rows, phases, "Share of each phase of a step (predicted)")
    bounds = [(f"bound_{name}", name) for name in BOUNDS]
    _draw_shares(folder / PICTURES[2], rows, bounds, "What a step's time goes to (predicted)")
    if measured:
        _draw_measured(folder / PICTURES[3], measured)


def _draw_throughput(path: Path, rows: list[Row]) -> None:
    panels = (
        ("strong scaling: tokens/s", "strong", "tokens_per_s", "log"),
        ("weak scaling: tokens/s/GPU", "weak", "tokens_per_gpu_s", "log"),
        ("weak scaling: MFU of the update, useful tokens", "weak", "mfu_update", "linear"),
        ("weak scaling: headroom of the trainer (GiB)", "weak", "headroom_gib", "linear"),
    )
    figure, axes = _figure(2, 2, (11, 8))
    for axis, (title, scaling, name, scale) in zip(axes.flat, panels, strict=True):
        for number, (cluster, model) in enumerate(_models(rows)):
            series = [row for row in _of(rows, cluster, model, scaling) if not row.reason]
            style = dict(color=_COLOURS[number % len(_COLOURS)], linestyle="-" if number < len(_COLOURS) else "--")
            label = model if cluster == "h100" else f"{model}, {cluster}"
            axis.plot(
                [r.gpus for r in series], [getattr(r, name) for r in series], "o", ms=3, lw=1.4, label=label, **style
            )
        _log_gpus(axis, rows)
        axis.set_yscale(scale)
        _plain(axis, title)
        if scale == "linear":
            axis.set_ylim(bottom=0)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    _save(figure, path, "Ten models over 8 to 4,096 GPUs (predicted)")


def _draw_shares(path: Path, rows: list[Row], names: list[tuple[str, str]], title: str) -> None:
    figure, axes = _figure(len(SCALINGS), len(_DRAWN), (12, 6))
    for line, scaling in zip(axes, SCALINGS, strict=True):
        for axis, model in zip(line, _DRAWN, strict=True):
            series = [row for row in _of(rows, "h100", model, scaling) if not row.reason]
            values = [[getattr(row, name) for row in series] for name, _ in names]
            axis.stackplot([r.gpus for r in series], values, labels=[label for _, label in names], colors=_COLOURS)
            _log_gpus(axis, rows)
            axis.set_ylim(0, 1)
            _plain(axis, f"{model}, {scaling}")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    _save(figure, path, title)


def _draw_measured(path: Path, measured: dict) -> None:
    figure, axes = _figure(1, len(measured_study.MODELS), (11, 4.5))
    for axis, model in zip(axes.flat, measured_study.MODELS, strict=True):
        for number, (curve, points) in enumerate(measured_study.curves(measured, model).items()):
            ranks = [point["ranks"] for point in points]
            for kind, style in (("measured", "o-"), ("predicted", "x--")):
                values = [point[kind] for point in points]
                label = curve if kind == "measured" else None
                axis.plot(ranks, values, style, color=_COLOURS[number], label=label, lw=1.4, ms=5)
        axis.set_xticks([1, 2, 4])
        axis.set_xlabel("ranks")
        axis.set_ylim(bottom=0)
        _plain(axis, f"{model} parameters: time of a policy update, of one rank's")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    _save(figure, path, f"Measured (solid) and predicted (dashed) over gloo, {measured['cores']} cores")


def _figure(lines: int, columns: int, size: tuple[float, float]):
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _log_gpus(axis, rows: list[Row]) -> None:
    counts = sorted({row.gpus for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xlim(counts[0], counts[-1])
    axis.xaxis.set_major_locator(FixedLocator(counts[::3]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{gpus:,}" for gpus in counts[::3]])
    axis.set_xlabel("GPUs")


def _plain(axis, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    figure.savefig(path, dpi=110)
