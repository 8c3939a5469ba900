"""Build rules; the metadata is in pyproject.toml. ``CONVIT_BUILD_EXT``: auto (default) builds if it can, 1 fails loudly, 0 skips."""

import os
import re
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("CONVIT_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"CONVIT_BUILD_EXT must be auto, 0 or 1, got {MODE!r}")


def extensions() -> list:
    if MODE == "0":
        return []
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError:
        if MODE == "1":
            raise
        return []
    ParallelCompile("CONVIT_BUILD_JOBS", default=os.cpu_count() or 1).install()
    return [
        Pybind11Extension(
            "convit._C",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.h"),
            include_dirs=["csrc"],
            # each instruction set is chosen inside its own file, at run time: no -march here
            extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra"] if os.name != "nt" else [],
            extra_link_args=["-pthread"] if sys.platform == "linux" else [],
            cxx_std=17,
        )
    ]


def description() -> str:
    """README.md for a package index, where no other file is at hand: without pictures, links to files as plain text."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


class BuildExt(build_ext):
    """Delete the old library first, so that a failed or skipped build never leaves a stale one to be loaded."""

    def run(self) -> None:
        root = Path(self.build_lib) if not self.inplace else Path(__file__).parent
        for old in (root / "convit").glob("_C.*"):
            old.unlink()
        try:
            super().run()
        except Exception as error:
            if MODE == "1":
                raise
            print(f"convit: the C++ kernels were not built ({error}); the portable paths will serve", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        for extension in list(self.extensions):
            if not Path(self.get_ext_fullpath(extension.name)).exists() and not self.inplace:
                self.extensions.remove(extension)
        super().copy_extensions_to_source()


if MODE == "0":
    for old in (Path(__file__).parent / "convit").glob("_C.*"):
        old.unlink()

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
