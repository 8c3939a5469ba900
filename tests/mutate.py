"""Plant small mistakes, one at a time, in a copy of the tree, and see whether the tests notice: ``make mutate``.

    python tests/mutate.py [--count 10] [--seed 0] [--only kernels/ csrc/] [--seconds 120] [--report tests/mutation.md]

Python is mutated by cosmic-ray's operators (pip install cosmic-ray), C++ by the patterns below. ``TESTS`` says which tests should notice a
mistake in which file; they stop at the first failure. A mutant that makes them fail, crash or outlast the limit was noticed; one that
lets them pass is a survivor and is listed with file, line and change. The sample follows from the seed: files are drawn with the weight of
their lines.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# file -> the tests that should notice a mistake in it; the first pattern that fits counts. None: needs a device or framework.
TESTS: list[tuple[str, tuple[str, ...] | None]] = [
    ("csrc/mindspore_aot.cpp", None),
    ("csrc/isa_neon.cpp", None),
    ("csrc/layers*", ("tests/test_linear.py", "tests/test_optimize.py")),
    ("csrc/optimize*", ("tests/test_optimize.py",)),
    ("csrc/*", ("tests/test_cpu_kernel.py", "tests/test_gpsa.py", "tests/test_gpsa_numerics.py")),
    ("kernels/gpsa/*mindspore*", None),
    ("kernels/gpsa/ascend_*", None),
    ("kernels/*/cpu_aot.py", None),
    ("kernels/aot.py", None),
    ("convit/mindspore/*", None),
    ("convit/engine/mindspore/*", None),
    ("convit/export/mindir.py", None),
    ("kernels/gpsa/gpu_triton/*", ("tests/test_triton.py",)),
    ("kernels/gpsa/definition.py", ("tests/test_gpsa_numerics.py",)),
    ("kernels/linear/*", ("tests/test_linear.py",)),
    ("kernels/*", ("tests/test_gpsa.py", "tests/test_gpsa_numerics.py", "tests/test_cpu_kernel.py", "tests/test_model.py")),
    ("convit/ops.py", ("tests/test_gpsa.py", "tests/test_linear.py", "tests/test_model.py")),
    ("convit/dispatch.py", ("tests/test_gpsa.py", "tests/test_package.py")),
    ("convit/pytorch/optimize.py", ("tests/test_optimize.py",)),
    ("convit/pytorch/accelerate.py", ("tests/test_accelerate.py",)),
    ("convit/pytorch/diagnostics.py", ("tests/test_plot.py", "tests/test_train.py")),
    ("convit/pytorch/*", ("tests/test_model.py", "tests/test_accelerate.py", "tests/test_checkpoints.py")),
    ("convit/weights/published.py", ("tests/test_published.py",)),
    ("convit/weights/*", ("tests/test_checkpoints.py", "tests/test_bad_checkpoints.py")),
    ("convit/engine/recipe.py", ("tests/test_config.py", "tests/test_train.py")),
    (
        "convit/engine/*",
        ("tests/test_validate.py", "tests/test_train.py", "tests/test_steps.py", "tests/test_data.py", "tests/test_resume.py"),
    ),
    ("convit/export/*", ("tests/test_export.py",)),
    ("convit/serve/*", ("tests/test_serve.py",)),
    ("convit/figures.py", ("tests/test_plot.py",)),
    ("convit/cli/demo.py", ("tests/test_demo.py",)),
    ("convit/cli/*", ("tests/test_package.py", "tests/test_config.py", "tests/test_validate.py")),
    ("bench/checks.py", ("tests/test_bench.py",)),
    ("bench/results.py", ("tests/test_bench.py",)),
]

OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for a, b in (("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"))),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, b in (("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt"), ("Eq", "NotEq"))),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, b in (("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is"))),
    *(f"core/{name}" for name in ("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot")),
    *(f"core/{name}" for name in ("NumberReplacer", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceUnaryOperator_Delete_Not")),
    "core/ReplaceUnaryOperator_Delete_USub",
)

# operators, bounds, constants, a dropped term, a dropped clamp
PATTERNS = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r" \+= ", " -= "),
    (r" \+= ", " = "),
    (r"\bstd::max\(([^,()]+), ([^,()]+)\)", r"\1"),
    (r"\bstd::min\(([^,()]+), ([^,()]+)\)", r"\1"),
    (r"\b0\.0?f?\b", "1.0f"),
    (r"\b1\.0?f?\b", "0.5f"),
    (r"\b([2-9]|[1-9]\d+)\b", r"(\1 + 1)"),
)


class Mutant(NamedTuple):
    file: str
    line: int
    before: str
    after: str
    text: str  # the whole mutated file


def tests_of(file: str) -> tuple[str, ...] | None:
    return next((tests for pattern, tests in TESTS if fnmatch(file, pattern)), None)


def cpp_mutants(file: str, text: str) -> list[Mutant]:
    found = []
    lines = text.split("\n")
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if code.lstrip().startswith(("#", "*", "/*", "using", "static_assert", "template")):
            continue
        for pattern, replacement in PATTERNS:
            for match in re.finditer(pattern, code):
                after = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                whole = [*lines[:number], after + line[len(code) :], *lines[number + 1 :]]
                found.append(Mutant(file, number + 1, line.strip(), after.strip(), "\n".join(whole)))
    return found


def python_mutants(file: str, text: str, dice: random.Random, most: int) -> list[Mutant]:
    """A random few: making all of them would parse the file thousands of times."""
    import ast

    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    tree = get_ast(text)
    places = []
    for name in OPERATORS:
        operator = get_operator(name)()
        count = sum(1 for node in ast_nodes(tree) for _ in operator.mutation_positions(node))
        places += [(operator, i) for i in range(count)]
    dice.shuffle(places)
    found = []
    lines = text.split("\n")
    for operator, i in places:
        if len(found) == most:
            break
        mutated = mutate_code(text, operator, i)
        if mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(text)):
            continue
        new = mutated.split("\n")
        number = next((n for n, pair in enumerate(zip(lines, new, strict=False)) if pair[0] != pair[1]), 0)
        found.append(Mutant(file, number + 1, lines[number].strip(), new[number].strip(), mutated))
    return found


def sample(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """Files are drawn with the weight of their lines, a mutant of each draw at random."""
    dice = random.Random(seed)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = {}
    for file in tracked:
        if file.endswith((".py", ".cpp", ".h")) and tests_of(file) and (not only or file.startswith(tuple(only))):
            files[file] = (ROOT / file).read_text(encoding="utf-8")
    names = list(files)
    drawn = dice.choices(names, [files[name].count("\n") for name in names], k=count)
    mutants = []
    for name in sorted(set(drawn)):
        wanted = drawn.count(name)
        if name.endswith(".py"):
            mutants += python_mutants(name, files[name], dice, wanted)
        else:
            every = cpp_mutants(name, files[name])
            mutants += dice.sample(every, min(wanted, len(every)))
    return mutants


class Workshop:
    """A copy of the tree that mutants are planted in."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(os.readlink(source))
            elif source.exists():
                shutil.copy2(source, target)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        for library in (ROOT / "convit").glob("_C.*"):
            shutil.copy2(library, folder / "convit" / library.name)
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, command: list[str], seconds: float) -> tuple[int | None, str]:
        """Exit status (None: time was up) and output; every process that it started is ended."""
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                return None, ""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def build(self) -> tuple[int | None, str]:
        return self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 600)

    def test(self, tests: tuple[str, ...]) -> tuple[int | None, str]:
        present = [name for name in tests if (self.folder / name).exists()]
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
        return self.run([sys.executable, "-c", code, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *present], self.seconds)

    def judge(self, mutant: Mutant) -> str:
        """ "noticed", "too slow", "does not build" or "survived"."""
        path = self.folder / mutant.file
        original = path.read_text(encoding="utf-8")
        compiled = not mutant.file.endswith(".py")
        try:
            path.write_text(mutant.text, encoding="utf-8")
            if compiled and self.build()[0] != 0:
                return "does not build"
            tests = tests_of(mutant.file)
            assert tests is not None
            status, _ = self.test(tests)
            return {0: "survived", None: "too slow"}.get(status, "noticed")
        finally:
            path.write_text(original, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10, help="mutants to plant [10]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="files or folders to plant in")
    parser.add_argument("--seconds", type=float, default=180, help="for the tests of one mutant; past them it counts as noticed [180]")
    parser.add_argument("--report", type=Path, help="write the result here, as Markdown")
    args = parser.parse_args()
    mutants = sample(args.count, args.seed, args.only)
    results: list[tuple[Mutant, str]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), args.seconds)
        os.environ["CONVIT_BUILD_EXT"] = workshop.environment["CONVIT_BUILD_EXT"] = "1"
        for i, mutant in enumerate(sorted(mutants, key=lambda m: not m.file.endswith(".py"))):
            verdict = workshop.judge(mutant)
            results.append((mutant, verdict))
            print(f"{i + 1}/{len(mutants)} {verdict}: {mutant.file}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
    judged = [(m, v) for m, v in results if v != "does not build"]
    survivors = [m for m, v in judged if v == "survived"]
    score = 100 * (1 - len(survivors) / max(1, len(judged)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        "# Planted mistakes",
        "",
        f"`python tests/mutate.py --count {args.count} --seed {args.seed}` at commit {commit}: {len(judged)} mutants that build, "
        f"{len(judged) - len(survivors)} noticed ({score:.0f} %), {len(survivors)} survived, in {time.monotonic() - began:.0f} s.",
        "",
        "| survivor | before | after |",
        "|---|---|---|",
        *(f"| {m.file}:{m.line} | `{m.before.replace('|', chr(92) + '|')}` | `{m.after.replace('|', chr(92) + '|')}` |" for m in survivors),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
