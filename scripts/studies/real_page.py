"""The page on what is found in a real model, written from the numbers of the study, beside what others published."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artefacts import write_whole
from .real_figures import TRACES, write_figures

NAME = "real_model.md"
SEEN, NOT_SEEN, DIFFERENT = "seen", "not seen", "different"
Results = Mapping[str, Any]
Row = Sequence[float | None]
"""Value, low and high of its 95 % interval, and the number of facts."""
_LAST = "last constraint token"
_WORDS = {"constraint": "all words of the constraint"}
_HEADER = """# What is found in a real model

Made by `python -m multrace.scripts.studies.real_model`. The model is a LLaVA over SmolLM2-135M-Instruct: its MLPs
are as their makers trained them, so nobody here put into them the facts that are traced below. A picture shows the flag
of a country, and the question is the beginning of a sentence ("The capital of the country in this photo is").

- A fact is *known* if the model's free answer to a held-out picture is right. All averages are over known facts.
- Countries are halved. Layers of peaks, numbers of tokens and thresholds are chosen on one half, and every number below
  is measured on the other one. Brackets hold 95 % intervals over facts (Student's t, Wilson's for shares).
- Effects are changes of the probability of the answer's first token.
- Verdicts follow rules that were fixed before the numbers were there; the numbers stand beside them, also where a rule
  is met by a hair. One rule was made stricter afterwards: windows of the second stage of image -> question must not
  reach into the first stage.
- Noise on words spoils the words too, so the first layers at these words bring back the words themselves as well as
  what they point at. Another flag leaves the words as they are.
- The picture's way through the first layers was taught: image tokens were trained to spell the country's name, row by
  row of the patches, with its last token in the last row, and states at the words of the constraint were pulled towards
  those at the name. That these words read the picture early, and which image tokens they read, is therefore no finding
  about large models. Above these layers no state was prescribed; but attention has low-rank changes in every layer,
  which were trained on the answers.
"""


def write_page(results: Results, folder: Path) -> Path:
    """Write the page and its figures into a folder, and return the path of the page."""
    figures = write_figures(results, folder)
    return write_whole(folder / NAME, page(results, figures).encode())


def page(results: Results, figures: Mapping[str, str]) -> str:
    """Return the page; parts without numbers are left out. figures: the file of each part's figure."""
    parts: list[str] = [_HEADER]
    if "model" in results:
        about = results["model"]
        parts.append(f"Weights {about['weights']}, {about['layers']} layers, multrace {about['version']}.\n")
    sections: dict[str, Callable[[Results], Iterator[str]]] = {
        "answers": _answers,
        **dict.fromkeys(TRACES, _trace),
        "picture": _picture,
        "flows": _flows,
        "emergence": _emergence,
        "tokens": _tokens,
        "cliff": _cliff,
        "failure": _failure,
    }
    published = list(_published(results))
    if published:
        parts += ["## Beside what others published\n", *published, ""]
    for name, section in sections.items():
        if name in results:
            parts.append(f"## {_TITLES[name]}\n")
            if name in figures:
                parts.append(f"![{_TITLES[name]}]({figures[name]})\n")
            parts += [*section(results[name]), ""]
    return "\n".join(parts)


_TITLES = {
    "answers": "What it answers",
    **TRACES,
    "picture": "How long the image tokens carry it",
    "flows": "Where the picture's information travels",
    "emergence": "When the answer appears",
    "tokens": "Which image tokens feed the constraint",
    "cliff": "From which layer on the picture is no longer needed",
    "failure": "Can its errors be predicted?",
}


def _share(row: Row) -> str:
    """Return a share with its interval in percent."""
    return _numbers(row, 100, 0)


def _effect(row: Row) -> str:
    return _numbers(row, 1, 3)


def _numbers(row: Row, scale: float, digits: int) -> str:
    value, low, high = (None if each is None else scale * each for each in row[:3])
    if value is None:
        return "none"
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{ends}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


# ---- sections ----


def _answers(part: Results) -> Iterator[str]:
    yield "Free answers in percent: right by picture, right by name, and equal in both.\n"
    rows = [
        [name, str(cells["picture"][3]), *(_share(cells[key]) for key in ("picture", "name", "agrees"))]
        for name, cells in part.items()
    ]
    yield from _table(["relation", "facts", "by picture", "by name", "equal"], rows)


