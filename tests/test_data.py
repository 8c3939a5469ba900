"""Where images come from: classes matched by name, folders as strangers leave them, even shares, workers that die."""

import io
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("timm")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402
from training import pictures  # noqa: E402

from convit.cli import main  # noqa: E402
from convit.engine.pytorch import data as data_module  # noqa: E402
from convit.engine.pytorch.data import EvalData, TrainData, timm_policy  # noqa: E402
from convit.engine.pytorch.train import train  # noqa: E402
from convit.engine.pytorch.validate import validate  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.sources import FolderSource, HfSource, choose_samples, open_source, read_sample  # noqa: E402
from convit.engine.world import World  # noqa: E402

COLOURS = {"a": (200, 0, 0), "b": (0, 200, 0), "c": (0, 0, 200)}
SMALL = {"model": "convit", "embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 16, "image_resize": 32}
SMALL |= {"num_parallel_workers": 0, "batch_size": 6, "amp_level": "O0", "drop_path_rate": 0, "epoch_size": 6, "warmup_epochs": 0}
SMALL |= {"decay_epochs": 6, "lr": 0.01, "opt": "adamw", "color_jitter": None, "scale": [0.5, 1.0]}
CPU = torch.device("cpu")


def paint(folder, colour, count=6):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 40 + i), tuple(min(value + 5 * i, 255) for value in colour)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes that colour tells apart."""
    root = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        paint(root / "train" / name, colour)
        paint(root / "val" / name, colour, 2)
    return root


def recipe(root, **keys):
    return load_recipe(None, {**SMALL, "data_dir": str(root), **keys})


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    result = train(recipe(root), tmp_path_factory.mktemp("run") / "run", progress=False)
    assert result.top1 == 100
    return result.output


def test_validation_of_some_classes_scores_those(root, run, tmp_path):
    """Without class b: 100 %, where numbers counted from the folders that are there would give half of it."""
    shutil.copytree(root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/val/b")
    result = validate(recipe(tmp_path / "data", ckpt_path=str(run / "best.pth")), progress=False)
    assert (result["samples"], result["top1"]) == (4, 100)
    assert train(recipe(tmp_path / "data"), tmp_path / "run", progress=False).best_top1 == 100


def test_a_class_that_is_not_the_models_is_named(root, run, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data/val/b").rename(tmp_path / "data/val/bb")
    for keys in ({"ckpt_path": str(run / "best.pth")}, {}):
        with pytest.raises(ValueError, match="1 of its 3 classes are not among the 3 of .*'bb'; did you mean 'b'"):
            validate(recipe(tmp_path / "data", **keys), progress=False) if keys else train(recipe(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "names.txt").write_text("a\nbb\nc\n")
    found = validate(recipe(tmp_path / "data", ckpt_path=str(run / "best.pth"), class_map=str(tmp_path / "names.txt")), progress=False)
    assert found["top1"] == 100
    (tmp_path / "names.txt").write_text("a\nbb\nc\nbb\n")
    with pytest.raises(ValueError, match=r"names.txt names the class 'bb' twice"):
        open_source(recipe(tmp_path / "data", class_map=str(tmp_path / "names.txt")), train=False)


def test_without_recorded_names_fewer_classes_are_imagenets_or_refused(root, tmp_path):
    paint(tmp_path / "val" / "n02124075", (9, 9, 9), 1)
    paint(tmp_path / "val" / "n01440764", (9, 9, 9), 1)
    data = EvalData(recipe(tmp_path), World(), CPU, None, 1000)
    assert [data.source.targets[i] for i in data.chosen] == [0, 285]  # tench, Egyptian cat
    with pytest.raises(ValueError, match="3 classes, the model 5, and its checkpoint does not say which they are"):
        EvalData(recipe(root), World(), CPU, None, 5)


def test_tar_labels_are_the_models_numbers(tmp_path):
    import io
    import tarfile

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")

    def shard(path, labels):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for i, label in enumerate(labels):
                for suffix, content in (("png", buffer.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    shard(tmp_path / "data/val.tar", [b"1", b"2"])
    source = open_source(recipe(tmp_path / "data"), train=False, classes=["a", "b", "c", "d"])
    assert source.targets == [1, 2]
    for label in (b"-1", b"1000000000", b"", b"cat"):
        shard(tmp_path / "data/train.tar", [b"0", label])
        with pytest.raises(ValueError, match=r"train\.tar .*1\.cls' holds the label .*, expected 0 to 99999"):
            open_source(recipe(tmp_path / "data"), train=True)


def test_folders_as_strangers_leave_them(root, tmp_path, caplog):
    """A flat folder and a shard beside the folder are refused; top folders are the classes; stray images and empty folders are told."""
    paint(tmp_path / "flat" / "val", (0, 0, 0))
    with pytest.raises(ValueError, match="holds 6 images but no folders of images, one per class: move each image"):
        open_source(recipe(tmp_path / "flat"), train=False)
    shutil.copytree(root, tmp_path / "deep")
    paint(tmp_path / "deep/train/a/more/of it", (255, 0, 0), 3)
    (tmp_path / "deep/train/zzz").mkdir()
    shutil.copy(root / "train/a/0.png", tmp_path / "deep/train/stray.png")
    source = FolderSource(tmp_path / "deep/train")
    assert source.classes == ["a", "b", "c"] and source.targets.count(0) == 9
    assert "left out 1 images beside the class folders" in caplog.text and "no image in the folders zzz" in caplog.text
    (tmp_path / "deep/train.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds the shard train\.tar and the folder train: choose with --dataset wds or --dataset folder"):
        open_source(recipe(tmp_path / "deep"), train=True)
    assert open_source(recipe(tmp_path / "deep", dataset="folder"), train=True).classes == ["a", "b", "c"]
    (tmp_path / "deep/train.tar").rename(tmp_path / "deep/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"holds the file train-0.*parquet and the folder train: choose with --dataset hfds or"):
        open_source(recipe(tmp_path / "deep"), train=True)


def test_classes_have_the_order_that_timm_gives_them(tmp_path):
    """Without regard to case, numbers by their value: class 3 of a checkpoint is class 3 here."""
    from timm.data import ImageDataset

    for name in ("Zebra", "ant", "Bee", "n10", "n9", "N11"):
        paint(tmp_path / "val" / name, (0, 0, 0), 1)
    theirs = ImageDataset(str(tmp_path / "val")).reader.class_to_idx
    assert open_source(recipe(tmp_path), train=False).classes == sorted(theirs, key=theirs.get)


def test_validation_comes_before_test(root, tmp_path):
    """A data set with both is validated on what is named for it."""
    for name in ("test", "validation", "train"):
        shutil.copytree(root / "val", tmp_path / name)
    assert open_source(recipe(tmp_path), train=False).where == str(tmp_path / "validation")
    shutil.rmtree(tmp_path / "validation")
    assert open_source(recipe(tmp_path), train=False).where == str(tmp_path / "test")


def test_the_image_in_place_of_an_unreadable_one_has_its_own_label(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data/train/a/5.png").write_bytes(b"no image")  # the next one is of another class
    data = TrainData(recipe(tmp_path / "data", shuffle=False), World(), CPU)
    bad = 0
    for batch in data.batches(0):
        assert batch.images.mean((2, 3)).argmax(1).tolist() == batch.targets.tolist()
        bad += len(batch.bad)
    assert bad == 1


def test_num_samples_are_an_even_share_of_each_class():
    targets = [0] * 50 + [1] * 3 + [2] * 50
    chosen = choose_samples(targets, None, num_samples=13)
    assert [sum(targets[i] == label for i in chosen) for label in range(3)] == [5, 3, 5] and chosen == sorted(chosen)
    assert choose_samples(targets, None, num_samples=500) == list(range(103))


def test_a_worker_that_dies_while_validating_costs_nothing(root, run, tmp_path, monkeypatch):
    read, once = data_module.read_sample, tmp_path / "once"

    def dying_read(source, index, channels):
        if index == 3 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(source, index, channels)

    monkeypatch.setattr(data_module, "read_sample", dying_read)
    keys = {"ckpt_path": str(run / "best.pth"), "num_parallel_workers": 1, "batch_size": 2}
    result = validate(recipe(root, **keys), progress=False)
    assert once.exists() and (result["samples"], result["top1"]) == (6, 100)


def test_policies_of_mindcv_or_a_message(root):
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    for policy in ("trivialaugwide", "randaug-m7-mstd0.5", "autoaug-mstd0.5", "augmix-m3"):
        assert data_module.train_transform(recipe(root, auto_augment=policy))(image).shape == (3, 32, 32)
    assert "TrivialAugmentWide" in str(data_module.train_transform(recipe(root, auto_augment="trivialaugwide")))
    for typo in ("trivialaugwhite", "randaugg-m9", "rand-m9-zzz3"):
        with pytest.raises(ValueError, match=f"auto_augment '{typo}' is no policy of the kinds randaug"):
            TrainData(recipe(root, auto_augment=typo), World(), CPU)
    for typo, section in (("randaug-m9-mstd", "mstd"), ("augmix-m3-w", "w"), ("rand-m9-", ""), ("autoaug-tweights", "tweights")):
        with pytest.raises(ValueError, match=f"auto_augment '{typo}': '{section}' is no name with a number"):
            recipe(root, auto_augment=typo)  # which timm and MindCV would take without it
    assert data_module.train_transform(recipe(root, auto_augment="rand-m9-tweights"))(image).shape == (3, 32, 32)


def test_published_weights_are_evaluated_as_published():
    from convit.cli.validate import as_published

    for config in (None, "convit_small", "small", "finetune"):
        found = as_published(load_recipe(config, {"model": "convit_small", "pretrained": True, "crop_pct": 0.95}), {})
        assert (found.crop_pct, found.interpolation) == (0.875, "bicubic")
        assert (found.image_resize, found.patch_size, found.depth, found.local_up_to_layer) == (224, None, None, None)
    asked = load_recipe("convit_small", {"pretrained": True, "crop_pct": 0.8})
    assert as_published(asked, {"crop_pct": "0.8"}).crop_pct == 0.8
    plus = load_recipe("convit_tiny", {"model": "convit_tiny_plus", "pretrained": True})
    assert as_published(plus, {}).crop_pct == load_recipe("convit_tiny_plus").crop_pct


def test_class_balanced_sampling_and_random_interpolation(root, tmp_path):
    shutil.copytree(root / "train", tmp_path / "train")
    for i in range(1, 6):
        (tmp_path / "train/a" / f"{i}.png").unlink()
    data = TrainData(recipe(tmp_path, class_balanced=True, interpolation="random"), World(), CPU)
    drawn = [data.source.targets[data.order.chosen[i]] for epoch in range(100) for i in data.order.of(epoch)]
    assert [round(drawn.count(label) / len(drawn), 1) for label in range(3)] == [0.3, 0.3, 0.3]
    assert next(data.batches(0)).images.shape == (6, 3, 32, 32)


def test_early_stop_and_mixing_that_ends(root, tmp_path, monkeypatch):
    from convit.engine.pytorch.train import TorchRun

    monkeypatch.setattr(TorchRun, "evaluate", lambda self: {"val_loss": 1.0, "top1": 50.0, "top5": 100.0})
    mixed = []
    monkeypatch.setattr("timm.data.Mixup.__call__", lambda self, x, y: mixed.append(1) or (x, torch.nn.functional.one_hot(y, 3).float()))
    keys = recipe(root, early_stop=2, mixup=0.2, mixup_off_epoch=1)
    result = train(keys, tmp_path / "run", progress=False)
    assert (result.epochs, result.best_epoch, len(mixed)) == (3, 0, 3)
    assert train(keys, tmp_path / "run", resume=True, progress=False).epochs == 3


def test_training_leaves_nothing_behind(root, tmp_path):
    """No process, no reseeded generator, no handler: whoever calls train() goes on as before."""
    import random

    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    there = children.read_text().split() if children.exists() else []  # servers of multiprocessing that other tests have started
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train(recipe(root, num_parallel_workers=2, epoch_size=1), tmp_path / "run", progress=False)
    with pytest.raises(FloatingPointError):  # nor where it fails
        train(recipe(root, num_parallel_workers=2, lr=1e30, opt="sgd", max_skipped_steps=0), tmp_path / "failed", progress=False)
    validate(recipe(root, ckpt_path=str(tmp_path / "run/last.pth")), progress=False)
    assert (
        torch.equal(before[0], torch.get_rng_state()) and np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    )
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    if children.exists():
        names = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children.read_text().split()}
        assert not [name for child, name in names.items() if child not in there and "resource_tracker" not in name]


def test_every_process_makes_as_many_batches(root):
    for size in (1, 2, 4, 5):
        datas = [EvalData(recipe(root, batch_size=2), World(rank, size), CPU) for rank in range(size)]
        batches = [[len(targets) for _, targets in data] for data in datas]
        assert len({len(each) for each in batches}) == 1 and sum(map(sum, batches)) == 6


def test_copies_of_repeated_augmentation_go_to_different_processes(root):
    keys = recipe(root, aug_repeats=3, batch_size=2)
    datas = [TrainData(keys, World(rank, 3), CPU) for rank in range(3)]
    order = datas[0].order.of(0)
    for step in range(datas[0].order.steps):
        taken = [[int(order[i]) for part in data.order.parts(step) for i in part] for data in datas]
        assert taken[0] == taken[1] == taken[2] and len(set(taken[0])) == 2


@pytest.mark.parametrize("train", [True, False])
def test_a_single_class_is_no_data_to_train_on(root, tmp_path, train):
    shutil.copytree(root / "train/a", tmp_path / "train/a")
    shutil.copytree(root / "train/a", tmp_path / "val/a")
    if train:
        with pytest.raises(ValueError, match=r"train with the single class 'a' leaves nothing to tell apart.*two classes"):
            open_source(recipe(tmp_path), train=True)
        with pytest.raises(ValueError, match="num_classes 1 leaves nothing to tell apart"):
            open_source(recipe(root, num_classes=1), train=True)
    else:
        assert open_source(recipe(tmp_path), train=False).classes == ["a"]  # some of a model's classes can be scored


def test_a_class_map_may_come_from_windows(root, tmp_path):
    (tmp_path / "map.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\n")
    assert open_source(recipe(root, class_map=str(tmp_path / "map.txt")), train=True).classes == ["a", "b", "c"]


def test_names_that_are_no_text_are_printed(run, tmp_path, monkeypatch):
    """A file's name is bytes: one that the terminal cannot show stopped all images after it."""
    for name in (b"\xff.png", b"z.png"):
        Image.new("RGB", (32, 32)).save(os.fsencode(tmp_path) + b"/" + name)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["infer", str(tmp_path), "--ckpt_path", str(run), "-q", "--num_parallel_workers", "0"]) == 0
    out.flush()
    assert b"/\\udcff.png" in out.buffer.getvalue() and b"/z.png" in out.buffer.getvalue()


