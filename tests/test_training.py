"""What a step does, against closed forms; the optimizers; a tiny model learns; several processes train as one."""

import copy
import math
import os
import subprocess

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
SMALL = {"channels": 32, "channel_mults": (1, 2), "res_blocks": 1, "attn_resolutions": (16,), "batch_size": 4}


class Gain(nn.Module):
    """Returns a multiple of x_t, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, t):
        self.seen = x, t
        return self.gain * x


def trainer_of(model, **settings):
    config = Config(**settings)
    return Trainer(model, NoiseSchedule(), config, Runtime(CPU))


def small_trainer(**settings):
    """Of a small UNet, every weight of which has a gradient from the first step on."""
    config = Config(**SMALL, **settings)
    torch.manual_seed(0)
    model = UNet(**config.of(UNET))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return trainer_of(model, **SMALL, **settings)


def flat(state):
    """Every tensor in nested dicts, by the path to it."""
    if isinstance(state, dict):
        return {(name, *path): tensor for name, inner in state.items() for path, tensor in flat(inner).items()}
    return {(): state}


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_a_tiny_model_learns_the_shapes(ddim, tmp_path, read_log):
    """Thirty steps reach 0.11, from 0.30. The loss stays far higher if average, noise or optimizer is wired wrongly."""
    learning = ["--iterations", "30", "--lr", "4e-3", "--warmup", "5", "--dropout", "0", "--ema-decay", "0.9"]
    assert ddim(*learning, "--dataset", "synthetic", "--num-samples", "1").code == 0
    first, *_, last = read_log(tmp_path)
    assert float(first["loss"]) > 0.2 and float(last["val_loss"]) < 0.13


def test_training_begins_at_a_loss_of_1_with_eps_and_below_a_half_with_v(ddim, tmp_path, read_log):
    ddim("--predict", "eps", "--batch-size", "16", "--num-samples", "1", out_dir=tmp_path / "eps")
    ddim("--predict", "v", "--batch-size", "16", "--num-samples", "1", out_dir=tmp_path / "v")
    eps, v = (float(read_log(tmp_path / name)[0]["loss"]) for name in ("eps", "v"))
    assert eps == pytest.approx(1, abs=0.03) and v < 0.5


@pytest.mark.parametrize("decay, used", [(0.9999, [2 / 11, 3 / 12]), (0.2, [2 / 11, 0.2])])
def test_the_average_follows_the_weights_at_the_decay_of_its_update(ddim, tmp_path, load, decay, used):
    ddim("--epochs", "3", "--save-every", "1", "--lr", "1e-2", "--warmup", "0", "--ema-decay", decay)
    saved = [load(tmp_path / f"ddim_model_epoch_{epoch}.pth") for epoch in (1, 2, 3)]
    for before, after, d in zip(saved, saved[1:], used):
        for name, value in after["ema"].items():
            expected = d * before["ema"][name].double() + (1 - d) * after["model"][name].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-5)


def test_the_first_weights_follow_the_seed(ddim, tmp_path, load):
    for seed in (0, 1):
        ddim("--seed", seed, "--lr", "1e-9", "--num-samples", "1", out_dir=tmp_path / str(seed))
    one, other = (load(tmp_path / seed / "ddim_model_final.pth")["model"]["conv_in.weight"] for seed in "01")
    assert (one - other).abs().mean() > 0.01


# ---- The loss --------------------------------------------------------------------------------------------------------


def test_a_step_flips_adds_noise_and_clips_the_gradient():
    images = draw_shapes(8, seed=0)
    trainer = trainer_of(Gain(), batch_size=8, predict="eps", grad_clip=0.001)
    loss, norm, _ = trainer.step(images)

    flip, t, eps = draw_step(0, 8, 1000, 0, CPU)
    turned = torch.stack([image.flip(2) if mirrored else image for image, mirrored in zip(images, flip)])
    x_t = NoiseSchedule().add_noise(to_float(turned), eps, t)
    seen = trainer.model.seen
    assert 0 < flip.sum() < 8 and torch.equal(seen[0], x_t) and torch.equal(seen[1], t)
    torch.testing.assert_close(loss, (0.5 * x_t - eps).square().mean())
    torch.testing.assert_close(norm, (2 * (0.5 * x_t - eps) * x_t).mean().abs())
    assert not trainer.ema.gain.requires_grad  # or every average would hold on to all before it
    assert norm > 0.01 and abs(trainer.model.gain.grad) == pytest.approx(0.001, rel=1e-2)


class Gaussian(nn.Module):
    """The best network for images whose pixels are N(mean, std^2), with an output that stands for eps or v."""

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
        """The variance of eps that x_t leaves open, on average."""
        return (alphas * self.std**2 / (alphas * self.std**2 + 1 - alphas)).mean().item()


def test_the_loss_of_the_best_network_for_gaussian_images_is_the_closed_form():
    """And however t is drawn: dividing by its density leaves Eq. 5 as it is."""
    losses, alphas = {}, NoiseSchedule().alphas_cumprod
    for predict, t_sampling in (("v", "uniform"), ("eps", "uniform"), ("v", "importance")):
        trainer = trainer_of(Gaussian(predict), batch_size=1000, predict=predict, t_sampling=t_sampling)
        noisy = trainer.noisy_images(trainer.model.images(1000), 0)
        losses[predict, t_sampling] = trainer.loss(*noisy).mean().item()
    assert losses["v", "uniform"] == pytest.approx(losses["eps", "uniform"], rel=1e-5)
    for loss in losses.values():
        assert loss == pytest.approx(Gaussian.least_loss(Gaussian, alphas), rel=5e-3)


def test_a_density_of_ones_own_is_what_t_is_drawn_with(monkeypatch):
    density = NoiseSchedule().alphas_cumprod ** 0.25
    density /= density.mean()
    monkeypatch.setattr(ddim_cifar, "t_density", lambda schedule, t_sampling: density)
    trainer = trainer_of(Gain(), batch_size=1000, t_sampling="mine")
    _, t, _ = trainer.noisy_images(draw_shapes(1000, seed=0), 0)
    assert (1 / density[t]).mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_so_is_its_held_out_loss(predict):
    schedule, network = NoiseSchedule(), Gaussian(predict)
    loss = held_out_loss(NoisePredictor(network, schedule, predict), network.images(256), Runtime(CPU))
    assert loss == pytest.approx(network.least_loss(schedule.alphas_cumprod[torch.arange(256) * 1000 // 256]), rel=1e-2)


def test_the_held_out_loss_is_of_fixed_noise_and_shared_among_processes(monkeypatch):
    schedule, images = NoiseSchedule(), draw_shapes(70, seed=0)
    predictor = NoisePredictor(Gain(), schedule, "eps")
    eps = torch.from_numpy(np.random.default_rng((0, 3)).standard_normal((70, 3, 32, 32), dtype=np.float32))
    x_t = schedule.add_noise(to_float(images), eps, torch.arange(70) * 1000 // 70)
    expected = pytest.approx(float((0.5 * x_t - eps).square().mean()), rel=1e-5)
    assert held_out_loss(predictor, images, Runtime(CPU)) == expected

    monkeypatch.setattr(ddim_cifar.world, "size", 2)
    monkeypatch.setattr(ddim_cifar, "sum_over_processes", lambda tensor: tensor)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ddim_cifar.world, "rank", rank)
        shares.append(held_out_loss(predictor, images, Runtime(CPU)))
    assert min(shares) > 0 and sum(shares) == expected


def test_the_held_out_loss_of_a_run_is_that_of_the_averaged_weights_without_dropout(ddim, tmp_path, read_log):
    ddim("--iterations", "3", "--lr", "1e-2", "--warmup", "0", "--dropout", "0.5")
    logged = float(read_log(tmp_path)[-1]["val_loss"])
    averaged, _ = load_model(tmp_path / "ddim_model_final.pth")
    _, held_out = ddim_cifar.load_images("folder", ddim.images)
    assert logged == pytest.approx(held_out_loss(averaged, held_out, Runtime(CPU)), rel=1e-4)


# ---- A step of the optimizers ----------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_falls_to_zero(ddim, tmp_path, read_log):
    ddim("--iterations", "10", "--lr", "4e-3", "--warmup", "4", "--lr-decay", "0.3", "--num-samples", "1")
    expected = [1e-3, 2e-3, 3e-3, *[4e-3] * 5, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [float(row["lr"]) for row in read_log(tmp_path)] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_every_weight_moves_by_the_rate_that_is_logged(optimizer):
    moved = []
    for warmup in (0, 10):
        trainer = small_trainer(optimizer=optimizer, lr=1e-2, warmup=warmup)
        before = copy.deepcopy(trainer.model.state_dict())
        _, _, lr = trainer.step(draw_shapes(4, seed=0))
        assert lr == pytest.approx(1e-2 / max(1, warmup))
        moved.append({name: after.double() - before[name] for name, after in trainer.model.state_dict().items()})
    for name, step in moved[0].items():
        if not name.endswith("to_k.bias"):  # which has no gradient
            assert step.any(), name
            torch.testing.assert_close(step, 10 * moved[1][name], rtol=1e-2, atol=1e-5)


def test_the_paper_s_optimizer_begins_with_steps_of_the_size_of_the_rate():
    trainer = trainer_of(Gain(), batch_size=8, optimizer="adam", lr=1e-3, warmup=0)
    trainer.step(draw_shapes(8, seed=0))
    assert abs(trainer.model.gain.item() - 0.5) == pytest.approx(1e-3, rel=1e-3)


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


def test_muon_keeps_one_moment_of_each_weight_and_adam_two():
    trainer = small_trainer()
    trainer.step(draw_shapes(4, seed=0))
    muon, adam = ({id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in trainer.optimizers)
    moments = trainer.state_dict()["optimizer"]
    for name, parameter in trainer.model.named_parameters():
        kept = {"momentum"} if id(parameter) in muon else {"step", "exp_avg", "exp_avg_sq"}
        assert moments[name].keys() == kept and (id(parameter) in adam) == (len(kept) == 3), name


def muon_by_hand(weights, gradients, lr, momentum=0.95):
    """The weights after steps with these gradients, matrices [rows, columns] of float64."""
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


SHAPES = {
    "square": (64, 64),
    "wide": (64, 160),
    "tall": (160, 64),
    "convolution": (64, 16, 3, 3),
    "1x1": (96, 64, 1, 1),
}


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
        momentum = muon.state[weight]["momentum"]
        assert momentum.shape == weight.shape and momentum.stride() == weight.stride()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_of_muon_is_nearly_orthogonal_and_as_large_as_one_of_adam(shape):
    random = torch.randn(shape, generator=torch.Generator().manual_seed(1)).flatten(1)
    left, values, right = torch.linalg.svd(random, full_matrices=False)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = (left * torch.linspace(1, 0.3, len(values)) @ right).view(shape)
    Muon([weight], lr=0.01).step()
    step = -weight.detach().flatten(1)
    values = torch.linalg.svdvals(step) / (0.01 * 0.2 * math.sqrt(max(step.shape)))
    assert values.min() > 0.6 and values.max() < 1.3
    assert (step * weight.grad.flatten(1)).sum() > 0.9 * step.norm() * weight.grad.norm()
    assert step.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_gradients_of_zero_move_nothing():
    weight = nn.Parameter(torch.ones(64, 64))
    muon = Muon([weight], lr=0.01)
    weight.grad = torch.zeros(64, 64)
    muon.step()
    assert torch.equal(weight, torch.ones(64, 64)) and not muon.state[weight]["momentum"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_muon_leaves_all_as_it_is_where_found_inf_says_so(bad):
    weight = nn.Parameter(torch.randn(64, 8, 3, 3).contiguous(memory_format=torch.channels_last))
    muon = Muon([weight], lr=0.01)
    weight.grad = torch.randn_like(weight)
    muon.step()
    before = weight.detach().clone(), muon.state[weight]["momentum"].clone()
    weight.grad = torch.full_like(weight, bad)
    muon.found_inf = torch.ones(())
    muon.step()
    assert torch.equal(weight, before[0]) and torch.equal(muon.state[weight]["momentum"], before[1])


def poison_loss(model):
    return model.conv_out.register_forward_hook(lambda module, inputs, output: output * math.nan)


def poison_gradient_of_a_matrix(model):
    return model.time_embedding["linear_2"].weight.register_hook(lambda gradient: gradient * math.inf)


def poison_gradient_of_a_bias(model):
    return model.conv_out.bias.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient_of_a_matrix, poison_gradient_of_a_bias])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_neither_weights_nor_moments(optimizer, poison):
    images, trainer = draw_shapes(4, seed=0), small_trainer(optimizer=optimizer, warmup=0)
    trainer.step(images)
    before = copy.deepcopy(trainer.state_dict())
    poisoned = poison(trainer.model)
    loss, norm, _ = trainer.step(images)
    assert loss.isfinite() == (poison is not poison_loss) and not norm.isfinite()
    after = trainer.state_dict()
    for part in ("model", "optimizer"):
        then, now = flat(before[part]), flat(after[part])
        assert then.keys() == now.keys() and all(torch.equal(then[name], now[name]) for name in then), part
    assert all(average.isfinite().all() for average in after["ema"].values())

    poisoned.remove()
    trainer.step(images)
    assert all(not torch.equal(before["model"][name], now) for name, now in trainer.model.state_dict().items()
               if not name.endswith("to_k.bias"))  # fmt: skip


# ---- Several processes -----------------------------------------------------------------------------------------------


class Dropping(Gain):
    """Keeps what dropout left."""

    def forward(self, x, t):
        self.left = nn.functional.dropout(torch.ones_like(x[:1]))
        return self.gain * x


def test_dropout_follows_the_step_and_differs_between_processes(monkeypatch):
    trainer, images = trainer_of(Dropping(), batch_size=8), draw_shapes(4, seed=0)
    monkeypatch.setattr(ddim_cifar.world, "size", 2)

    def left(rank, n):
        monkeypatch.setattr(ddim_cifar.world, "rank", rank)
        trainer.backward(images, n)
        return trainer.model.left

    first = left(0, 5)
    assert torch.equal(first, left(0, 5))
    assert not torch.equal(first, left(1, 5)) and not torch.equal(first, left(0, 6))


def test_two_processes_train_and_sample_as_one(ddim, tmp_path, read_log, load):
    flags = ["--dropout", "0", "--iterations", "4", "--lr", "1e-3", "--warmup", "0", "--num-samples", "5"]
    ddim(*flags, "--export", tmp_path / "one.npz", out_dir=tmp_path / "one")
    process = ddim.torchrun(2, *ddim.tiny, *flags, "--out-dir", tmp_path / "two", "--export", tmp_path / "two.npz")
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert out.count("epoch 1/1") == 1 and "2 processes" in out

    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
    one, two = (load(tmp_path / name / "ddim_model_final.pth")["model"] for name in ("one", "two"))
    # First steps have the size of the rate however small a gradient is, so that a rounding may turn one around.
    assert all((one[name] - two[name]).abs().mean() < 1e-4 for name in one)
    pictures = [np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two")]
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).mean() < 1

    checkpoint = tmp_path / "two" / "ddim_model_final.pth"
    resumed = ddim("--resume", checkpoint, "--epochs", "2", flags=[], out_dir=tmp_path / "resumed")
    assert resumed.code == 0 and "4 done, 4 to go" in resumed.out


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(ddim_cifar.world, "size", 3)
    with pytest.raises(ddim_cifar.UsageError, match="--batch-size 4 does not divide among 3 processes; try 6"):
        ddim_cifar.parse_args(["--batch-size", "4"])


def test_the_death_of_one_process_ends_the_others(ddim, tmp_path, wait_until):
    process = ddim.torchrun(2, *ddim.tiny, "--epochs", "100000", "--out-dir", tmp_path)
    log = tmp_path / "ddim_log.csv"
    wait_until(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), 9)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not any(os.path.exists(f"/proc/{child}") for child in children)


def test_a_step_in_parts_is_the_step_of_the_whole_batch(ddim, tmp_path, load, read_log):
    flags = ("--dropout", "0", "--iterations", "4", "--batch-size", "8", "--num-samples", "1")
    ddim(*flags, out_dir=tmp_path / "whole")
    ddim(*flags, "--micro-batch", "3", out_dir=tmp_path / "parts")
    for whole, parts in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts")):
        assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
        assert float(parts["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=1e-4)
    whole, parts = (load(tmp_path / name / "ddim_model_final.pth")["model"] for name in ("whole", "parts"))
    assert all((whole[name] - parts[name]).abs().mean() < 1e-4 for name in whole)


def test_micro_batches_may_change_on_resume_and_bound_what_the_network_sees(ddim, tmp_path, monkeypatch):
    ddim("--num-samples", "1")
    forward, seen = ddim_cifar.UNet.forward, []

    def watched(self, x, t):
        if self.training:
            seen.append(len(x))
        return forward(self, x, t)

    monkeypatch.setattr(ddim_cifar.UNet, "forward", watched)
    assert ddim("--resume", "auto", "--epochs", "2", "--micro-batch", "3", flags=[]).code == 0
    assert seen == [3, 1]
