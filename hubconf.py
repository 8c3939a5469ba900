"""The variants for ``torch.hub.load(FOLDER_OR_REPOSITORY, "convit_tiny", pretrained=True)``, where convit is installed."""

import sys as _sys
from functools import partial as _partial
from pathlib import Path as _Path

# torch.hub puts this folder first on the path, but an installed convit goes before it: here nothing is compiled, and in an archive of a
# repository, which torch.hub unpacks, the link convit/kernels is a text file
_path, _here = _sys.path[:], _Path(__file__).resolve().parent
_sys.path[:] = [place for place in _path if not place or _Path(place).resolve() != _here]
try:
    import convit as _convit  # noqa: F401
except ModuleNotFoundError:
    if not (_here / "convit" / "kernels").is_dir():
        raise ModuleNotFoundError("torch.hub finds these models where convit is installed: pip install it first") from None
finally:
    _sys.path[:] = _path

from convit.architecture import VARIANTS as _VARIANTS  # noqa: E402
from convit.pytorch.model import create_model as _create_model  # noqa: E402

dependencies = ["torch", "numpy"]

globals().update({_name: _partial(_create_model, _name) for _name in _VARIANTS})
