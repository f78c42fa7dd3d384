"""Denoising diffusion implicit models on CIFAR-10, in one file: train a UNet to predict noise, sample it with DDIM.

    python ddim_cifar.py                                       quick test: one training step, then 16 samples
    python ddim_cifar.py --epochs 50 --iterations 1000         train, save checkpoints, draw a 4x4 grid
    python ddim_cifar.py --resume auto --epochs 100            go on from the newest checkpoint
    python ddim_cifar.py --sample ddim_model_final.pth --num-samples 50000 --export samples/

The network and its training are those of Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239
("DDPM" below); schedule, sampler, step selection and experiments those of Song, Meng & Ermon, "Denoising Diffusion Implicit
Models", arXiv 2010.02502, whose equation numbers stand at the lines. Its alpha_t is called alphas_cumprod[t] here.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import socket
import stat
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

# ---- UNet ------------------------------------------------------------------------------------------------------------
# DDPM, App. B. Parameters carry the names of the published weights (diffusers' UNet2DModel), so either loads the other's.

group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)


def sinusoidal_embedding(t, dim):
    """Embed timesteps as sines, then cosines, of geometrically spaced frequencies (DDPM App. B; arXiv 1706.03762, Sec. 3.5).

    t: int64 [N]; dim: even, at least 4. Returns float32 [N, dim]; frequency i of dim/2 is 10000^(-i / (dim/2 - 1)).
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2 - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time_emb):  # [N, c_in, H, W], [N, c_time] -> [N, c_out, H, W]
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h += self.time_emb_proj(time_emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=True)))
        h += self.conv_shortcut(x)
        return h


class Attention(nn.Module):
    """One head over all H x W positions."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1, H*W, C]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The ResBlocks of one resolution, the attention behind some of them, and the way to the next resolution."""

    def __init__(self, widths_in, width, c_time, dropout, attends, downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, width, c_time, dropout) for c_in in widths_in)
        self.attentions = nn.ModuleList(Attention(width) if here else nn.Identity() for here in attends)
        self.downsamplers, self.upsamplers = nn.ModuleList(downsamplers), nn.ModuleList(upsamplers)


class UNet(nn.Module):
    """The DDPM CIFAR-10 network: predicts the noise eps in x_t. 35,746,307 parameters by default.

    channels: width of the first resolution, a multiple of 32; channel_mults: width of each resolution over channels; res_blocks:
    ResBlocks per resolution (one more on the way up); attn_resolutions: sides in pixels, where attention follows each ResBlock
    (in the middle, always the first); image_size: H, divisible by 2^(len(channel_mults) - 1). ValueError if sizes do not fit.
    """

    def __init__(self, channels=128, channel_mults=(1, 2, 2, 2), res_blocks=2, attn_resolutions=(16,), dropout=0.1, image_size=32):
        super().__init__()
        if channels % 32 or min(channels, *channel_mults, res_blocks) < 1:
            raise ValueError("channels must be a multiple of 32, channel_mults and res_blocks at least 1")
        resolutions = [image_size >> level for level in range(len(channel_mults))]
        if image_size % (1 << len(resolutions) - 1) or not set(attn_resolutions) <= set(resolutions):
            raise ValueError(f"image_size {image_size} allows resolutions {resolutions}, attention at {list(attn_resolutions)}")
        levels = [(channels * mult, side in attn_resolutions) for mult, side in zip(channel_mults, resolutions)]
        c_time = 4 * channels
        self.channels = channels
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(channels, c_time), "linear_2": nn.Linear(c_time, c_time)})
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [channels]
        for level, (width, attends) in enumerate(levels, 1):
            inputs = [skips[-1]] + [width] * (res_blocks - 1)
            down = [Downsample(width)] if level < len(levels) else []
            self.down_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * res_blocks, downsamplers=down))
            skips += [width] * (res_blocks + len(down))

        self.mid_block = Stage([width, width], width, c_time, dropout, [True, False])

        self.up_blocks = nn.ModuleList()
        below = width  # of what comes from the resolution below
        for level, (width, attends) in reversed(list(enumerate(levels))):
            inputs = [c_in + skips.pop() for c_in in [below] + [width] * res_blocks]
            up = [Upsample(width)] if level else []
            self.up_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * (res_blocks + 1), upsamplers=up))
            below = width

        self.conv_norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

        for name, module in self.named_modules():  # DDPM's variance scaling, fan_avg
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "to_out.0", "conv_out")):  # the last of each residual branch, and of the network
                    nn.init.zeros_(module.weight)

    def forward(self, x, t):
        """x: [N, 3, H, H], H = image_size, values around [-1, 1]; t: int64 [N]. Returns eps, [N, 3, H, H]."""
        time_emb = self.time_embedding["linear_1"](sinusoidal_embedding(t, self.channels))
        time_emb = F.silu(self.time_embedding["linear_2"](F.silu(time_emb)))  # each ResBlock would apply this SiLU again
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = [h]
        for stage in self.down_blocks:
            for resnet, attention in zip(stage.resnets, stage.attentions):
                h = attention(resnet(h, time_emb))
                skips.append(h)
            for downsample in stage.downsamplers:
                h = downsample(h)
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions):
            h = attention(resnet(h, time_emb))
        for stage in self.up_blocks:
            for resnet, attention in zip(stage.resnets, stage.attentions):
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), time_emb))
            for upsample in stage.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h), inplace=True))


# ---- Diffusion -------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """Linear betas (DDPM Sec. 4). alphas_cumprod: float64 [timesteps] on the CPU, the alpha_t of the DDIM paper."""

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        self.timesteps = timesteps
        self.betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    def alpha(self, t):
        """alphas_cumprod as a Python float; t = -1 is the clean image, alpha 1."""
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def noise_ratio(self, t):
        """sqrt((1 - alpha) / alpha), the sigma(t) of Eq. 14: x_t / sqrt(alpha) = x_0 + sigma(t) eps."""
        return math.sqrt((1 - self.alpha(t)) / self.alpha(t))

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a schedule lives as long as its program)
    def scales(self, device, dtype):
        alphas = self.alphas_cumprod
        return [scale.sqrt().to(dtype).to(device) for scale in (alphas, 1 - alphas)]  # in this order: MPS knows no float64

    def add_noise(self, x_0, eps, t):
        """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps (Eq. 4). x_0, eps: [N, ...]; t: int64 [N] in 0..timesteps-1."""
        signal_scale, noise_scale = (scale[t].view(-1, *[1] * (x_0.ndim - 1)) for scale in self.scales(x_0.device, x_0.dtype))
        return signal_scale * x_0 + noise_scale * eps


TAUS = ("uniform", "quadratic", "karras")


