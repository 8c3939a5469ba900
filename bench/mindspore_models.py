"""Whole models on MindSpore's CPU, ours against MindCV's: inference and a training step, in graph mode and in pynative.

    .venv-mindspore/bin/python bench/mindspore_models.py [--output FILE.json] [--name convit_tiny] [--threads 1] [--seconds 60]
        [--only "graph inference"] [--blocking]

Runs in an environment with MindSpore and MindCV, and needs no torch. Both models have the same weights and images. Before anything is
timed, the logits of both are compared with a float64 evaluation in NumPy, and the losses of three training steps with each other. The two
then take turns, round after round; a figure is a median over the rounds, and a ratio the median of MindCV's time over ours in the same
round. ``--blocking`` turns on ``mindspore.runtime.launch_blocking()``, for both: what one sets by hand for pynative on few cores.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timing
from machine import cpu_name

CASES = [f"{mode} {kind}" for kind in ("inference", "training step") for mode in ("graph", "pynative")]
LOGITS, LOSSES = 2e-6, 1e-5  # largest differences: of logits, relative to the largest one or 1; of losses, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--name", default="convit_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of timing, per case")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--blocking", action="store_true", help="launch_blocking for both models")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if hasattr(os, "sched_setaffinity"):
        # MindSpore's own thread count (runtime_num_threads) slows it down; the number of processors holds it as well
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])

    import mindspore as ms

    ms.set_context(device_target="CPU")
    if args.blocking:
        ms.runtime.launch_blocking()
    head = {"model": args.name, "batch": args.batch, "threads": args.threads, "launch_blocking": args.blocking}
    head |= {"mindspore": ms.__version__, "machine": platform.machine(), "processor": cpu_name()}
    results = []
    for case in args.only:
        mode, _, kind = case.partition(" ")
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        found = (inference if kind == "inference" else training)(args.name, args.batch, args.seconds)
        results.append({"case": case, **found})
        print(f"{case}: ours {found['ours_ms']:.1f} ms, MindCV {found['mindcv_ms']:.1f} ms, {found['ratio']:.2f}x", flush=True)
        if args.output:
            args.output.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


def models(name: str) -> dict:
    """Ours and MindCV's, with the same weights: gates and position weights of trained models differ from head to head."""
    import mindcv
    import mindspore as ms
    import numpy as np

    import convit.mindspore

    ms.set_seed(0)
    random = np.random.default_rng(0)
    theirs = mindcv.create_model(name, drop_path_rate=0.0)
    ours = convit.mindspore.create_model(name, drop_path_rate=0.0)
    own = ours.parameters_dict()
    for parameter in theirs.get_parameters():
        if parameter.name.endswith("gating_param"):
            parameter.set_data(ms.Tensor(random.standard_normal(parameter.shape).astype(np.float32)))
        own[parameter.name].set_data(parameter.value())
    return {"ours": ours, "mindcv": theirs}


def inference(name: str, batch: int, seconds: float) -> dict:
    import mindspore as ms
    import numpy as np

    both = models(name)
    images = np.random.default_rng(224).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    given = ms.Tensor(images)
    exact = float64_logits(both["ours"], images)
    errors, calls = {}, {}
    for who, model in both.items():
        model.set_train(False)
        errors[who] = float(np.abs(model(given).asnumpy() - exact).max() / max(1.0, np.abs(exact).max()))
        if not errors[who] <= LOGITS:
            sys.exit(f"{who}: the logits are off by {errors[who]:.1e} from float64")
        calls[who] = lambda model=model: model(given).asnumpy()
    return {**compare(calls, seconds), "logits_error": errors}


