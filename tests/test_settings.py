"""Flags: which values they take, what they are by default, and what a run takes over from its checkpoint."""

import math
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import ddim_cifar
from ddim_cifar import (
    RUNTIME,
    SAMPLING,
    Config,
    NoiseSchedule,
    Runtime,
    UserError,
    load_checkpoint,
    make_parser,
    parse_args,
)

PAPER = {"predict": "eps", "optimizer": "adam", "lr": 2e-4, "warmup": 5000, "batch_size": 128, "dropout": 0.1}
PAPER |= {"ema_decay": 0.9999, "lr_decay": 0.0}


def settings(*flags):
    """Return the settings of a command line, as parse_args completes them."""
    return parse_args([str(flag) for flag in flags])[0]


def values_of(config, names):
    return {name: getattr(config, name) for name in names}


# ---- Values ----------------------------------------------------------------------------------------------------------

WRONG = """
--epochs 0 | --epochs 0 at least 1
--epochs two | --epochs int two
--lr 0 | --lr at least
--lr nan | --lr nan
--eta 1.5 | --eta 1.5 0..1
--dropout 1 | --dropout 0..0.99
--save-minutes -1 | --save-minutes -1
--micro-batch 0 | --micro-batch 0
--channels 48 | --channels 48 32
--channels 3200000000 | --channels 4096
--channel-mults 1 x | --channel-mults x
--channel-mults 1 0 | --channel-mults 0
--channel-mults 1 1 1 1 1 1 1 | --channel-mults halved
--attn-resolutions 5 | --attn-resolutions 5 32 16 8 4
--tau cubic | --tau cubic quadratic
--predict x | --predict v eps
--recipe mine | --recipe mine paper
--experiments dreams | --experiments dreams trajectory
--device tpu | --device tpu
--epoch 3 | --epoch
--clip-x0 | --clip-x0
--sample-steps 0 | --sample-steps 0
--sample-steps 1001 50 --experiments consistency | --sample-steps 1001 1000
--order 2 --eta 0.5 | --order --eta
--experiments reconstruction --eta 1 | reconstruction --eta
--experiments reconstruction --order 2 | reconstruction --order
--export x.zip | --export x.zip .npz
--export-weights w --channel-mults 2 2 | --export-weights
--export-weights w.bin | --export-weights w.bin .pth
--sample x.pth --epochs 3 | --sample --epochs
--sample x.pth --resume x.pth | --sample --resume
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_flag_is_explained_in_the_last_line(ddim, case):
    flags, words = case.split(" | ")
    result = ddim(*flags.split(), flags=[])
    *usage, error = result.err.splitlines()
    assert result.code == 2 and error.startswith("ddim_cifar.py: error: "), result.err
    assert not any("error" in line for line in usage) and all(word in error for word in words.split()), result.err


@pytest.mark.parametrize(
    "flags",
    [
        "--warmup 0 --save-minutes 0 --seed 0 --ema-decay 0 --lr-decay 0 --dropout 0",
        "--ema-decay 1 --lr-decay 1 --dropout 0.99 --eta 1",
        "--attn-resolutions",
        "--attn-resolutions 32 16 8 4",
        "--channel-mults 1 1 1 1 1 1",
        "--sample-steps 1",
        "--sample-steps 1000 50 --experiments consistency trajectory interpolation reconstruction",
        "--order 2 --eta 0",
        "--export-weights x.pth --channel-mults 2 2",
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(flags):
    settings(*flags.split())


# ---- Defaults --------------------------------------------------------------------------------------------------------


def test_help_fits_two_screens_and_shows_every_flag_with_its_default(ddim):
    result = ddim("--help", flags=[])
    assert result.code == 0 and not result.err and len(result.out.splitlines()) < 110
    text = " ".join(result.out.split())
    for setting in fields(Config):
        assert f" --{setting.name.replace('_', '-')} " in text, setting.name
    for default in ("[32]", "[0.0025 for muon, 0.0002 for adam]", "[quadratic]", "[1 2 2 2]", "[cifar10]", "[50]"):
        assert default in text


def test_without_flags_the_defaults_are_those_of_config_and_a_quick_test_draws_in_few_steps():
    config = settings()
    assert config == Config() and config.total == 1 and config.compared_steps == (10, 20, 50, 100)
    assert config.steps == 10 and settings("--epochs", "2").steps == 50
    several = settings("--sample-steps", "5", "10", "20")
    assert several.steps == 20 and several.compared_steps == (5, 10, 20)


def test_the_default_rate_follows_the_optimizer():
    rates = {"--optimizer muon": 2.5e-3, "--optimizer adam": 2e-4, "--optimizer adam --lr 0.01": 0.01}
    rates |= {"--recipe paper": 2e-4, "--recipe paper --optimizer muon": 2.5e-3}
    assert {flags: settings(*flags.split()).lr for flags in rates} == rates


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
    config = Config(device="cpu")
    assert ddim_cifar.start(config) == Runtime(torch.device("cpu"), precision, "auto")
    assert config.precision == precision  # and so it stands in the checkpoint
    assert ddim_cifar.start(Config(device="cpu", precision="bf16")).precision == "bf16"


# ---- From a checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unusual(checkpoint, load, tmp_path_factory):
    """Write a checkpoint with other settings than the defaults, as far as its network allows: its path, and them."""
    others = {"epochs": 7, "iterations": 3, "lr": 0.005, "warmup": 2, "lr_decay": 0.25, "ema_decay": 0.99}
    others |= {"save_every": 3, "save_minutes": 1.0, "dropout": 0.2, "num_samples": 4, "sample_steps": (3, 4)}
    others |= {"tau": "uniform", "order": 2, "no_ema": True, "experiments": ("trajectory",), "device": "cuda"}
    others |= {"precision": "bf16", "compile": "on", "micro_batch": 8, "seed": 5, "recipe": "paper"}
    others |= {
        "data_dir": "/data",
        "resume": "before.pth",
        "export": "a.npz",
        "export_weights": "w",
        "out_dir": "/elsewhere",
    }
    whole, path = load(checkpoint), tmp_path_factory.mktemp("unusual") / "x.pth"
    config = {**whole["config"], **others}
    torch.save({**whole, "config": config}, path)
    return path, config


OF_THE_NETWORK = {"channels", "channel_mults", "res_blocks", "attn_resolutions", "predict"}
NOT_RESUMED = {"experiments", "export", "export_weights", "device", "no_ema", "resume", "sample", "out_dir"}


def test_a_resumed_run_goes_on_with_its_settings_but_repeats_no_experiment_and_overwrites_no_export(unusual):
    path, saved = unusual
    config, taken = settings("--resume", path), saved.keys() - NOT_RESUMED
    assert values_of(config, taken) == {name: saved[name] for name in taken}
    others = NOT_RESUMED - {"resume", "out_dir"}
    assert values_of(config, others) == values_of(Config(), others)
    assert config.folder == path.parent and settings("--resume", path, "--recipe", "paper") == config


def test_sampling_takes_network_and_data_set_from_the_checkpoint_but_nothing_about_sampling(unusual):
    path, saved = unusual
    config, taken = settings("--sample", path), OF_THE_NETWORK | {"dataset", "data_dir"}
    assert values_of(config, taken) == {name: saved[name] for name in taken}
    others = {*Config.names(SAMPLING, RUNTIME)} | {"resume", "export", "export_weights"}
    assert values_of(config, others) == values_of(Config(), others)
    assert config.folder == path.parent and config.steps == 50


def test_what_is_typed_on_resume_is_used(unusual, tmp_path):
    path, _ = unusual
    typed = (
        "--epochs 9 --lr 1e-4 --warmup 4 --order 1 --num-samples 2 --sample-steps 6 --precision fp32 --micro-batch 2"
    )
    config = settings("--resume", path, *typed.split(), "--out-dir", tmp_path)
    assert (config.epochs, config.lr, config.warmup, config.order, config.micro_batch) == (9, 1e-4, 4, 1, 2)
    assert (config.num_samples, config.sample_steps, config.precision) == (2, (6,), "fp32")
    assert config.folder == tmp_path.resolve()
    with pytest.raises(UserError, match=r"--order 2.*--eta 0"):  # that of the checkpoint
        settings("--resume", path, "--eta", "0.5")


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
    text = str(caught.value)
    assert (
        text.startswith(f"{flag} {typed} ") and str(checkpoint) in text and its.replace("FOLDER", ddim.images) in text
    )


def test_to_repeat_the_values_of_the_checkpoint_is_no_contradiction(ddim, checkpoint):
    repeated = [word for flag, its, _ in CONTRADICTIONS for word in (flag, *its.split())]
    repeated[repeated.index("FOLDER")] = ddim.images
    assert settings("--resume", checkpoint, *repeated) == settings("--resume", checkpoint)


def test_sampling_may_use_another_seed_and_other_images_and_needs_no_batch_that_divides(checkpoint, monkeypatch):
    monkeypatch.setattr(ddim_cifar.world, "size", 3)
    config = settings("--sample", checkpoint, "--seed", "1", "--dataset", "cifar10", "--data-dir", "elsewhere")
    assert (config.seed, config.dataset, config.data_dir) == (1, "cifar10", "elsewhere")


# ---- A noise schedule of one's own -----------------------------------------------------------------------------------


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
    monkeypatch.setattr(ddim_cifar, "NoiseSchedule", lambda: NoiseSchedule(beta_end=0.015))
    for path in (checkpoint, tmp_path / "w"):
        with pytest.raises(UserError, match=r"alphas_cumprod|betas"):
            load_checkpoint(path, "cpu")


# ---- The README ------------------------------------------------------------------------------------------------------

OF_OTHER_PROGRAMS = {"--index-url", "--extra-index-url"} | {"--slow"}  # pip, pytest
OF_OTHER_PROGRAMS |= {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv-endpoint"}  # torchrun
OF_OTHER_PROGRAMS |= {"--gpu", "--fid", "--isc", "--kid", "--input1", "--input2"}  # fidelity


@pytest.fixture(scope="module")
def readme():
    path = Path(ddim_cifar.__file__).with_name("README.md")
    return path.read_text() if path.exists() else pytest.skip("there is no README beside the program")


def commands_in(text):
    """Yield the flags of every call of ddim_cifar.py in code blocks, indented or fenced."""
    fenced, lines = False, []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    for line in lines:
        for call in re.findall(r"\bddim_cifar\.py\b(.*)", line):
            words = shlex.split(re.sub(r"\$\w+", "1", call), comments=True)  # a variable of a loop
            ends = [i for i, word in enumerate(words) if word in ("&&", "||", "|", "&", ";", ">", "2>")]
            yield [word.rstrip(";") for word in words[: min(ends, default=len(words))]]


def test_the_commands_of_the_readme_are_understood_and_no_other_flag_is_named(readme):
    found = list(commands_in(readme))
    assert len(found) >= 3  # it is the README that was read
    for flags in found:
        if "--help" not in flags:
            make_parser().parse_args(flags)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme))
    known = {option for action in make_parser()._actions for option in action.option_strings}
    assert named - known - OF_OTHER_PROGRAMS == set()
