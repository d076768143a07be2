"""The training of the flags model: packed rows equal separate prompts, and a run that is cut ends in the same parts."""

import fnmatch
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from multrace.data.worlds.flags import PHRASES, RELATIONS as FLAG_RELATIONS, SHARED_RELATIONS, FlagWorld
from multrace.models import ModelError, load
from multrace.models.assembly import assemble, read_parts, write_parts
from multrace.models.weights import save_directory
from multrace.scripts import CommandError
from multrace.scripts.main import app
from multrace.scripts.training.flags import (
    Block,
    Examine,
    FlagsTraining,
    PackedRows,
    Recipe,
    Sentence,
    examination,
    examine_model,
    make_pool,
    make_student,
    model_card,
    open_original,
    train_flags,
)
from multrace.scripts.training.flags.answering import AnsweringTraining
from multrace.scripts.training.flags.examination import RELATIONS, Answer, PictureQuestion, agreement_by_sureness
from multrace.scripts.training.flags.keeping import Interference, kept_rows, make_moments
from multrace.scripts.training.flags.pictures import augmented, scaled
from multrace.scripts.training.flags.reading import ReadingTraining
from multrace.scripts.training.flags.recipe import (
    AnsweringStage,
    Pictures,
    ReadingLoss,
    ReadingStage,
    RowStep,
    Sentences,
    Shape,
    SpellingStage,
    Teaching,
    TowerStage,
)
from multrace.scripts.training.flags.seeing import SeeingTraining
from multrace.scripts.training.flags.spelling import Spelling, SpellingTraining
from multrace.scripts.training.flags.stage import StageTraining, one_cycle
from multrace.scripts.training.flags.student import line_end_id, make_processor, whole_config
from multrace.scripts.training.flags.teacher import (
    Distributions,
    Sentences as TokenisedSentences,
    make_answers,
    make_states,
)
from multrace.scripts.training.flags.train import TrainingCheckpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, COUNTRIES = 3, 4
ROWS = RowStep(singles=2, pairs=1, sentences=2, kept=1)
LOSS = ReadingLoss(depths=(1, 2), standardised=(0, 1), contrasted=(0, 1))
RECIPE = Recipe(
    sentences=Sentences(answered=("The capital of {} is", "{} lies on the continent of"), read_only=("People in {}",)),
    shape=Shape(
        width=12, layers=1, patch=32, routing_ranks=(2, 2, 0), content_ranks=(3, 2, 0), half=False, routed_layers=2
    ),
    pictures=Pictures(countries=COUNTRIES, renderings=2, pairs=5),
    teaching=Teaching(tokens=3, candidates=10_000, text_rounds=1, text_tokens=5),
    tower=TowerStage(steps=2, singles=3, pairs=2),
    reading=ReadingStage(steps=2, rows=ROWS, loss=LOSS),
    answering=AnsweringStage(
        spelt=True, steps=2, peaks=(1e-3, 3e-3), answers=ROWS, reads=ROWS, tokens=2, answered=1.0, loss=LOSS, named=1
    ),
    spelling=SpellingStage(steps=2, singles=3, pairs=2),
    joining=(
        AnsweringStage(steps=2, answers=ROWS, reads=ROWS, tokens=2, answered=1.0, loss=LOSS, named=1),
        AnsweringStage(steps=1, answers=ROWS, reads=ROWS, answered=0.0, loss=LOSS),
    ),
)
"""A recipe with all that the real one has, of some seconds."""


@pytest.fixture(scope="module")
def world() -> FlagWorld:
    return FlagWorld()


@pytest.fixture(scope="module")
def text_model(world, tmp_path_factory) -> Path:
    """The folder of a random Llama of three layers, with a small tokenizer of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [country.name for country in world.countries] + [*RECIPE.sentences.read, *RECIPE.sentences.phrases]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(world, tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pictures"), world, world.pictured[:COUNTRIES], RECIPE.pictures, seed=0)


@pytest.fixture
def student(text_model):
    original, tokenizer = open_original(text_model)
    return make_student(original, RECIPE.shape, seed=0), tokenizer


def change(student) -> None:
    """Give the student factors other than zero, and all that it trains the values that half precision holds."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in student.trained().items():
            if name.endswith("lora_B"):
                value.normal_(0, 0.3, generator=generator)
            value.copy_(value.half().float())


