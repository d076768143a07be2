"""A model's own decoder layers run again from any layer on, only where states can have changed.

`Replay` takes keys and values of other positions from earlier recorded runs; only the attention function is replaced.
How a layer was called, and whether a run of single layers would repeat it, is observed by a `Witness`.

A model whose states this would not reproduce raises `ReplayError`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError, ReplayError
from ..families import Projection, Site
from ..frame import ATTENDED, DecoderInput, Frame
from ..hooks import StopForward, capture, first_input, main_tensor
from ..vlm import VisionLanguageModel
from .attention import Job, Kernels, Segment, Softmax, merged_attention, probe_kernels
from .crossing import Crossing, crossing_layers, without_edges
from .observe import LAYER_INPUT, SHARED, LayerCall, Witness, attention_function, exact_attention, mixers_of
from .recording import Index, Masks, Queries, Recording, Source, Span, index_of, places
from .running import Running

if TYPE_CHECKING:
    pass

Own = dict[int, tuple[Tensor, Tensor]]
"""Keys and values (row, head, position, size) of the computed positions, of the layers that others borrow them from."""
TOLERANCE = 1e-3
"""In logits: a wrong head or a lost scale is off by far more, another order of summation by far less."""
_Captured = tuple[Mapping[Any, Tensor], Mapping[Any, Tensor]]
"""The captured outputs and inputs of modules."""


@dataclass
class Work:
    """The amount of work done in the decoder layers; the counts grow with every call."""

    token_layers: int = 0
    """Tokens whose output of one decoder layer was computed."""
    key_value_tokens: int = 0
    """Tokens of which one layer computed keys and values only."""
    pairs: int = 0
    """Query-key pairs of attention in one layer, in each of its heads."""
    read_tokens: int = 0
    """Tokens that went through the output head."""


@contextmanager
def replaying(vlm: VisionLanguageModel) -> Iterator[Replay]:
    """Yield a `Replay` of this model, through which its text model attends until the block ends.

    Other threads wait until the block ends.

    Args:
        vlm: The model.

    Yields:
        The `Replay`, with nothing recorded yet.

    Raises:
        ReplayError: If the text model does not let its attention function be replaced, or changes the logits of its
            output head in an unknown way.

    Example:
        >>> import multrace as mt
        >>> import torch
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.models.replay.recording import Source
        >>> vlm = mt.load(tiny_vlm_path())
        >>> entering = vlm.embed(vlm.prompt(None, "What colour is this?"))
        >>> last = entering.length - 1
        >>> with torch.no_grad(), replaying(vlm) as replay:
        ...     run = replay.record(entering, kept=[last], read=[last])
        ...     span = replay.span([last], [Source(run=run, positions=run.positions[:-1])])
        ...     states = run.states[6]  # what enters layer 6 at the last position
        ...     for layer in (6, 7):
        ...         states = replay.layer(layer, states, span)
        ...     logits = replay.read(states)
        >>> torch.allclose(logits, run.logits, atol=1e-4)
        True
    """
    try:
        _ = vlm.after_head  # measured by a pass of the model, which must not be one that is replayed
    except ModelError as error:
        raise ReplayError(str(error)) from error
    replay = Replay(vlm)
    with attention_function(vlm, replay.attend):
        yield replay


class Replay:
    """A runner of single decoder layers on some positions of one prompt at a time. Made by `replaying`."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self.work = Work()
        self.masks = Masks(length=0, layers=())
        """The attention masks of the prompt that `record` ran last."""
        self.frame = Frame()
        """The frame of the run whose layers are called, which `record` and `follow` set: what is added between layers,
        and the pictures that layers attend to, differ between two runs of a prompt."""
        self.crossing = crossing_layers(vlm)
        """The layers that attend to pictures; none in most models."""
        self.skipped: tuple[int, ...] = ()
        """The layers that did not run in the prompt that `record` ran last."""
        self._layers = vlm.decoder_layers
        self._calls: list[LayerCall] = []
        self._borrowed: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._kernels: dict[tuple[Any, ...], Kernels] = {}
        self._witness: Witness | None = None
        self._job: Job | None = None
        self._mixers = mixers_of(vlm)
        self._running = Running(vlm, {})
        self._pictures = Crossing({}, self.frame, 0)
        is_known = getattr(vlm.decoder, "_supports_attention_backend", False)
        self._is_proven = is_known and not self._mixers and not self.crossing

    def entering(self, entering: DecoderInput) -> Tensor:
        """Return the first decoder layer's input for this input of the text stack, (row, token, hidden); none runs."""
        with first_input(self.vlm, self._layers[0], "decoder layer 0") as read:
            self.vlm.forward(entering)
        return read[0]

    def record(
        self,
        entering: DecoderInput,
        *,
        kept: Sequence[int],
        read: Sequence[int],
        sites: Collection[Site] = (),
        projections: Collection[Projection] = (),
    ) -> Recording:
        """Run the whole model once and return the recording; its masks and positions hold for later calls.

        Args:
            entering: The input of the text stack; masks and positions are alike in all rows.
            kept: Positions at which hidden states, outputs of sites and inputs of projections are stored; keys and
                values are stored everywhere.
            read: Positions whose logits are stored.
            sites: Sites whose outputs are stored.
            projections: Projections whose inputs are stored.

        Returns:
            The `Recording`.

        Raises:
            ReplayError: For anything that a replay would not reproduce.
        """
        rows, length, device = entering.rows, entering.length, entering.embeddings.device
        where = index_of(kept, device)
        self.frame, self.skipped = self.frame_of(entering), self.vlm.skipped_layers(entering)
        self._witness = witness = Witness(
            self._layers,
            between=self.frame.between_layers,
            mixers=self._mixers,
            crossing=self.crossing,
            skipped=self.skipped,
        )
        ends = self._ends
        try:
            with (
                capture(self.vlm, [*sites, *ends], clone=True) as outputs,  # a layer may write into them later
                capture(self.vlm, [*projections, *ends], inputs=True, clone=True) as inputs,
                witness.watching(),
            ):
                logits = self.vlm.forward(entering, positions=read)
        finally:
            self._witness = None
        attended, self._calls = witness.attended, witness.calls
        self._borrow(witness)
        self._running = Running(self.vlm, witness.running)
        self._running.check(projections)
        self._pictures = Crossing(witness.pictures, self.frame, length)
        self._check_logits((outputs, inputs), witness.states[-1], logits, read)
        stored: dict[Site | Projection, Tensor] = {site: outputs[site] for site in sites if site in outputs}
        stored |= {projection: inputs[projection] for projection in projections if projection in inputs}
        self.masks = Masks.of([mask for _, _, mask in attended], length)
        ran = len(attended) - len(self.skipped)
        self.work.token_layers += rows * length * ran
        self.work.pairs += rows * ran * length * (length + 1) // 2
        self.work.read_tokens += rows * len(read)
        recording = Recording(
            positions=tuple(range(length)),
            keys=tuple(key for key, _, _ in attended),
            values=tuple(value for _, value, _ in attended),
            kept=tuple(kept),
            states=tuple(states.to(device)[:, where] for states in witness.states),
            outputs={key: value.to(device)[:, where] for key, value in stored.items()},
            read=tuple(read),
            logits=logits,
        )
        if not self._is_proven:
            self._prove(recording, witness.states)
        return recording

    def _prove(self, run: Recording, states: Sequence[Tensor]) -> None:
        """Raise `ReplayError` unless each layer by itself, at some positions, gives its output in a recorded run.

        It is asked of models that do not declare that their attention can be replaced, and of layers with a running
        state, since something else might mix positions there. states: each layer's input and the last one's output.
        """
        middle = len(run.positions) // 2
        positions = tuple(place for place in run.positions if place >= middle and place != middle + 1)
        rest = tuple(place for place in run.positions if place not in set(positions))
        span, work = self.span(positions, [Source(run=run, positions=rest)]), replace(self.work)
        own = self.own_of(run, positions)
        for number in range(len(self._layers)):
            entering, expected = (each.to(self.vlm.device)[:, span.index] for each in states[number : number + 2])
            try:
                output = self.layer(number, entering, span, own)
            except ReplayError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ReplayError(f"decoder layer {number} does not run at some positions only: {error}") from error
            if not _is_near(output, expected):
                raise ReplayError(f"decoder layer {number} gives other states when it runs at some positions only")
        self.work, self._is_proven = work, True

    def record_after(
        self,
        base: Recording,
        entering: Tensor,
        positions: Sequence[int],
        *,
        frame: Frame | None = None,
        kept: Sequence[int] | None = None,
        sites: Collection[Site] = (),
        projections: Collection[Projection] = (),
    ) -> Recording:
        """Run some positions through all layers and return a recording that equals `base` everywhere else.

        Args:
            base: The run that holds the keys and values of all other positions.
            entering: (row, position, hidden), the input of the first layer at the computed positions.
            positions: The positions to compute; they must be all that can differ (`Masks.reach`).
            frame: The frame of this run, as `frame_of` gives it (default: that of `base`).
            kept: Those of them at which states, outputs of sites and inputs of projections are stored (default: all).
            sites: Sites whose outputs are stored.
            projections: Projections whose inputs are stored.

        Returns:
            The `Recording`: keys and values at the computed positions, logits wherever `base` has them.
        """
        rest = sorted(set(base.positions) - set(positions))
        self.follow(self.frame if frame is None else frame)
        span = self.span(positions, [Source(run=base, positions=tuple(rest))])
        kept = span.positions if kept is None else tuple(kept)
        where, written = places(span.positions, kept, entering.device), {}
        states, stored, attended = entering, [entering[:, where].clone()], []
        own: Own = {}
        for number in range(len(self._layers)):
            job = span.job(number)
            with self._storing(number, sites, projections, where, written):
                states = self._call(number, states, span, job, own)
            stored.append(states[:, where].clone())  # a view would keep the rest in memory
            attended.append(job.computed)
        changed = [position for position in base.read if position in set(positions)]
        logits = base.logits.expand(len(entering), -1, -1).clone()
        if changed:
            within = places(span.positions, changed, states.device)
            logits[:, places(base.read, changed, states.device)] = self.read(states[:, within])
        return Recording(
            positions=span.positions,
            keys=tuple(key for key, _ in attended),
            values=tuple(value for _, value in attended),
            kept=kept,
            states=tuple(stored),
            outputs=written,
            read=base.read,
            logits=logits,
        )

    def follow(self, frame: Frame) -> None:
        """Call layers from now on as in the run of this frame, another run of the recorded prompt.

        Layers that attend to pictures compute the keys and values of this run's pictures here, once for each frame.
        """
        self.frame, computed = frame, {}
        for number in self._pictures.missing(frame):
            pictures = cast(Tensor, frame.pictures)
            token, job = pictures.new_zeros(len(pictures), 1, self.vlm.hidden), Job()
            job.own = lambda keys, values: (Segment(keys=keys, values=values),)  # the token's output is not used
            with torch.no_grad():
                self._run(number, token, {**self._calls[number].at(slice(0, 1)), ATTENDED: pictures}, job)
            computed[number] = cast(tuple[Tensor, Tensor], job.computed)
        if computed:
            self._pictures.keep(frame, computed)

    def span(self, positions: Sequence[int], sources: Sequence[Source]) -> Span:
        """Return the span of these positions (ascending), with the recordings that hold the keys of the others."""
        return Span(positions=tuple(positions), sources=tuple(sources), masks=self.masks, device=self.vlm.device)

    def frame_of(self, entering: DecoderInput) -> Frame:
        """Return the frame of a run, with what each of its layers is given beside its states."""
        return entering.replayed_frame(self.vlm.decoder)

    @property
    def lenders(self) -> tuple[int, ...]:
        """The layers to whose keys later layers attend; none in most models."""
        return tuple(sorted(set(self._borrowed.values())))

    def own_of(self, run: Recording, positions: Sequence[int]) -> Own:
        """Return keys and values of the lending layers at some positions of a recorded run, in its rows."""
        where = places(run.positions, positions, self.vlm.device) if self._borrowed else slice(0)
        return {number: (run.keys[number][:, :, where], run.values[number][:, :, where]) for number in self.lenders}

    def layer(self, number: int, states: Tensor, span: Queries, own: Own | None = None) -> Tensor:
        """Return a decoder layer's output, (row, position, hidden), for states of that shape at the span's positions.

        Rows form as many equal blocks as a source has rows, in its order. own: what the lending layers below computed
        for these rows and positions, which a borrowing layer needs; a lending layer puts its own into it.
        """
        return self._call(number, states, span, span.job(number), own)

    def last_layer(self, states: Tensor, span: Queries, read: Sequence[int], own: Own | None = None) -> Tensor:
        """Return the last layer's output at only some of the span's positions, (row, read position, hidden).

        For the others the layer computes keys and values and is stopped there, unless its weights are moved while it
        runs (offloading), where stopping would leave them in the wrong place. Patches on modules of the layer see the
        read positions only.
        """
        number = len(self._layers) - 1
        if len(read) == len(span.positions):
            return self.layer(number, states, span, own)
        where = places(span.positions, read, states.device)
        is_offloaded = hasattr(self._layers[number], "_hf_hook")
        collect = span.job(number) if is_offloaded else Job(is_stopped=True)
        try:
            self._call(number, states, span, collect, own)
        except StopForward:
            self.work.key_value_tokens += states.shape[0] * states.shape[1]
        job = span.job(number, read)
        job.given = collect.computed
        return self._call(number, states[:, where], span, job, own, read)

    def read(self, states: Tensor) -> Tensor:
        """Return logits (row, position, vocab), float32 or wider, of last-layer outputs (row, position, hidden)."""
        self.work.read_tokens += states.shape[0] * states.shape[1]
        return self.vlm.readout(self.vlm.final_norm(states))

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Return one layer's attention output, (row, query, head, size), and no weights; called by the text model."""
        job = self._job
        if job is None:
            if self._witness is not None:
                self._witness.attends(module, (key, value, attention_mask), keywords)
                self._kernels_for(query, key, value)  # probed once, while recording, not in the first replayed layer
            return exact_attention(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
            )
        job.computed = key, value
        if job.is_stopped:
            raise StopForward
        key, value = job.given or job.computed
        segments = [part.on(query.device) for part in (*job.segments, *job.own(key, value))]
        self.work.pairs += query.shape[2] * sum(part.keys.shape[2] * part.seeing(len(query)) for part in segments)
        softmax = Softmax.of(query, scaling, keywords)
        kernels = self._kernels_for(query, key, value)
        output = merged_attention(query, segments, softmax=softmax, kernels=kernels)
        return output.transpose(1, 2).contiguous(), None

    def _kernels_for(self, query: Tensor, key: Tensor, value: Tensor) -> Kernels:
        """Return the kernels that passed the self-test for tensors of these shapes."""
        shape = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        where = query.device, *shape
        if where not in self._kernels:
            sizes = dict(zip(("heads", "key_heads", "size", "value_size"), shape, strict=True))
            self._kernels[where] = probe_kernels(device=query.device, dtype=query.dtype, **sizes)
        return self._kernels[where]

    def _call(
        self,
        number: int,
        states: Tensor,
        span: Queries,
        job: Job,
        own: Own | None = None,
        read: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the layer's output at the span's positions, or those in `read`, attention as the job says."""
        if number in self.skipped:
            job.computed = without_edges(states)[:2]
            return states.clone()  # a layer's output is never its input
        index = span.index if read is None else index_of(read, states.device)
        keywords = self._calls[number].at(index) | self._of_run(number, index, len(states), own or {})
        added = self.frame.between_layers.get(number)
        if added is not None:
            states = states + added[:, index].repeat_interleave(len(states) // len(added), 0).to(states)
        if number in self._pictures:
            self._pictures.show(number, self.frame, job, span.positions if read is None else read)
            keywords[ATTENDED] = keywords[ATTENDED].expand(len(states), -1, -1)
        with self._running.continued(number, span, job, read):
            output = self._run(number, states, keywords, job)
        if number in self._pictures:
            job.computed = without_edges(states)[:2]
        if own is not None and number in self.lenders:
            own[number] = cast(tuple[Tensor, Tensor], job.computed)
        return output

    def _run(self, number: int, states: Tensor, keywords: Mapping[str, Any], job: Job) -> Tensor:
        """Return the layer's output for these states and arguments, attention as the job says."""
        self._job = job
        try:
            output = main_tensor(self._layers[number](states, **keywords), f"decoder layer {number}")
        finally:
            self._job = None
        self.work.token_layers += states.shape[0] * states.shape[1]
        return output.to(states.device)

    def _borrow(self, witness: Witness) -> None:
        """Note which layers attend to the keys of others, and under which name they find them.

        Raises `ReplayError` if a layer is given something beside its states that the frame does not have.
        """
        self._borrowed, self._names, attended = witness.borrowed, {}, witness.attended
        for number, call in enumerate(witness.calls):
            given = call.keywords.get(LAYER_INPUT)
            made = None if self.frame.layer_inputs is None else self.frame.layer_inputs[:, :, number]
            if given is not None and (made is None or not torch.equal(given, made.to(given.device))):
                raise ReplayError(
                    f"decoder layers are given {LAYER_INPUT!r}, which cannot be made anew for another run"
                )
            if number in self._borrowed:
                names = [name for name, pair in (call.shared or {}).items() if pair[0] is attended[number][0]]
                if not names:
                    raise ReplayError(f"decoder layer {number} attends to the keys of another layer")
                self._names[number] = names[0]

    def _of_run(self, number: int, index: Index, rows: int, own: Own) -> dict[str, Any]:
        """Return those arguments of a layer that belong to one run, for the computed positions."""
        shared, given = self._calls[number].shared, self.frame.layer_inputs
        arguments: dict[str, Any] = {}
        if shared is not None:
            lent = {self._names[number]: own[self._borrowed[number]]} if number in self._borrowed else {}
            arguments[SHARED] = copy.copy(shared)
            arguments[SHARED].clear()
            arguments[SHARED].update(lent)
        if given is not None:
            arguments[LAYER_INPUT] = given[:, index, number].repeat_interleave(rows // len(given), 0)
        return arguments

    @contextmanager
    def _storing(
        self,
        number: int,
        sites: Collection[Site],
        projections: Collection[Projection],
        where: Index,
        stored: dict[Site | Projection, Tensor],
    ) -> Iterator[None]:
        """Store the states of one layer's sites and projections inside the block, at some positions."""
        inside = {id(part) for part in self._layers[number].modules()}
        own_sites = [site for site in sites if self.vlm.layer_index(site.layer) == number]
        own_projections = [projection for projection in projections if id(projection.module) in inside]
        with (
            capture(self.vlm, own_sites, clone=True) as written,
            capture(self.vlm, own_projections, inputs=True, clone=True) as read,
        ):
            yield
        device = self.vlm.device
        stored.update({key: value.to(device)[:, where].clone() for key, value in {**written, **read}.items()})

    @property
    def _ends(self) -> tuple[nn.Module, nn.Module]:
        """Return the modules that turn the last layer's output into logits: the final norm and the output head."""
        return self.vlm.final_norm, self.vlm.output_head

    def _check_logits(self, captured: _Captured, states: Tensor, logits: Tensor, read: Sequence[int]) -> None:
        """Raise `ReplayError` unless final norm and readout alone turn the last states into the logits."""
        norm, head = self._ends
        outputs, inputs = captured
        if norm in outputs and head in outputs:
            after = self.vlm.after_head
            normed, own = after.entering(outputs[norm][:, list(read)]), after(outputs[head])
            links = (states, inputs[norm]), (normed, inputs[head]), (own, logits)
            if all(torch.equal(one.to(other.device), other) for one, other in links):
                return
        raise ReplayError("final norm and output head do not give the model's own logits")


def _is_near(values: Tensor, expected: Tensor) -> bool:
    """Return whether values differ by no more than another order of summation can explain."""
    coarseness = max(1.0, torch.finfo(values.dtype).eps * 1e4)  # of half precision, beside float32
    bound = TOLERANCE * coarseness * max(1.0, expected.abs().max().item())
    return bool((values - expected).abs().max() <= bound)
