"""Denoising diffusion implicit models on CIFAR-10, in one file: train a UNet to predict noise, sample it with DDIM.

    python ddim_cifar.py                                       quick test: one training step, then 16 samples
    python ddim_cifar.py --epochs 50 --iterations 1000         train, save checkpoints, draw a 4x4 grid
    python ddim_cifar.py --resume auto --epochs 100            continue from the furthest checkpoint
    python ddim_cifar.py --sample ddim_model_final.pth --num-samples 50000 --export samples/

The chapter, in reading order: Settings, Diffusion, UNet, Data, Training, Sampling, Experiments. Behind the banner
after them is the machinery that makes a run fast and safe: Muon, files, checkpoints, signals, processes, flags. Skip it
until something in it has to change.

"DDPM" is Ho, Jain & Abbeel, arXiv 2006.11239, which network and training follow. "Eq.", "Sec." and "App." are those of
Song, Meng & Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502. Its alpha_t is alphas_cumprod[t] here.
"""

import argparse
import contextlib
import copy
import errno
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

SIZE = 32  # side of an image, in pixels
HELD_OUT = 256  # images of the held-out loss
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

# ---- Settings --------------------------------------------------------------------------------------------------------
# Every field of Config is a flag: epochs is --epochs. The groups are the headings of --help, and what --resume and
# --sample take over from a checkpoint. A new setting that changes samples is named in prepare_folder, too; one that a
# resumed run must not change, in FIXED_ON_RESUME (network and schedule are fixed as they are).

TRAINING = "training"
DATA = "data"
UNET = "network (with --resume and --sample: that of the checkpoint)"
SCHEDULE = "noise schedule (with --resume and --sample: that of the checkpoint)"
SAMPLING = "sampling"
EXPERIMENTS = "the paper's experiments, one picture each (the last two compare S = 10 20 50 100, or --sample-steps)"
RUNTIME = "run time"
FILES = "files"

TAUS = ("uniform", "quadratic", "karras")
T_SAMPLINGS = ("importance", "uniform")
LEARNING_RATES = {"muon": 2.5e-3, "adam": 2e-4}  # the default of --lr
RECIPES = {  # other defaults for a new run; a flag typed beside --recipe wins
    "default": {},
    "paper": {
        "predict": "eps",
        "t_sampling": "uniform",
        "optimizer": "adam",  # and so the learning rate
        "warmup": 5000,
        "batch_size": 128,
        "dropout": 0.1,
        "ema_decay": 0.9999,
        "lr_decay": 0.0,
    },
}


def flag(group, default, help, **options):
    """A field of Config. options: least and most allowed value, choices, and what argparse knows (nargs, metavar)."""
    return field(default=default, metadata={"group": group, "help": help, **options})


@dataclass
class Config:
    """Every setting of a run, by the name of its flag. A checkpoint holds it as a dict."""

    epochs: int = flag(TRAINING, 1, "length of the whole training, in epochs of --iterations steps", least=1)
    iterations: int = flag(TRAINING, 1, "optimizer steps per epoch, however large the data set", least=1)
    batch_size: int = flag(TRAINING, 32, "images per step, over all processes", least=1)
    micro_batch: int = flag(TRAINING, None, "images per forward pass [all]: less memory, the same step", least=1)
    predict: str = flag(TRAINING, "v", "what the network's output stands for", choices=("v", "eps"))
    t_sampling: str = flag(TRAINING, None, "how t is drawn [importance with v, else uniform]", choices=T_SAMPLINGS)
    optimizer: str = flag(TRAINING, "muon", "muon: on weight matrices, Adam on the rest", choices=("muon", "adam"))
    recipe: str = flag(TRAINING, "default", "paper: the defaults of DDPM", choices=tuple(RECIPES))
    lr: float = flag(TRAINING, None, "learning rate [0.0025 with muon, 0.0002 with adam]", least=1e-9)
    warmup: int = flag(TRAINING, 50, "steps of linear warm-up", least=0)
    lr_decay: float = flag(TRAINING, 0.5, "last share of the run, in which the rate falls to zero", least=0, most=1)
    grad_clip: float = flag(TRAINING, 1.0, "largest gradient norm", least=1e-9)
    ema_decay: float = flag(TRAINING, 0.9999, "decay of the averaged weights, used for sampling", least=0, most=1)
    save_every: int = flag(TRAINING, 10, "epochs between checkpoints, held-out losses and grids", least=1)
    save_minutes: float = flag(TRAINING, 10.0, "minutes between refreshes of ddim_model_last.pth", least=0)

    dataset: str = flag(DATA, "cifar10", "training images", choices=("cifar10", "folder", "synthetic"))
    data_dir: str = flag(DATA, "./data", "where CIFAR-10 is, or is downloaded to; or the folder", metavar="DIR")

    channels: int = flag(UNET, 128, "width, a multiple of 32", least=1, most=4096)
    channel_mults: tuple = flag(UNET, (1, 2, 2, 2), "widths over --channels", least=1, most=64, nargs="+", metavar="M")
    res_blocks: int = flag(UNET, 2, "ResBlocks per resolution", least=1, most=100)
    attn_resolutions: tuple = flag(UNET, (16,), "sides with attention, in pixels", least=1, nargs="*", metavar="R")
    dropout: float = flag(UNET, 0.0, "in each ResBlock; 0.1 for hundreds of passes over the data", least=0, most=0.99)
    timesteps: int = flag(SCHEDULE, 1000, "T, the number of noise levels", least=2)
    beta_start: float = flag(SCHEDULE, 1e-4, "first beta", least=1e-9, most=0.999)
    beta_end: float = flag(SCHEDULE, 0.02, "last beta", least=1e-9, most=0.999)

    num_samples: int = flag(SAMPLING, 16, "images to draw", least=1)
    sample_steps: tuple = flag(SAMPLING, (), "S [50]; samples take the last", least=1, nargs="+", metavar="S")
    tau: str = flag(SAMPLING, "quadratic", "which S of the T timesteps", choices=TAUS)
    order: int = flag(SAMPLING, 1, "2: DPM-Solver++(2M), at the same cost, no longer plain DDIM", choices=(1, 2))
    eta: float = flag(SAMPLING, 0.0, "0: DDIM, deterministic; 1: DDPM", least=0, most=1)
    clip_x0: bool = flag(SAMPLING, False, "clamp each predicted x_0 to [-1, 1]")
    no_ema: bool = flag(SAMPLING, False, "sample with the weights themselves, not their average")
    sample_batch_size: int = flag(SAMPLING, None, "images at a time [512 on cuda, else 32]", least=1)

    trajectory: bool = flag(EXPERIMENTS, False, "predicted x_0 from noise to picture, also as an animation")
    interpolate: bool = flag(EXPERIMENTS, False, "between pairs of x_T")
    reconstruct: bool = flag(EXPERIMENTS, False, "encode and decode test images, with the error of Table 2")
    consistency: bool = flag(EXPERIMENTS, False, "the same x_T at several S, and their distances")

    device: str = flag(RUNTIME, "auto", "auto: cuda, then mps, then cpu; or cuda:N", metavar="DEVICE")
    precision: str = flag(RUNTIME, "auto", "auto: bf16 where it is faster", choices=("auto", "fp32", "bf16"))
    compile: str = flag(RUNTIME, "auto", "auto: in a long run, on a CPU in bf16", choices=("auto", "on", "off"))
    seed: int = flag(RUNTIME, 0, "of everything random", least=0)

    resume: str = flag(FILES, None, "checkpoint to continue; auto: the furthest, or a new run", metavar="CKPT")
    sample: str = flag(FILES, None, "do not train: sample from this checkpoint or published weights", metavar="CKPT")
    export: str = flag(FILES, None, "write all images, too: x.npz (uint8 [N,32,32,3]) or a folder", metavar="PATH")
    export_weights: str = flag(FILES, None, "write the weights, too, as a folder for diffusers", metavar="DIR")
    out_dir: str = flag(FILES, ".", "where files go", metavar="DIR")

    quick_test = False  # the command without flags, which draws its own images when offline

    def __post_init__(self):
        if self.lr is None:
            self.lr = LEARNING_RATES.get(self.optimizer)
        if self.t_sampling is None:
            self.t_sampling = "importance" if self.predict == "v" else "uniform"

    @property
    def total(self):
        """Optimizer steps of the whole training."""
        return self.epochs * self.iterations

    @property
    def steps(self):
        """S of the samples."""
        return self.sample_steps[-1] if self.sample_steps else 50

    @property
    def compared_steps(self):
        """S of --reconstruct and --consistency."""
        return self.sample_steps or (10, 20, 50, 100)

    @property
    def folder(self):
        return Path(self.out_dir).resolve()

    @property
    def export_folder(self):
        """The folder of --export, or None if it is an archive."""
        return Path(self.export).resolve() if self.export and not self.export.endswith(".npz") else None

    def of(self, *groups):
        """The settings of these groups, by name: UNet(**config.of(UNET))."""
        return {name: getattr(self, name) for name in names_of(*groups)}


def names_of(*groups):
    return [setting.name for setting in fields(Config) if setting.metadata["group"] in groups]


# ---- Diffusion -------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """Linear betas (DDPM, Sec. 4). alphas_cumprod: float64 [timesteps] on the CPU, the alpha_t of the DDIM paper."""

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        self.timesteps = timesteps
        self.betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    def alpha(self, t):
        """alphas_cumprod[t] as a Python float; t = -1 is the clean image, alpha 1."""
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def noise_ratio(self, t):
        """sqrt((1 - alpha) / alpha), the sigma(t) of Eq. 14: x_t / sqrt(alpha) = x_0 + sigma(t) eps."""
        alpha = self.alpha(t)
        return math.sqrt((1 - alpha) / alpha)

    def scales(self, x, t):
        """sqrt(alpha_t) and sqrt(1 - alpha_t) for each image, shaped to multiply x. x: [N, ...]; t: int64 [N]."""
        tables = self.tables(x.device, x.dtype)
        return [table[t].view(-1, *[1] * (x.ndim - 1)) for table in tables]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a schedule lives as long as its program)
    def tables(self, device, dtype):
        """sqrt(alpha_t) and sqrt(1 - alpha_t) for all t, [T] each."""
        squares = (self.alphas_cumprod, 1 - self.alphas_cumprod)
        return [square.sqrt().to(dtype).to(device) for square in squares]  # converted first: MPS has no float64

    def add_noise(self, x_0, eps, t):
        """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps (Eq. 4). x_0, eps: [N, ...]; t: int64 [N]."""
        signal_scale, noise_scale = self.scales(x_0, t)
        return signal_scale * x_0 + noise_scale * eps


class NoisePredictor(nn.Module):
    """eps_theta(x_t, t) from a network's output F(x_t, t): the one place that knows what F stands for.

    predict "eps": eps_theta = F (DDPM). predict "v": eps_theta = sqrt(1 - alpha_t) x_t + sqrt(alpha_t) F (arXiv
    2202.00512, App. D), which gives a fresh network, F = 0, the best linear guess where x_t is nearly all noise.
    """

    def __init__(self, network, schedule, predict="v"):
        super().__init__()
        self.network, self.schedule, self.predict = network, schedule, predict

    def forward(self, x, t):
        """x: [N, 3, H, W], t: int64 [N]. Returns eps like x."""
        output = self.network(x, t).to(x.dtype)
        if self.predict == "eps":
            return output
        signal_scale, noise_scale = self.schedule.scales(x, t)
        return noise_scale * x + signal_scale * output


