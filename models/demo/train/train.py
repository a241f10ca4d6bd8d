"""Trains the demo model from scratch and exports it as a Hugging Face folder. See README.md beside this file.

The model is a plain Llama (RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embeddings), written in JAX for the CPU.
"""

import argparse
import json
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import dialogs
import tokenizer as tok

HIDDEN, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, FFN = 128, 4, 4, 2, 32, 384
ROPE_THETA, RMS_EPS, MAX_POSITIONS = 10_000.0, 1e-5, 2048


def init(seed, vocab_size):
    """Parameters under their Hugging Face names; every matrix is [out, in]."""
    rng = np.random.default_rng(seed)

    def matrix(n_out, n_in, std=None):
        return jnp.asarray(rng.normal(0.0, std or n_in**-0.5, (n_out, n_in)), jnp.float32)

    params = {
        "model.embed_tokens.weight": matrix(vocab_size, HIDDEN, 0.05),
        "model.norm.weight": jnp.ones(HIDDEN),
    }
    for layer in range(N_LAYERS):
        name = f"model.layers.{layer}."
        params |= {
            name + "input_layernorm.weight": jnp.ones(HIDDEN),
            name + "post_attention_layernorm.weight": jnp.ones(HIDDEN),
            name + "self_attn.q_proj.weight": matrix(N_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.k_proj.weight": matrix(N_KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.v_proj.weight": matrix(N_KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.o_proj.weight": matrix(HIDDEN, N_HEADS * HEAD_DIM, (2 * N_LAYERS * HIDDEN) ** -0.5),
            name + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            name + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
            name + "mlp.down_proj.weight": matrix(HIDDEN, FFN, (2 * N_LAYERS * FFN) ** -0.5),
        }
    return params


def rms_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + RMS_EPS) * weight


def rope(x, cos, sin):
    """x: [batch, time, heads, head_dim]; the two halves of head_dim are rotated together."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def forward(params, ids, docs):
    """ids, docs: [batch, time] -> hidden states [batch, time, hidden]. A token sees only its own document's past."""
    n_rows, n_time = ids.shape
    inv_freq = ROPE_THETA ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = jnp.arange(n_time)[:, None] * inv_freq
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    causal = jnp.tril(jnp.ones((n_time, n_time), bool))
    visible = (docs[:, :, None] == docs[:, None, :]) & causal
    bias = jnp.where(visible, 0.0, -1e9)[:, None, None]
    x = params["model.embed_tokens.weight"][ids]
    group = N_HEADS // N_KV_HEADS
    for layer in range(N_LAYERS):
        p = {key.split(".", 3)[3]: value for key, value in params.items() if key.startswith(f"model.layers.{layer}.")}
        h = rms_norm(x, p["input_layernorm.weight"])
        q = rope((h @ p["self_attn.q_proj.weight"].T).reshape(n_rows, n_time, N_HEADS, HEAD_DIM), cos, sin)
        k = rope((h @ p["self_attn.k_proj.weight"].T).reshape(n_rows, n_time, N_KV_HEADS, HEAD_DIM), cos, sin)
        v = (h @ p["self_attn.v_proj.weight"].T).reshape(n_rows, n_time, N_KV_HEADS, HEAD_DIM)
        q = q.reshape(n_rows, n_time, N_KV_HEADS, group, HEAD_DIM)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * HEAD_DIM**-0.5 + bias
        mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), v)
        x = x + mixed.reshape(n_rows, n_time, N_HEADS * HEAD_DIM) @ p["self_attn.o_proj.weight"].T
        h = rms_norm(x, p["post_attention_layernorm.weight"])
        gated = jax.nn.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)
        x = x + gated @ p["mlp.down_proj.weight"].T
    return rms_norm(x, params["model.norm.weight"])


def loss_fn(params, ids, docs, answer_at):
    """Mean cross-entropy of answer tokens. answer_at: flat positions in ids[:, 1:] to predict, -1 for padding."""
    hidden = forward(params, ids[:, :-1], docs[:, :-1]).reshape(-1, HIDDEN)
    targets = ids[:, 1:].reshape(-1)
    used = answer_at >= 0
    at = jnp.where(used, answer_at, 0)
    logits = hidden[at] @ params["model.embed_tokens.weight"].T
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[at][:, None], axis=-1)[:, 0]
    return jnp.sum(losses * used) / jnp.sum(used)


