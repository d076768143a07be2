"""Spans: the words of a question, and their tokens under every kind of tokenizer."""

import unicodedata

import multrace
import numpy as np
import pytest
import torch
from multrace import ModelError
from multrace.data import DataError
from multrace.data.spans import find_span, find_spans
from multrace.models.frontend import Frontend
from multrace.models.prompts import build
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

QUESTION = "Who founded the company in this photo?"
CORPUS = [
    QUESTION,
    "The founder of THE COMPANY shown here is Ada Example, the capital of Oslo",
    "Gr\u00fc\u00dfe aus M\u00fcnchen",
]


SPANS = {
    "as written": ("the company", (12, 23)),
    "another case": ("The COMPANY", (12, 23)),
    "outer blanks": ("  the company ", (12, 23)),
    "inner blanks": ("the  company\n in", (12, 26)),
    "a whole word before a part of one": ("photo", (32, 37)),
    "a part of a word, if there is nothing else": ("compan", (16, 22)),
}


@pytest.mark.parametrize("case", SPANS)
def test_spans_are_found(case):
    span, expected = SPANS[case]
    assert find_span(QUESTION, span) == expected


def test_whole_words_in_any_case_come_before_parts_of_words():
    assert find_span("A cartoon of the Car", "car") == (17, 20)
    assert find_span("the Cat and the cat", "cat") == (16, 19)
    assert find_span("\u8fd9\u5f20\u7167\u7247\u91cc\u7684\u516c\u53f8", "\u516c\u53f8") == (
        6,
        8,
    )  # no blanks between words
    assert find_span("What does a+b (c) mean?", "A+B (C)") == (10, 17)


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Who founded Caf\u00e9 Zo\u00eb there?") for form in ("NFC", "NFD"))

