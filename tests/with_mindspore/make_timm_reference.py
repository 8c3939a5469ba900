"""Write data/timm_convit.safetensors and .npz: a small ConViT of timm's with random weights, and its logits for two images.

Run where torch, timm and safetensors are installed; the tests, which have no torch, read the files.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.convit import ConVit

DATA = Path(__file__).parent / "data"


def main() -> None:
    torch.manual_seed(0)
    model = ConVit(img_size=64, patch_size=16, embed_dim=4, num_heads=4, depth=3, local_up_to_layer=2, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(images).double()).numpy()
    save_file({name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}, DATA / "timm_convit.safetensors")
    np.savez(DATA / "timm_convit.npz", logits=logits)


if __name__ == "__main__":
    main()
