"""The settings of a run as people meet them, in flags, files and tables: all derived from the fields of TrainConfig.

A setting's help is the docstring under its field, so that there is one place for each word about it.
"""

from __future__ import annotations

import ast
import inspect
import types
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError

_KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path as text"}


@dataclass(frozen=True)
class Setting:
    """One field of TrainConfig."""

    name: str
    """The field's name, which is also the key in a file."""
    kind: type
    """int, float, str or Path."""
    default: Any
    """None: not set; dataclasses.MISSING: must be given."""
    help: str
    """What it means, its unit, and what its special values mean."""

    @property
    def flag(self) -> str:
        """Return the flag on the command line."""
        return "--env" if self.name == "env_id" else f"--{self.name.replace('_', '-')}"

    def from_toml(self, value: Any) -> Any:
        """Turn a value of a file into one of the field. Raises TrainConfigError if it is of another type."""
        accepted = {int: (int,), float: (int, float), str: (str,), Path: (str,)}[self.kind]
        if not isinstance(value, accepted) or isinstance(value, bool):
            got = type(value).__name__
            raise TrainConfigError(f"{self.name}: got {value!r} ({got}), expected {_KINDS[self.kind]}")
        return self.kind(value)


def settings() -> tuple[Setting, ...]:
    """Return every setting in the order of the fields."""
    hints, texts = get_type_hints(TrainConfig), _docstrings()
    return tuple(Setting(f.name, _kind(hints[f.name]), f.default, texts[f.name]) for f in fields(TrainConfig))


def table() -> str:
    """Return all settings as a table in Markdown."""
    rows = ["| setting | flag | default | meaning |", "|---|---|---|---|"]
    for setting in settings():
        default = "required" if setting.default is MISSING else "" if setting.default is None else setting.default
        rows.append(f"| `{setting.name}` | `{setting.flag}` | {default} | {setting.help} |")
    return "\n".join(rows)


def _kind(hint: Any) -> type:
    """``int | None`` -> int."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    assert hint in _KINDS, f"a setting cannot be a {hint}"
    return hint


def _docstrings() -> dict[str, str]:
    """Read the text under each field from the source; Python does not keep it."""
    (of_class,) = ast.parse(inspect.getsource(TrainConfig)).body
    assert isinstance(of_class, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(of_class.body, of_class.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


if __name__ == "__main__":
    print(table())