def ddim_timesteps(timesteps, steps, tau, schedule=None):
    """The sub-sequence tau of 0..timesteps-1 that sampling visits (App. D.2): `steps` distinct ints, ascending.

    tau: "uniform" is floor(i T / S). "quadratic" is floor(c i^2), its last at 0.8 T: the official one, made distinct.
    "karras" is equal steps in sigma^(1/7), the sigma of Eq. 14 (arXiv 2206.00364, Eq. 5), for `schedule` (None: the
    default one). ValueError unless 1 <= steps <= timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1..{timesteps}, not {steps}")

    i = np.arange(steps, dtype=np.int64)  # Windows: int32, too small for the squares
    if tau == "uniform":
        wanted = i * timesteps // steps
    elif tau == "quadratic":
        last = max(1, steps - 1)
        squares = i**2 if steps > 1 else np.array([1])  # a single step starts at 0.8 T, not at 0
        wanted = 4 * timesteps * squares // (5 * last**2)
    elif tau == "karras":
        alphas = (schedule or NoiseSchedule(timesteps)).alphas_cumprod.numpy()
        warped = ((1 - alphas) / alphas) ** (1 / 14)
        targets = np.linspace(warped[-1], warped[0], steps)[::-1]  # from the noisy end: a single step starts there
        wanted = np.interp(targets, warped, np.arange(timesteps)).round().astype(int)
    else:
        raise ValueError(f"tau must be one of {', '.join(TAUS)}, not {tau!r}")

    # Make them distinct: each at least one above the last, and low enough that the rest fit below T.
    distinct = np.maximum.accumulate(wanted - i) + i
    return np.minimum(distinct, timesteps - steps + i).tolist()


@torch.inference_mode()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, *, order=1, clip_x0=False, noise=None, on_step=None):
    """Walk from x_T to x_0 along tau (Eq. 12). Deterministic for eta = 0; eta = 1 has the variance of DDPM (Eq. 16).

    model: any callable (x [N, ...], t int64 [N]) -> eps [N, ...]. x_T: [N, ...], float32 or float64: the state's dtype.
    tau: ascending timesteps, as from ddim_timesteps. order: 2 is DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), at
    the same number of network evaluations, for eta = 0 only; uniform steps are uneven in log sigma and suit it least.
    clip_x0: clamp each predicted x_0 to [-1, 1]. noise(): standard normal [N, ...] for eta > 0; None: torch.randn_like.
    on_step(t, x_0): called at each step with the predicted x_0. Returns x_0 like x_T. ValueError for eta outside
    [0, 1], order outside 1..2, or order 2 with eta > 0.
    """
    if not 0 <= eta <= 1 or order not in (1, 2) or (order == 2 and eta > 0):
        raise ValueError(f"eta must be in [0, 1], order 1 or 2, and order 2 needs eta 0; not eta {eta}, order {order}")

    x_t = x_T
    x_0_before = h_before = None
    for t, t_prev in reversed(list(zip(tau, [-1, *tau[:-1]]))):
        alpha, alpha_prev = schedule.alpha(t), schedule.alpha(t_prev)
        eps = model(x_t, x_t.new_full((len(x_t),), t, dtype=torch.int64)).to(x_t.dtype)

        # Predict x_0 (Eq. 9).
        x_0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        if clip_x0:
            x_0 = x_0.clamp(-1, 1)
        if on_step:
            on_step(t, x_0)

        # Second order: x_0 as it will be in the middle of the step, if it goes on changing with log sigma as before.
        if order == 2 and t_prev >= 0:
            x_0_here = x_0
            h = math.log(schedule.noise_ratio(t) / schedule.noise_ratio(t_prev))
            if x_0_before is not None:
                x_0 = x_0_here + h / (2 * h_before) * (x_0_here - x_0_before)
            x_0_before, h_before = x_0_here, h
        if clip_x0 or order == 2:
            eps = (x_t - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)

        # Step to t_prev (Eq. 12), with new noise of the variance of Eq. 16 if eta > 0.
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
        x_t = math.sqrt(alpha_prev) * x_0 + math.sqrt(max(0.0, 1 - alpha_prev - sigma**2)) * eps
        if sigma > 0:
            x_t += sigma * (noise() if noise else torch.randn_like(x_t))
    return x_t


@torch.inference_mode()
def ddim_encode(model, x_0, schedule, tau):
    """Walk from x_0 to its code x_T: the ODE of ddim_sample, run the other way (Sec. 4.3, Eq. 14).

    Arguments as for ddim_sample. eps is taken where a step starts. No network was trained at alpha = 1, so the first
    step asks for tau[0]. Returns x_T like x_0.
    """
    x_t = x_0
    for t, t_next in zip([-1, *tau[:-1]], tau):
        alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
        eps = model(x_t, x_t.new_full((len(x_t),), max(t, tau[0]), dtype=torch.int64)).to(x_t.dtype)
        h = schedule.noise_ratio(t_next) - schedule.noise_ratio(t)
        x_t = math.sqrt(alpha_next) * (x_t / math.sqrt(alpha) + h * eps)
    return x_t


def slerp(a, b, weight):
    """Spherical interpolation of noises, per image (App. D.5). a, b: [N, ...]; weight: float or [N]; 0 is a, 1 is b."""
    weight = torch.as_tensor(weight, dtype=a.dtype).to(a.device).expand(len(a))
    weight = weight.view(-1, *[1] * (a.ndim - 1))

    # The angle between a and b.
    norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    cosine = (a.flatten(1) * b.flatten(1)).sum(1) / norms.clamp(min=torch.finfo(a.dtype).tiny)
    theta = cosine.clamp(-1, 1).acos().view_as(weight)

    # Along the arc; along the straight line where a and b are parallel (no arc) or opposite (no unique arc).
    parallel = theta.sin() < 1e-6
    safe = torch.where(parallel, 1.0, theta.sin())
    weight_a = torch.where(parallel, 1 - weight, ((1 - weight) * theta).sin() / safe)
    weight_b = torch.where(parallel, weight, (weight * theta).sin() / safe)
    return weight_a * a + weight_b * b


# ---- UNet ------------------------------------------------------------------------------------------------------------
# DDPM, App. B. Parameters carry the names of the published weights (diffusers' UNet2DModel): either loads the other's.


class GroupNorm(nn.GroupNorm):
    """Of 32 groups."""

    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x):  # [N, C, H, W]
        if x.is_cuda and torch.compiler.is_compiling():
            return self.by_channels(x)
        return super().forward(x)

    def by_channels(self, x):
        """The same from the moments of each channel: a group's values lie apart in channels_last memory.

        In a compiled network on a GPU this is 1.18 times as fast in sampling (H200); uncompiled, it is slower.
        """
        x = x.to(self.weight.dtype)
        moments = x.mean((2, 3)), x.square().mean((2, 3))
        mean, mean_square = [moment.unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True) for moment in moments]
        var = (mean_square - mean.square()).clamp(min=0)

        scale = self.weight.unflatten(0, (self.num_groups, -1)) * (var + self.eps).rsqrt()  # [N, 32, C/32]
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - scale * mean
        scale, shift = [value.flatten(1)[:, :, None, None] for value in (scale, shift)]
        return x * scale + shift


def sinusoidal_embedding(t, dim):
    """Embed timesteps as sines, then cosines, of geometrically spaced frequencies (DDPM, App. B; arXiv 1706.03762).

    t: int64 [N]; dim: even, at least 4. Returns float32 [N, dim]; frequency i of dim/2 is 10000^(-i / (dim/2 - 1)).
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2 - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = GroupNorm(c_out)
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
        self.group_norm = GroupNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):  # [N, C, H, W]
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1, H*W, C]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out(h)[:, 0].transpose(1, 2)  # [N, C, H*W]
        return x + h.unflatten(2, x.shape[2:])


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
        # Doubling pixels and then convolving 3x3 is one transposed 4x4 convolution of stride 2, in 4/9 of the
        # arithmetic. Its kernel is the flipped 3x3 kernel, summed over windows of 2x2.
        taps = 4 * F.avg_pool2d(F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Stage(nn.Module):
    """The ResBlocks of one resolution, the attention after some of them, and the way to the next resolution."""

    def __init__(self, widths_in, width, c_time, dropout, attends, downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, width, c_time, dropout) for c_in in widths_in)
        self.attentions = nn.ModuleList(Attention(width) if here else nn.Identity() for here in attends)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)


class UNet(nn.Module):
    """The DDPM CIFAR-10 network. 35,746,307 parameters by default.

    channels: width of the first resolution, a multiple of 32. channel_mults: width of each resolution over channels.
    res_blocks: ResBlocks per resolution (one more on the way up). attn_resolutions: sides in pixels where attention
    follows each ResBlock (in the middle, always the first). image_size: H, divisible by 2^(len(channel_mults) - 1).
    ValueError, beginning with the argument's name, if sizes do not fit.
    """

    def __init__(
        self,
        channels=128,
        channel_mults=(1, 2, 2, 2),
        res_blocks=2,
        attn_resolutions=(16,),
        dropout=0.1,
        image_size=SIZE,
    ):
        super().__init__()
        sides = [image_size >> level for level in range(len(channel_mults))]
        if channels < 1 or channels % 32:
            raise ValueError(f"channels {channels}: must be a multiple of 32")
        if min(channel_mults, default=0) < 1:
            raise ValueError(f"channel_mults {spell(channel_mults)}: must be positive")
        if res_blocks < 1:
            raise ValueError(f"res_blocks {res_blocks}: must be positive")
        if image_size % 2 ** (len(sides) - 1):
            raise ValueError(f"channel_mults {spell(channel_mults)}: image_size {image_size} cannot be halved so often")
        if not set(attn_resolutions) <= set(sides):
            raise ValueError(f"attn_resolutions {spell(attn_resolutions)}: this network has {spell(sides)}")
        levels = [(channels * mult, side in attn_resolutions) for mult, side in zip(channel_mults, sides)]

        # Time embedding and first features.
        c_time = 4 * channels
        self.channels = channels
        linears = {"linear_1": nn.Linear(channels, c_time), "linear_2": nn.Linear(c_time, c_time)}
        self.time_embedding = nn.ModuleDict(linears)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)

        # The way down. Every output is a skip connection.
        self.down_blocks = nn.ModuleList()
        skips = [channels]
        for level, (width, attends) in enumerate(levels, 1):
            inputs = [skips[-1]] + [width] * (res_blocks - 1)
            down = [Downsample(width)] if level < len(levels) else []
            self.down_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * res_blocks, downsamplers=down))
            skips += [width] * (res_blocks + len(down))

        deepest = levels[-1][0]
        self.mid_block = Stage([deepest, deepest], deepest, c_time, dropout, [True, False])

        # The way up. Each ResBlock takes a skip connection beside what comes from below.
        self.up_blocks = nn.ModuleList()
        below = deepest
        for level, (width, attends) in reversed(list(enumerate(levels, 1))):
            inputs = [c_in + skips.pop() for c_in in [below] + [width] * res_blocks]
            up = [Upsample(width)] if level > 1 else []
            self.up_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * (res_blocks + 1), upsamplers=up))
            below = width

        self.conv_norm_out = GroupNorm(below)
        self.conv_out = nn.Conv2d(below, 3, 3, padding=1)
        self.initialize()

    def initialize(self):
        """DDPM's variance scaling (fan_avg); zero for the last layer of each residual branch and of the network."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "to_out.0", "conv_out")):
                    nn.init.zeros_(module.weight)

    def forward(self, x, t):
        """x: [N, 3, H, H], H = image_size, values around [-1, 1]; t: int64 [N]. Returns F, [N, 3, H, H]."""
        time_emb = self.time_embedding["linear_1"](sinusoidal_embedding(t, self.channels))
        time_emb = F.silu(self.time_embedding["linear_2"](F.silu(time_emb)))  # the SiLU of every ResBlock
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
                h = torch.cat([h, skips.pop()], dim=1)
                h = attention(resnet(h, time_emb))
            for upsample in stage.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h), inplace=True))


# ---- Data ------------------------------------------------------------------------------------------------------------
# Images are uint8 [N, 3, 32, 32] at rest. Every draw is a function of (seed, purpose, position): no state to save.

ORDER, STEP, DROPOUT, VALIDATION, NOISE, ETA_NOISE, WEIGHTS = range(7)  # purposes
rng = np.random.default_rng  # called with a tuple (seed, purpose, position); by draw_shapes, with a seed alone


def torch_seed(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to 0..255, rounded and clamped: the inverse of to_float."""
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def load_images(dataset, data_dir):
    """The training and the held-out images of cifar10, folder or synthetic, uint8 [N, 3, 32, 32] each; or UserError."""
    if dataset == "synthetic":
        return draw_shapes(10_000, seed=0), draw_shapes(HELD_OUT, seed=1)
    if dataset == "folder":
        return hold_out(read_folder(Path(data_dir)))
    train, test = open_cifar10(data_dir)
    return to_images(train.data), to_images(test.data)


