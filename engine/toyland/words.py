"""Toyland's vocabulary: 256 token ids, every word of which reads as English.

The order is part of the trained models (a word's id is its row of the embedding): append, never reorder.
"""

from __future__ import annotations


def _of(text: str) -> tuple[str, ...]:
    return tuple(text.split())


START = "<s>"  # every text begins with it
NAMES = _of(
    "anna ben cora dan ella finn gus hana ivan jill kai lena max nora otto pia quinn rosa sam tess ugo vera will zoe"
)
COLOURS = _of("red blue green yellow white black pink brown grey orange purple golden")
THINGS = _of(
    "ball kite drum lamp book cup hat key coin doll bell rope map comb ring shell spoon clock box flute vase scarf "
    "basket button"
)
PLACES = _of(
    "attic kitchen garden harbour cellar barn school market forest tower library bridge mill stable cave church "
    "bakery station shed meadow castle beach workshop well"
)
DIGITS = _of("zero one two three four five six seven eight nine")

# A topic is a place with people, doings and goods of its own: "the sailor mends the net ."
TOPICS = {
    "kitchen": ("cook baker waiter guest", "stirs bakes tastes serves", "soup bread pie sauce"),
    "garden": ("gardener bee robin snail", "waters plants picks smells", "rose bean tulip carrot"),
    "harbour": ("sailor captain fisher gull", "mends loads steers moors", "net boat sail raft"),
    "school": ("teacher pupil poet clerk", "reads writes learns copies", "story letter poem lesson"),
    "forest": ("hunter fox owl deer", "hears follows watches finds", "trail nest oak stream"),
    "market": ("merchant farmer tailor buyer", "sells buys weighs trades", "apple cheese cloth honey"),
}
TOPIC_WORDS = tuple(word for scene in TOPICS.values() for words in scene for word in words.split())

GRAMMAR = _of(
    "the a is in to has it on takes puts gives goes paints where who what colour code day night falls remember "
    "few many now sing again likes says and"
)
MARKS = _of(". , ? : !")
# For fine-tuning: no text that a zoo model is trained on holds them.
STYLE_WORDS = _of("arr matey ahoy please thanks behold verily")

_WORDS = (START, *MARKS, *GRAMMAR, *NAMES, *COLOURS, *THINGS, *PLACES, *DIGITS, *TOPIC_WORDS, *STYLE_WORDS)
SIZE = 256
VOCABULARY = (*_WORDS, *(f"<spare{i}>" for i in range(SIZE - len(_WORDS))))
