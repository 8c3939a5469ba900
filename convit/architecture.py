"""What the models of both frameworks and their weights share: variants, ImageNet's statistics, position embeddings on another grid."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line starts without NumPy
    import numpy as np

# of the pictures that every published checkpoint was trained on, per channel of [0, 1]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

VARIANTS: dict[str, dict[str, int]] = {
    "convit_tiny": {"embed_dim": 192, "num_heads": 4},
    "convit_tiny_plus": {"embed_dim": 256, "num_heads": 4},
    "convit_small": {"embed_dim": 432, "num_heads": 9},
    "convit_small_plus": {"embed_dim": 576, "num_heads": 9},
    "convit_base": {"embed_dim": 768, "num_heads": 16},
    "convit_base_plus": {"embed_dim": 1024, "num_heads": 16},
}


def bicubic(centres: Any, source: Any, width: Any) -> Any:
    """The weights [new, old] that resample one axis: Keys' cubic (a = -0.5), cut at the borders and normalised, as timm does.

    The arrays are NumPy's or torch's; only operations that both (and every exporter) know are used.

    Args:
        centres: [new], the middle of every new cell in units of old ones.
        source: [old], the middle of every old cell.
        width: What the kernel is widened by: old / new where that is more than 1, else 1.
    """
    x = abs(source[None, :] - centres[:, None]) / width
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    cubic = near * (x < 1) + far * ((x >= 1) & (x < 2))
    return cubic / cubic.sum(1)[:, None]


def resample(position: "np.ndarray", grid: tuple[int, int], new_grid: tuple[int, int]) -> "np.ndarray":
    """Resample a position embedding [1, gh*gw, C] to another grid: bicubic, with antialiasing, as timm does; float32."""
    import numpy as np

    rows, columns = (
        bicubic((np.arange(new) + 0.5) * (old / new), np.arange(old) + 0.5, max(old / new, 1.0))
        for old, new in zip(grid, new_grid, strict=True)
    )
    table = position.astype(np.float64).reshape(*grid, -1)
    table = np.einsum("ya,xb,abd->yxd", rows, columns, table, optimize=True)
    return np.ascontiguousarray(table.reshape(1, -1, table.shape[-1]), np.float32)