def _trace(part: Results) -> Iterator[str]:
    window, layers = part["window"], part["layers"]
    yield (
        f"Mean over {part['count']} facts ({part['corruption']}): the answer's probability falls from "
        f"{part['clean']:.3f} to {part['corrupted']:.3f}, total effect {_effect(part['total'])}. MLPs and attention "
        f"are restored in {window} of {layers} layers at a time."
    )
    if "known" in part:
        words = ", ".join(f"{known} of {asked} {name}" for name, (known, asked) in part["known"].items())
        yield (
            f"Known: {words}. The window is the share of the decoder that ROME restored (10 of 48 layers). Each fact "
            "has one noise sample of its own, and groups of tokens are represented by the one in their middle."
        )
    yield ""
    kinds = list(part["kinds"])
    rows = []
    for name in part["rows"]:
        cells = [part["kinds"][kind]["peaks"].get(name) for kind in kinds]
        words = ["" if each is None else f"{_effect(each['effect'])}, layer {each['layer']}" for each in cells]
        rows.append([_WORDS.get(name, name), *words])
    chosen = "the same facts" if part["chosen_on"] is None else f"{part['chosen_on']} other facts"
    yield f"Indirect effect at the strongest layer, which was chosen on {chosen}:\n"
    yield from _table(["restored at", *kinds], rows)


def _picture(part: Results) -> Iterator[str]:
    cells, layers = part["kinds"]["hidden"], part["layers"]
    total, effects = part["total"][0], cells["effect"][0]
    late = next((layer for layer, effect in enumerate(effects) if effect < total / 2), "none")
    yield (
        f"Another country's flag, and the states of all image tokens restored after one layer; mean over "
        f"{part['count']} facts, total effect {_effect(part['total'])}. From layer {late} on, they "
        "bring back less than half of it: by then the words have read the picture.\n"
    )
    shown = sorted({round((layers - 1) * step / 6) for step in range(7)})
    rows = [[_effect([cells[key][0][layer] for key in ("effect", "low", "high")]) for layer in shown]]
    yield from _table([f"layer {layer}" for layer in shown], rows)


def _flows(part: Results) -> Iterator[str]:
    yield (
        f"Change of the answer's probability in percent, mean over {part['count']} facts, if no token of the second "
        "group attends to the first: in the layer (centre of the window) that was chosen on the other half, and the "
        "centre of the loss over layers.\n"
    )
    rows = []
    for name, by_window in part["flows"].items():
        row = [name]
        for window in part["windows"]:
            cells = by_window[str(window)]
            row.append(f"{_numbers(cells['strongest'], 1, 0)}, layer {cells['layer']}")
        centre = by_window[str(part["windows"][-1])]["centre"]
        rows.append([*row, "" if centre is None else _numbers([*centre, None, None][:3], 1, 1)])
    heads = [f"{window} layer{'s' if window > 1 else ''} cut" for window in part["windows"]]
    yield from _table(["flow", *heads, "centre of the loss"], rows)


def _emergence(part: Results) -> Iterator[str]:
    yield f"The answer's first token in the logit lens (with the final norm), over {part['count']} facts.\n"
    rows = []
    for place, cells in part["places"].items():
        first = "never" if cells["first"] is None else "{1:g} [{0:g}, {2:g}]".format(*cells["first"])
        rows.append([place.replace("_", " "), first, _share(cells["never"]), _ranks(cells["ranks"][1])])
    heads = ["read at", "leads from layer (median, quartiles)", "never leads, %", "median rank by layer"]
    yield from _table(heads, rows)


def _ranks(medians: Sequence[float]) -> str:
    """Return the median rank after some layers, from first to last."""
    last = len(medians) - 2
    layers = sorted({round(last * step / 6) for step in range(7)})
    return ", ".join(f"{layer}: {medians[layer + 1]:.0f}" for layer in layers)


