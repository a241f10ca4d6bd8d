"""Mean of the last hidden states (after the final norm) of some prompts of goldens.json. usage: make_embeddings.py BUILD_DIR name ...
Reference = transformers, eager attention, float32 compute on the bf16 weights; the mean is taken in f64."""
import json, sys
import torch, transformers
from make_goldens import load

PROMPTS = ("short", "long_200", "chat")

if __name__ == "__main__":
    base = sys.argv[1]
    for name in sys.argv[2:]:
        folder = f"{base}/{name}"
        prompts = {p["name"]: p["input_ids"] for p in json.load(open(f"{folder}/goldens.json"))["prompts"]}
        m = load(folder, torch.float32)
        out = []
        for prompt in PROMPTS:
            ids = prompts[prompt]
            with torch.no_grad():
                h = m(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0]
            out.append(dict(name=prompt, input_ids=ids, mean=[round(x, 6) for x in h.double().mean(0).tolist()]))
        res = dict(reference=f"transformers {transformers.__version__}, torch {torch.__version__}, float32 compute, eager attention", prompts=out)
        json.dump(res, open(f"{folder}/embeddings.json", "w"), separators=(",", ":"))
        print(name, [len(p["input_ids"]) for p in out], len(out[0]["mean"]), flush=True)
