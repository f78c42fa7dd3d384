"""What a step does, against closed forms; the optimizers; a tiny model learns; several processes train as one."""

import copy
import functools
import importlib.util
import math
import os
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import ddim_cifar
from ddim_cifar import (
    UNET,
    Config,
    Muon,
    NoisePredictor,
    NoiseSchedule,
    Runtime,
    Trainer,
    UNet,
    draw_shapes,
    draw_step,
    held_out_loss,
    load_model,
    make_optimizers,
    to_float,
)

CPU = torch.device("cpu")
SMALL = {"channels": 32, "channel_mults": (1, 1), "res_blocks": 1, "attn_resolutions": (16,), "batch_size": 2}
ONE = ["--num-samples", "1"]
AT_ONCE = ["--warmup", "0", "--lr-decay", "0"]
LIGHT = ["--channel-mults", "1", "1", "--attn-resolutions", "--batch-size", "2"]  # a quarter of the usual time


class Gain(nn.Module):
    """Returns a multiple of x_t, and keeps what it saw."""

    def __init__(self, gain=0.5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain]))

    def forward(self, x, t):
        self.seen = x, t
        return self.gain * x


def trainer_of(model, schedule=None, **settings):
    return Trainer(model, schedule or NoiseSchedule(), Config(**settings), Runtime(CPU))


def small_trainer(**settings):
    """Return the trainer of a small UNet, every weight of which has a gradient from the first step on."""
    settings = {**SMALL, **settings}
    config = Config(**settings)
    torch.manual_seed(0)
    model = UNet(**config.of(UNET))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return trainer_of(model, **settings)


def assert_same_convolutions(one, other):
    """Compare the convolutions of two dicts of weights.

    Biases and time embeddings stand before a GroupNorm of one channel a group, which cancels them: their gradients are
    rounding errors, and their steps are as large as any.
    """
    names = [name for name in one if name.endswith(("conv1.weight", "conv2.weight"))]
    assert names and all((one[name] - other[name]).abs().mean() < 1e-5 for name in names)


def state_of(trainer):
    """Return copies of weights and moments, in order."""
    moments = [of.values() for optimizer in trainer.optimizers for of in optimizer.state.values()]
    return [value.clone() for values in (trainer.model.state_dict().values(), *moments) for value in values]


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_a_tiny_model_learns_the_shapes(ddim, tmp_path, read_log):
    """Lower the losses from 0.23 and 0.34, where they stay if average, noise or optimizer is wired wrongly."""
    ddim("--iterations", "30", "--lr", "4e-3", "--warmup", "5", "--ema-decay", "0.9", *ONE, *LIGHT)
    rows = read_log(tmp_path)
    assert sum(float(row["loss"]) for row in rows[-10:]) / 10 < 0.12 and float(rows[-1]["val_loss"]) < 0.3


@pytest.mark.parametrize(("decay", "used"), [(0.9999, [1 / 10, 2 / 11, 3 / 12]), (0.15, [0.1, 0.15, 0.15])])
def test_the_average_follows_the_weights_at_the_decay_of_its_update(decay, used):
    trainer, images = small_trainer(lr=1e-2, warmup=0, ema_decay=decay), draw_shapes(2, seed=0)
    for d in used:
        before = copy.deepcopy(trainer.ema.state_dict())
        trainer.step(images)
        for name, value in trainer.ema.state_dict().items():
            expected = d * before[name].double() + (1 - d) * trainer.model.state_dict()[name].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-5)


def test_the_first_weights_follow_the_seed(ddim, tmp_path, load):
    for seed in (0, 1):
        ddim("--seed", seed, "--lr", "1e-9", *ONE, *LIGHT, out_dir=tmp_path / str(seed))
    one, other = (load(tmp_path / seed / "ddim_model_final.pth")["model"]["conv_in.weight"] for seed in "01")
    assert (one - other).abs().mean() > 0.01


# ---- The loss --------------------------------------------------------------------------------------------------------


def test_a_step_flips_adds_noise_and_clips_the_gradient():
    images = draw_shapes(8, seed=0)
    trainer = trainer_of(Gain(5.0), batch_size=8, predict="eps", optimizer="adam", lr=1e-3, warmup=0)
    _, loss, norm, _ = trainer.step(images)

    flip, t, eps = draw_step(0, 8, 1000, 0, CPU)
    turned = torch.stack([image.flip(2) if mirrored else image for image, mirrored in zip(images, flip)])
    x_t = NoiseSchedule().add_noise(to_float(turned), eps, t)
    seen = trainer.model.seen
    assert 0 < flip.sum() < 8 and torch.equal(seen[0], x_t) and torch.equal(seen[1], t)
    torch.testing.assert_close(loss, (5 * x_t - eps).square().mean())
    torch.testing.assert_close(norm, (2 * (5 * x_t - eps) * x_t).mean().abs())
    assert not trainer.ema.gain.requires_grad  # or every average would hold on to all before it
    assert norm > 2 and abs(trainer.model.gain.grad) == pytest.approx(1, rel=1e-2)
    assert 5 - trainer.model.gain.item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step is as large as its rate


class Gaussian(nn.Module):
    """Predicts eps or v as the best network does for images whose pixels are N(mean, std^2)."""

    mean, std = 0.1, 0.2

    def __init__(self, predict):
        super().__init__()
        self.predict = predict
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        alpha = NoiseSchedule().alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (1 - alpha).sqrt() * (x - alpha.sqrt() * self.mean) / (alpha * self.std**2 + 1 - alpha)
        return eps if self.predict == "eps" else (eps - (1 - alpha).sqrt() * x) / alpha.sqrt()

    def images(self, count):
        x = self.mean + self.std * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        return ddim_cifar.to_uint8(x)

    def least_loss(self, alphas):
        """Return the variance of eps that x_t leaves open, on average."""
        return (alphas * self.std**2 / (alphas * self.std**2 + 1 - alphas)).mean().item()


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_the_losses_of_the_best_network_for_gaussian_images_are_the_closed_form(predict):
    """Check that to draw t by a density and to divide the loss by it leaves Eq. 5 as it is."""
    schedule, network = NoiseSchedule(), Gaussian(predict)
    trainer = trainer_of(network, batch_size=1000, predict=predict)
    loss = trainer.loss(*trainer.noisy_images(network.images(1000), 0)).mean().item()
    assert loss == pytest.approx(network.least_loss(schedule.alphas_cumprod), rel=5e-3)

    loss = held_out_loss(NoisePredictor(network, schedule, predict), network.images(256), Runtime(CPU))
    assert loss == pytest.approx(network.least_loss(schedule.alphas_cumprod[torch.arange(256) * 1000 // 256]), rel=1e-2)


def test_a_density_of_ones_own_is_what_t_is_drawn_with(monkeypatch):
    density = NoiseSchedule().alphas_cumprod ** 0.25
    density /= density.mean()
    monkeypatch.setattr(ddim_cifar, "t_density", lambda *_: density)
    trainer = trainer_of(Gain(), batch_size=1000)
    _, t, _ = trainer.noisy_images(draw_shapes(1000, seed=0), 0)
    assert (1 / density[t]).mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(("timesteps", "count"), [(1000, 70), (30, 10), (1000, 300)])
def test_the_held_out_loss_is_of_fixed_noise_and_of_256_images_at_most(timesteps, count):
    schedule, images, used = NoiseSchedule(timesteps), draw_shapes(count, seed=0), min(256, count)
    eps = torch.from_numpy(np.random.default_rng((0, 3)).standard_normal((used, 3, 32, 32), dtype=np.float32))
    x_t = schedule.add_noise(to_float(images[:used]), eps, torch.arange(used) * timesteps // used)
    expected = pytest.approx(float((0.5 * x_t - eps).square().mean()), rel=1e-5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert held_out_loss(NoisePredictor(Gain(), schedule, "eps"), images, Runtime(CPU)) == expected


def test_the_held_out_loss_of_a_run_is_that_of_the_averaged_weights_without_dropout(ddim, tmp_path, read_log):
    ddim("--iterations", "3", "--lr", "1e-2", "--warmup", "0", "--dropout", "0.5", *ONE, *LIGHT)
    averaged, _ = load_model(tmp_path / "ddim_model_final.pth")
    _, held_out = ddim_cifar.load_images(Config(dataset=ddim.images))
    loss = held_out_loss(averaged, held_out, Runtime(CPU))
    assert float(read_log(tmp_path)[-1]["val_loss"]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("timesteps", "beta_end"), [(20, 0.5), (2000, 0.01)])
def test_training_held_out_loss_and_sampling_ask_for_every_t_of_a_schedule_of_ones_own(
    ddim, monkeypatch, timesteps, beta_end
):
    schedule = functools.partial(NoiseSchedule, timesteps, 1e-4, beta_end)
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", schedule)
    forward, seen = UNet.forward, {True: [], False: []}

    def watched(self, x, t):
        seen[self.training].extend(t.tolist())
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", watched)
    assert ddim("--iterations", "2", "--predict", "eps", *ONE, *LIGHT, "--batch-size", "10").code == 0
    for batch in (seen[True][:10], seen[True][10:]):
        assert max(batch) - min(batch) >= 0.89 * timesteps and max(batch) < timesteps
    assert seen[False] == [i * timesteps // 4 for i in range(4)] + [timesteps * 8 // 10, 0]


# ---- A step of the optimizers ----------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_falls_to_zero(ddim, tmp_path, read_log):
    ddim("--iterations", "10", "--lr", "4e-3", "--warmup", "4", "--lr-decay", "0.3", *ONE, *LIGHT)
    expected = [1e-3, 2e-3, 3e-3, *[4e-3] * 5, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [float(row["lr"]) for row in read_log(tmp_path)] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_every_weight_moves_by_the_rate_that_is_returned(optimizer):
    moved = []
    for warmup in (0, 10):
        trainer = small_trainer(optimizer=optimizer, lr=1e-2, warmup=warmup)
        before = copy.deepcopy(trainer.model.state_dict())
        lr = trainer.step(draw_shapes(2, seed=0))[-1]
        assert lr == pytest.approx(1e-2 / max(1, warmup))
        moved.append({name: after.double() - before[name] for name, after in trainer.model.state_dict().items()})
    for name, step in moved[0].items():
        if not name.endswith("to_k.bias"):  # which has no gradient
            assert step.any(), name
            torch.testing.assert_close(step, 10 * moved[1][name], rtol=1e-2, atol=1e-5)


def test_by_default_muon_trains_all_matrices_but_the_first_and_the_last_and_adam_the_rest():
    with torch.device("meta"):
        model = UNet()
    muon, adam = make_optimizers(model, "muon", 1e-3)
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.Adam)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, others = ([names[p] for p in optimizer.param_groups[0]["params"]] for optimizer in (muon, adam))
    assert sorted(matrices + others) == sorted(names.values())
    assert {name for name in others if model.get_parameter(name).ndim > 1} == {"conv_in.weight", "conv_out.weight"}
    assert all(model.get_parameter(name).ndim > 1 for name in matrices)


def test_a_matrix_for_muon_has_thirty_two_rows_and_columns_or_more():
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(31, 32), nn.Linear(32, 31), nn.Conv2d(4, 32, 3)])
    muon, adam = make_optimizers(model, "muon", 1e-3)
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in (muon, adam)] == [2, 6]
    assert muon.param_groups[0]["params"][0] is model[0].weight
    assert muon.param_groups[0]["params"][1] is model[3].weight  # 36 columns
    (adam,) = make_optimizers(model, "adam", 1e-3)
    assert isinstance(adam, torch.optim.Adam) and len(adam.param_groups[0]["params"]) == 8


def muon_by_hand(weights, gradients, lr, momentum=0.95):
    """Return the weights after steps with these gradients, matrices [rows, columns] of float64."""
    average = torch.zeros_like(weights)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        x = momentum * average + (1 - momentum) * gradient
        x = x / x.norm()
        for _ in range(5):
            A = x @ x.T
            x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
        weights = weights - lr * 0.2 * math.sqrt(max(x.shape)) * x
    return weights


SHAPES = {"square": (64, 64), "wide": (64, 160), "tall": (160, 64), "conv": (64, 16, 3, 3), "1x1": (96, 64, 1, 1)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("steps", [1, 4])
def test_muon_takes_the_steps_of_its_formula(steps, layout):
    generator = torch.Generator().manual_seed(0)
    parameters, expected, gradients = [], [], []
    for shape in [*SHAPES.values(), *SHAPES.values()]:  # two of each, which are stacked
        start, *slopes = torch.randn(1 + steps, *shape, generator=generator)
        weight = nn.Parameter(start.clone())
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)
        parameters.append(weight)
        gradients.append(slopes)
        matrices = [slope.flatten(1).double() for slope in slopes]
        expected.append(muon_by_hand(start.flatten(1).double(), matrices, lr=0.1))

    muon = Muon(parameters, lr=0.1)
    for n in range(steps):
        for weight, slopes in zip(parameters, gradients):
            weight.grad = torch.empty_like(weight).copy_(1e-3 * slopes[n])  # of any size: steps do not depend on it
        muon.step()
    for weight, after in zip(parameters, expected):
        torch.testing.assert_close(weight.detach().flatten(1).double(), after, rtol=1e-3, atol=1e-4)
        (momentum,) = muon.state[weight].values()  # one moment, where Adam has two
        assert momentum.shape == weight.shape and momentum.stride() == weight.stride()


def test_gradients_of_zero_move_nothing():
    weight = nn.Parameter(torch.ones(64, 64))
    muon = Muon([weight], lr=0.01)
    weight.grad = torch.zeros(64, 64)
    muon.step()
    assert torch.equal(weight, torch.ones(64, 64)) and not any(moment.any() for moment in muon.state[weight].values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_muon_leaves_all_as_it_is_where_found_inf_says_so(bad):
    """Skip a step as torch's fused optimizers do, without waiting for the GPU."""
    weight = nn.Parameter(torch.randn(64, 8, 3, 3).contiguous(memory_format=torch.channels_last))
    muon = Muon([weight], lr=0.01)
    weight.grad = torch.randn_like(weight)
    muon.step()
    before = [weight.detach().clone(), *(moment.clone() for moment in muon.state[weight].values())]
    weight.grad = torch.full_like(weight, bad)
    muon.found_inf = torch.ones(())
    muon.step()
    assert all(torch.equal(*pair) for pair in zip(before, [weight, *muon.state[weight].values()], strict=True))


def poison_loss(model):
    return model.conv_out.register_forward_hook(lambda module, inputs, output: output * math.nan)


def poison_matrix(model):
    return model.time_embedding["linear_2"].weight.register_hook(lambda gradient: gradient * math.inf)


def poison_bias(model):
    return model.conv_out.bias.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("poison", [poison_loss, poison_matrix, poison_bias])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_neither_weights_nor_moments(optimizer, poison):
    images, trainer = draw_shapes(2, seed=0), small_trainer(optimizer=optimizer, warmup=0)
    trainer.step(images)
    before, poisoned = state_of(trainer), poison(trainer.model)
    _, loss, norm, _ = trainer.step(images)
    assert loss.isfinite() == (poison is not poison_loss) and not norm.isfinite() and trainer.steps == 2
    assert all(torch.equal(*pair) for pair in zip(before, state_of(trainer), strict=True))
    assert all(value.isfinite().all() for value in trainer.ema.state_dict().values())

    poisoned.remove()
    trainer.step(images)
    for name, then, now in zip(trainer.model.state_dict(), before, state_of(trainer)):
        assert name.endswith("to_k.bias") or not torch.equal(then, now), name


# ---- The log of a device that is not waited for; errors in a step ----------------------------------------------------


def in_step(monkeypatch, do):
    """Call do(n) in the network of each training step n, from 1 on; what it returns multiplies the output."""
    forward, steps = UNet.forward, []

    def changed(self, x, t):
        if not self.training:
            return forward(self, x, t)
        steps.append(1)
        return forward(self, x, t) * do(len(steps))

    monkeypatch.setattr(UNet, "forward", changed)


@pytest.fixture
def clock(monkeypatch):
    """Set up a clock on which each training step takes two seconds, and nothing else any time."""
    now, step = [0.0], Trainer.step

    def taking_two(self, images):
        now[0] += 2
        return step(self, images)

    monkeypatch.setattr(Trainer, "step", taking_two)
    monkeypatch.setattr(ddim_cifar.time, "perf_counter", lambda: now[0])


def test_rows_of_several_steps_fetched_at_once_are_those_of_single_ones(ddim, tmp_path, read_log, monkeypatch, clock):
    flags = ["--epochs", "2", "--iterations", "4", "--save-every", "1", "--sample-steps", "1", *ONE, *LIGHT]
    for every in (1, 3):  # the second fetches 3, 1, 2 and 2 steps
        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "fetch_every", every)
            in_step(patch, lambda n: math.nan if n == 3 else 1)
            result = ddim(*flags, out_dir=tmp_path / str(every))
            assert result.code == 0, result.err
    singly, at_once = (read_log(tmp_path / name) for name in "13")
    assert singly == at_once
    assert [float(row["seconds"]) for row in at_once] == [2 * n for n in range(1, 9)]
    assert {float(row["images_per_s"]) for row in at_once} == {1}
    assert [row["step"] for row in at_once if row["val_loss"]] == ["4", "8"]
    assert [row["step"] for row in at_once if row["loss"] == "nan"] == ["3"]
    assert len({row["loss"] for row in at_once}) == len({row["grad_norm"] for row in at_once}) == 8


@pytest.mark.parametrize(("bad", "code"), [({*range(16)} - {5, 10, 15}, 0), ({*range(4, 17)}, 1)])
def test_ten_bad_steps_in_a_row_end_a_run_wherever_the_device_was_looked_at(ddim, monkeypatch, bad, code):
    monkeypatch.setattr(Runtime, "fetch_every", 8)
    in_step(monkeypatch, lambda n: math.nan if n in bad else 1)
    result = ddim("--iterations", "16", *ONE, *LIGHT)
    assert result.code == code and ("10 steps in a row" in result.err) == code


@pytest.mark.parametrize(
    ("every", "kind", "words"),
    [(1, torch.OutOfMemoryError, "CUDA out of memory"), (10, RuntimeError, "a strange error")],
    ids=["memory", "any, fetched late"],
)
def test_an_error_in_a_step_saves_the_last_whole_one(ddim, tmp_path, load, read_log, monkeypatch, every, kind, words):
    def fail(n):
        if n == 5:
            raise kind(words)
        return 1

    flags = ["--iterations", "6", *AT_ONCE, *ONE, *LIGHT]
    ddim(*flags, out_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "fetch_every", every)
        in_step(patch, fail)
        result = ddim(*flags, out_dir=tmp_path / "parts")
    last = result.err.splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err
    assert ("--micro-batch" if "memory" in words else words) in last
    assert load(tmp_path / "parts" / "ddim_model_last.pth")["step"] == 4

    assert ddim("--resume", "auto", flags=ddim.device, out_dir=tmp_path / "parts").code == 0
    whole, parts = (load(tmp_path / name / "ddim_model_final.pth") for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    whole, parts = ([(row["step"], row["loss"]) for row in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts


def test_a_step_that_fails_half_way_is_not_saved_as_a_whole_one(ddim, tmp_path, monkeypatch):
    steps, step = [], torch.optim.Adam.step

    def fail(self):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("half of the weights have moved")
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    assert ddim("--iterations", "6", *ONE, *LIGHT).code == 2 and not list(tmp_path.glob("*.pth"))


# ---- A batch in parts, several processes -----------------------------------------------------------------------------


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    images, found, sizes = draw_shapes(4, seed=0), [], []
    for size in (None, 3):
        trainer = small_trainer(batch_size=4, micro_batch=size, lr=1e-3, warmup=0)
        trainer.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        found.append([*trainer.step(images)[1:3], trainer.model.state_dict()])
    (loss, norm, whole), (loss_of_parts, norm_of_parts, parts) = found
    assert sizes == [4, 3, 1]
    torch.testing.assert_close([loss_of_parts, norm_of_parts], [loss, norm], rtol=1e-4, atol=0)
    assert_same_convolutions(whole, parts)


def test_dropout_follows_the_step_and_differs_between_processes(monkeypatch):
    trainer, images, drawn = trainer_of(Gain(), batch_size=8), draw_shapes(4, seed=0), []
    trainer.model.register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
    monkeypatch.setattr(ddim_cifar.world, "size", 2)
    for rank, n in ((0, 5), (0, 5), (1, 5), (0, 6)):
        monkeypatch.setattr(ddim_cifar.world, "rank", rank)
        trainer.backward(images, n)
    assert drawn[0] == drawn[1] and len({*drawn}) == 3


@pytest.mark.parametrize(("launched", "found"), [({"TORCHELASTIC_RUN_ID": "1"}, (5, 8, 1)), ({}, (0, 1, 0))])
def test_only_torchrun_says_which_process_this_is(launched, found, monkeypatch):
    """Heed the variables of torchrun, and not those that another launcher left behind."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **launched}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("another_process", ddim_cifar.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "another_process", module)
    spec.loader.exec_module(module)
    assert (module.world.rank, module.world.size, module.world.local_rank) == found


def test_a_batch_that_does_not_divide_is_refused(ddim, monkeypatch):
    monkeypatch.setattr(ddim_cifar.world, "size", 3)
    with pytest.raises(ddim_cifar.UserError, match=r"--batch-size 4.* 3 processes"):
        ddim_cifar.parse_args(["--batch-size", "4"])


def test_two_processes_go_on_as_one_would(ddim, tmp_path, read_log, load):
    """Compare runs with a batch in parts, a preview, a held-out loss in each epoch, an experiment and an export."""
    ddim("--iterations", "2", "--lr", "1e-3", *AT_ONCE, *ONE, *LIGHT, "--batch-size", "4", out_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    flags = ["--resume", "auto", "--epochs", "3", "--save-every", "1", "--micro-batch", "1", "--num-samples", "5"]
    flags += ["--experiments", "trajectory", "--device", "cpu"]
    one = ddim(*flags, "--export", tmp_path / "one.npz", flags=[], out_dir=tmp_path / "one")
    two = ddim.finish(ddim.torchrun(2, *flags, "--export", tmp_path / "two.npz", "--out-dir", tmp_path / "two"))
    assert one.code == two.code == 0, two.err
    assert "2 processes" in two.out and two.out.count("2 done, 4 to go") == 1

    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] >= {"ddim_samples_epoch_2.png", "ddim_trajectory.png"}
    for row, other in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)
        assert float(other["val_loss"] or 0) == pytest.approx(float(row["val_loss"] or 0), rel=1e-3)
    one, two = (load(tmp_path / name / "ddim_model_final.pth")["model"] for name in ("one", "two"))
    assert_same_convolutions(one, two)
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert one.shape == two.shape == (5, 32, 32, 3) and np.abs(one - two).mean() < 1


@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="CUDA does not stand a fork")
def test_two_processes_begin_as_one_would_and_where_one_is_lost_the_other_saves(ddim, tmp_path, read_log, load):
    flags = [*ddim.tiny, *LIGHT, *ONE, *AT_ONCE, "--iterations", "3"]
    ddim(*flags, flags=[], out_dir=tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes, log = [], tmp_path / "two" / "ddim_log.csv"
    for rank in range(2):
        processes.append(os.fork())
        if processes[-1] == 0:
            signal.alarm(60)
            os.environ |= {**address, "RANK": str(rank)}
            vars(ddim_cifar.world).update(rank=rank, size=2, local_rank=rank)
            os._exit(ddim_cifar.main([*flags, "--epochs", "100000", "--out-dir", str(log.parent)]))

    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 5:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [1, -signal.SIGKILL]
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [float(row["loss"]) for row in two[:3]] == pytest.approx([float(row["loss"]) for row in one], rel=1e-4)
    assert load(log.with_name("ddim_model_last.pth"))["step"] == len(two)
