"""Diagnostics against the definition formed in full, and the pictures of a run."""

import json

import numpy as np
import pytest
import torch

import convit
from convit import figures
from convit.kernels.gpsa.reference import position_attention, relative_positions
from convit.pytorch import diagnostics

pytest.importorskip("matplotlib")


def small(**kwargs):
    torch.manual_seed(0)
    shape = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 16, "num_heads": 4, "depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    model = convit.ConViT(**shape | kwargs)
    for block in model.blocks[: model.local_up_to_layer]:
        torch.nn.init.normal_(block.attn.gating_param)
        torch.nn.init.normal_(block.attn.qk.weight, std=0.5)
    return model


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2), (6, 6)])
def test_position_distance_is_the_dense_one(grid):
    weight = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([2.0, 2.0, 0.5]).double()
    distance = relative_positions(grid)[..., 2].double().sqrt()
    expected = (position_attention(weight, grid) * distance).sum((1, 2)) / len(distance)
    torch.testing.assert_close(diagnostics.position_distance(weight, grid), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 2}, {"local_up_to_layer": 3, "global_pool": "avg"}, {"local_up_to_layer": 0}, {"qkv_bias": True}]
)
def test_diagnose_is_the_dense_distance_on_each_layers_input(kwargs):
    model, images = small(**kwargs), torch.randn(3, 3, 12, 20)
    inputs, hooks = [], []
    for block in model.blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0])))
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    model.train()
    found = diagnostics.diagnose(model, images)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert json.loads(json.dumps(found)) == found
    assert found["gate"] == [block.attn.gating_param.sigmoid().tolist() for block in model.blocks[: model.local_up_to_layer]]
    for block, x, heads, layer in zip(model.blocks, inputs, found["distance"], found["nonlocality"], strict=True):
        expected = block.attn.get_attention_map(x, grid=(3, 5))
        torch.testing.assert_close(torch.tensor(heads), expected.detach(), rtol=1e-5, atol=1e-6)
        assert layer == pytest.approx(expected.mean().item(), rel=1e-5)


