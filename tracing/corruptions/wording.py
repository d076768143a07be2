"""Other words in the place of a group's words."""

from dataclasses import dataclass

import torch

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError
from ..groups import group_positions
from .corruption import Corrupted


@dataclass(frozen=True, kw_only=True)
class ReplaceText:
    """Another phrase in the place of a group's words ("the company in this photo" becomes "Paris city").

    The replacement gets exactly as many tokens as the group: a longer one is cut, a shorter one starts over. With
    `repeat_first_token`, its first token fills the whole group, as the code that goes with arXiv 2406.04236 does.
    """

    replacement: str
    group: str = "constraint"
    repeat_first_token: bool = False

    def __post_init__(self) -> None:
        if not self.replacement.strip():
            raise TraceError(
                "the replacement is empty; pass the words to put in place of the constraint, such as 'Paris city'"
            )

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """One sample. TraceError if the group is absent or empty, or if it holds image tokens."""
        positions = group_positions(prompt, self.group)
        if set(positions) & set(prompt.groups["image"]):
            raise TraceError(
                f"group {self.group!r} holds image tokens, which words cannot replace; use SwapImage instead"
            )
        ids = prompt.inputs["input_ids"].clone()
        new = _replacement_ids(vlm, prompt, positions, vlm.check_words(self.replacement, "replacement").strip())
        new = new[:1] * len(positions) if self.repeat_first_token else new[: len(positions)]
        original = vlm.decode(ids[0, list(positions)].tolist()).strip()
        ids[0, list(positions)] = torch.tensor(new, device=ids.device)
        return Corrupted(
            embeddings=vlm.embed(prompt, {**prompt.inputs, "input_ids": ids}),
            description=f"replace {original!r} by {vlm.decode(new).strip()!r}",
        )


def _replacement_ids(
    vlm: VisionLanguageModel, prompt: Prompt, positions: tuple[int, ...], replacement: str
) -> list[int]:
    """Tokens of the replacement, over and over, as in running text: after a blank if the original is."""
    tokenizer, ids = vlm.tokenizer, prompt.inputs["input_ids"][0].tolist()
    before = ids[max(0, positions[0] - 1) : positions[0]]
    original = tokenizer.decode([*before, ids[positions[0]]])[len(tokenizer.decode(before)) :]
    start = "a " if original[:1].isspace() else "\n"
    text = start + " ".join([replacement] * len(positions))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > len(start)]
