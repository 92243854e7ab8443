"""Recorded sessions through the streaming engine that serves, tick by tick, several side by side.

The model gets what came in, never what went out. Results from the background come as they were recorded, but only to
a model that has asked for them: none before the call that the session's own first action makes, and none earlier than
the micro-turn behind that call. Without the call they never come.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from tml.codec.encode import encode_session
from tml.codec.text import Tokenizer
from tml.codec.waveform import resample, resampled_length
from tml.config import AudioOutConfig, ModelConfig, StreamConfig
from tml.duplex.controls import without
from tml.duplex.judge import call_of
from tml.duplex.trace import Trace, trace_of_said
from tml.microturn import TEXT_IN_STREAMS, EncodedText, Layout
from tml.params import PyTree
from tml.session import Session, Stream, TextEvent
from tml.stream import engine
from tml.stream.inputs import TurnInputs, join_sessions, session_inputs
from tml.stream.outputs import OutputReader, Said
from tml.stream.own_voice import OwnVoice
from tml.stream.placement import place_params

POSITIONS_STEP = 256
"""Caches hold a multiple of so many positions, or that times a power of two, so that few programs are compiled."""

LIKELY_SLOTS_OUT = 3
"""Tokens that most turns put out at most, in the mean over a session; the caches of a group that says more grow."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a model did in one session.

    Attributes:
        said: what went out, turn by turn.
        mels: own audio of every turn, a row a position (float16); None where it listened, or without a voice.
        background: the results that came in, on the session's clock.
    """

    said: tuple[Said, ...]
    mels: tuple[np.ndarray | None, ...]
    background: tuple[TextEvent, ...]


class _Feed:
    """The input of one session, micro-turn by micro-turn, as far as it depends on what the model does."""

    def __init__(self, session: Session, layout: Layout, model: ModelConfig, tokenizer: Tokenizer) -> None:
        inputs = without(session, Stream.OWN_TEXT, Stream.OWN_AUDIO, Stream.ACTION)
        self._layout, self._model, self._session = layout, model, session
        self._encoded = encode_session(inputs, model, tokenizer)
        self._call = opening_call(session)
        self._gated = self._call is not None
        self.num_turns = layout.clock.num_turns(self._encoded.num_samples)
        self.background = () if self._gated else session.texts_of(Stream.BACKGROUND)
        self._turns = self._laid_out(None if self._gated else 0)

    def _laid_out(self, first_turn: int | None) -> TurnInputs:
        """All turns, if results may come from `first_turn` on; None keeps them back."""
        opens = None if first_turn is None else first_turn * self._layout.clock.turn_samples
        texts: list[EncodedText] = []
        for event in self._encoded.texts:
            if event.stream is not Stream.BACKGROUND:
                texts.append(event)
            elif opens is not None:
                texts.append(event._replace(start=max(event.start, opens)))
        texts.sort(key=lambda event: event.start)
        # Room for text that comes too late to be read; those turns are not streamed.
        spare = 1 + sum(len(event.tokens) for event in texts if event.stream in TEXT_IN_STREAMS)
        late = max((self._layout.clock.turn_of(event.start) for event in texts), default=0)
        num_turns = max(self.num_turns, late + 1) + spare
        encoded = replace(self._encoded, texts=tuple(texts), num_samples=num_turns * self._layout.clock.turn_samples)
        return session_inputs(self._layout, encoded, self._model)

    def slots_in(self) -> int:
        """Positions that come in during the whole session."""
        return int(np.sum(self._turns.counts_B[: self.num_turns]))

    def turn(self, number: int) -> TurnInputs:
        """The input half of one turn: arrays [1, 1, ...]; idle when the session is over."""
        piece = jax.tree.map(lambda leaf: leaf[number : number + 1], self._turns)
        if number < self.num_turns:
            return piece
        return jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), self._turns)

    def hear(self, said: Said) -> None:
        """Takes in what the model has done, on which later turns may depend."""
        calls = (call_of(payload) for payload in said.actions)
        if not self._gated or not any(call is not None and call.name == self._call for call in calls):
            return
        self._gated = False
        self._turns = self._laid_out(said.turn + 1)
        clock, rate_hz = self._layout.clock, self._session.sample_rate_hz
        opens = (said.turn + 1) * clock.turn_samples * rate_hz // clock.sample_rate_hz
        moved = (
            replace(event, start=start, end=max(event.end, start))
            for event in self._session.texts_of(Stream.BACKGROUND)
            for start in [max(event.start, opens)]
        )
        self.background = tuple(event for event in moved if event.start < self._session.num_samples)


def opening_call(session: Session) -> str | None:
    """The name of the first recorded call of a session that holds results, without which none of them may come.

    None if it holds no result, or no call.
    """
    calls = [call_of(event.text) for event in session.texts_of(Stream.ACTION)]
    named = [call.name for call in calls if call is not None]
    return named[0] if named and Stream.BACKGROUND in session.streams else None


class Player:
    """Streams recorded sessions through one model, `num_slots` side by side.

    Example:
        player = Player(model.params, config.model, model.layout, config.stream, model.tokenizer, num_slots=8)
        played = player.play(sessions)
    """

    def __init__(
        self,
        params: Mapping[str, PyTree],
        model: ModelConfig,
        layout: Layout,
        stream: StreamConfig,
        tokenizer: Tokenizer,
        num_slots: int,
    ) -> None:
        self.model, self.layout, self.tokenizer = model, layout, tokenizer
        self._stream, self._num_slots = stream, num_slots
        self._params = place_params(params, model, stream)
        self._max_positions = 0
        self._step = engine.jit_step(engine.make_step(model, layout, stream))

    def num_turns(self, session: Session) -> int:
        """Micro-turns that a session takes."""
        clock = self.layout.clock
        return clock.num_turns(resampled_length(session.num_samples, session.sample_rate_hz, clock.sample_rate_hz))

    def play(
        self,
        sessions: Sequence[Session],
        progress: Callable[[int], None] = lambda turns: None,
        numbers: Sequence[int] | None = None,
    ) -> list[Played]:
        """What the model does in each session, in whatever slot it runs.

        Args:
            sessions: any number.
            progress: called after every tick with the micro-turns done so far, of all sessions.
            numbers: a number a session, by which it draws words and sound; its place in the list by default.

        Raises:
            SessionError: a session that cannot be encoded or laid out.
        """
        numbers = range(len(sessions)) if numbers is None else numbers
        played: list[Played | None] = [None] * len(sessions)
        # Sessions of about the same length end together; the longest come first and decide the size of the caches.
        order = sorted(range(len(sessions)), key=lambda i: (-self.num_turns(sessions[i]), i))
        reached = done = 0

        def show(turns: int) -> None:
            nonlocal reached
            reached = max(reached, done + turns)  # a group that is streamed anew has been further
            progress(reached)

        for first in range(0, len(order), self._num_slots):
            group = order[first : first + self._num_slots]
            found = self._play_group([sessions[i] for i in group], [numbers[i] for i in group], show)
            for place, one in zip(group, found, strict=True):
                played[place] = one
            done += sum(self.num_turns(sessions[i]) for i in group)
        return [one for one in played if one is not None]

    def _play_group(
        self, sessions: Sequence[Session], numbers: Sequence[int], show: Callable[[int], None]
    ) -> list[Played]:
        """Streams one group; anew, in caches twice as large, if a session has said more than is likely."""
        feeds = self._feeds(sessions)
        turns = max(feed.num_turns for feed in feeds)
        likely = max(feed.slots_in() for feed in feeds)
        likely += max(LIKELY_SLOTS_OUT + self.layout.own_positions_per_turn, self.layout.min_slots_out) * turns
        # What was compiled once serves all that fits.
        self._max_positions = max(self._max_positions, -(-likely // POSITIONS_STEP) * POSITIONS_STEP)
        while (played := self._attempt(feeds, numbers, show)) is None:
            self._max_positions *= 2
            feeds = self._feeds(sessions)
        return played

    def _feeds(self, sessions: Sequence[Session]) -> list[_Feed]:
        return [_Feed(session, self.layout, self.model, self.tokenizer) for session in sessions]

    def _attempt(
        self, feeds: Sequence[_Feed], numbers: Sequence[int], show: Callable[[int], None]
    ) -> list[Played] | None:
        """Streams one group to its end, or returns None when a session does not fit in the caches."""
        num_idle = self._num_slots - len(feeds)
        stream = replace(self._stream, max_positions=self._max_positions)
        state = engine.init_state(self.model, self.layout, stream, self._num_slots, numbers=[*numbers, *[0] * num_idle])
        state = engine.place_state(state, self.model, stream)
        readers = [OutputReader(self.layout, self.tokenizer) for _ in feeds]
        said: list[list[Said]] = [[] for _ in feeds]
        mels: list[list[np.ndarray | None]] = [[] for _ in feeds]
        done = 0
        for turn in range(max(feed.num_turns for feed in feeds)):
            columns = [feed.turn(turn) for feed in feeds] + [feeds[0].turn(feeds[0].num_turns)] * num_idle
            inputs = jax.tree.map(lambda leaf: leaf[0], join_sessions(columns, 1))
            state, outputs = self._step(self._params, state, inputs)
            tokens_BO, counts_B = np.asarray(outputs.tokens_BO), np.asarray(outputs.counts_B)
            own = jax.device_get(outputs.own)
            for slot, feed in enumerate(feeds):
                if turn < feed.num_turns:
                    said[slot].append(readers[slot].read(tokens_BO[slot, : counts_B[slot]].tolist()))
                    mels[slot].append(own.mels_BTY[slot] if own is not None and own.speaks_B[slot] else None)
                    feed.hear(said[slot][-1])
            done += sum(turn < feed.num_turns for feed in feeds)
            show(done)
        if int(np.max(state.decode.num_positions_B)) > self._max_positions:
            return None
        return [
            Played(said=tuple(turns), mels=tuple(sounds), background=feed.background)
            for turns, sounds, feed in zip(said, mels, feeds, strict=True)
        ]

    def own_sound(self, session: Session, played: Played) -> np.ndarray:
        """What was heard of the model in a session, as long as the session and at its rate; silence without a voice."""
        if not self.model.has_voice:
            return np.zeros(session.num_samples, np.float32)
        voice = OwnVoice(self.model, self.layout.own_positions_per_turn)
        for mels in played.mels:
            voice.say(mels)
        own_hz, rate_hz = self.layout.clock.sample_rate_hz, session.sample_rate_hz
        heard = voice.heard(resampled_length(session.num_samples, rate_hz, own_hz))
        return resample(heard, own_hz, rate_hz)[: session.num_samples]


def recorded_trace(session: Session, layout: Layout, tokenizer: Tokenizer, model: ModelConfig) -> Trace:
    """What a model would have emitted whose every output token is the session's own target: the ceiling of its scores.

    It is below 1 where the layout is too coarse for the windows of the expectations.

    Raises:
        SessionError: own words or calls do not fit in the layout's turns.
    """
    inputs = (Stream.SYSTEM, Stream.USER_AUDIO, Stream.USER_TEXT, Stream.BACKGROUND, Stream.OWN_AUDIO)
    outputs = without(replace(session, frames=()), *inputs, Stream.VIDEO)
    # Words and calls stand where they do whether they sound or not, and mels would take long to make.
    silent = replace(model, audio_out=AudioOutConfig())
    encoded = encode_session(outputs, silent, tokenizer)
    contents = replace(layout, own_positions_per_turn=0).contents(encoded)
    reader = OutputReader(layout, tokenizer)
    turns, tokens = contents.out[:, 0], contents.out[:, 1]
    said = [reader.read(tokens[turns == turn].tolist()) for turn in range(contents.num_turns)]
    return trace_of_said(said, layout.clock)
