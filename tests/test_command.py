"""The command as users run it: the files it leaves, mistakes and misfortunes, the log, signals, several processes."""

import errno
import fcntl
import os
import shlex
import shutil
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_cifar
from ddim_cifar import parse_args

FAST = ["--num-samples", "1", "--sample-steps", "1", "--batch-size", "1", "--channel-mults", "1", "1"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


def test_the_quick_test_works_without_network_in_any_folder_on_any_terminal(ddim, tmp_path):
    """Run in a folder whose name the terminal cannot show."""
    folder = tmp_path / "图片"
    folder.mkdir()
    process = ddim.start(*ddim.network, "--batch-size", "4", cwd=folder, env={"PYTHONIOENCODING": "cp1252"})
    code, out, err = ddim.finish(process)
    (warning,) = err.splitlines()
    assert code == 0 and warning.startswith("warning: CIFAR-10 is ") and "synthetic" in warning
    assert "synthetic: 10,000" in out and "??" in out and str(tmp_path) in out
    names = ["ddim_log.csv", "ddim_model_final.pth", "ddim_samples.png"]
    assert sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] != ".") == names
    with Image.open(folder / "ddim_samples.png") as grid:
        assert grid.width == grid.height and grid.mode == "RGB"


def test_training_leaves_every_promised_file_and_a_command_to_try(ddim, tmp_path, load, read_log):
    result = ddim("--epochs", "3", "--iterations", "2", "--save-every", "2", *FAST)
    assert result.code == 0 and not result.err
    names = ["ddim_log.csv", "ddim_model_epoch_2.pth", "ddim_model_final.pth"]
    names += ["ddim_samples.png", "ddim_samples_epoch_2.png"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == names
    assert all(str(path) in result.out for path in tmp_path.glob("ddim_[ms]*"))
    rows = read_log(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds"]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [row["val_loss"] != "" for row in rows] == [False, False, False, True, False, True]
    assert all(0 < float(row["loss"]) < 2 and float(row["images_per_s"]) > 0 for row in rows)
    (line,) = [line for line in result.out.splitlines() if line.startswith("step 4 ")]
    mean = statistics.fmean(float(row["loss"]) for row in rows[:4])
    assert f"held-out loss {float(rows[3]['val_loss']):.4f}, loss {mean:.4f}" in line

    saved = load(tmp_path / "ddim_model_final.pth")
    assert {"format", "config", "step", "model", "ema", "optimizer"} <= set(saved)
    assert saved["format"] == 3 and saved["step"] == 6 and saved["model"].keys() == saved["ema"].keys()
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])

    (command,) = [line for line in result.out.splitlines() if line.startswith("next: python")]
    config, checkpoint = parse_args(shlex.split(command)[3:])
    assert config.sample and checkpoint["step"] == 6 and config.folder == tmp_path


def test_sampling_follows_the_run_not_the_folder_in_which_it_is_typed(ddim, tmp_path, checkpoint, monkeypatch):
    """Take network and place from the checkpoint: the pictures of a run never land among those of another."""
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run.mkdir()
    shutil.copy(checkpoint, run)
    flags = ["--sample", "../run/ddim_model_final.pth", *ddim.device, "--num-samples", "3", "--sample-steps", "1"]
    assert ddim_cifar.main([*flags, "--export", "x.npz", "--export-weights", "w.pth"]) == 0
    assert sorted(path.name for path in other.iterdir()) == ["w.pth", "x.npz"] and (run / "ddim_samples.png").exists()
    assert np.load("x.npz")["arr_0"].shape == (3, 32, 32, 3) and np.load("x.npz")["arr_0"].dtype == np.uint8

    assert parse_args(["--resume", "../run"])[0].folder == run
    assert parse_args(["--sample", "../run", "--out-dir", "."])[0].folder == other
    shutil.move("w.pth", run)
    assert parse_args(["--sample", "../run/w.pth"])[0].folder == other  # weights are of no run


