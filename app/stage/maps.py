"""Writes maps.js, the colour tables of the stage: `python -m app.stage.maps`.

Perceptually uniform and safe for colour-blind eyes: cividis, and Peter Kovesi's CET-CBL2 and CET-CBD1 (colorcet).
The ramps of the roles (attention, query, key, value) are computed in colours.js from the page's own colours.
"""

from pathlib import Path

HEADER = "// Made by `python -m app.stage.maps`; 256 colours each, six hexadecimal digits a colour.\n"


def text() -> str:
    import colorcet
    from bokeh.palettes import Cividis256

    tables = {
        "CIVIDIS": Cividis256,
        "LINEAR": colorcet.palette["CET_CBL2"],
        "DIVERGING": colorcet.palette["CET_CBD1"],
    }
    lines = [
        f'export const {name} =\n  "{"".join(c.lstrip("#").lower() for c in table)}";' for name, table in tables.items()
    ]
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("maps.js").write_text(text())