# --- labels of strangers ---


def shard(path, label, size=None, kind=tarfile.REGTYPE, images=("0", "1")):
    """A shard of two images; the second one's label is as it is given."""
    with tarfile.open(path, "w") as tar:
        for key in images:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"jpeg"))
        for key, text, type_ in (("0", b"0", tarfile.REGTYPE), ("1", label, kind)):
            if text is not None:
                info = tarfile.TarInfo(f"{key}.cls")
                info.type, info.size = type_, len(text) if type_ == tarfile.REGTYPE else 0
                info.linkname = "0.cls" if type_ == tarfile.SYMTYPE else ""
                tar.addfile(info, io.BytesIO(text))


LABELS = [b"1000000000", b"-1", b"", b"1.5", b"one", b"\xb2", b"1" * 25, b"0" * 5000, b"1 2"]


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label[:12].decode("latin-1") or "empty")
def test_labels_that_are_no_class_are_named(tmp_path, label):
    shard(tmp_path / "train-0.tar", label)
    with pytest.raises(ValueError, match=r"train-0\.tar.*'1\.cls' holds the label .*expected 0 to 99999"):
        open_source(recipe(tmp_path), train=True)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_labels_that_are_no_files_are_named(tmp_path, kind):
    shard(tmp_path / "train-0.tar", b"", kind=kind)
    with pytest.raises(ValueError, match=r"train-0\.tar.*'1\.cls' holds the label b'of no file'"):
        open_source(recipe(tmp_path), train=True)