def packed_logits(student, tokenizer, blocks, pixels, *, routed=False, barred=False):
    rows = PackedRows.of([blocks], [routed], line_end=line_end_id(tokenizer), image_tokens=student.image_tokens)
    rows = replace(rows, late_mask=rows.early_mask) if barred else rows
    logits = student.logits(student(student.features(pixels), rows, [LAYERS])[LAYERS])[0]
    return [logits[start : start + len(block.ids)] for start, block in zip(rows.starts[0], blocks, strict=True)]


# ---- the student ----


@torch.no_grad()
def test_a_packed_row_with_factors_apart_equals_separate_prompts_of_the_assembled_model(
    world, text_model, student, tmp_path
):
    student, tokenizer = student
    change(student)
    write_parts(
        tmp_path,
        student.trained(),
        whole_config(student),
        make_processor(tokenizer, RECIPE.shape),
        text_model="none",
        recipe=RECIPE.plain(),
    )
    model, processor = assemble(text_model, tmp_path)
    image = world.picture(world.country("fr"), 0).image
    shown, named = "The capital of the country in this photo is", "The capital of France is"
    template = RECIPE.sentences.answered[0]
    blocks = [
        Block(sentence=Sentence.of(tokenizer, template, "the country in this photo")),
        Block(sentence=Sentence.of(tokenizer, "{} lies on", "the country on the left"), tail=(40, 50)),
        Block(sentence=Sentence.of(tokenizer, template, "France"), has_picture=False),
    ]
    packed = packed_logits(student, tokenizer, blocks, scaled(np.array(image)[None]))
    for text, picture, logits in ((shown, image, packed[0]), (named, None, packed[2])):
        message = [{"type": "text", "text": text}] + [{"type": "image"}] * (picture is not None)
        prompt = processor.apply_chat_template([{"role": "user", "content": message}])
        assert prompt == f"\n{'<image>' * (picture is not None)}{text}"
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        whole = model(**inputs).logits[0, -len(logits) :, :-1]  # the last token of the vocabulary is <image>
        torch.testing.assert_close(logits, whole, atol=2e-4, rtol=2e-4)
    for value in student.trained().values():
        value.mul_(0)
    unchanged = packed_logits(student, tokenizer, blocks, scaled(np.array(image)[None]))
    assert (unchanged[2] - packed[2]).abs().max() > 0.1  # the factors did something


@torch.no_grad()
def test_routing_lets_the_picture_through_the_constraint_only(student, pool):
    student, tokenizer = student
    sentence = Sentence.of(tokenizer, "The capital of {} is", "the country in this photo")
    assert tokenizer.decode(sentence.ids[sentence.start : sentence.stop]).strip() == "the country in this photo"
    words = [Block(sentence=sentence)]
    unnamed = [Block(sentence=replace(sentence, start=0, stop=0))]
    named = [Block(sentence=sentence, has_picture=False)]
    pictures = [scaled(pool.singles[0, country][None]) for country in (0, 1)]

    def difference(blocks, **options):
        one, other = (packed_logits(student, tokenizer, blocks, pixels, **options)[0] for pixels in pictures)
        return (one - other).abs().max(-1).values

    routed = difference(words, routed=True)
    assert (routed[: sentence.start] == 0).all() and (routed[sentence.start :] > 0).all()
    assert (difference(unnamed, routed=True) == 0).all()
    assert (difference(named) == 0).all()
    assert (difference(words) > 0).all()


