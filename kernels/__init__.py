"""Device kernels of ConViT, installed as ``convit.kernels``.

A checkout's root on ``sys.path`` (an editable installation, ``python -m pytest``) shows this folder as ``kernels`` too, the name of a
package on the package index. Who only looks whether that is there, as transformers does, finds a package without version or contents; who
takes something from it is told what it is.
"""

if __name__ != "convit.kernels":
    __path__ = []

    def __getattr__(name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"this folder is the package convit.kernels and was imported as {__name__!r}: "
            "install ConViT (pip install -e .) and run `pytest`, not `python -m pytest`"
        )
