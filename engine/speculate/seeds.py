"""The seed prompts of the draft model's training texts: short asks and openings of ours, times topics.

SmolLM2 writes on from them (`engine.speculate.draft.make_data`); nothing here is copied from a data set.
"""

from __future__ import annotations

import random

TOPICS = (
    "bread", "the moon", "a bicycle", "volcanoes", "honey bees", "a rainy day", "chess", "the ocean",
    "a small village", "coffee", "trains", "winter", "a lighthouse", "music", "the human heart", "a garden",
    "whales", "photosynthesis", "gravity", "the Roman Empire", "a lost key", "friendship", "robots", "magnets",
    "rice", "a thunderstorm", "libraries", "the printing press", "penguins", "maps", "dreams", "electric cars",
    "salt", "vaccines", "a dragon", "money", "sleep", "earthquakes", "tea", "a school play", "rivers", "glass",
    "the alphabet", "forests", "batteries", "a detective", "running", "languages", "a wooden boat", "dinosaurs",
    "time zones", "potatoes", "the stars", "a grandmother", "computers", "snow", "ants", "bridges",
    "a king and his cook", "clouds", "yoga", "soap", "cities", "the desert", "a talking cat", "numbers", "plastic",
    "football", "butterflies", "news", "a long journey", "cheese", "the wind", "teachers", "paper",
    "a broken clock", "spiders", "teamwork", "deserts", "solar power", "a new neighbour", "fractions", "apples",
    "memory", "castles", "the internet", "dogs", "a secret door", "light", "steam engines", "kindness", "oil",
    "elections", "birds", "a painter", "sugar", "mountains", "a market", "clocks", "recycling", "cells", "wolves",
    "cooking pasta", "stress", "a birthday", "tides", "poems",
)  # fmt: skip
ASKS = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Give me five facts about {}.",
    "Why does {} matter?",
    "How would you describe {}?",
    "List three good and three bad things about {}.",
    "Write a letter to a friend about {}.",
    "What should a beginner know about {}?",
    "Write a dialogue between two people about {}.",
    "Summarize what people know about {} in two sentences.",
    "Give step by step instructions that have to do with {}.",
    "What is the history of {}?",
    "Write a Python function that has to do with {}.",
    "How can I learn more about {}?",
    "What is the difference between {} and {}?",
    "Compare {} with {}.",
    "Invent a product that has to do with {}, and advertise it.",
)
OPENINGS = (
    "Once upon a time there was {}, and",
    "The most important thing about {} is",
    "In this article we look at {}.",
    "Everybody knows something about {}. What few people know is that",
    "The history of {} begins",
    "She had never thought much about {} until",
    "Scientists who study {} have found",
    "Here is a simple guide to {}:\n\n1.",
    "Question: What is {}?\nAnswer:",
    "The capital of France is Paris. A fact about {}:",
    "Chapter 1. {}\n\n",
    "Dear Anna,\n\nI am writing to you because of {}.",
)


def chat(ask: str) -> str:
    """A question as SmolLM2 was taught to see it, up to where its answer begins."""
    return f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"


def seeds(count: int, *, seed: int) -> list[str]:
    """`count` different prompts, two of three in chat form."""
    dice = random.Random(seed)
    every = [chat(ask.format(a, b)) for ask in ASKS for a, b in zip(TOPICS, TOPICS[7:] + TOPICS[:7], strict=True)]
    plain = [opening.format(topic) for opening in OPENINGS for topic in TOPICS]
    if not 1 <= count <= len(every) + len(plain):
        raise ValueError(f"count must be from 1 to {len(every) + len(plain)} prompts, not {count}")
    dice.shuffle(every)
    dice.shuffle(plain)
    return [plain.pop() if (i % 3 == 2 and plain) or not every else every.pop() for i in range(count)]
