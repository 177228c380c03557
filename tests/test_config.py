"""Options from a file: the same checks as on the command line, which wins."""

import json
import re

import pytest

import encode_dataset
import sample
import train_controlnet
import train_ldm_unet
import train_vae
from fibldm import config
from fibldm.cli import duration, make_parser, positive
from fibldm.config import modernized, read_config

STAGES = [train_vae, encode_dataset, train_ldm_unet, train_controlnet, sample]
MODELS = {"vae_checkpoint": "vae_best.pth", "unet_checkpoint": "unet_best.pth"}


@pytest.fixture
def parse(tmp_path):
    """The options of a stage from a file with this text, or these values, and a command line."""

    def parsed(stage, content, *words, name="options.yaml"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return stage.parse_args(["--config", str(file), *words])

    return parsed


@pytest.fixture
def refused(parse, capsys):
    """What is said of such a file; it is refused with code 2."""

    def said(stage, content, *words, **more) -> str:
        with pytest.raises(SystemExit) as ended:
            parse(stage, content, *words, **more)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return said


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(parse):
    text = "lr: 1e-3\nsteps: 70  # few\nwindow: [-1200, 300]\ncompile: true\nseed: 3\n"
    args = parse(train_vae, text, "--steps", "9", "--lr=0.5")
    assert (args.lr, args.steps, args.window, args.seed) == (0.5, 9, [-1200.0, 300.0], 3)
    assert args.compile and args.batch_size == train_vae.parse_args([]).batch_size
    assert not hasattr(args, "config")


def test_values_of_yaml_are_what_they_would_be_on_the_command_line(parse):
    text = "time_limit: 2:00:00\nlr: 1e-3\nchannels: [16, 32]\nblocks: 2\nseed:\nsave_dir: no\n"
    args = parse(train_ldm_unet, text)
    assert (args.time_limit, args.lr, args.seed, args.save_dir) == (7200.0, 1e-3, 0, "no")
    assert (args.channels, args.blocks) == ([16, 32], [2, 2])


def test_a_list_may_be_empty_where_the_option_may_stand_alone(parse, refused):
    needed = {**MODELS, "unconditional": True}
    args = parse(sample, {**needed, "compare_labels": []})
    assert args.compare_labels == [] and parse(sample, needed).compare_labels is None
    assert "expected + values" in refused(sample, {**needed, "label": []})


def test_a_tab_and_a_byte_order_mark_do_no_harm(parse):
    assert parse(train_vae, '\ufeff{\n\t"steps": 7\n}', name="a.json").steps == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bach_size: 4", ["unknown option 'bach_size'", "did you mean batch_size?"]),
        ("zzz: 4", ["unknown option 'zzz'"]),
        ("config: other.yaml", ["unknown option 'config'"]),
        ("help: true", ["unknown option 'help'"]),
        ("steps: 1.5", ["steps: found '1.5'", "a whole number of at least 1"]),
        ("steps: true", ["steps: found 'true'"]),
        ("steps: [1, 2]", ["steps: found ['1', '2']", "expected one value"]),
        ("steps: {a: 1}", ["steps: found {'a': '1'}"]),
        ("lr: nan", ["lr: found 'nan'", "a number above 0"]),
        ("precision: fp64", ["precision: found 'fp64'", "one of auto, fp32, bf16, fp16"]),
        ("window: [1]", ["window: found ['1']", "expected 2 values"]),
        ("window: 1", ["window: found '1'", "expected 2 values"]),
        ("window: [400, -1000]", ["window: found", "expected LOW below HIGH"]),
        ("balance_labels: [a=1, b=1]", ["balance_labels: found", "sum to 2"]),
        ("balance_labels: true", ["balance_labels: found", "expected NAME=WEIGHT"]),
        ("window: [[1], 2]", ["window: found"]),
        ("compile: 1", ["compile: found '1'", "expected true or false"]),
        ("val_fraction: 0.5\ntest_fraction: 0.5", ["--val_fraction 0.5 and --test_fraction 0.5"]),
        ("- steps", ["found ['- steps']".replace("- ", ""), "expected option: value"]),
        ("", ["found None", "expected option: value"]),
        ("a: [", ["expected JSON or YAML"]),
        ("!!python/object/apply:os.getcwd []", ["expected"]),
        ("[" * 5000, ["expected JSON or YAML"]),
    ],
)
def test_what_is_wrong_is_refused_with_file_and_option(refused, text, words):
    said = refused(train_vae, text)
    for word in [*words, ""]:
        assert word in said
    assert "options.yaml" in said or "--val_fraction" in said


