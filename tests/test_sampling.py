"""Pictures: the same image for the same number, exact counts, nothing half-written, and the paper's experiments."""

import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image
from torch import nn

import ddim_cifar
from ddim_cifar import (
    UNET,
    Config,
    NoiseSchedule,
    Runtime,
    Sampler,
    UNet,
    compute_all,
    ddim_sample,
    ddim_timesteps,
    draw_shapes,
    load_model,
    to_uint8,
)

FAST = ["--sample-steps", "3", "--precision", "fp32"]
DIFFUSERS = [*FAST, "--tau", "uniform", "--num-samples", "2"]  # the steps that its scheduler takes, too
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Zero(nn.Module):
    """A network that sees no noise: sampling and encoding only scale."""

    def forward(self, x, t):
        return torch.zeros_like(x)


def sampler_of(model, schedule=None, **settings):
    config = Config(predict="eps", **settings)
    schedule = schedule or NoiseSchedule(config.timesteps, config.beta_start, config.beta_end)
    return Sampler(model, schedule, config, Runtime(torch.device("cpu")))


@pytest.fixture(scope="module")
def checkpoints(checkpoint, tmp_path_factory):
    """A checkpoint for each way of predicting. That of eps has a schedule of its own."""
    folder = tmp_path_factory.mktemp("eps")
    network = "--channels 32 --channel-mults 1 2 --res-blocks 1 --attn-resolutions 16 --device cpu --precision fp32"
    training = "--dataset synthetic --batch-size 4 --iterations 10 --lr 2e-3 --warmup 0 --predict eps --beta-end 0.004"
    sampling = ["--sample-steps", "1", "--num-samples", "1", "--out-dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddim_cifar, "HELD_OUT", 40)  # to save time
        assert ddim_cifar.main([*network.split(), *training.split(), *sampling]) == 0
    return {"v": checkpoint, "eps": folder / "ddim_model_final.pth"}


@pytest.fixture
def export(ddim, checkpoint, tmp_path):
    """export(name, *flags) samples from the checkpoint, or another, and returns the images of the archive or folder."""

    def run(name, *flags, path=checkpoint, steps=FAST):
        result = ddim("--sample", path, *steps, "--export", tmp_path / name, *flags, flags=[])
        assert result.code == 0, result.err
        if name.endswith(".npz"):
            return np.load(tmp_path / name)["arr_0"]
        return np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("*.png"))])

    return run


