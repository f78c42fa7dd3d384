"""Denoising diffusion implicit models on CIFAR-10, in one file: train a UNet to predict noise, sample it with DDIM.

    python ddim_cifar.py                                       quick test: one training step, then 16 samples
    python ddim_cifar.py --epochs 50 --iterations 1000         train, save checkpoints, draw a 4x4 grid
    python ddim_cifar.py --resume auto --epochs 100            continue from the furthest checkpoint
    python ddim_cifar.py --sample tests/pretrained.pth         draw samples from a trained model

Read from the top: Settings, Diffusion, UNet, Data, Training and Sampling are the method, Experiments the paper's
figures. The code behind the banner makes a run fast and safe: the Muon optimizer, data sources, pictures, the log,
checkpoints, processes and the command line. You can skip it until you need to change something there.

References: "DDPM" is Ho, Jain & Abbeel, arXiv 2006.11239, which defines the network and the training. "Eq.", "Sec." and
"App." refer to Song, Meng & Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502; its alpha_t is called
alphas_cumprod[t] here.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

SIZE = 32  # image height and width in pixels
HELD_OUT = 256  # images in the held-out loss
READ_EVERY = {"cuda": 10}  # steps between reads of the loss, each of which synchronizes with a GPU; elsewhere 1

# ---- Settings --------------------------------------------------------------------------------------------------------
# Every field of Config is a flag: `epochs` is --epochs. The group of a field decides what a checkpoint passes on to a
# resumed or sampling run, and what may not be changed there (see `inherit`).

LENGTH = "training"
RUN = "training: cannot change on resume"
OUTPUT = "network output: fixed by the checkpoint"
UNET = "network: fixed by the checkpoint"
SCHEDULE = "noise schedule: fixed by the checkpoint"  # fields are passed to NoiseSchedule; none by default
SAMPLING = "sampling"
SAMPLER = "sampler"  # fields are passed to ddim_sample
RUNTIME = "hardware"
FILES = "files"

SPACINGS = ("uniform", "quadratic")
EXPERIMENTS = ("trajectory", "interpolation", "reconstruction", "consistency")
LEARNING_RATES = {"muon": 2.5e-3, "adam": 2e-4}  # the optimizers, and the default of --lr for each
PAPER = {"predict": "eps", "optimizer": "adam", "warmup": 5000, "batch_size": 128, "dropout": 0.1, "lr_decay": 0.0}


def flag(group, default, help, **options):
    """Declare a field of Config. options: its least and most allowed value, and arguments of add_argument."""
    return field(default=default, metadata={"group": group, "help": help, **options})


@dataclass
class Config:
    """All settings of a run. A checkpoint stores them as a dict.

    A new field is a new flag. In the groups UNET, SCHEDULE and SAMPLER, it is also a new argument of UNet,
    NoiseSchedule and ddim_sample.
    """

    epochs: int = flag(LENGTH, 1, "total training length, in epochs of --iterations steps", least=1)
    iterations: int = flag(LENGTH, 1, "optimizer steps per epoch, whatever the size of the data set", least=1)
    lr: float = flag(LENGTH, None, "learning rate [0.0025 for muon, 0.0002 for adam]", least=1e-9)
    warmup: int = flag(LENGTH, 50, "steps of linear learning-rate warm-up", least=0)
    lr_decay: float = flag(LENGTH, 0.5, "final fraction of training in which the rate falls to 0", least=0, most=1)
    ema_decay: float = flag(LENGTH, 0.9999, "decay of the exponential moving average of the weights", least=0, most=1)
    save_every: int = flag(LENGTH, 10, "epochs between checkpoints, held-out losses and sample grids", least=1)
    save_minutes: float = flag(LENGTH, 10.0, "minutes between updates of ddim_model_last.pth", least=0)

    batch_size: int = flag(RUN, 32, "images per step, over all processes", least=1)
    optimizer: str = flag(RUN, "muon", "muon: for matrices, with Adam for the rest", choices=tuple(LEARNING_RATES))
    recipe: str = flag(RUN, "default", "paper: DDPM's defaults; explicit flags override", choices=("default", "paper"))
    dropout: float = flag(RUN, 0.0, "dropout in each ResBlock; use 0.1 for hundreds of epochs", least=0, most=0.99)
    dataset: str = flag(RUN, "cifar10", "cifar10, synthetic (generated discs) or a folder of images", metavar="NAME")

    predict: str = flag(OUTPUT, "v", "what the network predicts; eps: as in DDPM", choices=("v", "eps"))
    channels: int = flag(UNET, 128, "base width, a multiple of 32", least=1, most=4096)
    channel_mults: tuple = flag(UNET, (1, 2, 2, 2), "width multiplier of each resolution", least=1, most=64, nargs="+")
    res_blocks: int = flag(UNET, 2, "ResBlocks per resolution", least=1, most=100)
    attn_resolutions: tuple = flag(UNET, (16,), "feature-map sizes that get attention", least=1, nargs="*")

    num_samples: int = flag(SAMPLING, 16, "images to draw; a grid shows at most 256, --export writes all", least=1)
    sample_steps: tuple = flag(SAMPLING, (), "steps S; experiments use all, samples the last [50]", least=1, nargs="+")
    tau: str = flag(SAMPLING, "quadratic", "spacing of the S timesteps; the paper's is quadratic", choices=SPACINGS)
    no_ema: bool = flag(SAMPLING, False, "sample with the raw weights instead of their moving average")
    experiments: tuple = flag(SAMPLING, (), "pictures to draw", choices=EXPERIMENTS, nargs="+", type=str)

    eta: float = flag(SAMPLER, 0.0, "0: DDIM, deterministic; 1: DDPM", least=0, most=1)
    order: int = flag(SAMPLER, 1, "2: DPM-Solver++(2M), better for few steps, at the same cost", choices=(1, 2))

    device: str = flag(RUNTIME, "auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, ...", metavar="DEVICE")
    precision: str = flag(RUNTIME, "auto", "auto: bf16 where it is fast", choices=("auto", "fp32", "bf16"))
    compile: str = flag(RUNTIME, "auto", "torch.compile; auto: long runs on a GPU", choices=("auto", "on", "off"))
    micro_batch: int = flag(RUNTIME, None, "images at a time, to save memory [all; sampling: 32, cuda 256]", least=1)
    seed: int = flag(RUNTIME, 0, "random seed; --sample uses this one, not that of the training run", least=0)

    resume: str = flag(FILES, None, "continue this checkpoint or run folder; auto: the run in --out-dir, or a new one")
    sample: str = flag(FILES, None, "sample from this checkpoint, run folder or published weights; do not train")
    export: str = flag(FILES, None, "also write all samples: NAME.npz (uint8 [N,32,32,3]), or a new folder of PNGs")
    export_weights: str = flag(FILES, None, "also write the EMA weights: NAME.pth, or a folder for diffusers")
    data_dir: str = flag(FILES, "./data", "folder of CIFAR-10, downloaded if missing", metavar="DIR")
    out_dir: str = flag(FILES, None, "output folder [that of the resumed or sampled run, else .]", metavar="DIR")

    def __post_init__(self):
        if self.lr is None:
            self.lr = LEARNING_RATES.get(self.optimizer)

    @property
    def total(self):
        """Optimizer steps of the whole training."""
        return self.epochs * self.iterations

    @property
    def is_quick_test(self):
        return self.total == 1 and not self.sample

    @property
    def steps(self):
        """Sampling steps S of the samples. The quick test draws noise, for which 10 are enough."""
        return self.sample_steps[-1] if self.sample_steps else 10 if self.is_quick_test else 50

    @property
    def folder(self):
        """The folder that all output goes to."""
        return Path(self.out_dir or ".").resolve()

    def autocast(self):
        """Return a context in which the network computes in --precision."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def of(self, *groups):
        """Return the settings of these groups as keyword arguments, as in NoiseSchedule(**config.of(SCHEDULE))."""
        return {name: getattr(self, name) for name in self.names(*groups)}

    @staticmethod
    def names(*groups):
        """Return the names of the settings of these groups."""
        return [setting.name for setting in fields(Config) if setting.metadata["group"] in groups]


# ---- Diffusion -------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """A linear schedule of betas (DDPM, Sec. 4).

    timesteps: T. beta_start, beta_end: the first and the last beta.
    Its attribute alphas_cumprod, float64 [T] on the CPU, is the alpha_t of the DDIM paper.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.timesteps, self.alphas_cumprod = timesteps, torch.cumprod(1 - betas, dim=0)
        self.tables = {}  # see `scales`

    def alpha(self, t):
        """Return alphas_cumprod[t] as a float. t = -1 is the clean image, with alpha = 1."""
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def noise_ratio(self, t):
        """Return sqrt((1 - alpha) / alpha), the sigma(t) of Eq. 14: x_t / sqrt(alpha) = x_0 + sigma(t) eps."""
        alpha = self.alpha(t)
        return math.sqrt((1 - alpha) / alpha)

    def scales(self, x, t):
        """Return sqrt(alpha_t) and sqrt(1 - alpha_t), shaped to multiply x. x: [N, ...]; t: int64 [N]."""
        key = x.dtype, x.device
        if key not in self.tables:  # cached, because copying to a GPU in every step would synchronize with it
            squares = (self.alphas_cumprod, 1 - self.alphas_cumprod)
            self.tables[key] = [square.sqrt().to(x.dtype).to(x.device) for square in squares]  # MPS has no float64
        return [table[t].view(-1, *[1] * (x.ndim - 1)) for table in self.tables[key]]

    def add_noise(self, x_0, eps, t):
        """Return x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps (Eq. 4). x_0, eps: [N, ...]; t: int64 [N]."""
        signal_scale, noise_scale = self.scales(x_0, t)
        return signal_scale * x_0 + noise_scale * eps


class NoisePredictor(nn.Module):
    """Compute eps_theta(x_t, t) from the network output F(x_t, t). Only this class knows what F stands for.

    predict="eps": eps_theta = F (DDPM).
    predict="v": eps_theta = sqrt(1 - alpha_t) x_t + sqrt(alpha_t) F (arXiv 2202.00512, App. D). At large t, where x_t
    is nearly pure noise, an untrained network (F = 0) is then close to the right answer.
    """

    def __init__(self, network, schedule, predict="v"):
        super().__init__()
        self.network, self.schedule, self.predict = network, schedule, predict

    def forward(self, x, t):
        """Return eps, like x. x: [N, 3, H, W]; t: int64 [N]."""
        output = self.network(x, t).to(x.dtype)
        signal_scale, noise_scale = self.schedule.scales(x, t)
        if self.predict == "eps":
            return output
        if self.predict == "v":
            return noise_scale * x + signal_scale * output
        raise ValueError(f"predict {self.predict!r} is not implemented")


