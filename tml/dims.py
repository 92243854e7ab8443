"""The one key of dimension letters, used in parameter axes, array-name suffixes and jaxtyping shapes.

An array name inside model code carries the letters of its axes as a suffix: `x_BSD` has
axes rows, query slots and model. Lower case letters mean one shard's part of an axis.
"""

DIMS: dict[str, str] = {
    "B": "rows",
    "S": "query slots",
    "T": "key slots",
    "U": "micro-turns",
    "W": "slots per micro-turn",
    "D": "model",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head",
    "H": "head",
    "F": "feed-forward hidden",
    "E": "experts",
    "A": "shared experts",
    "Z": "the gate and up halves of a gated MLP",
    "C": "capacity: rows of the padded expert buffer, or blocks of it",
    "R": "routed copies of tokens",
    "L": "layers in a scanned stack",
    "V": "vocabulary",
    "M": "mel channels",
    "Q": "quantisation levels",
    "J": "rank of the relative-position projection",
    "X": "extent: distances the relative bias covers",
    "P": "image tiles, or own audio positions, in a row",
    "I": "input width of a fold or of a projection",
    "O": "output width of a fold",
    "Y": "taps of a short convolution, or mel values of an own audio position",
}
