"""Measure the program beside diffusers' UNet2DModel of the same weights, and beside what the hardware can do at most.

    python tests/benchmark.py                                   everything; about five minutes on two CPU cores
    python tests/benchmark.py --only ab --batch-sizes 32 128    training and sampling alone, at two batch sizes
    python tests/benchmark.py --long --compile --losses 20      more rounds, compiled networks, and how well precisions agree

a  training step: noise, forward, backward, clipping, Adam and the averaged weights, from images in main memory
b  sampling in 50 steps; where fewer were timed, scaled up to 50, and the table says so
c  data feed alone: 50,000 images as float batches in [-1, 1]
d  start of the process to the end of the first training step, and to the first picture
e  peak memory, in a process per variant: of the process on a CPU, of the tensors on a GPU
f  ceilings: matrix product, convolution and copy, and the share of the former two that the network reaches
g  saving a checkpoint

diffusers runs tuned in either memory layout (fused Adam, foreach averaging, inference mode; bf16 is autocast in training and bf16
weights in sampling), and "as usual", at the defaults of a first script. On a GPU, fp32 means TF32, with cuDNN's search for the
best convolution; "as usual" has PyTorch's defaults: TF32 in convolutions alone, no search. Variants take turns, so that a slow
minute hits all of them; speed-ups are the median of each round's ratio, with their range. "cores" is what the process got of the
CPU meanwhile: figures of a CPU where other work took its share mean little. Needs diffusers. The last line is JSON.
"""

import argparse
import contextlib
import copy
import functools
import gc
import io
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize, to_tensor

SCRIPT = Path(__file__).resolve().parents[1] / "ddim_cifar.py"
sys.path.insert(0, str(SCRIPT.parent))
import ddim_cifar as ddim  # noqa: E402

PARTS, STEPS, SHAPE = "abcdefg", 50, (3, ddim.SIZE, ddim.SIZE)
NHWC, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Variant:
    network: str  # "ours" or "diffusers"
    precision: str  # "bf16"; "fp32", TF32 where a GPU has it; "ieee", never TF32
    compile: bool = False
    layout: torch.memory_format = NHWC
    tuned: bool = True

    def __str__(self):
        peer = f"diffusers tuned {'NHWC' if self.layout == NHWC else 'NCHW'}" if self.tuned else "diffusers as usual"
        return f"{'ours' if self.network == 'ours' else peer} {self.precision}{' compiled' * self.compile}"

    def use(self):
        torch.set_float32_matmul_precision("high" if self.tuned and self.precision != "ieee" else "highest")
        torch.backends.cudnn.allow_tf32 = self.precision != "ieee"
        torch.backends.cudnn.benchmark = self.tuned


