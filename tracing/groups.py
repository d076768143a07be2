"""Lookup of token positions by group, by index or by several of either."""

from collections.abc import Sequence

from ..models import Prompt
from ..models.texts import plain_number
from .errors import TraceError

Positions = str | int | Sequence[str | int]
"""A token group, a position (negative ones count from the end), or several of either."""


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Return the positions of a token group.

    Raises `TraceError`, which lists the groups, if the group is empty or reaches into an answer.
    """
    positions = prompt.groups.get(group, ())
    if not positions:
        names = ", ".join(name for name, members in prompt.groups.items() if members)
        hints = {"image": "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {names}{hint}")
    last = prompt.groups["last"][0]
    if max(positions) > last:
        raise TraceError(
            f"group {group!r} reaches beyond the prompt's last token (position {last}) into the answer; "
            "ask for a group of the prompt"
        )
    return positions


def named_positions(prompt: Prompt, positions: Positions) -> dict[int, str]:
    """Return each requested position once, in the requested order, with a role that has the same name in every prompt.

    A role is the name of the group ("last"), numbered from 1 if the group has several tokens ("question 2"), or
    "position -2" for a number. Raises `TraceError` for a group without tokens and if no position is given, and
    `ModelError` for an unknown group.
    """
    roles: dict[int, str] = {}
    positions = plain_number(positions)
    for item in map(plain_number, (positions,) if isinstance(positions, str | int) else positions):
        members = prompt.positions(item)
        if not members:
            names = ", ".join(name for name, own in prompt.groups.items() if own)
            raise TraceError(f"no tokens in group {item!r} of this prompt; groups with tokens are {names}")
        name = item if isinstance(item, str) else f"position {item}"
        for number, position in enumerate(members, start=1):
            roles.setdefault(position, f"{name} {number}" if len(members) > 1 else name)
    if not roles:
        raise TraceError("no positions to read; name a group such as 'last', a position or several")
    return roles


def prompt_positions(prompt: Prompt, positions: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the ascending positions of a group, of one index or of several indices within the prompt.

    Raises `TraceError` if there are none or if one of them belongs to an answer.
    """
    if isinstance(positions, str):
        return tuple(sorted(group_positions(prompt, positions)))
    members, last = tuple(sorted(set(prompt.positions(positions)))), prompt.groups["last"][0]
    if not members or members[-1] > last:
        raise TraceError(
            f"no positions {positions} within this prompt; pass at least one, and none beyond its last token ({last})"
        )
    return members
