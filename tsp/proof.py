"""Prove that a folder works with transformers alone: `python -m tsp.proof FOLDER PROBE [--trust-remote-code]`.

Started in a fresh process, so that nothing of the job's engine helps it. The probe holds `tokens` `[B, T]` and the
`logits` `[B, T, V]` that are expected, if any. Prints one JSON object.
"""

import json
import sys

import torch

NEW_TOKENS = 16


def proof(folder: str, probe: str, trust: str = "") -> dict[str, object]:
    """Load the folder, compare logits with the probe's, and greedy generation with and without cache."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(probe)
    dtype = expected["logits"].dtype if "logits" in expected else torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=bool(trust), output_loading_info=True
    )
    model.eval()
    prompt = expected["tokens"][:1, :8]
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"], use_cache=False).logits
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        cached, uncached = (
            model.generate(prompt, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)
        )
    return {
        "max_logit_difference": float((logits.float() - expected.get("logits", logits).float()).abs().max()),
        "cached_equals_uncached": torch.equal(cached, uncached),
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
    }


if __name__ == "__main__":
    print(json.dumps(proof(*sys.argv[1:])))
