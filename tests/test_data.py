"""Every image once per pass, everything a function of (seed, position), and files of every kind."""

import hashlib
import io
import pickle
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_cifar

CPU = torch.device("cpu")


def batches(count, batch_size, first, last, seed=0):
    return list(ddim_cifar.batches(count, batch_size, seed, first, last))


def draw_step(n, batch_size=8, timesteps=1000, seed=0, cumulative=None):
    return ddim_cifar.draw_step(n, batch_size, timesteps, seed, CPU, cumulative)


@pytest.fixture
def in_each_of(monkeypatch):
    """in_each_of(size, function): what each of so many processes gets from the function."""

    def call(size, function):
        results = []
        with monkeypatch.context() as patch:
            patch.setattr(ddim_cifar.world, "size", size)
            for rank in range(size):
                patch.setattr(ddim_cifar.world, "rank", rank)
                results.append(function())
        return results

    return call


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (3, 8), (100, 32)])
def test_a_pass_shows_every_image_once_and_short_batches_are_completed_from_the_next(count, batch_size):
    shown = [index for batch in batches(count, batch_size, 0, 3 * count) for index in batch]
    assert len(shown) == 3 * count * batch_size
    passes = [shown[i : i + count] for i in range(0, len(shown) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes) and (count < 7 or passes[0] != passes[1])


def test_the_order_depends_on_seed_and_position_alone(in_each_of):
    whole = batches(10, 4, 0, 9)
    assert whole == batches(10, 4, 0, 5) + batches(10, 4, 5, 9) != batches(10, 4, 0, 9, seed=1)
    halves = in_each_of(2, lambda: batches(10, 4, 0, 9))
    assert [a + b for a, b in zip(*halves)] == whole


def test_draws_depend_on_seed_and_step_alone_and_processes_take_their_share(in_each_of):
    whole = draw_step(5)
    draw_step(6)
    for a, b, other_step, other_seed in zip(whole, draw_step(5), draw_step(6), draw_step(5, seed=1)):
        assert torch.equal(a, b) and not torch.equal(a, other_step) and not torch.equal(a, other_seed)
    shares = in_each_of(4, lambda: draw_step(5))
    assert all(torch.equal(all_of_it, torch.cat(parts)) for all_of_it, parts in zip(whole, zip(*shares)))


def test_draws_are_fair_flips_and_normal_eps():
    flip, _, eps = draw_step(0, batch_size=4000)
    assert 0.45 < flip.float().mean() < 0.55 and abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_each_t_is_uniform_and_a_batch_of_them_evenly_spread(timesteps):
    t = torch.stack([draw_step(n, 10, timesteps)[1] for n in range(600)])
    assert all(row.sort().values.diff().eq(timesteps // 10).all() for row in t)
    counts = torch.stack([torch.bincount(column * 10 // timesteps, minlength=10) for column in t.T])
    assert counts.min() > 30 and counts.max() < 95  # 60 each, give or take 7


def test_t_drawn_by_importance_has_the_density_of_sqrt_alpha_and_is_evenly_spread_too():
    alphas = ddim_cifar.NoiseSchedule().alphas_cumprod
    density = ddim_cifar.t_density(ddim_cifar.NoiseSchedule(), "importance")
    assert torch.allclose(density / density[0], (alphas / alphas[0]).sqrt()) and density.mean().item() == pytest.approx(
        1
    )

    cumulative = density.cumsum(0) / 1000
    t = torch.stack([draw_step(n, 10, cumulative=1000 * cumulative.float())[1] for n in range(1000)])
    found = torch.bincount(t.flatten(), minlength=1000).cumsum(0) / t.numel()
    assert (found - cumulative).abs().max() < 0.01
    before = torch.cat([torch.zeros(1), cumulative[:-1]])
    tenths = torch.arange(10) / 10
    for row in t.sort().values:
        assert ((before[row] - tenths) < 0.1 + 1e-3).all() and ((cumulative[row] - tenths) > -1e-3).all()


def test_a_rare_t_is_drawn_as_often_as_its_density_says_and_not_never():
    cumulative = torch.tensor([1.6, 2.6, 3.6, 4.6, 5.6, 6.6, 7.6, 8.6, 9.6, 10.0])  # the last 0.4 times in 10 draws
    t = torch.stack([draw_step(n, 10, 10, cumulative=cumulative)[1] for n in range(1000)])
    assert 340 < (t == 9).sum() < 460 and 1540 < (t == 0).sum() < 1660


def test_the_loader_fetches_uint8_batches_in_order():
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    order = batches(20, 6, 0, 4)
    loaded = list(ddim_cifar.make_loader(images, order, CPU))
    assert len(loaded) == 4
    assert all(torch.equal(batch, images[torch.tensor(chosen)]) for batch, chosen in zip(loaded, order))


def test_synthetic_images_are_always_the_same_and_differ_from_those_held_out():
    (train, held_out), again = ddim_cifar.load_images("synthetic", None), ddim_cifar.load_images("synthetic", None)
    assert train.dtype == torch.uint8 and train.shape == (10_000, 3, 32, 32)
    assert torch.equal(train, again[0]) and not torch.equal(train[: len(held_out)], held_out)


def picture(mode="RGB", size=(50, 40)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0] * np.uint16(257))
    return Image.fromarray(pixels if mode in ("RGBA", "LA") else pixels[..., :3].copy()).convert(mode)


def test_a_folder_of_images_of_every_kind_is_read(tmp_path):
    (tmp_path / "below").mkdir()
    names = {"a.png": "RGB", "b.png": "L", "c.gif": "P", "below/d.png": "RGBA", "e.png": "LA", "f.jpg": "CMYK"}
    for name, mode in {**names, "g.png": "I;16", "h.bmp": "1", "i.WEBP": "RGB"}.items():
        picture(mode).save(tmp_path / name)
    picture(size=(3000, 20)).save(tmp_path / "wide.jpg")
    picture(size=(1, 1)).save(tmp_path / "small.png")
    (tmp_path / "notes.txt").write_text("no image")
    train, held_out = ddim_cifar.load_images("folder", tmp_path)
    assert len(train) + len(held_out) == 11 and train.shape[1:] == (3, 32, 32) and train.dtype == torch.uint8


def test_a_folder_keeps_what_images_show(tmp_path):
    red_left = np.zeros((32, 32, 3), np.uint8)
    red_left[:, :16] = (255, 0, 0)
    tilted = Image.fromarray(red_left)
    exif = tilted.getexif()
    exif[0x0112] = 3  # taken upside down
    tilted.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(tmp_path / "c.png")
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "d.png")
    (upright, transparent, deep, cropped), _ = ddim_cifar.load_images("folder", tmp_path)
    assert upright[0, 0, 31] == 255 and upright[0, 0, 0] == 0
    assert (transparent == 255).all() and (deep == 128).all() and (cropped[:, :, 2:30] == 255).all()


def test_sixteen_bits_are_divided_by_257_and_rounded(tmp_path):
    for i, value in enumerate((128, 129, 255, 256, 65535 - 129, 65535 - 128)):  # where v >> 8 and v / 257 part
        Image.fromarray(np.full((32, 32), value, np.uint16)).save(tmp_path / f"{i}.png")
    images, _ = ddim_cifar.load_images("folder", tmp_path)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 1, 1, 254, 255]


def test_transparency_of_grey_and_of_palettes_becomes_white(tmp_path):
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "grey.png")
    Image.new("P", (32, 32), 0).save(tmp_path / "palette.gif", transparency=0)
    images, _ = ddim_cifar.load_images("folder", tmp_path)
    assert len(images) == 2 and (images == 255).all()


def test_a_larger_picture_is_averaged_down_without_aliasing(tmp_path):
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "checks.png")
    image = ddim_cifar.load_images("folder", tmp_path)[0].float()
    assert abs(image.mean() - 127.5) < 3 and image.std() < 10


def test_a_broken_image_is_named_and_skipped(tmp_path, capsys):
    picture().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.gif").touch()
    train, _ = ddim_cifar.load_images("folder", tmp_path)
    warnings = capsys.readouterr().err.splitlines()
    assert len(train) == 1 and len(warnings) == 3
    assert all(any(name in line for line in warnings) for name in ("cut.png", "text.jpg", "empty.gif"))


def test_a_folder_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ddim_cifar.UserError, match="none of its 1 image files"):
        ddim_cifar.load_images("folder", tmp_path)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 in the official layout, its md5 sums told to torchvision, and a server that does not answer."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)
    lists = {"train_list": CIFAR10.train_list, "test_list": CIFAR10.test_list}
    for files in lists.values():
        for name, _ in files:
            content = {"data": draw.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0] * 4}
            (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["thing"]}))

    def listed(files):
        return [[name, calculate_md5(str(folder / name))] for name, _ in files]

    for name, files in lists.items():
        monkeypatch.setattr(CIFAR10, name, listed(files))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": calculate_md5(str(folder / "batches.meta"))})

    def silent(*_, **__):
        raise urllib.error.URLError(TimeoutError("timed out"))

    monkeypatch.setattr(urllib.request, "urlopen", silent)
    return folder


