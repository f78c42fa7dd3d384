"""Flags: which values they take, what they are by default, and what a run takes over from its checkpoint."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import ddim_cifar
from ddim_cifar import Config, UsageError, make_parser, parse_args

PAPER = {
    "predict": "eps",
    "t_sampling": "uniform",
    "optimizer": "adam",
    "lr": 2e-4,
    "warmup": 5000,
    "batch_size": 128,
    "dropout": 0.1,
    "ema_decay": 0.9999,
    "lr_decay": 0.0,
}


def settings(*flags):
    """The settings of a command line, as parse_args completes them."""
    return parse_args([str(flag) for flag in flags])[0]


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 0", "--epochs 0 at least 1"),
        ("--epochs two", "--epochs int two"),
        ("--lr 0", "--lr at least"),
        ("--lr nan", "--lr nan"),
        ("--lr inf", "--lr inf"),
        ("--eta 1.5", "--eta 1.5 0..1"),
        ("--eta -0.1", "--eta -0.1 0..1"),
        ("--dropout 1", "--dropout 0..0.99"),
        ("--save-minutes -1", "--save-minutes -1"),
        ("--warmup -1", "--warmup -1"),
        ("--seed -1", "--seed -1"),
        ("--batch-size 0", "--batch-size 0"),
        ("--timesteps 1", "--timesteps 1 at least 2"),
        ("--channels 48", "--channels 48 32"),
        ("--channel-mults 1 x", "--channel-mults x"),
        ("--channel-mults 1 0", "--channel-mults 0"),
        ("--channel-mults 1 1 1 1 1 1 1", "--channel-mults halved"),
        ("--attn-resolutions 5", "--attn-resolutions 5 32 16 8 4"),
        ("--tau cubic", "--tau cubic quadratic"),
        ("--order 3", "--order 3"),
        ("--predict x", "--predict v eps"),
        ("--optimizer sgd", "--optimizer muon adam"),
        ("--recipe mine", "--recipe mine paper"),
        ("--device tpu", "--device tpu"),
        ("--epoch 3", "--epoch"),
        ("--min-snr 5", "--min-snr"),
        ("--sample-steps 0", "--sample-steps 0"),
        ("--sample-steps 1001", "--sample-steps 1001 1..1000"),
        ("--sample-steps 1001 50 --consistency", "--sample-steps 1001 1..1000"),
        ("--reconstruct --timesteps 60", "--sample-steps 100 1..60"),
        ("--beta-start 0.5", "--beta-start 0.5 --beta-end"),
        ("--beta-start 0.5 --beta-end 0.9", "--beta-end 0.9 1000 --timesteps"),
        ("--order 2 --eta 0.5", "--order --eta"),
        ("--reconstruct --eta 1", "--reconstruct --eta"),
        ("--consistency --eta 1", "--consistency --eta"),
        ("--reconstruct --order 2", "--reconstruct --order"),
        ("--reconstruct --clip-x0", "--reconstruct --clip-x0"),
        ("--export-weights w --channel-mults 2 2", "--export-weights --channel-mults 1"),
        ("--sample x.pth --epochs 3", "--sample --epochs"),
        ("--sample x.pth --recipe paper", "--sample --recipe"),
        ("--sample x.pth --resume x.pth", "--sample --resume"),
        ("--resume ''", "--resume name of a file"),
        ("--sample ''", "--sample name of a file"),
        ("--export ''", "--export name of a file"),
        ("--export . --out-dir .", "--export --out-dir"),
        ("--channels 3200000000", "--channels 4096"),
    ],
)
def test_a_wrong_flag_is_explained_in_the_last_line(ddim, flags, words):
    result = ddim(*shlex.split(flags), flags=[])
    usage, error = result.err.splitlines()
    assert result.code == 2 and usage.startswith("usage: ddim_cifar.py")
    assert all(word in error for word in words.split()), result.err


@pytest.mark.parametrize(
    "flags",
    [
        "--warmup 0 --save-minutes 0 --seed 0 --ema-decay 0 --lr-decay 0 --dropout 0",
        "--ema-decay 1 --lr-decay 1 --dropout 0.99 --eta 1",
        "--attn-resolutions",
        "--attn-resolutions 32 16 8 4",
        "--channel-mults 1 1 1 1 1 1",
        "--timesteps 2 --sample-steps 2",
        "--sample-steps 1",
        "--sample-steps 1000 50 --consistency",
        "--order 2 --eta 0",
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
        flag = f" --{setting.name.replace('_', '-')} "
        assert text.count(flag) >= 1, flag
    for default in ("[32]", "[0.0025 with muon, 0.0002 with adam]", "[quadratic]", "[1 2 2 2]", "[cifar10]", "S [50]"):
        assert default in text


def test_without_flags_the_defaults_are_those_of_config():
    config = settings()
    assert config == Config() and config.total == 1 and config.steps == 50
    assert config.compared_steps == (10, 20, 50, 100)


@pytest.mark.parametrize(
    "flags, lr",
    [
        ("", 2.5e-3),
        ("--optimizer muon", 2.5e-3),
        ("--optimizer adam", 2e-4),
        ("--optimizer adam --lr 0.01", 0.01),
        ("--lr 0.01", 0.01),
        ("--recipe paper", 2e-4),
    ],
)
def test_the_default_rate_follows_the_optimizer(flags, lr):
    assert settings(*flags.split()).lr == lr


@pytest.mark.parametrize(
    "flags, t_sampling",
    [
        ("", "importance"),
        ("--predict eps", "uniform"),
        ("--t-sampling uniform", "uniform"),
        ("--predict eps --t-sampling importance", "importance"),
        ("--recipe paper --predict v", "uniform"),
    ],
)
def test_how_t_is_drawn_follows_what_is_predicted(flags, t_sampling):
    assert settings(*flags.split()).t_sampling == t_sampling


def test_the_recipe_of_the_paper_is_that_of_ddpm():
    config = settings("--recipe", "paper")
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    rest = [setting.name for setting in fields(Config) if setting.name not in {*PAPER, "recipe"}]
    assert all(getattr(config, name) == getattr(Config(), name) for name in rest)


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--predict v", "predict", "v"),
        ("--lr 1e-3", "lr", 1e-3),
        ("--warmup 0", "warmup", 0),
        ("--batch-size 64", "batch_size", 64),
        ("--dropout 0", "dropout", 0.0),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_flag_typed_beside_the_recipe_wins(flags, name, value, before):
    recipe = ["--recipe", "paper"]
    config = settings(*flags.split(), *recipe) if before else settings(*recipe, *flags.split())
    wanted = {**PAPER, name: value}
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_another_optimizer_beside_the_recipe_brings_its_own_rate():
    config = settings("--recipe", "paper", "--optimizer", "muon")
    assert (config.optimizer, config.lr, config.warmup) == ("muon", 2.5e-3, PAPER["warmup"])


def test_of_several_step_counts_the_last_draws_and_all_are_compared():
    config = settings("--sample-steps", "5", "10", "20")
    assert config.steps == 20 and config.compared_steps == (5, 10, 20)


@pytest.mark.parametrize("flags", ["--dataset cifar10", "--dataset synthetic", "--epochs 2", "--iterations 2"])
def test_only_the_command_without_data_set_or_length_is_the_quick_test(flags, checkpoint):
    assert settings().quick_test and settings("--seed", "1").quick_test
    assert not settings(*flags.split()).quick_test
    assert not settings("--sample", checkpoint).quick_test


# ---- From a checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unusual(checkpoint, load, tmp_path_factory):
    """A checkpoint with settings other than the defaults wherever its network allows, and those settings."""
    others = {
        "epochs": 7,
        "iterations": 3,
        "lr": 0.005,
        "warmup": 2,
        "lr_decay": 0.5,
        "grad_clip": 2.0,
        "ema_decay": 0.99,
        "save_every": 3,
        "save_minutes": 1.0,
        "data_dir": "/data",
        "dropout": 0.2,
        "timesteps": 500,
        "beta_start": 2e-4,
        "beta_end": 0.03,
        "num_samples": 4,
        "sample_steps": (3, 4),
        "tau": "karras",
        "order": 2,
        "clip_x0": True,
        "no_ema": True,
        "sample_batch_size": 8,
        "trajectory": True,
        "interpolate": True,
        "reconstruct": True,
        "consistency": True,
        "device": "cuda",
        "precision": "bf16",
        "compile": "on",
        "seed": 5,
        "resume": "before.pth",
        "export": "a.npz",
        "export_weights": "w",
        "out_dir": "/elsewhere",
    }
    whole = load(checkpoint)
    config = {**whole["config"], **others}
    path = tmp_path_factory.mktemp("unusual") / "x.pth"
    torch.save({**whole, "config": config}, path)
    return path, config


OF_THE_NETWORK = {"channels", "channel_mults", "res_blocks", "attn_resolutions", "dropout", "predict"}
OF_THE_SCHEDULE = {"timesteps", "beta_start", "beta_end"}
OF_THE_DATA = {"dataset", "data_dir"}
NOT_RESUMED = {"trajectory", "interpolate", "reconstruct", "consistency", "export", "export_weights"}
NOT_RESUMED |= {"device", "resume", "sample", "out_dir", "clip_x0", "no_ema"}


def test_a_resumed_run_goes_on_with_its_settings_but_repeats_no_experiment_and_overwrites_no_export(unusual):
    path, saved = unusual
    config = settings("--resume", path)
    for name in saved.keys() - NOT_RESUMED:
        assert getattr(config, name) == saved[name], name
    for name in NOT_RESUMED - {"resume"}:
        assert getattr(config, name) == getattr(Config(), name), name
    assert config.resume == str(path)


def test_sampling_takes_network_schedule_and_data_set_from_the_checkpoint_and_nothing_else(unusual):
    path, saved = unusual
    config = settings("--sample", path)
    taken = OF_THE_NETWORK | OF_THE_SCHEDULE | OF_THE_DATA
    for name in taken:
        assert getattr(config, name) == saved[name], name
    for name in saved.keys() - taken - {"sample"}:
        assert getattr(config, name) == getattr(Config(), name), name


def test_what_is_typed_on_resume_is_used(unusual):
    path, _ = unusual
    typed = "--epochs 9 --lr 1e-4 --warmup 4 --order 1 --num-samples 2 --sample-steps 6 --precision fp32"
    config = settings("--resume", path, *typed.split())
    assert (config.epochs, config.lr, config.warmup, config.order) == (9, 1e-4, 4, 1)
    assert (config.num_samples, config.sample_steps, config.precision) == (2, (6,), "fp32")


def test_settings_that_fit_alone_but_not_beside_those_of_the_checkpoint_are_explained(unusual):
    path, _ = unusual  # of order 2
    with pytest.raises(UsageError, match=r"--order 2.*--eta 0\.5"):
        parse_args(["--resume", str(path), "--eta", "0.5"])
    with pytest.raises(UsageError, match=r"--sample-steps 501.*1\.\.500"):
        parse_args(["--sample", str(path), "--sample-steps", "501"])


def test_a_resumed_run_keeps_its_rate_unless_another_is_typed_which_then_moves_the_weights(
    ddim, tmp_path, checkpoint, load, read_log
):
    before, moved = load(checkpoint)["model"]["conv_in.bias"], []  # Adam's: it moves by about the rate in each step
    for typed, lr in (([], 2e-3), (["--lr", "1e-5"], 1e-5)):
        flags = ["--resume", checkpoint, "--epochs", "21", "--iterations", "1", "--num-samples", "1", *typed]
        ddim(*flags, flags=ddim.device, out_dir=tmp_path / str(lr))
        assert [float(row["lr"]) for row in read_log(tmp_path / str(lr))] == [lr]
        after = tmp_path / str(lr) / "ddim_model_final.pth"
        assert settings("--resume", after).lr == lr
        moved.append((load(after)["model"]["conv_in.bias"] - before).abs().mean())
    assert moved[0] > 20 * moved[1] > 0


def test_the_paper_s_recipe_is_resumed_without_repeating_its_flag(ddim, tmp_path, load):
    assert ddim("--recipe", "paper", "--lr", "1e-3", "--num-samples", "1").code == 0
    final = tmp_path / "ddim_model_final.pth"
    for flags in ([], ["--recipe", "paper"]):
        config = settings("--resume", final, "--epochs", "2", *flags)
        wanted = {**PAPER, "recipe": "paper", "batch_size": 4, "lr": 1e-3}
        assert {name: getattr(config, name) for name in wanted} == wanted
    assert all(set(moments) == {"step", "exp_avg", "exp_avg_sq"} for moments in load(final)["optimizer"].values())


CONTRADICTIONS = [
    ("--channels", "32", "64"),
    ("--channel-mults", "1 2", "1 4"),
    ("--attn-resolutions", "16", "16 32"),
    ("--dropout", "0.0", "0.2"),
    ("--timesteps", "1000", "500"),
    ("--beta-end", "0.02", "0.01"),
    ("--predict", "v", "eps"),
    ("--t-sampling", "importance", "uniform"),
    ("--optimizer", "muon", "adam"),
    ("--recipe", "default", "paper"),
    ("--batch-size", "4", "8"),
    ("--dataset", "folder", "cifar10"),
    ("--seed", "0", "1"),
]
OF_TRAINING_ONLY = ("--t-sampling", "--optimizer", "--recipe", "--batch-size", "--dataset", "--seed")


@pytest.mark.parametrize(
    "mode, flag, its, typed",
    [("--resume", *case) for case in CONTRADICTIONS]
    + [("--sample", *case) for case in CONTRADICTIONS if case[0] not in OF_TRAINING_ONLY],
)
def test_a_flag_that_contradicts_the_checkpoint_names_both_values(checkpoint, mode, flag, its, typed):
    with pytest.raises(UsageError) as caught:
        settings(mode, checkpoint, flag, *typed.split())
    assert f"{flag} {typed} contradicts {its}, which {checkpoint}" in str(caught.value)


def test_a_checkpoint_older_than_t_sampling_drew_t_uniformly(checkpoint, load, tmp_path):
    saved = load(checkpoint)
    del saved["config"]["t_sampling"]
    torch.save(saved, tmp_path / "older.pth")
    assert settings("--resume", tmp_path / "older.pth").t_sampling == "uniform"
    with pytest.raises(UsageError, match="--t-sampling importance contradicts uniform"):
        settings("--resume", tmp_path / "older.pth", "--t-sampling", "importance")


def test_to_repeat_the_values_of_the_checkpoint_is_no_contradiction(checkpoint):
    repeated = [word for flag, its, _ in CONTRADICTIONS for word in (flag, *its.split())]
    assert settings("--resume", checkpoint, *repeated) == settings("--resume", checkpoint)


def test_sampling_may_use_another_seed_and_other_images_than_training(checkpoint):
    config = settings("--sample", checkpoint, "--seed", "1", "--dataset", "cifar10", "--data-dir", "elsewhere")
    assert (config.seed, config.dataset, config.data_dir) == (1, "cifar10", "elsewhere")


def test_published_weights_have_no_weights_beside_their_average(ddim, checkpoint, load, tmp_path):
    torch.save(load(checkpoint)["ema"], tmp_path / "published.bin")
    result = ddim("--sample", tmp_path / "published.bin", "--no-ema", flags=[])
    assert result.code == 2 and "--no-ema" in result.err.splitlines()[-1]


# ---- The README ------------------------------------------------------------------------------------------------------

OF_OTHER_PROGRAMS = {"--index-url", "--extra-index-url"} | {"--slow"}  # pip, pytest
OF_OTHER_PROGRAMS |= {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv-endpoint"}  # torchrun
OF_OTHER_PROGRAMS |= {"--gpu", "--fid", "--isc", "--kid", "--input1", "--input2"}  # fidelity


@pytest.fixture(scope="module")
def readme():
    return Path(ddim_cifar.__file__).with_name("README.md").read_text()


def commands_in(text):
    """The flags of every call of ddim_cifar.py in code blocks, indented or fenced."""
    fenced, lines = False, []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    for line in lines:
        for call in re.findall(r"\bddim_cifar\.py\b(.*)", line):
            words = shlex.split(call, comments=True)
            ends = [i for i, word in enumerate(words) if word in ("&&", "||", "|", "&", ";", ">", "2>")]
            yield [word.rstrip(";") for word in words[: min(ends, default=len(words))]]


def test_the_commands_of_the_readme_are_understood(readme):
    found = list(commands_in(readme))
    assert len(found) >= 3  # it is the README that was read
    for flags in found:
        if "--help" not in flags:
            make_parser().parse_args(flags)


def test_the_readme_names_no_flag_that_does_not_exist(readme):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme))
    known = {option for action in make_parser()._actions for option in action.option_strings}
    assert named - known - OF_OTHER_PROGRAMS == set()


@pytest.mark.parametrize(
    "has, precision, unit",
    [({}, "fp32", None), ({"amx_bf16": True}, "bf16", "amx_bf16"), ({"avx512_bf16": True}, "bf16", "avx512_bf16")],
)
def test_bf16_is_chosen_where_the_processor_is_fast_at_it_and_a_resumed_run_keeps_its_own(
    monkeypatch, capsys, has, precision, unit
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    config = Config(device="cpu")
    runtime = ddim_cifar.start(config, None)
    assert (runtime.precision, config.precision, runtime.unit) == (precision, precision, unit)
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]
    runtime = ddim_cifar.start(Config(device="cpu", precision=other, resume="x.pth"), None)
    assert runtime.precision == other and f"--precision {precision} would be faster here" in capsys.readouterr().out


def test_sampling_has_its_own_steps_and_needs_no_batch_that_divides(checkpoint, load, tmp_path, monkeypatch):
    whole = load(checkpoint)
    torch.save({**whole, "config": {**whole["config"], "timesteps": 20}}, tmp_path / "short.pth")
    assert settings("--sample", tmp_path / "short.pth", "--sample-steps", "10").steps == 10
    with pytest.raises(UsageError, match=r"--sample-steps 50: must be in 1..20"):
        settings("--sample", tmp_path / "short.pth")
    monkeypatch.setattr(ddim_cifar.world, "size", 3)
    assert settings("--sample", checkpoint).batch_size == 32


def test_a_schedule_that_is_not_linear_is_refused_not_misread(ddim, checkpoint, tmp_path):
    ddim("--sample", checkpoint, "--num-samples", "1", "--export-weights", tmp_path / "w", flags=ddim.device)
    file = tmp_path / "w" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"linear"', '"squaredcos_cap_v2"'))
    result = ddim("--sample", tmp_path / "w", flags=ddim.device)
    assert result.code == 2 and "beta_schedule squaredcos_cap_v2" in result.err and len(result.err.splitlines()) == 1