def ddim_timesteps(timesteps, steps, tau, schedule=None):
    """The sub-sequence tau of 0..timesteps-1 that sampling visits (App. D.2): `steps` distinct ints, ascending.

    tau: "uniform" floor(i T / S); "quadratic" floor(c i^2), the last at 0.8 T, as in the official code; "karras" equal steps in
    sigma^(1/7), the sigma of Eq. 14 (arXiv 2206.00364, Eq. 5), by `schedule` (the default one of `timesteps` steps if None).
    ValueError unless 1 <= steps <= timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1..{timesteps}, not {steps}")
    i = np.arange(steps)
    if tau == "uniform":
        wanted = i * timesteps // steps
    elif tau == "quadratic":
        wanted = 4 * timesteps * i**2 // (5 * (steps - 1) ** 2) if steps > 1 else np.array([4 * timesteps // 5])
    elif tau == "karras":
        alphas = (schedule or NoiseSchedule(timesteps)).alphas_cumprod.numpy()
        warped = ((1 - alphas) / alphas) ** (1 / 14)
        wanted = np.interp(np.linspace(warped[-1], warped[0], steps)[::-1], warped, np.arange(timesteps)).round().astype(int)
    else:
        raise ValueError(f"tau must be one of {', '.join(TAUS)}, not {tau!r}")
    distinct = np.maximum.accumulate(wanted - i) + i  # where values collide, the next free integer ...
    return np.minimum(distinct, timesteps - steps + i).tolist()  # ... that leaves room for those to come


@torch.inference_mode()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, *, order=1, clip_x0=False, noise=None, on_step=None):
    """Walk from x_T to x_0 along tau (Eq. 12). Deterministic for eta = 0; eta = 1 has the variance of DDPM (Eq. 16).

    model: any callable (x [N, ...], t int64 [N]) -> eps [N, ...]; x_T: [N, ...], float32 or float64, which the state keeps; tau:
    ascending timesteps, as from ddim_timesteps. order 2: a second-order step at no further network evaluations, for eta = 0 only.
    clip_x0: clamp each predicted x_0 to [-1, 1] and derive eps again. noise(): standard normal [N, ...] for eta > 0; else
    torch.randn_like. on_step(t, x_0): called at each step. Returns x_0 like x_T. ValueError for eta outside [0, 1], or for
    order 2 with eta > 0.
    """
    if not 0 <= eta <= 1 or order not in (1, 2) or (order == 2 and eta > 0):
        raise ValueError(f"eta must be in [0, 1] and order 1 or 2, order 2 only with eta 0; not eta {eta}, order {order}")
    x_t, eps_before, h_before = x_T, None, None
    for t, t_prev in reversed(list(zip(tau, [-1, *tau[:-1]]))):
        alpha, alpha_prev = schedule.alpha(t), schedule.alpha(t_prev)
        eps = model(x_t, x_t.new_full((len(x_t),), t, dtype=torch.int64)).to(x_t.dtype)
        if order == 2:  # Adams-Bashforth for d(x_t / sqrt(alpha_t)) = eps d sigma, Eq. 14
            eps_here, h = eps, schedule.noise_ratio(t_prev) - schedule.noise_ratio(t)
            if eps_before is not None:
                eps = eps_here + h / (2 * h_before) * (eps_here - eps_before)
            eps_before, h_before = eps_here, h
        x_0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)  # Eq. 9
        if clip_x0:
            x_0 = x_0.clamp(-1, 1)
            eps = (x_t - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)  # Eq. 16
        x_t = math.sqrt(alpha_prev) * x_0 + math.sqrt(max(0.0, 1 - alpha_prev - sigma**2)) * eps  # Eq. 12
        if sigma > 0:
            x_t += sigma * (noise() if noise else torch.randn_like(x_t))
        if on_step:
            on_step(t, x_0)
    return x_t


@torch.inference_mode()
def ddim_encode(model, x_0, schedule, tau):
    """Walk from x_0 to its code x_T: the ODE of ddim_sample, run the other way (Sec. 4.3, Eq. 14).

    Arguments as for ddim_sample. eps is taken where a step starts; no network knows alpha = 1, so the first step asks for tau[0].
    Returns x_T like x_0.
    """
    x_t = x_0
    for t, t_next in zip([-1, *tau[:-1]], tau):
        alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
        eps = model(x_t, x_t.new_full((len(x_t),), max(t, tau[0]), dtype=torch.int64)).to(x_t.dtype)
        x_t = math.sqrt(alpha_next) * (x_t / math.sqrt(alpha) + (schedule.noise_ratio(t_next) - schedule.noise_ratio(t)) * eps)
    return x_t


def slerp(a, b, weight):
    """Spherical interpolation of noises, per image (App. D.5). a, b: [N, ...]; weight: float or [N]; 0 gives a, 1 gives b."""
    weight = torch.as_tensor(weight, dtype=a.dtype).to(a.device).expand(len(a)).view(-1, *[1] * (a.ndim - 1))
    norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    cosine = (a.flatten(1) * b.flatten(1)).sum(1) / norms.clamp(min=torch.finfo(a.dtype).tiny)
    theta = cosine.clamp(-1, 1).acos().view_as(weight)
    parallel = theta.sin() < 1e-6  # the arc is a line, or not unique
    safe = torch.where(parallel, 1.0, theta.sin())
    weight_a = torch.where(parallel, 1 - weight, ((1 - weight) * theta).sin() / safe)
    weight_b = torch.where(parallel, weight, (weight * theta).sin() / safe)
    return weight_a * a + weight_b * b


# ---- Data ------------------------------------------------------------------------------------------------------------
# Images are uint8 [N, 3, 32, 32] at rest. Every draw is a function of (seed, what for, position): nothing to save or to lose.
# What for: 0 order, 1 flips, t and eps, 2 dropout, 3 held-out eps, 4 x_T, 5 noise of eta > 0, 6 first weights.

SIZE = 32
HELD_OUT = 256  # images of the held-out loss
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # this process, of those torchrun started
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
rng = np.random.default_rng  # of a tuple: seed, what for, position


class UserError(Exception):
    """A mistake or a misfortune that one line explains."""


class Offline(UserError):
    """CIFAR-10 is neither here nor to be downloaded."""


def say(text, file=None):
    """A line from the first process alone, that does not tear the progress bar."""
    if RANK == 0:
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()


def progress(items=None, **options):
    return tqdm(items, disable=RANK > 0 or None, dynamic_ncols=True, **options)  # None: silent when stderr is no terminal


def torch_seed(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def load_images(dataset, data_dir):
    """The training and the held-out images of cifar10, folder or synthetic, uint8 [N, 3, 32, 32] each; or UserError."""
    if dataset == "synthetic":
        return draw_shapes(10_000, seed=0), draw_shapes(HELD_OUT, seed=1)
    if dataset == "folder":
        images = read_folder(Path(data_dir))
        every = max(10, len(images) // HELD_OUT)
        held_out = torch.arange(len(images)) % every == every - 1
        return (images[~held_out], images[held_out]) if held_out.any() else (images, images)
    return tuple(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in open_cifar10(data_dir))


def open_cifar10(data_dir):
    """torchvision's train and test splits, downloaded if they are not in data_dir, md5-checked either way."""
    from torchvision.datasets import CIFAR10, utils  # here: the import takes a second that other data sets need not wait for

    with contextlib.suppress(RuntimeError):  # torchvision's word for "not there, or not whole"
        return [CIFAR10(data_dir, train) for train in (True, False)]
    archive, timeout = Path(data_dir, CIFAR10.filename), socket.getdefaulttimeout()
    found_here = archive.exists()
    socket.setdefaulttimeout(30)
    try:
        print(f"Downloading CIFAR-10 (163 MB) to {Path(data_dir).resolve()}", flush=True)
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            return [CIFAR10(data_dir, train, download=train) for train in (True, False)]
    except Exception as error:  # no network, a silent server, an archive cut short, no permission: each has its own
        reason = getattr(error, "reason", error)
    finally:
        socket.setdefaulttimeout(timeout)
        if archive.is_file() and not found_here and utils.calculate_md5(archive) != CIFAR10.tgz_md5:
            archive.unlink()  # a download that broke off
    parts = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    known = {archive: CIFAR10.tgz_md5} | {Path(data_dir, CIFAR10.base_folder, name): md5 for name, md5 in parts}
    for file, md5 in known.items():
        if file.is_file() and (found := utils.calculate_md5(file)) != md5:
            raise UserError(f"{file} is corrupt or cut short: its md5 is {found}, the right one {md5}; delete it, fetch it again")
    raise Offline(
        f"CIFAR-10 is not in {Path(data_dir).resolve()} and could not be downloaded ({reason}). Fetch {CIFAR10_URL} "
        f"(md5 {CIFAR10.tgz_md5}) into that folder, or use --dataset synthetic"
    )


