"""Rephrasing: synonyms of a list, and predictions of a masked language model."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import load_tokenizer
from tercet.rng import derive_seed
from tercet.training import SimCSEUnsup
from tercet.types import TokenBatch
from tercet.views import MLMReplacement, Synonyms, TokenInfo, Views
from tests.conftest import TEXTS, TINY, TOKENIZER, composed, tiny

LIST = "man\tguy\telderly gentleman\n\nharp\tlyre\nsnowballs\tsnow balls\nsnowball fight\tbattle\nmarch\tjune\n"


def seeds(n, seed=7):
    return derive_seed(torch.full((n,), seed), torch.arange(n))


@pytest.fixture(scope="module")
def info():
    torch.manual_seed(0)
    return build(composed(*tiny()).model).token_info()


@pytest.fixture
def synonyms(tmp_path):
    (tmp_path / "list.tsv").write_text(LIST)
    return lambda rate=1.0: Synonyms(str(tmp_path / "list.tsv"), rate)


def rows_of(info, texts):
    return TokenBatch.from_lists(info.tokenizer(texts)["input_ids"])


def said(info, batch):
    return [info.tokenizer.decode(row, skip_special_tokens=True) for row in batch.rows()]


def test_words_of_the_list_are_replaced_and_nothing_else(info, synonyms, caplog):
    texts = ["A man is playing a harp.", "Two children are throwing snowballs.", "Manly harpists.", "Rain."]
    found = {text for seed in range(9) for text in said(info, synonyms()(rows_of(info, texts), seeds(4, seed), info))}
    assert found == {
        "a guy is playing a lyre.", "a elderly gentleman is playing a lyre.", "two children are throwing snow balls.",
        "manly harpists.", "rain.",
    }  # fmt: skip
    assert "1 of 5 words are several" in caplog.text
    unchanged = synonyms(0.0)(rows_of(info, texts), seeds(4), info)
    assert unchanged.ids.tolist() == rows_of(info, texts).ids.tolist()


def test_the_rate_is_the_share_of_words(info, synonyms):
    rows = rows_of(info, ["harp man"] * 2000)
    changed = said(info, synonyms(0.3)(rows, seeds(2000), info))
    assert abs(sum("lyre" in text for text in changed) / 2000 - 0.3) < 0.03
    assert abs(sum("gentleman" in text for text in changed) / 2000 - 0.15) < 0.03
    assert {text for text in changed} == {f"{a} {b}" for a in ("harp", "lyre") for b in ("man", "guy", "elderly gentleman")}


def test_a_row_does_not_depend_on_the_others(info, synonyms):
    texts = [*TEXTS, "harp harp harp man man"]
    n, view = len(texts), synonyms(0.5)
    whole = said(info, view(rows_of(info, texts), seeds(n), info))
    back = list(range(n))[::-1]
    assert said(info, view(rows_of(info, [texts[i] for i in back]), seeds(n)[back], info)) == [whole[i] for i in back]


def test_a_row_does_not_grow_beyond_the_longest(info, synonyms):
    short = info._replace(max_length=6)  # [CLS] man man man . [SEP]
    rows = rows_of(info, ["man man man.", "harp."])
    changed = {tuple(said(info, synonyms()(rows, seeds(2, seed), short))) for seed in range(20)}
    assert {texts[1] for texts in changed} == {"lyre."}
    assert {texts[0] for texts in changed} == {"man man man.", "guy guy guy."}


def test_words_are_found_where_a_space_belongs_to_the_token(tmp_path, synonyms):
    """Byte-level BPE, as RoBERTa's, with capitals: the first word has no space before it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["A man and a guy or an elderly gentleman. Man! Guy Elderly"] * 9, vocab_size=400, min_frequency=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    starts = torch.tensor([token.startswith("\u0120") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    info = TokenInfo(starts, torch.zeros(len(tokenizer), dtype=torch.bool), tokenizer=tokenizer)
    found = {said(info, synonyms()(rows_of(info, ["Man and man or"]), seeds(1, seed), info))[0] for seed in range(40)}
    assert found == {f"{a} and {b} or" for a in ("Guy", "Elderly gentleman") for b in ("guy", "elderly gentleman")}


