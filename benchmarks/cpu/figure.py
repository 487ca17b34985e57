"""Time against the number of rows, with the machine's floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cpu import report

COLUMNS = 2


def draw(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = sorted((row for row in rows if row["peer"] == peer), key=lambda row: row["tokens"])
        x, y = [row["tokens"] for row in mine], [row["us"] for row in mine]
        spread = [[row["us"] - row["us_lower"] for row in mine], [row["us_upper"] - row["us"] for row in mine]]
        axes.errorbar(x, y, spread, marker="o", markersize=3, capsize=2, linewidth=1, label=peer)
    own = sorted((row for row in rows if row["peer"] == "ferrum int8"), key=lambda row: row["tokens"])
    tokens = [row["tokens"] for row in own]
    bandwidth = [row["bytes"] / row["read_gb_per_s"] / 1e3 for row in own]
    axes.plot(tokens, bandwidth, "k--", linewidth=1, label="floor: int4 bytes read once")
    if own and own[0]["int8_gop_per_s"]:
        peak = [row["operations"] / row["int8_gop_per_s"] / 1e3 for row in own]
        axes.plot(tokens, peak, "k:", linewidth=1, label="floor: int8 dot products")
    axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="microseconds", title=title)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set_ylim(bottom=0.5 * min(bandwidth))
    axes.grid(True, which="major", alpha=0.3)


def draw_all(experts: list[dict[str, Any]], linear: list[dict[str, Any]]) -> Path:
    """Write the figure: a panel for the experts and one for every linear layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"routed experts of a Qwen3-30B-A3B layer": experts} if experts else {}
    for row in linear:
        panels.setdefault(f"linear K={row['in_features']} N={row['out_features']}", []).append(row)
    lines = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(12, 4.5 * lines), layout="constrained", squeeze=False)
    for ax, (title, rows) in zip(axes.flat, panels.items()):
        draw(ax, rows, title)
        ax.legend(fontsize="small")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    path = report.RESULTS / "cpu_peers.png"
    figure.savefig(path, dpi=110)
    return path
