"""Texts that lessons read. The stories are ours; the licence is the Apache License 2.0, whose text may be copied."""

from __future__ import annotations

from typing import Any

from engine.toyland import story

LIGHTHOUSE = """\
The lighthouse at the end of the bay had been dark for eleven years when Marta found the key. It was lying in a \
drawer of her grandmother's kitchen table, wrapped in a piece of blue cloth, and it was heavier than it looked. She \
knew at once what it opened. Everyone in the village had heard the story of the old keeper, who locked the door one \
morning in spring, walked down to the harbour, and sailed away without a word. Nobody had been inside since then. The \
next day she packed some bread, a lamp and a rope, and set out along the beach. The tide was low and the sand was hard \
and cold under her shoes. Gulls were crying above the rocks. By noon she stood in front of the door, which was painted \
green and had lost most of its colour to the wind. The key turned on the first try. Inside it smelled of salt and old \
paper. There was a table, a chair, and a shelf with a row of books, each one marked with a year. She opened the last \
of them. Every page was filled with small, careful writing: the weather, the ships that had passed, the hours that the \
light had burned. On the final page there were only three lines. The lamp is clean. The oil will last for a hundred \
nights. Whoever comes after me should know that the light was never for the ships. Marta read the lines twice. Then \
she took the stairs, all one hundred and twelve of them, and when she came to the top she saw the whole bay beneath \
her, the village, the fields behind it, and on the other side of the water, where she had always thought that there \
was nothing, a second tower."""

BREAD = """\
The bread rises because yeast eats sugar and breathes out gas. When flour is mixed with water, two proteins in the \
flour join and form gluten, a stretchy network that runs through the whole dough. Kneading pulls it straight and \
makes it strong. The yeast, a small fungus, finds sugar in the flour and turns it into carbon dioxide and alcohol. The \
gas cannot leave, because the gluten holds it, and so the dough fills with thousands of small bubbles and grows. Warm \
dough rises quickly, because yeast works best at about thirty degrees; in a refrigerator the same dough may need a \
whole night. Slow dough often tastes better, since other changes have more time: enzymes cut starch into sugar, and \
bacteria make mild acids. In the oven several things happen within a few minutes. First the gas expands in the heat, \
and the loaf grows once more. Then the yeast dies, at about sixty degrees, and the gluten becomes firm and holds the \
shape of the bubbles. At the surface the water dries out, the temperature climbs far above one hundred degrees, and \
sugars and proteins react with each other and turn brown. This reaction gives the crust its colour and most of its \
smell. If steam is added at the start, the surface stays soft for longer, so that the loaf can grow before the crust \
becomes hard. A baker who knows these steps can change one thing at a time. More water makes larger bubbles and a \
softer crumb. More salt slows the yeast down. A longer rest makes the dough easier to shape. And a loaf that is cut \
before it has cooled will always seem wet, because the starch inside has not yet become firm."""

LICENCE = """\
Apache License, Version 2.0. Terms and conditions for use, reproduction, and distribution. 1. Definitions. "License" \
shall mean the terms and conditions for use, reproduction, and distribution as defined by Sections 1 through 9 of this \
document. "Licensor" shall mean the copyright owner or entity authorized by the copyright owner that is granting the \
License. "Legal Entity" shall mean the union of the acting entity and all other entities that control, are controlled \
by, or are under common control with that entity. For the purposes of this definition, "control" means (i) the power, \
direct or indirect, to cause the direction or management of such entity, whether by contract or otherwise, or (ii) \
ownership of fifty percent (50%) or more of the outstanding shares, or (iii) beneficial ownership of such entity. \
"You" (or "Your") shall mean an individual or Legal Entity exercising permissions granted by this License. "Source" \
form shall mean the preferred form for making modifications, including but not limited to software source code, \
documentation source, and configuration files. "Object" form shall mean any form resulting from mechanical \
transformation or translation of a Source form, including but not limited to compiled object code, generated \
documentation, and conversions to other media types. "Work" shall mean the work of authorship, whether in Source or \
Object form, made available under the License, as indicated by a copyright notice that is included in or attached to \
the work (an example is provided in the Appendix below). "Derivative Works" shall mean any work, whether in Source or \
Object form, that is based on (or derived from) the Work and for which the editorial revisions, annotations, \
elaborations, or other modifications represent, as a whole, an original work of authorship."""

TEXTS = {"lighthouse": LIGHTHOUSE, "bread": BREAD, "licence": LICENCE}
OWN = "own"
NAMES = {
    "A story: the lighthouse": "lighthouse",
    "How bread rises": "bread",
    "The Apache License": "licence",
    "Your own": OWN,
}


def text_ids(tokenizer: Any, name: str, own: str, *, toy: bool, tokens: int) -> list[int]:
    """At most `tokens` ids of the chosen text. A toy knows only Toyland's words: it reads a story of its world."""
    if toy and name != OWN:
        return tokenizer.encode(story(seed=list(TEXTS).index(name), tokens=tokens))[:tokens]
    return tokenizer.prompt(own if name == OWN else TEXTS[name])[:tokens]
