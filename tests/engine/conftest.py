"""What the engine's tests share."""

import pytest

from engine.checkpoints import ModelUnavailable, fetch_smollm2, load


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in float32 and its tokenizer; fetched when it is not on this machine yet."""
    try:
        fetch_smollm2()
    except ModelUnavailable as error:
        pytest.skip(str(error))
    return load("smollm2", device="cpu")
