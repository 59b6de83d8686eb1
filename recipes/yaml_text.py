"""Read and write recipes as YAML 1.2: ``1e-4`` is a number, ``no`` is a string, and a repeated key is an error.

PyYAML, which the toolkit needs anyway, reads YAML 1.1. ruamel.yaml reads 1.2 but would be a second YAML library: files
must still be written so that readers of YAML 1.1 read the same values, for which the PyYAML dumper below is needed.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from binarize.errors import BinarizeError

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|^\.nan$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_DIGITS = 1 << 20, 20_000, 32, 40
"""Limits of a file: its size, values with aliases written out, the depth of nesting, the digits of a whole number."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2, without tags, and with limits."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = self.deepest = self.values = 0
        self.sizes: dict[str, tuple[int, int]] = {}  # anchor -> values and levels of what it names

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.sizes:
                raise BinarizeError(f"line {line} has an alias, *{event.anchor:.40}, of nothing above it or of itself.")
            self._count(*self.sizes[event.anchor], line)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) not in (None, "!"):
            raise BinarizeError(f"line {line} has a tag, {event.tag!r:.60}; write the plain value.")
        values, deepest = self.values, self.deepest
        self.depth += 1
        self.deepest = self.depth
        self._count(1, 0, line)
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self.sizes[event.anchor] = self.values - values, self.deepest - self.depth + 1
        self.depth -= 1
        self.deepest = max(deepest, self.deepest)
        return node

    def _count(self, values: int, levels: int, line: int) -> None:
        """Count values and levels, those of an alias as if they were written out."""
        self.values += values
        self.deepest = max(self.deepest, self.depth + levels)
        if self.deepest > MAX_DEPTH:
            raise BinarizeError(f"line {line} is nested more than {MAX_DEPTH} levels deep.")
        if self.values > MAX_VALUES:
            raise BinarizeError(f"line {line} is beyond {MAX_VALUES} values, aliases written out; write fewer.")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise BinarizeError(f"line {line} has a list or a mapping as a key; a key is a name.")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise BinarizeError(f"the key {key!r:.80} is given twice, on lines {seen[key]} and {line}; keep one.")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_DIGITS:
            line = node.start_mark.line + 1
            raise BinarizeError(f"line {line} has a number of {len(node.value)} digits; at most {MAX_DIGITS}.")
        return super().construct_yaml_int(node)


_FLOAT_TAG, _INT_TAG, _BOOL_TAG = (f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool"))
_REPLACED = {_FLOAT_TAG, _INT_TAG, _BOOL_TAG, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INT_TAG, _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Return the data of one YAML document; errors name the source and the lines of what is wrong."""
    try:
        if len(text) > MAX_BYTES:
            raise BinarizeError(f"is longer than {MAX_BYTES} characters.")
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain data only  # nosec B506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise BinarizeError(f"{source} is not valid YAML{where}: {problem:.150}.") from error
    except BinarizeError as error:
        raise BinarizeError(f"{source}: {error}") from error


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """Return a YAML document that is a mapping with strings as keys."""
    data = parse_yaml(text, source)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BinarizeError(f"{source}: must hold `key: value` lines at its top level.")
    return data


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; strings and numbers read back the same in YAML 1.1 and 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in ((_FLOAT_TAG, _FLOAT, "-+.0123456789"), (_INT_TAG, _INT, "-+0123456789")):
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def to_yaml(data: Any) -> str:
    """Return ``data`` as YAML: one key per line in the given order, lists in brackets."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110)
