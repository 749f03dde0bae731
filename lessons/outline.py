"""The whole course, so that the index can show what is still to come. A lesson's own file takes over once it exists."""

from __future__ import annotations

from lessons import all_lessons
from lessons.lesson import PARTS, Lesson

# (order, slug, title, question), part by part as in PARTS
_PLAN: tuple[tuple[tuple[int, str, str, str], ...], ...] = (
    (
        (1, "decode", "One token at a time", "Why does a language model reread everything to say one more word?"),
        (2, "roofline", "Waiting for memory", "Is the machine busy computing, or waiting?"),
    ),
    (
        (3, "heads", "Many readers, fewer notebooks", "Do all heads need their own keys and values?"),
        (4, "layers-share", "The cache above and below", "If heads can share, can layers?"),
        (5, "latent", "Remember a sketch, redraw the rest", "Can the cache hold a compressed note?"),
        (6, "windows", "Look near, look far", "Which cells of the matrix can you leave out?"),
        (7, "linear", "One matrix instead of a growing list", "What if softmax goes away?"),
        (8, "ssm", "Memory that chooses", "Can a fixed-size memory know what to keep?"),
        (9, "titans", "Learning while reading", "Can a memory keep training at test time?"),
    ),
    (
        (10, "flash", "Never write the matrix down", "How can attention be exact without ever holding the n² matrix?"),
        (11, "ring", "Pass the keys around", "What if the sequence does not fit on one device?"),
    ),
    (
        (12, "sinks", "The tokens nobody reads but everybody needs", "Why does forgetting the first token break it?"),
        (13, "heavy-hitters", "Keep what was looked at", "If you may keep only k tokens, which?"),
        (14, "paged", "A page table for thoughts", "How do many conversations share one memory without waste?"),
        (15, "kv-bits", "Fewer bits for the cache", "How few bits can a memory have?"),
        (16, "rhythm", "Planning and anchoring", "Does attention have a rhythm?"),
    ),
    (
        (17, "number-formats", "What a number costs", "What is inside 16 bits?"),
        (18, "quantise", "Snapping to a grid", "How do you store a matrix in two bits?"),
        (19, "outliers", "The few that spoil the scale", "Why do a handful of channels ruin everything?"),
        (20, "qat", "Learn with the grid on", "What if the model trains knowing it will be rounded?"),
    ),
    (
        (21, "prune", "Cutting connections", "What can be removed, and does the hardware care?"),
        (22, "contextual", "Only what this token needs", "Do all neurons matter for every token?"),
        (23, "experts", "Calling only two of eight", "How can a model be large and cheap at once?"),
        (24, "offload", "Experts on the shelf", "What if the experts don't fit?"),
    ),
    ((25, "speculate", "Guess, then check", "How does a small model speed up a big one without changing its words?"),),
    (
        (26, "lora", "A small key for a big lock", "How little must be trained to teach a new habit?"),
        (27, "distil", "Learning from the teacher's doubts", "Why do soft answers teach more than right answers?"),
        (28, "search", "Letting the hardware choose", "Which shape is best for this machine?"),
    ),
    ((29, "build", "Your own lean model", "How far can you go before it breaks?"),),
)


def course() -> list[tuple[str, list[tuple[int, str, str, str, Lesson | None]]]]:
    """Part by part: (order, slug, title, question, the lesson or None while it is still to come)."""
    made = all_lessons()
    parts = []
    for part, planned in zip(PARTS, _PLAN, strict=True):
        rows = []
        for order, slug, title, question in planned:
            lesson = made.get(slug)
            title, question = (lesson.title, lesson.question) if lesson else (title, question)
            rows.append((order, slug, title, question, lesson))
        parts.append((part, rows))
    return parts
