"""Which positions are read and which tokens are followed, from what the caller asked."""

from collections.abc import Sequence

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError
from .followed import FollowedTokens

Positions = str | int | Sequence[str | int]
"""A group of tokens, a position (negative counts from the end), or several of both."""


def read_positions(prompt: Prompt, asked: Positions) -> dict[int, str]:
    """The positions, in the order asked and each once, with roles that are named alike in every prompt.

    A role is the group's name ("last"), with a number from 1 where the group has several tokens ("question 2"), or
    "position -2" as it was asked. TraceError for a group without tokens or no positions; ModelError for an unknown one.
    """
    found: dict[int, str] = {}
    for item in (asked,) if isinstance(asked, str | int) else tuple(asked):
        positions = prompt.positions(item)
        if not positions:
            groups = ", ".join(name for name, members in prompt.groups.items() if members)
            raise TraceError(f"no tokens in group {item!r} of this prompt; groups with tokens are {groups}")
        for number, position in enumerate(positions, start=1):
            name = item if isinstance(item, str) else f"position {item}"
            found.setdefault(position, f"{name} {number}" if len(positions) > 1 else name)
    if not found:
        raise TraceError("no positions to read; name a group such as 'last', a position or several")
    return found


def follow(
    vlm: VisionLanguageModel, prompt: Prompt, *, answer: str, foil: str | None, words: str | int | Sequence[str | int]
) -> FollowedTokens:
    """The first tokens of answer, foil and words as continuations of the prompt; equal ones are merged.

    Answer and foil are followed in lower case and with a capital first letter, words as they are spelled. TraceError
    for a token id that the model does not have, and for a foil that begins with the answer's tokens.
    """
    named = _spellings("answer", answer) + ([] if foil is None else _spellings("false option", foil))
    further = (words,) if isinstance(words, str | int) else tuple(words)
    named += [(f"token {each}" if isinstance(each, int) else f"word {each}", each) for each in further]
    members: dict[int, tuple[list[str], list[str]]] = {}
    for role, word in named:
        own_words, roles = members.setdefault(_first_token(vlm, prompt, word), ([], []))
        own_words += [word] if isinstance(word, str) and word not in own_words else []
        roles += [role] if role not in roles else []
    _check_told_apart(members, answer, foil)
    return FollowedTokens(
        ids=tuple(members),
        texts=tuple(vlm.tokenizer.decode([token]) for token in members),
        words=tuple(tuple(own_words) for own_words, _ in members.values()),
        roles=tuple(tuple(roles) for _, roles in members.values()),
    )


def _spellings(role: str, words: str) -> list[tuple[str, str]]:
    """(role, spelling) in lower case and with a capital first letter, the letters after it as given."""
    words = words.strip()
    return [(f"{role}, lower case", words.lower()), (f"{role}, capitalised", words[:1].upper() + words[1:])]


def _first_token(vlm: VisionLanguageModel, prompt: Prompt, word: str | int) -> int:
    if isinstance(word, str):
        return prompt.answer_tokens(word)[0]
    size = vlm.vocab
    if isinstance(word, bool) or not 0 <= word < size:
        raise TraceError(f"no token {word} in {vlm.name!r}: its vocabulary has {size} (0 to {size - 1})")
    return word


def _check_told_apart(members: dict[int, tuple[list[str], list[str]]], answer: str, foil: str | None) -> None:
    """TraceError if every token of the foil is one of the answer's too."""
    sides = [
        {token for token, (_, roles) in members.items() if any(role.startswith(side) for role in roles)}
        for side in ("answer", "false option")
    ]
    if foil is not None and sides[1] <= sides[0]:
        raise TraceError(
            f"the foil {foil!r} begins with the same tokens as the answer {answer!r}, so the two cannot be told apart "
            "by their first tokens; pass another foil"
        )
