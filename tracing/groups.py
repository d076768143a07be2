"""Positions of token groups, for experiments that need a group of the prompt to hold something."""

from ..models import Prompt
from .errors import TraceError


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Positions of a group that must hold something, and nothing of the answer. TraceError lists the groups."""
    positions = prompt.groups.get(group, ())
    if not positions:
        found = ", ".join(name for name, members in prompt.groups.items() if members)
        hints = {"image": "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {found}{hint}")
    last = prompt.groups["last"][0]
    if max(positions) > last:
        raise TraceError(
            f"group {group!r} reaches beyond the prompt's last token (position {last}) into the answer; "
            "ask for a group of the prompt"
        )
    return positions