def ddim_timesteps(timesteps, steps, spacing):
    """Select the timesteps tau that sampling visits: `steps` distinct ints in 0..timesteps-1, ascending (App. D.2).

    spacing: "uniform" is floor(i T / S); "quadratic" is floor(c i^2), ending at 0.8 T as in the official code. Where
    two of them coincide, the next free integer is used.
    Raises ValueError unless 1 <= steps <= timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1..{timesteps}, not {steps}")

    i = np.arange(steps, dtype=np.int64)  # the default on Windows, int32, is too small for the squares
    if spacing == "uniform":
        wanted = i * timesteps // steps
    elif spacing == "quadratic":
        last = max(1, steps - 1)
        squares = i**2 if steps > 1 else i + 1  # a single step starts at 0.8 T, not at 0
        wanted = 4 * timesteps * squares // (5 * last**2)
    else:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")

    # Make them distinct, and leave room for the rest below T.
    distinct = np.maximum.accumulate(wanted - i) + i
    return np.minimum(distinct, timesteps - steps + i).tolist()


@torch.no_grad()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, *, order=1, noise=None, on_step=None):
    """Sample x_0 from x_T along the timesteps tau (Eq. 12).

    model: any callable (x [N, ...], t int64 [N]) -> eps [N, ...].
    x_T: [N, ...], float32 or float64; the sampler computes in this dtype.
    tau: ascending timesteps, as from ddim_timesteps.
    eta: 0 is DDIM, deterministic; 1 has the variance of DDPM (Eq. 16).
    order: 2 is DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) with as many evaluations of the model. It needs eta = 0
    and suits uniform spacing least, whose steps are uneven in log sigma.
    noise: callable () -> standard normal [N, ...] for eta > 0; torch.randn_like by default.
    on_step: callable (t, x_0), called once per step with the predicted x_0.

    Returns x_0, like x_T. The predicted x_0 is not clipped.
    Raises ValueError if tau is not ascending, or for an unsupported eta or order.
    """
    check_tau(tau, schedule)
    if not 0 <= eta <= 1 or order not in (1, 2) or (order == 2 and eta > 0):
        raise ValueError(f"eta must be in [0, 1], order 1 or 2, and order 2 needs eta 0; not eta {eta}, order {order}")

    x_t = x_T
    previous_x_0 = previous_h = None
    for t, t_prev in reversed(list(zip(tau, [-1, *tau[:-1]]))):
        alpha, alpha_prev = schedule.alpha(t), schedule.alpha(t_prev)
        eps = model(x_t, x_t.new_full((len(x_t),), t, dtype=torch.int64)).to(x_t.dtype)

        # Predict x_0 (Eq. 9).
        x_0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        if on_step:
            on_step(t, x_0)

        # Second order: extrapolate x_0, linear in log sigma, to the middle of the step.
        if order == 2 and t_prev >= 0:
            predicted = x_0
            h = math.log(schedule.noise_ratio(t) / schedule.noise_ratio(t_prev))
            if previous_x_0 is not None:
                x_0 = predicted + h / (2 * previous_h) * (predicted - previous_x_0)
            previous_x_0, previous_h = predicted, h
            eps = (x_t - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)

        # Step to t_prev (Eq. 12), with fresh noise of the variance of Eq. 16 if eta > 0.
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
        x_t = math.sqrt(alpha_prev) * x_0 + math.sqrt(max(0.0, 1 - alpha_prev - sigma**2)) * eps
        if sigma > 0:
            x_t += sigma * (noise() if noise else torch.randn_like(x_t))
    return x_t


@torch.no_grad()
def ddim_encode(model, x_0, schedule, tau):
    """Encode x_0 as its noise x_T by running the ODE of ddim_sample in reverse (Sec. 4.3, Eq. 14).

    Arguments are those of ddim_sample. The model is evaluated at the start of each step. It was not trained at
    alpha = 1, so the first step evaluates it at tau[0].
    Returns x_T, like x_0.
    """
    check_tau(tau, schedule)
    x_t = x_0
    for t, t_next in zip([-1, *tau[:-1]], tau):
        alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
        eps = model(x_t, x_t.new_full((len(x_t),), max(t, tau[0]), dtype=torch.int64)).to(x_t.dtype)
        h = schedule.noise_ratio(t_next) - schedule.noise_ratio(t)
        x_t = math.sqrt(alpha_next) * (x_t / math.sqrt(alpha) + h * eps)
    return x_t


def check_tau(tau, schedule):
    """Raise ValueError unless tau holds ascending timesteps of the schedule."""
    if not tau or [*tau] != sorted({*tau} & {*range(schedule.timesteps)}):
        raise ValueError(f"tau must hold ascending timesteps in 0..{schedule.timesteps - 1}, not {[*tau[:5]]} ...")


def slerp(a, b, weight):
    """Interpolate spherically between noises, image by image (App. D.5).

    a, b: [N, ...]; weight: float or [N], where 0 gives a and 1 gives b. Returns [N, ...].
    """
    weight = torch.as_tensor(weight, dtype=a.dtype).to(a.device).expand(len(a))
    weight = weight.view(-1, *[1] * (a.ndim - 1))

    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1))
    theta = cosine.clamp(-1, 1).acos().view_as(weight)  # the angle between a and b

    # Along the arc, or along the straight line if a and b are parallel (no arc) or opposite (no unique arc).
    parallel = theta.sin() < 1e-6
    divisor = torch.where(parallel, 1.0, theta.sin())
    weight_a = torch.where(parallel, 1 - weight, ((1 - weight) * theta).sin() / divisor)
    weight_b = torch.where(parallel, weight, (weight * theta).sin() / divisor)
    return weight_a * a + weight_b * b


# ---- UNet ------------------------------------------------------------------------------------------------------------
# DDPM, App. B. Parameters are named as in diffusers' UNet2DModel, so published weights load as they are.


def sinusoidal_embedding(t, dim):
    """Embed timesteps as sines, then cosines, of geometrically spaced frequencies (DDPM, App. B; arXiv 1706.03762).

    t: int64 [N]; dim: even, at least 4. Returns float32 [N, dim]. Frequency i is 10000^(-i / (dim/2 - 1)).
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2 - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a shift by the time embedding, with a residual connection."""

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
        inplace = not self.training  # in training, torch would copy the input first
        h = self.conv1(F.silu(self.norm1(x), inplace))
        h += self.time_emb_proj(time_emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace)))
        h += self.conv_shortcut(x)
        return h


class Attention(nn.Module):
    """Single-head self-attention over all H x W positions."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = GroupNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):  # [N, C, H, W]
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, H*W, C]
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h))).transpose(1, 2)
        return x + h.unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve the image size with a strided 3x3 convolution, padded at the right and at the bottom."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):  # [N, C, H, W] -> [N, C, H/2, W/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """The ResBlocks of one resolution, with optional attention after each, and the resampling to the next."""

    def __init__(self, widths_in, width, c_time, dropout, attends, downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, width, c_time, dropout) for c_in in widths_in)
        self.attentions = nn.ModuleList(Attention(width) if attend else nn.Identity() for attend in attends)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)


class UNet(nn.Module):
    """The DDPM CIFAR-10 network (DDPM, App. B). It has 35,746,307 parameters by default.

    channels: width of the first resolution, a multiple of 32. channel_mults: width of each resolution over channels.
    res_blocks: ResBlocks per resolution (one more on the way up). attn_resolutions: feature-map sizes in pixels whose
    ResBlocks are followed by attention. image_size: H, divisible by 2^(len(channel_mults) - 1).
    Raises ValueError, beginning with the name of the argument, if sizes do not fit.
    """

    def __init__(
        self,
        channels=128,
        channel_mults=(1, 2, 2, 2),
        res_blocks=2,
        attn_resolutions=(16,),
        dropout=0.0,
        image_size=SIZE,
    ):
        super().__init__()
        sides = [image_size >> level for level in range(len(channel_mults))]
        if channels % 32:
            raise ValueError(f"channels {channels}: must be a multiple of 32")
        if image_size % 2 ** (len(sides) - 1):
            raise ValueError(f"channel_mults {spell(channel_mults)}: {image_size} pixels cannot be halved so often")
        if not set(attn_resolutions) <= set(sides):
            raise ValueError(f"attn_resolutions {spell(attn_resolutions)}: must be among {spell(sides)}")
        levels = [(channels * mult, side in attn_resolutions) for mult, side in zip(channel_mults, sides)]

        # Time embedding and first convolution.
        c_time = 4 * channels
        self.channels = channels
        linears = {"linear_1": nn.Linear(channels, c_time), "linear_2": nn.Linear(c_time, c_time)}
        self.time_embedding = nn.ModuleDict(linears)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)

        # The way down. The output of every layer becomes a skip connection.
        self.down_blocks = nn.ModuleList()
        skips = [channels]
        for level, (width, attends) in enumerate(levels, 1):
            inputs = [skips[-1]] + [width] * (res_blocks - 1)
            down = [Downsample(width)] if level < len(levels) else []
            self.down_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * res_blocks, downsamplers=down))
            skips += [width] * (res_blocks + len(down))

        deepest = levels[-1][0]
        self.mid_block = Stage([deepest, deepest], deepest, c_time, dropout, [True, False])

        # The way up. Each ResBlock takes a skip connection, concatenated to its input.
        self.up_blocks = nn.ModuleList()
        below = deepest
        for level, (width, attends) in reversed(list(enumerate(levels, 1))):
            inputs = [c_in + skips.pop() for c_in in [below] + [width] * res_blocks]
            up = [Upsample(width)] if level > 1 else []
            self.up_blocks.append(Stage(inputs, width, c_time, dropout, [attends] * (res_blocks + 1), upsamplers=up))
            below = width

        self.conv_norm_out = GroupNorm(below)
        self.conv_out = nn.Conv2d(below, 3, 3, padding=1)

        # Draw weights as DDPM does: fan_avg scaling, zeros for the last layer of each branch and of the network.
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "to_out.0", "conv_out")):
                    nn.init.zeros_(module.weight)

    def forward(self, x, t):
        """Return F(x, t), [N, 3, H, H]. x: [N, 3, H, H] with H = image_size; t: int64 [N]."""
        time_emb = self.time_embedding["linear_1"](sinusoidal_embedding(t, self.channels))
        time_emb = F.silu(self.time_embedding["linear_2"](F.silu(time_emb)))  # with the SiLU of every ResBlock
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
        return self.conv_out(F.silu(self.conv_norm_out(h), inplace=not self.training))


# ---- Data ------------------------------------------------------------------------------------------------------------
# Images are stored as uint8 [N, 3, 32, 32]. Every random draw is a function of (seed, purpose, position), so there is
# no random state to save.

ORDER, STEP, DROPOUT, VALIDATION, NOISE, ETA_NOISE, WEIGHTS = range(7)  # purposes
rng = np.random.default_rng  # called with a tuple (seed, purpose, position)


def torch_seed(*key):
    """Return a seed for torch's generators from (seed, purpose, position)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def to_float(images):
    """Convert uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Convert floats in [-1, 1] to uint8 0..255, rounded and clamped."""
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