def test_cifar10_is_found_where_it_is(cifar10):
    train, test = ddim_cifar.load_images("cifar10", cifar10.parent)
    with open(cifar10 / "data_batch_1", "rb") as file:
        first = pickle.load(file)["data"][0].reshape(3, 32, 32)
    assert len(train) == 20 and len(test) == 4 and np.array_equal(train[0], first)


def test_a_damaged_cifar10_is_named_with_its_md5_and_not_unpickled(cifar10):
    file = cifar10 / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ddim_cifar.UserError) as error:
        ddim_cifar.load_images("cifar10", cifar10.parent)
    assert str(file) in str(error.value) and str(error.value).count("md5") == 1 and "the right one" in str(error.value)


def test_an_archive_cut_short_is_named_with_its_md5(tmp_path, cifar10):
    where = tmp_path / "new"
    where.mkdir()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(cifar10, cifar10.name)
    (where / "cifar-10-python.tar.gz").write_bytes(content.getvalue()[:-100])
    complaint = r"cifar-10-python.tar.gz is corrupt .* its md5 is .* the right one c58f30108f71"
    with pytest.raises(ddim_cifar.UserError, match=complaint):
        ddim_cifar.load_images("cifar10", where)


class Answer(io.BytesIO):
    """What a server answers."""

    url, length = ddim_cifar.CIFAR10_URL, 170498071


