"""What several test files share: the command in this process and in others, a trained checkpoint, readers."""

import collections
import contextlib
import csv
import os
import signal
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
    """ddim(*flags) runs the command in this process, in a folder of the test's own, with a tiny network on few images.

    flags=[] or another list replaces these flags. ddim.start and ddim.torchrun run it in other processes.
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
        """The command in a process of its own, without a network, as from a shell. It is killed when the test ends."""
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
        """Wait for a process to end: its code and what it wrote. One that hangs is killed, and the test fails."""
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill(process)
            pytest.fail(f"still running after {seconds} seconds: {process.communicate(timeout=10)}")
        return Result(process.returncode, out, err)

    def kill(self, process):
        """End a process and those that it started: torchrun puts each into a session of its own."""
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
    """The command: see Command."""
    command = Command(tmp_path, capfd)
    yield command
    for process in command.processes:
        command.kill(process)
        process.communicate(timeout=10)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Of a tiny network after a few steps at a high rate, so that averaged and own weights, and all images, differ."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--iterations", "20", "--lr", "2e-3", "--warmup", "0", "--lr-decay", "0"]
    assert ddim_cifar.main([*TINY, *flags, "--out-dir", str(folder)]) == 0
    return folder / "ddim_model_final.pth"


@pytest.fixture(scope="session")
def load():
    """Reads a checkpoint, without the program's checks."""
    return lambda path: torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def read_log():
    """The rows of ddim_log.csv in a folder, as dicts of strings."""

    def read(folder):
        with open(folder / "ddim_log.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def wait_until():
    """Waits for a condition while a process runs."""

    def wait(condition, process, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while process.poll() is None and not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    return wait


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
