"""Device kernels of ConViT, installed as ``convit.kernels``.

The guard below catches the one way to import this folder under a wrong name: a checkout's root on ``sys.path``
(``python -m pytest`` puts it there), where it would also hide the package called ``kernels`` on the package index.
"""

if __name__ != "convit.kernels":
    raise ImportError(
        f"this folder is the package convit.kernels and was imported as {__name__!r}: "
        "install ConViT (pip install -e .) and run `pytest`, not `python -m pytest`"
    )
