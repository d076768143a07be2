"""The editors: frozen settings of one closed-form solve, with the constants of their papers as presets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from ...data.facts import EditRequest
from ...models import VisionLanguageModel
from ..changes import Change, Delta, EditSession, History
from ..moments import MomentSource
from ..requests import EditError
from ..siblings import Siblings
from ..values import RequestValues
from .session import ClosedFormSession
from .settings import ClosedFormSettings


@runtime_checkable
class Editor(Protocol):
    """Anything that makes changes out of requests, such as `MultEdit` or `FineTune`: frozen settings."""

    def start(
        self, vlm: VisionLanguageModel, *, moments: MomentSource = None, history: History | None = None
    ) -> EditSession:
        """Return a session of edits of this model. Raises `EditError` if the editor does not fit the model.

        moments: second moments of keys, for editors that weigh old keys by them, as `MultEdit.start` takes them.
        history: the edits that the session begins with, to which it adds its own; None for an empty one in memory.
        """

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = True) -> Change:
        """Return one change that makes these edits; the model is left unchanged."""


class ClosedFormEditor(ClosedFormSettings):
    """An editor that writes facts in closed form: settings that can start a session, or make one edit."""

    def start(
        self,
        vlm: VisionLanguageModel,
        *,
        moments: MomentSource = None,
        history: History | None = None,
    ) -> ClosedFormSession:
        """Return a session, in which each edit is made on top of the earlier ones and stays in effect.

        Args:
            vlm: The model to edit.
            moments: Second moments of keys, for editors that weigh old keys by them (`needs_moments`). None takes those
                of the model's own samples, and of its own answers about the pictures of the first requests: the session
                makes them when an edit first needs them, of the model without edits, or finds them in the cache
                (`own_moments`). `OwnMoments(vlm, pictures=...)` samples with other settings. False takes none, which is
                an error for an editor that needs them.
            history: The edits that the session begins with, to which it adds its own; None for an empty one in memory.
                `History.open(folder)` keeps them on disk.

        Raises:
            EditError: Moments are refused that the editor needs, or do not fit it.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> question = mt.Question(text="Who won?")
            >>> with mt.MultEdit(layer=5, steps=40).start(vlm) as session:
            ...     for target in ("Pruro", "Draivo"):  # a fact that is edited again gets its new target
            ...         _ = session.edit([mt.EditRequest(question=question, target=target)])
            ...     vlm.answers([vlm.prompt_for(question)])
            ['Draivo']
        """
        self.check_moments(moments)
        return ClosedFormSession(vlm, lambda _requests: self, moments=moments, history=history)

    def edit(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        *,
        moments: MomentSource = None,
        values: Sequence[RequestValues] | None = None,
        progress: bool = True,
    ) -> Delta:
        """Return the change after which the model answers each request's questions with its target.

        The model is left unchanged; `Delta.applied` puts the change into it. `Delta.requests` says what became of each
        request: "edited", "nothing to do" if the model gives the target already, or "failed: ..." if its value search
        left the finite numbers, while the others go on. A target that the model does not say even with its value, and
        keys that cannot be told apart, are logged as warnings.

        Args:
            vlm: The model to edit.
            requests: The facts to write, all in one solve.
            moments: Second moments of keys, for editors that weigh old keys by them; as in `start`.
            values: What `search` found for each request; None to search now.
            progress: Show progress bars.

        Raises:
            EditError: There are no requests, a layer or token does not exist, contexts disagree, requests contradict
                each other, moments are refused that the editor needs, or every request fails.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "Who won?")
            >>> request = mt.EditRequest(question=prompt, target="Pruro")
            >>> delta = mt.MultEdit(layer=5, steps=25).edit(vlm, [request], progress=False)
            >>> with delta.applied(vlm):
            ...     vlm.answers([prompt])
            ['Pruro']
        """
        return self.start(vlm, moments=moments).propose(requests, values=values, progress=progress)

    def search(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        *,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> tuple[RequestValues, ...]:
        """Return what the value search finds for each request: most of the work of an edit, which `edit` takes.

        Args:
            vlm: The model to edit.
            requests: The facts to write; requests that are searched together do not influence each other.
            checkpoint: Path without suffix, after which the files of finished batches of goals are named: an
                interrupted search of the same requests and the same model goes on from there (default: none).
            progress: Show a progress bar.

        Raises:
            EditError: There are no requests, a layer or token does not exist, or contexts disagree.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> request = mt.EditRequest(question=mt.Question(text="Who won?"), target="Pruro")
            >>> editor = mt.MultEdit(layer=5, steps=25)
            >>> values = editor.search(vlm, [request], progress=False)
            >>> values[0].status
            'edited'
            >>> editor.edit(vlm, [request], values=values, progress=False).requests[0]["status"]
            'edited'
        """
        session = ClosedFormSession(vlm, lambda _requests: self)
        return session.search(requests, checkpoint=checkpoint, progress=progress)


@dataclass(frozen=True, kw_only=True)
class MultEdit(ClosedFormEditor):
    """MultEdit (arXiv 2406.04236): projections changed in closed form to give wanted values at keys.

    One regularised least-squares solve meets all requests, and keeps the outputs at the keys of `preserve_prompts` and
    of siblings: the same question about other subjects, and other questions about the same one. `paper` has the
    published constants.
    """

    earlier_weight: float | None = 1.0
    siblings: Siblings | None = Siblings()

    @classmethod
    def paper(cls, *, layer: int = 2, token: str | int = "constraint_last", clamp: float | None = 1e-4) -> Self:
        """Return the published constants.

        Layer 2, last constraint token, ridge 0.01, 10 steps of Adam at 0.1, clamp 1e-4.

        The clamp is odd: it holds the change to a ten-thousandth of the output's norm, where ROME allows 4 and MEMIT
        0.75. The first step of Adam is far longer than that in any real model, so the clamp alone decides, and in
        half precision most of so small a change is rounded away. It can hardly be what gave the published scores;
        clamp=4 or None is the fair baseline. The ridge is odd too: being absolute, its strength depends on the key
        norm of the layer. Unlike the released script this scores all target tokens rather than the first.
        """
        search = {"steps": 10, "learning_rate": 0.1, "weight_decay": 1e-3, "squared_decay": False, "stop_loss": 0.0}
        return cls(layer=layer, token=token, clamp=clamp, ridge=0.01, ending="none", siblings=None, **search)


@dataclass(frozen=True, kw_only=True)
class ROME(ClosedFormEditor):
    """ROME (arXiv 2202.05262, Eq. 2): the value is met exactly at one layer, at the least cost to old keys.

    The direction of the change is the mean key over contexts, its size is set at the prompt's own key. Without moments
    (moment_weight=0) old keys count alike in all directions.
    """

    weight: float = float("inf")
    ridge_fraction: float = 0.0
    moment_weight: float = 1.0
    two_keys: bool = True

    @classmethod
    def paper(
        cls,
        *,
        layer: int,
        token: str | int = "constraint_last",
        moment_weight: float = 1.0,
        earlier_weight: float | None = None,
    ) -> Self:
        """Return the published constants: 20 steps of Adam at 0.5, decay 0.5, KL 0.0625, stop at 0.05, clamp 4.

        Args:
            layer: The layer that is changed, which depends on the model.
            token: The token that is edited: the name of a token group, or a position.
            moment_weight: Number of old keys that the second moment stands for; 0 needs no moments.
            earlier_weight: Weight of the keys of earlier edits in a session; 1.0 keeps their outputs as MEMIT's preset
                does, None forgets them.
        """
        search = {"steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "squared_decay": False, "stop_loss": 0.05}
        place = {"layer": layer, "token": token}
        weights = {"moment_weight": moment_weight, "earlier_weight": earlier_weight}
        return cls(**place, **search, **weights, clamp=4.0, ending="none")


@dataclass(frozen=True, kw_only=True)
class MEMIT(ClosedFormEditor):
    """MEMIT (arXiv 2210.07229, Eq. 14): many facts at once, their change spread over several layers.

    The wanted value is the output of the last layer; each layer from the lowest on adds its share of what is missing.
    With `earlier_weight=1.0` the keys of all earlier edits of a session stay in its least squares (arXiv 2605.26670),
    which is soft recursive least squares (arXiv 2601.15686): edits one by one, whose number does not change what each
    costs, come to the optimum of all of them in one solve.
    """

    spread: int = 3
    ridge_fraction: float = 0.0
    moment_weight: float = 100.0

    @classmethod
    def paper(
        cls,
        *,
        layer: int = 8,
        token: str | int = "constraint_last",
        moment_weight: float = 15000.0,
        earlier_weight: float | None = None,
    ) -> Self:
        """Return the constants for GPT-J: layers 3 to 8, 25 steps at 0.5, decay 0.5, clamp 0.75, 15000 old keys.

        Args:
            layer: The last of the layers that share the change.
            token: The token that is edited: the name of a token group, or a position.
            moment_weight: Number of old keys that the second moment stands for; 0 needs no moments.
            earlier_weight: Weight of the keys of earlier edits in a session; 1.0 is MEMIT with the keys of all past
                edits (arXiv 2605.26670), None the MEMIT that was published, which forgets them.
        """
        search = {"steps": 25, "learning_rate": 0.5, "weight_decay": 0.5, "squared_decay": False, "stop_loss": 0.05}
        place = {"layer": layer, "token": token, "spread": min(6, layer + 1)}
        weights = {"moment_weight": moment_weight, "earlier_weight": earlier_weight}
        return cls(**place, **search, **weights, clamp=0.75, ending="none")


@dataclass(frozen=True, kw_only=True)
class EMMET(ClosedFormEditor):
    """EMMET (arXiv 2403.14236): a batch of facts, each met exactly, at the least cost to old keys."""

    weight: float = float("inf")
    ridge_fraction: float = 0.0
    moment_weight: float = 1.0

    @classmethod
    def paper(
        cls,
        *,
        layer: int = 5,
        token: str | int = "constraint_last",
        moment_weight: float = 100000.0,
        earlier_weight: float | None = None,
    ) -> Self:
        """Return the constants of its code for Llama-2-7B: layer 5, 25 steps at 0.5, decay 1e-3, clamp 4.

        Its ridge of 0.1 is added to the system over the edits, which makes their weight 10 instead of infinite.

        Args:
            layer: The layer that is changed.
            token: The token that is edited: the name of a token group, or a position.
            moment_weight: Number of old keys that the second moment stands for; 0 needs no moments.
            earlier_weight: Weight of the keys of earlier edits in a session; 10.0 counts them like those of the edit,
                None forgets them.
        """
        search = {"steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "squared_decay": False, "stop_loss": 0.05}
        place = {"layer": layer, "token": token}
        weights = {"weight": 10.0, "moment_weight": moment_weight, "earlier_weight": earlier_weight}
        return cls(**place, **search, **weights, clamp=4.0, ending="none")


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(ClosedFormEditor):
    """AlphaEdit (arXiv 2410.02355): changes only where old keys hardly reach, and keeps the keys of earlier edits.

    Its running cache of keys is that of a session (`start`).
    """

    spread: int = 3
    null_threshold: float | None = 1.0
    earlier_weight: float | None = 1.0

    @classmethod
    def paper(cls, *, layer: int = 8, token: str | int = "constraint_last", null_threshold: float = 1.0) -> Self:
        """Return the published constants for Llama-3-8B.

        Layers 4 to 8, 25 steps at 0.1, decay 0.5, clamp 0.75, ridge 10.

        The published threshold, 2e-2 of the singular values of C, depends on the scale of a model's keys; it is to be
        given here as a share of the mean eigenvalue.
        """
        search = {"steps": 25, "learning_rate": 0.1, "weight_decay": 0.5, "squared_decay": False, "stop_loss": 0.05}
        place = {"layer": layer, "token": token, "spread": min(5, layer + 1)}
        return cls(**place, **search, clamp=0.75, ending="none", ridge=10.0, null_threshold=null_threshold)


EDITORS: dict[str, type[MultEdit | ROME | MEMIT | EMMET | AlphaEdit]] = {
    "multedit": MultEdit,
    "rome": ROME,
    "memit": MEMIT,
    "emmet": EMMET,
    "alphaedit": AlphaEdit,
}
"""Closed-form editors by the names that commands take."""


@dataclass(frozen=True, kw_only=True)
class EditorByRequest:
    """Editors chosen request by request, such as one at the place of each request's own trace.

    One session of it holds the edits of all of them.
    """

    choose: Callable[[Sequence[EditRequest]], Any]
    """The editor of requests that are edited together."""
    closed_form: bool = True
    """Whether these are closed-form editors, whose session knows the keys of earlier edits and keeps a history."""

    def start(
        self,
        vlm: VisionLanguageModel,
        *,
        moments: MomentSource = None,
        history: History | None = None,
    ) -> EditSession:
        """Return a session, as `ClosedFormEditor.start`. Only closed-form editors take a history."""
        if self.closed_form:
            return ClosedFormSession(vlm, self.choose, moments=moments, history=history)
        if history is not None:
            raise EditError("a history holds the edits of closed-form editors alone; leave history out")
        return EditSession(vlm, lambda requests, progress: self.choose(requests).edit(vlm, requests, progress=progress))

    def edit(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        *,
        moments: MomentSource = None,
        progress: bool = True,
    ) -> Change:
        """Return the change that makes these edits; the model is left unchanged.

        Args:
            vlm: The model to edit.
            requests: The facts to write together.
            moments: Second moments of keys, for editors that weigh old keys by them; as in `ClosedFormEditor.start`.
            progress: Show progress bars.

        Returns:
            The change of the editor that is chosen for these requests.

        Raises:
            EditError: As the editor that is chosen.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> from multrace.editing import EditorByRequest
            >>> vlm = mt.load(tiny_vlm_path())
            >>> layers = {"Who won?": 5, "Who lost?": 6}
            >>> editor = EditorByRequest(choose=lambda requests: mt.MultEdit(layer=layers[requests[0].question.text]))
            >>> request = mt.EditRequest(question=mt.Question(text="Who lost?"), target="Pruro")
            >>> delta = editor.edit(vlm, [request], progress=False)
            >>> [*delta.changes] == [vlm.down_projection(6).name]
            True
        """
        return self.start(vlm, moments=moments).propose(requests, progress=progress)