def test_images_without_labels_are_counted(tmp_path, caplog):
    shard(tmp_path / "train-0.tar", b"1", images=("0", "1", "2", "3"))
    assert open_source(recipe(tmp_path), train=True).targets == [0, 1]
    assert "left out 2 images without a .cls label, the first is 2" in caplog.text


def test_a_shard_is_read_whole_or_not_at_all(tmp_path, caplog):
    """Where tarfile stops in silence, takes the last of two members, or would read another's bytes."""
    path = tmp_path / "train-0.tar"

    def refused(message):
        with pytest.raises(ValueError, match=rf"train-0\.tar.*{message}"):
            open_source(recipe(tmp_path), train=True)

    shard(path, b"1")
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"x" + whole[1025:])  # the second header
    refused("what follows byte 1,024 is neither a file nor the end")
    path.write_bytes(whole + whole)  # cat a.tar b.tar
    refused("several tars in one")
    shard(path, b"1", images=("0", "1", "0"))
    refused("'0.jpg' is the second image of its key")
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
        shard(path, b"1")
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("2.jpg")
            info.type, info.linkname = kind, "0.jpg"
            tar.addfile(info)
        refused("'2.jpg' is a link, a folder, a pipe or a sparse file")
    shard(path, b"1", images=("0", "1", "a.b"))
    shard(tmp_path / "train-1.tar", None, images=("5",))
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("5.JPG"))
    assert open_source(recipe(tmp_path), train=True).targets == [0, 1]
    assert "left out 1 images with several dots in their names, the first is a.b.jpg" in caplog.text
    assert "train-1.tar: left out 1 images without a .cls label, the first is 5" in caplog.text


