"""A live session: sound, text and pictures in, a `Said` and own sound for every micro-turn, the record of it all."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np

from tml.codec import audio
from tml.codec.text import Tokenizer
from tml.codec.waveform import steps_of
from tml.config import ModelConfig, StreamConfig
from tml.microturn import Clock, Layout, TurnContents
from tml.params import PyTree
from tml.session import Session, Stream, TextEvent, VideoFrame
from tml.stream import engine
from tml.stream.inputs import NO_OUTPUT, TurnInputs, turn_inputs
from tml.stream.outputs import OutputReader, Said
from tml.stream.own_voice import OwnVoice
from tml.stream.placement import place_params
from tml.stream.recording import SILENT_TURNS, Recording
from tml.stream.sight import Sight


@dataclass(frozen=True, kw_only=True)
class TurnResult:
    """One micro-turn, done.

    Attributes:
        said: what went out.
        compute_s: what the turn took: decoding what was shown in it, features, network, reading, vocoding.
        sound: own sound of one turn's length, to be heard from the emission on; None without a voice.
        mels: the own audio that it was made from, a row a position (float16); None without a voice, or if it listens.
    """

    said: Said
    compute_s: float
    sound: np.ndarray | None = None
    mels: np.ndarray | None = None


@functools.lru_cache(maxsize=8)
def _compiled_step(model: ModelConfig, layout: Layout, stream: StreamConfig) -> engine.StepFunction:
    """One program for all sessions of a model: only the first of them waits for the compiler."""
    return engine.jit_step(engine.make_step(model, layout, stream))


class SessionFullError(ValueError):
    """A session that has no room for another turn.

    Attributes:
        results: the turns that the same `push` had completed before.
    """

    def __init__(self, message: str, results: list[TurnResult]) -> None:
        super().__init__(message)
        self.results = results


class LiveSession:
    """One session through the streaming engine.

    Text that is typed (`type_text`) goes in with the next turn, a picture (`show`) with the turn in which its tiles
    are complete. Everything is remembered, and `record` gives it back as a Session.
    """

    def __init__(
        self,
        params: Mapping[str, PyTree],
        model: ModelConfig,
        layout: Layout,
        stream: StreamConfig,
        tokenizer: Tokenizer,
        number: int = 0,
    ) -> None:
        """Opens a session.

        Args:
            params: the parameters.
            model: the model.
            layout: the layout of micro-turns.
            stream: the engine's limits, and how words are chosen.
            tokenizer: the tokenizer.
            number: of the session, by which it draws words and sound.

        Raises:
            ValueError: the vocoder's program cannot be read.
        """
        # Committed from the start: a state that comes back placed otherwise would compile again.
        self._params = place_params(params, model, stream)
        self._model, self._layout, self._stream = model, layout, stream
        self._tokenizer = tokenizer
        self._step = _compiled_step(model, layout, stream)
        self._number = number
        self._state = self._first_state()
        self._voice = OwnVoice(model, layout.own_positions_per_turn) if model.has_voice else None
        self._audio_state = audio.init_state(model.audio)
        self._sight, self._sight_s = Sight(model.video, layout.clock), 0.0
        self._reader = OutputReader(layout, tokenizer)
        self._waiting: dict[Stream, list[int]] = {}
        self._buffer = np.zeros(0, np.float32)
        self._heard: list[np.ndarray] = []
        self._events: list[TextEvent] = []
        self._num_positions = 0
        self._warm_up()

    @property
    def clock(self) -> Clock:
        """The clock of its micro-turns."""
        return self._layout.clock

    @property
    def num_compilations(self) -> int:
        """Programs compiled for the step; 1, however long the session and however many of the same model."""
        return self._step._cache_size()  # type: ignore[attr-defined]

    def _first_state(self) -> engine.StreamState:
        state = engine.init_state(self._model, self._layout, self._stream, num_slots=1, numbers=[self._number])
        return engine.place_state(state, self._model, self._stream)

    def _warm_up(self) -> None:
        """Compiles the step on a turn of silence, and forgets it."""
        silence = np.zeros(self._layout.clock.turn_samples, np.float32)
        _, levels_TM = audio.push(self._audio_state, silence, self._model.audio)
        self._state, outputs = self._step(self._params, self._state, self._inputs(levels_TM, [], self._sight.take(0)))
        jax.block_until_ready(outputs)
        self._state = self._first_state()
        if self._voice is not None:
            self._voice.warm_up()

    def type_text(self, text: str, stream: Stream = Stream.USER_TEXT) -> None:
        """Puts text on an input stream; it goes in with the next turns."""
        self._waiting.setdefault(stream, []).extend(self._tokenizer.encode(text))
        start = len(self._heard) * self._layout.clock.turn_samples
        self._events.append(TextEvent(stream=stream, start=start, end=start, text=text))

    def waits(self, stream: Stream) -> bool:
        """Whether text on an input stream is still to go in."""
        return bool(self._waiting.get(stream))

    def drop_waiting(self, stream: Stream) -> str:
        """Takes back what waits to go in on an input stream, as if it had not been typed; returns its text."""
        waiting = self._waiting.pop(stream, [])
        self._events = list(self._texts_without({stream: len(waiting)}))
        return self._tokenizer.decode(waiting)

    def show(self, picture: bytes) -> None:
        """Shows an encoded picture (PNG or JPEG) at the sample up to which sound has come.

        Raises:
            ValueError: it cannot be decoded, or is more than a turn can hold (`Sight.show`).
        """
        heard = len(self._heard) * self._layout.clock.turn_samples + len(self._buffer)
        begun = time.perf_counter()
        self._sight.show(VideoFrame(sample=heard, data=picture))
        self._sight_s += time.perf_counter() - begun

    def push(self, samples: np.ndarray) -> list[TurnResult]:
        """Takes sound (float32 [n], at the model's rate) and runs every turn that it completes.

        Raises:
            ValueError: a sample is not finite; none of the samples was taken.
            SessionFullError: the session has outgrown `stream.max_positions`; the sound of the turn
                that found no room waits.
        """
        if not np.isfinite(samples).all():
            raise ValueError("the sound holds samples that are NaN or infinite")
        self._buffer = np.concatenate([self._buffer, samples])
        turn_samples = self._layout.clock.turn_samples
        results: list[TurnResult] = []
        while len(self._buffer) >= turn_samples:
            self._check_room(results)
            heard, self._buffer = self._buffer[:turn_samples], self._buffer[turn_samples:]
            results.append(self._run_turn(heard))
        return results

    def _check_room(self, results: list[TurnResult]) -> None:
        layout, most = self._layout, self._stream.max_positions
        if self._num_positions + layout.max_slots_in + layout.max_slots_out > most:
            raise SessionFullError(
                f"the session holds {self._num_positions} positions after {len(self._heard)} turns, and one more turn "
                f"may pass stream.max_positions = {most}; raise it or start a new session",
                results,
            )

    def _run_turn(self, heard: np.ndarray) -> TurnResult:
        begun = time.perf_counter()
        self._audio_state, levels_TM = audio.push(self._audio_state, heard, self._model.audio)
        tiles_P = self._sight.take((len(self._heard) + 1) * self._layout.clock.turn_samples)
        inputs = self._inputs(levels_TM, self._layout.text_in_chunk(self._waiting), tiles_P)
        self._state, outputs = self._step(self._params, self._state, inputs)
        count = int(outputs.counts_B[0])
        said = self._reader.read(np.asarray(outputs.tokens_BO)[0, :count].tolist())
        sound, mels = None, None
        if self._voice is not None:
            assert outputs.own is not None
            if outputs.own.speaks_B[0]:
                mels = np.asarray(outputs.own.mels_BTY)[0]
            sound = self._voice.say(mels)
        compute_s, self._sight_s = time.perf_counter() - begun + self._sight_s, 0.0
        self._num_positions = int(np.asarray(self._state.decode.num_positions_B)[0])
        self._heard.append(steps_of(heard))
        self._remember(said)
        return TurnResult(said=said, compute_s=compute_s, sound=sound, mels=mels)

    def _inputs(self, levels_TM: np.ndarray, text_in: list[int], tiles_P: np.ndarray) -> TurnInputs:
        contents = TurnContents(
            num_turns=1,
            tile_turns=np.zeros(len(tiles_P), np.int32),
            text_in=np.array([(0, token) for token in text_in], np.int32).reshape(-1, 2),
            out=NO_OUTPUT,
        )
        turns = turn_inputs(self._layout, contents, levels_TM, tiles_P, self._model)
        return jax.tree.map(lambda leaf: leaf[0], turns)

    def _remember(self, said: Said) -> None:
        start = (said.turn + 1) * self._layout.clock.turn_samples
        span = {"start": start, "end": start + self._layout.clock.turn_samples}
        if said.text.strip():
            self._events.append(TextEvent(stream=Stream.OWN_TEXT, text=said.text.strip(), **span))
        self._events += [TextEvent(stream=Stream.ACTION, text=action, **span) for action in said.actions]

    def recording(self) -> Recording:
        """The session so far; cheap, so that it can be taken between two turns."""
        return Recording(
            clock=self._layout.clock,
            heard=tuple(self._heard),
            texts=tuple(self._events),
            frames=tuple(self._sight.frames),
            voice=None if self._voice is None else self._voice.so_far(),
        )

    def record(self, session_id: str, meta: Mapping[str, str] | None = None) -> Session:
        """The session so far, as a Session (`Recording.session`); text for which its turns have no room is left out."""
        return replace(self.recording(), texts=self._texts_that_fit()).session(session_id, meta)

    def _texts_that_fit(self) -> tuple[TextEvent, ...]:
        """The events, without text that would still wait after the silent turns at the end of a record."""
        left_over = {stream: list(tokens) for stream, tokens in self._waiting.items()}
        for _ in range(SILENT_TURNS):
            self._layout.text_in_chunk(left_over)
        return self._texts_without({stream: len(tokens) for stream, tokens in left_over.items()})

    def _texts_without(self, waiting: dict[Stream, int]) -> tuple[TextEvent, ...]:
        """The events without the last tokens of each stream, so many as wait; `waiting` ends with none."""
        read: list[TextEvent] = []
        for event in reversed(self._events):
            if left := waiting.get(event.stream):
                tokens = self._tokenizer.encode(event.text)
                waiting[event.stream] = max(0, left - len(tokens))
                # A character that is not there whole is left out: what stands for its bytes would be more of them.
                text = self._tokenizer.decode(tokens[: max(0, len(tokens) - left)]).rstrip("\ufffd")
                read += [replace(event, text=text)] if text else []
            else:
                read.append(event)
        return tuple(reversed(read))