def _tokens(part: Results) -> Iterator[str]:
    subset, agreement, box = part["subset"], part["agreement"], part["box"]
    strongest = max(range(len(part["by_layer"])), key=lambda layer: part["by_layer"][layer][0] or 0)
    enough = "no number measured" if part["enough"] is None else f"{part['enough']} of {part['tokens']}"
    yield (
        f"Contributions of {part['tokens']} image tokens to the constraint (arXiv 2406.04236, equation 1), mean over "
        f"{part['count']} facts; they are longest in layer {strongest}. Shares are means over the first quarter of the "
        "layers, in which words read the picture. The last row of patches holds the last token of a country's name, "
        "because it was trained to.\n"
    )
    rows = [
        ["share of the image tokens that hold 80 % of the contributions", _share(part["for_80"])],
        [f"contributions held by the {subset['size']} indices that lead on the other half", _share(subset["chosen"])],
        [f"contributions held by the last {subset['size']} indices", _share(subset["last"])],
        ["the same for equal contributions", _share([subset["uniform"], None, None])],
        [
            f"overlap of the {agreement['top']} strongest: same picture, other relation",
            _share(agreement["same_picture"]),
        ],
        ["... other picture, same relation", _share(agreement["other_picture"])],
        ["... by chance", _share([agreement["chance"], None, None])],
        ["image tokens that show the flag's box", _share(box["tokens"])],
        ["contributions that they hold", _share(box["mass"])],
    ]
    yield from _table(["", "percent"], rows)
    yield "\nAnswers (first token) that stay, in percent, if all other image tokens are cut in all layers:\n"
    rows = [
        [str(count), _share(best), _share(random)]
        for count, best, random in zip(part["keep"], part["best"], part["random"], strict=True)
    ]
    yield from _table(["image tokens that stay", "largest contributions", "at random"], rows)
    words = ", ".join(f"{name} {_share(row)}" for name, row in part["sets"].items())
    yield f"\nTokens that keep 90 % of the answers on the other half: {enough}. By place: {words}."


def _cliff(part: Results) -> Iterator[str]:
    yield (
        f"Free answers of {part['count']} facts that stay when all image tokens are dropped from a layer on; without "
        f"them in any layer, {_share(part['floor'])} % stay."
    )
    yield (
        "The cliff is the first layer from which on no layer changes more than "
        f"{_share([part['tolerance'], None, None])} % of the answers to {part['chosen_on']} facts of the other half, "
        f"which is {int(part['tolerance'] * part['chosen_on'])} of them."
    )
    if part["cliff"] is None:
        yield "No layer keeps that many.\n"
    else:
        yield (
            f"It is layer {part['cliff']}: {_share(part['at_cliff'])} % of the reported answers stay, and "
            f"{100 * part['saved']:.0f} % of the decoder's operations on the prompt are saved.\n"
        )
    layers = part["layers"]
    shown = sorted({*range(min(6, len(layers))), *(round((len(layers) - 1) * step / 6) for step in range(7))})
    rows = [[_share(part["stays"][place]) for place in shown]]
    yield from _table([f"from layer {layers[place]}" for place in shown], rows)


def _failure(part: Results) -> Iterator[str]:
    yield f"{part['count']} questions as they come, of which the model answers {_share(part['right'])} % rightly.\n"
    if "problem" in part:
        yield f"No prediction: {part['problem']}."
        return
    yield "Area under the ROC curve (right answers score higher; fitted scores are out of fold):\n"
    yield from _table(["score", "AUROC"], [[name, _effect(row)] for name, row in part["scores"].items()])
    yield f"\nDecisions at the threshold that is most often right on {part['chosen_on']} other questions, in percent:\n"
    right = part["right"][0]
    rows = [["always the commoner verdict", "", f"{100 * max(right, 1 - right):.0f}", "", ""]]
    for name, cells in part["decisions"].items():
        shares = [_share(cells[key]) for key in ("accuracy", "caught", "false_alarms")]
        rows.append([name, f"{cells['auroc']:.3f}", *shares])
    yield from _table(["decided by", "AUROC", "right decisions", "errors caught", "right answers flagged"], rows)


# ---- published findings ----


@dataclass(frozen=True, kw_only=True)
class PublishedFinding:
    """A published finding, and how it is judged here."""

    claim: str
    source: str
    needs: tuple[str, ...]
    """The parts of the study that judge it."""
    judge: Callable[[Results], tuple[str, str]]
    """The verdict, and the numbers behind it."""


def _published(results: Results) -> Iterator[str]:
    """Yield the table of published findings on which there are numbers."""
    rows = []
    for finding in FINDINGS:
        if all(name in results for name in finding.needs):
            verdict, words = finding.judge(results)
            rows.append([finding.claim, finding.source, f"**{verdict}**", words])
    if rows:
        yield from _table(["published", "source", "here", "numbers"], rows)


