"""mteb's tasks from local copies, without a network: equal to mteb's own run of the same model by sentence-transformers."""

import json
import random
import socket
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.app.components import build
from tercet.errors import InputError
from tercet.evaluation import MTEB
from tercet.images import PixelFormat, encode_png
from tercet.models import CachedEncoder, ImageEncoder, load, random_backbone, save_model
from tests.conftest import MINILM, TEXTS, composed, tiny
from tests.end_to_end.conftest import command  # noqa: F401 - a fixture
from tests.models.test_saved_folders import RESNET

mteb = pytest.importorskip("mteb", reason="tercet[mteb] is not installed")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import evaluation as peers  # noqa: E402

OTHERS = [
    "Somebody makes music with a harp.", "A flute is heard near the sea.", "The dogs are running.", "God made the earth.",
    "A cat is sitting.", "Stocks went up in spring, then down.", "It rains.", "A book about the sea is read.",
    "Kids throw snow.", "It is a secret.", "There is a train in the morning.", "A woman sings in the kitchen.",
]  # fmt: skip
TASKS = {  # of five kinds, each with its data set in mteb's layout
    "STSBenchmark": {
        "test": {"sentence1": TEXTS * 2, "sentence2": OTHERS + OTHERS[::-1], "score": [5.0, 4.0] * 6 + [0.0, 1] * 6}
    },
    "Banking77Classification": {
        split: {"text": TEXTS + OTHERS, "label": [i % 2 for i in range(24)]} for split in ("train", "test")
    },
    "TwentyNewsgroupsClustering": {
        "test": {"sentences": [TEXTS + OTHERS] * 2, "labels": [[i % 4 for i in range(24)], [i % 3 for i in range(24)]]}
    },
    "SprintDuplicateQuestions": {
        "test": {"sent1": [TEXTS * 2], "sent2": [OTHERS + OTHERS[::-1]], "labels": [[1] * 12 + [0] * 12]}
    },
}
NANO = ["NanoNFCorpusRetrieval", "NanoSciFactRetrieval"]
SCORES = {"STSBenchmark": "cosine_spearman", "Banking77Classification": "accuracy", "TwentyNewsgroupsClustering": "v_measure",
          "SprintDuplicateQuestions": "max_ap", "NanoNFCorpusRetrieval": "ndcg_at_10"}  # fmt: skip


