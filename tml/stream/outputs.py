"""What went out in a micro-turn: own words and actions, read from its output tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tml.codec.text import Tokenizer
from tml.microturn import Layout
from tml.stream.engine import TurnOutputs


@dataclass(frozen=True, kw_only=True)
class Said:
    """The output of one turn of one session.

    Attributes:
        turn: index of the turn.
        emitted_s: when it was emitted, on the session's clock.
        tokens: tokens of own text, without control.
        text: what these tokens added to the text of the session.
        actions: payloads of actions, as text.
    """

    turn: int
    emitted_s: float
    tokens: tuple[int, ...]
    text: str
    actions: tuple[str, ...]


class OutputReader:
    """Reads a session's turns in order. Text is decoded whole, so that a character may span turns."""

    def __init__(self, layout: Layout, tokenizer: Tokenizer) -> None:
        self._layout, self._tokenizer = layout, tokenizer
        self._tokens: list[int] = []
        self._text = ""
        self._turn = 0

    def read(self, tokens: Sequence[int]) -> Said:
        """The next turn, from its output tokens (control tokens included)."""
        special = self._layout.special
        own: list[int] = []
        actions: list[str] = []
        payload: list[int] | None = None
        for token in tokens:
            if token == special.action:
                payload = []
            elif token == special.end_of_text and payload is not None:
                actions.append(self._tokenizer.decode(payload).strip())
                payload = None
            elif payload is not None:
                payload.append(token)
            elif token not in (special.listen, special.speak, special.end_of_text, special.pad):
                own.append(token)
        said = Said(
            turn=self._turn,
            emitted_s=self._layout.clock.emission_s(self._turn),
            tokens=tuple(own),
            text=self._added(own),
            actions=tuple(actions),
        )
        self._turn += 1
        return said

    def _added(self, own: list[int]) -> str:
        if not own:
            return ""
        self._tokens += own
        text = self._tokenizer.decode(self._tokens)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        added, self._text = whole[len(self._text) :], whole
        return added


def read_session(outputs: TurnOutputs, slot: int, num_turns: int, layout: Layout, tokenizer: Tokenizer) -> list[Said]:
    """Every turn of the session in `slot`, from outputs with a leading axis of turns."""
    reader = OutputReader(layout, tokenizer)
    tokens_UO, counts_U = np.asarray(outputs.tokens_BO)[:, slot], np.asarray(outputs.counts_B)[:, slot]
    return [reader.read(tokens_UO[turn, : counts_U[turn]].tolist()) for turn in range(num_turns)]
