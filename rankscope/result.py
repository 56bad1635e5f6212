"""Results with a versioned, strict JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import msgspec
import numpy as np

from rankscope.errors import FormatError

T = TypeVar("T")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What an analysis or an operation found; ``to_json`` and ``from_json`` are inverses.

    A subclass has a field ``schema``, which is one of its ``schemas``.
    """

    schemas: ClassVar[tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values: no NaN, no infinity."""
        return json_values(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that ``to_json`` described.

        Raises:
            FormatError: another schema, or fields that are missing or of another type.
        """
        found = value.get("schema") if isinstance(value, Mapping) else None
        if found not in cls.schemas:
            raise FormatError(f"expected a result with the schema {cls.schemas[0]!r}, not {found!r}")
        return convert_json(value, cls, str(found))


def convert_json(value: Any, kind: type[T], schema: str) -> T:
    """JSON values as an instance of ``kind``, a part of a result of this schema or all of it.

    Raises:
        FormatError: fields are missing or of another type.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_array)
    except msgspec.ValidationError as error:
        raise FormatError(f"not a whole result of the schema {schema!r} ({error})") from error


def _array(kind: type, value: Any) -> Any:
    """Lists of numbers as arrays; null stands for a number that is not known."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise msgspec.ValidationError(f"expected a grid of numbers ({error})") from error


def json_values(result: msgspec.Struct) -> dict[str, Any]:
    """What strict JSON holds of a result: arrays and tuples as lists, NaN as null."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(result, enc_hook=lambda array: array.tolist()))
    return found
