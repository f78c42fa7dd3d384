"""The UNet, against diffusers' implementation of the same network, in memory and through files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
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
    load_checkpoint,
    load_model,
    sinusoidal_embedding,
)

DEFAULT = Config()
SMALL = Config(channels=32, channel_mults=(1, 2), res_blocks=1, attn_resolutions=(32, 16))
UNEVEN = Config(channels=64, channel_mults=(1, 3, 2), res_blocks=2, attn_resolutions=(8,))
WITHOUT_ATTENTION = Config(channels=32, channel_mults=(1, 1, 2, 4), res_blocks=1, attn_resolutions=())


def build(config, **others):
    return UNet(**{**config.of(UNET), **others})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on busy cores make these small networks many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def randomise(model, first_features=1.0):
    """Every weight random, those that start as zero too."""
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


def assert_same_eps(ours, theirs, tolerance=1e-4):
    x, t = images_and_times()
    with torch.inference_mode():
        eps, expected = ours(x, t), theirs(x, t).sample  # both networks' outputs stand for eps
    assert expected.std() > 0.1
    torch.testing.assert_close(eps, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return UNet()


@pytest.fixture(scope="module")
def small():
    return randomise(build(SMALL))


# ---- Time embedding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_the_time_embedding_is_sines_then_cosines_of_geometric_frequencies(dim):
    t = torch.tensor([0, 1, 10, 500, 999, 3999])
    embedding = sinusoidal_embedding(t, dim)
    assert embedding.shape == (6, dim) and embedding.dtype == torch.float32
    for row, step in zip(embedding.tolist(), t.tolist()):
        angles = [step * 10000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(expected, rel=0, abs=3e-7 * (step + 1))


# ---- Size and initialisation -----------------------------------------------------------------------------------------


def test_the_default_network_has_the_parameters_of_ddpm(fresh):
    assert sum(parameter.numel() for parameter in fresh.parameters()) == 35_746_307


def test_a_fresh_network_returns_exactly_zero_and_its_eps_is_that_of_pure_noise(fresh):
    schedule, (x, t) = NoiseSchedule(), images_and_times(4)
    noise_scale = (1 - schedule.alphas_cumprod[t]).sqrt().float().view(4, 1, 1, 1)
    with torch.inference_mode():
        v, eps = (NoisePredictor(fresh.eval(), schedule, predict)(x, t) for predict in ("v", "eps"))
    assert torch.equal(v, noise_scale * x)
    assert eps.shape == x.shape and eps.count_nonzero() == 0


def test_fresh_residual_branches_and_attention_add_nothing(fresh):
    time_emb = torch.randn(2, 512)
    for module in fresh.modules():
        if isinstance(module, ddim_cifar.ResBlock):
            x = torch.randn(2, module.conv1.in_channels, 4, 4)
            assert torch.equal(module(x, time_emb), module.conv_shortcut(x))
        elif isinstance(module, ddim_cifar.Attention):
            x = torch.randn(2, module.to_q.in_features, 4, 4)
            assert torch.equal(module(x), x)


def test_all_other_weights_start_with_variance_one_over_the_mean_fan_and_biases_at_zero(fresh):
    checked = 0
    for name, module in fresh.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.bias.count_nonzero() == 0
            if module.weight.any():
                fan_in, fan_out = module.weight[0].numel(), module.weight[:, 0].numel()
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.05), name
                checked += 1
    assert checked > 60


def test_weights_start_uniform_up_to_the_bound_of_their_variance(fresh):
    for module in fresh.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.any():
            bound = math.sqrt(6 / (module.weight[0].numel() + module.weight[:, 0].numel()))
            assert 0.99 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 48}, {"channels": 0}, {"channel_mults": (1, 0)}, {"res_blocks": 0},
        {"image_size": 30}, {"image_size": 36}, {"attn_resolutions": (10,)}, {"attn_resolutions": (2,)},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_do_not_fit_are_value_errors(sizes):
    with (
        pytest.raises(ValueError, match=r"^(channels|channel_mults|res_blocks|attn_resolutions) "),
        torch.device("meta"),
    ):
        UNet(**sizes)


@pytest.mark.parametrize(("side", "attends"), [(16, (8,)), (64, (32, 16))])
def test_other_image_sizes_work(side, attends):
    model = randomise(build(SMALL, channel_mults=(1, 2, 2), attn_resolutions=attends, image_size=side))
    x, t = images_and_times(side=side)
    eps = model(x, t)
    assert eps.shape == x.shape and eps.isfinite().all()


# ---- What it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [DEFAULT, SMALL, UNEVEN, WITHOUT_ATTENTION], ids=["default", "small", "uneven", "without attention"]
)
@pytest.mark.parametrize("first_features", [1.0, 1e-3])  # the small ones are where the eps of GroupNorm counts
def test_the_output_is_that_of_diffusers_with_the_same_weights(config, first_features, tmp_path):
    ours, theirs = randomise(build(config), first_features), diffusers_twin(config, tmp_path).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_eps(ours, theirs)


@pytest.mark.parametrize(("offset", "scale", "most"), [(0, 1, 1e-5), (0, 1e-3, 1e-5), (30, 1, 2e-3)])
def test_group_norm_by_channels_is_that_of_torch_in_float64_with_its_gradients(offset, scale, most):
    """What a compiled network computes on a GPU. Far from zero, float32 loses digits, with torch's own as well."""
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


