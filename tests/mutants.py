"""The small mistakes that ``tests/mutate.py`` plants: Python by cosmic-ray's operators, C++ by the patterns below, and where."""

import random
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# file -> the tests that should notice a mistake in it; the first pattern that fits counts. None: needs a device or framework.
TESTS: list[tuple[str, tuple[str, ...] | None]] = [
    ("csrc/mindspore_aot.cpp", None),
    ("csrc/isa_neon.cpp", None),
    ("csrc/infer*", ("tests/test_optimize.py",)),
    ("csrc/layers*", None),
    ("csrc/product*", ("tests/test_cpu_kernel.py", "tests/test_gpsa.py", "tests/test_gpsa_numerics.py", "tests/test_optimize.py")),
    ("csrc/*", ("tests/test_cpu_kernel.py", "tests/test_gpsa.py", "tests/test_gpsa_numerics.py")),
    ("kernels/gpsa/*mindspore*", None),
    ("kernels/gpsa/ascend_*", None),
    ("kernels/gpsa/any_blocks.py", None),
    ("kernels/*/cpu_aot.py", None),
    ("kernels/aot.py", None),
    ("convit/mindspore/*", None),
    ("convit/engine/mindspore/*", None),
    ("convit/export/mindir.py", None),
    (
        "kernels/gpsa/gpu_triton/*",
        ("tests/triton_interpreted.py", "tests/triton_memory.py", "tests/test_triton.py", "tests/test_triton_aot.py", "tests/test_npu.py"),
    ),
    ("kernels/gpsa/definition.py", ("tests/test_gpsa_numerics.py",)),
    ("kernels/linear/*", ("tests/test_linear.py", "tests/test_optimize.py")),
    ("kernels/eager.py", ("tests/test_linear.py", "tests/test_autograd.py", "tests/test_accelerate.py", "tests/test_compile.py")),
    (
        "kernels/*",
        ("tests/test_gpsa.py", "tests/test_gpsa_numerics.py", "tests/test_cpu_kernel.py", "tests/test_model.py", "tests/test_compile.py"),
    ),
    ("convit/ops.py", ("tests/test_gpsa.py", "tests/test_linear.py", "tests/test_model.py")),
    ("convit/dispatch.py", ("tests/test_gpsa.py", "tests/test_package.py", "tests/test_compile.py")),
    ("convit/pytorch/optimize.py", ("tests/test_optimize.py",)),
    ("convit/pytorch/accelerate.py", ("tests/test_accelerate.py",)),
    ("convit/pytorch/diagnostics.py", ("tests/test_plot.py", "tests/test_train.py")),
    ("convit/pytorch/*", ("tests/test_model.py", "tests/test_accelerate.py", "tests/test_checkpoints.py", "tests/test_compile.py")),
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
    mutants: list[Mutant] = []
    while drawn:
        before = len(mutants)
        for name in sorted(set(drawn)):
            wanted = drawn.count(name)
            if name.endswith(".py"):
                mutants += python_mutants(name, files[name], dice, wanted)
            else:
                every = cpp_mutants(name, files[name])
                mutants += dice.sample(every, min(wanted, len(every)))
        missing = count - len(mutants) if len(mutants) > before else 0  # what a short file has not got
        drawn = dice.choices(names, [files[name].count("\n") for name in names], k=missing)
    return mutants
