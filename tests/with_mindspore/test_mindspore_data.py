"""The data of the MindSpore engine: the pixels, the order and the choice of the PyTorch engine; draws that follow from the position."""

import dataclasses
import io
import tarfile

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from convit.engine.images import read_image  # noqa: E402
from convit.engine.mindspore import data as data_module  # noqa: E402
from convit.engine.mindspore.build import check_recipe  # noqa: E402
from convit.engine.mindspore.data import Data, EvalData, eval_transforms, train_transforms  # noqa: E402
from convit.engine.mindspore.validate import evaluate  # noqa: E402
from convit.engine.order import Order  # noqa: E402
from convit.engine.recipe import recipe_from  # noqa: E402
from convit.engine.sources import open_source  # noqa: E402
from convit.engine.world import World  # noqa: E402

PLAIN = {"framework": "mindspore", "image_resize": 16, "crop_pct": 1.0, "color_jitter": None, "hflip": 0, "scale": [1, 1], "ratio": [1, 1]}
DRAWN = {"image_resize": 16, "auto_augment": "randaug-m7-mstd0.5", "re_prob": 0.5, "re_value": "random", "vflip": 0.5, "mixup": 0.2}


def recipe(root, **keys):
    return recipe_from({"framework": "mindspore", "data_dir": str(root), "batch_size": 4, **keys})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes of 6, 5 and 5 files of every kind to train on, one each to validate; a hidden folder; a file that is no picture."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    for split, counts in (("train", (6, 5, 5)), ("val", (1, 1, 1))):
        for name, count in zip("abc", counts, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                deep = Image.fromarray(random.integers(0, 65535, (16, 16), dtype=np.uint16))
                kinds = (
                    lambda path, image=image: image.save(f"{path}.png"),
                    lambda path, image=image: image.save(f"{path}.png", exif=turned),
                    lambda path, image=image: image.quantize(32).save(f"{path}.png"),
                    lambda path, image=image: image.convert("CMYK").save(f"{path}.tif"),
                    lambda path, deep=deep: deep.save(f"{path}.png"),
                    lambda path, image=image: image.convert("LA").save(f"{path}.png"),
                )
                kinds[i if split == "train" else "abc".index(name) + 1](folder / str(i))
        (root / split / ".ipynb_checkpoints").mkdir()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / split / ".ipynb_checkpoints" / "0.png")
    (root / "val/a/1.png").write_bytes(b"no picture")
    return root


def batches(recipe, world=None, epoch=0, start=0):
    return [(images.asnumpy(), targets.asnumpy()) for images, targets, _ in Data(recipe, world or World()).batches(epoch, start)]


def test_pixels_are_those_of_the_one_reader(root):
    """To train on and to validate: upright, 16 bit, palettes, CMYK and transparency as everywhere, in the order of every engine."""
    keys = recipe(root, **PLAIN, shuffle=False, in_channels=3)
    mean, std = (np.array(values, np.float32)[:, None, None] * 255 for values in (keys.mean, keys.std))
    for train, made in ((True, batches(keys)), (False, list(EvalData(keys, World())))):
        source = open_source(keys, train)
        paths = [path for path in source.paths if not path.endswith("val/a/1.png")]
        expected = np.stack([(np.asarray(read_image(path), np.float32).transpose(2, 0, 1) - mean) / std for path in paths])
        images = np.concatenate([one if train else one.asnumpy() for one, _ in made])
        assert source.classes == ["a", "b", "c"] and len(images) == len(expected)
        np.testing.assert_allclose(images, expected, atol=2e-6)
    data = EvalData(keys, World())
    for _ in range(2):  # each time anew
        assert sum(len(targets) for _, targets in data) == 3 and [image.name for image in data.bad] == [str(root / "val/a/1.png")]


def test_grey_images(root):
    keys = recipe(root, **PLAIN, in_channels=1, mean=[0.5], std=[0.5], shuffle=False)
    images = np.concatenate([images for images, _ in batches(keys)])
    expected = np.stack([np.asarray(read_image(path, 1), np.float32)[None] / 127.5 - 1 for path in open_source(keys, True).paths])
    np.testing.assert_allclose(images, expected, atol=2e-6)


