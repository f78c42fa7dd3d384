"""Resuming equals never having stopped; no run is lost to another; what is damaged is refused, and never run."""

import builtins
import contextlib
import io
import json
import os
import pickle
import random
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

import ddim_cifar
from ddim_cifar import UserError, load_checkpoint, load_model, parse_args

FAST = ["--num-samples", "1", "--sample-steps", "1", "--batch-size", "1", "--channel-mults", "1", "1"]
TWO = ["--num-samples", "2", "--batch-size", "2"]
DROPOUT = ["--dropout", "0.3", "--warmup", "5", "--lr", "1e-3"]
ZEROS = ["--dropout", "0", "--warmup", "0", "--ema-decay", "0", "--attn-resolutions"]
PAPER = ["--recipe", "paper", "--batch-size", "2", "--warmup", "2"]
ADAM = {"step", "exp_avg", "exp_avg_sq"}
TWO_ROWS = "step,epoch,loss,val_loss,lr,grad_norm,images_per_s,seconds\n1,1,.5,,.1,1,9,1\n2,2,.4,,.1,1,9,2\n"


def assert_equal(a, b):
    """Compare to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        a, b = (part if isinstance(part, dict) else dict(enumerate(part)) for part in (a, b))
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b and type(a) is type(b)


def assert_same_training(a, b):
    """Compare steps, weights, averages and moments of two checkpoints."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    for part in ("step", "model", "ema", "optimizer"):
        assert_equal(a[part], b[part])


@pytest.fixture
def write(checkpoint, load):
    """Write the trained checkpoint with other content, by write(path, step=3, ...)."""
    return lambda path, **content: torch.save({**load(checkpoint), **content}, path)


@pytest.fixture
def log_of(read_log):
    """Read the rows of a folder's log, without what depends on the clock or on where runs end."""
    names = ("step", "epoch", "loss", "lr", "grad_norm")
    return lambda folder: [[row[name] for name in names] for row in read_log(folder)]


