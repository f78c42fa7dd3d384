"""A tiny model learns the shapes; and several processes train and sample as one."""

import csv
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY
from test_command import SCRIPT

import ddim_cifar


def read_log(folder):
    with open(folder / "ddim_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def torchrun(processes, *flags, wait=True):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(SCRIPT),
        *map(str, flags),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err


def test_a_tiny_model_learns_the_shapes(ddim, tmp_path):
    """Eighty steps reach 0.055. The loss is 1 untrained, and stays near it if the average, the noise or the optimizer is wired wrongly."""
    learning = ["--batch-size", "8", "--iterations", "80", "--lr", "3e-3", "--warmup", "10", "--dropout", "0", "--ema-decay", "0.95"]
    result = ddim(*TINY, *learning, flags=[])
    assert result.code == 0 and float(read_log(tmp_path)[-1]["val_loss"]) < 0.08


@pytest.mark.parametrize("decay, used", [(0.9999, [2 / 11, 3 / 12]), (0.2, [2 / 11, 0.2])])
def test_the_average_follows_the_weights_at_the_decay_of_its_update(ddim, tmp_path, decay, used):
    ddim("--epochs", "3", "--save-every", "1", "--lr", "1e-2", "--warmup", "0", "--ema-decay", decay)
    saved = [ddim_cifar.load_checkpoint(tmp_path / f"ddim_model_epoch_{epoch}.pth", "cpu") for epoch in (1, 2, 3)]
    for before, after, d in zip(saved, saved[1:], used):
        for name, value in after["ema"].items():
            expected = d * before["ema"][name].double() + (1 - d) * after["model"][name].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-5)


class Gain(torch.nn.Module):
    """Predicts a multiple of x_t, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, t):
        self.seen = x, t
        return self.gain * x


def test_a_step_flips_adds_noise_and_clips_the_gradient():
    args, _ = ddim_cifar.parse_args(["--batch-size", "8", "--grad-clip", "0.001"])
    model, schedule, images = Gain(), ddim_cifar.NoiseSchedule(), ddim_cifar.draw_shapes(8, seed=0)
    state = ddim_cifar.State(model, Gain().requires_grad_(False), torch.optim.Adam(model.parameters(), fused=True))
    run = ddim_cifar.Run(torch.device("cpu"), None, "fp32", "off", None)
    loss, norm, _ = ddim_cifar.make_step(state, schedule, args, run)(images)
    flip, t, eps = ddim_cifar.Draws(8, 1000, args.seed, run.device)(0)
    x_0 = ddim_cifar.to_float(torch.stack([image.flip(2) if mirrored else image for image, mirrored in zip(images, flip)]))
    x_t = schedule.add_noise(x_0, eps, t)
    assert 0 < flip.sum() < 8 and torch.equal(model.seen[0], x_t) and torch.equal(model.seen[1], t)
    torch.testing.assert_close(loss, (0.5 * x_t - eps).square().mean())
    torch.testing.assert_close(norm, (2 * (0.5 * x_t - eps) * x_t).mean().abs())
    assert not state.ema.gain.requires_grad  # or every average would hold on to all before it
    assert norm > 0.01 and abs(model.gain.grad) == pytest.approx(0.001, rel=1e-2)


def test_the_held_out_loss_is_of_fixed_noise_and_shared_among_processes(monkeypatch):
    model, schedule, images = Gain(), ddim_cifar.NoiseSchedule(), ddim_cifar.draw_shapes(70, seed=0)
    run = ddim_cifar.Run(torch.device("cpu"), None, "fp32", "off", None)
    eps = torch.from_numpy(np.random.default_rng((0, 3)).standard_normal((70, 3, 32, 32), dtype=np.float32))
    x_t = schedule.add_noise(ddim_cifar.to_float(images), eps, torch.arange(70) * 1000 // 70)
    expected = pytest.approx(float((0.5 * x_t - eps).square().mean()), rel=1e-5)
    assert ddim_cifar.held_out_loss(model, images, schedule, run) == expected
    monkeypatch.setattr(ddim_cifar, "WORLD_SIZE", 2)
    monkeypatch.setattr(ddim_cifar, "sum_over_processes", lambda tensor: tensor)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ddim_cifar, "RANK", rank)
        shares.append(ddim_cifar.held_out_loss(model, images, schedule, run))
    assert min(shares) > 0 and sum(shares) == expected


def test_the_rate_warms_up_stays_and_falls_to_zero(ddim, tmp_path):
    ddim("--iterations", "10", "--lr", "4e-3", "--warmup", "4", "--lr-decay", "0.3", "--num-samples", "1")
    expected = [1e-3, 2e-3, 3e-3, *[4e-3] * 5, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [float(row["lr"]) for row in read_log(tmp_path)] == pytest.approx(expected)


def test_min_snr_weighs_the_loss_of_each_t(ddim, tmp_path):
    ddim("--min-snr", "0.01")  # a fresh network predicts 0, so that the first loss is the weighted square of eps
    _, t, eps = ddim_cifar.Draws(4, 1000, 0, torch.device("cpu"))(0)
    alphas = ddim_cifar.NoiseSchedule().alphas_cumprod[t]
    snr = alphas / (1 - alphas)
    expected = (snr.clamp(max=0.01) / snr * eps.square().mean((1, 2, 3))).mean()
    assert float(read_log(tmp_path)[0]["loss"]) == pytest.approx(float(expected), rel=1e-5) and expected < 0.9


def test_two_processes_train_and_sample_as_one(ddim, tmp_path):
    flags = (*TINY, "--dropout", "0", "--precision", "fp32", "--iterations", "4", "--lr", "1e-3", "--warmup", "0", "--num-samples", "5")
    ddim(*flags, "--export", tmp_path / "one.npz", flags=[], out_dir=tmp_path / "one")
    code, out, err = torchrun(2, *flags, "--out-dir", tmp_path / "two", "--export", tmp_path / "two.npz")
    assert code == 0, err
    assert out.count("epoch 1/1") == 1 and "2 processes" in out
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two")):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    one, two = (ddim_cifar.load_checkpoint(tmp_path / name / "ddim_model_final.pth", "cpu")["model"] for name in ("one", "two"))
    # Adam's first steps have the size of the rate however small a gradient is, so a rounding may turn one around
    assert all((one[name] - two[name]).abs().mean() < 1e-4 for name in one)
    pictures = [np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two")]
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).mean() < 1

    resumed = ddim("--resume", tmp_path / "two" / "ddim_model_final.pth", "--epochs", "2", flags=[], out_dir=tmp_path / "one")
    assert resumed.code == 0 and "4 done, 4 to go" in resumed.out


def test_a_batch_that_does_not_divide_is_refused(ddim, monkeypatch):
    monkeypatch.setattr(ddim_cifar, "WORLD_SIZE", 3)
    result = ddim("--batch-size", "4")
    assert result.code == 2 and "--batch-size 4 does not divide among 3 processes" in result.err and "try 6" in result.err


def test_the_death_of_one_process_ends_the_others(tmp_path):
    process = torchrun(2, *TINY, "--epochs", "100000", "--out-dir", tmp_path, wait=False)
    log = tmp_path / "ddim_log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), 9)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not any(os.path.exists(f"/proc/{child}") for child in children)
