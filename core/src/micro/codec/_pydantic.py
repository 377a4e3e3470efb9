"""Models of pydantic as messages: in every form as their JSON, by pydantic's own rules.

pydantic is no dependency: it is imported where a class of its models is, so it is there.
"""

from __future__ import annotations

from typing import Any


def model_to_builtins(model: Any) -> Any:
    """What JSON holds for a model, under its aliases.

    Raises:
        ValueError: it has no form in JSON.
    """
    return model.model_dump(mode="json", by_alias=True)


def model_from_builtins(shape: Any, value: Any) -> Any:
    """The model that JSON, once parsed, holds.

    Raises:
        ValueError: it is not valid; the text ends with the path.
    """
    from pydantic_core import to_json

    # Written again, since a strict model takes from JSON alone what JSON has no type for.
    return model_from_json(shape, to_json(value, inf_nan_mode="constants"))


def model_from_json(shape: Any, body: bytes) -> Any:
    """The model that a JSON text holds, which nobody could read differently.

    Raises:
        ValueError: it is not valid; the text ends with the path.
    """
    from pydantic import ValidationError

    try:
        return shape.model_validate_json(body)
    except ValidationError as exc:
        # What was sent stays out of the text.
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{first['msg']} - at `{_path(first['loc'])}`") from None


def _path(places: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in places)