def test_bf16_trains_and_samples_nearly_as_fp32_does_and_keeps_weights_in_float32(ddim, tmp_path, load, read_log):
    losses, images = [], []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        flags = ["--iterations", "2", "--batch-size", "2", "--num-samples", "2", "--export", folder / "x.npz"]
        result = ddim(*flags, "--precision", precision, out_dir=folder)
        assert result.code == 0 and f"cpu, {precision}" in result.out, result.err
        losses.append([float(row["loss"]) for row in read_log(folder)])
        images.append(np.load(folder / "x.npz")["arr_0"].astype(int))
        saved = load(folder / "ddim_model_final.pth")
        states = [state for optimizer in saved["optimizer"] for state in optimizer["state"].values()]
        for part in (saved["model"], saved["ema"], *states):
            assert all(value.dtype == torch.float32 for value in part.values())
    assert 0 < np.abs(np.subtract(*losses)).max() < 0.02
    assert 0 < np.abs(np.subtract(*images)).max() < 30


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a compiler")
def test_a_compiled_network_trains_as_the_network_itself_and_resumes_to_the_bit(ddim, tmp_path, load, read_log):
    small = ["--channel-mults", "1", "--attn-resolutions", "--iterations", "3", "--save-every", "1", "--epochs", "2"]
    for choice in ("off", "on"):
        result = ddim(*small, "--compile", choice, "--micro-batch", "2", out_dir=tmp_path / choice)
        assert result.code == 0, result.err
    middle = tmp_path / "on" / "ddim_model_epoch_1.pth"
    assert ddim("--resume", middle, flags=ddim.device, out_dir=tmp_path / "again").code == 0
    losses = [[float(row["loss"]) for row in read_log(tmp_path / choice)] for choice in ("off", "on")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    off, on, again = (load(tmp_path / name / "ddim_model_final.pth")["model"] for name in ("off", "on", "again"))
    assert off.keys() == on.keys() and all(torch.equal(value, again[name]) for name, value in on.items())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--resume {}/none.pth", ["none.pth", "No such file"]),
        ("--sample {}", ["{}"]),
        ("--out-dir {}/file/out", ["file/out"]),
        ("--out-dir /proc/sys", ["/proc/sys"]),  # a folder that exists and takes no files
        ("--export {}/file/folder", ["file"]),
        ("--export-weights {}/file/w", ["file"]),
        ("--device cuda:99", ["--device cuda:99", "not available"]),
    ],
)
def test_a_wrong_path_or_device_is_explained_in_one_line(ddim, tmp_path, at_step, flags, words):
    """Explain it before training, unless it concerns what comes after it."""
    if "--export" not in flags:
        at_step(0, lambda: pytest.fail("it trained"))
    (tmp_path / "file").touch()
    flags = [flag.format(tmp_path) for flag in flags.split()]
    result = ddim(*flags, flags=ddim.device if "--sample" in flags else [*ddim.tiny, *FAST])
    (line,) = result.err.splitlines()
    assert result.code == 2 and all(word.format(tmp_path) in line for word in words), line


def test_minutes_are_minutes_between_saves_and_between_lines_where_there_is_no_terminal(ddim, clock):
    """Take ten seconds for each step: a save after every third, and a line after every sixth."""
    clock(10)
    result = ddim("--iterations", "25", "--save-minutes", "0.5", *FAST)
    assert result.code == 0 and result.out.count("ddim_model_last.pth\n") == 8
    lines = [line for line in result.err.splitlines() if "%" in line]
    assert 3 <= len(lines) <= 5 and all("\r" not in line and "loss 0." in line and "/25" in line for line in lines)


@pytest.fixture
def press(at_step):
    """Send signals to this process in the third step, by press(signum, ..., apart=seconds)."""

    def in_vain(signum, frame):
        pytest.fail(f"signal {signum} came through")

    def patch(*signums, apart=0.0):
        def send():
            for i, signum in enumerate(signums):
                time.sleep(apart * (i > 0))
                os.kill(os.getpid(), signum)

        at_step(3, send)

    before = {signum: signal.signal(signum, in_vain) for signum in SIGNALS}
    yield patch
    after = [signal.signal(signum, handler) for signum, handler in before.items()]
    assert all(handler in (in_vain, signal.SIG_IGN) for handler in after)  # put back by the program


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_training_after_the_step_with_a_checkpoint_and_the_command_that_goes_on(
    ddim, tmp_path, load, read_log, press, signum
):
    folder = tmp_path / "my folder"
    press(signum)
    result = ddim("--epochs", "5", *FAST, out_dir=folder)
    assert result.code == 128 + signum and "Traceback" not in result.err
    assert load(folder / "ddim_model_last.pth")["step"] == 3 == len(read_log(folder))
    words = shlex.split(result.err.splitlines()[-1])  # as a shell understands it
    config, found = parse_args(words[words.index("python") + 2 :])
    assert found["step"] == 3 and config.epochs == 5 and config.folder == folder


