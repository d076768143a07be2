"""Options of `multrace edit` and `multrace evaluate`: the editor and its settings, the requests, and the place."""

# Annotations are not postponed here: commands inherit these options, and would otherwise have to import every name that
# stands in them.

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .. import data, editing, models, tracing, workflow
from ..data import spans
from ..editing import siblings as sibling_room, solve
from .options import (
    BASELINES,
    EDITOR,
    EDITORS,
    GRADIENT_EDITORS,
    MOMENT_KINDS,
    PROJECTIONS,
    CommandError,
    CorruptionOptions,
    GeneralOptions,
    RunOptions,
)

_PLACE = ("layer", "layers", "token", "spread", "where")
NAMES = (*EDITORS, *GRADIENT_EDITORS, *BASELINES)
"""Every name that --editor takes."""
PAPER = "paper"
OWN_MOMENTS, NO_MOMENTS = "own", "none"
"""What --moments takes in place of a file."""
_GRADIENT_SPREAD = 2
"""Number of layers that an editor by one gradient step changes, unless --spread or --where says otherwise."""
ANY_LAYER = 10**6
"""A layer above those of any model, for editors whose layer is chosen later: any number of layers lies below it."""


@dataclass(frozen=True, kw_only=True)
class EditorOptions(GeneralOptions):
    """The editor and its settings; None leaves a setting at the default of the editor or of the preset."""

    editor: Annotated[
        str, Parameter(help="method that makes the edits", group=EDITOR, choices=NAMES, metavar="NAME")
    ] = "multedit"
    preset: Annotated[
        str | None,
        Parameter(
            help="paper: start from the published constants of the editor, which other options override (default: "
            "start from its own defaults)",
            group=EDITOR,
            choices=(PAPER,),
        ),
    ] = None
    moments: Annotated[
        Path | None,
        Parameter(
            help="second moments of old keys, by which rome, memit, emmet and alphaedit weigh old keys, and multedit "
            "with --moment-weight: a FILE made by multrace moments; own for those of texts that the model samples, "
            "and of its answers about the pictures of the edits, which take about a minute with a small model and are "
            "then kept in the cache; or none (default: own, where the editor needs them)",
            group=EDITOR,
            metavar="FILE|own|none",
        ),
    ] = None
    projection: Annotated[
        str | None,
        Parameter(
            help="weight that is changed: mlp (the down projection) or attention (the output projection) (default: "
            "mlp)",
            group=EDITOR,
            choices=PROJECTIONS,
        ),
    ] = None
    expert: Annotated[
        int | Literal["routed"] | None,
        Parameter(
            help="in a layer of experts, the number of the routed expert that alone is changed, or routed for all that "
            "the edited tokens are routed to (default: the expert that every token sees, or routed where there is "
            "none)",
            group=EDITOR,
            metavar="N|routed",
            show_choices=False,
        ),
    ] = None
    spread: Annotated[
        int | None,
        Parameter(
            help="number of layers that share the change, the last of which is the layer to edit (default: 3 for "
            "memit and alphaedit, 2 for ultraedit and stableedit, 1 for the others)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Parameter(
            help="maximum number of steps of the value search, or of training with ft, ft-l and lora (default: 200 for "
            "multedit); ft-bf and lora-bf have a number of epochs instead",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Parameter(
            help="learning rate of the value search, of the training, or of the gradient step in place of --step-size "
            "(default: 0.3 for multedit)",
            group=EDITOR,
            metavar="RATE",
        ),
    ] = None
    step_size: Annotated[
        float | None,
        Parameter(
            help="norm of the change of outputs that ultraedit and stableedit ask for, on average and in sum over the "
            "layers, as a share of the norm of outputs; without --learning-rate (default: 3.0 for ultraedit)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    warm_up: Annotated[
        int | None,
        Parameter(
            help="number of edits at the beginning from which ultraedit and stableedit only gather statistics "
            "(default: 0 for ultraedit)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    stop_loss: Annotated[
        float | None,
        Parameter(
            help="loss in nats per target token at which the value search or the training stops (default: 0.005 for "
            "multedit)",
            group=EDITOR,
            metavar="NATS",
        ),
    ] = None
    clamp: Annotated[
        float | None,
        Parameter(
            help="maximum norm of the change of an output, as a multiple of the norm of that output; inf for no limit "
            "(default: 10.0 for multedit)",
            group=EDITOR,
            metavar="RATIO",
        ),
    ] = None
    weight_decay: Annotated[
        float | None,
        Parameter(
            help="weight of the penalty on the relative norm of the change, or weight decay of ft, ft-l and ft-bf "
            "(default: 0.001 for multedit)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    essence_weight: Annotated[
        float | None,
        Parameter(
            help="weight of the KL penalty that keeps the next token after essence prompts (default: 0.0625 for "
            "multedit)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    ridge_fraction: Annotated[
        float | None,
        Parameter(
            help="ridge of the least squares, as a share of the mean squared norm of what kept keys leave of a key "
            "(default: 0.02 for multedit)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    ridge: Annotated[
        float | None,
        Parameter(
            help="ridge in units of a squared key norm, instead of --ridge-fraction (default: none for multedit)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    weight: Annotated[
        float | None,
        Parameter(
            help="weight of each edited key in the least squares; inf for an exact fit (default: 1.0 for multedit)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    preserve_weight: Annotated[
        float | None,
        Parameter(
            help="weight of the keys of questions whose outputs stay; inf for an exact fit (default: exact where that "
            "leaves each request at least half of what it would be given without them)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    ending: Annotated[
        str | None,
        Parameter(
            help="what is asked for after the target: own (what the model says after its present answer), stop (the "
            "end of sequence) or none (default: own for multedit)",
            group=EDITOR,
            choices=("own", "stop", "none"),
        ),
    ] = None
    siblings: Annotated[
        str | None,
        Parameter(
            help="auto keeps the same question about others, and other questions about the same subject, as they are; "
            "none keeps only what records ask to keep (default: auto for multedit, none for the others)",
            group=EDITOR,
            choices=("auto", "none"),
        ),
    ] = None
    sibling_names: Annotated[
        Path | None,
        Parameter(
            help="file with a name of another subject on each line, in place of names that the model gives",
            group=EDITOR,
            metavar="FILE",
        ),
    ] = None
    sibling_pictures: Annotated[
        Path | None,
        Parameter(
            help="folder with pictures of other things, about which the same question is kept",
            group=EDITOR,
            metavar="FOLDER",
        ),
    ] = None
    moment_weight: Annotated[
        float | None,
        Parameter(
            help="number of old keys that the second moments stand for; 0 leaves them out of the cost (default: 0.0 "
            "for multedit)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    moment_kind: Annotated[
        str | None,
        Parameter(
            help="tokens whose second moments are used (default: all for multedit)", group=EDITOR, choices=MOMENT_KINDS
        ),
    ] = None
    null_threshold: Annotated[
        float | None,
        Parameter(
            help="leave directions unchanged whose second moment is at least this share of the mean (default: none for "
            "multedit)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    null_share: Annotated[
        float | None,
        Parameter(
            help="leave as few directions unchanged as hold this share of the second moments, such as 0.99, instead of "
            "--null-threshold (default: none)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    null_refresh: Annotated[
        int | None,
        Parameter(
            help="number of edits after which the unchanged directions are chosen anew, with the keys of these edits "
            "(default: never)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    earlier_weight: Annotated[
        float | None,
        Parameter(
            help="weight of the keys of earlier edits of a sequence, whose outputs stay; inf for an exact fit "
            "(default: 1.0 for multedit and alphaedit, none for the others)",
            group=EDITOR,
            metavar="WEIGHT",
        ),
    ] = None
    norm_anchor: Annotated[
        float | Literal["pilot"] | None,
        Parameter(
            help="norm that new outputs are scaled to in a long sequence, or pilot for the mean over its first "
            "--norm-pilot edits (default: none)",
            group=EDITOR,
            metavar="NORM|pilot",
            show_choices=False,
        ),
    ] = None
    norm_pilot: Annotated[
        int | None,
        Parameter(
            help="number of edits that give the norm of --norm-anchor pilot (default: 100)", group=EDITOR, metavar="N"
        ),
    ] = None
    change_limit: Annotated[
        float | None,
        Parameter(
            help="refuse an edit that changes a weight by more than this share of its norm (default: none)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    growth_limit: Annotated[
        float | None,
        Parameter(
            help="refuse an edit after which the norm of a weight would be more than this multiple of that before the "
            "first edit, such as 1.5 (default: none)",
            group=EDITOR,
            metavar="RATIO",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, under the names that the editors have for them."""
        of_siblings = ("siblings", "sibling_names", "sibling_pictures")
        apart = ("editor", "preset", "moments", "spread", *of_siblings, *(row.name for row in fields(GeneralOptions)))
        names = [row.name for row in fields(EditorOptions) if row.name not in apart]
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return own | (
            {} if all(getattr(self, name) is None for name in of_siblings) else {"siblings": self._siblings()}
        )

    def _siblings(self) -> "sibling_room.Siblings | None":
        """The siblings that the options name. Raises `CommandError` for a file or folder that cannot be read."""
        if self.siblings == "none":
            if self.sibling_names or self.sibling_pictures:
                raise CommandError("--siblings none keeps none; leave --sibling-names and --sibling-pictures out")
            return None
        names: tuple[str, ...] = ()
        if self.sibling_names is not None:
            names = read_texts(self.sibling_names)
        pictures: tuple[Path, ...] = ()
        if self.sibling_pictures is not None:
            if not self.sibling_pictures.is_dir():
                raise CommandError(f"--sibling-pictures {str(self.sibling_pictures)!r} is no folder")
            files = sorted(path for path in self.sibling_pictures.iterdir() if path.is_file())
            pictures = tuple(path for path in files if data.inspect_picture(path).problem is None)
            if not pictures:
                raise CommandError(f"--sibling-pictures {str(self.sibling_pictures)!r} holds no picture")
        return sibling_room.Siblings(names=names, pictures=pictures)

    def check_moments(self, editors: Mapping[str, Any]) -> None:
        """Raises `CommandError` if an editor needs what --moments refuses or none uses it, `EditError` for a bad file.

        editors: the editors that will be used, by name.
        """
        needing = {
            name: editor
            for name, editor in editors.items()
            if isinstance(editor, editing.ClosedFormEditor) and editor.needs_moments
        }
        if self.moments is not None and str(self.moments) != NO_MOMENTS:
            if self.moments_file is not None:
                editing.Moments.load(self.moments_file)
            if not needing:
                raise CommandError(
                    f"--moments plays no part, since {' and '.join(editors)} would not weigh old keys by it; pass "
                    "--moment-weight WEIGHT, such as 10, or leave --moments out"
                )
            return
        for name, editor in needing.items() if self.moments is not None else ():
            without = "" if editor.has_null_space else ", or --moment-weight 0 to do without them"
            raise CommandError(
                f"{name} weighs old keys by their second moments, and --moments is {NO_MOMENTS}; leave --moments out, "
                f"so that the model samples texts for them, or pass --moments FILE, made by multrace moments{without}"
            )

    @property
    def moments_file(self) -> Path | None:
        """The file of --moments; None without one."""
        return None if str(self.moments) in (str(None), OWN_MOMENTS, NO_MOMENTS) else self.moments

    def open_moments(self, vlm: "models.VisionLanguageModel") -> "editing.Moments | None":
        """Return the moments in the file of --moments, None for own ones. Raises `EditError` if they do not fit."""
        if self.moments_file is None:
            return None
        moments = editing.Moments.load(self.moments_file)
        moments.check(vlm)
        return moments


@dataclass(frozen=True, kw_only=True)
class ComparedEditorOptions(EditorOptions):
    """The same with the settings of training that baselines alone have."""

    epochs: Annotated[
        int | None,
        Parameter(
            help="maximum number of passes over the prompts with ft-bf and lora-bf, which take a step for each "
            "mini-batch (default: 60 for ft-bf)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    mini_batch: Annotated[
        int | None,
        Parameter(
            help="number of prompts of a mini-batch of ft-bf and lora-bf (default: 64 for ft-bf)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None
    held_out: Annotated[
        float | None,
        Parameter(
            help="share of the prompts that ft-bf and lora-bf do not train on but stop early by; these are contexts "
            "and other questions of the edits, never their own questions (default: 0.1 for ft-bf)",
            group=EDITOR,
            metavar="SHARE",
        ),
    ] = None
    patience: Annotated[
        int | None,
        Parameter(
            help="number of epochs without a lower loss of the held-out prompts after which ft-bf and lora-bf stop "
            "(default: 3 for ft-bf)",
            group=EDITOR,
            metavar="N",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, under the names that the editors and the order of training have."""
        names = ("epochs", "mini_batch", "held_out", "patience")
        return super().settings() | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """How to make a baseline from the options that all editors share."""

    kind: str
    """The name of its class in `editing`."""
    preset: str | None = None
    """The method of the class that returns its default settings; None for the class itself."""
    paper: str | None = None
    """The method that returns the published settings; None if there are none."""
    has_layer: bool = False


_BASELINES: Mapping[str, _Baseline] = {
    "ft": _Baseline(kind="FineTune", paper="paper", has_layer=True),
    "ft-l": _Baseline(kind="FineTune", preset="constrained", paper="constrained", has_layer=True),
    "ft-bf": _Baseline(kind="FineTune", preset="breadth_first", paper="locft", has_layer=True),
    "lora": _Baseline(kind="Lora"),
    "lora-bf": _Baseline(kind="Lora", preset="breadth_first"),
    "in-context": _Baseline(kind="InContext"),
}
"""Fine-tuning of projections, the same within a bound, the same in epochs over mini-batches (breadth first, LocFT-BF),
LoRA in all layers, the same in such epochs, and the facts in front of the question."""


def editor(
    name: str,
    *,
    layer: int,
    token: str | int = "last",
    spread: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Any:
    """Return the editor of this name, which can start sessions.

    Args:
        name: One of `NAMES`.
        layer: The layer that is changed, the last one of several. "lora" adapts all layers unless the settings name
            `layers`, and "in-context" changes none.
        token: The token group or position at which a closed-form editor edits (default "last").
        spread: The number of layers that share the change, or that fine-tuning or a gradient step changes at once. None
            (default) is the number of the editor, or fewer if fewer layers lie below.
        preset: "paper" for the published constants, which the settings override; None (default) for the defaults of
            the editor.
        settings: Fields of the editor.

    Returns:
        A closed-form editor, an editor by one gradient step, or a baseline.

    Raises:
        CommandError: The name, the preset or a setting is unknown.
        EditError: A setting is out of range.
    """
    if preset not in (None, PAPER):
        raise CommandError(f"no preset {preset!r}; pass 'paper', or leave it out for the defaults")
    if name in EDITORS:
        kind = solve.EDITORS[name]
        _check_settings(name, kind, settings)
        place = {"layer": ANY_LAYER, "token": token}  # presets spread the change over no more layers than there are
        result = kind.paper(**place) if preset else kind(**place)
        if spread is None:
            spread = min(result.spread, layer + 1) if layer >= 0 else result.spread
        return replace(result, layer=layer, spread=spread, **settings)
    if name in GRADIENT_EDITORS:
        kind = solve.GRADIENT_EDITORS[name]
        _check_settings(name, kind, settings)
        layers = _gradient_layers(layer, spread)
        return replace(kind.paper(layers=layers) if preset else kind(layers=layers), **settings)
    if name not in BASELINES:
        raise CommandError(f"no editor {name!r}; pass one of {', '.join(NAMES)}")
    row = _BASELINES[name]
    if preset and row.paper is None:
        raise CommandError(f"{name} has no published constants for the preset {preset!r}; leave the preset out")
    kind = getattr(editing, row.kind)
    start = row.paper if preset else row.preset
    result = (getattr(kind, start) if start else kind)(**{"layer": layer} if row.has_layer else {})
    order: Any = getattr(result, "order", None)
    of_order = () if order is None else tuple(each.name for each in fields(order))
    _check_settings(name, kind, settings, of_order)
    if chosen := {setting: settings.pop(setting) for setting in of_order if setting in settings}:
        settings["order"] = replace(order, **chosen)
    if row.has_layer and spread is not None and spread > 1:
        settings |= {"layer": None, "layers": _layers(layer, spread)}
    return replace(result, **settings)


def _gradient_layers(layer: int, spread: int | None) -> tuple[int, ...]:
    """The layers that a gradient step changes, the last of which is `layer`."""
    if spread is None:
        spread = min(_GRADIENT_SPREAD, layer + 1) if layer >= 0 else _GRADIENT_SPREAD
    if spread < 1 or 0 <= layer < spread - 1:
        raise CommandError(f"{spread} layers up to layer {layer} do not exist; pass another --spread or --where")
    return tuple(range(layer - spread + 1, layer + 1))


def check_place(name: str) -> None:
    """Raise `CommandError` for an editor that cannot be placed by traces, which find one layer and one token."""
    if name in GRADIENT_EDITORS:
        raise CommandError(
            f"{name} changes the layers that are named, at the tokens of the answers, and no trace chooses these; pass "
            "--where LAYER or --where FIRST-LAST"
        )


def _layers(last: int, count: int) -> tuple[int, ...]:
    """Return so many layers up to the last. Raises `CommandError` if there are fewer."""
    if 0 <= last < count - 1:
        raise CommandError(f"{count} layers up to layer {last} are more than there are; pass at most {last + 1}")
    return tuple(range(last - count + 1, last + 1))


def _check_settings(name: str, kind: type, settings: Mapping[str, Any], of_order: Sequence[str] = ()) -> None:
    """Raise `CommandError` for an unknown setting. of_order: the settings of the order of a training, if it has one."""
    apart = (*_PLACE, "order", *(("steps",) if of_order else ()))
    known = [*(row.name for row in fields(kind) if row.name not in apart), *of_order]
    if unknown := [setting for setting in settings if setting not in known]:
        raise CommandError(f"{name} has no setting {unknown[0]!r}; leave it out, or pass one of {', '.join(known)}")


def make_editor(options: EditorOptions, *, layer: int, token: str | int = "last", spread: int | None = None) -> Any:
    """Return the editor that the options name, at this place; errors as in `editor`.

    spread: the number of layers that share the change; None for --spread, or without it the default of the editor.
    """
    place = {"layer": layer, "token": token, "spread": options.spread if spread is None else spread}
    return editor(options.editor, **place, preset=options.preset, **options.settings())


_WHERE = re.compile(r"(?P<first>-?\d+)(?:-(?P<last>\d+))?(?::(?P<token>.+))?")
_NUMBER = re.compile(r"-?\d+")


def parse_place(where: str) -> "workflow.Place":
    """Return the place that LAYER, LAYER:TOKEN, FIRST-LAST or FIRST-LAST:TOKEN names; the default token is the last.

    Raises `CommandError` for anything else.
    """
    match = _WHERE.fullmatch(where)
    first, last = (int(match[name]) if match and match[name] else None for name in ("first", "last"))
    if first is None or (last is not None and not 0 <= first <= last):
        raise CommandError(
            f"no place {where!r}; write --where trace, --where 4, --where 4:constraint_last or --where 3-5:last"
        )
    token = match["token"] or "last"
    return workflow.Place(
        layer=first if last is None else last,
        token=int(token) if _NUMBER.fullmatch(token) else token,
        spread=None if last is None else last - first + 1,
        reason="as asked",
    )


@dataclass(frozen=True, kw_only=True)
class RequestOptions(CorruptionOptions, RunOptions):
    """One request (the fact, other ways to ask for it, and what must stay), or a file of requests."""

    # pyrefly: ignore[bad-override] -- not needed where records are given
    question: Annotated[
        str | None, Parameter(help="question to ask; either this or --data is needed", metavar="TEXT")
    ] = None
    target: Annotated[str | None, Parameter(help="new answer to --question, which needs it", metavar="ANSWER")] = None
    context_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="other pictures of the same thing; keys are averaged over them, and the new answer must hold for each",
            metavar="FILE",
        ),
    ] = ()
    also_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="other pictures about which --question must get the new answer, with keys of their own", metavar="FILE"
        ),
    ] = ()
    also_question: Annotated[
        tuple[str, ...], Parameter(help="other questions about --image that must get the new answer", metavar="TEXT")
    ] = ()
    also_text: Annotated[
        tuple[str, ...],
        Parameter(
            help="questions without a picture, for example by name, that must get the new answer", metavar="TEXT"
        ),
    ] = ()
    keep_image: Annotated[
        tuple[str, ...], Parameter(help="pictures about which --question must keep its present answer", metavar="FILE")
    ] = ()
    keep_question: Annotated[
        tuple[str, ...],
        Parameter(help="other questions about --image that must keep their present answers", metavar="TEXT"),
    ] = ()
    augment: Annotated[
        int,
        Parameter(
            help="number of variants of each picture (crops, jitters, shifts) over which keys are averaged as well",
            metavar="N",
        ),
    ] = 0

    def check_request(self) -> None:
        """Raises `CommandError` for options that do not fit together."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question with --target, or --data FILE")
        if self.data is None and (wrong := self.given(_OF_MANY)):
            raise CommandError(f"{wrong[0]} belongs to --data FILE; leave it out")
        if self.data is not None and (wrong := self.given(_OF_ONE)):
            raise CommandError(f"{wrong[0]} belongs to one request; with --data, write it into each line")
        if self.augment < 0 or (self.augment and self.data is None and self.image is None):
            raise CommandError(
                f"--augment {self.augment} needs a picture and a number of at least 0; pass --image FILE, or leave it "
                "out"
            )
        self.check_run()

    def check_target(self) -> None:
        """Raises `CommandError` for a request without a target."""
        if self.target is None or not self.target.strip():
            raise CommandError(f"the target of the edit is {self.target!r}; pass the new answer, as --target Paris")

    def check_question(self) -> None:
        """Raises `ModelError` also for another picture that cannot be read."""
        super().check_question()
        for path in (*self.context_image, *self.also_image, *self.keep_image):
            models.open_images(path)


NEXT = "swap:next"
"""The value of --corrupt for the picture of the next record."""
_OF_ONE = ("image", "constraint", "target", "context_image", "also_image", "also_question", "also_text")
_OF_ONE += ("keep_image", "keep_question")
_OF_MANY = ("format", "images", "limit", "shard", "retry_failed")


def request_of(options: RequestOptions, vlm: "models.VisionLanguageModel") -> "data.EditRequest":
    """Return the one request of the options; errors as in `VisionLanguageModel.prompt` and `EditRequest`."""
    image, prompt = options.image, partial(_prompt, options, vlm)
    question = options.prompt(vlm).as_question()
    also = [prompt(path) for path in options.also_image]
    also += [prompt(image, text) for text in options.also_question]
    also += [prompt(None, text) for text in options.also_text]
    keep = [prompt(path) for path in options.keep_image]
    keep += [prompt(image, text) for text in options.keep_question]
    return data.EditRequest(
        question=question,
        target=options.target,
        contexts=tuple(prompt(path) for path in options.context_image),
        rewrite_prompts=tuple(also),
        preserve_prompts=tuple(keep),
    )


def variants(count: int) -> "editing.Augmentation | None":
    """Return the augmentation that makes this number of variants of a picture, or None for 0."""
    crops, jitters, shifts = ((count + rest) // 3 for rest in (2, 1, 0))
    return editing.Augmentation(crops=crops, jitters=jitters, shifts=shifts) if count else None


def edit_rows(options: RequestOptions, *, traced: bool) -> tuple[tuple[int, Any], ...]:
    """Return the records of --data with their row numbers; a row that cannot be edited has its `DataError` instead.

    traced: whether each record is traced and so needs a corruption; with --corrupt swap:next, that is the picture of
    the next record.

    Raises `CommandError` if no record names a corruption and --corrupt is missing, or if all show the same picture.
    """
    rows = [(row, _usable_edit(record)) for row, record in options.records()]
    edits = [record for _, record in rows if isinstance(record, data.EditRecord)]
    if not traced:
        return tuple(rows)
    if options.corrupt is None and edits and not any(edit.question.corrupt for edit in edits):
        options.corruption()
    if options.corrupt != NEXT:
        return tuple(rows)
    next_pictures = {id(edit): swapped(edits, index) for index, edit in enumerate(edits)}
    return tuple((row, _under(record, next_pictures.get(id(record)))) for row, record in rows)


def _usable_edit(record: Any) -> Any:
    """Return the record, or the error that says why it cannot be edited."""
    try:
        if isinstance(record, data.Question):
            raise data.DataError(f"{record.text!r} has no 'target'; add the new answer")
        if isinstance(record, data.EditRecord):
            _check(record)
    except data.DataError as error:
        return error
    return record


def _under(record: Any, corruption: "tracing.SwapImage | None") -> Any:
    """Return the record with this corruption of its question, unless it names one of its own."""
    if corruption is None or record.question.corrupt is not None:
        return record
    return replace(record, question=replace(record.question, corrupt=f"swap:{corruption.image}"))


def _prompt(
    options: RequestOptions, vlm: "models.VisionLanguageModel", image: str | None, question: str | None = None
) -> data.Question:
    """Return a question about another picture or in other words; the constraint is marked if it occurs there once."""
    text = options.question if question is None else question
    is_said = options.constraint is not None and spans.says_once(text, options.constraint)
    return vlm.prompt(image, text, constraint=options.constraint if is_said else None).as_question()


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the lines of a file that are not empty. Raises `CommandError` if it cannot be read or has none."""
    try:
        texts = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {str(path)!r}: {error}; pass a text file in UTF-8") from error
    if not texts:
        raise CommandError(f"{str(path)!r} has no text; write one per line")
    return texts


def read_cloze(path: Path) -> "tuple[data.Question, ...]":
    """Return the questions of a file whose answers are known; those of edits are taken with their present answers.

    Raises `CommandError` for the first row that cannot be used, and if no answer is known.
    """
    records: list[data.EditRecord | data.Question] = []
    for row, record in data.read_data(path):
        if isinstance(record, data.DataError):
            raise CommandError(f"row {row} of {str(path)!r}: {record}; multrace data check lists all such rows")
        records.append(record)
    asked = [record for record in records if isinstance(record, data.Question) and record.answer]
    edits = [record for record in records if isinstance(record, data.EditRecord)]
    questions = (*asked, *editing.cloze_questions(edits))
    if not questions:
        raise CommandError(f"{str(path)!r} has no question with a known answer; write 'answer' into its lines")
    return questions


def read_general(path: Path, *, format: str | None = None, images: Path | None = None) -> "tuple[data.Question, ...]":
    """Return held-out questions with their right answers, after checking the headers of their pictures.

    Raises `CommandError` for the first row that cannot be used, with the number of the others.
    """
    questions: list[data.Question] = []
    problems: list[str] = []
    for row, record in data.read_data(path, format=format, images=images):
        try:
            if isinstance(record, data.DataError):
                raise record
            if not isinstance(record, data.Question):
                raise data.DataError(
                    "it has a 'target', but a held-out question needs an 'answer'; write it without the target"
                )
            _check(record)
            questions.append(record if record.id else replace(record, id=f"line_{row}"))
        except data.DataError as error:
            message = str(error)
            problems.append(message if f"{str(path)!r}: " in message else f"line {row} of {str(path)!r}: {message}")
    if problems:
        rows = len(problems) + len(questions)
        more = f" ({len(problems) - 1} more of {rows} lines cannot be used either)" if len(problems) > 1 else ""
        raise CommandError(f"{problems[0]}{more}; multrace data check lists all, and its --fix leaves them out")
    return tuple(questions)


def _check(record: "data.Question | data.EditRecord") -> None:
    """Raises `DataError` for a question that no model could be asked."""
    if isinstance(record, data.Question) and record.answer is None:
        raise data.DataError(f"no 'answer' to {record.text!r}; add the right answer")
    for _, question in data.questions_of(record):
        for image in question.images:
            if isinstance(image, Path) and (problem := data.inspect_picture(image).problem):
                raise data.DataError(problem)
        for words in question.words.values():
            data.find_spans(question.text, words)


def swapped(entries: "Sequence[data.EditRecord]", index: int) -> "tracing.SwapImage | None":
    """Return the picture of the next entry that shows another picture, with the same question if possible.

    A picture of another kind of thing would corrupt the kind too, which the words of the question reveal early. Raises
    `CommandError` if all entries show the same picture.
    """
    own = entries[index].question
    if own.image is None:
        return None
    others = [entry.question for entry in (*entries[index + 1 :], *entries[:index])]
    candidates = [other for other in others if other.images and other.image != own.image]
    if not candidates:
        raise CommandError(
            "a trace under the next record's picture needs records with different pictures; all have "
            f"{str(own.images[0])!r}; add records, or name the place by --where LAYER:TOKEN"
        )
    return tracing.SwapImage(next((other for other in candidates if other.text == own.text), candidates[0]).images[0])
