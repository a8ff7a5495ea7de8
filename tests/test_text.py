"""Text of tokens: what is released adds up to the decoded whole, and no part of a stop string ever gets out."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from openlora.errors import InvalidArgument
from openlora.serving.text import TextAssembler, TextCodec

LETTERS = "abc"
CHUNKS = ["".join(letters) for length in (1, 2, 3) for letters in itertools.product(LETTERS, repeat=length)]
UNKNOWN = "\ufffd"


def saved(tokenizer: Tokenizer, folder: Path) -> TextCodec:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder)


@pytest.fixture(scope="module")
def demo_codec(demo: Path) -> TextCodec:
    return TextCodec(demo / "model")


@pytest.fixture(scope="module", params=["strip", "metaspace"])
def byte_codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """SentencePiece's kind: `▁` for a space, bytes where no piece fits, in the two ways in which it is decoded."""
    pieces = ["▁", "▁▁", "▁the", "▁cat", "cat", "é", "▁st", "op", "a", UNKNOWN]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] + [(piece, -5.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    ending = {
        "strip": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        "metaspace": [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()],
    }
    tokenizer.decoder = decoders.Sequence(ending[request.param])
    return saved(tokenizer, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chunk_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Every string of one to three of the letters is one token."""
    tokenizer = Tokenizer(models.WordLevel({chunk: number for number, chunk in enumerate(CHUNKS)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return saved(tokenizer, tmp_path_factory.mktemp("tokenizer"))


def pieces(assembler: TextAssembler, ids: Sequence[int]) -> list[str]:
    """What each token sets free, up to a stop, and at last what was held."""
    released = []
    for token_id in ids:
        released.append(assembler.push(token_id))
        if assembler.stopped:
            break
    return [*released, assembler.finish()]


def decoded(codec: TextCodec, ids: Sequence[int], skip: bool = True) -> str:
    return codec.tokenizer.decode(list(ids), skip_special_tokens=skip)


def is_rewritten(codec: TextCodec, ids: Sequence[int], skip: bool) -> bool:
    """Whether more tokens change text that was whole before: then what is out already differs from the final decode."""
    whole = [text for end in range(len(ids)) if not (text := decoded(codec, ids[:end], skip)).endswith(UNKNOWN)]
    whole.append(decoded(codec, ids, skip))
    return any(not after.startswith(before) for before, after in itertools.pairwise(whole))


# --- the sum of what is released ------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_releases_add_up_to_the_decoded_whole(demo_codec: TextCodec, data: st.DataObject, skip: bool) -> None:
    tokens = st.integers(0, demo_codec.tokenizer.get_vocab_size() - 1)
    ids = data.draw(st.lists(tokens, max_size=40))
    assert "".join(pieces(TextAssembler(demo_codec, skip_special_tokens=skip), ids)) == decoded(demo_codec, ids, skip)


@settings(max_examples=300)
@given(text=st.text(max_size=12), cut=st.integers(0, 20))
@example(text="😀😁", cut=1)
@example(text="é€\ufffd", cut=0)
def test_text_that_ends_within_a_character(demo_codec: TextCodec, text: str, cut: int) -> None:
    ids = demo_codec.encode(text)
    ids = ids[: max(0, len(ids) - cut)]
    assert "".join(pieces(TextAssembler(demo_codec), ids)) == decoded(demo_codec, ids)


@settings(max_examples=400)
@given(data=st.data(), skip=st.booleans())
def test_releases_add_up_with_byte_tokens(byte_codec: TextCodec, data: st.DataObject, skip: bool) -> None:
    words = st.integers(0, byte_codec.tokenizer.get_vocab_size() - 1).map(lambda token_id: [token_id])
    spelled = st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
    ids = [token_id for group in data.draw(st.lists(words | spelled, max_size=10)) for token_id in group]
    assembler = TextAssembler(byte_codec, skip_special_tokens=skip)
    released = "".join(pieces(assembler, ids))
    if not is_rewritten(byte_codec, ids, skip):
        assert released == decoded(byte_codec, ids, skip)


BYTES = {
    "a character in four": (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], ["", "", "", "😀", ""]),
    "cut within a character": (["▁the", "<0xE2>", "<0x82>"], ["the", "", "", UNKNOWN * 2]),
    "cut within the second": (
        ["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>"],
        ["", "é", "", "", UNKNOWN * 2],
    ),
    "never a character": (["<0xFF>", "▁the"], ["", UNKNOWN + " the", ""]),
    # The decoder makes both bytes U+FFFD then, but `A` is out: what follows it must not be lost.
    "a run that turns invalid": (["<0x41>", "<0xFF>", "▁the", "▁cat"], ["A", "", UNKNOWN + " the", " cat", ""]),
    "an honest U+FFFD": (["▁the", UNKNOWN, "▁cat"], ["the", "", UNKNOWN + " cat", ""]),
    "an honest U+FFFD at the end": (["▁the", UNKNOWN], ["the", "", UNKNOWN]),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes(byte_codec: TextCodec, case: str) -> None:
    tokens, expected = BYTES[case]
    ids = [byte_codec.tokenizer.token_to_id(token) for token in tokens]
    assert pieces(TextAssembler(byte_codec), ids) == expected


def test_special_tokens_show_only_when_asked(demo_codec: TextCodec) -> None:
    ids = [*demo_codec.encode("Hello"), 1]
    hidden = "".join(pieces(TextAssembler(demo_codec), ids))
    shown = "".join(pieces(TextAssembler(demo_codec, skip_special_tokens=False), ids))
    assert hidden.strip() == "Hello"
    assert shown != hidden
    assert shown.endswith(demo_codec.piece(1))


# --- stop strings ---------------------------------------------------------------------------------------------------

STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)
CHUNKED = st.lists(st.integers(0, len(CHUNKS) - 1), max_size=12)


def expected_text(text: str, stops: Sequence[str], include: bool) -> tuple[str, bool]:
    """Letter by letter, from the definition: the first place where any stop string is complete ends the text."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include else text[: end - len(max(complete, key=len))], True
    return text, False


@settings(max_examples=1500)
@given(ids=CHUNKED, stops=STOPS, include=st.booleans())
def test_stops_at_the_same_place_however_the_text_is_cut(
    chunk_codec: TextCodec, ids: list[int], stops: list[str], include: bool
) -> None:
    text = "".join(CHUNKS[token_id] for token_id in ids)
    expected, stopped = expected_text(text, stops, include)
    assembler = TextAssembler(chunk_codec, stops, include_stop=include)
    shown = ""
    for count, piece in enumerate(pieces(assembler, ids), 1):
        shown += piece
        assert expected.startswith(shown)  # nothing behind the stop, and no part of it, whatever comes later
        if not assembler.stopped and count <= len(ids):
            so_far = text[: sum(len(CHUNKS[token_id]) for token_id in ids[:count])]
            held = so_far[len(shown) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)  # held back for a reason
    assert (shown, assembler.stopped) == (expected, stopped)


@pytest.mark.parametrize(
    ("stops", "chunks", "expected"),
    [
        (["cab"], ["c", "a", "b", "a"], ["", "", "", ""]),
        (["cab"], ["bca", "c", "ab"], ["b", "ca", "", ""]),
        (["cab"], ["ca", "c"], ["", "ca", "c"]),
        (["abc", "b"], ["abc"], ["a", ""]),
        (["bc", "abc"], ["abc"], ["", ""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""]),
    ],
)
def test_stop_examples(chunk_codec: TextCodec, stops: list[str], chunks: list[str], expected: list[str]) -> None:
    assert pieces(TextAssembler(chunk_codec, stops), [CHUNKS.index(chunk) for chunk in chunks]) == expected


@settings(max_examples=200)
@given(data=st.data(), include=st.booleans())
def test_stops_in_real_text(demo_codec: TextCodec, data: st.DataObject, include: bool) -> None:
    text = data.draw(st.sampled_from(["Tell me about the cat.", "Ω€ 😀😀 é\n\n{}", "aaa bbb aaa"]))
    ids = demo_codec.encode(text, add_special_tokens=False)
    whole = decoded(demo_codec, ids)
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
    at = whole.index(stop)
    assembler = TextAssembler(demo_codec, [stop], include_stop=include)
    shown = list(itertools.accumulate(pieces(assembler, ids)))
    assert assembler.stopped
    assert shown[-1] == (whole[: at + len(stop)] if include else whole[:at])
    assert all(whole[:at].startswith(text) for text in shown[:-2])


def test_a_stop_completed_by_the_last_flush(byte_codec: TextCodec) -> None:
    """Text that waits for the rest of a character is searched for stop strings as well, before it is let go."""
    ids = [byte_codec.tokenizer.token_to_id(token) for token in ("▁the", "▁st", UNKNOWN)]
    assembler = TextAssembler(byte_codec, [f"st{UNKNOWN}"])
    assert pieces(assembler, ids) == ["the", " ", "", ""]
    assert assembler.stopped


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_encode_adds_special_tokens_unless_told_not_to(demo_codec: TextCodec, demo: Path) -> None:
    config = json.loads((demo / "model" / "config.json").read_text())
    plain = demo_codec.encode("Hello", add_special_tokens=False)
    assert demo_codec.encode("Hello") == (config["bos_token_id"], *plain)
    assert demo_codec.encode("") == (config["bos_token_id"],)
    assert demo_codec.encode("", add_special_tokens=False) == ()


@settings(max_examples=200)
@given(text=st.text(max_size=40), special=st.booleans())
def test_encode_gives_the_tokenizers_own_ids(demo_codec: TextCodec, text: str, special: bool) -> None:
    expected = demo_codec.tokenizer.encode(text, add_special_tokens=special).ids
    assert demo_codec.encode(text, add_special_tokens=special) == tuple(expected)


def test_a_long_prompt_leaves_other_threads_alone(demo_codec: TextCodec) -> None:
    """While it is tokenized another thread must get its turns: with the interpreter's lock held there would be none."""
    started, ended = threading.Event(), threading.Event()

    def tokenize() -> None:
        started.set()
        demo_codec.encode("word " * 200_000)
        ended.set()

    thread = threading.Thread(target=tokenize)
    thread.start()
    started.wait()
    turns = 0
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5


def test_padding_and_truncation_of_a_tokenizer_file_are_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<pad>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="b $A", special_tokens=[("b", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=2, pad_token="<pad>", length=9)
    codec = saved(tokenizer, tmp_path)
    assert codec.encode("a a a a a a") == (1, 0, 0, 0, 0, 0, 0)


def test_bad_words_in_both_of_their_forms(demo_codec: TextCodec) -> None:
    plain, spaced = (demo_codec.encode(form, add_special_tokens=False) for form in ("cat", " cat"))
    assert demo_codec.bad_word_ids(["cat"]) == tuple(dict.fromkeys([plain, spaced]))
    assert demo_codec.bad_word_ids(["  cat"]) == demo_codec.bad_word_ids(["cat"])


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="tokenizer.json is missing: a fast tokenizer is needed"):
        TextCodec(tmp_path)


def test_an_id_outside_the_vocabulary_is_no_text(demo_codec: TextCodec) -> None:
    unknown_id = demo_codec.tokenizer.get_vocab_size() + 5
    assert pieces(TextAssembler(demo_codec), [unknown_id]) == ["", ""]
