"""A whole ConViT's inference on CPU as one call: ``csrc/infer.h`` with weights packed in its panels.

``Product`` has the interface of ``cpu_packed.Packed`` as far as weights go in and out; ``Inference`` joins the products of a network, whose
shape (``convit.pytorch.network.Shape``) names them, into the call.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convit.kernels.gpsa.cpu_cpp import _C, _broken  # type: ignore[attr-defined]

_LANES = 16


def why_not(dtype: torch.dtype) -> str | None:
    """Why this machine cannot run it, or should not; ``None`` if it can."""
    if _C is None:
        return _broken
    if dtype == torch.bfloat16 and getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "the processor's matrix unit (AMX) is faster, which PyTorch's oneDNN uses"
    return _C.infer_why_not(dtype == torch.bfloat16)


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    """First column and columns of each panel, as ``panel_vectors`` in ``csrc/infer.h`` has it."""
    vectors, at = -(-columns // _LANES), 0
    while at < vectors:
        left = vectors - at
        count = 3 if left == 3 or left >= 5 else 2 if left in (2, 4) else 1
        yield at * _LANES, count * _LANES
        at += count


def _padded(x: Tensor) -> Tensor:
    """[C] to contiguous float32 with zeros up to the next multiple of 16."""
    return F.pad(x.float(), (0, -x.shape[0] % _LANES)).clone()


class Product:
    """A weight [O, I] in panels, and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int):
        self.out, self.depth = weight.shape
        self.step = 2 if dtype == torch.bfloat16 else 1
        self._bias = None if bias is None else _padded(bias)
        depth = -(-self.depth // self.step) * self.step
        self.weight = torch.empty(depth * -(-self.out // _LANES) * _LANES, dtype=dtype)
        for column, count in _panels(self.out):
            panel = weight[column : column + count]
            panel = F.pad(panel, (0, depth - self.depth, 0, count - panel.shape[0]))  # [count, depth]
            self._slice(column, count).copy_(panel.view(count, -1, self.step).transpose(0, 1))

    def _slice(self, column: int, count: int) -> Tensor:
        depth = -(-self.depth // self.step) * self.step
        return self.weight[column * depth : (column + count) * depth].view(-1, count, self.step)

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias[: self.out]

    def unpack(self) -> Tensor:
        panels = [self._slice(column, count).transpose(0, 1).flatten(1) for column, count in _panels(self.out)]
        return torch.cat(panels)[: self.out, : self.depth]

    def address(self) -> tuple[int, int, int, int]:
        return self.weight.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(), self.depth, self.out


class Inference:
    """The call over a ``Network`` whose products are ``Product``s. Keeps the tensors that it is given the addresses of."""

    def __init__(self, net: Any, dtype: torch.dtype):
        shape, self._kept = net.shape, [net.products]

        def keep(x: Tensor) -> int:
            x = x.float().contiguous()
            self._kept.append(x)
            return x.data_ptr()

        def norm(name: str, eps: float) -> tuple[int, int, float]:
            return keep(_padded(net.tensors[f"{name}.weight"])), keep(_padded(net.tensors[f"{name}.bias"])), eps

        def layer(i: int) -> tuple[Any, ...]:
            norms = (norm(f"blocks.{i}.norm{n + 1}", shape.eps[2 * i + n]) for n in (0, 1))
            products = (net.products[f"{i}.{name}"].address() for name in ("qkv", "proj", "fc1", "fc2"))
            names = (f"blocks.{i}.attn.pos_proj.weight", f"blocks.{i}.attn.gating_param")
            position = (keep(net.tensors[name]) if i < shape.local else 0 for name in names)
            return shape.heads[i], shape.scales[i], shape.gelus[i] == "tanh", *norms, *products, *position

        self._inference = _C.Inference(
            dtype == torch.bfloat16,
            shape.dim,
            shape.channels,
            *shape.patch,
            shape.prefix,
            shape.local,
            shape.classes,
            ("token", "avg", "").index(shape.pool),
            net.products["patch"].address(),
            net.products["head"].address() if shape.classes else (0, 0, shape.dim, 0),
            keep(net.prefix_tokens()),
            norm("norm", shape.eps[-1]),
            [layer(i) for i in range(shape.depth)],
        )

    def __call__(self, net: Any, images: Tensor) -> Tensor:
        shape = net.shape
        grid = shape.grid_of(images)
        images = images.to(torch.float32).contiguous()
        position = net.position(grid)
        width = shape.classes or shape.dim
        tokens = () if shape.pool else (shape.prefix + grid[0] * grid[1],)
        out = images.new_empty((images.shape[0], *tokens, width))
        if images.shape[0]:
            table = 0 if position is None else position.data_ptr()
            self._inference.run(images.data_ptr(), table, images.shape[0], *grid, out.data_ptr(), torch.get_num_threads())
        return out
