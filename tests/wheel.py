"""What an installed wheel must do, without the source tree and without test packages: cibuildwheel runs this in a clean environment."""

import torch

import convit
import convit._C
from convit.cli import main

problem = convit.Problem("torch", "cpu", "float32", batch=2, heads=4, tokens=196, head_dim=48, grid=(14, 14))
assert convit.why_not("cpp", problem) is None, convit.why_not("cpp", problem)
model = convit.create_model("convit_tiny").eval()
images = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    found = model(images)
    with convit.use_backend("reference"):
        expected = model(images)
assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
assert main(["env"]) == 0