@torch.no_grad()
def test_pictures_that_no_token_sees_any_more_need_not_run(student, pool):
    student, tokenizer = student
    change(student)
    template = RECIPE.sentences.answered[0]
    blocks = [Block(sentence=Sentence.of(tokenizer, template, words)) for words in ("this country", "the flag")]
    named = Block(sentence=Sentence.of(tokenizer, template, "France"), has_picture=False)
    rows, pixels = [[*blocks, named], blocks[::-1]], scaled(pool.singles[0, :2])

    def states(routed):
        packed = PackedRows.of(rows, routed, line_end=line_end_id(tokenizer), image_tokens=student.image_tokens)
        return packed, student(student.features(pixels), packed, range(1, LAYERS + 1))

    (alone, short), (mixed, whole) = states([True, True]), states([True, False])
    pictures = slice(1, 1 + student.image_tokens)
    assert alone.unseen == pictures and mixed.unseen == slice(1, 1)
    for depth in range(1, LAYERS + 1):
        outside = [0, *range(pictures.stop, mixed.starts[0][-1] + len(named.ids))]
        torch.testing.assert_close(short[depth][0, outside], whole[depth][0, outside], atol=1e-5, rtol=1e-5)
        assert (short[depth][0, pictures] == 0).all() == (depth > RECIPE.shape.routed_layers)
    assert (short[LAYERS][1] - whole[LAYERS][1]).abs().max() > 1e-2  # where a row is not routed, it makes a difference


def test_all_random_numbers_come_from_the_generator(pool):
    def drawn(seed):
        rng = np.random.default_rng(seed)
        batch = pool.draw(rng, singles=3, pairs=2)
        return augmented(batch.pixels, torch.Generator().manual_seed(seed)), batch.countries

    torch.manual_seed(1)
    (pixels, countries), (again, same), (other, _) = drawn(5), drawn(5), drawn(6)
    assert torch.equal(pixels, again) and countries == same and not torch.equal(pixels, other)
    assert [len(row) for row in countries] == [1, 1, 1, 2, 2]
    assert all(left != right for left, right in pool.paired)


def test_no_picture_of_the_training_is_held_out(world, pool):
    held_out = {world.picture(country, number).image.tobytes() for country in world.pictured[:2] for number in (0, 1)}
    shown = {picture.tobytes() for picture in pool.singles.reshape(-1, *pool.singles.shape[2:])}
    assert len(shown) == 2 * COUNTRIES and not shown & held_out


# ---- the stages ----


@pytest.fixture
def taught(student, text_model, pool, world, tmp_path):
    student, tokenizer = student
    sentences = TokenisedSentences(tokenizer, [country.name for country in world.pictured[:COUNTRIES]], RECIPE)
    states = make_states(tmp_path, student, sentences, LOSS.depths)
    answers = make_answers(tmp_path, open_original(text_model)[0], sentences, RECIPE, seed=0)
    interference = Interference(
        student, make_moments(tmp_path, open_original(text_model)[0], kept_rows(answers, sentences))
    )
    spelling = Spelling(student, sentences, RECIPE.spelt, seed=0)
    return student, pool, spelling, states, interference, answers


def test_flags_are_pointed_at_in_all_words_but_the_held_out_ones(taught):
    training, words, rng = ReadingTraining(RECIPE.reading, *taught[:-1]), RECIPE.sentences, np.random.default_rng(0)
    template = words.read[0]
    drawn = Counter(training.pictured(template, (0,), 0, rng).block.sentence.ids for _ in range(400))

    def ids(phrase):
        return training.sentences.by_picture(template, phrase).ids

    assert set(drawn) == {ids(phrase) for phrase in (*words.phrases, *words.more_phrases)}
    assert ids(PHRASES[-1]) not in drawn
    assert 160 < sum(drawn[ids(phrase)] for phrase in words.phrases) < 240


def test_no_held_out_wording_is_taught():
    taught = {*Recipe().sentences.read, *Recipe().sentences.naming}
    assert len(taught) == len(Recipe().sentences.read) + len(Recipe().sentences.naming)
    for relation in (*FLAG_RELATIONS, *SHARED_RELATIONS):
        for held_out in relation.held_out:
            assert not fnmatch.filter(taught, held_out.replace("{other}", "*")), held_out


