"""Trains the small Qwen3-MoE of examples/tiny-qwen3-moe from scratch on a CPU.

Model and loss are transformers' own; this file holds the tokenizer, the batches and the optimiser loop. The result is a
dense bfloat16 checkpoint, which `quantize_tiny.py` turns into the committed GPTQ one.

    python examples/train_tiny.py --minutes 18 --seed 0 --out build/tiny-dense
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

EXAMPLES = Path(__file__).resolve().parent
TEXT = EXAMPLES / "text" / "stories.txt.xz"
HELDOUT = EXAMPLES / "tiny-qwen3-moe" / "heldout.txt"
END_OF_TEXT = "<|endoftext|>"
# Qwen's own split: contractions, words with one leading character, single digits, punctuation, line breaks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_text(path: Path) -> str:
    """A text file, plain or .xz; END_OF_TEXT stands after each tale, and the tokenizer makes one token of it."""
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's pre-tokenizer: every string can be encoded, common words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(pattern=Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=512
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Every input width is a multiple of the GPTQ group of 128, and gate and up have two groups to order."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        intermediate_size=512,
        norm_topk_prob=True,
        router_aux_loss_coef=0.02,  # keeps all sixteen experts in use, so that calibration reaches each of them
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Batches:
    """Random windows of the token stream; half of them begin with a tale, as a prompt does."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast, rows: int, length: int, seed: int):
        self.stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        ends = (self.stream == tokenizer.eos_token_id).nonzero().flatten()
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends + 1])
        self.starts = starts[starts <= len(self.stream) - length]
        self.rows, self.length = rows, length
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> torch.Tensor:
        """Token ids (rows, length)."""
        half = self.rows // 2
        tale = self.starts[torch.randint(len(self.starts), (half,), generator=self.generator)]
        last = len(self.stream) - self.length
        anywhere = torch.randint(last + 1, (self.rows - half,), generator=self.generator)
        return self.stream[torch.cat([tale, anywhere])[:, None] + torch.arange(self.length)]


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> float:
    """exp(mean negative log-likelihood per token) over consecutive windows of `context` tokens.

    The first token of a window has nothing before it and is not scored.
    """
    total, count = 0.0, 0
    for window in torch.tensor(tokenizer(text, verbose=False)["input_ids"]).split(context):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 4% of the time, then a cosine to 2% of the peak."""
    if progress < 0.04:
        return peak * (progress / 0.04 + 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.04) / 0.96))))


def balance(router_logits: tuple[torch.Tensor, ...], config: Qwen3MoeConfig) -> torch.Tensor:
    """transformers' load-balancing loss, layer by layer; 1 when every expert is used equally.

    Called with all layers at once it only balances their sum, and a layer may drop some of its experts.
    """
    layers = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok) for logits in router_logits
    ]
    return torch.stack(layers).mean() / config.num_experts_per_tok


def train(model: Qwen3MoeForCausalLM, batches: Batches, minutes: float, peak: float) -> dict:
    """AdamW until the time is up. The schedule follows the clock, so a slow machine also ends at a low rate."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    model.train()
    began, step, average = time.perf_counter(), 0, None
    while (seconds := time.perf_counter() - began) < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seconds / (60 * minutes), peak)
        ids = batches.next()
        output = model(input_ids=ids, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1)
        language = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        (language + model.config.router_aux_loss_coef * balance(output.router_logits, model.config)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = language.item() if average is None else 0.98 * average + 0.02 * language.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {seconds:.0f} s  loss {average:.3f}", flush=True)
    return {
        "steps": step,
        "seconds": round(time.perf_counter() - began, 1),
        "tokens_seen": step * batches.rows * batches.length,
        "train_loss": round(average, 4),
    }


def continuation(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    """The prompt and its greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.decode(model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=18, help="wall time of the optimiser loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory of the dense checkpoint")
    parser.add_argument("--text", type=Path, default=TEXT, help="training text, plain or .xz")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="text for the perplexity")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512, help="tokens in a training window")
    parser.add_argument("--perplexity-context", type=int, default=256, help="tokens in a held-out window")
    parser.add_argument("--rows", type=int, default=4, help="windows in a batch")
    parser.add_argument("--peak-learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    text, heldout = read_text(arguments.text), read_text(arguments.heldout)
    if shared := {tale for tale in heldout.split(END_OF_TEXT) if tale} & set(text.split(END_OF_TEXT)):
        raise SystemExit(f"{len(shared)} held-out tales are also in {arguments.text}")
    tokenizer = train_tokenizer(text, arguments.vocab_size)
    batches = Batches(text, tokenizer, arguments.rows, arguments.context, arguments.seed)

    model = Qwen3MoeForCausalLM(model_config(tokenizer))
    # On a CPU the plain loop over experts trains about ten times as fast as grouped_mm with its slow backward.
    model.set_experts_implementation("eager")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(batches.stream)} training tokens, vocabulary {len(tokenizer)}")
    figures = train(model, batches, arguments.minutes, arguments.peak_learning_rate)

    # Rounded to bfloat16 first: that is what is saved, quantised and compared.
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    model.float()
    figures |= {
        "seed": arguments.seed,
        "parameters": parameters,
        "training_tokens": len(batches.stream),
        "training_text": arguments.text.name,
        "heldout_text": arguments.heldout.name,
        "training_context": arguments.context,
        "perplexity_context": arguments.perplexity_context,
        "ppl_dense": round(perplexity(model, tokenizer, heldout, arguments.perplexity_context), 4),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (arguments.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    for prompt in ("Once upon a time", "One day the fox", "The king"):
        print("---\n" + continuation(model, tokenizer, prompt, 96))


if __name__ == "__main__":
    main()
