"""is_integer: what counts as a whole number where one is asked for."""

from typing import Any, TypeGuard


def is_integer(value: Any, least: int, most: int | None = None) -> TypeGuard[int]:
    """Whether ``value`` is an int, which a bool is not, from ``least`` to ``most`` (None: without an end)."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)
