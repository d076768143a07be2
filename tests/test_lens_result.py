"""The result of the logit lens: what it says about words, files, tables, pictures and averages over prompts."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from multrace.artefacts import ArtefactError
from multrace.data import World
from multrace.tracing import TraceError, average, logit_lens
from multrace.tracing.lens import NORMS, QUANTITIES, AverageLogitLens, FollowedTokens, LogitLens
from result_checks import assert_same, assert_shown, colours, svg

LOWER, CAPITALISED = "answer, lower case", "answer, capitalised"
FALSE_LOWER = "false option, lower case"


def by_hand(ranks: list[list[int]], roles: tuple[tuple[str, ...], ...], **changes: object) -> LogitLens:
    """A lens result at one position with these ranks (state, followed token), alike with and without the norm."""
    values = torch.tensor(ranks)[None, None].repeat(2, 1, 1, 1)
    states, count = len(ranks), len(roles)
    followed = FollowedTokens(
        ids=tuple(range(count)),
        texts=tuple(f" w{index}$" for index in range(count)),
        words=tuple((f"w{index}$",) for index in range(count)),
        roles=roles,
    )
    top = torch.arange(3).repeat(2, 1, states, 1)
    fields = {
        "model": "some-model",
        "revision": None,
        "question": "Who $costs$?",
        "tokens": ("Who", "\n", ":"),
        "positions": (2,),
        "position_roles": ("last",),
        "answer": "w0",
        "is_own_answer": True,
        "foil": None,
        "followed": followed,
        "probabilities": 0.9 / values.double(),
        "ranks": values,
        "top_ids": top,
        "top_probabilities": torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).expand(2, 1, states, 3),
        "texts": {str(index): f" w{index}$" for index in range(max(3, count))},
    }
    return LogitLens(**fields | changes)


@pytest.fixture(scope="module")
def read_fact(tiny_vlm):
    """Reads a fact of the world by its number, at the constraint and the last position or as asked."""
    world = World()

    def read(number: int, **options: object) -> LogitLens:
        fact = world.facts[number]
        record = world.question(fact)
        prompt = tiny_vlm.prompt(
            world.picture(world.entities[fact.entity], 5).image, record.text, constraint=record.constraint
        )
        return logit_lens(tiny_vlm, prompt, progress=False, **{"answer": record.answer, **options})

    return read


@pytest.fixture(scope="module")
def lens(read_fact) -> LogitLens:
    """A real one with several positions, a foil and a further word."""
    return read_fact(0, positions=["last", "constraint"], foil="Sallez Kimrer", words=["red", 7], top=4)


@pytest.mark.parametrize(
    ("ranks", "first"),
    [([1, 1, 1], -1), ([9, 1, 1], 0), ([1, 2, 1], 1), ([1, 1, 2], None), ([3, 2, 2], None)],
)
def test_the_first_layer_is_where_it_leads_to_the_end(ranks, first):
    assert by_hand([[rank, 5] for rank in ranks], ((LOWER,), (FALSE_LOWER,))).first_layer("w0$") == first


def test_words_roles_and_ids_name_the_same_token(lens):
    index = lens.followed.index(CAPITALISED)
    for name in (lens.answer, CAPITALISED, lens.followed.ids[index]):
        for position in (0, "last"):
            for norm in NORMS:
                row = NORMS.index(norm), 0, slice(None), index
                asked = {"position": position, "norm": norm}
                assert torch.equal(lens.probability(name, **asked), lens.probabilities[row])
                assert torch.equal(lens.rank(name, **asked), lens.ranks[row])
    assert lens.followed.roles[lens.followed.index(7)] == ("token 7",)
    with pytest.raises(TraceError, match="'blue' was not followed; followed are the words .*red.*words="):
        lens.rank("blue")
    for position in (99, "question", -99):
        with pytest.raises(TraceError, match=f"position {position!r} was not read; pass a number from 0 to"):
            lens.rank("red", position=position)


def test_the_likeliest_tokens_are_in_order_and_agree_with_the_ranks(lens):
    for norm in NORMS:
        for layer in lens.layers:
            tokens = lens.top(layer, position="last", norm=norm)
            assert len(tokens) == 4 and sorted(tokens, key=lambda each: -each[2]) == list(tokens)
            leads = int(lens.rank(CAPITALISED, norm=norm)[layer + 1]) == 1
            assert leads == (tokens[0][0] == lens.followed.ids[lens.followed.index(CAPITALISED)])
    assert lens.top(lens.layers[-1])[0][1].strip() == lens.answer.split()[0]
    with pytest.raises(TraceError, match=r"no layer 8; layers were read from -1 \(the embedding\) to 7"):
        lens.top(8)


def test_saved_and_loaded_it_is_the_same(lens, tmp_path):
    again = LogitLens.load(lens.save(tmp_path / "deep" / "e.safetensors"))
    assert_same(again, lens)
    assert_shown(lens)
    broken = replace(lens, ranks=lens.ranks[:, :1])
    with pytest.raises(ArtefactError, match="its tensors are of other shapes than its positions"):
        LogitLens.load(broken.save(tmp_path / "broken.safetensors"))
    with pytest.raises(ArtefactError, match="holds 'multrace logit lens 2', not 'multrace average logit lens 2'"):
        AverageLogitLens.load(tmp_path / "deep" / "e.safetensors")


def test_the_table_has_a_line_for_every_number(lens):
    frame = lens.to_dataframe()
    columns = ["norm", "position_role", "position", "token", "layer", "state", "token_id", "text", "words", "roles"]
    assert list(frame) == [*columns, "probability", "rank"]
    assert len(frame) == lens.probabilities.numel()
    assert frame["probability"].tolist() == lens.probabilities.flatten().tolist()
    assert frame["rank"].tolist() == lens.ranks.flatten().tolist()
    is_here = ~frame["norm"] & (frame["position_role"] == "constraint 2")
    chosen = frame[is_here & frame["roles"].str.contains(CAPITALISED)]
    assert chosen["layer"].tolist() == list(range(-1, 8))
    assert chosen["state"].tolist() == ["embedding", *(f"layer {layer}" for layer in range(8))]
    place = lens.position_roles.index("constraint 2")
    assert set(chosen["position"]) == {lens.positions[place]}
    assert set(chosen["token"]) == {lens.tokens[lens.positions[place]]}
    assert set(chosen["words"]) == {lens.answer}
    wanted = lens.probability(CAPITALISED, position="constraint 2", norm=False)
    assert chosen["probability"].tolist() == wanted.tolist()


def test_the_table_of_likeliest_tokens_has_a_line_for_every_one(lens):
    frame = lens.top_dataframe()
    assert frame["token_id"].tolist() == lens.top_ids.flatten().tolist()
    chosen = frame[frame["norm"] & (frame["position_role"] == "last") & (frame["layer"] == 3)]
    assert chosen["place"].tolist() == [1, 2, 3, 4]
    rows = zip(chosen["token_id"], chosen["text"], chosen["probability"], strict=True)
    assert tuple(rows) == lens.top(3)


def test_lines_are_drawn_for_every_followed_token_and_both_norms(lens, tmp_path):
    text = svg(lens.plot())
    for label in ("with the final norm", "without the final norm", "red (word red)", lens.question, "rank"):
        assert f"<!-- {label} -->" in text, label
    assert text.count("<!-- rank -->") == 2 and "read at last (':')" in text
    assert "constraint 1" in svg(lens.plot(position="constraint 1"))
    assert colours(lens.plot()) > 100
    with pytest.raises(ArtefactError, match="no format '.bmp'"):
        lens.plot(tmp_path / "lines.bmp")


def test_dollars_underscores_and_line_breaks_are_drawn():
    odd = by_hand([[5, 9], [1, 3]], ((LOWER, CAPITALISED), (FALSE_LOWER,)), positions=(1,))
    odd = replace(odd, followed=replace(odd.followed, texts=(" w0$", "_name")))
    text = svg(odd.plot())
    assert f"w0$ ({LOWER};" in text and "Who $costs$?" in text and f"_name ({FALSE_LOWER})" in text
    assert "w0$" in svg(odd.plot_tokens()) and "↵" in svg(odd.plot_tokens())


def test_the_table_of_tokens_frames_the_answer(lens):
    text = svg(lens.plot_tokens())
    for label in ("embedding", "layer 7", "constraint 2", "last", "probability"):
        assert f"<!-- {label} -->" in text, label
    framed = text.count("stroke: #d55e00")
    answers = {lens.followed.ids[lens.followed.index(role)] for role in (CAPITALISED,)}
    assert framed == sum(token in answers for token in lens.top_ids[0, :, :, 0].flatten().tolist()) > 0
    only = lens.plot_tokens(norm=False, positions=["last"])
    assert "constraint 2" not in svg(only) and "without the final norm" in svg(only)
    assert colours(lens.plot_tokens()) > 100
    with pytest.raises(TraceError, match="cannot draw 61 positions in one table; pass positions= with 1 to 60"):
        lens.plot_tokens(positions=[0] * 61)


def test_averages_are_means_over_prompts_by_role():
    one = by_hand([[100, 10], [1, 10]], ((LOWER,), (FALSE_LOWER,)))
    two = by_hand([[1, 1000], [1, 10]], ((LOWER, CAPITALISED), ("word red",)), question="What?")
    three = by_hand([[10, 4], [2, 8]], ((CAPITALISED,), (LOWER,)))
    mean = average([one, two, three])
    assert mean.roles == (LOWER, CAPITALISED, FALSE_LOWER, "word red") and mean.count == 3
    assert mean.layers == (-1, 0)
    assert mean.mean(LOWER, "share").tolist() == pytest.approx([1 / 3, 2 / 3])
    assert mean.mean(LOWER).tolist() == pytest.approx([0.9 * (0.01 + 1 + 0.25) / 3, 0.9 * (1 + 1 + 1 / 8) / 3])
    logs = torch.tensor([100.0, 1, 4]).log10()
    assert float(mean.mean(LOWER, "log_rank")[0]) == pytest.approx(float(logs.mean()), rel=1e-6)
    low, high = mean.interval(LOWER, "log_rank")
    middle, half = float(logs.mean()), 4.30265 * float(logs.std()) / 3**0.5  # Student's t, two degrees of freedom
    assert (float(low[0]), float(high[0])) == pytest.approx((middle - half, middle + half), rel=1e-5)
    assert mean.mean(CAPITALISED, "share").tolist() == [0.5, 0.5]  # of the two prompts that have it
    assert all(end.isnan().all() for end in mean.interval(FALSE_LOWER))  # one prompt has no spread


def test_the_average_of_one_is_itself_without_an_interval(lens):
    mean = average([lens])
    assert mean.position_role == "last"
    for norm in NORMS:
        assert torch.equal(mean.mean(CAPITALISED, norm=norm), lens.probability(CAPITALISED, norm=norm))
    with pytest.raises(ArtefactError, match="an interval needs at least two"):
        mean.interval(CAPITALISED)
    assert mean.to_dataframe()["low"].isna().all()
    assert colours(mean.plot()) > 50


def test_over_facts_the_capitalised_answer_emerges_and_the_foil_does_not(read_fact):
    # every answer here is a name; none of them is the foil's
    found = [read_fact(number, foil="horse") for number in range(0, 360, 40)]
    names = [each for each in found if each.answer[0].isupper()]
    mean = average(names)
    assert len(names) >= 5
    probability, foil = mean.mean(CAPITALISED), mean.mean(FALSE_LOWER)
    low, _ = mean.interval(CAPITALISED)
    assert probability[0] < 0.05 and float(low[-1]) > 0.3
    assert mean.mean(CAPITALISED, "share")[-1] >= 0.8 and mean.mean(CAPITALISED, "share")[0] <= 0.2
    assert foil.max() < 0.05 and not mean.mean(FALSE_LOWER, "share").any()
    text = svg(mean.plot())
    for label in (CAPITALISED, FALSE_LOWER, "share of prompts, likeliest"):
        assert f"<!-- {label} -->" in text, label
    assert "95% intervals" in text


def test_an_average_is_saved_loaded_and_tabulated(tmp_path):
    one = by_hand([[100, 10], [1, 10]], ((LOWER,), (FALSE_LOWER,)))
    two = by_hand([[7, 1000], [3, 10]], ((LOWER,), ("word red",)))
    mean = average([one, two])
    again = AverageLogitLens.load(mean.save(tmp_path / "mean.safetensors"))
    pd.testing.assert_frame_equal(again.to_dataframe(), mean.to_dataframe())
    assert_same(again, mean)
    assert_shown(mean)
    frame = mean.to_dataframe()
    assert len(frame) == 2 * 2 * 3 * len(QUANTITIES)
    line = frame[frame["norm"] & (frame["layer"] == 0) & (frame["role"] == LOWER) & (frame["quantity"] == "log_rank")]
    low, high = mean.interval(LOWER, "log_rank")
    wanted = [float(mean.mean(LOWER, "log_rank")[1]), float(low[1]), float(high[1]), 2]
    assert line[["mean", "low", "high", "n"]].iloc[0].tolist() == wanted
    assert set(frame[frame["role"] == "word red"]["n"]) == {1}
    broken = replace(mean, roles=("one",))
    with pytest.raises(ArtefactError, match="other shapes than its layers and roles"):
        AverageLogitLens.load(broken.save(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another"}, r"differ in their model \(some-model and another\)"),
        ({"revision": "abc"}, "differ in their revision"),
        ({"position_roles": ("question 1",)}, r"differ in their position_role \(last and question 1\)"),
    ],
)
def test_what_is_not_alike_is_not_averaged(changes, message):
    one = by_hand([[1], [1]], ((LOWER,),))
    with pytest.raises(ArtefactError, match=message):
        average([one, replace(one, **changes)])


def test_other_numbers_of_layers_no_prompts_and_unknown_names_are_refused():
    one, deeper = by_hand([[1], [1]], ((LOWER,),)), by_hand([[1], [1], [1]], ((LOWER,),))
    with pytest.raises(ArtefactError, match=r"differ in their layers \(\(-1, 0\) and \(-1, 0, 1\)\)"):
        average([one, deeper])
    with pytest.raises(ArtefactError, match="no results to average"):
        average([])
    with pytest.raises(TraceError, match=f"no role 'foil' in this average; it has {LOWER}"):
        average([one]).mean("foil")
    with pytest.raises(TraceError, match="no quantity 'rank' in this average; it has probability, share, log_rank"):
        average([one]).mean(LOWER, "rank")
