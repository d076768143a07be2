"""Many edits of one model, in order, by name: any of them can be taken out, and what came after it solved anew."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import files
from ...data.facts import counted, shortened
from ...models import VisionLanguageModel
from ..errors import EditError
from .delta import Delta, damage_named, joined
from .weight_change import AppliedDelta, check_fingerprints, put_in, write

FORMAT = "multrace ledger 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One edit of a ledger, as it was made, and how much of it is still in effect."""

    name: str
    delta: Delta
    """As it was made: nothing that is withdrawn is forgotten."""
    after: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The entries that were in place when it was made, each with the requests that were by then taken out of it."""
    withdrawn: tuple[int, ...] = ()
    """Indices in delta.requests of requests that were taken out."""
    dropped: bool = False
    """All of it was taken out."""

    @property
    def in_effect(self) -> Delta | None:
        """What is left of it, its requests renumbered; None once dropped."""
        return None if self.dropped else self.delta.without(*self.withdrawn) if self.withdrawn else self.delta


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """What `Ledger.verify` found out about one entry."""

    name: str
    as_made: bool
    """The weights below it are bit by bit those it was made on (as edits of another device or dtype need not be)."""
    retained: Mapping[str, Tensor]
    """As Delta.retained, on the weights below it."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ledger:
    """Named edits of one model, in the order in which they were made.

    Start with `Ledger()` and add edits with `added`. A ledger is a value: `added`, `without` and `resolved` return new
    ones.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who won?")
        >>> delta = mt.MultEdit(layer=5).edit(vlm, [mt.EditRequest(question=prompt, target="Pruro")], progress=False)
        >>> ledger = mt.Ledger().added("winner", delta)
        >>> ledger.names, ledger.without("winner").names
        (('winner',), ())
    """

    entries: tuple[Entry, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    """Hash of each touched weight before any of the edits."""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len({*names}) < len(names):
            raise EditError(f"two edits of a ledger have one name: {names}; choose another name for one of them")

    def __repr__(self) -> str:
        if not self.entries:
            return "Ledger without edits"
        gone = sum(entry.dropped for entry in self.entries)
        names = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        model, count = shortened(self.entries[0].delta.model), counted(len(self.names), "edit")
        line = f"Ledger of {model}: {count} in effect ({names})"
        return f"{line}, {gone} taken out; {counted(len(self.base), 'weight')}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the edits in effect, in order."""
        return tuple(entry.name for entry in self.entries if not entry.dropped)

    @property
    def listing(self) -> str:
        """A line per edit: its name, its requests, its weights, and what was taken out of it."""
        lines = []
        for entry in self.entries:
            left = len(entry.delta.requests) - len(entry.withdrawn)
            gone = f"without {', '.join(map(str, entry.withdrawn))}" if entry.withdrawn else "whole"
            state = "taken out" if entry.dropped else gone
            lines.append(f"{entry.name}  {left} requests  {', '.join(entry.delta.changes)}  {state}")
        return "\n".join(lines)

    def added(self, name: str, delta: Delta) -> Self:
        """The ledger with one more edit, made on the base weights or with all edits in effect in place.

        Its fingerprints tell which of the two. EditError for a name in use, or an edit of another model.
        """
        model = self.entries[0].delta if self.entries else delta
        made_after = any(self.base.get(weight, digest) != digest for weight, digest in delta.fingerprints.items())
        if made_after and (delta.model, delta.revision) != (model.model, model.revision):
            raise EditError(
                f"the edit {name!r} was made on '{delta.model}', on other weights than this ledger's of "
                f"'{model.model}'; keep a ledger for each model"
            )
        after = {each.name: each.withdrawn for each in self.entries if made_after and not each.dropped}
        entry = Entry(name=name, delta=delta, after=after)
        return replace(self, entries=(*self.entries, entry), base={**delta.fingerprints, **self.base})

    def without(self, name: str, *, request: int | None = None) -> Self:
        """The ledger without one edit, or without one request of it (counted from 0 as the edit was made).

        Its own factors are taken out; later edits stay as they were solved, with it in place. EditError for an edit
        or a request that is not there any more.
        """
        index = self._index(name)
        entry = self.entries[index]
        if request is None:
            changed = replace(entry, dropped=True)
        else:
            entry.delta.owned(request)
            if request in entry.withdrawn:
                raise EditError(f"request {request} of the edit {name!r} is already taken out of this ledger")
            changed = replace(entry, withdrawn=(*entry.withdrawn, request))
        return replace(self, entries=(*self.entries[:index], changed, *self.entries[index + 1 :]))

    def resolved(self) -> Self:
        """The ledger with its edits solved anew as if what was taken out had never been made; that is forgotten now.

        The output that an edit wanted at its keys stays: what an earlier edit no longer adds there, the edit adds
        itself. Where the output was to stay, it is to stay. Needs no model, and is exact while one weight is edited,
        since the keys of a weight do not depend on its own change. An edit that was made without what was taken out
        is left as it is. EditError where an edit to be solved anew, or one below it, changes another weight: its keys
        would have to be read anew from the model.
        """
        fresh: dict[str, Entry] = {}
        changed: set[str] = set()
        for entry in self.entries:
            below = changed & entry.after.keys()
            if entry.dropped:
                changed.add(entry.name)
            elif entry.withdrawn or below:
                self._check_one_weight(entry, below)
                fresh[entry.name] = self._solved(entry, fresh)
                changed.add(entry.name)
            else:
                fresh[entry.name] = entry
        return replace(self, entries=tuple(fresh.values()))

    def composed(self) -> Delta:
        """One delta of all edits in effect, for the base weights; EditError if there is none."""
        left = [entry for entry in self.entries if not entry.dropped]
        self._need_entries(left)
        places = {entry.name: index for index, entry in enumerate(left)}
        below = [[places[name] for name in entry.after if name in places] for entry in left]
        delta = joined([entry.in_effect for entry in left], below)
        return replace(delta, fingerprints={name: self.base[name] for name in delta.changes})

    def apply(self, vlm: VisionLanguageModel) -> AppliedDelta:
        """A handle whose undo() takes all edits back bit by bit; they are in the weights, in order, until then.

        One copy is kept of each touched weight, however many edits there are. EditError if a touched weight is not
        the base's, or as Delta.apply; the weights are then as they were.
        """
        with vlm.lock:
            return put_in(vlm, [delta.changes for delta in self._checked(vlm)])

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        """The model with all edits in its weights; on any exit every touched weight is bit-equal to before."""
        with vlm.lock:
            handle = self.apply(vlm)
            try:
                yield vlm
            finally:
                handle.restore()

    def verify(self, vlm: VisionLanguageModel, *, progress: bool = True) -> tuple[Checked, ...]:
        """What each edit in effect meets and achieves when they are put on in order; the model ends as it began.

        EditError as `apply`.
        """
        with vlm.lock:
            return self._verified(vlm, progress)

    def _verified(self, vlm: VisionLanguageModel, progress: bool) -> tuple[Checked, ...]:
        deltas, found = self._checked(vlm), []
        handle = AppliedDelta(vlm)
        bar = tqdm(
            zip(self.names, deltas, strict=True), "edits checked", len(deltas), disable=not progress, leave=False
        )
        try:
            for name, delta in bar:
                handle.keep(delta.changes)
                prints = vlm.fingerprint(delta.changes)
                as_made = all(digest in (prints[each], self.base[each]) for each, digest in delta.fingerprints.items())
                retained = delta.retained(vlm, on_other_weights=True)
                found.append(Checked(name=name, as_made=as_made, retained=retained))
                for each, change in delta.changes.items():
                    write(vlm, each, change)
        finally:
            handle.restore()
        return tuple(found)

    def save(self, path: str | Path) -> Path:
        """The path of the one safetensors file written (whole or not at all). EditError where it cannot be written."""
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for index, entry in enumerate(self.entries):
            tensors |= entry.delta.tensors(f"{index}:")
            own = {"after": dict(entry.after), "withdrawn": entry.withdrawn, "dropped": entry.dropped}
            entries.append({"name": entry.name, **own, "delta": entry.delta.words()})
        text = {"format": FORMAT, "base": json.dumps(dict(self.base)), "entries": json.dumps(entries)}
        return files.write_tensors(path, tensors, text, error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The ledger in a file that save wrote, bit-equal. EditError if the file is missing or damaged."""
        tensors, text = files.read_tensors(path, error=EditError)
        if text.get("format") != FORMAT:
            raise EditError(
                f"'{path}' is no ledger: its header says {text.get('format')!r}, not {FORMAT!r}; "
                "pass a file that Ledger.save wrote"
            )
        with damage_named(path):
            entries = []
            for index, words in enumerate(json.loads(text["entries"])):
                delta = Delta.assembled(tensors, words["delta"], f"{index}:")
                own = {"withdrawn": tuple(words["withdrawn"]), "dropped": words["dropped"]}
                after = {name: tuple(gone) for name, gone in words["after"].items()}
                entries.append(Entry(name=words["name"], delta=delta, after=after, **own))
            return cls(entries=tuple(entries), base=json.loads(text["base"]))

    def _index(self, name: str) -> int:
        for index, entry in enumerate(self.entries):
            if entry.name == name and not entry.dropped:
                return index
        raise EditError(f"no edit {name!r} in effect in this ledger; there are: {', '.join(self.names) or 'none'}")

    def _checked(self, vlm: VisionLanguageModel) -> list[Delta]:
        """The deltas in effect, once it is known that they fit this model and that it is unedited."""
        deltas = [delta for entry in self.entries if (delta := entry.in_effect) is not None]
        self._need_entries(deltas)
        for delta in deltas:
            delta.check_fits(vlm)
        touched = {name: self.base[name] for delta in deltas for name in delta.changes}
        check_fingerprints(vlm, touched, deltas[0].model)
        return deltas

    def _check_one_weight(self, entry: Entry, changed: Set[str]) -> None:
        others = [each.delta for each in self.entries if each.name in changed]
        if len({weight for delta in (entry.delta, *others) for weight in delta.changes}) > 1:
            raise EditError(
                f"the edit {entry.name!r} and those it was made on change several weights, and the keys of one depend "
                "on the change of another; solving anew needs the model: edit again from the requests that are left"
            )

    def _solved(self, entry: Entry, fresh: Mapping[str, Entry]) -> Entry:
        """The entry without its withdrawn requests, solved on top of what is left of those it was made on."""
        ((weight, change),) = entry.delta.changes.items()
        kept, left = torch.ones(change.rank, dtype=torch.bool), entry.delta.without(*entry.withdrawn)
        for index in entry.withdrawn:
            kept &= ~entry.delta.owned(index)[weight]
        made = {each.name: each.delta for each in self.entries if each.name in entry.after}
        before = [made[name].without(*withdrawn) for name, withdrawn in entry.after.items()]
        below = [fresh[name].delta for name in entry.after if name in fresh]
        keys, residuals = change.keys[kept], change.residuals[kept].double()
        lost = _moved(before, weight, keys) - _moved(below, weight, keys)
        solved = change.resolved(kept, residuals + residuals.any(dim=-1, keepdim=True) * lost)
        delta = replace(
            left,
            changes={weight: replace(solved, owners=left.changes[weight].owners)},
            fingerprints=entry.delta.fingerprints if below else {weight: self.base[weight]},
        )
        return Entry(name=entry.name, delta=delta, after={name: () for name in entry.after if name in fresh})

    def _need_entries(self, left: list[Any]) -> None:
        if not left:
            raise EditError("no edit is in effect in this ledger; add one: Ledger().added('name', delta)")


def load_edit(path: str | Path) -> Delta | Ledger:
    """The delta or the ledger in a file. EditError if it holds neither."""
    _tensors, text = files.read_tensors(path, error=EditError)
    return Ledger.load(path) if text.get("format") == FORMAT else Delta.load(path)


def _moved(deltas: Sequence[Delta], weight: str, keys: Tensor) -> Tensor | float:
    """What these deltas together add to a weight's outputs at the keys."""
    return sum(delta.changes[weight].moved(keys) for delta in deltas if weight in delta.changes)
