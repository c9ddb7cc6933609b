"""transformers with torch's attention; as the engine "zentorch", with AMD's extension of torch."""

from typing import Any

from ..worker import Job, Request, Step

IMPORTS = ("torch", "transformers.models.paligemma.modeling_paligemma", "transformers.generation")


def load(job: Job):
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(job.model, **options)
    model.eval()
    if job.engine == "zentorch":
        import zentorch  # noqa: F401  # pyright: ignore[reportMissingImports]

        model.forward = torch.compile(model.forward, backend="zentorch", dynamic=True)
    given = {name: torch.from_numpy(x) for name, x in job.arrays().items()}

    def run(request: Request, step: Step) -> None:
        ids = given["text_ids"][:, : request.length] if request.length else given["input_ids"]
        ids = ids.expand(request.rows, -1)
        # without token types, attention in transformers 5 is causal
        inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
        if not request.length:
            inputs["pixel_values"] = given["pixel_values"].expand(request.rows, -1, -1, -1)
        greedy(model, inputs, request.new, step)

    return run


def greedy(model: Any, inputs: dict[str, Any], new: int, step: Step) -> None:
    """transformers' generate, which hands over the prompt first and then the ids of each step."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        prompt = True

        def put(self, value):
            if not self.prompt:
                step(value.flatten().tolist())
            self.prompt = False

        def end(self):
            pass

    model.generation_config.eos_token_id = None
    model.generate(**inputs, max_new_tokens=new, do_sample=False, streamer=Clock())
