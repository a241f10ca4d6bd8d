"""Checks an exported demo model with a second, independent forward pass: numpy only, reading nothing but the folder's files.

Decodes every character of Unicode, answers every held-out sum greedily and once at temperature 1, and a few other questions. Exits 1 under 98 % of the sums (greedy).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jinja2
import numpy as np
from tokenizers import Tokenizer


def read_safetensors(path):
    """All tensors of a bf16 safetensors file, as f32."""
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, info in json.loads(data[8 : 8 + n_header]).items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16", f"{name}: {info['dtype']}, expected BF16"
        start, end = (8 + n_header + offset for offset in info["data_offsets"])
        bits = np.frombuffer(data[start:end], "<u2").astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).reshape(info["shape"])
    return tensors


class Model:
    def __init__(self, folder):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_safetensors(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(self.tokenizer_config["chat_template"])

    def prompt(self, messages):
        text = self.template.render(messages=messages, bos_token=self.tokenizer_config["bos_token"], add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.tensors[name]

    def logits(self, ids):
        """ids: [time] -> logits [vocab_size] after the last token; everything recomputed, no cache."""
        c, t = self.config, self.tensors
        n, dim = len(ids), c["head_dim"]
        angles = np.arange(n)[:, None] / c["rope_theta"] ** (np.arange(0, dim, 2) / dim)
        turn = np.exp(1j * angles)

        def heads(x, name, rotated):
            y = (x @ t[name].T).reshape(n, -1, dim).transpose(1, 0, 2)
            if rotated:
                z = (y[..., : dim // 2] + 1j * y[..., dim // 2 :]) * turn
                y = np.concatenate([z.real, z.imag], -1)
            return y

        x = t["model.embed_tokens.weight"][ids]
        hidden_future = np.triu(np.full((n, n), -np.inf), 1)
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = self.norm(x, at + "input_layernorm.weight")
            q = heads(h, at + "self_attn.q_proj.weight", True)
            k = heads(h, at + "self_attn.k_proj.weight", True)
            v = heads(h, at + "self_attn.v_proj.weight", False)
            group = q.shape[0] // k.shape[0]
            k, v = k.repeat(group, 0), v.repeat(group, 0)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(dim) + hidden_future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + (weights @ v).transpose(1, 0, 2).reshape(n, -1) @ t[at + "self_attn.o_proj.weight"].T
            h = self.norm(x, at + "post_attention_layernorm.weight")
            gate = h @ t[at + "mlp.gate_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ t[at + "mlp.up_proj.weight"].T)) @ t[at + "mlp.down_proj.weight"].T
        return self.norm(x[-1], "model.norm.weight") @ t["model.embed_tokens.weight"].T

    def answer(self, messages, rng=None, max_tokens=64):
        """The reply; greedy, or at temperature 1 when a generator is given."""
        ids, said = self.prompt(messages), []
        while len(said) < max_tokens:
            logits = self.logits(ids + said)
            said.append(int((logits if rng is None else logits + rng.gumbel(size=len(logits))).argmax()))
            if said[-1] == self.config["eos_token_id"]:
                break
        return self.tokenizer.decode(said)


def user(text):
    return {"role": "user", "content": text}


def sums_right(model, cases, before=(), rng=None):
    n_right = 0
    for case in cases:
        text = model.answer([*before, user(case["question"])], rng)
        right = re.findall(r"\d+", text)[-1:] == [case["answer"]]
        n_right += right
        if not right:
            print(f"  wrong: {case['question']} -> {text!r}")
    return n_right


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=Path(__file__).resolve().parents[1])
    folder = Path(parser.parse_args().folder)
    model = Model(folder)
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False).ids) == text, "the tokenizer loses text"
    cases = json.loads((folder / "heldout.json").read_text())
    n_greedy = sums_right(model, cases)
    print(f"held-out sums, greedy: {n_greedy} of {len(cases)}")
    print(f"held-out sums, temperature 1: {sums_right(model, cases, rng=np.random.default_rng(0))} of {len(cases)}")

    history = [{"role": "system", "content": "You are a helpful assistant."}]
    for question in ("Hello!", "Spell lemon.", "What is 11 + 22?", "Count from 4 to 9."):
        history += [user(question), {"role": "assistant", "content": model.answer([*history, user(question)])}]
    print(f"the same in the fifth turn of a chat: {sums_right(model, cases[:50], history)} of 50")
    long = list(history)
    while len(model.prompt(long)) < 1500:
        long += history[1:]
    print(f"the same after {len(model.prompt(long))} tokens of chat: {sums_right(model, cases[:10], long)} of 10")

    for question in (
        "What is 37 + 58?", "what's 99+99", "Add 12 and 30.", "7 + 8", "What is 100 + 1?", "What is 9 - 4?", "Spell cat.", "Spell encyclopedia.",
        "Count from 3 to 7.", "Count down from 12 to 8.", "What is Baton?", "What is a KV cache?", "What is a prefill instance?", "Who are you?",
        "Hi!", "Why is the sky blue?", "Größe 東京 🙂?",
    ):
        print(f"{question} -> {model.answer([user(question)])}")
    sys.exit(0 if n_greedy >= 0.98 * len(cases) else 1)


if __name__ == "__main__":
    main()
