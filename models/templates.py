"""Templates that frame a question: the model's chat template, the plain LLaVA wording, or the caller's own."""

from typing import Any

from .errors import ModelError, gist
from .texts import check_text

_MARK = "\ue000"  # a private-use character: no template and no question contains it


def frame(processor: Any, *, images: int, image_token: str | None, template: str | None = None) -> tuple[str, str]:
    """Return the text before and after the question; together they contain one image token per picture.

    Args:
        processor: The processor, or the tokenizer of a text-only model.
        images: Number of pictures.
        image_token: The text of one image position; None for a text-only model.
        template: None for the model's own (the processor's chat template; "USER: <image>\\n{question} ASSISTANT:" where
            it has none; the bare question for a text-only model without one), "raw" for the image tokens and the
            question alone, or a text with {question} once and {image} once for all pictures or once for each. Without
            pictures, {image} stands for nothing.

    Raises:
        ModelError: The template cannot be rendered, or shows the question or the pictures more or less often than it
            should.
    """
    if images and image_token is None:
        raise ModelError("this is a text-only model; pass image=None")
    image_tokens = [image_token or ""] * images
    if template == "raw":
        return "".join(image_tokens), ""
    if template is not None:
        rendered = _custom(template, image_tokens)
    elif getattr(processor, "chat_template", None):
        rendered = _chat(processor, images, has_vision=image_token is not None)
    elif image_token is None:
        rendered = _MARK
    else:
        rendered = "USER: " + "".join(f"{token}\n" for token in image_tokens) + _MARK + " ASSISTANT:"
    check_text(rendered, "template")
    if rendered.count(_MARK) != 1:
        raise ModelError(f"the template shows the question {rendered.count(_MARK)} times; it must show it exactly once")
    if image_token and template is not None and rendered.count(image_token) != images:
        raise ModelError(
            f"the template {template!r} shows {rendered.count(image_token)} pictures and the prompt has {images}; "
            f"write {{image}} in place of {image_token!r}"
        )
    before, after = rendered.split(_MARK)
    return before, after


def _custom(template: str, image_tokens: list[str]) -> str:
    if "{question}" not in check_text(template, "template"):
        raise ModelError(f"the template {template!r} has no {{question}}; write where the question goes")
    shown, given = template.count("{image}"), len(image_tokens)
    if given and not shown:
        raise ModelError(f"the template {template!r} has no {{image}}; write where the picture goes")
    if given and shown not in (1, given):
        raise ModelError(
            f"the template {template!r} has {{image}} {shown} times and the prompt has {given} "
            f"picture{'s' if given > 1 else ''}; write it once for all pictures, or once for each"
        )
    parts = image_tokens if shown == given else ["\n".join(image_tokens)] * shown
    for part in parts:
        template = template.replace("{image}", part, 1)
    return template.replace("{question}", _MARK)


def _chat(processor: Any, images: int, *, has_vision: bool) -> str:
    content: Any = [*[{"type": "image"}] * images, {"type": "text", "text": _MARK}] if has_vision else _MARK
    messages = [{"role": "user", "content": content}]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a chat template is third-party code, which can raise anything
        where = getattr(processor, "tokenizer", processor).name_or_path
        raise ModelError(
            f"the chat template of {where!r} cannot be rendered: {type(error).__name__}: {gist(error)}; mend its "
            "chat_template, or pass template='raw' or a text with {question} and {image}"
        ) from error
