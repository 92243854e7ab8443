"""The words of the behaviours: what is asked, what is answered, and how a request may be worded.

Few words, most of them shared by several behaviours, so that a small model can learn them all.
"""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")

SAYABLE = (*DIGITS, *COLOURS)
"""What the user may ask to have said."""

TIMED_WORDS = (*COLOURS, "go", "now")
SECONDS = ("two", "three", "four", "five")
"""Delays, in the user's words; a word stands for its place in `DIGITS`."""

CUES: dict[str, str] = {
    "apple": "chapel",
    "window": "winter",
    "river": "liver",
    "paper": "pepper",
    "monkey": "money",
    "garden": "pardon",
}
"""Words that may become cues, each with one that sounds nearly like it."""

FILLERS = ("table", "music", "summer", "candle")
"""Words that are never cues."""

SPANISH = {"one": "uno", "two": "dos", "three": "tres", "four": "cuatro", "five": "cinco"}

STORY_OPENERS = ("let me tell you a story", "listen to my story")
STORY_SUBJECTS = ("my sister", "we", "the children", "our friends")
STORY_ENDS = ("went home", "had some bread", "slept well", "came by train")

OWN_NOD = "okay"
USER_NODS = ("right", "yes", "good")
STOPPERS = ("stop", "wait")

PITCH_PHRASES = ("you are here", "you are late", "you are home")
NEW_PITCH_PHRASES = ("you are well",)
RATE_PHRASES = ("tell me more", "tell me now", "tell me this")
NEW_RATE_PHRASES = ("tell me all",)
"""Phrases that are said in two ways; the new ones only occur where wordings are held out."""

LOOK_UPS = ("bread", "coffee", "paper", "music")
SUBJECTS = ("price", "number")
"""What only the background model knows: a digit for each (subject, thing), another one every time."""

WAITING = ("let me see", "one moment")
"""What the model says, in turn, until a result is there."""

CANCELS = ("never mind", "forget it")

AFFIXES = (("", ""), ("please", ""), ("", "please"), ("can you", ""), ("now", ""))
NEW_AFFIXES = (("can you", "please"), ("now", "please"), ("please can you", ""))
"""(Before, behind) a request; the new ones only occur where wordings are held out. All their words train."""


def own_words() -> tuple[str, ...]:
    """Every word that the model may have to say, sorted."""
    said = {
        *DIGITS,
        *COLOURS,
        *TIMED_WORDS,
        *SPANISH.values(),
        OWN_NOD,
        "yes",
        "no",
        "fast",
        "slow",
        "sorry",
        "it",
        "is",
    }
    return tuple(sorted(said | {word for phrase in WAITING for word in phrase.split()}))
