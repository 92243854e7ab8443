"""Full-text search over a folder of texts, in SQLite (FTS5, ranked by BM25)."""

import re
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".md")
MAX_RESULTS = 20
_SNIPPET_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A text that was found: the name of its file in the folder, and the place in it that fits best."""

    title: str
    snippet: str


class TextIndex:
    """An index of every text in a folder, in memory; searched by any thread."""

    def __init__(self, folder: Path) -> None:
        """Reads the folder and the folders in it.

        Raises:
            ValueError: no such folder, no text in it, or a text that is not UTF-8.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder of texts")
        files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise ValueError(f"{folder}: there is no text in it ({', '.join(SUFFIXES)})")
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute("CREATE VIRTUAL TABLE texts USING fts5(title, body, tokenize = 'porter unicode61')")
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: this is not UTF-8: {error}") from error
            row = (file.relative_to(folder).with_suffix("").as_posix(), text)
            self._database.execute("INSERT INTO texts VALUES (?, ?)", row)

    def search(self, query: str, limit: int = 3) -> list[Hit]:
        """The texts that hold every word of the query, or if none does any of them; the best first.

        Raises:
            ValueError: the query has no word, or `limit` is not in 1..`MAX_RESULTS`.
        """
        if not 1 <= limit <= MAX_RESULTS:
            raise ValueError(f"limit = {limit} is not in 1..{MAX_RESULTS}")
        # Quoted, so that no word of a query is an operator.
        words = [f'"{word}"' for word in re.findall(r"\w+", query)]
        if not words:
            raise ValueError(f"the query {query!r} has no word in it")
        return self._matching(" AND ".join(words), limit) or self._matching(" OR ".join(words), limit)

    def _matching(self, expression: str, limit: int) -> list[Hit]:
        statement = (
            f"SELECT title, snippet(texts, 1, '', '', '…', {_SNIPPET_TOKENS}) FROM texts WHERE texts MATCH ? "
            "ORDER BY rank, title LIMIT ?"
        )
        with self._lock:
            rows = self._database.execute(statement, (expression, limit)).fetchall()
        return [Hit(title=title, snippet=" ".join(snippet.split())) for title, snippet in rows]
