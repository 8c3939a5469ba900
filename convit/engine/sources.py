"""Where images with labels come from: folders, tar shards, Hugging Face files, scikit-learn's digits. Imports no framework."""

import errno
import io
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from convit.dispatch import nearest
from convit.engine.images import BadImage, image_suffixes, images_below, read_image
from convit.engine.recipe import Recipe
from convit.weights.files import check_regular, read_text, shown

logger = logging.getLogger("convit")

MOST_CLASSES = 100_000
MAX_HEADER = 8 << 10  # bytes of a member's long name or pax records: tarfile's time grows with the square
MAX_PADDING = 1 << 20  # zeros behind a tar
SPLITS = {"val": ("val", "validation", "valid", "test"), "validation": ("validation", "val", "valid"), "train": ("train", "training")}


@cache
def _warn(text: str) -> None:
    """Once: a folder is opened several times in a run."""
    logger.warning("%s", text)


# a source has: where, targets, classes, named (whether the classes have names of their own, or numbers), name(index), open(index)


class FolderSource:
    """A folder of image folders, one per class, in the order in which timm reads them; images may lie deeper."""

    named = True

    def __init__(self, root: Path) -> None:
        self.where = str(root)
        folders = sorted(
            (entry for entry in root.iterdir() if entry.is_dir() and entry.name[:1] != "."), key=lambda entry: _natural(entry.name)
        )
        images = [(str(path), folder.name) for folder in folders for path in images_below(folder)]
        stray = sorted(entry.name for entry in root.iterdir() if entry.suffix.lower() in image_suffixes() and entry.is_file())
        if not images:
            found = f"{len(stray)} images but " if stray else ""
            raise ValueError(
                f"{root} holds {found}no folders of images, one per class: move each image into a folder with the name of its class "
                "(valprep.sh does it for the validation images of ILSVRC)"
            )
        if stray:
            _warn(f"{root}: left out {len(stray)} images beside the class folders, the first is {stray[0]}")
        images.sort(key=lambda image: _natural(image[0]))
        present = {name for _, name in images}
        self.classes = [folder.name for folder in folders if folder.name in present]
        if len(present) < len(folders):
            empty = [folder.name for folder in folders if folder.name not in present]
            _warn(f"{root}: no image in the folders {', '.join(empty[:10])}: they are no classes")
        number = {name: target for target, name in enumerate(self.classes)}
        self.paths = [path for path, _ in images]
        self.targets = [number[name] for _, name in images]

    def part(self, train: bool, val_share: float, seed: int) -> "FolderSource":
        """The images to train on, or the share of each class that is kept for validation, at least one; drawn from the seed.

        Raises:
            ValueError: A class has a single image.
        """
        labels, kept = np.asarray(self.targets), []
        for number, name in enumerate(self.classes):
            where = np.random.default_rng([seed, number]).permutation(np.flatnonzero(labels == number))
            if len(where) < 2:
                raise ValueError(f"class {name!r} has a single image: training and validation need one each")
            held = min(max(round(len(where) * val_share), 1), len(where) - 1)
            kept += sorted(where[held:] if train else where[:held])
        self.paths, self.targets = [self.paths[i] for i in kept], labels[kept].tolist()
        return self

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> BinaryIO:
        check_regular(self.paths[index])
        return open(self.paths[index], "rb")


def _natural(name: str) -> list[Any]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


