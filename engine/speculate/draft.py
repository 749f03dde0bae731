"""How the draft of SmolLM2 is made: the target writes texts after our own prompts, and the draft learns to foretell it.

EAGLE (arXiv:2401.15077), the training of its draft. Paper -> here: L_cls, the cross-entropy of the two laws =
`divergence` (less the target's own entropy); L_reg, smooth L1 between the features = `feature`, weighted by FEATURE.

Deviations: the training set is written by the target itself, so that it has its law and nobody's licence; half of the
features that the draft reads are its own guesses, as when it drafts (HASS, arXiv:2408.15766), instead of noise.

    make(Path("train/draft"))                               # an hour of one core, and it goes on where it stopped
    drafter = FeatureDraft(load(model), length=3)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine import checkpoints, halfway, hardware
from engine.model import Decoder
from engine.packed import pack
from engine.speculate.feature import FFN, Feature, packed
from engine.speculate.texts import ROWS, make_data
from engine.weights import ModelUnavailable, read_tensors

DRAFT = Path(__file__).parent.parent.parent / "assets" / "models" / "drafts" / "smollm2.safetensors"
WORDS = 6144  # words that the draft can say
BATCHES = 30  # files of texts
STEPS = 4000
PROMPT = 32  # tokens of a seed prompt at most: the end marks among them end no text
FEATURE = 0.2  # weight of the features in the loss


# --- training --------------------------------------------------------------------------------------------------


def frequent(ids: Tensor, *, vocab: int, count: int = WORDS) -> Tensor:
    """The `count` most frequent ids, in order of id; ties go to the lower id, which byte-pair merging found earlier."""
    if not 1 <= count <= vocab:
        raise ValueError(f"count must be a number of words from 1 to {vocab}, not {count}")
    found = torch.bincount(ids.flatten(), minlength=vocab)
    return found.argsort(descending=True, stable=True)[:count].sort().values


def loss_of(
    model: Feature, ids: Tensor, hidden: Tensor, *, generator: torch.Generator, eos: int | None
) -> tuple[Tensor, dict[str, float]]:
    """ids [B, T + 1] and the target's rows hidden [B, T, W]: how far the draft is from the target, and figures.

    Half of the features that it reads are its own, from a first pass that is not trained: when it drafts, most are.
    """
    features, following, truth = hidden[:, :-1], ids[:, 1:-1], hidden[:, 1:]  # of t, the token t + 1, of t + 1
    with torch.no_grad():
        own = model(features, following)  # foretells the feature of t + 1
        coin = torch.rand(features.shape[:2], generator=generator).lt(0.5)
        coin[:, 0] = False
        shifted = torch.cat((features[:, :1], own[:, :-1]), 1)
        wanted = F.linear(truth, model._head).float().log_softmax(-1)  # B T-1 R
    mixed = torch.where(coin[..., None], shifted, features)
    out = model(mixed, following)
    said = model.logits(out).float().log_softmax(-1)
    # After the end of a text the target goes on with anything: not worth learning.
    alive = torch.ones_like(following, dtype=torch.bool)
    if eos is not None:
        ends = following == eos
        ends[:, :PROMPT] = False
        ended = ends.cumsum(1).bool()
        alive = ~ended
    divergence = (wanted.exp() * (wanted - said)).sum(-1)[alive].mean()
    apart = F.smooth_l1_loss(out.float(), truth.float(), reduction="none").mean(-1)[alive].mean()
    same = (said.argmax(-1) == wanted.argmax(-1))[alive].float().mean()
    overlap = torch.minimum(said.exp(), wanted.exp()).sum(-1)[alive].mean()
    figures = {"divergence": divergence, "feature": apart, "same": same, "overlap": overlap}
    return divergence + FEATURE * apart, {name: float(value.detach()) for name, value in figures.items()}


def train(
    model: Feature,
    folder: Path,
    *,
    steps: int,
    rows: int = 4,
    rate: float = 1e-3,
    warmup: int = 30,
    until: int | None = None,
    eos: int | None = None,
    checkpoint: Path | None = None,
    every: float = 60.0,
    seed: int = 0,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> int:
    """Train on the files of `make_data` (all but the last, which is for testing); returns the steps done in all.

    AdamW with warm-up and cosine, the products in bfloat16. A checkpoint resumes it; `until` stops it early, to go on
    another time.
    """
    files = sorted(folder.glob("*.safetensors"))[:-1]
    if not files:
        raise ValueError(f"{folder} must hold two files of texts at least: call make_data first")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, stop = _resume(checkpoint, model, optimiser), min(steps, steps if until is None else until)
    saved = time.monotonic()
    generator = torch.Generator()
    for at in range(start, stop):
        generator.manual_seed(seed + at)
        ids, hidden = _batch(files, rows, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=hardware.fast_dtype(torch.device("cpu")) == torch.bfloat16):
            loss, figures = loss_of(model, ids, hidden.to(model._embed.dtype), generator=generator, eos=eos)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (at + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * at / steps))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        now = time.monotonic()
        if checkpoint is not None and (at + 1 == stop or now - saved > every):
            halfway.keep(checkpoint, model, optimiser, step=at + 1)
            saved = now
        if progress is not None:
            progress(at + 1, steps, figures)
    return max(start, stop)


def _batch(files: Sequence[Path], rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some texts of one file, read by slices so that the files need not fit into memory."""
    path = files[int(torch.randint(len(files), (), generator=generator))]
    with safe_open(str(path), "pt") as file:
        ids, hidden = file.get_slice("ids"), file.get_slice("hidden")
        first = int(torch.randint(max(1, ids.get_shape()[0] - rows + 1), (), generator=generator))
        return ids[first : first + rows].long(), hidden[first : first + rows]


