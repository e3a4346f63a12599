"""Loading runs no code that comes with a model: of a folder, the Hub, a checkpoint, an exported model, pickled weights."""

import json
import pickle
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tercet.errors import InputError
from tercet.models.exported import ONNX_SETTINGS
from tercet.models.folder import load, save_model
from tests.hub import Repository, local_hub

CODE = {"auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoTokenizer": ["mine.Tokenizer", None]}}
NAMES = r"names Python code that comes with it .*which is not run.*trust_remote_code=true runs it"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def ran(tmp_path):
    """The file that any code of the model makes; it is not there at the end."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(encoder, tmp_path, ran, monkeypatch):
    """A model folder with a Python file, which can be imported under the name ``mine``."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    save_model(encoder, tmp_path / "model")
    (tmp_path / "model" / "mine.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom sentence_transformers.models import Transformer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder(folder, file):
    change(folder / file, **CODE)
    with pytest.raises(InputError, match=rf"path_or_id=.*its {file} {NAMES}"):
        load(folder)


@pytest.mark.parametrize(
    "kind", ["mine.Transformer", "sentence_transformers.models.mine.Other", "mine.sentence_transformers.Pooling"]
)
@pytest.mark.parametrize("place", [0, 1])
def test_modules_of_sentence_transformers(folder, kind, place):
    (folder / "tercet.json").unlink()
    modules = json.loads((folder / "modules.json").read_text())
    modules[place]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=rf"its module {place}, {kind}, is not one that tercet can run"):
        load(folder)


def test_pickled_weights(folder, ran):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(ran)))
    with pytest.raises(InputError, match=r"could not be read as a model|cannot be built"):
        load(folder)


def test_pickled_weights_of_a_layer(folder, ran):
    (folder / "tercet.json").unlink()
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    dense = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(ran)))
    with pytest.raises(InputError, match=r"cannot be built here .*(Unpickling|weights_only)"):
        load(folder)


def test_a_pickled_checkpoint(tmp_path, ran):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"state_dict": Touch(ran)}))
    with pytest.raises(InputError, match=r"x.ckpt cannot be read as a checkpoint"):
        load(tmp_path / "x.ckpt")


def test_an_exported_model(folder, tmp_path):
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "length"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["z"], to=TensorProto.FLOAT)], "g", [ids],
                              [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", "length"])])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    saved = {"precision": "float32", "dim": 4, "sides": 1, "kind": "text", "max_length": 8}
    (folder / ONNX_SETTINGS).write_text(json.dumps(saved))
    assert load(folder).dim == 4
    change(folder / "tokenizer_config.json", **CODE)
    with pytest.raises(InputError, match=r"its tokenizer_config.json names Python code .*not run. Nothing runs it"):
        load(folder)


@pytest.mark.parametrize("kind", ["code", "module"])
def test_a_model_of_the_hub(folder, tmp_path, monkeypatch, kind):
    if kind == "code":
        change(folder / "config.json", **CODE)
    else:
        (folder / "tercet.json").unlink()
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps([{**modules[0], "type": "mine.Transformer"}, *modules[1:]]))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with local_hub(monkeypatch) as hub:
        hub.repositories["someone/coded"] = Repository(False, {"main": files})
        message = rf"path_or_id=someone/coded: its config.json {NAMES}" if kind == "code" else "its module 0, mine.Transformer"
        with pytest.raises(InputError, match=message):
            load("someone/coded")
        assert any("resolve" in request for request in hub.requests)
        assert not any(request.endswith("mine.py") for request in hub.requests)
