"""The picture of a run, from its metrics file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from megatron_dgpo.metrics import read_metrics

# Colours of Okabe and Ito, which colour-blind readers tell apart.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
# Title, and what is drawn: (metric, colour, legend).
_PANELS = (
    ("reward", (("rollout/reward", _BLUE, ""),)),
    ("accuracy", (("rollout/accuracy", _BLUE, "sampled in training"), ("eval/accuracy", _ORANGE, "held out"))),
    ("entropy of the policy (nats)", (("policy/entropy", _BLUE, ""),)),
    ("mean deviation from the reference", (("policy/deviation", _BLUE, ""),)),
    ("effective share of tokens", (("credit/effective_share", _BLUE, ""),)),
    ("response length (tokens)", (("rollout/response_length", _BLUE, ""),)),
)
_COLUMNS = 3
# A metric with fewer points is drawn with a mark at each.
_FEW = 25


def plot_run(metrics_file: Path, picture: Path, title: str) -> Path:
    """Draw reward, accuracy, entropy, mean H², effective share and response length against steps as a PNG."""
    rows = read_metrics(metrics_file)
    last = max((row["step"] for row in rows), default=0)
    figure = Figure(figsize=(11, 5.5), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(_PANELS) // _COLUMNS), _COLUMNS)
    for axis, (name, series) in zip(axes.flat, _PANELS, strict=True):
        for metric, colour, label in series:
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    linewidth=1.5,
                    marker="o" if len(points) < _FEW else None,
                    markersize=3.5,
                )
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", color="grey")
        elif any(label for _, _, label in series):
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    return picture
