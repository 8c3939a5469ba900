"""What the tests of checkpoints share: timm's model in the shape of MindCV's small file, and its state compared bit for bit."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
timm_convit = pytest.importorskip("timm.models.convit")

DATA = Path(__file__).parent / "data"
FORMATS = ("a.pth", "a.safetensors", "a.ckpt")


def tiny(**kwargs):
    """timm's class in the shape of tests/data/mindcv_tiny.ckpt (its embed_dim is per head)."""
    shape = {"img_size": 56, "patch_size": 4, "embed_dim": 4, "num_heads": 4, "depth": 3, "local_up_to_layer": 2, "num_classes": 10}
    return timm_convit.ConVit(**shape | kwargs).eval()


def randomised(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = tiny(**kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [(m.approximate if isinstance(m, torch.nn.GELU) else getattr(m, "eps", None)) for m in model.modules()]


def unchanged(model, before):
    state, settings = snapshot(model)
    return settings == before[1] and all(torch.equal(state[name], before[0][name]) for name in before[0])


def same_bits(a, b):
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)