def damage(path):
    """Flip one bit in the middle, among the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(folder):
    """Return the contents of the files of a run, by name."""
    paths = [path for pattern in ("ddim_model_*", "ddim_log*", "ddim_samples*") for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("recipe", [DROPOUT, ZEROS, PAPER], ids=["muon", "muon_with_zeros", "paper"])
def test_resuming_equals_never_having_stopped(ddim, tmp_path, load, log_of, recipe):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ddim(*recipe, "--epochs", "3", "--iterations", "2", *TWO, out_dir=whole)
    ddim(*recipe, "--epochs", "1", "--iterations", "2", *TWO, out_dir=parts)
    last = parts / "ddim_model_final.pth"
    result = ddim("--resume", last, "--epochs", "3", flags=ddim.device, out_dir=parts)
    assert result.code == 0 and "2 done, 4 to go" in result.out, result.err
    assert_same_training(whole / "ddim_model_final.pth", last)
    assert log_of(whole) == log_of(parts)
    assert (whole / "ddim_samples.png").read_bytes() == (parts / "ddim_samples.png").read_bytes()
    states = [optimizer["state"].values() for optimizer in load(last)["optimizer"]]
    kinds = [{frozenset(moments) for moments in state} for state in states]
    assert kinds == [{frozenset({"momentum"})}] * (recipe is not PAPER) + [{frozenset(ADAM)}]
    written = last.stat().st_mtime_ns
    result = ddim("--resume", "auto", flags=ddim.device, out_dir=parts)  # a finished run only draws again
    assert result.code == 0 and "6 done, 0 to go" in result.out and last.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "log, steps",
    [
        (TWO_ROWS + "3,3,.4,,.1,1,9,3\n4,4,1234.5,,9,9,9,9\n5,5,9.", "1234"),  # rows behind the checkpoint
        (TWO_ROWS + "3,3,.4,,.1,1,9,", "124"),  # a row cut short
        (TWO_ROWS + "3,3,.4,,.1,1,9," + 9 * "\0", "124"),  # as a power cut leaves it
        (TWO_ROWS + "3,3,.4,", "124"),
        (None, "4"),
    ],
    ids=["longer", "without the last value", "zeros at its end", "cut short", "gone"],
)
def test_the_log_goes_on_behind_the_checkpoint_whatever_was_left_of_it(ddim, tmp_path, read_log, log, steps):
    ddim("--epochs", "3", *FAST)
    path = tmp_path / "ddim_log.csv"
    path.write_text(log) if log else path.unlink()
    result = ddim("--resume", "auto", "--epochs", "4", flags=ddim.device)
    assert result.code == 0, result.err
    rows = read_log(tmp_path)
    assert "".join(row["step"] for row in rows) == steps and "1234.5" not in path.read_text()
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_a_folder_is_its_furthest_checkpoint_whatever_names_and_dates_say(tmp_path, checkpoint, write, capfd):
    """Pass over a damaged one and one cut short with a warning, and weights alone in silence."""
    for name, step in {"last": 1, "epoch_1": 3, "final": 20, "epoch_8": 98, "epoch_9": 99}.items():
        write(tmp_path / f"ddim_model_{name}.pth", step=step)
    os.utime(tmp_path / "ddim_model_epoch_1.pth", (2e9, 2e9))  # as after cp, zip or git
    damage(tmp_path / "ddim_model_epoch_8.pth")
    os.truncate(tmp_path / "ddim_model_epoch_9.pth", checkpoint.stat().st_size - 1000)
    torch.save(torch.load(checkpoint)["ema"], tmp_path / "ddim_model_ema.pth")
    for flags in (["--resume", "auto", "--out-dir"], ["--resume"], ["--sample"]):
        config, found = parse_args([*flags, str(tmp_path)])
        assert found["step"] == 20 and config.folder == tmp_path
        warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
        assert all(any(f"epoch_{n}.pth" in line for line in warnings) for n in (8, 9))
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    assert torch.equal(load_model(tmp_path)[0](x, t), load_model(checkpoint)[0](x, t))


def test_weights_start_a_new_run(ddim, tmp_path, checkpoint, load):
    """Begin with weights of --export-weights, in bf16, and with those of others."""
    weights, published = tmp_path / "weights.pth", tmp_path / "1-of-2.bin"
    average = load(checkpoint)["ema"]
    weights.write_text("of another run")
    sample = ["--sample", checkpoint, "--num-samples", "1", "--sample-steps", "1", "--export-weights", weights]
    assert ddim(*sample, flags=ddim.device).code == 0
    assert (tmp_path / "weights-earlier-1.pth").read_text() == "of another run"
    torch.save(average, published)
    for name, config in ddim_cifar.diffusers_configs(ddim_cifar.Config(**load(checkpoint)["config"])).items():
        (tmp_path / name).write_text(json.dumps(config))
    assert weights.stat().st_size < checkpoint.stat().st_size / 4

    for path, error in ((weights, 4e-3), (published, 1e-7)):
        still = ["--iterations", "2", "--lr", "1e-9", "--warmup", "0", "--num-samples", "1"]
        result = ddim("--resume", path, *still, flags=ddim.tiny, out_dir=tmp_path / path.stem)
        assert result.code == 0 and "0 done, 2 to go" in result.out, result.err
        saved = load(tmp_path / path.stem / "ddim_model_final.pth")
        assert saved["config"]["predict"] == "v" and saved["step"] == 2
        for name, value in average.items():
            torch.testing.assert_close(saved["model"][name], value, rtol=error, atol=1e-6)


def test_runs_of_any_length_in_any_order_share_a_folder(ddim, tmp_path):
    """Set each aside for the next, but for quick tests, and leave what is nobody's run."""
    (tmp_path / ".ddim_notes").touch()
    (tmp_path / ".123-ddim_x.pth").touch()  # of a run that was killed while it saved
    whole = []
    for epochs, iterations in ((1, 1), (1, 1), (2, 3), (10, 1), (1, 1)):
        result = ddim("--epochs", epochs, "--iterations", iterations, *FAST)
        assert result.code == 0, result.err
        whole.append(contents(tmp_path))
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".ddim_lock", ".ddim_notes"]
    assert contents(tmp_path / "earlier-1") == whole[2] and contents(tmp_path / "earlier-2") == whole[3]
    assert sorted(path.name for path in tmp_path.glob("earlier*")) == ["earlier-1", "earlier-2"]
    assert str(tmp_path / "earlier-2") in result.out
    earlier = tmp_path / "earlier-1"
    result = ddim("--resume", earlier, "--epochs", "3", flags=ddim.device, out_dir=earlier)
    assert result.code == 0 and "6 done, 3 to go" in result.out


def test_auto_begins_anew_beside_a_quick_test_but_goes_on_with_anything_longer(ddim, tmp_path):
    ddim(*FAST)
    result = ddim("--resume", "auto", "--epochs", "2", "--seed", "7", *FAST)
    assert result.code == 0 and "0 done, 2 to go" in result.out and not (tmp_path / "earlier-1").exists()
    result = ddim("--resume", "auto", "--epochs", "3", "--seed", "8", *FAST)
    assert result.code == 2 and "--seed 8" in result.err and "7" in result.err
    (tmp_path / "ddim_log.csv").unlink()  # without which it is none the less a run
    before = contents(tmp_path)
    assert ddim(*FAST).code == 0 and contents(tmp_path / "earlier-1") == before
    with open(tmp_path / "ddim_log.csv", "a") as log:  # of a run that was killed before its first checkpoint
        log.write("\n2,1,0.1,,0.1,0.1,1,2\n3,1,0.1,,0.1,0.1,1,3")
    before = contents(tmp_path)
    assert ddim(*FAST).code == 0 and contents(tmp_path / "earlier-2") == before


