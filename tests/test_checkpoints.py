"""Resuming equals never having stopped; what is damaged is refused; nothing in a file is ever run."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import TINY
from test_command import SCRIPT

import ddim_cifar

DROPOUT = ["--dropout", "0.3", "--warmup", "5", "--lr", "1e-3"]
ZEROS = ["--dropout", "0", "--warmup", "0", "--ema-decay", "0", "--attn-resolutions"]


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(a, b):
    """Equal to the bit, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_training(a, b):
    for part in ("step", "model", "ema", "optimizer"):
        assert_equal(load(a)[part], load(b)[part])


def columns(path, *names):
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return [[row[header.index(name)] for name in names] for row in rows]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert ddim_cifar.main([*TINY, "--iterations", "2", "--out-dir", str(folder)]) == 0
    return folder / "ddim_model_final.pth"


@pytest.mark.parametrize("recipe", [DROPOUT, ZEROS])
def test_resuming_equals_never_having_stopped(ddim, tmp_path, recipe):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ddim(*recipe, "--epochs", "3", "--iterations", "3", out_dir=whole)
    ddim(*recipe, "--epochs", "1", "--iterations", "3", out_dir=parts)
    result = ddim("--resume", parts / "ddim_model_final.pth", "--epochs", "3", flags=[], out_dir=parts)
    assert result.code == 0 and "3 done, 6 to go" in result.out
    assert_same_training(whole / "ddim_model_final.pth", parts / "ddim_model_final.pth")
    logged = ("step", "epoch", "loss", "lr", "grad_norm")
    assert columns(whole / "ddim_log.csv", *logged) == columns(parts / "ddim_log.csv", *logged)
    assert (whole / "ddim_samples.png").read_bytes() == (parts / "ddim_samples.png").read_bytes()


def test_rows_logged_behind_the_checkpoint_are_written_once(ddim, tmp_path):
    ddim("--epochs", "1", "--iterations", "2")
    log = tmp_path / "ddim_log.csv"
    log.write_text(log.read_text() + "3,2,9.0,,9,9,9,9\n4,2,9.")
    ddim("--resume", "auto", "--epochs", "2", flags=[])
    assert [step for (step,) in columns(log, "step")] == ["1", "2", "3", "4"] and "9.0" not in log.read_text()


def test_auto_takes_the_newest_complete_checkpoint(ddim, tmp_path):
    assert "starting afresh" in ddim("--resume", "auto", "--epochs", "2", "--save-every", "1").out
    final = tmp_path / "ddim_model_final.pth"
    final.write_bytes(final.read_bytes()[:-1000])
    (tmp_path / "ddim_model_last.pth.tmp").write_bytes(b"of a run that was killed")
    result = ddim("--resume", "auto", "--epochs", "4")
    assert result.code == 0 and "2 done, 2 to go" in result.out and "passed over" in result.err
    assert not list(tmp_path.glob("*.tmp"))


def test_a_finished_run_only_draws_again(ddim, tmp_path):
    ddim()
    before = (tmp_path / "ddim_model_final.pth").stat().st_mtime_ns
    assert ddim("--resume", "auto").code == 0
    assert (tmp_path / "ddim_model_final.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "flag, old, new",
    [("--channels", 32, 64), ("--channel-mults", "1 2", "1 4"), ("--timesteps", 1000, 500), ("--batch-size", 4, 8),
     ("--dataset", "synthetic", "cifar10"), ("--dropout", 0.1, 0.2), ("--seed", 0, 1)],
)  # fmt: skip
def test_a_flag_that_contradicts_the_checkpoint_names_both_values(ddim, checkpoint, flag, old, new):
    result = ddim("--resume", checkpoint, flag, *str(new).split(), flags=[])
    last = result.err.splitlines()[-1]
    assert result.code == 2 and f"{flag} {new} contradicts {old}" in last and str(checkpoint) in last


def mutants(data):
    draw = random.Random(0)
    for _ in range(25):
        yield data[: draw.randrange(len(data))]
    for _ in range(25):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


def test_a_damaged_file_is_refused_or_read_right(checkpoint, tmp_path):
    whole, damaged, refused = load(checkpoint), tmp_path / "damaged.pth", 0
    for data in mutants(checkpoint.read_bytes()):
        damaged.write_bytes(data)
        try:
            assert_equal(ddim_cifar.load_checkpoint(damaged, "cpu"), whole)  # bytes between the parts of a zip mean nothing
        except ddim_cifar.UserError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 45


