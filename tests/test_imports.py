"""The rules of the house, held by syntax trees: who imports whom, and what is never written."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {path.stem: path for path in (ROOT / "fibldm").glob("*.py") if path.stem != "__init__"}
STAGES = {path.stem: path for path in ROOT.glob("*.py")}
TOOLS = {f"scripts/{path.stem}": path for path in (ROOT / "scripts").glob("*.py")}
ALL = {**PACKAGE, **STAGES, **TOOLS}

# The wings of the house, by what they know.
MODELS = {"layers", "vae", "unet", "controlnet", "scheduler", "samplers", "texture", "optim"}
DATA = {
    *("ct", "lungs", "phantom", "arrays", "decoders", "dicom", "pictures", "volumes", "export"),
    *("files", "headers", "series", "scans", "slices", "patients", "records", "preparation"),
    *("fields", "spine", "ribs", "anatomy", "likeness", "findings", "inspection", "panels"),
    *("tables", "datasets", "encoding", "limits", "disk"),
}
TRAINING = {
    *(
        "cli",
        "config",
        "balance",
        "batches",
        "run",
        "journal",
        "distributed",
        "checkpoint",
        "validation",
    ),
    *("guard", "reconstruction", "tracking"),
}
JUDGEMENT = {
    *("features", "distances", "verdicts", "weights", "metrics", "disease", "privacy", "samples"),
    *("comparison", "measurement", "evaluation", "report"),
}
SYNTHESIS = {"conditions", "synthesis"}
BUFFERS = {"latent_shift", "latent_gain", "usage"}  # of PyTorch and of argparse

# What a module of the package may import from it, at most; a module not named here is free.
MAY_IMPORT = {
    "layers": set(),
    "vae": {"layers", "texture"},
    "unet": {"layers"},
    "scheduler": set(),
    "controlnet": {"layers", "unet", "scheduler"},
    "samplers": {"scheduler"},
    "optim": set(),
    "texture": {"layers", "scheduler"},
    "distributed": set(),
    "disk": set(),
    "checkpoint": {"disk", "limits"},
    "tracking": {"disk"},
    "journal": {"batches", "checkpoint", "config", "disk", "distributed", "tracking"},
    "limits": set(),
    "decoders": set(),
    "dicom": {"decoders", "limits"},
    "headers": {"dicom"},
    "pictures": {"decoders", "limits"},
    "arrays": {"limits"},
    "volumes": {"arrays", "dicom", "limits", "pictures"},
    "ct": {"dicom", "disk", "limits", "pictures", "volumes"},
    "files": {"limits"},
    "export": {"ct", "disk"},
    "series": {
        *("ct", "disk", "files", "headers", "limits", "pictures", "tables", "volumes"),
    },
    "fields": set(),
    "spine": set(),
    "scans": {"anatomy", "ct", "dicom", "fields", "files", "headers", "series", "volumes"},
    "slices": {"anatomy", "ct", "disk", "fields", "files", "lungs", "scans", "series", "spine"},
    "patients": {"series", "tables"},
    "preparation": {
        *("disk", "files", "headers", "patients", "records", "series", "slices", "tables"),
        "volumes",
    },
    "records": {"disk", "series", "tables"},
    "ribs": set(),
    "lungs": {"ribs"},
    "phantom": {"ct", "tables"},
    "anatomy": {"ct", "lungs"},
    "likeness": {"ct"},
    "findings": {"anatomy", "ct", "likeness", "spine", "tables"},
    "inspection": {
        *("anatomy", "ct", "fields", "findings", "likeness", "limits", "panels", "spine"),
        "tables",
    },
    "verdicts": set(),
    "distances": {"disk", "verdicts"},
    "metrics": {"disk", "distances", "features", "verdicts"},
    "features": set(),
    "weights": {"features"},
    "privacy": {"encoding", "likeness", "verdicts"},
    "disease": {"ct", "verdicts"},
    "panels": {"disk"},
    "tables": {"disk", "limits"},
    "datasets": {"balance", "batches", "ct", "disk", "distributed", "limits", "tables"},
    "encoding": {
        *("batches", "checkpoint", "ct", "datasets", "disk", "distributed", "limits", "tables"),
        *("unet", "vae"),
    },
    "conditions": {"balance", "ct", "encoding", "tables", "unet"},
    "synthesis": {
        *("batches", "checkpoint", "conditions", "controlnet", "ct", "distributed", "export"),
        *("optim", "privacy", "samplers", "scheduler", "tables", "unet", "vae"),
    },
    "comparison": {"conditions", "ct", "datasets", "disease", "lungs", "panels"},
    "samples": {
        *("comparison", "conditions", "ct", "datasets", "disease", "disk", "encoding", "export"),
        *("limits", "lungs", "metrics", "panels", "privacy", "synthesis", "tables"),
    },
    "measurement": {
        *("ct", "datasets", "disease", "disk", "features", "lungs", "metrics", "samples"),
        "tables",
    },
    "evaluation": {
        *("ct", "datasets", "disease", "disk", "features", "metrics", "panels", "privacy"),
        *("measurement", "synthesis", "tables", "verdicts"),
    },
    "report": {"disease", "disk", "evaluation", "verdicts"},
    "batches": {"distributed", "optim"},
    "balance": {"batches", "tables"},
    "config": {"limits", "unet"},
    "cli": {"balance", "config", "distributed", "optim"},
    "guard": {"batches", "disk", "distributed", "journal"},
    "run": {
        *("balance", "batches", "checkpoint", "cli", "config", "distributed", "guard", "journal"),
        *("optim", "tracking"),
    },
    "reconstruction": {
        *("anatomy", "batches", "datasets", "distributed", "features", "panels", "run", "texture"),
        "vae",
    },
    "validation": {
        *("batches", "controlnet", "ct", "datasets", "distributed", "encoding", "features"),
        *("lungs", "metrics", "panels", "privacy", "run", "scheduler", "synthesis"),
    },
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; `from a import b` is a and a.b."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "fibldm" if node.level and not node.module else node.module
            module = f"fibldm.{module}" if node.level and node.module else module
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def modules_of_the_package(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path)]
    return {name[1] for name in parts if name[0] == "fibldm" and len(name) > 1} & PACKAGE.keys()


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def attributes_set(function: ast.FunctionDef) -> set[str]:
    """Attributes of self that a method assigns."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keyword(call: ast.Call, name: str) -> str | None:
    """A call's keyword argument, as source."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_this_test_sees_the_files():
    assert MAY_IMPORT.keys() <= PACKAGE.keys()
    assert {"train_vae", "encode_dataset", "train_ldm_unet", "train_controlnet", "sample"} == set(
        STAGES
    )
    assert modules_of_the_package(STAGES["train_controlnet"]) >= {"unet", "checkpoint"}
    assert modules_of_the_package(PACKAGE["vae"]) == {"layers", "texture"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_import_table(name):
    assert modules_of_the_package(PACKAGE[name]) - MAY_IMPORT[name] == set()


def test_each_module_is_in_one_wing():
    wings = [*MODELS, *DATA, *TRAINING, *JUDGEMENT, *SYNTHESIS]
    assert sorted(wings) == sorted(PACKAGE)


@pytest.mark.parametrize("name", PACKAGE)
def test_wings_know_what_they_may(name):
    used = modules_of_the_package(PACKAGE[name])
    if name in MODELS:
        assert used <= MODELS
    if name in DATA:
        assert not used & (JUDGEMENT | SYNTHESIS | {"run", "journal", "validation"})
        assert name == "encoding" or not used & MODELS
    if name in JUDGEMENT:
        assert not used & TRAINING


@pytest.mark.parametrize("name", PACKAGE.keys() - {"cli", "config"})
def test_functions_of_the_package_take_values(name):
    taken = [n for n in ast.walk(tree(PACKAGE[name])) if isinstance(n, ast.arg) and n.annotation]
    assert [n.lineno for n in taken if "Namespace" in ast.unparse(n.annotation)] == []


@pytest.mark.parametrize("name", PACKAGE)
def test_attributes_are_born_in_init(name):
    """Of a class that has an __init__, but for the buffers of networks."""
    for kind in (n for n in ast.walk(tree(PACKAGE[name])) if isinstance(n, ast.ClassDef)):
        fields = {n.target.id for n in kind.body if isinstance(n, ast.AnnAssign)}
        functions = {n.name: attributes_set(n) for n in kind.body if isinstance(n, ast.FunctionDef)}
        if "__init__" in functions:
            born = fields | functions.pop("__init__")
            assert set().union(*functions.values()) - born <= BUFFERS, kind.name


@pytest.mark.parametrize("name", {**STAGES, **TOOLS})
def test_a_script_is_read_at_one_sitting(name):
    assert len(ALL[name].read_text("utf-8").splitlines()) <= 200


def test_no_circle_of_imports():
    left = {name: modules_of_the_package(path) for name, path in PACKAGE.items()}
    while ready := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert left == {}


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_imports_no_script(name):
    scripts = {*STAGES, "scripts", *(path.stem for path in TOOLS.values())}
    assert {found.split(".")[0] for found in imports(PACKAGE[name])} & scripts == set()


@pytest.mark.parametrize("name", STAGES)
def test_scripts_do_not_import_each_other(name):
    assert {found.split(".")[0] for found in imports(STAGES[name])} & STAGES.keys() == set()


def test_the_package_is_flat_and_every_module_has_a_noun():
    assert [p.name for p in (ROOT / "fibldm").iterdir() if p.is_dir()] in ([], ["__pycache__"])
    empty_names = {"utils", "util", "misc", "common", "helpers", "helper", "base", "core"}
    assert PACKAGE.keys() & empty_names == set()


@pytest.mark.parametrize("name", ALL)
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(tree(ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_never_written(name):
    for node in ast.walk(tree(ALL[name])):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("module", "_orig_mod"), f"line {node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "_orig_mod" not in node.value, f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            everything = {"Exception", "BaseException"} & {
                n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)
            }
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            swallows = everything and not raises and name not in TOOLS
            assert not swallows, f"line {node.lineno}: swallows every error"
    for call in calls(ALL[name]):
        if name_of(call) == "torch.load":
            assert keyword(call, "weights_only") == "True", f"line {call.lineno}"
        assert keyword(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"
        if name_of(call).split(".")[-1] == "DistributedDataParallel":
            assert name == "distributed", f"line {call.lineno}: DDP only through wrap"
            assert keyword(call, "find_unused_parameters") is None, f"line {call.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_load_no_pickle_either(path):
    for call in calls(path):
        if name_of(call) == "torch.load":
            assert keyword(call, "weights_only") == "True", f"line {call.lineno}"
        assert keyword(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"


def test_tables_are_read_and_written_in_one_module():
    for path in (*ALL.values(), *(ROOT / "benchmarks").glob("*.py")):
        assert "csv" not in imports(path), path.name
        used = {name_of(call) for call in calls(path)} & {"pd.read_csv", "pandas.read_csv"}
        assert not used or path.stem == "tables", path.name


def test_backward_stands_in_each_training_script_and_not_in_the_package():
    def has_backward(path: Path) -> bool:
        return any(name_of(call).endswith(".backward") for call in calls(path))

    assert {name for name, path in STAGES.items() if has_backward(path)} == {
        *("train_vae", "train_ldm_unet", "train_controlnet")
    }
    assert [name for name, path in PACKAGE.items() if has_backward(path)] == []


@pytest.mark.parametrize("name", ["train_vae", "train_ldm_unet", "train_controlnet"])
def test_training_scripts_are_told_in_the_same_order(name):
    lines = [line.strip() for line in STAGES[name].read_text().splitlines()]
    setup, train = lines.index("# Setup."), lines.index("# Train.")
    model = next(i for i, line in enumerate(lines) if line.startswith("# Model"))
    data = next(i for i, line in enumerate(lines) if line.startswith("# Data"))
    assert setup < min(model, data) and max(model, data) < train
    functions = {n.name for n in tree(STAGES[name]).body if isinstance(n, ast.FunctionDef)}
    assert {"parse_args", "main"} <= functions


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_when_called(name):
    last = tree(STAGES[name]).body[-1]
    assert isinstance(last, ast.If) and "run_script(main, parse_args)" in ast.unparse(last)
