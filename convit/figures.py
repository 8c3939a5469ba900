"""The pictures of a training run and of a model; nothing here but drawing. A picture that fails leaves no file."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convit.engine.folder import log_lines
from convit.weights.files import BadFile, shown

Gates = Sequence[Sequence[float]]  # [layer][head]

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
# Okabe and Ito: told apart in every kind of colour vision
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_RUNS = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SUFFIXES = (".png", ".pdf", ".svg")
_LAYERS, _HEAT = "viridis", "inferno"


def read_log(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records per epoch of a run: its folder, or a ``log.jsonl``. A last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: There is no such log.
        ValueError: The log cannot be read, or has no epoch yet.
    """
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() or not path.suffix else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: RUN must be the folder of a training run (convit train --output RUN)")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(log_lines(path), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is no record: an object was expected, got {line[:40]!r}")
        if record.get("kind", "epoch") == "epoch" and "epoch" in record:
            if "gating" in record:  # the name of logs written before the gates were called by theirs
                record["gate"] = record.pop("gating")
            _check_record(path, f"line {number}", record, records[0] if records else record)
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no finished epoch yet")
    return records


def _check_record(path: Path, place: str, record: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse values of which no picture can be drawn; NaN and what is missing are left out of it."""
    if type(record["epoch"]) is not int or not 0 <= record["epoch"] < 1 << 31:
        raise BadFile(path, f"has no epoch: {shown(record['epoch'])}", place)
    for name in ("train_loss", "val_loss", "top1", "top5", "lr"):
        value = record.get(name)
        if value is not None and (type(value) not in (int, float) or not _is_drawable(value)):
            raise BadFile(path, f"must have a number for {name}, got {shown(value)}", place)
    for name in ("gate", "distance"):
        if record.get(name) and _heads(record[name]) != _heads(first.get(name) or record[name]):
            raise BadFile(path, f"must have a number for every head of every layer, as the first epoch has, for {name}", place)
        if record.get(name) and not _heads(record[name]):
            raise BadFile(path, f"must have a number for every head of every layer for {name}, got {shown(record[name])}", place)


def _heads(layers: Any) -> tuple[int, ...]:
    """How many heads each layer has; nothing for what is no list of lists of numbers."""
    if not isinstance(layers, list) or not all(isinstance(heads, list) and heads for heads in layers):
        return ()
    numbers = all(type(value) in (int, float) and _is_drawable(value) for heads in layers for value in heads)
    return tuple(map(len, layers)) if numbers else ()


def _is_drawable(value: float) -> bool:
    return not 1e300 < abs(value) < math.inf


def _seen(epochs: Sequence[int], line: str = "-") -> str:
    """The style of a curve: one of a single epoch has no line to see, but its point."""
    return line + "o" * (len(epochs) == 1)


def plot_history(log: str | os.PathLike[str] | Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Loss and accuracy over the epochs.

    Args:
        log: A run folder, a ``log.jsonl``, or its records per epoch (``train_loss``, ``val_loss``, ``top1``, ``top5``, ``lr``).
        path: The picture to write; the suffix chooses the type.
    """
    records = _records(log)
    with _figure(path, 2, (7.2, 2.8)) as (figure, (left, right)):
        for name, label, colour in (("train_loss", "training", _BLUE), ("val_loss", "validation", _ORANGE)):
            epochs, values = _series(records, name)
            if epochs:
                left.plot(epochs, values, _seen(epochs), color=colour, label=label, linewidth=1.6, markersize=4)
        left.set(xlabel="epoch", ylabel="loss", title="Loss", yscale="log" if _spans_decades(records) else "linear")
        left.legend()
        top5 = _series(records, "top5")
        for name, label, colour in (("top1", "top-1", _BLUE), ("top5", "top-5", _GREEN)):
            epochs, values = _series(records, name)
            if epochs and not (name == "top5" and min(top5[1]) >= 99.0):
                right.plot(epochs, values, _seen(epochs), color=colour, label=label, linewidth=1.6, markersize=4)
        epochs, values = _series(records, "top1")
        if epochs:
            best = int(np.argmax(values))
            right.plot(epochs[best], values[best], "o", color=_BLUE, markersize=4)
            text = f"{values[best]:.2f} % (epoch {epochs[best]})"
            side = "right" if best > len(epochs) / 2 else "left"
            # above the best value the curve never comes
            right.annotate(text, (epochs[best], values[best]), xytext=(0, 5), textcoords="offset points", ha=side, color=_BLUE)
            right.margins(y=0.14)
            _no_more_than_all(right)
            right.legend(loc="lower right")
        else:
            right.text(0.5, 0.5, "not validated", ha="center", va="center", transform=right.transAxes, color="0.5")
        right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
        _whole_epochs(left, right)
    return Path(path)


def plot_range_test(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], steepest: float | None, path: str | os.PathLike[str]
) -> Path:
    """Loss over the learning rate of a range test.

    Args:
        rates, losses, smoothed: Per step, see ``convit.engine.pytorch.range_test``.
        steepest: The rate to mark.
        path: The picture to write.
    """
    with _figure(path, 1, (4.8, 3.0)) as (figure, axes):
        axes.plot(rates, losses, color="0.75", linewidth=0.8, label="loss of the step")
        axes.plot(rates, smoothed, color=_BLUE, linewidth=1.6, label="smoothed")
        if steepest is not None:
            axes.axvline(steepest, color=_ORANGE, linewidth=1.2, linestyle="--", label=f"falls fastest: {steepest:.2g}")
        low, high = min(smoothed), max(smoothed)
        axes.set(xlabel="learning rate", ylabel="loss", title="Learning-rate range test", xscale="log")
        axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
        axes.legend()
    return Path(path)


