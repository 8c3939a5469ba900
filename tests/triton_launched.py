"""Every launch once through Triton and once directly, on a driver that launches nothing. Run by test_triton_aot.py."""

import sys
import time

import launch as bench  # bench/launch.py: the test puts its folder on the path
import torch
from gpsa_cases import Case, make_inputs, run
from triton.runtime import driver

import convit
from convit.dispatch import Problem
from convit.kernels.gpsa.gpu_triton import compile_ahead, launch
from convit.kernels.gpsa.gpu_triton.configs import Config, Row
from convit.kernels.gpsa.gpu_triton.tile import fwd_tile_kernel


def plain(arguments: tuple) -> tuple:
    return tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)


def main() -> None:
    seen: list[tuple] = []
    with bench.pretend(lambda *arguments: seen.append(arguments)):
        compare(seen)


def compare(seen: list[tuple]) -> None:
    count, differ = 0, 0

    def twice(call, *tensors):
        nonlocal count, differ
        call.run = None
        driver.active.__class__.stream += 1  # the current stream at the time of the launch, not that of the first
        launch.launch(call, *tensors)
        driver.active.__class__.stream += 1
        launch.launch(call, *tensors)
        ours, theirs = seen.pop(), seen.pop()
        assert not seen and not any(isinstance(x, torch.Tensor) for x in ours) and any(isinstance(x, torch.Tensor) for x in theirs)
        assert ours[3] == theirs[3] + 1 == driver.active.stream
        count += 1
        # but for the stream and the notes for profilers, which are made anew
        if plain(ours[:3] + ours[4:6] + ours[7:]) != plain(theirs[:3] + theirs[4:6] + theirs[7:]):
            differ += 1
            print(call.kernel, plain(ours), plain(theirs), sep="\n", file=sys.stderr)

    def passes(*cases: Case) -> None:
        for case in cases:
            inputs, grad = make_inputs(case, dtype=torch.bfloat16)
            run(convit.gpsa, inputs, grad, case.grid)

    with launch.trial(through=twice):
        passes(Case(1, 2, 16, (4, 5)), Case(3, 1, 24, (17, 16)), Case(1, 1, 16, (1, 300)))
    with launch.trial(through=twice, rows={"fwd_tile": [Row("", "half", 64, Config(64, 256, 4, 1, 0))]}):
        passes(Case(2, 3, 16, (4, 5)))

    # a tensor that begins between multiples of 16 bytes needs another kernel, and comes back to the first one after it
    case = Case(1, 2, 16, (4, 5))
    inputs, _ = make_inputs(case, dtype=torch.bfloat16)
    odd, eighth = (torch.empty(inputs.q.numel() + some, dtype=torch.bfloat16)[some:].view(1, 20, 2, 16).transpose(1, 2) for some in (1, 4))
    aligned = inputs._replace(q=odd.clone())
    for arguments in (aligned, aligned, inputs._replace(q=odd), inputs._replace(q=eighth), aligned):
        convit.gpsa(*arguments, case.grid)
    first, second, other, half_way, last = seen
    assert first[4] == second[4] == last[4] != other[4] == half_way[4]
    assert isinstance(other[9], torch.Tensor) and not isinstance(last[9], torch.Tensor)

    # so does another type of the same shape, in whatever order they come
    del seen[:]
    for dtype in (torch.bfloat16, torch.float16, torch.float16, torch.bfloat16):
        convit.gpsa(*make_inputs(case, dtype=dtype)[0], case.grid)
    first, other, again, last = seen
    assert first[4] == last[4] != other[4] == again[4]

    # what was compiled ahead serves the module's own calls: neither pass compiles anything more
    kernels = [launch.fwd_tile_kernel, launch.dq_tile_kernel, launch.dkdv_tile_kernel, launch.reduce_kernel]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    problem, before, began = Problem("torch", "cpu", "bfloat16", 2, 3, 42, 16, (6, 7)), compiled(), time.perf_counter()
    seconds = compile_ahead(problem, training=False)
    assert 0 < seconds <= time.perf_counter() - began and compiled() == before + 1  # the forward pass alone
    compile_ahead(problem)
    ahead = compiled()
    assert ahead >= before + 3
    with torch.autocast("cpu", torch.bfloat16):
        convit.GPSA(48, 3)(torch.randn(2, 42, 48), (6, 7)).float().sum().backward()
    assert compiled() == ahead

    # a hook that somebody adds later is called
    asked = []
    fwd_tile_kernel.add_pre_run_hook(lambda *args, **kwargs: asked.append(args))
    convit.gpsa(*aligned, case.grid)
    fwd_tile_kernel.pre_run_hooks.clear()
    assert len(asked) == 1
    print(differ, "of", count, "launches differ")


if __name__ == "__main__":
    main()
