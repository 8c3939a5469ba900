"""One recipe, one meaning: schedules, the moving average, a step written out by hand, what resuming changes, what diverging leaves."""

import contextlib
import json
import math

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import ten_steps  # noqa: E402

from convit.engine.pytorch.build import build_loss, build_model, build_optimizer  # noqa: E402
from convit.engine.pytorch.checkpoint import load  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.pytorch.validate import validate  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.schedule import average_decay, rates  # noqa: E402
from convit.engine.world import World  # noqa: E402

SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 8, "batch_size": 16, "num_samples": 48}
SMALL |= {"epoch_size": 2, "warmup_epochs": 0, "decay_epochs": 2, "log_interval": 1, "drop_path_rate": 0, "val_while_train": False}
SMALL |= {"clip_grad": False}


def small(**keys):
    return load_recipe("digits", {**SMALL, **keys})


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the schedule ---

EPOCHS, STEPS, LR = 12, 5, 0.02
SCHEDULES = {
    "constant": lambda e: LR,
    "cosine_decay": lambda e: 0.001 + (LR - 0.001) / 2 * (1 + math.cos(math.pi * e / 4)) if e < 4 else 0.001,
    "step_decay": lambda e: LR * 0.5 ** (e // 4),
    "multi_step_decay": lambda e: LR * 0.5 ** ((e >= 3) + (e >= 6)),
    "exponential_decay": lambda e: LR * 0.5**e,
    "polynomial_decay": lambda e: LR * (1 - e / 9) ** 0.5,
}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("stair", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_mindcvs(name, stair, prefix):
    """Written out: a linear warm-up of 3 epochs, then the decay counted from its end, without ``warmup_prefix`` from the start; milestones
    in any order. MindSpore's tests hold them against MindCV's own."""
    keys = {"scheduler": name, "warmup_epochs": 3, "warmup_factor": 0.1, "decay_epochs": 4, "min_lr": 0.001, "decay_rate": 0.5}
    keys |= {"multi_step_decay_milestones": "[6, 3]", "lr_epoch_stair": stair, "warmup_prefix": prefix}
    epochs = [step // STEPS if stair else step / STEPS for step in range(EPOCHS * STEPS)]
    decayed = SCHEDULES[name] if prefix or name != "polynomial_decay" else lambda e: LR * (1 - e / 12) ** 0.5
    expected = [LR * (0.1 + 0.9 * e / 3) if e < 3 else decayed(e - 3 * prefix) for e in epochs]
    np.testing.assert_allclose(rates(load_recipe(None, {**keys, "epoch_size": EPOCHS}), LR, STEPS), expected, rtol=1e-12)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("stair", [False, True])
def test_the_cosine_is_timms(prefix, cycles, stair):
    from timm.scheduler import create_scheduler_v2

    keys = {"warmup_epochs": 2, "decay_epochs": 5, "num_cycles": cycles, "cycle_decay": 0.5, "warmup_prefix": prefix, "min_lr": 1e-4}
    recipe = load_recipe(None, {**keys, "epoch_size": EPOCHS, "warmup_lr": 1e-3, "lr_epoch_stair": stair})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    theirs, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=5, min_lr=1e-4, warmup_lr=1e-3, warmup_epochs=2, warmup_prefix=prefix, cycle_limit=cycles,
        cycle_decay=0.5, step_on_epochs=stair, updates_per_epoch=STEPS,
    )  # fmt: skip
    for step, rate in enumerate(rates(recipe, LR, STEPS)):
        theirs.step(step // STEPS) if stair else theirs.step_update(step)
        assert optimizer.param_groups[0]["lr"] == rate, step


@pytest.mark.parametrize("name", ["one_cycle", "cyclic"])
def test_cycles_are_torchs(name):
    recipe = load_recipe(None, {"scheduler": name, "epoch_size": EPOCHS, "min_lr": 0.001, "num_cycles": 3, "warmup_epochs": 0})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    steps, expected = EPOCHS * STEPS, []
    if name == "one_cycle":
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, div_factor=25, final_div_factor=LR / 25 / 0.001)
    else:
        theirs = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.001, LR, step_size_up=steps // 6)
    for step in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            theirs.step()
    np.testing.assert_allclose(rates(recipe, LR, STEPS), expected, rtol=1e-9)


def test_the_moving_average_warms_up_as_mindcvs():
    assert average_decay(small(ema_decay=0.9), 1) == pytest.approx(0.9 * (1 - math.exp(-1 / 2000)))
    assert average_decay(small(ema_decay=0.9, ema_warmup=False), 1) == 0.9


# --- a step by hand ---

EVERYTHING = {"mixup": 0.4, "label_smoothing": 0.1, "gradient_accumulation_steps": 2, "clip_grad": True, "clip_value": 0.1, "ema": True}
EVERYTHING |= {"ema_decay": 0.99, "layer_decay": 0.5, "weight_decay": 0.05, "scheduler": "exponential_decay", "decay_rate": 0.5}


@pytest.mark.parametrize(
    "keys",
    [
        {"opt": "adamw", "weight_decay": 0.05, "label_smoothing": 0.1},
        {"opt": "momentum", "weight_decay": 0.05, "clip_grad": True, "clip_value": 0.1, "gradient_accumulation_steps": 2},
        {"opt": "sgd", "use_nesterov": True, "weight_decay": 0.01, "loss": "BCE"},
        {"opt": "adam", "weight_decay": 0.01, "mixup": 0.4, "ema": True, "ema_decay": 0.99},
        {"opt": "adamw", "layer_decay": 0.5, "weight_decay": 0.05, "scheduler": "exponential_decay", "decay_rate": 0.5},
        {"opt": "adamw", "amp_level": "O2", "amp_dtype": "bfloat16", "clip_grad": True, "clip_value": 0.5},
        {"opt": "adamw", "amp_level": "O2", "amp_dtype": "float16", "loss_scale": 512, "gradient_accumulation_steps": 2},
        {"opt": "adam", **EVERYTHING},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_steps_by_hand(tmp_path, monkeypatch, keys):
    """Six steps of the engine equal six written out in float64: loss, accumulation, clipping, optimiser, schedule and moving average."""
    recipe = small(lr=0.01, **{"batch_size": 8, "eps": 1e-3, **keys})  # an eps that rounding does not drown in
    seen, gradients = [], TorchRun.gradients

    def recording(self, batches):
        own = []
        if not seen:
            seen.append({name: p.detach().double().clone() for name, p in self.model.named_parameters()})
        criterion, loss = self.criterion, type(self.criterion).forward
        monkeypatch.setattr(criterion, "forward", lambda logits, y: own.append(y.clone()) or loss(criterion, logits, y))
        forward = self.parallel.register_forward_pre_hook(lambda module, args: own.append(args[0].clone()))
        try:
            return gradients(self, batches)
        finally:
            forward.remove()
            seen.append(own)

    monkeypatch.setattr(TorchRun, "gradients", recording)
    result = train(recipe, tmp_path / "run", progress=False)
    model = build_model(recipe, 10).double()
    weights, steps = seen[0], seen[1:]
    assert len(steps) == 12 // recipe.gradient_accumulation_steps
    model.load_state_dict({**model.state_dict(), **weights})
    names = dict(model.named_parameters())
    no_decay = {name for name, p in names.items() if p.ndim <= 1 or name in ("pos_embed", "cls_token")}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in names.items()}
    average = {name: p.detach().clone() for name, p in names.items()}
    per_epoch = len(steps) // 2
    for number, own in enumerate(steps):
        model.zero_grad()
        for images, targets in zip(own[::2], own[1::2], strict=True):
            logits = model(images.double())
            if targets.ndim == 1:
                smooth = recipe.label_smoothing
                targets = torch.nn.functional.one_hot(targets, 10).double() * (1 - smooth) + smooth / 10
            if recipe.loss == "BCE":
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
            else:
                loss = -(targets.double() * logits.log_softmax(1)).sum(1).mean()
            (loss / recipe.gradient_accumulation_steps).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in names.values()))
        scale = min(1.0, recipe.clip_value / float(norm + 1e-6)) if recipe.clip_grad else 1.0
        epoch, t = number / per_epoch, number + 1
        with torch.no_grad():
            for name, p in names.items():
                depth = 3 if name.startswith("head.") else int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
                depth = 2 if name.startswith("norm.") else depth
                base = (
                    0.01 * 0.5**epoch
                    if recipe.scheduler == "exponential_decay"
                    else recipe.min_lr + (0.01 - recipe.min_lr) / 2 * (1 + math.cos(math.pi * epoch / 2))
                )
                lr = base * (recipe.layer_decay ** (3 - depth) if recipe.layer_decay else 1)
                g, (m, v), wd = p.grad * scale, moments[name], 0.0 if name in no_decay else recipe.weight_decay
                if recipe.opt == "adamw":
                    p.mul_(1 - lr * wd)
                else:
                    g = g + wd * p
                if recipe.opt in ("adam", "adamw"):
                    m.mul_(0.9).add_(g, alpha=0.1)
                    v.mul_(0.999).addcmul_(g, g, value=0.001)
                    p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + recipe.eps))
                else:
                    m.mul_(0.9).add_(g)
                    p.sub_(lr * (g + 0.9 * m if recipe.use_nesterov else m))
                decay = recipe.ema_decay * (1 - math.exp(-t / 2000))
                average[name].mul_(decay).add_(p, alpha=1 - decay)
    expected = average if recipe.ema else names
    tolerance = 0.1 if recipe.amp_level == "O2" else 2e-4
    for name, p in result.model.named_parameters():
        moved, off = float((expected[name] - weights[name]).detach().norm()), float((p - expected[name]).detach().norm())
        assert off <= tolerance * moved + 1e-6, (name, off, moved)