def test_draws_follow_from_the_position(root, monkeypatch):
    """Two processes see what one with twice the batch sees; any step can be the first; MindSpore's own loop gets the epochs in turn."""
    drawn = recipe(root, **DRAWN | {"mixup": 0})
    whole = batches(drawn)
    halves = [batches(recipe(root, **DRAWN | {"mixup": 0, "batch_size": 2}), World(rank, 2)) for rank in (0, 1)]
    for (images, targets), left, right in zip(whole, *halves, strict=True):
        assert np.array_equal(images, np.concatenate([left[0], right[0]])) and np.array_equal(targets, np.concatenate([left[1], right[1]]))
    mixed = recipe(root, **DRAWN, cutmix=1.0, gradient_accumulation_steps=2)
    epochs = [batches(mixed, epoch=epoch) for epoch in (0, 1)]
    assert len(epochs[0]) == 4 and epochs[0][0][1].shape == (4, 3) and not np.array_equal(epochs[0][0][0], epochs[1][0][0])
    for (images, _), (again, _) in zip(epochs[0][2:], batches(mixed, start=1), strict=True):
        assert np.array_equal(images, again)
    pipeline = Data(mixed, World()).pipeline(0).create_tuple_iterator(num_epochs=2, output_numpy=True)
    for epoch in epochs:
        for (images, targets), (again, others) in zip(epoch, pipeline, strict=True):
            assert np.array_equal(images, again) and np.array_equal(targets, others)


def test_which_samples_and_classes(root, tmp_path):
    """num_classes, num_samples, sampling_ratio, class_map, val_share as in PyTorch; tar shards; folders without a split."""
    assert {int(t) for _, targets in batches(recipe(root, num_classes=2, drop_remainder=False)) for t in targets} == {0, 1}
    assert Data(recipe(root, num_samples=6), World()).order.samples == 6
    assert Data(recipe(root, sampling_ratio=0.5, drop_remainder=False), World()).order.samples == 7
    (tmp_path / "names.txt").write_text("c\nb\na\n")
    named = Data(recipe(root, class_map=str(tmp_path / "names.txt")), World())
    assert named.classes == ["c", "b", "a"] and named.source.targets[0] == 2
    flat = [Data(recipe(root / "train"), World()).order.samples, len(EvalData(recipe(root / "train"), World()).chosen)]
    assert sum(flat) == 16 and flat[1] == 3
    with tarfile.open(tmp_path / "train.tar", "w") as shard:
        for i, path in enumerate(sorted((root / "train/a").iterdir())):
            for suffix, content in ((path.suffix, path.read_bytes()), (".cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i}{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    assert Data(recipe(tmp_path), World()).order.samples == 6
    for size in (1, 2, 5):
        parts = [EvalData(recipe(root), World(rank, size)).chosen for rank in range(size)]
        assert sorted(sum(parts, [])) == [0, 1, 2, 3]
    assert EvalData(recipe(root), World(), num_classes=2).chosen == [0, 1, 2]  # classes that the model does not have are left out
    with pytest.raises(ValueError, match="3 classes, the model 5, and its checkpoint does not say which they are"):
        EvalData(recipe(root), World(), num_classes=5)


def test_an_image_that_is_replaced_takes_the_label_of_the_other(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), ord(name), np.uint8)).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "train/a/1.png").write_bytes(b"no picture")
    images, targets, bad = Data(recipe(tmp_path, **PLAIN | {"batch_size": 3, "shuffle": False}), World())[0]
    assert targets.tolist() == [0, 1, 1] and np.array_equal(images[1], images[2]) and "1.png" in str(bad)
    assert not caplog.text  # who trains counts and names them, but not in MindSpore's own loop
    data = Data(recipe(tmp_path, **PLAIN | {"batch_size": 3, "shuffle": False}), World())
    assert len(list(data.pipeline(0).create_tuple_iterator(num_epochs=1))) == 1
    assert "replaced the unreadable image" in caplog.text and "1.png" in caplog.text


def test_a_batch_that_makes_no_pairs_is_not_mixed(root):
    keys = {**PLAIN, "batch_size": 6, "num_samples": 15, "drop_remainder": False}
    plain, mixed = (batches(recipe(root, **keys, **more)) for more in ({}, {"mixup": 0.8}))
    assert [len(images) for images, _ in mixed] == [6, 6, 3] and not np.array_equal(mixed[0][0], plain[0][0])
    assert np.array_equal(mixed[2][0], plain[2][0]) and np.array_equal(mixed[2][1], np.eye(3)[plain[2][1]])


def described(one):
    """What a transform does, as plain values."""
    if isinstance(one, (list, tuple)):
        return [described(each) for each in one]
    if callable(one) and not hasattr(one, "__code__"):
        return type(one).__name__, {name: described(value) for name, value in vars(one).items()}
    return one