def largest(one, other):
    """The largest difference of uint8 images."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()


# ---- An image depends on its number ----------------------------------------------------------------------------------


def test_an_image_is_the_same_whatever_else_is_asked_for(export):
    many = export("a.npz", "--num-samples", "10")
    few = export("b.npz", "--num-samples", "4", "--sample-batch-size", "3")
    assert len({image.tobytes() for image in many}) == 10 and largest(many[:4], few) <= 1
    assert largest(export("c.npz", "--num-samples", "4", "--seed", "1"), few) > 50


def test_random_steps_are_the_same_whatever_else_is_asked_for(export):
    many = export("a.npz", "--num-samples", "6", "--eta", "1")
    assert largest(many[:2], export("b.npz", "--num-samples", "2", "--eta", "1")) <= 1
    assert largest(many[:2], export("c.npz", "--num-samples", "2")) > 20


def test_every_sampling_flag_changes_the_picture(export):
    plain = export("plain.npz", "--num-samples", "2")
    taus = (["--tau", "uniform"], ["--tau", "karras"])
    for i, flags in enumerate((["--no-ema"], ["--clip-x0"], ["--order", "2"], ["--sample-steps", "4"], *taus)):
        assert not np.array_equal(plain, export(f"{i}.npz", "--num-samples", "2", *flags)), flags


def test_of_several_step_counts_the_last_draws_the_samples(export):
    several = export("a.npz", "--num-samples", "2", "--sample-steps", "2", "5")
    assert np.array_equal(several, export("b.npz", "--num-samples", "2", "--sample-steps", "5"))


def test_steps_are_chosen_by_the_run_s_own_schedule():
    sampler = sampler_of(Zero(), tau="karras", beta_start=1e-3, beta_end=0.01)
    assert sampler.tau(10) == ddim_timesteps(1000, 10, "karras", sampler.schedule) != ddim_timesteps(1000, 10, "karras")


def test_the_last_batch_of_a_compiled_network_is_filled_up_and_cut_again():
    sampler, sizes = sampler_of(Zero(), sample_batch_size=4), []
    sampler.compiled = True  # which a new size would compile anew

    def double(chunk):
        sizes.append(len(chunk))
        return 2 * torch.tensor(chunk)

    assert compute_all(sampler, 7, double, 1, "").tolist() == [0, 2, 4, 6, 8, 10, 12] and sizes == [4, 4]


def test_after_training_and_on_the_way_the_averaged_weights_draw(ddim, tmp_path):
    ddim("--iterations", "2", "--save-every", "1", "--lr", "1e-2", "--warmup", "0", "--export-weights", tmp_path / "w")

    def drawn(*flags):
        as_before = ["--sample-steps", "2", "--precision", "fp32", *flags]
        ddim("--sample", tmp_path / "ddim_model_final.pth", *as_before, flags=[], out_dir=tmp_path / "again")
        return np.asarray(Image.open(tmp_path / "again" / "ddim_samples.png"))

    averaged, own = drawn(), drawn("--no-ema")
    for name in ("ddim_samples.png", "ddim_samples_epoch_1.png"):
        picture = np.asarray(Image.open(tmp_path / name))
        assert largest(picture, averaged) <= 1 < largest(picture, own), name

    written = ddim_cifar.load_checkpoint(tmp_path / "w" / "unet" / WEIGHTS, "cpu")["ema"]
    average = ddim_cifar.load_checkpoint(tmp_path / "ddim_model_final.pth", "cpu")["ema"]
    assert all(torch.equal(written[name], value) for name, value in average.items())


# ---- Exports ---------------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_images_of_the_archive(export, tmp_path):
    assert np.array_equal(export("folder", "--num-samples", "5"), export("x.npz", "--num-samples", "5"))
    assert len(list((tmp_path / "folder").glob("*.png"))) == 5


def test_a_stopped_folder_export_goes_on_and_its_grid_shows_all(export, tmp_path):
    whole = export("folder", "--num-samples", "5")
    grid = np.asarray(Image.open(tmp_path / "ddim_samples.png"))
    kept = tmp_path / "folder" / "00001.png"
    for name in ("00003.png", "00004.png"):
        (tmp_path / "folder" / name).unlink()
    (tmp_path / "folder" / "00006.png.elsewhere-1.tmp").touch()
    before = kept.stat().st_mtime_ns
    again = export("folder", "--num-samples", "5")
    assert largest(whole, again) <= 1 and kept.stat().st_mtime_ns == before
    assert largest(grid, Image.open(tmp_path / "ddim_samples.png")) <= 1
    assert len(export("folder", "--num-samples", "7")) == 7 and not list((tmp_path / "folder").glob("*.tmp"))


def test_a_folder_takes_images_of_one_origin_only(ddim, export, checkpoint, tmp_path, load):
    export("folder", "--num-samples", "2")
    content = load(checkpoint)
    torch.save({**content, "config": {**content["config"], "beta_end": 0.015}}, tmp_path / "other_schedule.pth")
    torch.save({**content, "config": {**content["config"], "predict": "eps"}}, tmp_path / "other_predict.pth")

    def refused(*flags, path=checkpoint):
        flags = ["--num-samples", "2", *FAST, *flags]
        result = ddim("--sample", path, *flags, "--export", tmp_path / "folder", flags=[])
        return result.code == 2 and "folder" in result.err.splitlines()[-1]

    others = (["--seed", "1"], ["--no-ema"], ["--eta", "0.5"], ["--order", "2"], ["--tau", "uniform"], ["--clip-x0"])
    for flags in (*others, ["--sample-steps", "2"], ["--precision", "bf16"], ["--num-samples", "1"]):
        assert refused(*flags), flags
    assert refused(path=tmp_path / "other_schedule.pth") and refused(path=tmp_path / "other_predict.pth")
    assert len(list((tmp_path / "folder").glob("*.png"))) == 2 and not refused()


def test_a_folder_with_pictures_of_somebody_else_is_refused(ddim, checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    picture = tmp_path / "folder" / "00000.png"
    Image.new("RGB", (32, 32)).save(picture)
    before = picture.read_bytes()
    result = ddim("--sample", checkpoint, *FAST, "--export", tmp_path / "folder", flags=[])
    assert result.code == 2 and "it holds 00000.png" in result.err and picture.read_bytes() == before


def test_a_disk_that_is_full_at_the_last_image_is_an_error(ddim, checkpoint, tmp_path, monkeypatch):
    rename = os.replace

    def full(source, target):
        if str(target).endswith("00001.png"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = ddim("--sample", checkpoint, *FAST, "--num-samples", "2", "--export", tmp_path / "folder", flags=[])
    assert result.code == 2 and "No space left" in result.err


def test_an_archive_is_complete_or_absent(ddim, checkpoint, tmp_path, monkeypatch):
    def stop(*_):
        raise ddim_cifar.Stopped(2)

    monkeypatch.setattr(np, "savez", stop)
    result = ddim("--sample", checkpoint, *FAST, "--export", tmp_path / "x.npz", flags=[])
    assert result.code == 130 and not list(tmp_path.glob("x.npz*"))


@pytest.mark.parametrize("count, side", [(1, 1), (5, 3), (16, 4), (17, 5), (300, 16)])
def test_the_grid_is_square_and_shows_at_most_256(count, side):
    grid = ddim_cifar.draw_grid(torch.zeros(min(count, 256), 3, 32, 32, dtype=torch.uint8), scale=1)
    assert grid.width == 2 + side * 34


def test_grid_keeps_every_pixel():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    sheet = np.asarray(ddim_cifar.draw_grid(images, scale=1))
    assert np.array_equal(sheet[2:34, 36:68], images[1].permute(1, 2, 0))


# ---- Experiments -----------------------------------------------------------------------------------------------------


def table(path):
    """The rows of a CSV file below its header, as lists of strings."""
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


@pytest.fixture
def grids(monkeypatch):
    """The arguments of every grid that is drawn, by the name of its file: (images, layout)."""
    drawn = {}
    monkeypatch.setattr(
        ddim_cifar, "save_grid", lambda images, path, **layout: drawn.update({path.name: (images, layout)})
    )
    return drawn


def test_the_experiments_draw_their_pictures(ddim, checkpoint, tmp_path):
    experiments = ["--trajectory", "--interpolate", "--reconstruct", "--consistency"]
    flags = [*experiments, "--sample-steps", "2", "4", "--num-samples", "4", "--precision", "fp32"]
    result = ddim("--sample", checkpoint, *flags, flags=[])
    assert result.code == 0, result.err
    pictures = [
        f"ddim_{name}.png" for name in ("samples", "trajectory", "interpolation", "reconstruction", "consistency")
    ]
    others = ["ddim_trajectory.gif", "ddim_reconstruction.csv", "ddim_consistency.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures + others)
    with Image.open(tmp_path / "ddim_trajectory.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
    assert (tmp_path / "ddim_reconstruction.csv").read_text().startswith("steps,error,paper\n2,")
    assert (tmp_path / "ddim_consistency.csv").read_text().startswith("steps,distance\n2,")
    assert [row[0] for row in table(tmp_path / "ddim_reconstruction.csv")] == ["2", "4"]
    assert [float(row[1]) > 0 for row in table(tmp_path / "ddim_consistency.csv")] == [True, False]


def test_experiments_use_the_paper_s_step_counts_by_default():
    assert Config().compared_steps == (10, 20, 50, 100) and Config().steps == 50
    assert Config(sample_steps=(20, 50)).compared_steps == (20, 50)


def test_the_trajectory_goes_from_the_noise_through_ever_lower_t(grids, tmp_path):
    sampler = sampler_of(Zero(), num_samples=2, sample_steps=(4,), out_dir=str(tmp_path))
    ddim_cifar.trajectory(sampler)
    images, layout = grids["ddim_trajectory.png"]
    tau = sampler.tau(4)[::-1]
    assert layout["column_labels"] == ["x_T"] + [f"t={t}" for t in tau] and layout["columns"] == 5
    assert torch.equal(images.unflatten(0, (2, 5))[:, 0], to_uint8(sampler.x_T([0, 1])))


def test_the_reconstruction_error_is_the_mean_square_on_0_to_1(tmp_path):
    """Where eps is the same for each image, and rises with t, encoding and decoding differ by a known sum."""

    class Rising(nn.Module):
        def forward(self, x, t):
            return (1e-4 * t.view(-1, 1, 1, 1)).expand_as(x)

    images, steps = draw_shapes(3, seed=0), (5, 10)
    sampler = sampler_of(Rising(), sample_steps=steps, out_dir=str(tmp_path))
    ddim_cifar.reconstruction(sampler, images)
    for (number, error, _), S in zip(table(tmp_path / "ddim_reconstruction.csv"), steps, strict=True):
        tau, sigma = sampler.tau(S), sampler.schedule.noise_ratio
        off = sum(1e-4 * (t - before) * (sigma(t) - sigma(before)) for before, t in pairwise(tau))
        assert int(number) == S and float(error) == pytest.approx((off / 2) ** 2, rel=1e-3)


def test_the_distance_of_consistency_is_that_of_the_final_images_on_0_to_1(grids, tmp_path):
    """A network that sees no noise: x_0 is x_T over the root of alpha, at the last of the steps."""
    steps = (2, 4, 8)
    sampler = sampler_of(Zero(), tau="uniform", num_samples=2, sample_steps=steps, out_dir=str(tmp_path))
    ddim_cifar.consistency(sampler)
    alphas = [sampler.schedule.alpha(1000 - 1000 // S) for S in steps]
    ends = [(sampler.x_T([0, 1]) / math.sqrt(alpha)).clamp(-1, 1) for alpha in alphas]
    distances = [float(row[1]) for row in table(tmp_path / "ddim_consistency.csv")]
    assert distances == pytest.approx([((end - ends[-1]) / 2).square().mean().item() for end in ends], rel=1e-3)
    assert distances[0] > distances[1] > distances[2] == 0

    images, layout = grids["ddim_consistency.png"]
    assert layout["column_labels"] == ["S=2", "S=4", "S=8"]
    expected = to_uint8(torch.stack(ends, dim=1)).flatten(0, 1)
    assert largest(images, expected) <= 1


def test_interpolation_ends_in_the_samples_themselves(export, grids):
    export("x.npz", "--num-samples", "4", "--interpolate")
    samples, rows = grids["ddim_samples.png"][0], grids["ddim_interpolation.png"][0].unflatten(0, (2, 11))
    assert largest(rows[:, [0, -1]].flatten(0, 1), samples) <= 1


def test_interpolation_goes_along_the_sphere_on_which_noise_lies(tmp_path):
    class Recorder(Zero):
        def forward(self, x, t):
            self.seen = x
            return super().forward(x, t)

    sampler = sampler_of(Recorder(), num_samples=2, sample_steps=(1,), out_dir=str(tmp_path))
    ddim_cifar.interpolation(sampler)
    assert len(sampler.model.seen) == 11 and (sampler.model.seen.std((1, 2, 3)) - 1).abs().max() < 0.05


# ---- From and for other programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_diffusers_draws_our_pictures_from_exported_weights(export, checkpoints, predict, tmp_path, monkeypatch):
    ours = export("x.npz", "--export-weights", tmp_path / "weights", path=checkpoints[predict], steps=DIFFUSERS)
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "weights", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    x_T = sampler_of(Zero()).x_T([0, 1])
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: x_T)
    theirs = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert ((ours > 0) & (ours < 255)).mean() > 0.2
    assert largest(ours, (255 * theirs).round()) <= 1


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_exported_weights_draw_here_what_their_checkpoint_draws(export, checkpoints, predict, tmp_path):
    ours = export("a.npz", "--export-weights", tmp_path / "weights", path=checkpoints[predict], steps=DIFFUSERS)
    again = export("b.npz", path=tmp_path / "weights" / "unet" / WEIGHTS, steps=DIFFUSERS)
    assert np.array_equal(ours, again)


def three_lines(path, x_T):
    """The program as a library."""
    model, schedule = load_model(path)
    tau = ddim_timesteps(schedule.timesteps, 3, "quadratic")
    return to_uint8(ddim_sample(model, x_T, schedule, tau)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_three_lines_lead_from_a_checkpoint_to_the_pictures_of_the_command(export, checkpoints, predict):
    pictures = export("x.npz", "--num-samples", "2", path=checkpoints[predict])
    assert largest(three_lines(checkpoints[predict], sampler_of(Zero()).x_T([0, 1])), pictures) <= 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The file and the network of weights that diffusers wrote, which predict eps."""
    folder, config = tmp_path_factory.mktemp("published"), Config(channels=32, channel_mults=(1, 2), res_blocks=1)
    torch.manual_seed(0)
    network = UNet(**config.of(UNET))
    nn.init.xavier_uniform_(network.conv_out.weight)
    ddim_cifar.export_weights(folder, network, config)
    unet = DDIMPipeline.from_pretrained(folder, local_files_only=True).unet
    unet.save_pretrained(folder / "theirs")
    return folder / "theirs" / WEIGHTS, unet


