"""The main job: compose the configuration, check it, measure, train, measure again.

    python train.py                                          adapt MiniLM to Middle English (experiment=quickstart)
    python train.py data=text data.path=my.txt               the same with your own sentences
    python train.py experiment=simcse_unsup_bert_base        a row of the SimCSE paper
    python train.py -m seed=1,2,3                            a sweep; ends with mean ± sd
    python train.py trainer=ddp_cpu trainer.devices=2        two processes

Everything is set by keys of conf/train.yaml and its groups; `python train.py --help` lists them.
"""

from tercet.app.cli import main

if __name__ == "__main__":
    main("train")
