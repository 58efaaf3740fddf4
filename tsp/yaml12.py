"""Read YAML as its version 1.2 has it: `off` is a word, not False, and `1e-3` a number, not a word.

PyYAML reads version 1.1; only the scalars' resolvers differ here.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from tsp.errors import ConfigError

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """Read an experiment file; it states only what differs from the defaults.

    Args:
        path: of the file.
        option: that named it, for the message.

    Raises:
        ConfigError: no such file, no valid YAML, or no mapping.
    """
    place = f"{option} {path}"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), place)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: no UTF-8: {error}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{place}: must be a mapping, got {type(content).__name__}")
    return content or {}


def parse_yaml(text: str, place: str) -> Any:
    """What a text says.

    Args:
        text: YAML.
        place: where it stands, for the message.

    Raises:
        ConfigError: no valid YAML.
    """
    try:
        content = yaml.load(text, _Loader)
        json.dumps(content, default=str)  # An alias may lead to what holds it.
        return content
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = textwrap.shorten(str(error), 120, placeholder=" ...")
        raise ConfigError(f"{place}: no valid YAML: {said}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, where each key is a word and stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice{key.start_mark}")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        mapping = super().construct_mapping(node, deep)
        if no_words := [key for key in mapping if not isinstance(key, str)]:
            raise yaml.YAMLError(f"a key must be a word, got {no_words[0]!r}{node.start_mark}")
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