def prepared(tmp_path, **keys):
    """A run that is ready for its first step."""
    run = TorchRun(small(**keys), tmp_path / "run", False, False, False)
    try:
        run._prepare()
    finally:
        run.leave()
    return run


def test_what_is_random_differs_between_epochs_steps_passes_and_processes(tmp_path, monkeypatch):
    """Dropout and mixing each draw from a seed of their own everywhere, and from the same one when a step is made again."""
    run = prepared(tmp_path, mixup=0.2, gradient_accumulation_steps=2, batch_size=8)
    seeds = {"dropout": [], "mixing": []}
    run.mixup = lambda x, y: seeds["mixing"].append(torch.initial_seed()) or (x, torch.nn.functional.one_hot(y, 10).float())
    run.model.register_forward_pre_hook(lambda *_: seeds["dropout"].append(torch.initial_seed()))
    monkeypatch.setattr(run, "total", lambda values: values)
    monkeypatch.setattr(run, "_last_part", lambda last: contextlib.nullcontext())

    def step(epoch, number, rank):
        run.progress.epoch, run.progress.step, run.world = epoch, number, World(rank, 2)
        run.gradients(run.batches(epoch, number))

    places = [(epoch, number, rank) for epoch in (0, 1) for number in (0, 1) for rank in (0, 1)]
    with torch.random.fork_rng([]):
        for place in places:
            step(*place)
        first = {name: list(found) for name, found in seeds.items()}
        assert len({*first["dropout"], *first["mixing"]}) == 2 * 2 * len(places)
        step(*places[3])
    assert all(found[-2:] == first[name][6:8] for name, found in seeds.items())