def test_diagnose_takes_timms_model():
    timm = pytest.importorskip("timm.models.convit")
    theirs = timm.ConVit(img_size=16, patch_size=4, embed_dim=4, num_heads=4, depth=3, local_up_to_layer=2, num_classes=5)
    ours = small(img_size=16)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 16, 16)
    a, b = diagnostics.diagnose(theirs, images), diagnostics.diagnose(ours, images)
    torch.testing.assert_close(torch.tensor(a["distance"]), torch.tensor(b["distance"]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be a ConViT"):
        diagnostics.attentions(torch.nn.Linear(2, 2))


def records(epochs):
    gate = [[[0.7 - 0.01 * epoch * layer for _ in range(4)] for layer in range(2)] for epoch in range(epochs)]
    return [
        {"kind": "epoch", "epoch": e, "train_loss": 2 / (e + 1), "top1": 10.0 + e, "gate": gate[e], "distance": [[1.0, 2.0]] * 3}
        for e in range(epochs)
    ]


@pytest.mark.parametrize("epochs", [1, 5])
def test_command_draws_a_run(tmp_path, capsys, epochs):
    from convit.cli import main

    lines = [json.dumps(record) for record in records(epochs)]
    lines.insert(0, json.dumps({"kind": "step", "epoch": 0, "loss": 1.0}))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "epo')
    assert main(["plot", str(tmp_path)]) == 0
    drawn = capsys.readouterr().out.split()
    assert [name.rsplit("/", 1)[1] for name in drawn] == ["history.png", "gates_over_time.png", "gates.png", "locality.png"]
    for name in drawn:
        with open(name, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert main(["plot", str(tmp_path), "--format", "svg", "-o", str(tmp_path / "svg")]) == 0
    assert "<svg" in (tmp_path / "svg/history.svg").read_text()


def test_command_compares_runs(tmp_path, capsys, monkeypatch):
    """A line a run, what differs between their recipes, one picture; names that tell runs of one name apart."""
    from convit.cli import main
    from convit.engine.recipe import dump_recipe, load_recipe

    monkeypatch.chdir(tmp_path)
    for name, layers in (("a", 5), ("b", 0), ("c/a", 5)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "log.jsonl").write_text("\n".join(json.dumps(record) for record in records(3)))
        recipe = load_recipe("digits", {"local_up_to_layer": layers, "ckpt_save_dir": name})
        (tmp_path / name / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["plot", "a", "b", "--format", "svg"]) == 0
    told = capsys.readouterr().out.splitlines()
    score = "3 epochs  training loss 0.6667  best top-1 12.00 % (epoch 3)"
    assert told == [f"a  {score}", f"b  {score}", "local_up_to_layer: 5 / 0", "plots/comparison.svg"]
    assert "b: best top-1 12.00 % (epoch 3)" in (tmp_path / told[-1]).read_text()
    assert main(["plot", "a", "c/a", "-o", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("c/a  3 epochs") and (tmp_path / "out" / "comparison.png").exists()
    for words, message in ((["a", "a"], "the same run twice"), (["a", "b", "--image", "x.png"], "--image and --query are about one run")):
        assert main(["plot", *words]) == 1
        assert message in capsys.readouterr().err


def test_command_says_what_is_wrong(tmp_path, capsys):
    from convit.cli import main

    assert main(["plot", str(tmp_path)]) == 1
    assert "log.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "epoch": 0}\n')
    assert main(["plot", str(tmp_path)]) == 1
    assert "no finished epoch" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('oops\n{"kind": "epoch", "epoch": 0}\n')
    assert main(["plot", str(tmp_path)]) == 1
    assert "log.jsonl:1" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text(json.dumps(records(1)[0]))
    assert main(["plot", str(tmp_path), "--image", "none.png"]) == 1
    assert "holds none of best.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path), "--query", "three"])


def test_command_names_an_unreadable_image(tmp_path, capsys, monkeypatch):
    """In a real run's folder: what is no image is named, and no picture of it is left; a real one is drawn."""
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    pillow = pytest.importorskip("PIL.Image")
    from convit.cli import main
    from convit.engine.pytorch.train import train
    from convit.engine.recipe import load_recipe

    keys = {"embed_dim": 16, "depth": 2, "num_heads": 4, "local_up_to_layer": 1, "num_samples": 64, "epoch_size": 1}
    train(load_recipe("digits", keys), tmp_path / "run", progress=False)
    (tmp_path / "bad.png").write_bytes(b"no image")
    for image, message in (("bad.png", "bad.png is not an image"), ("none.png", "none.png")):
        assert main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "plots"), "--image", str(tmp_path / image)]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "plots" / "attention.png").exists()
    pillow.new("L", (8, 8), 100).save(tmp_path / "good.png")
    assert main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "plots"), "--image", str(tmp_path / "good.png")]) == 0
    assert (tmp_path / "plots" / "attention.png").stat().st_size > 1000
    asked = []
    monkeypatch.setattr(figures, "plot_attention", lambda *args, **named: asked.append((args, named)) or tmp_path)
    assert main(["plot", str(tmp_path / "run"), "--image", str(tmp_path / "good.png"), "--query", "1,0"]) == 0
    (_, image, _), named = asked[0]
    assert named["query"] == (1, 0) and image.shape == (1, 16, 16) and (named["picture"] == 100).all()
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "run"), "--format", "gif"])
    assert "invalid choice: 'gif'" in capsys.readouterr().err


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written, in order."""
    found = []

    def keeping(self, *error):
        found.append(self.figure)
        return self.style.__exit__(*error)

    monkeypatch.setattr(figures._figure, "__exit__", keeping)
    return found


def test_attention_picture_shows_each_head_from_the_marked_patch(tmp_path, drawn):
    model, image, inputs = small(reg_tokens=1).eval(), torch.randn(3, 12, 20), []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks]
    model(image[None])
    for hook in hooks:
        hook.remove()
    for query, at, kwargs in (((2, 4), 14, {"heads": 2}), (None, 7, {"layers": [-1, 0], "heads": 9})):
        figures.plot_attention(model, image, tmp_path / "attention.png", query=query, **kwargs)
        layers = [layer % 3 for layer in kwargs.get("layers", range(3))]
        heads = min(kwargs["heads"], 4)
        panels = iter(drawn[-1].axes)
        maps = []
        for line, layer in enumerate(layers):
            block = model.blocks[layer]
            attention = block.attn.get_attention_map(inputs[layer], return_map=True, grid=(3, 5))[1].detach()
            prefix = attention.shape[-1] - 15
            for head in range(heads + 1):
                panel = next(panels)
                assert panel.patches[0].get_xy() == (at % 5, at // 5)
                assert all(shown.get_extent() == [0, 5, 3, 0] for shown in panel.images) and len(panel.images) == (2 if head else 1)
                assert panel.get_aspect() == 12 * 5 / (20 * 3)  # the image's own
                if head == 0:
                    assert panel.get_ylabel() == f"layer {layer + 1}"
                    continue
                assert panel.get_title() == (f"head {head}" if line == 0 else "")
                expected = 100 * attention[head - 1, prefix + at, prefix:].reshape(3, 5)
                maps.append(panel.images[-1])
                np.testing.assert_allclose(maps[-1].get_array(), expected, rtol=1e-4, atol=1e-3)
        assert len({(each.norm.vmin, each.norm.vmax) for each in maps}) == 1
        assert maps[0].norm.vmin == 0 and maps[0].norm.vmax == pytest.approx(max(each.get_array().max() for each in maps))


def test_pictures_of_a_run_show_its_numbers(tmp_path, drawn):
    log = records(3)
    log[1]["top1"] = 20.5  # the best is in the middle
    for record in log:
        record["val_loss"] = record["train_loss"] + 0.5
        record["distance"] = [[1.0 + record["epoch"], 2.0], [3.0, 5.0], [4.0, 8.0]]
    figures.plot_history(log, tmp_path / "a.png")
    left, right = drawn[-1].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.lines}
    assert lines == {"training": ([1, 2, 3], [2.0, 1.0, 2 / 3]), "validation": ([1, 2, 3], [2.5, 1.5, 2 / 3 + 0.5])}
    assert list(right.lines[0].get_ydata()) == [10.0, 20.5, 12.0] and right.texts[0].get_text() == "20.50 % (epoch 2)"
    assert (right.lines[1].get_xdata()[0], right.lines[1].get_ydata()[0]) == (2, 20.5)
    for best, side in ((0, "left"), (2, "right")):  # the figure beside the point, inside the picture
        figures.plot_history([record | {"top1": float(i == best)} for i, record in enumerate(log)], tmp_path / "a.png")
        assert drawn[-1].axes[1].texts[0].get_ha() == side
    figures.plot_locality(log, tmp_path / "a.png")
    left, right = drawn[-1].axes[:2]
    assert [list(line.get_ydata()) for line in left.lines] == [[1.5, 2.0, 2.5], [4.0] * 3, [6.0] * 3]
    assert [line.get_linestyle() for line in left.lines] == ["-", "-", "--"]  # two layers have gates
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in left.lines) and list(right.get_xticks()) == [1, 2, 3]
    assert (list(right.lines[0].get_xdata()), list(right.lines[0].get_ydata())) == ([1, 2, 3], [2.5, 4, 6])
    assert [spots.get_offsets().tolist() for spots in right.collections] == [[[1, 3], [1, 2]], [[2, 3], [2, 5]], [[3, 4], [3, 8]]]
    figures.plot_gates_over_time(log, tmp_path / "a.png")
    assert [list(bar.get_yticks()) for bar in drawn[-1].axes[1:]] == [[1, 2]]  # a colour for each layer with gates
    lines = drawn[-1].axes[0].lines
    thick = [line.get_ydata().tolist() for line in lines if line.get_linewidth() == 2]
    np.testing.assert_allclose(thick, [[0.7, 0.7, 0.7], [0.7, 0.69, 0.68]])
    assert len(lines) == 2 * (4 + 1) + 1 and all(list(line.get_xdata()) == [1, 2, 3] for line in lines[:-1])
    figures.plot_gates([[0.1, 0.2], [0.3, 0.4]], [[0.9, 0.8], [0.7, 0.6]], tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    spots = [each.get_offsets()[:, 1].tolist() for each in axes.collections if len(each.get_offsets()) == 2]
    assert spots == [[0.1, 0.2], [0.9, 0.8], [0.3, 0.4], [0.7, 0.6]]
    where = [each.get_offsets()[:, 0].tolist() for each in axes.collections if len(each.get_offsets()) == 2]
    np.testing.assert_allclose(where, [[0.78, 1.22]] * 2 + [[1.78, 2.22]] * 2)
    assert list(axes.get_xticks()) == [1, 2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_of_one_epoch_is_seen_as_points(tmp_path, drawn, epochs):
    log = [record | {"val_loss": 1.0} for record in records(epochs)]
    figures.plot_history(log, tmp_path / "a.png")
    figures.plot_comparison({"a": log}, tmp_path / "a.png")
    figures.plot_locality(log, tmp_path / "a.png")
    figures.plot_gates_over_time(log, tmp_path / "a.png")
    thin = [[line for line in axes.lines if list(line.get_xdata()) == list(range(1, epochs + 1))] for axes in drawn[0].axes + drawn[1].axes]
    left, over = drawn[2].axes[0].lines, [line for line in drawn[3].axes[0].lines if line.get_linewidth() == 2]
    for lines in (*thin, left, over):
        assert lines and any(line.get_marker() == "o" for line in lines) == (epochs == 1)


@pytest.mark.parametrize("top", [1.0, 255.0, -1.0], ids=["of 0 to 1", "of 0 to 255", "normalised"])
def test_the_picture_is_shown_as_it_is(tmp_path, drawn, top):
    """Whatever its values say: those of 0 to 1 and of 0 to 255 keep their brightness, others are stretched to it."""
    image = torch.rand(3, 12, 20) * 0.5
    given = image * top if top > 0 else 4 * image - 1
    figures.plot_attention(small().eval(), given, tmp_path / "a.png")
    expected = image if top > 0 else (image - image.min()) / (image.max() - image.min())
    np.testing.assert_allclose(drawn[-1].axes[0].images[0].get_array(), expected.permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(drawn[-1].axes[1].images[0].get_array(), expected.mean(0), atol=1e-6)


def test_every_head_has_the_same_room(tmp_path, drawn):
    model, image = small().eval(), torch.rand(3, 12, 20)
    for layers in ([0], [0, 1, 2]):
        figures.plot_attention(model, image, tmp_path / "a.png", layers=layers)
    one, three = (figure.get_size_inches() for figure in drawn)
    assert one[0] == three[0] and 2 < three[1] / one[1] < 3


def test_percents_end_at_a_hundred(tmp_path, drawn):
    """And a point at 100 is not cut in half by the edge."""
    log = records(4)
    for record, top1 in zip(log, (60.0, 90.0, 100.0, 100.0), strict=True):
        record["top1"] = top1
    figures.plot_history(log, tmp_path / "a.png")
    low, high = drawn[-1].axes[1].get_ylim()
    assert low < 60 and 100 < high < 110


def test_the_range_test_shows_all_of_the_smoothed_curve(tmp_path, drawn):
    figures.plot_range_test([1e-4, 1e-3, 1e-2], [9.0, 2.0, 30.0], [3.0, 2.0, 4.0], 1e-3, tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    assert axes.get_ylim() == pytest.approx((1.8, 4.2)) and axes.get_xscale() == "log"
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["loss of the step"] == [9.0, 2.0, 30.0] and lines["smoothed"] == [3.0, 2.0, 4.0]
    assert list(axes.lines[2].get_xdata()) == [1e-3, 1e-3] and axes.lines[2].get_label() == "falls fastest: 0.001"


def test_attention_picture(tmp_path):
    model, image = small(), torch.randn(3, 12, 20)
    path = figures.plot_attention(model, image, tmp_path / "a" / "attention.png", query=(2, 4), heads=2)
    assert path.stat().st_size > 1000
    for query, layers, text in (((3, 0), None, "3 x 5 grid"), (None, [7], "layers must be among 0..2")):
        with pytest.raises(ValueError, match=text):
            figures.plot_attention(model, image, tmp_path / "b.png", query=query, layers=layers)
    with pytest.raises(ValueError, match="same layers"):
        figures.plot_gates([[0.5]], [[0.5, 0.5]], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"train_loss": "x"}, {"val_loss": 10**400}, {"top1": [1]}, {"lr": True}, {"epoch": "a"}, {"epoch": 1.5}, {"epoch": -5}),
        *({"gate": [[None]]}, {"gate": [[0.5]]}, {"gate": [[[0.5, 0.5]]]}, {"gate": "abc"}, {"gate": {"a": 1}}, {"gate": [[0.5], [0.5]]}),
        *({"distance": [["x", 1]]}, {"distance": [[1.0, 2.0], [1.0]]}, {"distance": [[10**400, 1]]}),
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_a_strangers_log_is_refused_by_line(tmp_path, wrong):
    good = {"kind": "epoch", "epoch": 0, "train_loss": 1.0, "top1": 50.0, "lr": 1e-3, "gate": [[0.5, 0.5]], "distance": [[1.0, 1.0]]}
    lines = [good, good | {"epoch": 1, "train_loss": float("nan"), "gate": [[float("nan"), 1]]}, good | {"epoch": 2} | wrong]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"log\.jsonl, line 3 .*{next(iter(wrong))}") as error:
        figures.read_log(tmp_path)
    assert len(str(error.value)) < 400
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert len(figures.read_log(tmp_path)) == 2