def write(folder, tables):
    folder.mkdir(parents=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def write_retrieval(folder, shift=1, split="train"):
    """A corpus, queries and judgements as in the repositories of NanoBEIR: query i has the document i, and i + ``shift``."""
    ids, size = [f"q{i}" for i in range(12)], len(TEXTS)
    judged = {
        "query-id": ids * 2,
        "corpus-id": [f"d{(i + k) % size}" for k in (0, shift) for i in range(size)],
        "score": [1] * 24,
    }
    write(folder, {"corpus": {"_id": [f"d{i}" for i in range(size)], "title": [""] * size, "text": OTHERS},
                   "queries": {"_id": ids, "text": TEXTS}, "qrels": judged})  # fmt: skip
    lines = [
        f"- config_name: {name}\n  data_files: [{{split: {split}, path: {name}.parquet}}]"
        for name in ("corpus", "queries", "qrels")
    ]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with a copy of each data set, called after the task or its repository."""
    folder, patch = tmp_path_factory.mktemp("copies"), pytest.MonkeyPatch()
    for name, tables in TASKS.items():
        write(folder / name, tables)
    write_retrieval(folder / "mteb" / NANO[0])
    write_retrieval(folder / NANO[1], 3)

    def refuse(*_):
        raise OSError("the test allows no network")

    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    yield folder
    patch.undo()


def of_mteb(model, evaluate):
    """The main scores of mteb's own run of the tasks of an evaluator."""
    tasks = evaluate._tasks(mteb)
    for task in tasks:
        evaluate._load(task)
    results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
    return {f"mteb/{result.task_name}/{task.metadata.main_score}": result.get_score() for result, task in zip(results, tasks)}  # noqa: B905


@pytest.fixture(scope="module")
def minilm():
    return load(MINILM)


def test_five_kinds_of_task_are_as_mteb_measures_them(copies, minilm, tmp_path):
    library = SentenceTransformer(minilm.backbone.config._name_or_path, device="cpu")
    evaluate = MTEB([*TASKS, NANO[0]], str(copies), results=str(tmp_path / "mine"), name="me/model", revision="v1")
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = evaluate(CachedEncoder(minilm))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert found.pop("mteb/mean/main_score") == pytest.approx(np.mean([*found.values()]))
    assert found.keys() == {f"mteb/{task}/{score}" for task, score in SCORES.items()}
    assert found == pytest.approx(of_mteb(library, evaluate), abs=1e-4)
    few = MTEB(["STSBenchmark", NANO[0]], str(copies))
    of_object = of_mteb(minilm, few)
    assert of_object == pytest.approx({name: found[name] for name in of_object}, abs=1e-4)
    for task, score in SCORES.items():
        written = json.loads((tmp_path / "mine" / "results" / "me__model" / "v1" / f"{task}.json").read_text())
        (first,) = next(iter(written["scores"].values()))
        assert first["main_score"] == pytest.approx(found[f"mteb/{task}/{score}"])
        assert written["dataset_revision"] == mteb.get_task(task).metadata.revision
    assert mteb.ResultCache(tmp_path / "mine").load_results(["me/model"]).model_results[0].task_names


def test_values_by_example_are_those_whose_mean_mteb_reports(copies, minilm):
    """Of retrieval, STS and classification, counted anew from embeddings; the other kinds have no such values."""
    evaluate, encode = MTEB([*TASKS, *NANO], str(copies)), CachedEncoder(minilm)
    metrics, found = evaluate(encode), evaluate.examples(encode)
    assert found.keys() == {f"mteb/{name}/{SCORES[name]}" for name in ("STSBenchmark", "Banking77Classification", NANO[0])} | {
        f"mteb/{NANO[1]}/ndcg_at_10"
    }
    for name, values in found.items():
        assert values.mean() == pytest.approx(metrics[name], abs=1e-5 if "ndcg" in name else 1e-9), name
    queries, documents = (torch.nn.functional.normalize(minilm.encode(texts)) for texts in (TEXTS, OTHERS))
    cosine = queries @ documents.T
    gains = np.zeros(12)
    for i in range(12):
        order = cosine[i].argsort(descending=True).tolist()
        ranks = [order.index(d) + 1 for d in {i, (i + 1) % 12}]
        gains[i] = sum(1 / np.log2(r + 1) for r in ranks if r <= 10) / (1 + 1 / np.log2(3))
    by_id = sorted(range(12), key=lambda i: f"q{i}")
    np.testing.assert_allclose(found[f"mteb/{NANO[0]}/ndcg_at_10"], gains[by_id], atol=1e-6)
    right = found["mteb/Banking77Classification/accuracy"]
    assert len(right) == 24 and set(np.round(right * 10, 6)) <= set(range(11)), "a mean over ten experiments"
    assert len(found["mteb/STSBenchmark/cosine_spearman"]) == 24
    all_have = MTEB(["STSBenchmark", NANO[0]], str(copies))
    assert all_have.examples(encode)["mteb/mean/main_score"].mean() == pytest.approx(
        all_have(encode)["mteb/mean/main_score"], abs=1e-5
    )


def test_a_task_that_scores_in_its_own_way_has_no_values(copies, minilm):
    task = mteb.get_task(NANO[0])
    task.task_specific_scores = lambda scores, *_, **__: {"ndcg_at_10": 0.123}
    evaluate = MTEB([task], str(copies))
    assert evaluate(minilm.encode) == {f"mteb/{NANO[0]}/ndcg_at_10": 0.123}
    assert evaluate.examples(minilm.encode) == {}


def test_a_task_of_several_splits_has_the_values_of_all(copies, minilm, tmp_path):
    texts = {"sentence1": TEXTS, "sentence2": OTHERS, "score": [float(i % 5) for i in range(12)]}
    few = {name: column[:7] for name, column in texts.items()}
    write(tmp_path / "STSBenchmark", {"test": texts, "validation": few})
    task = mteb.get_task("STSBenchmark", eval_splits=["validation", "test"])
    evaluate = MTEB([task], str(tmp_path))
    (values,) = evaluate.examples(minilm.encode).values()
    assert len(values) == 19
    assert values.mean() == pytest.approx(evaluate(minilm.encode)["mteb/STSBenchmark/cosine_spearman"], abs=1e-9)


def test_documents_with_the_id_of_their_query_are_left_out_as_mteb_does(copies, minilm, tmp_path):
    write_retrieval(tmp_path / NANO[0])
    for name in ("queries", "qrels"):
        file = tmp_path / NANO[0] / f"{name}.parquet"
        table = pq.read_table(file).to_pylist()
        key = {"queries": "_id", "qrels": "query-id"}[name]
        pq.write_table(pa.Table.from_pylist([{**row, key: row[key].replace("q", "d")} for row in table]), file)
    task = mteb.get_task(NANO[0])
    task.ignore_identical_ids = True
    evaluate = MTEB([task], str(tmp_path))
    (values,), (score,) = evaluate.examples(minilm.encode).values(), evaluate(minilm.encode).values()
    assert values.mean() == pytest.approx(score, abs=1e-5) and score < 0.9


def test_prompts_of_queries_documents_and_tasks_are_as_in_sentence_transformers(copies, tmp_path):
    torch.manual_seed(0)
    encoder = build(composed(*tiny("model.prompt=['find: ','']")).model).eval()
    save_model(encoder, tmp_path / "model")
    file = tmp_path / "model" / "config_sentence_transformers.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "prompts": {**settings["prompts"], "STS": "same? ", NANO[1]: "a fact: "}}))
    (tmp_path / "model" / "tercet.json").unlink()
    evaluate = MTEB(["STSBenchmark", *NANO], str(copies))
    model = load(tmp_path / "model")
    assert model.prompts.texts["document"] == ""
    found = evaluate(CachedEncoder(model))
    found.pop("mteb/mean/main_score")
    want = of_mteb(SentenceTransformer(str(tmp_path / "model"), device="cpu"), evaluate)
    assert found == pytest.approx(want, abs=1e-4)
    assert of_mteb(model, evaluate) == pytest.approx(want, abs=1e-4)
    without = evaluate(lambda texts: model.encode(texts, prompt=""))
    assert all(without[name] != pytest.approx(score, abs=1e-4) for name, score in want.items())


def test_the_command_measures_and_writes(copies, command, encoder, tmp_path):  # noqa: F811
    save_model(encoder, tmp_path / "model")
    words = [f"model={tmp_path / 'model'}", "evaluation=mteb", f"evaluation.path={copies}", f"output={tmp_path / 'x.json'}"]
    result = command("evaluate", *words, "evaluation.tasks=[STSBenchmark]", f"evaluation.results={tmp_path}")
    assert result.code == 0, result.terminal
    metrics = json.loads((tmp_path / "x.json").read_text())
    want = MTEB(["STSBenchmark"], str(copies))(load(tmp_path / "model").encode)
    assert {f"test/{name}": score for name, score in want.items()} == pytest.approx(
        {name: value for name, value in metrics.items() if name.startswith("test/")}, abs=1e-6
    )
    assert "mteb/STSBenchmark/cosine_spearman" in result.terminal and "x_examples.npz" in result.terminal
    with np.load(tmp_path / "x_examples.npz") as values:
        assert values["mteb/STSBenchmark/cosine_spearman"].mean() == pytest.approx(next(iter(want.values())), abs=1e-6)
    assert (tmp_path / "results" / "tercet__model" / "unknown" / "STSBenchmark.json").is_file()
    result = command("evaluate", *words, "evaluation.tasks=[STSBenchmrk]")
    assert result.code == 1 and "evaluation.tasks has STSBenchmrk: mteb has no such task" in result.terminal


def test_nanobeir_is_thirteen_tasks_by_mtebs_name(copies, minilm):
    evaluate = build(composed("evaluation=nanobeir", f"evaluation.path={copies}", entry="evaluate").evaluation)
    names = [task.metadata.name for task in evaluate._tasks(mteb)]
    assert len(names) == 13 and set(NANO) < set(names)
    with pytest.raises(InputError, match=r"has no folder NanoArguAnaRetrieval or mteb/NanoArguAnaRetrieval. To copy it: hf"):
        evaluate(minilm.encode)
    benchmark = mteb.Benchmark(name="mine", tasks=mteb.get_tasks(tasks=NANO))
    found = MTEB(benchmark.tasks, str(copies))(minilm.encode)
    assert found["mteb/mean/main_score"] == pytest.approx(np.mean([found[f"mteb/{name}/ndcg_at_10"] for name in NANO]))


def test_what_cannot_be_measured_is_explained(copies, minilm, monkeypatch, tmp_path):
    for options, message in [
        ({"tasks": ["STSBenchmrk"]}, "tasks has STSBenchmrk: mteb has no such task or benchmark. Did you mean STSBenchmark"),
        ({"tasks": ["NanoBEER"]}, "no such task or benchmark. Did you mean NanoBEIR"),
        ({"tasks": ["STS12"]}, "its data set mteb/sts12-sts cannot be read .*Set path to a folder with a copy"),
        ({"tasks": ["STS12"], "path": str(tmp_path)}, "To copy it: hf download mteb/sts12-sts --repo-type dataset"),
        ({"tasks": "STS12"}, "tasks=STS12: a list of names is needed"),
        ({"tasks": ["STS12"], "path": "nowhere"}, "path=nowhere is no folder"),
        ({"tasks": ["STS12"], "name": "model"}, "name=model: mteb's names of models are <organization>/<model>"),
    ]:
        with pytest.raises(InputError, match=message):
            MTEB(**options)(minilm.encode)
    (tmp_path / "STS12").mkdir()
    (tmp_path / "STS12" / "test.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"tasks has STS12: its data set .*STS12 cannot be read"):
        MTEB(["STS12"], str(tmp_path))(minilm.encode)
    with pytest.raises(InputError, match="STSBenchmark: 24 of 24 embeddings are not finite"):
        MTEB(["STSBenchmark"], str(copies))(lambda texts: torch.full((len(texts), 2), torch.nan))
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"mteb is not installed: pip install 'tercet\[mteb\]'"):
        MTEB(["STS12"])


def test_evaluators_of_sentence_transformers_take_our_models(minilm, tmp_path):
    library = SentenceTransformer(minilm.backbone.config._name_or_path, device="cpu")
    queries, corpus = ({f"{i}": text for i, text in enumerate(texts)} for texts in (TEXTS, OTHERS))
    scores, functions = [i / 12 for i in range(12)], ["cosine", "dot", "euclidean", "manhattan"]
    for evaluate in (
        peers.EmbeddingSimilarityEvaluator(TEXTS, OTHERS, scores, similarity_fn_names=functions, truncate_dim=32),
        peers.EmbeddingSimilarityEvaluator(TEXTS, OTHERS, scores, precision="int8"),
        peers.InformationRetrievalEvaluator(queries, corpus, {key: {key} for key in queries}),
        peers.TripletEvaluator(TEXTS, OTHERS, OTHERS[::-1]),
    ):
        assert evaluate(minilm, str(tmp_path)) == pytest.approx(evaluate(library), abs=1e-4), type(evaluate)
    assert minilm.model_card_data.metrics["cosine_ndcg@10"] > 0.5


def test_nanobeir_of_sentence_transformers_takes_our_models(copies, minilm, tmp_path):
    write_retrieval(tmp_path / "nano", 2, "NanoMSMARCO")
    evaluate = peers.NanoBEIREvaluator(["msmarco"], dataset_id=str(tmp_path / "nano"))
    library = SentenceTransformer(minilm.backbone.config._name_or_path, device="cpu")
    assert evaluate(minilm) == pytest.approx(evaluate(library), abs=1e-4)


@pytest.mark.slow
def test_all_of_nanobeir_from_copies(minilm, copies, tmp_path):
    tasks = mteb.get_benchmark("NanoBEIR").tasks
    for i, task in enumerate(tasks):
        write_retrieval(tmp_path / task.metadata.name, i + 1)
    found = build(composed("evaluation=nanobeir", f"evaluation.path={tmp_path}", entry="evaluate").evaluation)(minilm.encode)
    assert found.keys() == {"mteb/mean/main_score", *(f"mteb/{task.metadata.name}/ndcg_at_10" for task in tasks)}


def test_images_of_mteb_are_encoded():
    torch.manual_seed(0)
    encoder = ImageEncoder(random_backbone(RESNET), PixelFormat(32)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    found = encoder.encode([{"image": images[:2]}, {"image": images[2:]}], task_metadata=mteb.get_task("STSBenchmark").metadata)
    np.testing.assert_allclose(found, encoder.encode(list(map(encode_png, images))), atol=1e-6)
    assert encoder.mteb_model_meta.modalities == ["image"]


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_those_of_sentence_transformers(encoder, tmp_path, name):
    encoder.similarity_fn_name = name
    save_model(encoder, tmp_path)
    library, model = SentenceTransformer(str(tmp_path), device="cpu"), load(tmp_path)
    assert library.similarity_fn_name == model.similarity_fn_name == name
    a, b = model.encode(TEXTS[:5]), model.encode(TEXTS[5:10]).numpy()
    torch.testing.assert_close(model.similarity(a, b), library.similarity(a, b))
    torch.testing.assert_close(model.similarity_pairwise(a, b), library.similarity_pairwise(a, b))
    assert mteb.models.EncoderProtocol and isinstance(model, mteb.models.EncoderProtocol)
    assert model.mteb_model_meta.similarity_fn_name.value == name


def test_keywords_of_sentence_transformers(tmp_path):
    encoder = build(composed(*tiny("model.prompt=['query: ','passage: ']", "model.normalize=true")).model).eval()
    save_model(encoder, tmp_path)
    library = SentenceTransformer(str(tmp_path), device="cpu")
    for method in ("encode", "encode_query", "encode_document"):
        for options in (
            {}, {"prompt_name": "document"}, {"prompt": "to: "}, {"normalize_embeddings": True, "truncate_dim": 8},
            {"batch_size": 2, "convert_to_tensor": True, "show_progress_bar": False},
        ):  # fmt: skip
            options = {"convert_to_numpy": True, **options}
            mine, theirs = getattr(encoder, method)(TEXTS, **options), getattr(library, method)(TEXTS, **options)
            assert type(mine) is type(theirs)
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    with pytest.raises(InputError, match="prompt_name=x: this model's prompts are query, document"):
        encoder.encode(TEXTS, prompt_name="x")
    with pytest.raises(InputError, match="pool: encode has no such parameter"):
        encoder.encode(TEXTS, pool=3)
    with pytest.raises(InputError, match="output_value=token_embeddings: choose one of sentence_embedding"):
        encoder.encode(TEXTS, output_value="token_embeddings")
