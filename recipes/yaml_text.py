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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise BinarizeError(f"the key {key!r} is given twice, on lines {seen[key]} and {line}; keep one.")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


_FLOAT_TAG, _INT_TAG, _BOOL_TAG = (f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool"))
_REPLACED = {_FLOAT_TAG, _INT_TAG, _BOOL_TAG, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Return the data of one YAML document; errors name the source and the lines of what is wrong."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise BinarizeError(f"{source} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from error
    except BinarizeError as error:
        raise BinarizeError(f"{source}: {error}") from error


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
