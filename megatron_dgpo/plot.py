"""The picture of a run, from its metrics file."""

from __future__ import annotations

from pathlib import Path

from megatron_dgpo.metrics import read_metrics

_PANELS = (
    ("reward", (("rollout/reward", "train, sampled"),)),
    ("accuracy", (("rollout/accuracy", "train, sampled"), ("eval/accuracy", "held out"))),
    ("entropy (nats)", (("policy/entropy", "policy"),)),
    ("mean H²(π, reference)", (("policy/hellinger2", "policy"),)),
    ("effective share of tokens", (("credit/effective_share", "(Σw)² / (T·Σw²)"),)),
)


def plot_run(metrics_file: Path, picture: Path, title: str) -> Path:
    """Draw reward, accuracy, entropy, mean H² and effective share of tokens against steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_file)
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(4 * len(_PANELS), 3.2), layout="constrained")
    for axis, (label, series) in zip(axes, _PANELS, strict=True):
        for metric, name in series:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 12 else None, markersize=4, label=name
                )
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(series) > 1 and axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture
