"""What a step does, against closed forms; the optimizers; a tiny model learns; several processes train as one."""

import copy
import functools
import importlib.util
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import ddim_cifar
from ddim_cifar import Config, NoisePredictor, NoiseSchedule, Trainer, UNet, draw_shapes

CPU = torch.device("cpu")
SMALL = {"channels": 32, "channel_mults": (1, 1), "res_blocks": 1, "attn_resolutions": (16,), "batch_size": 2}
ONE = ["--num-samples", "1"]
AT_ONCE = ["--warmup", "0", "--lr-decay", "0"]
LIGHT = ["--channel-mults", "1", "1", "--attn-resolutions", "--batch-size", "2"]  # a quarter of the usual time


class Gain(nn.Module):
    """Return a multiple of x_t, and keep what was seen."""

    def __init__(self, gain=0.5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain]))

    def forward(self, x, t):
        self.seen = x, t
        return self.gain * x


def trainer_of(model, schedule=None, **settings):
    return Trainer(model, schedule or NoiseSchedule(), Config(device="cpu", **settings))


def small_trainer(**settings):
    """Return the trainer of a small UNet, every weight of which has a gradient from the first step on."""
    settings = {**SMALL, **settings}
    config = Config(**settings)
    torch.manual_seed(0)
    model = UNet(**config.of(ddim_cifar.UNET))
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


def moments_of(trainer):
    return [value for optimizer in trainer.optimizers for of in optimizer.state.values() for value in of.values()]


def state_of(trainer):
    """Return copies of weights and moments, in order."""
    return [value.clone() for value in [*trainer.model.state_dict().values(), *moments_of(trainer)]]


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


def test_a_step_flips_adds_noise_and_clips_the_gradient():
    images = draw_shapes(8, seed=0)
    trainer = trainer_of(Gain(5.0), batch_size=8, predict="eps", optimizer="adam", lr=1e-2, warmup=10)
    _, loss, norm, rate = trainer.step(images)

    flip, t, eps = ddim_cifar.draw_step(0, 8, 1000, 0, CPU)
    turned = torch.stack([image.flip(2) if mirrored else image for image, mirrored in zip(images, flip)])
    x_t = NoiseSchedule().add_noise(ddim_cifar.to_float(turned), eps, t)
    seen = trainer.model.seen
    assert 0 < flip.sum() < 8 and torch.equal(seen[0], x_t) and torch.equal(seen[1], t)
    torch.testing.assert_close(loss, (5 * x_t - eps).square().mean())
    torch.testing.assert_close(norm, (2 * (5 * x_t - eps) * x_t).mean().abs())
    assert not trainer.ema.gain.requires_grad  # or every average would hold on to all before it
    assert norm > 2 and abs(trainer.model.gain.grad) == pytest.approx(1, rel=1e-2)
    assert 5 - trainer.model.gain.item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step is as large as its rate
    assert rate == pytest.approx(1e-3)


class Gaussian(nn.Module):
    """Predict eps or v as the best network does for images whose pixels are N(mean, std^2)."""

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

    loss = ddim_cifar.held_out_loss(
        NoisePredictor(network, schedule, predict), network.images(256), Config(device="cpu")
    )
    assert loss == pytest.approx(network.least_loss(schedule.alphas_cumprod[torch.arange(256) * 1000 // 256]), rel=1e-2)


@pytest.mark.parametrize(("timesteps", "count"), [(1000, 70), (30, 10), (1000, 300)])
def test_the_held_out_loss_is_of_fixed_noise_and_of_32_to_256_images_fewer_being_repeated(timesteps, count):
    schedule, images, used = NoiseSchedule(timesteps), draw_shapes(count, seed=0), max(32, min(256, count))
    eps = torch.from_numpy(np.random.default_rng((0, 3)).standard_normal((used, 3, 32, 32), dtype=np.float32))
    x_0 = ddim_cifar.to_float(torch.cat([images] * 4)[:used])
    x_t = schedule.add_noise(x_0, eps, torch.arange(used) * timesteps // used)
    expected = pytest.approx(float((0.5 * x_t - eps).square().mean()), rel=1e-5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert (
            ddim_cifar.held_out_loss(NoisePredictor(Gain(), schedule, "eps"), images, Config(device="cpu")) == expected
        )


def test_the_held_out_loss_of_a_run_is_that_of_the_averaged_weights_without_dropout(ddim, tmp_path, read_log):
    ddim("--iterations", "3", "--lr", "1e-2", "--warmup", "0", "--dropout", "0.5", *ONE, *LIGHT)
    averaged, _ = ddim_cifar.load_model(tmp_path / "ddim_model_final.pth")
    _, held_out = ddim_cifar.load_images(Config(dataset=ddim.images))
    loss = ddim_cifar.held_out_loss(averaged, held_out, Config(device="cpu"))
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
    assert seen[False] == [i * timesteps // 32 for i in range(32)] + [timesteps * 8 // 10, 0]


def test_the_rate_warms_up_stays_and_falls_to_zero(ddim, tmp_path, read_log):
    ddim("--iterations", "10", "--lr", "4e-3", "--warmup", "4", "--lr-decay", "0.3", *ONE, *LIGHT)
    expected = [1e-3, 2e-3, 3e-3, *[4e-3] * 5, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [float(row["lr"]) for row in read_log(tmp_path)] == pytest.approx(expected)


def test_a_matrix_for_muon_has_thirty_two_rows_and_columns_or_more():
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(31, 32), nn.Linear(32, 31), nn.Conv2d(4, 32, 3)])
    muon, adam = ddim_cifar.make_optimizers(model, "muon", 1e-3)
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in (muon, adam)] == [2, 6]
    assert muon.param_groups[0]["params"][0] is model[0].weight
    assert muon.param_groups[0]["params"][1] is model[3].weight  # 36 columns
    unet = ddim_cifar.UNet(32, (1,), 1, ())
    muon, _ = ddim_cifar.make_optimizers(unet, "muon", 1e-3)
    embedding = {id(weight) for name, weight in unet.named_parameters() if "time_emb" in name}
    assert embedding and embedding.isdisjoint(map(id, muon.param_groups[0]["params"]))
    (adam,) = ddim_cifar.make_optimizers(model, "adam", 1e-3)
    assert isinstance(adam, torch.optim.Adam) and len(adam.param_groups[0]["params"]) == 8


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_resumed_run_has_the_moments_of_the_checkpoint_and_the_settings_of_make_optimizers(optimizer):
    stopped, resumed = (small_trainer(optimizer=optimizer) for _ in range(2))
    stopped.step(draw_shapes(2, seed=0))
    for changed in resumed.optimizers:
        changed.param_groups[0]["weight_decay"] = 0.1
    ddim_cifar.load_optimizers(resumed.optimizers, [before.state_dict() for before in stopped.optimizers])
    assert all(changed.param_groups[0]["weight_decay"] == 0.1 for changed in resumed.optimizers)
    assert all(torch.equal(*pair) for pair in zip(moments_of(stopped), moments_of(resumed), strict=True))


def test_an_unknown_prediction_or_optimizer_is_an_error():
    with pytest.raises(ValueError, match="score"):
        NoisePredictor(Gain(), NoiseSchedule(), "score")(torch.zeros(1, 3, 32, 32), torch.tensor([0]))
    with pytest.raises(ValueError, match="sgd"):
        ddim_cifar.make_optimizers(Gain(), "sgd", 1e-3)


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

    muon = ddim_cifar.Muon(parameters, lr=0.1)
    for n in range(steps):
        for weight, slopes in zip(parameters, gradients):
            weight.grad = torch.empty_like(weight).copy_(1e-3 * slopes[n])  # of any size: steps do not depend on it
        muon.step()
    for weight, after in zip(parameters, expected):
        torch.testing.assert_close(weight.detach().flatten(1).double(), after, rtol=1e-3, atol=1e-4)
        (momentum,) = muon.state[weight].values()  # one moment, where Adam has two
        assert momentum.shape == weight.shape and momentum.stride() == weight.stride()


def test_muon_in_bfloat16_rounds_the_steps_of_convolutions_only():
    torch.manual_seed(0)
    starts = [torch.randn(64, 16, 3, 3), torch.randn(64, 64)]
    gradients = [torch.randn_like(start) for start in starts]
    steps = {}
    for precision in ("fp32", "bf16"):
        weights = [nn.Parameter(start.clone()) for start in starts]
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
        ddim_cifar.Muon(weights, lr=0.1, precision=precision).step()
        steps[precision] = [weight.detach() - start for weight, start in zip(weights, starts)]
    (convolution, linear), (rounded, same) = steps["fp32"], steps["bf16"]
    assert torch.equal(linear, same)
    assert 1e-4 < (rounded - convolution).norm() / convolution.norm() < 0.02


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_muon_leaves_all_as_it_is_where_found_inf_says_so(on_cpu, bad, monkeypatch):
    """Skip a step as torch's fused optimizers do, on a CPU and in the form for GPUs, which computes the same."""
    shapes = [(64, 8, 3, 3), (64, 8, 3, 3), (40, 64)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    weights[0].data = weights[0].data.contiguous(memory_format=torch.channels_last)
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    gradients = [torch.randn_like(weight) for weight in weights]

    def step(muon, gradients):
        for weight, gradient in zip(muon.param_groups[0]["params"], gradients):
            weight.grad = gradient.clone()
        muon.step()

    step(ddim_cifar.Muon(twins, lr=0.01), gradients)
    monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu, raising=False)
    muon = ddim_cifar.Muon(weights, lr=0.01)
    step(muon, gradients)
    for weight, twin in zip(weights, twins):
        torch.testing.assert_close(weight, twin, rtol=0, atol=1e-7)

    kept = weights + [muon.state[weight]["momentum"] for weight in weights]
    before = [value.detach().clone() for value in kept]
    muon.found_inf = torch.ones(())
    step(muon, [torch.full_like(gradient, bad) for gradient in gradients])
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_neither_weights_nor_moments(optimizer, poisoned):
    images, trainer = draw_shapes(2, seed=0), small_trainer(optimizer=optimizer, warmup=0)
    trainer.step(images)
    before, last = state_of(trainer), trainer.model.conv_out
    if poisoned == "loss":
        poison = last.register_forward_hook(lambda module, inputs, output: output * math.nan)
    else:
        poison = last.weight.register_hook(lambda gradient: gradient * math.inf)
    _, loss, norm, _ = trainer.step(images)
    assert loss.isfinite() == (poisoned == "gradient") and not norm.isfinite() and trainer.steps == 2
    assert all(torch.equal(*pair) for pair in zip(before, state_of(trainer), strict=True))
    assert all(value.isfinite().all() for value in trainer.ema.state_dict().values())

    poison.remove()
    trainer.step(images)
    for name, then, now in zip(trainer.model.state_dict(), before, state_of(trainer)):
        assert name.endswith("to_k.bias") or not torch.equal(then, now), name


def in_step(monkeypatch, do):
    """Call do(n) in the network of each training step n, from 1 on; what it returns multiplies the output."""
    forward, steps = UNet.forward, []

    def changed(self, x, t):
        if not self.training:
            return forward(self, x, t)
        steps.append(1)
        return forward(self, x, t) * do(len(steps))

    monkeypatch.setattr(UNet, "forward", changed)


def test_rows_of_several_steps_fetched_at_once_are_those_of_single_ones(ddim, tmp_path, read_log, monkeypatch, clock):
    flags = ["--epochs", "2", "--iterations", "4", "--save-every", "1", "--sample-steps", "1", *ONE, *LIGHT]
    clock(2)
    for every in (1, 3):  # the second fetches 3, 1, 2 and 2 steps
        with monkeypatch.context() as patch:
            patch.setitem(ddim_cifar.READ_EVERY, "cpu", every)
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


@pytest.mark.parametrize(("bad", "code"), [({*range(16)} - {5, 10, 15}, 0), ({*range(4, 15)}, 1)])
def test_ten_bad_steps_in_a_row_end_a_run_wherever_the_device_was_looked_at(ddim, monkeypatch, bad, code):
    monkeypatch.setitem(ddim_cifar.READ_EVERY, "cpu", 8)
    in_step(monkeypatch, lambda n: math.nan if n in bad else 1)
    result = ddim("--iterations", "16", *ONE, *LIGHT)
    assert result.code == code and ("10 steps in a row" in result.err) == code
    assert code or "12 bad steps skipped" in result.out


@pytest.mark.parametrize(
    ("every", "error", "words"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"),
        (8, KeyError("my\nown"), f"{__file__}, line "),
    ],
    ids=["memory", "any, fetched late"],
)
def test_an_error_in_a_step_saves_the_last_whole_one(ddim, tmp_path, load, read_log, monkeypatch, every, error, words):
    def fail(n):
        if n == 5:
            raise error
        return 1

    monkeypatch.setitem(ddim_cifar.READ_EVERY, "cpu", every)
    in_step(monkeypatch, fail)
    result = ddim("--iterations", "6", *ONE, *LIGHT)
    assert result.code == 2 and "Traceback" not in result.err and words in result.err.splitlines()[-1]
    assert load(tmp_path / "ddim_model_last.pth")["step"] == 4
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3", "4"]


def test_steps_are_logged_even_if_their_held_out_loss_fails(ddim, tmp_path, read_log, monkeypatch):
    monkeypatch.setattr(ddim_cifar, "held_out_loss", lambda *_: 1 / 0)
    assert ddim("--iterations", "3", *ONE, *LIGHT).code == 2
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3"]


def test_a_step_that_fails_half_way_is_not_saved_as_a_whole_one(ddim, tmp_path, monkeypatch):
    steps, step = [], torch.optim.Adam.step

    def fail(self):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("half of the weights have moved")
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    assert ddim("--iterations", "6", *ONE, *LIGHT).code == 2 and not list(tmp_path.glob("*.pth"))


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
    assert "processes: 2" in two.out and two.out.count("2 done, 4 to go") == 1

    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] >= {"ddim_samples_epoch_2.png", "ddim_trajectory.png"}
    for row, other in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)
        assert float(other["val_loss"] or 0) == pytest.approx(float(row["val_loss"] or 0), rel=1e-3)
    one, two = (load(tmp_path / name / "ddim_model_final.pth")["model"] for name in ("one", "two"))
    assert_same_convolutions(one, two)
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert one.shape == two.shape == (5, 32, 32, 3) and np.abs(one - two).mean() < 1


def test_two_processes_begin_as_one_would_and_where_one_is_lost_the_other_saves(ddim, tmp_path, read_log, load):
    flags, log = [*LIGHT, *ONE, *AT_ONCE, "--iterations", "3"], tmp_path / "two" / "ddim_log.csv"
    ddim(*flags, out_dir=tmp_path / "one")
    processes = ddim.fork(*ddim.tiny, *flags, "--epochs", "100000", "--out-dir", log.parent)
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 5:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    assert ddim.join(processes) == [1, -signal.SIGKILL]
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [float(row["loss"]) for row in two[:3]] == pytest.approx([float(row["loss"]) for row in one], rel=1e-4)
    assert load(log.with_name("ddim_model_last.pth"))["step"] == len(two)