def _resume(path: Path | None, model: Feature, optimiser: torch.optim.Optimizer) -> int:
    facts = halfway.facts(path) if path is not None else {}
    if path is None or not facts:
        return 0
    halfway.take_up(path, model, optimiser)
    model.take_head()  # the words are those of the checkpoint
    return int(facts["step"])


def make(
    work: Path,
    *,
    path: Path = DRAFT,
    batches: int = BATCHES,
    steps: int = STEPS,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Make the draft of SmolLM2 again: its texts and checkpoints under `work`, the result at `path`; returns its bytes.

    What is there already is kept, so that a stopped run goes on. `progress` is told ("texts" or "training", done, all).
    """
    tell = progress or (lambda stage, done, total: None)
    cpu, texts = torch.device("cpu"), work / "texts"
    quick, tokenizer = checkpoints.load("smollm2", dtype=hardware.fast_dtype(cpu), device=cpu)
    written = make_data(
        pack(quick),
        tokenizer.encode,
        texts,
        seconds=math.inf,
        batches=batches,
        progress=lambda done, _: tell("texts", done, batches),
    )
    target = checkpoints.load("smollm2", device=cpu)[0]
    words, ffn_width = min(WORDS, target.shape.vocab), min(FFN, target.shape.ffn_width)
    model = untrained(target, texts, words=words, ffn_width=ffn_width)
    train(
        model,
        texts,
        steps=steps,
        eos=tokenizer.eos,
        checkpoint=work / "checkpoint.safetensors",
        progress=lambda done, total, _: tell("training", done, total),
    )
    return ship(model, path, steps=steps, texts=written * ROWS)


# --- storing ---------------------------------------------------------------------------------------------------


def untrained(target: Decoder, folder: Path, *, words: int = WORDS, ffn_width: int = FFN, seed: int = 0) -> Feature:
    """A draft before training. Its words are those that the target uses most in the texts of `folder`."""
    files = sorted(folder.glob("*.safetensors"))[:-1]
    if not files:
        raise ValueError(f"{folder} must hold two files of texts at least: call make_data first")
    ids = []
    for path in files:
        with safe_open(str(path), "pt") as file:
            ids.append(file.get_tensor("ids").flatten().long())
    torch.manual_seed(seed)
    model = Feature(target, frequent(torch.cat(ids), vocab=target.shape.vocab, count=words), ffn_width=ffn_width)
    model.start_from(target, seed=seed)
    return model


def ship(model: Feature, path: Path = DRAFT, **facts: str | int | float) -> int:
    """Store the draft in float16, without what it borrows, and `facts` of its making; returns the bytes of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.half() if value.is_floating_point() else value.int()).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    about = {"ffn_width": model.shape.ffn_width, "width": model.shape.width, "vocab": model.shape.vocab, **facts}
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    path.chmod(0o644)  # safetensors writes for the owner alone
    return path.stat().st_size


def about(path: Path = DRAFT) -> dict[str, str | int | float]:
    """The facts that the draft was stored with. Raises ModelUnavailable."""
    try:
        with safe_open(str(path), "pt") as file:
            return dict(json.loads((file.metadata() or {})["about"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelUnavailable(f"{path} is missing, cut short or no draft ({error}).") from error


def load(target: Decoder, path: Path = DRAFT) -> Feature:
    """The stored draft beside its target, in the target's dtype and on its device, ready to run and frozen.

    `target` is the model itself or its `pack`ed twin with tied embeddings. Raises ModelUnavailable.
    """
    facts = about(path)
    if (facts["width"], facts["vocab"]) != (target.shape.width, target.shape.vocab):
        raise ModelUnavailable(
            f"{path} was made for a model of width {facts['width']} and {facts['vocab']} words, "
            f"not {target.shape.width} and {target.shape.vocab}."
        )
    tensors = read_tensors(path)
    weight = target.embed.weight
    with torch.inference_mode(False):
        model = Feature(target, tensors["words"].to(weight.device), ffn_width=int(facts["ffn_width"]))
        model.load_state_dict(tensors)
        model = model.to(weight.device, weight.dtype).eval().requires_grad_(False)
        return packed(model)