def test_and_from_published_weights(export, published):
    pictures = export("x.npz", "--num-samples", "2", path=published[0])
    assert largest(three_lines(published[0], sampler_of(Zero()).x_T([0, 1])), pictures) <= 1


def test_a_loaded_model_returns_eps(checkpoints, published):
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.inference_mode():
        v, schedule = load_model(checkpoints["v"])
        eps, _ = load_model(checkpoints["eps"])
        theirs, _ = load_model(published[0])
        signal_scale, noise_scale = schedule.scales(x, t)
        torch.testing.assert_close(v(x, t), noise_scale * x + signal_scale * v.network(x, t))
        assert torch.equal(eps(x, t), eps.network(x, t))
        torch.testing.assert_close(theirs(x, t), published[1](x, t).sample, rtol=0, atol=1e-4)


def test_published_weights_are_for_sampling_only(ddim, published, tmp_path):
    result = ddim("--resume", published[0], flags=[])
    assert result.code == 2 and "--sample" in result.err


def test_without_export_a_gridful_is_drawn_and_said_so(ddim, checkpoint, tmp_path):
    result = ddim(
        "--sample", checkpoint, "--sample-steps", "1", "--precision", "fp32", "--num-samples", "257", flags=[]
    )
    assert result.code == 0 and "drawing 256 images" in result.out and "all 257" in result.out


