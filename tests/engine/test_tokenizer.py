"""Oracle: byte-level BPE written out from GPT-2's paper. Law: decode undoes encode, up to bytes without a token."""

import json
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from engine.tokenizer import Tokenizer, _byte_letters

# GPT-2's pattern (openai/gpt-2, encoder.py), after numerals have been set apart one by one.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
NUMERAL = regex.compile(r"(\p{N})")
# The wheel's vocabulary lacks 6 control characters and the lead bytes of planes that Unicode has not filled.
LOST = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab 1²\n\t'sé本🦙", max_size=40)


@pytest.fixture(scope="module")
def tables(smollm2):
    inner = json.loads(smollm2[1].inner.to_str())["model"]
    return inner["vocab"], {tuple(merge): rank for rank, merge in enumerate(inner["merges"])}


def byte_letters() -> list[str]:
    """The letter of each byte: itself where it prints in Latin-1, else the next free one from 256 on."""
    letters, free = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            letters.append(chr(byte))
        else:
            letters.append(chr(free))
            free += 1
    return letters


LETTERS = byte_letters()


def bpe_by_hand(text: str, vocab: dict, ranks: dict) -> list[int]:
    ids = []
    for part in NUMERAL.split(text):
        for word in WORDS.findall(part):
            letters = [letter for byte in word.encode() if (letter := LETTERS[byte]) in vocab]
            while True:
                pairs = [(ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(letters))]
                rank, i = min(pairs, default=(1 << 30, 0))
                if rank == 1 << 30:
                    break
                letters[i : i + 2] = [letters[i] + letters[i + 1]]
            ids += [vocab[piece] for piece in letters]
    return ids


def writable(text: str) -> bool:
    return not LOST.intersection(text.encode())


@pytest.mark.real
@given(text=TEXT)
@example(text="")
@example(text="It's 12 o'clock,   they'll pay £3.50\r\n\n for naïve 日本語 🦙🏽 x²  ")
@example(text="\x04\U00040000")
def test_encoding_is_byte_level_bpe(smollm2, tables, text):
    assert smollm2[1].encode(text) == bpe_by_hand(text, *tables)


@pytest.mark.real
@given(text=TEXT)
def test_decode_undoes_encode(smollm2, text):
    tokenizer = smollm2[1]
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.size for token in ids)
    kept = bytes(byte for byte in text.encode() if byte not in LOST)
    assert tokenizer.decode(ids) == kept.decode("utf-8", "replace")
    if writable(text):
        assert tokenizer.decode(ids) == text


@pytest.mark.real
@given(text=TEXT.filter(writable))
def test_pieces_lose_nothing(smollm2, text):
    tokenizer = smollm2[1]
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    if text.isascii() and "\\" not in text:
        assert "".join(pieces) == text


@pytest.mark.real
def test_pieces_show_parts_of_characters_as_bytes(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.pieces(tokenizer.encode(" the 🦙\n")) == [" the", " \\xf0\\x9f", "\\xa6", "\\x99", "\n"]
    assert tokenizer.pieces(tokenizer.encode("<|im_start|>user é")) == ["<|im_start|>", "user", " é"]
    assert tokenizer.decode(tokenizer.encode(" 🦙")[:2]) == " \ufffd"
    assert tokenizer.decode(tokenizer.encode("<|im_start|>user")) == "<|im_start|>user"


def test_every_byte_has_the_letter_that_byte_level_bpe_gives_it():
    assert _byte_letters() == {letter: byte for byte, letter in enumerate(LETTERS)}
    assert set(LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.real
def test_smollm2_names_its_special_tokens(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.size == 49152
    assert tokenizer.pieces([tokenizer.bos, tokenizer.eos, tokenizer.newline]) == ["<|im_start|>", "<|im_end|>", "\n"]
    assert tokenizer.prompt("a") == tokenizer.encode("a")  # it was trained without a token before the text
    with pytest.raises(ValueError, match="below 49152, not 49152"):
        tokenizer.pieces([49152])


@pytest.mark.real
def test_half_a_surrogate_pair_is_no_text_and_becomes_a_question_mark(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a? b"


def test_pieces_of_sentencepiece_show_spaces():
    inner = Inner(models.BPE({"▁": 0, "▁a": 1, "b": 2, "<0xF0>": 3}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert Tokenizer(inner).pieces([1, 2, 0, 3]) == [" a", "b", " ", "<0xF0>"]