def plot_comparison(runs: Mapping[str, Sequence[dict[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Loss and top-1 of several runs over the epochs, a colour for each.

    Args:
        runs: Their records per epoch, by the names to show.
        path: The picture to write.
    """
    if not 0 < len(runs) <= len(_RUNS):
        raise ValueError(f"1 to {len(_RUNS)} runs can be told apart in one picture, got {len(runs)}")
    with _figure(path, 2, (7.2, 3.0 + 0.16 * len(runs))) as (figure, (left, right)):
        lines = []
        for (name, records), colour in zip(runs.items(), _RUNS, strict=False):
            label = name
            for axes, key, style in ((left, "train_loss", ":"), (left, "val_loss", "-"), (right, "top1", "-")):
                epochs, values = _series(records, key)
                if epochs:
                    axes.plot(epochs, values, _seen(epochs, style), color=colour, linewidth=1.6, markersize=4)
                if epochs and key == "top1":
                    best = int(np.argmax(values))
                    right.plot(epochs[best], values[best], "o", color=colour, markersize=4)
                    label = f"{name}: best top-1 {values[best]:.2f} % (epoch {epochs[best]})"
            lines += left.plot([], [], color=colour, linewidth=2.5, label=label)
        scale = "log" if _spans_decades([record for records in runs.values() for record in records]) else "linear"
        left.set(xlabel="epoch", ylabel="loss", title="Loss (training dotted)", yscale=scale)
        right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy, top-1")
        _no_more_than_all(right)
        figure.legend(handles=lines, loc="outside lower center")
        _whole_epochs(left, right)
    return Path(path)


def plot_gates(before: Gates, after: Gates, path: str | os.PathLike[str], *, names: tuple[str, str] = ("before", "after")) -> Path:
    """The gate of every head before and after training, one column per GPSA layer.

    Args:
        before, after: sigmoid(gating) by [layer][head], as ``convit.pytorch.diagnostics.gates(model)`` gives.
        path: The picture to write.
        names: What the two are.
    """
    if [len(layer) for layer in before] != [len(layer) for layer in after] or not before:
        raise ValueError("before and after must hold the gates of the same layers and heads, at least one")
    with _figure(path, 1, (max(4.2, 1.2 + 0.55 * len(before)), 3.0)) as (figure, axes):
        for layer, (old, new) in enumerate(zip(before, after, strict=True), 1):
            spots = layer + np.linspace(-0.22, 0.22, len(old)) if len(old) > 1 else np.array([float(layer)])
            axes.vlines(spots, old, new, color="0.75", linewidth=1.2, zorder=1)
            labels = names if layer == 1 else (None, None)
            axes.scatter(spots, old, s=14, facecolors="white", edgecolors="0.45", linewidths=1, zorder=2, label=labels[0])
            axes.scatter(spots, new, s=16, color=_BLUE, zorder=3, label=labels[1])
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="GPSA layer (one point per head)", ylabel="gate", ylim=(-0.03, 1.03), title="Gates: position (1) or content (0)")
        axes.set_xticks(range(1, len(before) + 1))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return Path(path)


def plot_gates_over_time(log: str | os.PathLike[str] | Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Every gate over the epochs: a thin line per head, a thick one for the mean of a layer."""
    records = [record for record in _records(log) if record.get("gate")]
    if not records:
        raise ValueError("the log holds no gates")
    epochs = [record["epoch"] + 1 for record in records]
    layers = len(records[0]["gate"])
    with _figure(path, 1, (5.6, 3.2)) as (figure, axes):
        for layer, colour in enumerate(_colours(layers)):
            gates = np.array([record["gate"][layer] for record in records])
            axes.plot(epochs, gates, color=colour, linewidth=0.6, alpha=0.45)
            axes.plot(epochs, gates.mean(1), _seen(epochs), color=colour, linewidth=2)
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="epoch", ylabel="gate", ylim=(-0.02, 1.02), title="Gates: position (1) or content (0); mean of a layer thick")
        _whole_epochs(axes)
        _layer_bar(figure, axes, layers)
    return Path(path)


def plot_locality(log: str | os.PathLike[str] | Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Non-locality of each layer over the epochs, and the attention distance of every head at the last."""
    records = [record for record in _records(log) if record.get("distance")]
    if not records:
        raise ValueError("the log holds no attention distances")
    epochs = [record["epoch"] + 1 for record in records]
    last = records[-1]["distance"]
    local = len(records[-1].get("gate") or [])
    with _figure(path, 2, (7.6, 3.0)) as (figure, (left, right)):
        for layer, colour in enumerate(_colours(len(last))):
            means = [float(np.mean(record["distance"][layer])) for record in records]
            style = "-" if layer < local else "--"
            left.plot(epochs, means, _seen(epochs, style), color=colour, linewidth=1.6)
            right.scatter([layer + 1] * len(last[layer]), last[layer], s=14, color=colour, alpha=0.8)
        right.plot(range(1, len(last) + 1), [float(np.mean(layer)) for layer in last], color="0.3", linewidth=1, marker="_", markersize=12)
        left.set(xlabel="epoch", ylabel="mean distance (patches)", title="Non-locality (MHSA dashed)", ylim=(0, None))
        right.set(xlabel="layer", title="Distance of each head at the end", ylim=(0, None))
        right.set_xticks(range(1, len(last) + 1))
        _whole_epochs(left)
        _layer_bar(figure, left, len(last))
    return Path(path)


def plot_attention(
    model: Any,
    image: Any,
    path: str | os.PathLike[str],
    *,
    query: tuple[int, int] | None = None,
    layers: Iterable[int] | None = None,
    heads: int = 4,
    picture: Any = None,
) -> Path:
    """Where heads look from one patch of an image: a row per layer, a column per head, each on that layer's own input.

    All maps share one scale, whose root is drawn, so that a head that looks everywhere is seen beside one that looks at one patch.

    Args:
        model: A ConViT in PyTorch, on any device; left as it was.
        image: [C, H, W] or [1, C, H, W], prepared for the model.
        path: The picture to write.
        query: (row, column) of the patch that looks; default the middle of the grid. In layers with a class token the same patch looks.
        layers: Indices of the layers; default four spread over the depth.
        heads: How many heads of each layer, the first ones.
        picture: [H, W, 3] or [H, W] in 0..255 or 0..1 to show; default ``image`` stretched to its range.

    Raises:
        ValueError: The query is outside the grid, or a layer does not exist.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    from convit.pytorch.diagnostics import attention_rows, attentions

    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1:
        raise ValueError(f"image must be [C, H, W] or [1, C, H, W], got {list(image.shape)}")
    batch = batch.to(next(model.parameters()).device)
    depth = len(attentions(model))
    chosen = sorted({round(i) for i in np.linspace(0, depth - 1, min(4, depth))}) if layers is None else list(layers)
    if not chosen or not all(-depth <= layer < depth for layer in chosen):
        raise ValueError(f"layers must be among 0..{depth - 1}, got {chosen}")
    (gh, gw), (row, column), rows = attention_rows(model, batch, query)
    maps = [(f"layer {layer % depth + 1}", rows[layer].maps[:heads].numpy()) for layer in chosen]
    shown = _picture(batch[0].float().cpu().numpy() if picture is None else picture)
    height, width = shown.shape[:2]
    grey = shown.mean(-1)
    columns = 1 + max(len(layer) for _, layer in maps)
    tile = 1.45
    size = (tile * columns * min(width / height, 1.6) + 1.1, tile * len(maps) + 0.3)
    scale = PowerNorm(0.5, 0, 100 * max(float(layer.max()) for _, layer in maps))
    with _figure(path, (len(maps), columns), size, tight=True) as (figure, axes):
        for line, (name, layer) in enumerate(maps):
            for spot in range(columns):
                panel = axes[line][spot]
                panel.set(xticks=[], yticks=[])
                panel.grid(False)
                panel.spines[:].set_visible(False)
                if spot == 0:
                    panel.imshow(shown, extent=(0, gw, gh, 0), aspect=(height * gw) / (width * gh))
                    panel.add_patch(_square(column, row))
                    panel.set_ylabel(name)
                elif spot <= len(layer):
                    panel.imshow(grey, extent=(0, gw, gh, 0), aspect=(height * gw) / (width * gh), cmap="gray", vmin=0, vmax=1)
                    panel.imshow(
                        100 * layer[spot - 1],
                        extent=(0, gw, gh, 0),
                        aspect=(height * gw) / (width * gh),
                        cmap=_HEAT,
                        alpha=0.62,
                        norm=scale,
                    )
                    panel.add_patch(_square(column, row))
                    if line == 0:
                        panel.set_title(f"head {spot}")
                else:
                    panel.axis("off")
        bar = figure.colorbar(ScalarMappable(scale, _HEAT), ax=axes, aspect=40, pad=0.01, fraction=0.04)
        bar.set_label("attention per patch, %")
        bar.outline.set_visible(False)
    return Path(path)


def _square(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), 1, 1, fill=False, edgecolor="#56B4E9", linewidth=1.4)


def _picture(image: Any) -> np.ndarray:
    """[H, W, 3] in 0..1 from [C, H, W] or [H, W, C] or [H, W] of any range."""
    array = np.asarray(image, dtype=np.float64)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    low, high = array.min(), array.max()
    if low >= 0 and high <= 1:
        return array[:, :, :3]
    if low >= 0 and high > 1 and high <= 255:
        return array[:, :, :3] / 255
    return np.asarray((array[:, :, :3] - low) / max(high - low, 1e-12))


class _figure:
    """A figure in our style that becomes ``path`` when the block ends well; nothing is left of it otherwise."""

    def __init__(self, path: str | os.PathLike[str], panels: int | tuple[int, int], size: tuple[float, float], tight: bool = False) -> None:
        self.path, self.panels, self.size, self.tight = Path(path), panels, size, tight

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        self.style = matplotlib.rc_context(_STYLE)
        self.style.__enter__()
        rows, columns = self.panels if isinstance(self.panels, tuple) else (1, self.panels)
        # not pyplot: no global state, no window, whatever backend the caller uses
        engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02) if self.tight else ConstrainedLayoutEngine()
        self.figure = Figure(figsize=self.size, layout=engine)
        FigureCanvasAgg(self.figure)
        axes = self.figure.subplots(rows, columns, squeeze=False)
        if isinstance(self.panels, tuple):
            return self.figure, axes
        return self.figure, axes[0, 0] if self.panels == 1 else axes[0]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from convit.weights.files import replacing

        try:
            if kind is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as file:
                    self.figure.savefig(file, format=self.path.suffix[1:] or "png", bbox_inches="tight")
        finally:
            self.style.__exit__(kind, error, trace)


def _records(log: Any) -> Sequence[dict[str, Any]]:
    records = read_log(log) if isinstance(log, (str, os.PathLike)) else list(log)
    if not records:
        raise ValueError("log must hold at least one epoch")
    return records


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(record["epoch"] + 1, record[name]) for record in records if isinstance(record.get(name), (int, float))]
    found = [(epoch, value) for epoch, value in found if math.isfinite(value)]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _spans_decades(records: Sequence[dict[str, Any]]) -> bool:
    values = [value for name in ("train_loss", "val_loss") for value in _series(records, name)[1]]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def _colours(layers: int) -> Any:
    import matplotlib

    return matplotlib.colormaps[_LAYERS](np.linspace(0.0, 0.9, layers))


def _whole_epochs(*panels: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _no_more_than_all(axes: Any) -> None:
    """An axis of percents does not show what is past 100, but for a margin."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + 0.14 * (100 - low)))


def _layer_bar(figure: Any, axes: Any, layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ScalarMappable(BoundaryNorm(np.arange(0.5, layers + 1), layers), ListedColormap(_colours(layers)))
    bar = figure.colorbar(colours, ax=axes, ticks=range(1, layers + 1), pad=0.02, aspect=30)
    bar.set_label("layer")
    bar.outline.set_visible(False)
    bar.minorticks_off()
