"""From files and overrides to a `Config`: YAML files merged left to right, then `a.b.c=value`; nothing else.

`model.preset: NAME` puts a preset's values underneath whatever else `model` says.
"""

import copy
import difflib
import re
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import pydantic
import yaml

from boreal_megatron.config import presets, schema
from boreal_megatron.errors import BorealError, ProblemsError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(files, overrides=()):
    """Read, merge and type-check.

    Args:
        files: YAML paths, later ones win key by key; lists are replaced whole.
        overrides: `a.b.c=value` strings, the value in YAML; `phases.0.sequence=64` reaches into a list.

    Raises:
        ProblemsError: every unknown key (with the nearest spelling) and ill-typed value at once.
    """
    merged = {}
    for file in files:
        merged = merge(merged, read(Path(file)))
    return parse(merged, ", ".join(map(str, files)) or "configuration", overrides)


def load_words(words):
    """`load` of what a command line has: files, and overrides, which have a `=`."""
    return load([w for w in words if "=" not in w], [w for w in words if "=" in w])


def parse(values, where, overrides=()):
    """A plain dict, and overrides of it, to a Config; the errors as `load`."""
    values = copy.deepcopy(values)
    for override in overrides:
        _assign(values, override)
    if isinstance(values.get("model"), dict):
        values["model"] = resolve_preset(values["model"])
    return validate(schema.Config, values, where)


def resolve_preset(model):
    """The `model` section with its preset filled in underneath."""
    model = dict(model)
    name = model.pop("preset", None)
    if name is None:
        return model
    if name not in presets.PRESETS:
        raise BorealError(f"model.preset={name!r} is unknown; expected one of {', '.join(presets.PRESETS)}")
    return merge(presets.PRESETS[name], model)


def validate(kind, values, where):
    """`kind(**values)`, with pydantic's findings as a ProblemsError."""
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise ProblemsError(where, [_say(kind, problem) for problem in error.errors()]) from None


def dump(config, path):
    """Write the resolved config so that `load([path])` gives it back."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False))


def merge(below, above):
    """Nested dicts, key by key; `above` wins."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def read(path):
    """The keys and values of a YAML file.

    Raises:
        BorealError: it does not exist, is no YAML, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise BorealError(f"{path} does not exist; expected a YAML configuration file") from None
    except OSError as error:
        raise BorealError(f"{path} cannot be read: {error.strerror}; expected a YAML configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BorealError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise BorealError(f"{path} holds {type(values).__name__}, expected keys and values at the top level")
    return values


def _assign(values, override):
    path, equals, text = override.partition("=")
    if not equals:
        raise BorealError(f"override {override!r} has no '='; expected a.b.c=value")
    *parents, last = path.split(".")
    here = values
    for part in parents:
        if isinstance(here, list):
            here = here[_index(here, part, override)]
        else:
            if not isinstance(here.get(part), (dict, list)):
                here[part] = {}
            here = here[part]
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text  # `model.pattern=*-G- / *-` is text, whatever YAML makes of its star
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def _index(items, part, override):
    if not part.isdigit() or int(part) >= len(items):
        raise BorealError(f"override {override!r}: {part!r} is no index of a list of {len(items)}")
    return int(part)


def _say(kind, problem):
    """One pydantic finding in our words: found, expected, do."""
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = _fields(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(fields)}"
        return f"{location}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{location}: missing; it has no default"
    found = repr(problem["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{location or 'top level'}: found {found}; {message}"


def _fields(kind, location):
    """Field names of the model at a location."""
    for part in location:
        if isinstance(part, int):
            continue
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        kind = _model_in(kind.model_fields[part].annotation)
    return list(kind.model_fields) + (["preset"] if kind is schema.Model else [])


def _model_in(annotation):
    """The pydantic model inside X, X | None or tuple[X, ...]."""
    if get_origin(annotation) in (UnionType, tuple):
        return next(_model_in(part) for part in get_args(annotation) if part not in (type(None), Ellipsis))
    return annotation