def training(name: str, batch: int, seconds: float) -> dict:
    """Forward, backward and AdamW; at a learning rate of 0 every timed step starts from the same weights."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn

    class Loss(nn.Cell):
        def __init__(self, model: nn.Cell) -> None:
            super().__init__(auto_prefix=False)
            self.model, self.loss = model, nn.CrossEntropyLoss(label_smoothing=0.1)

        def construct(self, images: ms.Tensor, labels: ms.Tensor) -> ms.Tensor:
            return self.loss(self.model(images), labels)

    random = np.random.default_rng(224)
    images = ms.Tensor(random.standard_normal((batch, 3, 224, 224)).astype(np.float32))
    labels = ms.Tensor(random.integers(0, 1000, batch).astype(np.int32))
    losses, calls = {}, {}
    for who, model in models(name).items():
        model.set_train(True)
        optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=1e-3, weight_decay=0.05)
        step = nn.TrainOneStepCell(Loss(model), optimizer).set_train()
        losses[who] = [float(step(images, labels).asnumpy()) for _ in range(3)]
        optimizer.learning_rate.set_data(ms.Tensor(0.0, ms.float32))
        calls[who] = lambda step=step: step(images, labels).asnumpy()
    if not np.allclose(losses["ours"], losses["mindcv"], rtol=LOSSES, atol=0) or losses["ours"][2] >= losses["ours"][0]:
        sys.exit(f"the losses of three steps differ, or do not fall: {losses}")
    return {**compare(calls, seconds), "losses": losses}


def compare(calls: dict[str, Callable], seconds: float) -> dict:
    """Medians of both and of their ratio, over interleaved rounds."""
    first = {}
    for who, call in calls.items():
        for _ in range(2):  # the first call compiles
            start = time.perf_counter()
            call()
            first[who] = time.perf_counter() - start
    samples = timing.interleave(calls, "cpu", rounds=100, budget=seconds, seconds=first)
    wall = {who: dict(zip(mine.rounds, mine.wall, strict=True)) for who, mine in samples.items()}
    ratios = [wall["mindcv"][r] / ours for r, ours in wall["ours"].items() if r in wall["mindcv"]]
    medians = {f"{who}_ms": round(1000 * statistics.median(mine.wall), 2) for who, mine in samples.items()}
    return {**medians, "ratio": round(statistics.median(ratios), 3), "rounds": len(ratios)}


def float64_logits(model, images):
    """The logits of our model's weights, evaluated in float64 with both softmaxes formed in full."""
    import numpy as np

    from convit.kernels.gpsa.definition import content_attention, gpsa

    w = {name: parameter.asnumpy().astype(np.float64) for name, parameter in model.parameters_dict().items()}
    eps, (gh, gw), (ph, pw) = model.norm.epsilon, model.grid, model.patch_embed.patch_size
    heads, batch = model.num_heads, len(images)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.gamma"] + w[f"{name}.beta"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def split(x):
        return x.reshape(batch, x.shape[1], heads, -1).transpose(0, 2, 1, 3)

    z = images.astype(np.float64).reshape(batch, -1, gh, ph, gw, pw).transpose(0, 2, 4, 1, 3, 5).reshape(batch, gh * gw, -1)
    z = z @ w["patch_embed.proj.weight"].reshape(model.embed_dim, -1).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    for i in range(len(model.blocks)):
        if i == model.local_up_to_layer:
            z = np.concatenate((np.broadcast_to(w["cls_token"], (batch, 1, model.embed_dim)), z), 1)
        n, name = norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn"
        q, k, v = (split(dense(n, f"{name}.{one}")) for one in "qkv")
        scale = q.shape[-1] ** -0.5
        if f"{name}.gating_param" in w:
            mixed = gpsa(q, k, v, w[f"{name}.pos_proj.weight"], w[f"{name}.gating_param"], (gh, gw), scale)
        else:
            mixed = content_attention(q, k, scale) @ v
        z = z + dense(mixed.transpose(0, 2, 1, 3).reshape(n.shape), f"{name}.proj")
        h = dense(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        z = z + dense(h, f"blocks.{i}.mlp.fc2")
    return dense(norm(z[:, :1], "norm"), "classifier")[:, 0]


if __name__ == "__main__":
    main()