def test_a_run_resumed_from_another_checkpoint_sets_the_others_aside_and_takes_its_log_along(
    ddim, tmp_path, checkpoint, log_of
):
    ddim("--epochs", "3", "--save-every", "1", *FAST)
    before, log = contents(tmp_path), log_of(tmp_path)
    first = tmp_path / "ddim_model_epoch_1.pth"
    result = ddim("--resume", first, "--epochs", "2", flags=ddim.device)
    assert result.code == 0 and "1 done, 1 to go" in result.out, result.err
    assert len(log_of(tmp_path)) == 2 and log_of(tmp_path)[0] == log[0]
    aside = {**contents(tmp_path / "earlier-1"), first.name: first.read_bytes()}  # which may stay, being this run's
    assert aside == before

    result = ddim("--resume", checkpoint, "--iterations", "21", flags=ddim.device)  # of another folder
    assert result.code == 0 and "20 done, 1 to go" in result.out
    assert len(log_of(tmp_path)) == 21 and log_of(tmp_path)[:20] == log_of(checkpoint.parent)


def test_what_cannot_be_read_now_is_set_aside_and_auto_ends_with_its_name(ddim, tmp_path, forbid):
    ddim("--epochs", "3", "--save-every", "1", *FAST)
    before = contents(tmp_path)
    for module in (builtins, io):
        forbid(module, "open", tmp_path / "ddim_model_epoch_3.pth")
    result = ddim("--resume", "auto", "--epochs", "4", *FAST)
    assert result.code == 2 and "ddim_model_epoch_3.pth" in result.err.splitlines()[-1], result.err
    assert "Permission denied" in result.err and not (tmp_path / "earlier-1").exists()
    assert ddim("--epochs", "2", *FAST).code == 0
    assert contents(tmp_path / "earlier-1") == before


def test_nothing_is_moved_or_replaced_in_a_folder_that_cannot_be_listed(ddim, tmp_path, forbid):
    ddim("--epochs", "3", *FAST)
    before = contents(tmp_path)
    forbid(os, "listdir", tmp_path)
    result = ddim("--epochs", "2", *FAST)
    assert result.code == 2 and "Permission denied" in result.err and contents(tmp_path) == before


def test_a_damaged_file_is_refused_or_read_right(checkpoint, load, tmp_path):
    """Cut files short anywhere, and flip one bit anywhere."""
    whole, data, damaged = load(checkpoint), checkpoint.read_bytes(), tmp_path / "damaged.pth"
    draw, refused = random.Random(0), 0
    for n in range(24):
        place = draw.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        damaged.write_bytes(data[:place] + (flipped if n % 2 else b""))
        try:
            found = load_checkpoint(damaged, "cpu")
            assert_equal({name: found[name] for name in whole}, whole)  # bytes between the parts of a zip mean nothing
        except UserError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 21 and zipfile.ZipFile(checkpoint).testzip() is None


class Malice:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def test_code_in_a_file_is_not_run(ddim, tmp_path, write):
    trace = tmp_path / "trace"
    write(tmp_path / "ddim_model_1.pth", extra=Malice(trace))
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malice(trace)))
    for path in ("pickle.pth", "ddim_model_1.pth"):
        for mode in ("--sample", "--resume"):
            result = ddim(mode, tmp_path / path, flags=ddim.device)
            (line,) = result.err.splitlines()
            assert result.code == 2 and str(tmp_path / path) in line
    with contextlib.suppress(UserError):
        parse_args(["--resume", "auto", "--out-dir", str(tmp_path)])
    assert not trace.exists()


