"""Losses of parts: collected where asked for, forgotten elsewhere, never mixed between contexts."""

from contextvars import copy_context

import pytest
import torch

from engine.auxiliary import add_loss, auxiliary, losses_wanted


def test_they_are_collected_inside_and_forgotten_outside():
    add_loss(torch.tensor(1.0))
    assert not losses_wanted()
    with auxiliary() as extra:
        assert losses_wanted()
        add_loss(torch.tensor(2.0))
        with auxiliary() as inner:
            add_loss(torch.tensor(3.0))
        add_loss(torch.tensor(4.0))
    assert not losses_wanted()
    add_loss(torch.tensor(5.0))
    assert [float(x) for x in extra] == [2, 4]
    assert [float(x) for x in inner] == [3]


def test_an_error_inside_ends_it_and_other_contexts_see_nothing():
    other = copy_context()

    def fail():
        with auxiliary():
            assert losses_wanted()
            assert not other.run(losses_wanted)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not losses_wanted()


def test_without_losses_the_sum_is_the_loss_itself():
    loss = torch.tensor(1.0, requires_grad=True)
    assert sum([], loss) is loss


def test_bad_input_is_named():
    with auxiliary(), pytest.raises(ValueError, match=r"loss must be a scalar, not of shape \[2\]"):
        add_loss(torch.zeros(2))
