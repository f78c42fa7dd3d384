"""Every image once per pass, everything a function of (seed, position), and files of every kind."""

import hashlib
import io
import os
import pickle
import socket
import tarfile
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

import ddim_cifar
from ddim_cifar import Config, NoiseSchedule, UserError, hold_out, t_density


def batches(count, batch_size, first, last, seed=0):
    return list(ddim_cifar.batches(count, batch_size, seed, first, last))


def draw_step(n, batch_size=8, timesteps=1000, seed=0, cumulative=None):
    return ddim_cifar.draw_step(n, batch_size, timesteps, seed, torch.device("cpu"), cumulative)


def load_images(**settings):
    return ddim_cifar.load_images(Config(**settings))


def load_folder(folder):
    """Return all images of a folder, in order of names, however they are split: fewer than ten are not."""
    return load_images(dataset=str(folder))[0]


@pytest.fixture
def in_each_of(monkeypatch):
    """Call a function as each of so many processes: in_each_of(size, function) returns what each gets."""

    def call(size, function):
        results = []
        with monkeypatch.context() as patch:
            patch.setattr(ddim_cifar.world, "size", size)
            for rank in range(size):
                patch.setattr(ddim_cifar.world, "rank", rank)
                results.append(function())
        return results

    return call


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 7), (3, 8), (100, 32)])
def test_a_pass_shows_every_image_once_and_short_batches_are_completed_from_the_next(count, batch_size):
    shown = [index for batch in batches(count, batch_size, 0, 3 * count) for index in batch]
    assert len(shown) == 3 * count * batch_size
    passes = [shown[i : i + count] for i in range(0, len(shown) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes) and (count < 7 or passes[0] != passes[1])


def test_batches_and_draws_depend_on_seed_and_step_alone_and_processes_take_their_share(in_each_of):
    whole = batches(10, 4, 0, 9)
    assert whole == batches(10, 4, 0, 5) + batches(10, 4, 5, 9) != batches(10, 4, 0, 9, seed=1)
    assert [a + b for a, b in zip(*in_each_of(2, lambda: batches(10, 4, 0, 9)))] == whole

    whole = draw_step(5)
    draw_step(6)
    for a, b, other_step, other_seed in zip(whole, draw_step(5), draw_step(6), draw_step(5, seed=1)):
        assert torch.equal(a, b) and not torch.equal(a, other_step) and not torch.equal(a, other_seed)
    flip, _, eps = draw_step(0, batch_size=4000)
    assert 0.45 < flip.float().mean() < 0.55 and abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    shares = in_each_of(4, lambda: draw_step(5))
    assert all(torch.equal(all_of_it, torch.cat(parts)) for all_of_it, parts in zip(whole, zip(*shares)))


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_each_t_is_uniform_and_a_batch_of_them_evenly_spread(timesteps):
    t = torch.stack([draw_step(n, 10, timesteps)[1] for n in range(600)])
    assert all(row.sort().values.diff().eq(timesteps // 10).all() for row in t)
    counts = torch.stack([torch.bincount(column * 10 // timesteps, minlength=10) for column in t.T])
    assert counts.min() > 30 and counts.max() < 95  # 60 each, give or take 7


def test_for_v_t_has_the_density_of_sqrt_alpha_and_is_evenly_spread_as_well():
    alphas, density = NoiseSchedule().alphas_cumprod, t_density(NoiseSchedule(), "v")
    assert torch.allclose(density / density[0], (alphas / alphas[0]).sqrt())
    assert density.mean().item() == pytest.approx(1) and (t_density(NoiseSchedule(), "eps") == 1).all()

    cumulative = density.cumsum(0) / 1000
    t = torch.stack([draw_step(n, 10, cumulative=1000 * cumulative.float())[1] for n in range(1000)])
    found = torch.bincount(t.flatten(), minlength=1000).cumsum(0) / t.numel()
    assert (found - cumulative).abs().max() < 0.01
    before = torch.cat([torch.zeros(1), cumulative[:-1]])
    for row in t.sort().values:
        assert ((before[row] - torch.arange(10) / 10) < 0.1 + 1e-3).all()
        assert ((cumulative[row] - torch.arange(10) / 10) > -1e-3).all()


def test_a_rare_t_is_drawn_as_often_as_its_density_says_and_none_beyond_the_last():
    cumulative = torch.tensor([1.6, 2.6, 3.6, 4.6, 5.6, 6.6, 7.6, 8.6, 9.6, 10.0])  # the last 0.4 times in 10 draws
    t = torch.stack([draw_step(n, 10, 10, cumulative=cumulative)[1] for n in range(1000)])
    assert 340 < (t == 9).sum() < 460 and 1540 < (t == 0).sum() < 1660
    rounded_down = torch.linspace(0.9, 9.0, 10)  # as sums in float32 may end
    assert max(draw_step(n, 10, 10, cumulative=rounded_down)[1].max() for n in range(50)) == 9


@pytest.mark.parametrize(("count", "kept"), [(44, (40, 4)), (2_560, (2_304, 256)), (25_600, (25_344, 256))])
def test_every_tenth_image_is_held_out_or_of_many_some_256(count, kept):
    images = torch.arange(count)[:, None]
    train, held_out = hold_out(images)
    assert (len(train), len(held_out)) == kept and torch.equal(torch.cat([train, held_out]).sort(0).values, images)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_a_folder_keeps_what_images_show(tmp_path):
    red_left = np.zeros((32, 32, 3), np.uint8)
    red_left[:, :16] = (255, 0, 0)
    tilted = Image.fromarray(red_left)
    exif = tilted.getexif()
    exif[0x0112] = 3  # taken upside down
    tilted.save(tmp_path / "a.png", exif=exif)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "c.png")
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "d.png")
    Image.new("P", (32, 32), 0).save(tmp_path / "e.gif", transparency=0)
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "f.png")
    upright, cropped, *transparent, averaged = load_folder(tmp_path)
    assert abs(averaged.float().mean() - 127.5) < 3 and averaged.float().std() < 10  # without aliasing
    assert upright[0, 0, 31] == 255 and upright[0, 0, 0] == 0 and (cropped[:, :, 2:30] == 255).all()
    assert len(transparent) == 3 and all((image == 255).all() for image in transparent)


def test_colours_of_an_embedded_profile_become_those_of_srgb(tmp_path):
    """Embed a profile in which red means the green of sRGB, and green its red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    colours = Image.new("RGB", (32, 32), (200, 50, 100))
    for name, embedded in (("a", None), ("b", profile), ("c", swapped), ("d", b"damaged")):
        colours.save(tmp_path / f"{name}.png", icc_profile=embedded)
    colours.convert("RGBA").save(tmp_path / "e.png", icc_profile=swapped)
    Image.new("L", (32, 32), 70).save(tmp_path / "f.png", icc_profile=swapped)  # which is not for grey
    found = load_folder(tmp_path)[:, :, 16, 16].int()
    expected = torch.tensor([[200, 50, 100]] * 2 + [[50, 200, 100], [200, 50, 100], [50, 200, 100], [70, 70, 70]])
    assert (found - expected).abs().max() <= 1


def test_grey_of_no_known_scale_is_skipped(tmp_path, capsys):
    Image.new("L", (32, 32), 70).save(tmp_path / "a.png")
    for name, kind in (("float.tif", np.float32), ("int.tif", np.int32), ("sixteen.png", np.uint16)):
        Image.fromarray(np.full((32, 32), 200, kind)).save(tmp_path / name)
    assert load_folder(tmp_path)[:, 0, 0, 0].tolist() == [70]
    assert "2 unreadable .tif, 1 unreadable .png" in capsys.readouterr().err


def test_what_is_left_out_of_a_folder_is_counted_by_kind_in_one_line(tmp_path, capsys):
    picture().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in (*(f"{n}.gif" for n in range(30)), "one.heic", "two.HEIC", "three.heic", "notes.txt"):
        (tmp_path / name).touch()
    assert len(load_folder(tmp_path)) == 1
    line, few = capsys.readouterr().err.splitlines()
    kinds = ("1 unreadable .png", "30 unreadable .gif", "3 .heic", "1 .txt")
    assert all(words in line for words in (str(tmp_path), *kinds)), line
    assert "too few images" in few

    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match=r"3 \.heic"):
        load_folder(tmp_path)


def test_a_folder_that_cannot_be_entered_is_an_error_and_not_left_out(tmp_path, forbid):
    (tmp_path / "below").mkdir()
    for folder in (tmp_path, tmp_path / "below"):
        picture().save(folder / "a.png")
    forbid(os, "scandir", tmp_path / "below")
    with pytest.raises(UserError, match=r"Permission denied.*below"):
        load_folder(tmp_path)


@pytest.fixture
def server(monkeypatch):
    """Stand in for the server of CIFAR-10: answer with server.content, or not at all if it is None."""
    server = SimpleNamespace(content=None, timeouts=[])

    def answer(*_, timeout=None, **__):
        server.timeouts.append(timeout or socket.getdefaulttimeout())
        if server.content is None:
            raise urllib.error.URLError(TimeoutError("timed out"))
        answer = io.BytesIO(server.content)
        answer.url, answer.length = CIFAR10.url, len(server.content)
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    return server


@pytest.fixture
def cifar10(tmp_path, monkeypatch, server):
    """Write a small CIFAR-10 in the official layout, its md5 sums told to torchvision."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for kind in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, kind)]
        for name in names:
            content = {"data": draw.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0] * 4}
            (folder / name).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(CIFAR10, kind, [[name, calculate_md5(folder / name)] for name in names])
    meta = folder / CIFAR10.meta["filename"]
    meta.write_bytes(pickle.dumps({"label_names": ["thing"]}))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": calculate_md5(meta)})
    return folder


@pytest.fixture
def archive(cifar10, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        file.add(cifar10, cifar10.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content.getvalue()).hexdigest())
    return content.getvalue()


def test_cifar10_is_found_or_downloaded_where_it_is_missing_or_damaged_and_damaged_files_are_not_unpickled(
    tmp_path, cifar10, archive, server
):
    intact = load_images(data_dir=str(cifar10.parent))
    with open(cifar10 / "data_batch_1", "rb") as file:
        first = pickle.load(file)["data"][0].reshape(3, 32, 32)
    assert [len(images) for images in intact] == [20, 4] and np.array_equal(intact[0][0], first)
    assert torch.equal(load_images(data_dir=str(cifar10))[0], intact[0])  # by the name of its own folder
    damaged = cifar10 / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / CIFAR10.filename).write_bytes(archive)
    for folder, answers in ((cifar10.parent, archive), (tmp_path / "new", archive), (tmp_path / "brought", None)):
        server.content = answers
        found = load_images(data_dir=str(folder))
        assert all(torch.equal(*pair) for pair in zip(intact, found)), folder
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {cifar10.name, CIFAR10.filename}
    assert server.timeouts and max(server.timeouts) <= 30  # a server that is silent for longer counts as none


def test_a_download_that_breaks_off_leaves_nothing_behind_and_the_error_says_what_to_fetch(
    ddim, tmp_path, cifar10, archive, server
):
    server.content = archive[:-100]
    damaged = cifar10 / "data_batch_3"
    damaged.write_bytes(b"of half the length")
    for folder in (tmp_path / "new", cifar10.parent):
        before = {path.name for path in folder.rglob("*")}
        result = ddim("--data-dir", folder, "--epochs", "2", flags=ddim.network)
        (line,) = result.err.splitlines()[-1:]
        advice = (CIFAR10.url, CIFAR10.tgz_md5, str(folder), "--dataset synthetic")
        assert result.code == 2 and all(words in line for words in advice), line
        assert {path.name for path in folder.rglob("*") if path.is_file()} <= before


def test_nothing_is_downloaded_among_photographs(ddim, tmp_path, server):
    picture().save(tmp_path / "photo.JPG")
    result = ddim("--data-dir", tmp_path, flags=ddim.network, out_dir=tmp_path / "run")
    (line,) = result.err.splitlines()
    assert result.code == 2 and f"--dataset {tmp_path}" in line and not server.timeouts