@pytest.mark.parametrize("over", [0, 1])
def test_names_and_padding_up_to_their_bounds(tmp_path, over):
    """A member's names of 8 KiB, and 1 MiB of zeros behind the last; not a byte more."""
    path = tmp_path / "train-0.tar"

    def check(message):
        if over:
            with pytest.raises(ValueError, match=rf"train-0\.tar.*{message}"):
                open_source(recipe(tmp_path), train=True)
        else:
            assert open_source(recipe(tmp_path), train=True).targets == [0, 1]

    name = "n" * (8192 + over - len("8192 path=.jpg\n"))  # with which the record of pax has 8,192 bytes
    shard(path, b"1", images=("0", "1", name))
    check("has 8,193 bytes of names")
    shard(path, b"1")
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end] + bytes((1 << 20) + over))
    check(f"what follows byte {end:,} is neither a file nor the end")


def test_rows_that_name_files_open_only_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    os.mkfifo(tmp_path / "pipe")
    rows = [{"bytes": None, "path": str(tmp_path / "pipe")}, {"bytes": b"", "path": None}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    source = HfSource.__new__(HfSource)
    source.image, source.data = "image", datasets.Dataset.from_dict({"image": rows}, features=features)
    for index, reason in enumerate(("is a named pipe, not a file", "the row has no image")):
        assert reason in read_sample(source, index, 3).reason


def test_a_folder_that_cannot_be_read_is_no_empty_class(root, monkeypatch):
    """Its pictures would vanish in silence."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="train/b"):
        open_source(recipe(root), train=True)


@pytest.mark.parametrize("what", ["image", "label", "range"])
def test_null_rows_are_named(root, tmp_path, what):
    datasets = pytest.importorskip("datasets")
    paths = [str(path) for path in sorted((root / "train").rglob("*.png"))[:4]]
    rows = {"image": paths, "label": [0, 1, 0, 1]}
    if what == "range":
        rows["label"][2] = -1
    else:
        rows[what][2] = None
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "hf"))
    said = "1 rows have no image, the first is row 2" if what == "image" else "row 2 has the label"
    with pytest.raises(ValueError, match=said):
        open_source(recipe(tmp_path / "hf"), train=True)


# --- the order of an epoch ---


def test_the_order_and_augmentation_do_not_depend_on_workers_or_position(folder):
    def take(workers, start, epoch=1):
        data = TrainData(pictures(folder, num_parallel_workers=workers), World(), torch.device("cpu"))
        return [(batch.images, batch.targets) for batch in data.batches(epoch, start)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole, split = take(0, 0), take(2, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert len(whole) == 6 and len(split) == 4
    for (images, targets), (other_images, other_targets) in zip(whole[2:], split, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)
    assert not torch.equal(whole[0][0], take(0, 0, epoch=2)[0][0])


def test_every_epoch_has_an_order_of_its_own(folder):
    order = TrainData(pictures(folder), World(), torch.device("cpu")).order
    orders = [order.of(epoch).tolist() for epoch in range(3)]
    assert all(sorted(each) == list(range(24)) for each in orders) and len(set(map(tuple, orders))) == 3
    plain = TrainData(pictures(folder, shuffle=False), World(), torch.device("cpu")).order
    assert plain.of(0).tolist() == plain.of(1).tolist() == list(range(24))
    other = TrainData(pictures(folder, seed=7), World(), torch.device("cpu")).order
    assert other.of(0).tolist() != orders[0]


def test_every_epoch_has_augmentations_of_its_own(folder):
    """In one order: of pictures the policy's draws, of digits the shifts, which stay within the margin."""
    data = TrainData(pictures(folder, shuffle=False, batch_size=8, mixup=0, cutmix=0), World(), CPU)
    first, second = (next(data.batches(epoch)) for epoch in (0, 1))
    assert torch.equal(first.targets, second.targets)
    assert not any(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))
    order = TrainData(load_recipe("digits", {"shift": 2}), World(), CPU).order
    shifts = [order.shifts(epoch) for epoch in (0, 1)]
    assert all((each.min(), each.max()) == (0, 4) for each in shifts) and (shifts[0] != shifts[1]).mean() > 0.5


