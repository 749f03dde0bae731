"""`leanscope bench`: every group is measured in turns, and told beside what the machine can do at most."""

import json
import math

import pytest
import torch

from app import bench, cli
from engine import hardware
from engine.model import Decoder, Shape

SHAPE = Shape(vocab=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=48)


def test_contenders_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    taken = bench.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == list("abababab")
    assert all(0 <= seconds.best <= seconds.median for seconds in taken.values())
    with pytest.raises(ValueError, match="rounds"):
        bench.race({}, rounds=0)
    for wrong in ({"rounds": 0}, {"new": 0}, {"kept": 7}):
        with pytest.raises(ValueError, match="must be"):
            bench.Settings(**wrong)


@pytest.mark.slow  # importing transformers
def test_the_twin_in_transformers_has_the_same_logits():
    pytest.importorskip("transformers")
    model = Decoder(SHAPE).eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    theirs = bench.twin(model)
    assert theirs is not None
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_group_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "choose", lambda name: (name, Decoder(SHAPE)))
    monkeypatch.setattr(hardware, "bandwidth", lambda where: 1e10)
    monkeypatch.setattr(hardware, "flops", lambda dtype, where: 1e11)
    assert cli.main(["bench", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "toy"
    assert told["machine"]["bytes_per_second"] > 0
    assert all(flops > 0 for flops in told["machine"]["flops_per_second"].values())
    rows = told["rows"]
    assert [*dict.fromkeys(row["group"] for row in rows)] == [
        "decode", "prefill", "recording", "speculation", "policies", "training"
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["median"] <= row["best"] < math.inf
        assert row["limit"] is None or row["limit"] > 0
    kept = {row["name"]: row["cache_bytes"] for row in rows if row["group"] == "policies"}
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert kept["full"] == 64 * per_token
    assert kept["window"] == kept["sinks"] == 16 * per_token
    assert kept["heavy hitters"] < kept["full"]
    assert kept["quantised, 4 bits"] < kept["full"]


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "--rounds", "0"]) == 2
    assert cli.main(["bench", "--model", "no such model"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
