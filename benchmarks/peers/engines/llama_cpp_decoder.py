"""llama.cpp with the decoder alone, whose weights it takes from a GGUF file that `prepare` writes."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from ..worker import Job, Request, Step

IMPORTS = ("llama_cpp",)
NORMS = {  # of a layer: Gemma 2 has another two, and its post_attention_layernorm is another norm
    "gemma": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma2": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    },
}  # fmt: skip
MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def prepare(job: Job) -> None:
    """Write the decoder as GGUF in bfloat16; for 8 or 4 bits, llama.cpp quantises that file."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    made = Path(f"{job.files}.part")
    made.mkdir(parents=True, exist_ok=True)
    plain = made / "BF16.gguf"
    write_gguf(Path(job.model), plain)
    if job.weights != "BF16":
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.weights}")
        options.pure = True  # the embedding table, which is the head, as well
        target = made / f"{job.weights}.gguf"
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp could not quantise {plain}")
        plain.unlink()
    made.rename(job.files)


def write_gguf(model: Path, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter  # pyright: ignore[reportMissingImports]

    from paligemma import checkpoint  # needs neither torch nor NumPy

    config, stored = checkpoint.load(model)
    t = config.text_config
    kind = "gemma2" if t.post_norms else "gemma"
    writer = GGUFWriter(path, kind)
    writer.add_context_length(8192)
    writer.add_embedding_length(t.hidden_size)
    writer.add_block_count(t.num_hidden_layers)
    writer.add_feed_forward_length(t.intermediate_size)
    writer.add_head_count(t.num_attention_heads)
    writer.add_head_count_kv(t.num_key_value_heads)
    writer.add_layer_norm_rms_eps(t.rms_norm_eps)
    writer.add_key_length(t.head_dim)
    writer.add_value_length(t.head_dim)
    writer.add_vocab_size(t.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(t.attn_logit_softcapping or 0.0)
        writer.add_final_logit_softcapping(t.final_logit_softcapping or 0.0)
        writer.add_sliding_window(t.sliding_window or 4096)
    for name, tensor in stored.items():
        if name.startswith("language_model.model."):
            x = np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
            if tensor.dtype != "BF16":
                raise RuntimeError(f"{name} is {tensor.dtype}; only bfloat16 checkpoints are converted")
            x = x.view(np.uint16).reshape(tensor.shape)
            target = f"{gguf_name(name.removeprefix('language_model.model.'), kind)}.weight"
            if len(tensor.shape) == 1:  # a norm: Gemma's weights are centred on 0, llama.cpp's on 1
                writer.add_tensor(target, (x.astype(np.uint32) << 16).view(np.float32) + np.float32(1))
            else:
                bf16 = GGMLQuantizationType.BF16
                writer.add_tensor(target, x.view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str, kind: str) -> str:
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return {"embed_tokens": "token_embd", "norm": "output_norm"}[name]
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{({**NORMS[kind], **MATRICES})[part]}"


def load(job: Job):
    import os

    import llama_cpp  # pyright: ignore[reportMissingImports]

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    path = Path(job.files) / f"{job.weights}.gguf"
    model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    prompt = job.arrays()["text_ids"][0]
    size = job.rows * (len(prompt) + job.new)
    shape = llama_cpp.llama_context_default_params()
    shape.n_ctx, shape.n_batch, shape.n_seq_max = size, job.rows * len(prompt), job.rows
    shape.n_threads = shape.n_threads_batch = len(os.sched_getaffinity(0))
    shape.kv_unified = True
    context: Any = llama_cpp.llama_init_from_model(model, shape)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(job.rows * len(prompt), 0, 1)

    def decode(ids: np.ndarray, start: int) -> list[int]:  # ids: (rows, T) at the positions from `start`
        rows, length = ids.shape
        batch.n_tokens = rows * length
        for i, (row, place) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(ids[row, place]), start + place, 1
            batch.seq_id[i][0], batch.logits[i] = row, place == length - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not compute a batch")
        found = []
        for row in range(rows):
            logits = llama_cpp.llama_get_logits_ith(context, row * length + length - 1)
            found.append(int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax()))
        return found

    def run(request: Request, step: Step) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids = np.tile(prompt[: request.length], (request.rows, 1))
        last = decode(ids, 0)
        step(last)
        for place in range(ids.shape[1], ids.shape[1] + request.new - 1):
            last = decode(np.array(last)[:, None], place)
            step(last)

    return run