LOOKALIKES = {  # question, span, the part of the question that the span names
    "composed in decomposed": (DECOMPOSED, "Caf\u00e9 Zo\u00eb", "Cafe\u0301 Zoe\u0308"),
    "decomposed in composed": (COMPOSED, "Cafe\u0301 Zoe\u0308", "Caf\u00e9 Zo\u00eb"),
    "in any case": (DECOMPOSED, "CAF\u00c9 ZO\u00cb", "Cafe\u0301 Zoe\u0308"),
    "two marks in another order": ("a q\u0323\u0307 b", "q\u0307\u0323", "q\u0323\u0307"),
    "syllables and their letters": (
        "\u1112\u1161\u11ab\u1100\u116e\u11a8 here",
        "\ud55c\uad6d",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    ),
    "a blank that does not break": ("Is the\u00a0company old?", "the company", "the\u00a0company"),
    "narrow and wide blanks": ("Is the\u2009\u3000company old?", "the company", "the\u2009\u3000company"),
    "curly quotes": ("Is \u201cBig\u201d Ann\u2019s?", '"Big" Ann\'s', "\u201cBig\u201d Ann\u2019s"),
    "straight quotes": ('Is "Big" Ann\'s?', "\u201cBig\u201d Ann\u2019s", '"Big" Ann\'s'),
    "dashes": ("Who ran Coca\u2011Cola then?", "Coca-Cola", "Coca\u2011Cola"),
    "a sign between words": ("Who ran Draivo\u200b Ltd then?", "Draivo Ltd", "Draivo\u200b Ltd"),
    "a soft hyphen": ("Who ran the co\u00adoperative?", "cooperative", "co\u00adoperative"),
    "a ligature": ("Who ran the \ufb01rm?", "firm", "\ufb01rm"),
    "full width": ("Who ran \uff21\uff22\uff23 then?", "ABC", "\uff21\uff22\uff23"),
    "sharp s": ("Where is Bahnhofstra\u00dfe here?", "BAHNHOFSTRASSE", "Bahnhofstra\u00dfe"),
    "capitals for a sharp s": ("Where is BAHNHOFSTRASSE here?", "bahnhofstra\u00dfe", "BAHNHOFSTRASSE"),
    "a dotted capital": ("Where is \u0130stanbul here?", "istanbul", "\u0130stanbul"),
    "for a dotted capital": ("Where is istanbul here?", "\u0130STANBUL", "istanbul"),
    "a dotless letter": ("Where is I\u015fiklar here?", "\u0131\u015fiklar", "I\u015fiklar"),
    "a final sigma": (
        "Where is \u039f\u0394\u039f\u03a3 here?",
        "\u03bf\u03b4\u03bf\u03c2",
        "\u039f\u0394\u039f\u03a3",
    ),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_words_are_found_however_their_characters_are_written(case):
    question, span, said = LOOKALIKES[case]
    start, end = find_span(question, span)
    assert question[start:end] == said
    assert question.count(said) == 1


def test_letters_are_no_part_of_themselves_with_an_accent():
    for question in (COMPOSED, DECOMPOSED):
        with pytest.raises(DataError, match="'Cafe' is not in the question"):
            find_span(question, "Cafe")
    assert find_span("e\u0301clair clair", "clair") == (8, 13)  # not inside the first word, whose accent is no border
    assert find_span("Caf\u00e9 or Cafe\u0301?", "Caf\u00e9") == (0, 4)  # the same characters come first
    with pytest.raises(DataError, match="is not in"):
        find_span("Stra\u00dfe", "stras")


def test_an_absent_span_names_the_letter_that_only_looks_alike():
    with pytest.raises(
        DataError, match="with '\u0430' \\(CYRILLIC SMALL LETTER A\\) where the constraint has 'a' \\(LATIN SMALL"
    ):
        find_span("Who founded C\u0430fe Zoe?", "Cafe Zoe")
    with pytest.raises(
        DataError, match="with '\u00e9' \\(LATIN SMALL LETTER E WITH ACUTE\\) where the constraint has 'e' "
    ):
        find_span(DECOMPOSED, "Cafe Zoe")
    with pytest.raises(DataError, match=r"nearest words are '\w+\??'$"):
        find_span(QUESTION, "Oslo")


TWICE = "Is Draivo Ltd old, and who founded draivo ltd or Draivo Ltd?"


def test_words_that_are_said_again_need_a_choice():
    with pytest.raises(DataError) as error:
        find_span(TWICE, "Draivo Ltd")
    assert "says 'Draivo Ltd' 2 times (characters 3 to 13, 49 to 59); pass more of the words" in str(error.value)
    assert "constraint=('Draivo Ltd', number) with a number from 0 to 1, or ('Draivo Ltd', \"all\")" in str(error.value)
    first, last = (3, 13), (49, 59)
    for number, place in {0: first, 1: last, -1: last, -2: first}.items():
        assert find_spans(TWICE, ("Draivo Ltd", number)) == (place,)
    assert find_spans(TWICE, ("Draivo Ltd", "all")) == find_spans(TWICE, ["Draivo Ltd", "all"]) == (first, last)
    assert find_span(TWICE, ("Draivo Ltd", np.int64(1))) == last
    assert find_span(TWICE, "draivo ltd") == (35, 45)  # only one place has the same case
    assert find_span(TWICE, "founded draivo") == (27, 41)
    assert find_span("Who?", ("Who", 0)) == find_span("Who?", ("Who", "all")) == (0, 3)
    for number in (2, -3):
        with pytest.raises(DataError, match=f"2 times, so there is no occurrence {number}; pass a number from 0 to 1"):
            find_span(TWICE, ("Draivo Ltd", number))
    with pytest.raises(DataError, match="number of the occurrence is 'both', of type str"):
        find_span(TWICE, ("Draivo Ltd", "both"))


def test_a_prompt_marks_the_occurrence_that_was_chosen(random_llama, tiny_vlm):
    def marked(vlm, constraint):
        prompt = vlm.prompt(None, TWICE, constraint=constraint)
        return prompt.positions("constraint"), prompt.positions("constraint_last")

    for vlm in (random_llama, tiny_vlm):
        with pytest.raises(ModelError, match="says 'Draivo Ltd' 2 times"):
            vlm.prompt(None, TWICE, constraint={"company": "Draivo Ltd", "verb": "founded"})
        (first, first_end), (last, last_end) = (marked(vlm, ("Draivo Ltd", number)) for number in (0, 1))
        assert max(first) < min(last) and (first_end, last_end) == (first[-1:], last[-1:])
        assert marked(vlm, ("Draivo Ltd", "all")) == (first + last, last_end)
        assert marked(vlm, {"company": ("Draivo Ltd", 1)}) == (last, last_end)
        # Noise on both reaches all of them; on the first alone it leaves the second as it was.
        embeddings = {}
        for choice in (0, "all"):
            prompt = vlm.prompt(None, TWICE, constraint=("Draivo Ltd", choice))
            embeddings[choice] = multrace.TextNoise(samples=1).corrupt(vlm, prompt).embeddings[0]
        clean = vlm.embed(prompt).embeddings[0]
        changed = {choice: (value != clean).any(-1).nonzero().flatten() for choice, value in embeddings.items()}
        assert tuple(changed[0].tolist()) == first and tuple(changed["all"].tolist()) == first + last


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_another_form_give_the_tokens_of_the_words(form, random_llama):
    question = unicodedata.normalize(form, COMPOSED)
    groups = {
        random_llama.prompt(None, question, constraint=unicodedata.normalize(other, "Caf\u00e9 Zo\u00eb")).positions(
            "constraint"
        )
        for other in ("NFC", "NFD")
    }
    (positions,) = groups
    ids = random_llama.prompt(None, question).inputs["input_ids"][0, list(positions)]
    assert random_llama.decode(ids).strip() == unicodedata.normalize(form, "Caf\u00e9 Zo\u00eb")


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=options.get("add_prefix_space", False))
    return tokenizer, trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace():  # the way of Llama 2's tokenizer: blanks become letters of the next word, and one is put in front
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\u2581", "merged_with_next"), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"])


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"])


TOKENIZERS = {
    "byte level": byte_level,
    "byte level, blank in front, trimmed offsets": lambda: byte_level(add_prefix_space=True),
    "blanks as letters": metaspace,
    "unigram": unigram,
    "lower-casing word pieces": word_piece,
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("span", ["the company in this photo", "THE COMPANY", "photo", "Who", "founded"])
def test_spans_become_tokens_under_every_tokenizer(case, span):
    built, trainer = TOKENIZERS[case]()
    built.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    frontend = Frontend(
        processor=tokenizer,
        tokenizer=tokenizer,
        image_token_id=None,
        patch_size=None,
        dropped_inputs=(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    prompt = build(frontend, None, QUESTION, constraint=span)
    positions = prompt.positions("constraint")
    assert positions == tuple(range(positions[0], positions[-1] + 1))
    text = tokenizer.decode(prompt.inputs["input_ids"][0, list(positions)]).strip()
    assert text.lower() == span.lower()
    apart = prompt.with_answer("Ada Example")
    assert tokenizer.decode(list(apart.answer_ids)).strip().lower() == "ada example"
