"""The C++ library as MindSpore's custom operators: ``ops.Custom(func_type="aot")`` over the C ABI of ``csrc/mindspore_aot.cpp``."""

import ctypes
from functools import lru_cache
from importlib.util import find_spec

SYMBOL = "convit_gpsa_packed_forward"


@lru_cache(None)
def library() -> tuple[str | None, str]:
    """The path of the library, or None and the reason why there is none."""
    spec = find_spec("convit._C")
    mend = "CONVIT_BUILD_EXT=1 pip install ... builds it or says why not"
    if spec is None or spec.origin is None:
        return None, f"the C++ kernels are not built for this Python; {mend}"
    try:
        getattr(ctypes.CDLL(spec.origin), SYMBOL)
    except OSError as error:
        return None, f"the C++ library does not load: {error}; {mend}"
    except AttributeError:
        return None, f"{spec.origin} is of another version: it has no {SYMBOL}; {mend}"
    return spec.origin, ""


def symbol(name: str) -> str:
    """What ``ops.Custom`` takes as ``func``. Ask ``library`` first."""
    return f"{library()[0]}:{name}"
