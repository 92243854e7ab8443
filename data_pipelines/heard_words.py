"""The user's words as targets: in training, an audio position can be asked which word has just ended.

What is heard has to be told apart before it can be answered, and a request of six words has one answer. With a
target for every word a small model learns to hear several times sooner (BUILD_NOTES.md, "Heard words"). Nothing is
emitted at these positions, and nothing changes in what the model sees.
"""

import itertools
from dataclasses import replace

import numpy as np

from tml.microturn import Clock, EncodedSession, Kind, Segment, Target
from tml.session import Stream


def with_heard_words(segment: Segment, encoded: EncodedSession, clock: Clock) -> Segment:
    """The segment, with targets of kind HEARD where the words of `user_audio` end.

    A word's first token is the target of the audio position during which the word ends, or of the next free one;
    the others follow in the next free ones. The last audio position of a turn is never free: what is due there is
    the turn's output. Tokens for which the session has no position left have none.
    """
    words = [event for event in encoded.texts if event.stream is Stream.USER_AUDIO]
    tokens = np.array([*itertools.chain(*(word.tokens for word in words))], np.int32)
    frames = clock.frames_per_turn
    free = frames - 1
    if not len(tokens) or not free:
        return segment
    ends = np.array([word.start for word in words], np.int64)
    frame = np.maximum(-(-ends // clock.hop_samples) - 1, 0)
    # The last frame of a turn counts as the first free place of the next one.
    own_places = np.repeat(frame // frames * free + frame % frames, [len(word.tokens) for word in words])
    order = np.arange(len(tokens))
    places = np.maximum.accumulate(own_places - order) + order
    places = places // free * frames + places % free
    audio = np.flatnonzero(segment.kinds == Kind.AUDIO)
    fits = places < len(audio)
    targets, target_kinds = segment.targets.copy(), segment.target_kinds.copy()
    here = audio[places[fits]]
    assert (target_kinds[here] == Target.NONE).all(), "these positions have no output to predict"
    targets[here], target_kinds[here] = tokens[fits], Target.HEARD
    return replace(segment, targets=targets, target_kinds=target_kinds)
