"""Sweeps: words that span a grid of settings become named variants of one configuration.

In: words. `model.patch_size=16x16,16x8` gives a setting its values (a comma inside brackets, braces or quotes
belongs to the value); any other word is a YAML file, as in configs/sweeps/. Out: one `Variant` for every
combination. Whether the settings exist and fit each other is for `load_config` to say, which reads a variant's
overrides as those of a command line. Fails with ConfigError.

A file holds `description:` and either `grid:`, a setting with its list of values on every line, or `runs:`, a list
whose entries set several settings together.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msm_dist.errors import ConfigError
from msm_dist.plain import parse_yaml

MOST_VARIANTS = 1000
LONGEST_NAME = 120
KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
CLOSED_BY = {"[": "]", "{": "}", "(": ")"}
FILE_KEYS = ("description", "grid", "runs")

Choice = tuple[tuple[str, str], ...]
"""Settings that one run of an axis makes: pairs of key and value, the value as YAML text."""


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: `name` is a valid run.name, `overrides` are words `a.b=c` for load_config."""

    name: str
    overrides: tuple[str, ...]


def expand(words: Sequence[str]) -> list[Variant]:
    """Every combination that the words span, in their order, the last word's values varying fastest.

    Names and overrides are functions of a variant's own settings and of which settings are swept: a value added to a
    sweep leaves the other names as they are. Raises ConfigError.
    """
    axes = [axis for word in words for axis in _axes(word)]
    if not axes:
        raise ConfigError(
            "a sweep needs settings to vary, such as data.crop_frames=96,208, or a file of configs/sweeps/"
        )
    keys = [key for axis in axes for key in dict.fromkeys(key for choice in axis for key, _ in choice)]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: is swept twice; give all its values in one place: {twice[0]}=VALUE,VALUE,...")
    if own := [key for key in keys if key.partition(".")[0] == "run"]:
        raise ConfigError(f"{own[0]}: a sweep names its run folders itself; run.name=NAME beside it names the sweep's")
    count = math.prod(len(axis) for axis in axes)
    if count > MOST_VARIANTS:
        sizes = " x ".join(str(len(axis)) for axis in axes)
        raise ConfigError(f"the sweep has {count} runs ({sizes}): at most {MOST_VARIANTS}; submit it in parts")
    choices = [tuple(itertools.chain(*parts)) for parts in itertools.product(*axes)]
    overrides = [tuple(f"{key}={text}" for key, text in choice) for choice in choices]
    return [Variant(*pair) for pair in zip(_names(choices, keys), overrides, strict=True)]


def _axes(word: str) -> Iterator[list[Choice]]:
    """The axes of a word, each the list of its choices."""
    key, equals, text = word.partition("=")
    if equals and KEY.fullmatch(key):
        texts = _split(word, text)
        _refuse_repeated(word, [_parsed(f"{key}={value}", value) for value in texts])
        yield [((key, value),) for value in texts]
    elif Path(word).is_file():
        yield from _file_axes(Path(word))
    elif equals:
        raise ConfigError(f"{word!r}: a setting to vary is written section.key=VALUE,VALUE,...")
    else:
        folder = Path(word).parent
        near = sorted(path.name for path in folder.glob("*.yaml"))[:20] if folder.is_dir() else []
        has = f"; {folder} has {', '.join(near)}" if near else ""
        raise ConfigError(f"{word!r}: neither a setting to vary (section.key=VALUE,VALUE,...) nor a sweep's file{has}")


