"""Spans: the words of a question, and their tokens under every kind of tokenizer."""

import pytest
import torch
from multrace.models.frontend import Frontend
from multrace.models.prompts import build
from multrace.models.spans import find_span
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
