"""The report's plots: times over ours, memory against N, rates against the roofline. PNG for the page, SVG to zoom into."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from results import LARGE, Entry, Run, core_groups, exponent, find, leader, plots_of, series

OURS = "#c1272d"
# a colour for each peer, the same in every plot and every run
COLOURS = {
    "plain SDPA": "#33608c",
    "timm ViT with SDPA": "#33608c",
    "convit without GPSA": "#86a9cf",
    "timm eager": "#8a8a8a",
    "timm convit eager": "#8a8a8a",
    "SDPA + dense P@v": "#c9a227",
    "convit sdpa": "#e39a8e",
    "convit reference": "#d9c8c0",
    "convit.accelerate(timm)": "#a0522d",
    "convit.optimize": "#d9707a",
    "convit.optimize as it comes": "#8c1c2b",
    "OpenVINO as it comes": "#2b2a5e",
    "torch.compile(timm)": "#5b8c5a",
    "torch.compile(convit)": "#e8a0a8",
    "torch.compile(ViT)": "#a3c4a2",
    "SDPA flash": "#4f7fb0",
    "SDPA cuDNN": "#6c99c6",
    "SDPA efficient": "#9dbfdf",
    "FlexAttention x 2": "#8067a8",
    "ONNX Runtime": "#5aa3a8",
    "OpenVINO": "#4b4b8f",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.hashsalt": "convit",
    "svg.fonttype": "none",
    "figure.dpi": 160,
}


def _colour(peer: str, ours: str) -> str:
    return OURS if peer == ours else COLOURS.get(peer, "#555555")


def _plain(value: float, _position=None) -> str:
    return f"{value:g}"


def draw(run: Run, stem: Path) -> None:
    """Write ``stem``-speed, -memory and -roofline as PNG and SVG, those that the run has something to show in."""
    make = {"speed": speed, "memory": memory, "roofline": roofline}
    with plt.rc_context(STYLE):
        for name in plots_of(run):
            figure = make[name](run)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                figure.savefig(f"{stem}-{name}.{kind}", bbox_inches="tight", metadata=metadata)
            plt.close(figure)


def _place(e: Entry) -> str:
    return f"{e.problem['threads']} thread{'s' * (e.problem['threads'] > 1)}" if e.problem["device"] == "cpu" else e.problem["dtype"]


def _panels(run: Run) -> list[tuple[str, list[tuple[str, list[Entry]]]]]:
    most = run.threads
    core = [g for g in core_groups(run) if g[0].problem["threads"] == most and leader(g)]
    dtypes = list(dict.fromkeys(g[0].problem["dtype"] for g in core))
    core = [g for g in core if g[0].problem["dtype"] == dtypes[-1]] if dtypes else []
    models = [g for g in run.kind("model") if g[0].problem["threads"] == most and leader(g)]
    panels = []
    for backward, title in ((False, "attention core, forward"), (True, "attention core, forward + backward")):
        rows = [(f"B {g[0].problem['batch']}, N {g[0].tokens}, H {g[0].problem['heads']}", g) for g in core]
        panels.append((title, [row for row in rows if row[1][0].problem["backward"] == backward]))
    for train, title in ((False, "whole model, inference"), (True, "whole model, training step")):
        some = [g for g in models if g[0].problem.get("train", False) == train]
        panels.append((title, [(f"{g[0].problem['name'].removeprefix('convit_')}, batch {g[0].problem['batch']}", g) for g in some]))
    return [panel for panel in panels if panel[1]]


def speed(run: Run):
    """Bars of each competitor's time over ours, a panel for each pass, two beside each other: a page shows them half as wide as drawn."""
    panels = _panels(run)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # numbers stand clear of the line at 1
    heights = [sum(len(g) + 0.9 for _, g in rows) for _, rows in panels]
    columns = min(2, len(panels))
    ratios = [max(heights[i : i + columns]) for i in range(0, len(panels), columns)]  # bars are equally thick in all panels
    size = (4.2 * columns, 0.3 + 0.75 * len(ratios) + 0.16 * sum(ratios))
    figure, axes = plt.subplots(len(ratios), columns, figsize=size, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    seen: dict[str, str] = {}
    times = [e.over(leader(g)) for _, rows in panels for _, g in rows for e in g]
    log = max(times) > 4  # one kind of axis for all
    for number, (ax, (title, rows)) in enumerate(zip(axes.flat, panels, strict=False)):
        y, ticks = 0.0, []
        widest = 1.0
        for label, entries in rows:
            mine = leader(entries)
            ordered = sorted(entries, key=lambda e, mine=mine: e.over(mine))
            ticks.append((y + (len(ordered) - 1) / 2, label))
            for e in ordered:
                value, is_ours = e.over(mine), e.peer == mine.peer
                seen[e.peer] = _colour(e.peer, mine.peer)
                ax.barh(y, value, height=0.82, color=seen[e.peer], linewidth=0)
                ax.text(value, y, f" {value:.2f}" if value < 10 else f" {value:.1f}", va="center", fontsize=7.5, color="#222222",
                        fontweight="bold" if is_ours else "normal", bbox=clear)  # fmt: skip
                widest = max(widest, value)
                y += 1
            y += 0.9
        ax.axvline(1, color=OURS, linewidth=0.9, zorder=0)
        ax.set(title=title, xscale="log" if log else "linear", xlabel=f"time over ours ({_place(rows[0][1][0])}), less is faster")
        ax.set_xlim(min(0.3, 0.7 * min(times)) if log else 0, widest * (1.5 if log else 1.15))
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
        if log:
            ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(ratios[number // columns] - 0.9, -0.9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in seen.values()]
    if ratios[-1] - heights[-1] > 1.4 * len(seen):  # the last panel has room for the legend
        ax.legend(handles, list(seen), loc="lower center", fontsize=8, frameon=True, framealpha=1, edgecolor="none")
    else:
        figure.legend(handles, list(seen), loc="upper center", ncols=min(len(seen), 4), bbox_to_anchor=(0.5, 0.0), fontsize=8)
    figure.suptitle(run.record["device"], x=0.01, ha="left", fontsize=9, color="#666666")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / size[1]))
    return figure


def memory(run: Run):
    """Peak bytes of one forward pass, with what is held between passes, against the number of patches."""
    figure, ax = plt.subplots(figsize=(5.2, 3.6))
    found = series(run, "tokens")
    ours = next(iter(found), None)
    labels = []
    for peer, entries in found.items():
        sized = [(e.tokens, (e.info["peak"] + e.info["held"]) / 1e6) for e in entries if e.info.get("peak")]
        if len(sized) < 2:
            continue
        x, y = zip(*sized, strict=True)
        mine = peer == ours
        ax.plot(x, y, marker="o", markersize=4, linewidth=2 if mine else 1.4, color=_colour(peer, ours), zorder=3 if mine else 2)
        large = [point for point in sized if point[0] >= LARGE]
        law = f"  ∝ N$^{{{exponent(large):.1f}}}$" if len(large) > 1 else ""
        labels.append((y[-1], peer + law, _colour(peer, ours)))
    # beside the last points, moved apart where two would overlap
    height = float("-inf")
    for value, text, colour in sorted(labels):
        height = max(math.log10(value), height + 0.16)
        ax.annotate(text, (x[-1], 10**height), (7, 0), textcoords="offset points", va="center", color=colour, fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="patches N", ylabel="peak memory of a forward pass, MB")
    ax.set_title("Memory against the number of patches (batch 1, 4 heads of 48)", pad=10)
    ticks = sorted({e.tokens for entries in found.values() for e in entries})
    ticks = [t for t, after in zip(ticks, [*ticks[1:], math.inf], strict=False) if after > 1.4 * t]  # the labels must not overlap
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.grid(axis="y", zorder=0)
    ax.margins(x=0.05)
    figure.tight_layout()
    return figure


def roofline(run: Run):
    """Arithmetic rate of ours and of plain attention against what the machine can do, for the widest thread count."""
    figure, ax = plt.subplots(figsize=(5.6, 3.8))
    groups = [g for g in core_groups(run) if leader(g)]
    threads = sorted({g[0].problem["threads"] for g in groups})
    keys = {f"{g[0].problem['device']} {g[0].problem['dtype']} {g[0].problem['threads']}": g[0] for g in groups}
    intensities = [e.info["flops"] / e.info["bytes"] for g in groups for e in g] or [1.0]
    low, high = min(intensities) / 12, max(intensities) * 2
    for key, e in keys.items():
        peaks = run.record["rooflines"][key]
        ridge = peaks["flops"] / peaks["bytes"]
        xs = [low, *([ridge] if low < ridge < high else []), high]
        ys = [min(peaks["flops"], peaks["bytes"] * x) / 1e9 for x in xs]
        ax.plot(xs, ys, color="#444444", linewidth=1.2)
        ax.annotate(f"{_place(e)}: {peaks['flops'] / 1e9:.0f} GFLOP/s", (high, ys[-1]), (0, 4), textcoords="offset points",
                    ha="right", fontsize=7.5, color="#444444")  # fmt: skip
    seen = {}
    for g in groups:
        mine, plain = leader(g), find(g, "plain SDPA")
        for e in (plain, mine):
            if e is None:
                continue
            marker = {1: "o", threads[-1]: "s"}.get(e.problem["threads"], "D")
            x, y = e.info["flops"] / e.info["bytes"], e.info["flops"] / e.median / 1e9
            colour = _colour(e.peer, mine.peer)
            filled = e.problem["backward"]
            ax.plot(x, y, marker, markersize=5.5, color=colour, markerfacecolor=colour if filled else "white", markeredgewidth=1.3)
            seen[e.peer] = colour
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour, label=peer) for peer, colour in seen.items()]
    shapes = [("o", "white", "forward"), ("o", "#777777", "forward + backward")]
    if len(threads) > 1:
        shapes += [("o", "white", f"{threads[0]} thread"), ("s", "white", f"{threads[-1]} threads")]
    handles += [plt.Line2D([], [], marker=m, linestyle="", color="#777777", markerfacecolor=f, label=label) for m, f, label in shapes]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=7.5)
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="arithmetic per byte that must move (FLOP/B)", ylabel="GFLOP/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_locator(NullLocator())
    ax.grid(which="major", zorder=0)
    ax.set_title("Attention core against the measured roofline", pad=10)
    figure.tight_layout()
    return figure
