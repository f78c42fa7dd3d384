"""Measure the program beside diffusers' UNet2DModel of the same weights, and beside what the hardware can do at most.

    python tests/benchmark.py                                      everything; about six minutes on two CPU cores
    python tests/benchmark.py --only ab --batch-sizes 32 128       training and sampling alone, at two batch sizes
    python tests/benchmark.py --long --compile --losses 20         more rounds, compiled networks, and how well precisions agree

a  training step: noise, forward, backward, clipping, Adam and the averaged weights, from images in main memory
b  sampling in 50 steps; where fewer were timed, scaled up to 50, and the table says so
c  data feed alone: 50,000 images as float batches in [-1, 1]
d  start of the process to the end of the first training step, and to the first picture
e  peak memory, in a process per variant: of the process on a CPU, of the tensors on a GPU
f  ceilings: matrix product, convolution and copy, and the share of the former two that the network reaches
g  saving a checkpoint

"diffusers tuned" runs at its best settings for the device (channels_last, autocast, fused Adam, foreach averaging, inference mode),
"diffusers as usual" at the defaults of a first script; on a GPU, fp32 is TF32 for all but the latter. Variants take turns, so that a
slow minute of the machine hits all of them; speed-ups are the median of each round's ratio, with their range. "cores" is what the process
got of the CPU meanwhile: figures of a CPU where other work took its share mean little. Needs diffusers. The last line is JSON.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).resolve().parents[1] / "ddim_cifar.py"
sys.path.insert(0, str(SCRIPT.parent))
import ddim_cifar as ddim  # noqa: E402

PARTS, STEPS, SHAPE = "abcdefg", 50, (3, ddim.SIZE, ddim.SIZE)


@dataclass(frozen=True)
class Variant:
    network: str  # "ours" or "diffusers"
    precision: str
    compile: bool = False
    tuned: bool = True

    def __str__(self):
        settings = "" if self.network == "ours" else "tuned" if self.tuned else "as usual"
        return " ".join(filter(None, [self.network, settings, self.precision, "compiled" * self.compile]))

    @property
    def layout(self):
        return torch.channels_last if self.tuned else torch.contiguous_format

    def use(self):
        torch.set_float32_matmul_precision("high" if self.tuned else "highest")
        torch.backends.cudnn.benchmark = self.tuned


class Bench:
    def __init__(self, options):
        self.args = ddim.parse_args(["--channels", str(options.channels), "--device", options.device, "--warmup", "1"])[0]
        self.device, self.results = ddim.start_processes(self.args.device), {}
        self.schedule = ddim.NoiseSchedule(self.args.timesteps, self.args.beta_start, self.args.beta_end)
        self.gpu = self.device.type == "cuda"
        self.short = not self.gpu if options.short is None else options.short
        self.rounds = options.rounds or (3 if self.short else 7)
        self.steps = STEPS if self.gpu else 2 if self.short else 10
        self.repeats = 10 if self.gpu else 1  # of what takes milliseconds there
        self.batch_sizes = options.batch_sizes or [128 if self.gpu else 32]
        self.sample_batch_size = options.sample_batch_size or (256 if self.gpu else 16 if self.short else 64)

        self.precision = ddim.choose_precision(options.precision, self.device)
        compiled, names = options.compile or self.gpu, ("ours", "diffusers")
        self.variants = [Variant(name, kind, compiled) for kind in dict.fromkeys([self.precision, "fp32"]) for name in names]
        self.variants += [Variant(name, self.precision) for name in names if compiled] + [Variant("diffusers", "fp32", tuned=False)]

    def unet(self):
        return ddim.UNet(**{name: getattr(self.args, name) for name in ddim.UNET_FLAGS})

    @functools.cached_property
    def weights(self):
        torch.manual_seed(0)
        weights = self.unet().state_dict()
        for value in weights.values():
            if not value.any():  # a fresh network predicts 0, which would hide any disagreement
                value.normal_(std=0.02)
        return weights

    @functools.cached_property
    def peer_configs(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            ddim.export_weights(Path(folder), torch.nn.Module(), self.args)
            return {path.parent.name: json.loads(path.read_text()) for path in Path(folder).glob("*/*config.json")}

    def network(self, variant):
        if variant.network == "ours":
            network = self.unet()
        else:
            from diffusers import UNet2DModel  # here and below, since it is no part of the memory that ours takes

            network = UNet2DModel.from_config(self.peer_configs["unet"])
        network.load_state_dict(self.weights)
        return network.to(self.device, memory_format=variant.layout)

    def run(self, variant):
        return ddim.Run(self.device, ddim.Signals(), variant.precision, "on" if variant.compile else "off", Path())

    def state(self, variant):
        model = self.network(variant)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        return ddim.State(model, ema, torch.optim.Adam(model.parameters(), lr=self.args.lr, fused=True))

    def our_step(self, variant, batch_size, state):
        args = argparse.Namespace(**vars(self.args) | {"batch_size": batch_size})
        return ddim.make_step(state, self.schedule, args, self.run(variant))

    def peer_step(self, variant):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        run, model = self.run(variant), self.network(variant).train()
        network, parameters = run.compiled(model, 1), list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.args.lr, fused=variant.tuned or None)
        ema = EMAModel(parameters, decay=self.args.ema_decay, foreach=variant.tuned)
        scheduler = DDPMScheduler(self.args.timesteps, self.args.beta_start, self.args.beta_end)

        def step(x_0):
            x_0 = x_0.to(self.device, non_blocking=True)
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
        if variant.network == "ours":
            step = self.our_step(variant, batch_size, self.state(variant))
        else:
            step, images = self.peer_step(variant), ddim.to_float(images)
        images = images.pin_memory() if self.gpu else images
        return lambda: (variant.use(), step(images))

    def sampling(self, variant, batch_size):
        """A function that takes the last self.steps of the STEPS steps from noise to images."""
        run, model = self.run(variant), self.network(variant).eval()
        x_T = torch.randn(batch_size, *SHAPE, device=self.device).contiguous(memory_format=variant.layout)
        if variant.network == "ours":
            sampler = ddim.Sampler(model, self.schedule, self.args, run, evaluations=1)
            tau = sampler.tau(STEPS)[: self.steps]
            return lambda: (variant.use(), ddim.ddim_sample(sampler.eps, x_T, self.schedule, tau))
        from diffusers import DDIMScheduler

        network, scheduler = run.compiled(model, 1), DDIMScheduler.from_config(self.peer_configs["scheduler"])
        scheduler.set_timesteps(STEPS)

        @(torch.inference_mode if variant.tuned else torch.no_grad)()
        def sample():
            variant.use()
            x = x_T
            on_device = scheduler.timesteps.to(self.device) if variant.tuned else scheduler.timesteps
            for t, t_network in list(zip(scheduler.timesteps, on_device))[-self.steps :]:
                with run.autocast():
                    eps = network(x, t_network).sample
                x = scheduler.step(eps, t, x).prev_sample

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
        """Time the functions in turn. Speed-ups are those of the first of them, and of ours at the same precision."""
        for function in functions.values():  # memory, autotuning and compilation stay outside the times
            self.timed(function, 3 if self.gpu else 1)
        names, seconds, cores = list(functions), {name: [] for name in functions}, {name: [] for name in functions}
        for i in range(self.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                busy = time.process_time()
                seconds[name].append(scale * self.timed(functions[name], repeats))
                cores[name].append((time.process_time() - busy) / (seconds[name][-1] / scale * repeats))
        table = self.results.setdefault(part, {}).setdefault(title, {})
        print(f"\n({part}) {title:<42}{'images/s':>10}{'seconds':>10}{'cores':>7}", end="   ")
        print(f"{f'speed-up of {names[0]}':<34}of ours at the same precision")
        for name, own in seconds.items():
            peers = [other for other in self.variants if other in names and (other.network, other.precision) == ("ours", name.precision)]
            row, spreads = {"images_per_s": images / median(own), "seconds": median(own), "cores": median(cores[name])}, []
            for reference in [names[0], *sorted(peers, key=lambda other: other.compile != name.compile)[:1]]:
                ratios = [a / b for a, b in zip(own, seconds[reference])]
                row[f"speed_up_of_{reference}"] = spread = [median(ratios), min(ratios), max(ratios)]
                spreads.append("{:.2f} ({:.2f}..{:.2f})".format(*spread))
            line = f"    {name!s:<42}{row['images_per_s']:10,.2f}{row['seconds']:10.4f}{row['cores']:7.1f}   "
            print((line + "".join(f"{spread:<34}" for spread in spreads)).rstrip(), flush=True)
            table[str(name)] = row
        return table

    def row(self, part, name, text, **values):
        print(f"    {name:<52}{text}", flush=True)
        self.results.setdefault(part, {})[name] = values

    def a(self):
        for n in self.batch_sizes:
            torch.compiler.reset()  # a second batch size would be compiled for any size, and slower
            functions = {variant: self.training(variant, n) for variant in self.variants}
            table = self.rates("a", f"training step, batch {n}", functions, n, self.repeats)
        state, step = self.trained_state(), table[str(self.variants[0])]["seconds"]
        clip = functools.partial(torch.nn.utils.clip_grad_norm_, list(state.model.parameters()), self.args.grad_clip)
        average = functools.partial(ddim.update_ema, state.ema, state.model, self.args.timesteps, self.args.ema_decay)
        for name, function in {"averaging of the weights": average, "clipping of the gradient": clip}.items():
            seconds = median(self.timed(function, self.repeats) for _ in range(10))
            text = f"{1e3 * seconds:.2f} ms, {seconds / step:.1%} of the step of {self.variants[0]} at batch {n}"
            self.row("a", name, text, seconds=seconds, share=seconds / step)

    def trained_state(self):
        state = self.state(self.variants[0])
        for parameter in state.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        return state

    def b(self):
        torch.compiler.reset()
        n, scaled = self.sample_batch_size, "" if self.steps == STEPS else f" (from {self.steps})"
        functions = {variant: self.sampling(variant, n) for variant in self.variants}
        self.rates("b", f"sampling, {STEPS} steps{scaled}, batch {n}", functions, n, scale=STEPS / self.steps)

    def c(self):
        from torchvision import transforms

        count, n = 50_000, self.batch_sizes[0]
        images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8)
        pixels = images.permute(0, 2, 3, 1).numpy()
        steps = max(1, count // n // (10 if self.short else 1))
        to_tensor = transforms.Compose([Image.fromarray, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

        def ours():
            for batch in ddim.make_loader(images, ddim.Order(count, n, 0, 0, steps), self.device):
                ddim.to_float(batch)

        def usual():
            loader = torch.utils.data.DataLoader(pixels, n, shuffle=True, collate_fn=lambda batch: torch.stack([*map(to_tensor, batch)]))
            for _ in itertools.islice(loader, steps):
                pass

        self.rates("c", f"data feed, {steps} batches of {n}", {"ours": ours, "usual, ToTensor per image": usual}, steps * n)

    def d(self):
        print("\n(d) from the start of the process, synthetic images")
        with tempfile.TemporaryDirectory() as folder:
            flags = {"dataset": "synthetic", "out-dir": folder, "precision": self.precision, "channels": self.args.channels}
            command = [sys.executable, str(SCRIPT), f"--device={self.device.type}", *(f"--{name}={value}" for name, value in flags.items())]
            lines, began = [], time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                for line in process.stdout:
                    seconds = time.perf_counter() - began
                    lines.append(line)
                    if line.startswith("epoch 1/1"):
                        self.row("d", "to the first training step and held-out loss", f"{seconds:.1f} s", seconds=seconds)
                    if line.startswith("wrote") and line.rstrip().endswith("ddim_samples.png"):
                        self.row("d", f"to the picture of {self.args.num_samples} samples", f"{seconds:.1f} s", seconds=seconds)
        if process.returncode:
            sys.exit("".join(lines[-20:]))

    def e(self):
        print("\n(e) peak memory")
        kinds = {"training": self.batch_sizes[0]} | ({} if self.short else {"sampling": self.sample_batch_size})
        for (kind, n), (i, variant) in itertools.product(kinds.items(), enumerate(self.variants)):
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", kind, str(n), str(i)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            before, peak = json.loads(answer.splitlines()[-1])
            text = f"{peak / 1e9:.2f} GB" + (f", {before / 1e9:.2f} GB of it before there was a network" if before else "")
            self.row("e", f"{kind}, batch {n}, {variant}", text, bytes=peak, bytes_before=before)

    def peak(self, kind, batch_size, i):
        self.steps, variant = 1, self.variants[int(i)]
        if variant.network == "diffusers":
            from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel, training_utils  # noqa: F401 (imported lazily there)
        before = self.peak_bytes()
        function = getattr(self, kind)(variant, int(batch_size))
        function()
        function()  # has Adam's moments from its start, which the first has not
        print(json.dumps([before, self.peak_bytes()]))

    def peak_bytes(self):
        if self.gpu:
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):  # Linux hands the parent's ru_maxrss down to the child
            return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        import resource  # which Windows has not

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @torch.inference_mode()
    def f(self):
        self.variants[0].use()
        size, n, c, side, ceilings = 8192 if self.gpu else 2048, self.batch_sizes[0], 256, 16, {}
        print(f"\n(f) ceilings, the best of 10: matrices {size}x{size}, 3x3 convolution {n}x{c}x{side}x{side}; and what ours reaches")

        def best(function, *tensors, **options):
            return min([self.timed(lambda: function(*tensors, **options), self.repeats) for _ in range(11)][1:])

        for precision in dict.fromkeys([self.precision, "fp32"]):
            draw = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            x, kernel = (draw(shape).contiguous(memory_format=torch.channels_last) for shape in ((n, c, side, side), (c, c, 3, 3)))
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
        macs = counter.get_total_flops() / 2
        self.row("f", "network, forward, per image", f"{macs / 1e9:.2f} GMAC", macs=macs)
        for part, kind, passes in (("a", "training", 3), ("b", "sampling", STEPS)):  # a backward pass costs two forward ones
            measured = list(self.results.get(part, {}).values())
            for variant in [variant for variant in self.variants if variant.network == "ours" and measured]:
                flops = 2 * passes * macs * measured[0][str(variant)]["images_per_s"]
                shares = {name: flops / ceiling for name, ceiling in ceilings[variant.precision].items()}
                text = ", ".join([f"{flops / 1e12:.3f} TFLOP/s"] + [f"{share:.0%} of the {name}" for name, share in shares.items()])
                self.row("f", f"{kind}, {variant}", text, flops_per_s=flops, shares=shares)

    def g(self):
        print("\n(g) checkpoint")
        state = self.trained_state()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder, "ddim_model_final.pth")
            seconds = median(self.timed(lambda: ddim.save_checkpoint(path, state, vars(self.args))) for _ in range(3))
            size = path.stat().st_size
        text = f"{seconds:.2f} s for {size / 1e6:,.0f} MB, {size / 1e6 / seconds:,.0f} MB/s"
        self.row("g", "saved, and on disk", text, seconds=seconds, bytes=size)

    def losses(self, steps):
        """How far precision and compilation lead apart, from the same weights, images and draws; without dropout, whose masks differ."""
        torch.compiler.reset()
        modes = [False, True] if self.variants[0].compile else [False]
        variants = [Variant("ours", precision, mode) for mode in modes for precision in ("fp32", "bf16")]
        reference, *others = variants
        n, count, images = self.batch_sizes[0], self.args.num_samples, ddim.draw_shapes(1000, seed=0)
        self.args.dropout, states, curves, pictures = 0.0, {}, {}, {}
        for variant in variants:
            variant.use()
            state = states[variant] = self.state(variant)
            step = self.our_step(variant, n, state)
            curves[variant] = [float(step(images[torch.tensor(batch)])[0]) for batch in ddim.Order(len(images), n, 0, 0, steps)]
        shown = sorted({i * (steps - 1) // 9 for i in range(10)})
        print(f"\n{f'losses, batch {n}, no dropout; step':<36}" + "".join(f"{i + 1:>9}" for i in shown))
        for variant, curve in curves.items():
            print(f"    {variant!s:<32}" + "".join(f"{curve[i]:9.5f}" for i in shown))
        for variant in variants:
            sampler = ddim.Sampler(states[reference].model, self.schedule, self.args, self.run(variant), evaluations=1)
            pictures[variant] = ddim.to_uint8(sampler.sample(range(count), STEPS)).float()
        print(f"against {reference}, with {count} pictures of its weights from the same x_T in {STEPS} steps")
        for other in others:
            loss = max(abs(a - b) / b for a, b in zip(curves[other], curves[reference]))
            apart = (pictures[other] - pictures[reference]).abs()
            most, mean = apart.max().item(), apart.mean().item()
            text = f"losses differ by up to {loss:.2%}, pixels by up to {most:.0f} of 255, {mean:.3f} on average"
            self.row("losses", str(other), text, loss=loss, pixel_max=most, pixel_mean=mean, curve=curves[other], against=curves[reference])

    def header(self):
        cpu = platform.processor() or platform.machine()
        with contextlib.suppress(OSError, TypeError):
            cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        with torch.inference_mode():
            x, t = torch.randn(2, *SHAPE, device=self.device), torch.tensor([1, 900], device=self.device)
            ours, theirs = (self.network(Variant(name, "fp32", tuned=False)).eval()(x, t) for name in ("ours", "diffusers"))
            apart = (ours - theirs.sample).abs().max() / ours.abs().max()
        self.results["setting"] = {
            "CPU": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {ddim.available_cores()} cores",
            "device": torch.cuda.get_device_name(self.device) if self.gpu else self.device.type,
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {version('diffusers')}",
            "network": f"{sum(value.numel() for value in self.weights.values()):,} parameters, {self.args.channels} channels",
            "agreement": f"the two networks' eps differ by at most {apart:.1e} of the largest",
            "precision": f"{self.precision}; {self.rounds} rounds",
        }
        print("\n".join(f"{name:<10}{value}" for name, value in self.results["setting"].items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the first variant; fp32 is measured too")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="of training; c, e and f take the first [32; 128 on a GPU]")
    parser.add_argument("--sample-batch-size", type=int, metavar="N", help="of sampling [16, 64 with --long; 256 on a GPU]")
    parser.add_argument("--channels", type=int, default=128, help="width of the network [128]")
    parser.add_argument("--rounds", type=int, help="[3, 7 with --long]")
    parser.add_argument("--compile", action="store_true", help="compile the networks, as is always done on a GPU")
    parser.add_argument("--short", action="store_true", default=None, help="few rounds and steps, the default without a GPU")
    parser.add_argument("--long", action="store_false", dest="short", help="more of them, the default on a GPU")
    parser.add_argument("--only", default=PARTS, metavar="PARTS", help="the parts to measure, such as abf")
    parser.add_argument("--skip", default="", metavar="PARTS", help="the parts to leave out, such as d")
    parser.add_argument("--losses", type=int, default=0, metavar="N", help="also compare precisions over N training steps and in pictures")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options)
    if options.peak:
        return bench.peak(*options.peak)
    bench.header()
    for part in PARTS:
        if part in options.only and part not in options.skip:
            getattr(bench, part)()
    if options.losses:
        bench.losses(options.losses)
    print("\n" + json.dumps(bench.results))


if __name__ == "__main__":
    main()
