"""The command as users run it: the files it leaves, mistakes and misfortunes, signals."""

import contextlib
import errno
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_cifar

ONE = ["--num-samples", "1"]


# ---- What it leaves --------------------------------------------------------------------------------------------------


def test_the_quick_test_works_without_network_and_says_what_it_did(ddim, tmp_path):
    process = ddim.start(*ddim.network, "--sample-steps", "2", "--batch-size", "4", cwd=tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    (warning,) = err.splitlines()
    assert warning.startswith("warning: CIFAR-10 is not in") and "synthetic" in warning
    names = ["ddim_log.csv", "ddim_model_final.pth", "ddim_samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == names
    assert f"files     {tmp_path}, with the log ddim_log.csv" in out
    assert all(str(tmp_path / name) in out for name in names[1:])
    with Image.open(tmp_path / "ddim_samples.png") as grid:
        assert grid.width == grid.height and grid.mode == "RGB"


def test_training_leaves_every_promised_file(ddim, tmp_path, load, read_log):
    result = ddim("--epochs", "3", "--iterations", "2", "--save-every", "2")
    assert result.code == 0 and not result.err
    *_, suggestion = result.out.splitlines()
    assert suggestion.startswith("next: python") and f"--out-dir {tmp_path}" in suggestion
    assert {path.name for path in tmp_path.iterdir()} == {
        "ddim_log.csv",
        "ddim_model_epoch_2.pth",
        "ddim_samples_epoch_2.png",
        "ddim_model_final.pth",
        "ddim_samples.png",
    }
    rows = read_log(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds"]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [row["val_loss"] != "" for row in rows] == [False, False, False, True, False, True]
    assert all(0 < float(row["loss"]) < 2 and float(row["images_per_s"]) > 0 for row in rows)

    saved = load(tmp_path / "ddim_model_final.pth")
    assert set(saved) == {"format", "config", "step", "images", "model", "ema", "optimizer"} and saved["step"] == 6
    assert saved["model"].keys() == saved["ema"].keys() == saved["optimizer"].keys()
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])


def test_sampling_takes_the_network_from_the_checkpoint(ddim, tmp_path, checkpoint):
    flags = ["--num-samples", "5", "--sample-steps", "3", "--export", tmp_path / "x.npz"]
    result = ddim("--sample", checkpoint, *flags, flags=ddim.device)
    assert result.code == 0, result.err
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (5, 32, 32, 3) and archive["arr_0"].dtype == np.uint8
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "ddim_samples.png"}


def drawn(ddim, path, checkpoint, *flags):
    """The images drawn with these flags, as int [N, 32, 32, 3]."""
    few = ["--num-samples", "4", "--sample-steps", "3", "--export", path]
    assert ddim("--sample", checkpoint, *few, *flags, flags=ddim.device).code == 0
    return np.load(path)["arr_0"].astype(int)


def assert_close_but_not_equal(a, b, most):
    assert 0 < np.abs(np.subtract(a, b)).max() < most


def test_bf16_trains_and_samples_nearly_as_fp32_does_and_keeps_weights_in_float32(
    ddim, tmp_path, checkpoint, load, read_log
):
    losses = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        result = ddim("--iterations", "2", *ONE, "--precision", precision, out_dir=folder)
        assert result.code == 0 and f"cpu, {precision}" in result.out, result.err
        losses.append([float(row["loss"]) for row in read_log(folder)])
        saved = load(folder / "ddim_model_final.pth")
        moments = {f"{name} {key}": value for name, of in saved["optimizer"].items() for key, value in of.items()}
        for part in (saved["model"], saved["ema"], moments):
            assert all(value.dtype == torch.float32 for value in part.values())
    assert_close_but_not_equal(*losses, most=0.02)
    few = ("--num-samples", "2")
    images = [drawn(ddim, tmp_path / f"{name}.npz", checkpoint, *few, "--precision", name) for name in ("fp32", "bf16")]
    assert_close_but_not_equal(*images, most=30)


def test_a_long_run_is_compiled_where_that_is_possible(monkeypatch):
    network = torch.nn.Identity()
    for possible in (True, False):
        monkeypatch.setattr(ddim_cifar, "can_compile", lambda device, possible=possible: possible)
        for precision in ("bf16", "fp32"):
            runtime = ddim_cifar.Runtime(torch.device("cpu"), precision, "auto")
            assert runtime.compiled(network, 999) is network
            assert (runtime.compiled(network, 1000) is not network) == (possible and precision == "bf16")


