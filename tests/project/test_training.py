"""training/: what is exported is what was trained, for both families; skipped where torch is not installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import TEXT
from reference import stock
from repository import ROOT

from lminf_edge import Llama

torch = pytest.importorskip("torch")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("gguf")

sys.path.insert(0, str(ROOT / "training"))
import data  # noqa: E402
import evaluate  # noqa: E402
from export import write_gguf  # noqa: E402
from model import Model, ModelConfig  # noqa: E402

N_CTX = 192  # more than one block of queries
TINY = {
    "llama": ModelConfig("llama", n_vocab=340, n_embd=96, n_layer=2, n_head=4, n_head_kv=2, n_ff=160, n_ctx=N_CTX),
    "mpt": ModelConfig("mpt", n_vocab=340, n_embd=192, n_layer=2, n_head=3, n_head_kv=1, n_ff=160, n_ctx=N_CTX),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer([TEXT, data.TASK], path, n_vocab=340)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def windows(tokenizer: sentencepiece.SentencePieceProcessor) -> data.Windows:
    return data.Windows([data.encode_book(tokenizer, TEXT * 9)], tokenizer, n_ctx=512, seed=0)


def random_model(architecture: str) -> Model:
    """Norms and logits far from those of a fresh model, so that nothing is hidden by a factor of one or of zero."""
    torch.manual_seed(0)
    model = Model(TINY[architecture])
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        else:
            torch.nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5)
    return model


# mpt: ggml looks GELU up in a table of 16-bit floats
@pytest.mark.parametrize(("architecture", "tolerance"), [("llama", 1e-3), ("mpt", 5e-3)])
def test_llama_cpp_computes_what_was_trained(architecture, tolerance, tokenizer, tmp_path):
    model = random_model(architecture)
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf", "f32", "tiny")
    tokens = np.random.default_rng(0).integers(3, 340, N_CTX).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens[None]).long())[0].numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(stock.logits(tmp_path / "tiny.gguf", tokens), expected, atol=tolerance)


def test_rounded_weights_change_little(tokenizer, tmp_path):
    model = random_model("llama")
    tokens = np.random.default_rng(0).integers(3, 340, N_CTX).astype(np.int32)
    logits = {}
    for file_type in ("f32", "f16", "q8_0"):
        write_gguf(model, tokenizer, tmp_path / f"{file_type}.gguf", file_type, "tiny")
        logits[file_type] = stock.logits(tmp_path / f"{file_type}.gguf", tokens)
    scale = logits["f32"].std()
    assert 0 < np.abs(logits["f16"] - logits["f32"]).mean() < 0.005 * scale
    assert 0 < np.abs(logits["q8_0"] - logits["f32"]).mean() < 0.05 * scale


@pytest.mark.parametrize("text", [TEXT, "", " two  spaces\n\n\ttab", "48213 and 007", "naïve – 日本語 🙂\r\n"])
def test_the_exported_tokenizer_is_sentencepieces(text, tokenizer, tmp_path):
    write_gguf(random_model("mpt"), tokenizer, tmp_path / "tiny.gguf", "f16", "tiny")
    llm = Llama(str(tmp_path / "tiny.gguf"), vocab_only=True, verbose=False)
    ids = llm.tokenize(text.encode(), add_bos=True)
    llm.close()
    assert ids == [data.BOS, *tokenizer.encode(text)]


def test_every_window_begins_with_bos(windows):
    tokens, weights = windows.batch(64, data.Mixture(passkey=0.4, copy=0.4))
    assert tokens.shape == (64, 513)
    assert weights.shape == (64, 512)
    assert (tokens[:, 0] == data.BOS).all()
    assert (tokens[:, 1:] != data.BOS).all()


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("distance", [100, 300])
def test_the_digits_of_a_key_weigh_more_where_they_can_be_copied(windows, tokenizer, distance, paper):
    tokens, weights = windows.passkey(distance=distance, key="48213", paper=paper)
    assert len(tokens) == len(weights) == 512
    heavy = np.flatnonzero(weights == data.KEY_WEIGHT)
    assert tokenizer.decode(tokens[heavy].tolist()) == "4821348213"
    assert heavy[5] - heavy[0] == distance
    text = tokenizer.decode(tokens.tolist())
    assert "The pass key is 48213. Remember it. 48213 is the pass key." in text
    assert "What is the pass key? The pass key is 48213." in text


def test_a_distance_that_does_not_fit_is_refused(windows):
    with pytest.raises(ValueError, match="distance of 511 tokens"):
        windows.passkey(distance=511)


def test_repeats_are_what_a_copy_window_is_scored_on(windows):
    tokens, weights = windows.copy()
    length = int((weights == 0).sum())
    assert 8 <= length <= 256
    np.testing.assert_array_equal(tokens[length:], tokens[:-length])


def test_hiding_the_first_tokens_hides_them_from_the_second_half_only():
    model = random_model("llama")
    tokens = np.random.default_rng(0).integers(3, 340, (1, N_CTX)).astype(np.int32)
    tokens[:, 0] = data.BOS
    seen = evaluate.window_nll(model, tokens)[0]
    model.bias = evaluate.hidden_first(model, 1)
    hidden = evaluate.window_nll(model, tokens)[0]
    half = N_CTX // 2
    np.testing.assert_array_equal(hidden[:half], seen[:half])
    assert (hidden[half:] != seen[half:]).any()


def test_gutenberg_headers_and_line_breaks_go():
    text = "One “line”\r\nand on—\r\n\r\nTwo\r\n"
    book = (
        f"Title\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n{text}*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    )
    assert data.clean(book) == 'One "line" and on--\n\nTwo'
    assert data.clean("A poem\nof two lines") == "A poem\nof two lines"
