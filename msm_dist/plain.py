"""Plain values from text that may be anybody's: YAML and JSON, bounded in size, depth and what aliases make of it.

In: the text or bytes of a file. Out: dicts, lists, strings, numbers, dates; no tag makes anything else of it. Fails
with ValueError, whose message fits behind a file's name in brackets.
"""

import json
from typing import Any

import yaml

MAX_YAML = 2**20
"""Characters of a YAML file, here some pages; a sweep of thousands of runs has a hundredth of it."""
MAX_EXPANDED = 2 * MAX_YAML
"""Values and characters once every alias stands for what it names: without aliases no text gets there."""
MAX_JSON = 2**25
"""Bytes of a JSON text: of index.json, which is the longest, a hundred thousand shards."""
MAX_DEPTH = 100


def parse_yaml(text: str) -> Any:
    """The one document in a YAML text. Raises ValueError."""
    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text)} characters; at most {MAX_YAML} are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _expanded(root, {}, 0)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # What PyYAML's constructors of dates and numbers let through.
    except (ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    if len(content) > MAX_JSON:
        raise ValueError(f"{len(content)} bytes; at most {MAX_JSON} are read")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def shown(value: Any, limit: int = 200) -> str:
    """A value for a message, as Python writes it, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _expanded(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """The size of a node with its aliases written out: found for each node once, as a bomb would take for ever."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if (known := sizes.get(id(node))) is not None:
        if known < 0:
            raise ValueError("an alias names what it is part of")
        return known
    sizes[id(node)] = -1
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        size = 1 + sum(_expanded(child, sizes, depth + 1) for child in children)
    if size > MAX_EXPANDED:
        raise ValueError(f"its aliases make more than {MAX_EXPANDED} values and characters of it")
    sizes[id(node)] = size
    return size


def _depth(value: Any) -> int:
    """Levels of lists and objects; looked at level by level, as what is deep may not be descended into."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        depth += 1
    return depth
