"""A training that was stopped goes on bit for bit; a file that is not whole is none."""

import torch

from engine import halfway


def made():
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(model, optimiser, *, steps):
    for at in steps:
        optimiser.zero_grad()
        model(torch.full((4, 3), float(at))).square().sum().backward()
        optimiser.step()


def test_what_is_taken_up_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "checkpoint.safetensors"
    first = made()
    trained(*first, steps=range(3))
    halfway.keep(path, *first, step=3, of="a toy")
    assert halfway.facts(path) == {"step": "3", "of": "a toy"}
    second = made()
    halfway.take_up(path, *second)
    for pair in (first, second):
        trained(*pair, steps=range(3, 6))
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].bias, second[0].bias)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_not_whole_has_no_facts(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert halfway.facts(path) == {}
    path.write_bytes(b"torn")
    assert halfway.facts(path) == {}
