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
from ddim_cifar import (
    UNET,
    Config,
    GroupNorm,
    NoisePredictor,
    NoiseSchedule,
    UNet,
    ddim_sample,
    ddim_timesteps,
    load_model,
    sinusoidal_embedding,
)

DEFAULT = Config()
SMALL = Config(channels=32, channel_mults=(1, 2), res_blocks=1, attn_resolutions=(32, 16))
UNEVEN = Config(channels=64, channel_mults=(1, 3, 2), res_blocks=2, attn_resolutions=(8,))
WITHOUT_ATTENTION = Config(channels=32, channel_mults=(1, 1, 2, 4), res_blocks=1, attn_resolutions=())


def build(config, **others):
    return UNet(**{**config.of(UNET), **others})


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
    """diffusers' network as export_weights describes it, with weights of its own."""
    ddim_cifar.export_weights(folder, nn.Module(), config)
    return UNet2DModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return UNet()


@pytest.fixture(scope="module")
def small():
    return randomise(build(SMALL))


# ---- Time embedding, size, initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_the_time_embedding_is_sines_then_cosines_of_geometric_frequencies(dim):
    t = torch.tensor([0, 1, 10, 500, 999, 3999])
    embedding = sinusoidal_embedding(t, dim)
    assert embedding.shape == (6, dim) and embedding.dtype == torch.float32
    for row, step in zip(embedding.tolist(), t.tolist()):
        angles = [step * 10000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(expected, rel=0, abs=3e-7 * (step + 1))


def test_the_default_network_has_the_parameters_of_ddpm(fresh):
    assert sum(parameter.numel() for parameter in fresh.parameters()) == 35_746_307


def test_a_fresh_network_returns_exactly_zero(fresh):
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
    "sizes", [{"channels": 48}, {"image_size": 36}, {"attn_resolutions": (10,)}, {"attn_resolutions": (2,)}], ids=str
)
def test_sizes_that_do_not_fit_are_value_errors(sizes):
    argument = r"^(channels|channel_mults|attn_resolutions) "
    with torch.device("meta"), pytest.raises(ValueError, match=argument):
        UNet(**sizes)


@pytest.mark.parametrize(("side", "attends"), [(16, (8,)), (64, (32, 16))])
def test_other_image_sizes_work(side, attends):
    model = randomise(build(SMALL, channel_mults=(1, 2, 2), attn_resolutions=attends, image_size=side))
    x, t = images_and_times(side=side)
    eps = model(x, t)
    assert eps.shape == x.shape and eps.isfinite().all()


# ---- What it computes ------------------------------------------------------------------------------------------------


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


def test_group_norm_by_channels_of_a_constant_is_the_bias():
    norm = GroupNorm(96)
    nn.init.normal_(norm.bias)
    x = torch.linspace(-50, 50, 40)[:, None, None, None].repeat(1, 96, 8, 8)
    expected = norm.bias[None, :, None, None].expand_as(x)
    torch.testing.assert_close(norm.by_channels(x), expected, rtol=0, atol=0.05)


def test_an_image_gets_the_same_output_alone_and_in_any_batch_layout_and_precision_of_its_state(small):
    x, t = images_and_times(4)
    before = x.clone()
    alone = torch.cat([small(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    model = build(SMALL).eval().to(memory_format=torch.channels_last)
    model.load_state_dict(small.state_dict())
    with torch.inference_mode():
        found = model(x.double().flip(0).contiguous(memory_format=torch.channels_last), t.flip(0)).flip(0)
    torch.testing.assert_close(found, alone, rtol=0, atol=5e-5)
    assert torch.equal(x, before)


def test_dropout_acts_in_training_only_before_the_last_convolution_of_each_block():
    model, seen, (x, t) = randomise(build(SMALL, dropout=0.5)), [], images_and_times()
    for block in model.modules():
        if isinstance(block, ddim_cifar.ResBlock):
            block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0] == 0).float().mean()))
    assert torch.equal(model(x, t), model(x, t)) and max(seen) < 0.1
    seen.clear()
    assert not torch.equal(model.train()(x, t), model(x, t))
    assert len(seen) == 2 * 8 and all(0.4 < dropped < 0.6 for dropped in seen)


def test_gradient_reaches_every_parameter():
    x, t = images_and_times()
    model = randomise(build(SMALL, channels=64, attn_resolutions=(16,))).requires_grad_(True).train()
    model(x, t).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("to_k.bias"):  # softmax does not see a constant added to all scores
            assert parameter.grad.norm() > 1e-6, name


# ---- Weights from and for diffusers ----------------------------------------------------------------------------------


class Cosine(NoiseSchedule):
    """Replaces the linear schedule, with another length as well."""

    def __init__(self):
        super().__init__(500)
        self.alphas_cumprod = torch.linspace(0.001, 0.999, 500, dtype=torch.float64).mul(math.pi / 2).cos() ** 2


@pytest.mark.parametrize(("predict", "schedule"), [("v", NoiseSchedule), ("eps", NoiseSchedule), ("v", Cosine)])
def test_exported_weights_give_the_same_pictures_in_diffusers_pipeline(small, predict, schedule, tmp_path, monkeypatch):
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", schedule)
    ddim_cifar.export_weights(tmp_path, small, replace(SMALL, predict=predict, dropout=0.25))
    pipeline, schedule = DDIMPipeline.from_pretrained(tmp_path), schedule()
    assert pipeline.unet.config.dropout == 0.25 and not pipeline.scheduler.config.clip_sample
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4)
    x, _ = images_and_times(1)
    tau = ddim_timesteps(schedule.timesteps, 5, "uniform")
    x_0 = ddim_sample(NoisePredictor(small, schedule, predict), x, schedule, tau)

    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps.tolist() == tau[::-1]
    with torch.inference_mode():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=1e-3, atol=3e-3)


def test_the_attention_names_of_older_published_weights_are_understood(tmp_path):
    theirs = randomise(diffusers_twin(replace(SMALL, predict="eps"), tmp_path))
    weights = theirs.state_dict()
    for new, old in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in weights
    torch.save(weights, tmp_path / "unet" / "old.bin")
    x, t = images_and_times()
    with torch.inference_mode():
        eps, expected = load_model(tmp_path / "unet" / "old.bin")[0](x, t), theirs(x, t).sample
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-4)