def test_to_ask_for_compiling_where_it_does_not_work_is_an_error(ddim, monkeypatch):
    monkeypatch.setattr(ddim_cifar, "can_compile", lambda device: False)
    result = ddim("--compile", "on")
    assert result.code == 2 and "--compile off" in result.err.splitlines()[-1]


NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a compiler"
)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("compiler, possible", [("g++", True), ("/none", False)])
def test_whether_a_network_can_be_compiled_is_found_out_by_trying(compiler, possible):
    program = "import ddim_cifar, torch; print(ddim_cifar.can_compile(torch.device('cpu')))"
    options = {"cwd": ddim_cifar.Path(ddim_cifar.__file__).parent, "env": {**os.environ, "CXX": compiler}}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, **options)
    assert answer.stdout == f"{possible}\n"


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_network_trains_and_samples_as_the_network_itself_does(ddim, tmp_path, load, read_log):
    losses, images = [], []
    small = ["--channel-mults", "1", "--attn-resolutions", "--dropout", "0"]
    for choice in ("off", "on"):
        folder = tmp_path / choice
        more = [*small, "--compile", choice, "--num-samples", "5", "--sample-batch-size", "2"]
        result = ddim("--iterations", "3", *more, "--export", folder / "x.npz", out_dir=folder)
        assert result.code == 0, result.err
        losses.append([float(row["loss"]) for row in read_log(folder)])
        images.append(np.load(folder / "x.npz")["arr_0"].astype(int))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and np.abs(images[0] - images[1]).max() <= 2
    off, on = (load(tmp_path / choice / "ddim_model_final.pth") for choice in ("off", "on"))
    assert all(off[part].keys() == on[part].keys() for part in ("model", "ema", "optimizer"))
    result = ddim("--resume", "auto", "--compile", "off", "--epochs", "2", flags=ddim.device, out_dir=tmp_path / "on")
    assert result.code == 0


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_is_resumed_to_the_same_bits(ddim, tmp_path, load, precision):
    flags = ["--epochs", "4", "--save-every", "1", "--compile", "on", "--precision", precision]
    assert ddim(*flags, "--channel-mults", "1", "--attn-resolutions", out_dir=tmp_path / "a").code == 0
    middle = tmp_path / "a" / "ddim_model_epoch_2.pth"
    assert ddim("--resume", middle, flags=ddim.device, out_dir=tmp_path / "b").code == 0
    whole, resumed = (load(tmp_path / name / "ddim_model_final.pth") for name in "ab")
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())


# ---- Mistakes and misfortunes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--resume {}/none.pth", ["none.pth", "no such file"]),
        ("--sample {}/none.pth", ["none.pth", "no such file"]),
        ("--sample {}", ["no such file"]),
        ("--dataset folder --data-dir {}/none", ["--data-dir", "none", "no such folder"]),
        ("--dataset folder --data-dir {}", ["--data-dir", "holds no image files"]),
        ("--out-dir {}/file/out", ["--out-dir", "file/out"]),
        ("--export {}/file/x.npz", ["--export", "file"]),
        ("--export-weights {}/file/w", ["--export-weights", "file"]),
        ("--export /proc/x.npz", ["--export", "/proc"]),  # a folder that exists and takes no files
    ],
)
def test_a_wrong_path_is_explained_in_one_line(ddim, tmp_path, flags, words):
    (tmp_path / "file").touch()
    flags = [flag.format(tmp_path) for flag in flags.split()]
    result = ddim(*flags, flags=ddim.device if "--sample" in flags else ddim.tiny)
    (line,) = result.err.splitlines()
    assert result.code == 2 and all(word in line for word in words), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_device_is_explained(ddim):
    result = ddim("--device", "cuda", flags=ddim.network)
    assert result.code == 2 and "--device cuda: not available" in result.err


def planned(load, path, iterations):
    """Make a checkpoint one of a run that was to take so many steps."""
    saved = load(path)
    torch.save({**saved, "config": {**saved["config"], "iterations": iterations}}, path)


