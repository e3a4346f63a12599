"""Model folders of sentence-transformers, versions 2 to 6: equal vectors, or a refusal by name.

The layouts are those of public models, with small random weights. What is right is computed row by row with transformers and
torch alone (``vector``), and by sentence-transformers itself.
"""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer, SqueezeBertConfig, SqueezeBertModel

from tercet.errors import InputError
from tercet.models import load, load_backbone, load_tokenizer, save_model
from tercet.models.folder import KEY, encoder_spec, load_checkpoint_encoder
from tercet.models.sentence_transformers import MODEL_SETTINGS, default_prompt
from tercet.training.masked_lm import MaskedLM

TEXTS = ["A man plays.", "WHO is Anna, and where?", "one two three four five six", "x", "B"]
HIDDEN = 12
V2, V5 = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
V6 = "sentence_transformers.base.modules.{0}.{1}"


def unit(x):
    return x / x.norm()


def mean(h):
    return h.mean(0)


@dataclass
class Layout:
    """A model folder: the types of its modules, the files beside them, and the vector of a row's hidden states ``(T, H)``."""

    vector: Callable[[torch.Tensor, dict[str, Callable]], torch.Tensor]
    modules: list[tuple[str, str]]  # type and path
    files: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, tuple[int, bool, str, str]] = field(default_factory=dict)  # path: columns, bias, activation, file
    prompt: str = ""
    pools_prompt: bool = True
    lower: bool = False
    length: int = 64

    @property
    def transformer(self):
        return self.modules[0][1]


def version_2(*names, root=""):
    kinds = ["Transformer", "Pooling", *names]
    return [(V2 + kind, f"{i}_{kind}" if i else root) for i, kind in enumerate(kinds)]


def length(n, lower=False):
    return {"sentence_bert_config.json": {"max_seq_length": n, "do_lower_case": lower}}


