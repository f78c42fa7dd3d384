"""The command as users run it: files, flags, mistakes, stops."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORK, TINY
from PIL import Image

import ddim_cifar

SCRIPT = Path(ddim_cifar.__file__)
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # refuses at once


def heed_signals():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a test suite in the background hands down that they are ignored
        signal.signal(signum, signal.SIG_DFL)


def start(*flags, **options):
    environment = {**os.environ, **OFFLINE}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), *flags], env=environment, preexec_fn=heed_signals, **pipes, **options)


def test_quick_test_works_without_network_and_says_what_it_did(tmp_path):
    process = start(*NETWORK, "--sample-steps", "2", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    (warning,) = err.splitlines()
    assert warning.startswith("warning: CIFAR-10 is not in") and "synthetic" in warning and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "ddim_log.csv",
        "ddim_model_final.pth",
        "ddim_samples.png",
    ]
    for name in ("ddim_model_final.pth", "ddim_samples.png"):
        assert str(tmp_path / name) in out
    with Image.open(tmp_path / "ddim_samples.png") as grid:
        assert grid.width == grid.height and grid.mode == "RGB"


def test_training_leaves_every_promised_file(ddim, tmp_path):
    assert ddim("--epochs", "3", "--iterations", "2", "--save-every", "2").code == 0
    names = {"ddim_log.csv", "ddim_model_epoch_2.pth", "ddim_samples_epoch_2.png", "ddim_model_final.pth", "ddim_samples.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with open(tmp_path / "ddim_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds"]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [row["val_loss"] != "" for row in rows] == [False, False, False, True, False, True]
    assert all(0 < float(row["loss"]) < 2 and float(row["images_per_s"]) > 0 for row in rows)
    saved = torch.load(tmp_path / "ddim_model_final.pth", weights_only=True)
    assert {"format", "config", "step", "model", "ema", "optimizer"} == set(saved) and saved["step"] == 6
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])


def test_sampling_takes_the_network_from_the_checkpoint(ddim, tmp_path):
    ddim("--epochs", "1")
    result = ddim(
        *(
            "--sample",
            str(tmp_path / "ddim_model_final.pth"),
            "--num-samples",
            "5",
            "--sample-steps",
            "3",
            "--export",
            str(tmp_path / "x.npz"),
        ),
        flags=[],
    )
    assert result.code == 0, result.err
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (5, 32, 32, 3) and archive["arr_0"].dtype == np.uint8


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", "0"], ["--epochs", "0", "at least 1"]),
        (["--epochs", "two"], ["--epochs", "two", "whole number"]),
        (["--lr", "0"], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--eta", "1.5"], ["--eta", "1.5", "0..1"]),
        (["--dropout", "1"], ["--dropout", "0..0.99"]),
        (["--channels", "48"], ["--channels", "48", "32"]),
        (["--channel-mults", "1", "x"], ["--channel-mults", "x"]),
        (["--attn-resolutions", "5"], ["--attn-resolutions", "5", "32 16 8 4"]),
        (["--sample-steps", "1001"], ["--sample-steps", "1001", "1..1000"]),
        (["--beta-start", "0.5"], ["--beta-start", "0.5", "--beta-end"]),
        (["--order", "2", "--eta", "0.5"], ["--order", "--eta"]),
        (["--tau", "cubic"], ["--tau", "cubic", "quadratic"]),
        (["--epoch", "3"], ["--epoch"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--sample", "x.pth", "--epochs", "3"], ["--sample", "--epochs"]),
        (["--sample", "x.pth", "--resume", "x.pth"], ["--sample", "--resume"]),
        (["--resume", ""], ["--resume", "name of a file"]),
        (["--reconstruct", "--eta", "1"], ["--reconstruct", "--eta"]),
    ],
)
def test_a_wrong_flag_is_explained(ddim, flags, words):
    result = ddim(*flags, flags=[])
    assert result.code == 2 and result.err.startswith("usage: ")
    assert all(word in result.err.splitlines()[-1] for word in words), result.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume", "{}/none.pth"], ["none.pth", "no such file"]),
        (["--sample", "{}/none.pth"], ["none.pth", "no such file"]),
        (["--dataset", "folder", "--data-dir", "{}/none"], ["--data-dir", "none", "no such folder"]),
        (["--dataset", "folder", "--data-dir", "{}"], ["--data-dir", "holds no image files"]),
        (["--out-dir", "{}/file/out"], ["--out-dir", "file/out"]),
        (["--export", "{}/file/x.npz"], ["--export", "file"]),
    ],
)
def test_a_wrong_path_is_explained_in_one_line(ddim, tmp_path, flags, words):
    (tmp_path / "file").touch()
    result = ddim(*[flag.format(tmp_path) for flag in flags], flags=[] if "--sample" in flags else TINY)
    (line,) = result.err.splitlines()
    assert result.code == 2 and all(word in line for word in words), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_device_is_explained(ddim):
    result = ddim("--device", "cuda", flags=NETWORK)
    assert result.code == 2 and "--device cuda: not available" in result.err


def test_help_fits_two_screens_and_shows_defaults(ddim):
    result = ddim("--help", flags=[])
    assert result.code == 0 and len(result.out.splitlines()) < 110
    for text in ("--epochs", "[0.0002]", "[quadratic]", "--reconstruct", "[1 2 2 2]"):
        assert text in result.out


@pytest.mark.parametrize("taken, planned, kind", [(3, 3, "a longer run, of 3 steps"), (1, 3, "an interrupted run, of 1 steps")])
def test_an_earlier_run_is_not_overwritten(ddim, tmp_path, taken, planned, kind):
    path = tmp_path / "ddim_model_final.pth"
    ddim("--iterations", taken)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "iterations": planned}}, path)
    before = path.read_bytes()
    result = ddim("--iterations", max(2, taken - 1))
    assert result.code == 2 and kind in result.err and path.read_bytes() == before


def test_a_checkpoint_is_only_replaced_by_a_complete_one(ddim, tmp_path, monkeypatch):
    ddim()
    before = (tmp_path / "ddim_model_final.pth").read_bytes()

    def full_disk(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    result = ddim()
    assert result.code == 2 and "No space left on device" in result.err and len(result.err.splitlines()) == 1
    assert (tmp_path / "ddim_model_final.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_too_small_a_disk_is_noticed_before_training(ddim, tmp_path, monkeypatch):
    monkeypatch.setattr(ddim_cifar.shutil, "disk_usage", lambda path: type("", (), {"free": 1_000_000}))
    result = ddim()
    assert result.code == 2 and "MB needed" in result.err and not list(tmp_path.iterdir())


def test_out_of_memory_says_what_to_try(ddim, monkeypatch):
    def full(self, x, t):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ddim_cifar.UNet, "forward", full)
    result = ddim("--batch-size", "8")
    assert result.code == 2 and "out of memory; try --batch-size 4" in result.err


def test_sampling_goes_on_with_smaller_batches_when_memory_is_short(ddim, tmp_path, monkeypatch):
    ddim()
    checkpoint, forward = str(tmp_path / "ddim_model_final.pth"), ddim_cifar.UNet.forward
    export = ["--sample", checkpoint, "--num-samples", "7", "--sample-steps", "2", "--precision", "fp32", "--export"]
    ddim(*export, str(tmp_path / "a.npz"), flags=[])

    def small(self, x, t):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, t)

    monkeypatch.setattr(ddim_cifar.UNet, "forward", small)
    assert ddim(*export, str(tmp_path / "b.npz"), flags=[]).code == 0
    a, b = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert a.shape == b.shape == (7, 32, 32, 3) and np.abs(a - b).max() <= 1


def poison(monkeypatch, bad_steps):
    """Let the network answer NaN while training, at these steps."""
    forward, calls = ddim_cifar.UNet.forward, iter(range(10**6))

    def poisoned(self, x, t):
        out = forward(self, x, t)
        return out * math.nan if self.training and next(calls) in bad_steps else out

    monkeypatch.setattr(ddim_cifar.UNet, "forward", poisoned)


def test_bad_numbers_are_skipped_and_counted(ddim, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2})
    result = ddim("--iterations", "4", "--warmup", "0")
    assert result.code == 0 and "2 bad steps skipped" in result.out
    saved = ddim_cifar.load_checkpoint(tmp_path / "ddim_model_final.pth", "cpu")
    assert all(moments["step"] == 2 for moments in saved["optimizer"]["state"].values())


def test_ten_bad_steps_in_a_row_end_the_run(ddim, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 100))
    result = ddim("--epochs", "10", "--iterations", "4", "--save-every", "1")
    assert result.code == 1 and "10 steps in a row" in result.err and str(tmp_path / "ddim_model_epoch_3.pth") in result.err
    first, last = (ddim_cifar.load_checkpoint(tmp_path / f"ddim_model_epoch_{i}.pth", "cpu")["model"] for i in (1, 3))
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_command_that_goes_on(tmp_path, signum, code):
    process = start(*TINY, "--epochs", "100000", "--out-dir", str(tmp_path))
    log = tmp_path / "ddim_log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code, err
    assert "Traceback" not in err and err.splitlines()[-1].endswith(f"--resume {tmp_path / 'ddim_model_last.pth'}")
    saved = ddim_cifar.load_checkpoint(tmp_path / "ddim_model_last.pth", "cpu")
    assert saved["step"] == int(log.read_text().splitlines()[-1].split(",")[0])


@pytest.mark.parametrize("rank, left", [(None, [130]), ("0", [])])  # torchrun, which sets RANK, repeats the first by itself
def test_a_second_ctrl_c_quits_at_once(monkeypatch, rank, left):
    monkeypatch.setattr(os, "_exit", lambda code: exits.append(code))
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    exits, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    with ddim_cifar.Signals() as signals:
        signals.postpone(True)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert exits == left