def _peak(part: Results, kind: str, row: str) -> Mapping[str, Any] | None:
    return part["kinds"][kind]["peaks"].get(row)


def _is_clear(row: Row) -> bool:
    """Return whether the interval excludes zero."""
    low, high = row[1], row[2]
    return low is not None and high is not None and (low > 0 or high < 0)


def _place(peak: Mapping[str, Any], layers: int) -> str:
    return f"{_effect(peak['effect'])} at layer {peak['layer']} of {layers}"


def _early_mlps(results: Results) -> tuple[str, str]:
    part = results["noise"]
    peak, layers = _peak(part, "mlp", _LAST), part["layers"]
    if peak is None or not _is_clear(peak["effect"]) or peak["effect"][0] < 0.05 * part["total"][0]:
        return NOT_SEEN, "no clear effect of MLPs there" if peak is None else _place(peak, layers)
    return (SEEN if peak["layer"] <= layers * 4 / 32 else DIFFERENT), _place(peak, layers)


def _earlier_than_by_name(results: Results) -> tuple[str, str]:
    parts = [results["noise"], results["noise by name"]]
    peaks = [_peak(part, "mlp", _LAST) for part in parts]
    if None in peaks:
        return NOT_SEEN, "no effect of MLPs at the constraint"
    first, second = (peak["layer"] for peak in peaks if peak is not None)
    words = f"strongest MLPs at layer {first} by picture, {second} by name, of {parts[0]['layers']}"
    return (SEEN if first < second else NOT_SEEN if first == second else DIFFERENT), words


def _middle_attention(results: Results) -> tuple[str, str]:
    part = results["flows"]
    cells = part["flows"]["constraint -> last"][str(part["windows"][-1])]
    words = f"{_numbers(cells['strongest'], 1, 0)} % at layer {cells['layer']} of {part['layers']}"
    if not _is_clear(cells["strongest"]):
        return NOT_SEEN, words
    if cells["centre"] is None:
        return DIFFERENT, words
    depth = cells["centre"][0] / part["layers"]
    return (SEEN if 0.35 <= depth <= 0.65 else DIFFERENT), f"{words}, centre of the loss at {cells['centre'][0]:.1f}"


def _small_subset(results: Results) -> tuple[str, str]:
    subset = results["tokens"]["subset"]
    words = (
        f"{subset['size']} indices chosen on the other half hold {_share(subset['chosen'])} %, the last ones "
        f"{_share(subset['last'])} %, equal shares would be {100 * subset['uniform']:.0f} %"
    )
    value, low = subset["chosen"][:2]
    if value >= 0.5:
        return SEEN, words
    return (DIFFERENT if low is not None and low > 2 * subset["uniform"] else NOT_SEEN), words


def _two_stages(results: Results) -> tuple[str, str]:
    part = results["flows"]
    cells = part["flows"]["image -> question"][str(part["windows"][-1])]
    layers = part["layers"]
    early = max(1, round(4 * layers / 40))
    apart = early + part["windows"][-1] // 2 + 1  # the first centre whose window has no layer of the first stage
    late = min(max(apart, round(8 * layers / 40)), layers - 1)
    stages = []
    for chosen in (range(early + 1), range(late, max(late, round(14 * layers / 40)) + 1)):
        layer = min((each for each in chosen if each < layers), key=lambda each: cells["change"][each] or 0)
        stages.append((layer, [cells[key][layer] for key in ("change", "low", "high")]))
    words = "; ".join(f"{_numbers(row, 1, 0)} % at layer {layer}" for layer, row in stages)
    strong = [_is_clear(row) and (row[0] or 0) < -5 for _, row in stages]
    return (SEEN if all(strong) else DIFFERENT if any(strong) else NOT_SEEN), words


def _image_last(results: Results) -> tuple[str, str]:
    part = results["flows"]
    window = str(part["windows"][-1])
    direct, through = (part["flows"][name][window]["strongest"] for name in ("image -> last", "question -> last"))
    words = f"image -> last {_numbers(direct, 1, 0)} %, question -> last {_numbers(through, 1, 0)} %"
    return (SEEN if (direct[0] or 0) > 0.5 * (through[0] or 0) and _is_clear(through) else DIFFERENT), words