def pooling(mode, **others):
    return {"1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, f"pooling_mode_{mode}": True, **others}}


def said(**values):
    return {"config_sentence_transformers.json": {"__version__": {"sentence_transformers": "3.0.0"}, **values}}


WEIGHTS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
V6_MODULES = [
    (V6.format("transformer", "Transformer"), ""), (V5 + "pooling.Pooling", "1_Pooling"),
    (V6.format("dense", "Dense"), "2_Dense"), (V6.format("normalize", "Normalize"), "3_Normalize"),
]  # fmt: skip
V6_TEXT = {
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}  # fmt: skip
WHY = "Represent this question: "

LAYOUTS = {
    "all-MiniLM-L6-v2": Layout(
        lambda h, d: unit(mean(h)), version_2("Normalize"), {**length(64), **pooling("mean_tokens")}
    ),
    "distiluse-base-multilingual-cased-v2": Layout(
        lambda h, d: d["2_Dense"](mean(h)), version_2("Dense"), {**length(16), **pooling("mean_tokens")},
        {"2_Dense": (8, True, "activation.Tanh", "bin")}, length=16,
    ),
    "LaBSE": Layout(
        lambda h, d: unit(d["2_Dense"](h[0])), version_2("Dense", "Normalize"), {**length(64), **pooling("cls_token")},
        {"2_Dense": (HIDDEN, True, "activation.Tanh", "bin")},
    ),
    "gtr-t5-base": Layout(
        lambda h, d: unit(d["2_Dense"](mean(h))), version_2("Dense", "Normalize"), {**length(64), **pooling("mean_tokens")},
        {"2_Dense": (10, False, "linear.Identity", "safetensors")},
    ),
    "bert-base-nli-mean-tokens": Layout(
        lambda h, d: mean(h), version_2(root="0_Transformer"),
        {"0_Transformer/sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": True}, **pooling("mean_tokens")},
        lower=True, length=12,
    ),
    "paraphrase-distilroberta-base-v1": Layout(
        lambda h, d: h.amax(0), version_2(),
        {"sentence_roberta_config.json": {"max_seq_length": 9, "do_lower_case": False}, **pooling("max_tokens")}, length=9,
    ),
    "multi-qa-mpnet-base-dot-v1": Layout(
        lambda h, d: h[0], version_2(), {**length(64), **pooling("cls_token"), **said(similarity_fn_name="dot")}
    ),
    "mxbai-embed-large-v1": Layout(
        lambda h, d: h[0], version_2(),
        {**length(64), **pooling("cls_token"), **said(prompts={"query": WHY, "passage": ""}, default_prompt_name="query")},
        prompt=WHY,
    ),
    "instructor-base": Layout(
        lambda h, d: unit(d["2_Dense"](mean(h))), version_2("Dense", "Normalize"),
        {**length(64), **pooling("mean_tokens", include_prompt=False), **said(prompts={"q": WHY}, default_prompt_name="q")},
        {"2_Dense": (HIDDEN, False, "linear.Identity", "bin")}, prompt=WHY, pools_prompt=False,
    ),
    "SGPT-125M-weightedmean-nli": Layout(
        lambda h, d: (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / torch.arange(1, len(h) + 1).sum(), version_2(),
        {**length(64), **pooling("weightedmean_tokens")},
    ),
    "stella_en_400M_v5": Layout(
        lambda h, d: d["4_Dense"](d["3_Dense"](unit(mean(h)))), version_2("Normalize", "Dense", "Dense"),
        {**length(64), **pooling("mean_tokens")},
        {"3_Dense": (16, True, "activation.GELU", "safetensors"), "4_Dense": (8, True, "linear.Identity", "safetensors")},
    ),
    "embeddinggemma-300m": Layout(
        lambda h, d: unit(d["2_Dense"](h[-1]))[:5], V6_MODULES,
        {"sentence_bert_config.json": V6_TEXT,
         "1_Pooling/config.json": {"embedding_dimension": HIDDEN, "pooling_mode": "lasttoken"},
         "3_Normalize/config.json": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
         **said(model_type="SentenceTransformer", truncate_dim=5, prompts={"query": "", "document": ""})},
        {"2_Dense": (8, True, "activation.ReLU", "safetensors")},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a small BERT and a cased tokenizer whose pieces are single characters."""
    folder = tmp_path_factory.mktemp("parts")
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=False, model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def write(layout, parts, folder):
    """Write a layout as a folder."""
    root = folder / layout.transformer
    root.mkdir(parents=True, exist_ok=True)
    for file in parts.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(layout.modules)]
    for name, content in {**layout.files, "modules.json": modules}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    size = HIDDEN
    for path, (columns, bias, activation, kind) in layout.dense.items():
        (folder / path).mkdir()
        config = {
            "in_features": size,
            "out_features": columns,
            "bias": bias,
            "activation_function": f"torch.nn.modules.{activation}",
        }
        (folder / path / "config.json").write_text(json.dumps(config))
        weights = {"linear.weight": torch.randn(columns, size) / 3, **({"linear.bias": torch.randn(columns)} if bias else {})}
        {"safetensors": save_file, "bin": torch.save}[kind](weights, folder / path / WEIGHTS[kind])
        size = columns
    for _, path in layout.modules:  # sentence-transformers writes an empty folder for a module without settings
        (folder / path).mkdir(exist_ok=True)
    return folder


def expected(layout, folder, texts=TEXTS):
    """The vectors, one row at a time, by transformers and torch."""
    root = folder / layout.transformer
    tokenizer, backbone = AutoTokenizer.from_pretrained(root), AutoModel.from_pretrained(root).eval()
    dense = {}
    for path, (_, bias, activation, kind) in layout.dense.items():
        file = folder / path / WEIGHTS[kind]
        weights = load_file(file) if kind == "safetensors" else torch.load(file, weights_only=True)
        function = getattr(torch.nn, activation.rsplit(".", 1)[-1])()
        dense[path] = lambda x, w=weights, f=function, b=bias: f(w["linear.weight"] @ x + (w["linear.bias"] if b else 0))
    skipped = 0 if layout.pools_prompt else len(tokenizer(layout.prompt).input_ids) - 1
    out = []
    for text in texts:
        text = layout.prompt + text
        ids = tokenizer(text.lower() if layout.lower else text, truncation=True, max_length=layout.length).input_ids
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, skipped:]
            out.append(layout.vector(hidden, dense))
    return torch.stack(out)


@pytest.fixture(params=LAYOUTS)
def case(request, parts, tmp_path):
    folder = write(LAYOUTS[request.param], parts, tmp_path / request.param)
    return LAYOUTS[request.param], folder


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_the_vectors_are_those_of_the_layout(case):
    close(load(case[1]).encode(TEXTS), expected(*case))


def test_they_come_back_from_a_folder_and_a_checkpoint(case, tmp_path):
    made = load(case[1])
    save_model(made, tmp_path / "again")
    again = load(tmp_path / "again")
    close(again.encode(TEXTS), expected(*case))
    assert again.settings() == made.settings()
    state = {f"encoder.{name}": x for name, x in made.state_dict().items()}
    torch.save({"state_dict": state, KEY: encoder_spec(made)}, tmp_path / "x.ckpt")
    close(load_checkpoint_encoder(tmp_path / "x.ckpt").eval().encode(TEXTS), expected(*case))


def by_sentence_transformers(folder):
    library = pytest.importorskip("sentence_transformers")
    return torch.tensor(library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_sentence_transformers_says_the_same(case, tmp_path):
    want = expected(*case)
    close(by_sentence_transformers(case[1]), want)
    save_model(load(case[1]), tmp_path / "again")
    close(by_sentence_transformers(tmp_path / "again"), want)


def test_what_a_folder_says_beside_its_vectors_is_kept(parts, tmp_path):
    from sentence_transformers import SentenceTransformer

    for name in ("multi-qa-mpnet-base-dot-v1", "instructor-base", "embeddinggemma-300m"):
        save_model(load(write(LAYOUTS[name], parts, tmp_path / name)), tmp_path / "again" / name)
    opened = {path.name: SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "again").iterdir()}
    assert opened["multi-qa-mpnet-base-dot-v1"].similarity_fn_name == "dot"
    assert opened["instructor-base"].prompts["q"] == WHY
    assert opened["instructor-base"].default_prompt_name == "q"
    assert opened["instructor-base"][1].include_prompt is False
    assert opened["embeddinggemma-300m"].truncate_dim == 5


@pytest.mark.parametrize(
    "name", ["mxbai-embed-large-v1", "instructor-base", "embeddinggemma-300m", "multi-qa-mpnet-base-dot-v1"]
)
def test_queries_documents_and_similarities_are_as_in_sentence_transformers(parts, tmp_path, name):
    """Also after a round trip. For queries and documents a prompt that is empty or missing replaces the default one."""
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(write(LAYOUTS[name], parts, tmp_path / "first")), device="cpu")
    save_model(load(tmp_path / "first"), tmp_path / "again")
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert (again.prompts, again.truncate_dim) == (library.prompts, library.truncate_dim)
    assert (again.default_prompt_name, again.similarity_fn_name) == (library.default_prompt_name, library.similarity_fn_name)
    for model in (load(tmp_path / "first"), load(tmp_path / "again")):
        z = {}
        for method in ("encode", "encode_query", "encode_document"):
            mine, theirs, saved = (getattr(each, method)(TEXTS, convert_to_tensor=True) for each in (model, library, again))
            close(mine, theirs)
            close(saved, theirs)
            z[method] = mine
        found = model.similarity(z["encode_query"], z["encode_document"])
        torch.testing.assert_close(found, library.similarity(z["encode_query"], z["encode_document"]))
        assert torch.equal(z["encode_query"], z["encode_document"]) == (name != "mxbai-embed-large-v1")


@pytest.mark.parametrize("name", ["maxsim", 7])
def test_a_similarity_that_is_unknown_is_refused_by_name(parts, tmp_path, name):
    folder = write(LAYOUTS["multi-qa-mpnet-base-dot-v1"], parts, tmp_path)
    (folder / MODEL_SETTINGS).write_text(json.dumps({"similarity_fn_name": name}))
    with pytest.raises(InputError, match=f"its similarity function is {name}; tercet knows cosine, dot, euclidean, manhattan"):
        load(folder)


def test_a_folder_that_is_written_again_keeps_nothing_of_before(parts, tmp_path):
    save_model(load(write(LAYOUTS["instructor-base"], parts, tmp_path / "first")), tmp_path / "model")
    plain = load(write(LAYOUTS["all-MiniLM-L6-v2"], parts, tmp_path / "second"))
    save_model(plain, tmp_path / "model")
    close(load(tmp_path / "model").encode(TEXTS), plain.encode(TEXTS))
    close(by_sentence_transformers(tmp_path / "model"), plain.encode(TEXTS))


def test_another_similarity_is_said(parts, tmp_path, caplog):
    load(write(LAYOUTS["multi-qa-mpnet-base-dot-v1"], parts, tmp_path))
    assert "similarity function is dot; evaluations but those of mteb compare embeddings" in caplog.text


def test_prompts_of_encode(parts, tmp_path):
    model = load(write(LAYOUTS["mxbai-embed-large-v1"], parts, tmp_path))
    bare = model.encode(TEXTS, prompt="")
    close(model.encode(TEXTS), model.encode([WHY + text for text in TEXTS], prompt=""))
    close(model.encode(TEXTS, prompt="To: "), model.encode([f"To: {text}" for text in TEXTS], prompt=""))
    assert not torch.allclose(bare, model.encode(TEXTS))
    assert model.prompts.text == WHY


def test_lowercase_and_the_inner_folder_are_read_for_training_too(parts, tmp_path):
    folder = write(LAYOUTS["bert-base-nli-mean-tokens"], parts, tmp_path)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("ABC").input_ids == tokenizer("abc").input_ids
    assert load_backbone(str(folder)).config.hidden_size == HIDDEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "max"]}}, "its pooling is mean and max; .*take no other"),
        ({"1_Pooling/config.json": {"pooling_mode": "mean_sqrt_len_tokens"}}, "its pooling is mean_sqrt_len_tokens"),
        ({"2_Dense/config.json": {"out_features": 8, "activation_function": "my.Act"}}, "its Dense has the activation my.Act"),
        ({"2_Dense/config.json": {"out_features": 8, "use_residual": True}}, "its module Dense has {.use_residual"),
        ({"2_Dense/config.json": {"out_features": 8, "module_input_name": "token_embeddings"}}, "module_input_name"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "its transformer has {'transformer_task'"),
        ({"sentence_bert_config.json": {"modality_config": {"image": {}}}}, "it reads image; tercet reads texts"),
        ({"sentence_bert_config.json": {"query_length": 32}}, "its transformer has {'query_length': 32}"),
        ({"sentence_bert_config.json": {"new_setting": 5}}, "its transformer has the settings {'new_setting': 5}"),
        ({"1_Pooling/config.json": {"pooling_mode": "mean", "new": 1}}, "its module Pooling has the settings {'new': 1}"),
        ({"2_Dense/config.json": {"out_features": 8, "new": 1}}, "its module Dense has the settings {'new': 1}"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, r"an adapter to another model \(PEFT\)\. Merge the adapter first"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "it is a SparseEncoder"),
        ({"modules.json": [{"path": "", "type": V2 + "WordEmbeddings"}]}, "its module 0, .*WordEmbeddings"),
        ({"modules.json": [{"path": "", "type": V2 + "Transformer"}]}, "it has no module that pools"),
        ({"modules.json": [{"path": "", "type": "custom.Transformer"}]}, "its module 0, custom.Transformer"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_by_name(parts, tmp_path, change, message):
    layout = LAYOUTS["distiluse-base-multilingual-cased-v2"]
    folder = write(layout, parts, tmp_path)
    for name, content in change.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_settings_that_change_no_embedding_are_accepted(parts, tmp_path):
    layout = LAYOUTS["distiluse-base-multilingual-cased-v2"]
    folder = write(layout, parts, tmp_path)
    harmless = {"max_seq_length": 16, "unpad_inputs": True, "model_args": {}, "module_output_name": "token_embeddings"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(harmless))
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_weightedmean_tokens": False, "word_embedding_dimension": HIDDEN}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    close(load(folder).encode(TEXTS), expected(layout, folder))


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "distiluse-base-multilingual-cased-v2"])
def test_a_truncation_above_the_width_is_none(name, parts, tmp_path):
    folder = write(LAYOUTS[name], parts, tmp_path / "first")
    (folder / MODEL_SETTINGS).write_text(json.dumps({"truncate_dim": 64}))
    model = load(folder)
    want = expected(LAYOUTS[name], folder)
    assert model.dim == want.shape[1]
    close(model.encode(TEXTS), want)
    close(by_sentence_transformers(folder), want)
    save_model(model, tmp_path / "again")
    close(load(tmp_path / "again").encode(TEXTS), want)
    close(by_sentence_transformers(tmp_path / "again"), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
def test_weights_that_are_no_numbers_are_named(parts, tmp_path, file, bad):
    folder = write(LAYOUTS["gtr-t5-base"], parts, tmp_path)
    weights = load_file(folder / file)
    name = next(name for name in weights if name in ("linear.weight", "encoder.layer.1.output.dense.bias"))
    weights[name].view(-1)[0] = bad
    save_file(weights, folder / file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"weights hold NaN or infinite values: .*{name.removeprefix('linear.')}\."):
        load(folder)


def test_an_adapter_is_refused_in_training_too(parts, tmp_path):
    folder = write(LAYOUTS["all-MiniLM-L6-v2"], parts, tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"^name=.* has an adapter_config.json: .*Merge the adapter first"):
        load_backbone(str(folder))


def test_a_pooling_that_is_chosen_needs_none_that_is_known(parts, tmp_path):
    folder = write(LAYOUTS["distiluse-base-multilingual-cased-v2"], parts, tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean_sqrt_len_tokens"}))
    close(load(folder, pooling="mean").encode(TEXTS), expected(LAYOUTS["distiluse-base-multilingual-cased-v2"], folder))
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": V2 + "Transformer"}]))
    assert load(folder, pooling="max").pooling == "max"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_mended(parts, tmp_path, prefix):
    layout = LAYOUTS["gtr-t5-base"]
    folder = write(layout, parts, tmp_path)
    want = expected(layout, folder)
    for file in (folder / "model.safetensors", folder / "2_Dense" / "model.safetensors"):
        save_file({prefix + name: x for name, x in load_file(file).items()}, file, {"format": "pt"})
    close(load(folder).encode(TEXTS), want)
    torch.testing.assert_close(load_backbone(str(folder)).state_dict(), AutoModel.from_pretrained(parts).state_dict())


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
def test_weights_that_are_missing_are_named(parts, tmp_path, file):
    folder = write(LAYOUTS["gtr-t5-base"], parts, tmp_path)
    weights = load_file(folder / file)
    lost = [name for name in weights if "layer.1." in name or name == "linear.weight"]
    save_file({name: x for name, x in weights.items() if name not in lost}, folder / file, {"format": "pt"})
    with pytest.raises(InputError, match=r"path_or_id.*lacks weights of the model: .*weight"):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match=r"path_or_id"):
        load(folder)


def test_only_a_pooler_may_be_missing(parts, tmp_path):
    folder = write(LAYOUTS["LaBSE"], parts, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    close(load(folder).encode(TEXTS), expected(LAYOUTS["LaBSE"], folder))
    with pytest.raises(InputError, match="pooling=cls_pooler: BertModel has no pooler"):
        load(folder, pooling="cls_pooler")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_and_saved_as_asked(parts, tmp_path, dtype):
    layout = LAYOUTS["all-MiniLM-L6-v2"]
    folder = write(layout, parts, tmp_path / "half")
    weights = {name: x.to(dtype) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    model = load(folder)
    assert {x.dtype for x in (*model.parameters(), *load_backbone(str(folder)).parameters())} == {torch.float32}
    save_model(model, tmp_path / "full")
    save_model(model, tmp_path / "again", str(dtype).removeprefix("torch."))
    for name, saved in (("full", torch.float32), ("again", dtype)):
        assert {x.dtype for x in load_file(tmp_path / name / "model.safetensors").values()} == {saved}
        assert AutoModel.from_pretrained(tmp_path / name).dtype == saved
        close(load(tmp_path / name).encode(TEXTS), model.encode(TEXTS))
    assert {p.dtype for p in MaskedLM(weight=0.1).build(load(folder)).parameters()} == {torch.float32}
    with pytest.raises(InputError, match="dtype=float64"):
        save_model(model, tmp_path / "x", "float64")


def test_a_pooler_that_cannot_be_left_out_is_not_used_without_its_weights(parts, tmp_path):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    groups = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    config = SqueezeBertConfig(vocab_size=500, embedding_size=HIDDEN, **sizes, **groups)
    SqueezeBertModel(config).save_pretrained(tmp_path)
    load_tokenizer(str(parts)).save_pretrained(tmp_path)
    assert load(tmp_path, pooling="cls_pooler").pooling == "cls_pooler"
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).encode(TEXTS).isfinite().all()
    with pytest.raises(InputError, match="pooling=cls_pooler: SqueezeBertModel has no pooler"):
        load(tmp_path, pooling="cls_pooler")


@pytest.mark.parametrize("settings", [
    {"prompts": []}, {"prompts": ["a"], "default_prompt_name": "a"}, {"prompts": {"a": 5}, "default_prompt_name": "a"},
    {"prompts": {"a": "b"}, "default_prompt_name": ["a"]}, {"prompts": {"a": "b"}}, {"default_prompt_name": "a"}, {},
])  # fmt: skip
def test_a_default_prompt_that_is_none_is_no_error(settings, tmp_path):
    (tmp_path / MODEL_SETTINGS).write_text(json.dumps(settings))
    assert default_prompt(str(tmp_path)) == ""