@pytest.mark.parametrize(
    "part, content, word",
    [
        *[(name, None, name) for name in ("format", "config", "model", "ema", "optimizer")],
        *[("format", number, "format") for number in (1, 2, 4, "x")],
        ("config/channels", 48, "48"),
        ("config/unheard_of", 1, "unheard_of"),
        ("config/channels", 64, "size mismatch"),
        ("model/more", torch.zeros(1), "more"),
        ("optimizer", [], ""),
        ("config/optimizer", "adam", ""),  # the moments are Muon's
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_said_in_one_line(ddim, tmp_path, checkpoint, load, part, content, word):
    """Remove a part, or give it another content."""
    whole, path = load(checkpoint), tmp_path / "ddim_model_final.pth"
    *outer, name = part.split("/")
    parent = whole[outer[0]] if outer else whole
    parent.pop(name) if content is None else parent.update({name: content})
    torch.save(whole, path)
    result = ddim("--resume", path, "--epochs", "2", flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and str(path) in line and word in line


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["ddim_model_epoch_1.pth", "ddim_model_last.pth", "ddim_samples_epoch_1.png"])
def test_a_save_or_a_preview_that_fails_once_ends_no_training(ddim, tmp_path, monkeypatch, name):
    replace, failing = os.replace, [name]

    def sometimes(source, target):
        if Path(target).name in failing:
            failing.clear()
            full()
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    result = ddim("--epochs", "3", "--iterations", "2", "--save-every", "1", "--save-minutes", "0", *FAST)
    (line,) = result.err.splitlines()
    assert result.code == 0 and name in line and "No space left" in line
    assert {"ddim_model_epoch_2.pth", "ddim_model_last.pth", "ddim_samples_epoch_2.png"} <= {*contents(tmp_path)}
    assert not list(tmp_path.glob(".[0-9]*"))


@pytest.mark.parametrize("fails", ["save_checkpoint", "held_out_loss"])
def test_an_error_at_the_last_step_leaves_a_checkpoint_to_go_on_from(ddim, tmp_path, load, monkeypatch, fails):
    original = getattr(ddim_cifar, fails)

    def fail(first, *rest):
        return original(first, *rest) if Path(str(first)).name == "ddim_model_last.pth" else full()

    monkeypatch.setattr(ddim_cifar, fails, fail)
    result = ddim("--epochs", "2", *FAST)
    assert result.code == 2 and "No space left" in result.err
    assert load(tmp_path / "ddim_model_last.pth")["step"] == 2


def test_log_rows_that_cannot_be_written_are_written_with_the_next(
    ddim, tmp_path, at_step, forbid, monkeypatch, read_log
):
    log, original = tmp_path / "ddim_log.csv", builtins.open
    at_step(2, lambda: forbid(builtins, "open", log))
    at_step(4, lambda: log.write_text(log.read_text() + "2,1,0."))  # a row that was written in part
    at_step(4, lambda: monkeypatch.setattr(builtins, "open", original))
    result = ddim("--iterations", "5", *FAST)
    (line,) = result.err.splitlines()
    assert result.code == 0 and "ddim_log.csv" in line and "Permission denied" in line
    assert [row["step"] for row in read_log(tmp_path) if row["seconds"]] == ["1", "2", "3", "4", "5"]


def test_a_file_is_on_disk_before_it_has_its_name_and_a_write_that_fails_damages_nothing(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    ddim_cifar.write_atomically(tmp_path / "x", lambda file: file.write(b"text"))
    assert done[:2] == ["fsync", "replace"]
    with pytest.raises(UserError, match=r"x: .*No space left"):
        try:
            raise SystemExit(143)  # which it is called to rescue from
        except SystemExit:
            ddim_cifar.write_atomically(tmp_path / "x", lambda file: (file.write(b"half of it"), full()))
    assert (tmp_path / "x").read_text() == "text" and not list(tmp_path.glob(".[0-9]*"))


def close_output():
    os.close(1)
    os.close(2)


@pytest.mark.parametrize(
    ("signum", "stops", "iterations", "within"),
    [
        (signal.SIGKILL, 1, 3, 0.1),
        pytest.param(signal.SIGKILL, 6, 40, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 6, 40, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_at_random_moments_ends_as_if_left_alone(
    ddim, tmp_path, load, read_log, log_of, wait_until, signum, stops, iterations, within
):
    """Type the same command line each time, until it is through. Each stop comes `within` seconds of a row logged.

    stdout and stderr are closed, as by >&-, which must not matter.
    """
    draw = random.Random(0)
    alone, folder = tmp_path / "alone", tmp_path / "stopped"
    lengths = ["--epochs", stops + 1, "--iterations", iterations, "--save-every", "2", "--save-minutes", "0"]
    flags = [*DROPOUT, *lengths, *FAST]
    assert ddim(*flags, out_dir=alone).code == 0
    flags += ["--resume", "auto", "--out-dir", folder]
    log = folder / "ddim_log.csv"
    for _ in range(stops):
        begun = time.time()
        process = ddim.start(*ddim.tiny, *flags, before=close_output)
        wait_until(lambda begun=begun: log.exists() and log.stat().st_mtime > begun, process)
        time.sleep(draw.uniform(0, within))
        process.send_signal(signum)
        code = ddim.finish(process).code
        assert code in (-signum, 128 + signum)
        if code > 0 and (rows := read_log(folder)):  # it could say goodbye: what is logged is saved
            assert load(folder / "ddim_model_last.pth")["step"] == int(rows[-1]["step"])

    result = ddim(*flags)
    assert result.code == 0, result.err
    assert_same_training(alone / "ddim_model_final.pth", folder / "ddim_model_final.pth")
    assert log_of(alone) == log_of(folder)
    losses = [[row["val_loss"] for row in read_log(path)] for path in (alone, folder)]
    assert losses[0] == losses[1]
    assert not list(folder.glob(".[0-9]*")) and not list(folder.glob("earlier-*/*.pth"))