def _cliff_depth(results: Results) -> tuple[str, str]:
    part, layers = results["cliff"], results["cliff"]["layers"][-1] + 1
    if part["cliff"] is None:
        return NOT_SEEN, "the picture is needed up to the last layer"
    words = f"layer {part['cliff']} of {layers}, {_share(part['at_cliff'])} % stay"
    return (SEEN if part["cliff"] <= layers * 22 / 32 else DIFFERENT), words


def _failure_order(results: Results) -> tuple[str, str]:
    scores = results["failure"].get("scores")
    if scores is None:
        return NOT_SEEN, results["failure"]["problem"]
    one, other = scores["contribution"], scores["answer probability"]
    words = f"contribution {_effect(one)}, probability {_effect(other)}"
    if one[1] <= 0.5:
        return (DIFFERENT if other[1] > 0.5 else NOT_SEEN), words
    return (SEEN if other[0] > one[0] else DIFFERENT), words


def _rome_site(results: Results) -> tuple[str, str]:
    part = results["rome"]
    mlp, attention = _peak(part, "mlp", _LAST), _peak(part, "attention", _LAST)
    if mlp is None or attention is None or not _is_clear(mlp["effect"]):
        return NOT_SEEN, "no clear effect of MLPs there"
    words = f"MLPs {_place(mlp, part['layers'])}, attention {_effect(attention['effect'])}"
    if mlp["effect"][0] <= attention["effect"][0]:
        return DIFFERENT, words
    return (SEEN if 0.15 <= mlp["layer"] / part["layers"] <= 0.6 else DIFFERENT), words


def _rome_late(results: Results) -> tuple[str, str]:
    part = results["rome"]
    peak = _peak(part, "attention", "last token")
    if peak is None or not _is_clear(peak["effect"]):
        return NOT_SEEN, "no clear effect of attention there"
    return (SEEN if peak["layer"] >= part["layers"] / 2 else DIFFERENT), _place(peak, part["layers"])


FINDINGS = (
    PublishedFinding(
        claim="MLPs of middle layers at the last subject token store facts (GPT-2 XL: 6.6 of 18.6 %, attention 1.6)",
        source="arXiv 2202.05262",
        needs=("rome",),
        judge=_rome_site,
    ),
    PublishedFinding(
        claim="attention in late layers at the last token brings the answer back",
        source="arXiv 2202.05262",
        needs=("rome",),
        judge=_rome_late,
    ),
    PublishedFinding(
        claim="MLPs of layers 1 to 4 of 32 at the visual constraint are causal (LLaVA-7B, words corrupted)",
        source="arXiv 2406.04236",
        needs=("noise",),
        judge=_early_mlps,
    ),
    PublishedFinding(
        claim="these are earlier than in the same language model without pictures (layers 4 to 7)",
        source="arXiv 2406.04236",
        needs=("noise", "noise by name"),
        judge=_earlier_than_by_name,
    ),
    PublishedFinding(
        claim="the constraint reaches the last token through attention in the middle (layers 16 and 17 of 32)",
        source="arXiv 2406.04236",
        needs=("flows",),
        judge=_middle_attention,
    ),
    PublishedFinding(
        claim="a small and consistent subset of image tokens, the last 36 of 576, feeds the constraint",
        source="arXiv 2406.04236",
        needs=("tokens",),
        judge=_small_subset,
    ),
    PublishedFinding(
        claim="image -> question has two stages (layers 0 to 4 of 40: -60 %; around 10: -21 %)",
        source="arXiv 2411.18620",
        needs=("flows",),
        judge=_two_stages,
    ),
    PublishedFinding(
        claim="the picture reaches the last token through the question (-30 %) and hardly directly (-5 %)",
        source="arXiv 2411.18620",
        needs=("flows",),
        judge=_image_last,
    ),
    PublishedFinding(
        claim="image tokens can be dropped from layers 12 to 22 of 32 on (LLaVA-1.5)",
        source="arXiv 2406.06579",
        needs=("cliff",),
        judge=_cliff_depth,
    ),
    PublishedFinding(
        claim="contributions tell right from wrong (AUROC .63), the answer's probability better (.76)",
        source="arXiv 2406.04236",
        needs=("failure",),
        judge=_failure_order,
    ),
)
"""What others found in large models, judged on the numbers here by rules."""
