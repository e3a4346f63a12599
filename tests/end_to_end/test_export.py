"""``python -m tercet export``, and its folder as a model."""

import json

import pytest
import torch

from tercet.app.components import build
from tercet.models.folder import save_model
from tests.conftest import composed, tiny

pytest.importorskip("onnxscript", reason="tercet[export] is not installed")


def test_an_exported_model_is_measured_as_the_model(command, tmp_path):
    torch.manual_seed(0)
    save_model(build(composed(*tiny()).model).eval(), tmp_path / "model")
    wrote = command("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'onnx'}", "precision=float32")
    assert wrote.code == 0, wrote.terminal
    assert "Vectors of 8 samples differ from the model's by" in wrote.terminal
    found = []
    for name in ("model", "onnx"):
        output = tmp_path / f"{name}.json"
        result = command("evaluate", f"model={tmp_path / name}", "evaluation=heldout", f"output={output}")
        assert result.code == 0, result.terminal
        found.append(json.loads(output.read_text()))
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    again = command("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'onnx'}")
    assert again.code == 1 and "holds something already" in again.terminal
    refused = command("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'x'}", "format=torch_export")
    assert refused.code == 1 and "precision=int8: format=torch_export has float32, float16" in refused.terminal
    asked = command("evaluate", f"model={tmp_path / 'onnx'}", "evaluation=heldout", "model.normalize=true")
    assert asked.code == 1 and "Export it anew" in asked.terminal