def decayed(name):
    return not name.endswith("norm.weight") and "embed" not in name


def make_step(peak_lr, n_steps, n_warmup, weight_decay=0.1, beta1=0.9, beta2=0.98):
    def step(params, first, second, step_idx, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
        scale = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
        progress = jnp.clip((step_idx - n_warmup) / (n_steps - n_warmup), 0.0, 1.0)
        lr = peak_lr * jnp.minimum(1.0, (step_idx + 1) / n_warmup) * (0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        first = {k: beta1 * first[k] + (1 - beta1) * g * scale for k, g in grads.items()}
        second = {k: beta2 * second[k] + (1 - beta2) * (g * scale) ** 2 for k, g in grads.items()}
        c1, c2 = 1 - beta1 ** (step_idx + 1.0), 1 - beta2 ** (step_idx + 1.0)
        params = {
            k: p - lr * (first[k] / c1 / (jnp.sqrt(second[k] / c2) + 1e-8) + (weight_decay * p if decayed(k) else 0.0))
            for k, p in params.items()
        }
        return params, first, second, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


class Packer:
    """Packs whole dialogs into rows of a fixed length and marks which tokens belong to answers."""

    def __init__(self, tokenizer, seed):
        self.rng = random.Random(f"dialogs {seed}")
        self.tokenizer = tokenizer
        self.ids = {name: tokenizer.token_to_id(name) for name in tok.SPECIAL}
        self.encoded = {}
        self.carried = None

    def encode(self, text):
        known = self.encoded.get(text)
        if known is None:
            if len(self.encoded) > 300_000:
                self.encoded.clear()
            known = self.encoded[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return known

    def tokens(self, max_turns):
        system, turns = dialogs.dialog(self.rng, max_turns)
        ids, mask = [self.ids[tok.BOS]], [0]
        end, user, assistant = self.ids[tok.END], self.ids[tok.USER], self.ids[tok.ASSISTANT]
        if system is not None:
            text = [self.ids[tok.SYSTEM], *self.encode(system), end]
            ids += text
            mask += [0] * len(text)
        for question, answer in turns:
            asked = [user, *self.encode(question), end, assistant]
            said = [*self.encode(answer), end]
            ids += asked + said
            mask += [0] * len(asked) + [1] * len(said)
        return ids, mask

    def batch(self, n_rows, n_time, max_turns):
        width = n_time + 1
        ids = np.full((n_rows, width), self.ids[tok.PAD], np.int32)
        docs = np.zeros((n_rows, width), np.int32)
        mask = np.zeros((n_rows, width), bool)
        for row in range(n_rows):
            used = 0
            doc = 1
            while width - used > 16:
                next_ids, next_mask = self.carried or self.tokens(max_turns)
                self.carried = None
                if len(next_ids) > width - used:
                    if used > width // 2:
                        self.carried = (next_ids, next_mask)
                        break
                    next_ids, next_mask = next_ids[: width - used], next_mask[: width - used]
                span = slice(used, used + len(next_ids))
                ids[row, span], docs[row, span], mask[row, span] = next_ids, doc, next_mask
                used += len(next_ids)
                doc += 1
        at = np.flatnonzero(mask[:, 1:].reshape(-1))
        answer_at = np.full(n_rows * n_time * 5 // 8, -1, np.int32)
        answer_at[: min(len(at), len(answer_at))] = at[: len(answer_at)]
        return ids, docs, answer_at


def heldout_batch(tokenizer):
    """The 200 held-out questions with their answers, teacher-forced: all have the same number of tokens but for the sum's."""
    rows, masks = [], []
    for a, b in dialogs.heldout_sums():
        asked = f"{tok.BOS}{tok.USER}What is {a} + {b}?{tok.END}{tok.ASSISTANT}"
        prompt = tokenizer.encode(asked, add_special_tokens=False).ids
        answer = tokenizer.encode(f"{a} + {b} = {a + b}{tok.END}", add_special_tokens=False).ids
        rows.append(prompt + answer)
        masks.append([0] * len(prompt) + [1] * len(answer))
    width = max(map(len, rows))
    pad = tokenizer.token_to_id(tok.PAD)
    ids = np.array([row + [pad] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([row + [0] * (width - len(row)) for row in masks], bool)
    return ids, mask


@jax.jit
def heldout_right(params, ids, mask):
    """Which held-out answers greedy decoding gives exactly, and the probability of each whole answer at temperature 1."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    hidden = forward(params, ids[:, :-1], jnp.ones_like(ids[:, :-1]))
    logprobs = jax.nn.log_softmax(hidden @ params["model.embed_tokens.weight"].T)
    right = (logprobs.argmax(-1) == ids[:, 1:]) | ~mask[:, 1:]
    chosen = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)[..., 0]
    return right.all(-1), jnp.exp(jnp.sum(chosen * mask[:, 1:], axis=-1))


def export(params, tokenizer, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in params.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    bos, end, pad = (tokenizer.token_to_id(name) for name in (tok.BOS, tok.END, tok.PAD))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": bos,
        "eos_token_id": end,
        "pad_token_id": pad,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": N_HEADS,
        "num_hidden_layers": N_LAYERS,
        "num_key_value_heads": N_KV_HEADS,
        "rms_norm_eps": RMS_EPS,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": tok.VOCAB_SIZE,
    }
    generation = {"bos_token_id": bos, "eos_token_id": [end], "pad_token_id": pad, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tok.save(tokenizer, folder, MAX_POSITIONS)
    questions = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in dialogs.heldout_sums()]
    (folder / "heldout.json").write_text("[\n" + ",\n".join("  " + json.dumps(q) for q in questions) + "\n]\n")


def load(folder):
    """The parameters of an exported folder, in f32."""
    return {name: jnp.asarray(value.astype(np.float32)) for name, value in load_file(str(Path(folder) / "model.safetensors")).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out", help="folder for the newest model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--time", type=int, default=128, help="tokens in a row")
    parser.add_argument("--stop-at", type=int, help="end after this step of the schedule")
    parser.add_argument("--long-from", metavar="FOLDER", help="second stage: go on from this export, on rows of the whole context")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eval-every", type=int, default=250)
    args = parser.parse_args()

    tokenizer = tok.train(args.seed)
    params = load(args.long_from) if args.long_from else init(args.seed, tok.VOCAB_SIZE)
    n_params = sum(p.size for p in params.values())
    print(f"{n_params} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    assert tokenizer.get_vocab_size() == tok.VOCAB_SIZE
    first = {name: jnp.zeros_like(p) for name, p in params.items()}
    second = {name: jnp.zeros_like(p) for name, p in params.items()}
    step_fn = make_step(args.lr, args.steps, n_warmup=min(200, args.steps // 10))
    packer = Packer(tokenizer, f"{args.seed} long" if args.long_from else args.seed)
    ids, mask = heldout_batch(tokenizer)
    n_steps = args.stop_at or args.steps

    losses = []
    started = time.time()
    for step in range(n_steps):
        if args.long_from:
            batch = packer.batch(1, MAX_POSITIONS, max_turns=120)
        elif step % 12 == 11:
            batch = packer.batch(args.rows * args.time // 512, 512, max_turns=30)
        else:
            batch = packer.batch(args.rows, args.time, max_turns=8)
        params, first, second, loss = step_fn(params, first, second, jnp.float32(step), batch)
        losses.append(loss)
        if (step + 1) % args.eval_every == 0 or step + 1 == n_steps:
            right, prob = heldout_right(params, ids, mask)
            accuracy, sharpness = float(right.mean()), float(prob.mean())
            recent = float(jnp.stack(losses).mean())
            losses.clear()
            minutes = (time.time() - started) / 60
            print(f"step {step + 1} loss {recent:.4f} held-out {accuracy:.3f} at temperature 1 {sharpness:.3f} {minutes:.1f} min", flush=True)
            # Always the newest: choosing among checkpoints by the held-out sums would make them part of the training.
            export(params, tokenizer, args.out)


if __name__ == "__main__":
    main()
