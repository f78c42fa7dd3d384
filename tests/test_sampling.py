"""Pictures: the same image for the same number, nothing half-written; the paper's experiments; diffusers' networks."""

import json
import math
import os
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import nn

import ddim_cifar
from ddim_cifar import Config, NoiseSchedule, Sampler, UserError, load_model, save_grid, to_uint8

FAST = ["--sample-steps", "3", "--precision", "fp32"]
TWO = ["--num-samples", "2"]


class Zero(nn.Module):
    """See no noise: sampling and encoding only scale."""

    def forward(self, x, t):
        return torch.zeros_like(x)


def sampler_of(model, **settings):
    return Sampler(model, NoiseSchedule(), Config(predict="eps", device="cpu", **settings))


@pytest.fixture
def export(ddim, checkpoint, tmp_path):
    """Sample from the checkpoint or another, by export(name, *flags), and return the exported images."""

    def run(name, *flags, path=checkpoint):
        result = ddim("--sample", path, *FAST, "--export", tmp_path / name, *flags, flags=ddim.device)
        assert result.code == 0 and "next:" not in result.out, result.err
        return read(tmp_path / name)

    return run


def read(path):
    """Return the images of an archive or folder, uint8 [N, 32, 32, 3]."""
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])


def largest(one, other):
    """Return the largest difference of uint8 images."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()


def others(folder):
    """Return the names of what a folder holds beside grids of samples."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("ddim_samples")}


def test_an_image_is_the_same_whatever_else_is_asked_for_and_every_sampling_flag_changes_it(export):
    many = export("a.npz", "--num-samples", "10")
    few = export("b.npz", "--num-samples", "4", "--micro-batch", "3")
    assert len({image.tobytes() for image in many}) == 10 and largest(many[:4], few) <= 1
    assert largest(export("c.npz", *TWO, "--seed", "1"), few[:2]) > 50
    random = export("d.npz", "--num-samples", "3", "--eta", "1")
    assert largest(random[:2], export("e.npz", *TWO, "--eta", "1", "--micro-batch", "1")) <= 1
    assert largest(random, few[:3]) > 20
    for i, flags in enumerate((["--no-ema"], ["--order", "2"], ["--sample-steps", "4"], ["--tau", "uniform"])):
        assert not np.array_equal(few[:2], export(f"{i}.npz", *TWO, *flags)), flags
    assert largest(few[:2], export("several.npz", *TWO, "--sample-steps", "5", "3")) <= 1  # the last counts
    sampler, nothing = sampler_of(Zero(), eta=1.0), torch.zeros(2, 3, 32, 32)
    noise = sampler.sample([0, 1], 4, nothing)
    assert (noise[0] - noise[1]).abs().mean() > 0.01
    torch.testing.assert_close(sampler.sample([1], 4, nothing[:1]), noise[1:])


def test_a_sampler_draws_without_dropout_and_fills_up_the_last_batch_of_a_compiled_network():
    sampler, sizes = sampler_of(nn.Dropout(0.5).train(), micro_batch=4), []
    sampler.is_compiled = True  # which a new size would compile anew

    def double(chunk):
        sizes.append(len(chunk))
        return 2 * torch.tensor(chunk)[:, None]

    doubled = ddim_cifar.compute(sampler, 7, double, 1, "").flatten().tolist()
    assert doubled == [0, 2, 4, 6, 8, 10, 12] and sizes == [4, 4]
    assert not sampler.model.training


def test_after_training_and_on_the_way_the_averaged_weights_draw_unless_told_otherwise(ddim, tmp_path):
    fast = ["--iterations", "2", "--save-every", "1", "--lr", "1e-2", "--warmup", "0", "--batch-size", "2"]
    assert ddim(*fast, "--export", tmp_path / "x").code == 0
    assert len(read(tmp_path / "x")) == 16 and not (tmp_path / "x-earlier-1").exists()  # filled at the end only
    ddim(*fast, *TWO, "--no-ema", out_dir=tmp_path / "no_ema")

    def drawn(*flags):
        flags = ["--sample-steps", "2", "--precision", "fp32", *flags]
        ddim("--sample", tmp_path, *flags, flags=ddim.device, out_dir=tmp_path / "again")
        return np.asarray(Image.open(tmp_path / "again" / "ddim_samples.png"))

    averaged, own = drawn(), drawn("--no-ema")
    for name in ("ddim_samples.png", "ddim_samples_epoch_1.png"):
        picture = np.asarray(Image.open(tmp_path / name))
        assert largest(picture, averaged) <= 1 < largest(picture, own), name
    assert largest(Image.open(tmp_path / "no_ema" / "ddim_samples.png"), drawn("--no-ema", *TWO)) <= 1


