"""Settings: YAML files that extend one another and `a.b=c` overrides, checked as a pydantic model.

In: a file, if any, and overrides, then a model and its rules. Out: plain values, then the model. Everything wrong is
reported at once, as one ConfigError that names the source; an unknown key comes with the name that is nearest.
"""

import difflib
import os
import select
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from msm_dist.errors import ConfigError
from msm_dist.plain import MAX_YAML, parse_yaml, shown
from msm_dist.redact import holds_secret

REPORTED_AT_ONCE = 40
LONGEST_CHAIN = 20
PATIENCE_SECONDS = 30
"""How long a pipe that a configuration is to come from may say nothing."""
REFUSED_SECRET = (
    "holds a password, a token or a signature, which would be shown and kept in the run folder; take it out: ~/.netrc "
    "or the variables of the store's own library give access to URLs, and a pipe: command names an environment "
    "variable ($TOKEN) that its shell fills in; see docs/security.md"
)
Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The plain values of a YAML file, if any, with `a.b=c` overrides on top. Raises ConfigError."""
    values = {} if path is None else _read_yaml(Path(path), seen=())
    for override in overrides:
        _apply_override(values, override)
    return values


def validated(
    kind: type[Settings], values: dict[str, Any], source: str, conflicts: Callable[[Settings], Iterable[str]]
) -> Settings:
    """Settings of a kind from plain values, all faults and conflicts in one ConfigError that names `source`.

    No text among them may hold a secret, as settings are shown and kept.
    """
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        faults = [_describe(fault, kind) for fault in error.errors()]
        raise ConfigError(_report(source, faults)) from None
    secrets = [f"{name}: {REFUSED_SECRET}" for name in _secrets(settings.model_dump())]
    if faults := [*secrets, *conflicts(settings)]:
        raise ConfigError(_report(source, faults))
    return settings


def _secrets(value: Any, name: str = "") -> Iterable[str]:
    """The names of settings of which a text, or the key of a mapping, holds a secret."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if holds_secret(str(key)):
                yield name
            else:
                yield from _secrets(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secrets(inner, name)
    elif isinstance(value, str) and holds_secret(value):
        yield name


def flat_items(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {'a.b': value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flat_items(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested settings: those of `top` over those of `base`."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's settings on top of those of the file it extends."""
    try:
        values = parse_yaml(_text_of(path))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: must hold settings as `section:` with `key: value` below it")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {shown(parent)}: must name one other YAML file")
    try:
        base = (path.parent / parent).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: extends = {shown(parent)}: names no file ({error})") from None
    if len(seen) > LONGEST_CHAIN:
        raise ConfigError(f"{path}: more than {LONGEST_CHAIN} files extend one another; join them")
    if base in seen or base == path.resolve():
        raise ConfigError(f"{path}: extends {parent}, which extends it in turn; break the circle")
    result = merged(_read_yaml(base, (*seen, path.resolve())), values)
    # Which corpora are mixed is one value: those of the other file don't stay among them.
    if isinstance(mine := values.get("data"), dict) and "mix" in mine:
        result["data"]["mix"] = mine["mix"]
    return result


def _text_of(path: Path) -> str:
    """A file's text, up to what is too long for settings: a device, or a pipe, may have no end. Raises OSError.

    A pipe is read while somebody writes to it, such as the shell of `<(command)`.
    """
    # Opened otherwise, a pipe without a writer would keep us for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        text, waiting = b"", select.poll()
        waiting.register(descriptor, select.POLLIN)
        while len(text) <= 4 * MAX_YAML:
            if not waiting.poll(1000 * PATIENCE_SECONDS):
                raise OSError(f"is a pipe to which nobody has written for {PATIENCE_SECONDS} s")
            if not (piece := os.read(descriptor, 4 * MAX_YAML + 1 - len(text))):
                break
            text += piece
    finally:
        os.close(descriptor)
    return text.decode("utf-8")


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: an override is written section.key=value, such as train.steps=100")
    try:
        value = parse_yaml(text) if text else None
    except ValueError as error:
        raise ConfigError(
            f"{override!r}: the value is not valid YAML ({error}); a text with such signs is to be quoted"
        ) from None
    *sections, key = name.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
        values[section] = dict(inner or {})
        values = values[section]
    values[key] = value


def _describe(fault: Any, kind: type[BaseModel]) -> str:
    """One line for one fault found by pydantic: field, value, rule, remedy."""
    names = [str(part) for part in fault["loc"]]
    # A union reports each of its members; their type names are no fields.
    names = [name for name in names if name not in {"str", "list[str]", "int", "float"}]
    field = ".".join(names)
    if fault["type"] == "extra_forbidden":
        known = _known_names(kind, names[:-1])
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        elsewhere = [n for n in _all_names(kind) if n.split(".")[-1] == names[-1]]
        if near:
            hint = f"did you mean {'.'.join([*names[:-1], near[0]])}?"
        elif elsewhere:
            hint = f"did you mean {elsewhere[0]}?"
        else:
            hint = f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "must be a section, with its settings below it"
    return f"{field} = {shown(fault['input'])}: {message[:1].lower()}{message[1:]}"


def _known_names(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = kind
    for name in path:
        field = model.model_fields.get(name)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def _all_names(kind: type[BaseModel]) -> list[str]:
    return [f"{section}.{name}" for section in kind.model_fields for name in _known_names(kind, [section])]


def _report(source: str, faults: Sequence[str]) -> str:
    faults = list(dict.fromkeys(faults))
    shown = [f"  {fault}" for fault in faults[:REPORTED_AT_ONCE]]
    more = len(faults) - len(shown)
    count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    return "\n".join([f"{source}: {count} in the configuration:", *shown, *([f"  and {more} more"] if more else [])])
