"""Schedule, choice of steps, samplers and interpolation, against closed forms, float64 references and diffusers."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import ddim_cifar
from ddim_cifar import NoisePredictor, NoiseSchedule, ddim_encode, ddim_sample, ddim_timesteps, slerp

MU, STD = 0.3, 0.5  # of Gaussian data, N(MU, STD^2) in each pixel


@functools.cache
def alphas_by_hand(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    alphas = [1.0]
    for i in range(timesteps):
        alphas.append(alphas[-1] * (1 - (beta_start + (beta_end - beta_start) * i / (timesteps - 1))))
    return alphas[1:]


def smooth_model(x, t):
    """Return no network's idea of the noise, but something smooth, nonlinear and different at each t."""
    phase = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 200
    return torch.sin(x + phase) + 0.3 * x


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest(difference):
    return difference.abs().max().item()


@pytest.mark.parametrize("arguments", [(), (10, 0.01, 0.3), (4000, 2.5e-5, 0.005)])
def test_alphas_cumprod_is_the_float64_product_of_one_minus_linear_betas(arguments):
    schedule = NoiseSchedule(*arguments)
    assert schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.alphas_cumprod, alphas_by_hand(*arguments), rtol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_add_noise_is_equation_4_with_a_timestep_for_each_image(dtype, tolerance):
    schedule, t = NoiseSchedule(), [0, 10, 500, 999]
    schedule.add_noise(randn(1, 5, dtype=torch.float32), randn(1, 5, dtype=torch.float32), torch.tensor([0]))
    for shape in ((4, 3, 8, 8), (4, 5)):
        x_0, eps = randn(*shape, seed=1), randn(*shape, seed=2)
        x_t = schedule.add_noise(x_0.to(dtype), eps.to(dtype), torch.tensor(t))
        assert x_t.dtype == dtype
        for image, step in enumerate(t):
            alpha = alphas_by_hand()[step]
            expected = math.sqrt(alpha) * x_0[image] + math.sqrt(1 - alpha) * eps[image]
            torch.testing.assert_close(x_t[image].double(), expected, rtol=0, atol=tolerance)


def test_the_networks_output_is_eps_or_v_of_which_follows_eps_in_the_precision_of_x_t():
    """Compute v = sqrt(alpha) eps - sqrt(1 - alpha) x_0. From it and x_t follow eps, and with Eq. 9 x_0."""
    schedule, x_0, eps, t = NoiseSchedule(), randn(4, 5, seed=1), randn(4, 5, seed=2), torch.tensor([0, 10, 500, 999])
    alpha = schedule.alphas_cumprod[t].view(4, 1)
    v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x_0
    x_t = schedule.add_noise(x_0, eps, t)
    torch.testing.assert_close(NoisePredictor(lambda x, t: v, schedule, "v")(x_t, t), eps)
    assert torch.equal(NoisePredictor(lambda x, t: eps, schedule, "eps")(x_t, t), eps)
    for predict in ("v", "eps"):
        assert NoisePredictor(lambda x, t: eps.bfloat16(), schedule, predict)(x_t, t).dtype == torch.float64


