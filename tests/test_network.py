"""The UNet, against diffusers' implementation of the same network, in memory and through files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import nn

import ddim_cifar
from ddim_cifar import Config, GroupNorm, NoiseSchedule, UNet

DEFAULT = Config()
SMALL = Config(channels=32, channel_mults=(1, 2), res_blocks=1, attn_resolutions=(32, 16))
UNEVEN = Config(channels=64, channel_mults=(1, 3, 2), res_blocks=2, attn_resolutions=(8,))
WITHOUT_ATTENTION = Config(channels=32, channel_mults=(1, 1, 2, 4), res_blocks=1, attn_resolutions=())


def build(config, **others):
    return UNet(**{**config.of(ddim_cifar.UNET), **others})


@torch.no_grad()
def randomise(model, first_features=1.0):
    """Make every weight random, also those that start at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
        parameter.copy_(noise if parameter.ndim > 1 else 0.3 * noise + ("norm" in name and name.endswith("weight")))
    model.conv_in.weight *= first_features
    model.conv_in.bias *= first_features
    return model.eval().requires_grad_(False)


def images_and_times(n=2, side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, side, side, generator=generator), torch.tensor([0, 999, 37, 500])[:n]


def diffusers_twin(config, folder):
    """Build diffusers' network as export_weights describes it, with weights of its own."""
    ddim_cifar.export_weights(folder, nn.Module(), config)
    return UNet2DModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return UNet()


@pytest.fixture(scope="module")
def small():
    return randomise(build(SMALL))


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_the_time_embedding_is_sines_then_cosines_of_geometric_frequencies(dim):
    t = torch.tensor([0, 1, 10, 500, 999, 3999])
    embedding = ddim_cifar.sinusoidal_embedding(t, dim)
    assert embedding.shape == (6, dim) and embedding.dtype == torch.float32
    for row, step in zip(embedding.tolist(), t.tolist()):
        angles = [step * 10000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(expected, rel=0, abs=3e-7 * (step + 1))


def test_the_default_network_has_the_parameters_of_ddpm_and_returns_zero_at_first(fresh):
    assert sum(parameter.numel() for parameter in fresh.parameters()) == 35_746_307
    with torch.inference_mode():
        output = fresh.eval()(torch.randn(1, 3, 32, 32), torch.tensor([500]))
    assert output.shape == (1, 3, 32, 32) and output.count_nonzero() == 0


def test_last_layers_of_branches_start_at_zero_and_others_uniform_with_variance_one_over_the_mean_fan(fresh):
    for name, module in fresh.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.bias.count_nonzero() == 0
            if name.endswith(("conv2", "to_out.0", "conv_out")):
                assert module.weight.count_nonzero() == 0, name
            else:
                std = math.sqrt(2 / (module.weight[0].numel() + module.weight[:, 0].numel()))
                assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
                assert 0.99 * math.sqrt(3) * std < module.weight.abs().max() <= math.sqrt(3) * std, name


@pytest.mark.parametrize(
    ("config", "first_features"),
    [(DEFAULT, 1.0), (SMALL, 1.0), (UNEVEN, 1.0), (WITHOUT_ATTENTION, 1.0), (SMALL, 1e-3), (UNEVEN, 1e-3)],
    ids=["default", "small", "uneven", "without attention", "small, eps", "uneven, eps"],
)  # the small features are where the eps of GroupNorm counts
def test_the_output_is_that_of_diffusers_with_the_same_weights(config, first_features, tmp_path):
    ours, theirs = randomise(build(config), first_features), diffusers_twin(config, tmp_path).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t = images_and_times()
    with torch.inference_mode():
        output, expected = ours(x, t), theirs(x, t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("offset", "scale", "most"), [(0, 1, 1e-5), (0, 1e-3, 1e-5), (30, 1, 2e-3)])
def test_group_norm_by_channels_is_that_of_torch_in_float64_with_its_gradients(offset, scale, most):
    """Check what a compiled network computes on a GPU. Far from zero, float32 loses digits, also torch's own."""
    torch.manual_seed(0)
    norm, exact = GroupNorm(96), nn.GroupNorm(32, 96, eps=1e-6).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    exact.load_state_dict(norm.state_dict())
    x = (offset + scale * torch.randn(4, 96, 8, 8)).contiguous(memory_format=torch.channels_last)
    direction = torch.randn_like(x)

    found = []
    for module, function in ((norm, norm.by_channels), (exact, exact.forward)):
        leaf = x.detach().to(module.weight.dtype, copy=True).requires_grad_()
        y = function(leaf)
        (y * direction).sum().backward()
        found.append([y, leaf.grad, module.weight.grad, module.bias.grad])
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() < most * theirs.abs().max()
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(norm.by_channels(x.bfloat16()), norm.by_channels(x.bfloat16().float()))  # moments in float32


@pytest.mark.parametrize(("channels", "side"), [(64, 32), (96, 8), (512, 8)])
def test_group_norm_in_bfloat16_on_a_cpu_has_the_gradients_of_float64(channels, side):
    torch.manual_seed(0)
    norm, exact = GroupNorm(channels), nn.GroupNorm(32, channels, eps=1e-6).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    exact.load_state_dict(norm.state_dict())
    x, direction = (3 + torch.randn(2, 4, channels, side, side)).bfloat16()

    found = []
    for module, dtype in ((norm, torch.bfloat16), (exact, torch.float64)):
        leaf = x.to(dtype, memory_format=torch.channels_last, copy=True).requires_grad_()
        y = module(leaf)
        y.backward(direction.to(dtype))
        found.append([y, leaf.grad, module.weight.grad, module.bias.grad])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() < 0.006 * theirs.norm()  # rounding x alone changes some by 0.006
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in found[0][:2])


@pytest.mark.parametrize(("predict", "timesteps"), [("v", 1000), ("eps", 1000), ("v", 500)])
def test_exported_weights_give_the_same_pictures_in_diffusers(small, predict, timesteps, tmp_path, monkeypatch):
    schedule = NoiseSchedule(timesteps)
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", lambda: schedule)
    ddim_cifar.export_weights(tmp_path, small, replace(SMALL, predict=predict, dropout=0.25))
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.dropout == 0.25 and not pipeline.scheduler.config.clip_sample
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4)
    x, _ = images_and_times(1)
    tau = ddim_cifar.ddim_timesteps(schedule.timesteps, 5, "uniform")
    x_0 = ddim_cifar.ddim_sample(ddim_cifar.NoisePredictor(small, schedule, predict), x, schedule, tau)

    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps.tolist() == tau[::-1]
    with torch.inference_mode():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=1e-3, atol=3e-3)
