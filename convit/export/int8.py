"""Eight-bit files: a checked ONNX or OpenVINO file quantised by its runtime's own tool, and kept only where that pays on this machine.

A third of the folder's images calibrates, the others compare: how often the most probable class is that of the float file. Then both
are timed as a server would run them, in turns, against the fastest export in floating point: OpenVINO's as it comes, bfloat16 where
the chip multiplies it, and for ONNX also ONNX Runtime's own. What was found is written into the file, as JSON under "int8".
"""

import contextlib
import importlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convit.engine.images import images_below, read_named
from convit.engine.preparation import Preparation
from convit.engine.shown import quiet
from convit.export.check import Infer

FORMATS = {"onnx": ("onnxruntime.quantization", "export"), "openvino": ("nncf", "int8")}  # the tool, and the extra that brings it
FEWEST, CALIBRATE, COMPARE = 48, 128, 256  # images: at least in the folder, at most for either purpose
AGREEMENT = 0.9  # of the most probable classes: below, it is no longer the same model
BATCHES = (1, 8)
SECONDS, ROUNDS = 4.0, 5  # of timing, per batch: so long, and at least so many rounds
PAUSE = 0.003  # between turns: the other runtime's threads spin on after a call

_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Timing(NamedTuple):
    """Milliseconds of one call, medians, and the median over rounds of the float file's time over the int8 file's."""

    batch: int
    milliseconds: float
    float_milliseconds: float
    ratio: float


class Int8(NamedTuple):
    """What was measured of an int8 file.

    Attributes:
        agreement: The share of images with the same most probable class as the float file in float32.
        compared, calibrated: How many images, none in both.
        runs: How it is fastest here.
        against: The fastest floating-point export, and its type.
        timings: One per batch.
        threads: Cores of this machine, all of which both had.
    """

    agreement: float
    compared: int
    calibrated: int
    runs: str
    against: str
    timings: list[Timing]
    threads: int

    def __str__(self) -> str:
        times = "; ".join(
            f"batch {t.batch} {t.milliseconds:.1f} ms to {t.float_milliseconds:.1f} ({t.ratio:.2f} times as fast)" for t in self.timings
        )
        return (
            f"calibrated on {self.calibrated} images; same top-1 as in float32 on {self.agreement:.1%} of {self.compared} others\n"
            f"{self.runs}, to {self.against}, on the {self.threads} cores here: {times}"
        )


def check_int8(form: str, data_dir: str | os.PathLike[str] | None) -> None:
    """Raise ``ValueError`` or ``ImportError`` where a file of this format cannot be quantised."""
    if form not in FORMATS:
        raise ValueError(f"--int8 is for {' and '.join(FORMATS)}, got --format {form}")
    if data_dir is None:
        raise ValueError("--int8 is calibrated on images: name a folder of them, --data_dir DIR")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir {data_dir} is no folder")
    tool, extra = FORMATS[form]
    try:
        importlib.import_module(tool)
    except ImportError as error:
        raise ImportError(f"--int8 with --format {form} needs {tool} ({error}): pip install '.[{extra}]' in the source folder") from error


def read_images(data_dir: str | os.PathLike[str], preparation: Preparation) -> tuple[np.ndarray, np.ndarray]:
    """Images of a folder, in whichever folders they lie below it, evenly from all of it: those to calibrate on, those to compare with.

    Raises:
        ValueError: They are too few, or one cannot be read.
    """
    paths = sorted(images_below(Path(data_dir)))
    if len(paths) < FEWEST:
        raise ValueError(f"--int8 needs at least {FEWEST} images, data_dir {data_dir} holds {len(paths)}")
    count = min(len(paths), CALIBRATE + COMPARE)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    images = np.stack([preparation(read_named(path, len(preparation.mean))) for path in chosen])
    calibrate = np.arange(count) % 3 == 0
    return images[calibrate], images[~calibrate]