def read_folder(folder):
    """Every readable image below the folder, in order of names: turned upright, resized, centre-cropped. The others are named."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in Image.registered_extensions())

    def read(path):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (4 * SIZE, 4 * SIZE))  # a JPEG is decoded no larger than needed
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which Pillow would clip to 255
                    pixels = np.asarray(image, dtype=np.float64)
                    image = Image.fromarray((pixels / (257 if pixels.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS))
        except Exception as error:  # Pillow's decoders raise nearly everything
            say(f"warning: skipped {path}: {error}", sys.stderr)

    with ThreadPoolExecutor() as pool:
        arrays = progress(pool.map(read, files), total=len(files), desc="reading", unit="image")
        images = [array for array in arrays if array is not None]
    if not images:
        what = f"none of its {len(files)} image files can be read" if files else "it holds no image files"
        what = what if folder.is_dir() else "no such folder"
        raise UserError(f"--data-dir {folder}: {what}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def draw_shapes(count, seed):
    """Discs, squares and diamonds of any colour on shaded grounds: easy to learn, easy to judge."""
    draw = rng(seed)
    kind = torch.from_numpy(draw.integers(3, size=(count, 1, 1)))

    def uniform(low, high, *shape):
        return torch.from_numpy(draw.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32))

    x, y, radius, slope_x, slope_y = (uniform(*limits) for limits in ((10, 21), (10, 21), (4, 10), (-1, 1), (-1, 1)))
    ground, ink = uniform(0, 255, 3), uniform(0, 255, 3)
    side = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = (side - x).abs(), (side[:, None] - y).abs()
    distance = torch.where(kind == 0, torch.hypot(dx, dy), torch.where(kind == 1, torch.maximum(dx, dy), dx + dy))
    cover = (radius - distance + 0.5).clamp(0, 1)[:, None]  # one pixel of anti-aliasing
    shade = 1 + (slope_x * (side / SIZE - 0.5) + slope_y * (side[:, None] / SIZE - 0.5))[:, None] / 2
    return torch.lerp(ground * shade, ink, cover).round().clamp(0, 255).to(torch.uint8)


class Order:
    """For each step first .. last-1, this process's share of indices, from an endless chain of permutations, one per pass."""

    def __init__(self, count, batch_size, seed, first, last, rank=RANK, world_size=WORLD_SIZE):
        self.count, self.batch_size, self.steps = count, batch_size, range(first, last)
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.permutation = functools.lru_cache(maxsize=2)(lambda number: rng((seed, 0, number)).permutation(count))

    def __iter__(self):
        for n in self.steps:
            positions = range(n * self.batch_size, (n + 1) * self.batch_size)[self.share]
            yield [int(self.permutation(position // self.count)[position % self.count]) for position in positions]


def make_loader(images, order, device):
    """Batches in that order; the tensor itself is the data set, and each list of indices one indexing operation."""
    return torch.utils.data.DataLoader(images, batch_size=None, sampler=order, pin_memory=device.type == "cuda")


def to_float(images):
    return images.float() / 127.5 - 1


class Draws:
    """Flips, t and eps of step n, drawn on the device from (seed, n) for the whole global batch; a process takes its share."""

    def __init__(self, batch_size, timesteps, seed, device, rank=RANK, world_size=WORLD_SIZE):
        self.batch_size, self.timesteps, self.seed, self.device, self.rank = batch_size, timesteps, seed, device, rank
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.generator = torch.Generator(device)

    def __call__(self, n):
        """flip bool [B, 1, 1, 1], t int64 [B], eps float32 [B, 3, 32, 32]; dropout's generator, torch's own, is set as well."""
        self.generator.manual_seed(torch_seed(self.seed, 1, n))
        torch.manual_seed(torch_seed(self.seed, 2, n, self.rank))
        on = {"generator": self.generator, "device": self.device}
        flip = torch.rand(self.batch_size, 1, 1, 1, **on) < 0.5
        strata = torch.arange(self.batch_size, device=self.device) * self.timesteps // self.batch_size
        t = (strata + torch.randint(self.timesteps, (1,), **on)) % self.timesteps  # uniform each, evenly spread: arXiv 2107.00630
        eps = torch.randn(self.batch_size, 3, SIZE, SIZE, **on)
        return flip[self.share], t[self.share], eps[self.share]


# ---- Training --------------------------------------------------------------------------------------------------------


def start_processes(asked):
    """Join the processes that torchrun started, if it did, and return the device of this one."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if asked not in ("auto", *there):
        raise UserError(f"--device {asked}: not available here, where there is {', '.join(there)}")
    device = torch.device(there[0] if asked == "auto" else asked)
    if device.type == "cuda":
        if torch.cuda.device_count() < LOCAL_WORLD_SIZE:
            raise UserError(f"{LOCAL_WORLD_SIZE} processes for {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if LOCAL_WORLD_SIZE > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        torch.set_num_threads(max(1, available_cores() // LOCAL_WORLD_SIZE))
    if WORLD_SIZE > 1:
        patience = timedelta(hours=2)  # the others wait while the first downloads CIFAR-10
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device


def available_cores():
    """The cores this process may use, which in a container can be fewer than the host shows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # "max 100000" without a limit
        cores = min(cores, max(1, quota // period))
    return cores


def gather(item):
    """The items of all processes, in order of rank."""
    items = [item] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(items, item)
    return items


def sum_over_processes(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


class Stopped(BaseException):
    """A signal asked for the end."""


class Signals:
    """Ctrl-C, SIGTERM and a closed terminal raise Stopped, at once or as soon as it is not postponed. A second Ctrl-C quits."""

    received, since, postponed = 0, 0.0, False

    def __enter__(self):
        signums = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heeded = [signum for signum in signums if signal.getsignal(signum) not in (signal.SIG_IGN, None)]  # SIG_IGN: under nohup
        self.previous = {signum: signal.signal(signum, self.handle) for signum in heeded}
        return self

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if signum == getattr(signal, "SIGHUP", None):  # the terminal is gone: writing to it would fail
            for stream in (1, 2):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not self.received:
            self.received, self.since = signum, time.monotonic()
        elif signum == signal.SIGINT and ("RANK" not in os.environ or time.monotonic() - self.since > 1):  # torchrun repeats it
            os._exit(128 + signum)
        self.heed()

    def postpone(self, postponed):
        self.postponed = postponed
        self.heed()

    def heed(self):
        if self.received and not self.postponed:
            raise Stopped(self.received)


def write_atomically(path, content):
    """Write a text, or what content(file) writes: the file appears complete and on disk, or not at all. First process only."""
    if RANK > 0:
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    write = content if callable(content) else lambda file: file.write(content.encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename, too, has to reach the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk in a RuntimeError
        raise UserError(f"cannot write {path.resolve()}: {error.__context__ or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclass
class State:
    """What training changes, and a checkpoint holds."""

    model: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    step: int = 0


FORMAT = 1
UNET_FLAGS = ("channels", "channel_mults", "res_blocks", "attn_resolutions", "dropout")
SCHEDULE_FLAGS = ("timesteps", "beta_start", "beta_end")


def save_checkpoint(path, state, config):
    """Tensors and plain values only, so that torch.load(weights_only=True) reads it."""
    parts = {"model": state.model.state_dict(), "ema": state.ema.state_dict(), "optimizer": state.optimizer.state_dict()}
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "config": config, "step": state.step, **parts}, file))


def load_checkpoint(path, device):
    """Read and validate a checkpoint, running nothing in it: a dict of format, config, step, model, ema, optimizer.

    Published weights in diffusers' naming (.bin, .safetensors) give a dict of format, config (the network's flags) and ema alone.
    UserError, naming the file and the reason, for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load does not look at the CRCs
            raise UserError("damaged, a checksum is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            safe = path.suffix == ".safetensors"
            checkpoint = read_safetensors(path, device) if safe else torch.load(path, map_location=device, weights_only=True)
        if "conv_in.weight" in checkpoint:
            checkpoint = from_published(checkpoint)
        validate(checkpoint)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: damaged, or more than tensors and plain values; nothing of it was run") from error
    except Exception as error:  # zip, pickle and tensor readers have errors of many kinds
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise UserError(f"checkpoint {path}: damaged, cut short or not of this program ({reason})") from error
    return checkpoint


def validate(checkpoint):
    """UserError, or another error, if anything a checkpoint should hold is missing, of another shape, or not finite."""
    if checkpoint["format"] > FORMAT:
        raise UserError(f"written by a newer version of this program (format {checkpoint['format']}, this one reads {FORMAT})")
    with torch.device("meta"):
        network = UNet(**{flag: checkpoint["config"][flag] for flag in UNET_FLAGS})
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    parts = {"ema": checkpoint["ema"]}
    if "step" in checkpoint or "model" in checkpoint or "optimizer" in checkpoint:
        if not isinstance(checkpoint["step"], int) or checkpoint["step"] < 0:
            raise UserError(f"its step is {checkpoint['step']!r}")
        parts["model"] = checkpoint["model"]
        moments = checkpoint["optimizer"]["state"]
        for moment in ("exp_avg", "exp_avg_sq") if moments else ():
            parts[f"optimizer's {moment}"] = {name: moments[i][moment] for i, name in enumerate(shapes)}
    for part, tensors in parts.items():
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise UserError(f"its {part} does not fit the network of its config")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"its {part} is not finite throughout")


def read_safetensors(path, device):
    """8 bytes of length, a JSON header, then the tensors: the whole format."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
            tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).view(entry["shape"]).float().to(device)
    return tensors


def from_published(weights):
    """A checkpoint of a state dict in diffusers' naming, old or new; the network's flags are read off its keys and shapes."""
    renamed = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for old, new in renamed.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    channels = len(weights["conv_in.weight"])
    widths = [len(weights[name]) for i in range(9) if (name := f"down_blocks.{i}.resnets.0.conv1.weight") in weights]
    config = {
        "channels": channels,
        "channel_mults": [width // channels for width in widths],
        "res_blocks": sum(f"down_blocks.0.resnets.{i}.conv1.weight" in weights for i in range(99)),
        "attn_resolutions": [SIZE >> i for i in range(9) if f"down_blocks.{i}.attentions.0.to_q.weight" in weights],
        "dropout": 0.1,
    }
    return {"format": FORMAT, "config": config, "ema": weights}


def mean_finite(losses):
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def open_log(path, step):
    """ddim_log.csv, open for more rows, and the seconds in it; rows behind `step`, where a run resumes, are dropped."""
    if RANK > 0:
        return open(os.devnull, "w"), 0.0
    header = ["step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds"]
    rows = [line.split(",") for line in path.read_text(errors="replace").splitlines()] if step and path.is_file() else []
    whole = [row for row in rows if len(row) == len(header) and row[0].isdigit() and row[-1][-1:].isdigit()]  # not cut short
    kept = [row for row in whole if int(row[0]) <= step]
    write_atomically(path, "".join(",".join(row) + "\n" for row in [header, *kept]))
    return open(path, "a", newline="\n", buffering=1), float(kept[-1][-1]) if kept else 0.0


@dataclass
class Run:
    """Where and how the network runs."""

    device: torch.device
    signals: Signals
    precision: str
    compile: str
    out_dir: Path
    saved: Path | None = None  # the newest checkpoint

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, network, evaluations):
        """The network compiled, if that was asked for or so many evaluations of a batch earn back the minute it takes."""
        able = importlib.util.find_spec("triton") and any(map(shutil.which, ("cc", "gcc", "clang")))
        modern = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (7, 0)
        earned = modern and able and evaluations >= 2000
        wanted = {"on": evaluations > 0, "auto": earned, "off": False}[self.compile]
        return torch.compile(network) if wanted else network


def choose_precision(asked, device):
    """bf16 where matrix units compute it, at several times the speed of fp32: GPUs since Ampere, CPUs with AMX."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return asked if asked != "auto" else "bf16" if fast else "fp32"


@torch.inference_mode()
def held_out_loss(model, images, schedule, run):
    """The loss for fixed eps and t, evenly spread: it falls while the training loss, noisy by nature, looks flat."""
    x_0, total = to_float(images[:HELD_OUT].to(run.device)), torch.zeros((), device=run.device)
    t = torch.arange(len(x_0), device=run.device) * schedule.timesteps // len(x_0)
    eps = torch.from_numpy(rng((0, 3)).standard_normal(x_0.shape, dtype=np.float32)).to(run.device)
    x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
    for first in range(32 * RANK, len(x_t), 32 * WORLD_SIZE):
        part = slice(first, first + 32)
        with run.autocast():
            predicted = model(x_t[part], t[part])
        total += (predicted.float() - eps[part]).square().sum()
    return float(sum_over_processes(total)) / eps.numel()


def make_step(state, schedule, args, run):
    """step(batch): one optimizer step on uint8 images, this process's share; returns loss and gradient norm, unread, and lr."""
    device, total = run.device, args.epochs * args.iterations
    draws = Draws(args.batch_size, schedule.timesteps, args.seed, device)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    gamma = (snr.clamp(max=args.min_snr or math.inf) / snr).float().to(device)  # 1, or min-SNR: arXiv 2303.09556
    parameters, averages = list(state.model.parameters()), list(state.ema.parameters())
    network = run.compiled(state.model.train(), total - state.step)
    if WORLD_SIZE > 1:
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)

    def step(batch):  # nothing in here waits for the device
        n = state.step
        flip, t, eps = draws(n)
        x_0 = to_float(batch.to(device, non_blocking=True))
        x_t = schedule.add_noise(torch.where(flip, x_0.flip(3), x_0), eps, t)
        with run.autocast():
            predicted = network(x_t.contiguous(memory_format=torch.channels_last), t)
        loss = (gamma[t] * (predicted.float() - eps).square().mean((1, 2, 3))).mean()  # Eq. 5
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        loss = sum_over_processes(loss.detach()) / WORLD_SIZE
        to_zero = (total - n) / max(1, args.lr_decay * total) if args.lr_decay else 1.0
        lr = args.lr * min(1.0, (n + 1) / max(1, args.warmup), to_zero)  # linear warm-up, constant, linear decay
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.found_inf = (~(loss + grad_norm).isfinite()).float()  # 1: the fused kernel leaves everything as it is
        if device.type != "mps" or not state.optimizer.found_inf:  # Metal's kernel passes over found_inf in some versions
            state.optimizer.step()
        with torch.no_grad():  # average = d average + (1 - d) parameter
            d = min(args.ema_decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(averages, parameters, 1 - d)
        state.step += 1
        return loss, grad_norm, lr

    return step


def train(state, images, held_out, schedule, args, run, preview):
    """Take the steps that are left, write log and checkpoints, call preview(epoch) after each ddim_model_epoch_N.

    Raises Stopped when a signal came, with a checkpoint saved, and FloatingPointError after ten bad steps in a row.
    """
    total = args.epochs * args.iterations
    loader = make_loader(images, Order(len(images), args.batch_size, args.seed, state.step, total), run.device)
    step = make_step(state, schedule, args, run)

    def save(name):
        nonlocal last_save
        save_checkpoint(run.out_dir / name, state, vars(args))
        say(f"saved {run.out_dir / name}")
        run.saved, last_save = run.out_dir / name, time.monotonic()

    log, seconds = open_log(run.out_dir / "ddim_log.csv", state.step)
    read_every = 1 if run.device.type == "cpu" else 10  # to read a loss is to wait for the device
    pending, losses, recent, epoch_began, bad, skipped = [], [], [], seconds, 0, 0
    clock = last_save = time.monotonic()
    run.signals.postpone(True)
    with log, progress(total=total, initial=state.step, unit="step") as bar:
        for batch in loader:
            pending.append(step(batch))
            epoch, epoch_ends = state.step // args.iterations, state.step % args.iterations == 0
            if not epoch_ends and state.step % read_every and not (run.signals.received and WORLD_SIZE == 1):
                continue

            read, norms, rates = zip(*pending)
            read, norms = torch.stack([*read, *norms]).view(2, -1).tolist()  # one wait for the device
            each = (time.monotonic() - clock) / len(pending)
            periodic = epoch_ends and epoch % args.save_every == 0
            val_loss = held_out_loss(state.ema, held_out, schedule, run) if periodic or state.step == total else ""
            for n, loss, grad_norm, lr in zip(range(state.step - len(pending) + 1, state.step + 1), read, norms, rates):
                seconds += each
                taken = val_loss if n == state.step else ""
                row = [n, (n - 1) // args.iterations + 1, loss, taken, lr, grad_norm, args.batch_size / each, seconds]
                log.write(",".join(f"{value:.7g}" if isinstance(value, float) else str(value) for value in row) + "\n")
                bad = 0 if math.isfinite(loss + grad_norm) else bad + 1
                skipped += bad > 0
            losses += read
            recent = [*recent, *read][-100:]
            bar.set_postfix_str(f"loss {mean_finite(recent):.4f}, {args.batch_size / each:,.1f} images/s", refresh=False)
            bar.update(len(pending))
            pending.clear()
            if bad >= 10:
                good = f"The last good checkpoint is {run.saved}" if run.saved else "No checkpoint had been saved"
                raise FloatingPointError(f"10 steps in a row without a finite loss or gradient; try a lower --lr. {good}")
            if epoch_ends:
                line = f"epoch {epoch}/{args.epochs}  step {state.step:,}  loss {mean_finite(losses):.4f}"
                line += f"  held-out loss {val_loss:.4f}" if val_loss != "" else ""
                line += f"  {args.batch_size * len(losses) / (seconds - epoch_began):,.1f} images/s"
                say(line + (f"  {skipped} bad steps skipped" if skipped else ""))
                losses, epoch_began = [], seconds

            stop = max(gather(run.signals.received))
            if periodic:
                save(f"ddim_model_epoch_{epoch}.pth")
            if state.step == total:
                save("ddim_model_final.pth")
            elif stop or time.monotonic() - last_save >= 60 * args.save_minutes:
                save("ddim_model_last.pth")
            if stop:
                raise Stopped(stop)
            if periodic:
                run.signals.postpone(False)
                preview(epoch)
                run.signals.postpone(True)
            clock = time.monotonic()
    run.signals.postpone(False)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def to_uint8(x):
    """[-1, 1] to 0..255, rounded and clamped: the inverse of u8 / 127.5 - 1."""
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class Sampler:
    """Makes images by number. Image i comes from x_T of (seed, i) alone, whatever else is asked for, on any processes."""

    def __init__(self, model, schedule, args, run, evaluations=0):
        self.model, self.schedule, self.args, self.run = model.eval(), schedule, args, run
        network = bf16_layers(model) if run.precision == "bf16" else model
        self.network = run.compiled(network, evaluations)
        self.fixed_size = self.network is not network  # another batch size would be compiled anew
        self.bar = tqdm(disable=True)

    def eps(self, x, t):
        with self.run.autocast():
            eps = self.network(x, t)
        self.bar.update(len(x) * WORLD_SIZE)
        return eps

    def noise(self, indices):
        x_T = self.normal([rng((self.args.seed, 4, i)) for i in indices])
        if self.args.standardize_noise:
            x_T = (x_T - x_T.mean((2, 3), keepdim=True)) / x_T.std((2, 3), keepdim=True)
        return x_T

    def normal(self, generators):
        x = np.stack([generator.standard_normal((3, SIZE, SIZE), dtype=np.float32) for generator in generators])
        return torch.from_numpy(x).to(self.run.device).contiguous(memory_format=torch.channels_last)

    def tau(self, steps):
        return ddim_timesteps(self.schedule.timesteps, steps, self.args.tau, self.schedule)

    def sample(self, indices, steps, x_T=None, **options):
        x_T = self.noise(indices) if x_T is None else x_T
        generators = [rng((self.args.seed, 5, i)) for i in indices] if self.args.eta else []
        options |= {"order": self.args.order, "clip_x0": self.args.clip_x0, "noise": lambda: self.normal(generators)}
        return ddim_sample(self.eps, x_T, self.schedule, self.tau(steps), self.args.eta, **options)

    @torch.inference_mode()
    def batch_size(self):
        if self.args.sample_batch_size:
            return self.args.sample_batch_size
        if self.run.device.type != "cuda":
            return 64
        probe = self.noise(range(16))
        before = torch.cuda.memory_allocated()
        for _ in range(2):  # the first also holds what the choice of convolutions tries
            torch.cuda.reset_peak_memory_stats()
            self.model(probe, torch.zeros(16, dtype=torch.int64, device=probe.device))  # eager, in float32: an upper bound
        per_image = (torch.cuda.max_memory_allocated() - before) / len(probe)
        torch.cuda.empty_cache()
        return max(1, min(2048, int(0.8 * torch.cuda.mem_get_info()[0] / per_image)))

    def over(self, indices, function, evaluations, desc):
        """Yield (chunk, rows) in order, on every process; each computes its share. rows = function(chunk), one per index.

        evaluations: of the network, per index, for the bar.
        """
        count = math.ceil(len(indices) / (min(gather(self.batch_size())) * WORLD_SIZE)) * WORLD_SIZE
        chunks = [chunk.tolist() for chunk in np.array_split(np.asarray(indices), max(1, count)) if len(chunk)]
        plain = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with progress(total=len(indices) * evaluations, desc=desc, bar_format=plain) as self.bar:
            for first in range(0, len(chunks), WORLD_SIZE):
                turn = chunks[first : first + WORLD_SIZE]
                mine = self.halving(function, turn[RANK], len(chunks[0])) if len(turn) > RANK else None
                yield from zip(turn, gather(mine))

    def halving(self, function, chunk, size):
        """function(chunk), in halves where memory does not suffice."""
        padding = [chunk[-1]] * (size - len(chunk)) if self.fixed_size else []
        try:
            return function(chunk + padding)[: len(chunk)].cpu()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or len(chunk) == 1:
                raise
        torch.cuda.empty_cache()
        half = math.ceil(len(chunk) / 2)
        return torch.cat([self.halving(function, part, half) for part in (chunk[:half], chunk[half:])])

    def all(self, count, function, evaluations, desc):
        return torch.cat([result for _, result in self.over(range(count), function, evaluations, desc)])


def bf16_layers(model):
    """A copy whose convolutions and linear layers hold the bfloat16 values to which autocast would round them each time."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.bfloat16()
    return model


def out_of_memory(error):
    words = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")  # GPUs, Windows, Linux, CUDA's libraries
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def draw_grid(images, columns=None, row_labels=(), column_labels=(), scale=None):
    """A Pillow image of uint8 [N, 3, H, W] in rows, ceil(sqrt(N)) wide by default, with labels at the left and on top."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    side = SIZE * (scale or max(1, min(3, 560 // (columns * SIZE))))
    left, top, pitch = 6 * max(map(len, row_labels), default=-1) + 8, 16 if column_labels else 2, side + 2
    sheet = Image.new("RGB", (left + columns * pitch, top + math.ceil(len(images) / columns) * pitch), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (left + i % columns * pitch, top + i // columns * pitch))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(row_labels):
        draw.text((left - 5, top + row * pitch + side / 2), label, "black", anchor="rm")
    for column, label in enumerate(column_labels):
        draw.text((left + column * pitch + side / 2, top / 2), label, "black", anchor="mm")
    return sheet


def save_grid(images, path, **layout):
    """Write a grid as PNG. images: uint8 [N, 3, H, W]."""
    write_atomically(path, lambda file: draw_grid(images, **layout).save(file, "PNG"))
    say(f"wrote {path}")


def save_samples(sampler, path, count, export=None):
    """The grid of the first 256; and all: an .npz, complete or absent, or a folder of PNGs, which goes on where it stopped."""
    steps, export = sampler.args.sample_steps[-1], Path(export).resolve() if export else None
    archive, folder = (export, None) if export and export.suffix == ".npz" else (None, export)
    kept = np.zeros((count if archive else min(count, 256), SIZE, SIZE, 3), np.uint8)  # all, or those of the grid
    todo = range(count if export else len(kept))
    if folder:
        todo = gather(prepare_folder(folder, sampler, count) if RANK == 0 else None)[0]

    def keep(chunk, images):
        for i, image in zip(chunk, images.permute(0, 2, 3, 1).numpy()):
            if i < len(kept):
                kept[i] = image
            if folder:
                try:
                    Image.fromarray(image).save(folder / "unfinished.tmp", "PNG")
                    os.replace(folder / "unfinished.tmp", folder / f"{i:05d}.png")
                except OSError as error:
                    raise UserError(f"cannot write {folder / f'{i:05d}.png'}: {error}") from error

    with ThreadPoolExecutor(1) as pool:  # files are written while the next images are computed
        writing = pool.submit(int)  # nothing yet
        for chunk, images in sampler.over(todo, lambda chunk: to_uint8(sampler.sample(chunk, steps)), steps, "sampling"):
            writing.result()  # a full disk ends the run now
            writing = pool.submit(keep, chunk, images) if RANK == 0 else writing
        writing.result()
    if RANK > 0:
        return
    for i in set(range(len(kept))) - set(todo):  # drawn by the run that was stopped
        kept[i] = np.asarray(Image.open(folder / f"{i:05d}.png"))
    if archive:
        write_atomically(archive, lambda file: np.savez(file, kept))
    if export:
        say(f"wrote {count:,} images to {export}")
    save_grid(torch.from_numpy(kept[:256]).permute(0, 3, 1, 2), path)


def prepare_folder(folder, sampler, count):
    """The folder holds images of one origin, which a hidden file states, and no more than asked for; returns those it lacks."""
    note, weights = folder / ".origin.json", sampler.model.state_dict().values()
    names = ("seed", "sample_steps", "tau", "order", "eta", "clip_x0", "standardize_noise", *SCHEDULE_FLAGS)
    flags = {name: getattr(sampler.args, name) for name in names}
    crc = functools.reduce(lambda crc, value: zlib.crc32(value.cpu().numpy().tobytes(), crc), weights, 0)
    origin = json.dumps({"weights_crc32": crc, "precision": sampler.run.precision, **flags})
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in folder.iterdir()} - {"unfinished.tmp", f"{note.name}.tmp"}  # of a run that was killed
    known = note.read_text(errors="replace") if note.name in present else None
    wanted = {f"{i:05d}.png": i for i in range(count)}
    if (present and known != origin) or present - wanted.keys() - {note.name}:
        raise UserError(f"--export {folder}: it holds other files, or images of other weights or settings; choose another")
    (folder / "unfinished.tmp").unlink(missing_ok=True)
    write_atomically(note, origin)
    return [i for name, i in wanted.items() if name not in present]


def trajectory(sampler, out_dir):
    """The predicted x_0 on the way from noise to picture: a row per image, and an animation of all of them."""
    steps, count = sampler.args.sample_steps[-1], min(16, sampler.args.num_samples)

    def frames(indices):
        x_T = sampler.noise(indices)
        seen = [to_uint8(x_T)]
        sampler.sample(indices, steps, x_T, on_step=lambda t, x_0: seen.append(to_uint8(x_0)))
        return torch.stack(seen, dim=1)

    films = sampler.all(count, frames, steps, "trajectory")  # [count, 1 + steps, 3, 32, 32]
    labels = ["x_T"] + [f"t={t}" for t in reversed(sampler.tau(steps))]
    chosen = np.linspace(0, steps, min(11, steps + 1)).round().astype(int).tolist()
    rows = films[:8, chosen].flatten(0, 1)
    save_grid(rows, out_dir / "ddim_trajectory.png", columns=len(chosen), column_labels=[labels[i] for i in chosen])
    sheets = [draw_grid(films[:, i], scale=2) for i in np.linspace(0, steps, min(26, steps + 1)).round().astype(int)]
    options = {"save_all": True, "append_images": sheets[1:], "duration": [120] * (len(sheets) - 1) + [2000], "loop": 0}
    write_atomically(out_dir / "ddim_trajectory.gif", lambda file: sheets[0].save(file, "GIF", **options))
    say(f"wrote {out_dir / 'ddim_trajectory.gif'}")


def interpolation(sampler, out_dir, columns=11):
    """Pictures between pictures: slerp between pairs of x_T (App. D.5), a row per pair."""
    pairs, steps = min(8, max(1, sampler.args.num_samples // 2)), sampler.args.sample_steps[-1]

    def between(indices):
        row, column = np.divmod(indices, columns)
        x_T = slerp(sampler.noise(2 * row), sampler.noise(2 * row + 1), torch.from_numpy(column / (columns - 1)))
        return to_uint8(sampler.sample(indices, steps, x_T))

    images = sampler.all(pairs * columns, between, steps, "interpolation")
    labels = [f"{column / (columns - 1):.1f}" for column in range(columns)]
    save_grid(images, out_dir / "ddim_interpolation.png", columns=columns, column_labels=labels)


def consistency(sampler, out_dir):
    """The same x_T at several S (Sec. 5.2): a row per image, a column per S; and how far each S ends from the last, on [0, 1]."""
    count, lengths = min(256, sampler.args.num_samples), sampler.args.compared_steps
    columns = [sampler.all(count, lambda chunk, S=S: sampler.sample(chunk, S).clamp(-1, 1), S, f"S = {S}") for S in lengths]
    images = to_uint8(torch.stack([column[:8] for column in columns], dim=1)).flatten(0, 1)
    save_grid(images, out_dir / "ddim_consistency.png", columns=len(lengths), column_labels=[f"S={S}" for S in lengths])
    rows = [(S, ((column - columns[-1]) / 2).square().mean().item()) for S, column in zip(lengths, columns)]  # on [0, 1]
    say(f"Mean squared distance of {count:,} images to those at S = {lengths[-1]}, per dimension on [0, 1]:")
    save_table(out_dir / "ddim_consistency.csv", ("steps", "distance"), rows)


def reconstruction(sampler, out_dir, test_images):
    """Encode test images in S steps, decode them in S steps: a picture, and the error on [0, 1] of Table 2."""
    count = min(len(test_images), sampler.args.num_samples)
    shown = min(16, count)
    paper = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}  # Table 2
    images, rows, labels = [test_images[:shown]], [], ["original"]
    for S in sampler.args.compared_steps:

        def there_and_back(indices, S=S):
            x_0 = to_float(test_images[indices].to(sampler.run.device)).contiguous(memory_format=torch.channels_last)
            return sampler.sample(indices, S, x_T=ddim_encode(sampler.eps, x_0, sampler.schedule, sampler.tau(S)))

        decoded = sampler.all(count, there_and_back, 2 * S, f"reconstruction, S = {S}")
        error = ((decoded - to_float(test_images[:count])) / 2).square().mean().item()  # on [0, 1]
        rows.append((S, error, paper.get(S, "")))
        images.append(to_uint8(decoded[:shown]))
        labels.append(f"S={S}")
    save_grid(torch.cat(images), out_dir / "ddim_reconstruction.png", columns=shown, row_labels=labels)
    say(f"Mean squared error of {count:,} reconstructed test images, per dimension on [0, 1], beside the paper's (Table 2):")
    save_table(out_dir / "ddim_reconstruction.csv", ("steps", "error", "paper"), rows)


def save_table(path, header, rows):
    """Show a table, and write it as CSV."""
    rows = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    say("\n".join("".join(f"{cell:>12}" for cell in row) for row in rows))
    write_atomically(path, "".join(",".join(row) + "\n" for row in rows))
    say(f"wrote {path}")


# ---- Command ---------------------------------------------------------------------------------------------------------

TRAINING_FLAGS = ("epochs", "iterations", "batch_size", "lr", "warmup", "lr_decay", "grad_clip", "min_snr", "ema_decay")
TRAINING_FLAGS += ("save_every", "save_minutes")
PLACE_FLAGS = ("resume", "sample", "device", "out_dir", "export", "export_weights")  # of this run, not of the model
EXPERIMENTS = ("trajectory", "interpolate", "consistency", "reconstruct")


class UsageError(UserError):
    """A flag out of range, unknown, or contradicting another."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def spell(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def number(kind, low, high=math.inf, above=False):
    """A parser of numbers in low..high; above: low itself is not allowed."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low) and value != math.inf:
                return value
        limits = f"above {low}" if above else f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' if kind is int else ''}number {limits}")

    return parse


def make_parser():
    wide = functools.partial(argparse.HelpFormatter, max_help_position=34, width=min(130, shutil.get_terminal_size().columns))
    purpose = "Train a UNet on CIFAR-10 and sample it with DDIM. Without flags: a quick test."
    parser = Parser(prog="ddim_cifar.py", description=purpose, formatter_class=wide, add_help=False, allow_abbrev=False)
    count, share = number(int, 1), number(float, 0, 1)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=1, help="length of training from its very start, in epochs of --iterations steps")
    add("--iterations", type=count, default=1, help="optimizer steps per epoch, however long the data set")
    add("--batch-size", type=count, default=32, help="images per step, over all processes")
    add("--lr", type=number(float, 0, above=True), default=2e-4, help="Adam's learning rate")
    add("--warmup", type=number(int, 0), default=1000, help="steps of linear warm-up")
    add("--lr-decay", type=share, default=0.0, help="last share of the run, over which the rate falls to zero")
    add("--grad-clip", type=number(float, 0, above=True), default=1.0, help="largest gradient norm")
    add("--min-snr", type=number(float, 0), default=0.0, help="weigh the loss of t by min(SNR, this) / SNR; 0: equally")
    add("--ema-decay", type=share, default=0.9999, help="decay of the averaged weights, which sampling uses")
    add("--resume", metavar="CKPT", help="checkpoint to continue, with its flags; auto: the newest in --out-dir, or a new run")
    add("--save-every", type=count, default=10, help="epochs between checkpoints, held-out losses and grids")
    add("--save-minutes", type=number(float, 0), default=10.0, help="also refresh ddim_model_last.pth this often")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["cifar10", "folder", "synthetic"], default="cifar10", help="images to learn")
    add("--data-dir", metavar="DIR", default="./data", help="where CIFAR-10 is, or goes; or the folder of images")

    add = parser.add_argument_group("network and noise schedule (of the checkpoint with --resume and --sample)").add_argument
    add("--channels", type=count, default=128, help="width, a multiple of 32")
    add("--channel-mults", type=count, nargs="+", metavar="M", default=[1, 2, 2, 2], help="widths, in units of --channels")
    add("--res-blocks", type=count, default=2, help="ResBlocks per resolution")
    add("--attn-resolutions", type=count, nargs="*", metavar="R", default=[16], help="sides, in pixels, with attention")
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="in each ResBlock")
    add("--timesteps", type=number(int, 2), default=1000, help="T, the number of noise levels")
    add("--beta-start", type=number(float, 1e-9, 0.999), default=1e-4, help="first beta")
    add("--beta-end", type=number(float, 1e-9, 0.999), default=0.02, help="last beta")

    add = parser.add_argument_group("sampling").add_argument
    add("--sample", metavar="CKPT", help="do not train: sample from a checkpoint, or from published weights")
    add("--num-samples", type=count, default=16, help="images")
    listed = "steps S; of a list, all are compared and the last is used"
    add("--sample-steps", type=count, nargs="+", metavar="S", default=[50], help=listed)
    add("--tau", choices=TAUS, default="quadratic", help="which of the T timesteps")
    add("--order", type=int, choices=[1, 2], default=1, help="2: second-order steps at the same cost, not plain DDIM")
    add("--eta", type=share, default=0.0, help="0: DDIM, deterministic; 1: DDPM")
    add("--clip-x0", action="store_true", help="clamp each predicted x_0 to [-1, 1]")
    add("--standardize-noise", action="store_true", help="x_T of mean 0, variance 1 in each channel: after short training")
    add("--no-ema", action="store_true", help="sample the weights themselves, not their average")
    add("--sample-batch-size", type=count, metavar="N", help="images at a time [what memory allows on cuda; else 64]")
    add("--export", metavar="PATH", help="also write all images: x.npz (arr_0, uint8 [N, 32, 32, 3]) or a folder of PNGs")
    add("--export-weights", metavar="DIR", help="also write the weights as diffusers' DDIMPipeline reads them")

    title = "the paper's experiments, a picture each (the last two compare S = 10 20 50 100 or --sample-steps)"
    add = parser.add_argument_group(title).add_argument
    add("--trajectory", action="store_true", help="predicted x_0 from noise to picture, also as an animation")
    add("--interpolate", action="store_true", help="between pairs of x_T")
    add("--reconstruct", action="store_true", help="encode and decode test images, with the error of Table 2")
    add("--consistency", action="store_true", help="the same x_T at several S, and their distances")

    add = parser.add_argument_group("run time").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: cuda, then mps, then cpu")
    fast = "auto: bf16 on GPUs since Ampere and CPUs with AMX; fp32 includes TF32"
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=fast)
    add("--compile", choices=["auto", "on", "off"], default="auto", help="auto: on a GPU, where the run is long enough")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--out-dir", metavar="DIR", default=".", help="where files go")
    add("-h", "--help", action="help", help="show this help")
    for action in parser._actions:
        if str(action.default) not in ("None", "False", argparse.SUPPRESS):
            action.help += f" [{spell(action.default)}]"
        if action.type and not action.choices:
            action.metavar = action.metavar or "N"
    return parser


def as_argv(config):
    """A checkpoint's flags as they would be typed, so that the parser checks them, too."""
    argv = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None and value is not False:
            argv += [flag] if value is True else [f"{flag}={value}"]
    return argv


def parse_args(argv=None):
    """The flags, completed from the checkpoint that --resume or --sample names, and that checkpoint (or None)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    args = parser.parse_args(argv)
    without_defaults = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    given = {name for name, value in vars(without_defaults).items() if value is not None}
    clash = sorted("--" + name.replace("_", "-") for name in given & {"resume", *TRAINING_FLAGS})
    if args.sample and clash:
        raise UsageError(f"--sample does not train, which {', '.join(clash)} asks for")
    if "" in (args.sample, args.resume):
        raise UsageError("--sample and --resume need the name of a file")

    path, checkpoint = args.sample or args.resume, None
    if args.resume == "auto":
        path, checkpoint = newest_checkpoint(Path(args.out_dir))
    elif path:
        checkpoint = load_checkpoint(path, "cpu")
    if checkpoint:
        config = checkpoint["config"]
        if args.resume and "step" not in checkpoint:
            raise UserError(f"checkpoint {path}: published weights have no optimizer state to resume from; use --sample")
        fixed = (*UNET_FLAGS, *SCHEDULE_FLAGS) + (("dataset", "batch_size", "seed") if args.resume else ())
        inherited = set(vars(args)) - {*PLACE_FLAGS, *EXPERIMENTS} if args.resume else {*fixed, "dataset", "data_dir"}
        for name in fixed:
            if name in given & config.keys() and getattr(args, name) != config[name]:
                mine, its = spell(getattr(args, name)), spell(config[name])
                raise UsageError(f"--{name.replace('_', '-')} {mine} contradicts {its}, which {path} was trained with")
        try:
            args = parser.parse_args(as_argv({name: config[name] for name in sorted(inherited & config.keys())}) + argv)
        except UsageError as error:
            raise UserError(f"checkpoint {path}: its config does not fit: {error}") from error
        args.resume = args.resume and str(path)

    listed = "sample_steps" in given or args.sample_steps != parser.get_default("sample_steps")  # now, or in the resumed run
    args.compared_steps = args.sample_steps if listed else [10, 20, 50, 100]
    args.quick_test = not path and args.epochs * args.iterations == 1 and "dataset" not in given
    check(args, checkpoint)
    return args, checkpoint


def check(args, checkpoint):
    """Flags that are fine each, but not together."""
    if args.channels % 32:
        raise UsageError(f"--channels {args.channels}: must be a multiple of 32")
    sides = [SIZE >> level for level in range(len(args.channel_mults))]
    if len(sides) > 6:
        raise UsageError(f"--channel-mults {spell(args.channel_mults)}: 1 to 6 resolutions are possible from {SIZE} pixels")
    if not set(args.attn_resolutions) <= set(sides):
        raise UsageError(f"--attn-resolutions {spell(args.attn_resolutions)}: this network has {spell(sides)}")
    if args.beta_start > args.beta_end:
        raise UsageError(f"--beta-start {args.beta_start} must not be above --beta-end {args.beta_end}")
    if NoiseSchedule(args.timesteps, args.beta_start, args.beta_end).alpha(args.timesteps - 1) < 1e-12:
        raise UsageError(f"--beta-end {args.beta_end} leaves no image after {args.timesteps} --timesteps; lower either")
    if args.export_weights and args.channel_mults[0] != 1:
        raise UsageError("--export-weights: diffusers has no such network, its --channel-mults begin with 1")
    compares = args.reconstruct or args.consistency
    steps = args.sample_steps + (args.compared_steps if compares else [])
    if max(steps) > args.timesteps:
        raise UsageError(f"--sample-steps {spell(steps)}: must be in 1..{args.timesteps} (--timesteps)")
    if compares and args.eta > 0:
        raise UsageError(f"--reconstruct and --consistency are about --eta 0, not --eta {args.eta}")
    if args.order == 2 and args.eta > 0:
        raise UsageError(f"--order 2 solves the equation of --eta 0, not of --eta {args.eta}")
    if args.no_ema and args.sample and "model" not in checkpoint:
        raise UsageError(f"--no-ema: {args.sample} holds one set of weights only")
    if args.batch_size % WORLD_SIZE and not args.sample:
        better = math.ceil(args.batch_size / WORLD_SIZE) * WORLD_SIZE
        raise UsageError(f"--batch-size {args.batch_size} does not divide among {WORLD_SIZE} processes; try {better}")


def newest_checkpoint(out_dir):
    """(path, checkpoint) of the newest complete checkpoint in the folder, or (None, None)."""
    for path in sorted(out_dir.glob("ddim_model_*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            return path, load_checkpoint(path, "cpu")
        except UserError as error:
            say(f"warning: passed over: {error}", sys.stderr)
    say(f"no checkpoint in {out_dir.resolve()}: starting afresh")
    return None, None


def export_weights(folder, model, args):
    """The folder that diffusers' DDIMPipeline.from_pretrained(folder) loads."""
    attends = [SIZE >> level in args.attn_resolutions for level in range(len(args.channel_mults))]
    unet = {
        "_class_name": "UNet2DModel", "sample_size": SIZE, "in_channels": 3, "attention_head_dim": None,
        "layers_per_block": args.res_blocks,
        "block_out_channels": [args.channels * mult for mult in args.channel_mults], "out_channels": 3,
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "dropout": args.dropout,
    }  # fmt: skip
    scheduler = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": args.timesteps,
        "beta_start": args.beta_start, "beta_end": args.beta_end, "steps_offset": 0,
        "beta_schedule": "linear", "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading",
    }  # fmt: skip
    index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    files = {"model_index.json": index, "unet/config.json": unet, "scheduler/scheduler_config.json": scheduler}
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2))
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / "unet" / "diffusion_pytorch_model.bin", lambda file: torch.save(weights, file))
    say(f"wrote {folder}")