def test_training_transforms_do_what_the_recipe_says():
    """Flips, the crop's area and shape, erasing: seen on an image whose pixels tell their place, bright enough not to pass for erased."""
    y, x = np.mgrid[:64, :64]
    image = Image.fromarray(np.stack([64 + 2 * x, 64 + 2 * y, np.full_like(x, 200)], -1).astype(np.uint8))
    still = {"image_resize": 32, "mean": "0,0,0", "std": "1,1,1", "scale": "[1, 1]", "ratio": "[1, 1]", "hflip": 0, "vflip": 0}
    still |= {"color_jitter": 0, "auto_augment": "null", "re_prob": 0, "interpolation": "bilinear"}

    def spans(**keys):
        """Columns and rows of the image that the corners of the transformed one come from: (left, right), (top, bottom)."""
        made = data_module.train_transform(load_recipe(None, still | keys))(image)
        place = (made[:2] * 255 - 64) / 2
        return (place[0, 16, 0].item(), place[0, 16, -1].item()), (place[1, 0, 16].item(), place[1, -1, 16].item())

    around = pytest.approx((0.5, 62.5), abs=1)
    assert spans() == (around, around)
    turned = pytest.approx((62.5, 0.5), abs=1)
    assert spans(hflip=1) == (turned, around) and spans(vflip=1) == (around, turned)
    torch.manual_seed(0)
    for _ in range(20):
        (left, right), (top, bottom) = spans(scale="[0.25, 0.36]", ratio="[2, 2.5]")
        wide, high = 64 / 62 * (right - left), 64 / 62 * (bottom - top)
        assert 1.7 < wide / high < 2.9 and 0.2 < wide * high / 64**2 < 0.42
    erasing = still | {"re_prob": 1, "re_scale": "[0.1, 0.15]", "re_ratio": "[0.2, 0.25]", "re_value": "0"}
    for _ in range(5):
        erased = data_module.train_transform(load_recipe(None, erasing))(image)[2] == 0
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert 0.07 < rows * columns / 32**2 < 0.18 and 3 < columns / rows < 6
        assert erased.sum() == rows * columns
    assert not (data_module.train_transform(load_recipe(None, still))(image)[2] == 0).any()
    noise = data_module.train_transform(load_recipe(None, erasing | {"re_value": "random"}))(image)
    assert noise.min() < -1 and noise.max() > 1.5 and (noise < 0).float().mean() < 0.1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_image_to_train_on_is_resized_and_normalised_as_one_to_validate(interpolation):
    """Where nothing is drawn: the whole of a square image, in the recipe's filter, by its mean and std."""
    whole = {"image_resize": 32, "scale": "[1, 1]", "ratio": "[1, 1]", "hflip": 0, "color_jitter": None, "re_prob": 0, "crop_pct": 1.0}
    chosen = load_recipe(None, whole | {"mean": [0.2, 0.4, 0.6], "std": [0.5, 0.3, 0.2], "interpolation": interpolation})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    trained, evaluated = data_module.train_transform(chosen)(image), data_module.eval_transform(chosen)(image)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)


