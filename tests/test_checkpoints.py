"""Resuming equals never having stopped; what is damaged is refused; nothing in a file is ever run."""

import os
import pickle
import random
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_cifar
from ddim_cifar import UNet, UserError, load_checkpoint, load_model, parse_args

ONE, FOUR = ["--num-samples", "1"], ["--num-samples", "4"]
DROPOUT = ["--dropout", "0.3", "--warmup", "5", "--lr", "1e-3"]
ZEROS = ["--dropout", "0", "--warmup", "0", "--ema-decay", "0", "--attn-resolutions"]
PAPER = ["--recipe", "paper", "--batch-size", "4", "--warmup", "2"]
LOGGED = ("step", "epoch", "loss", "lr", "grad_norm")
ADAM = {"step", "exp_avg", "exp_avg_sq"}


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
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def assert_same_training(load):
    """Two checkpoints hold the same weights, averages and moments, after as many steps."""

    def assert_same(a, b):
        a, b = load(a), load(b)
        for part in ("step", "model", "ema", "optimizer"):
            assert_equal(a[part], b[part])

    return assert_same


@pytest.fixture(scope="module")
def columns(read_log):
    return lambda folder, *names: [[row[name] for name in names] for row in read_log(folder)]


# ---- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [DROPOUT, ZEROS, PAPER], ids=["muon", "muon_with_zeros", "paper"])
def test_resuming_equals_never_having_stopped(ddim, tmp_path, load, columns, assert_same_training, recipe):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ddim(*recipe, "--epochs", "3", "--iterations", "2", *FOUR, out_dir=whole)
    ddim(*recipe, "--epochs", "1", "--iterations", "2", *FOUR, out_dir=parts)
    last = parts / "ddim_model_final.pth"
    result = ddim("--resume", last, "--epochs", "3", flags=ddim.device, out_dir=parts)
    assert result.code == 0 and "2 done, 4 to go" in result.out, result.err
    assert_same_training(whole / "ddim_model_final.pth", last)
    assert columns(whole, *LOGGED) == columns(parts, *LOGGED)
    assert (whole / "ddim_samples.png").read_bytes() == (parts / "ddim_samples.png").read_bytes()
    kinds = {frozenset(moments) for moments in load(last)["optimizer"].values()}
    assert kinds == {frozenset(ADAM)} | (set() if recipe is PAPER else {frozenset({"momentum"})})


def test_moments_of_another_memory_layout_resume_alike(ddim, tmp_path, checkpoint, load, assert_same_training):
    saved = load(checkpoint)
    moments = {name: {key: value.contiguous() for key, value in of.items()} for name, of in saved["optimizer"].items()}
    strides = [of[key].stride() for of in saved["optimizer"].values() for key in of]
    assert strides != [of[key].stride() for of in moments.values() for key in of]
    torch.save({**saved, "optimizer": moments}, tmp_path / "contiguous.pth")
    more = ["--iterations", "1", "--epochs", "21", *ONE]
    for path in (checkpoint, tmp_path / "contiguous.pth"):
        assert ddim("--resume", path, *more, flags=ddim.device, out_dir=tmp_path / path.stem).code == 0
    assert_same_training(*(tmp_path / name / "ddim_model_final.pth" for name in ("ddim_model_final", "contiguous")))


def test_rows_logged_behind_the_checkpoint_are_written_once(ddim, tmp_path, columns):
    ddim("--epochs", "1", "--iterations", "2", *ONE)
    log = tmp_path / "ddim_log.csv"
    behind = "3,2,1234.5,,9,9,9,9"
    log.write_text(f"{log.read_text()}{behind}\n4,2,9.")
    ddim("--resume", "auto", "--epochs", "2", flags=ddim.device)
    assert [step for (step,) in columns(tmp_path, "step")] == ["1", "2", "3", "4"]
    assert behind not in log.read_text()