def prepare_out_dir(args, run, checkpoint_bytes):
    """Find out now what would fail after hours: no permission, no space."""
    try:
        for path in filter(None, (args.export, args.export_weights)):
            Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
        run.out_dir.mkdir(parents=True, exist_ok=True)
        (run.out_dir / "ddim_trial.tmp").touch()
        for leftover in run.out_dir.glob("ddim_trial.tmp" if args.sample else "ddim_*.tmp"):  # of a killed run
            leftover.unlink(missing_ok=True)
        free = shutil.disk_usage(run.out_dir).free
    except OSError as error:
        raise UserError(f"cannot write to {error.filename}: {error.strerror} (--out-dir, --export, --export-weights)") from error
    for files in (2, 2 + args.epochs // args.save_every):
        if free < (needed := files * checkpoint_bytes):
            lack = f"{args.out_dir}: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed for {files} checkpoints"
            if files == 2:
                raise UserError(f"--out-dir {lack}")
            say(f"warning: {lack}; see --save-every", sys.stderr)


def protect_earlier_run(out_dir, total):
    """A fresh run overwrites neither a longer run nor one that was interrupted."""
    steps = planned = 0
    for path in out_dir.glob("ddim_model_*.pth"):
        with contextlib.suppress(Exception):  # whatever cannot be read is no run to lose
            found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
            steps, planned = max((steps, planned), (found["step"], found["config"]["epochs"] * found["config"]["iterations"]))
    if steps > total or steps < planned:
        kind = "a longer run" if steps > total else "an interrupted run"
        raise UserError(f"--out-dir {out_dir} holds {kind}, of {steps:,} steps: go on with --resume auto, or choose another folder")


def get_images(args):
    """load_images, first in one process of each machine, since it may download. Offline, the quick test draws its own."""
    if LOCAL_RANK > 0:
        gather(None)  # a barrier
    try:
        return load_images(args.dataset, args.data_dir)
    except Offline as error:
        if not args.quick_test:
            raise
        args.dataset = "synthetic"
        say(f"warning: {error}. This quick test goes on with the synthetic images", sys.stderr)
        return load_images(args.dataset, args.data_dir)
    finally:
        if LOCAL_RANK == 0:
            gather(None)


def execute(args, checkpoint, run):
    """Train, unless --sample was given, then draw what was asked for."""
    total = args.epochs * args.iterations
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(torch_seed(args.seed, 6))
    schedule = NoiseSchedule(args.timesteps, args.beta_start, args.beta_end)
    model = UNet(**{name: getattr(args, name) for name in UNET_FLAGS}, image_size=SIZE)
    if checkpoint:
        model.load_state_dict(checkpoint["ema" if args.sample and not args.no_ema else "model"])
    model.to(run.device, memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())

    if RANK == 0:
        prepare_out_dir(args, run, 0 if args.sample else 4 * 4 * size)  # weights, averages and two moments
        if not checkpoint:
            protect_earlier_run(run.out_dir, total)
    train_images, test_images = get_images(args) if not args.sample or args.reconstruct else (None, None)
    say(f"device    {run.device}, {run.precision}" + (f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""))
    say(f"network   {size:,} parameters" + (f", from {args.sample}" if args.sample else ""))

    network = model
    if not args.sample:
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        state = State(model, ema, torch.optim.Adam(model.parameters(), lr=args.lr, fused=True))
        if checkpoint:
            state.step = checkpoint["step"]
            ema.load_state_dict(checkpoint["ema"])
            state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
            for parameter, moments in state.optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):  # the fused kernel trusts them to lie in memory as the parameter does
                    moments[name] = torch.empty_like(parameter).copy_(moments[name])
            checkpoint.clear()  # half a gigabyte
            run.saved = Path(args.resume).resolve()
        say(f"images    {args.dataset}: {len(train_images):,} to train on, {len(test_images):,} held out")
        say(f"steps     {state.step:,} done, {max(0, total - state.step):,} to go, of {args.batch_size} images each")
        say(f"files     {run.out_dir}, with the log ddim_log.csv")
        say("A training loss near 0.03 is normal and then looks flat; the held-out loss, on fixed noise, falls for longer.")

        def preview(epoch):
            save_samples(Sampler(ema, schedule, args, run), run.out_dir / f"ddim_samples_epoch_{epoch}.png", count=16)

        train(state, train_images, test_images, schedule, args, run, preview)
        network = model if args.no_ema else ema
    evaluations = math.ceil(args.num_samples * args.sample_steps[-1] / 256)  # of a batch of some 256
    sampler = Sampler(network, schedule, args, run, evaluations)
    save_samples(sampler, run.out_dir / "ddim_samples.png", args.num_samples, args.export)
    experiments = trajectory, interpolation, consistency, functools.partial(reconstruction, test_images=test_images)
    for name, draw in zip(EXPERIMENTS, experiments):
        if getattr(args, name):
            draw(sampler, run.out_dir)
    if args.export_weights and RANK == 0:
        export_weights(Path(args.export_weights).resolve(), network, args)

    script = shlex.quote(sys.argv[0])
    if args.export and not args.export.endswith(".npz"):
        say(f"next, with torch-fidelity: fidelity --fid --isc --input1 {shlex.quote(args.export)} --input2 cifar10-train")
    elif args.sample:
        say(f"next: python {script} --sample {shlex.quote(args.sample)} --trajectory --interpolate --reconstruct --consistency")
    else:
        say(f"next: python {script} --sample {shlex.quote(str(run.saved))} --num-samples 64")


