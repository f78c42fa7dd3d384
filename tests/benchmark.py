"""Time the program beside diffusers' UNet2DModel with the same weights. Needs tests/requirements.txt.

    python tests/benchmark.py                                  training, sampling and memory, in fp32 and bf16
    python tests/benchmark.py --precision bf16 --compile       bf16 only, with compiled networks

"diffusers, tuned" uses channels_last memory, fused Adam, foreach EMA, inference mode, and bf16 by autocast in training
and by bf16 weights in sampling. "diffusers, defaults" uses fp32, contiguous memory, Adam's defaults, EMA in a Python
loop and no_grad, and is never compiled.

Variants take turns, so that a slow minute affects all of them. A rate is the median over the rounds; a ratio is the
median of the ratios of each round, with their range. Peak memory is that of CUDA tensors, or else of the process.
"""

import argparse
import contextlib
import io
import platform
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddim_cifar as ddim

SHAPE = (3, ddim.SIZE, ddim.SIZE)
DEFAULTS = "diffusers, defaults (fp32)"


def our_network(config):
    """Return the program's UNet. Zero weights are made random, because zeros are less work for a GPU."""
    torch.manual_seed(0)
    network = ddim.UNet(**config.of(ddim.UNET))
    for weight in network.state_dict().values():
        if not weight.any():
            weight.normal_(std=0.02)
    return network.to(config.device, memory_format=torch.channels_last)


def diffusers_twin(config, layout):
    """Return diffusers' network with the same weights, and its scheduler, built from the program's export."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ddim.export_weights(Path(folder), torch.nn.Module(), config)
        network = UNet2DModel.from_config(UNet2DModel.load_config(Path(folder, "unet")))
        scheduler = DDIMScheduler.from_pretrained(Path(folder, "scheduler"))
    network.load_state_dict(our_network(config).state_dict())
    return network.to(config.device, memory_format=layout), scheduler


def random_batch(config):
    """Return a batch of uint8 images, in pinned memory for a GPU."""
    images = torch.randint(256, (config.batch_size, *SHAPE), dtype=torch.uint8)
    return images.pin_memory() if config.device.startswith("cuda") else images


def our_training(config, optimizer):
    """Return a function that takes one training step of the program."""
    images = random_batch(config)
    config = replace(config, optimizer=optimizer, lr=None, micro_batch=None)
    schedule = ddim.NoiseSchedule(**config.of(ddim.SCHEDULE))
    trainer = ddim.Trainer(our_network(config), schedule, config)
    return lambda: trainer.step(images)


def diffusers_training(config, tuned):
    """Return a function that takes one training step with diffusers."""
    images = random_batch(config)
    layout = torch.channels_last if tuned else torch.contiguous_format
    network, scheduler = diffusers_twin(config, layout)
    parameters = list(network.train().parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=tuned or None)
    called = ddim.compiled(network, config, 1) if tuned else network
    autocast = config.autocast if tuned else contextlib.nullcontext

    def step():
        x_0 = ddim.to_float(images.to(config.device, non_blocking=True))
        eps = torch.randn_like(x_0)
        t = torch.randint(len(scheduler.betas), (len(x_0),), device=config.device)
        x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=layout)
        with autocast():
            predicted = called(x_t, t).sample
        optimizer.zero_grad()
        F.mse_loss(predicted.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            if tuned:
                torch._foreach_lerp_(averages, parameters, 1 - config.ema_decay)
            else:
                for average, parameter in zip(averages, parameters):
                    average.mul_(config.ema_decay).add_(parameter, alpha=1 - config.ema_decay)

    return step


def our_sampling(config):
    """Return a function that samples with the program, in config.steps steps."""
    schedule = ddim.NoiseSchedule(**config.of(ddim.SCHEDULE))
    sampler = ddim.Sampler(our_network(config), schedule, config, evaluations=1)
    return lambda: sampler.sample(range(config.micro_batch), config.steps)


def diffusers_sampling(config, tuned):
    """Return a function that samples with diffusers, in config.steps steps."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    network, scheduler = diffusers_twin(config, layout)
    if tuned and config.precision == "bf16":
        network.bfloat16()
    called = ddim.compiled(network.eval(), config, 1) if tuned else network.eval()
    scheduler.set_timesteps(config.steps)
    n = config.micro_batch

    def sample():
        x = torch.randn(n, *SHAPE, device=config.device).contiguous(memory_format=layout)
        with torch.inference_mode() if tuned else torch.no_grad():
            for t in scheduler.timesteps:
                t_in = torch.full((n,), int(t), device=config.device) if tuned else t  # t itself synchronizes
                x = scheduler.step(called(x.to(network.dtype), t_in).sample, t, x).prev_sample

    return sample


