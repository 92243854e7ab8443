"""The micro-turn clock and layout, written once for training and streaming. Plain numpy.

Turn k covers input samples [kT, (k+1)T). Its output is computed when that input is complete:
it is emitted at (k+1)T and heard during [(k+1)T, (k+2)T). So the output of turn k holds what
`own_text` says in [(k+1)T, (k+2)T), and a latency is measured to the emission at (k+1)T.

One turn, in row order (`||` divides what comes in from what goes out):

    [tick]? audio x n, tiles, text in || actions, [listen] or [speak] own text [end of text] own audio x n

What comes in stands in the order of `turn.order`; this is the default. Own audio stands in speaking turns of a model
with a voice: position j holds what `own_audio` has in the j-th hop of [(k+1)T, (k+2)T). A turn speaks if it has own
text, or if its own audio can be heard.

| position                  | input embedding     | target                    | emitted           |
|---------------------------|---------------------|---------------------------|-------------------|
| [tick] (if boundary)      | token               | none                      |                   |
| audio 0 .. n-1            | dMel levels         | none (1)                  |                   |
| tile                      | 2 x 40 x 40 pixels  | none                      |                   |
| marker, text in           | token               | none                      |                   |
| last of the above         |                     | first output token        | control or action |
| [action], payload tokens  | token               | next payload token        | action            |
| [end of text] of action   | token               | next output token         | control           |
| [listen]                  | token               | none: the turn is over    |                   |
| [speak]                   | token               | first own token           | text              |
| own text                  | token               | next own, [end of text]   | text              |
| [end of text]             | token               | none: the turn is over (2)|                   |
| own audio 0 .. n-2        | its mel, quantised  | mel of the next           | sound             |
| own audio n-1             | its mel, quantised  | none: the turn is over    | sound             |

(1) In training, the user's word that has ended, where it is known (`data_pipelines.heard_words`); never in the last.
(2) With a voice, the mel of own audio 0: a loss of its own, no token (`tml.model.flow_head`).

With `Control.IMPLICIT` there is no [listen] or [speak]: a listening turn is [end of text] alone. With a voice, own text
then ends with [speak] instead, and own audio follows it. What `own_audio` holds before T no output can say.

With `SlotScheme.FIXED`, [pad] tokens fill up two blocks of every turn, so that a turn takes the same number of
positions, but for its tiles and actions:

- text in, behind its last token, to `max_text_in_per_turn`;
- what goes out without actions, to control, `max_text_out_per_turn` tokens, [end of text] and own audio. They stand
  behind the last token: before own audio in a turn that speaks, also in place of it in one that listens.

A [pad] is never a target and never chosen: a session that is streamed is fed all of a block at once. As any other
position, the last one of text in has the first output token as its target, and the one before own audio its mel.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tml.config import Boundary, Control, MicroTurnConfig, Modality, ModelConfig, SlotScheme
from tml.microturn.clock import Clock
from tml.microturn.encoded import EncodedSession
from tml.microturn.positions import Kind, Segment, SpecialTokens, Target
from tml.session import SessionError, Stream

TEXT_IN_STREAMS = (Stream.SYSTEM, Stream.USER_TEXT, Stream.BACKGROUND)


@dataclass(frozen=True, kw_only=True)
class TurnContents:
    """What U consecutive turns hold, before it is laid out; every array is ordered by turn.

    Attributes:
        num_turns: U.
        tile_turns: the turn of each image tile.
        text_in: (turn, token) pairs, markers and [pad] included, as int32 [n, 2].
        out: (turn, token, Target) triples of the output block, as int32 [n, 3]; empty when streaming. A [pad] is no
            target: Target.NONE.
    """

    num_turns: int
    tile_turns: np.ndarray
    text_in: np.ndarray
    out: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The micro-turn layout: clock, rules and special tokens."""

    clock: Clock
    turn: MicroTurnConfig
    special: SpecialTokens
    max_tiles_per_turn: int
    own_positions_per_turn: int = 0
    """Own audio positions of a speaking turn; 0 without a voice."""

    @classmethod
    def of(cls, turn: MicroTurnConfig, model: ModelConfig, special: SpecialTokens) -> "Layout":
        """The layout of an experiment, with the special tokens of its tokenizer."""
        clock = Clock.of(turn, model.audio)
        return cls(
            clock=clock,
            turn=turn,
            special=special,
            max_tiles_per_turn=model.video.max_tiles_per_turn,
            own_positions_per_turn=clock.frames_per_turn if model.has_voice else 0,
        )

    @property
    def max_slots_in(self) -> int:
        """Positions that the input half of one turn can take."""
        boundary = int(self.turn.boundary is Boundary.TICK)
        return boundary + self.clock.frames_per_turn + self.max_tiles_per_turn + self.turn.max_text_in_per_turn

    @property
    def textless_slots_in(self) -> int:
        """Positions that the input half of one turn can take if no text comes in, as in most turns."""
        return self.max_slots_in - (0 if self._is_fixed else self.turn.max_text_in_per_turn)

    @property
    def min_slots_in(self) -> int:
        """Positions that the input half of every turn takes: those of a turn of sound alone."""
        return self.textless_slots_in - self.max_tiles_per_turn

    @property
    def max_tokens_out(self) -> int:
        """Tokens that the output half of one turn can hold: actions, control, own text, [end of text]."""
        return self.turn.max_action_per_turn + self.turn.max_text_out_per_turn + 2

    @property
    def max_slots_out(self) -> int:
        """Positions that the output half of one turn can take: its tokens and own audio."""
        return self.max_tokens_out + self.own_positions_per_turn

    @property
    def min_slots_out(self) -> int:
        """Positions that the output half of every turn takes; if slots are fixed, all but actions."""
        control = int(self.turn.control is Control.EXPLICIT)
        return control + self.turn.max_text_out_per_turn + 1 + self.own_positions_per_turn if self._is_fixed else 1

    @property
    def max_padding_out(self) -> int:
        """[pad] tokens that the output half of one turn can hold: one of its fixed positions is never [pad]."""
        return self.min_slots_out - 1

    @property
    def max_slots_at_once(self) -> int:
        """Positions that a live session can be fed at once; at least 1."""
        return max(self.max_slots_in, self.max_padding_out, self.own_positions_per_turn, 1)

    @property
    def _is_fixed(self) -> bool:
        return self.turn.slots is SlotScheme.FIXED

    def contents(self, encoded: EncodedSession) -> TurnContents:
        """Assigns everything in a session to turns.

        Raises:
            SessionError: more text or tiles than the session's turns can hold, or a layout with a voice for a session
                that was encoded without one.
        """
        if self.own_positions_per_turn and encoded.own_audible_T is None:
            raise SessionError(
                f"session {encoded.session_id} was encoded without own audio, but this layout has a voice "
                f"(model.audio_out.frames_per_position > 0); encode it with the same config"
            )
        num_turns = self.clock.num_turns(encoded.num_samples)
        tile_turns = encoded.tile_samples_P // self.clock.turn_samples
        most = int(np.bincount(tile_turns).max()) if len(tile_turns) else 0
        if most > self.max_tiles_per_turn:
            raise SessionError(
                f"session {encoded.session_id} has {most} tiles in one turn, the layout holds "
                f"video.max_tiles_per_turn = {self.max_tiles_per_turn}"
            )
        text_in, out = self._text_in(encoded, num_turns), self._out(encoded, num_turns)
        return TurnContents(num_turns=num_turns, tile_turns=tile_turns.astype(np.int32), text_in=text_in, out=out)

    def text_in_chunk(self, waiting: dict[Stream, list[int]]) -> list[int]:
        """Takes one turn's worth of tokens, with markers and [pad], from the waiting ones (which it shortens)."""
        markers = {
            Stream.SYSTEM: self.special.system,
            Stream.USER_TEXT: self.special.user_text,
            Stream.BACKGROUND: self.special.background,
        }
        chunk: list[int] = []
        for stream in TEXT_IN_STREAMS:
            room = self.turn.max_text_in_per_turn - len(chunk) - 1
            if room < 1 or not waiting.get(stream):
                continue
            chunk += [markers[stream], *waiting[stream][:room]]
            del waiting[stream][:room]
        padding = self.turn.max_text_in_per_turn - len(chunk) if self._is_fixed else 0
        return chunk + [self.special.pad] * padding

    def _text_in(self, encoded: EncodedSession, num_turns: int) -> np.ndarray:
        events = [event for event in encoded.texts if event.stream in TEXT_IN_STREAMS]
        waiting: dict[Stream, list[int]] = {}
        chunks: dict[int, list[int]] = {}
        turn, next_event = 0, 0
        while next_event < len(events) or any(waiting.values()):
            if not any(waiting.values()):
                turn = max(turn, self.clock.turn_of(events[next_event].start))
            while next_event < len(events) and self.clock.turn_of(events[next_event].start) <= turn:
                event = events[next_event]
                waiting.setdefault(event.stream, []).extend(event.tokens)
                next_event += 1
            if turn >= num_turns:
                raise SessionError(
                    f"session {encoded.session_id}: text in does not fit in its {num_turns} turns at "
                    f"turn.max_text_in_per_turn = {self.turn.max_text_in_per_turn}"
                )
            chunks[turn] = self.text_in_chunk(waiting)
            turn += 1
        nothing = self.text_in_chunk({})
        pairs = [(turn, token) for turn in range(num_turns) for token in chunks.get(turn, nothing)]
        return np.array(pairs, np.int32).reshape(-1, 2)

    def _out(self, encoded: EncodedSession, num_turns: int) -> np.ndarray:
        explicit = self.turn.control is Control.EXPLICIT
        listening = self.special.listen if explicit else self.special.end_of_text
        action_turns, action_tokens = self._actions(encoded)
        said_turns, said_tokens = self._paced(encoded, num_turns)
        speaks_U = (np.bincount(said_turns, minlength=num_turns) > 0) | self._sounds(encoded, num_turns)
        speaking, listens = np.flatnonzero(speaks_U), np.flatnonzero(~speaks_U)
        voice = self.own_positions_per_turn
        opens, closes = (speaking, speaking[:0]) if explicit else (speaking[:0], speaking if voice else speaking[:0])
        sounds = np.repeat(speaking, voice)
        # In the order in which a turn holds them: a stable sort by turn then interleaves the turns.
        blocks: list[tuple[np.ndarray, int | np.ndarray, Target]] = [
            (listens, listening, Target.LISTEN),
            (opens, self.special.speak, Target.SPEAK),
            (said_turns, said_tokens, Target.TEXT),
            (speaking if explicit or not voice else speaking[:0], self.special.end_of_text, Target.TEXT),
            (closes, self.special.speak, Target.SPEAK),
        ]
        held_U = np.bincount(np.concatenate([sounds, *(turns for turns, _, _ in blocks)]), minlength=num_turns)
        pads = np.repeat(np.arange(num_turns), np.maximum(self.min_slots_out - held_U, 0))
        blocks = [
            (action_turns, action_tokens, Target.ACTION),
            *blocks,
            (pads, self.special.pad, Target.NONE),
            (sounds, self.special.audio, Target.AUDIO),
        ]
        out = np.empty((sum(len(turns) for turns, _, _ in blocks), 3), np.int32)
        end = 0
        for turns, tokens, target in blocks:
            start, end = end, end + len(turns)
            out[start:end, 0], out[start:end, 1], out[start:end, 2] = turns, tokens, target
        return out[np.argsort(out[:, 0], kind="stable")]

    def _sounds(self, encoded: EncodedSession, num_turns: int) -> np.ndarray:
        """Which turns hold own audio that can be heard (bool [U])."""
        if encoded.own_audible_T is None or not self.own_positions_per_turn:
            return np.zeros(num_turns, bool)
        # Output k holds the hops of turn k + 1.
        audible = encoded.own_audible_T[self.clock.frames_per_turn :]
        size = num_turns * self.clock.frames_per_turn
        padded = np.pad(audible[:size], (0, max(0, size - len(audible))))
        sounds_U: np.ndarray = np.any(padded.reshape(num_turns, -1), axis=1)
        return sounds_U

    def _actions(self, encoded: EncodedSession) -> tuple[np.ndarray, np.ndarray]:
        """The turns and tokens of all actions, markers included."""
        turns: list[int] = []
        tokens: list[int] = []
        for event in encoded.texts:
            if event.stream is Stream.ACTION:
                tokens += [self.special.action, *event.tokens, self.special.end_of_text]
                turns += [self.clock.output_turn_of(event.start)] * (len(event.tokens) + 2)
        most = int(np.bincount(turns).max()) if turns else 0
        if most > self.turn.max_action_per_turn:
            raise SessionError(
                f"session {encoded.session_id} has {most} tokens of actions in one turn, the layout holds "
                f"turn.max_action_per_turn = {self.turn.max_action_per_turn}"
            )
        return np.array(turns, np.int64), np.array(tokens, np.int64)

    def _paced(self, encoded: EncodedSession, num_turns: int) -> tuple[np.ndarray, np.ndarray]:
        """The turns and tokens of own text, at most `max_text_out_per_turn` tokens in each turn."""
        events = [event for event in encoded.texts if event.stream is Stream.OWN_TEXT]
        tokens = np.array([*itertools.chain(*(event.tokens for event in events))], np.int64)
        most, order = self.turn.max_text_out_per_turn, np.arange(len(tokens))
        # With `most` places a turn, each token takes the place after the last one, or the first of its own turn.
        starts = np.array([event.start for event in events], np.int64)
        first_places = most * np.maximum(0, starts // self.clock.turn_samples - 1)
        own_places = np.repeat(first_places, [len(event.tokens) for event in events])
        turns = (np.maximum.accumulate(own_places - order) + order) // most
        if len(turns) and turns[-1] >= num_turns:
            raise SessionError(
                f"session {encoded.session_id}: own text does not fit in its {num_turns} turns at "
                f"turn.max_text_out_per_turn = {most}"
            )
        return turns, tokens

    def lay_out(self, contents: TurnContents) -> Segment:
        """Interleaves the turns into positions."""
        num_turns, frames = contents.num_turns, self.clock.frames_per_turn
        tile_turns, text_turns, out_turns = contents.tile_turns, contents.text_in[:, 0], contents.out[:, 0]
        # What a turn holds, in row order: [tick], what came in, output.
        audio_field, tile_field, text_field = (
            1 + self.turn.order.index(modality) for modality in (Modality.AUDIO, Modality.VIDEO, Modality.TEXT)
        )
        count_UF = np.empty((num_turns, 5), np.int64)
        count_UF[:, 0] = self.turn.boundary is Boundary.TICK
        count_UF[:, audio_field] = frames
        for field, turns in ((tile_field, tile_turns), (text_field, text_turns), (4, out_turns)):
            count_UF[:, field] = np.bincount(turns, minlength=num_turns)
        end_UF = np.cumsum(count_UF).reshape(count_UF.shape)
        start_UF = end_UF - count_UF
        size = int(end_UF[-1, -1]) if num_turns else 0

        def places(field: int, turns: np.ndarray) -> np.ndarray:
            before_U = np.cumsum(count_UF[:, field]) - count_UF[:, field]
            return (start_UF[:, field] - before_U)[turns] + np.arange(len(turns))

        tokens = np.zeros(size, np.int32)
        kinds = np.full(size, Kind.TOKEN.value, np.int32)
        source = np.zeros(size, np.int32)
        targets = np.zeros(size, np.int32)
        target_kinds = np.full(size, Target.NONE.value, np.int32)
        if self.turn.boundary is Boundary.TICK:
            tokens[start_UF[:, 0]] = self.special.tick
        audio = (start_UF[:, audio_field, None] + np.arange(frames)).reshape(-1)
        tokens[audio], kinds[audio] = self.special.audio, Kind.AUDIO.value
        source[audio] = np.arange(len(audio))
        tile, out = places(tile_field, tile_turns), places(4, out_turns)
        tokens[tile], kinds[tile], source[tile] = self.special.tile, Kind.TILE.value, np.arange(len(tile))
        tokens[places(text_field, text_turns)] = contents.text_in[:, 1]
        tokens[out] = contents.out[:, 1]
        # The token at an output position is the target of the position before it, which is in the same turn.
        targets[out - 1], target_kinds[out - 1] = contents.out[:, 1], contents.out[:, 2]
        targets[out[contents.out[:, 2] == Target.NONE] - 1] = 0
        own = np.flatnonzero(contents.out[:, 2] == Target.AUDIO)
        if len(own):
            targets[out[own] - 1], kinds[out[own]] = 0, Kind.OWN_AUDIO.value
            place_in_turn = np.arange(len(own)) % self.own_positions_per_turn
            source[out[own]] = (out_turns[own] + 1) * frames + place_in_turn
        turn_starts = np.append(start_UF[:, 0], size).astype(np.int32)
        return Segment(
            tokens=tokens,
            kinds=kinds,
            source=source,
            targets=targets,
            target_kinds=target_kinds,
            turn_starts=turn_starts,
        )

    def slots_beside_tiles(self, num_tiles: int) -> int:
        """The other positions that so many tiles of a document need: as many as in turns full of tiles.

        Then a row holds no more tiles than one of turns does. Too short a text is filled up with [pad] behind its end.

        Raises:
            SessionError: there are tiles, and turns hold none.
        """
        if num_tiles and not self.max_tiles_per_turn:
            raise SessionError(f"a document has {num_tiles} tiles, but video.max_tiles_per_turn is 0")
        num_turns = -(-num_tiles // max(self.max_tiles_per_turn, 1))
        return num_turns * (self.min_slots_in + self.min_slots_out)

    def lay_out_document(self, tokens: Sequence[int], num_tiles: int = 0) -> Segment:
        """One piece of a plain text: [document] tiles text [end of text], with loss on all of the text."""
        shown = [self.special.document, *[self.special.tile] * num_tiles, *tokens, self.special.end_of_text]
        last, missing = len(shown) - 1, num_tiles + self.slots_beside_tiles(num_tiles) - len(shown)
        row = np.array(shown + [self.special.pad] * missing, np.int32)
        targets, target_kinds = np.zeros(len(row), np.int32), np.full(len(row), Target.NONE, np.int32)
        targets[num_tiles:last], target_kinds[num_tiles:last] = row[num_tiles + 1 : last + 1], Target.DOCUMENT
        kinds, source = np.full(len(row), Kind.TOKEN, np.int32), np.zeros(len(row), np.int32)
        kinds[1 : num_tiles + 1], source[1 : num_tiles + 1] = Kind.TILE, np.arange(num_tiles)
        ends = np.array([0, len(row)], np.int32)
        return Segment(
            tokens=row, kinds=kinds, source=source, targets=targets, target_kinds=target_kinds, turn_starts=ends
        )
