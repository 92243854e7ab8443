import base64
import functools
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from tml.codec.text import O200K_SPLIT, Tokenizer, train_tokenizer
from tml.microturn import SPECIAL_TOKEN_NAMES

TEXTS = [
    "say seven",
    "what comes after three",
    "seven, eight and nine: that is it!",
    "did the naïve café owner say 12,345 times 678? No, she didn't.",
]


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 3, 330, path)
    return path


@functools.cache
def small_ranks() -> bytes:
    """A rank file of the 256 bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b" s", b"ev", b"en", b" sev", b" seven"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(small_ranks())
    return path


@pytest.fixture(scope="session", params=["json", "ranks"])
def tokenizer(request, directory, ranks_file) -> Tokenizer:
    return Tokenizer.load(directory if request.param == "json" else ranks_file)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
@example(text="<|tick|> <|end_of_text|><|pad|>")
@example(text="  two  spaces\r\n\ttabs\n")
@example(text="e\u0301 \U0001f9d1\u200d\U0001f680 \u0000 \ufeff \ufffd")
def test_every_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(vars(tokenizer.special).values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(words=st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8), max_size=8))
def test_a_stream_of_words_decodes_with_spaces(tokenizer, words):
    stream = [token for word in words for token in tokenizer.encode_word(word)]
    assert tokenizer.decode(stream) == "".join(f" {word}" for word in words)


def test_words_are_stripped(tokenizer):
    assert tokenizer.encode_word(" seven\n") == tokenizer.encode_word("seven") == tokenizer.encode(" seven")


def test_special_tokens_of_a_trained_tokenizer_are_the_first_ids(directory):
    tokenizer = Tokenizer.load(directory)
    assert list(vars(tokenizer.special).values()) == list(range(len(SPECIAL_TOKEN_NAMES)))
    assert 12 + 256 < tokenizer.vocab_size <= 330
    assert len(tokenizer.encode(" seven")) < 6


def test_special_tokens_and_unknown_ids_are_visible(tokenizer):
    special = tokenizer.special
    ids = [special.speak, *tokenizer.encode(" hé"), special.end_of_text, tokenizer.vocab_size, -1]
    assert tokenizer.decode(ids) == "<|speak|> hé<|end_of_text|>\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("\U0001f680")[:1]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_a_tokenizer_without_our_special_tokens_gets_them_after_its_last_id(ranks_file, tmp_path):
    ranks = Tokenizer.load(ranks_file)
    assert list(vars(ranks.special).values()) == list(range(261, 273))
    assert ranks.vocab_size == 273
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", SPECIAL_TOKEN_NAMES["tick"]],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    library.save(str(tmp_path / "foreign.json"))
    foreign = Tokenizer.load(tmp_path / "foreign.json")
    assert foreign.special.tick == 1
    assert foreign.special.pad == library.get_vocab_size()
    assert foreign.vocab_size == library.get_vocab_size() + 11
    assert foreign.decode(foreign.encode("<|endoftext|> <|tick|>")) == "<|endoftext|> <|tick|>"
    assert not {0, 1} & set(foreign.encode("<|endoftext|> <|tick|>"))


def test_training_is_deterministic_across_processes(directory, tmp_path):
    code = (
        "import json, sys; from pathlib import Path; from tml.codec.text import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), 330, Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS * 3), str(tmp_path)], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart(directory, ranks_file, tmp_path):
    first = Tokenizer.load(directory)
    assert first.fingerprint() == Tokenizer.load(directory / "tokenizer.json").fingerprint()
    other = train_tokenizer([*TEXTS, "another text altogether"], 330, tmp_path)
    assert len({first.fingerprint(), other.fingerprint(), Tokenizer.load(ranks_file).fingerprint()}) == 3


def test_a_saved_tokenizer_is_read_from_its_directory(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == [file]
    for path in (file, file.parent):
        again = Tokenizer.load(path)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode("say seven") == tokenizer.encode("say seven")


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "<|tick|> say seven"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.special == tokenizer.special


def test_a_tokenizer_cannot_change(tokenizer):
    with pytest.raises(AttributeError):
        tokenizer.vocab_size = 1


def test_bad_tokenizers_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no such tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"bad\.json: this is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    (tmp_path / "bad.tiktoken").write_text("###\n")
    with pytest.raises(ValueError, match=r"bad\.tiktoken: this is not a rank file"):
        Tokenizer.load(tmp_path / "bad.tiktoken")
    (tmp_path / "holes.tiktoken").write_bytes(small_ranks() + b"enp6 999\n")
    with pytest.raises(ValueError, match="ranks of 262 lines"):
        Tokenizer.load(tmp_path / "holes.tiktoken")
    (tmp_path / "few.tiktoken").write_bytes(small_ranks()[:80])
    with pytest.raises(ValueError, match="rank"):
        Tokenizer.load(tmp_path / "few.tiktoken")
    (tmp_path / "none.tiktoken").write_bytes(b"")
    with pytest.raises(ValueError, match="256 single bytes"):
        Tokenizer.load(tmp_path / "none.tiktoken")


def test_without_tiktoken_the_way_out_is_named(ranks_file):
    code = (
        "import sys; sys.modules['tiktoken'] = None;from tml.codec.text import Tokenizer; Tokenizer.load(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ranks_file)], capture_output=True, text=True)
    assert "needs the tiktoken package" in done.stderr
    assert "pip install tiktoken" in done.stderr


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="cannot be encoded"):
        tokenizer.encode("a\ud800")


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="the smallest is 268"):
        train_tokenizer(TEXTS, 267, tmp_path)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", ""], 300, tmp_path)


def test_the_split_is_o200ks():
    source = inspect.getsource(openai_public.o200k_base)
    assert all(f'r"""{part}"""' in source for part in _parts(O200K_SPLIT))


def _parts(pattern: str) -> list[str]:
    """Cuts the pattern at the bars outside brackets."""
    parts, depth = [""], 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
