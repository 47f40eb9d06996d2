"""Write a checkpoint of train.py as GGUF for llama.cpp.

python training/export.py --run RUN --type q8_0 --out nano.gguf
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import sentencepiece
from model import Model, load_checkpoint

Array = npt.NDArray[np.float32]

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}

# these models go on with a text, and know of no questions: what is said to them is a paragraph, and they write the next
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}{% endfor %}"
)


def interleave(weight: Array, n_head: int) -> Array:
    """Rows of Q or K reordered from RoPE pairs (i, i + head_size / 2) to llama.cpp's pairs (2 i, 2 i + 1)."""
    n_rows, n_embd = weight.shape
    pairs = weight.reshape(n_head, 2, n_rows // n_head // 2, n_embd)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(n_rows, n_embd)


def gguf_tensors(model: Model) -> Iterator[tuple[str, Array]]:
    """llama.cpp's name and the f32 values of every tensor; output.weight is absent: it is token_embd.weight."""
    c = model.config
    weights = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    yield "token_embd.weight", weights["token_embd.weight"]
    yield "output_norm.weight", weights["output_norm.weight"]
    for i in range(c.n_layer):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = block["attn.q.weight"], block["attn.k.weight"], block["attn.v.weight"]
        if c.architecture == "llama":
            yield f"blk.{i}.attn_q.weight", interleave(q, c.n_head)
            yield f"blk.{i}.attn_k.weight", interleave(k, c.n_head_kv)
            yield f"blk.{i}.attn_v.weight", v
            yield f"blk.{i}.ffn_gate.weight", block["ffn.gate.weight"]
        else:
            yield f"blk.{i}.attn_qkv.weight", np.concatenate([q, k, v])
        yield f"blk.{i}.attn_norm.weight", block["attn_norm.weight"]
        yield f"blk.{i}.attn_output.weight", block["attn.output.weight"]
        yield f"blk.{i}.ffn_norm.weight", block["ffn_norm.weight"]
        yield f"blk.{i}.ffn_up.weight", block["ffn.up.weight"]
        yield f"blk.{i}.ffn_down.weight", block["ffn.down.weight"]


def add_hyperparameters(writer: gguf.GGUFWriter, model: Model) -> None:
    c = model.config
    writer.add_vocab_size(c.n_vocab)
    writer.add_context_length(c.n_ctx)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    if c.architecture == "llama":
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_dimension_count(c.head_size)
        writer.add_rope_freq_base(c.rope_theta)
    else:
        writer.add_layer_norm_eps(c.norm_eps)
        writer.add_max_alibi_bias(c.alibi_max_bias)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """The vocabulary as llama.cpp's "llama" tokenizer reads it: `<s>` in front, a space before the first word."""
    ids = range(tokenizer.get_piece_size())

    def token_type(i: int) -> gguf.TokenType:
        if tokenizer.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if tokenizer.is_control(i):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if tokenizer.is_byte(i) else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokenizer.id_to_piece(i) for i in ids])
    writer.add_token_scores([tokenizer.get_score(i) for i in ids])
    writer.add_token_types([token_type(i) for i in ids])
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(tokenizer.eos_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(
    model: Model, tokenizer: sentencepiece.SentencePieceProcessor, path: Path, file_type: str, name: str
) -> None:
    """Write a model; file_type is "f32", "f16" or "q8_0", and norms are f32 in each."""
    writer = gguf.GGUFWriter(path, model.config.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(
        "A small model for demonstrations and tests, trained on windows of 512 tokens of old novels."
    )
    writer.add_license("MIT")
    writer.add_languages(["en"])
    writer.add_file_type(FILE_TYPES[file_type])
    if file_type == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, model)
    add_tokenizer(writer, tokenizer)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for tensor_name, weight in gguf_tensors(model):
        if weight.ndim == 1 or file_type == "f32":
            writer.add_tensor(tensor_name, weight)
        elif file_type == "f16":
            writer.add_tensor(tensor_name, weight.astype(np.float16))
        else:
            writer.add_tensor(tensor_name, gguf.quantize(weight, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of train.py as GGUF.")
    parser.add_argument("--run", type=Path, required=True, help="folder with checkpoint.pt and tokenizer.model")
    parser.add_argument("--type", choices=FILE_TYPES, default="q8_0")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    args = parser.parse_args()
    model, name = load_checkpoint(args.run / "checkpoint.pt")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.run / "tokenizer.model"))
    write_gguf(model, tokenizer, args.out, args.type, name)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
