"""Every tolerance of the test suite, the same on a laptop as in CI.

An implementation of GPSA is judged against the definition in float64 by the relative Frobenius error of the output and of each
gradient. It may be twice as wrong as the eager framework path (the formula as timm writes it, in the tensors' own dtype), or as
wrong as the floor below: a gradient with H or 3 H numbers can be right by luck in the eager path.
"""

import torch

EAGER_FACTOR = 2.0

# dtype -> floor of the allowed relative error: a few roundings of the dtype
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# float32 has an absolute bound besides, at the sizes that models run at; the definition itself is exempt, since its gradient of the
# position weights sums N x N terms that cancel
FLOAT32_BOUND = 2e-6
FLOAT32_BOUND_TOKENS = 784

# two models with the same weights: largest difference of logits or gradients, relative to the largest value
MODEL = {torch.float64: 1e-10, torch.float32: 1e-5}

# logits of a checkpoint under its own framework and under ours, absolute, float32
LOGITS = 1e-6


def allowed_error(dtype: torch.dtype, tokens: int, eager_error: float, definition: bool = False) -> float:
    """The relative error that an output or gradient of GPSA may have."""
    allowed = max(EAGER_FACTOR * eager_error, FLOOR[dtype])
    if not definition and dtype == torch.float32 and tokens <= FLOAT32_BOUND_TOKENS:
        allowed = min(allowed, FLOAT32_BOUND)
    return allowed
