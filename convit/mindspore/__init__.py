"""ConViT for MindSpore, with MindCV's signatures and parameter names.

Where MindCV is installed, importing this registers our variants with it:

    import mindcv, convit.mindspore
    model = mindcv.create_model("convit_tiny_kernel")

The device is the one of ``mindspore.get_context("device_target")``; graph mode and pynative.
"""

import logging
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def _release(package: str) -> tuple[int, int] | None:
    """(major, minor) of an installed package, without importing it."""
    try:
        major, minor = version(package).split(".")[:2]
        return int(major), int(minor)
    except PackageNotFoundError:
        return None


def check_environment() -> None:
    """Raise ``ImportError`` with the mend if MindSpore cannot work here; nothing is imported."""
    mend = "pip install '.[mindspore]' in the source folder"
    mindspore, numpy = _release("mindspore"), _release("numpy")
    if mindspore is None or find_spec("mindspore") is None:
        raise ImportError(f"convit.mindspore needs MindSpore, which is not installed: {mend}")
    if mindspore < (2, 7):
        raise ImportError(f"convit.mindspore needs MindSpore 2.7 or newer, got {version('mindspore')}: {mend}")
    if numpy is not None and numpy >= (2, 0):
        raise ImportError(
            f"MindSpore {version('mindspore')} does not work with numpy {version('numpy')}: pip install 'numpy<2' (or {mend})"
        )


check_environment()

from convit.mindspore.attention import GPSA, MHSA  # noqa: E402
from convit.mindspore.model import ConViT, create_model, list_models, load_checkpoint  # noqa: E402
from convit.mindspore.ops import gpsa  # noqa: E402

__all__ = ["GPSA", "MHSA", "ConViT", "create_model", "gpsa", "list_models", "load_checkpoint"]


def _register_with_mindcv() -> None:
    if find_spec("mindcv") is None:
        return
    try:
        from convit.mindspore.mindcv import register

        register()
    except Exception as error:  # MindCV is not needed here: one that is broken must not take this package with it
        logging.getLogger("convit").warning("MindCV is installed but our models could not be registered with it: %s", error)


_register_with_mindcv()
