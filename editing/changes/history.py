"""The edits of one model in order, by name, in memory or in a folder that only grows; any of them can be taken out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import files, plain_fields, replacing_folder
from ...data.facts import counted, shortened
from ...models import ModelError, VisionLanguageModel
from ...models.guards import uninterrupted
from ..requests import EditError
from .delta import Delta, joined
from .weight_change import AppliedDelta, Rounding, check_fingerprints, held, write_all

logger = logging.getLogger("multrace")
INDEX = "index.jsonl"
_LAYOUT = "multrace history 1"
_EDIT, _WITHDRAWAL, _STATE = "edit", "withdrawal", "state"
_FILES = "[0-9][0-9][0-9][0-9][0-9][0-9]*-*.safetensors"
"""Pattern of the files of edits, which begin with the number of changes before the edit was added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HistoryEntry:
    """One edit of a history, as it was made, and how much of it is still in effect."""

    name: str
    source: Delta | Path
    """The edit as it was made, or its file: nothing that is taken out is forgotten."""
    digest: str = ""
    """`Delta.digest` of an edit that is in a file, which loading checks."""
    model: str
    revision: str | None = None
    fingerprints: Mapping[str, str]
    """Hash of each weight that it touches, before the edit."""
    requests: tuple[Mapping[str, str | float], ...] = ()
    """As `Delta.requests`."""
    step: int
    """Number of changes of the history before this edit was added."""
    on_top: bool = False
    """Whether all edits that were in effect at that step were in place when it was made."""
    gone: Mapping[int, int] = field(default_factory=dict)
    """Index of each request that was taken out, with the step at which it was."""
    dropped: int | None = None
    """Step at which all of it was taken out; None while it is in effect."""

    @classmethod
    def of(cls, name: str, delta: Delta, *, step: int, on_top: bool) -> Self:
        """Return the entry of a new edit."""
        own = {"model": delta.model, "revision": delta.revision, "requests": delta.requests}
        return cls(name=name, source=delta, step=step, on_top=on_top, fingerprints=dict(delta.fingerprints), **own)

    @property
    def delta(self) -> Delta:
        """The edit as it was made, read from its file if it is in one. Raises `EditError` if the file is damaged."""
        if isinstance(self.source, Delta):
            return self.source
        delta = Delta.load(self.source)
        if delta.digest != self.digest:
            raise EditError(f"{str(self.source)!r} is not the file of the edit {self.name!r} that the history names")
        return delta

    @property
    def withdrawn(self) -> tuple[int, ...]:
        """Indices of the requests that were taken out, in the order in which they were."""
        return tuple(self.gone)

    @property
    def in_effect(self) -> Delta | None:
        """The edit without what was taken out, its requests renumbered; None once it is dropped."""
        if self.dropped is not None:
            return None
        return self.delta.without(*self.withdrawn) if self.gone else self.delta

    def words(self) -> dict[str, Any]:
        """Return the entry as JSON takes it, with the name of its file; None for an edit in memory."""
        file = self.source.name if isinstance(self.source, Path) else None
        words = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "source"}
        return words | {"file": file, "gone": [*map(list, self.gone.items())]}

    @classmethod
    def from_words(cls, words: Mapping[str, Any], folder: Path) -> Self:
        """Return the entry that `words` spelled."""
        parts = plain_fields(cls, words, [part.name for part in fields(cls) if part.name not in ("source", "gone")])
        if Path(words["file"]).name != words["file"]:
            raise ValueError(f"the file {words['file']!r} is not in the folder")
        gone = {int(index): int(step) for index, step in words["gone"]}
        return cls(source=folder / words["file"], gone=gone, **parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifiedEdit:
    """What `History.verify` learned about one edit."""

    name: str
    as_made: bool
    """Whether the weights below it are bit by bit those it was made on (another device or dtype may differ)."""
    retained: Mapping[str, Tensor]
    """As `Delta.retained`, on the weights below it."""
    rounding: Mapping[str, Rounding]
    """As `Delta.rounding`, on the weights below it."""

    def __str__(self) -> str:
        """Return one line: whether the edit is as it was made, and what rounding takes from it."""
        made = "as it was made" if self.as_made else "on other weights than it was made on"
        losses = "; ".join(f"{name}: {rounding}" for name, rounding in self.rounding.items())
        return f"{self.name}: {made}; {losses}"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class History:
    """Named edits of one model, in the order in which they were made.

    `History()` is kept in memory, `History.open(folder)` in a folder: one file per edit and an index to which each
    change appends one line, so that a crash loses at most the edit that was being made, and adding an edit costs the
    same however many there are. A history is a value: `added`, `without` and `resolved` return the next one (and append
    to the folder, if there is one); only the newest one of a folder can be continued.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who won?")
        >>> request = mt.EditRequest(question=prompt, target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=5).edit(vlm, [request], progress=False)
        >>> history = mt.History().added("winner", delta)
        >>> history.names, history.without("winner").names
        (('winner',), ())
    """

    entries: tuple[HistoryEntry, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    """Hash of each touched weight before any of the edits."""
    step: int = 0
    """Number of changes so far: edits added, parts taken out, edits solved again."""
    folder: Path | None = None
    """Where it is kept; None: in memory."""
    length: int = 0
    """Length of the part of the folder's index that this history stands for, in bytes."""

    def __repr__(self) -> str:
        if not self.entries:
            return "History without edits"
        gone = sum(entry.dropped is not None for entry in self.entries)
        names = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        model, count = shortened(self.entries[0].model), counted(len(self.names), "edit")
        place = "" if self.folder is None else f" in {shortened(str(self.folder))}"
        line = f"History of {model}{place}: {count} in effect ({names})"
        return f"{line}, {gone} taken out; {counted(len(self.base), 'weight')}"

    @classmethod
    def open(cls, folder: str | Path) -> History:
        """Return the history in a folder, or an empty one that will be kept there if the folder is new or empty.

        A program that is stopped while it adds an edit leaves a last line of the index that is not written to its end,
        the file of an edit without its line, or both. Such a line is left out and replaced by the next change; such a
        file stays where it is, and a warning names it each time that the folder is opened, until somebody adds its edit
        (`history.added(name, load_edit(file))`) or deletes it. What was written before is there.

        Raises `EditError` if the folder holds something else, if any other line of the index is damaged, if the file of
        an edit is missing, or if the index has lost more than its last line. The content of each file is checked when
        its edit is used.
        """
        folder = Path(folder)
        index = folder / INDEX
        if not index.is_file():
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            if folder.exists() and (not folder.is_dir() or names - _first_files(folder)):
                raise EditError(f"{str(folder)!r} is no history: it has no {INDEX}; pass a new folder, or one of ours")
            _report_unlisted(folder, names)
            return cls(folder=folder)
        return _read(cls(folder=folder), index)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the edits in effect, in order."""
        return tuple(entry.name for entry in self.entries if entry.dropped is None)

    @property
    def listing(self) -> str:
        """One line per edit: its name, its requests, its weights, and what was taken out of it."""
        lines = []
        for entry in self.entries:
            left = len(entry.requests) - len(entry.gone)
            gone = f"without {', '.join(map(str, entry.withdrawn))}" if entry.gone else "whole"
            state = gone if entry.dropped is None else "taken out"
            lines.append(f"{entry.name}  {left} requests  {', '.join(entry.fingerprints)}  {state}")
        return "\n".join(lines)

    def below(self, entry: HistoryEntry) -> dict[str, tuple[int, ...]]:
        """Return the edits that were in place when this one was made, each with the requests then taken out of it."""
        if not entry.on_top:
            return {}
        step = entry.step
        earlier = [each for each in self.entries if each.step < step and not (each.dropped or step) < step]
        return {each.name: tuple(index for index, when in each.gone.items() if when < step) for each in earlier}

    def added(self, name: str, delta: Delta, *, on_top: bool | None = None) -> Self:
        """Return the history with one more edit.

        Args:
            name: Name of the edit, unique in the history.
            delta: The edit, made on the base weights or with all edits in effect in place.
            on_top: Which of the two; None tells by the fingerprints of the edit.

        Raises:
            EditError: The name is in use, the edit was made on another model, or `on_top` is False and it was not made
                on the base weights.
        """
        if any(entry.name == name for entry in self.entries):
            raise EditError(f"two edits of a history have one name: {name!r} is there; choose another name")
        is_later = any(self.base.get(weight, digest) != digest for weight, digest in delta.fingerprints.items())
        if is_later and on_top is False:
            raise EditError(
                f"the edit {name!r} was made on '{delta.model}', on other weights than those before the edits of this "
                "history; keep a history for each model"
            )
        if is_later and self.entries:
            first = self.entries[0]
            is_known = any(self.base.get(weight) == digest for weight, digest in delta.fingerprints.items())
            if on_top is None and not is_known and (delta.model, delta.revision) != (first.model, first.revision):
                raise EditError(
                    f"the edit {name!r} was made on '{delta.model}', on other weights than this history's of "
                    f"'{first.model}'; keep a history for each model"
                )
        entry = HistoryEntry.of(name, delta, step=self.step, on_top=is_later if on_top is None else on_top)
        if self.folder is not None:
            entry = self._stored(entry)
        changed = self._with(entry)
        return changed if self.folder is None else changed._appended(_EDIT, entry.words())

    def without(self, name: str, *, request: int | None = None) -> Self:
        """Return the history without one edit, or without one request of it (counted from 0 as the edit was made).

        Its own factors are taken out; later edits stay as they were solved, with it in place. Raises `EditError` for an
        edit or a request that is not there any more.
        """
        entry = self.entries[self._index(name)]
        if request is not None:
            entry.delta.owned(request)
            if request in entry.gone:
                raise EditError(f"request {request} of the edit {name!r} is already taken out of this history")
        changed = self._withdrawn(name, request)
        return changed if self.folder is None else changed._appended(_WITHDRAWAL, {"name": name, "request": request})

    def resolved(self) -> Self:
        """Return the history with its edits solved again as if what was taken out had never been made.

        What was taken out is forgotten. The output that an edit wanted at its keys stays: what an earlier edit no
        longer adds there, the edit adds itself. Where the output was to stay, it is to stay. This needs no model, and
        it is exact while one weight is edited, since the keys of a weight do not depend on its own change. An edit that
        was made without what was taken out is left as it is. Raises `EditError` if an edit to be solved again, or one
        below it, changes another weight: its keys would have to be read again from the model.
        """
        fresh: dict[str, HistoryEntry] = {}
        changed: set[str] = set()
        gaps = _Gaps({entry.name: entry for entry in self.entries}, fresh)
        for entry in self.entries:
            below = self.below(entry)
            touched = changed & below.keys()
            if entry.dropped is not None:
                changed.add(entry.name)
            elif entry.gone or touched:
                self._check_one_weight(entry, touched)
                is_on_top = any(name in fresh for name in below)
                left = {name: withdrawn for name, withdrawn in below.items() if name in touched}
                fresh[entry.name] = self._solved(entry, left, gaps, on_top=is_on_top)
                changed.add(entry.name)
            else:
                fresh[entry.name] = entry
        after = replace(self, entries=tuple(fresh.values()), step=self.step + 1)
        return after if self.folder is None else after._state_appended()

    def saved(self, folder: str | Path) -> Self:
        """Return this history in a new folder, which holds a copy of every edit.

        Raises `EditError` if the folder exists or cannot be written; there is a whole folder afterwards, or none.
        """
        folder = Path(folder)
        if folder.exists():
            raise EditError(f"{str(folder)!r} is there already; pass a new folder for the history")
        with replacing_folder(folder, error=EditError) as new:
            saved = replace(self, folder=new, length=0)._state_appended()
        entries = [replace(entry, source=folder / cast(Path, entry.source).name) for entry in saved.entries]
        return replace(saved, folder=folder, entries=tuple(entries))

    def in_memory(self) -> Self:
        """Return the same history, whose next changes are not written to its folder."""
        return replace(self, folder=None, length=0)

    def composed(self) -> Delta:
        """Return one delta of all edits in effect, for the base weights. Raises `EditError` if there is none."""
        left = self._left()
        places = {entry.name: index for index, entry in enumerate(left)}
        below = [[places[name] for name in self.below(entry) if name in places] for entry in left]
        delta = joined([delta for _, delta in self.edits()], below)
        return replace(delta, fingerprints={name: self.base[name] for name in delta.changes})

    def apply(self, vlm: VisionLanguageModel) -> AppliedDelta:
        """Return a handle whose undo() takes all edits back bit by bit; until then they are in the weights, in order.

        One copy is kept of each touched weight, however many edits there are. Raises `EditError` if a touched weight is
        not the base's, or as `Delta.apply`; the weights are then as they were.
        """
        handle = AppliedDelta(vlm)
        with vlm.lock:
            self.put_in(handle)
        return handle

    def applied(self, vlm: VisionLanguageModel) -> AbstractContextManager[VisionLanguageModel]:
        """Yield the model with all edits in its weights; on any exit every touched weight is bit-equal to before."""
        return held(vlm, self.put_in)

    def put_in(self, handle: AppliedDelta) -> None:
        """Add all edits in effect to the weights of the handle's model; the handle holds the way back."""
        vlm = handle.vlm
        handle.put_in(self._checked(vlm), lambda: write_all(vlm, (delta.changes for _, delta in self.edits(vlm))))

    def check_base(self, vlm: VisionLanguageModel) -> None:
        """Raise `EditError` unless every weight that an edit ever touched is as it was before the first edit."""
        if self.entries:
            model = self.entries[0].model
            try:
                check_fingerprints(vlm, self.base, model)
            except ModelError as error:
                raise EditError(f"a history of '{model}' does not fit '{vlm.name}': {error}") from error

    def edits(self, vlm: VisionLanguageModel | None = None) -> Iterator[tuple[HistoryEntry, Delta]]:
        """Yield each edit in effect with its entry, one at a time. Raises `EditError` if one does not fit the model."""
        for entry in self.entries:
            delta = entry.in_effect
            if delta is not None:
                if vlm is not None:
                    delta.check_fits(vlm)
                yield entry, delta

    def verify(self, vlm: VisionLanguageModel, *, progress: bool = True) -> tuple[VerifiedEdit, ...]:
        """Return what each edit in effect achieves when the edits are applied in order; the model ends as it began.

        Raises `EditError` as `apply`.
        """
        with vlm.lock:
            self._checked(vlm)
            verified = []
            handle = AppliedDelta(vlm)
            edits = tqdm(self.edits(vlm), "edits checked", len(self.names), disable=not progress, leave=False)
            try:
                for entry, delta in edits:
                    handle.keep(delta.changes)
                    prints, wanted = vlm.fingerprint(delta.changes), delta.fingerprints
                    as_made = all(wanted[name] in (prints[name], self.base[name]) for name in wanted)
                    retained = delta.retained(vlm, on_other_weights=True)
                    rounding = delta.rounding(vlm, on_other_weights=True)
                    made = VerifiedEdit(name=entry.name, as_made=as_made, retained=retained, rounding=rounding)
                    verified.append(made)
                    write_all(vlm, [delta.changes])
            finally:
                uninterrupted(handle.restore)
        return tuple(verified)

    def _with(self, entry: HistoryEntry) -> Self:
        base = {**entry.fingerprints, **self.base}
        return replace(self, entries=(*self.entries, entry), base=base, step=self.step + 1)

    def _withdrawn(self, name: str, request: int | None) -> Self:
        index = self._index(name)
        entry = self.entries[index]
        if request is not None and not 0 <= request < len(entry.requests):
            raise EditError(f"the edit {name!r} has no request {request}")
        if request is None:
            changed = replace(entry, dropped=self.step)
        else:
            changed = replace(entry, gone={**entry.gone, request: self.step})
        entries = (*self.entries[:index], changed, *self.entries[index + 1 :])
        return replace(self, entries=entries, step=self.step + 1)

    def _left(self) -> list[HistoryEntry]:
        if not self.names:
            raise EditError("no edit is in effect in this history; add one: History().added('name', delta)")
        return [entry for entry in self.entries if entry.dropped is None]

    def _index(self, name: str) -> int:
        for index, entry in enumerate(self.entries):
            if entry.name == name and entry.dropped is None:
                return index
        raise EditError(f"no edit {name!r} in effect in this history; there are: {', '.join(self.names) or 'none'}")

    def _checked(self, vlm: VisionLanguageModel) -> tuple[str, ...]:
        """Names of the weights that the edits touch, once it is known that the model fits and is unedited."""
        left = self._left()
        for _ in self.edits(vlm):
            pass
        touched = {name: self.base[name] for entry in left for name in entry.fingerprints}
        check_fingerprints(vlm, touched, left[0].model)
        return tuple(touched)

    def _check_one_weight(self, entry: HistoryEntry, changed: Set[str]) -> None:
        others = [each for each in self.entries if each.name in changed]
        if len({weight for each in (entry, *others) for weight in each.fingerprints}) > 1:
            raise EditError(
                f"the edit {entry.name!r} and those it was made on change several weights, and the keys of one depend "
                "on the change of another; solving anew needs the model: edit again from the requests that are left"
            )

    def _solved(
        self, entry: HistoryEntry, touched: Mapping[str, tuple[int, ...]], gaps: _Gaps, *, on_top: bool
    ) -> HistoryEntry:
        """The entry without its withdrawn requests, solved on top of what is left of those it was made on.

        touched: those of them that changed, with the requests that were out of them when the entry was made.
        """
        own = entry.delta
        ((weight, change),) = own.changes.items()
        kept, left = torch.ones(change.rank, dtype=torch.bool), own.without(*entry.withdrawn)
        for index in entry.withdrawn:
            kept &= ~own.owned(index)[weight]
        residuals = change.residuals[kept].double()
        lost = gaps.moved(touched, weight, change.keys[kept])
        solved = change.resolved(kept, residuals + residuals.any(dim=-1, keepdim=True) * lost)
        delta = replace(
            left,
            changes={weight: replace(solved, owners=left.changes[weight].owners)},
            fingerprints=own.fingerprints if on_top else {weight: self.base[weight]},
        )
        return HistoryEntry.of(entry.name, delta, step=entry.step, on_top=on_top)

    def _stored(self, entry: HistoryEntry) -> HistoryEntry:
        """The entry with its edit in a file of the folder, which without a line of the index counts for nothing."""
        if isinstance(entry.source, Path) and entry.source.parent == self.folder:
            return entry
        files.check_length(self.folder / INDEX, self.length, error=EditError)
        delta = entry.delta
        digest = delta.digest
        path = self.folder / f"{entry.step:06d}-{digest[:12]}.safetensors"
        delta.save(path)
        with files.writable(path.parent, error=EditError):
            files.flush(path, path.parent)  # before the line that names the file: no line is ever ahead of its file
        return replace(entry, source=path, digest=digest)

    def _state_appended(self) -> Self:
        """The history with a line that says all of it, each edit in a file of this folder."""
        entries = tuple(map(self._stored, self.entries))
        words = {"edits": [entry.words() for entry in entries], "base": dict(self.base)}
        return replace(self, entries=entries)._appended(_STATE, {**words, "step": self.step})

    def _appended(self, kind: str, content: Mapping[str, Any]) -> Self:
        """This history, once its last change is a line of the folder's index."""
        index = self.folder / INDEX
        line = {"kind": kind, **content}
        length = files.append_line(index, self.length, line, layout=_LAYOUT, error=EditError)
        return replace(self, length=length)


def load_edit(path: str | Path) -> Delta | History:
    """Return the edit in a file, or the history in a folder. Raises `EditError` if it is neither."""
    path = Path(path)
    if path.name == INDEX or path.is_dir():
        folder = path.parent if path.name == INDEX else path
        if not (folder / INDEX).is_file():
            raise EditError(f"{str(folder)!r} is no history: it has no {INDEX}; pass a saved edit, or another folder")
        return History.open(folder)
    return Delta.load(path)


class _Gaps:
    """What edits no longer add to outputs since they were solved again or dropped, each read and compared once."""

    def __init__(self, made: Mapping[str, HistoryEntry], fresh: Mapping[str, HistoryEntry]) -> None:
        """Compare edits as they were made with those that took their place in `fresh`, which may still grow."""
        self._made, self._fresh = made, fresh
        self._factors: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor] | None] = {}

    def moved(self, touched: Mapping[str, tuple[int, ...]], weight: str, keys: Tensor) -> Tensor | float:
        """Return what these edits, each without some requests, added to a weight's outputs at keys and add no more."""
        factors = [self._of(name, withdrawn, weight) for name, withdrawn in touched.items()]
        pairs = [pair for pair in factors if pair is not None]
        if not pairs:
            return 0.0
        left, right = torch.cat([pair[0] for pair in pairs], dim=1), torch.cat([pair[1] for pair in pairs])
        return keys.double() @ right.T @ left.T

    def _of(self, name: str, withdrawn: tuple[int, ...], weight: str) -> tuple[Tensor, Tensor] | None:
        key = name, withdrawn
        if key not in self._factors:
            after = [self._fresh[name].delta] if name in self._fresh else []
            deltas = [(self._made[name].delta.without(*withdrawn), 1.0), *((delta, -1.0) for delta in after)]
            changes = [(delta.changes[weight], sign) for delta, sign in deltas if weight in delta.changes]
            left = [sign * change.left.double() for change, sign in changes]
            right = [change.right.double() for change, _ in changes]
            self._factors[key] = (torch.cat(left, dim=1), torch.cat(right)) if changes else None
        return self._factors[key]


