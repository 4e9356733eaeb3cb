"""Distil a text into a cartridge: a few keys and values that answer like the text in context (arXiv:2506.06266).

    make models && python examples/cartridge.py [--model FOLDER] [--virtual-tokens 128] [--steps 100]    # 3 minutes

The text lists functions of Python's library by what they do. The teacher is the base model with the text in context; of
passages with entries in other orders its most likely next tokens are kept. The student, the base model with a cartridge
of N tokens, learns to predict them. Then both are asked for functions, one at a time.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import statistics
import time
from typing import Any

import torch
from _data import first_sentence
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusedprompt as fp

MODULES = "shutil statistics textwrap random inspect glob fnmatch difflib calendar ast tokenize platform heapq bisect"
QUESTION = "Task: {}.\nFunction:"
TOP, LESSONS, ROWS, ENTRIES = 20, 12, 8, 2  # logits kept for a token; batches, passages of one, entries of a passage


def entries(count: int) -> list[tuple[str, str]]:
    """(what it does, name) of functions whose documentation begins with a short sentence."""
    found: dict[str, str] = {}
    for module in map(importlib.import_module, MODULES.split()):
        for name in getattr(module, "__all__", dir(module)):
            said = first_sentence(function := getattr(module, name))
            if inspect.isfunction(function) and 5 <= len(said.split()) <= 14 and "(" not in said and name not in said:
                found.setdefault(said, name)
    return list(found.items())[:count]


def passages(tokenizer: Any, facts: list[tuple[str, str]], count: int) -> list[Tensor]:
    """Batches (ROWS, T) of entries of the text in random order, cut to the shortest."""
    rng, batches = random.Random(0), []
    for _ in range(count):
        texts = ["".join(f"{QUESTION.format(s)} {n}\n\n" for s, n in rng.sample(facts, ENTRIES)) for _ in range(ROWS)]
        rows = [tokenizer(text).input_ids for text in texts]
        batches.append(torch.tensor([row[: min(map(len, rows))] for row in rows]))
    return batches


@torch.no_grad()
def taught(model: fp.PromptModel, text: Tensor, batches: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, the TOP most likely next tokens, their log-probabilities) of the base model with `text` in context."""
    lessons = []
    for ids in batches:
        with model.disable_adapter():
            logits = model(ids, shared_prefix=text, logits="text").logits
        likely, tokens = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1]))
        lessons.append((ids, tokens, likely))
    return lessons


def distil(model: fp.PromptModel, lessons: list[tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    """Train the active cartridge to say the same without the text."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        ids, tokens, likely = lessons[step % len(lessons)]
        said = model(ids).logits.log_softmax(-1).gather(-1, tokens)
        loss = (likely.exp() * (likely - said)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: {float(loss.detach()):.3f} nats a token from the text in context", flush=True)


def answered(model: fp.PromptModel, tokenizer: Any, facts: list[tuple[str, str]], **context: Tensor) -> list[float]:
    """Right answers, and the median of milliseconds that a question takes."""
    right, seconds = 0, []
    for said, name in facts:
        begin = time.perf_counter()
        inputs = tokenizer(QUESTION.format(said), return_tensors="pt")
        new = len(tokenizer(f" {name}\n").input_ids)
        ids = model.generate(**inputs, **context, max_new_tokens=new, do_sample=False, pad_token_id=0)
        right += tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip(" `").split("\n")[0] == name
        seconds.append(time.perf_counter() - begin)
    return [right, 1000 * statistics.median(seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="build/models/SmolLM2-135M-Instruct")
    parser.add_argument("--virtual-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    facts = entries(48)
    text = "".join(f"{QUESTION.format(said)} {name}\n\n" for said, name in facts)
    ids = tokenizer(text, return_tensors="pt").input_ids
    config = fp.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.virtual_tokens)
    model = fp.get_prompt_model(AutoModelForCausalLM.from_pretrained(options.model), config).eval()
    fp.initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)
    asked, rows = facts[::4], []
    with model.disable_adapter():
        rows.append(("no context", 0, *answered(model, tokenizer, asked)))
        rows.append(("full context", ids.shape[1], *answered(model, tokenizer, asked, shared_prefix=ids)))
    rows.append(("the text's first tokens", options.virtual_tokens, *answered(model, tokenizer, asked)))
    distil(model, taught(model, ids, passages(tokenizer, facts, LESSONS)), options.steps)
    rows.append(("cartridge", options.virtual_tokens, *answered(model, tokenizer, asked)))
    print(f"| context | its tokens | answered of {len(asked)} | ms a question |\n|---|---|---|---|")
    print("\n".join(f"| {name} | {tokens} | {right} | {time:.0f} |" for name, tokens, right, time in rows))


if __name__ == "__main__":
    main()
