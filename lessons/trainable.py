"""How much the methods of lesson lora train, from published shapes, and what their papers report."""

from __future__ import annotations

from engine import cost
from engine.recording import Recording
from lessons.lesson import Finding, Verdict
from lessons.views import Sheet

# fmt: off
GLUE = (
    ("All weights", "125.0M", "87.6", "94.8", "78.7", "86.4"),
    ("BitFit", "0.1M", "84.7", "93.7", "81.5", "85.2"),
    ("Adapters", "0.9M", "87.3", "94.7", "75.9", "85.4"),
    ("LoRA", "0.3M", "87.5", "95.1", "86.6", "87.2"),
)
# fmt: on


def bitfit_share(recording: Recording) -> Finding:
    e = cost.ENCODERS["bert-large"]
    some, whole = cost.bitfit_parameters(e), sum(cost.encoder_parameters(e).values())
    agrees = f"{some / whole:.2%}" == "0.08%"
    return Finding(f"{some / whole:.2%}", *_verdict(agrees), formula=f"{some:,} / {whole:,}")


def adapter_share(recording: Recording) -> Finding:
    (_, low), (_, mean) = _adapters()
    agrees = (f"{low:.1%}", f"{mean:.1%}") == ("2.1%", "3.6%")
    why = "Of the layers alone. 3.6% is a mean over tasks: widths 8, 64 and 256, here equally often."
    filled = "24 · 2 · (2m·1024 + m + 1024) + norms"
    return Finding(f"{low:.1%} to {mean:.1%}", *_verdict(agrees, why), formula=filled)


def lora_count(recording: Recording) -> Finding:
    found = [_lora_of(name) for name in ("roberta-base", "roberta-large")]
    agrees = [f"{n / 1e6:.1f}M" for n in found] == ["0.3M", "0.8M"]
    filled = "2 · 12 · 8 · (768 + 768) and 2 · 24 · 8 · (1024 + 1024)"
    return Finding(" and ".join(f"{n:,}" for n in found), *_verdict(agrees), formula=filled)


def _verdict(agrees: bool, why: str = "") -> tuple[Verdict, str]:
    return ("agrees", why) if agrees else ("differs", why or "The shapes give something else.")


def _lora_of(name: str) -> int:
    e = cost.ENCODERS[name]
    return cost.lora_parameters(e.width, e.width, rank=8, matrices=2 * e.layers)


def _adapters() -> list[tuple[float, float]]:
    """Parameters and share of BERT-large's layers: of width 64, and the mean over three widths."""
    e = cost.ENCODERS["bert-large"]
    counts = [cost.adapter_parameters(e.width, layers=e.layers, bottleneck=m) for m in (64, 8, 256)]
    layers = cost.encoder_parameters(e)["layers"]
    return [(n, n / layers) for n in (float(counts[0]), sum(counts) / len(counts))]


def _rows() -> tuple[tuple[str, ...], ...]:
    bert = cost.ENCODERS["bert-large"]
    biases = cost.bitfit_parameters(bert)
    share = biases / sum(cost.encoder_parameters(bert).values())
    rows = [("BitFit", "BERT-large", "all biases", f"{biases:,}", f"{share:.2%}", "0.08%")]
    for (n, part), what, reported in zip(_adapters(), ("width 64", "widths 8, 64, 256"), ("2.1%", "3.6%"), strict=True):
        rows.append(("Adapters", "BERT-large", what, f"{n:,.0f}", f"{part:.1%}", reported))
    for name, label, reported in (("roberta-base", "RoBERTa-base", "0.3M"), ("roberta-large", "RoBERTa-large", "0.8M")):
        n, whole = _lora_of(name), sum(cost.encoder_parameters(cost.ENCODERS[name]).values())
        rows.append(("LoRA", label, "rank 8, q and v", f"{n:,}", f"{n / whole:.2%}", reported))
    return tuple(rows)


# fmt: off
def sheets() -> tuple[Sheet, Sheet]:
    """The lecture's tables: shares, computed here, and scores, quoted."""
    return (
        Sheet(
            name="shares", title="How much is trained", origin="formula", rows=_rows(),
            columns=("method", "model", "what", "trained", "share", "the papers say"),
            kinds=("", "", "", "formula", "formula", "reported"),
            source="Shares of adapters are of the layers alone, the others of all parameters. The 3.6% is a mean over "
            "tasks that took widths 8, 64 or 256; that each came equally often is our assumption.",
        ),
        Sheet(
            name="glue", title="GLUE, RoBERTa-base", span=6, origin="reported", rows=GLUE,
            columns=("method", "trained", "MNLI", "SST-2", "RTE", "mean of 8"),
            source="As Hu 2021 (arXiv:2106.09685), table 2, gives them. Houlsby 2019 reports for BERT-large 80.4, and "
            "80.0 with adapters of 3.6%.",
        ),
    )
# fmt: on
