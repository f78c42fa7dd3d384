"""What several test files share: the command in this process and in others, a trained checkpoint, readers."""

import collections
import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker: tiny models gain nothing from more

import torch
from PIL import Image

import ddim_cifar

SCRIPT = Path(ddim_cifar.__file__)
NETWORK = ["--channels", "32", "--channel-mults", "1", "2", "--res-blocks", "1", "--attn-resolutions", "16"]
DEVICE = ["--device", "cpu"]
NETWORK += [*DEVICE, "--compile", "off"]
FEW_IMAGES = tempfile.TemporaryDirectory(prefix="ddim_images_")  # 40 to train on, 4 held out
TINY = [*NETWORK, "--dataset", FEW_IMAGES.name, "--batch-size", "4", "--sample-steps", "2", "--precision", "fp32"]
PATIENCE = 120  # seconds; no process of a test takes longer, but for those of --slow
Result = collections.namedtuple("Result", "code out err")


class Command:
    """Run the command in this process, by ddim(*flags), in a folder of the test's own, with a tiny network.

    flags=[] or another list replaces these flags. start, torchrun and fork run it in other processes.
    """

    script, device, network, images, tiny = SCRIPT, DEVICE, NETWORK, FEW_IMAGES.name, TINY

    def __init__(self, folder, capfd):
        self.folder, self.capfd, self.processes = folder, capfd, []

    def __call__(self, *more, flags=TINY, out_dir=None):
        more = [str(word) for word in more]
        if not {"--out-dir", "--help"} & set(more):
            more += ["--out-dir", str(out_dir or self.folder)]
        self.capfd.readouterr()
        code = ddim_cifar.main([*flags, *more])
        return Result(code, *self.capfd.readouterr())

    def start(self, *flags, python=(), before=lambda: None, **options):
        """Start the command in a process of its own, without a network. It is killed when the test ends."""
        refusing = "http://127.0.0.1:9"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        options["env"] = {**os.environ, "http_proxy": refusing, "https_proxy": refusing, **options.get("env", {})}
        command = [sys.executable, *python, str(SCRIPT), *map(str, flags)]
        prepare = {"start_new_session": True, "preexec_fn": lambda: [heed_signals(), before()]}
        process = subprocess.Popen(command, **prepare, **options)
        self.processes.append(process)
        return process

    def torchrun(self, processes, *flags, **options):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return self.start(*flags, python=launcher, env={"OMP_NUM_THREADS": "1"}, **options)

    def finish(self, process, seconds=PATIENCE):
        """Wait for a process to end, and return its code and what it wrote. One that hangs fails the test."""
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill(process)
            pytest.fail(f"still running after {seconds} seconds: {process.communicate(timeout=10)}")
        return Result(process.returncode, out, err)

    def fork(self, *flags):
        """Start the command in two forks of this process that work together, as torchrun would: their numbers."""
        if torch.cuda.is_available() or not hasattr(os, "fork"):
            pytest.skip("CUDA does not stand a fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        processes = []
        for rank in range(2):
            processes.append(os.fork())
            if processes[-1] == 0:
                signal.alarm(60)
                os.environ |= {**address, "RANK": str(rank)}
                vars(ddim_cifar.world).update(rank=rank, size=2, local_rank=rank)
                os._exit(ddim_cifar.main([str(flag) for flag in flags]))
        return processes

    def join(self, processes):
        """Wait for forks to end, and return their exit codes."""
        return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]

    def kill(self, process):
        """End a process and those that it started: torchrun puts each into a process group of its own."""
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if process.poll() is None and listed.exists() else []
        for pid in [*map(int, children), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def heed_signals():
    """Undo that a test suite in the background hands down ignored signals."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def ddim(tmp_path, capfd):
    """Return the command: see Command."""
    command = Command(tmp_path, capfd)
    yield command
    for process in command.processes:
        command.kill(process)
        process.communicate(timeout=10)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Train a tiny network in a few steps at a high rate, so that averaged and own weights, and all images, differ."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--iterations", "20", "--lr", "2e-3", "--warmup", "0", "--lr-decay", "0"]
    assert ddim_cifar.main([*TINY, *flags, "--out-dir", str(folder)]) == 0
    return folder / "ddim_model_final.pth"


@pytest.fixture(scope="session")
def load():
    """Return a reader of checkpoints without the program's checks."""
    return lambda path: torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def read_log():
    """Return a reader of the rows of ddim_log.csv in a folder, as dicts of strings."""

    def read(folder):
        with open(folder / "ddim_log.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def wait_until():
    """Wait for a condition while a process runs, by wait_until(condition, process)."""

    def wait(condition, process, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while process.poll() is None and not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    return wait


@pytest.fixture
def at_step(monkeypatch):
    """Call action() while the n-th step of a training is taken, by at_step(n, action). n=0: in each."""

    def patch(n, action):
        step = ddim_cifar.Trainer.step

        def watched(self, images):
            if n in (0, self.steps + 1):
                action()
            return step(self, images)

        monkeypatch.setattr(ddim_cifar.Trainer, "step", watched)

    return patch


@pytest.fixture
def clock(monkeypatch, at_step):
    """Set up a clock on which a training step takes so many seconds and nothing else any time, by clock(seconds)."""

    def set_up(seconds):
        now = [0.0]
        monkeypatch.setattr(ddim_cifar.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        at_step(0, lambda: now.append(now.pop() + seconds))

    return set_up


@pytest.fixture
def forbid(monkeypatch):
    """Let os.scandir or the like fail for a path, even for root, by forbid(os, "scandir", path)."""

    def patch(module, name, path):
        original = getattr(module, name)

        def guarded(file=".", *rest, **options):
            if isinstance(file, (str, os.PathLike)) and Path(file) == path:
                raise PermissionError(13, "Permission denied", str(file))
            return original(file, *rest, **options)

        monkeypatch.setattr(module, name, guarded)

    return patch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long torture tests as well")
    parser.addoption("--on", default="cpu", metavar="DEVICE", help="where the command runs: cuda, mps, cpu [cpu]")


def pytest_configure(config):
    for flags in (DEVICE, NETWORK, TINY):
        flags[flags.index("--device") + 1] = config.getoption("--on")
    for i, image in enumerate(ddim_cifar.draw_shapes(44, seed=0)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(FEW_IMAGES.name) / f"{i}.png")
    config.add_cleanup(FEW_IMAGES.cleanup)
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))
