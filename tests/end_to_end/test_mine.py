"""``python -m tercet mine``: a file that training takes."""

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tercet.app.commands.mine import KINDS, write_table
from tercet.data import TextFiles
from tests.conftest import MINILM

PAIRS = [(f"how do I {verb} my {thing}?", f"You {verb} the {thing} in the {place} menu.")
         for verb in ("open", "close", "sell", "paint")
         for thing, place in (("car", "garage"), ("house", "home"), ("phone", "settings"))]  # fmt: skip


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "faq.csv"
    # A second answer to the first question: nobody's negative for it.
    rows = [*PAIRS, (PAIRS[0][0], "The car opens with a key."), ("Unrelated?", PAIRS[1][1])]
    path.write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows))
    return path


def mine(command, path, target, *more):
    return command("mine", f"model={MINILM}", f"data.path={path}", f"output={target}", "data.held_out=0", *more)


@pytest.mark.parametrize("ending", KINDS)
def test_pairs_get_the_nearest_answer_of_another_question(command, pairs, tmp_path, ending):
    target = tmp_path / f"hard{ending}"
    said = mine(command, pairs, target, "data.columns=[question,answer]", "guard.relative_margin=null")
    assert said.code == 0, said.terminal
    if ending == ".parquet":
        rows = pq.read_table(target).to_pylist()
    elif ending == ".jsonl":
        import json

        rows = [json.loads(line) for line in target.read_text().splitlines()]
    else:
        options = pyarrow.csv.ParseOptions(
            delimiter="," if ending == ".csv" else "\t", quote_char='"' if ending == ".csv" else False
        )
        rows = pyarrow.csv.read_csv(target, parse_options=options).to_pylist()
    assert len(rows) == len(PAIRS) + 2
    known = {(q, a) for q, a in PAIRS} | {(PAIRS[0][0], "The car opens with a key."), ("Unrelated?", PAIRS[1][1])}
    for row in rows:
        assert (row["anchor"], row["positive"]) in known
        assert (row["anchor"], row["negative"]) not in known
    first = next(row for row in rows if row["positive"] == PAIRS[0][1])
    assert "car" in first["negative"]
    assert 0 < first["negative_cosine"] < first["positive_cosine"] + 0.3
    assert f"data.path={target}" in said.terminal


QUESTIONS = [("What is rain?", "Water that falls from clouds."), ("WHAT IS RAIN?", "It is wet weather with drops."),
             ("what is rain?", "Drops fall down."), ("What is bread?", "Baked dough of flour."),
             ("Who bakes?", "baked dough of FLOUR."), ("What is a river?", "Water that flows to the sea.")]  # fmt: skip


def test_texts_that_the_model_reads_as_one_are_one(command, tmp_path):
    """An uncased model: no answer to a question in other letters is a negative, in pairs or by label."""
    rows = pa.table({"question": [q for q, _ in QUESTIONS], "answer": [a for _, a in QUESTIONS]})
    pq.write_table(rows, tmp_path / "pairs.parquet")
    loose = ["guard.relative_margin=null", "guard.max_similarity=1", "negatives=9"]
    said = mine(
        command, tmp_path / "pairs.parquet", tmp_path / "hard.parquet", "data.columns=[question,answer]", "data=table", *loose
    )
    assert said.code == 0, said.terminal
    found = {(row["anchor"].lower(), row["negative"].lower()) for row in pq.read_table(tmp_path / "hard.parquet").to_pylist()}
    known = {(q.lower(), a.lower()) for q, a in QUESTIONS}
    assert found == {(q, a) for q, _ in known for _, a in known} - known

    texts = ["Rain falls.", "RAIN FALLS.", "It drizzles.", "Bread is baked.", "bread is baked.", "Dough rises."]
    pq.write_table(pa.table({"text": texts, "label": ["w", "w", "w", "b", "b", "w"]}), tmp_path / "texts.parquet")
    options = ["data=table", "data.columns=[text]", "data.label=label", *loose]
    said = mine(command, tmp_path / "texts.parquet", tmp_path / "hard2.parquet", *options)
    assert said.code == 0, said.terminal
    found = {(row["anchor"], row["positive"], row["negative"]) for row in pq.read_table(tmp_path / "hard2.parquet").to_pylist()}
    assert {anchor for anchor, _, _ in found} == {"Rain falls.", "It drizzles.", "Dough rises."}  # bread has one text only
    assert all(anchor != positive and negative == "Bread is baked." for anchor, positive, negative in found)