@pytest.mark.parametrize(
    ("text", "message"), [("man guy\n", "line 1 has no tab"), ("\n", "has no words"), ("a b\tc\n", "no word of it")]
)
def test_a_list_that_cannot_be_used_is_said(info, tmp_path, text, message):
    (tmp_path / "list.tsv").write_text(text)
    with pytest.raises(InputError, match=f"list.tsv.*{message}"):
        Synonyms(str(tmp_path / "list.tsv"))(rows_of(info, ["a b"]), seeds(1), info)
    with pytest.raises(InputError, match="there is no such file"):
        Synonyms(str(tmp_path / "none.tsv"))


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    """A folder with a random masked language model of the tiny model's vocabulary."""
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_masked_tokens_become_the_models_predictions(info, masked_lm):
    model, rows = BertForMaskedLM.from_pretrained(masked_lm).eval(), rows_of(info, TEXTS)
    out = MLMReplacement(masked_lm, rate=0.4)(rows, seeds(len(TEXTS)), info)
    changed = 0
    for before, after in zip(rows.rows(), out.rows(), strict=True):
        places = (before != after).nonzero()[:, 0]
        changed += len(places)
        assert not info.special[before[places]].any() and not info.special[after[places]].any()
    assert 0.2 < changed / int((~info.special[rows.ids]).sum()) < 0.5
    # Row 1 alone, its changed tokens masked: the most probable tokens that are not special.
    before, after = rows.rows()[1], out.rows()[1]
    with torch.no_grad():
        logits = model(input_ids=torch.where(before == after, before, info.mask_id)[None]).logits[0]
    best = logits.masked_fill(info.special, -torch.inf).argmax(1)
    assert torch.equal(torch.where(before == after, before, best), after)


def test_one_of_the_best_is_drawn_and_a_row_does_not_depend_on_the_others(info, masked_lm):
    view, rows, n = MLMReplacement(masked_lm, rate=0.5, top_k=4), rows_of(info, TEXTS), len(TEXTS)
    out = view(rows, seeds(n), info)
    back = torch.arange(n).flip(0)
    assert view(rows.select(back), seeds(n)[back], info).select(back).ids.tolist() == out.ids.tolist()
    assert view(rows, seeds(n, 8), info).ids.tolist() != out.ids.tolist()
    nearest = MLMReplacement(masked_lm, rate=0.5)(rows, seeds(n), info)
    assert 0 < int((nearest.ids != out.ids).sum()) < int((rows.ids != out.ids).sum())


def test_a_model_that_cannot_replace_is_refused_before_training(encoder, info, masked_lm, tmp_path):
    headless, empty = tmp_path / "headless", tmp_path / "empty"
    BertModel(BertConfig(vocab_size=len(encoder.tokenizer), **TINY)).save_pretrained(headless)
    encoder.tokenizer.save_pretrained(headless)
    empty.mkdir()
    for name, message in ((headless, "it has no language-model head"), (empty, "could not be read")):
        with pytest.raises(InputError, match=message):
            SimCSEUnsup(encoder, view=Views(second=[MLMReplacement(str(name))]))
    other = info._replace(tokenizer=load_tokenizer(TOKENIZER))
    other.tokenizer.add_tokens(["zzqq"])
    with pytest.raises(InputError, match="its vocabulary is not that of the encoder"):
        MLMReplacement(masked_lm)(rows_of(info, ["a"]), seeds(1), other)
    with pytest.raises(InputError, match="no mask token"):
        MLMReplacement(masked_lm)(rows_of(info, ["a"]), seeds(1), info._replace(mask_id=None))
    SimCSEUnsup(encoder, view=Views(second=[MLMReplacement(masked_lm)]))
