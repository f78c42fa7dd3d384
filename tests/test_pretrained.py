"""The trained model that comes with the program draws the same pictures, predicts as well and inverts as well as ever.

pretrained.png holds, side by side, the first four samples of seed 0 in 20 steps, and the first eight test images of
CIFAR-10.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cifar import Config, ddim_encode, ddim_sample, ddim_timesteps, held_out_loss, load_model, to_float

WEIGHTS = Path(__file__).with_name("pretrained.pth")
HELD_OUT_LOSS = 0.04437  # of the eight test images
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def strip():
    """Return the tiles of pretrained.png, uint8 [12, 3, 32, 32]."""
    pixels = np.array(Image.open(WEIGHTS.with_suffix(".png")))
    return torch.from_numpy(pixels).unflatten(1, (12, 32)).permute(1, 3, 0, 2)


@pytest.fixture(scope="module")
def trained():
    return load_model(WEIGHTS)


def test_it_draws_the_stored_pictures(ddim, strip, tmp_path):
    flags = ["--sample", WEIGHTS, "--num-samples", "4", "--sample-steps", "20", "--precision", "fp32"]
    assert ddim(*flags, "--export", tmp_path / "x.npz", flags=ddim.device).code == 0
    drawn = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2)
    difference = (drawn.int() - strip[:4].int()).abs()
    assert difference.max() <= 8 and difference.float().mean() < 0.5


def test_its_held_out_loss_is_the_stored_one(trained, strip):
    predictor, _ = trained
    assert held_out_loss(predictor, strip[4:], Config(device="cpu")) == pytest.approx(HELD_OUT_LOSS, rel=1e-3)


def test_encoding_and_decoding_give_test_images_back(trained, strip):
    model, schedule = trained
    x_0, errors = to_float(strip[4:6]), []
    for steps in (5, 10):
        tau = ddim_timesteps(1000, steps, "quadratic")
        x_T = ddim_encode(model, x_0, schedule, tau)
        assert 0.8 < x_T.std() < 1.1  # nearly the noise that sampling starts from
        errors.append(((ddim_sample(model, x_T, schedule, tau) - x_0) / 2).square().mean().item())
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.02