@pytest.mark.parametrize(
    "taken, whole, new, kind",
    [
        (3, 3, 2, "a finished run, of 3 steps"),
        (3, 3, 9, "a finished run, of 3 steps"),  # whose checkpoints would be further than the new ones
        (1, 3, 9, "an interrupted run, of 1 steps"),
    ],
)
def test_an_earlier_run_is_not_overwritten(ddim, tmp_path, load, taken, whole, new, kind):
    path = tmp_path / "ddim_model_final.pth"
    ddim("--iterations", taken, *ONE)
    planned(load, path, whole)
    before = path.read_bytes()
    result = ddim("--iterations", new)
    assert result.code == 2 and kind in result.err and path.read_bytes() == before


@pytest.mark.parametrize("reverse", [False, True], ids=["listed_upwards", "listed_downwards"])
def test_of_several_checkpoints_the_longest_is_protected(ddim, tmp_path, checkpoint, load, monkeypatch, reverse):
    saved = load(checkpoint)
    for step in (1, 2, 3):
        content = {"config": {**saved["config"], "iterations": 3}, "step": step}
        torch.save({**saved, **content}, tmp_path / f"ddim_model_epoch_{step}.pth")
    paths = sorted(tmp_path.glob("*.pth"), reverse=reverse)  # a folder may list them in any order
    monkeypatch.setattr(type(tmp_path), "glob", lambda folder, pattern: iter(paths if pattern.endswith("pth") else ()))
    result = ddim("--iterations", "2")
    assert result.code == 2 and "a finished run, of 3 steps" in result.err


def test_a_folder_that_cannot_be_forced_to_the_disk_is_no_error_but_a_failing_disk_is(tmp_path, monkeypatch):
    for number, fails in ((errno.EINVAL, False), (errno.EIO, True)):

        def fsync(handle, number=number):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(ddim_cifar.UserError, match="cannot write") if fails else contextlib.nullcontext():
            ddim_cifar.write_atomically(tmp_path / "x", "text")


@pytest.mark.parametrize("fails", ["while_writing", "while_renaming"])
def test_a_checkpoint_is_only_replaced_by_a_complete_one(ddim, tmp_path, monkeypatch, fails):
    path, replace = tmp_path / "ddim_model_final.pth", os.replace
    ddim(*ONE)
    before = path.read_bytes()

    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def full_at_the_end(source, target):
        if str(target) == str(path):
            raise OSError(28, "No space left on device")
        replace(source, target)

    if fails == "while_writing":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(os, "replace", full_at_the_end)
    result = ddim("--seed", "1", *ONE)
    (line,) = result.err.splitlines()
    assert result.code == 2 and "No space left on device" in line and str(path) in line
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def leave_free(monkeypatch, megabytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_000_000 * megabytes))


def test_too_small_a_disk_is_noticed_before_training(ddim, tmp_path, monkeypatch):
    leave_free(monkeypatch, 1)
    result = ddim()
    assert result.code == 2 and "1 MB free" in result.err and "MB needed" in result.err and not list(tmp_path.iterdir())


def test_too_small_a_disk_for_all_checkpoints_is_said_before_training(ddim, tmp_path, monkeypatch):
    leave_free(monkeypatch, 500)
    monkeypatch.setattr(ddim_cifar, "train", lambda *_: None)  # which would take days
    few, many = (ddim("--epochs", epochs, "--save-every", "1", *ONE) for epochs in (2, 1000))
    assert few.code == 0 and not few.err
    assert many.code == 0 and many.err.startswith("warning: ") and "--save-every" in many.err


def exhaust_memory(monkeypatch, above=0):
    """Let the network run out of memory with more images than that."""
    forward = ddim_cifar.UNet.forward

    def limited(self, x, t):
        if len(x) > above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, t)

    monkeypatch.setattr(ddim_cifar.UNet, "forward", limited)


def test_out_of_memory_in_training_says_what_to_try(ddim, monkeypatch):
    exhaust_memory(monkeypatch)
    result = ddim("--batch-size", "8")
    assert result.code == 2 and "out of memory; try --micro-batch 4, which trains the same" in result.err
    assert "--micro-batch 4" in ddim("--batch-size", "8", "--micro-batch", "64").err


