"""Ten steps that both engines must take alike, from the same weights: recipes, images, and what MindSpore found.

``python tests/ten_steps.py``, in an environment with MindSpore, writes ``tests/data/ten_steps.ckpt`` and ``.json`` anew.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"
KEYS = {"model": "convit", "embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "image_resize": 16, "patch_size": 4}
KEYS |= {"num_classes": 2, "batch_size": 4, "epoch_size": 1, "warmup_epochs": 0, "decay_epochs": 1, "lr": 0.003, "log_interval": 1}
KEYS |= {"hflip": 0, "color_jitter": None, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "crop_pct": 1.0, "drop_path_rate": 0, "mode": 1}
KEYS |= {"ckpt_path": str(DATA / "ten_steps.ckpt"), "num_parallel_workers": 0, "label_smoothing": 0.1, "device": "cpu"}
KEYS |= {"eps": 1e-8}  # which MindCV takes for every optimiser but rmsprop, whatever its recipe says
# the optimisers that also MindCV's own trainer takes these steps with; and one whose layer_decay its ConViT has not
WHOLE = {"ema": True, "ema_decay": 0.9, "clip_grad": True, "clip_value": 0.5, "weight_decay": 0.05}
CASES = {
    "adamw": WHOLE | {"opt": "adamw", "weight_decay_filter": "norm_and_bias"},
    "momentum": WHOLE | {"opt": "momentum", "lr": 0.02, "use_nesterov": False, "scheduler": "polynomial_decay", "decay_rate": 0.9},
    "adam": WHOLE | {"opt": "adam", "weight_decay_filter": "auto", "scheduler": "constant"},
    "accumulated": WHOLE | {"opt": "adamw", "batch_size": 2, "gradient_accumulation_steps": 2},
    "sgd": {"opt": "sgd", "use_nesterov": True, "weight_decay": 0.05, "lr": 0.02, "loss": "BCE", "layer_decay": 0.7},
}


def paint(root):
    """20 + 20 images to train on, 3 + 2 to validate."""
    random = np.random.default_rng(0)
    for split, counts in (("train", (20, 20)), ("val", (3, 2))):
        for label, count in enumerate(counts):
            folder = Path(root, split, "ab"[label])
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                pixels[..., label] += 40
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


def recipe(root, case, framework):
    from convit.engine.recipe import recipe_from

    return recipe_from(KEYS | CASES[case] | {"framework": framework, "data_dir": str(root)})


def taken(train, root, output, case, framework):
    """The losses of the steps, and the last one of validation, of a run by the engine's ``train``."""
    result = train(recipe(root, case, framework), output, progress=False)
    records = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"] + [result.val_loss]


def recorded(case):
    return json.loads((DATA / "ten_steps.json").read_text())[case]


if __name__ == "__main__":
    import mindspore as ms

    from convit.engine.mindspore.train import train
    from convit.mindspore import ConViT

    ms.set_seed(1)
    shape = {"embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "image_size": 16, "patch_size": 4, "num_classes": 2}
    path = DATA / "ten_steps.ckpt"
    ms.save_checkpoint(ConViT(**shape), str(path))
    path.chmod(0o644)
    with tempfile.TemporaryDirectory() as place:
        root = paint(Path(place, "images"))
        found = {case: taken(train, root, Path(place, case), case, "mindspore") for case in CASES}
    (DATA / "ten_steps.json").write_text(json.dumps(found, indent=1) + "\n")
