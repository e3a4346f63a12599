"""SentEval's classifiers, written once more in benchmarks/senteval.py, beside ours."""

import numpy as np
import pytest
import torch

from benchmarks import senteval
from tercet.evaluation import Transfer
from tests.evaluation.test_sts import write

COLUMNS = ("task", "split", "sentence1", "sentence2", "label")
SPLITS = {"MR": ["all"] * 8000, "TREC": ["train"] * 4000 + ["test"] * 2000}
SPLITS |= {"SST2": ["train"] * 4000 + ["dev"] * 1000 + ["test"] * 2000}


def test_its_steps_are_torchs_adam(monkeypatch):
    """Mean cross entropy, batches of 64 in a new order each epoch, the penalty as weight decay, also of the bias."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 7)).astype(np.float32), rng.integers(0, 3, 200)
    monkeypatch.setattr(senteval, "MAX_EPOCHS", 0)  # four epochs
    found = senteval.fit((x, y), (x, y), 1e-2, seed=5)

    rng = np.random.default_rng(5)
    model = torch.nn.Linear(7, 3)
    start = torch.from_numpy(rng.uniform(-(7**-0.5), 7**-0.5, (8, 3)).astype(np.float32))
    model.weight.data, model.bias.data = start[:7].T.clone(), start[7].clone()
    adam = torch.optim.Adam(model.parameters(), weight_decay=1e-2)
    for _ in range(4):
        for rows in torch.from_numpy(rng.permutation(200)).split(64):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows]).backward()
            adam.step()
    np.testing.assert_allclose(found[:7], model.weight.detach().T, atol=1e-5)
    np.testing.assert_allclose(found[7], model.bias.detach(), atol=1e-5)


@pytest.mark.parametrize("task", SPLITS)
def test_accuracies_are_within_a_point(task, tmp_path):
    """Each protocol of the three, on vectors of which no line divides the classes."""
    rng = np.random.default_rng(1)
    count, classes = len(SPLITS[task]), 3 if task == "TREC" else 2
    x = rng.normal(size=(count, 12)).astype(np.float32)
    label = (x @ rng.normal(size=(12, classes)) + 2 * rng.normal(size=(count, classes))).argmax(1)
    x *= 4
    rows = [(task, split, str(i), None, int(label[i])) for i, split in enumerate(SPLITS[task])]
    evaluator = Transfer(write(tmp_path / "transfer.parquet", rows, COLUMNS), [task], folds=2)
    ours = evaluator(lambda texts: x[[int(text) for text in texts]])[f"transfer/{task.lower()}/accuracy"]
    assert 0.7 < ours < 0.9
    assert ours == pytest.approx(senteval.protocol(x, evaluator.data[task], folds=2), abs=0.01)
