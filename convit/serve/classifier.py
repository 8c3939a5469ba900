"""The model behind the service: images to probabilities, whatever waits in one batch, and where its heads look."""

import asyncio
import base64
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import convit
from convit.engine.images import read_image
from convit.engine.preparation import Preparation
from convit.engine.trained import class_names
from convit.pytorch.diagnostics import attention_rows

# raster formats; Pillow's others start programs, or hold no photograph
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


class Prepared(NamedTuple):
    """An upload as the model sees it: the crop, and the same normalised [channels, height, width]."""

    crop: Image.Image
    array: np.ndarray


class Classifier:
    """One model, used by one thread. While it computes, images wait, and the next batch is all of them, up to ``max_batch``.

    Args:
        model: A PyTorch ConViT in evaluation mode with a classifier.
        max_batch: The largest batch.
        max_pixels: The largest upload that is decoded, width times height.
        precision: "auto", "float32" or "bfloat16": what ``convit.optimize`` computes in, on CPU.
        on_batch: Told the size of every batch.
    """

    def __init__(self, model: Any, max_batch: int, max_pixels: int, precision: str, on_batch: Callable[[int], None]) -> None:
        if not model.num_classes:
            raise ValueError("model must have a classifier, got num_classes = 0")
        self.model, self.max_batch, self.max_pixels, self.on_batch = model.eval(), max_batch, max_pixels, on_batch
        self.device = next(model.parameters()).device
        self.fast: Any = model
        if self.device.type == "cpu":
            self.fast = convit.optimize(model, None if precision == "auto" else precision)
        self.precision = str(getattr(self.fast, "dtype", next(model.parameters()).dtype)).removeprefix("torch.")
        self.preparation = Preparation.of(model)
        self.names = class_names(list(model.pretrained_cfg.get("label_names") or []), model.num_classes)
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._forward([np.zeros((model.in_chans, *self.preparation.size), np.float32)])  # what the first call builds

    def prepare(self, data: bytes) -> Prepared:
        """Decode an upload.

        Raises:
            ValueError: It is no image of ``FORMATS``, is damaged, or has more than ``max_pixels``.
        """
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        try:
            with Image.open(io.BytesIO(data), formats=known) as header:  # reads no pixel yet
                width, height = header.size
        except Image.DecompressionBombError as error:  # Pillow's own limit comes first
            raise ValueError(f"the image has more pixels than the {self.max_pixels} that are taken") from error
        except Exception as error:  # the many ways in which Pillow refuses a file
            raise ValueError(f"this is no image of {', '.join(known)}") from error
        if width * height > self.max_pixels:
            raise ValueError(f"the image has {width} x {height} pixels, more than the {self.max_pixels} that are taken")
        crop = self.preparation.crop(read_image(io.BytesIO(data), self.model.in_chans, known))
        return Prepared(crop, self.preparation.normalise(crop))

    async def probabilities(self, image: Prepared) -> np.ndarray:
        """The probability of every class, [classes] float32."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((image.array, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def attention(self, image: Prepared, query: tuple[int, int] | None) -> dict[str, Any]:
        """Where every head of every layer looks from the patch ``query`` (default the middle one), and the picture it looks at.

        Raises:
            ValueError: The query is outside the grid.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._look, image, query)

    def close(self) -> None:
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]
                batch = [one for one in batch if not one[1].cancelled()]  # their clients have gone
                if not batch:
                    continue
                try:
                    rows = await loop.run_in_executor(self._thread, self._forward, [array for array, _ in batch])
                except Exception as error:
                    for _, answer in batch:
                        if not answer.cancelled():
                            answer.set_exception(error)
                    continue
                self.on_batch(len(batch))
                for (_, answer), row in zip(batch, rows, strict=True):
                    if not answer.cancelled():
                        answer.set_result(row)
        finally:
            self._running = None

    def _forward(self, arrays: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            logits = self.fast(torch.from_numpy(np.stack(arrays)).to(self.device))
            return np.asarray(logits.float().softmax(dim=-1).cpu())

    def _look(self, image: Prepared, query: tuple[int, int] | None) -> dict[str, Any]:
        images = torch.from_numpy(image.array)[None].to(self.device)
        rows = attention_rows(self.model, images, query)
        file = io.BytesIO()
        image.crop.save(file, "PNG")
        layers = [
            {
                "kind": "MHSA" if layer.gates is None else "GPSA",
                "heads": [
                    {
                        "gate": None if layer.gates is None else round(layer.gates[i], 4),
                        "map": [round(x, 6) for x in each.flatten().tolist()],
                    }
                    for i, each in enumerate(layer.maps)
                ],
            }
            for layer in rows.layers
        ]
        picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"grid": rows.grid, "query": rows.query, "picture": picture, "layers": layers}