def test_two_processes_share_the_batches_of_one(folder):
    def take(rank, size, batch):
        data = TrainData(
            pictures(folder, batch_size=batch, drop_remainder=False, mixup=0, cutmix=0), World(rank, size), torch.device("cpu")
        )
        return list(data.batches(0))

    for one, left, right in zip(take(0, 1, 10), take(0, 2, 5), take(1, 2, 5), strict=True):
        assert torch.equal(one.images, torch.cat([left.images, right.images]))
        assert left.share + right.share == one.share == 1.0


def test_repeated_augmentation_repeats_images_with_other_augmentations(folder):
    data = TrainData(pictures(folder, aug_repeats=3, batch_size=24), World(), torch.device("cpu"))
    order = data.order.of(0)
    assert len(order) == 24 and len(set(order.tolist())) == 8
    images = next(data.batches(0)).images
    same = np.flatnonzero(order == order[0])
    assert not torch.equal(images[same[0]], images[same[1]])


# --- other layouts ---


def test_tar_shards_hold_the_images_of_the_folder(folder, tmp_path):
    wds = pytest.importorskip("webdataset")
    tree = open_source(pictures(folder), train=True)
    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=10, verbose=0) as writer:
        for i, target in enumerate(tree.targets):
            writer.write({"__key__": f"{i:06}", "jpg": Path(tree.name(i)).read_bytes(), "cls": str(target)})
    shutil.copy(tmp_path / "train-0000.tar", tmp_path / "val-0000.tar")
    shards = open_source(pictures(tmp_path), train=True)
    assert type(shards).__name__ == "TarSource" and shards.targets == tree.targets
    for i in range(len(tree.targets)):
        assert shards.open(i).read() == tree.open(i).read()
    assert train(pictures(tmp_path, epoch_size=1), tmp_path / "run", progress=False).epochs == 1


