"""Schedule, choice of steps, samplers and interpolation, against closed forms, float64 references and diffusers."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ddim_cifar import (
    TAUS,
    NoisePredictor,
    NoiseSchedule,
    ddim_encode,
    ddim_sample,
    ddim_timesteps,
    slerp,
    to_float,
    to_uint8,
)

MU, STD = 0.3, 0.5  # of Gaussian data, N(MU, STD^2) in each pixel


@functools.cache
def alphas_by_hand(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    alphas = [1.0]
    for i in range(timesteps):
        alphas.append(alphas[-1] * (1 - (beta_start + (beta_end - beta_start) * i / (timesteps - 1))))
    return alphas[1:]


def smooth_model(x, t):
    """No network's idea of the noise, but smooth, nonlinear and different at each t."""
    phase = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 200
    return torch.sin(x + phase) + 0.3 * x


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest(difference):
    return difference.abs().max().item()


# ---- Schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), (10, 0.01, 0.3), (4000, 2.5e-5, 0.005)])
def test_alphas_cumprod_is_the_float64_product_of_one_minus_linear_betas(arguments):
    schedule = NoiseSchedule(*arguments)
    assert schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.alphas_cumprod, alphas_by_hand(*arguments), rtol=1e-11)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_add_noise_is_equation_4_with_a_timestep_for_each_image(shape, dtype, tolerance):
    x_0, eps, t = randn(*shape, seed=1), randn(*shape, seed=2), [0, 10, 500, 999]
    x_t = NoiseSchedule().add_noise(x_0.to(dtype), eps.to(dtype), torch.tensor(t))
    assert x_t.dtype == dtype
    for image, step in enumerate(t):
        alpha = alphas_by_hand()[step]
        expected = math.sqrt(alpha) * x_0[image] + math.sqrt(1 - alpha) * eps[image]
        torch.testing.assert_close(x_t[image].double(), expected, rtol=0, atol=4 * tolerance)


# ---- What the network's output stands for ----------------------------------------------------------------------------


def zeros(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_a_network_returns_zero_v_makes_its_eps_the_noise_share_of_x_t(dtype):
    schedule, x, t = NoiseSchedule(), randn(4, 3, 8, 8, dtype=dtype), torch.tensor([0, 10, 500, 999])
    noise_scale = (1 - schedule.alphas_cumprod[t]).sqrt().to(dtype).view(4, 1, 1, 1)
    assert torch.equal(NoisePredictor(zeros, schedule, "v")(x, t), noise_scale * x)
    assert torch.equal(NoisePredictor(zeros, schedule, "eps")(x, t), 0 * x)


def test_v_and_x_t_make_eps_as_they_make_x_0():
    """v = sqrt(alpha) eps - sqrt(1 - alpha) x_0: from it and x_t follow eps, and with Eq. 9 x_0."""
    schedule, x_0, eps, t = NoiseSchedule(), randn(4, 5, seed=1), randn(4, 5, seed=2), torch.tensor([0, 10, 500, 999])
    alpha = schedule.alphas_cumprod[t].view(4, 1)
    v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x_0
    predicted = NoisePredictor(lambda x, t: v, schedule, "v")(schedule.add_noise(x_0, eps, t), t)
    torch.testing.assert_close(predicted, eps)


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_eps_has_the_precision_of_the_state_whatever_the_network_returns(predict):
    model = NoisePredictor(lambda x, t: x.bfloat16(), NoiseSchedule(), predict)
    x, t = randn(2, 3, 4, 4), torch.tensor([3, 700])
    assert model(x, t).dtype == torch.float64 and model(x.float(), t).dtype == torch.float32


# ---- Choice of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("timesteps", "lengths"),
    [
        (1000, range(1, 1001)),
        (1, [1]),
        (2, [1, 2]),
        (10, range(1, 11)),
        (37, range(1, 38)),
        (4000, range(1, 4001, 333)),
    ],
)
def test_every_number_of_steps_gives_that_many_distinct_ascending_timesteps(timesteps, lengths, tau):
    schedule = NoiseSchedule(timesteps)
    for steps in lengths:
        chosen = ddim_timesteps(timesteps, steps, tau, schedule)
        assert len(chosen) == steps and all(type(t) is int for t in chosen)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < timesteps, steps