@pytest.mark.parametrize("spacing", ddim_cifar.SPACINGS)
@pytest.mark.parametrize(("timesteps", "stride"), [(1000, 1), (1, 1), (2, 1), (10, 1), (37, 1), (4000, 333)])
def test_every_number_of_steps_gives_that_many_distinct_ascending_timesteps(timesteps, stride, spacing):
    for steps in range(1, timesteps + 1, stride):
        chosen = ddim_timesteps(timesteps, steps, spacing)
        assert len(chosen) == steps and all(type(t) is int for t in chosen)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < timesteps, steps
        if spacing == "uniform":
            assert chosen == [i * timesteps // steps for i in range(steps)]


@pytest.mark.parametrize("timesteps", [1000, 4000])
def test_quadratic_equals_the_official_formula_wherever_that_has_no_duplicates(timesteps):
    compared = 0
    for steps in range(2, 60):
        official = np.linspace(0, math.sqrt(0.8 * timesteps), steps) ** 2
        if len(set(official.astype(int))) == steps:
            safe = abs(official - official.round()) > 1e-6  # elsewhere the formula's own rounding decides
            ours = np.array(ddim_timesteps(timesteps, steps, "quadratic"))
            np.testing.assert_array_equal(ours[safe], official[safe].astype(int))
            compared += safe.sum()
    assert compared > 300


@pytest.mark.parametrize("steps", [1, 50, 100, 250, 800, 900])
def test_where_quadratic_steps_collide_each_takes_the_next_free_integer_and_the_last_is_at_800(steps):
    expected = [] if steps > 1 else [800]
    for i in range(steps - len(expected)):
        wanted = 800 * i * i // (steps - 1) ** 2
        expected.append(max(wanted, expected[-1] + 1) if expected else wanted)
    assert ddim_timesteps(1000, steps, "quadratic") == expected
    assert expected[-1] == max(800, steps - 1)


def reference_sample(model, x_T, tau, eta, noises):
    """Compute Eq. 12 and 16 as they are printed, in float64 numpy."""
    alphas, x, noises = alphas_by_hand(), x_T.double().numpy(), iter(noises)
    for i in reversed(range(len(tau))):
        a, a_prev = alphas[tau[i]], alphas[tau[i - 1]] if i else 1.0
        eps = model(torch.from_numpy(x), torch.full((len(x),), tau[i])).numpy()
        predicted_x_0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
        x = np.sqrt(a_prev) * predicted_x_0 + np.sqrt(max(0, 1 - a_prev - sigma**2)) * eps
        if i:
            x = x + sigma * next(noises).double().numpy()
    return torch.from_numpy(x)


def replay(noises):
    return iter(noises).__next__


@pytest.mark.parametrize("spacing", ddim_cifar.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_is_equation_12(spacing, steps, eta):
    x_T, noises = randn(3, 3, 4, 4), [randn(3, 3, 4, 4, seed=i) for i in range(1, steps)]
    tau = ddim_timesteps(1000, steps, spacing)
    x_0 = ddim_sample(smooth_model, x_T, NoiseSchedule(), tau, eta, noise=replay(noises))
    torch.testing.assert_close(x_0, reference_sample(smooth_model, x_T, tau, eta, noises), rtol=1e-9, atol=1e-9)


class Recorder:
    """Keep what it was asked as a model, and what it answered."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t):
        eps = smooth_model(x, t)
        self.asked.append((x.clone(), t, eps))
        return eps


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"order": 2}], ids=str)
def test_every_step_asks_once_and_shows_its_prediction_of_x_0_and_the_last_one_is_returned(options):
    model, shown, tau = Recorder(), [], [3, 200, 700]
    options = {**options, "on_step": lambda t, x_0: shown.append((t, x_0.clone()))}
    x_0 = ddim_sample(model, randn(2, 3, 4, 4), NoiseSchedule(), tau, **options)
    assert [t.tolist() for _, t, _ in model.asked] == [[700, 700], [200, 200], [3, 3]]
    assert model.asked[0][1].dtype == torch.int64 and [t for t, _ in shown] == tau[::-1]
    for (t, predicted), (x, _, eps) in zip(shown, model.asked, strict=True):
        alpha = alphas_by_hand()[t]
        torch.testing.assert_close(predicted, (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha))
    assert torch.equal(shown[-1][1], x_0)


def test_encoding_asks_for_the_timestep_where_each_step_starts_and_first_for_the_lowest():
    model = Recorder()
    ddim_encode(model, randn(2, 3, 4, 4), NoiseSchedule(), [3, 200, 700])
    assert [t.tolist() for _, t, _ in model.asked] == [[3, 3], [3, 3], [200, 200]]


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.0), (50, 0.0), (10, 0.4), (50, 1.0)])
def test_sampling_agrees_with_diffusers_scheduler(steps, eta):
    x_T = randn(2, 3, 8, 8, dtype=torch.float32)
    noises = [randn(2, 3, 8, 8, seed=i, dtype=torch.float32) for i in range(1, steps)]
    tau = ddim_timesteps(1000, steps, "uniform")
    ours = ddim_sample(gaussian_model(), x_T, NoiseSchedule(), tau, eta, noise=replay(noises))

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading")
    scheduler.alphas_cumprod = NoiseSchedule().alphas_cumprod  # its own are float32
    scheduler.set_timesteps(steps)
    x = x_T
    for t, noise in zip(scheduler.timesteps, [*noises, torch.zeros_like(x)]):
        eps = gaussian_model()(x, torch.full((2,), int(t)))
        x = scheduler.step(eps, t, x, eta, variance_noise=noise if eta else None).prev_sample
    assert ours.dtype == x.dtype == torch.float32
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("walk", [ddim_sample, ddim_encode])
def test_the_state_keeps_the_precision_of_its_start_whatever_the_network_returns(walk, network_dtype, dtype):
    def model(x, t):
        assert x.dtype == dtype
        return smooth_model(x, t).to(network_dtype)

    start = randn(2, 3, 4, 4, dtype=dtype)
    untouched = start.clone()
    end = walk(model, start, NoiseSchedule(), [0, 400, 800])
    assert end.dtype == dtype and torch.equal(start, untouched)
    assert torch.equal(end, walk(lambda x, t: model(x, t).to(dtype), start, NoiseSchedule(), [0, 400, 800]))


@pytest.mark.parametrize("walk", [ddim_sample, ddim_encode])
def test_gradients_work_inside_the_model_and_what_is_returned_can_be_trained_on(walk):
    """Sample as guidance by a classifier does, and as a teacher inside a training step."""
    x_T, layer, tau = randn(2, 3, 4, 4), torch.nn.Conv2d(3, 3, 1).double(), [0, 400, 800]

    def guided(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((x**2).sum(), x)
        return smooth_model(x, t) + 0.1 * slope

    x = walk(guided, x_T, NoiseSchedule(), tau)
    torch.testing.assert_close(x, walk(lambda x, t: smooth_model(x, t) + 0.2 * x, x_T, NoiseSchedule(), tau))
    assert not x.requires_grad and torch.is_grad_enabled()
    layer(x).sum().backward()
    assert layer.weight.grad.any()


WITHOUT_MEANING = [{"eta": -0.1}, {"eta": 1.1}, {"eta": math.nan}, {"eta": 0.5, "order": 2}, {"order": 3}]


@pytest.mark.parametrize("options", [*WITHOUT_MEANING, {"tau": [500, 0]}], ids=str)
def test_sampling_options_without_a_meaning_are_value_errors(options):
    with pytest.raises(ValueError, match=r"eta|tau"):
        ddim_sample(smooth_model, randn(1, 3, 4, 4), NoiseSchedule(), **{"tau": [0, 500], **options})


@pytest.mark.parametrize(("timesteps", "words"), [(1000, ""), (100, "alpha is 0.52")])
def test_a_sampler_says_when_it_starts_where_the_network_expects_a_part_of_the_image(timesteps, words, capsys):
    ddim_cifar.Sampler(torch.nn.Identity(), NoiseSchedule(timesteps), ddim_cifar.Config(device="cpu"))
    said = "".join(capsys.readouterr())
    assert words in said and bool(said) == bool(words)


def gaussian_model(schedule=None):
    """Return E[eps | x_t] where x_0 ~ N(MU, STD^2)."""
    alphas = (schedule or NoiseSchedule()).alphas_cumprod

    def model(x, t):
        alpha = alphas[t].view(-1, *[1] * (x.ndim - 1))
        return ((1 - alpha).sqrt() * (x - alpha.sqrt() * MU) / (alpha * STD**2 + 1 - alpha)).to(x.dtype)

    return model


def sampling_error(tau, order=1, schedule=None):
    schedule, x_T = schedule or NoiseSchedule(), randn(8, 3, 4, 4)
    x_0 = ddim_sample(gaussian_model(schedule), x_T, schedule, tau, order=order)
    alpha_T = schedule.alpha(tau[-1])
    return largest(x_0 - (MU + STD * (x_T - math.sqrt(alpha_T) * MU) / math.sqrt(alpha_T * STD**2 + 1 - alpha_T)))


def encoding_error(tau, schedule=None):
    schedule, x_0 = schedule or NoiseSchedule(), MU + STD * randn(8, 3, 4, 4)
    x_T = ddim_encode(gaussian_model(schedule), x_0, schedule, tau)
    alpha_T = schedule.alpha(tau[-1])
    return largest(x_T - (math.sqrt(alpha_T) * MU + (x_0 - MU) / STD * math.sqrt(alpha_T * STD**2 + 1 - alpha_T)))


second_order_error = functools.partial(sampling_error, order=2)


@pytest.mark.parametrize(
    ("error", "order"),
    [(sampling_error, 1), (second_order_error, 2), (encoding_error, 1)],
    ids=["sampling", "order 2", "encoding"],
)
def test_the_error_falls_with_the_order_promised(error, order):
    schedule = NoiseSchedule(3841, 1e-6, 0.005)  # 3840 divides into each number of steps, with the ends the same
    counts = [30, 60, 120, 240, 480]
    errors = [error(range(0, 3841, 3840 // count), schedule=schedule) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15), errors


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, inside diffusers
@pytest.mark.parametrize("spacing", ddim_cifar.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_order_2_is_diffusers_dpm_solver(spacing, steps):
    schedule, x_T = NoiseSchedule(), randn(2, 3, 4, 4)
    tau = ddim_timesteps(1000, steps, spacing)
    solver = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero")
    solver.set_timesteps(steps)
    solver.timesteps = torch.tensor(tau[::-1])
    solver.sigmas = torch.tensor([schedule.noise_ratio(t) for t in tau[::-1]] + [0.0])
    x = x_T
    for t in solver.timesteps:
        x = solver.step(smooth_model(x, t.expand(2)), t, x).prev_sample
    x_0 = ddim_sample(smooth_model, x_T, schedule, tau, order=2)
    torch.testing.assert_close(x_0, x.to(x_0.dtype), rtol=1e-4, atol=1e-4)


def reference_slerp(a, b, weight):
    a, b = a.double().flatten().numpy(), b.double().flatten().numpy()
    theta = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - weight) * theta) * a + np.sin(weight * theta) * b) / np.sin(theta)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 1.0, [0.0, 0.3, 0.6, 1.0]])
def test_slerp_is_the_papers_formula_image_by_image(weight, dtype, tolerance):
    a, b = randn(4, 3, 8, 8, seed=1, dtype=dtype), randn(4, 3, 8, 8, seed=2, dtype=dtype)
    result = slerp(a, b, torch.tensor(weight) if isinstance(weight, list) else weight)
    assert result.dtype == dtype and result.shape == a.shape
    for i, share in enumerate(np.broadcast_to(np.float32(weight) if isinstance(weight, list) else weight, 4)):
        np.testing.assert_allclose(result[i].flatten(), reference_slerp(a[i], b[i], float(share)), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "half_way"), [(1.0, 1.0), (3.0, 2.0), (1 + 1e-7, 1.0)])
def test_slerp_between_parallel_vectors_is_the_straight_line_and_else_finite(scale, half_way, dtype):
    a = randn(2, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(slerp(a, scale * a, 0.5), half_way * a, rtol=1e-5, atol=1e-6)
    assert slerp(a, -a, 0.5).isfinite().all() and slerp(0 * a, 0 * a, 0.5).isfinite().all()


def test_every_pixel_value_survives_the_way_to_floats_and_back_and_others_are_rounded_and_clamped():
    values = torch.arange(256, dtype=torch.uint8)
    x = ddim_cifar.to_float(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x.double(), values.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(ddim_cifar.to_uint8(x), values)
    levels = torch.tensor([10.4, 10.6, 254.4, 254.6, 255.3, 1000.0, -0.4, -0.6, -1000.0])
    assert ddim_cifar.to_uint8(levels / 127.5 - 1).tolist() == [10, 11, 254, 255, 255, 255, 0, 0, 0]
