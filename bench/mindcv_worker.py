"""MindCV's ConViT in an environment of its own: MindSpore and torch rarely fit into one.

The benchmark starts this file with that environment's Python and talks to it line by line: arguments are the model's name, the thread
count and a folder with ``weights.npz`` (MindCV's names) and ``images.npy``. It writes ``logits.npy``, prints ``ready``, and then
answers every line it reads with ``done`` after one more inference. Prints go to stderr meanwhile, so that the line stays clean.
"""

import os
import sys
from pathlib import Path


def main(name: str, threads: int, folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        # MindSpore's own thread count (runtime_num_threads) slows it down; the number of processors holds it as well
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    import mindcv
    import mindspore
    import numpy as np

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    model = mindcv.create_model(name, num_classes=1000)
    weights = {key: mindspore.Parameter(mindspore.Tensor(value), name=key) for key, value in np.load(folder / "weights.npz").items()}
    absent, unknown = mindspore.load_param_into_net(model, weights)
    # relative indices are constants that MindCV stores as parameters
    absent = [key for key in absent if "rel_indices" not in key]
    if absent or unknown:
        raise ValueError(f"weights do not fit MindCV's {name}: absent {absent[:3]}, unknown {unknown[:3]}")
    model.set_train(False)
    images = mindspore.Tensor(np.load(folder / "images.npy"))
    np.save(folder / "logits.npy", model(images).asnumpy())
    print("ready", file=answers)
    for _line in sys.stdin:
        model(images).asnumpy()
        print("done", file=answers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
