"""A script's options, taken from the command line and from a file."""

import argparse
import difflib
import json
import math
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml

from fibldm import limits
from fibldm.unet import blocks_per_level

CONFIG_BYTES = 2**20  # of a file for --config, at most
NOT_OPTIONS = ("environment", "samples_of")  # what args.json has besides options
ABSENT = object()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the example at the end as it is written.

    A value is named by the last word of its option.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.nargs == 0
        return action.help if silent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()


class Parser(argparse.ArgumentParser):
    """Takes options from the command line and from a file (--config); `rare` comes last in --help.

    Raises SystemExit with code 2, as argparse does, after a message that names file and option.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **kwargs)
        self.rare = self.add_argument_group("rarely needed")

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group is self.rare)
        return super().format_help()

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """The options' values: those of the command line, else of --config, else the defaults."""
        if all(action.option_strings for action in self._actions):
            self.usage = "%(prog)s [options]"
        if not any(action.dest == "config" for action in self._actions):
            return super().parse_args(args, namespace)
        required = [p for p in (*self._actions, *self._mutually_exclusive_groups) if p.required]
        for part in required:  # a file may give them
            part.required = False
        unset = argparse.Namespace(**{action.dest: ABSENT for action in self._actions})
        given = {n: v for n, v in vars(super().parse_args(args, unset)).items() if v is not ABSENT}
        found = self._read_options(Path(given["config"]), given) if given.get("config") else {}
        for part in required:
            members = getattr(part, "_group_actions", [part])
            part.required = not any(action.dest in found for action in members)
        args = super().parse_args(args, argparse.Namespace(**found))
        del args.config
        return args

    def _read_options(self, file: Path, given: dict[str, Any]) -> dict[str, Any]:
        """Values by name from a file, but of options that the command line rules out."""
        try:
            entries = read_config(file)
        except (OSError, ValueError) as error:
            self.error(f"--config {file}: {getattr(error, 'strerror', None) or error}")
        actions = {action.dest: action for action in self._actions if action.option_strings}
        for name in ("help", "config"):
            del actions[name]
        values = {}
        for name, value in entries.items():
            if name not in actions:
                near = difflib.get_close_matches(str(name), actions, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.error(f"--config {file}: unknown option {short(name)}{hint}")
            if value is not None:
                values[name] = self._value(file, actions[name], value)
        for group in self._mutually_exclusive_groups:
            names = {action.dest for action in group._group_actions}
            set_here = [n for n in values if n in names and values[n] != actions[n].default]
            if names & given.keys():
                values = {name: value for name, value in values.items() if name not in names}
            elif len(set_here) > 1:
                self.error(f"--config {file}: {' and '.join(set_here)}: expected one of them")
        return values

    def _value(self, file: Path, action: argparse.Action, value: Any) -> Any:
        """What an option makes of a value in a file: that of the same words after its name."""
        what = f"--config {file}: {action.dest}: found {short(value)}"
        if action.nargs == 0:
            words = {"true": True, "false": False}
            if str(value).lower() not in words:
                self.error(f"{what}, expected true or false")
            return words[str(value).lower()]
        several = action.nargs not in (None, "?")
        words = value if isinstance(value, list) and several else [value]
        exact = isinstance(action.nargs, int)
        if len(words) != action.nargs if exact else not words and action.nargs != "*":
            self.error(f"{what}, expected {action.nargs} values")
        converted = []
        for word in words:
            if isinstance(word, bool | list | dict | None):
                self.error(f"{what}, expected {'numbers or texts' if several else 'one value'}")
            try:
                converted.append((action.type or str)(str(word)))
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                self.error(f"{what}: {error}")
            if action.choices is not None and converted[-1] not in action.choices:
                self.error(f"{what}, expected one of {', '.join(map(str, action.choices))}")
        scratch = argparse.Namespace()
        try:
            action(self, scratch, converted if several else converted[0], action.option_strings[0])
        except argparse.ArgumentError as error:
            self.error(f"{what}: {error.message}")
        return getattr(scratch, action.dest)


def read_config(file: Path) -> dict[str, Any]:
    """The options in a JSON or YAML file, by name; a run's args.json of any version is one.

    YAML's values stay texts, as on the command line. Raises OSError, or ValueError where the file
    is too large or no table of names and values.
    """
    with open(file, "rb") as stream:
        content = stream.read(CONFIG_BYTES + 1)
    if len(content) > CONFIG_BYTES:
        raise ValueError(f"larger than {CONFIG_BYTES:,} bytes, expected a list of options")
    try:
        text = content.decode("utf-8-sig")
        is_json = file.suffix.lower() == ".json"
        # The loader makes texts, lists and tables alone: it is safer than yaml.safe_load, and
        # leaves 1e-3, no and 2:00:00 as they are written.
        entries = json.loads(text) if is_json else yaml.load(text, Loader=yaml.BaseLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"expected JSON or YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"found {short(entries)}, expected option: value, one a line")
    if "environment" in entries:
        entries = modernized(entries)
    nothing = (None, "", "~", "null")
    return {n: None if v in nothing else v for n, v in entries.items() if n not in NOT_OPTIONS}


def read_settings(file: Path) -> dict[str, Any]:
    """What args.json holds, as this version names it; ValueError where it is damaged."""
    try:
        settings = limits.read_json(file)
        if not isinstance(settings, dict):
            raise ValueError("expected an object")
        return modernized(settings)
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}; use another --save_dir") from error


def begun_with(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty where there is none. See `read_settings`."""
    file = folder / "args.json"
    return read_settings(file) if file.is_file() and any(folder.glob("*.pth")) else {}


def modernized(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in args.json of any version, as this version's options would be given."""
    settings = dict(settings)
    if "lr" in settings:  # a training's
        settings.setdefault("lr_schedule", "constant")
    if isinstance(widths := settings.get("channels"), list):  # a U-Net's
        settings["blocks"] = list(blocks_per_level(settings.get("blocks"), len(widths)))
    pixels, side = settings.get("max_shift"), settings.get("image_size")
    if isinstance(pixels, int) and isinstance(side, int) and side > 0:
        settings["max_shift"] = pixels / side
    if isinstance(seconds := settings.get("time_limit"), float):
        minutes, rest = divmod(math.ceil(seconds), 60)
        settings["time_limit"] = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return settings