@functools.lru_cache(maxsize=2)
def permutation(seed, number, count):
    """Return the order of `count` images in one pass over the data."""
    return rng((seed, ORDER, number)).permutation(count)


def batches(count, batch_size, seed, first, last):
    """Yield this process's image indices for steps first..last-1, from consecutive shuffled passes over the data."""
    for n in range(first, last):
        positions = range(n * batch_size, (n + 1) * batch_size)[share(batch_size)]
        yield [int(permutation(seed, position // count, count)[position % count]) for position in positions]


def t_density(schedule, predict):
    """Return the density with which training draws t, relative to uniform: float64 [T] with mean 1.

    For "v" it is sqrt(alpha_t), because the error of eps is sqrt(alpha_t) times that of the network output, so large t
    teach little. The loss is divided by the density, so its expectation is still Eq. 5. The per-image gradient has half
    the second moment (measured; arXiv 2102.09672, Sec. 3.3, describes the method).
    """
    density = schedule.alphas_cumprod ** (0.5 if predict == "v" else 0)
    return density / density.mean()


def draw_step(n, batch_size, timesteps, seed, device, cumulative=None):
    """Draw flip bool [B, 1, 1, 1], t int64 [B] and eps float32 [B, 3, 32, 32] of step n, for B images of this process.

    cumulative: float32 [T], the cumulative sum of a t_density. None draws t uniformly.
    """
    generator = torch.Generator(device).manual_seed(torch_seed(seed, STEP, n))
    options = {"generator": generator, "device": device}
    flip = torch.rand(batch_size, 1, 1, 1, **options) < 0.5

    # Uniform t, stratified over the batch (arXiv 2107.00630, App. I.1).
    strata = torch.arange(batch_size, device=device) * timesteps // batch_size
    t = (strata + torch.randint(timesteps, (1,), **options)) % timesteps

    eps = torch.randn(batch_size, 3, SIZE, SIZE, **options)

    # Non-uniform t: map the uniform draws through the inverse CDF.
    if cumulative is not None:
        t = torch.searchsorted(cumulative, t + torch.rand(1, **options), right=True).clamp(max=timesteps - 1)
    mine = share(batch_size)
    return flip[mine], t[mine], eps[mine]


# ---- Training --------------------------------------------------------------------------------------------------------


class Trainer:
    """The training state, as stored in a checkpoint: weights, EMA weights, optimizer moments and step count."""

    def __init__(self, model, schedule, config, images_crc32=None):
        self.model, self.schedule, self.config = model.train(), schedule, config
        self.device = torch.device(config.device)
        self.images_crc32 = images_crc32  # of the training images: a resumed run compares it
        self.steps, self.is_whole = 0, True  # is_whole is False while a step changes the weights
        self.optimizers = make_optimizers(model, config.optimizer, config.lr, config.precision)

        # The density of t.
        density = t_density(schedule, config.predict)
        self.density = density.float().to(self.device)
        self.cumulative = density.cumsum(0).float().to(self.device) if (density != 1).any() else None

        # The exponential moving average of the weights, used for sampling.
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters, self.averages = list(model.parameters()), list(self.ema.parameters())

        # Compile by the total, not the remaining, steps, so that a resumed run computes as the original did.
        network = compiled(model, config, evaluations=config.total)
        if world.size > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.predictor = NoisePredictor(network, schedule, config.predict)

    def learning_rate(self, n):
        """Return the rate of step n: linear warm-up, constant, linear decay to zero."""
        config = self.config
        warm = (n + 1) / max(1, config.warmup)
        to_zero = (config.total - n) / max(1, config.lr_decay * config.total)
        return config.lr * min(1.0, warm, to_zero)

    def noisy_images(self, images, n):
        """Return x_t, t and eps of step n for this process's uint8 images: flipped at random, with noise added."""
        batch_size, seed = self.config.batch_size, self.config.seed
        flip, t, eps = draw_step(n, batch_size, self.schedule.timesteps, seed, self.device, self.cumulative)
        images = images.pin_memory() if self.device.type == "cuda" else images  # lets the copy run asynchronously
        x_0 = to_float(images.to(self.device, non_blocking=True))
        x_0 = torch.where(flip, x_0.flip(3), x_0)
        x_t = self.schedule.add_noise(x_0, eps, t)
        return x_t.contiguous(memory_format=torch.channels_last), t, eps

    def loss(self, x_t, t, eps):
        """Return Eq. 5 for each image, [N], divided by the density of t. To reweight t, multiply by gamma_t here."""
        with self.config.autocast():
            predicted = self.predictor(x_t, t)
        return (predicted - eps).square().mean((1, 2, 3)) / self.density[t]

    def backward(self, images, n):
        """Accumulate the gradients of step n, --micro-batch images at a time. Returns the mean loss."""
        x_t, t, eps = self.noisy_images(images, n)
        torch.manual_seed(torch_seed(self.config.seed, DROPOUT, n, world.rank))
        size = self.config.micro_batch or len(images)
        total = 0.0
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            loss = self.loss(x_t[part], t[part], eps[part]).sum() / len(images)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, images):
        """Take one optimizer step on uint8 images. Returns step count, loss, gradient norm and learning rate.

        Loss and norm stay on the device, because reading them would synchronize with a GPU.
        """
        n, lr = self.steps, self.learning_rate(self.steps)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.backward(images, n) / world.size
        if world.size > 1:
            dist.all_reduce(loss)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)

        # Skip the step if loss or gradient is not finite.
        bad = (~(loss + grad_norm).isfinite()).float()
        self.is_whole = False
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if bad.is_cuda and hasattr(optimizer, "_step_supports_amp_scaling"):  # torch's fused ones, and Muon
                optimizer.found_inf = bad
                optimizer.step()
            elif not bad:  # reading `bad` would synchronize with a GPU
                optimizer.step()

        # EMA: average = d average + (1 - d) parameter.
        d = min(self.config.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - d)
        self.steps, self.is_whole = n + 1, True
        return self.steps, loss, grad_norm, lr


@torch.no_grad()
def held_out_loss(predictor, images, config):
    """Return the loss on held-out images with fixed eps and stratified t. It is less noisy than the training loss."""
    schedule, device = predictor.schedule, config.device
    count = max(32, min(HELD_OUT, len(images)))  # fewer images are repeated, to cover at least 32 values of t
    x_0 = to_float(images[torch.arange(count) % len(images)].to(device))
    t = torch.arange(len(x_0), device=device) * schedule.timesteps // len(x_0)
    eps = rng((0, VALIDATION)).standard_normal(x_0.shape, dtype=np.float32)  # not --seed, so that runs are comparable
    eps = torch.from_numpy(eps).to(device)
    x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
    with config.autocast():
        predicted = torch.cat([predictor(*part) for part in zip(x_t.split(32), t.split(32))])
    return float((predicted - eps).square().mean())


def train(trainer, images, held_out, log):
    """Take the remaining steps. Write the log and checkpoints, and draw sixteen samples with each epoch checkpoint.

    Raises SystemExit after a signal, with a checkpoint saved, and UserError after ten bad steps in a row.
    """
    config = trainer.config
    averaged = NoisePredictor(trainer.ema, trainer.schedule, config.predict)
    saved_at = time.perf_counter()
    with log.bar, rescued(trainer, log) as signals:
        for indices in batches(len(images), config.batch_size, config.seed, trainer.steps, config.total):
            log.timed(trainer.step, images[indices])
            epoch, within_epoch = divmod(trainer.steps, config.iterations)
            periodic = within_epoch == 0 and epoch % config.save_every == 0
            run_ends = trainer.steps == config.total
            if trainer.steps % READ_EVERY.get(trainer.device.type, 1) and not (periodic or run_ends):
                continue

            # Log.
            validates = (periodic or run_ends) and not config.is_quick_test
            log.write(functools.partial(held_out_loss, averaged, held_out, config) if validates else None)

            # Save and show.
            with forgiving():
                if periodic:
                    save_checkpoint(config.folder / f"ddim_model_epoch_{epoch}.pth", trainer)
                if not run_ends and time.perf_counter() - saved_at >= 60 * config.save_minutes:
                    saved_at = time.perf_counter()
                    save_checkpoint(config.folder / "ddim_model_last.pth", trainer)
            if run_ends:
                save_checkpoint(config.folder / "ddim_model_final.pth", trainer)
            if periodic:
                with forgiving():
                    sampler = Sampler(trainer.ema, trainer.schedule, config)
                    save_samples(sampler, config.folder / f"ddim_samples_epoch_{epoch}.png", count=16)

            if stop := max(gather(max(signals, default=0))):  # all processes stop at the same step
                raise SystemExit(128 + stop)  # `rescued` saves


# ---- Sampling --------------------------------------------------------------------------------------------------------


class Sampler:
    """Draw images by index. Image i depends only on (seed, i), not on the batch it is drawn in."""

    def __init__(self, model, schedule, config, evaluations=0):
        self.model, self.schedule, self.config = model.eval(), schedule, config
        network = compiled(model, config, evaluations)
        self.is_compiled = network is not model
        self.predictor = NoisePredictor(network, schedule, config.predict)
        self.chunk_size = config.micro_batch or (256 if config.device.startswith("cuda") else 32)
        self.bar = tqdm(disable=True)
        # x_T is pure noise, but at an alpha well above 0 the network expects some signal.
        first = self.tau(config.steps)[-1]
        if (alpha := schedule.alpha(first)) > 0.02:
            say(f"warning: sampling starts at t = {first}, where alpha is {alpha:.2f}; try --tau uniform", sys.stderr)

    def eps(self, x, t):
        """Return eps_theta(x, t), and advance the progress bar."""
        self.bar.update(len(x) * world.size)
        with self.config.autocast():
            return self.predictor(x, t)

    def normal(self, generators):
        """Return standard normal float32 [N, 3, 32, 32], one image from each generator."""
        x = np.stack([generator.standard_normal((3, SIZE, SIZE), dtype=np.float32) for generator in generators])
        return torch.from_numpy(x).to(self.config.device, memory_format=torch.channels_last)

    def x_T(self, indices):
        """Return the starting noise of these images."""
        return self.normal([rng((self.config.seed, NOISE, i)) for i in indices])

    def tau(self, steps):
        """Return the timesteps of a sampler with this many steps."""
        return ddim_timesteps(self.schedule.timesteps, steps, self.config.tau)

    def sample(self, indices, steps, x_T=None, on_step=None):
        """Return x_0 of these images, float32 [N, 3, 32, 32]."""
        x_T = self.x_T(indices) if x_T is None else x_T
        generators = [rng((self.config.seed, ETA_NOISE, i)) for i in indices]
        options = {**self.config.of(SAMPLER), "noise": lambda: self.normal(generators), "on_step": on_step}
        return ddim_sample(self.eps, x_T, self.schedule, self.tau(steps), **options)


def save_samples(sampler, path, count, export=None):
    """Draw images 0..count-1. Write the first 256 as a grid to `path`, and all to `export` (see save_images)."""
    steps = sampler.config.steps
    images = compute(sampler, count, functools.partial(sampler.sample, steps=steps), steps, "sampling", to_uint8)
    if export:
        save_images(images, Path(export).resolve())
    save_grid(images[:256], path)


# ---- Experiments -----------------------------------------------------------------------------------------------------
# Each draws a figure of the paper: (sampler, test images) -> a picture in --out-dir, and numbers on the screen.


def trajectory(sampler, _):
    """Show the predicted x_0 on the way from noise to image, one row per image, and as an animation."""
    config = sampler.config
    steps, count = config.steps, min(8, config.num_samples)

    def frames(indices):
        seen = [sampler.x_T(indices)]
        sampler.sample(indices, steps, seen[0], on_step=lambda t, x_0: seen.append(x_0))
        return torch.stack(seen, dim=1)

    films = compute(sampler, count, frames, steps, "trajectory", to_uint8)  # [count, 1 + steps, 3, 32, 32]
    shown = np.linspace(0, steps, min(11, steps + 1)).round().astype(int)
    labels = ["x_T"] + [f"t={t}" for t in reversed(sampler.tau(steps))]
    path = config.folder / "ddim_trajectory.png"
    save_grid(films[:, shown].flatten(0, 1), path, column_labels=[labels[i] for i in shown])

    first, *others = [draw_grid(film, columns=count) for film in films.transpose(0, 1)]
    film = functools.partial(first.save, format="GIF", save_all=True, append_images=others, duration=80, loop=0)
    write_atomically(config.folder / "ddim_trajectory.gif", film)


def interpolation(sampler, _):
    """Show slerp between pairs of noises x_T (App. D.5), one row per pair."""
    config, columns = sampler.config, 11
    pairs = min(8, max(1, config.num_samples // 2))

    def between(indices):
        row, column = np.divmod(indices, columns)
        weight = torch.from_numpy(column / (columns - 1))
        x_T = slerp(sampler.x_T(2 * row), sampler.x_T(2 * row + 1), weight)
        return sampler.sample(indices, config.steps, x_T)

    images = compute(sampler, pairs * columns, between, config.steps, "interpolation")
    labels = [f"{column / (columns - 1):.1f}" for column in range(columns)]
    save_grid(images, config.folder / "ddim_interpolation.png", column_labels=labels)


def reconstruction(sampler, test_images):
    """Encode and decode test images in S steps (Sec. 5.4): a row per image, and the error of Table 2."""
    originals = to_float(test_images[: sampler.config.num_samples])

    def encode_and_decode(indices, steps):
        x_0 = originals[indices].to(sampler.config.device, memory_format=torch.channels_last)
        x_T = ddim_encode(sampler.eps, x_0, sampler.schedule, sampler.tau(steps))
        return sampler.sample(indices, steps, x_T)

    compare_steps(sampler, "reconstruction", {"original": originals}, encode_and_decode, len(originals), evaluations=2)


def consistency(sampler, _):
    """Show the same x_T at several S (Sec. 5.2), a row per image, and print how far each is from the last S."""
    count = min(256, sampler.config.num_samples)
    compare_steps(sampler, "consistency", {}, lambda i, steps: sampler.sample(i, steps).clamp(-1, 1), count)


def compare_steps(sampler, name, columns, function, count, evaluations=1):
    """Add a column of function(indices, S) for each S. Print its distance to the originals, else to the last S.

    columns: {label: images [count, 3, 32, 32]}, the originals if any. evaluations: as in `compute`, per step.
    """
    labels = {f"S={steps}": steps for steps in sampler.config.sample_steps or (10, 20, 50, 100)}
    reference = next(iter(columns), [*labels][-1])
    for label, steps in labels.items():
        draw = functools.partial(function, steps=steps)
        columns[label] = compute(sampler, count, draw, evaluations * steps, f"{name}, {label}")
    say(f"{name}: mean squared distance of {count:,} images to {reference}, per dimension on [0, 1]:")
    for label, steps in labels.items():
        say(f"    S = {steps:<5} {((columns[label] - columns[reference]) / 2).square().mean():.4g}")
    rows = torch.stack([images[:8] for images in columns.values()], dim=1).flatten(0, 1)
    save_grid(rows, sampler.config.folder / f"ddim_{name}.png", column_labels=[*columns])


########################################################################################################################
#  The method ends here. The code below makes a run fast and safe; skip it until you need to change something there.
########################################################################################################################

# ---- Speed -----------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """The Muon optimizer: orthogonalized momentum, scaled to the RMS of an Adam update (arXiv 2502.16982, Eq. 4).

    params: weights of two or more dimensions. A convolution is treated as the matrix [out, k k in]. step() overwrites
    the gradients. As in torch's fused optimizers, it leaves weights and momentum unchanged if found_inf is 1.
    precision: "bf16" computes the last product of convolutions in bf16. Linear layers would lose accuracy, because
    their gradients are worse conditioned.
    """

    _step_supports_amp_scaling = True  # tells torch that step() honors found_inf

    def __init__(self, params, lr, momentum=0.95, precision="fp32"):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.precision = precision
        self.found_inf = torch.zeros(())
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        on_cpu = group["params"][0].is_cpu
        if on_cpu and self.found_inf:
            return

        # On a CPU, take one weight at a time, which stays in its cache. On a GPU, stack weights of one shape, and
        # orthogonalize all of one shorter side together, to launch few kernels.
        by_side = {}
        for weight in group["params"]:
            shape = (len(weight), weight[0].numel())
            side, shape = (weight, weight) if on_cpu else (min(shape), weight.shape)
            by_side.setdefault(side, {}).setdefault(shape, []).append(weight)

        for by_shape in by_side.values():
            stacks = [self.directions(weights, group["momentum"]) for weights in by_shape.values()]
            is_wide = [x.shape[1] <= x.shape[2] for x in stacks]
            roots = inverse_roots([x @ x.mT if wide else x.mT @ x for x, wide in zip(stacks, is_wide)])
            for weights, x, root, wide in zip(by_shape.values(), stacks, roots, is_wide):
                root = root * (1 - self.found_inf)
                if self.precision == "bf16" and weights[0].ndim == 4:
                    root, x = root.bfloat16(), x.bfloat16()
                size = 0.2 * group["lr"] * math.sqrt(max(x.shape[1:]))  # matches the RMS of an Adam update
                x = root @ x if wide else x @ root
                views = [weight.movedim(1, -1) for weight in weights]
                torch._foreach_add_(views, list(x.view(len(views), *views[0].shape)), alpha=-size)

    def directions(self, weights, momentum):
        """Update the momentum of weights of one shape. Returns Nesterov's direction, [K, out, k k in]."""
        averages = [self.state[weight]["momentum"].movedim(1, -1) for weight in weights]
        gradients = [weight.grad.movedim(1, -1) for weight in weights]  # channels_last, so that nothing is copied
        if weights[0].is_cpu:
            stack = gradients[0][None]
        else:  # a gradient equal to the average does not change it
            stack = torch.where(self.found_inf > 0, torch.stack(averages), torch.stack(gradients))
        gradients = list(stack)
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, averages, momentum)
        return stack.flatten(2)


def inverse_roots(grams):
    """Approximate (X X^T)^(-1/2) for each X X^T, so that its product with X has all singular values near 1.

    grams: float32 [K, m, m] each, of one m. The quintic Newton-Schulz iteration of Muon, X <- F X with A = X X^T and
    F = a I + b A + c A^2, is computed as A <- F A F, P <- P F, on small matrices that commute. It needs full
    float32, because TF32 and bf16 turn small eigenvalues of A negative.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    gram = torch.cat(grams)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)[:, None, None]  # bounds the largest eigenvalue
    gram = gram / trace
    rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # F - a I
    product = rest + a * torch.eye(gram.shape[1], device=gram.device)
    for _ in range(4):  # five iterations in all
        gram = torch.baddbmm(gram, gram, rest, beta=a)
        gram = torch.baddbmm(gram, gram, rest, beta=a)
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, product, rest, beta=a)
    return (product * trace.rsqrt()).split([len(x) for x in grams])


def make_optimizers(model, name, lr, precision="fp32"):
    """Return the optimizers, all at rate lr: [Muon for weight matrices, Adam for the rest], or [Adam].

    Adam also takes the layers of the time embedding, which is as good and makes a step faster (measured).
    """
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=lr, fused=True)]
    if name != "muon":
        raise ValueError(f"optimizer {name!r} is not implemented")
    matrices, others = [], []
    for weight_name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= 32
        (matrices if is_matrix and "time_emb" not in weight_name else others).append(parameter)
    optimizers = [Muon(matrices, lr, precision=precision)] if matrices else []
    return [*optimizers, torch.optim.Adam(others, lr=lr, fused=True)]


def load_optimizers(optimizers, states):
    """Load optimizer state, but keep the hyperparameters of make_optimizers, which may have been edited."""
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.param_groups
        optimizer.load_state_dict(state)
        optimizer.param_groups = groups


class CPUGroupNorm(torch.autograd.Function):
    """Compute GroupNorm in bf16 and channels_last on a CPU, where torch takes up to seven times as long in training."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        channels, pixels = x.shape[1], x.shape[2:].numel()
        source = x.contiguous() if channels < 512 and pixels < 1024 else x  # torch is slow for these in channels_last
        y, mean, rstd = torch.native_group_norm(source, weight, bias, len(x), channels, pixels, groups, eps)
        ctx.save_for_backward(x, weight.unflatten(0, (groups, -1)), mean[:, :, None], rstd[:, :, None])
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy):
        """Return dx = rstd (w dy - mean(w dy) - z mean(w dy z)), dw and db, where z = (x - mean) rstd."""
        x, w, mean, rstd = ctx.saved_tensors  # [N, C, H, W], [32, C/32], [N, 32, 1], [N, 32, 1]
        rounded = mean.expand(-1, *w.shape).to(x.dtype)
        product = (x - rounded.flatten(1)[:, :, None, None]).mul_(dy)  # less the mean, so that sums lose no digits

        # Sums over pixels, [N, 32, C/32], and means over groups, [N, 32, 1].
        sum_dy, sum_product = [v.sum((2, 3)).float().unflatten(1, w.shape) for v in (dy, product)]
        sum_dy_z = (sum_product - (mean - rounded) * sum_dy) * rstd
        size = w.shape[1] * x.shape[2:].numel()
        mean_dy = (w * sum_dy).sum(2, keepdim=True) / size
        mean_dy_z = (w * sum_dy_z).sum(2, keepdim=True) / size

        # dx = a dy + b x + c, for each image and channel.
        b = -rstd.square() * mean_dy_z
        factors = [rstd * w, b, -rstd * mean_dy - b * mean]
        a, b, c = [factor.expand_as(sum_dy).flatten(1)[:, :, None, None].to(x.dtype) for factor in factors]
        dx = torch.addcmul(c, b, x, out=product).addcmul_(a, dy)
        return dx, sum_dy_z.sum(0).flatten(), sum_dy.sum(0).flatten(), None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups and eps 1e-6, as in DDPM."""

    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x):  # [N, C, H, W]
        if x.is_cuda and torch.compiler.is_compiling():
            return self.by_channels(x)
        if x.is_cpu and x.dtype == torch.bfloat16:
            return CPUGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)

    def by_channels(self, x):
        """Compute GroupNorm from per-channel moments, because a group is not contiguous in channels_last.

        This makes sampling 1.18 times as fast in a compiled network on a GPU (H200). Not compiled, it is slower.
        """
        x = x.to(self.weight.dtype)
        moments = x.mean((2, 3)), x.square().mean((2, 3))
        mean, mean_square = [moment.unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True) for moment in moments]
        var = (mean_square - mean.square()).clamp(min=0)
        scale = self.weight.unflatten(0, (self.num_groups, -1)) * (var + self.eps).rsqrt()  # [N, 32, C/32]
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - scale * mean
        scale, shift = [value.flatten(1)[:, :, None, None] for value in (scale, shift)]
        return x * scale + shift


def attend(q, k, v):
    """Return softmax(q k^T / sqrt(C)) v (arXiv 1706.03762, Eq. 1). q, k, v: [N, L, C]."""
    if q.is_cpu and q.dtype == torch.bfloat16:  # twice as fast as torch's kernel
        return (q * q.shape[2] ** -0.5 @ k.mT).softmax(-1, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Upsample(nn.Module):
    """Double the image size with nearest neighbours, then convolve 3x3."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):  # [N, C, H, W] -> [N, C, 2H, 2W]
        # Both together are one transposed 4x4 convolution of stride 2, with 4/9 of the arithmetic. Along each axis, its
        # kernel holds sums of neighbours in the flipped 3x3 kernel. The rows of `sums` are 001, 011, 110 and 100.
        weight = self.conv.weight
        eye = torch.eye(4, 3, dtype=weight.dtype, device=weight.device)
        sums = (eye + eye.roll(1, 0)).flip(1)
        taps = torch.einsum("ai,bj,oxij->xoab", sums, sums, weight)
        return F.conv_transpose2d(x, taps, self.conv.bias, stride=2, padding=1)


# ---- Sources of images -----------------------------------------------------------------------------------------------


def load_images(config):
    """Load the training and the held-out images of --dataset, uint8 [N, 3, 32, 32] each."""
    if config.dataset == "cifar10":
        try:
            return open_cifar10(Path(config.data_dir).resolve())
        except ConnectionError as error:
            if not config.is_quick_test:
                raise
            say(f"warning: {error}. The quick test goes on with synthetic images", sys.stderr)
            config.dataset = "synthetic"
    if config.dataset == "synthetic":
        return draw_shapes(10_000, seed=0), draw_shapes(HELD_OUT, seed=1)
    return hold_out(read_folder(Path(config.dataset)))


def to_images(pixels):
    """Convert numpy's uint8 [N, H, W, 3] to uint8 [N, 3, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def hold_out(images):
    """Split off every 10th image, at most about 256. With fewer than 10 images, return all of them as both splits."""
    every = max(10, len(images) // HELD_OUT)
    held_out = torch.arange(len(images)) % every == every - 1
    if not held_out.any():
        say("warning: too few images to hold any out, so the held-out loss is on training images", sys.stderr)
        return images, images
    return images[~held_out], images[held_out]


def open_cifar10(folder):
    """Load the md5-checked training and test images, downloading if needed. Raises ConnectionError on failure."""
    from torchvision.datasets import CIFAR10, utils  # takes a second, which other data sets need not wait for

    folder = folder.parent if folder.name == CIFAR10.base_folder else folder

    def read():
        return [to_images(CIFAR10(folder, train).data) for train in (True, False)]

    with contextlib.suppress(RuntimeError):  # torchvision's: not found or corrupted
        return read()
    final, archive = folder / CIFAR10.base_folder, folder / CIFAR10.filename
    has_images = any(path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") for path in folder.rglob("*"))
    if has_images and not final.exists() and not archive.exists():
        raise UserError(f"--data-dir {folder} holds images, not CIFAR-10: to train on them, use --dataset {folder}")

    # Download to a private folder, then rename, so that other processes see complete files only.
    socket.setdefaulttimeout(30)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as private:
            root = folder if archive.is_file() else private
            utils.download_and_extract_archive(CIFAR10.url, root, private, md5=CIFAR10.tgz_md5)
            final.mkdir(exist_ok=True)
            for file in Path(private, CIFAR10.base_folder).iterdir():
                os.replace(file, final / file.name)
        return read()
    except Exception as error:  # no network, a silent server, a truncated archive, no permission: each raises its own
        raise ConnectionError(
            f"CIFAR-10 is missing or damaged in {folder} and cannot be downloaded ({error}). Save {CIFAR10.url} "
            f"(md5 {CIFAR10.tgz_md5}) in that folder, or try --dataset synthetic"
        ) from error


def read_folder(folder):
    """Read every image below the folder, sorted by path, as uint8 [N, 3, 32, 32]. Warns of other files."""

    def fail(error):
        raise UserError(f"--dataset {folder}: {error}") from error

    def read(path):
        """Return an image as an array, or else what kind of file this is."""
        kind = path.suffix.lower()
        if kind not in Image.registered_extensions():
            return kind or "without an ending"
        try:
            return read_image(path)
        except Exception:  # Pillow's decoders raise nearly everything
            return f"unreadable {kind}"

    found = [Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names if name[0] != "."]
    with ThreadPoolExecutor() as pool:
        results = list(progress(pool.map(read, sorted(found)), total=len(found), desc="reading", unit="image"))
    images = [result for result in results if not isinstance(result, str)]
    skipped = Counter(result for result in results if isinstance(result, str))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
    if not images:
        raise UserError(f"--dataset {folder}: no readable images ({kinds or 'the folder is empty'})")
    if kinds:
        say(f"warning: skipped in {folder}: {kinds}", sys.stderr)
    return to_images(np.stack(images))


def read_image(path):
    """Read an image as uint8 [32, 32, 3]: upright, on white, in sRGB, resized and centre-cropped."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode} has no known scale to 0..255")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode in ("L", "CMYK") else image.convert("RGB")  # the modes that profiles are made for
        if profile:
            with contextlib.suppress(ImageCms.PyCMSError):  # a damaged profile
                srgb = ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
        return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS))