@pytest.mark.parametrize(
    "cut", ["2,1,0.5,,1e-3,1,9,12.", "2,1,0.5,,1e", "2", "2,1,0.5,,1e-3,1,9,", "2,1,0.5,,1e-3,1,9,00:12\n"]
)
def test_a_row_that_was_cut_short_or_edited_is_dropped_and_the_seconds_go_on(tmp_path, cut):
    kept = "step,epoch,loss,val_loss,lr,grad_norm,images_per_s,seconds\n1,1,0.5,,1e-3,1,9,10.5\n"
    (tmp_path / "ddim_log.csv").write_text(kept + cut)
    log = ddim_cifar.Log(ddim_cifar.Config(out_dir=str(tmp_path)), step=2)
    log.file.close()
    assert (tmp_path / "ddim_log.csv").read_text() == kept and log.seconds == 10.5


def test_a_log_that_is_gone_is_begun_anew(ddim, tmp_path, columns):
    ddim("--epochs", "1", *ONE)
    (tmp_path / "ddim_log.csv").unlink()
    assert ddim("--resume", "auto", "--epochs", "2", flags=ddim.device).code == 0
    assert columns(tmp_path, "step") == [["2"]]


def test_auto_takes_the_furthest_complete_checkpoint_and_clears_up(ddim, tmp_path):
    assert "starting afresh" in ddim("--resume", "auto", "--epochs", "2", "--save-every", "1", *ONE).out
    final = tmp_path / "ddim_model_final.pth"
    final.write_bytes(final.read_bytes()[:-1000])
    (tmp_path / "ddim_model_last.pth.elsewhere-1.tmp").write_bytes(b"of a run that was killed")
    result = ddim("--resume", "auto", "--epochs", "4", *ONE)
    assert result.code == 0 and "2 done, 2 to go" in result.out and "passed over" in result.err
    assert not list(tmp_path.glob("*.tmp"))


def test_auto_is_not_misled_by_an_old_file_of_a_later_name(tmp_path, checkpoint, load):
    """ddim_model_last.pth, left from before the run came to its end, is behind ddim_model_final.pth."""
    torch.save({**load(checkpoint), "step": 1}, tmp_path / "ddim_model_last.pth")
    os.utime(tmp_path / "ddim_model_last.pth", (1, 1))
    (tmp_path / "ddim_model_final.pth").write_bytes(checkpoint.read_bytes())
    config, found = parse_args(["--resume", "auto", "--out-dir", str(tmp_path)])
    assert found["step"] == 20 and config.resume == str(tmp_path / "ddim_model_final.pth")


def test_a_finished_run_only_draws_again(ddim, tmp_path):
    ddim(*ONE)
    before = (tmp_path / "ddim_model_final.pth").stat().st_mtime_ns
    (tmp_path / "ddim_samples.png").unlink()
    result = ddim("--resume", "auto", *ONE)
    assert result.code == 0 and "1 done, 0 to go" in result.out and (tmp_path / "ddim_samples.png").exists()
    assert (tmp_path / "ddim_model_final.pth").stat().st_mtime_ns == before


# ---- Damage ----------------------------------------------------------------------------------------------------------


def mutants(data):
    """Files cut short anywhere, and files with one bit flipped anywhere."""
    draw = random.Random(0)
    for _ in range(15):
        yield data[: draw.randrange(len(data))]
    for _ in range(15):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


def test_a_damaged_file_is_refused_or_read_right(checkpoint, load, tmp_path):
    whole, damaged, refused = load(checkpoint), tmp_path / "damaged.pth", 0
    for data in mutants(checkpoint.read_bytes()):
        damaged.write_bytes(data)
        try:
            assert_equal(load_checkpoint(damaged, "cpu"), whole)  # bytes between the parts of a zip mean nothing
        except UserError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 27


