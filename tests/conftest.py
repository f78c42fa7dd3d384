import collections
import functools
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: tiny models on busy machines run faster, nothing else changes

import ddim_cifar

NETWORK = ["--channels", "32", "--channel-mults", "1", "2", "--res-blocks", "1", "--attn-resolutions", "16", "--device", "cpu"]
TINY = [*NETWORK, "--dataset", "synthetic", "--batch-size", "4", "--sample-steps", "2", "--precision", "fp32"]
Result = collections.namedtuple("Result", "code out err")
draw_shapes_once = functools.cache(ddim_cifar.draw_shapes)


@pytest.fixture
def ddim(tmp_path, capfd, monkeypatch):
    """Runs the command in this process, in a folder of its own: ddim(*more_flags) -> Result."""
    # a tiny model's training takes less time than drawing the shapes, or than the loss of 256 held-out images
    monkeypatch.setattr(ddim_cifar, "draw_shapes", draw_shapes_once)
    monkeypatch.setattr(ddim_cifar, "HELD_OUT", 40)

    def run(*more, flags=TINY, out_dir=tmp_path):
        out = [] if {"--out-dir", "--help"} & set(more) else ["--out-dir", str(out_dir)]
        capfd.readouterr()
        code = ddim_cifar.main([*flags, *out, *map(str, more)])
        return Result(code, *capfd.readouterr())

    return run


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long torture tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))