def test_transforms_are_mindcvs():
    """Every key of the recipe is that of MindCV's ``create_transforms``; mean and std in either unit; timm's names of policies."""
    from mindcv.data import create_transforms

    both = {"image_resize": 24, "interpolation": "bicubic"}
    drawn = {"scale": (0.2, 0.9), "ratio": (0.5, 2.0), "hflip": 0.3, "vflip": 0.6, "color_jitter": [0.1, 0.2, 0.3]}
    drawn |= {"re_prob": 0.4, "re_scale": (0.1, 0.2), "re_ratio": (0.4, 2.5), "re_value": "random", "re_max_attempts": 3}
    bytes_ = {"mean": [127.5, 63.75, 51.0], "std": [51.0, 63.75, 127.5]}
    for unit in (1, 255):
        keys = both | drawn | {"crop_pct": 0.8} | {name: [value / 255 * unit for value in values] for name, values in bytes_.items()}
        ours = recipe("", **{name: list(value) if isinstance(value, tuple) else value for name, value in keys.items()})
        theirs = create_transforms("imagenet", is_training=True, **both, **drawn, **bytes_)
        crop, *rest = train_transforms(ours)
        assert described(rest) == described(theirs[1:])
        for name in ("size", "scale", "ratio", "interpolation", "max_attempts"):
            assert getattr(crop, name) == getattr(theirs[0], name), name
        theirs = create_transforms("imagenet", is_training=False, **both, **bytes_, crop_pct=0.8)
        assert described(eval_transforms(ours)) == described(theirs[1:])
    for name, policy in (
        ("rand-m7-mstd0.5-inc1", "randaug-m7-mstd0.5-inc1"),
        ("original-mstd0.5", "autoaug-mstd0.5"),
        ("originalr", "autoaugr"),
    ):
        one = train_transforms(dataclasses.replace(ours, auto_augment=name))
        other = create_transforms("imagenet", is_training=True, auto_augment=policy, **both, **drawn, **bytes_)
        assert described(one[1:]) == described(other[1:]), name
    with pytest.raises(ValueError, match="interpolation can only be 'bilinear' or 'bicubic' with framework mindspore"):
        check_recipe(recipe("", interpolation="random"))


def test_several_processes_read_for_an_accelerator(monkeypatch):
    """As many as the recipe says and the machine has; on CPU, and with 0, one."""
    monkeypatch.setattr(data_module.ds, "GeneratorDataset", lambda *_, num_parallel_workers, **__: num_parallel_workers)
    monkeypatch.setattr(data_module.multiprocessing, "cpu_count", lambda: 8)
    for target, wanted in (("CPU", [1, 1, 1]), ("Ascend", [1, 3, 8])):
        monkeypatch.setattr(ms, "get_context", lambda name, target=target: target)
        assert [data_module._dataset([], [], recipe("", num_parallel_workers=count)) for count in (0, 3, 99)] == wanted


def test_scores_are_those_of_the_logits():
    """Labels of every rank, batches of two sizes, logits whose exponentials no float holds."""
    logits = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    logits[8] = [0, 3000, 0, 0, 0, 0, 0]
    ranked = np.argsort(-logits, axis=1)
    labels = np.array([ranked[i, i] for i in range(7)] + [ranked[7, 4], 1])
    made = [(ms.Tensor(logits[:6]), labels[:6]), (ms.Tensor(logits[6:]), labels[6:])]
    scores = evaluate(ms.nn.Identity(), made, 1)
    exact = logits.astype(np.float64)
    losses = np.logaddexp.reduce(exact, axis=1) - exact[np.arange(9), labels]
    assert scores["samples"] == 9 and scores["top1"] == pytest.approx(200 / 9) and scores["top5"] == pytest.approx(700 / 9)
    assert scores["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    with pytest.raises(ValueError, match="no validation image could be read"):
        evaluate(ms.nn.Identity(), [], 1)


def test_digits_are_mixed_and_shifted(monkeypatch):
    class Source:
        classes, named, where = ["0", "1"], True, "digits"
        pixels = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
        targets = [0, 1] * 4

    monkeypatch.setattr(data_module, "open_source", lambda *_, **__: Source())
    monkeypatch.setattr(data_module, "DigitsSource", Source)
    keys = {"dataset": "digits", "image_resize": 16, "in_channels": 1, "mean": [0.3], "std": [0.4]}
    still, moved, mixed = (batches(recipe("", **keys, **more)) for more in ({}, {"shift": 2}, {"shift": 2, "mixup": 0.8}))
    assert moved[0][0].shape == (4, 1, 16, 16) and moved[0][1].dtype == np.int32
    assert mixed[0][1].shape == (4, 2) and not np.array_equal(mixed[0][0], moved[0][0])
    still, moved = (np.concatenate([images[:, 0] for images, _ in one]) for one in (still, moved))
    shifts = Order(recipe("", **keys, shift=2), Source.targets, World()).shifts(0)
    for image, other, (down, right) in zip(still, moved, shifts, strict=True):  # a margin of the digit's own background
        margin = np.pad(image, 2, constant_values=(0 - 0.3) / 0.4)
        np.testing.assert_allclose(other, margin[down : down + 16, right : right + 16], atol=1e-6)