class Malice:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def test_code_in_a_file_is_not_run(ddim, tmp_path, checkpoint, load):
    trace = tmp_path / "trace"
    torch.save({**load(checkpoint), "extra": Malice(trace)}, tmp_path / "zip.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malice(trace)))
    for name in ("zip.pth", "pickle.pth"):
        for mode in ("--sample", "--resume"):
            result = ddim(mode, tmp_path / name, flags=ddim.device)
            (line,) = result.err.splitlines()
            assert result.code == 2 and "nothing of it was run" in line
    assert not trace.exists()


def without(part):
    return lambda whole: {name: value for name, value in whole.items() if name != part}


def changed(**parts):
    return lambda whole: {**whole, **parts}


def within(part, **entries):
    return lambda whole: {**whole, part: {**whole[part], **entries}}


def moments_of(name, **moments):
    return lambda whole: within("optimizer", **{name: {**whole["optimizer"][name], **moments}})(whole)


def without_moments_of(name):
    def change(whole):
        return {**whole, "optimizer": {other: of for other, of in whole["optimizer"].items() if other != name}}

    return change


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda whole: [1, 2], "not of this program"),
        (lambda whole: {"conv_in.weight": torch.zeros(32, 3, 3, 3)}, "not of this program"),
        *[(without(part), part) for part in ("format", "config", "step", "model", "ema", "optimizer")],
        (changed(format=3), "written by a newer version of this program (format 3"),
        (changed(format="x"), "not of this program"),
        (changed(step=-1), "-1"),
        (changed(step="many"), "many"),
        (changed(config={}), "not of this program"),
        (within("config", channels=64), "does not fit"),
        (within("config", channels=48), "48"),
        (within("config", lr="fast"), "--lr"),
        (within("config", tau="cubic"), "--tau"),
        (within("config", predict="x"), "--predict"),
        (within("config", sample_steps=(0,)), "--sample-steps"),
        (within("ema", **{"conv_in.bias": torch.full((32,), torch.nan)}), "ema is not finite"),
        (within("model", **{"conv_in.bias": torch.zeros(31)}), "model does not fit"),
        (within("model", **{"conv_in.bias": torch.zeros(32, dtype=torch.int64)}), "model is not finite"),
        (within("model", more=torch.zeros(1)), "model does not fit"),
        (changed(optimizer={"state": {0: {"step": torch.ones(())}}, "param_groups": []}), "optimizer"),
        (changed(optimizer={}), "optimizer does not fit"),
        (without_moments_of("conv_in.bias"), "optimizer does not fit"),
        (within("optimizer", more={}), "optimizer does not fit"),
        (moments_of("conv_in.bias", exp_avg=torch.zeros(31)), "exp_avg does not fit"),
        (moments_of("conv_in.bias", exp_avg_sq=torch.full((32,), torch.inf)), "exp_avg_sq is not finite"),
        (moments_of("conv_in.bias", momentum=torch.zeros(32)), "momentum"),
        (within("config", optimizer="adam"), "optimizer"),  # the moments are Muon's
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_said_in_one_line(ddim, tmp_path, checkpoint, load, change, word):
    torch.save(change(load(checkpoint)), tmp_path / "x.pth")
    result = ddim("--resume", tmp_path / "x.pth", "--epochs", "2", *ONE, flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and f"checkpoint {tmp_path / 'x.pth'}: " in line and word in line


def test_a_setting_of_the_network_that_a_checkpoint_does_not_know_has_its_default(tmp_path, checkpoint, load):
    """As an older checkpoint, once the network has a new setting."""
    saved = load(checkpoint)
    del saved["config"]["dropout"]
    torch.save(saved, tmp_path / "older.pth")
    x, t = torch.zeros(1, 3, 32, 32), torch.tensor([500])
    older, newer = (load_model(path)[0](x, t) for path in (tmp_path / "older.pth", checkpoint))
    assert torch.equal(older, newer)


def test_a_checkpoint_is_a_plain_zip_with_right_checksums(checkpoint):
    assert zipfile.ZipFile(checkpoint).testzip() is None


# ---- Files of another origin -----------------------------------------------------------------------------------------

FORMAT_1 = {  # the settings in a checkpoint of format 1, as its program wrote them
    "epochs": 1,
    "iterations": 2,
    "batch_size": 4,
    "lr": 0.0002,
    "warmup": 1000,
    "lr_decay": 0.0,
    "grad_clip": 1.0,
    "min_snr": 0.0,
    "ema_decay": 0.9999,
    "resume": None,
    "save_every": 10,
    "save_minutes": 10.0,
    "dataset": "synthetic",
    "data_dir": "./data",
    "channels": 32,
    "channel_mults": [1, 2],
    "res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.1,
    "timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "sample": None,
    "num_samples": 16,
    "sample_steps": [50],
    "tau": "quadratic",
    "order": 1,
    "eta": 0.0,
    "clip_x0": False,
    "standardize_noise": False,
    "no_ema": False,
    "sample_batch_size": None,
    "export": None,
    "export_weights": None,
    "trajectory": False,
    "interpolate": False,
    "reconstruct": False,
    "consistency": False,
    "device": "cpu",
    "precision": "fp32",
    "compile": "auto",
    "seed": 0,
    "out_dir": ".",
    "compared_steps": [10, 20, 50, 100],
    "quick_test": False,
}
FORMAT_1_WAS = {"predict": "eps", "t_sampling": "uniform", "optimizer": "adam"}
GROUP_OF_FORMAT_1 = {
    "lr": 4.0000000000000003e-07,
    "betas": (0.9, 0.999),
    "eps": 1e-08,
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": False,
}


def format_1(**settings):
    """A checkpoint of format 1 after two steps: Adam's moments go by the number of their parameter."""
    draw = torch.Generator().manual_seed(0)

    def network():
        weights = UNet(32, (1, 2), 1, (16,)).state_dict()
        return {name: torch.randn(value.shape, generator=draw) / 20 for name, value in weights.items()}

    model, moments = network(), {}
    for i, value in enumerate(model.values()):
        first, second = (torch.randn(value.shape, generator=draw) / 1000 for _ in range(2))
        moments[i] = {"step": torch.tensor(2.0), "exp_avg": first, "exp_avg_sq": second.square()}
    return {
        "format": 1,
        "config": {**FORMAT_1, **settings},
        "step": 2,
        "model": model,
        "ema": network(),
        "optimizer": {"state": moments, "param_groups": [{**GROUP_OF_FORMAT_1, "params": list(moments)}]},
    }


def test_a_checkpoint_of_format_1_is_one_of_eps_and_adam(tmp_path):
    old = format_1()
    torch.save(old, tmp_path / "old.pth")
    read = load_checkpoint(tmp_path / "old.pth", "cpu")
    for part in ("step", "model", "ema"):
        assert_equal(read[part], old[part])
    for i, moments in enumerate(read["optimizer"].values()):
        assert_equal(moments, old["optimizer"]["state"][i])
    assert list(read["optimizer"]) == list(old["model"])

    config, _ = parse_args(["--resume", str(tmp_path / "old.pth"), "--epochs", "3"])
    assert (config.predict, config.optimizer, config.lr, config.warmup) == ("eps", "adam", 2e-4, 1000)
    assert (config.channel_mults, config.attn_resolutions, config.precision) == ((1, 2), (16,), "fp32")
    assert config.steps == 50 and config.compared_steps == (10, 20, 50, 100)
    for flag, typed, its in (("--predict", "v", "eps"), ("--optimizer", "muon", "adam")):
        with pytest.raises(ddim_cifar.UsageError, match=f"{flag} {typed} contradicts {its}"):
            parse_args(["--resume", str(tmp_path / "old.pth"), flag, typed])


def test_step_counts_that_a_run_of_format_1_was_given_are_kept(tmp_path):
    torch.save(format_1(sample_steps=[5, 20], compared_steps=[5, 20]), tmp_path / "old.pth")
    config, _ = parse_args(["--resume", str(tmp_path / "old.pth")])
    assert config.steps == 20 and config.compared_steps == (5, 20)


def test_a_checkpoint_of_format_1_resumes_and_samples_as_its_translation_does(
    ddim, tmp_path, load, assert_same_training
):
    """The translation by hand: moments by name, eps and Adam among the settings."""
    old, config = format_1(), {}
    for name in ddim_cifar.Config.__dataclass_fields__:
        value = old["config"].get(name, {**FORMAT_1_WAS, "recipe": "default"}.get(name))
        config[name] = tuple(value) if isinstance(value, list) else value
    moments = dict(zip(old["model"], old["optimizer"]["state"].values()))
    torch.save(old, tmp_path / "old.pth")
    torch.save({**old, "format": 2, "config": config, "optimizer": moments}, tmp_path / "new.pth")

    few = ["--num-samples", "2", "--sample-steps", "2"]
    for name in ("old", "new"):
        path, folder = tmp_path / f"{name}.pth", tmp_path / name
        assert ddim("--sample", path, *few, "--export", folder / "x.npz", flags=ddim.device, out_dir=folder).code == 0
        result = ddim("--resume", path, "--epochs", "2", *few, flags=ddim.device, out_dir=folder)
        assert result.code == 0 and "2 done, 2 to go" in result.out, result.err
    a, b = (np.load(tmp_path / name / "x.npz")["arr_0"] for name in ("old", "new"))
    assert np.array_equal(a, b)
    assert_same_training(*(tmp_path / name / "ddim_model_final.pth" for name in ("old", "new")))
    written = load(tmp_path / "old" / "ddim_model_final.pth")
    assert written["format"] == 2 and FORMAT_1_WAS.items() <= written["config"].items()
    assert not torch.equal(written["model"]["conv_in.weight"], old["model"]["conv_in.weight"])


def test_published_weights_can_be_sampled_from_but_not_resumed(ddim, tmp_path):
    """They predict eps: the pictures are those of the checkpoint of such a network."""
    assert ddim("--predict", "eps", "--iterations", "2", *ONE).code == 0
    final, published = tmp_path / "ddim_model_final.pth", tmp_path / "published.bin"
    torch.save(load_checkpoint(final, "cpu")["ema"], published)
    result = ddim("--resume", published, flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and "cannot be resumed, only used with --sample" in line
    few, images = ["--num-samples", "2", "--sample-steps", "2", "--export"], []
    for path in (final, published):
        assert ddim("--sample", path, *few, tmp_path / f"{path.stem}.npz", flags=ddim.device).code == 0
        images.append(np.load(tmp_path / f"{path.stem}.npz")["arr_0"])
    assert np.array_equal(*images)


# ---- Stopped at random moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "stops", "iterations", "within"),
    [
        (signal.SIGKILL, 1, 3, 0.1),
        pytest.param(signal.SIGKILL, 20, 15, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 20, 15, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_at_random_moments_ends_as_if_left_alone(
    ddim, tmp_path, load, read_log, columns, wait_until, assert_same_training, signum, stops, iterations, within
):
    """With the same command line each time, until it is through. Each stop comes `within` seconds of a row logged."""
    draw = random.Random(0)
    alone, folder = tmp_path / "alone", tmp_path / "stopped"
    lengths = ["--epochs", stops + 1, "--iterations", iterations, "--save-every", "2", "--save-minutes", "0"]
    flags = [*ddim.tiny, *DROPOUT, *lengths, *ONE]
    left_alone = ddim.start(*flags, "--out-dir", alone)
    log, stopped, code = folder / "ddim_log.csv", 0, None
    while code != 0:
        begun = time.time()
        process = ddim.start(*flags, "--resume", "auto", "--out-dir", folder)
        if stopped < stops:
            wait_until(lambda begun=begun: log.exists() and log.stat().st_mtime > begun, process)
            time.sleep(draw.uniform(0, within))
            process.send_signal(signum)
        _, err = process.communicate(timeout=900)
        code = process.returncode
        if code == 0:
            break
        stopped += 1
        assert code in (-signum, 128 + signum), err
        if code > 0 and (rows := read_log(folder)):  # it could say goodbye: what is logged is saved
            assert load(folder / "ddim_model_last.pth")["step"] == int(rows[-1]["step"])
    assert stopped == stops

    _, err = left_alone.communicate(timeout=900)
    assert left_alone.returncode == 0, err
    assert_same_training(alone / "ddim_model_final.pth", folder / "ddim_model_final.pth")
    assert columns(alone, "val_loss", *LOGGED) == columns(folder, "val_loss", *LOGGED)
    assert not list(folder.glob("*.tmp"))


# ---- Which checkpoint, and into which folder -------------------------------------------------------------------------


def test_auto_takes_the_furthest_whatever_its_date_says(ddim, tmp_path):
    ddim("--epochs", "3", "--save-every", "1", "--num-samples", "1")
    os.utime(tmp_path / "ddim_model_epoch_1.pth", (2e9, 2e9))  # as after cp, zip or git
    result = ddim("--resume", "auto", "--epochs", "4", flags=[])
    assert result.code == 0 and "3 done, 1 to go" in result.out


def test_auto_passes_over_a_quick_test_of_other_settings_but_over_nothing_longer(ddim, tmp_path):
    ddim(*ONE)
    result = ddim("--resume", "auto", "--epochs", "2", "--seed", "7", *ONE)
    assert result.code == 0 and "--seed 7 contradicts 0" in result.out and "0 done, 2 to go" in result.out
    result = ddim("--resume", "auto", "--epochs", "3", "--seed", "8", *ONE)
    assert result.code == 2 and "--seed 8 contradicts 7" in result.err


def test_auto_does_not_go_on_with_the_drawn_shapes_of_a_quick_test(ddim, tmp_path):
    ddim("--dataset", "synthetic", *ONE)
    for flags, dataset, steps in (([], "cifar10", None), (["--dataset", "synthetic"], "synthetic", 1)):
        config, found = parse_args(["--resume", "auto", "--epochs", "2", *flags, "--out-dir", str(tmp_path)])
        assert config.dataset == dataset and (found or {"step": None})["step"] == steps


def test_auto_takes_the_furthest_where_files_cannot_be_mapped_into_memory(ddim, tmp_path, monkeypatch):
    def read(*arguments, mmap=False, **options):
        if mmap:
            raise RuntimeError("unable to mmap")
        return torch_load(*arguments, **options)

    ddim("--epochs", "2", "--save-every", "1", *ONE)
    torch_load = torch.load
    monkeypatch.setattr(torch, "load", read)
    assert parse_args(["--resume", "auto", "--out-dir", str(tmp_path)])[1]["step"] == 2


def test_auto_passes_over_a_damaged_checkpoint_and_over_weights_alone(ddim, tmp_path, load):
    ddim("--epochs", "2", "--save-every", "1", "--num-samples", "1")
    torch.save(load(tmp_path / "ddim_model_final.pth")["ema"], tmp_path / "ddim_model_ema.pth")
    for name in ("epoch_2", "final"):
        content = bytearray((tmp_path / f"ddim_model_{name}.pth").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / f"ddim_model_{name}.pth").write_bytes(content)
    result = ddim("--resume", "auto", flags=[])
    assert result.code == 0 and "1 done, 1 to go" in result.out and result.err.count("passed over") == 2


def test_resuming_into_a_folder_of_a_longer_or_another_run_is_refused(ddim, tmp_path, checkpoint):
    ddim("--epochs", "3", "--save-every", "1", "--num-samples", "1")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    longer = ddim("--resume", tmp_path / "ddim_model_epoch_1.pth", "--epochs", "2", flags=[])
    assert longer.code == 2 and "holds a longer run, of 3 steps" in longer.err
    ddim("--seed", "7", "--num-samples", "1", out_dir=tmp_path / "other")
    other = ddim("--resume", checkpoint, "--epochs", "2", flags=[], out_dir=tmp_path / "other")
    assert other.code == 2 and "holds another run (--seed 7)" in other.err
    assert all(path.read_bytes() == content for path, content in files.items())
    assert ddim("--resume", tmp_path / "ddim_model_epoch_1.pth", flags=[], out_dir=tmp_path / "new").code == 0


def test_other_training_images_than_before_are_reported_on_resume(ddim, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    flags = [*ddim.network, "--dataset", "folder", "--data-dir", folder, "--batch-size", "4", "--sample-steps", "2"]
    ddim(*flags, flags=[])
    assert "images are not those" not in ddim("--resume", "auto", "--epochs", "2", flags=[]).err
    Image.new("RGB", (32, 32), "blue").save(folder / "3.png")
    result = ddim("--resume", "auto", "--epochs", "3", flags=[])
    assert result.code == 0 and result.err.count("images are not those") == 1


def test_a_finished_run_goes_on_with_an_export_that_was_stopped(ddim, tmp_path):
    folder = tmp_path / "folder"
    assert ddim("--num-samples", "3", "--export", folder).code == 0
    kept, lost = folder / "00000.png", folder / "00002.png"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    result = ddim("--resume", "auto", "--export", folder, flags=ddim.device)
    assert result.code == 0 and "1 done, 0 to go" in result.out, result.err
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == before