def test_labels_stay_smoothed_where_nothing_is_mixed_any_more(tmp_path):
    run = prepared(tmp_path, mixup=0.8, label_smoothing=0.2, mixup_off_epoch=2)
    images, targets = torch.rand(4, 1, 32, 32), torch.tensor([1, 2, 3, 4])
    smooth = torch.nn.functional.one_hot(targets, 10) * 0.8 + 0.2 / 10
    for epoch, count, mixed in ((1, 4, True), (1, 3, False), (2, 4, False)):  # of three, no pairs can be made
        run.progress.epoch = epoch
        found = run._mix(images[:count].clone(), targets[:count], 0)
        assert torch.equal(found[0], images[:count]) != mixed and torch.allclose(found[1], smooth[:count]) != mixed


# --- what a run keeps and tells ---


def test_epochs_are_validated_told_and_averaged(tmp_path, monkeypatch):
    """Every second epoch and the last are validated; the loss is the mean of the steps that were made; images are those of all passes."""
    gradients, calls = TorchRun.gradients, []

    def poisoned(self, batches):
        calls.append(1)
        loss, bad, waited = gradients(self, batches)
        return (math.nan if len(calls) == 2 else loss), bad, waited

    monkeypatch.setattr(TorchRun, "gradients", poisoned)
    keys = {"val_while_train": True, "val_interval": 2, "batch_size": 8, "gradient_accumulation_steps": 2}
    keys |= {"ema": True, "ema_warmup": False, "ema_decay": 0.9}
    result = train(small(**keys, epoch_size=5, ckpt_save_policy=None, keep_checkpoint_max=1), tmp_path / "run", progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["top1" in record for record in result.history] == [False, True, False, True, True]
    for record in result.history:
        steps = [each["loss"] for each in log if each["kind"] == "step" and each["epoch"] == record["epoch"]]
        assert len(steps) == 3 and record["train_loss"] == pytest.approx(np.nanmean(steps))
        assert record["images_per_second"] == pytest.approx(48 / record["seconds"], rel=0.02)
    # without a policy all are kept; what is kept to be used, and was measured, is the average
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch_*.pth")) == [f"epoch_{i}.pth" for i in range(1, 6)]
    last, kept = load(tmp_path / "run" / "last.pth"), torch.load(tmp_path / "run" / "epoch_5.pth", weights_only=True)
    assert all(torch.equal(kept["state_dict"][name], average) for name, average in last["state_dict_ema"].items())
    assert not torch.equal(kept["state_dict"]["head.weight"], last["state_dict"]["head.weight"])
    again = validate(small(ckpt_path=str(tmp_path / "run" / "epoch_5.pth"), batch_size=64), progress=False)
    assert (again["loss"], again["top1"]) == (pytest.approx(result.val_loss, rel=1e-4), result.top1)


def test_the_optimiser_and_the_mixing_have_the_recipes_numbers():
    model = build_model(small(), 10)
    for keys in ({"opt": "sgd"}, {"opt": "momentum"}, {"opt": "sgd", "use_nesterov": True}):
        groups = build_optimizer(small(momentum=0.7, **keys), model, 0.01).param_groups
        assert {(group["momentum"], group["nesterov"]) for group in groups} == {(0.7, keys.get("use_nesterov", False))}
    mixing, _ = build_loss(small(mixup=0.2, cutmix=0.9, cutmix_prob=0.4, label_smoothing=0.3), 10)
    found = mixing.mixup_alpha, mixing.cutmix_alpha, mixing.mix_prob, mixing.label_smoothing, mixing.num_classes
    assert found == (0.2, 0.9, 0.4, 0.3, 10)


# --- resuming with other keys ---


def resumed(tmp_path, first, then):
    train(small(epoch_size=1, **first), tmp_path / "run", progress=False)
    return train(small(epoch_size=2, **then), tmp_path / "run", resume=True, progress=False)


def group_options(run):
    return load(run / "last.pth")["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    ("key", "old", "new", "option"),
    [("weight_decay", 0.05, 0.3, "weight_decay"), ("eps", 1e-8, 1e-3, "eps"), ("lr", 0.001, 0.5, "lr")],
)
def test_announced_keys_take_effect(tmp_path, caplog, key, old, new, option):
    caplog.set_level("INFO", "convit")
    resumed(tmp_path, {"opt": "adamw", "lr": 0.001, key: old}, {"opt": "adamw", "lr": 0.001, key: new, "scheduler": "constant"})
    assert f"{key} {old!r} -> {new!r}" in caplog.text
    assert max(group[option] for group in group_options(tmp_path / "run")) == new


def test_other_groups_keep_the_state_of_each_parameter(tmp_path):
    """filter_bias_and_bn regroups the parameters: the moments of each stay with it, whatever its new number."""
    train(small(epoch_size=1, opt="adamw"), tmp_path / "run", progress=False)
    saved = load(tmp_path / "run" / "last.pth")
    run = TorchRun(small(opt="adamw", filter_bias_and_bn=False), tmp_path / "run", True, False, False)
    try:
        run._prepare()
    finally:
        run.leave()
    old = run.states._names(build_optimizer(small(opt="adamw"), run.model, 0.001))
    new = run.states._names(run.optimizer)
    assert new != old and sorted(new) == sorted(old)
    for name, p in run.model.named_parameters():
        moments = saved["optimizer"]["state"][old.index(name)]["exp_avg"]
        assert torch.equal(run.optimizer.state[p]["exp_avg"], moments) and (moments.any() or "pos_proj.bias" in name)


def test_another_optimiser_starts_its_state_anew(tmp_path, caplog):
    caplog.set_level("INFO", "convit")
    result = resumed(tmp_path, {"opt": "adamw"}, {"opt": "momentum"})
    assert "the state of adamw is of no use to momentum: it starts anew" in caplog.text and result.epochs == 2
    assert set(load(tmp_path / "run" / "last.pth")["optimizer"]["state"][0]) == {"momentum_buffer"}
    again = resumed(tmp_path / "other", {"opt": "adamw"}, {"opt": "adam"})
    assert not any(group.get("decoupled_weight_decay") for group in group_options(again.output))


# --- diverging ---


def test_an_infinite_gradient_skips_the_step_though_the_loss_is_finite(tmp_path, monkeypatch, caplog):
    gradients, calls = TorchRun.gradients, []

    def poisoned(self, batches):
        calls.append(1)
        found = gradients(self, batches)
        if len(calls) in (2, 5):
            next(self.model.parameters()).grad.view(-1)[0] = math.inf if len(calls) == 2 else math.nan
        return found

    monkeypatch.setattr(TorchRun, "gradients", poisoned)
    result = train(small(), tmp_path / "run", progress=False)
    assert [record["skipped_steps"] for record in result.history] == [1, 1]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert "the norm of the gradient is inf; skipped this step" in caplog.text


@pytest.mark.parametrize(
    ("keys", "tolerated"), [({}, 2), ({"amp_level": "O2", "amp_dtype": "float16", "loss_scale": 4}, 4)], ids=["32", "16"]
)
def test_so_many_steps_in_a_row_may_be_skipped_and_no_more(tmp_path, monkeypatch, keys, tolerated):
    """In float16 the halvings of a loss scale come before; but below one it is not the scale that overflows."""
    gradients, left = TorchRun.gradients, []

    def poisoned(self, batches):
        found = gradients(self, batches)
        if left:
            next(self.model.parameters()).grad.view(-1)[0] = left.pop()
        return found

    monkeypatch.setattr(TorchRun, "gradients", poisoned)
    left[:] = [math.inf] * tolerated
    result = train(small(**keys, max_skipped_steps=2, batch_size=8), tmp_path / "run", progress=False)
    assert [record["skipped_steps"] for record in result.history] == [tolerated, 0]
    left[:] = [math.inf] * (tolerated + 1)
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row"):
        train(small(**keys, max_skipped_steps=2, batch_size=8), tmp_path / "other", progress=False)


def test_a_run_that_diverges_names_a_state_that_is_there_and_finite(tmp_path):
    """From a learning rate of 1e30: the weights overflow in the first epoch, and nothing is there; in the second, and last.pth is whole."""
    with pytest.raises(FloatingPointError, match=r"not finite.*no checkpoint had been written"):
        train(small(opt="sgd", lr=1e30, max_skipped_steps=1), tmp_path / "first", progress=False)
    assert not (tmp_path / "first" / "last.pth").exists()
    train(small(opt="sgd", lr=0.01, epoch_size=1), tmp_path / "second", progress=False)
    before = (tmp_path / "second" / "last.pth").read_bytes()
    for rate in (1e30, 1e12):
        keys = {"opt": "sgd", "lr": rate, "max_skipped_steps": 1, "ckpt_save_steps": 1, "epoch_size": 4}
        with pytest.raises(FloatingPointError, match=r"last\.pth is from before"):
            train(small(**keys), tmp_path / "second", resume=True, progress=False)
        state = load(tmp_path / "second" / "last.pth")
        assert all(torch.isfinite(t).all() and t.norm() < 1e15 for t in state["state_dict"].values()), rate
        (tmp_path / "second" / "last.pth").write_bytes(before)


def test_weights_that_score_no_number_are_not_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(TorchRun, "evaluate", lambda self: {"val_loss": math.nan, "top1": 90.0, "top5": 99.0})
    result = train(small(val_while_train=True), tmp_path / "run", progress=False)
    assert result.best_epoch == -1 and not (tmp_path / "run" / "best.pth").exists()


def test_the_scores_are_left_out_where_nothing_validated(tmp_path, capsys):
    from convit import cli

    words = [word for name, value in (SMALL | {"epoch_size": 1}).items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--output", str(tmp_path / "run"), *words]) == 0
    said = capsys.readouterr().err
    assert "1 epochs in" in said and "training loss" in said and "top-1" not in said
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["kind"] == "epoch"


def test_nesterov_of_adam_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="use_nesterov with opt adam is MindSpore's: use opt nadam"):
        train(small(opt="adam", use_nesterov=True), tmp_path / "run", progress=False)


def test_mixing_has_one_loss_per_kind():
    mixup, loss = build_loss(small(mixup=0.2), 10)
    assert mixup is not None and type(loss).__name__ == "SoftTargetCrossEntropy"


# --- the other engine ---


@pytest.mark.parametrize("case", ten_steps.CASES)
def test_ten_steps_are_those_of_mindspore(tmp_path, case):
    """The same recipe, weights and images give the losses of MindSpore: order, optimiser, decay and rate of each parameter, clipping."""
    found = ten_steps.taken(train, ten_steps.paint(tmp_path / "images"), tmp_path / "run", case, "pytorch")
    assert len(found) == 11
    np.testing.assert_allclose(found, ten_steps.recorded(case), rtol=1e-3)
