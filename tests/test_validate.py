"""Validate and infer: the same digits for every kind of checkpoint, and messages for what cannot be measured."""

import json
import math
import shutil
import sys

import pytest
import yaml

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

import convit  # noqa: E402
from convit import cli  # noqa: E402
from convit.engine import preparation  # noqa: E402
from convit.engine.images import BadImage, find_images, read_image, read_named  # noqa: E402
from convit.engine.preparation import Preparation  # noqa: E402
from convit.engine.pytorch.build import build_model  # noqa: E402
from convit.engine.pytorch.data import EvalData, eval_transform  # noqa: E402
from convit.engine.pytorch.train import train  # noqa: E402
from convit.engine.pytorch.validate import evaluate, validate  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.trained import weights_at  # noqa: E402
from convit.engine.world import World  # noqa: E402
from convit.weights.load import save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A validation split of 3 classes with 5 images each, larger than the model's input."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(random.integers(0, 255, (50 + i, 60, 3), dtype=np.uint8)).save(root / "val" / name / f"{i}.png")
    return root


TINY = {"image_resize": 32, "num_classes": 3, "num_parallel_workers": 0, "batch_size": 4, "amp_level": "O0"}


def recipe(root, **keys):
    return load_recipe("convit_tiny", {**TINY, "data_dir": str(root), **keys})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One model in every kind of file."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    model = convit.create_model("convit_tiny", img_size=32, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    torch.save(model.state_dict(), root / "timm.pth")
    torch.save({"model": model.state_dict(), "epoch": 3}, root / "fair.pth")
    save_checkpoint(model, root / "ours.safetensors")
    save_checkpoint(model, root / "mindcv.ckpt")
    return model, root


def by_hand(model, root, keys):
    """Top-1, top-5 and loss, image by image, in float64."""
    from timm.data import ImageDataset, create_transform

    data = ImageDataset(str(root / "val"), transform=create_transform(32, interpolation="bicubic", crop_pct=keys.crop_pct))
    model = model.double().eval()
    with torch.no_grad():
        logits = torch.cat([model(image[None].double()) for image, _ in data])
    model.float()
    targets = torch.tensor([target for _, target in data])
    top1 = (logits.argmax(1) == targets).double().mean().item()
    return 100 * top1, torch.nn.functional.cross_entropy(logits, targets).item()