@pytest.mark.parametrize("saved", [True, False])
def test_hugging_face_files_hold_the_images_of_the_folder(folder, tmp_path, saved, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tree = open_source(pictures(folder), train=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    rows = {"image": [tree.name(i) for i in range(len(tree.targets))], "label": tree.targets}
    data = datasets.Dataset.from_dict(rows, features=features)
    root = tmp_path / "hf"
    if saved:
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(root))
    else:
        root.mkdir()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data.to_parquet(str(root / "train-00000.parquet"))
    source = open_source(pictures(root), train=True)
    assert type(source).__name__ == "HfSource" and source.targets == tree.targets and source.classes == ["blue", "red"]
    image = read_sample(source, 5, 3)
    assert image.tobytes() == read_sample(tree, 5, 3).tobytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_dir": ""}, "data_dir must name the folder"),
        ({"data_dir": "nowhere"}, "data_dir nowhere is no folder"),
        ({"train_split": "holdout"}, "has no folder 'holdout'; --train_split names another"),
        ({"dataset": "wds"}, "no tar shards train"),
        ({"batch_size": 48}, "the global batch of 48 exceeds the 24 samples"),
        ({"sampling_ratio": 0.01}, "no sample left"),
    ],
)
def test_missing_data_is_named(folder, tmp_path, keys, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(pictures(folder, **keys), tmp_path / "run", progress=False)
    assert message in str(error.value)


def test_choose_samples():
    targets = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert choose_samples(targets, 2) == [0, 1, 2, 3, 4, 5]
    assert choose_samples(targets, None, 0.5) == [0, 3, 6, 7]
    assert choose_samples(targets, 1, 1.0, 2) == [0, 1]


@pytest.mark.parametrize(
    ("mindcv", "timm"),
    [
        ("autoaug-mstd0.5", "original-mstd0.5"),
        ("autoaugr", "originalr"),
        ("randaug-m9-n2", "rand-m9-n2"),
        ("rand-m9", "rand-m9"),
        (None, None),
    ],
)
def test_policies_of_mindcv_in_words_of_timm(mindcv, timm):
    assert timm_policy(mindcv) == timm


def test_digits_are_normalised_and_what_they_leave_is_black():
    """At their own 8 x 8 pixels: scaled by the recipe's mean and std; moved within the margin, whose pixels are a black image's."""
    pytest.importorskip("sklearn")
    keys = {"image_resize": 8, "patch_size": 2, "mean": [0.25], "std": [0.5], "batch_size": 16, "shift": 0}
    black, recipe = -0.5, load_recipe("digits", keys)
    images, targets = next(iter(EvalData(recipe, World(), CPU)))
    source = open_source(recipe, False)
    assert source.pixels.min() == 0 and source.pixels.max() == 1
    torch.testing.assert_close(images[:, 0], (torch.from_numpy(source.pixels[:16]) - 0.25) / 0.5)
    assert targets.tolist() == source.targets[:16]
    moved = TrainData(load_recipe("digits", keys | {"shift": 3}), World(), CPU)
    still = {tuple(image.flatten().tolist()) for image in (torch.from_numpy(open_source(recipe, True).pixels) - 0.25) / 0.5}
    for batch in moved.batches(0, 0):
        assert batch.images.shape[2:] == (8, 8) and batch.images.min() == black
        assert any(tuple(image.flatten().tolist()) not in still for image in batch.images)
        break


def test_colours_are_jittered_where_no_policy_does_it(root):
    def jitter(**keys):
        transforms = data_module.train_transform(recipe(root, **keys)).transforms
        return next((one.brightness for one in transforms if type(one).__name__ == "ColorJitter"), None)

    assert jitter(color_jitter=0.3) == pytest.approx((0.7, 1.3)) and jitter(color_jitter=[0.1, 0.2, 0.2]) == pytest.approx((0.9, 1.1))
    assert jitter(color_jitter=None) is jitter(color_jitter=0.3, auto_augment="trivialaugwide") is None


@pytest.mark.parametrize("repeats", [0, 1, 2, 3])
def test_an_epoch_of_repeated_augmentation_has_each_image_so_often(root, repeats):
    order = data_module.Order(recipe(root, aug_repeats=repeats, batch_size=6), [0] * 18, World()).of(0)
    counts = np.bincount(order, minlength=18)
    assert len(order) == 18 and sorted(counts[counts > 0]) == [max(repeats, 1)] * (18 // max(repeats, 1))