@pytest.mark.parametrize("ending", KINDS)
def test_any_text_comes_back_from_the_file(tmp_path, ending):
    texts = ['"Well," he said, "no."', "two\nlines, and a\ttab", '"not closed', "plain"]
    table = {name: [f"{text}{i}" for text in texts] for i, name in enumerate(("anchor", "positive", "negative"))}
    write_table(pa.table(table | {"positive_cosine": [0.5] * 4}), tmp_path / f"hard{ending}")
    found = TextFiles(str(tmp_path / f"hard{ending}")).rows().to_dict()
    if ending in (".csv", ".tsv"):
        table = {name: [text.replace("\n", " ").replace("\t", " ") for text in column] for name, column in table.items()}
    assert found == table


def test_a_tsv_is_not_quoted(tmp_path):
    texts = {"anchor": ['"A" is quoted', "b"], "positive": ["c", 'd"'], "negative": ["e", "f"]}
    write_table(pa.table({**texts, "positive_cosine": pa.array([0.5, 0.25], pa.float32())}), tmp_path / "hard.tsv")
    assert (tmp_path / "hard.tsv").read_text().splitlines()[1:] == ['"A" is quoted\tc\te\t0.5', 'b\td"\tf\t0.25']


def test_the_file_is_trained_on(command, pairs, tmp_path):
    from tests.conftest import tiny
    from tests.end_to_end.conftest import FAST

    target = tmp_path / "hard.parquet"
    assert mine(command, pairs, target, "data.columns=[question,answer]").code == 0
    own = ["objective=simcse_sup", "data=text", f"data.path={target}", "data.columns=[anchor,positive,negative]"]
    done = command("train", *tiny(*FAST, *own))
    assert done.code == 0, done.terminal


def test_labelled_texts(command, tmp_path):
    path, target = tmp_path / "labelled.csv", tmp_path / "hard.csv"
    path.write_text("text,verb\n" + "".join(f"{q},{q.split()[3]}\n" for q, _ in PAIRS) + "Alone?,alone\n")
    said = mine(command, path, target, "data.columns=[text]", "data.label=verb", "negatives=2", "skip=1",
                "guard.relative_margin=null", "guard.max_similarity=1")  # fmt: skip
    assert said.code == 0, said.terminal
    rows = pyarrow.csv.read_csv(target).to_pylist()
    assert len(rows) == 2 * len(PAIRS)
    for row in rows:
        verbs = [row[name].split()[3] if row[name] != "Alone?" else "alone" for name in ("anchor", "positive", "negative")]
        assert verbs[0] == verbs[1] != verbs[2]
        assert row["anchor"] != row["positive"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.columns=[question,answer]", "output=hard.txt"], "output=hard.txt: a file that ends in .parquet"),
        (["data.columns=[question]"], "mine needs pairs: two columns"),
        (["data.columns=[question,answer]", "guard.max_similarity=-1"], "No negative is left of 13 texts"),
        (["data.columns=[question,answer]", "negatives=0"], "negatives=0"),
        (["data.columns=[question,answer]", "guard.max_similarity=3"], "max_similarity=3"),
        (["data=text", "data.columns=[question,answer]"], "With `mine` use data=table"),
    ],
)
def test_mistakes_are_explained(command, pairs, tmp_path, overrides, message):
    said = mine(command, pairs, tmp_path / "hard.csv", *overrides)
    assert said.code == 1
    assert message in said.terminal
    assert "Traceback" not in said.terminal