def test_group_norm_by_channels_of_a_constant_is_the_bias():
    norm = GroupNorm(96)
    nn.init.normal_(norm.bias)
    x = torch.linspace(-50, 50, 40)[:, None, None, None].repeat(1, 96, 8, 8)
    expected = norm.bias[None, :, None, None].expand_as(x)
    torch.testing.assert_close(norm.by_channels(x), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_gets_the_same_output_alone_and_in_any_batch_and_memory_layout(small, layout):
    x, t = images_and_times(4)
    alone = torch.cat([small(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    model = build(SMALL).eval().to(memory_format=layout)
    model.load_state_dict(small.state_dict())
    with torch.inference_mode():
        together = model(x.contiguous(memory_format=layout), t)
        reversed_order = model(x.flip(0).contiguous(memory_format=layout), t.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)
    torch.testing.assert_close(reversed_order, alone, rtol=0, atol=5e-5)


def test_the_output_depends_on_the_timestep_of_each_image(small):
    x, _ = images_and_times()
    early, late, mixed = (small(x, torch.tensor(t)) for t in ([5, 5], [900, 900], [5, 900]))
    assert (early - late).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1]]), rtol=0, atol=5e-5)


def test_a_float64_state_is_welcome_in_a_float32_network(small):
    x, t = images_and_times()
    assert torch.equal(small(x.double(), t), small(x, t))


def test_the_network_leaves_its_input_alone(small):
    x, t = images_and_times()
    before = x.clone()
    small(x, t)
    assert torch.equal(x, before)


def test_dropout_acts_in_training_only():
    model, (x, t) = randomise(build(SMALL, dropout=0.5)), images_and_times()
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_dropout_comes_before_the_last_convolution_of_a_block():
    block, seen = ddim_cifar.ResBlock(32, 32, 128, dropout=0.5).train(), []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.randn(2, 32, 8, 8), torch.randn(2, 128))
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6


def test_gradient_reaches_every_parameter():
    model, (x, t) = (
        randomise(build(SMALL, channels=64, attn_resolutions=(16,))).requires_grad_(True),
        images_and_times(),
    )
    model.train()(x, t).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("to_k.bias"):  # softmax does not see a constant added to all scores
            assert parameter.grad.norm() > 1e-6, name


# ---- Weights from and for others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_exported_weights_give_the_same_pictures_in_diffusers_pipeline(small, predict, tmp_path):
    config = replace(SMALL, predict=predict, beta_end=0.015)
    ddim_cifar.export_weights(tmp_path, small, config)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    x, _ = images_and_times()
    tau, schedule = ddim_timesteps(1000, 10, "uniform"), NoiseSchedule(beta_end=0.015)
    x_0 = ddim_sample(NoisePredictor(small, schedule, predict), x, schedule, tau)

    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps.tolist() == tau[::-1]
    with torch.inference_mode():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=1e-4, atol=1e-3)


def test_the_exported_folder_describes_schedule_and_dropout(tmp_path):
    config = replace(SMALL, predict="eps", timesteps=500, beta_start=0.001, beta_end=0.03, dropout=0.25)
    ddim_cifar.export_weights(tmp_path, nn.Module(), config)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    np.testing.assert_allclose(scheduler.betas, np.linspace(0.001, 0.03, 500), rtol=1e-5)
    assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample
    assert scheduler.final_alpha_cumprod == 1 and scheduler.config.steps_offset == 0
    assert UNet2DModel.from_config(UNet2DModel.load_config(tmp_path / "unet")).config.dropout == 0.25


@pytest.mark.parametrize("config", [SMALL, UNEVEN], ids=["small", "uneven"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_networks_saved_by_diffusers_are_read_and_give_the_same_eps(config, safe, tmp_path):
    theirs = randomise(diffusers_twin(config, tmp_path / "config"))
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    model, _ = load_model(tmp_path / f"diffusion_pytorch_model.{'safetensors' if safe else 'bin'}")
    assert_same_eps(model, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_published_weights_of_half_precision_are_read_as_what_they_are(small, dtype, tmp_path):
    weights = {name: value.to(dtype) for name, value in small.state_dict().items()}
    save_file(weights, tmp_path / "half.safetensors")
    read = load_checkpoint(tmp_path / "half.safetensors", "cpu")["ema"]
    assert all(read[name].dtype == torch.float32 and torch.equal(read[name], weights[name].float()) for name in weights)


def test_the_attention_names_of_older_published_weights_are_understood(tmp_path):
    theirs = randomise(diffusers_twin(SMALL, tmp_path))
    weights = theirs.state_dict()
    for new, old in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in weights
    torch.save(weights, tmp_path / "old.bin")
    assert_same_eps(load_model(tmp_path / "old.bin")[0], theirs)


def test_exported_weights_come_back_bit_for_bit(small, tmp_path):
    ddim_cifar.export_weights(tmp_path, small, SMALL)
    (path,) = (tmp_path / "unet").glob("diffusion_pytorch_model.*")
    read = load_checkpoint(path, "cpu")["ema"]
    assert read.keys() == small.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in small.state_dict().items())