class Malice:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def test_code_in_a_file_is_not_run(ddim, tmp_path, checkpoint):
    trace = tmp_path / "trace"
    torch.save({**load(checkpoint), "extra": Malice(trace)}, tmp_path / "zip.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malice(trace)))
    for name in ("zip.pth", "pickle.pth"):
        for mode in ("--sample", "--resume"):
            result = ddim(mode, tmp_path / name, flags=[])
            assert result.code == 2 and len(result.err.splitlines()) == 1 and "nothing of it was run" in result.err
    assert not trace.exists()


def without(part):
    return lambda whole: {name: value for name, value in whole.items() if name != part}


def changed(**parts):
    return lambda whole: {**whole, **parts}


def within(part, **entries):
    return lambda whole: {**whole, part: {**whole[part], **entries}}


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda whole: [1, 2], "not of this program"),
        (lambda whole: {"conv_in.weight": torch.zeros(32, 3, 3, 3)}, "not of this program"),
        *[(without(part), part) for part in ("config", "step", "model", "ema", "optimizer")],
        (changed(format=99), "newer version"),
        (changed(step=-1), "-1"),
        (changed(step="many"), "many"),
        (changed(config={}), "not of this program"),
        (within("config", channels=64), "does not fit"),
        (within("config", lr="fast"), "--lr"),
        (within("config", tau="cubic"), "--tau"),
        (within("config", sample_steps=[0]), "--sample-steps"),
        (within("ema", **{"conv_in.bias": torch.full((32,), torch.nan)}), "not finite"),
        (within("model", **{"conv_in.bias": torch.zeros(31)}), "does not fit"),
        (within("model", more=torch.zeros(1)), "does not fit"),
        (changed(optimizer={"state": {0: {"step": 1}}, "param_groups": []}), "not of this program"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_lacks_is_said_in_one_line(ddim, tmp_path, checkpoint, change, word):
    torch.save(change(load(checkpoint)), tmp_path / "x.pth")
    result = ddim("--resume", tmp_path / "x.pth", flags=[])
    (line,) = result.err.splitlines()[-1:]
    assert result.code == 2 and "x.pth" in line and word in line and "Traceback" not in result.err


def test_a_checkpoint_is_a_plain_zip_with_right_checksums(checkpoint):
    assert zipfile.ZipFile(checkpoint).testzip() is None


def torture(folder, signum, stops, flags, seed=0):
    """Stop a run at random moments, with the same command line each time, until it is through. Returns how often it was stopped."""
    draw, stopped = random.Random(seed), 0
    command = [sys.executable, str(SCRIPT), *flags, "--resume", "auto", "--out-dir", str(folder)]
    log = folder / "ddim_log.csv"
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if stopped < stops:
            begun = time.time()
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > begun):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signum)
        _, err = process.communicate()
        if process.returncode == 0:
            return stopped
        assert process.returncode in (-signum, 128 + signum), err
        if process.returncode > 0 and log.read_text().count("\n") > 1:  # it could say goodbye: what is logged is saved
            assert str(load(folder / "ddim_model_last.pth")["step"]) == log.read_text().splitlines()[-1].split(",")[0]
        stopped += 1


@pytest.mark.parametrize(
    ("signum", "stops"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 20, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_at_random_moments_ends_as_if_left_alone(tmp_path, signum, stops):
    flags = [*TINY, *DROPOUT, "--epochs", str(stops + 1), "--iterations", "15", "--save-every", "2", "--save-minutes", "0"]
    assert ddim_cifar.main([*flags, "--out-dir", str(tmp_path / "alone")]) == 0
    (tmp_path / "stopped").mkdir()
    assert torture(tmp_path / "stopped", signum, stops, flags) == stops
    assert_same_training(*(tmp_path / name / "ddim_model_final.pth" for name in ("alone", "stopped")))
    logged = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm")
    assert columns(tmp_path / "alone" / "ddim_log.csv", *logged) == columns(tmp_path / "stopped" / "ddim_log.csv", *logged)
    assert not list((tmp_path / "stopped").glob("*.tmp"))
