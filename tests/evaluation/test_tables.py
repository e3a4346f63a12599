"""Tables of evaluators are read as those of training: a TSV has no quotes, and each fault has one message."""

import pytest

from tercet.errors import InputError
from tercet.evaluation import STS, Transfer, Verification
from tests.evaluation.fakes import words

QUOTED = (4, 9, 15)  # rows whose first sentence begins with a quote that nothing closes


def sentence(i):
    return ('"' if i in QUOTED else "") + f"A man plays the guitar {i}."


def test_a_quote_in_a_tsv_takes_up_no_rows(tmp_path):
    lines = [f"STS-B\tx\ttest\t{sentence(i)}\tSomeone plays {i}.\t{i * 0.7 % 5:.1f}" for i in range(20)]
    (tmp_path / "sts.tsv").write_text("task\tsubset\tsplit\tsentence1\tsentence2\tscore\n" + "\n".join(lines))
    evaluator = STS(tmp_path / "sts.tsv", ["STS-B"])
    assert evaluator.pairs["STS-B"].first == [sentence(i) for i in range(20)]
    assert len(evaluator.pairs["STS-B"].gold) == 20
    assert evaluator(words)

    lines = [f"CR\tall\t{sentence(i)}\t\t{i % 2}" for i in range(20)]
    (tmp_path / "transfer.tsv").write_text("task\tsplit\tsentence1\tsentence2\tlabel\n" + "\n".join(lines))
    assert Transfer(tmp_path / "transfer.tsv", ["CR"]).data["CR"].first == [sentence(i) for i in range(20)]


def test_a_quote_in_pairs_of_faces(tmp_path):
    rows = [(1, "true", '"Ann', 1, '"Ann', 2), (1, "false", '"Ann', 1, "Bo", 1), (2, "true", "Cy", 1, "Cy", 2)]
    rows += [(2, "false", "Cy", 1, '"Di', 1)]
    lines = ["fold\tsame\tidentity1\timage1\tidentity2\timage2", *("\t".join(map(str, row)) for row in rows)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    faces = Verification(tmp_path, tmp_path / "pairs.tsv").protocol.faces
    assert faces == [('"Ann', 1), ('"Ann', 2), ("Bo", 1), ("Cy", 1), ("Cy", 2), ('"Di', 1)]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_cell_that_is_never_closed(tmp_path, kind):
    """In a CSV it is an error with its line; a TSV has no such cells."""
    path, mark = tmp_path / f"sts.{kind}", {"csv": ",", "tsv": "\t"}[kind]
    rows = ["task subset split sentence1 sentence2 score", "STS-B x test a b 1", 'STS-B x test "a c 2', "STS-B x test a d 3"]
    path.write_text("\n".join(rows).replace(" ", mark))
    if kind == "tsv":
        assert STS(path, ["STS-B"]).pairs["STS-B"].first == ["a", '"a', "a"]
    else:
        with pytest.raises(InputError, match="line 3"):
            STS(path, ["STS-B"])(words)


def test_an_object_that_is_too_deep(tmp_path):
    """pyarrow's reader ends the process with a segmentation fault here."""
    path = tmp_path / "sts.jsonl"
    path.write_text('{"task": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(InputError, match=r"sts\.jsonl: line 1"):
        STS(path, ["STS-B"])(words)