def draw_shapes(count, seed):
    """Draw discs of random size, place and colours, uint8 [count, 3, 32, 32]: easy to learn, easy to judge."""
    draw = rng(seed)
    x, y = draw.uniform(10, 21, (2, count, 1, 1))
    radius = draw.uniform(4, 10, (count, 1, 1))
    ground, ink = draw.uniform(0, 255, (2, count, 3, 1, 1)).astype(np.float32)
    rows, columns = np.indices((SIZE, SIZE))
    inside = radius - np.hypot(columns - x, rows - y)  # pixels from the edge
    cover = np.clip(inside + 0.5, 0, 1)[:, None].astype(np.float32)
    return torch.from_numpy((ground + cover * (ink - ground)).round().astype(np.uint8))


# ---- Pictures and the log --------------------------------------------------------------------------------------------


def draw_grid(images, columns=None, column_labels=()):
    """Draw images side by side, enlarged if they are few, as a Pillow image.

    images: [N, 3, H, W], uint8, or float in [-1, 1]. columns: ceil(sqrt(N)) by default, or the number of column_labels.
    column_labels: strings shown on top.
    """
    from torchvision.utils import make_grid  # takes a second

    images = to_uint8(images) if images.is_floating_point() else images
    columns = columns or len(column_labels) or math.ceil(math.sqrt(len(images)))
    scale = max(1, min(3, 560 // (columns * images.shape[-1])))
    images = F.interpolate(images.cpu(), scale_factor=scale)
    grid = make_grid(images, columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(np.pad(grid, ((14 if column_labels else 0, 0), (0, 0), (0, 0)), constant_values=255))
    for column, label in enumerate(column_labels):
        x = (column + 0.5) * (images.shape[-1] + 2) + 1
        ImageDraw.Draw(sheet).text((x, 8), label, "black", anchor="mm")
    return sheet


def save_grid(images, path, **layout):
    """Write a grid of images: see draw_grid. Raises ValueError if the path's ending names no image format."""
    write_atomically(Path(path), lambda file: draw_grid(images, **layout).save(file))


def save_images(images, path):
    """Write uint8 [N, 3, H, W] as .npz (arr_0, uint8 [N, H, W, 3]) or as a folder of PNGs: complete or not at all."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    if path.suffix == ".npz":
        write_atomically(path, lambda file: np.savez(file, pixels))
    elif world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as private:
            folder = Path(private, path.name)
            folder.mkdir()
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(folder / f"{i:05d}.png")
            set_aside(path)
            os.replace(folder, path)
        say(f"wrote {len(images):,} images to {path}")


class Log:
    """ddim_log.csv, with a row per step, and the progress bar. The file is open only while it is written."""

    columns = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "images_per_s", "seconds")
    layout = "\n{},{},{:.7g},{},{:.7g},{:.7g},{:.7g},{:.7g}"  # on a new line, because the last row may be incomplete

    def __init__(self, config, step, earlier=()):
        """Start after this step. earlier: the rows of the steps before, as from read_log."""
        self.config, self.path = config, config.folder / "ddim_log.csv"
        self.bar = progress(total=config.total, initial=step, unit="step")
        self.pending, self.unwritten = [], ""  # steps whose loss was not read yet; rows that could not be written yet
        self.seconds = float(earlier[-1][-1]) if earlier else 0.0
        self.losses = deque(maxlen=100)
        self.skipped = self.bad_in_a_row = 0  # steps that were not finite
        text = "\n".join(",".join(row) for row in [self.columns, *earlier])
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def timed(self, step, images):
        """Take a step, timed together with the other pending ones. `write` reads the results later."""
        if not self.pending:
            self.began = time.perf_counter()
        self.pending.append(step(images))

    def write(self, validate=None):
        """Read the results of the pending steps, which synchronizes with a GPU, and write a row for each.

        validate: callable () -> held-out loss of the last one. Raises UserError after ten bad steps in a row.
        """
        steps, losses, norms, rates = zip(*self.pending)
        losses, norms = torch.stack([*losses, *norms]).view(2, -1).tolist()
        seconds_each = (time.perf_counter() - self.began) / len(steps)
        images_per_s = self.config.batch_size / seconds_each
        val_loss = validate() if validate else None
        self.pending = []  # not before, so that `rescued` writes these rows if validation fails
        for step, loss, grad_norm, lr in zip(steps, losses, norms, rates):
            self.seconds += seconds_each
            epoch = (step - 1) // self.config.iterations + 1
            shown = f"{val_loss:.7g}" if validate and step == steps[-1] else ""
            self.unwritten += self.layout.format(step, epoch, loss, shown, lr, grad_norm, images_per_s, self.seconds)
            if not math.isfinite(loss + grad_norm):
                self.skipped += 1
                self.bad_in_a_row += 1
            elif self.bad_in_a_row < 10:
                self.losses.append(loss)
                self.bad_in_a_row = 0

        with forgiving():  # rows that cannot be written now go with the next ones
            if world.rank == 0:
                with open(self.path, "a") as file:
                    file.write(self.unwritten)
            self.unwritten = ""

        # Show.
        text = f"loss {np.mean(self.losses or [math.nan]):.4f}, {images_per_s:,.1f} images/s"
        text += f", {self.skipped} bad steps skipped" if self.skipped else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(len(steps))
        if validate:
            say(f"step {step:,} (epoch {epoch}): held-out loss {val_loss:.4f}, {text}")
        if self.bad_in_a_row >= 10:
            raise UserError("the loss or gradient of 10 steps in a row was not finite; try a lower --lr", code=1)


def read_log(folder, step):
    """Return the rows of a run's log up to this step, as lists of strings. Incomplete rows are left out."""
    path = folder / "ddim_log.csv"
    text = path.read_text(errors="replace").replace("\0", "") if path.is_file() else ""
    rows = [line.split(",") for line in text.splitlines()]
    rows = [row for row in rows if len(row) == len(Log.columns) and row[-1]]
    return [row for row in rows if row[0].isdigit() and int(row[0]) <= step]


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

FORMAT = 3


def facts(config):
    """Return the metadata stored with weights: the settings, and the constants of this file they depend on."""
    alphas = NoiseSchedule(**config.of(SCHEDULE)).alphas_cumprod
    return {"format": FORMAT, "config": asdict(config), "image_size": SIZE, "alphas_cumprod": alphas}


def save_checkpoint(path, trainer):
    """Write the training state, as tensors and plain values, which torch.load(weights_only=True) can read."""
    content = {
        **facts(trainer.config),
        "step": trainer.steps,
        "images_crc32": trainer.images_crc32,
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path, device):
    """Read and validate a checkpoint without running code from it.

    path: a checkpoint; a run's folder, which stands for its furthest intact checkpoint; or weights alone, written by
    --export-weights or published for diffusers (.safetensors, .bin, or their folder).

    Returns a dict of path, format, config, step, model, ema and optimizer; for weights alone, of path, format, config
    and ema. Raises UserError for anything else.
    """
    path = Path(path)
    files = [file for _, file in runs_in(path)] or [path]
    for file in files:
        try:
            return read_checkpoint(file, device)
        except UserError as error:
            if file == files[-1] or not isinstance(error.__cause__, zipfile.BadZipFile):  # it may be intact
                raise
            say(f"warning: {error}; trying the next one", sys.stderr)


def read_checkpoint(path, device):
    """Read and validate one file, or a folder of published weights: see load_checkpoint."""
    try:
        found = [path]
        if path.is_dir():  # of diffusers, where variants such as fp16 come before the full weights
            folder = path / "unet" if (path / "unet").is_dir() else path
            found = sorted(folder.glob("diffusion_*.bin")) + sorted(folder.glob("diffusion_*.safetensors"))
            if not found:
                raise FileNotFoundError("no weights in this folder")
            path = found[-1]
        checkpoint = read_tensors(path, device)
        for shard in found[:-1] if "-of-" in path.name else ():
            checkpoint |= read_tensors(shard, device)
        if any(name.endswith("conv_in.weight") for name in checkpoint):
            checkpoint = from_published(checkpoint, path.parent)
        if checkpoint.get("format") != FORMAT:
            raise ValueError(f"not a checkpoint of format {FORMAT}; its keys are {spell([*checkpoint][:3])} ...")
        checkpoint["ema"] = {name: value.float() for name, value in checkpoint["ema"].items()}

        # Check the settings against this program, and the weights against the settings.
        config = Config(**checkpoint["config"])
        for name, value in facts(config).items():
            if name != "config" and not np.allclose(checkpoint.get(name, value), value, rtol=1e-9, atol=0):
                raise ValueError(f"it was trained with another {name} than this program has")
        for part in ("ema", "model") if "step" in checkpoint else ("ema",):
            with torch.device("meta"):
                UNet(**config.of(UNET)).load_state_dict({**checkpoint[part]}, assign=True)  # a copy: assign alters it
    except Exception as error:  # zip, pickle, tensor readers and networks raise errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"checkpoint {path} cannot be used ({reason})") from error
    return {**checkpoint, "path": path.resolve()}


def read_tensors(path, device):
    """Read a file of torch.save or safetensors. Raises BadZipFile if it is truncated or a checksum is wrong."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device=str(device))
    with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
    return torch.load(path, map_location=device, weights_only=True)


def load_model(path, device="cpu"):
    """Load a model for ddim_sample, with EMA weights and in eval mode.

    path: as for load_checkpoint. Returns (model, schedule), where model(x, t) -> eps.
    """
    checkpoint = load_checkpoint(path, device)
    config = Config(**checkpoint["config"])
    network = UNet(**config.of(UNET)).to(device).eval()
    network.load_state_dict(checkpoint["ema"])
    schedule = NoiseSchedule(**config.of(SCHEDULE))
    return NoisePredictor(network, schedule, config.predict), schedule


def runs_in(folder):
    """Return (steps, path) of the checkpoints in a folder, furthest first. Unreadable ones count as furthest."""
    runs = []
    for path in folder.glob("ddim_model_*.pth"):
        steps = math.inf  # load_checkpoint says what is wrong
        with contextlib.suppress(Exception):
            steps = int(torch.load(path, map_location="meta", mmap=True, weights_only=True).get("step", 0))
        runs.append((steps, path))
    return sorted(runs, reverse=True)


def make_room(folder, step, own):
    """Move another run's files into earlier-1, earlier-2, ..., so that only a quick test is overwritten.

    step, own: the step at which this run starts, and the checkpoint it resumes or None. That run's files stay.
    """
    furthest = max((steps for steps, _ in runs_in(folder)), default=0)  # 1 after a quick test
    goes_on = own and own.parent == folder and step >= furthest
    os.listdir(folder)  # raises an error where glob would find nothing, in a folder that cannot be listed
    patterns = ("ddim_model_*.pth", "ddim_log.csv", "ddim_samples*.png")
    files = [path for pattern in patterns for path in folder.glob(pattern) if path != own]
    if files and not goes_on and (furthest != 1 or read_log(folder, math.inf)[1:]):
        target = unused(folder / "earlier")
        target.mkdir()
        for path in files:
            os.replace(path, target / path.name)
        say(f"moved {len(files)} files of an earlier run to {target}")


def set_aside(path):
    """Rename what is at this path, if anything, to NAME-earlier-1, NAME-earlier-2, ..."""
    if world.rank == 0 and path.exists():
        target = unused(path.with_stem(f"{path.stem}-earlier"))
        os.replace(path, target)
        say(f"moved the earlier {path.name} to {target}")


def unused(path):
    """Return path-1, path-2, ...: the first that does not exist."""
    names = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def write_atomically(path, write):
    """Call write(file), on rank 0. The file appears complete and on disk, or not at all."""
    if world.rank > 0:
        return
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # Pillow takes the format from the ending
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the error of a full disk
        raise UserError(f"cannot write {path}: {error if isinstance(error, OSError) else error.__context__}") from error
    finally:
        temporary.unlink(missing_ok=True)
    say(f"wrote {path}")


# ---- Weights from and for diffusers ----------------------------------------------------------------------------------

PREDICTION_TYPES = {"v": "v_prediction", "eps": "epsilon"}  # diffusers' names
BETA_SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DPMSolver", "Euler", "UniPC", "DEIS", "LMS")  # not EDM or flow matching

# diffusers' defaults for keys that decide what a network computes, and that a file may lack.
DEFAULTS = json.loads("""{
"config.json": {"in_channels": 3, "out_channels": 3, "center_input_sample": false, "time_embedding_type": "positional",
"time_embedding_dim": null, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "layers_per_block": 2,
"downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu", "norm_num_groups": 32, "attention_head_dim": 8,
"attn_norm_num_groups": null, "resnet_time_scale_shift": "default", "add_attention": true, "class_embed_type": null},
"scheduler_config.json": {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": null,
"beta_schedule": "linear", "prediction_type": "epsilon", "rescale_betas_zero_snr": false}}""")


def diffusers_configs(config):
    """Return what diffusers has to know about network and schedule, beside DEFAULTS: {file: {key: value}}."""
    attends = [SIZE >> level in config.attn_resolutions for level in range(len(config.channel_mults))]
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": SIZE,
        "attention_head_dim": None,
        "layers_per_block": config.res_blocks,
        "block_out_channels": [config.channels * mult for mult in config.channel_mults],
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "dropout": config.dropout,
    }
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": PREDICTION_TYPES.get(config.predict)}

    # Any schedule other than diffusers' default is described by its betas.
    alphas = NoiseSchedule(**config.of(SCHEDULE)).alphas_cumprod
    linear = torch.linspace(1e-4, 0.02, 1000).double()
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    scheduler |= {"num_train_timesteps": len(betas), "clip_sample": False}
    if len(betas) != 1000 or not torch.allclose(betas, linear, rtol=1e-4):
        scheduler["trained_betas"] = betas.tolist()
    return {"config.json": unet, "scheduler_config.json": scheduler}


def from_published(weights, folder):
    """Convert a diffusers state dict (old or new key names) from this folder to a checkpoint, without a step.

    Raises ValueError if config.json or scheduler_config.json, where present, describe what this program does not
    implement. Without scheduler_config.json, it assumes DDPM's.
    """
    renamed = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed |= {"module.": "", "_orig_mod.": ""}
    for old, new in renamed.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}

    places = [folder.absolute().parent / "scheduler", folder / "scheduler", folder]
    found = {path.name: json.loads(path.read_text()) for place in places for path in place.glob("*config.json")}
    for file in DEFAULTS.keys() - found.keys():
        say(f"note: no {file} beside the weights: assuming DDPM's")
    scheduler = found.setdefault("scheduler_config.json", {})
    if not scheduler.get("_class_name", "DDPM").startswith(BETA_SCHEDULERS):
        raise ValueError(f"its scheduler is {scheduler['_class_name']}, which has no betas")
    settings = {"predict": "v" if scheduler.get("prediction_type") == "v_prediction" else "eps"}
    if unet := found.get("config.json"):
        widths, kinds = unet["block_out_channels"], unet["down_block_types"]
        settings["channels"] = widths[0]
        settings["channel_mults"] = tuple(width // widths[0] for width in widths)
        settings["attn_resolutions"] = tuple(SIZE >> i for i, kind in enumerate(kinds) if kind == "AttnDownBlock2D")
        settings["res_blocks"] = unet.get("layers_per_block", 2)

    # Compare every key with what this program would write there.
    ours = diffusers_configs(Config(**settings))
    for file in sorted(DEFAULTS.keys() & found.keys()):
        for key in sorted({*DEFAULTS[file], *ours[file]} - {"_class_name", "dropout", "clip_sample"}):
            value = {**DEFAULTS[file], **found[file]}.get(key)
            expected = {**DEFAULTS[file], **ours[file]}.get(key)
            if value != expected:
                raise ValueError(f"its {file} has {key} = {value}, but this program computes {expected}")
    return {"format": FORMAT, "config": settings, "ema": weights}


def export_weights(path, model, config):
    """Write weights alone: x.pth in bf16, for --sample, --resume and load_model, or a folder for diffusers."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    set_aside(path if path.suffix == ".pth" else path / "unet")
    if path.suffix == ".pth":
        content = {**facts(config), "ema": {name: value.bfloat16() for name, value in weights.items()}}
        for name in Config.names(FILES):  # the paths of this machine
            del content["config"][name]
        write_atomically(path, lambda file: torch.save(content, file))
    else:
        from safetensors.torch import save

        unet, scheduler = diffusers_configs(config).values()
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
        index = {"_class_name": "DDIMPipeline", **parts}
        files = {"model_index.json": index, "unet/config.json": unet, "scheduler/scheduler_config.json": scheduler}
        files = {name: json.dumps(content, indent=2).encode() for name, content in files.items()}
        files["unet/diffusion_pytorch_model.safetensors"] = save(weights, {"format": "pt"})
        for name, data in files.items():
            write_atomically(path / name, lambda file, data=data: file.write(data))


# ---- Processes -------------------------------------------------------------------------------------------------------

# This process among those of torchrun. Variables of other launchers, or an incomplete set of them, are ignored.
launched = os.environ if dist.is_torchelastic_launched() else {}
world = SimpleNamespace(
    rank=int(launched.get("RANK", 0)),
    size=int(launched.get("WORLD_SIZE", 1)),
    local_rank=int(launched.get("LOCAL_RANK", 0)),
)


def share(count):
    """Return this process's slice of `count` items."""
    return slice(world.rank * count // world.size, (world.rank + 1) * count // world.size)


def gather(item):
    """Return the items of all processes, by rank."""
    items = [item] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
    return items


def compute(sampler, count, function, evaluations, desc, convert=None):
    """Return the rows of function(indices) for indices 0..count-1, computed in chunks, by all processes.

    evaluations: of the network per index, for the progress bar. convert: applied to each chunk, to save memory.
    Raises UserError unless all rows are finite.
    """
    results = []
    with progress(total=count * evaluations, desc=desc, unit="evaluation") as sampler.bar:
        for chunk in torch.arange(count).split(sampler.chunk_size * world.size):
            mine = chunk[share(len(chunk))].tolist()
            padding = mine[-1:] * (sampler.chunk_size - len(mine)) if sampler.is_compiled else []  # for one shape
            rows = function(mine + padding)[: len(mine)].cpu() if mine else None
            rows = torch.cat([part for part in gather(rows) if part is not None])
            if bad := int((~rows.flatten(1).isfinite().all(1)).sum()):
                raise UserError(f"{bad} of {len(chunk)} images are not finite", code=1)
            results.append(convert(rows) if convert else rows)
            sampler.bar.total = sampler.bar.n * count // (int(chunk[-1]) + 1)  # some samplers take more evaluations
    return torch.cat(results)


class UserError(Exception):
    """An error that main reports in one line before it exits with `code`."""

    def __init__(self, text, code=2):
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def forgiving():
    """Turn an error in this block into a warning, said once, because training is worth more than one file."""
    try:
        yield
    except Exception as error:
        if world.size > 1 and not isinstance(error, UserError | OSError):
            raise  # the other processes may wait for this one
        say_once(f"warning: {type(error).__name__}: {error}", sys.stderr)


@contextlib.contextmanager
def rescued(trainer, log):
    """Note signals as {signal: time}, which is yielded. A Ctrl-C over a second after the first exits at once.

    On an error or SystemExit in this block, save the last complete step and the log, and print the resume command.
    """
    first, config = trainer.steps, trainer.config
    noted, before = {}, {}

    def note(signum, frame):
        noted.setdefault(signum, time.monotonic())
        if signum == signal.SIGINT and time.monotonic() > min(noted.values()) + 1:
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"):  # batch systems send the last two
        signum = getattr(signal, name, None)  # Windows has only the first two
        if signum and signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                before[signum] = signal.signal(signum, note)
    try:
        yield noted
    except (Exception, SystemExit):
        with forgiving():
            if trainer.is_whole and trainer.steps > first:
                save_checkpoint(config.folder / "ddim_model_last.pth", trainer)
            if log.pending:
                log.write()
        if trainer.steps > 0 and runs_in(config.folder):
            words = [sys.argv[0], *config.argv, "--resume", str(config.folder)]  # of two --resume, the last counts
            say(f"to go on: {'torchrun ...' if world.size > 1 else 'python'} {shlex.join(words)}", sys.stderr)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def lock(folder):
    """Lock a folder until the returned file is closed, if the system can. Raises UserError if it is locked."""
    file = open(folder / ".ddim_lock", "a")  # noqa: SIM115 (stays open)
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--out-dir {folder}: another process is training there; use another folder") from error
    except (ImportError, OSError):
        say(f"warning: {folder} cannot be locked; do not start a second training there", sys.stderr)
    return file


class Unbroken(io.FileIO):
    """An output stream that switches to os.devnull once its reader is gone, as with a closed pipe or terminal."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def say(text, file=None):
    """Print a line above the progress bar, from rank 0."""
    if world.rank == 0:
        (tqdm.write if sys.stderr.isatty() else print)(text, file=file)


say_once = functools.cache(say)


def progress(items=None, **options):
    """Return a progress bar of tqdm. If stderr is not a terminal, it prints a line per minute instead."""
    if not sys.stderr.isatty():
        layout = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]\n"
        options |= {"delay": 60, "mininterval": 60, "miniters": 1, "bar_format": layout}
    return tqdm(items, disable=world.rank > 0, dynamic_ncols=True, **options)


def spell(value):
    """Format the value of a setting as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def compiled(network, config, evaluations):
    """Return the network, compiled with --compile on, or with auto if so many evaluations repay the compile time."""
    pays = config.device.startswith("cuda") and evaluations >= 4000 and importlib.util.find_spec("triton")
    if not evaluations or config.compile == "off" or (config.compile == "auto" and not pays):
        return network
    say("compiling the network, which may take a minute or two")
    return torch.compile(network)


def start(config):
    """Set up this process: device, precision and, under torchrun, the process group. Replaces "auto" in the config."""
    asked = config.device
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda", world.local_rank) if asked == "cuda" else torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OSError(f"--device {asked}: not available ({error})") from error
    config.device = str(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")  # Muon does not tolerate TF32
    if world.size > 1:
        timeout = timedelta(hours=2)  # the others wait while rank 0 downloads CIFAR-10
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)

    # bf16 is faster only with hardware support. The choice is stored in checkpoints, so a resumed run keeps it.
    if config.precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        is_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        config.precision = "bf16" if is_ampere or cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "fp32"


# ---- Command line ----------------------------------------------------------------------------------------------------


def make_parser():
    """Return a parser with a flag for each field of Config. Its result omits flags that were not given."""
    parser = argparse.ArgumentParser(
        prog="ddim_cifar.py",
        usage="%(prog)s [--epochs N] [--iterations N] [flags], or --sample CKPT [flags]; see --help",
        description="Train a UNet on CIFAR-10 and sample it with DDIM. Without flags: a quick test of one step.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)  # torch.distributed.launch sets LOCAL_RANK as well
    group = functools.cache(parser.add_argument_group)
    for setting in fields(Config):
        options = {name: value for name, value in setting.metadata.items() if name not in ("group", "least", "most")}
        if setting.type is bool:
            options["action"] = "store_true"
        else:
            options.setdefault("type", {tuple: int, str: os.path.expanduser}.get(setting.type, setting.type))
            if "choices" not in options:
                options.setdefault("metavar", "PATH" if setting.type is str else "N")
            if setting.default not in (None, ()):
                options["help"] += f" [{spell(setting.default)}]"
        group(setting.metadata["group"]).add_argument(spell_flag(setting.name), **options)
    return parser


def spell_flag(name):
    """Return the flag of a setting: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def parse_args(argv):
    """Return the Config of a command line, completed from the checkpoint it names, and that checkpoint or {}."""
    typed = vars(make_parser().parse_args(argv))
    typed.pop("local_rank", None)
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    for name in [name for name, value in typed.items() if value == ""]:
        raise UserError(f"{spell_flag(name)}: must not be empty, as from an unset shell variable")
    training_only = sorted(typed.keys() & {*Config.names(LENGTH, RUN), "resume"} - {"dataset"})
    if "sample" in typed and training_only:
        raise UserError(f"--sample does not train, so it cannot be combined with {spell_flag(training_only[0])}")

    # Load the checkpoint, and take the settings that follow from it.
    path, checkpoint = typed.get("sample", typed.get("resume")), {}
    if typed.get("resume") == "auto":
        path = Path(typed.get("out_dir", "."))
        if all(steps <= 1 for steps, _ in runs_in(path)):  # nothing, or a quick test
            say(f"nothing to resume in {path.resolve()}: starting a new run")
            path = None
    given = PAPER if typed.get("recipe") == "paper" else {}
    if path is not None:
        checkpoint = load_checkpoint(path, "cpu")
        given = {**given, **inherit(checkpoint, typed)}
    config = Config(**{**given, **typed})
    config.argv = argv
    check(config)
    if config.batch_size % world.size and not config.sample:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {world.size} processes")
    return config, checkpoint


def inherit(checkpoint, typed):
    """Return the settings that come from the checkpoint. Raises UserError if a typed flag contradicts a fixed one."""
    saved = {**asdict(Config()), **checkpoint["config"]}  # an older checkpoint may lack settings
    saved["out_dir"] = str(checkpoint["path"].parent) if "step" in checkpoint else None
    fixed = {*Config.names(UNET, SCHEDULE, OUTPUT)}
    taken = {*fixed, "out_dir"}
    if "sample" in typed or "step" in checkpoint:
        taken |= {*Config.names(LENGTH, RUN), "data_dir"}  # in sampling, to reconstruct test images and export weights
    if "resume" in typed and "step" in checkpoint:
        fixed |= {*Config.names(RUN), "seed"}
        taken |= {*Config.names(SAMPLING, SAMPLER, RUNTIME)} - {"device", "no_ema", "experiments"}
    if {"cifar10", "synthetic"}.isdisjoint([saved["dataset"], typed.get("dataset")]):
        fixed -= {"dataset"}  # a folder may have moved; images_crc32 is compared
    for name in sorted(fixed & typed.keys()):
        if typed[name] != saved[name]:
            trained = f"{checkpoint['path']}, which was trained with {spell(saved[name])}"
            raise UserError(f"{spell_flag(name)} {spell(typed[name])} conflicts with {trained}")
    return {name: saved[name] for name in taken}


def check(config):
    """Raise UserError if a setting is impossible, alone or in combination."""
    for setting in fields(Config):
        value, limits = getattr(config, setting.name), setting.metadata
        least = limits.get("least")
        most = limits.get("most", sys.float_info.max)
        for item in value if isinstance(value, tuple) else [value]:
            if least is not None and item is not None and not least <= item <= most:  # excludes NaN and inf
                allowed = f"in {least}..{most}" if "most" in limits else f"at least {least}"
                raise UserError(f"{spell_flag(setting.name)} {item}: must be {allowed}")
    try:
        with torch.device("meta"):
            UNet(**config.of(UNET))
    except ValueError as error:  # begins with the name of the argument
        raise UserError(spell_flag(str(error))) from error

    # Sampling and experiments.
    timesteps = NoiseSchedule(**config.of(SCHEDULE)).timesteps
    steps = max((config.steps, *config.sample_steps))
    if steps > timesteps:
        raise UserError(f"--sample-steps {steps}: must be at most {timesteps}")
    if config.eta > 0 and config.order == 2:
        raise UserError(f"--order 2: needs --eta 0, not {config.eta}")
    if "reconstruction" in config.experiments and config.of(SAMPLER) != Config().of(SAMPLER):
        raise UserError("--experiments reconstruction: needs the default sampler (--eta 0 --order 1), which it inverts")

    # Files.
    for name, path, ending in (("", config.export, ".npz"), ("-weights", config.export_weights, ".pth")):
        if path and Path(path).suffix not in ("", ending):
            raise UserError(f"--export{name} {path}: must be NAME{ending} or a folder, whose name has no dot")
    for place in (config.folder, Path.cwd()) if config.export else ():
        if place.is_relative_to(Path(config.export).resolve()):  # an export is set aside by the next
            raise UserError(f"--export {config.export}: must be a folder of its own")
    is_known = config.channel_mults[0] == 1 and config.predict in PREDICTION_TYPES and len(Config.names(UNET)) == 4
    if config.export_weights and Path(config.export_weights).suffix != ".pth":
        if not is_known:
            raise UserError("--export-weights: diffusers has no such network or prediction; write NAME.pth instead")
        if not importlib.util.find_spec("safetensors"):
            raise UserError("--export-weights FOLDER: needs `pip install safetensors`")


def execute(config, checkpoint):
    """Train unless --sample was given, then write samples, experiments and exports."""
    torch.manual_seed(torch_seed(config.seed, WEIGHTS))
    model = UNet(**config.of(UNET), dropout=config.dropout)
    schedule = NoiseSchedule(**config.of(SCHEDULE))
    if checkpoint:
        raw = checkpoint.get("model", checkpoint["ema"])  # weights alone are EMA weights
        model.load_state_dict(checkpoint["ema"] if config.sample and not config.no_ema else raw)
    model.to(config.device, memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"device    {config.device}, {config.precision}, processes: {world.size}")
    say(f"network   {size:,} parameters" + (f", from {checkpoint['path']}" if checkpoint else ""))

    test_images = None
    if not config.sample:
        model, test_images = execute_training(config, checkpoint, model, schedule)
    elif "reconstruction" in config.experiments:
        _, test_images = load_images(config)

    # Draw.
    count = config.num_samples if config.export else min(256, config.num_samples)
    sampler = Sampler(model, schedule, config, evaluations=math.ceil(count * config.steps / 256))
    save_samples(sampler, config.folder / "ddim_samples.png", count, config.export)
    for name in config.experiments:
        globals()[name](sampler, test_images)
    if config.export_weights:
        export_weights(Path(config.export_weights).resolve(), model, config)

    # Suggest what to do next.
    if not (config.experiments or config.export or config.export_weights):
        words = [sys.argv[0], "--sample", config.sample or str(config.folder), "--seed", str(config.seed)]
        say(f"next: python {shlex.join(words)} --experiments trajectory interpolation")


def execute_training(config, checkpoint, model, schedule):
    """Train. Returns the network to sample with, and the held-out images."""
    config.folder.mkdir(parents=True, exist_ok=True)
    held = lock(config.folder) if world.rank == 0 else None  # noqa: F841 (held until training ends)
    if world.local_rank > 0:
        gather(None)  # waits for the first process of the machine, which may download
    images, held_out = load_images(config)
    if world.local_rank == 0:
        gather(None)
    trainer = Trainer(model, schedule, config, zlib.crc32(images.numpy()))
    own, rows = None, []
    if "step" in checkpoint:
        own = checkpoint["path"]
        trainer.steps = checkpoint["step"]  # `execute` has loaded the weights
        trainer.ema.load_state_dict(checkpoint["ema"])
        try:
            load_optimizers(trainer.optimizers, checkpoint["optimizer"])
        except Exception as error:  # torch raises errors of many kinds
            raise UserError(f"checkpoint {own} cannot be resumed ({type(error).__name__}: {error})") from error
        if checkpoint.get("images_crc32") != trainer.images_crc32:
            say("warning: the training images differ from those the checkpoint was trained on", sys.stderr)
        rows = read_log(own.parent, trainer.steps)
    checkpoint.clear()  # frees half a gigabyte
    if len({*gather(trainer.steps)}) > 1:
        raise UserError("the processes found different checkpoints; they must all see the same files")
    if world.rank == 0:
        make_room(config.folder, trainer.steps, own)
        for leftover in config.folder.glob(".[0-9]*-ddim_*"):  # of a run that was killed while it saved
            leftover.unlink(missing_ok=True)

    say(f"images    {config.dataset}: {len(images):,} for training, {min(HELD_OUT, len(held_out)):,} held out")
    left = max(0, config.total - trainer.steps)
    say(f"steps     {trainer.steps:,} done, {left:,} to go, {config.batch_size} images each")
    say(f"output    {config.folder}")
    train(trainer, images, held_out, Log(config, trainer.steps, rows))
    return (model if config.no_ema else trainer.ema), held_out


def main(argv=None):
    """Run the command line. Returns 0; 1 for non-finite values or a lost process; 2 for other errors; 128 + signal."""
    try:
        config, checkpoint = parse_args(sys.argv[1:] if argv is None else argv)
        start(config)
        execute(config, checkpoint)
        if world.size > 1:  # not after an error, because NCCL waits for all processes here
            dist.destroy_process_group()
        return 0
    except SystemExit as finished:  # from argparse, or from `train` after a signal
        return finished.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        text = str(error)
        code = getattr(error, "code", 2)
        if isinstance(error, UserError):  # all processes meet it, so one of each machine reports it
            if world.local_rank > 0:
                return code
        elif isinstance(error, MemoryError) or "out of memory" in text:
            text = "out of memory; a smaller --micro-batch gives the same result with less memory"
        elif isinstance(error, dist.DistBackendError) or (world.size > 1 and "gloo" in text):
            code = 1
            text = f"another process was lost: {text}"
        elif not isinstance(error, OSError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {text}"
        print(f"ddim_cifar.py: error: {' '.join(text.split())}", file=sys.stderr)
        return code


if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None if it was closed, as by >&-
        stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        buffer = io.BufferedWriter(Unbroken(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors="replace", line_buffering=True))
    sys.exit(main())