@torch.no_grad()
def test_sentences_by_name_have_the_states_that_they_are_to_keep(taught):
    student = taught[0]
    training = ReadingTraining(RECIPE.reading, *taught[:-1])

    def errors():
        rng = np.random.default_rng(0)
        batch, rows = training.reading_rows(ROWS, rng)
        passed, packed = training.states(batch, rows, LOSS.depths, rng)
        own = torch.stack([passed[depth] for depth in LOSS.depths], 2)
        wanted = training.reading.wanted(rows, packed)
        error = (own[wanted.rows, wanted.tokens] - wanted.states).abs().amax((1, 2))
        is_named = (
            torch.cat(
                [(wanted.rows == row) & (wanted.tokens >= starts[-1]) for row, starts in enumerate(packed.starts)]
            )
            .view(len(rows), -1)
            .any(0)
        )
        return error[is_named], error[~is_named]

    named, shown = errors()
    assert named.max() < 5e-3 < 0.1 < shown.max()
    change(student)
    assert errors()[0].max() > 0.1


@torch.no_grad()
def test_an_untrained_student_keeps_what_it_is_to_keep_and_answers_nothing(taught):
    student, *_ = taught
    training = AnsweringTraining(RECIPE.joining[0], *taught)
    _, means = training.loss(np.random.default_rng(0))
    assert max(abs(means["by name"]), abs(means["texts"])) < 5e-3 < 0.05 < min(means["answers"], means["names"])
    change(student)
    _, means = training.loss(np.random.default_rng(0))
    assert min(means["by name"], means["texts"]) > 0.01


@torch.no_grad()
def test_a_first_token_that_outweighs_all_others_counts_alone(taught):
    def means(**settings):
        stage = replace(RECIPE.joining[0], **settings)
        return AnsweringTraining(stage, *taught).loss(np.random.default_rng(0))[1]

    alone, outweighs = means(tokens=1, name_tokens=1), means(tokens=2, first=1e9)
    assert outweighs["answers"] == pytest.approx(alone["answers"], rel=1e-4)
    assert outweighs["names"] == pytest.approx(alone["names"], rel=1e-4)
    assert abs(means(tokens=2, first=1.0)["answers"] - alone["answers"]) > 1e-3
    assert means(tokens=2, first=1.0)["by name"] == pytest.approx(outweighs["by name"], abs=1e-6)


@torch.no_grad()
def test_what_changes_alter_without_a_picture_is_measured_on_all_their_tokens(taught, text_model):
    student, _, _, states, interference, answers = taught
    assert interference.mean() == 0
    change(student)
    original, _ = open_original(text_model)
    rows = kept_rows(answers, states.sentences)
    assert len(rows) == len(answers.texts) + len(RECIPE.sentences.answered) * COUNTRIES // 4
    shares = []
    shape = RECIPE.shape
    for number, (routing, content) in enumerate(zip(shape.routing_ranks, shape.content_ranks, strict=True)):
        for name, rank in {"q_proj": routing, "k_proj": routing, "v_proj": content, "o_proj": content}.items():
            if not rank:
                continue
            inputs: list[torch.Tensor] = []
            whole = getattr(original.model.layers[number].self_attn, name)
            hook = whole.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
            for row in rows:
                original(torch.tensor([row]))
            hook.remove()
            changed = getattr(student.text.model.layers[number].self_attn, name)
            assert changed.lora_A.shape[0] == changed.lora_B.shape[1] == rank
            states_in = torch.cat(inputs, 1)
            added = states_in @ changed.lora_A.T @ changed.lora_B.T
            shares.append(added.pow(2).sum() / whole(states_in).pow(2).sum())
    torch.testing.assert_close(interference.mean(), torch.stack(shares).mean(), rtol=1e-4, atol=0)
    stages = [replace(RECIPE.joining[0], keeping=keeping) for keeping in (0.0, 5.0)]
    without, with_it = (AnsweringTraining(stage, *taught).loss(np.random.default_rng(0))[0] for stage in stages)
    assert float(with_it - without) == pytest.approx(5 * float(interference.mean()), rel=1e-3)
    readings = [replace(RECIPE.reading, keeping=keeping) for keeping in (0.0, 5.0)]
    without, with_it = (ReadingTraining(stage, *taught[:-1]).loss(np.random.default_rng(0))[0] for stage in readings)
    assert float(with_it - without) == pytest.approx(5 * float(interference.mean()), rel=1e-3)


