"""What is taken for a PaliGemma checkpoint but is something else: known by file names, by the kind that
config.json gives, or by tensor names. No torch, no NumPy."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

ORIGINAL = "use the safetensors checkpoint that it was made from"
PICKLE = "{file}, a pickle, which is never opened: convert it to safetensors"
# Patterns of the names of files that are not weights in safetensors: what the files are, and the remedy.
# {file} is replaced by the file's name, {give} by how to pass that file itself.
FILES = {
    r".*\.npz": "{file}, a file in Google's format: {give}",
    r".*\.gguf": "{file}, a GGUF file of llama.cpp, which is not supported: " + ORIGINAL,
    r"ggml.*\.bin": "{file}, a GGML file of llama.cpp, which is not supported: " + ORIGINAL,
    r"(.*/)?openvino_.*\.(bin|xml)": "{file}, a model for OpenVINO: " + ORIGINAL,
    r"paligemma-\w+-\d{5}-of-\d{5}\.safetensors": "{file}, quantised weights whose config.json has lost its "
    "quantization_config: copy the directory again, or make it again with python -m paligemma.quantize",
    r"model\.\w+\.safetensors": "{file}, weights whose name has a variant: "
    "if they are the ones that you want, rename the file to model.safetensors",
    r"model\.[\w-]+-\d{5}-of-\d{5}\.safetensors": "{file}, weights whose names have a variant: "
    "use the revision or the repository that has them without one",
    r"consolidated.*\.safetensors": "{file}, whose tensors have another library's names: "
    "convert it with that library's script for transformers",
    r"(pytorch_model|model|consolidated|mp_rank).*\.(bin|pt|pth|ckpt)": PICKLE,
    r"(.*/)?.*\.distcp|(.*/)?global_step\d+/.*": "the shards of a distributed training ({file}): "
    "have the trainer save a whole model in safetensors",
    r"(.*/)?.*\.(h5|msgpack|onnx|tflite)": "{file}, a file of another framework: " + ORIGINAL,
    r"trainer_state\.json|(training_args|optimizer|scheduler)\.(bin|pt)|(rng_state|random_states).*\.(pth|pkl)":
    "the state of a training ({file}) and no weights: give the folder with the weights",
    r".*\.(bin|pt|pth|ckpt)": PICKLE,
}  # fmt: skip
KERAS = "a PaliGemma of Keras Hub: use the checkpoint for transformers"
# Other models, by config.json's model_type, LeRobot's type or Keras Hub's class_name.
MODELS = {
    "colpali": "ColPali, which computes embeddings of pages and no text",
    "pi0": "a pi0, a robot's policy on top of a PaliGemma",
    "pi05": "a pi0.5, a robot's policy on top of a PaliGemma",
    "pi0_fast": "a pi0-FAST, a robot's policy on top of a PaliGemma",
    "PaliGemmaBackbone": KERAS,
    "PaliGemmaCausalLM": KERAS,
    "siglip": "SigLIP, an image and a text encoder without a language model",
    "siglip_vision_model": "SigLIP's vision tower without a language model",
    "gemma": "Gemma, which takes only text",
    "gemma2": "Gemma 2, which takes only text",
    "gemma3": "Gemma 3, which is another architecture",
    "gemma3_text": "Gemma 3, which is another architecture",
    "shieldgemma2": "ShieldGemma 2, which is a Gemma 3",
}
QUANTIZED = (
    "quantised weights ({}): use the float checkpoint that they were made from, "
    "with --quantize int8 if memory is short"
)
# Patterns of tensor names that only other models have.
TENSORS = {
    r"\.base_layer\.|\.lora_[A-Za-z_]*\.|\.modules_to_save\.":
    "a model with an adapter that is not merged into it: "
    "call merge_and_unload() of peft and save the result, or give the base and the adapter",
    r"^(vlm\.)?(model\.)?(custom_text_proj|embedding_proj_layer)\.": MODELS["colpali"],
    r"paligemma_with_expert\.|gemma_expert\.|(^|\.)action_(in|out)_proj\.": MODELS["pi0"],
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|quant_state\..*)$":
    QUANTIZED.format("bitsandbytes"),
    r"\.(qweight|qzeros|g_idx)$": QUANTIZED.format("GPTQ or AWQ"),
    r"\.biases$": QUANTIZED.format("MLX"),
    r"\.(weight_packed|weight_scale(_inv)?|input_scale|weight_zero_point|W_q|_weight_qdata)$":
    QUANTIZED.format("float8, compressed-tensors or the like"),
    r"^(model\.)?(_orig_mod|module|_fsdp_wrapped_module)\.":
    "a model saved from inside torch.compile or a parallel wrapper: save the model that is wrapped",
    r"^(text_model|vision_model)\.|^logit_scale$": MODELS["siglip"],
    r"multi_modal_projector\.mm_": MODELS["gemma3"],
}  # fmt: skip


def other_files(path: Path, files: Iterable[str], repository: str = "") -> str | None:
    """What a folder or a hub repository holds instead of weights, according to its file names; None if
    unknown."""
    for pattern, what in FILES.items():
        name = re.compile(pattern.replace(".*", "[^/]*"))
        if found := next((file for file in sorted(files) if name.fullmatch(file)), None):
            give = f"give that file itself, {path / found}"
            if repository:
                give = f"run 'hf download {repository} {found}' and give the path that it prints"
            return what.format(file=found, give=give)
    return None


def foreign(tensors: Collection[str]) -> str | None:
    """What weights other than a PaliGemma's are, according to the names of their tensors; None if unknown."""
    for pattern, what in TENSORS.items():
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            return f"{what} (it has the tensor {found!r})"
    language_model = any("language_model" in name for name in tensors)
    if not language_model and any("model.layers." in name for name in tensors):
        return "a language model alone, without a vision tower"
    return None