VARIANTS = {
    "training": {
        "ours, muon": partial(our_training, optimizer="muon"),
        "ours, adam": partial(our_training, optimizer="adam"),
        "diffusers, tuned": partial(diffusers_training, tuned=True),
        DEFAULTS: partial(diffusers_training, tuned=False),
    },
    "sampling": {
        "ours": our_sampling,
        "diffusers, tuned": partial(diffusers_sampling, tuned=True),
        DEFAULTS: partial(diffusers_sampling, tuned=False),
    },
}


def in_new_process(function, *args):
    """Call a function in a new process, where memory use is small and nothing is compiled yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def seconds_per_call(name, function, device):
    """Time one call of a variant, or the mean of 10 calls on a GPU."""
    torch.backends.cudnn.benchmark = name != DEFAULTS  # the search for the fastest convolutions
    synchronize = getattr(torch, device.type).synchronize
    calls = 1 if device.type == "cpu" else 10
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - began) / calls


def time_in_turn(kind, config, rounds):
    """Return the seconds per call of every variant, one value per round: {name: [seconds, ...]}."""
    ddim.start(config)
    functions = {name: build(config) for name, build in VARIANTS[kind].items()}
    seconds = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            seconds[name].append(seconds_per_call(name, function, torch.device(config.device)))
    return {name: own[1:] for name, own in seconds.items()}  # the first round warms up


def peak_memory(name, config):
    """Return the peak memory of a training step in gigabytes."""
    ddim.start(config)
    cuda = config.device.startswith("cuda")
    step = VARIANTS["training"][name](config)
    for _ in range(2):  # the first leaves Adam's moments, the second has them from its start
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds_per_call(name, step, torch.device(config.device))
    if cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def print_table(title, columns, seconds):
    """Print a row per variant. columns: {heading: {name: value}}; on the right, the speed of ours over each peer."""
    ours = [name for name in seconds if name.startswith("ours")]
    headings = [f"{heading:>17}" for heading in columns] + [f"{name + ' / this':>22}" for name in ours]
    print(f"\n{title:<30}" + "".join(headings))
    for name in seconds:
        line = f"{name:<30}" + "".join(f"{values[name]:17.2f}" for values in columns.values())
        for our in ours if name not in ours else []:
            ratios = [a / b for a, b in zip(seconds[name], seconds[our])]
            line += f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})".rjust(22)
        print(line, flush=True)


def measure(config, rounds):
    """Measure and print training and sampling in one precision."""
    seconds = in_new_process(time_in_turn, "training", config, rounds)
    images = {name: config.batch_size / median(own) for name, own in seconds.items()}
    memory = {name: in_new_process(peak_memory, name, config) for name in seconds}
    title = f"training, {config.precision}, batch {config.batch_size}"
    print_table(title, {"images/s": images, "peak memory, GB": memory}, seconds)

    seconds = in_new_process(time_in_turn, "sampling", config, rounds)
    rates = {name: config.steps / median(own) for name, own in seconds.items()}
    images = {name: config.micro_batch * rate / 50 for name, rate in rates.items()}
    title = f"sampling, {config.precision}, batch {config.micro_batch}"
    print_table(title, {"evaluations/s": rates, "images/s, S=50": images}, seconds)


def print_header(options, device):
    """Print what is measured, and with what."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    print(f"processor  {processor}, {device.type}, {torch.get_num_threads()} threads")
    print(f"versions   torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"precision  {', '.join(options.precision)}{', compiled' if options.compile else ''}")
    print(f"network    {options.channels} channels; {options.rounds} rounds", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="width of the network [128]")
    parser.add_argument("--batch-size", type=int, help="images per training step [128 on cuda, else 32]")
    parser.add_argument("--sample-batch-size", type=int, default=16, help="images per evaluation in sampling [16]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant, beside one to warm up [3]")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile ours and diffusers, tuned")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    options = parser.parse_args()

    ddim.start(found := ddim.Config(device=options.device))
    device = torch.device(found.device)
    config = ddim.Config(
        channels=options.channels,
        batch_size=options.batch_size or (128 if device.type == "cuda" else 32),
        micro_batch=options.sample_batch_size,
        sample_steps=(5,) if device.type == "cpu" else (50,),
        compile="on" if options.compile else "off",
        device=device.type,
    )
    print_header(options, device)
    for precision in options.precision:
        measure(replace(config, precision=precision), options.rounds)


if __name__ == "__main__":
    main()