def _split(word: str, text: str) -> list[str]:
    """The values of `a.b=v1,v2`: cut at the commas that stand outside of brackets, braces and quotes."""
    values, closing, quote, start, position = [], [], "", 0, 0
    while position < len(text):
        letter = text[position]
        if quote:
            escaped = text[position : position + 2] == "''" if quote == "'" else letter == "\\"
            position += escaped
            quote = "" if letter == quote and not escaped else quote
        # As in YAML, a quote opens where a value begins; elsewhere it is a letter.
        elif letter in "'\"" and text[:position].rstrip()[-1:] in ("", ",", "[", "{", "(", ":"):
            quote = letter
        elif letter in CLOSED_BY:
            closing.append(CLOSED_BY[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            values.append(text[start:position].strip())
            start = position + 1
        position += 1
    if quote or closing:
        raise ConfigError(f"{word!r}: {quote or closing[-1]} is missing; close it, or quote the value")
    values.append(text[start:].strip())
    if "" in values:
        raise ConfigError(f"{word!r}: value {values.index('') + 1} is empty; remove a comma, or write null")
    return values


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        raise ConfigError(f"{place!r}: the value is not valid YAML; quote it") from None


def _refuse_repeated(place: str, values: Sequence[Any]) -> None:
    seen: set[str] = set()
    for value in values:
        text = yaml.safe_dump(_as_number(value))
        if text in seen:
            raise ConfigError(f"{place}: {value!r} is given twice, for one and the same run; remove one")
        seen.add(text)


def _as_number(value: Any) -> Any:
    """The value with integers as the floats they equal: settings take 1 and 1.0 alike."""
    if isinstance(value, list | tuple):
        return [_as_number(item) for item in value]
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def _file_axes(path: Path) -> Iterator[list[Choice]]:
    """The axes of a sweep's file: one for every line of its grid, or one of its runs."""
    content = _read(path)
    if unknown := [str(key) for key in content if key not in FILE_KEYS]:
        raise ConfigError(f"{path}: {unknown[0]}: unknown key; a sweep's file has {', '.join(FILE_KEYS)}")
    if not isinstance(content.get("description", ""), str):
        raise ConfigError(f"{path}: description = {content['description']!r}: must be a text; quote it")
    if ("grid" in content) == ("runs" in content):
        raise ConfigError(f"{path}: give either grid: (settings with lists of values) or runs: (a list of settings)")
    name, entries = ("grid", content["grid"]) if "grid" in content else ("runs", content["runs"])
    if not isinstance(entries, dict if name == "grid" else list) or not entries:
        form = "`section.key: [VALUE, ...]`" if name == "grid" else "`- {section.key: VALUE, ...}`"
        raise ConfigError(f"{path}: {name} = {entries!r}: must hold lines of {form}")
    if name == "runs":
        yield [_choice(f"{path}: runs, entry {number}", entry) for number, entry in enumerate(entries, start=1)]
        _refuse_repeated(f"{path}: runs", [sorted(entry.items(), key=str) for entry in entries])
        return
    for key, values in entries.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: {key} = {values!r}: must be a list of values, such as [96, 208]")
        yield [_choice(f"{path}: grid", {key: value}) for value in values]
        _refuse_repeated(f"{path}: {key}", values)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content, root = parse_yaml(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold {', '.join(f'`{key}:`' for key in FILE_KEYS)} of a sweep")
    if twice := repeated_key(root):
        raise ConfigError(f"{path}: {twice}: is given twice; give all its values in one list")
    return content


def repeated_key(root: yaml.MappingNode) -> str | None:
    """A key that a YAML mapping, or one right in it, has twice: what Python makes of it has forgotten that."""
    for node in (root, *(value for _, value in root.value)):
        if isinstance(node, yaml.MappingNode):
            counts = Counter(str(key.value) for key, _ in node.value)
            if twice := [key for key, count in counts.items() if count > 1]:
                return twice[0]
    return None


def _choice(place: str, entry: Any) -> Choice:
    """One entry's settings, their values as text that an override carries."""
    if not isinstance(entry, dict) or not entry:
        raise ConfigError(f"{place}: {entry!r}: must hold settings as section.key: VALUE")
    return tuple((_key(place, key), _as_text(f"{place}: {key}", value)) for key, value in entry.items())


def _key(place: str, key: Any) -> str:
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ConfigError(f"{place}: {key!r}: a setting is named section.key, such as data.crop_frames")
    return key


def _as_text(place: str, value: Any) -> str:
    """A value as YAML on one line. Only what settings hold: scalars and lists of them."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, dict | list | set | bytes):
            raise ConfigError(f"{place} = {value!r}: must be a value or a list of values; name settings as section.key")
    # Unescaped, U+0085 would be read as the end of a line.
    is_printable = "".join(map(str, items)).isprintable()
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=is_printable)
    return text.removesuffix("\n").removesuffix("\n...")


def _names(choices: Sequence[Choice], keys: Sequence[str]) -> list[str]:
    """A name for each choice, such as crop_frames-96_patch_size-16x8; a digest sets apart what looks the same."""
    short = {key: _shortest(key, keys) for key in keys}
    names = ["_".join(f"{short[key]}-{_in_name(text)}" for key, text in choice) for choice in choices]
    counts = Counter(names)
    for number, (name, choice) in enumerate(zip(names, choices, strict=True)):
        if counts[name] > 1 or len(name) > LONGEST_NAME:
            digest = hashlib.sha256(repr(choice).encode()).hexdigest()[:8]
            names[number] = f"{name[: LONGEST_NAME - 9]}-{digest}"
    return names


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, with as many parts before it as tell it from the others."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = parts[-count:]
        if all(other == key or other.split(".")[-count:] != tail for other in keys):
            return ".".join(tail)
    return key


def _in_name(text: str) -> str:
    """A value in the letters that a run's name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.strip("[]{}()'\" "))