@pytest.mark.parametrize("name", ["timm.pth", "fair.pth", "ours.safetensors", "mindcv.ckpt"])
def test_every_kind_of_checkpoint_validates(folder, weights, name):
    model, root = weights
    result = validate(recipe(folder, ckpt_path=str(root / name)), progress=False, precision="float32")
    top1, loss = by_hand(model, folder, recipe(folder))
    assert result["samples"] == 15 and result["top5"] == 100.0 and result["bad_images"] == []
    assert (result["model"], result["checkpoint"]) == ("convit_tiny", str(root / name))
    assert result["top1"] == pytest.approx(top1, abs=1e-9)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_result_is_reproducible_to_the_digit(folder, weights, capsys):
    words = ["validate", "-c", "convit_tiny", "--data_dir", str(folder), "--ckpt_path", str(weights[1] / "timm.pth"), "--json"]
    words += [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    results = []
    for workers in ("0", "1"):
        assert cli.main([*words, "--num_parallel_workers", workers]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert set(results[0]) == {"model", "checkpoint", "samples", "top1", "top5", "loss", "precision", "images_per_second", "bad_images"}
    for result in results:
        assert result.pop("images_per_second") > 0
    assert results[0] == results[1]


def test_scores_are_those_counted_by_hand():
    """Six classes, three images, the last in a batch of its own: right at once, the fifth, and the last of six."""

    class Data(list):
        bad, rounds = [BadImage("broken.png", "why")], 2

    logits = torch.tensor([[5.0, 1, 2, 3, 4, 0], [5.0, 1, 2, 3, 4, 0], [5.0, 1, 2, 3, 4, 0]])
    targets = torch.tensor([0, 1, 5])
    batches = Data([(logits[:2], targets[:2]), (logits[:0], targets[:0]), (logits[2:], targets[2:])])
    scores = evaluate(torch.nn.Identity(), batches, World(), torch.device("cpu"))
    assert (scores.samples, scores.top1, scores.top5) == (3, pytest.approx(100 / 3), pytest.approx(200 / 3))
    exact = [math.log(sum(math.exp(x) for x in range(6))) - x for x in (5, 1, 0)]
    assert scores.loss == pytest.approx(sum(exact) / 3, rel=1e-6) and scores.bad == Data.bad and scores.images_per_second > 0


@pytest.mark.parametrize(
    "keys", [{}, {"crop_pct": 1.0, "interpolation": "bilinear"}, {"interpolation": "random", "image_resize": 24}], ids=str
)
def test_a_recipe_prepares_an_image_as_timm_does(keys):
    from timm.data import create_transform

    chosen = load_recipe(None, {"image_resize": 32, **keys})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    interpolation = {"random": "bicubic"}.get(chosen.interpolation, chosen.interpolation)
    theirs = create_transform(chosen.image_resize, crop_pct=chosen.crop_pct, interpolation=interpolation)
    assert np.array_equal(eval_transform(chosen)(image).numpy(), theirs(image).numpy())


def test_processes_add_up(folder, weights):
    """The parts that three processes take are all images, each once."""
    parts = [EvalData(recipe(folder), World(rank, 3), torch.device("cpu")) for rank in range(3)]
    assert sorted(i for part in parts for i in part.chosen) == list(range(15))
    scores = [evaluate(weights[0], part, World(), torch.device("cpu")) for part in parts]
    whole = validate(recipe(folder, ckpt_path=str(weights[1] / "timm.pth")), progress=False, precision="float32")
    assert sum(s.loss * s.samples for s in scores) / 15 == pytest.approx(whole["loss"], rel=1e-6)


def test_unreadable_images_are_left_out_and_named(folder, weights, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/val/b/2.png").write_bytes(b"\x89PNG broken")
    result = validate(recipe(tmp_path / "data", ckpt_path=str(weights[1] / "timm.pth")), progress=False)
    assert result["samples"] == 14 and [name[-7:] for name in result["bad_images"]] == ["b/2.png"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ckpt_path": "missing.pth"}, "missing.pth"),
        ({"num_classes": 2}, "head"),
        ({"num_classes": 7}, "has 3 classes, the model 7"),
        ({"model": "convit_tinny"}, "did you mean 'convit_tiny"),
        ({"data_dir": ""}, "data_dir must name the folder"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_named(folder, weights, keys, message, capsys):
    words = {**TINY, "data_dir": str(folder), "ckpt_path": str(weights[1] / "timm.pth"), **keys}
    assert cli.main(["validate", "-c", "convit_tiny", *[w for k, v in words.items() for w in (f"--{k}", str(v))]]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run on the digits."""
    output = tmp_path_factory.mktemp("digits") / "run"
    keys = {"epoch_size": 2, "warmup_epochs": 1, "decay_epochs": 1, "depth": 2, "local_up_to_layer": 1, "ema": True, "ema_decay": 0.9}
    return train(load_recipe("digits", keys), output, progress=False)


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_a_run_validates_without_its_recipe(digits, capsys, name):
    """The recipe is in the checkpoint; the scores are those of the log, of the moving average."""
    words = ["validate", "--ckpt_path", str(digits.output / name), "--json", "--precision"]
    assert cli.main([*words, "float32"]) == 0
    result = json.loads(capsys.readouterr().out)
    log = [json.loads(line) for line in (digits.output / "log.jsonl").read_text().splitlines()]
    epochs = {record["epoch"]: record for record in log if record["kind"] == "epoch"}
    record = epochs[digits.best_epoch if name == "best.pth" else 1]
    assert (result["top1"], result["samples"], result["precision"]) == (record["top1"], 360, "float32")
    assert result["loss"] == pytest.approx(record["val_loss"], rel=1e-6)
    assert cli.main([*words, "bfloat16"]) == 0
    narrow = json.loads(capsys.readouterr().out)
    assert narrow["precision"] == "bfloat16" and abs(narrow["top1"] - result["top1"]) <= 0.3


@pytest.mark.parametrize("key", ["--amp_level", "--val-amp-level"])
def test_o0_on_the_command_line_means_float32(digits, capsys, monkeypatch, key):
    """Where the chip multiplies bfloat16 or not; what a recipe says of mixed precision chooses nothing on CPU."""
    chosen, optimize = [], convit.optimize
    monkeypatch.setattr(convit, "optimize", lambda model, dtype: chosen.append(dtype) or optimize(model, dtype))
    words = ["validate", str(digits.output), "--json"]
    for more, dtype in (([], None), ([key, "o0"], "float32"), (["--precision", "float32", key, "O0"], "float32")):
        assert cli.main([*words, *more]) == 0
        precision = json.loads(capsys.readouterr().out)["precision"]
        assert chosen.pop() == dtype and precision == (dtype or precision)
    assert cli.main([*words, key, "O0", "--precision", "bfloat16"]) == 1 and "contradict" in capsys.readouterr().err
    Image.new("L", (8, 8)).save(digits.output.parent / "digit.png")
    assert cli.main(["infer", str(digits.output.parent / "digit.png"), "--ckpt_path", str(digits.output), key, "O0"]) == 0
    assert chosen == ["float32"]


def test_a_file_without_a_recipe_takes_no_more_workers_than_cores(weights, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    for words, count in (((), 3), (("--num_parallel_workers", "5"), 5)):
        assert cli.main(["validate", str(weights[1] / "ours.safetensors"), "--print-config", *words]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["num_parallel_workers"] == count


def test_precision_where_it_has_no_say(digits, capsys):
    words = ["validate", "--precision", "bfloat16"]
    mixed = digits.output.parent / "mixed.yaml"
    recipe = yaml.safe_load((digits.output / "recipe.yaml").read_text())
    mixed.write_text(yaml.safe_dump(recipe | {"amp_level": "O2", "amp_dtype": "bfloat16"}))
    recorded = ["-c", str(mixed), "--ckpt_path", str(digits.output / "best.pth")]
    for more, reason in ((recorded, "it sets amp_dtype"), (["--framework", "mindspore"], "is of PyTorch on CPU")):
        assert cli.main([*words, *more]) != 0
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("level", "precision"), [(None, "bfloat16"), ("O0", "float32")])
def test_a_recipe_may_be_validated_in_another_precision_than_it_trains_in(folder, weights, level, precision):
    keys = {"amp_level": "O2", "amp_dtype": "bfloat16", "val_amp_level": level, "ckpt_path": str(weights[1] / "timm.pth")}
    asked = {"precision": "float32"} if level else {}
    assert validate(recipe(folder, **keys), progress=False, **asked)["precision"] == precision


def test_the_best_of_a_folder_is_taken_before_the_last(tmp_path):
    for name in ("model.safetensors", "last.ckpt", "best.ckpt", "last.pth", "best.pth"):
        (tmp_path / name).touch()
        assert weights_at(tmp_path).name == name  # each better than those before it


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recipe_of_mixed_precision_is_served_in_the_precision_asked_for(digits, capsys, precision):
    """O1 to O3 are of training: they choose no type on a CPU."""
    words = ["--ckpt_path", str(digits.output / "best.pth"), "--amp_level", "O2", "--json", "-q"]
    assert cli.main(["validate", *words, "--precision", precision]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == precision


def test_infer_names_the_digits(digits, tmp_path, capsys):
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:3] * 15.9).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    words = ["--ckpt_path", str(digits.output / "best.pth"), "--json", "--topk", "10", "--crop_pct", "1.0"]
    assert cli.main(["infer", str(tmp_path), *words, "--precision", "float32"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["image"][-5:] for result in results] == ["0.png", "1.png", "2.png"]
    recipe = load_recipe("digits", {"depth": 2, "local_up_to_layer": 1, "ckpt_path": str(digits.output / "best.pth")})
    model = build_model(recipe, 10).eval()
    for result in results:
        assert sorted(one["name"] for one in result["classes"]) == list("0123456789")
        assert sum(one["probability"] for one in result["classes"]) == pytest.approx(1, abs=1e-5)
        image = Image.open(result["image"]).resize((16, 16), Image.Resampling.BILINEAR)
        x = (torch.tensor(np.array(image), dtype=torch.float32) / 255 - 0.305) / 0.376
        with torch.no_grad():
            expected = model(x[None, None]).softmax(1)[0]
        for one in result["classes"]:
            assert one["probability"] == pytest.approx(expected[one["index"]].item(), abs=1e-5)


def test_infer_names_imagenet_and_survives_a_broken_image(folder, tmp_path, capsys, monkeypatch):
    model = convit.create_model("convit_tiny")
    with torch.no_grad():
        model.head.bias[207] = 50.0
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    images = [str(folder / "val/a/0.png"), str(tmp_path / "broken.png")]
    assert cli.main(["infer", *images, "--ckpt_path", str(tmp_path / "tiny.pth")]) == 1
    shown = capsys.readouterr()
    assert "golden retriever" in shown.out and "100.00 %" in shown.out and len(shown.out.splitlines()) == 6
    assert "broken.png: UnidentifiedImageError" in shown.err
    monkeypatch.setattr("convit.weights.load.fetch", lambda name, source: tmp_path / f"{name.removeprefix('convit_')}.pth")
    assert cli.main(["infer", images[0], "--model", "convit_tiny", "--pretrained"]) == 0
    assert capsys.readouterr().out == shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jpg", "--pretrained"], "no such image: nowhere.jpg"),
        (["."], "infer needs weights"),
        (["x", "--topk", "0"], "--topk must be at least 1"),
    ],
)
def test_infer_says_what_is_missing(words, message, capsys):
    assert cli.main(["infer", *words]) == 1
    assert message in capsys.readouterr().err


# --- reading images ---


def test_as_many_pixels_as_a_file_of_its_length_can_hold(tmp_path, monkeypatch):
    """200 a byte, where they are many; few are read from any file."""
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for many, length, fits in ((100, 100, True), (100, 99, False), (20_000, 99, True), (19_999, 99, False)):
        monkeypatch.setattr("convit.engine.images._LARGE", many)
        (tmp_path / "a.png").write_bytes(data + bytes(length - len(data)))
        assert len((tmp_path / "a.png").read_bytes()) == length
        if fits:
            assert read_image(tmp_path / "a.png").size == (200, 100)
        else:
            with pytest.raises(ValueError, match="pixels"):
                read_image(tmp_path / "a.png")


def test_one_reader_for_every_kind_of_image(tmp_path):
    """The same picture, upright and in colour, whatever the file: orientation, palette, 16 bit, CMYK, grey with transparency."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :, 0], pixels[4:, :, 2] = 255, 255  # red above blue
    image = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    image.rotate(180).save(tmp_path / "turned.png", exif=turned)
    image.save(tmp_path / "plain.webp", lossless=True)
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "plain.bmp")
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("P").save(tmp_path / "transparent.gif", transparency=0)
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    for path in sorted(tmp_path.iterdir()):
        read = read_image(path)
        assert read.mode == "RGB" and np.array_equal(np.asarray(read), pixels), path.name
    assert [path.name for path in find_images([str(tmp_path)])] == sorted(path.name for path in tmp_path.iterdir())
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "cmyk.jpg")).astype(int) - pixels).max() < 12
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png", 1)), grey // 257)
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 2], grey // 257)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="expected 8 or 16 bit"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("size", [(224, 224), (192, 256), (16, 16)])
@pytest.mark.parametrize(
    ("crop", "interpolation"), [(0.875, "bicubic"), (0.915, "bilinear"), (1.0, "bicubic"), (1.1, "bicubic"), (1.5, "bilinear")]
)
def test_a_preparation_is_timms_bit_for_bit(size, crop, interpolation):
    """Of wide, high and small images, with a mean and std of 0 to 255 as of 0 to 1."""
    from timm.data import create_transform

    config = {"mean": [127.5, 100.0, 50.0], "std": [51.0, 60.0, 70.0], "crop_pct": crop, "interpolation": interpolation}
    prepare = Preparation.of_config(config, size, 3)
    unit = {name: [value / 255 for value in config[name]] for name in ("mean", "std")}
    theirs = create_transform(size if size[0] != size[1] else size[0], crop_pct=crop, interpolation=interpolation, **unit)
    for high, wide in ((50, 301), (301, 50), (9, 7)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (high, wide, 3), dtype=np.uint8))
        assert np.array_equal(prepare(image), theirs(image).numpy())
    assert Preparation.of_recipe(load_recipe(None, {"interpolation": "random"})).interpolation == "bicubic"  # as the engines evaluate
    grey = prepare._replace(mean=(0.5,), std=(0.25,))(Image.new("L", (40, 20), 255))
    assert grey.shape == (1, *size) and np.unique(grey).tolist() == ([2.0] if crop <= 1 else [-2.0, 2.0])


