"""``import convit.timm``: timm builds ours by name, and what timm's own model tests ask of a ConViT holds.

Each in a process of its own, since it changes what timm's names mean.
"""

import pytest
from test_compile import in_a_fresh_process

pytest.importorskip("timm")

CASES = """
import torch, timm, convit
from timm.models import FeatureInfo
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

torch.manual_seed(0)
small = {"img_size": 64, "depth": 4, "local_up_to_layer": 3, "num_heads": 4}
x = torch.randn(2, 3, 64, 64)

def traced(model):
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions(), "param_shapes_constant": True}
    train, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    nodes = {"train_return_nodes": [train[-1]], "eval_return_nodes": [evaluation[-1]]}
    return create_feature_extractor(model, **nodes, tracer_kwargs=tracer)

def complete(model, out):
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()

model = build()
assert model.default_cfg["input_size"] == (3, 224, 224) and model.default_cfg["first_conv"] + ".weight" in model.state_dict()
assert model(x).shape == (2, 42)
complete(model, model.train()(x))
complete(model, traced(model)(x).popitem()[1])
model.eval()
with torch.inference_mode():
    expected = model(x)
    assert torch.equal(traced(model)(x).popitem()[1], expected)
for scripted in (torch.jit.script(model), torch.jit.script(traced(model))):
    out = scripted(x)
    torch.testing.assert_close(out.popitem()[1] if isinstance(out, dict) else out, model(x), rtol=1e-4, atol=1e-5)
if isinstance(model, convit.ConViT) or hasattr(timm.models.convit.ConVit, "forward_intermediates"):  # timm's from 1.0.31 on
    final, maps = model.forward_intermediates(x)
    assert [m.shape for m in maps] == [(2, c, 4, 4) for c in FeatureInfo(model.feature_info, 4).channels()]
    torch.testing.assert_close(final, model.forward_features(x))
    features = build(features_only=True).eval()
    assert [m.shape[1] for m in features(x)] == features.feature_info.channels()
model.reset_classifier(0)
assert model(x).shape == (2, model.head_hidden_size)
model.reset_classifier(0, "")
assert model(x).shape == (2, 17, model.num_features)
print("passed")
"""

OURS = """
import warnings
warnings.filterwarnings("error", "Overwriting")
import convit.timm
def of(home, name):
    (found,) = (each.default.to_dict() for key, each in home.default_cfgs.items() if key.split(".")[0] == name)
    keys = ("hf_hub_id", "input_size", "mean", "std", "crop_pct", "interpolation", "first_conv", "classifier")
    return {key: found.get(key) for key in keys}
import timm.models.convit
for name in ("convit_tiny", "convit_small", "convit_base"):
    expected = of(timm.models.convit, name)
    assert of(convit.timm, name) == expected, (of(convit.timm, name), expected)
def build(**kwargs):
    model = timm.create_model("convit_tiny", num_classes=42, embed_dim=32, **small, **kwargs)
    assert isinstance(getattr(model, "model", model), convit.ConViT)
    assert all(timm.is_model(name) for name in convit.list_models())
    return model
"""

ACCELERATED = """
def build(**kwargs):
    return convit.accelerate(timm.create_model("convit_tiny", num_classes=42, embed_dim=8, **small, **kwargs))
"""


@pytest.mark.parametrize("build", [OURS, ACCELERATED], ids=["ours", "accelerated"])
def test_what_timm_tests(build):
    imports, rest = CASES.split("\ntorch.manual_seed", 1)
    assert in_a_fresh_process(f"{imports}\n{build}\ntorch.manual_seed{rest}") == "passed\n"
