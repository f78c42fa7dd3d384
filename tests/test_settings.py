"""Flags: which values they take, what they are by default, and what a run takes over from its checkpoint."""

import math
import re
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import ddim_cifar
from ddim_cifar import Config, NoiseSchedule, UserError, load_checkpoint, parse_args

PAPER = {"predict": "eps", "optimizer": "adam", "lr": 2e-4, "warmup": 5000, "batch_size": 128, "dropout": 0.1}
PAPER |= {"ema_decay": 0.9999, "lr_decay": 0.0}


def settings(*flags):
    """Return the settings of a command line, as parse_args completes them."""
    return parse_args([str(flag) for flag in flags])[0]


def values_of(config, names):
    return {name: getattr(config, name) for name in names}


WRONG = """
--epochs 0 | --epochs 0 at least 1
--lr nan | --lr nan
--eta 1.5 | --eta 1.5 0..1
--dropout 1 | --dropout 0..0.99
--channels 3200000000 | --channels 4096
--channel-mults 1 0 | --channel-mults 0
--channel-mults 1 1 1 1 1 1 1 | --channel-mults halved
--attn-resolutions 5 | --attn-resolutions 5 32 16 8 4
--tau cubic | --tau cubic quadratic
--epoch 3 | --epoch
--sample-steps 1001 50 --experiments consistency | --sample-steps 1001 1000
--order 2 --eta 0.5 | --order --eta
--experiments reconstruction --order 2 | reconstruction --order
--export x.zip | --export x.zip .npz
--export-weights w --channel-mults 2 2 | --export-weights
--sample x.pth --epochs 3 | --sample --epochs
--sample x.pth --resume x.pth | --sample --resume
--sample= | empty
--resume= | empty
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_flag_is_explained_in_the_last_line(ddim, case):
    flags, words = case.split(" | ")
    result = ddim(*flags.split(), flags=[])
    *usage, error = result.err.splitlines()
    assert result.code == 2 and error.startswith("ddim_cifar.py: error: "), result.err
    assert not any("error" in line for line in usage) and all(word in error for word in words.split()), result.err


def test_help_fits_two_screens_and_shows_every_flag_with_its_default(ddim):
    result = ddim("--help", flags=[])
    assert result.code == 0 and not result.err and len(result.out.splitlines()) < 110
    text = " ".join(result.out.split())
    for setting in fields(Config):
        assert f" --{setting.name.replace('_', '-')} " in text, setting.name
    for default in ("[32]", "[0.0025 for muon, 0.0002 for adam]", "[quadratic]", "[1 2 2 2]", "[cifar10]", "[50]"):
        assert default in text


@pytest.mark.parametrize("own", ["", "--predict v", "--lr 1e-3", "--warmup 0", "--batch-size 64", "--dropout 0"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_the_recipe_of_the_paper_is_that_of_ddpm_and_a_flag_typed_beside_it_wins(own, before):
    recipe = ["--recipe", "paper"]
    config, alone = settings(*(own.split() + recipe if before else recipe + own.split())), settings(*own.split())
    changed = own.split()[0][2:].replace("-", "_") if own else None
    for setting in fields(Config):
        name = setting.name
        if name != "recipe":
            wanted = PAPER[name] if name in PAPER and name != changed else getattr(alone, name)
            assert getattr(config, name) == wanted, name


@pytest.mark.parametrize(("has", "precision"), [({}, "fp32"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")])
def test_bf16_is_chosen_where_the_processor_is_fast_at_it(monkeypatch, has, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    torch.set_float32_matmul_precision("high")
    config = Config(device="cpu")
    ddim_cifar.start(config)
    assert config.precision == precision  # and so it stands in the checkpoint
    ddim_cifar.start(typed := Config(device="cpu", precision="bf16"))
    assert typed.precision == "bf16"
    assert torch.get_float32_matmul_precision() == "highest"  # for Muon


@pytest.fixture(scope="module")
def unusual(checkpoint, load, tmp_path_factory):
    """Write a checkpoint with other settings than the defaults, as far as its network allows: its path, and them."""
    others = {"epochs": 7, "iterations": 3, "lr": 0.005, "warmup": 2, "lr_decay": 0.25, "ema_decay": 0.99}
    others |= {"save_every": 3, "save_minutes": 1.0, "dropout": 0.2, "num_samples": 4, "sample_steps": (3, 4)}
    others |= {"tau": "uniform", "order": 2, "no_ema": True, "experiments": ("trajectory",), "device": "cuda"}
    others |= {"precision": "bf16", "compile": "on", "micro_batch": 8, "seed": 5, "recipe": "paper"}
    others |= {"data_dir": "/data", "resume": "before.pth", "export": "a.npz", "export_weights": "w"}
    others |= {"out_dir": "/elsewhere"}
    whole, path = load(checkpoint), tmp_path_factory.mktemp("unusual") / "x.pth"
    config = {**whole["config"], **others}
    torch.save({**whole, "config": config}, path)
    return path, config


OF_THE_NETWORK = {"channels", "channel_mults", "res_blocks", "attn_resolutions", "predict"}
NOT_RESUMED = {"experiments", "export", "export_weights", "device", "no_ema", "resume", "sample", "out_dir"}


@pytest.mark.parametrize("mode", ["--resume", "--sample"])
def test_a_run_takes_its_settings_from_the_checkpoint_but_for_outputs_and_in_sampling_what_concerns_it(unusual, mode):
    path, saved = unusual
    config, taken, others = settings(mode, path), saved.keys() - NOT_RESUMED, NOT_RESUMED - {"resume", "out_dir"}
    if mode == "--sample":
        taken = OF_THE_NETWORK | {"dataset", "data_dir"}
        others = {*Config.names(ddim_cifar.SAMPLING, ddim_cifar.RUNTIME), "resume", "export", "export_weights"}
    assert values_of(config, taken) == {name: saved[name] for name in taken}
    assert values_of(config, others - {mode[2:]}) == values_of(Config(), others - {mode[2:]})
    assert config.folder == path.parent


CONTRADICTIONS = """
--channels | 32 | 64
--channel-mults | 1 2 | 1 4
--attn-resolutions | 16 | 16 32
--predict | v | eps
--dropout | 0.0 | 0.2
--optimizer | muon | adam
--recipe | default | paper
--batch-size | 4 | 8
--dataset | FOLDER | cifar10
--seed | 0 | 1
"""
CONTRADICTIONS = [line.split(" | ") for line in CONTRADICTIONS.strip().splitlines()]


@pytest.mark.parametrize(
    ("mode", "flag", "its", "typed"),
    [("--resume", *case) for case in CONTRADICTIONS] + [("--sample", *case) for case in CONTRADICTIONS[:4]],
)
def test_a_flag_that_contradicts_the_checkpoint_names_both_values(ddim, checkpoint, mode, flag, its, typed):
    with pytest.raises(UserError) as caught:
        settings(mode, checkpoint, flag, *typed.split())
    text, its = str(caught.value), its.replace("FOLDER", ddim.images)
    assert text.startswith(f"{flag} {typed} ") and str(checkpoint) in text and its in text


@pytest.fixture
def extended(monkeypatch):
    """Give the program one more field of Config, and one more argument of NoiseSchedule."""

    @dataclass
    class Extended(Config):
        schedule: str = ddim_cifar.flag(ddim_cifar.SCHEDULE, "linear", "shape", choices=("linear", "cosine"))

    class Schedule(NoiseSchedule):
        def __init__(self, schedule="linear"):
            super().__init__()
            if schedule == "cosine":
                angle = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64) * math.pi / 2
                self.alphas_cumprod = angle.cos() ** 2

    monkeypatch.setattr(ddim_cifar, "Config", Extended)
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", Schedule)
    return Schedule


def test_a_setting_added_to_the_schedule_is_inherited_and_defended_like_the_others(
    ddim, checkpoint, tmp_path, load, extended
):
    for mode in ("--sample", "--resume"):  # a checkpoint older than the setting has its default
        assert settings(mode, checkpoint, "--schedule", "linear").schedule == "linear"
        with pytest.raises(UserError, match=r"--schedule cosine .*linear"):
            settings(mode, checkpoint, "--schedule", "cosine")

    run = ["--schedule", "cosine", "--num-samples", "1", "--export-weights", tmp_path / "w", "--iterations", "2"]
    assert ddim(*run).code == 0
    for mode in ("--sample", "--resume"):
        assert settings(mode, tmp_path).schedule == "cosine"
        with pytest.raises(UserError, match=r"--schedule linear .*cosine"):
            settings(mode, tmp_path, "--schedule", "linear")
    _, schedule = ddim_cifar.load_model(tmp_path)
    told = DDIMScheduler.from_pretrained(tmp_path / "w" / "scheduler").alphas_cumprod.double()
    for alphas in (schedule.alphas_cumprod, told):
        torch.testing.assert_close(alphas, extended("cosine").alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_weights_are_refused_by_a_program_whose_schedule_is_another_one(ddim, checkpoint, tmp_path, monkeypatch):
    """Change the schedule in its place, and read what the unchanged program wrote."""
    ddim("--sample", checkpoint, "--num-samples", "1", "--export-weights", tmp_path / "w", flags=ddim.device)
    shutil.copytree(tmp_path / "w" / "unet", tmp_path / "bare")  # without a scheduler: DDPM's
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", lambda: NoiseSchedule(beta_end=0.015))
    for path in (checkpoint, tmp_path / "w", tmp_path / "bare"):
        with pytest.raises(UserError, match=r"alphas_cumprod|betas"):
            load_checkpoint(path, "cpu")


@pytest.mark.parametrize(("factor", "is_refused"), [(1 + 1e-15, False), (1 + 1e-6, True)])
def test_a_schedule_may_differ_from_the_checkpoint_in_its_last_bits_only(checkpoint, monkeypatch, factor, is_refused):
    changed = NoiseSchedule()
    changed.alphas_cumprod *= factor
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", lambda: changed)
    with pytest.raises(UserError, match="alphas_cumprod") if is_refused else nullcontext():
        load_checkpoint(checkpoint, "cpu")


def test_a_setting_added_to_the_sampler_reaches_it_and_is_refused_by_reconstruction(ddim, checkpoint, monkeypatch):
    @dataclass
    class Extended(Config):
        clip: float = ddim_cifar.flag(ddim_cifar.SAMPLER, 0.0, "largest x_0")

    def with_clip(*rest, clip, **options):
        clips.append(clip)
        return sample(*rest, **options)

    clips, sample = [], ddim_cifar.ddim_sample
    monkeypatch.setattr(ddim_cifar, "Config", Extended)
    monkeypatch.setattr(ddim_cifar, "ddim_sample", with_clip)
    flags = ["--sample", checkpoint, "--clip", "0.5", "--num-samples", "1", "--sample-steps", "1"]
    assert ddim(*flags, flags=ddim.device).code == 0 and clips == [0.5]
    with pytest.raises(UserError, match="reconstruction"):
        settings(*flags, "--experiments", "reconstruction")


OF_OTHER_PROGRAMS = {"--local-dir", "--index-url", "--extra-index-url"} | {"--slow"}  # pip, pytest
OF_OTHER_PROGRAMS |= {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv-endpoint"}  # torchrun
OF_OTHER_PROGRAMS |= {"--gpu", "--fid", "--isc", "--kid", "--input1", "--input2"}  # fidelity


def test_the_commands_of_the_readme_are_understood_and_no_other_flag_is_named():
    readme = Path(ddim_cifar.__file__).with_name("README.md").read_text()
    found = re.findall(r"(?:python|=\d+) ddim_cifar\.py([^`\n|&;>]*)", readme.replace("\\\n", " "))
    assert len(found) >= 3
    for flags in found:
        ddim_cifar.make_parser().parse_args(shlex.split(re.sub(r"\$\w+", "1", flags), comments=True))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme))
    known = {option for action in ddim_cifar.make_parser()._actions for option in action.option_strings}
    assert named - known - OF_OTHER_PROGRAMS == set()