def test_values_of_json_are_checked_too(refused):
    wrong = {"steps": True, "lr": float("nan"), "window": [None, 3], "img_dir": ["a"], "seed": {}}
    for name, value in wrong.items():
        assert f"{name}: found" in refused(train_vae, {name: value}, name="a.json")


def test_a_file_that_cannot_be_read_is_refused(refused, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "CONFIG_BYTES", 20)
    assert "larger than 20 bytes" in refused(train_vae, "steps: 7" + " " * 20)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, words in (
        ("binary.yaml", "JSON or YAML"),
        ("no.yaml", "No such file"),
        (".", "Is a"),
    ):
        with pytest.raises(SystemExit):
            train_vae.parse_args(["--config", str(tmp_path / name)])
        assert words in capsys.readouterr().err


def test_references_that_multiply_take_no_time(refused):
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "unknown option" in refused(train_vae, "\n".join(["a0: &a0 [x]", *lines]))


def test_a_stage_says_what_is_missing_only_where_the_file_lacks_it(parse, refused):
    said = refused(sample, {"vae_checkpoint": "vae_best.pth"})
    assert "--unet_checkpoint" in said and "--vae_checkpoint" not in said.split("required")[-1]
    assert "one of the arguments --contours" in refused(sample, MODELS)
    assert parse(sample, {**MODELS, "contours": "mine"}).contours == "mine"
    assert parse(sample, {**MODELS, "unconditional": True}).unconditional


def test_of_options_that_exclude_each_other_the_command_line_wins(parse, refused):
    file = {**MODELS, "latent_data_dir": "latents", "contours": None, "unconditional": False}
    assert parse(sample, file).latent_data_dir == "latents"
    args = parse(sample, file, "--uncond")
    assert args.unconditional and args.latent_data_dir is None
    said = refused(sample, {**file, "contours": "mine"})
    assert "latent_data_dir and contours: expected one" in said


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_stage_takes_its_own_settings_again(stage, parse):
    words = ["--vae_checkpoint", "v", "--unet_checkpoint", "u", "--contours", "c", "--label", "a=1"]
    words = words if stage is sample else []
    if stage in (train_vae, train_ldm_unet, train_controlnet):
        assert parse(stage, {"balance_labels": []}).balance_labels == []
        words = ["--balance_labels", "b=0.5", "a=.5"]
    args = stage.parse_args(words)
    content = {**vars(args), "environment": {"command": "x"}}
    assert parse(stage, content, name="args.json") == args


def test_a_run_of_an_older_version_gives_its_options(parse):
    """Pixels, no schedule, seconds of a time limit; what it was not given is null."""
    old = {"max_shift": 8, "image_size": 64, "latent_size": 8, "lr": 0.01, "time_limit": 5400.0}
    old |= {"init_checkpoint": None, "environment": {"command": "train_vae.py"}}
    args = parse(train_vae, old, name="args.json")
    assert (args.max_shift, args.lr_schedule, args.time_limit) == (0.125, "constant", 5400.0)
    assert args.init_checkpoint is None


@pytest.mark.parametrize("seconds", [60.0, 90.0, 5400.0, 90061.0, 59.5])
def test_seconds_become_a_time_limit(seconds):
    text = modernized({"time_limit": seconds})["time_limit"]
    assert 0 <= duration(text) - seconds < 1


def test_what_is_no_option_of_a_run_is_left_out(tmp_path):
    (tmp_path / "args.json").write_text('{"steps": 3, "environment": {}, "samples_of": "abc"}')
    assert read_config(tmp_path / "args.json") == {"steps": 3}


def test_rarely_needed_options_come_last_in_help():
    for stage in STAGES:
        with pytest.raises(SystemExit):
            stage.parse_args(["--help"])
    parser = make_parser("It trains.", "  train")
    parser.rare.add_argument("--odd", type=positive, default=1)
    parser.add_argument_group("data").add_argument("--csv_file")
    text = parser.format_help()
    assert re.search(r"data:.*--csv_file FILE.*rarely needed:.*--odd ODD.*example:", text, re.S)


def test_the_default_blocks_and_the_same_given_are_one_run():
    """The README's command and the launcher, which names them, go on with each other's run."""
    assert train_ldm_unet.parse_args([]).blocks == [1, 1, 3]
    assert train_ldm_unet.parse_args(["--channels", "8", "16", "--blocks", "2"]).blocks == [2, 2]
    old = {"channels": [8, 16], "lr": 0.1}
    assert modernized({**old, "blocks": None})["blocks"] == [1, 3]
    assert modernized({**old, "blocks": [2]})["blocks"] == [2, 2]
