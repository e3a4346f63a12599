"""An error names a component's parameter; the message for the user has the configuration key that sets it."""

import functools

import pytest
from hydra.errors import InstantiationException

from tercet.app import components
from tercet.app.components import build, component_key, settable_key, start_record
from tercet.app.error_formatting import explain
from tercet.errors import InputError
from tests.conftest import composed, tiny

TEXT = ("data=text", "data.path=my.txt")
OWN_SOURCE = ("evaluation@test=retrieval", "test.source.path=pairs.csv")
GRU = ("objective=quick_thoughts", "data=text", "data.path=my.txt", "model=towers")

KEYS = [  # overrides, component, parameter, the key to set
    (TEXT, "objective.loss", "temperature", "loss.temperature"),
    (TEXT, "objective.encoder", "pooling", "model.pooling"),
    (TEXT, "objective.encoder", "kind", "model.head.kind"),
    (TEXT, "objective.encoder", "head.kind", "model.head.kind"),
    (TEXT, "objective.encoder", "execution.chunk_rows", "model.execution.chunk_rows"),
    (TEXT, "objective.encoder.backbone", "name", "model.backbone.name"),
    (TEXT, "objective.encoder.tokenizer", "name", "model.backbone.name"),
    (TEXT, "data.module.transform.tokenizer", "name", "model.backbone.name"),
    (TEXT, "objective.optimizer", "lr", "optimizer.lr"),
    (TEXT, "objective.scheduler", "warmup", "scheduler.warmup"),
    (TEXT, "objective.mlm", "probability", "objective.mlm.probability"),
    (TEXT, "objective.memory", "size", "objective.memory.size"),
    (TEXT, "data.module", "batch_size", "data.batch_size"),
    (TEXT, "data.module", "seed", "seed"),
    (TEXT, "data.module.source", "path", "data.path"),
    (TEXT, "data.module.source", "held_out", "data.held_out"),
    (TEXT, "data.module.source", "split", "data.train.split"),
    (TEXT, "data.module.transform", "max_length", "data.max_length"),
    (TEXT, "data.module.sampler", "batch_size", "data.batch_size"),
    ((*TEXT, "sampler=pk"), "data.module.sampler", "per_label", "sampler.per_label"),
    ((*TEXT, "sampler=pk"), "data.module", "per_label", "sampler.per_label"),
    ((*TEXT, "view=token_cutoff"), "objective.view", "rate", "view.second.0.rate"),
    ((*TEXT, "loss=triplet"), "objective.loss", "margin", "loss.margin"),
    ((*TEXT, *OWN_SOURCE), "test", "ks", "test.ks"),
    ((*TEXT, *OWN_SOURCE), "test.source", "path", "test.source.path"),
    ((*TEXT, *OWN_SOURCE), "test", "path", "test.source.path"),
    ((*TEXT, "evaluation@test=heldout"), "test.members.retrieval", "ks", "test.members.retrieval.ks"),
    ((*TEXT, "evaluation@test=heldout"), "test.members.retrieval.source", "path", "data.path"),
    ((*TEXT, "evaluation@test=heldout"), "test.members.retrieval", "held_out", "data.held_out"),
    ((*TEXT, "evaluation@validation=stsb_dev"), "validation", "tasks", "validation.tasks"),
    (GRU, "objective.encoder.g", "pooling", "model.f.pooling"),
    (GRU, "objective.encoder.f.tokenizer.source", "path", "data.path"),
    (TEXT, "callback.embeddings", "rows", "callback.embeddings.rows"),
    (TEXT, "callback.last", "save_every", "save_every"),
    (TEXT, "objective.loss", "no_such_parameter", None),
]


@pytest.mark.parametrize(("overrides", "component", "parameter", "key"), KEYS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_key_that_sets_a_parameter(overrides, component, parameter, key):
    start_record(composed(*overrides))
    assert settable_key(component, parameter) == key


BAD = [  # overrides, the node that is built, what the message says
    (["loss.temperature=0"], "objective.loss", "loss.temperature=0"),
    (["loss=triplet", "loss.margin=9"], "objective.loss", "loss.margin=9"),
    (["model.pooling=clss"], "objective.encoder", "model.pooling=clss"),
    (["model.head.kind=conv"], "objective.encoder", "model.head.kind=conv"),
    (["model.execution.layout=random"], "objective.encoder", "model.execution.layout=random"),
    (["view=token_cutoff", "view.second.0.rate=2"], "objective.view", "view.second.0.rate=2"),
    (["data.batch_size=1"], "data.module", "data.batch_size=1"),
    (["evaluation@test=retrieval", "test.source.path={file}", "test.ks=[0]"], "test", "test.ks"),
    (["evaluation@test=retrieval", "test.source.path=x.csv"], "test", "test.source.path=x.csv does not exist"),
    (["data.path=x.csv"], "data.module", "data.path=x.csv does not exist"),
]


@pytest.mark.parametrize(("overrides", "node", "text"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_an_error_of_a_constructor_has_the_key(overrides, node, text, tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("One text.\nAnother one.\n")
    given = [f"data.path={file}", *(override.replace("{file}", str(file)) for override in overrides)]
    cfg = composed(*tiny("data=text", *given))
    start_record(cfg)
    with pytest.raises(InstantiationException) as caught:
        build(functools.reduce(lambda part, name: part[name], node.split("."), cfg))
    assert text in explain(caught.value, "train")


class Part:
    """A component with a parameter, which fails when it is used."""

    def __init__(self, size, inner=None):
        self.size, self.inner = size, inner

    def use(self):
        if self.inner is not None:
            self.inner.use()
        raise InputError(f"`size`={self.size}: too large, and `inner.size` is, too. Use `count`=2.")


def test_an_error_of_a_method_has_the_key_of_the_object_that_raised_it():
    target = f"{__name__}.Part"
    cfg = composed("+outer={_target_: '', size: 3, inner: {_target_: '', size: '${seed}'}}", "+part={_target_: '', size: 7}")
    for node in (cfg.outer, cfg.outer.inner, cfg.part):
        node._target_ = target
    start_record(cfg)
    outer, part = build(cfg.outer), build(cfg.part)
    for used, expected in ((part, "part.size=7: too large"), (outer, "seed=1: too large"), (outer.inner, "seed=1: too large")):
        with pytest.raises(InputError) as caught:
            used.use()
        assert explain(caught.value, "train").startswith(expected)
    assert component_key(outer.inner) == "outer.inner"
    assert component_key("text") is None
    assert "count=2" in explain(caught.value, "train")  # no key is called so: the bare name


class Silent(Part):
    def use(self):
        raise InputError("There is too much of it.")


def test_a_message_without_a_parameter_begins_with_the_key_of_the_component():
    cfg = composed("+outer={_target_: '', size: 3}")
    cfg.outer._target_ = f"{__name__}.Silent"
    start_record(cfg)
    with pytest.raises(InputError) as caught:
        build(cfg.outer).use()
    assert explain(caught.value, "train") == "outer: There is too much of it."


def test_what_a_partial_makes_is_recorded():
    cfg = composed(*TEXT, "sampler=random")
    cfg.sampler._target_ = f"{__name__}.Part"
    start_record(cfg)
    make = build(cfg.sampler)
    assert component_key(make) == component_key(made := make(3)) == "sampler"
    assert made.size == 3


def test_the_record_does_not_keep_components_alive():
    start_record(composed(*TEXT))
    part = components.record(Part(1), "part")
    found = components._Run.keys[id(part)][0]
    del part
    assert found() is None
