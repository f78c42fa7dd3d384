"""Pictures: the same image for the same number, exact counts, nothing half-written, and the paper's experiments."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import ddim_cifar

FAST = ["--sample-steps", "3", "--precision", "fp32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A few steps at a high rate, so that averaged and own weights, and all images, differ."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--iterations", "20", "--lr", "2e-3", "--warmup", "0", "--out-dir", str(folder)]
    assert ddim_cifar.main(flags) == 0
    return folder / "ddim_model_final.pth"


@pytest.fixture
def export(ddim, checkpoint, tmp_path):
    def run(name, *flags):
        result = ddim("--sample", checkpoint, *FAST, "--export", tmp_path / name, *flags, flags=[])
        assert result.code == 0, result.err
        if name.endswith(".npz"):
            return np.load(tmp_path / name)["arr_0"]
        return np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("*.png"))])

    return run


def test_an_image_is_the_same_whatever_else_is_asked_for(export):
    many = export("a.npz", "--num-samples", "10").astype(int)
    few = export("b.npz", "--num-samples", "4", "--sample-batch-size", "3").astype(int)
    assert len({image.tobytes() for image in many}) == 10 and np.abs(many[:4] - few).max() <= 1
    assert np.abs(export("c.npz", "--num-samples", "4", "--seed", "1") - few).max() > 50


def test_random_steps_are_the_same_whatever_else_is_asked_for(export):
    many = export("a.npz", "--num-samples", "6", "--eta", "1").astype(int)
    assert np.abs(many[:2] - export("b.npz", "--num-samples", "2", "--eta", "1")).max() <= 1
    assert np.abs(many[:2] - export("c.npz", "--num-samples", "2")).max() > 20


def test_every_sampling_flag_changes_the_picture(export):
    plain = export("plain.npz", "--num-samples", "2")
    switches = (["--no-ema"], ["--clip-x0"], ["--standardize-noise"])
    for i, flags in enumerate((*switches, ["--order", "2"], ["--tau", "uniform"], ["--tau", "karras"], ["--sample-steps", "4"])):
        assert not np.array_equal(plain, export(f"{i}.npz", "--num-samples", "2", *flags)), flags


def test_standardized_noise_has_mean_0_and_variance_1_in_each_channel():
    args, _ = ddim_cifar.parse_args(["--standardize-noise"])
    run = ddim_cifar.Run(torch.device("cpu"), None, "fp32", "off", None)
    x_T = ddim_cifar.Sampler(torch.nn.Identity(), ddim_cifar.NoiseSchedule(), args, run).noise([0, 7])
    torch.testing.assert_close(x_T.mean((2, 3)), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x_T.std((2, 3)), torch.ones(2, 3))


def test_rounding_the_weights_once_is_what_autocast_does_each_time():
    torch.manual_seed(0)
    model = ddim_cifar.UNet(channels=32, channel_mults=(1, 2), res_blocks=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, t), ddim_cifar.bf16_layers(model)(x, t))
    assert model.conv_in.weight.dtype == torch.float32


def test_a_folder_holds_the_images_of_the_archive(export, tmp_path):
    assert np.array_equal(export("folder", "--num-samples", "5"), export("x.npz", "--num-samples", "5"))
    assert len(list((tmp_path / "folder").glob("*.png"))) == 5


def test_a_stopped_folder_export_goes_on(export, tmp_path):
    whole = export("folder", "--num-samples", "5")
    kept = tmp_path / "folder" / "00001.png"
    for name in ("00003.png", "00004.png"):
        (tmp_path / "folder" / name).unlink()
    (tmp_path / "folder" / "unfinished.tmp").touch()
    before = kept.stat().st_mtime_ns
    again = export("folder", "--num-samples", "5")
    assert np.abs(whole.astype(int) - again).max() <= 1 and kept.stat().st_mtime_ns == before
    assert len(export("folder", "--num-samples", "7")) == 7 and not (tmp_path / "folder" / "unfinished.tmp").exists()


def test_a_folder_never_mixes_origins(ddim, export, checkpoint, tmp_path):
    export("folder", "--num-samples", "3")
    for flags in (["--num-samples", "2"], ["--num-samples", "3", "--seed", "1"], ["--num-samples", "3", "--no-ema"]):
        result = ddim("--sample", checkpoint, *FAST, "--export", tmp_path / "folder", *flags, flags=[])
        assert result.code == 2 and "folder" in result.err and len(list((tmp_path / "folder").glob("*.png"))) == 3


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


def test_the_experiments_draw_their_pictures(ddim, checkpoint, tmp_path):
    flags = ("--trajectory", "--interpolate", "--reconstruct", "--consistency", "--sample-steps", "2", "4", "--num-samples", "4")
    result = ddim("--sample", checkpoint, *flags, "--precision", "fp32", flags=[])
    assert result.code == 0, result.err
    names = {
        "ddim_trajectory.gif",
        *(f"ddim_{name}.png" for name in ("samples", "trajectory", "interpolation", "reconstruction", "consistency")),
    }
    assert {path.name for path in tmp_path.iterdir()} == {*names, "ddim_reconstruction.csv", "ddim_consistency.csv"}
    with Image.open(tmp_path / "ddim_trajectory.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
    header, *rows = (tmp_path / "ddim_reconstruction.csv").read_text().splitlines()
    assert header == "steps,error,paper" and [row.split(",")[0] for row in rows] == ["2", "4"]
    header, *rows = (tmp_path / "ddim_consistency.csv").read_text().splitlines()
    assert header == "steps,distance" and [float(row.split(",")[1]) > 0 for row in rows] == [True, False]


def test_experiments_use_the_paper_s_step_counts_by_default():
    args = ddim_cifar.parse_args(["--reconstruct"])[0]
    assert args.compared_steps == [10, 20, 50, 100] and args.sample_steps == [50]
    assert ddim_cifar.parse_args(["--reconstruct", "--sample-steps", "50"])[0].compared_steps == [50]


def test_interpolation_ends_in_the_samples_themselves(export, ddim, checkpoint, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(ddim_cifar, "save_grid", lambda images, path, **layout: drawn.update({path.name: images}))
    export("x.npz", "--num-samples", "4", "--interpolate")
    samples, rows = drawn["ddim_samples.png"].int(), drawn["ddim_interpolation.png"].unflatten(0, (2, 11)).int()
    assert (rows[:, [0, -1]].flatten(0, 1) - samples).abs().max() <= 1


def test_our_weights_are_written_for_diffusers_and_published_weights_are_read(ddim, checkpoint, tmp_path):
    pipeline = pytest.importorskip("diffusers").DDIMPipeline
    tail = ("--sample-steps", "5", "--tau", "uniform", "--precision", "fp32", "--num-samples", "2")
    ddim("--sample", checkpoint, *tail, "--export", tmp_path / "ours.npz", "--export-weights", tmp_path / "weights", flags=[])
    loaded = pipeline.from_pretrained(tmp_path / "weights", use_safetensors=False)
    loaded.unet.save_pretrained(tmp_path / "published")
    result = ddim(
        "--sample", tmp_path / "published" / "diffusion_pytorch_model.safetensors", *tail, "--export", tmp_path / "theirs.npz", flags=[]
    )
    assert result.code == 0, result.err
    assert np.array_equal(np.load(tmp_path / "ours.npz")["arr_0"], np.load(tmp_path / "theirs.npz")["arr_0"])
    assert json.loads((tmp_path / "weights" / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    result = ddim("--resume", tmp_path / "published" / "diffusion_pytorch_model.safetensors", flags=[])
    assert result.code == 2 and "--sample" in result.err
