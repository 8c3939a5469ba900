"""``convit demo``: a ConViT on real images, start to finish, in a few minutes on a laptop.

(a) The photographs that scikit-learn ships go through convit_tiny: which backend ran, how far it is from the definition, and what each
contestant costs. (b) A small ConViT learns scikit-learn's handwritten digits, is saved, read back and validated. (c) Pictures of both.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 7
BATCH = 8
DIGITS_EPOCHS = 60  # of the recipe's 100: enough for 98 % within four minutes on two cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="skip training on the digits")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="where pictures and the trained model go [runs/demo]"
    )


def run(args: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
        import timm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the demo needs {error.name}: pip install '.[train]' in the source folder") from error
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # keep the order with the progress bar on stderr
    args.output.mkdir(parents=True, exist_ok=True)
    photographs(args.output)
    if not args.quick:
        digits(args.output)


# ---- (a) photographs ----


def photographs(output: Path) -> None:
    """Classify scikit-learn's photographs, compare backends, draw attention maps."""
    import torch

    import convit
    from convit.dispatch import Problem, choose, forced_backend
    from convit.figures import plot_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names, pictures, images = _photographs()
    images = images.to(device)
    model, trained = _model()
    model.to(device)
    print(f"convit_tiny on scikit-learn's photographs, {device}, {torch.get_num_threads()} threads")
    if trained:
        _print_classes(model, names, images)
    else:
        print("  weights: its own initialisation, untrained, so its classes mean nothing; pass published weights with convit infer")

    batch = images.repeat(BATCH // len(images), 1, 1, 1)
    problem = Problem("torch", device, "float32", BATCH, 4, 196, 48, (14, 14))
    kernel = choose(problem, forced_backend(None)).__name__.rsplit(".", 1)[-1]
    with torch.no_grad():
        ours = model(batch)
        with convit.use_backend("reference"):
            difference = ((ours - model(batch)).norm() / ours.norm()).item()
    print(f"  attention ran on {kernel}; logits differ from the reference by {difference:.1e} (relative)")
    _print_table(_contestants(device), batch)
    path = output / "attention.png"
    plot_attention(model, images[0], path, picture=pictures[0])
    print(f"  {path}: where four heads of four layers look on {names[0]}")


def _photographs() -> tuple[list[str], list[Any], Any]:
    """Names, 224 x 224 pictures, and the pictures normalised as a batch [2, 3, 224, 224]."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform

    from convit.architecture import IMAGENET_MEAN, IMAGENET_STD

    data = load_sample_images()
    transform = create_transform((3, 224, 224), crop_pct=0.875, interpolation="bicubic")
    images = [transform(Image.fromarray(array)) for array in data.images]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pictures = [(image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for image in images]
    return [Path(name).name for name in data.filenames], pictures, torch.stack(images)


def _model() -> tuple[Any, bool]:
    """convit_tiny with its published weights, or with its own initialisation if they cannot be had; and whether they could."""
    import torch

    import convit

    torch.manual_seed(0)
    try:
        return convit.create_model("convit_tiny", pretrained=True).eval(), True
    except (OSError, ImportError) as error:
        print(f"published weights: {str(error).split('. ')[0]}")
        return convit.create_model("convit_tiny").eval(), False


def _print_classes(model: Any, names: list[str], images: Any) -> None:
    import torch
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    with torch.no_grad():
        top = model(images).softmax(-1).topk(5)
    for name, probabilities, classes in zip(names, top.values, top.indices, strict=True):
        best = ", ".join(
            f"{info.index_to_description(int(c)).split(',')[0]} {100 * p:.0f} %" for p, c in zip(probabilities, classes, strict=True)
        )
        print(f"  {name}: {best}")


def _contestants(device: str) -> list[str]:
    from convit.dispatch import Problem, backends, why_not

    problem = Problem("torch", device, "float32", BATCH, 4, 196, 48, (14, 14))
    return ["timm, eager", *(name for name in backends() if why_not(name, problem) is None)]


def _runner(contestant: str, device: str) -> Callable[[Any], Any]:
    """convit_tiny as ``contestant`` runs it: timm's own code, or ours on the backend of that name."""
    import timm
    import torch

    import convit

    torch.manual_seed(0)
    model = timm.create_model("convit_tiny").eval().to(device)
    if contestant == "timm, eager":
        return model
    convit.accelerate(model)

    def forward(images: Any) -> Any:
        with convit.use_backend(contestant):
            return model(images)

    return forward


def _print_table(contestants: list[str], batch: Any) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    device = batch.device.type
    runners = {name: _runner(name, device) for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            for name, forward in runners.items():
                began = time.perf_counter()
                forward(batch)
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first round warms up
                    times[name].append(time.perf_counter() - began)
    base = statistics.median(times["timm, eager"])
    table = Table(title=f"convit_tiny, inference, batch {BATCH}: median of {ROUNDS} interleaved rounds")
    for column in ("", "ms", "times timm's speed", "peak MB above idle"):
        table.add_column(column, justify="left" if not column else "right")
    spawn = multiprocessing.get_context("spawn")
    for name in contestants:
        with spawn.Pool(1) as fresh:  # a process of its own: a peak cannot be told apart from what ran before
            peak = fresh.apply(_peak_memory, (name, device))
        median = statistics.median(times[name])
        table.add_row(name, f"{1e3 * median:.0f}", f"{base / median:.2f}", "-" if peak is None else f"{peak:.0f}")
    Console().print(table)


def _peak_memory(contestant: str, device: str) -> float | None:
    """Megabytes that one forward pass needs above what the process holds before; None where the system cannot tell."""
    import torch

    forward = _runner(contestant, device)
    batch = torch.zeros(BATCH, 3, 224, 224, device=device)
    with torch.no_grad():
        if device == "cuda":
            forward(batch)
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            forward(batch)
            return (torch.cuda.max_memory_allocated() - base) / 1e6
        forward(batch[:1])  # what the libraries allocate once
        if not sys.platform.startswith("linux"):
            return None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            return None
        resident = _status("VmRSS")
        forward(batch)
        return (_status("VmHWM") - resident) / 1e3


def _status(key: str) -> float:
    """A field of this process's status, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


# ---- (b) digits, (c) pictures ----


def digits(output: Path) -> None:
    """Train on the digits, save, read back, validate; draw curves and gates."""
    import torch

    from convit.engine.pytorch.build import build_model
    from convit.engine.pytorch.data import EvalData
    from convit.engine.pytorch.train import train
    from convit.engine.pytorch.validate import validate
    from convit.engine.recipe import load_recipe
    from convit.engine.world import World
    from convit.figures import plot_attention, plot_gates, plot_history
    from convit.pytorch.diagnostics import gates
    from convit.weights.load import save_checkpoint

    recipe = load_recipe("digits", {"epoch_size": DIGITS_EPOCHS, "decay_epochs": DIGITS_EPOCHS - 5})
    print(f"\na ConViT of {recipe.embed_dim} x {recipe.depth} learns 1437 handwritten digits, {DIGITS_EPOCHS} epochs")
    before = gates(build_model(recipe, 10))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at 64 x 17 tokens a second thread waits more than it works
    try:
        result = train(recipe, output / "digits", overwrite=True)
    finally:
        torch.set_num_threads(threads)
    weights = output / "digits.safetensors"
    save_checkpoint(result.model, weights)
    # in the type that it was trained in: a CPU with bfloat16 would take that, which may see one digit otherwise
    scores = validate(load_recipe("digits", {"ckpt_path": str(weights)}), precision="float32")
    print(f"  {result.seconds:.0f} s; {scores['samples']} digits it has not seen: {scores['top1']:.2f} % right, read back from {weights}")
    if abs(scores["top1"] - result.top1) > 1e-9:
        raise RuntimeError(f"the model read back scores {scores['top1']} %, the trained one {result.top1} %")
    plot_history(result.history, output / "history.png")
    plot_gates(before, gates(result.model), output / "gates.png")
    print(f"  {output / 'history.png'}: loss and accuracy; {output / 'gates.png'}: gates before and after")
    images, _ = next(iter(EvalData(recipe, World(), torch.device("cpu"))))
    plot_attention(result.model, images[0], output / "digits_attention.png", query=(1, 1))
    print(f"  {output / 'digits_attention.png'}: where the trained heads look on a digit")
