"""The head start of Mamba: what was told after a word is found under that word, before any training."""

import torch

from engine import zoo
from engine.mixers.head_start import scan_start
from engine.model import Decoder
from engine.recording import record


def small(seed: int = 0) -> Decoder:
    return scan_start(zoo.find("recall-mamba16-0").make(seed), seed=seed)


def test_a_token_is_written_under_the_one_before_it_and_asked_for_by_its_own_name():
    model = small()
    ids = torch.tensor([[5, 9, 7, 9, 11, 5]])
    with record() as recorder:
        model(ids)
    seen = recorder.freeze()
    write, read = (seen.stack(f"mamba.{name}", layer=0)[0] for name in ("write", "read"))  # T N each
    write, read = (torch.from_numpy(x) for x in (write, read))
    # What is written after a word has the name by which this word asks: the same projection, one token late.
    torch.testing.assert_close(write[1:], read[:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read[1], read[3], atol=1e-5, rtol=1e-4)  # word 9, both times
    assert not torch.allclose(read[0], read[1], atol=1e-2)
    kept = seen.stack("mamba.kept", layer=0)
    assert kept.min() > 0.5, "and it is kept"


def test_the_seed_alone_decides_and_other_mixers_stay():
    one, again, other = small(), small(), small(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].mixer.inp.weight, other.blocks[0].mixer.inp.weight)
    plain = zoo.find("recall-softmax-0").make(0)
    before = [p.clone() for p in plain.parameters()]
    scan_start(plain, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
