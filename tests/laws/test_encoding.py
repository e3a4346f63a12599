"""Laws 5 and 6: how rows run through the network is nobody's business but the network's."""

import pytest
import torch

from tercet.build import build
from tercet.contract import Batch, Ragged
from tercet.model import Execution
from tercet.model.pooling import OF_WORDS, POOLINGS
from tests.conftest import MINILM, TEXTS, choices, composed, tiny

FAMILIES = {
    "bert": tiny(),
    "roberta": ["model=bert_small", f"model.tokenizer.name={MINILM}", "model.backbone.config.model_type=roberta",
                "+model.backbone.config.max_position_embeddings=130", "+model.backbone.config.pad_token_id=0"],
    "distilbert": ["model=bert_small", f"model.tokenizer.name={MINILM}", "~model.backbone.config",
                   "+model.backbone.config={model_type:distilbert,dim:32,n_layers:2,n_heads:2,hidden_dim:64}"],
}  # fmt: skip


def batch_of(module, columns):
    # No text twice: which of two equal negatives is mined would be up to rounding.
    views = tuple(module.encoder.inputs([f"{text} {'again ' * v}" for text in TEXTS]) for v in range(columns))
    n = len(TEXTS)
    content = torch.arange(columns * n).view(columns, n)
    return Batch(views, torch.arange(n), torch.arange(n) % 3 - 1, torch.arange(n), content)


def gradients(module, batch, seed):
    torch.manual_seed(seed)
    module.train()
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def objective(name, execution, dropout=0.1, mlm=0.1):
    torch.manual_seed(0)
    cfg = composed(*tiny(f"objective={name}", f"model.backbone.dropout={dropout}", f"objective.mlm.weight={mlm}"))
    module = build(cfg.objective)
    module.encoder.execution = execution
    if module.mlm is not None:
        module.mlm.execution = execution
    return module


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", choices("objective"))
@pytest.mark.parametrize("order", ["given", "sorted"])
@pytest.mark.parametrize("tokens", [None, 40])
def test_recomputed_gradients_are_the_plain_ones_with_dropout_on(name, order, tokens):
    plain, again = (objective(name, Execution(order, tokens, None, recompute)) for recompute in (False, True))
    batch = batch_of(plain, plain.columns[1])
    expected, got = gradients(plain, batch, 3), gradients(again, batch, 3)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=key: f"{n}: {m}")
    other = gradients(plain, batch, 4)
    assert any(not torch.allclose(other[k], expected[k]) for k in expected), "dropout was off: nothing is shown"


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", choices("objective"))
def test_chunks_do_not_change_the_gradient(name):
    whole, cut = (
        objective(name, e, dropout=0.0)
        for e in (Execution("given", None, None, False), Execution("sorted", 40, None, True))
    )
    batch = batch_of(whole, whole.columns[1])
    expected, got = gradients(whole, batch, 0), gradients(cut, batch, 0)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", sorted(set(POOLINGS) - {"cls_pooler"} - OF_WORDS))
def test_sorted_chunks_embed_as_single_rows_do(family, pooling):
    torch.manual_seed(0)
    encoder = build(composed(*FAMILIES[family], f"model.pooling={pooling}").model).eval()
    inputs = encoder.inputs(TEXTS)
    alone = torch.cat([encoder(Ragged(row, torch.tensor([len(row)]))) for row in inputs.rows()])
    for plan in (
        Execution("given", None, None, False),
        Execution("sorted", None, None, False),
        Execution("sorted", 30, None, False),
        Execution("given", None, 2, False),
    ):
        encoder.execution = plan
        torch.testing.assert_close(encoder(inputs), alone, rtol=1e-5, atol=1e-5)
