"""The engine beside the reference's own code, at every step: timm's parts in a plain loop, FAIR's arithmetic written out."""

import math

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from timm.data import Mixup  # noqa: E402
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3, dispatch_clip_grad  # noqa: E402
from training import pictures, small  # noqa: E402

from convit.engine.order import mix_seed  # noqa: E402
from convit.engine.pytorch.build import build_loss, build_model  # noqa: E402
from convit.engine.pytorch.data import TrainData, seeded  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.schedule import rates  # noqa: E402
from convit.engine.world import World  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"num_samples": 96, "epoch_size": 2, "warmup_epochs": 0, "decay_epochs": 2, "val_while_train": False, "ema_warmup": False}
SHORT |= {"weight_decay": 0.05, "lr": 0.01, "clip_grad": False, "embed_dim": 8, "batch_size": 16}
TIMMS = {"opt": "adamw", "weight_decay_filter": "timm"}

# keys of the recipe, and what timm's optimiser of that meaning is called
SETTINGS = {
    "mixing": (TIMMS | {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}, "adamw"),
    "mixing at times, until an epoch": (TIMMS | {"mixup": 0.4, "cutmix": 1.0, "cutmix_prob": 0.5, "mixup_off_epoch": 1}, "adamw"),
    "cutmix alone": (TIMMS | {"cutmix": 1.0, "loss": "BCE"}, "adamw"),
    "accumulation and clipping": (TIMMS | {"gradient_accumulation_steps": 2, "clip_grad": True, "clip_value": 0.1}, "adamw"),
    "moving average": (TIMMS | {"ema": True, "ema_decay": 0.9, "clip_grad": True, "clip_value": 0.5}, "adamw"),
    "layer decay": (TIMMS | {"layer_decay": 0.7, "ema": True, "ema_decay": 0.99}, "adamw"),
    "smoothing": (TIMMS | {"label_smoothing": 0.1, "drop_rate": 0.2, "drop_path_rate": 0.2}, "adamw"),
    "bfloat16": (TIMMS | {"amp_level": "O2", "amp_dtype": "bfloat16", "clip_grad": True, "clip_value": 0.5}, "adamw"),
    "float16": (TIMMS | {"amp_level": "O2", "amp_dtype": "float16", "loss_scale": 1024, "clip_grad": True, "clip_value": 0.5}, "adamw"),
    "everything": (
        TIMMS
        | {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "layer_decay": 0.7, "ema": True, "ema_decay": 0.9, "batch_size": 8}
        | {"amp_level": "O2", "amp_dtype": "float16", "loss_scale": 1024, "gradient_accumulation_steps": 2, "clip_grad": True}
        | {"clip_value": 0.5, "drop_path_rate": 0.2, "warmup_epochs": 1, "warmup_lr": 1e-3, "warmup_prefix": False, "decay_epochs": 2},
        "adamw",
    ),
    "warm-up, then cycles": (
        TIMMS | {"epoch_size": 6, "warmup_epochs": 1, "warmup_lr": 1e-3, "decay_epochs": 2, "num_cycles": 2, "cycle_decay": 0.5},
        "adamw",
    ),
    "everything decays": ({"opt": "adam", "weight_decay_filter": "disable"}, "adam"),
    "sgd": ({"opt": "sgd", "weight_decay_filter": "timm"}, "momentum"),
    "Nesterov": ({"opt": "momentum", "use_nesterov": True, "weight_decay_filter": "timm"}, "sgd"),
    **{opt: ({"opt": opt, "weight_decay_filter": "timm"}, opt) for opt in ("lion", "rmsprop", "adagrad", "lamb", "nadam")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_is_that_of_timms_parts_in_a_plain_loop(tmp_path, monkeypatch, name):
    """Weights, moving average and learning rate after each of the steps: 0 difference."""
    keys, opt = SETTINGS[name]
    recipe = small(**{**SHORT, **keys})
    batches, states = [], []
    following, applying = TorchRun._next, TorchRun.apply

    def recording_next(self, made):
        batch = following(self, made)
        batches.append(batch._replace(images=batch.images.clone()))  # timm mixes in place
        return batch

    def recording_apply(self):
        norm = applying(self)
        average = [p.clone() for p in self.ema.module.parameters()] if self.ema is not None else []
        states.append(([p.detach().clone() for p in self.model.parameters()], average, [g["lr"] for g in self.optimizer.param_groups]))
        return norm

    monkeypatch.setattr(TorchRun, "_next", recording_next)
    monkeypatch.setattr(TorchRun, "apply", recording_apply)
    train(recipe, tmp_path / "run", progress=False)

    parts, smoothing = recipe.gradient_accumulation_steps, recipe.label_smoothing
    steps = len(states) // recipe.epoch_size
    model = build_model(recipe, 10).train()
    eps = {} if opt in ("sgd", "momentum", "lion") else {"eps": recipe.eps}
    filtered = recipe.weight_decay_filter == "timm"
    trained = model if filtered else list(model.parameters())  # of a model timm spares the position embedding and class token all the same
    optimizer = create_optimizer_v2(
        trained, opt, lr=0.01, weight_decay=0.05, momentum=0.9, filter_bias_and_bn=filtered, layer_decay=recipe.layer_decay, **eps
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=recipe.decay_epochs, min_lr=recipe.min_lr, warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr or 0.0, warmup_prefix=recipe.warmup_prefix, cycle_limit=recipe.num_cycles,
        cycle_decay=recipe.cycle_decay, step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    ema = ModelEmaV3(model, decay=recipe.ema_decay)
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, prob=recipe.cutmix_prob, label_smoothing=smoothing, num_classes=10)
    criterion = SoftTargetCrossEntropy() if mixup else torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    if recipe.loss == "BCE":
        criterion = BinaryCrossEntropy(0.0 if mixup else smoothing)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(recipe.amp_dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=dtype is torch.float16)
    made = iter(batches)
    assert len(states) * parts == len(batches) >= 6
    for number, (weights, average, lrs) in enumerate(states):
        epoch, step = divmod(number, steps)
        scheduler.step_update(number)
        for part in range(parts):
            batch = next(made)
            images, targets = batch.images, batch.targets
            if mixup is not None:
                mixup.mixup_enabled = not 0 < recipe.mixup_off_epoch <= epoch  # as timm's train.py does from its mixup_off_epoch on
                with seeded(mix_seed(recipe.seed, epoch, step, 0, part, 3)):
                    images, targets = mixup(images, targets)
            torch.manual_seed(mix_seed(recipe.seed, epoch, step, 0, part, 2))
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = criterion(model(images).float(), targets)
            scaler.scale(loss / parts).backward()
        scaler.unscale_(optimizer)
        if recipe.clip_grad:
            dispatch_clip_grad(model.parameters(), recipe.clip_value, mode="norm")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(model)
        assert [group["lr"] for group in optimizer.param_groups] == lrs, number
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True)), number
        assert not average or all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), average, strict=True)), number