def test_memory_that_does_not_suffice_for_one_image_is_explained(ddim, checkpoint, monkeypatch):
    exhaust_memory(monkeypatch)
    result = ddim("--sample", checkpoint, "--num-samples", "4", "--sample-steps", "2", flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and "out of memory; try a smaller --sample-batch-size" in line


def test_sampling_goes_on_with_smaller_batches_when_memory_is_short(ddim, tmp_path, checkpoint, monkeypatch):
    flags = ["--num-samples", "7", "--precision", "fp32"]
    whole = drawn(ddim, tmp_path / "whole.npz", checkpoint, *flags)
    exhaust_memory(monkeypatch, above=2)
    halved = drawn(ddim, tmp_path / "halved.npz", checkpoint, *flags)
    assert whole.shape == halved.shape == (7, 32, 32, 3) and np.abs(whole - halved).max() <= 1


def poison(monkeypatch, bad_steps):
    """Let the network answer NaN while training, at these steps."""
    forward, calls = ddim_cifar.UNet.forward, iter(range(10**6))

    def poisoned(self, x, t):
        out = forward(self, x, t)
        return out * math.nan if self.training and next(calls) in bad_steps else out

    monkeypatch.setattr(ddim_cifar.UNet, "forward", poisoned)


def test_bad_steps_are_skipped_and_counted(ddim, tmp_path, monkeypatch, read_log):
    poison(monkeypatch, {1, 2})
    result = ddim("--iterations", "4", "--warmup", "0", *ONE)
    assert result.code == 0 and "2 bad steps skipped" in result.out
    assert [math.isfinite(float(row["loss"])) for row in read_log(tmp_path)] == [True, False, False, True]
    saved = ddim_cifar.load_checkpoint(tmp_path / "ddim_model_final.pth", "cpu")  # which refuses what is not finite
    assert {int(moments["step"]) for moments in saved["optimizer"].values() if "step" in moments} == {2}


def test_ten_bad_steps_in_a_row_end_the_run_with_all_as_before_them(ddim, tmp_path, monkeypatch, load):
    poison(monkeypatch, range(4, 100))
    result = ddim("--epochs", "10", "--iterations", "4", "--save-every", "1", *ONE)
    last = tmp_path / "ddim_model_epoch_3.pth"
    assert result.code == 1 and "10 steps in a row" in result.err and str(last) in result.err
    before, after = load(tmp_path / "ddim_model_epoch_1.pth"), load(last)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    for name, moments in before["optimizer"].items():
        assert all(torch.equal(value, after["optimizer"][name][key]) for key, value in moments.items())


# ---- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_training_with_a_checkpoint_and_the_command_that_goes_on(
    ddim, tmp_path, load, read_log, wait_until, signum, code
):
    process = ddim.start(*ddim.tiny, "--epochs", "100000", "--out-dir", tmp_path)
    log = tmp_path / "ddim_log.csv"
    wait_until(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err and err.splitlines()[-1].endswith(f"--resume {tmp_path / 'ddim_model_last.pth'}")
    assert load(tmp_path / "ddim_model_last.pth")["step"] == int(read_log(tmp_path)[-1]["step"])


def test_a_signal_ends_sampling_in_one_line(ddim, tmp_path, checkpoint, wait_until):
    many = ["--num-samples", "100000", "--sample-steps", "2", "--sample-batch-size", "4"]
    flags = [*ddim.device, *many, "--export", tmp_path / "images", "--out-dir", tmp_path]
    process = ddim.start("--sample", checkpoint, *flags)
    wait_until(lambda: (tmp_path / "images" / "00003.png").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err == "stopped by SIGTERM\n", err


@pytest.fixture
def ctrl_c(monkeypatch):
    """Presses Ctrl-C; where the program quits at once, its code is in the list ctrl_c.exits."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        os.kill(os.getpid(), signal.SIGINT)

    press.exits = exits
    yield press
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_a_postponed_block_and_a_second_one_does_not(ctrl_c, monkeypatch):
    monkeypatch.setattr(ddim_cifar.world, "size", 1)
    reached = []
    with ddim_cifar.Signals() as signals, pytest.raises(ddim_cifar.Stopped), signals.postponed():
        ctrl_c()
        reached.append("after the first")
        assert ctrl_c.exits == []
        ctrl_c()
        assert ctrl_c.exits == [130]
    assert reached and signals.received == signal.SIGINT


def test_ctrl_c_is_heeded_at_once_where_nothing_or_a_preview_is_under_way(ctrl_c):
    for inside in (False, True):
        with (
            ddim_cifar.Signals() as signals,
            pytest.raises(ddim_cifar.Stopped),
            signals.postponed(inside),
            signals.heeded(),
        ):
            ctrl_c()
            pytest.fail("it went on")


def test_what_torchrun_repeats_by_itself_is_no_second_ctrl_c(ctrl_c, monkeypatch):
    monkeypatch.setattr(ddim_cifar.world, "size", 2)
    with ddim_cifar.Signals() as signals, pytest.raises(ddim_cifar.Stopped), signals.postponed():
        ctrl_c()
        ctrl_c()
        assert ctrl_c.exits == []
        signals.since -= 2  # seconds later it is the user's
        ctrl_c()
        assert ctrl_c.exits == [130]


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ddim_cifar.Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_as_before_when_the_command_is_through(ddim):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    ddim("--epochs", "0")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    "typed", ["--epochs 3", "--resume old.pth --epochs 3", "--resume=old.pth --epochs 3", "--epochs 3 --resume auto"]
)
def test_the_command_that_goes_on_is_one_a_shell_understands(monkeypatch, typed):
    monkeypatch.setattr(sys, "argv", ["ddim_cifar.py"])
    command = ddim_cifar.resume_command(typed.split(), "my folder/x.pth")
    assert command == "python ddim_cifar.py --epochs 3 --resume 'my folder/x.pth'"


def test_several_processes_go_on_as_several(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddim_cifar.py", "--epochs", "3"])
    monkeypatch.setattr(ddim_cifar.world, "size", 3)
    monkeypatch.setattr(ddim_cifar.world, "local_size", 3)
    command = ddim_cifar.resume_command(None, "x.pth")
    assert command == "torchrun --standalone --nproc_per_node=3 ddim_cifar.py --epochs 3 --resume x.pth"
    monkeypatch.setattr(ddim_cifar.world, "size", 6)  # two machines, started in their user's own way
    assert ddim_cifar.resume_command(None, "x.pth") == "torchrun ... ddim_cifar.py --epochs 3 --resume x.pth"


def test_a_windows_shell_has_quotes_of_its_own(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        line = ddim_cifar.shell_line(["python", r"C:\ddim_cifar.py", r"C:\my files\x.pth"])
    assert line == r'python C:\ddim_cifar.py "C:\my files\x.pth"'


def test_an_error_of_rank_0_is_that_of_all(monkeypatch):
    full = ddim_cifar.UserError("no space")
    monkeypatch.setattr(ddim_cifar.world, "rank", 1)
    monkeypatch.setattr(ddim_cifar, "gather", lambda item: [full, item])
    with pytest.raises(ddim_cifar.UserError, match="no space"):
        ddim_cifar.on_rank_0(pytest.fail)


def test_processes_that_found_other_checkpoints_do_not_train_together(ddim, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(ddim_cifar, "gather", lambda item: [item, None])
    result = ddim("--resume", checkpoint, "--epochs", "2", flags=ddim.device)
    assert result.code == 2 and "checkpoints of other steps (20 None)" in result.err
    assert not (tmp_path / "ddim_model_final.pth").exists()


def test_minutes_between_saves_are_minutes(ddim, monkeypatch):
    """By a clock that goes on by a second each time it is read: some 30 seconds for the eight steps."""
    clock = iter(range(10**6))
    monkeypatch.setattr(ddim_cifar.time, "perf_counter", lambda: float(next(clock)))
    saved = ddim("--iterations", "8", *ONE, "--save-minutes", "0.2").out.count("saved ")
    assert 2 <= saved <= 4  # one at the end, the others 12 seconds and more apart


# ---- One owner per folder --------------------------------------------------------------------------------------------


def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on(ddim, tmp_path, wait_until, read_log):
    first = ddim.start(*ddim.tiny, "--epochs", "100000", "--save-minutes", "0", "--out-dir", tmp_path)
    wait_until((tmp_path / "ddim_model_last.pth").exists, first)
    for flags in (["--epochs", "3"], ["--epochs", "100000", "--resume", "auto"]):
        result = ddim(*flags)
        (line,) = result.err.splitlines()
        assert result.code == 2 and f"is being written by process {first.pid} on " in line
    steps = len(read_log(tmp_path))
    wait_until(lambda: len(read_log(tmp_path)) > steps, first)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 143 and not list(tmp_path.glob(".ddim_owner"))


def test_of_two_exports_into_a_folder_one_is_refused_and_every_image_has_its_own_number(ddim, checkpoint, tmp_path):
    flags = ["--sample", checkpoint, "--sample-steps", "3", "--precision", "fp32", "--num-samples", "12", "--export"]
    ddim(*flags, tmp_path / "alone.npz", flags=[])
    slow = ["--sample-batch-size", "1", tmp_path / "x"]
    both = [ddim.start(*flags[:-1], *slow[:2], "--export", slow[2], "--out-dir", tmp_path / name) for name in "ab"]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 2], [0, 0])  # or one was through before the other began
    assert all("being written" in error for error, process in zip(errors, both) if process.returncode == 2)
    drawn = [np.asarray(Image.open(tmp_path / "x" / f"{i:05d}.png")).astype(int) for i in range(12)]
    assert np.abs(np.stack(drawn) - np.load(tmp_path / "alone.npz")["arr_0"]).max() <= 1


def test_a_folder_that_this_process_writes_already_is_refused(ddim, checkpoint, tmp_path):
    flags = ["--sample", checkpoint, "--sample-steps", "2", *ONE, "--export", tmp_path / "folder"]
    for folder, flag in ((tmp_path, "--out-dir"), (tmp_path / "folder", "--export")):
        with ddim_cifar.Owner(folder, "of the test"):
            result = ddim(*flags, flags=ddim.device)
        (line,) = result.err.splitlines()
        assert result.code == 2 and f"{flag} {folder} is being written by this process" in line
    assert ddim(*flags, flags=ddim.device).code == 0


def test_what_a_killed_owner_left_is_cleaned_up(ddim, tmp_path, wait_until):
    killed = ddim.start(*ddim.tiny, "--epochs", "100000", "--out-dir", tmp_path)
    wait_until((tmp_path / "ddim_log.csv").exists, killed)
    killed.kill()
    killed.communicate(timeout=120)
    assert (tmp_path / ".ddim_owner").exists()
    (tmp_path / "ddim_model_last.pth.elsewhere-123.tmp").touch()
    (tmp_path / "report-2023.tmp").touch()  # the user's own
    assert ddim().code == 0
    assert list(tmp_path.glob("*.tmp")) == [tmp_path / "report-2023.tmp"] and not list(tmp_path.glob(".*"))


# ---- The environment of several processes ----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of torchrun and of a job scheduler; those not named are absent."""

    def change(**variables):
        for name in (*ddim_cifar.TORCHRUN, "SLURM_NTASKS", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    "variables, word",
    [
        ({"RANK": "3"}, "RANK=3"),
        ({"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": ""}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ""),
        ({"SLURM_NTASKS": "many"}, ""),
    ],
)
def test_leftover_variables_mean_one_process_and_one_warning_at_most(ddim, environment, variables, word):
    environment(**variables)
    result = ddim("--num-samples", "1")
    assert result.code == 0 and len(result.err.splitlines()) == bool(word) and word in result.err


@pytest.mark.parametrize(
    "variables, word",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        (
            dict(zip(ddim_cifar.TORCHRUN, ["2", "2", "0", "2", "127.0.0.1", "29500"])),
            "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2",
        ),
    ],
)
def test_variables_that_make_no_sense_are_explained_in_one_line(ddim, environment, variables, word):
    environment(**variables)
    result = ddim()
    (line,) = result.err.splitlines()
    assert result.code == 2 and word in line and "torchrun" in line


def test_waiting_for_other_processes_is_announced_and_ends_with_a_signal(ddim, tmp_path):
    variables = dict(zip(ddim_cifar.TORCHRUN, ["0", "2", "0", "2", "127.0.0.1", "29513"]))
    process = ddim.start(*ddim.tiny, "--out-dir", tmp_path, env=variables)
    assert "waiting for 2 processes at 127.0.0.1:29513" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143


# ---- Output that goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["fails_at_flush", "fails_at_write"])
def test_a_run_whose_output_goes_away_goes_on_to_its_end(ddim, tmp_path, unbuffered):
    environment = {"PYTHONUNBUFFERED": unbuffered}
    process = ddim.start(*ddim.tiny, "--epochs", "2", *ONE, "--out-dir", tmp_path, env=environment)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.wait(120) == 0 and process.stderr.read() == ""
    assert (tmp_path / "ddim_samples.png").exists()


def test_a_run_stopped_after_its_output_went_away_saves_and_has_its_code(ddim, tmp_path, wait_until):
    process = ddim.start(*ddim.tiny, "--epochs", "100000", "--out-dir", tmp_path)
    wait_until(lambda: (tmp_path / "ddim_log.csv").exists(), process)
    process.stdout.close()  # as of `| tee log`, which the same Ctrl-C ends
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130 and (tmp_path / "ddim_model_last.pth").exists()


def test_closed_streams_do_not_matter(ddim, tmp_path):
    def close():
        os.close(1)
        os.close(2)

    command = [sys.executable, str(ddim.script), *ddim.tiny, "--out-dir", str(tmp_path)]
    assert subprocess.run(command, preexec_fn=close, timeout=120).returncode == 0
    assert (tmp_path / "ddim_samples.png").exists()


def test_a_character_that_the_terminal_lacks_does_not_end_the_run(ddim, tmp_path):
    process = ddim.start(*ddim.tiny, "--out-dir", tmp_path / "图片", env={"PYTHONIOENCODING": "cp1252"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "??" in out and err == ""


def test_a_full_disk_is_named_with_the_log_and_a_checkpoint_is_tried(ddim, tmp_path, monkeypatch):
    append, rows = ddim_cifar.Log.append, []

    class Full:
        def write(self, data):
            return 0

        def close(self):
            pass

    def fill_up(self, text):
        rows.append(text)
        if len(rows) == 3:
            self.file = Full()
        append(self, text)

    monkeypatch.setattr(ddim_cifar.Log, "append", fill_up)
    result = ddim("--epochs", "9")
    (line,) = result.err.splitlines()
    assert result.code == 2 and "ddim_log.csv" in line and "No space left" in line
    assert (tmp_path / "ddim_model_last.pth").exists()


def test_a_preview_that_is_not_finite_is_warned_of_and_training_goes_on(ddim, tmp_path, monkeypatch):
    sample, broken = ddim_cifar.Sampler.sample, [True]

    def first_is_broken(self, indices, *rest, **options):
        if broken:
            broken.clear()
            raise ddim_cifar.NotFinite(indices, len(indices))
        return sample(self, indices, *rest, **options)

    monkeypatch.setattr(ddim_cifar.Sampler, "sample", first_is_broken)
    result = ddim("--epochs", "2", "--save-every", "1", *ONE)
    (line,) = result.err.splitlines()
    assert result.code == 0 and line.startswith("warning: 16 of 16 images are not finite")
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["ddim_samples.png", "ddim_samples_epoch_2.png"]


# ---- Called from another program -------------------------------------------------------------------------------------


def test_main_runs_in_a_thread_and_twice_and_leaves_torch_as_it_was(ddim):
    def state():
        return torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.get_rng_state().tolist()

    before, streams, codes = state(), (sys.stdout, sys.stderr), []
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        thread = threading.Thread(target=lambda: codes.append(ddim("--num-samples", "1").code))
        thread.start()
        thread.join(120)
    assert codes == [0, 0] and state() == before
    assert (sys.stdout, sys.stderr) == streams and signal.getsignal(signal.SIGINT) is handler


def test_matrix_products_are_in_float32_whatever_the_caller_had_set(ddim, monkeypatch):
    """Muon's iteration needs it."""
    train, seen = ddim_cifar.train, []

    def look_and_train(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        train(*arguments)

    monkeypatch.setattr(ddim_cifar, "train", look_and_train)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert ddim(*ONE).code == 0
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpu_may_be_named_by_its_number(ddim):
    assert "--device gpu" in ddim("--device", "gpu").err
    result = ddim("--device", "cuda:99")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "--device cuda:99" in result.err