class BrokenOff(Answer):
    """The server falls silent in the middle of the archive."""

    def read(self, size=-1):
        content = super().read(size)
        if not content:
            raise TimeoutError("timed out")
        return content


def test_cifar10_is_downloaded(tmp_path, cifar10, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(cifar10, cifar10.name)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.tgz_md5", hashlib.md5(content.getvalue()).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer(content.getvalue()))
    here, there = (ddim_cifar.load_images("cifar10", folder) for folder in (cifar10.parent, tmp_path / "new"))
    assert all(torch.equal(*pair) for pair in zip(here, there))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {cifar10.name, "cifar-10-python.tar.gz"}


def test_a_download_that_breaks_off_leaves_nothing_behind(tmp_path, cifar10, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: BrokenOff(b"half of it"))
    with pytest.raises(ddim_cifar.Offline, match=r"could not be downloaded .*timed out"):
        ddim_cifar.load_images("cifar10", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_real_run_without_cifar10_stops_and_says_what_to_fetch(ddim, tmp_path, cifar10):
    result = ddim("--data-dir", tmp_path / "none", "--epochs", "2", flags=ddim.network)
    (line,) = result.err.splitlines()
    assert result.code == 2
    advice = (ddim_cifar.CIFAR10_URL, "c58f30108f718f92721af3b95e74349a", str(tmp_path / "none"), "--dataset synthetic")
    assert all(words in line for words in advice)


def test_grey_values_are_scaled_by_mode_never_by_content_and_the_others_are_named(tmp_path, capsys):
    for name, value in (("a.png", 256), ("b.png", 255), ("c.png", 65535)):
        Image.fromarray(np.full((32, 32), value, np.uint16)).save(tmp_path / name)
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "d.tif")
    Image.fromarray(np.full((32, 32), 70.0, np.float32)).save(tmp_path / "e.tif")
    Image.fromarray(np.full((32, 32), 200, np.int32)).save(tmp_path / "f.tif")
    images, _ = ddim_cifar.load_images("folder", tmp_path)
    assert images[:, 0, 0, 0].tolist() == [1, 1, 255, 128]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(any(name in line for line in warnings) for name in ("e.tif", "f.tif"))


def test_what_the_program_drew_is_not_trained_on(ddim, tmp_path):
    picture().save(tmp_path / "mine.png")
    assert ddim("--num-samples", "1", "--trajectory", "--export", tmp_path / "samples").code == 0
    assert len(list(tmp_path.rglob("*.png"))) == 4
    assert len(ddim_cifar.load_images("folder", tmp_path)[0]) == 1
    assert len(ddim_cifar.load_images("folder", tmp_path / "samples")[0]) == 1  # unless that is what was asked for


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    picture().save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "images")
    assert len(ddim_cifar.load_images("folder", tmp_path / "images")[0]) == 2
