"""OpenVINO with the decoder alone, which optimum-intel converts."""

from pathlib import Path
from typing import Any

from ..worker import Job, Request, Step
from .transformers_sdpa import greedy

IMPORTS = ("optimum.intel", "transformers.generation")
BITS = {"int8": 8, "int4": 4}


def prepare(job: Job) -> None:
    import torch
    from optimum.exporters.openvino import export_from_model  # pyright: ignore[reportMissingImports]
    from optimum.intel import (  # pyright: ignore[reportMissingImports]
        OVConfig,
        OVWeightQuantizationConfig,
    )
    from transformers import AutoModelForCausalLM, PaliGemmaForConditionalGeneration

    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    whole: Any = PaliGemmaForConditionalGeneration.from_pretrained(job.model, **options)
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(whole.config.text_config, **options)
    decoder.model = whole.model.language_model
    decoder.lm_head.weight = decoder.model.embed_tokens.weight
    decoder.eval()
    made = Path(f"{job.files}.part")
    bits = BITS.get(job.weights)
    quantized = bits and OVWeightQuantizationConfig(bits=bits, sym=True, group_size=128 if bits == 4 else -1)
    settings = OVConfig(quantization_config=quantized) if quantized else OVConfig(dtype="bf16")
    export_from_model(
        decoder, made, task="text-generation-with-past", ov_config=settings, stateful=True,
        patch_16bit_model=True,
    )  # fmt: skip
    decoder.config.save_pretrained(made)
    made.rename(job.files)


def load(job: Job):
    import torch
    from optimum.intel import OVModelForCausalLM  # pyright: ignore[reportMissingImports]

    # Without instructions for bfloat16, that hint makes a token take minutes.
    precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model: Any = OVModelForCausalLM.from_pretrained(job.files, ov_config=options)
    ids = torch.from_numpy(job.arrays()["text_ids"])

    def run(request: Request, step: Step) -> None:
        given = ids[:, : request.length].expand(request.rows, -1)
        greedy(model, {"input_ids": given, "attention_mask": torch.ones_like(given)}, request.new, step)

    return run