@pytest.mark.parametrize("timesteps", [1000, 37])
def test_uniform_is_floor_of_i_T_over_S(timesteps):
    for steps in range(1, timesteps + 1):
        assert ddim_timesteps(timesteps, steps, "uniform") == [i * timesteps // steps for i in range(steps)]


def test_quadratic_in_ten_steps_is_the_sequence_of_the_paper():
    assert ddim_timesteps(1000, 10, "quadratic") == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]


def test_quadratic_ends_at_800_of_1000_as_long_as_its_steps_fit_below():
    assert all(ddim_timesteps(1000, steps, "quadratic")[-1] == max(800, steps - 1) for steps in range(1, 1001))


@pytest.mark.parametrize("timesteps", [1000, 4000])
def test_quadratic_equals_the_official_formula_wherever_that_has_no_duplicates(timesteps):
    compared = 0
    for steps in range(2, 60):
        official = np.linspace(0, math.sqrt(0.8 * timesteps), steps) ** 2
        if len(set(official.astype(int))) == steps:
            safe = abs(official - official.round()) > 1e-6  # elsewhere the formula's own rounding decides
            np.testing.assert_array_equal(
                np.array(ddim_timesteps(timesteps, steps, "quadratic"))[safe], official[safe].astype(int)
            )
            compared += safe.sum()
    assert compared > 300


@pytest.mark.parametrize("steps", [50, 100, 250, 800])
def test_where_quadratic_steps_collide_each_takes_the_next_free_integer(steps):
    expected = []
    for i in range(steps):
        wanted = 800 * i * i // (steps - 1) ** 2
        expected.append(max(wanted, expected[-1] + 1) if expected else wanted)
    assert ddim_timesteps(1000, steps, "quadratic") == expected


@pytest.mark.parametrize("schedule", [NoiseSchedule(1000), NoiseSchedule(1000, 1e-3, 0.01)])
def test_karras_takes_equal_steps_in_the_seventh_root_of_sigma_from_end_to_end(schedule):
    warped = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().numpy() ** (1 / 7)
    chosen = ddim_timesteps(1000, 10, "karras", schedule)
    ideal = np.linspace(warped[0], warped[-1], 10)
    assert (chosen[0], chosen[-1]) == (0, 999)
    assert all(abs(warped[t] - wanted) <= abs(warped - wanted).min() + 1e-3 for t, wanted in zip(chosen, ideal))


@pytest.mark.parametrize(
    ("steps", "tau"), [(0, "uniform"), (-1, "quadratic"), (1001, "quadratic"), (1001, "karras"), (10, "cubic")]
)
def test_impossible_numbers_of_steps_and_unknown_taus_are_value_errors(steps, tau):
    with pytest.raises(ValueError, match="must be"):
        ddim_timesteps(1000, steps, tau)


# ---- Sampler ---------------------------------------------------------------------------------------------------------


def reference_sample(model, x_T, tau, eta, noises):
    """Eq. 12 and 16 as they are printed, in float64 numpy."""
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


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_is_equation_12(tau, steps, eta):
    x_T, noises = randn(3, 3, 4, 4), [randn(3, 3, 4, 4, seed=i) for i in range(1, steps)]
    tau = ddim_timesteps(1000, steps, tau)
    x_0 = ddim_sample(smooth_model, x_T, NoiseSchedule(), tau, eta, noise=replay(noises))
    torch.testing.assert_close(x_0, reference_sample(smooth_model, x_T, tau, eta, noises), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"order": 2}, {"clip_x0": True}])
def test_the_last_step_returns_the_predicted_x_0(options):
    seen, tau, x_T = [], ddim_timesteps(1000, 7, "quadratic"), randn(2, 3, 4, 4)
    options["on_step"] = lambda t, x_0: seen.append((t, x_0))
    x_0 = ddim_sample(smooth_model, x_T, NoiseSchedule(), tau, **options)
    assert [t for t, _ in seen] == tau[::-1]
    assert torch.equal(seen[-1][1], x_0)