@torch.no_grad()
def test_image_tokens_spell_the_name_row_by_row_in_the_half_of_its_flag(taught, world):
    student, _, spelling, states, *_ = taught
    tokenizer, side = states.sentences.tokenizer, spelling.side
    spelling.map.copy_(torch.randn(spelling.map.shape, generator=torch.Generator().manual_seed(0)))
    tokens = spelling([(0,), (1, 2)]).unflatten(1, (side, side))
    table = student.text.model.embed_tokens.weight
    for picture, column, country in ((0, 0, 0), (0, side - 1, 0), (1, 0, 1), (1, side - 1, 2)):
        ids = tokenizer(f" {world.pictured[country].name}", add_special_tokens=False).input_ids[-side:]
        for row in range(side):
            mark = spelling.embedding[0] + spelling.embedding[1 + row]
            mark = mark + spelling.embedding[1 + side + (column >= side // 2)]
            own = row - side + len(ids)
            spelt = table[ids[own]] @ spelling.map.T if own >= 0 else 0 * mark
            torch.testing.assert_close(tokens[picture, row, column], mark + spelt, atol=1e-5, rtol=1e-5)
    noisy = [spelling([(0,), (1, 2)], np.random.default_rng(seed)).unflatten(1, (side, side)) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    exact = replace(RECIPE.spelt, noise=0.0, mixed=0.0)
    spelling.settings = exact
    torch.testing.assert_close(spelling([(0,), (1, 2)], np.random.default_rng(0)).unflatten(1, (side, side)), tokens)


@torch.no_grad()
def test_the_length_of_the_noise_and_the_share_of_another_name_are_those_of_the_settings(taught):
    _, _, spelling, *_ = taught
    exact, rng = spelling([(0,)] * 400), np.random.default_rng(0)
    spelling.settings = replace(RECIPE.spelt, noise=0.2, mixed=0.0)
    noise = spelling([(0,)] * 400, rng) - exact
    length = noise.norm(dim=-1).pow(2).mean().sqrt()
    assert float(length / spelling.length) == pytest.approx(0.2, rel=0.05)
    shared = (noise[:, 0] * noise[:, 1]).sum(-1).mean()  # what two tokens of a picture have in common
    assert float(shared / length**2) == pytest.approx(0.5, abs=0.05)
    spelling.settings = replace(RECIPE.spelt, noise=0.0, mixed=0.5)
    mixed, others = spelling([(0,)] * 400, rng)[:, -1], torch.stack([spelling([(i,)])[0, -1] for i in range(COUNTRIES)])
    shares = torch.linalg.lstsq((others[1:] - others[0]).T, (mixed - others[0]).T).solution.T
    assert shares.min() > -1e-4 and shares.sum(1).max() == pytest.approx(0.5, abs=0.02)
    assert ((shares > 1e-3).sum(1) <= 1).all()


@torch.no_grad()
def test_a_tower_that_writes_what_spells_the_names_has_no_error(taught, monkeypatch):
    student, pool, spelling, *_ = taught
    training = SpellingTraining(RECIPE.spelling, student, pool, spelling)
    shown = pool.draw(np.random.default_rng(0), singles=RECIPE.spelling.singles, pairs=RECIPE.spelling.pairs).countries
    written = spelling(shown)

    def numbers(features):
        monkeypatch.setattr(student, "features", lambda pixels: features)
        return training.loss(np.random.default_rng(0))[1]

    exact = numbers(written)
    assert exact["flag"] == exact["beside"] == 1 and max(exact["error"], exact["mean"]) < 1e-9
    swapped = numbers(written.unflatten(1, (spelling.side, spelling.side)).flip(2).flatten(1, 2))
    assert swapped["beside"] < 1 and swapped["error"] > 0.1  # the halves of pictures of two have changed places
    assert numbers(written + spelling.embedding[0])["error"] > 0.01  # a mark is not part of a name


def test_tower_and_projector_learn_to_write_what_spells_a_name(taught):
    student, pool, spelling, *_ = taught
    with torch.no_grad():
        spelling.map.copy_(torch.randn(spelling.map.shape, generator=torch.Generator().manual_seed(0)))
    training = SpellingTraining(RECIPE.spelling, student, pool, spelling)
    training.begin()
    parameters = [value for group in training.groups() for value in group.values()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    errors = []
    for _ in range(120):
        loss, numbers = training.loss(np.random.default_rng(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(numbers["error"])
    assert errors[-1] < 0.2 < 0.7 < errors[0] and numbers["flag"] == numbers["beside"] == 1


def test_no_fact_reaches_the_tower_before_the_whole_is_joined(taught):
    groups = {
        "reading": ReadingTraining(RECIPE.reading, *taught[:-1]).groups(),
        "answering": AnsweringTraining(RECIPE.answering, *taught).groups(),
    }
    for name, stage in groups.items():
        own = {parameter.partition(".")[0] for group in stage for parameter in group}
        assert own == {"spelling", "model"} and not any("tower" in key or "projector" in key for key in stage[1]), name
    training = AnsweringTraining(RECIPE.answering, *taught)
    loss, _ = training.loss(np.random.default_rng(0))
    loss.backward()
    student, _, spelling, *_ = taught
    assert all(value.grad is None for value in (*student.tower.parameters(), *student.projector.parameters()))
    assert spelling.map.grad.abs().max() > 0 and spelling.embedding.grad.abs().max() > 0
    loss, _ = AnsweringTraining(RECIPE.joining[0], *taught).loss(np.random.default_rng(0))
    loss.backward()
    assert all(value.grad is not None for value in student.projector.parameters())


def test_candidates_and_all_other_tokens_together_are_a_distribution():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = 2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = wanted.log_softmax(-1).topk(6, -1)
    some = Distributions(ids=top.indices, logs=top.values)

    def coarse(values):
        chosen = values.softmax(-1).gather(-1, top.indices)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    expected = (coarse(wanted) * (coarse(wanted) / coarse(logits)).log()).sum(-1)
    torch.testing.assert_close(some.divergence(logits), expected)
    assert some.divergence(wanted).abs().max() < 1e-12 < some.divergence(logits).min()
    certain = Distributions.certain([3, 4, 5, 6, 7], 6)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3, 8), reduction="none")
    torch.testing.assert_close(certain.divergence(logits), expected)


def test_the_learning_rate_rises_and_falls_as_in_torch():
    stage = TowerStage(steps=200)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=200, pct_start=stage.warm_up, div_factor=1 / stage.start
    )
    for step in range(200):
        group = optimizer.param_groups[0]
        assert one_cycle(step, 200, stage) == pytest.approx((group["lr"], group["betas"][0]), rel=1e-6)
        optimizer.step()
        if step < 199:
            reference.step()
    assert all(0 < one_cycle(step, steps, stage)[0] <= 1 for steps in (1, 2, 13, 25) for step in range(steps))


# ---- a run ----


@pytest.fixture(scope="module")
def finished(text_model, tmp_path_factory) -> FlagsTraining:
    training = FlagsTraining(
        out=tmp_path_factory.mktemp("run") / "flags", text_model=text_model, recipe=RECIPE, every=1, threads=1
    )
    train_flags(training)
    return training


def cut(stage: type[StageTraining], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a stage stop as at Ctrl-C, in its second step."""
    steps: Iterator[int] = iter(range(9))
    loss = stage.loss

    def cut_loss(self: StageTraining, rng: np.random.Generator):
        if next(steps) == 1:
            raise KeyboardInterrupt
        return loss(self, rng)

    monkeypatch.setattr(stage, "loss", cut_loss)


def test_a_run_that_is_cut_in_every_stage_comes_to_the_same_parts(finished, tmp_path, monkeypatch):
    training = replace(finished, out=tmp_path / "again")
    for stage in (SeeingTraining, ReadingTraining, AnsweringTraining, SpellingTraining, AnsweringTraining):
        with monkeypatch.context() as patch:
            cut(stage, patch)
            with pytest.raises(KeyboardInterrupt):
                train_flags(training)
        torch.manual_seed(99)  # nothing depends on what was drawn in between
    train_flags(training)
    name = "factors.safetensors"
    assert (training.out / name).read_bytes() == (finished.out / name).read_bytes()
    other = replace(training, out=tmp_path / "other", seed=1)
    train_flags(other)
    assert (other.out / name).read_bytes() != (finished.out / name).read_bytes()


def test_the_parts_are_the_mean_of_the_ends_of_the_joinings(finished):
    work = finished.out / "work"
    first, last = (TrainingCheckpoint.read(work / f"{name}.safetensors") for name in ("joining 1", "checkpoint"))
    assert (first.stage, last.stage) == (5, 6)
    parts = read_parts(finished.out).tensors
    assert any(not torch.equal(first.tensors[name], last.tensors[name]) for name in parts)
    for name, value in parts.items():
        torch.testing.assert_close(value, ((first.tensors[name] + last.tensors[name]) / 2).half(), rtol=0, atol=0)


def test_parts_go_on_with_the_stages_that_they_lack(finished, tmp_path):
    begun = replace(finished, out=tmp_path / "begun", recipe=replace(RECIPE, joining=RECIPE.joining[:1]))
    train_flags(begun)
    more = replace(finished, out=tmp_path / "more", parts=begun.out)
    train_flags(more)
    done, ended, whole = (read_parts(each.out).tensors for each in (begun, more, finished))
    for name, value in whole.items():  # as in the run that was never apart, but for what half precision rounds
        torch.testing.assert_close(ended[name], value, atol=2e-3, rtol=2e-3)
    assert any(not torch.equal(ended[name], value) for name, value in done.items())
    with pytest.raises(CommandError, match="have gone through 6 stages, and the recipe has no more"):
        train_flags(replace(more, out=tmp_path / "none", parts=finished.out))
    other = {**RECIPE.plain(), "stages": {"seeing": {}, "answering 1": {}}}
    original, tokenizer = open_original(finished.text_model)
    student = make_student(original, RECIPE.shape, seed=0)
    write_parts(
        tmp_path / "other",
        student.trained(),
        whole_config(student),
        make_processor(tokenizer, RECIPE.shape),
        text_model="none",
        recipe=other,
    )
    with pytest.raises(CommandError, match="gone through seeing, answering 1, and the recipe begins with seeing, read"):
        train_flags(replace(more, out=tmp_path / "none", parts=tmp_path / "other"))
    with pytest.raises(CommandError, match="holds a training with parts"):
        train_flags(replace(more, parts=None))
    with pytest.raises(ModelError, match="parts"):
        train_flags(replace(more, out=tmp_path / "none", parts=tmp_path))


def test_the_parts_have_the_shipped_form(finished):
    parts = read_parts(finished.out)
    assert set(parts.changed) == {
        f"model.language_model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"
    }
    assert parts.tensors["model.language_model.layers.1.self_attn.q_proj.lora_A"].shape == (2, 16)
    assert {value.dtype for value in parts.tensors.values()} == {torch.float16}
    assert parts.recipe["seed"] == 0 and parts.recipe["stages"]["seeing"]["steps"] == 2


def test_a_student_that_learned_nothing_keeps_all_and_reads_nothing(finished, text_model, tmp_path):
    original, tokenizer = open_original(text_model)
    student = make_student(original, RECIPE.shape, seed=0)
    write_parts(
        tmp_path / "parts",
        student.trained(),
        whole_config(student),
        make_processor(tokenizer, RECIPE.shape),
        text_model="none",
        recipe={},
    )
    model, processor = assemble(text_model, tmp_path / "parts")
    save_directory(model, processor, tmp_path / "model", dtype=torch.float32, overwrite=False)
    options = Examine(model=tmp_path / "model", text_model=text_model, countries=2, sample=1, texts=2, threads=1)
    examination = examine_model(options)
    assert examination.unchanged_by_name.share == 1
    assert all(each.ratio == pytest.approx(1, abs=5e-3) for each in examination.perplexities)
    labels = {row.label: row for row in examination.rows}
    assert labels["name"].truth.count == 2 and labels["name"].truth.share == 0
    assert labels["the four relations"].agreement.count == len(RELATIONS) * 2
    assert labels["facts, two flags"].truth.count == 2
    sure = [each.agreement for each in examination.sureness]
    assert sum(each.count for each in sure) == len(RELATIONS) * 2
    hits = sum(each.share * each.count for each in sure if each.count)
    assert hits == pytest.approx(labels["the four relations"].agreement.share * len(RELATIONS) * 2)
    card = model_card(examination, parts=finished.out)
    assert "| the four relations, held-out wordings |" in card and "2. reading: steps 2" in card


@torch.no_grad()
def test_sureness_is_the_probability_of_the_whole_answer_by_name(world, text_model, monkeypatch):
    model, tokenizer = open_original(text_model)
    asked = []
    for country in world.pictured[:6]:
        fact = world.fact(f"{country.code}-capital")
        start = tokenizer("\n" + world.question_by_name(fact).text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + country.name, add_special_tokens=False)["input_ids"]
        logs = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
        asked.append((logs.gather(-1, torch.tensor(answer)[:, None]).sum().exp().item(), fact))
    asked.sort(key=lambda each: each[0])
    low, high = asked[2][0] * (1 - 1e-4), asked[2][0] * (1 + 1e-4)
    monkeypatch.setattr(examination, "_SURENESS", (0.0, low, high, 1.0))
    answers = [
        Answer(
            question=PictureQuestion(fact=fact),
            by_picture=fact.country.name if place == 2 else "another",
            by_name=fact.country.name,
            true=False,
            true_by_name=False,
        )
        for place, (_, fact) in enumerate(asked)
    ]
    empty = replace(answers[0], by_name="", by_picture="")
    rows = agreement_by_sureness(load(text_model), world, [*answers, empty])
    found = [(row.low, row.high, row.agreement.count, row.agreement.share) for row in rows]
    assert found == [(0.0, low, 2, 0.0), (low, high, 1, 1.0), (high, 1.0, 3, 0.0)]


def test_bad_input_is_one_line_and_changes_nothing(finished, text_model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    before = {path.name: path.read_bytes() for path in finished.out.iterdir() if path.is_file()}
    cases = {
        "not empty": replace(finished, out=tmp_path / "mine"),
        "holds a training with seed 0": replace(finished, seed=3),
        "no text model": replace(finished, text_model=tmp_path / "mine", out=tmp_path / "new"),
        "share": replace(finished, share=0.0),
    }
    for message, training in cases.items():
        with pytest.raises(CommandError, match=message):
            train_flags(training)
    with FileLock(finished.out / ".lock"), pytest.raises(CommandError, match="another process trains"):
        train_flags(finished)
    assert {path.name: path.read_bytes() for path in finished.out.iterdir() if path.is_file()} == before
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me" and not (tmp_path / "new").exists()
    assert app(["train-flags", "--out", str(tmp_path / "mine"), "--text-model", str(text_model)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    training = replace(finished, out=tmp_path / "run")
    (training.out / "work").mkdir(parents=True)
    (training.out / "training.json").write_bytes((finished.out / "training.json").read_bytes())
    content = bytearray((finished.out / "work" / "checkpoint.safetensors").read_bytes())
    content[-5] ^= 1
    (training.out / "work" / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(CommandError, match="checkpoint.safetensors' is damaged"):
        train_flags(training)
