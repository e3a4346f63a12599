"""The checkpoint that validation selects is the best one, also where less is better."""

import csv

from tercet.models.folder import read_checkpoint

METRIC = "val/alignment_uniformity/text/alignment"


def test_the_checkpoint_of_the_least_alignment_is_kept(run):
    validated = ["evaluation@validation=heldout", "trainer.val_check_interval=2", "logger=csv", "optimizer.lr=0.01"]
    result = run(*validated, f"monitor={METRIC}", "trainer.max_epochs=2", "trainer.num_sanity_val_steps=1")
    assert result.code == 0, result.terminal
    with (result.output / "metrics.csv").open(newline="") as file:
        found = {int(row["step"]): float(row[METRIC]) for row in csv.DictReader(file) if row[METRIC]}
    start = found.pop(0, None)
    best = min(found, key=found.__getitem__)
    assert found[best] < max(found.values()), "nothing is shown"
    # A validation is logged at the step after which it is made, counted from 0.
    assert read_checkpoint(result.output / "checkpoints" / "best.ckpt")["global_step"] in (best, best + 1)
    kept = "Nothing beat the start" in result.terminal
    assert kept == (start is not None and start <= found[best])