def test_a_folder_holds_the_images_of_the_archive_and_one_that_is_there_is_set_aside(ddim, export, tmp_path):
    folder = tmp_path / "folder"
    five = export("folder", "--num-samples", "5")
    assert np.array_equal(five, export("x.npz", "--num-samples", "5"))
    os.truncate(folder / "00003.png", 100)  # which must not matter
    (folder / "notes.txt").touch()
    assert largest(export("folder", *TWO), five[:2]) <= 1
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    export("folder", *TWO, "--seed", "1")
    assert {path.name for path in (tmp_path / "folder-earlier-1").iterdir()} >= {"00004.png", "notes.txt"}
    assert largest(read(tmp_path / "folder-earlier-2"), five[:2]) <= 1
    assert others(tmp_path) == {"folder", "folder-earlier-1", "folder-earlier-2", "x.npz"}


def test_an_archive_holds_all_images_a_grid_256_and_without_export_no_more_are_drawn(ddim, checkpoint, tmp_path):
    sampler = sampler_of(Zero(), sample_steps=(1,), num_samples=257, export=str(tmp_path / "x.npz"))
    ddim_cifar.save_samples(sampler, tmp_path / "grid.png", 257, str(tmp_path / "x.npz"))
    images = read(tmp_path / "x.npz")
    assert len(images) == 257 and Image.open(tmp_path / "grid.png").width < 17 * 34
    assert largest(images[256], to_uint8(sampler.sample([256], 1))[0].permute(1, 2, 0)) <= 1
    result = ddim("--sample", checkpoint, "--sample-steps", "1", "--num-samples", "300", flags=ddim.device)
    assert result.code == 0 and Image.open(tmp_path / "ddim_samples.png").width < 17 * 34


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_an_export_is_complete_or_absent(ddim, checkpoint, tmp_path, monkeypatch, export, name):
    """Fill the disk at the last image. What was there before is as it was."""
    before = export(name, *TWO)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: full() if "00001" in str(a[1]) else save(*a, **k))
    monkeypatch.setattr(np, "savez", full)
    flags = [*FAST, *TWO, "--seed", "1", "--export", tmp_path / name]
    result = ddim("--sample", checkpoint, *flags, flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and "No space left" in line
    assert others(tmp_path) == {name} and np.array_equal(read(tmp_path / name), before)


def test_an_export_is_written_although_its_grid_cannot_be(ddim, checkpoint, tmp_path):
    (tmp_path / "ddim_samples.png").mkdir()
    result = ddim("--sample", checkpoint, *FAST, *TWO, "--export", tmp_path / "x.npz", flags=ddim.device)
    assert result.code == 2 and "ddim_samples.png" in result.err and len(read(tmp_path / "x.npz")) == 2


@pytest.mark.parametrize("count, side", [(2, 2), (5, 3), (16, 4), (17, 5)])
def test_the_grid_is_square_and_keeps_every_pixel(count, side):
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    sheet = np.asarray(ddim_cifar.draw_grid(images))
    scale = (sheet.shape[1] - 2 - 2 * side) // (32 * side)  # of images parted by two pixels
    pitch = 32 * scale + 2
    assert scale >= 1 and sheet.shape[1] == 2 + side * pitch
    row, column = divmod(count - 1, side)
    tile = sheet[2 + row * pitch :, 2 + column * pitch :][: 32 * scale : scale, : 32 * scale : scale]
    assert np.array_equal(tile, images[-1].permute(1, 2, 0))


def test_the_name_of_a_grid_decides_its_format_and_floats_are_images(tmp_path):
    images = torch.rand(4, 3, 32, 32) * 2.4 - 1.2  # as ddim_sample returns them
    for name, begins in (("x.png", b"\x89PNG"), ("x.jpg", b"\xff\xd8\xff"), ("x.PDF", b"%PDF")):
        save_grid(images, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)
    save_grid(to_uint8(images), str(tmp_path / "y.png"))
    assert largest(Image.open(tmp_path / "x.png"), Image.open(tmp_path / "y.png")) == 0
    with pytest.raises(ValueError, match=r"\.txt"):
        save_grid(images, tmp_path / "x.txt")


def table(out):
    """Return the numbers that an experiment printed: [(S, number), ...]."""
    rows = re.findall(r"^\s*(?:S = )?(\d+)\s+(\d[\d.e-]*)", out, re.MULTILINE)
    return [(int(steps), float(number)) for steps, number in rows]


@pytest.fixture
def grids(monkeypatch):
    """Keep the arguments of every grid that is drawn, by the name of its file: (images, column labels)."""
    drawn = {}

    def save(images, path, column_labels=(), **_):
        drawn[path.name] = to_uint8(images) if images.is_floating_point() else images, column_labels

    monkeypatch.setattr(ddim_cifar, "save_grid", save)
    return drawn


def test_the_experiments_draw_their_pictures_from_images_that_were_held_out(ddim, checkpoint, tmp_path, monkeypatch):
    seen, original = [], ddim_cifar.reconstruction
    monkeypatch.setattr(ddim_cifar, "reconstruction", lambda *both: (seen.append(both[1]), original(*both)))
    flags = ["--experiments", *ddim_cifar.EXPERIMENTS, "--sample-steps", "2", "4", "--num-samples", "2"]
    result = ddim("--sample", checkpoint, *flags, "--precision", "fp32", flags=ddim.device)
    assert result.code == 0, result.err
    pictures = [f"ddim_{name}.png" for name in ("samples", *ddim_cifar.EXPERIMENTS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*pictures, "ddim_trajectory.gif"])
    assert all(str(tmp_path / name) in result.out for name in pictures)
    with Image.open(tmp_path / "ddim_trajectory.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
    numbers = table(result.out)
    assert [S for S, _ in numbers] == [2, 4, 2, 4] and [error > 0 for _, error in numbers].count(False) == 1
    assert torch.equal(seen[0], ddim_cifar.load_images(Config(dataset=ddim.images))[1])


@pytest.mark.parametrize("steps", [4, 50])
def test_the_trajectory_goes_from_the_noise_through_ever_lower_t(grids, tmp_path, steps):
    class Clock(nn.Module):
        """Predict that x_0 is t / 1000 everywhere."""

        def forward(self, x, t):
            signal_scale, noise_scale = NoiseSchedule().scales(x, t)
            return (x - signal_scale * t.view(-1, 1, 1, 1) / 1000) / noise_scale

    sampler = sampler_of(Clock(), num_samples=2, sample_steps=(steps,), out_dir=str(tmp_path))
    ddim_cifar.trajectory(sampler, None)
    images, labels = grids["ddim_trajectory.png"]
    assert len(labels) == min(11, steps + 1) and labels[0] == "x_T"
    shown = [int(label.removeprefix("t=")) for label in labels[1:]]
    assert shown == sorted(shown, reverse=True) and shown[-1] == sampler.tau(steps)[0]
    images = images.unflatten(0, (2, len(labels)))
    assert torch.equal(images[:, 0], to_uint8(sampler.x_T([0, 1])))
    expected = to_uint8(torch.tensor(shown) / 1000).view(1, -1, 1, 1, 1)
    assert largest(images[:, 1:], expected.expand_as(images[:, 1:])) <= 1


def test_the_reconstruction_error_is_the_mean_square_on_0_to_1(tmp_path, capfd):
    """Let eps be the same for each image, and rise with t: encoding and decoding differ by a known sum."""

    class Rising(nn.Module):
        def forward(self, x, t):
            return (1e-4 * t.view(-1, 1, 1, 1)).expand_as(x)

    sampler = sampler_of(Rising(), sample_steps=(5, 10), out_dir=str(tmp_path))
    capfd.readouterr()
    ddim_cifar.reconstruction(sampler, ddim_cifar.draw_shapes(3, seed=0))
    for (S, error), steps in zip(table(capfd.readouterr().out), (5, 10), strict=True):
        tau, sigma = sampler.tau(steps), sampler.schedule.noise_ratio
        off = sum(1e-4 * (t - before) * (sigma(t) - sigma(before)) for before, t in pairwise(tau))
        assert steps == S and error == pytest.approx((off / 2) ** 2, rel=1e-2)


def test_the_distance_of_consistency_is_that_of_the_final_images_on_0_to_1(grids, tmp_path, capfd):
    """Compute x_0 of a network that sees no noise: x_T over the root of alpha, at the last of the steps."""
    sampler = sampler_of(Zero(), tau="uniform", num_samples=2, sample_steps=(2, 4, 8), out_dir=str(tmp_path))
    capfd.readouterr()
    ddim_cifar.consistency(sampler, None)
    alphas = [sampler.schedule.alpha(1000 - 1000 // S) for S in (2, 4, 8)]
    ends = [(sampler.x_T([0, 1]) / math.sqrt(alpha)).clamp(-1, 1) for alpha in alphas]
    steps, distances = zip(*table(capfd.readouterr().out))
    expected = [((end - ends[-1]) / 2).square().mean().item() for end in ends]
    assert steps == (2, 4, 8) and distances == pytest.approx(expected, rel=1e-2)
    assert distances[0] > distances[1] > distances[2] == 0

    images, labels = grids["ddim_consistency.png"]
    assert labels == ["S=2", "S=4", "S=8"]
    assert largest(images, to_uint8(torch.stack(ends, dim=1)).flatten(0, 1)) <= 1


def test_interpolation_goes_along_the_sphere_of_noise_from_a_sample_to_the_next(grids, tmp_path):
    class Recorder(Zero):
        def forward(self, x, t):
            self.seen = x
            return super().forward(x, t)

    sampler = sampler_of(Recorder(), num_samples=4, sample_steps=(1,), out_dir=str(tmp_path))
    ddim_cifar.interpolation(sampler, None)
    seen = sampler.model.seen
    assert len(seen) == 22 and (seen.std((1, 2, 3)) - 1).abs().max() < 0.05
    rows = grids["ddim_interpolation.png"][0].unflatten(0, (2, 11))
    assert largest(rows[:, [0, -1]].flatten(0, 1), to_uint8(sampler.sample(range(4), 1))) <= 1


OURS = {  # of its UNet2DModel, as google/ddpm-cifar10-32 has them
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
X, T = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


@pytest.fixture
def publish(tmp_path):
    """Let diffusers write a pipeline with these keys beside OURS to tmp_path / "d", by publish(keys, scheduler)."""

    def write(keys=(), scheduler=()):
        torch.manual_seed(0)
        unet = UNet2DModel(**{**OURS, **dict(keys)}).eval()
        for parameter in unet.parameters():  # no part of it is without effect
            nn.init.normal_(parameter, std=0.05)
        pipeline = DDIMPipeline(unet, DDIMScheduler(**dict(scheduler)))
        pipeline.save_pretrained(tmp_path / "d")
        return pipeline

    return write


def assert_same_function(path, pipeline):
    """Compare eps of load_model with that of diffusers' network and scheduler."""
    model, schedule = load_model(path)
    alphas = pipeline.scheduler.alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod.float(), alphas, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        eps, output = model(X, T), pipeline.unet(X, T).sample
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        alpha = alphas[T].view(-1, 1, 1, 1)
        output = alpha.sqrt() * output + (1 - alpha).sqrt() * X
    torch.testing.assert_close(eps, output, rtol=0, atol=1e-4)


PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
BETAS = np.linspace(0.0001, 0.03, 1000).tolist()


@pytest.mark.parametrize(
    "keys, scheduler, is_ours",
    [
        *[({key: value}, {}, False) for key, value in {
            "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "attention_head_dim": 8,
            "norm_eps": 1e-5, "norm_num_groups": 16, "act_fn": "gelu", "resnet_time_scale_shift": "scale_shift",
            "center_input_sample": True, "time_embedding_type": "fourier", "mid_block_scale_factor": 2.0,
            "add_attention": False, "attn_norm_num_groups": 8, "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "block_out_channels": (64, 96), "sample_size": 64,
        }.items()],
        *[({}, {key: value}, False) for key, value in {
            "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.001, "beta_end": 0.01,
            "num_train_timesteps": 500, "trained_betas": BETAS, "rescale_betas_zero_snr": True,
        }.items()],
        (PLAIN, {"clip_sample": False, "steps_offset": 1}, True),
        ({"layers_per_block": 2, "dropout": 0.3}, {"prediction_type": "v_prediction"}, True),
        ({"block_out_channels": (32, 96)}, {}, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_network_or_scheduler_of_diffusers_is_refused_by_the_key_that_differs_or_computed_alike(
    publish, tmp_path, keys, scheduler, is_ours
):
    pipeline = publish(keys, scheduler)
    if is_ours:
        return assert_same_function(tmp_path / "d", pipeline)
    (key,) = {**keys, **scheduler}
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'd'))}.*\b{key}\b") as caught:
        load_model(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_absent_keys_have_the_defaults_of_diffusers(publish, tmp_path):
    pipeline = publish()

    def drop(name, key):
        path = tmp_path / "d" / name
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))

    drop("scheduler/scheduler_config.json", "beta_start")
    drop("unet/config.json", "act_fn")
    assert_same_function(tmp_path / "d", pipeline)
    scheduler = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        load_model(tmp_path / "d")
    scheduler.unlink()
    drop("unet/config.json", "freq_shift")  # whose default is 0 there
    with pytest.raises(UserError, match="freq_shift"):
        load_model(tmp_path / "d")
    (tmp_path / "d" / "unet" / "config.json").write_text("{")
    for path in (tmp_path / "d", tmp_path / "d" / "scheduler", tmp_path / "d" / "unet" / "config.json"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_model(path)


@pytest.mark.parametrize("form", ["fp16", "sharded", "root", "prefixed", "old names"])
def test_published_weights_are_found_in_each_form_in_which_they_are_published(publish, tmp_path, form):
    pipeline, folder = publish(), tmp_path / "x"
    unet, path = pipeline.unet, folder
    if form == "fp16":
        unet.half().save_pretrained(folder / "unet", variant="fp16")
        unet.float()
    elif form == "sharded":
        unet.save_pretrained(folder / "unet", max_shard_size="1MB")
        assert len(list(folder.glob("unet/*.safetensors"))) > 1
    else:
        unet.save_pretrained(folder)
    if form in ("prefixed", "old names"):
        path = folder / "weights.pt"
        renamed = {f"module._orig_mod.{name}": value for name, value in unet.state_dict().items()}
        for new, old in OLD_NAMES.items() if form == "old names" else ():
            renamed = {name.replace(new, old): value for name, value in renamed.items()}
        torch.save(renamed, path)
    assert_same_function(path, pipeline)


@pytest.mark.parametrize("path", [".", "diffusion_pytorch_model.safetensors"])
def test_the_scheduler_is_found_from_inside_the_folder_of_the_weights(publish, tmp_path, monkeypatch, path):
    pipeline = publish(scheduler={"prediction_type": "v_prediction"})
    monkeypatch.chdir(tmp_path / "d" / "unet")
    assert_same_function(path, pipeline)


def test_what_is_typed_must_not_contradict_the_scheduler(publish, tmp_path, ddim):
    publish()
    result = ddim("--sample", tmp_path / "d", "--predict", "v", flags=ddim.device)
    (line,) = result.err.splitlines()
    assert result.code == 2 and "--predict v" in line
    shutil.rmtree(tmp_path / "d" / "scheduler")  # nothing says what they predict: DDPM's eps
    assert ddim_cifar.parse_args(["--sample", str(tmp_path / "d")])[0].predict == "eps"


def test_the_folder_for_diffusers_draws_here_what_its_checkpoint_draws_and_holds_no_older_weights(export, tmp_path):
    weights = tmp_path / "weights"
    (weights / "unet").mkdir(parents=True)
    for old in ("fp16.safetensors", "safetensors.index.json", "bin"):
        (weights / "unet" / f"diffusion_pytorch_model.{old}").write_text("{}")
    ours = export("x.npz", *TWO, "--export-weights", weights)
    names = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in (weights / "unet").iterdir()) == names
    assert np.array_equal(ours, export("again.npz", *TWO, path=weights))