def share(batch_size):
    """This process's part of a batch."""
    return slice(world.rank * batch_size // world.size, (world.rank + 1) * batch_size // world.size)


@functools.lru_cache(maxsize=2)
def permutation(seed, number, count):
    """The order of the images in one pass over the data."""
    return rng((seed, ORDER, number)).permutation(count)


def batches(count, batch_size, seed, first, last):
    """This process's indices of steps first .. last-1: every image once per pass, the passes end to end."""
    for n in range(first, last):
        positions = range(n * batch_size, (n + 1) * batch_size)[share(batch_size)]
        yield [int(permutation(seed, position // count, count)[position % count]) for position in positions]


def make_loader(images, order, device):
    """Batches in that order. The tensor itself is the data set, and a list of indices takes one indexing operation."""
    return torch.utils.data.DataLoader(images, batch_size=None, sampler=order, pin_memory=device.type == "cuda")


def t_density(schedule, t_sampling):
    """How often each t is drawn in training, as a multiple of a uniform draw: float64 [T].

    "importance" is sqrt(alpha_t): with v, the error of eps is sqrt(alpha_t) times that of the network's output, so that
    at t = 800 there is hardly anything to learn. A loss divided by its density is Eq. 5 as before, and the gradients of
    single images have half the mean square (measured; arXiv 2102.09672, Sec. 3.3, has the method).
    """
    density = schedule.alphas_cumprod ** (0.5 if t_sampling == "importance" else 0)
    return density / density.mean()


def draw_step(n, batch_size, timesteps, seed, device, cumulative=None):
    """flip bool [B, 1, 1, 1], t int64 [B], eps float32 [B, 3, 32, 32] of step n: this process's share of one draw.

    B: images of this process. cumulative: float32 [T], the cumulative sums of a t_density; None: t is uniform.
    """
    generator = torch.Generator(device).manual_seed(torch_seed(seed, STEP, n))
    options = {"generator": generator, "device": device}
    flip = torch.rand(batch_size, 1, 1, 1, **options) < 0.5

    # Uniform t, those of a batch evenly spread: arXiv 2107.00630, App. I.1.
    spread = torch.arange(batch_size, device=device) * timesteps // batch_size
    t = (spread + torch.randint(timesteps, (1,), **options)) % timesteps

    eps = torch.randn(batch_size, 3, SIZE, SIZE, **options)

    # Another density: t is where its cumulative sums reach the uniform one.
    if cumulative is not None:
        t = torch.searchsorted(cumulative, t + torch.rand(1, **options), right=True).clamp(max=timesteps - 1)
    mine = share(batch_size)
    return flip[mine], t[mine], eps[mine]


# ---- Training --------------------------------------------------------------------------------------------------------


class Trainer:
    """What training changes, and a checkpoint holds: weights, their average, moments, and the steps taken."""

    def __init__(self, model, schedule, config, runtime):
        self.model, self.schedule, self.config, self.runtime = model.train(), schedule, config, runtime
        self.steps = 0
        self.fingerprint = 0  # of the training images
        self.optimizers = make_optimizers(model, config.optimizer, config.lr)
        self.parameters = list(model.parameters())

        # How often each t is drawn.
        density = t_density(schedule, config.t_sampling)
        self.density = density.float().to(runtime.device)
        self.cumulative = density.cumsum(0).float().to(runtime.device) if config.t_sampling != "uniform" else None

        # The average of the weights, used for sampling.
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.averages = list(self.ema.parameters())

        # The network as it is called: compiled, and with gradients averaged over processes.
        network = runtime.compiled(model, config.total)  # not by the steps left: a resumed run computes as before
        if world.size > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.predictor = NoisePredictor(network, schedule, config.predict)

    def state_dict(self):
        """The optimizer's moments go by the name of their parameter."""
        moments = {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        return {
            "step": self.steps,
            "images": self.fingerprint,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {name: moments.get(parameter, {}) for name, parameter in self.model.named_parameters()},
        }

    def load_state_dict(self, state):
        self.steps = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.state[parameter] = laid_out_as(parameter, state["optimizer"][names[parameter]])

    def learning_rate(self, n):
        """Linear warm-up, constant, linear decay to zero."""
        config = self.config
        warm = (n + 1) / max(1, config.warmup)
        to_zero = (config.total - n) / max(1, config.lr_decay * config.total)
        return config.lr * min(1.0, warm, to_zero)

    def noisy_images(self, images, n):
        """x_t, t and eps of step n, for this process's uint8 images: flipped at random, with noise added."""
        config, device = self.config, self.runtime.device
        flip, t, eps = draw_step(n, config.batch_size, config.timesteps, config.seed, device, self.cumulative)
        x_0 = to_float(images.to(device, non_blocking=True))
        x_0 = torch.where(flip, x_0.flip(3), x_0)
        x_t = self.schedule.add_noise(x_0, eps, t)
        return x_t.contiguous(memory_format=torch.channels_last), t, eps

    def loss(self, x_t, t, eps):
        """Eq. 5 with gamma = 1, for each image, divided by the density of t: [N]. A weight for t multiplies here."""
        with self.runtime.autocast():
            predicted = self.predictor(x_t, t)
        return (predicted - eps).square().mean((1, 2, 3)) / self.density[t]

    def backward(self, images, n):
        """Add up the gradients of step n, --micro-batch images at a time. Returns the mean loss of these images."""
        x_t, t, eps = self.noisy_images(images, n)
        torch.manual_seed(torch_seed(self.config.seed, DROPOUT, n, world.rank))
        size = self.config.micro_batch or len(images)
        total = 0.0
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            is_last = first + size >= len(images)
            with gradients_averaged(self.predictor.network, is_last):
                loss = self.loss(x_t[part], t[part], eps[part]).sum() / len(images)
                loss.backward()
            total += loss.detach()
        return total

    def step(self, images):
        """One optimizer step. Returns loss and gradient norm, as tensors, and the rate: nothing waits for a GPU."""
        n = self.steps
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.backward(images, n)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        loss = sum_over_processes(loss) / world.size

        # Where loss or gradient is not finite, found_inf tells the optimizers to skip the step.
        lr = self.learning_rate(n)
        bad = (~(loss + grad_norm).isfinite()).float()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.found_inf = bad
            if self.runtime.device.type != "mps" or not bad:  # Metal's kernel ignores found_inf in some versions
                optimizer.step()

        # Average the weights: average = d average + (1 - d) parameter.
        d = min(self.config.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - d)
        self.steps += 1
        return loss, grad_norm, lr


@torch.inference_mode()
def held_out_loss(predictor, images, runtime):
    """The loss for fixed eps and t, evenly spread. It falls while the training loss, noisy by nature, looks flat."""
    schedule, device = predictor.schedule, runtime.device
    x_0 = to_float(images[:HELD_OUT].to(device))
    t = torch.arange(len(x_0), device=device) * schedule.timesteps // len(x_0)
    eps = rng((0, VALIDATION)).standard_normal(x_0.shape, dtype=np.float32)  # whatever --seed is: runs can be compared
    eps = torch.from_numpy(eps).to(device)
    x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)

    total = torch.zeros((), device=device)
    for first in range(32 * world.rank, len(x_t), 32 * world.size):
        part = slice(first, first + 32)
        with runtime.autocast():
            predicted = predictor(x_t[part], t[part])
        total += (predicted - eps[part]).square().sum()
    return float(sum_over_processes(total)) / eps.numel()


def train(trainer, images, held_out, preview):
    """Take the steps that are left, write log and checkpoints, call preview(epoch) after each ddim_model_epoch_N.

    Raises Stopped when a signal came, with a checkpoint saved, and Diverged after ten bad steps in a row.
    """
    config, runtime = trainer.config, trainer.runtime
    order = batches(len(images), config.batch_size, config.seed, trainer.steps, config.total)
    averaged = NoisePredictor(trainer.ema, trainer.schedule, config.predict)
    log = Log(config, trainer.steps)
    last_save = time.perf_counter()

    def save(name):
        nonlocal last_save
        save_checkpoint(config.folder / name, trainer)
        runtime.saved = config.folder / name
        last_save = time.perf_counter()

    signals = runtime.signals
    with signals.postponed(), log.file, progress(total=config.total, initial=trainer.steps, unit="step") as bar:
        for batch in make_loader(images, order, runtime.device):
            loss, grad_norm, lr = trainer.step(batch)
            log.add(trainer.steps, loss, grad_norm, lr)

            # To fetch a loss is to wait for the device: on a GPU, only every tenth.
            epoch_ends = trainer.steps % config.iterations == 0
            due = runtime.device.type == "cpu" or trainer.steps % 10 == 0
            if not (epoch_ends or due or (signals.received and world.size == 1)):
                continue

            # Log.
            epoch = trainer.steps // config.iterations
            run_ends = trainer.steps == config.total
            periodic = epoch_ends and epoch % config.save_every == 0
            bar.update(len(log.pending))
            log.fetch()
            val_loss = held_out_loss(averaged, held_out, runtime) if periodic or run_ends else None
            bar.set_postfix_str(log.write(val_loss), refresh=False)
            if log.bad_in_a_row >= 10:
                raise Diverged(runtime.saved)
            if epoch_ends:
                log.end_epoch(epoch, val_loss)

            # Save.
            stop = max(gather(signals.received))  # all processes, or none
            if periodic:
                save(f"ddim_model_epoch_{epoch}.pth")
            if run_ends:
                save("ddim_model_final.pth")
            elif stop or log.failure or time.perf_counter() - last_save >= 60 * config.save_minutes:
                save("ddim_model_last.pth")
            if log.failure:
                raise log.failure
            if stop:
                raise Stopped(stop)

            # Show.
            if periodic:
                with signals.heeded():
                    preview(epoch)
            log.restart_clock()


# ---- Sampling --------------------------------------------------------------------------------------------------------


class Sampler:
    """Makes images by number. Image i comes from x_T of (seed, i) alone, whatever else is asked for."""

    def __init__(self, model, schedule, config, runtime, evaluations=0):
        self.model, self.schedule, self.config, self.runtime = model.eval(), schedule, config, runtime
        network = runtime.compiled(model, evaluations)
        self.compiled = network is not model
        self.predictor = NoisePredictor(network, schedule, config.predict)
        self.chunk_size = config.sample_batch_size or (512 if runtime.device.type == "cuda" else 32)
        self.bar = tqdm(disable=True)

    def eps(self, x, t):
        with self.runtime.autocast():
            eps = self.predictor(x, t)
        self.bar.update(len(x) * world.size)
        return eps

    def normal(self, generators):
        """Standard normal float32 [N, 3, 32, 32], an image from each generator."""
        x = np.stack([generator.standard_normal((3, SIZE, SIZE), dtype=np.float32) for generator in generators])
        return torch.from_numpy(x).to(self.runtime.device).contiguous(memory_format=torch.channels_last)

    def x_T(self, indices):
        """The noise that these images come from."""
        return self.normal([rng((self.config.seed, NOISE, i)) for i in indices])

    def tau(self, steps):
        return ddim_timesteps(self.schedule.timesteps, steps, self.config.tau, self.schedule)

    def sample(self, indices, steps, x_T=None, on_step=None):
        """x_0 of these images, float32 [N, 3, 32, 32]."""
        config = self.config
        if x_T is None:
            x_T = self.x_T(indices)
        generators = [rng((config.seed, ETA_NOISE, i)) for i in indices]

        def step_noise():
            return self.normal(generators)

        options = {"order": config.order, "clip_x0": config.clip_x0, "noise": step_noise, "on_step": on_step}
        x_0 = ddim_sample(self.eps, x_T, self.schedule, self.tau(steps), config.eta, **options)
        finite = x_0.isfinite().all((1, 2, 3)).tolist()
        if not all(finite):
            bad = {i for i, good in zip(indices, finite) if not good}
            raise NotFinite(sorted(bad), len(set(indices)))
        return x_0


def save_samples(sampler, path, count, export=None):
    """Draw images 0 .. count-1. The first 256 go into a grid at `path`; with `export`, all are written, too.

    An .npz is complete or absent; a folder of PNGs can be continued.
    """
    steps = sampler.config.steps
    folder = sampler.config.export_folder if export else None
    archive = Path(export).resolve() if export and not folder else None

    # What is to be drawn, and what is there.
    present = on_rank_0(lambda: prepare_folder(folder, sampler, count)) if folder else set()
    kept = np.zeros((count if archive else min(count, 256), SIZE, SIZE, 3), np.uint8)
    wanted = [i for i in range(count) if i not in present]

    # Draw.
    def draw(indices):
        return to_uint8(sampler.sample(indices, steps))

    for chunk, images in in_chunks(sampler, wanted, draw, steps, "sampling"):
        if world.rank > 0:
            continue
        for i, image in zip(chunk, images.permute(0, 2, 3, 1).numpy()):
            if i < len(kept):
                kept[i] = image
            if folder:
                save_png(image, folder / f"{i:05d}.png")
    if world.rank > 0:
        return

    # Write.
    for i in present & set(range(len(kept))):
        kept[i] = np.asarray(Image.open(folder / f"{i:05d}.png"))
    if archive:
        write_atomically(archive, lambda file: np.savez(file, kept))
    if export:
        say(f"wrote {count:,} images to {folder or archive}")
    save_grid(torch.from_numpy(kept[:256]).permute(0, 3, 1, 2), path)


# ---- Experiments -----------------------------------------------------------------------------------------------------


def trajectory(sampler):
    """The predicted x_0 on the way from noise to picture: a row per image, and an animation of all of them."""
    config = sampler.config
    steps, count = config.steps, min(16, config.num_samples)

    def frames(indices):
        x_T = sampler.x_T(indices)
        seen = [to_uint8(x_T)]
        sampler.sample(indices, steps, x_T, on_step=lambda t, x_0: seen.append(to_uint8(x_0)))
        return torch.stack(seen, dim=1)

    def evenly(most):
        return np.linspace(0, steps, min(most, steps + 1)).round().astype(int).tolist()

    films = compute_all(sampler, count, frames, steps, "trajectory")  # [count, 1 + steps, 3, 32, 32]

    # The picture.
    labels = ["x_T"] + [f"t={t}" for t in reversed(sampler.tau(steps))]
    shown = evenly(11)
    rows = films[:8, shown].flatten(0, 1)
    labels = [labels[i] for i in shown]
    save_grid(rows, config.folder / "ddim_trajectory.png", columns=len(shown), column_labels=labels)

    # The animation.
    first, *others = [draw_grid(films[:, i], scale=2) for i in evenly(26)]
    options = {"save_all": True, "append_images": others, "duration": [120] * len(others) + [2000], "loop": 0}
    path = config.folder / "ddim_trajectory.gif"
    write_atomically(path, lambda file: first.save(file, "GIF", **options))
    say(f"wrote {path}")


def interpolation(sampler):
    """Pictures between pictures: slerp between pairs of x_T (App. D.5), a row per pair."""
    config, columns = sampler.config, 11
    pairs = min(8, max(1, config.num_samples // 2))

    def between(indices):
        row, column = np.divmod(indices, columns)
        weight = torch.from_numpy(column / (columns - 1))
        x_T = slerp(sampler.x_T(2 * row), sampler.x_T(2 * row + 1), weight)
        return to_uint8(sampler.sample(indices, config.steps, x_T))

    images = compute_all(sampler, pairs * columns, between, config.steps, "interpolation")
    labels = [f"{column / (columns - 1):.1f}" for column in range(columns)]
    save_grid(images, config.folder / "ddim_interpolation.png", columns=columns, column_labels=labels)


def consistency(sampler):
    """The same x_T at several S (Sec. 5.2): a row per image, a column per S; and how far each S ends from the last."""
    config = sampler.config
    count, lengths = min(256, config.num_samples), config.compared_steps
    ends = []
    for steps in lengths:

        def end(indices, steps=steps):
            return sampler.sample(indices, steps).clamp(-1, 1)

        ends.append(compute_all(sampler, count, end, steps, f"S = {steps}"))

    # The picture.
    images = to_uint8(torch.stack([end[:8] for end in ends], dim=1)).flatten(0, 1)
    labels = [f"S={steps}" for steps in lengths]
    save_grid(images, config.folder / "ddim_consistency.png", columns=len(lengths), column_labels=labels)

    # The distances, on [0, 1].
    say(f"Mean squared distance of {count:,} images to those at S = {lengths[-1]}, per dimension on [0, 1]:")
    distances = [((end - ends[-1]) / 2).square().mean().item() for end in ends]
    save_table(config.folder / "ddim_consistency.csv", ("steps", "distance"), zip(lengths, distances))


def reconstruction(sampler, test_images):
    """Encode test images in S steps, decode them in S steps: a picture, and the error on [0, 1] of Table 2."""
    config = sampler.config
    count = min(len(test_images), config.num_samples)
    shown = min(16, count)
    paper = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}  # Table 2

    images, rows, labels = [test_images[:shown]], [], ["original"]
    for steps in config.compared_steps:

        def there_and_back(indices, steps=steps):
            x_0 = to_float(test_images[indices].to(sampler.runtime.device))
            x_0 = x_0.contiguous(memory_format=torch.channels_last)
            x_T = ddim_encode(sampler.eps, x_0, sampler.schedule, sampler.tau(steps))
            return sampler.sample(indices, steps, x_T)

        decoded = compute_all(sampler, count, there_and_back, 2 * steps, f"reconstruction, S = {steps}")
        error = ((decoded - to_float(test_images[:count])) / 2).square().mean().item()
        rows.append((steps, error, paper.get(steps, "")))
        images.append(to_uint8(decoded[:shown]))
        labels.append(f"S={steps}")

    save_grid(torch.cat(images), config.folder / "ddim_reconstruction.png", columns=shown, row_labels=labels)
    say(f"Mean squared error of {count:,} reconstructed test images, per dimension on [0, 1], and of Table 2:")
    save_table(config.folder / "ddim_reconstruction.csv", ("steps", "error", "paper"), rows)


########################################################################################################################
#  The chapter ends here. What follows makes a run fast and safe: skip it until something in it has to change.
########################################################################################################################

# ---- Optimizers ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal, at the learning rates of Adam (arXiv 2502.16982, Eq. 4).

    params: weights of two or more dimensions; a convolution counts as the matrix [out, k k in]. As with torch's fused
    optimizers, a step whose found_inf is 1 leaves weights and momentum as they are, without waiting for the device.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        bad = self.found_inf.to(group["params"][0].device) > 0
        stacks = {}
        for weight in group["params"]:
            stacks.setdefault(weight.shape, []).append(weight)
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)

        # Momentum. Weights of one shape are stacked, so that a GPU sees few kernels.
        pending = []
        for weights in stacks.values():
            views = [weight.movedim(1, -1) for weight in weights]  # columns in the order of channels_last
            buffers = [self.state[weight]["momentum"].movedim(1, -1) for weight in weights]
            gradient = torch.stack([weight.grad.movedim(1, -1).flatten(1) for weight in weights])  # [K, out, k k in]
            average = torch.stack([buffer.flatten(1) for buffer in buffers])
            gradient = torch.where(bad, 0.0, gradient)
            average = torch.where(bad, average, average.lerp(gradient, 1 - momentum))
            torch._foreach_copy_(buffers, list(average.view(len(weights), *views[0].shape)))
            pending.append((views, gradient.lerp(average, momentum)))  # Nesterov's

        # The step. 0.2 sqrt(max(out, k k in)) gives it the root mean square of a step of Adam.
        directions = orthogonalize([direction for _, direction in pending])
        for (views, _), direction in zip(pending, directions):
            size = ~bad * (-0.2 * lr * math.sqrt(max(direction.shape[1:])))
            torch._foreach_add_(views, list((size * direction).view(len(views), *views[0].shape)))


def orthogonalize(stacks, iterations=5):
    """The singular vectors of each matrix with singular values near 1: the quintic Newton-Schulz iteration of Muon.

    stacks: float32 [K, m, n] each; so is the result. The iteration X <- (a + b A + c A^2) X, A = X X^T, runs on the
    small A alone, for all matrices of one m at a time, and is applied to X once at the end: the same result for a third
    of the products. It needs float32 proper: rounding as coarse as TF32's turns small eigenvalues of A negative.
    """
    wide = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    wide = [x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30) for x in wide]
    for m in {x.shape[1] for x in wide}:
        members = [i for i, x in enumerate(wide) if x.shape[1] == m]
        product = newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in members]), iterations)
        for i, own in zip(members, product.split([len(wide[i]) for i in members])):
            wide[i] = own @ wide[i]
    return [x.mT if stack.shape[1] > stack.shape[2] else x for x, stack in zip(wide, stacks)]


