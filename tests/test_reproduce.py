"""docs/reproduce.md: each command reads its files, of which stand-ins of a few rows lie where the page says."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tercet.app.components import build
from tercet.evaluation.senteval import COUNTS, PAIRS, POLARITY, SUBSETS, TREC
from tests.conftest import composed
from tests.test_docs import ROOT, blocks, commands, overrides

PAGE = ROOT / "docs" / "reproduce.md"
COMMANDS = list(commands(PAGE))


def write_senteval(root):
    """Two rows in every file of SentEval's folder."""
    files = {}
    for task, subsets in SUBSETS.items():
        for subset in subsets:
            files[f"STS/{task}-en-test/STS.input.{subset}.txt"] = "a b\ta c\nd e\tf g\n"
            files[f"STS/{task}-en-test/STS.gs.{subset}.txt"] = "3.5\n1\n"
    for name, skipped, cells in PAIRS.values():
        rows = [["x"] * 7 for _ in range(2)]
        for score, row in enumerate(rows):
            row[cells[2]] = f"{score}.5"
        files[name] = "head\n" * skipped + "".join("\t".join(row) + "\n" for row in rows)
    files |= {name: "bad\nvery bad\n" for both in POLARITY.values() for name in both}
    files |= {f"SST/binary/sentiment-{split}": "bad\t0\ngood\t1\n" for split in ("train", "dev", "test")}
    files |= dict.fromkeys(TREC.values(), "DESC:def What ?\nNUM:date When ?\n")
    files |= {f"MRPC/msr_paraphrase_{split}.txt": "head\n0\t1\t2\ta\tb\n1\t1\t2\ta\ta\n" for split in ("train", "test")}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    sizes = {task: 2 * len(subsets) for task, subsets in SUBSETS.items()} | dict.fromkeys(POLARITY, 4)
    return {task: dict.fromkeys(counts, sizes.get(task, 2)) for task, counts in COUNTS.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory that the page describes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TERCET_DATA", raising=False)
    counts = write_senteval(tmp_path / "SentEval" / "data" / "downstream")
    for task, known in counts.items():
        monkeypatch.setitem(COUNTS, task, known)
    (tmp_path / "wiki1m_for_simcse.txt").write_text("".join(f"sentence {i}\n" for i in range(9)))
    triplets = "".join(f'premise {i},"entailed, {i}",contradicted {i}\n' for i in range(9))
    (tmp_path / "nli_for_simcse.csv").write_text("sent0,sent1,hard_neg\n" + triplets)
    books = {
        "document": [f"book {i // 6}" for i in range(60)],
        "position": [*range(6)] * 10,
        "text": [f"sentence {i}" for i in range(60)],
    }
    pq.write_table(pa.table(books), tmp_path / "books.parquet")
    for name in ("Ann", "Bo", "Cy", "Di"):
        for folder in ("faces", "lfw"):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in (1, 2):
                pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{name}_000{number}.jpg")
    (tmp_path / "pairs.txt").write_text("2\t1\nAnn\t1\t2\nAnn\t1\tBo\t1\nCy\t1\t2\nCy\t1\tDi\t1\n")
    return tmp_path


def test_the_page_has_the_papers_tables():
    experiments = {word.partition("=")[2] for _, words in COMMANDS for word in words if word.startswith("experiment=")}
    sizes = {f"simcse_{kind}_{model}" for kind in ("unsup", "sup") for model in
             ("bert_base", "bert_large", "roberta_base", "roberta_large")}  # fmt: skip
    assert experiments == sizes | {"facenet", "quick_thoughts"}


@pytest.mark.parametrize(("entry", "words"), COMMANDS, ids=map(str, range(len(COMMANDS))))
def test_a_command_reads_its_files(here, entry, words):
    cfg = composed(*overrides(entry, words), entry=entry)
    if entry == "train":
        rows = build(cfg.data.train).rows()
        assert len(rows) == {"wiki1m": 9, "nli": 9}.get(cfg.data.name, len(rows)) > 0
        evaluators = [build(node) for node in (cfg.validation, cfg.test) if "path" in node]
    else:
        evaluators = [build(cfg.evaluation)]
    for evaluator in evaluators:
        for name in ("pairs", "data", "protocol", "images"):
            assert getattr(evaluator, name, True), name  # read at first use


def test_simcses_commands_are_measured_on_the_papers_pairs(here):
    for entry, words in COMMANDS:
        if entry == "train" and any("simcse" in word for word in words):
            cfg = composed(*overrides(entry, words))
            assert cfg.validation.path == cfg.test.path == "SentEval/data/downstream"
            assert cfg.monitor == "val/sts/stsb/spearman"


def test_the_check_of_the_folder_counts_its_rows(here, capsys):
    (block,) = blocks(PAGE, "python")
    exec(block, {})
    years, dev, transfer = capsys.readouterr().out.splitlines()
    assert years == "{'STS12': 10, 'STS13': 6, 'STS14': 12, 'STS15': 10, 'STS16': 10, 'STS-B': 2, 'SICK-R': 2}"
    assert dev == "{'STS-B': 2}"
    assert transfer == "{'MR': 4, 'CR': 4, 'SUBJ': 4, 'MPQA': 4, 'SST2': 6, 'TREC': 4, 'MRPC': 4}"