def test_smoothing_is_timms_and_fairs():
    """torch's own cross entropy in place of timm's LabelSmoothingCrossEntropy: the same sum in another order."""
    logits, targets = torch.randn(64, 10) * 5, torch.randint(10, (64,))
    _, ours = build_loss(small(label_smoothing=0.1), 10)
    torch.testing.assert_close(ours(logits, targets), LabelSmoothingCrossEntropy(0.1)(logits, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["convit_tiny_fair", "convit_small_fair", "convit_base_fair"])
def test_rates_are_fairs_an_epoch_earlier(name):
    """main.py: lr times the global batch over 512; timm's cosine per epoch from 5 epochs of warm-up at 1e-6, set after each epoch."""
    recipe = load_recipe(name)
    peak = 5e-4 * 1024 / 512
    assert recipe.scale_lr and recipe.lr * 1024 / recipe.scale_lr_batch == peak

    def fair(epoch):
        if epoch < 5:
            return 1e-6 + epoch * ((peak - 1e-6) / 5)
        return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) if epoch < 300 else 1e-5

    set_after = [1e-6] + [fair(epoch) for epoch in range(recipe.epoch_size)]  # the rate that FAIR's epoch 0, 1, 2, ... runs with
    ours = rates(recipe, peak, 2)
    np.testing.assert_allclose(ours[::2], set_after[1:], rtol=1e-12)
    assert ours[::2] == ours[1::2]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_repeated_augmentation_is_fairs(folder, processes):
    """samplers.py's RASampler written out: three copies of each image in a row, dealt to the processes in turn."""
    recipe = pictures(folder, aug_repeats=3, batch_size=4)
    worlds = [TrainData(recipe, World(rank, processes), torch.device("cpu")) for rank in range(processes)]
    shuffled = np.random.default_rng(mix_seed(recipe.seed, 5)).permutation(24).tolist()
    indices = [index for index in shuffled for _ in range(3)]
    for rank, data in enumerate(worlds):
        mine = [data.order.of(5)[position] for step in range(data.order.steps) for position in data.order.parts(step)[0]]
        assert mine == indices[rank::processes][: len(mine)] and len(mine) == 24 // (4 * processes) * 4
