"""Values by example: their means are the metrics, of every evaluator that gives some, and each is what its example says."""

import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.evaluation import (
    STS,
    AdjacentSentences,
    AlignmentUniformity,
    Clustering,
    EvaluatorGroup,
    NearestNeighbor,
    Retrieval,
    Transfer,
    Verification,
)  # fmt: skip
from tercet.evaluation.verification import fold_thresholds
from tests.evaluation.fakes import noise, words


def check(evaluator, encode, tolerance=1e-9):
    """The values by example, whose means are the metrics of these names."""
    metrics, examples = evaluator(encode), evaluator.examples(encode)
    assert examples
    for name, values in examples.items():
        assert np.ndim(values) == 1 and float(np.mean(np.asarray(values))) == pytest.approx(metrics[name], abs=tolerance), name
    return {name: np.asarray(values) for name, values in examples.items()}


def test_a_group_has_the_values_of_its_members(tmp_path):
    texts = [f"text {i} {'ab'[i % 2]}" for i in range(24)]
    table = tmp_path / "sts.csv"
    rows = [
        f"{task},{task},test,{texts[i]},{texts[(7 * i + 3) % 24]},{i % 6}" for task in ("STS-B", "SICK-R") for i in range(24)
    ]
    table.write_text("\n".join(["task,subset,split,sentence1,sentence2,score", *rows]))
    examples = check(
        EvaluatorGroup({
            "sts": STS(str(table), tasks=["STS-B", "SICK-R"]),
            "retrieval": Retrieval({"q": texts[:12], "d": texts[12:]}, ks=[1, 3]),
            "neighbors": NearestNeighbor({"text": texts, "label": [i % 2 for i in range(24)]}, neighbors=3),
            "other": lambda encode: {"other": 1.0},
        }), noise)  # fmt: skip
    assert {"sts/avg/spearman_all", "retrieval/pairs/mrr", "nearest_neighbor/items/knn_accuracy"} <= examples.keys()
    assert not hasattr(Clustering, "examples"), "items are no independent examples of a clustering"


def test_sts_of_unequal_tasks(shared):
    found = check(STS(shared / "sts.parquet", ["STS13", "STS-B"]), words)
    sizes = {name: len(values) for name, values in found.items()}
    assert sizes == {"sts/sts13/spearman_all": 1500, "sts/stsb/spearman": 1379, "sts/avg/spearman_all": 2879}


def test_pairs_and_labels(shared):
    pairs = pq.read_table(shared / "nli_pairs.parquet").slice(0, 300).to_pandas()
    columns = {"premise": list(pairs.premise), "hypothesis": list(pairs.hypothesis)}
    ranks = check(Retrieval(columns), words)
    x, y = (torch.nn.functional.normalize(words(list(dict.fromkeys(column)))) for column in columns.values())
    index = [{text: i for i, text in enumerate(dict.fromkeys(column))} for column in columns.values()]
    relevant = {}
    for first, second in zip(*columns.values(), strict=True):
        relevant.setdefault(index[0][first], set()).add(index[1][second])
    for query, documents in relevant.items():
        cosine = x[query] @ y.T
        first = min(sum(cosine[d] - cosine[r] > -1e-6 for d in range(len(y)) if d not in documents) for r in documents) + 1
        assert ranks["retrieval/pairs/mrr"][query] == pytest.approx(1 / int(first))
    distances = check(AlignmentUniformity(columns), words)["alignment_uniformity/pairs/alignment"]
    u, v = (torch.nn.functional.normalize(words([columns[name][7]])) for name in columns)
    assert distances[7] == pytest.approx(float((u - v).square().sum()), abs=1e-6)
    labeled = pq.read_table(shared / "labelled_text.parquet").to_pandas().groupby("label").head(4).head(200)
    check(NearestNeighbor({"text": list(labeled.text), "label": list(labeled.label.factorize()[0])}), words)


def test_sentences_of_books(shared):
    rows = pq.read_table(shared / "books_ordered.parquet").slice(0, 800).to_pandas()
    source = {"text": list(rows.text), "label": list(rows.document.factorize()[0]), "position": list(rows.position)}
    found = check(AdjacentSentences(source, window=100), words)
    sizes = [len(found[f"adjacent_sentences/documents/{name}"]) for name in ("forward", "backward", "accuracy")]
    assert sizes[0] == sizes[1] == sizes[2] * 99 / 100


def test_classification_of_unequal_folds(shared, tmp_path):
    table = pd.read_parquet(shared / "transfer.parquet")
    few = table.groupby(["task", "split"]).head(157)
    few = pd.concat([few[few.task.isin(["TREC", "MRPC", "SST2"])], table[table.task == "MR"].sample(151, random_state=0)])
    few.to_parquet(tmp_path / "t.parquet")
    found = check(Transfer(tmp_path / "t.parquet", ["MR", "SST2", "TREC", "MRPC"], 3, 1, "cpu"), words, 1e-6)
    sizes = {name.split("/")[1]: len(values) for name, values in found.items()}
    assert sizes == {"mr": 151, "sst2": 157, "trec": 157, "mrpc": 157, "avg": 622}
    assert len(set(found["transfer/mr/accuracy"])) == 3, "151 rows in 3 folds: 0, and two weights"


def test_pairs_of_faces(shared):
    def shades(images):
        small = [np.asarray(Image.open(io.BytesIO(each)).convert("L").resize((6, 6)), np.float64) for each in images]
        return torch.from_numpy(np.stack(small).reshape(len(small), -1) - np.mean(small))

    verify = Verification(shared / "faces_lfw.parquet", shared / "faces_lfw_pairs.parquet", folds=[1, 2, 3])
    values = check(verify, shades)["verification/lfw/accuracy"]
    pairs, distance = verify.protocol, verify.distances(shades)
    threshold = fold_thresholds(pairs, distance)
    right = [(d <= t) == same for d, t, same in zip(distance, threshold, pairs.same, strict=True)]
    assert values.tolist() == [float(right[i]) for fold in (1, 2, 3) for i in np.flatnonzero(pairs.fold == fold)]
