"""Names that an executor uses of a package that may not be there, and which of them it lacks."""

import inspect
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import Any


class Kind(StrEnum):
    """What the names of a need are to their owner."""

    ATTRIBUTES = "attributes"
    FIELDS = "fields"
    PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class Need:
    """Names that `owner`, an attribute path in `module`, must have. Fields are those of a pydantic
    model, parameters those of a call."""

    module: str
    owner: str
    kind: Kind
    names: tuple[str, ...]


def missing_names(need: Need) -> list[str]:
    """What an installed package lacks of a need, each named as a person would."""
    path = f"{need.module}.{need.owner}"
    try:
        owner: Any = import_module(need.module)
        for part in need.owner.split("."):
            owner = getattr(owner, part)
    except (ImportError, AttributeError):
        return [path]
    have = names_of(owner, need.kind)
    lacking = [name for name in need.names if name not in have]
    if need.kind is Kind.PARAMETERS:
        return [f"{need.owner}({name})" for name in lacking]
    return [f"{need.owner}.{name}" for name in lacking]


def names_of(owner: Any, kind: Kind) -> set[str]:
    """The names that an object has of a kind."""
    match kind:
        case Kind.FIELDS:
            return set(getattr(owner, "model_fields", ()))
        case Kind.PARAMETERS:
            return set(inspect.signature(owner).parameters)
        case Kind.ATTRIBUTES:
            # Fields without a default are no attributes of their class.
            return {*dir(owner), *inspect.get_annotations(owner)}
