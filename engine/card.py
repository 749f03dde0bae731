"""The zoo's card: what its models were trained on, what each can do and what it can't, from the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """# The zoo

Tiny models trained on Toyland, a made-up world with a small grammar (`engine/toyland/`). The texts are generated from
seeds, follow no corpus and are free of licences; the true probability of every word is known, so that a model's
perplexity has an exact floor. All figures are measured on texts that no training step has seen, as long as the longest
that the model was trained on, with the weights as they are stored (float16).

`leanscope train NAME` makes a model again from its seed, `leanscope train --all` all of them; what was stopped goes on
where it was. This card is written from `manifest.json` by the same command: do not edit it.
"""

KINDS = {
    "few": "lists of a few pairs",
    "many": "lists of many pairs",
    "home": "who and what is where in a story",
    "secret": "a code told far back",
}
GOOD, POOR = 0.9, 0.5


def card(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole card, as Markdown."""
    parts = [HEAD]
    for title, names in (
        ("The main list", [n for n in entries if not n.startswith(("recall-", "qat"))]),
        ("Trained on with a grid (QAT)", [n for n in entries if n.startswith("qat")]),
        ("The recall series: lists of pairs, and nothing else", [n for n in entries if n.startswith("recall-")]),
    ):
        if names:
            parts.append(f"## {title}\n\n{table({name: entries[name] for name in names})}")
    parts.append("## What they can do, and what they can't\n\n" + "\n".join(verdicts(entries)) + "\n")
    return "\n".join(parts)


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a model."""
    lines = [
        "| model | what it is | parameters | steps | perplexity (floor) | above the floor | recall | minutes, on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, e in entries.items():
        perplexity, floor = e["perplexity"], e["floor"]
        cells = [
            f"`{name}`",
            e["about"],
            f"{e['parameters']:,}",
            f"{e['steps']:,}",
            f"{perplexity:.2f} ({floor:.2f})",
            f"{perplexity / floor - 1:+.1%}",
            f"{e['recall']:.1%}",
            f"{e['seconds'] / 60:.0f}, {e['device']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdicts(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence or two a model: what it answers nearly always, and what it mostly gets wrong."""
    lines = []
    for name, e in entries.items():
        if name.startswith("recall-"):
            continue
        known = {kind: e[f"recall_{kind}"] for kind in KINDS if f"recall_{kind}" in e}
        says = [
            f"{word} {', '.join(f'{KINDS[k]} ({known[k]:.0%})' for k in kinds)}"
            for word, kinds in (
                ("right about", [k for k, v in known.items() if v >= GOOD]),
                ("often wrong about", [k for k, v in known.items() if POOR <= v < GOOD]),
                ("mostly wrong about", [k for k, v in known.items() if v < POOR]),
            )
            if kinds
        ]
        lines.append(f"- `{name}`: {'; '.join(says)}.")
    lines.append("- None knows a word outside Toyland's 256.")
    return lines
