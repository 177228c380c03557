"""The pages that people read: their links, options, commands and messages are true."""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from fibldm.synthesis import Sampling

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
CODE = sorted(
    path
    for pattern in ("*.py", "fibldm/*.py", "scripts/*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
)
SHELL = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*")])

# Options of programs that are not ours: sbatch, scancel, torchrun, docker, tensorboard, pytest.
FOREIGN = {
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--standalone"),
    *("--nproc_per_node", "--shutdown-timeout", "--shm-size", "--logdir", "--chaos"),
}
# What stopped new readers, and words that are ours alone: (what, where it is looked for).
PRIVATE = [
    *("it is said", "is said, and so", "times the room", "rules until", "has room for is noise"),
    *("patients that it has seen", "meet by a name", "best guess is a blur"),
]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(page: Path) -> list[str]:
    """A page's code blocks, indented or fenced."""
    found, block, fenced = [], [], False
    for line in [*page.read_text("utf-8").splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            block.append(line if fenced else line[4:])
            continue
        if block and (line.strip() or not fenced):
            found.append("\n".join(block))
            block = []
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    names: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", title.strip().lower())
        names.add(plain.replace(" ", "-"))
    return names


@functools.cache
def messages() -> list[str]:
    """All texts in the code; NUL stands where something is formatted into them."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("\n", " ") for text in found]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command in the pages' code blocks, variables put in."""
    found = []
    for page in PAGES:
        variables: dict[str, str] = {}
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)
                words = shlex.split(line, comments=True)
                for word in words:
                    if (assigned := re.fullmatch(r"(\w+)=(.*)", word)) is None:
                        break
                    variables[assigned[1]] = assigned[2]
                while words and re.match(r"\w+=", words[0]):
                    words = words[1:]
                if words and "..." not in words:
                    found.append((str(page.relative_to(ROOT)), words))
    return found


def parse(script: str, options: list[str]) -> None:
    """Let a script's own parser read the options."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        module.parse_args(options)
    except SystemExit as end:
        assert end.code == 0, f"{script} {' '.join(options)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_pages_name_only_files_that_exist(page):
    for name in re.findall(r"\b[a-z]\w*\.(?:py|sh|sbatch)\b", page.read_text("utf-8")):
        assert list(ROOT.rglob(name)), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_pages_name_only_options_that_exist(page):
    code = "\n".join(path.read_text("utf-8") for path in [*CODE, *SHELL])
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) | FOREIGN
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text("utf-8")))
    assert named - known == set()


def test_pages_that_are_read_at_one_sitting():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    assert len((ROOT / "benchmarks" / "README.md").read_text("utf-8").splitlines()) <= 200


def test_every_page_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in readme


def test_the_five_commands_stand_in_the_readme():
    text = " ".join((ROOT / "README.md").read_text("utf-8").replace("\\\n", " ").split())
    for command in (
        "./scripts/train_vae.sh",
        "python encode_dataset.py --csv_file ./data/label.csv --img_dir ./data/ --vae_checkpoint "
        "./vae_run_1/vae_best.pth --output_dir ./data/latents_dataset",
        "python train_ldm_unet.py --latent_data_dir ./data/latents_dataset --vae_checkpoint "
        "./vae_run_1/vae_best.pth --save_dir ./model_runs/ldm_unet_run_1 --latent_dim 8 "
        "--latent_size 16",
        "python train_controlnet.py --data_path ./data --csv_path label.csv --vae_checkpoint "
        "./vae_run_1/vae_best.pth --unet_checkpoint ./model_runs/ldm_unet_run_1/unet_best.pth "
        "--save_dir ./model_runs/controlnet_run_1 --latent_dim 8 --latent_size 16 "
        "--contour_channels 1",
        "python sample.py ",
    ):
        assert command in text


PYTHON = [(page, words) for page, words in commands() if words[0] == "python"]
LAUNCHED = [(page, words) for page, words in commands() if words[0].startswith("./scripts/")]


@pytest.mark.parametrize("page, words", PYTHON, ids=[" ".join(w)[:60] for _, w in PYTHON])
def test_commands_parse(page, words, tmp_path):
    script = words[1]
    if "--config" in words:  # a run's args.json, which is read while the options are
        words[words.index("--config") + 1] = str(tmp_path / "args.json")
        (tmp_path / "args.json").write_text("{}")
    if not script.startswith(("-", "benchmarks/")):  # python -m; parsers that look for the data
        assert (ROOT / script).is_file(), page
        parse(script, words[2:])


@pytest.mark.parametrize("page, words", LAUNCHED, ids=[" ".join(w)[:60] for _, w in LAUNCHED])
def test_launchers_commands_parse(page, words, tmp_path):
    for name in "torchrun", "python":  # what the launcher would start is printed
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *words], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    script, *options = done.stdout.splitlines()
    parse(script, options)


def test_the_defaults_of_sampling_are_those_that_the_page_and_the_launcher_say():
    page, launcher = (ROOT / f for f in ("docs/sampling.md", "scripts/sample.sh"))
    default = Sampling()
    assert f"`--sampler {default.sampler}`, the default" in page.read_text()
    assert f"{default.guidance_scale:g}, the default" in page.read_text()
    assert f"\nSAMPLER={default.sampler} " in launcher.read_text()
    assert f"\nGUIDANCE_SCALE={default.guidance_scale:g} " in launcher.read_text()


def test_messages_in_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]+)`", page, flags=re.M)
    assert len(rows) > 40
    for row in rows:
        parts = [re.escape(part) for part in re.split(r"\s*\.\.\.\s*", row)]
        pattern = re.compile(".*".join(parts))
        assert any(pattern.search(text) for text in messages()), row


def test_architecture_lists_the_modules_of_the_package():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, flags=re.M)
    listed = [name for row in rows for name in re.findall(r"\w+", row)]
    modules = {path.stem for path in (ROOT / "fibldm").glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("phrase", PRIVATE)
def test_sentences_that_stopped_readers_are_gone(phrase):
    files = [*PAGES, *CODE, *SHELL]
    assert [str(p) for p in files if phrase in " ".join(p.read_text("utf-8").split())] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_baseline_has_its_name(page):
    assert re.search(r"\bfloors?\b", page.read_text("utf-8")) is None


def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["title"] and cff["message"]
    assert [author["name"] for author in cff["authors"]] == ["The FibLDM developers"]
    assert "The FibLDM developers" in (ROOT / "LICENSE").read_text("utf-8")