class TarSource:
    """Tar shards in webdataset's layout: ``key.jpg`` beside ``key.cls``. Indexed, not streamed, so that any sample can be reached."""

    named = False

    def __init__(self, shards: list[Path]) -> None:
        self.where = str(shards[0].parent)
        self.samples: list[tuple[str, str, int, int]] = []  # shard, key, offset and size of the image
        self.targets: list[int] = []
        for shard in shards:
            self._index(str(shard))
        if not self.samples:
            raise ValueError(f"no image with a .cls label in {len(shards)} tar shards, the first of which is {shards[0]}")
        self.classes = [str(i) for i in range(max(self.targets) + 1)]

    def _index(self, shard: str) -> None:
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        dotted = []
        check_regular(shard)
        try:
            with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.lower().partition(".")
                    key, kind = f"{folder}/{base[: len(stem)]}", f".{suffix}"
                    if kind != ".cls" and kind not in image_suffixes():
                        dotted += [member.name] * (stem != "" and f".{suffix.rpartition('.')[2]}" in image_suffixes())
                        continue
                    if kind == ".cls":
                        text = tar.extractfile(member).read(20) if _is_plain(member) else b"of no file"  # type: ignore[union-attr]
                        if not text.strip().isdigit() or int(text) >= MOST_CLASSES or member.size > len(text):
                            raise ValueError(f"{shown(member.name)} holds the label {text!r}, expected 0 to {MOST_CLASSES - 1}")
                    elif not _is_plain(member):
                        raise ValueError(f"{shown(member.name)} is a link, a folder, a pipe or a sparse file")
                    if key in (labels if kind == ".cls" else images):
                        raise ValueError(f"{shown(member.name)} is the second {'label' if kind == '.cls' else 'image'} of its key")
                    if kind == ".cls":
                        labels[key] = int(text)
                    else:
                        images[key] = (member.offset_data, member.size)
                _check_end(tar)
        except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a place that no file has
                raise
            raise ValueError(f"{shard} is not an uncompressed tar of key.jpg and key.cls files: {error}") from None
        if dotted:
            logger.warning("%s: left out %d images with several dots in their names, the first is %s", shard, len(dotted), dotted[0])
        unlabelled = [key for key in images if key not in labels]
        if unlabelled:
            logger.warning(
                "%s: left out %d images without a .cls label, the first is %s", shard, len(unlabelled), unlabelled[0].lstrip("/")
            )
        for key, (offset, size) in images.items():
            if key in labels:
                self.samples.append((shard, key, offset, size))
                self.targets.append(labels[key])

    def name(self, index: int) -> str:
        shard, key, _, _ = self.samples[index]
        return f"{shard}:{key.lstrip('/')}"

    def open(self, index: int) -> Any:
        shard, _, offset, size = self.samples[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


class _Header(tarfile.TarInfo):
    """A member's header; one that describes another (a long name, pax records) is no longer than tarfile reads in no time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in (b"x", b"g", b"X", b"L", b"K") and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"{shown(header.name)} has {header.size:,} bytes of names")
        return header


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse what tarfile takes for the end: a damaged header, or an archive behind which another begins."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    rest = file.read(MAX_PADDING + 1)
    if len(rest) > MAX_PADDING or rest.strip(b"\0"):
        raise ValueError(f"what follows byte {tar.offset:,} is neither a file nor the end: it is damaged, or several tars in one")


class HfSource:
    """A split of a Hugging Face data set on disk: parquet or arrow files, an image folder with metadata, or a ``save_to_disk`` folder."""

    def __init__(self, root: Path, splits: tuple[str, ...]) -> None:
        try:
            import datasets
        except ImportError:
            raise ImportError("Hugging Face data needs the package datasets: pip install '.[train]' in the source folder") from None
        if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
            data = datasets.load_from_disk(str(root))
        else:
            data = datasets.load_dataset(str(root))
        if isinstance(data, dict):
            found = next((name for name in splits if name in data), None)
            if found is None:
                raise ValueError(f"{root} has the splits {', '.join(data)}, none of {', '.join(splits)}")
            data = data[found]
        kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
        self.image = next((name for name, kind in kinds.items() if kind == "Image"), None)
        self.label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), "label" if "label" in kinds else None)
        if self.image is None or self.label is None:
            raise ValueError(f"{root} needs an image column and a label column, it has {kinds}")
        labels = data[self.label]
        wrong = next((i for i, label in enumerate(labels) if not isinstance(label, int) or not 0 <= label < MOST_CLASSES), None)
        if wrong is not None:
            raise ValueError(f"{root}: row {wrong} has the label {labels[wrong]!r}, expected 0 to {MOST_CLASSES - 1}")
        self.where, self.targets = str(root), list(labels)
        column = data.data.column(self.image)
        if column.null_count and data._indices is None:
            row = next(i for i, null in enumerate(column.is_null()) if null.as_py())
            raise ValueError(f"{root}: {column.null_count} rows have no image, the first is row {row}")
        names = getattr(data.features[self.label], "names", None)
        self.named = bool(names)
        self.classes = names or [str(i) for i in range(max(self.targets, default=0) + 1)]
        self.data = data.cast_column(self.image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        return f"row {index}"

    def open(self, index: int) -> Any:
        image = self.data[index][self.image] or {}
        if image.get("bytes"):
            return io.BytesIO(image["bytes"])
        if not image.get("path"):
            raise ValueError("the row has no image")
        check_regular(image["path"])
        return open(image["path"], "rb")


class DigitsSource:
    """scikit-learn's digits: ``pixels`` [n, 8, 8] float32 in 0 to 1, a fixed stratified fifth kept for testing."""

    classes = [str(digit) for digit in range(10)]
    named, where = True, "the digits"

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise ImportError("the digits need scikit-learn: pip install '.[train]' in the source folder") from None
        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(images, targets, test_size=0.2, stratify=targets, random_state=0)
        pixels, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.pixels = pixels.reshape(-1, 8, 8).astype(np.float32) / 16
        self.targets = [int(label) for label in labels]


Source = FolderSource | TarSource | HfSource | DigitsSource


def open_source(recipe: Recipe, train: bool, classes: list[str] | None = None) -> Source:
    """The split that ``recipe`` names, its classes numbered as in ``classes`` (of a checkpoint or the training split) or ``class_map``.

    Raises:
        ValueError: ``data_dir`` is not set or holds no such data, classes that are not among the given ones, or, to train on, only one.
        FileNotFoundError: ``data_dir`` or the split does not exist.
    """
    source = _open(recipe, train)
    if train and min(len(source.classes), recipe.num_classes or 2) < 2:
        only = "num_classes 1" if recipe.num_classes == 1 else f"{source.where} with the single class {source.classes[0]!r}"
        raise ValueError(f"{only} leaves nothing to tell apart: training needs images of two classes at least")
    if recipe.class_map:
        text = read_text(Path(recipe.class_map).expanduser(), MOST_CLASSES * 100).removeprefix("\ufeff")
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ValueError(f"{recipe.class_map} names the class {twice!r} twice, so that nobody knows which number it has")
        match_classes(source, names, recipe.class_map)
    elif classes:
        match_classes(source, classes, "the checkpoint or the training data")
    return source


def match_classes(source: Source, classes: list[str], whose: str) -> None:
    """Number the classes of ``source`` as in ``classes``: by name where both have names, else as they are.

    Raises:
        ValueError: Classes that ``classes`` lacks.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in numbers]
    numbered = classes == [str(i) for i in range(len(classes))] and len(unknown) == len(source.classes) == len(classes)
    if numbered or (not source.named and len(source.classes) <= len(classes)):
        source.classes = classes
        return
    if unknown:
        raise ValueError(
            f"{source.where}: {len(unknown)} of its {len(source.classes)} classes are not among the {len(classes)} of {whose}, "
            f"the first is {unknown[0]!r}{nearest(unknown[0], classes)}. Classes are matched by name: rename them, or give the names "
            "that the data has in the order of the model's classes, --class_map FILE"
        )
    source.targets = [numbers[source.classes[target]] for target in source.targets]
    source.classes = classes


def imagenet_classes() -> list[str]:
    """The names of ImageNet-1K's folders, in the order of the classes; empty without timm, which knows them."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    return list(ImageNetInfo().label_names())


def match_imagenet(source: Source, num_classes: int | None) -> None:
    """Number the classes of ``source`` for a model whose checkpoint names none: by ImageNet's names, or as they are if it has as many.

    Raises:
        ValueError: It has fewer classes than the model, so that nobody knows which they are.
    """
    if num_classes is None or not source.named or len(source.classes) >= num_classes:
        return
    if num_classes == 1000 and set(source.classes) <= set(names := imagenet_classes()):
        match_classes(source, names, "ImageNet-1K")
        return
    raise ValueError(
        f"{source.where} has {len(source.classes)} classes, the model {num_classes}, and its checkpoint does not say which they are: "
        "give their names in order, --class_map FILE"
    )


def _open(recipe: Recipe, train: bool) -> Source:
    if recipe.dataset == "digits":
        return DigitsSource(train)
    if not recipe.data_dir:
        raise ValueError(f"data_dir must name the folder of the data set ({recipe.dataset}); --config digits needs none")
    root = Path(recipe.data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir {root} is no folder")
    split = recipe.train_split if train else recipe.val_split
    names = SPLITS.get(split, (split,))
    shards = next((found for name in names if (found := sorted([*root.glob(f"{name}*.tar"), *root.glob(f"{name}/*.tar")]))), [])
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    kind = recipe.dataset
    if kind == "imagenet":
        tables = [path for name in names for pattern in (f"{name}*.parquet", f"data/{name}*.parquet") for path in root.glob(pattern)]
        for files, what, which in ((shards, "shard", "wds"), (tables, "file", "hfds")):
            if files and folder and files[0].parent != folder:
                both = f"{root} holds the {what} {files[0].name} and the folder {folder.name}"
                raise ValueError(f"{both}: choose with --dataset {which} or --dataset folder")
        saved = any((root / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json"))
        columns = any(next(root.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet", "*/*.parquet", "*.arrow"))
        kind = "wds" if shards else "hfds" if saved or columns else "folder"
    if kind == "hfds":
        return HfSource(root, names)
    if kind == "wds":
        if not shards:
            raise FileNotFoundError(f"no tar shards {split}*.tar or {split}/*.tar in {root}")
        return TarSource(shards)
    if folder is None:
        if not any((root / name).is_dir() for name in {*sum(SPLITS.values(), ()), recipe.train_split, recipe.val_split}):
            return FolderSource(root).part(train, recipe.val_share, recipe.seed)  # the class folders themselves
        raise FileNotFoundError(f"data_dir {root} has no folder {split!r}; --{'train' if train else 'val'}_split names another")
    return FolderSource(folder)


def choose_samples(targets: list[int], num_classes: int | None, sampling_ratio: float = 1.0, num_samples: int | None = None) -> list[int]:
    """Indices of the first ``num_classes`` classes, of each the first ``sampling_ratio`` share (rounded down, as FAIR does); of these
    at most ``num_samples``, as evenly from all classes as they allow."""
    labels = np.asarray(targets)
    keep = np.ones(len(labels), bool) if num_classes is None else labels < num_classes
    if sampling_ratio < 1.0:
        for label in np.unique(labels):
            where = np.flatnonzero(labels == label)
            keep[where[int(len(where) * sampling_ratio) :]] = False
    found = np.flatnonzero(keep)
    if num_samples is not None and num_samples < len(found):
        by_class = np.argsort(labels[found], kind="stable")
        counts = np.unique(labels[found], return_counts=True)[1]
        place = np.empty(len(found), np.int64)  # of each sample in its class
        place[by_class] = np.concatenate([np.arange(count) for count in counts])
        found = np.sort(found[np.argsort(place, kind="stable")[:num_samples]])
    chosen: list[int] = found.tolist()
    if not chosen:
        raise ValueError(f"no sample left of {len(targets)} with num_classes={num_classes}, sampling_ratio={sampling_ratio}")
    return chosen


def read_sample(source: Any, index: int, channels: int) -> Image.Image | BadImage:
    """Image ``index``, decoded in full, or why it cannot be."""
    try:
        with source.open(index) as file:
            return read_image(file, channels)
    except (OSError, ValueError) as error:
        return BadImage(source.name(index), str(error))


def tell_replaced(bad: Iterable[BadImage]) -> None:
    """Log what ``read_some`` has replaced."""
    for image in bad:
        logger.warning("replaced the unreadable image %s (%s)", image.name, image.reason)


def read_some(source: Any, chosen: list[int], which: int, channels: int) -> tuple[Image.Image, int, list[BadImage]]:
    """The image ``chosen[which]``, or the next one that can be read; its index, and those that cannot.

    Raises:
        ValueError: A hundred in a row cannot be read, or all.
    """
    bad: list[BadImage] = []
    for step in range(min(100, len(chosen))):
        index = chosen[(which + step) % len(chosen)]
        image = read_sample(source, index, channels)
        if not isinstance(image, BadImage):
            return image, index, bad
        bad.append(image)
    raise ValueError(f"{len(bad)} images in a row cannot be read, from {bad[0].name} ({bad[0].reason})")
