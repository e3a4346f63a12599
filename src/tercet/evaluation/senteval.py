"""SentEval's folder, ``data/downstream`` as its scripts make it: STS and classification tasks, checked to be complete."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tercet.errors import InputError, require

# Pairs and rows of each task's splits, blank lines included, those without a gold score left out.
COUNTS = {
    "STS12": {"test": 3108}, "STS13": {"test": 1500}, "STS14": {"test": 3750}, "STS15": {"test": 3000},
    "STS16": {"test": 1186}, "STS-B": {"dev": 1500, "test": 1379}, "SICK-R": {"dev": 500, "test": 4927},
    "MR": {"all": 10662}, "CR": {"all": 3775}, "SUBJ": {"all": 10000}, "MPQA": {"all": 10606},
    "SST2": {"train": 67349, "dev": 872, "test": 1821}, "TREC": {"train": 5452, "test": 500},
    "MRPC": {"train": 4076, "test": 1725},
}  # fmt: skip
SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),  # SMT is not free, and no part of SentEval
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
PAIRS = {  # file, its lines before the first pair, and the cells that are sentence1, sentence2 and score
    ("STS-B", "dev"): ("STS/STSBenchmark/sts-dev.csv", 0, (5, 6, 4)),
    ("STS-B", "test"): ("STS/STSBenchmark/sts-test.csv", 0, (5, 6, 4)),
    ("SICK-R", "dev"): ("SICK/SICK_trial.txt", 1, (1, 2, 3)),
    ("SICK-R", "test"): ("SICK/SICK_test_annotated.txt", 1, (1, 2, 3)),
}
POLARITY = {  # files of the labels 0 and 1
    "MR": ("MR/rt-polarity.neg", "MR/rt-polarity.pos"), "CR": ("CR/custrev.neg", "CR/custrev.pos"),
    "SUBJ": ("SUBJ/subj.subjective", "SUBJ/subj.objective"), "MPQA": ("MPQA/mpqa.neg", "MPQA/mpqa.pos"),
}  # fmt: skip
TREC = {"train": "TREC/train_5500.label", "test": "TREC/TREC_10.label"}
Row = dict[str, Any]


class SentEval:
    """The rows of SentEval's folder; ``path``, as the user wrote it, opens messages.

    A row has the columns that a table would have (sentence1, sentence2, score or label, subset, split) and ``where``, its place
    for messages. A task that has other numbers of rows than SentEval's is an ``InputError``: it is another test.
    """

    def __init__(self, folder: Path, path: str | Path) -> None:
        places = (folder, folder / "downstream", folder / "data" / "downstream")
        self.root = next((place for place in places if (place / "STS").is_dir() or (place / "MR").is_dir()), folder)
        self.path = path

    def sts(self, task: str, split: str) -> list[Row]:
        """The pairs of ``test`` or ``dev``; score "" where people gave none."""
        if task in SUBSETS:
            rows = [row for subset in SUBSETS[task] for row in self._year(task, subset)]
        else:
            name, skipped, (first, second, score) = PAIRS[task, split]
            rows = [
                {"sentence1": cells[first], "sentence2": cells[second], "score": cells[score], "split": split, "where": where}
                for where, cells in self._cells(name, max(first, second, score) + 1, skipped)
            ]
        self._check(task, {split: sum(row["score"] != "" for row in rows)})
        return rows

    def transfer(self, task: str) -> list[Row]:
        """The rows of a classification task; of a blank line the sentence is ".", as in SentEval's examples."""
        rows = list(self._labeled(task))
        for row in rows:
            row["sentence1"] = row["sentence1"].strip() or "."
        self._check(task, Counter(row["split"] for row in rows))
        return rows

    def _year(self, task: str, subset: str) -> Iterator[Row]:
        names = [f"STS/{task}-en-test/STS.{kind}.{subset}.txt" for kind in ("input", "gs")]
        pairs, scores = list(self._cells(names[0], 2)), self._lines(names[1])
        fault = f"{names[0]} has {len(pairs)} lines and {names[1]} {len(scores)}"
        require(len(pairs) == len(scores), f"`path`={self.path}: {fault}. Copy the folder anew.")
        for (where, (first, second, *_)), score in zip(pairs, scores, strict=True):
            yield {"subset": subset, "sentence1": first, "sentence2": second, "score": score.strip(), "where": where}

    def _labeled(self, task: str) -> Iterator[Row]:
        """The rows of a classification task; texts are of the encodings in which SentEval reads them."""
        if task in POLARITY:
            for label, name in enumerate(POLARITY[task]):
                for where, (text, *_) in self._cells(name, 1, encoding="latin-1"):
                    yield {"split": "all", "sentence1": text, "label": label, "where": where}
        for split in COUNTS[task]:
            if task == "SST2":
                for where, cells in self._cells(f"SST/binary/sentiment-{split}", 2):
                    yield {"split": split, "sentence1": cells[0], "label": cells[1], "where": where}
            elif task == "TREC":  # "DESC:manner How did serfdom develop ?"
                for where, (line, *_) in self._cells(TREC[split], 1, encoding="latin-1"):
                    kind, _, text = line.partition(" ")
                    yield {"split": split, "sentence1": text, "label": kind.partition(":")[0], "where": where}
            elif task == "MRPC":
                for where, cells in self._cells(f"MRPC/msr_paraphrase_{split}.txt", 5, 1):
                    yield {"split": split, "sentence1": cells[3], "sentence2": cells[4], "label": cells[0], "where": where}

    def _cells(self, name: str, least: int, skipped: int = 0, encoding: str = "utf-8-sig") -> Iterator[tuple[str, list[str]]]:
        """The place and the cells of each line, ``least`` or more; quotes are characters like others."""
        for number, line in enumerate(self._lines(name, encoding)[skipped:], start=skipped + 1):
            cells, where = line.split("\t"), f"`path`={self.path}, {name}, line {number}"
            require(len(cells) >= least, f"{where}: {len(cells)} cells, {least} are needed. Copy the folder anew.")
            yield where, cells

    def _lines(self, name: str, encoding: str = "utf-8-sig") -> list[str]:
        file = self.root / name
        accepted = "SentEval's folder data/downstream, complete for the `tasks`, or a table"
        require(file.is_file(), f"`path`={self.path} is a folder without {name}. It takes {accepted}.")
        try:
            lines = file.read_text(encoding).split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"`path`={self.path}, {name}: byte {error.start} is not UTF-8. Copy the folder anew.") from error
        return lines if lines[-1] else lines[:-1]

    def _check(self, task: str, counts: dict[str, int]) -> None:
        for split, count in counts.items():
            fault = f"{task} has {count:,} {split} rows here, SentEval's {COUNTS[task][split]:,}"
            advice = f"Copy the folder anew, leave {task} out of `tasks`, or read your own rows from a table"
            require(count == COUNTS[task][split], f"`path`={self.path}: {fault}: this is another test. {advice}.")