def test_samples_that_are_not_finite_end_the_command_and_nothing_is_exported(ddim, checkpoint, load, tmp_path):
    broken = load(checkpoint)
    broken["ema"]["conv_out.bias"][:] = 3e38
    torch.save(broken, tmp_path / "broken.pth")
    for name in ("x.npz", "folder"):
        flags = ("--sample", tmp_path / "broken.pth", *FAST, "--num-samples", "3", "--export", tmp_path / name)
        result = ddim(*flags, flags=[])
        (line,) = result.err.splitlines()
        assert result.code == 1 and "3 of 3 images are not finite: numbers 0 1 2" in line
    assert not (tmp_path / "x.npz").exists() and not list((tmp_path / "folder").glob("*.png"))

    # Of two processes, the second has nothing to draw and ends with the first.
    process = ddim.torchrun(2, *flags[:-4], "--num-samples", "1", "--out-dir", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("1 of 1 images are not finite") == 1 and "lost" not in err


def test_what_systems_leave_in_a_folder_is_no_reason_to_refuse_it_and_a_reason_is_named(ddim, checkpoint, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (folder / name).touch()
    flags = ("--sample", checkpoint, *FAST, "--num-samples", "2", "--export", folder)
    assert ddim(*flags, flags=[]).code == 0 and len(list(folder.glob("*.png"))) == 2
    (folder / "notes.txt").touch()
    result = ddim(*flags, flags=[])
    assert result.code == 2 and "it holds notes.txt" in result.err


@pytest.mark.parametrize("name", ["x.npy", "x.NPZ", "x.zip"])
def test_an_export_that_is_neither_an_archive_nor_a_folder_is_explained(ddim, checkpoint, tmp_path, name):
    result = ddim("--sample", checkpoint, "--export", tmp_path / name, flags=[])
    assert result.code == 2 and ".npz" in result.err and "folder" in result.err and not (tmp_path / name).exists()


def test_an_export_folder_that_cannot_be_used_is_refused_before_training(ddim, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    result = ddim("--export", tmp_path / "folder", out_dir=tmp_path / "out")
    assert result.code == 2 and "notes.txt" in result.err and not (tmp_path / "out" / "ddim_model_final.pth").exists()


def test_the_folder_of_exported_weights_can_be_sampled_from(ddim, checkpoint, tmp_path):
    flags = (*FAST, "--num-samples", "2", "--export")
    ddim("--sample", checkpoint, "--export-weights", tmp_path / "weights", *flags, tmp_path / "a.npz", flags=[])
    assert ddim("--sample", tmp_path / "weights", *flags, tmp_path / "b.npz", flags=[]).code == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"])


def test_after_training_with_no_ema_the_weights_themselves_draw(ddim, tmp_path):
    few = ["--num-samples", "2", "--sample-steps", "2", "--precision", "fp32", "--export"]
    ddim("--iterations", "2", "--lr", "1e-2", "--warmup", "0", "--no-ema", *few, tmp_path / "trained.npz")
    for name, flags in (("own", ["--no-ema"]), ("averaged", [])):
        path = tmp_path / f"{name}.npz"
        ddim(
            "--sample",
            tmp_path / "ddim_model_final.pth",
            *flags,
            *few,
            path,
            flags=["--device", "cpu"],
            out_dir=tmp_path / "again",
        )
    names = ("trained", "own", "averaged")
    trained, own, averaged = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in names)
    assert np.abs(trained - own).max() <= 1 < np.abs(trained - averaged).max()
