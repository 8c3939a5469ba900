"""The data of the MindSpore engine: the pixels, the order and the choice of the PyTorch engine; draws that follow from the position."""

import io
import tarfile

import pytest

pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from convit.engine.images import read_image  # noqa: E402
from convit.engine.mindspore import data as data_module  # noqa: E402
from convit.engine.mindspore.data import Data, EvalData  # noqa: E402
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


def test_digits_are_mixed_and_shifted(monkeypatch):
    class Source:
        classes, named, where = ["0", "1"], True, "digits"
        pixels = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
        targets = [0, 1] * 4

    monkeypatch.setattr(data_module, "open_source", lambda *_, **__: Source())
    monkeypatch.setattr(data_module, "DigitsSource", Source)
    keys = {"dataset": "digits", "image_resize": 16, "in_channels": 1, "mean": [0.3], "std": [0.4], "shift": 2}
    plain, mixed = (batches(recipe("", **keys, **more)) for more in ({}, {"mixup": 0.8}))
    assert plain[0][0].shape == (4, 1, 16, 16) and plain[0][1].dtype == np.int32
    assert mixed[0][1].shape == (4, 2) and not np.array_equal(mixed[0][0], plain[0][0])