@pytest.mark.parametrize(
    ("mean", "std", "unit"),
    [
        ([127.5], [51.0], ((0.5,), (0.2,))),
        ([0.0], [255.0], ((0.0,), (1.0,))),
        ([127.5], [1.0], ((0.5,), (1 / 255,))),
        ([0.5], [0.25], ((0.5,), (0.25,))),
        ([0.0], [1.0], ((0.0,), (1.0,))),
    ],
)
def test_mean_and_std_of_either_scale(mean, std, unit):
    assert preparation.unit_scale(mean, std) == unit


def test_other_channels_than_colours_have_the_mean_of_the_colours_statistics():
    colours = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.6)}
    for channels in (1, 4):
        made = Preparation.of_config(colours, (8, 8), channels)
        assert made.mean == pytest.approx((0.4,) * channels) and made.std == pytest.approx((0.3,) * channels)


@pytest.mark.parametrize("crop", [0.8, 1.3])
def test_a_strip_costs_what_its_crop_costs(monkeypatch, crop):
    """Resized whole, a strip of a million pixels would take gigabytes; its crop is that of the whole, but for roundings."""
    random = np.random.default_rng(0)
    for high, wide in ((3, 700), (700, 3), (2, 301)):
        image = Image.fromarray(random.integers(80, 176, (high, wide, 3), dtype=np.uint8))
        for size in ((32, 32), (24, 40)):
            prepare = Preparation(size, crop_pct=crop)
            whole = np.asarray(prepare.crop(image)).astype(int)
            with monkeypatch.context() as bounded:
                bounded.setattr(preparation, "_WHOLE", 0)
                assert np.abs(np.asarray(prepare.crop(image)).astype(int) - whole).max() <= 2
    for shape in ((1, 1_000_000), (1_000_000, 1)):
        assert np.ptp(np.asarray(Preparation((224, 224), crop_pct=0.875).crop(Image.new("L", shape[::-1], 85)))) == 0


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png is not an image"):
        read_named(tmp_path / "bad.png")
    with pytest.raises(FileNotFoundError):
        read_named(tmp_path / "none.png")


def test_links_are_followed_and_circles_end(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "photos")
    (tmp_path / "all" / "round").symlink_to(tmp_path / "all")
    assert [path.name for path in find_images([str(tmp_path / "all")])] == ["a.png"]


@pytest.mark.parametrize(("quiet", "terminal", "bar"), [(False, True, True), (True, True, False), (False, False, False)])
def test_a_bar_is_shown_on_a_terminal_unless_it_is_to_be_quiet(monkeypatch, capsys, quiet, terminal, bar):
    from convit.cli import validate as command

    asked = []
    found = {"model": "convit", "checkpoint": None, "samples": 1, "top1": 0, "top5": 0, "loss": 0, "images_per_second": 0, "bad_images": []}
    stand_in = type("Engine", (), {"validate": staticmethod(lambda recipe, progress, **more: asked.append(progress) or found)})
    monkeypatch.setattr(command, "engine", lambda framework, job: stand_in)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert cli.main(["validate", "-c", "digits", *["-q"] * quiet]) == 0
    assert asked == [bar] and "untrained weights, 1 images" in capsys.readouterr().out
