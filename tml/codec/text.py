"""Text to tokens and back, by a byte-level BPE; the special tokens of the stream have ids beside it.

Text is data: what looks like a special token inside a text is encoded as ordinary bytes, so no text can
forge the structure of the stream.
"""

import base64
import enum
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tml.microturn import SPECIAL_TOKEN_NAMES, SpecialTokens
from tml.whole_folder import write_whole

REPLACEMENT = "\ufffd"
"""What an id that is no token, or bytes that are no character, decode to."""

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How o200k splits text before its merges; a rank file does not say it (tiktoken, openai_public.py, o200k_base)."""


class TokenizerFormat(enum.StrEnum):
    """What the bytes of a tokenizer are."""

    JSON = "json"
    """A tokenizer.json of the `tokenizers` library."""
    RANKS = "ranks"
    """Lines of base64 bytes and a rank, as in o200k_base.tiktoken."""


TOKENIZER_FILES = {TokenizerFormat.JSON: "tokenizer.json", TokenizerFormat.RANKS: "tokenizer.tiktoken"}
"""What a tokenizer is called in a directory, by its format."""


@dataclass(frozen=True)
class _JsonBackend:
    """The `tokenizers` library; it knows nothing of which tokens structure the stream."""

    library: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class _RanksBackend:
    """The `tiktoken` library over ordinary tokens."""

    library: Any

    def encode(self, text: str) -> list[int]:
        return self.library.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, errors="replace")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer that cannot change.

    Attributes:
        special: ids of the stream's special tokens.
        vocab_size: one more than the highest id.
        format: what `content` is.
        content: the file it was read from.
        backend: the library behind it.
        ordinary: which ids below `vocab_size` are ordinary tokens.

    Example: `tokenizer.decode(tokenizer.encode("seven")) == "seven"`.
    """

    special: SpecialTokens
    vocab_size: int
    format: TokenizerFormat
    content: bytes = field(repr=False)
    backend: _JsonBackend | _RanksBackend = field(repr=False)
    ordinary: frozenset[int] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a directory (`tokenizer_file`), a tokenizer.json, or a .tiktoken rank file.

        Special tokens that it lacks get the ids after its last one.

        Raises:
            ValueError: nothing there, not a tokenizer, or `tiktoken` is needed and not installed.
        """
        file = tokenizer_file(Path(path)) or Path(path)
        if not file.is_file():
            raise ValueError(
                f"{file}: there is no such tokenizer; name a directory that holds "
                f"{' or '.join(TOKENIZER_FILES.values())}, or such a file"
            )
        kind = TokenizerFormat.RANKS if file.suffix == ".tiktoken" else TokenizerFormat.JSON
        try:
            return _tokenizer_of(kind, file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of them special.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no bytes stand for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} cannot be encoded: {error}") from error
        return self.backend.encode(text)

    def encode_word(self, word: str) -> list[int]:
        """The tokens of one word of own text, with a space before it: a stream of words decodes with spaces."""
        return self.encode(f" {word.strip()}")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special tokens show as their names, ids that are no token as U+FFFD."""
        names = {number: SPECIAL_TOKEN_NAMES[name] for name, number in asdict(self.special).items()}
        pieces: list[str] = []
        for is_ordinary, group in itertools.groupby(ids, key=self.ordinary.__contains__):
            run = list(group)
            pieces += [self.backend.decode(run)] if is_ordinary else [names.get(i, REPLACEMENT) for i in run]
        return "".join(pieces)

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids, for the headers of encoded data."""
        special = json.dumps(asdict(self.special), sort_keys=True)
        return hashlib.sha256(b"\n".join([self.format.encode(), special.encode(), self.content])).hexdigest()[:16]

    def save(self, directory: Path) -> Path:
        """Writes the file it was read from into a directory; returns what `load` reads."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / TOKENIZER_FILES[self.format]
        file.write_bytes(self.content)
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the file's content, since a backend forgets its settings on the way."""
        return _tokenizer_of, (self.format, self.content)


def tokenizer_file(directory: Path) -> Path | None:
    """The tokenizer in a directory, whatever its format; of two, the first in `TOKENIZER_FILES`; None without one."""
    files = (directory / name for name in TOKENIZER_FILES.values())
    return next((file for file in files if file.is_file()), None)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Trains a byte-level BPE and saves it as `directory`/tokenizer.json; the special tokens get the first ids.

    The same texts give the same file. With few texts the vocabulary stays smaller than `vocab_size`.

    Raises:
        ValueError: `vocab_size` cannot hold the special tokens and every byte, or there is no text.
    """
    least = len(SPECIAL_TOKEN_NAMES) + 256
    if vocab_size < least:
        raise ValueError(
            f"a vocabulary of {vocab_size} cannot hold {len(SPECIAL_TOKEN_NAMES)} special tokens and 256 bytes; "
            f"the smallest is {least}"
        )
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError("there is no text to train a tokenizer on")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKEN_NAMES.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(itertools.chain([first], texts), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / TOKENIZER_FILES[TokenizerFormat.JSON]
    write_whole(file, library.to_str(pretty=True))
    return Tokenizer.load(directory)


def _tokenizer_of(kind: TokenizerFormat, content: bytes) -> Tokenizer:
    backend, ids, named = _read_json(content) if kind is TokenizerFormat.JSON else _read_ranks(content)
    fresh = itertools.count(max(ids) + 1)
    special = {name: named[mark] if mark in named else next(fresh) for name, mark in SPECIAL_TOKEN_NAMES.items()}
    return Tokenizer(
        special=SpecialTokens(**special),
        vocab_size=max(ids | set(special.values())) + 1,
        format=kind,
        content=content,
        backend=backend,
        ordinary=frozenset(ids - set(special.values())),
    )


def _read_json(content: bytes) -> tuple[_JsonBackend, set[int], dict[str, int]]:
    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"this is not a {TOKENIZER_FILES[TokenizerFormat.JSON]}: {error}") from error
    library.encode_special_tokens = True
    library.no_padding()
    library.no_truncation()
    named = library.get_vocab(with_added_tokens=True)
    if not named:
        raise ValueError("the tokenizer has no tokens")
    return _JsonBackend(library), set(named.values()), named


def _read_ranks(content: bytes) -> tuple[_RanksBackend, set[int], dict[str, int]]:
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(f"this is not a rank file, lines of base64 bytes and a number: {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"the ranks of {len(lines)} lines must be 0 to {len(lines) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the ranks lack {len(missing)} of the 256 single bytes, the first is {missing[0]}")
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError("a .tiktoken file needs the tiktoken package; `pip install tiktoken`") from error
    library = tiktoken.Encoding(name="ranks", pat_str=O200K_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return _RanksBackend(library), set(ranks.values()), {}