@pytest.mark.parametrize(
    "signum, apart, saves",
    [(signal.SIGINT, 0.01, True), (signal.SIGINT, 1.1, False), (signal.SIGTERM, 1.1, True)],
)
def test_only_a_second_ctrl_c_more_than_a_second_later_quits_at_once(ddim, tmp_path, press, signum, apart, saves):
    """Repeat signals as terminals, torchrun and job schedulers do by themselves."""
    press(signum, signum, apart=apart)
    assert ddim("--epochs", "5", *FAST).code == 128 + signum
    assert (tmp_path / "ddim_model_last.pth").exists() == saves


def test_a_signal_during_the_final_save_is_heeded_after_it(ddim, tmp_path, press, monkeypatch):
    save = ddim_cifar.save_checkpoint
    monkeypatch.setattr(ddim_cifar, "save_checkpoint", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), save(*a)))
    assert ddim(*FAST).code == 128 + signal.SIGTERM and (tmp_path / "ddim_model_final.pth").exists()


def test_main_trains_in_a_thread_as_well(ddim):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(ddim, *FAST).result().code == 0


def test_under_nohup_a_closed_terminal_is_ignored(ddim, press):
    press(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ddim("--epochs", "4", *FAST).code == 0


def test_a_folder_is_one_training_s_which_signals_end_though_its_output_went_away(
    ddim, tmp_path, wait_until, read_log, load
):
    """Close the output as of `| tee log`, which the same Ctrl-C ends, and repeat the signal as job schedulers do."""
    first = ddim.start(*ddim.tiny, *FAST, "--epochs", "100000", "--save-minutes", "0", "--out-dir", tmp_path)
    wait_until((tmp_path / "ddim_model_last.pth").exists, first)
    for flags in (["--epochs", "3"], ["--epochs", "100000", "--resume", "auto"]):
        result = ddim(*flags, *FAST)
        (line,) = result.err.splitlines()
        assert result.code == 2 and str(tmp_path) in line and "another process" in line
    steps = len(read_log(tmp_path))
    first.stdout.close()
    first.stderr.close()
    wait_until(lambda: len(read_log(tmp_path)) > steps + 2, first)
    for _ in range(3):
        first.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert ddim.finish(first).code == 143
    assert load(tmp_path / "ddim_model_last.pth")["step"] == len(read_log(tmp_path))
    assert not (tmp_path / "earlier-1").exists() and ddim(*FAST).code == 0


def test_a_file_system_without_locks_gets_a_warning(ddim, monkeypatch):
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, fail_with(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    result = ddim(*FAST)
    (line,) = result.err.splitlines()
    assert result.code == 0 and line.startswith("warning: ")


@pytest.mark.parametrize("local_rank, events", [(0, ["load", "wait"]), (1, ["wait", "load"])])
def test_the_first_process_of_each_machine_may_download(tmp_path, monkeypatch, local_rank, events):
    seen, images = [], torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8)
    for name, value in {"rank": 4 + local_rank, "size": 8, "local_rank": local_rank}.items():
        monkeypatch.setattr(ddim_cifar.world, name, value)
    monkeypatch.setattr(ddim_cifar, "load_images", lambda *_: seen.append("load") or images)
    monkeypatch.setattr(ddim_cifar, "gather", lambda item: seen.append("wait") or [item])
    monkeypatch.setattr(ddim_cifar, "Trainer", fail_with(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ddim_cifar.execute_training(ddim_cifar.Config(out_dir=str(tmp_path), device="cpu"), None, None, None)
    assert seen == events


def test_a_signal_to_one_process_and_a_picture_that_one_cannot_draw_end_all(ddim, tmp_path, at_step, load, checkpoint):
    at_step(3, lambda: ddim_cifar.world.rank == 1 and os.kill(os.getpid(), signal.SIGUSR1))
    training = ddim.fork(*ddim.tiny, *FAST, "--batch-size", "2", "--epochs", "9", "--out-dir", tmp_path)
    assert ddim.join(training) == [128 + signal.SIGUSR1] * 2, ddim.capfd.readouterr()
    assert load(tmp_path / "ddim_model_last.pth")["step"] == 3

    broken = load(checkpoint)
    broken["ema"]["conv_out.bias"][:] = 3e38
    torch.save(broken, tmp_path / "broken.pth")
    flags = ["--sample", tmp_path / "broken.pth", *ddim.device, "--num-samples", "1", "--export", tmp_path / "x"]
    assert ddim.join(ddim.fork(*flags)) == [1, 1] and not (tmp_path / "x").exists()
    err = ddim.capfd.readouterr().err
    assert err.count("1 of 1 images are not finite") == 1 and err.count("to go on: torchrun") == 1, err
