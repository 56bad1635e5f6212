"""Results that have a versioned, strict JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar

import msgspec
import numpy as np

from rankscope.errors import FormatError

T = TypeVar("T")


class Named(Protocol):
    """Anything with a name, such as the layer of a result."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def find_layer(layers: Iterable[N], name: str) -> N:
    """The layer of that name.

    Raises:
        KeyError: there is none.
    """
    for layer in layers:
        if layer.name == name:
            return layer
    raise KeyError(name)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an analysis or an operation; ``from_json`` is the inverse of ``to_json``.

    A subclass has a field ``schema``, whose value is one of its ``schemas``.
    """

    schemas: ClassVar[tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON values, without NaN and infinity."""
        return json_values(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that ``to_json`` wrote.

        Raises:
            FormatError: another schema, or fields that are missing or of another type.
        """
        schema = value.get("schema") if isinstance(value, Mapping) else None
        if schema not in cls.schemas:
            raise FormatError(f"expected a result with the schema {cls.schemas[0]!r}, not {schema!r}")
        return convert_json(value, cls, str(schema))


def convert_json(value: Any, kind: type[T], schema: str) -> T:
    """JSON values as an instance of ``kind``, a part of a result of this schema or all of it.

    Raises:
        FormatError: fields are missing or of another type.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_array)
    except msgspec.ValidationError as error:
        raise FormatError(f"the result is not a complete one of the schema {schema!r} ({error})") from error


def _array(kind: type, value: Any) -> Any:
    """A list of numbers as an array; null becomes NaN."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise msgspec.ValidationError(f"expected a grid of numbers ({error})") from error


def json_values(result: msgspec.Struct) -> dict[str, Any]:
    """A result as strict JSON values: arrays and tuples as lists, NaN as null."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(result, enc_hook=lambda array: array.tolist()))
    return values
