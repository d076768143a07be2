"""The tokens whose way to the output is followed: the answer's, the false option's, and any others."""

from dataclasses import dataclass

from ..errors import TraceError


@dataclass(frozen=True, kw_only=True)
class FollowedTokens:
    """Tokens, each once, with the words that begin with it and the roles that it plays."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """What each token says, blanks included."""
    words: tuple[tuple[str, ...], ...]
    """Per token the words of which it is the first token; empty for one that was given as an id."""
    roles: tuple[tuple[str, ...], ...]
    """Per token what it stands for, named alike in every prompt: "answer, lower case", "word red", ..."""

    @property
    def labels(self) -> tuple[str, ...]:
        """For pictures: what each token says and stands for."""
        return tuple(f"{shown(text)} ({'; '.join(roles)})" for text, roles in zip(self.texts, self.roles, strict=True))

    def index(self, word: str | int) -> int:
        """Which token a word (as spelled when asked), a role or a token id means. TraceError lists what is followed."""
        names = (self.ids,) if isinstance(word, int) else (self.words, self.roles)
        for members in names:
            for index, each in enumerate(members):
                if word == each or (isinstance(each, tuple) and word in each):
                    return index
        words = [name for each in self.words for name in each]
        roles = [name for each in self.roles for name in each]
        raise TraceError(
            f"{word!r} was not followed; followed are the words {', '.join(words)} as {', '.join(roles)} "
            f"(tokens {', '.join(map(str, self.ids))}); read the model again with words=[{word!r}]"
        )


def shown(text: str) -> str:
    """A token's text for pictures: outer blanks removed, with a sign for line breaks and for only a blank."""
    return text.replace("\n", "↵").strip() or "␣"