class Bench:
    def __init__(self, options):
        self.options, self.results = options, {}
        self.args = ddim.parse_args(["--channels", str(options.channels), "--device", options.device, "--warmup", "1"])[0]
        self.device = ddim.start_processes(self.args.device)
        self.schedule = ddim.NoiseSchedule(self.args.timesteps, self.args.beta_start, self.args.beta_end)
        self.gpu = self.device.type == "cuda"
        self.long = self.gpu if options.long is None else options.long
        self.rounds, self.repeats = 7 if self.long else 3, 10 if self.gpu else 1  # repeats: of what takes milliseconds there
        self.steps = STEPS if self.gpu else 10 if self.long else 2
        self.batch_sizes = options.batch_sizes or [128 if self.gpu else 32]
        self.sample_batch_size = options.sample_batch_size or (256 if self.gpu else 64 if self.long else 16)

        self.precision, compiled = ddim.choose_precision(options.precision, self.device), options.compile
        if compiled is None:  # the program's own rule, for a long run
            trial = torch.nn.Identity()
            compiled = ddim.Run(self.device, ddim.Signals(), "fp32", "auto", Path()).compiled(trial, 10**6) is not trial
        if compiled:  # variants share code: another's batch size or layout is no reason to compile for any
            torch._dynamo.config.automatic_dynamic_shapes = False
        modes, self.variants = dict.fromkeys([compiled, False]), []
        for mode in modes:
            self.variants += [Variant("ours", self.precision, mode)]
            self.variants += [Variant("diffusers", self.precision, mode, layout) for layout in (NHWC, NCHW)]
        if self.precision != "fp32":
            self.variants += [Variant("ours", "fp32", mode) for mode in modes] + [Variant("diffusers", "fp32", compiled)]
        self.variants += [Variant("diffusers", "fp32", False, NCHW, tuned=False)]

    @functools.cached_property
    def peer_configs(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            ddim.export_weights(Path(folder), torch.nn.Module(), self.args)
            return {path.parent.name: json.loads(path.read_text()) for path in Path(folder).glob("*/*config.json")}

    def unet(self):
        return ddim.UNet(**{name: getattr(self.args, name) for name in ddim.UNET_FLAGS})

    def network(self, variant):
        torch.manual_seed(0)
        network = ours = self.unet()
        for value in ours.state_dict().values():
            if not value.any():  # a fresh network predicts 0, which would hide any disagreement
                value.normal_(std=0.02)
        if variant.network == "diffusers":
            network = UNet2DModel.from_config(self.peer_configs["unet"])
            network.load_state_dict(ours.state_dict())
        return network.to(self.device, memory_format=variant.layout)

    def run(self, variant):
        return ddim.Run(self.device, ddim.Signals(), variant.precision, "on" if variant.compile else "off", Path())

    def our_step(self, variant, batch_size):
        model = self.network(variant)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        state = ddim.State(model, ema, torch.optim.Adam(model.parameters(), lr=self.args.lr, fused=True))
        args = argparse.Namespace(**vars(self.args) | {"batch_size": batch_size})
        return ddim.make_step(state, self.schedule, args, self.run(variant)), state

    def peer_step(self, variant):
        run, model = self.run(variant), self.network(variant).train()
        network, parameters = run.compiled(model, 1), list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.args.lr, fused=variant.tuned or None)
        ema = EMAModel(parameters, decay=self.args.ema_decay, foreach=variant.tuned)
        scheduler = DDPMScheduler(self.args.timesteps, self.args.beta_start, self.args.beta_end)

        def step(images):
            x_0 = ddim.to_float(images.to(self.device, non_blocking=True))
            eps = torch.randn_like(x_0)
            t = torch.randint(self.args.timesteps, (len(x_0),), device=self.device)
            x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=variant.layout)
            with run.autocast():
                predicted = network(x_t, t).sample
            optimizer.zero_grad()
            F.mse_loss(predicted.float(), eps).backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)
            optimizer.step()
            ema.step(parameters)

        return step

    def training(self, variant, batch_size):
        """A function that takes one training step."""
        images = torch.randint(256, (batch_size, *SHAPE), dtype=torch.uint8)
        images = images.pin_memory() if self.gpu else images
        step = self.our_step(variant, batch_size)[0] if variant.network == "ours" else self.peer_step(variant)
        return lambda: step(images)

    def sampling(self, variant, batch_size):
        """A function that takes the last self.steps of the STEPS steps from noise to images."""
        run, model = self.run(variant), self.network(variant).eval()
        x_T = torch.randn(batch_size, *SHAPE, device=self.device).contiguous(memory_format=variant.layout)
        if variant.network == "ours":
            sampler = ddim.Sampler(model, self.schedule, self.args, run, evaluations=1)
            tau = sampler.tau(STEPS)[: self.steps]
            return lambda: ddim.ddim_sample(sampler.eps, x_T, self.schedule, tau)
        if variant.precision == "bf16":
            model.bfloat16()  # as from_pretrained(torch_dtype=torch.bfloat16) does, and faster than autocast
        network, scheduler = run.compiled(model, 1), DDIMScheduler.from_config(self.peer_configs["scheduler"])
        scheduler.set_timesteps(STEPS)

        @(torch.inference_mode if variant.tuned else torch.no_grad)()
        def sample():
            x = x_T
            for t in scheduler.timesteps[-self.steps :]:  # on the CPU, whence the network would fetch it, and wait
                on_device = torch.full((batch_size,), int(t), device=self.device) if variant.tuned else t
                x = scheduler.step(network(x.to(model.dtype), on_device).sample, t, x).prev_sample

        return sample

    def timed(self, function, repeats=1):
        synchronize = getattr(torch, self.device.type).synchronize
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize()
        return (time.perf_counter() - began) / repeats

    def rates(self, part, title, functions, images, repeats=1, scale=1.0):
        """Time the functions in turn. Speed-ups are those of the first of them, and of ours in the same precision and mode."""
        names, spent, cores = list(functions), {name: [] for name in functions}, {name: [] for name in functions}
        for i in range(-1, self.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if isinstance(name, Variant):
                    name.use()
                if i < 0 or repeats > 1:  # compiles, searches convolutions, makes the allocator's blocks fit
                    functions[name]()
                if i >= 0:
                    busy, seconds = time.process_time(), self.timed(functions[name], repeats)
                    cores[name].append((time.process_time() - busy) / (seconds * repeats))
                    spent[name].append(scale * seconds)
        table = self.results.setdefault(part, {}).setdefault(title, {})
        print(f"\n({part}) {title:<42}{'images/s':>10}{'seconds':>10}{'cores':>7}   {f'speed-up of {names[0]}':<34}of ours alike")
        for name, own in spent.items():
            row = {"images_per_s": images / median(own), "seconds": median(own), "cores": median(cores[name]), "speed_up_of": {}}
            line = f"    {name!s:<42}{row['images_per_s']:10,.2f}{row['seconds']:10.4f}{row['cores']:7.1f}   "
            alike = Variant("ours", name.precision, name.compile) if isinstance(name, Variant) else names[0]
            for other in dict.fromkeys([names[0], alike]):
                ratios = [a / b for a, b in zip(own, spent[other])]
                row["speed_up_of"][str(other)] = spread = [median(ratios), min(ratios), max(ratios)]
                line += "{:.2f} ({:.2f}..{:.2f})".format(*spread).ljust(34)
            table[str(name)] = row
            print(line.rstrip(), flush=True)

    def row(self, part, name, text, **values):
        print(f"    {name:<52}{text}", flush=True)
        self.results.setdefault(part, {})[name] = values

    def a(self):
        for n in self.batch_sizes:
            fresh()
            functions = {variant: self.training(variant, n) for variant in self.variants}
            self.rates("a", f"training step, batch {n}", functions, n, self.repeats)
            del functions

    def b(self):
        n, scaled = self.sample_batch_size, "" if self.steps == STEPS else f" (from {self.steps})"
        functions = {variant: self.sampling(variant, n) for variant in self.variants}
        self.rates("b", f"sampling, {STEPS} steps{scaled}, batch {n}", functions, n, scale=STEPS / self.steps)

    def c(self):
        count, n, half = 50_000, self.batch_sizes[0], [0.5] * 3
        steps = max(1, count // n // (1 if self.long else 10))
        images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8)
        floats, pixels = ddim.to_float(images), images.permute(0, 2, 3, 1).numpy()

        def each(batch):
            return torch.stack([normalize(to_tensor(Image.fromarray(image)), half, half) for image in batch])

        loaders = {
            "ours": lambda: map(ddim.to_float, ddim.make_loader(images, ddim.Order(count, n, 0, 0, steps), self.device)),
            "usual, from float tensors": lambda: DataLoader(floats, n, shuffle=True, pin_memory=self.gpu),
            "usual, ToTensor per image": lambda: DataLoader(pixels, n, shuffle=True, pin_memory=self.gpu, collate_fn=each),
        }
        functions = {name: lambda make=make: sum(map(len, itertools.islice(make(), steps))) for name, make in loaders.items()}
        self.rates("c", f"data feed, {steps} batches of {n}", functions, steps * n)

    def d(self):
        print("\n(d) from the start of the process, synthetic images")
        pictures = f"to the picture of {self.args.num_samples} samples"
        shown = {"epoch 1/1": "to the first training step and held-out loss", "wrote ": pictures}
        with tempfile.TemporaryDirectory() as folder:
            settings = {"device": self.device.type, "precision": self.precision, "channels": self.args.channels}
            flags = [f"--{flag}={value}" for flag, value in settings.items()] + [f"--out-dir={folder}", "--dataset=synthetic"]
            command = [sys.executable, str(SCRIPT), *flags]
            lines, began = [], time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                for line in process.stdout:
                    lines.append(line)
                    seconds = time.perf_counter() - began
                    for name in [name for start, name in shown.items() if line.startswith(start)]:
                        self.row("d", name, f"{seconds:.1f} s", seconds=seconds)
        if process.returncode:
            sys.exit("".join(lines[-20:]))

    def e(self):
        if not self.gpu and sys.platform != "linux":
            return print("\n(e) peak memory of a process: on Linux alone")
        print("\n(e) peak memory, and how much of it there was before the network")
        kinds = {"training": self.batch_sizes[0]} | ({"sampling": self.sample_batch_size} if self.long else {})
        for (kind, n), i in itertools.product(kinds.items(), range(len(self.variants))):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                before, most = pool.submit(peak, self.options, kind, n, i).result()
            name = f"{kind}, batch {n}, {self.variants[i]}"
            self.row("e", name, f"{most / 1e9:.2f} GB, {before / 1e9:.2f} GB", bytes=most, bytes_before=before)

    def most_bytes(self):
        if self.gpu:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])

    @torch.inference_mode()
    def f(self):
        self.variants[0].use()
        size, n, c, side, ceilings = 8192 if self.gpu else 2048, self.batch_sizes[0], 256, 16, {}
        print(f"\n(f) ceilings, the best of 10: matrices {size}x{size}, 3x3 convolution {n}x{c}x{side}x{side}; what ours reaches")

        def best(function, *tensors, **options):
            return min([self.timed(lambda: function(*tensors, **options), self.repeats) for _ in range(11)][1:])

        for precision in dict.fromkeys([self.precision, "fp32"]):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            draw = functools.partial(torch.randn, device=self.device, dtype=dtype)
            x, kernel = (draw(shape).contiguous(memory_format=NHWC) for shape in ((n, c, side, side), (c, c, 3, 3)))
            product = 2 * size**3 / best(torch.mm, draw(size, size), draw(size, size))
            convolution = 2 * 9 * n * (c * side) ** 2 / best(F.conv2d, x, kernel, padding=1)
            ceilings[precision] = {"matrix product": product, "convolution": convolution}
            for name, flops in ceilings[precision].items():
                self.row("f", f"{precision} {name}", f"{flops / 1e12:.3f} TFLOP/s", flops_per_s=flops)
        source = torch.ones(2**26, device=self.device)
        bandwidth = 2 * source.nbytes / best(torch.empty_like(source).copy_, source)
        self.row("f", "copy, bytes read and written", f"{bandwidth / 1e9:.1f} GB/s", bytes_per_s=bandwidth)

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.unet().eval()(torch.empty(1, *SHAPE), torch.empty(1, dtype=torch.int64))
        forward = counter.get_total_flops()
        self.row("f", "network, forward, per image", f"{forward / 2e9:.2f} GMAC", macs=forward / 2)
        for part, passes in (("a", 3), ("b", STEPS)):  # a backward pass costs two forward ones
            for (title, table), variant in itertools.product(self.results.get(part, {}).items(), self.variants):
                if variant.network == "ours":
                    flops = passes * forward * table[str(variant)]["images_per_s"]
                    shares = {name: flops / ceiling for name, ceiling in ceilings[variant.precision].items()}
                    text = ", ".join(f"{share:.0%} of the {name}" for name, share in shares.items())
                    self.row("f", f"{title}, {variant}", f"{flops / 1e12:.3f} TFLOP/s, {text}", flops_per_s=flops, shares=shares)

    def g(self):
        print("\n(g) checkpoint")
        step, state = self.our_step(Variant("ours", self.precision), 1)
        step(torch.zeros(1, *SHAPE, dtype=torch.uint8))  # makes Adam's moments
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ddim_model_final.pth")
            seconds = median(self.timed(lambda: ddim.save_checkpoint(path, state, vars(self.args))) for _ in range(3))
            size = path.stat().st_size
        text = f"{seconds:.2f} s for {size / 1e6:,.0f} MB, {size / 1e6 / seconds:,.0f} MB/s"
        self.row("g", "saved, and on disk", text, seconds=seconds, bytes=size)

    def losses(self, steps):
        """How far precision and compilation lead apart, from the same weights, images and draws; dropout masks would differ."""
        reference, modes = Variant("ours", "ieee" if self.gpu else "fp32"), {False, self.variants[0].compile}
        variants = [reference, *(Variant("ours", precision, mode) for mode in modes for precision in ("fp32", "bf16"))]
        n, count, images = self.batch_sizes[0], self.args.num_samples, ddim.draw_shapes(1000, seed=0)
        shown = sorted({i * (steps - 1) // 9 for i in range(10)})
        print(f"\n{f'losses, batch {n}, no dropout; step':<36}" + "".join(f"{i + 1:>9}" for i in shown))
        self.args.dropout, curves, pictures = 0.0, {}, {}
        for variant in dict.fromkeys(variants):
            variant.use()
            step, state = self.our_step(variant, n)
            curves[variant] = [float(step(images[indices])[0]) for indices in ddim.Order(len(images), n, 0, 0, steps)]
            print(f"    {variant!s:<32}" + "".join(f"{curves[variant][i]:9.5f}" for i in shown), flush=True)
            if variant == reference:
                model = state.model
            sampler = ddim.Sampler(model, self.schedule, self.args, self.run(variant), evaluations=1)
            pictures[variant] = ddim.to_uint8(sampler.sample(range(count), STEPS)).float()
        print(f"against {reference}, with {count} pictures of its weights from the same x_T in {STEPS} steps")
        right = curves.pop(reference)
        for other, curve in curves.items():
            loss = max(abs(a - b) / b for a, b in zip(curve, right))
            apart = (pictures[other] - pictures[reference]).abs()
            most, mean = apart.max().item(), apart.mean().item()
            text = f"losses differ by up to {loss:.2%}, pixels by up to {most:.0f} of 255, {mean:.3f} on average"
            self.row("losses", str(other), text, loss=loss, pixel_max=most, pixel_mean=mean, curve=curve, against=right)

    def header(self):
        cpu, device, libraries = platform.processor() or platform.machine(), self.device.type, "no CUDA"
        with contextlib.suppress(OSError, TypeError):
            cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        if self.gpu:
            device = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"
            libraries = f"CUDA {torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
        self.results["setting"] = {
            "CPU": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {ddim.available_cores()} cores",
            "device": device,
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {version('diffusers')}",
            "libraries": libraries,
            "network": f"{sum(p.numel() for p in self.unet().parameters()):,} parameters, {self.args.channels} channels",
            "precision": f"{self.precision}; {self.rounds} rounds",
        }
        print("\n".join(f"{name:<10}{value}" for name, value in self.results["setting"].items()), flush=True)


def fresh():
    """Forget compiled code, of which Dynamo keeps eight per function, and free what nothing uses."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(options, kind, batch_size, i):
    """Bytes before there is a network, and at most; for a process of its own."""
    bench = Bench(options)
    bench.steps, variant, before = 1, bench.variants[i], bench.most_bytes()
    variant.use()
    function = getattr(bench, kind)(variant, batch_size)
    function()
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()  # of what the search for convolutions took
    function()  # has Adam's moments from its start, which the first has not
    return before, bench.most_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="besides fp32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="of training; c, e, f: the first [32; GPU: 128]")
    parser.add_argument("--sample-batch-size", type=int, metavar="N", help="of sampling [16, 64 with --long; GPU: 256]")
    parser.add_argument("--channels", type=int, default=128, help="width of the network [128]")
    parser.add_argument("--long", action="store_true", default=None, help="more rounds and steps [GPU]")
    parser.add_argument("--short", action="store_false", dest="long", help="fewer [CPU]")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also compile the networks [GPU with Triton]")
    parser.add_argument("--only", default=PARTS, metavar="PARTS", help="the parts to measure, such as abf")
    parser.add_argument("--losses", type=int, metavar="N", help="also compare precisions over N training steps and in pictures")
    options = parser.parse_args()
    bench = Bench(options)
    bench.header()
    for part in [part for part in PARTS if part in options.only]:
        fresh()
        getattr(bench, part)()
    if options.losses:
        fresh()
        bench.losses(options.losses)
    print("\n" + json.dumps(bench.results))


if __name__ == "__main__":
    main()
