"""The options of multrace flow, and the readings and questions that they ask for."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..tracing import Engine
from ..tracing.engine.settings import ENGINES
from .errors import CommandError
from .flow_asking import OF_MANY, OF_ONE, AskingOptions
from .flow_contributions import Failure, ImageToConstraint, ToLast
from .flow_knockout import Knockout
from .flow_lens import Lens
from .flow_reading import Reading
from .flow_relevance import Cam, Saliency, Share, Truncated
from .options import option

ANALYSES = ("knockout", "lens", "contributions", "relevance")
_ENGINE = Engine()
_OF_ANALYSIS = {
    "knockout": ("flows", "windows", "heads", "whole_answer"),
    "lens": ("positions", "foil"),
    "contributions": ("degrade",),
    "relevance": ("smooth", "keep"),
}


def _number_or(*words: str) -> Any:
    """What turns a text into a number, or leaves it if it is one of the words (any word if there are none)."""

    def parsed(text: str) -> int | str:
        if text.removeprefix("-").isdecimal():
            return int(text)
        if words and text not in words:
            raise argparse.ArgumentTypeError(f"{text!r}: write {' or '.join(words)}, or numbers")
        return text

    return parsed


@dataclass(frozen=True, kw_only=True)
class Flow(AskingOptions):
    """Options of `multrace flow`."""

    knockout: bool = option(
        "cut attention from one group of tokens to another, layer by layer (the default)",
        default=False,
        action="store_true",
    )
    lens: bool = option("what the output head would say after every layer", default=False, action="store_true")
    contributions: bool = option(
        "what attention brings from the picture to the constraint and from there to the answer; with many questions, "
        "also whether that tells right answers from wrong ones",
        default=False,
        action="store_true",
    )
    relevance: bool = option(
        "LLaVA-CAM, attention shares, attention x gradient, and image tokens dropped from each layer on",
        default=False,
        action="store_true",
    )
    flows: tuple[str, ...] | None = option(
        'knockout: "source -> target" by token groups (image, question, last, constraint, object, other patches, '
        "separators, system, template, ...) or positions (default: those of the study that a question has)",
        default=None,
        nargs="+",
        metavar="FLOW",
    )
    windows: tuple[int, ...] | None = option(
        "knockout: how many layers are cut together (default: 1, and the same share of all layers as 9 of 40)",
        default=None,
        nargs="+",
        type=int,
        metavar="N",
    )
    heads: tuple[int | str, ...] | None = option(
        "knockout: only these heads lose the edges, or each on its own (default: all together)",
        default=None,
        nargs="+",
        type=_number_or("each"),
        metavar="each|HEAD",
    )
    whole_answer: bool = option(
        "knockout: score all tokens of the answer besides its first", default=False, action="store_true"
    )
    positions: tuple[int | str, ...] | None = option(
        "lens: token groups or positions to read, of which the first is averaged (default: last; for one question also "
        "question)",
        default=None,
        nargs="+",
        type=_number_or(),
        metavar="GROUP",
    )
    smooth: int = option(
        "relevance: average LLaVA-CAM over so many noisy copies (default 0: the picture itself)",
        default=0,
        type=int,
        metavar="N",
    )
    keep: tuple[int | str, ...] = option(
        "relevance: how many image tokens stay, those with most attention (default 0), or all",
        default=(0,),
        nargs="+",
        type=_number_or("all"),
        metavar="N",
    )
    engine: str = option(
        "auto (default); replay: compute only what can have changed; plain: one forward pass per cell",
        default=_ENGINE.name,
        choices=ENGINES,
    )
    memory: int = option(
        f"MiB that replay may use beside the model (default {_ENGINE.memory})",
        default=_ENGINE.memory,
        type=int,
        metavar="MIB",
    )
    checks: int = option(
        f"random cells that are computed a second time the plain way, for the first three questions (default "
        f"{_ENGINE.checks})",
        default=_ENGINE.checks,
        type=int,
        metavar="N",
    )
    out: Path = option("folder for the results (default out/flow)", default=Path("out/flow"), type=Path)

    @property
    def analyses(self) -> tuple[str, ...]:
        """The analyses that were asked for."""
        return tuple(name for name in ANALYSES if getattr(self, name)) or ANALYSES[:1]

    def check(self) -> None:
        """CommandError or TraceError for options that do not fit together, or that no model could follow."""
        given = [name for name in ("question", "records", "world") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "nothing to ask"
            raise CommandError(f"found {found}; pass one of --question, --records FILE_OR_FOLDER and --world N")
        self._check_belongings(given[0])
        for name in ("limit", "world"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise CommandError(f"--{name} {value}: ask at least one question")
        if self.smooth < 0:
            raise CommandError(f"--smooth {self.smooth}: average over 0 noisy copies or more")
        if self.heads and "each" in self.heads and len(self.heads) > 1:
            raise CommandError("--heads takes 'each' or numbers of heads, not both")
        self.settings_of_engine(checked=True)
        for reading in self.readings():
            reading.check_settings()

    def readings(self) -> tuple[Reading, ...]:
        """What is computed for each question."""
        one = self.is_one
        positions = self.positions or (("last", "question") if one else ("last",))
        heads = "each" if self.heads == ("each",) else self.heads
        known: dict[str, tuple[Reading, ...]] = {
            "knockout": (
                Knockout(flows=self.flows, windows=self.windows, heads=heads, whole_answer=self.whole_answer),
            ),
            "lens": (Lens(positions=positions),),
            "contributions": (
                ToLast(by_head=one),
                ImageToConstraint(by_head=one),
                *(() if one else (Failure(seed=self.seed),)),
            ),
            "relevance": (
                Cam(samples=self.smooth, seed=self.seed),
                Share(),
                Saliency(),
                Truncated(keep=self.keep),
            ),
        }
        return tuple(reading for name in self.analyses for reading in known[name])

    def settings_of_engine(self, *, checked: bool) -> Engine:
        """The engine, with its check or without. TraceError for settings that it does not have."""
        return Engine(name=self.engine, memory=self.memory, checks=self.checks if checked else 0)

    def _check_belongings(self, asked: str) -> None:
        """CommandError for an option that belongs to another way of asking, or to an analysis that is not asked for."""
        others = {
            "question": dict.fromkeys(OF_MANY, "many questions (--records or --world)"),
            "records": dict.fromkeys(OF_ONE, "one question; write it into each record"),
            "world": dict.fromkeys(OF_ONE, "one question") | dict.fromkeys(("images", "limit"), "--records"),
        }
        if wrong := [name for name in others[asked] if self._is_given(name)]:
            raise CommandError(f"{_flag(wrong[0])} cannot go with --{asked}: it is for {others[asked][wrong[0]]}")
        for analysis, names in _OF_ANALYSIS.items():
            if analysis not in self.analyses and (wrong := [name for name in names if self._is_given(name)]):
                raise CommandError(f"{_flag(wrong[0])} belongs to --{analysis}, which is not asked for; add it")

    def _is_given(self, name: str) -> bool:
        """Whether an option is other than its default."""
        default = next(each.default for each in fields(self) if each.name == name)
        return getattr(self, name) != default


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