def newton_schulz(gram, iterations):
    """The product of the iteration's factors a + b A + c A^2. gram: the first A, [K, m, m]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    product = None
    for to_go in reversed(range(iterations)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if to_go:
            gram = factor @ gram @ factor
    return product


def make_optimizers(model, name, lr):
    """[Muon for weight matrices, Adam for the rest], or [Adam]. Matrices have at least 32 rows and columns."""
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=lr, fused=True)]
    matrices, others = [], []
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= 32
        (matrices if is_matrix else others).append(parameter)
    optimizers = [Muon(matrices, lr)] if matrices else []
    return [*optimizers, torch.optim.Adam(others, lr=lr, fused=True)]


# ---- Sources ---------------------------------------------------------------------------------------------------------


def to_images(pixels):
    """uint8 [N, H, W, 3] of numpy as uint8 [N, 3, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def hold_out(images):
    """Every tenth image, or fewer if there are many, is held out. If there are fewer than ten, none is."""
    every = max(10, len(images) // HELD_OUT)
    held_out = torch.arange(len(images)) % every == every - 1
    if not held_out.any():
        return images, images
    return images[~held_out], images[held_out]


def open_cifar10(data_dir):
    """torchvision's training and test splits, downloaded if they are not in data_dir, md5-checked either way."""
    from torchvision.datasets import CIFAR10, utils  # takes a second that other data sets need not wait for

    # Already there? torchvision raises a RuntimeError for "not there, or not whole".
    with contextlib.suppress(RuntimeError):
        return [CIFAR10(data_dir, train) for train in (True, False)]

    # Is one of its files damaged? Looking before the download keeps what the user put there.
    archive = Path(data_dir, CIFAR10.filename)
    known = {archive: CIFAR10.tgz_md5}
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        known[Path(data_dir, CIFAR10.base_folder, name)] = md5
    for file, md5 in known.items():
        found = utils.calculate_md5(file) if file.is_file() else md5
        if found != md5:
            raise UserError(f"{file} is corrupt or cut short: its md5 is {found}, the right one {md5}; fetch it again")

    # Download and extract it in a folder of our own: other processes see complete files alone.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with quiet, tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as private:
            if not archive.is_file():
                say(f"Downloading CIFAR-10 (163 MB) to {Path(data_dir).resolve()}")
                utils.download_url(CIFAR10.url, private, CIFAR10.filename, CIFAR10.tgz_md5)
                os.replace(Path(private, CIFAR10.filename), archive)
            utils.extract_archive(archive, private)
            Path(data_dir, CIFAR10.base_folder).mkdir(exist_ok=True)
            for file in Path(private, CIFAR10.base_folder).iterdir():
                os.replace(file, Path(data_dir, CIFAR10.base_folder, file.name))
        return [CIFAR10(data_dir, train) for train in (True, False)]
    except Exception as error:  # no network, a silent server, an archive cut short, no permission: each raises its own
        raise Offline(
            f"CIFAR-10 is not in {Path(data_dir).resolve()} and could not be downloaded "
            f"({getattr(error, 'reason', error)}). Fetch {CIFAR10_URL} (md5 {CIFAR10.tgz_md5}) into that folder, "
            "or use --dataset synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def read_folder(folder):
    """Every readable image below the folder, in order of names, as uint8 [N, 3, 32, 32]. The others are reported."""
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: no such folder")

    def read(path):
        try:
            return read_image(path)
        except Exception as error:  # Pillow's decoders raise nearly everything
            say(f"warning: skipped {path}: {error}", sys.stderr)
            return None

    files = find_images(folder)
    with ThreadPoolExecutor() as pool:
        arrays = list(progress(pool.map(read, files), total=len(files), desc="reading", unit="image"))
    images = [array for array in arrays if array is not None]
    if not files:
        raise UserError(f"--data-dir {folder}: it holds no image files")
    if not images:
        raise UserError(f"--data-dir {folder}: none of its {len(files)} image files can be read")
    return to_images(np.stack(images))


def find_images(folder):
    """The image files below the folder, in order of names, without pictures and exports of this program.

    Linked folders are followed, but none is entered twice. The folder itself may be an export.
    """
    drawn = re.compile("ddim_(samples|trajectory|interpolation|reconstruction|consistency)")
    extensions = Image.registered_extensions()
    entered, found = set(), []
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        exported = ORIGIN in names and Path(where) != folder
        if real in entered or exported:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        names = [name for name in names if not drawn.match(name)]
        found += [Path(where, name) for name in names if Path(name).suffix.lower() in extensions]
    return sorted(path for path in found if path.is_file())


def read_image(path):
    """uint8 [32, 32, 3]: turned upright, transparency made white, resized and centre-cropped."""
    with Image.open(path) as image:
        image.draft("RGB", (4 * SIZE, 4 * SIZE))  # a JPEG is decoded no larger than needed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(to_eight_bits(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
        return np.asarray(image)


def to_eight_bits(image):
    """Deep grey values as uint8 [H, W]. The scale depends on the mode alone; ValueError where it would be a guess."""
    pixels = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16"):
        pixels = pixels / 257
    elif image.mode == "F" and pixels.min() >= 0 and pixels.max() <= 1:  # never true of NaN
        pixels = pixels * 255
    else:
        raise ValueError(
            f"mode {image.mode}, values {pixels.min():.4g} to {pixels.max():.4g}: no scale to 0..255 is known"
        )
    return pixels.round().astype(np.uint8)


@functools.lru_cache(maxsize=2)
def draw_shapes(count, seed):
    """Discs, squares and diamonds of any colour on shaded backgrounds: easy to learn, easy to judge."""
    draw = rng(seed)
    kind = torch.from_numpy(draw.integers(3, size=(count, 1, 1)))

    def uniform(low, high, *shape):
        return torch.from_numpy(draw.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32))

    x, y, radius = uniform(10, 21), uniform(10, 21), uniform(4, 10)
    slope_x, slope_y = uniform(-1, 1), uniform(-1, 1)
    ground, ink = uniform(0, 255, 3), uniform(0, 255, 3)

    # The shape: distances from its centre, and a cover with one pixel of anti-aliasing.
    across = torch.arange(SIZE, dtype=torch.float32)
    down = across[:, None]
    dx, dy = (across - x).abs(), (down - y).abs()
    square_or_diamond = torch.where(kind == 1, torch.maximum(dx, dy), dx + dy)
    distance = torch.where(kind == 0, torch.hypot(dx, dy), square_or_diamond)
    cover = (radius - distance + 0.5).clamp(0, 1)[:, None]

    # The ground, and the shape on it.
    slope = slope_x * (across / SIZE - 0.5) + slope_y * (down / SIZE - 0.5)
    shade = 1 + slope[:, None] / 2
    return torch.lerp(ground * shade, ink, cover).round().clamp(0, 255).to(torch.uint8)


# ---- Pictures, tables, the log ---------------------------------------------------------------------------------------


def draw_grid(images, columns=None, row_labels=(), column_labels=(), scale=None):
    """A Pillow image of uint8 [N, 3, H, W] in rows, ceil(sqrt(N)) wide by default, with labels left and on top."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    side = SIZE * (scale or max(1, min(3, 560 // (columns * SIZE))))
    pitch = side + 2
    left = 6 * max(map(len, row_labels), default=-1) + 8
    top = 16 if column_labels else 2

    sheet = Image.new("RGB", (left + columns * pitch, top + rows * pitch), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (left + column * pitch, top + row * pitch))

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


def save_table(path, header, rows):
    """Show a table, and write it as CSV."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    for row in cells:
        say("".join(f"{cell:>12}" for cell in row))
    write_atomically(path, "".join(",".join(row) + "\n" for row in cells))
    say(f"wrote {path}")


def save_png(image, path):
    """A PNG of uint8 [H, W, 3] that is complete or absent, but not forced to the disk: there are thousands."""
    write_atomically(path, lambda file: Image.fromarray(image).save(file, "PNG"), to_disk=False)


ORIGIN = ".origin.json"
LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX")


def prepare_folder(folder, sampler, count):
    """Make sure that the folder holds images of one origin, and no more than asked for. Returns the numbers it holds.

    A hidden file states the origin: the weights, and every setting on which an image depends.
    """
    config = sampler.config
    origin = {"weights_crc32": 0, "precision": sampler.runtime.precision, "seed": config.seed, "steps": config.steps}
    origin |= config.of(SCHEDULE)
    for name in ("predict", "tau", "order", "eta", "clip_x0"):  # a new setting that changes samples belongs here
        origin[name] = getattr(config, name)
    for value in sampler.model.state_dict().values():
        origin["weights_crc32"] = zlib.crc32(value.cpu().numpy().tobytes(), origin["weights_crc32"])

    # Compare it with what is there.
    note = folder / ORIGIN
    there = visible_files(folder)
    known = note.is_file() and note.read_text(errors="replace") == json.dumps(origin)
    wanted = {f"{i:05d}.png": i for i in range(count)}
    if there and not known:
        raise UserError(f"--export {folder}: it holds {there[0]}, of other weights or settings; choose another folder")
    foreign = [name for name in there if name not in wanted]
    if foreign:
        raise UserError(f"--export {folder}: it holds {foreign[0]}, which is not asked for; choose another folder")
    write_atomically(note, json.dumps(origin))
    return {wanted[name] for name in there if (folder / name).stat().st_size}  # a power cut can leave empty files


def visible_files(folder):
    """The names in a folder, sorted, without what systems leave there: hidden files, thumbnails, unfinished files."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir())
    return [name for name in names if not name.startswith(".") and not name.endswith(".tmp") and name not in LITTER]


class Log:
    """ddim_log.csv, a row per step. Steps are added as they are taken, and fetched and written several at a time."""

    columns = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds")
    row = re.compile(r"\d+,(?:[^,]*,){6}\d+(?:\.\d+)?(?:e[+-]\d+)?\n", re.ASCII)

    def __init__(self, config, step):
        """Open the file to append to it. Rows after `step`, where a run resumes, are dropped."""
        path = config.folder / "ddim_log.csv"
        rows = self.read(path, step) if step and world.rank == 0 else []
        write_atomically(path, "".join(",".join(row) + "\n" for row in [self.columns, *rows]))
        self.path, self.failure = path, None
        self.file = open(path if world.rank == 0 else os.devnull, "ab", buffering=0)  # noqa: SIM115 (closed by train)
        self.config = config
        self.pending = []  # added, but not fetched
        self.fetched = []
        self.of_epoch, self.recent = [], []  # losses
        self.seconds = self.epoch_began = float(rows[-1][-1]) if rows else 0.0
        self.bad_in_a_row = self.skipped = 0
        self.restart_clock()

    def read(self, path, step):
        """The rows up to this step. A row that was cut short, even inside its last field, or edited, is dropped."""
        if not path.is_file():
            return []
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        whole = [line for line in lines if self.row.fullmatch(line)]
        rows = [line.strip().split(",") for line in whole]
        return [row for row in rows if int(row[0]) <= step]

    def restart_clock(self):
        self.clock = time.perf_counter()

    def add(self, step, loss, grad_norm, lr):
        self.pending.append((step, loss, grad_norm, lr))

    def fetch(self):
        """Read what was added, which waits for the device, and take the time."""
        steps, losses, norms, rates = zip(*self.pending)
        values = torch.stack([*losses, *norms]).tolist()  # waits once
        self.fetched = list(zip(steps, values[: len(steps)], values[len(steps) :], rates))
        self.seconds_each = (time.perf_counter() - self.clock) / len(steps)
        self.pending.clear()

    def write(self, val_loss=None):
        """Write a row for each step that was fetched; val_loss goes with the last. Returns the text of the bar."""
        images_per_s = self.config.batch_size / self.seconds_each
        last = self.fetched[-1][0]
        for step, loss, grad_norm, lr in self.fetched:
            self.seconds += self.seconds_each
            epoch = (step - 1) // self.config.iterations + 1
            shown = val_loss if step == last and val_loss is not None else ""
            row = [step, epoch, loss, shown, lr, grad_norm, images_per_s, self.seconds]
            cells = [f"{cell:.7g}" if isinstance(cell, float) else str(cell) for cell in row]
            self.append(",".join(cells) + "\n")

            good = math.isfinite(loss + grad_norm)
            self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
            self.skipped += not good
            self.of_epoch.append(loss)
            self.recent = [*self.recent, loss][-100:]
        return f"loss {mean_finite(self.recent):.4f}, {images_per_s:,.1f} images/s"

    def append(self, text):
        """Write at once. A failure is kept for later: a disk too full for a row may still take a checkpoint."""
        data = text.encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.failure = UserError(f"cannot write {self.path}: {error}")

    def end_epoch(self, epoch, val_loss):
        """Say how the epoch went."""
        rate = self.config.batch_size * len(self.of_epoch) / (self.seconds - self.epoch_began)
        line = (
            f"epoch {epoch}/{self.config.epochs}  step {self.fetched[-1][0]:,}  loss {mean_finite(self.of_epoch):.4f}"
        )
        if val_loss is not None:
            line += f"  held-out loss {val_loss:.4f}"
        line += f"  {rate:,.1f} images/s"
        if self.skipped:
            line += f"  {self.skipped} bad steps skipped"
        say(line)
        self.of_epoch, self.epoch_began = [], self.seconds


def mean_finite(losses):
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

FORMAT = 2
PREDICTION_TYPES = {"v": "v_prediction", "eps": "epsilon"}  # diffusers' names


def save_checkpoint(path, trainer):
    """Tensors and plain values only, so that torch.load(weights_only=True) reads it."""
    content = {"format": FORMAT, "config": asdict(trainer.config), **trainer.state_dict()}
    write_atomically(path, lambda file: torch.save(content, file))
    say(f"saved {path}")


def load_checkpoint(path, device):
    """Read and validate a checkpoint, running nothing in it: a dict of format, config, step, model, ema, optimizer.

    Published weights in diffusers' naming (.bin, .safetensors), or a folder of --export-weights, give a dict of format,
    config (network and schedule) and ema alone. UserError, naming the file and the reason, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        names = [path / "unet" / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
        path = next((name for name in names if name.is_file()), names[0])
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        read = read_safetensors if path.suffix == ".safetensors" else read_torch
        checkpoint = read(path, device)
        if "conv_in.weight" in checkpoint:
            checkpoint = from_published(checkpoint)
            checkpoint["config"] |= read_scheduler(path)
        if checkpoint["format"] > FORMAT:
            newer = f"format {checkpoint['format']}, this one reads {FORMAT}"
            raise UserError(f"written by a newer version of this program ({newer})")
        if checkpoint["format"] == 1:
            upgrade(checkpoint)
        checkpoint["config"].setdefault("t_sampling", "uniform")  # older than the setting
        validate(checkpoint)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: damaged, or holds code; nothing of it was run") from error
    except Exception as error:  # zip, pickle and tensor readers have errors of many kinds
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise UserError(f"checkpoint {path}: damaged, cut short or not of this program ({reason})") from error
    return checkpoint


def load_model(path, device="cpu"):
    """(model, schedule) of a checkpoint or of published weights, ready for ddim_sample: model(x, t) -> eps.

    The weights are the averaged ones, in eval mode. UserError as for load_checkpoint.
    """
    checkpoint = load_checkpoint(path, device)
    saved = checkpoint["config"]
    config = Config(**{name: saved[name] for name in [*names_of(UNET, SCHEDULE), "predict"] if name in saved})
    network = UNet(**config.of(UNET)).to(device).eval()
    network.load_state_dict(checkpoint["ema"])
    schedule = NoiseSchedule(**config.of(SCHEDULE))
    return NoisePredictor(network, schedule, config.predict), schedule


def checksums_hold(path):
    """Of a file that torch wrote: torch.load does not look at them."""
    return not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None


def read_torch(path, device):
    if not checksums_hold(path):
        raise UserError("damaged, a checksum is wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location=device, weights_only=True)


def read_safetensors(path, device):
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError("reading it needs the package safetensors: pip install safetensors") from error
    return {name: tensor.float() for name, tensor in load_file(path, device=str(device)).items()}


def from_published(weights):
    """A checkpoint of a state dict in diffusers' naming, old or new. The settings are read off names and shapes."""
    renamed = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for old, new in renamed.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}

    channels = len(weights["conv_in.weight"])
    levels = [level for level in range(9) if f"down_blocks.{level}.resnets.0.conv1.weight" in weights]
    widths = [len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels]
    blocks = [i for i in range(99) if f"down_blocks.0.resnets.{i}.conv1.weight" in weights]
    attends = [level for level in levels if f"down_blocks.{level}.attentions.0.to_q.weight" in weights]
    config = {
        "predict": "eps",
        "channels": channels,
        "channel_mults": tuple(width // channels for width in widths),
        "res_blocks": len(blocks),
        "attn_resolutions": tuple(SIZE >> level for level in attends),
        "dropout": 0.1,
    }
    return {"format": FORMAT, "config": config, "ema": weights}


def read_scheduler(path):
    """The settings in the scheduler's config beside a folder's weights, as written by --export-weights."""
    file = path.parent.parent / "scheduler" / "scheduler_config.json"
    if path.parent.name != "unet" or not file.is_file():
        return {}
    scheduler = json.loads(file.read_text())
    betas, prediction = scheduler.get("beta_schedule", "linear"), scheduler.get("prediction_type", "epsilon")
    if betas != "linear" or prediction not in PREDICTION_TYPES.values():
        raise UserError(f"its scheduler has beta_schedule {betas}, prediction_type {prediction}: not known here")
    return {
        "predict": next(ours for ours, theirs in PREDICTION_TYPES.items() if theirs == prediction),
        "timesteps": scheduler["num_train_timesteps"],
        "beta_start": scheduler["beta_start"],
        "beta_end": scheduler["beta_end"],
    }


def upgrade(checkpoint):
    """Format 1, in place: it predicted eps, trained with Adam, and numbered the parameters of the optimizer."""
    config = {name: value for name, value in checkpoint["config"].items() if name in Config.__dataclass_fields__}
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if config.get("sample_steps") == (50,):  # its default
        del config["sample_steps"]
    checkpoint["config"] = {"predict": "eps", "optimizer": "adam", **config}
    if "optimizer" in checkpoint:
        moments = checkpoint["optimizer"]["state"]
        checkpoint["optimizer"] = {name: moments.get(i, {}) for i, name in enumerate(checkpoint["model"])}


def validate(checkpoint):
    """UserError, or another error, if anything a checkpoint should hold is missing, of another shape, or not finite."""
    config = checkpoint["config"]
    with torch.device("meta"):
        network = UNet(**{name: config[name] for name in names_of(UNET) if name in config})
    shapes = {name: value.shape for name, value in network.state_dict().items()}

    parts = {"ema": checkpoint["ema"]}
    if {"step", "model", "optimizer"} & checkpoint.keys():
        if not isinstance(checkpoint["step"], int) or checkpoint["step"] < 0:
            raise UserError(f"its step is {checkpoint['step']!r}")
        parts["model"] = checkpoint["model"]
        kinds = [{"step", "exp_avg", "exp_avg_sq"}]  # of Adam, and of Muon
        if config["optimizer"] == "muon":
            kinds.append({"momentum"})
        for name, moments in checkpoint["optimizer"].items():
            if moments and set(moments) not in kinds:
                raise UserError(f"its optimizer holds {spell(sorted(moments))} of {name}")
        for moment in ("momentum", "exp_avg", "exp_avg_sq"):
            holders = {name: moments[moment] for name, moments in checkpoint["optimizer"].items() if moment in moments}
            parts[f"optimizer's {moment}"] = holders
        if checkpoint["optimizer"].keys() != shapes.keys():
            raise UserError("its optimizer does not fit the network of its config")

    for part, tensors in parts.items():
        expected = {name: shapes.get(name) for name in tensors} if "optimizer" in part else shapes
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise UserError(f"its {part} does not fit the network of its config")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"its {part} is not finite throughout")


def laid_out_as(parameter, moments):
    """A parameter's moments, in memory as the parameter is, which the fused kernels trust them to be."""
    moved = {}
    for name, value in moments.items():
        if value.shape == parameter.shape:
            moved[name] = torch.empty_like(parameter).copy_(value)
        else:  # Adam's step count
            moved[name] = torch.empty_like(value, device=parameter.device).copy_(value)
    return moved


def peek(path):
    """Step and config of a checkpoint, without its tensors; or None for a file that cannot be read."""
    for mmap in (True, False):  # some network file systems have no mmap
        with contextlib.suppress(Exception):  # whatever cannot be read is no run to lose
            found = torch.load(path, map_location="meta", mmap=mmap, weights_only=True)
            return found["step"], found["config"]
    return None


def known_runs(folder):
    """(steps, config, path) of the checkpoints in the folder, furthest first; time breaks ties."""
    found = [(peek(path), path) for path in folder.glob("ddim_model_*.pth")]
    runs = [(*seen, path) for seen, path in found if seen]
    return sorted(runs, key=lambda run: (run[0], run[2].stat().st_mtime_ns), reverse=True)


def furthest_checkpoint(folder):
    """(path, checkpoint) of the complete checkpoint with the most steps in the folder, or (None, None)."""
    runs = [path for _, _, path in known_runs(folder)]
    unreadable = sorted(set(folder.glob("ddim_model_*.pth")) - set(runs))  # to be named below
    for path in [*unreadable, *runs]:
        try:
            checkpoint = load_checkpoint(path, "cpu")
        except UserError as error:
            say(f"warning: passed over: {error}", sys.stderr)
            continue
        if "step" in checkpoint:  # published weights cannot be resumed
            return path, checkpoint
    say(f"no checkpoint in {folder.resolve()}: starting afresh")
    return None, None


def planned_steps(config):
    """The length of a checkpoint's run."""
    return config.get("epochs", 1) * config.get("iterations", 1)


def is_quick_test(steps, config):
    return steps <= 1 and planned_steps(config) <= 1


def protect_earlier_run(config, step):
    """UserError if a new run (step None) would overwrite an earlier one; or a resumed run, a longer or another one.

    Nobody misses a quick test. A damaged checkpoint protects nothing.
    """
    runs = known_runs(config.folder)
    while runs and not checksums_hold(runs[0][2]):
        del runs[0]
    if not runs:
        return
    steps, saved, _ = runs[0]
    if step is None:
        if not is_quick_test(steps, saved):
            kind, hint = "a finished run", "choose another folder, or continue it with --resume auto and more --epochs"
            if steps < planned_steps(saved):
                kind, hint = "an interrupted run", "go on with --resume auto, or choose another folder"
            raise UserError(f"--out-dir {config.folder} holds {kind}, of {steps:,} steps: {hint}")
        return

    if steps > step:
        raise UserError(
            f"--out-dir {config.folder} holds a longer run, of {steps:,} steps, than the {step:,} of {config.resume}: "
            "choose another folder"
        )
    same = {"predict": "eps", "t_sampling": "uniform", "optimizer": "adam", **saved}  # of older programs
    for name in sorted({*names_of(UNET, SCHEDULE), *FIXED_ON_RESUME} & same.keys()):
        theirs = tuple(same[name]) if isinstance(same[name], list) else same[name]
        if theirs != getattr(config, name):
            other = f"another run ({spell_flag(name)} {spell(theirs)})"
            raise UserError(f"--out-dir {config.folder} holds {other}: choose another folder")


def this_process():
    """A name no other process has: temporary files carry it."""
    return f"{socket.gethostname()}-{os.getpid()}"


class Owner:
    """A folder that is being written has one owner: the process that holds the lock on its file .ddim_owner.

    The lock ends with the process, however that ends, so nothing stale is left. It also holds between machines where
    the file system passes locks on (NFS 4 does). Where it has none, or on Windows, the folder is not protected.
    """

    held = {}  # folder -> open file: a process does not lock itself out

    def __init__(self, folder, flag):
        self.folder, self.flag = folder.resolve(), flag
        self.path = self.folder / ".ddim_owner"

    def __enter__(self):
        if self.folder in Owner.held:
            raise UserError(f"{self.flag} {self.folder} is being written by this process; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.lock()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        Owner.held[self.folder] = file
        for leftover in self.folder.glob("*.tmp"):  # of owners that are dead
            if re.fullmatch(r"(ddim_.+|\.origin\.json|\d+\.png)\..+-\d+\.tmp", leftover.name):
                leftover.unlink(missing_ok=True)
        return self

    def lock(self):
        """The open file .ddim_owner, locked as far as the file system can."""
        while True:
            file = open(self.path, "a+")  # noqa: SIM115 (open as long as it is owned)
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    raise UserError(
                        f"{self.flag} {self.folder} is being written by {owner}; choose another folder"
                    ) from error
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()  # its owner ended, and took the file away, between our two calls: once more

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.path.unlink()  # before the lock goes: whoever opened it meanwhile finds it locked
        Owner.held.pop(self.folder).close()


def own_folders(config, stack):
    """Become the owner of --out-dir and of a folder of --export, until the stack is closed. UserError if another is."""
    export = config.export_folder
    try:
        stack.enter_context(Owner(config.folder, "--out-dir"))
        if export:
            stack.enter_context(Owner(export, "--export"))
    except OSError as error:
        where = error.filename or config.folder
        raise UserError(f"cannot write to {where}: {error.strerror} (--out-dir, --export)") from error


def prepare_out_dir(config, checkpoint_bytes):
    """Find out now what would fail after hours: no permission, no space."""
    try:
        targets = [config.folder]
        if config.export and not config.export_folder:
            targets.append(Path(config.export).resolve().parent)
        if config.export_weights:
            targets.append(Path(config.export_weights).resolve())
        for folder in targets:
            folder.mkdir(parents=True, exist_ok=True)
            trial = folder / f"ddim_trial.{this_process()}.tmp"
            trial.touch()
            trial.unlink()
        free = shutil.disk_usage(config.folder).free
    except OSError as error:
        flags = "--out-dir, --export, --export-weights"
        raise UserError(f"cannot write to {error.filename}: {error.strerror} ({flags})") from error

    # Two checkpoints at least: a new one is written before the old one goes.
    needed, all_of_them = 2 * checkpoint_bytes, (2 + config.epochs // config.save_every) * checkpoint_bytes
    if free < needed:
        raise UserError(
            f"--out-dir {config.out_dir}: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed at least"
        )
    if free < all_of_them:
        lack = f"{free / 1e6:,.0f} MB free, {all_of_them / 1e6:,.0f} MB needed for all checkpoints"
        say(f"warning: {config.out_dir}: {lack}; see --save-every", sys.stderr)


def diffusers_configs(config):
    """What diffusers has to know of a network and its schedule: the texts of its files, by name."""
    attends = [SIZE >> level in config.attn_resolutions for level in range(len(config.channel_mults))]
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 3,
        "attention_head_dim": None,
        "layers_per_block": config.res_blocks,
        "block_out_channels": [config.channels * mult for mult in config.channel_mults],
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "dropout": config.dropout,
    }
    scheduler = {
        "_class_name": "DDIMScheduler",
        "prediction_type": PREDICTION_TYPES[config.predict],
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    files = {"model_index.json": index, "unet/config.json": unet, "scheduler/scheduler_config.json": scheduler}
    return {name: json.dumps(content, indent=2) for name, content in files.items()}


def export_weights(folder, model, config):
    """The folder that diffusers' DDIMPipeline.from_pretrained(folder) loads."""
    for name, text in diffusers_configs(config).items():
        write_atomically(folder / name, text)

    # safetensors if the package is there, which diffusers prefers; else what torch writes.
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    stem = folder / "unet" / "diffusion_pytorch_model"
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import save

        data = save(weights, metadata={"format": "pt"})
        write_atomically(stem.with_suffix(".safetensors"), lambda file: file.write(data))
        stem.with_suffix(".bin").unlink(missing_ok=True)  # of an earlier export
    else:
        write_atomically(stem.with_suffix(".bin"), lambda file: torch.save(weights, file))
        stem.with_suffix(".safetensors").unlink(missing_ok=True)
    say(f"wrote {folder}")


def write_atomically(path, content, to_disk=True):
    """Write a text, or what content(file) writes: the file appears complete and on disk, or not at all. Rank 0 only."""
    if world.rank > 0:
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{this_process()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            if to_disk:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if to_disk and os.name == "posix":
            sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        reason = error
        while reason.__context__ and not isinstance(reason, OSError):  # torch.save hides a full disk in RuntimeErrors
            reason = reason.__context__
        raise UserError(f"cannot write {path.resolve()}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder):
    """Force a rename in this folder to the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


# ---- Processes -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """This process among those that torchrun started: its rank in all and on this machine, and how many there are."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def read_environment(self):
        """torchrun's variables, all of them or none. UserError if they make no sense; leftovers are ignored."""
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        found = {name: os.environ.get(name, "").strip() for name in TORCHRUN}
        hint = "start with torchrun, or unset these variables"
        numbers = {}
        for name, text in found.items():
            if text and name != "MASTER_ADDR":
                most = 65535 if name == "MASTER_PORT" else math.inf
                if not text.isdecimal() or int(text) > most:
                    raise UserError(f"{name}={text!r} in the environment is not a number it can be: {hint}")
                numbers[name] = int(text)

        size = numbers.get("WORLD_SIZE", 1)
        if size <= 1:
            if numbers.get("RANK", 0) > 0:
                say(f"warning: RANK={numbers['RANK']} without WORLD_SIZE > 1 is ignored: one process", sys.stderr)
            tasks = os.environ.get("SLURM_NTASKS", "")
            if tasks.isdecimal() and int(tasks) > 1 and os.environ.get("SLURM_PROCID", "0") == "0":
                say("warning: srun started several tasks, each a run of its own; for one run, use torchrun", sys.stderr)
            return
        missing = [name for name, text in found.items() if not text]
        if missing:
            raise UserError(f"WORLD_SIZE={size} in the environment, but {', '.join(missing)} missing: {hint}")
        rank, local_rank, local_size = (numbers[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if not (rank < size and local_rank < local_size <= size):
            told = ", ".join(f"{name}={found[name]}" for name in TORCHRUN[:4])
            raise UserError(f"{told} in the environment contradict each other: {hint}")
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
world = World()


def gather(item):
    """The items of all processes, in order of rank."""
    items = [item] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
    return items


def on_rank_0(action):
    """What action() returns, or raises as UserError, on rank 0: for all processes."""
    result = None
    if world.rank == 0:
        try:
            result = action()
        except UserError as error:
            result = error
    result = gather(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def sum_over_processes(tensor):
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def gradients_averaged(network, now):
    """backward() in this block averages gradients over processes, or leaves it to a later block."""
    if now or world.size == 1:
        return contextlib.nullcontext()
    return network.no_sync()


class UserError(Exception):
    """An error that one line explains, without a traceback."""

    code = 2


class UsageError(UserError):
    """A flag out of range, unknown, or contradicting another."""


class Offline(UserError):
    """CIFAR-10 is missing and cannot be downloaded."""


class Diverged(UserError):
    """Loss or gradient stayed non-finite."""

    code = 1

    def __init__(self, saved):
        good = f"The last good checkpoint is {saved}" if saved else "No checkpoint had been saved"
        super().__init__(f"10 steps in a row without a finite loss or gradient; try a lower --lr. {good}")


class NotFinite(UserError):
    """NotFinite(indices, count): these images of count hold infinities or NaN."""

    code = 1

    def __str__(self):
        indices, count = self.args
        which = spell(indices[:5]) + (" ..." if len(indices) > 5 else "")
        return f"{len(indices)} of {count} images are not finite: numbers {which}; none of them is written"


class Stopped(BaseException):
    """A signal asked the run to end. Its argument is the number of the signal."""


class SafeStream:
    """stdout or stderr whose failure loses no work: it becomes the null device, or shows ? for a character."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (`>&-` leaves none)

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.give_up()

    def give_up(self):
        try:  # what is in its buffer goes there, too, at the very end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def global_state_restored():
    """What the program changes in Python and torch is put back at the end: main can be called from other programs."""
    streams, threads, benchmark = (sys.stdout, sys.stderr), torch.get_num_threads(), torch.backends.cudnn.benchmark
    precision = "highest"
    with contextlib.suppress(RuntimeError):  # the caller set it by the newer names, of which torch 2.6 knows none
        precision = torch.get_float32_matmul_precision()
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # to ask for more would wake them all
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)


def say(text, file=None):
    """Print from rank 0 without breaking the progress bar."""
    if world.rank == 0:
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()


def progress(items=None, **options):
    disable = True if world.rank > 0 else None  # None: silent without a terminal
    return tqdm(items, disable=disable, dynamic_ncols=True, **options)


def spell(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def compute_all(sampler, count, function, evaluations, desc):
    """The rows of indices 0 .. count-1: see in_chunks."""
    return torch.cat([rows for _, rows in in_chunks(sampler, range(count), function, evaluations, desc)])


def in_chunks(sampler, indices, function, evaluations, desc):
    """Yield (chunk, function(chunk)) in order, on every process. Each process computes its share of the chunks.

    function: returns a row per index. evaluations: of the network, per index, for the progress bar.
    """
    count = math.ceil(len(indices) / (sampler.chunk_size * world.size)) * world.size
    chunks = [chunk.tolist() for chunk in np.array_split(np.asarray(indices), max(1, count)) if len(chunk)]
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with progress(total=len(indices) * evaluations, desc=desc, bar_format=layout) as sampler.bar:
        for first in range(0, len(chunks), world.size):
            turn = chunks[first : first + world.size]
            mine = None
            try:
                if world.rank < len(turn):
                    mine = compute_chunk(sampler, function, turn[world.rank], len(chunks[0]))
            except NotFinite as error:
                mine = error

            # All processes raise, or none: the others would wait for one that has gone.
            results = gather(mine)
            for result in results:
                if isinstance(result, NotFinite):
                    raise result
            yield from zip(turn, results)


def compute_chunk(sampler, function, chunk, size):
    """function(chunk), in halves where memory does not suffice."""
    padding = [chunk[-1]] * (size - len(chunk)) if sampler.compiled else []  # a new size would be compiled anew
    try:
        return function(chunk + padding)[: len(chunk)].cpu()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or len(chunk) == 1:
            raise
    torch.cuda.empty_cache()
    half = math.ceil(len(chunk) / 2)
    return torch.cat([compute_chunk(sampler, function, part, half) for part in (chunk[:half], chunk[half:])])


def out_of_memory(error):
    words = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")  # GPUs, Windows, Linux, CUDA
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


class Signals:
    """Ctrl-C, SIGTERM and a closed terminal raise Stopped, at once or when not postponed. A second Ctrl-C quits."""

    def __init__(self):
        self.received = 0
        self.since = 0.0
        self.postpone = False
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in no other
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum and signal.getsignal(signum) not in (signal.SIG_IGN, None):  # nohup ignores it
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if not self.received:
            self.received, self.since = signum, time.perf_counter()
        elif signum == signal.SIGINT and (world.size == 1 or time.perf_counter() - self.since > 1):
            os._exit(128 + signum)  # torchrun repeats the first by itself
        self.heed()

    def heed(self):
        if self.received and not self.postpone:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def postponed(self, postpone=True):
        """Signals that come in this block are heeded after it."""
        before, self.postpone = self.postpone, postpone
        self.heed()
        try:
            yield
        finally:
            self.postpone = before
        self.heed()

    def heeded(self):
        """Signals that come in this block are heeded at once, though it lies in a block where they are postponed."""
        return self.postponed(False)


@dataclass
class Runtime:
    """Where and how the network runs, and what stops it."""

    device: torch.device
    precision: str = "fp32"
    compile: str = "off"
    signals: Signals | None = None
    saved: Path | None = None  # the newest checkpoint
    unit: str | None = None  # of the processor, for bf16

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, network, evaluations):
        """The network compiled, if asked for, or if that many evaluations of a batch make up for the time it takes."""
        if evaluations == 0 or self.compile == "off":
            return network
        if self.compile == "auto":
            gains = self.device.type == "cuda" or self.precision == "bf16"  # a CPU in fp32: 3 %
            enough = 4000 if self.device.type == "cuda" else 1000  # compiling takes 1 to 2 minutes, eager steps 0.07 s
            if not (gains and evaluations >= enough and can_compile(self.device)):
                return network
        elif self.device.type != "mps" and not can_compile(self.device):
            raise UserError("--compile on: torch.compile does not work here (no compiler?); use --compile off")
        say("compiling the network, which may take a minute or two")
        return torch.compile(network)


def start(config, signals):
    """Join the processes that torchrun started, if it did, and choose device, precision and threads of this one."""
    device = choose_device(config.device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")  # whatever was set: newton_schulz does not stand TF32
    if world.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        torch.set_num_threads(max(1, available_cores() // world.local_size))
    if world.size > 1:
        join_processes(device)
    unit = bf16_unit(device)
    fastest = "bf16" if unit else "fp32"
    if config.precision == "auto":
        config.precision = fastest  # the checkpoint's, too: a resumed run computes as before on another machine
    elif config.resume and config.precision != fastest:
        say(f"precision {config.precision}, as before or as asked for; --precision {fastest} would be faster here")
    return Runtime(device, config.precision, config.compile, signals, unit=unit)


def join_processes(device):
    """Wait for the other processes, in a thread, so that a signal can end the waiting."""
    say(f"waiting for {world.size} processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    failure = []

    def join():
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            patience = timedelta(hours=2)  # the others wait while rank 0 downloads CIFAR-10
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failure:
        raise failure[0]


def choose_device(asked):
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    kind, _, number = asked.partition(":")
    if kind not in ("auto", *here):
        raise UserError(f"--device {asked}: not available here, where there is {', '.join(here)}")
    device = torch.device(here[0] if asked == "auto" else asked)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if count < world.local_size:
        raise UserError(f"{world.local_size} processes for {count} GPUs: lower --nproc_per_node")
    if number and (world.size > 1 or int(number) >= count):
        raise UserError(f"--device {asked}: one of {count} GPUs, for a single process; or set CUDA_VISIBLE_DEVICES")
    device = torch.device("cuda", int(number or world.local_rank))
    torch.cuda.set_device(device)
    return device


def bf16_unit(device):
    """What computes bf16 faster than fp32 there, or None: 1.8 times with avx512_bf16, several times with the others."""
    if device.type == "cuda":
        return "tensor cores" if torch.cuda.get_device_capability(device) >= (8, 0) else None  # Ampere
    if device.type == "mps":
        return None
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)


@functools.cache
def can_compile(device):
    """Whether torch.compile works there, found out by trying: it needs a C++ compiler, on a GPU Triton as well."""
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0)):
        return False
    try:
        return bool(torch.compile(torch.neg)(torch.ones(2, device=device)).sum() == -2)
    except Exception:  # of many kinds: no compiler, no headers, no Triton, no place for its files
        return False


def available_cores():
    """The cores this process may use, which in a container can be fewer than the host shows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # "max 100000" without a limit
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


# ---- Command ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def make_parser():
    """The fields of Config as flags. What is not typed is absent from the result: the defaults are Config's."""
    width = min(130, shutil.get_terminal_size().columns)
    parser = Parser(
        prog="ddim_cifar.py",
        usage="%(prog)s [--epochs N] [--iterations N] [flags], or --sample CKPT [flags]; --help lists all flags",
        description="Train a UNet on CIFAR-10 and sample it with DDIM. Without flags: a quick test.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=width),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {}
    for setting in fields(Config):
        options = {name: value for name, value in setting.metadata.items() if name not in ("group", "least", "most")}
        if setting.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = int if setting.type is tuple else setting.type
        if setting.type in (int, float) and "choices" not in options:
            options["metavar"] = "N"
        if setting.type is not bool and setting.default not in (None, ()):
            options["help"] += f" [{spell(setting.default)}]"
        title = setting.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(spell_flag(setting.name), **options)
    groups[RUNTIME].add_argument("-h", "--help", action="help", help="show this help")
    return parser


def spell_flag(name):
    return "--" + name.replace("_", "-")


def parse_args(argv=None):
    """The Config of a command line, completed from the checkpoint it names, and that checkpoint (or None)."""
    typed = vars(make_parser().parse_args(argv))
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    resume, sample = typed.get("resume"), typed.get("sample")
    trains = {*names_of(TRAINING), "resume"} - {"predict"}
    clash = [spell_flag(name) for name in typed if name in trains]
    if sample and clash:
        raise UsageError(f"--sample does not train, which {', '.join(clash)} asks for")
    for name, value in typed.items():
        if value == "":
            raise UsageError(f"{spell_flag(name)} needs the name of a file or folder")

    # The checkpoint, and the settings that come from it.
    path, checkpoint, inherited = sample or resume, None, {}
    if resume == "auto":
        path, checkpoint = furthest_checkpoint(Path(typed.get("out_dir", Config.out_dir)))
    elif path:
        checkpoint = load_checkpoint(path, "cpu")
    if checkpoint:
        quick = resume == "auto" and is_quick_test(checkpoint["step"], checkpoint["config"])
        wanted = typed
        if quick and checkpoint["config"].get("dataset") == "synthetic":  # CIFAR-10 may have been out of reach
            wanted = {"dataset": Config.dataset, **typed}
        try:
            inherited = inherit(checkpoint, path, wanted, bool(resume))
        except UsageError as error:
            if not quick:
                raise
            say(f"starting afresh, since {path} is a quick test: {error}")
            path = checkpoint = None

    # A new run begins with its recipe; what was typed wins.
    recipe = {} if checkpoint else RECIPES[typed.get("recipe", "default")]
    config = Config(**recipe | inherited | typed)
    config.resume = str(path) if resume and checkpoint else None
    config.quick_test = not path and config.total == 1 and "dataset" not in typed
    check(config)
    if config.no_ema and sample and "model" not in checkpoint:
        raise UsageError(f"--no-ema: {sample} holds one set of weights only")
    return config, checkpoint


FIXED_ON_RESUME = {"predict", "t_sampling", "dataset", "batch_size", "seed", "optimizer", "recipe"}


def inherit(checkpoint, path, typed, resume):
    """The settings a run takes over from its checkpoint. UsageError if what was typed contradicts a fixed one."""
    config = checkpoint["config"]
    taken = {*names_of(UNET, SCHEDULE), "predict", "dataset", "data_dir"}
    fixed = {*names_of(UNET, SCHEDULE)}
    if "step" in checkpoint:  # published weights do not say what they predict
        fixed.add("predict")
    if resume:
        if "step" not in checkpoint:
            raise UserError(f"checkpoint {path}: published weights cannot be resumed, only used with --sample")
        fixed |= FIXED_ON_RESUME
        taken = {*names_of(TRAINING, DATA, UNET, SCHEDULE, SAMPLING, RUNTIME)}
        taken -= {"device", "clip_x0", "no_ema"}  # of another machine; switches that no flag takes back
    inherited = {name: config[name] for name in taken & config.keys()}

    for name in sorted(fixed & typed.keys() & inherited.keys()):
        if typed[name] != inherited[name]:
            mine, its = spell(typed[name]), spell(inherited[name])
            raise UsageError(f"{spell_flag(name)} {mine} contradicts {its}, which {path} was trained with")
    judged = {**inherited, "resume": str(path)}
    if not resume:  # --sample brings steps of its own
        judged = {**inherited, "sample": str(path), "sample_steps": (1,)}
    try:
        check(Config(**judged))
    except UsageError as error:
        raise UserError(f"checkpoint {path}: its config does not fit: {error}") from error
    return inherited


def check(config):
    """UsageError for a setting that is not possible, by itself or beside the others."""
    for setting in fields(Config):
        check_value(setting, getattr(config, setting.name))
    try:
        with torch.device("meta"):
            UNet(**config.of(UNET))
    except ValueError as error:  # begins with the argument's name
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"{spell_flag(name)} {rest}") from error

    # The schedule.
    if config.beta_start > config.beta_end:
        raise UsageError(f"--beta-start {config.beta_start} must not be above --beta-end {config.beta_end}")
    if NoiseSchedule(**config.of(SCHEDULE)).alpha(config.timesteps - 1) < 1e-12:
        raise UsageError(
            f"--beta-end {config.beta_end} leaves no image after {config.timesteps} --timesteps; lower either"
        )

    if not re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", config.device):
        raise UsageError(f"--device {config.device}: must be auto, cuda, cuda:N, mps or cpu")

    # Sampling and experiments.
    if config.export_folder and config.export_folder.suffix and not config.export_folder.is_dir():
        raise UsageError(f"--export {config.export}: must be NAME.npz, or a folder, whose name has no dot")
    if config.export_folder == config.folder:
        raise UsageError(f"--export {config.export}: must be another folder than --out-dir")
    compares = config.reconstruct or config.consistency
    steps = (config.steps, *config.compared_steps) if compares else (config.steps,)
    if max(steps) > config.timesteps:
        raise UsageError(f"--sample-steps {max(steps)}: must be in 1..{config.timesteps} (--timesteps)")
    if compares and config.eta > 0:
        raise UsageError(f"--reconstruct and --consistency are about --eta 0, not --eta {config.eta}")
    if config.reconstruct and (config.order == 2 or config.clip_x0):
        raise UsageError("--reconstruct encodes with plain DDIM, which --order 2 and --clip-x0 do not undo")
    if config.order == 2 and config.eta > 0:
        raise UsageError(f"--order 2 solves the equation of --eta 0, not of --eta {config.eta}")
    if config.export_weights and config.channel_mults[0] != 1:
        raise UsageError("--export-weights: diffusers has no such network, its --channel-mults begin with 1")

    # Processes.
    if config.batch_size % world.size and not config.sample:
        better = math.ceil(config.batch_size / world.size) * world.size
        hint = "" if config.resume else f"; try {better}"
        raise UsageError(f"--batch-size {config.batch_size} does not divide among {world.size} processes{hint}")


def check_value(setting, value):
    """UsageError for a value of another type, outside its limits, or not among its choices."""
    name, limits = spell_flag(setting.name), setting.metadata
    if value is None or value == setting.default:
        return
    kind = {float: (int, float), tuple: int}.get(setting.type, setting.type)
    for item in value if setting.type is tuple else [value]:
        if not isinstance(item, kind):
            raise UsageError(f"{name} {item}: must be of type {setting.type.__name__}")
        if "choices" in limits and item not in limits["choices"]:
            raise UsageError(f"{name} {item}: must be one of {spell(limits['choices'])}")
        if "least" in limits:
            least, most = limits["least"], limits.get("most", sys.float_info.max)  # neither infinity nor NaN
            if not least <= item <= most:
                allowed = f"in {least}..{most}" if "most" in limits else f"at least {least}"
                raise UsageError(f"{name} {item}: must be {allowed}")


def get_images(config):
    """load_images, first in one process of each machine: it may download. Offline, the quick test draws its own."""
    if world.local_rank > 0:
        gather(None)  # a barrier
    try:
        return load_images(config.dataset, config.data_dir)
    except Offline as error:
        if not config.quick_test:
            raise
        config.dataset = "synthetic"
        say(f"warning: {error}. This quick test goes on with the synthetic images", sys.stderr)
        return load_images(config.dataset, config.data_dir)
    finally:
        if world.local_rank == 0:
            gather(None)


def execute(config, checkpoint, runtime):
    """Train, unless --sample was given, then draw what was asked for."""
    steps = gather(checkpoint.get("step") if checkpoint else None)
    if len(set(steps)) > 1:
        raise UserError(f"the processes found checkpoints of other steps ({spell(steps)}): each must see the same file")

    # Build the network.
    torch.manual_seed(torch_seed(config.seed, WEIGHTS))
    schedule = NoiseSchedule(**config.of(SCHEDULE))
    model = UNet(**config.of(UNET))
    if checkpoint:
        model.load_state_dict(checkpoint["ema" if config.sample and not config.no_ema else "model"])
    model.to(runtime.device, memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())

    # Prepare folders and images.
    on_rank_0(lambda: prepare_folders(config, size, steps[0]))
    images = held_out = None
    if not config.sample or config.reconstruct:
        images, held_out = get_images(config)
    processes = f", {world.size} processes" if world.size > 1 else ""
    unit = f" ({runtime.unit})" if runtime.unit and runtime.precision == "bf16" else ""
    say(f"device    {runtime.device}, {runtime.precision}{unit}{processes}")
    say(f"network   {size:,} parameters" + (f", from {config.sample}" if config.sample else ""))

    if not config.sample:
        model = execute_training(config, checkpoint, runtime, model, schedule, images, held_out)

    # Draw.
    count = config.num_samples if config.export else min(256, config.num_samples)
    if count < config.num_samples:
        say(f"drawing {count} images, a grid's most; --export PATH would write all {config.num_samples:,}")
    evaluations = math.ceil(count * config.steps / 256)  # of a batch of some 256
    sampler = Sampler(model, schedule, config, runtime, evaluations)
    save_samples(sampler, config.folder / "ddim_samples.png", count, config.export)
    if config.trajectory:
        trajectory(sampler)
    if config.interpolate:
        interpolation(sampler)
    if config.consistency:
        consistency(sampler)
    if config.reconstruct:
        reconstruction(sampler, held_out)
    if config.export_weights and world.rank == 0:
        export_weights(Path(config.export_weights).resolve(), model, config)
    say(f"next: {next_command(config, runtime)}")


def prepare_folders(config, size, step):
    """UserError if they cannot be written, or hold what this run would spoil. step: of the checkpoint, or None."""
    moments = 1 if config.optimizer == "muon" else 2
    prepare_out_dir(config, 0 if config.sample else 4 * size * (2 + moments))  # weights and averages, too
    if config.sample:
        return
    protect_earlier_run(config, step)
    there = visible_files(config.export_folder) if config.export_folder else []
    will_train = step is None or step < config.total
    if there and will_train:
        raise UserError(f"--export {config.export}: it holds {there[0]}, of other weights; choose another folder")


def execute_training(config, checkpoint, runtime, model, schedule, images, held_out):
    """Train, and return the network to sample with."""
    trainer = Trainer(model, schedule, config, runtime)
    trainer.fingerprint = zlib.crc32(images.numpy())
    if checkpoint:
        if checkpoint.get("images", trainer.fingerprint) != trainer.fingerprint:
            say("warning: the training images are not those that the run began with", sys.stderr)
        trainer.load_state_dict(checkpoint)
        checkpoint.clear()  # half a gigabyte
        runtime.saved = Path(config.resume).resolve()
    left = max(0, config.total - trainer.steps)
    say(f"images    {config.dataset}: {len(images):,} to train on, {len(held_out):,} held out")
    say(f"steps     {trainer.steps:,} done, {left:,} to go, of {config.batch_size} images each")
    say(f"files     {config.folder}, with the log ddim_log.csv")
    say("A training loss near 0.03 is normal and then looks flat; the held-out loss, on fixed noise, falls for longer.")

    def preview(epoch):
        sampler = Sampler(trainer.ema, schedule, config, runtime)
        try:
            save_samples(sampler, config.folder / f"ddim_samples_epoch_{epoch}.png", count=16)
        except NotFinite as error:  # training may recover
            say(f"warning: {error}", sys.stderr)

    train(trainer, images, held_out, preview)
    return model if config.no_ema else trainer.ema


def shell_line(words):
    """A command to be pasted into the shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def next_command(config, runtime):
    """What to try next."""
    place = [] if config.out_dir == Config.out_dir else ["--out-dir", config.out_dir]
    if config.export_folder and config.dataset == "cifar10":  # with torch-fidelity
        return shell_line(["fidelity", "--fid", "--isc", "--input1", config.export, "--input2", "cifar10-train"])
    if config.sample:
        experiments = ["--trajectory", "--interpolate", "--reconstruct", "--consistency"]
        return shell_line(["python", sys.argv[0], "--sample", config.sample, *place, *experiments])
    return shell_line(["python", sys.argv[0], "--sample", str(runtime.saved), *place, "--num-samples", "64"])


def resume_command(argv, saved):
    """The command that resumes this run."""
    argv = sys.argv[1:] if argv is None else argv
    kept = []
    for i, word in enumerate(argv):
        follows = i > 0 and argv[i - 1] == "--resume"
        if not follows and word.split("=")[0] != "--resume":
            kept.append(word)
    launcher = ["python"]
    if world.size > 1:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={world.local_size}"]
    if world.size > world.local_size:  # several machines, in their user's own way
        launcher = ["torchrun", "..."]
    return shell_line([*launcher, sys.argv[0], *kept, "--resume", str(saved)])


def main(argv=None):
    """The command. Returns the exit code: 0; 1 diverged, not finite, or a process lost; 2 an error; 128 + the signal.

    It may be called from another program, in any thread, any number of times.
    """
    with global_state_restored():
        code, complaint, everywhere = run(argv)
        if complaint and (everywhere or world.local_rank == 0):  # each machine has its own folders
            print(complaint, file=sys.stderr)
    return code


def run(argv):
    """Exit code, what to say on stderr, and whether a process other than rank 0 says it, too."""
    config = runtime = None
    try:
        world.read_environment()
        with Signals() as signals, contextlib.ExitStack() as stack:
            config, checkpoint = parse_args(argv)
            runtime = start(config, signals)
            on_rank_0(lambda: own_folders(config, stack))
            execute(config, checkpoint, runtime)
        if world.size > 1:  # NCCL waits for all processes here, so never on the way out of an error
            dist.destroy_process_group()
        return 0, None, False
    except SystemExit as finished:  # --help
        return finished.code or 0, None, False
    except Stopped as stopped:
        (signum,) = stopped.args
        complaint = f"stopped by {signal.Signals(signum).name}"
        if runtime and runtime.saved:
            complaint += f"; to go on:\n{resume_command(argv, runtime.saved)}"
        return 128 + signum, complaint, False
    except (UserError, OSError) as error:
        usage = make_parser().format_usage() if isinstance(error, UsageError) else ""
        return getattr(error, "code", 2), f"{usage}ddim_cifar.py: error: {error}", False
    except (MemoryError, RuntimeError) as error:
        code, complaint = explain(error, config)
        return code, complaint, True


def explain(error, config):
    """Exit code and line for an error of torch's: out of memory, or another process lost. Others are raised again."""
    if out_of_memory(error):
        smaller = "a smaller --sample-batch-size"
        if config and not config.sample:
            now = min(config.micro_batch or config.batch_size, config.batch_size // world.size)
            if now > 1:
                smaller = f"--micro-batch {now // 2}, which trains the same (or {smaller})"
        return 2, f"ddim_cifar.py: error: out of memory; try {smaller}"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return 1, f"ddim_cifar.py: error: process {world.rank} lost the others: {str(error).splitlines()[0]}"
    raise error


if __name__ == "__main__":
    sys.exit(main())