def resume_command(argv, saved):
    """What to type to go on."""
    argv = sys.argv[1:] if argv is None else argv
    kept = [word for before, word in zip(["", *argv], argv) if "--resume" not in (before, word.split("=")[0])]
    start = ["torchrun", "--standalone", f"--nproc_per_node={LOCAL_WORLD_SIZE}"] if "RANK" in os.environ else ["python"]
    return shlex.join([*start, sys.argv[0], *kept, "--resume", str(saved)])


def main(argv=None):
    """The command. Returns the exit code: 0; 1 diverged; 2 a mistake or a misfortune, in one line; 128 + the signal that came."""
    args = run = None
    try:
        with Signals() as signals:
            args, checkpoint = parse_args(argv)
            device = start_processes(args.device)
            run = Run(device, signals, choose_precision(args.precision, device), args.compile, Path(args.out_dir).resolve())
            execute(args, checkpoint, run)
        if WORLD_SIZE > 1:  # NCCL waits for all processes here, so never on the way out of an error
            dist.destroy_process_group()
        return 0
    except SystemExit as finished:  # --help
        return finished.code or 0
    except Stopped as stopped:
        code, complaint = 128 + stopped.args[0], f"stopped by {signal.Signals(stopped.args[0]).name}"
        if run and run.saved:
            complaint += f"; to go on:\n{resume_command(argv, run.saved)}"
    except FloatingPointError as error:  # training diverged
        code, complaint = 1, f"ddim_cifar.py: error: {error}"
    except (UserError, OSError) as error:
        usage = make_parser().format_usage() if isinstance(error, UsageError) else ""
        code, complaint = 2, f"{usage}ddim_cifar.py: error: {error}"
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            smaller = "a smaller --sample-batch-size"
            if args and not args.sample:
                smaller = f"--batch-size {max(1, args.batch_size // 2 // WORLD_SIZE) * WORLD_SIZE} (or {smaller})"
            code, complaint = 2, f"ddim_cifar.py: error: out of memory; try {smaller}"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            code, complaint = 1, f"ddim_cifar.py: error: process {RANK} lost the others: {str(error).splitlines()[0]}"
        else:
            raise
        print(complaint, file=sys.stderr)  # of whichever process
        return code
    if RANK == 0:
        print(complaint, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
