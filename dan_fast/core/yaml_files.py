"""Settings in YAML files."""

from pathlib import Path
from typing import Any

import yaml

from dan_fast.core.errors import DanFastError


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        what: what it should be, in words, for the sentence of an error.

    Raises:
        DanFastError: there is no such file, it cannot be read as YAML, a key stands twice in a mapping of it, or it
            holds something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "base.yaml"
        >>> _ = path.write_text("data: {labeled: market}")
        >>> read_mapping(path, "a configuration of a training")
        {'data': {'labeled': 'market'}}
    """
    try:
        text = path.read_text(encoding="utf-8")
        _require_single_keys(path, yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise DanFastError(f"{path} is not YAML ({place}{error.problem}): correct it.") from error
    # A date that does not exist is a ValueError, as is what is no UTF-8.
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DanFastError(f"{path} cannot be read as {what} ({reason}): name a YAML file.") from error
    if not isinstance(content, dict):
        raise DanFastError(f"{path} is not {what}: it must be a YAML mapping.")
    return content


def _require_single_keys(path: Path, node: yaml.Node | None) -> None:
    """Refuse a key that stands twice in a mapping, of which YAML keeps the last one alone."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    lines: dict[str, int] = {}
    for key, _ in pairs:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if (first := lines.get(key.value)) is not None:
                where = f"in lines {first} and {line}" if first != line else f"twice in line {line}"
                raise DanFastError(f"{path} has {key.value} {where}: write it once.")
            lines[key.value] = line
    inner = [value for _, value in pairs] if pairs else node.value if isinstance(node, yaml.SequenceNode) else ()
    for each in inner:
        _require_single_keys(path, each)
