"""The prompt before any text, from which a model samples texts of its own."""

from dataclasses import replace

from .frontend import Frontend, is_per_token
from .prompts import Prompt, build

_WORD = "The"
"""A word with which a text can begin."""


def opening(frontend: Frontend) -> Prompt:
    """Return the prompt before any text; see `VisionLanguageModel.opening`."""
    for template in ("{question}", "\n{question}"):
        prompt = build(frontend, None, _WORD, template=template)
        length = prompt.groups["question_only"][0]
        if length:
            return _beginning(prompt, length, template.removesuffix("{question}"))
    return prompt


def _beginning(prompt: Prompt, length: int, text: str) -> Prompt:
    """The first positions of a prompt without pictures, which show this text."""
    inputs = {
        name: value[:, :length] if is_per_token(name, value, prompt.length) else value
        for name, value in prompt.inputs.items()
    }
    empty = dict.fromkeys(prompt.groups, ())
    groups = {**empty, "last": (length - 1,), "all": tuple(range(length))}
    return replace(prompt, question="", text=text, inputs=inputs, tokens=prompt.tokens[:length], groups=groups)
