"""What `train.py` needs, made from a seed: a tiny model, its tokenizer, eight problems and a configuration.

    python -m examples.fsdp_gsm8k.offline_sample out/gsm8k_sample [--fp8] [--server URL]

The model knows nothing, but among random bytes a last number is now and then the right one-digit one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.fsdp_gsm8k.gsm8k import Row
from examples.local_server import CPU_ARGS
from examples.tiny_qwen3 import CONFIG, SEED

SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2, as in `tiny_qwen3.CONFIG`
ROWS = (
    Row(question="A jar holds 3 red and 4 blue beads. How many beads?", answer="3 + 4 = 7 beads.\n#### 7"),
    Row(question="A crate of 12 pears loses 4. How many are left?", answer="12 - 4 = 8 pears.\n#### 8"),
    Row(question="Two shelves hold 3 books each. How many books?", answer="2 * 3 = 6 books.\n#### 6"),
    Row(question="20 coins go evenly into 4 bags. Coins per bag?", answer="20 / 4 = 5 coins.\n#### 5"),
    Row(question="A tram with 9 riders loses 6. How many riders stay?", answer="9 - 6 = 3 riders.\n#### 3"),
    Row(question="A rope of 18 m is cut into 9 m parts. How many parts?", answer="18 / 9 = 2 parts.\n#### 2"),
    Row(question="A goat eats 2 kg a day. How many kg in 2 days?", answer="2 * 2 = 4 kg.\n#### 4"),
    Row(question="5 lamps and 4 more are lit. How many lamps are lit?", answer="5 + 4 = 9 lamps.\n#### 9"),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special ones."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def write_config(folder: Path, *, fp8: bool, server: str) -> Path:
    """The sample's `config.toml`. JSON's strings and lists of strings are TOML's."""
    server_args = [] if torch.cuda.is_available() else list(CPU_ARGS)
    lines = [
        *(f"{key} = {json.dumps(str(folder / name))}" for key, name in (("model", "model"), ("data", "train.jsonl"))),
        f"checkpoint = {json.dumps(str(folder / 'checkpoint'))}",
        *("[train]", "steps = 2", "batch_size = 4", "group_size = 8", "learning_rate = 1e-3"),
        *("[rollout]", f"servers = [{json.dumps(server)}]", "max_new_tokens = 24"),
        f"server_args = {json.dumps(server_args)}",
        *("[rollout.quantization]", f"fp8 = {json.dumps(fp8)}"),
    ]
    file = folder / "config.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_sample(folder: Path, *, fp8: bool = False, server: str = "http://127.0.0.1:30000") -> Path:
    """Model, tokenizer and rows in `folder`; returns the configuration file there."""
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(Qwen3Config(**{**CONFIG, "vocab_size": len(tokenizer)}))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [row.model_dump_json() + "\n" for row in ROWS]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return write_config(folder, fp8=fp8, server=server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--server", default="http://127.0.0.1:30000", metavar="URL")
    args = parser.parse_args()
    print(make_sample(args.folder, fp8=args.fp8, server=args.server))


if __name__ == "__main__":
    main()
