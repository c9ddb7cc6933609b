"""vLLM for CPUs."""

import os
from typing import Any

from ..worker import Job, Request, Step

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMPORTS = ("vllm",)


def load(job: Job):
    from PIL import Image
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    given = job.arrays()
    picture, image_ids, text_ids = (given[name] for name in ("picture", "input_ids", "text_ids"))
    length = image_ids.shape[1]
    options: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": length + job.new + 8, "max_num_seqs": job.rows,
        "max_num_batched_tokens": job.rows * (length + 8), "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0, "limit_mm_per_prompt": {"image": 1}, "seed": 0,
    }  # fmt: skip
    engine: Any = LLM(model=job.model, **options).llm_engine
    # vLLM puts the image tokens and another <bos> after <bos> itself.
    prompt = image_ids[0, (image_ids[0] == image_ids[0, 0]).sum() :].tolist()
    with_image = {"prompt_token_ids": prompt, "multi_modal_data": {"image": Image.fromarray(picture)}}

    def run(request: Request, step: Step) -> None:
        text = {"prompt_token_ids": text_ids[0, : request.length].tolist()}
        prompt = text if request.length else with_image
        sampling = SamplingParams(temperature=0, max_tokens=request.new, ignore_eos=True, detokenize=False)
        for row in range(request.rows):
            engine.add_request(str(row), prompt, sampling)
        while engine.has_unfinished_requests():
            outputs = sorted(engine.step(), key=lambda output: int(output.request_id))
            if outputs:
                step([output.outputs[0].token_ids[-1] for output in outputs])

    return run
