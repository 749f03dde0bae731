"""The lecture's shares, computed from published shapes; the same formulas count our own models' parameters."""

import pytest
import transformers

from engine import cost
from engine.peft import adapter, bitfit, lora, trained_count
from tests.engine.quant.test_integer import toy

BERT = cost.ENCODERS["bert-large"]


@pytest.mark.parametrize("name", cost.ENCODERS)
def test_encoders_have_as_many_parameters_as_the_library_gives_them(name):
    e = cost.ENCODERS[name]
    make = transformers.BertConfig if name == "bert-large" else transformers.RobertaConfig
    config = make(
        vocab_size=e.vocab, max_position_embeddings=e.positions, type_vocab_size=e.types, hidden_size=e.width,
        num_hidden_layers=e.layers, num_attention_heads=e.width // 64, intermediate_size=e.ffn_width,
    )  # fmt: skip
    import torch

    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == sum(cost.encoder_parameters(e).values())
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert biases == cost.bitfit_parameters(e)


def test_the_shares_of_the_lecture():
    parts = cost.encoder_parameters(BERT)
    assert f"{cost.bitfit_parameters(BERT) / sum(parts.values()):.2%}" == "0.08%"
    shares = [
        cost.adapter_parameters(BERT.width, layers=BERT.layers, bottleneck=m) / parts["layers"] for m in (8, 64, 256)
    ]
    assert f"{shares[1]:.1%}" == "2.1%"
    assert f"{sum(shares) / 3:.1%}" == "3.6%"
    found = []
    for name in ("roberta-base", "roberta-large"):
        e = cost.ENCODERS[name]
        found.append(cost.lora_parameters(e.width, e.width, rank=8, matrices=2 * e.layers))
    assert found == [294_912, 786_432]


def test_the_formulas_count_our_own_models():
    base = toy()
    assert trained_count(adapter.attach(base, bottleneck=5)) == cost.adapter_parameters(
        32, layers=2, bottleneck=5, norms=False
    )
    assert trained_count(lora.attach(base, rank=3, targets=("q",))) == cost.lora_parameters(32, 32, rank=3, matrices=2)
    assert trained_count(bitfit.attach(bitfit.with_biases(base))) > 0
    with pytest.raises(ValueError, match="rank must be from 1 to 8"):
        cost.lora_parameters(8, 9, rank=9, matrices=1)
    with pytest.raises(ValueError, match="width, layers and bottleneck must be above 0"):
        cost.adapter_parameters(8, layers=1, bottleneck=0)