class Recorder:
    """A model that keeps what it was asked, and what it answered."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t):
        eps = smooth_model(x, t)
        self.asked.append((x.clone(), t, eps))
        return eps


def test_every_step_shows_the_x_0_predicted_from_what_the_network_saw():
    model, shown = Recorder(), []
    start, tau = randn(2, 3, 4, 4), [3, 200, 700]
    ddim_sample(model, start, NoiseSchedule(), tau, on_step=lambda t, x_0: shown.append((t, x_0.clone())))
    assert [t.tolist() for _, t, _ in model.asked] == [[700, 700], [200, 200], [3, 3]]
    assert model.asked[0][1].dtype == torch.int64
    for (t, x_0), (x, _, eps) in zip(shown, model.asked, strict=True):
        alpha = alphas_by_hand()[t]
        torch.testing.assert_close(x_0, (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha))


def test_encoding_asks_for_the_timestep_where_each_step_starts_and_first_for_the_lowest():
    model = Recorder()
    ddim_encode(model, randn(2, 3, 4, 4), NoiseSchedule(), [3, 200, 700])
    assert [t.tolist() for _, t, _ in model.asked] == [[3, 3], [3, 3], [200, 200]]


def diffusers_sample(model, x, steps, eta=0.0, noises=None, clip=False):
    scheduler = DDIMScheduler(clip_sample=clip, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading")
    scheduler.alphas_cumprod = NoiseSchedule().alphas_cumprod  # its own are float32
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        eps = model(x, torch.full((len(x),), int(t)))
        extra = {"variance_noise": noises[i] if i < len(noises) else torch.zeros_like(x)} if noises is not None else {}
        x = scheduler.step(eps, t, x, eta, use_clipped_model_output=clip, **extra).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_sampling_agrees_with_diffusers_scheduler(steps, clip, eta):
    x_T = randn(2, 3, 8, 8, dtype=torch.float32)
    noises = [randn(2, 3, 8, 8, seed=i, dtype=torch.float32) for i in range(1, steps)]
    tau = ddim_timesteps(1000, steps, "uniform")

    def sample(clip_x0):
        return ddim_sample(gaussian_model(), x_T, NoiseSchedule(), tau, eta, clip_x0=clip_x0, noise=replay(noises))

    ours, theirs = sample(clip), diffusers_sample(gaussian_model(), x_T, steps, eta, noises if eta else None, clip)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if clip:
        assert largest(ours) <= 1 < largest(sample(clip_x0=False))


def test_eta_1_along_every_timestep_is_the_ancestral_sampling_of_ddpm():
    schedule, x_T = NoiseSchedule(50, 1e-3, 0.2), randn(2, 3, 4, 4)
    noises = [randn(2, 3, 4, 4, seed=i) for i in range(1, 50)]
    x_0 = ddim_sample(smooth_model, x_T, schedule, list(range(50)), 1.0, noise=replay(noises))
    alphas_cumprod, x = alphas_by_hand(50, 1e-3, 0.2), x_T
    for t in reversed(range(50)):  # DDPM, Algorithm 2, with the smaller of its two variances
        before = alphas_cumprod[t - 1] if t else 1.0
        alpha, bar = alphas_cumprod[t] / before, alphas_cumprod[t]
        x = (x - (1 - alpha) / math.sqrt(1 - bar) * smooth_model(x, torch.full((2,), t))) / math.sqrt(alpha)
        if t:
            x = x + math.sqrt((1 - before) / (1 - bar) * (1 - alpha)) * noises[49 - t]
    torch.testing.assert_close(x_0, x)


def test_eta_0_draws_no_noise_and_eta_1_draws_it_from_torch():
    def sample(seed, eta):
        torch.manual_seed(seed)
        return ddim_sample(smooth_model, randn(2, 3, 4, 4), NoiseSchedule(), [1, 300, 600], eta)

    assert torch.equal(sample(1, 0.0), sample(2, 0.0))
    assert torch.equal(sample(1, 1.0), sample(1, 1.0)) and not torch.equal(sample(1, 1.0), sample(2, 1.0))


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


@pytest.mark.parametrize(
    "options", [{"eta": -0.1}, {"eta": 1.1}, {"eta": math.nan}, {"eta": 0.5, "order": 2}, {"order": 3}]
)
def test_sampling_options_without_a_meaning_are_value_errors(options):
    with pytest.raises(ValueError, match="eta"):
        ddim_sample(smooth_model, randn(1, 3, 4, 4), NoiseSchedule(), [0, 500], **options)


# ---- Gaussian data: the network and the solution of its ODE are known exactly ----------------------------------------


def gaussian_model(schedule=None, predict="eps"):
    """E[eps | x_t] where x_0 ~ N(MU, STD^2), from a network whose output stands for what `predict` says."""
    schedule = schedule or NoiseSchedule()

    def network(x, t):
        alpha = schedule.alphas_cumprod[t].view(-1, *[1] * (x.ndim - 1))
        eps = (1 - alpha).sqrt() * (x - alpha.sqrt() * MU) / (alpha * STD**2 + 1 - alpha)
        return eps if predict == "eps" else (eps - (1 - alpha).sqrt() * x) / alpha.sqrt()

    return NoisePredictor(network, schedule, predict)


def exact_x_0(x_T, alpha_T):
    return MU + STD * (x_T - math.sqrt(alpha_T) * MU) / math.sqrt(alpha_T * STD**2 + 1 - alpha_T)


def exact_x_T(x_0, alpha_T):
    return math.sqrt(alpha_T) * MU + (x_0 - MU) / STD * math.sqrt(alpha_T * STD**2 + 1 - alpha_T)


def sampling_error(tau, order=1, schedule=None, predict="eps"):
    schedule, x_T = schedule or NoiseSchedule(), randn(8, 3, 4, 4)
    x_0 = ddim_sample(gaussian_model(schedule, predict), x_T, schedule, tau, order=order)
    return largest(x_0 - exact_x_0(x_T, schedule.alpha(tau[-1])))


def encoding_error(tau, schedule=None, predict="eps"):
    schedule, x_0 = schedule or NoiseSchedule(), MU + STD * randn(8, 3, 4, 4)
    x_T = ddim_encode(gaussian_model(schedule, predict), x_0, schedule, tau)
    return largest(x_T - exact_x_T(x_0, schedule.alpha(tau[-1])))


def round_trip_error(tau, predict="eps"):
    model, schedule, x_0 = gaussian_model(predict=predict), NoiseSchedule(), MU + STD * randn(8, 3, 4, 4)
    return largest(ddim_sample(model, ddim_encode(model, x_0, schedule, tau), schedule, tau) - x_0)


@pytest.mark.parametrize("predict", ["v", "eps"])
@pytest.mark.parametrize(("order", "tolerance"), [(1, 1e-2), (2, 2e-4)])
def test_a_thousand_steps_land_on_the_exact_solution(order, tolerance, predict):
    assert sampling_error(range(1000), order, predict=predict) < tolerance


@pytest.mark.parametrize("predict", ["v", "eps"])
@pytest.mark.parametrize("error", [encoding_error, round_trip_error])
def test_a_thousand_steps_encode_an_image_and_bring_it_back(error, predict):
    assert error(range(1000), predict=predict) < 2e-2


@pytest.mark.parametrize("walk", [ddim_sample, ddim_encode])
def test_a_network_of_v_and_one_of_eps_that_know_the_same_walk_the_same_way(walk):
    start, tau = randn(8, 3, 4, 4), ddim_timesteps(1000, 20, "quadratic")
    ends = [walk(gaussian_model(predict=predict), start, NoiseSchedule(), tau) for predict in ("v", "eps")]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("error", [sampling_error, encoding_error, round_trip_error])
def test_more_steps_come_closer(error, tau):
    errors = [error(ddim_timesteps(1000, steps, tau)) for steps in (10, 20, 50, 100, 250)]
    assert all(np.diff(np.log(errors)) < math.log(0.7)), errors


@pytest.mark.parametrize(("tau", "steps"), [("quadratic", 40), ("karras", 40), ("uniform", 250)])
def test_order_2_is_several_times_closer_than_order_1(tau, steps):  # uniform steps are uneven in log sigma
    tau = ddim_timesteps(1000, steps, tau)
    assert sampling_error(tau, order=2) < sampling_error(tau, order=1) / 5


@pytest.mark.parametrize(
    ("error", "order"),
    [(sampling_error, 1), (functools.partial(sampling_error, order=2), 2), (encoding_error, 1)],
    ids=["sampling", "sampling of order 2", "encoding"],
)
def test_the_error_falls_with_the_order_promised(error, order):
    schedule = NoiseSchedule(3841, 1e-6, 0.005)  # 3840 divides into each number of steps, with the ends the same
    counts = [30, 60, 120, 240, 480]
    errors = [error(range(0, 3841, 3840 // count), schedule=schedule) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15), errors


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, inside diffusers
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_order_2_is_diffusers_dpm_solver(tau, steps):
    schedule, x_T = NoiseSchedule(), randn(2, 3, 4, 4)
    tau = ddim_timesteps(1000, steps, tau)
    solver = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero")
    solver.set_timesteps(steps)
    solver.timesteps = torch.tensor(tau[::-1])
    solver.sigmas = torch.tensor([schedule.noise_ratio(t) for t in tau[::-1]] + [0.0])
    x = x_T
    for t in solver.timesteps:
        x = solver.step(smooth_model(x, t.expand(2)), t, x).prev_sample
    x_0 = ddim_sample(smooth_model, x_T, schedule, tau, order=2)
    torch.testing.assert_close(x_0, x.to(x_0.dtype), rtol=1e-4, atol=1e-4)


def test_order_2_asks_the_network_no_more_often_than_order_1():
    calls = {1: 0, 2: 0}
    for order in calls:

        def model(x, t, order=order):
            calls[order] += 1
            return smooth_model(x, t)

        ddim_sample(model, randn(1, 3, 4, 4), NoiseSchedule(), [0, 250, 500, 750], order=order)
    assert calls == {1: 4, 2: 4}


# ---- Interpolation ---------------------------------------------------------------------------------------------------


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


def test_slerp_begins_at_its_first_argument_and_ends_at_its_second():
    a, b = randn(2, 3, 8, 8, seed=1), randn(2, 3, 8, 8, seed=2)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_slerp_between_equal_norms_keeps_the_norm_and_goes_its_share_of_the_angle(weight):
    unit = [x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (randn(3, 3, 8, 8, seed=i) for i in (1, 2))]
    a, b, between = (x.flatten(1) for x in (*unit, slerp(*unit, weight)))
    torch.testing.assert_close(between.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((a * between).sum(1).acos(), weight * (a * b).sum(1).acos())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "half_way"), [(1.0, 1.0), (3.0, 2.0), (1 + 1e-7, 1.0)])
def test_slerp_between_parallel_vectors_is_the_straight_line(scale, half_way, dtype):
    a = randn(2, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(slerp(a, scale * a, 0.5), half_way * a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b", [-1.0, 0.0])
def test_slerp_stays_finite_between_opposite_and_zero_vectors(b):
    a = randn(2, 3, 8, 8)
    assert slerp(a, b * a, 0.5).isfinite().all() and slerp(0 * a, 0 * a, 0.5).isfinite().all()


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_every_pixel_value_survives_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x.double(), values.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(x), values)


def test_pixels_are_rounded_to_the_nearest_value_and_clamped():
    levels = torch.tensor([10.4, 10.6, 254.4, 254.6, 255.3, 1000.0, -0.4, -0.6, -1000.0])
    assert to_uint8(levels / 127.5 - 1).tolist() == [10, 11, 254, 255, 255, 255, 0, 0, 0]