def quantise(path: Path, form: str, calibrate: np.ndarray, compare: np.ndarray) -> Int8:
    """Put an int8 file in the place of a float one.

    Raises:
        ValueError: It is not faster here, or not the same model any more; the float file stays.
    """
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".export-") as folder:
        made = Path(folder) / path.name
        quantised: Any = _with_nncf(path, calibrate) if form == "openvino" else _with_onnxruntime(path, made, calibrate)
        runs = _runs(quantised, form)
        exact = _openvino(path, _FLOAT32) if form == "openvino" else _onnxruntime(path)
        name, against, timings = _timed(runs, _floats(path, form), compare)
        same = [_top(runs[name], compare[i : i + 8]) == _top(exact, compare[i : i + 8]) for i in range(0, len(compare), 8)]
        agreement = float(np.concatenate(same).mean())
        found = Int8(agreement, len(compare), len(calibrate), name, against, timings, os.cpu_count() or 1)
        if agreement < AGREEMENT:
            raise ValueError(f"the int8 file is another model; nothing is written. {found}")
        if min(t.ratio for t in timings) <= 1:
            raise ValueError(f"the int8 file is not faster on this machine; nothing is written. Leave out --int8. {found}")
        text = json.dumps(found._asdict() | {"timings": [t._asdict() for t in timings]})
        if form == "openvino":
            import openvino

            quantised.set_rt_info(text, ["convit", "int8"])
            openvino.save_model(quantised, made, compress_to_fp16=False)
        else:
            import onnx

            model, facts = onnx.load(made), {entry.key: entry.value for entry in onnx.load(path).metadata_props}
            onnx.helper.set_model_props(model, facts | {"int8": text})
            onnx.save(model, made)
        for file in Path(folder).iterdir():
            os.replace(file, path.with_name(file.name))
    return found


def _with_nncf(path: Path, images: np.ndarray) -> Any:
    import nncf
    import openvino

    with quiet("nncf"), contextlib.redirect_stdout(sys.stderr):  # its progress
        data = nncf.Dataset([image[None] for image in images])
        return nncf.quantize(openvino.Core().read_model(path), data, subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER)


def _with_onnxruntime(path: Path, made: Path, images: np.ndarray) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # it advises through the root logger what is done here
    try:
        with tempfile.TemporaryDirectory(dir=made.parent.parent, prefix=".export-") as folder:
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(path, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                made,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
    finally:
        logging.disable(before)
    return made


# ---- runtimes, as a server starts them


def _openvino(model: Any, config: dict[str, str]) -> Infer:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **config})

    def infer(images: np.ndarray) -> Any:
        return compiled([images])[0]

    infer.type = _type(compiled)  # type: ignore[attr-defined]
    return infer


def _type(compiled: Any) -> str:
    name = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(name, name)


def _onnxruntime(path: Path) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _runs(quantised: Any, form: str) -> dict[str, Infer]:
    if form == "onnx":
        return {"ONNX Runtime in int8": _onnxruntime(quantised)}
    held = _openvino(quantised, _FLOAT32)
    found = {"OpenVINO in int8, INFERENCE_PRECISION_HINT f32": held}
    loose = _openvino(quantised, {})
    return found if loose.type == "float32" else {"OpenVINO in int8 as it comes": loose, **found}  # type: ignore[attr-defined]


def _floats(path: Path, form: str) -> dict[str, Infer]:
    """The exports in floating point: those of the format, and OpenVINO's where it has bfloat16."""
    found = {"ONNX Runtime in float32": _onnxruntime(path)} if form == "onnx" else {}
    if form == "openvino" or find_spec("openvino"):
        loose = _openvino(path, {})
        kind = loose.type  # type: ignore[attr-defined]
        if form == "openvino" or kind == "bfloat16":
            found[f"OpenVINO as it comes, in {kind}"] = loose
    return found


def _timed(runs: dict[str, Infer], floats: dict[str, Infer], images: np.ndarray) -> tuple[str, str, list[Timing]]:
    """The fastest of the int8 ways and of the float ones, at the first batch, and their times at every batch."""
    name, against, timings = "", "", []
    for batch in BATCHES:
        seconds = _interleaved({**runs, **floats}, images[np.arange(batch) % len(images)])
        if not name:
            name = min(runs, key=lambda each: statistics.median(seconds[each]))
            against = min(floats, key=lambda each: statistics.median(seconds[each]))
        ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds[name], seconds[against], strict=True))
        mine, theirs = (1e3 * statistics.median(seconds[each]) for each in (name, against))
        timings.append(Timing(batch, round(mine, 2), round(theirs, 2), round(ratio, 3)))
    return name, against, timings


def _interleaved(calls: dict[str, Infer], images: np.ndarray) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for infer in calls.values():
        infer(images)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(next(iter(seconds.values()))) < ROUNDS:
        for name, infer in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            infer(images)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _top(infer: Infer, images: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.asarray(infer(images)).argmax(axis=-1)
    return found
