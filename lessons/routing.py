"""Small mixtures of experts that lessons train: how even their calls become, whom a text calls, who likes what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from engine.generate import checked_ids
from engine.model import Decoder
from engine.moe.experts import Experts
from engine.moe.router import Router
from engine.moe.usage import calls, counted, evenness, favourites, told_by
from engine.recipes import Recipe, Stage, surprise
from engine.recording import labelled, newest, note, record, site, tap
from engine.toyland import Grammar, Tokenizer, batch
from engine.train import train
from engine.zoo import SMALL
from lessons.models import name_ids

COUNT = 8  # experts
SHAPE = replace(SMALL, ffn_width=64)  # of one expert
ROWS, LENGTH, RATE, SEED = 16, 48, 3e-3, 0  # of the training on the page
TOP = 8  # favourite words of an expert
RIVER = site("experts.river", "the share of a training step’s tokens that call each expert", grows="when",
             low=0.0, high=1.0)  # fmt: skip
EVEN = site("experts.even", "how even the calls are: 1 alike, 0 all on one", low=0.0, high=1.0)
AT = site("experts.at", "the training step")
SENT = site("experts.sent", "the weight of each expert in a token’s answer; 0: not called, or full", symbol="g",
            grows="token", low=0.0, high=1.0)  # fmt: skip
ODDS = site("experts.odds", "how likely the router finds each expert", symbol="p", grows="token", low=0.0, high=1.0)
LOST = site("experts.lost", "what became of each token: 1 served, 2 an expert that it asked for was full")
DROPS = site("experts.drops", "tokens so far whose expert was full", low=0.0)
LIKES = site("experts.likes", "of all calls of a word, the share that goes to this expert", low=0.0, high=1.0)
LIKED = site("experts.liked", "the words that call an expert most surely, by their ids")
CALLED = site("experts.called", "the share of a text’s tokens that call each expert", low=0.0, high=1.0)


def grown(design: str, route: Router, *, balance: float, steps: int, shared: int = 0) -> Any:
    """A decoder of experts, trained before the learner's eyes."""
    model = Decoder(
        SHAPE, seed=SEED,
        ffn=lambda layer: Experts(SHAPE, layer, count=COUNT, route=route, shared=shared, balance=balance),
    )  # fmt: skip

    def loss(now: Any, ids: Any, at: int) -> Any:
        tap(AT, at, "")
        found = surprise(now, ids, at)
        for layer in range(SHAPE.layers):
            load = newest("moe.load", design=design, layer=layer)
            if load is not None:
                share = load / max(1.0, load.sum())
                tap(RIVER, share[None].astype(np.float32), "when expert", layer=layer)
                tap(EVEN, float(evenness(now.embed.weight.new_tensor(load))), "", layer=layer)
        return found

    recipe = Recipe(lambda _: model, design, stages=(Stage(steps, ROWS, LENGTH),), rate=RATE, warmup=20,
                    seed=SEED, loss=loss)  # fmt: skip
    with labelled(design=design):
        train(model, recipe)
    return model


def favourite_words(design: str, model: Any) -> None:
    """What each expert of a trained model likes to read, on texts that it was not trained on."""
    test = batch(Grammar(), seed=0, step=0, rows=48, length=96, stream="test").ids
    words = Tokenizer().words
    told = []
    for layer, called in calls(model, test).items():
        table = counted(called, test, classes=len(words))
        told.append({"told": told_by(table), "even": float(evenness(called.sum(0)))})
        note(**{f"{design}_{layer}_load": [float(x) for x in (called.sum(0) / called.sum())]})
        for expert, best in enumerate(favourites(table, words, top=TOP)):
            shares = np.zeros(TOP, np.float32)
            ids = np.zeros(TOP, np.int32)
            for i, word in enumerate(best):
                shares[i], ids[i] = word.share, words.index(word.word)
            where: dict[str, Any] = {"design": design, "layer": layer, "expert": expert}
            tap(LIKES, shares, "word", **where)
            tap(LIKED, ids, "word", **where)
            name_ids(Tokenizer(), ids)
    note(**{design: told})


def routed(model: Any, ids: list[int], route: Router) -> dict[int, dict[str, np.ndarray]]:
    """Whom a text calls, with as many places as an expert has."""
    for block in model.blocks:
        block.ffn.route = route
    names = {"moe.gate": "gate", "moe.probability": "odds", "moe.dropped": "dropped", "moe.chosen": "chosen"}
    with record(keep={name: {} for name in names}) as seen:
        model(checked_ids(ids, SHAPE.vocab)[None])
    found: dict[int, dict[str, np.ndarray]] = {}
    for track in seen.freeze().tracks:
        rows = np.concatenate([chunk.array for chunk in track.chunks])
        found.setdefault(int(track.index["layer"]), {})[names[track.name]] = rows
    return found
