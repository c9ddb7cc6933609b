"""This engine, with the best backend that is installed; with "torch" in its name, without Numba."""

from typing import Any

from paligemma.command import wait_briefly

from ..worker import Job, Request, Step

wait_briefly()  # as the commands do
IMPORTS = ("paligemma.loading", "paligemma.generation")


def load(job: Job):
    import torch

    from paligemma import load_hf_model

    kind, _, backend = job.weights.partition(" ")
    quantize = None if kind == "bf16" else kind
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "backend": backend or "auto",
        "quantize": quantize,
    }
    model, _ = load_hf_model(job.model, **options)
    given = {name: torch.from_numpy(x) for name, x in job.arrays().items()}

    def run(request: Request, step: Step) -> None:
        ids = given["text_ids"][:, : request.length] if request.length else given["input_ids"]
        inputs: dict[str, Any] = {"input_ids": ids.expand(request.rows, -1)}
        if not request.length:
            inputs["pixel_values"] = given["pixel_values"].expand(request.rows, -1, -1, -1)
        for ids in model.stream(**inputs, max_new_tokens=request.new, eos_token_id=-1):
            step(ids.tolist())

    return run
