"""The metric of validation by which settings are chosen, in whole runs."""

import json

from tests.conftest import TEXTS, tiny
from tests.end_to_end.conftest import FAST, write_texts


def test_the_kept_weights_are_validated_and_data_without_such_rows_is_no_error(command, tmp_path, caplog):
    write_texts(tmp_path / "my.txt")
    own = [*tiny("data=text", f"data.path={tmp_path / 'my.txt'}", "logger=none"), *FAST[1:], "experiment=quickstart"]
    (tmp_path / "dev.tsv").write_text("question\tanswer\n" + "".join(f"{text}\t{text} too\n" for text in TEXTS))
    given = [
        "evaluation@validation=retrieval",
        f"validation.source.path={tmp_path / 'dev.tsv'}",
        "validation.source.columns=[question,answer]",
    ]
    chosen = command("train", *own, *given, "optimized_metric=val/retrieval/pairs/mrr")
    assert chosen.code == 0, chosen.terminal
    assert "val/retrieval/pairs/mrr" in json.loads((chosen.output / "metrics.json").read_text())
    typo = command("train", *own, *given, "optimized_metric=val/retrieval/pairs/mr", "measure_before=true")
    assert typo.code == 1 and "val/retrieval/pairs/mr was not measured" in typo.terminal and "train/loss" not in typo.terminal
    without = command("train", *own)
    assert without.code == 0 and "holds out no rows for validation" in caplog.text, without.terminal