def _read(history: History, index: Path) -> History:
    """The history that the lines of an index make of an empty one."""
    folder = index.parent
    apply: dict[str, Callable[[History, dict[str, Any]], History]] = {
        _EDIT: lambda state, words: state._with(HistoryEntry.from_words(words, folder)),
        _WITHDRAWAL: lambda state, words: state._withdrawn(words["name"], words["request"]),
        _STATE: lambda state, words: replace(
            state,
            entries=tuple(HistoryEntry.from_words(each, folder) for each in words["edits"]),
            **plain_fields(History, words, ["base", "step"]),
        ),
    }
    lines, length = files.whole_lines(index, layout=_LAYOUT, error=EditError)
    listed: set[str] = set()
    for number, words in lines:
        with files.damaged_line(index, number, error=EditError):
            history = apply[words.pop("kind")](history, words)
            listed.update(each["file"] for each in words.get("edits", [words]) if "file" in each)
    later = [path.name for path in folder.glob(_FILES) if int(path.name.split("-")[0]) > history.step]
    if later:  # the file of one edit, that of the next change, may be there without its line
        raise EditError(
            f"{str(index)!r} has lost its end: it tells of {counted(history.step, 'change')}, but {min(later)!r} was "
            "added after more; restore it from a copy"
        )
    for entry in history.entries:
        path = entry.source
        if isinstance(path, Path) and not path.is_file():
            raise EditError(f"{path.name!r} of the edit {entry.name!r} is missing in {str(folder)!r}; restore it")
    _report_unlisted(folder, {path.name for path in folder.glob(_FILES)} - listed)
    return replace(history, length=length)


def _first_files(folder: Path) -> set[str]:
    """Names of the files that adding the first edit to a folder can leave if it is stopped."""
    return {path.name for path in folder.glob(f"{0:06d}-*.safetensors")} | {
        path.name for path in folder.glob(".*.part")
    }


def _report_unlisted(folder: Path, names: Set[str]) -> None:
    """Warn of the files of edits that no line of the index names."""
    if files := ", ".join(repr(name) for name in sorted(names) if name.endswith(".safetensors")):
        where = "in no line of the index of %s: %s, of an edit that a program was adding when it stopped; "
        logger.warning(where + "add it with history.added(name, load_edit(file)), or delete it", folder, files)
