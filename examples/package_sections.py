"""A small trained model learns to name a package's section from its description, by three kinds of soft prompts.

    make demo-real    # fetches the model, and runs this file

The text is what apt knows of packages, on Debian and its relatives (`apt-get update` fetches it). Each prompt is
learned by `fusedprompt tune`, counted on packages that had no part in that, and read back by PEFT, whose own training
steps are timed beside ours. Needs PEFT, accelerate and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import fusedprompt as fp
from fusedprompt.commands import tune
from fusedprompt.commands.answers import answers
from fusedprompt.commands.progress import quiet_transformers
from fusedprompt.commands.tune.prepare import collator
from fusedprompt.commands.tune.template import PlainWriter, TextTemplate

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("games", "fonts", "sound", "science", "admin", "web", "graphics", "net")
TEMPLATE = TextTemplate(r"Description: {text}\nSection: {section}")
METHODS = {  # learning rate, and PEFT's configuration
    "p-tuning": (2e-3, lambda rows: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)),
    "prompt-tuning": (5e-2, lambda rows: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)),
    "prefix": (1e-2, lambda rows: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)),
}
Rows = list[dict[str, str]]


def packages(apt: str, each: int, letters: int) -> Rows:
    """Descriptions of as many packages of each section, cut, and in a random order that is always the same."""
    found: dict[str, set[str]] = {section: set() for section in SECTIONS}
    for paragraph in apt.split("\n\n"):
        section = re.search(r"^Section: (?:[\w-]+/)?(\w+)$", paragraph, re.MULTILINE)
        text = re.search(r"^Description(?:-en)?: (.*(?:\n .*)*)", paragraph, re.MULTILINE)
        if section and text and section[1] in found:
            lines = [line.strip() for line in text[1].split("\n")]
            found[section[1]].add(" ".join(line for line in lines if line not in ("", "."))[:letters].strip())
    drawn, rows = random.Random(0), list[dict[str, str]]()
    for section, texts in found.items():
        if len(texts) < each:
            raise SystemExit(
                f"apt knows {len(texts)} packages of section {section}, and {each} are needed: apt-get update"
            )
        rows += [{"text": text, "section": section} for text in drawn.sample(sorted(texts), each)]
    drawn.shuffle(rows)
    return rows


def count_right(model: Any, tokenizer: Any, rows: Rows) -> tuple[int, list[str]]:
    """How many sections are named, and what was written."""
    writer = PlainWriter(TEMPLATE, tokenizer)
    texts = answers(model, tokenizer, [writer.question(row) for row in rows], 5)
    return sum(text.strip() == row["section"] for text, row in zip(texts, rows)), texts


def seconds_a_step(models: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The median of each model's training steps on the same batches, in turns, in the order A B B A."""
    names, taken = [*models], {name: list[float]() for name in models}
    optimizers = {
        name: torch.optim.AdamW([p for p in one.parameters() if p.requires_grad]) for name, one in models.items()
    }
    for index, batch in enumerate(batches):
        for name in names if index % 2 else names[::-1]:
            start = time.perf_counter()
            optimizers[name].zero_grad()
            models[name].train()(**batch).loss.backward()
            optimizers[name].step()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first finds things out


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of the text, (tokens, V): behind a prompt in front, and without padding."""
    logits, mask = model(**batch).logits, batch["attention_mask"]
    found: torch.Tensor = logits[:, -mask.shape[1] :][mask.bool()]
    return found


def learn(method: str, model: Path, folder: Path, test: Rows, options: argparse.Namespace) -> dict[str, Any]:
    """Tune a prompt, count what it gets right, read it back with PEFT, and time its steps beside PEFT's."""
    rate, config = METHODS[method]
    out, rows = folder / method, options.virtual_tokens
    arguments = {"model": model, "data": folder / "train.jsonl", "held-out-data": folder / "held-out.jsonl", "out": out}
    arguments |= {"method": method, "template": TEMPLATE.text, "virtual-tokens": rows, "learning-rate": rate}
    arguments |= {"steps": options.steps, "interval": max(1, options.steps // 8), "dtype": "float32", "device": "cpu"}
    arguments["answers"] = 0
    if code := tune.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]):
        raise SystemExit(code)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    ours = fp.PromptModel.from_pretrained(base(), out)
    right, texts = count_right(ours, tokenizer, test)
    writer, collate = PlainWriter(TEMPLATE, tokenizer), collator(tokenizer.pad_token_id)
    size = 8
    batches = [collate([writer.row(row) for row in test[i : i + size]]) for i in range(0, options.timed * size, size)]
    theirs = peft.PeftModel.from_pretrained(base(), str(out)).eval()
    with torch.no_grad():
        largest = float((logits_of(ours, batches[0]) - logits_of(theirs, batches[0])).abs().max())
    trained = fp.PromptModel.from_pretrained(base(), out, is_trainable=True)
    times = seconds_a_step({"PEFT": peft.get_peft_model(base(), config(rows)), "fusedprompt": trained}, batches)
    examples = [(row["text"][:60], row["section"], text.strip()) for row, text in list(zip(test, texts))[:4]]
    return {"right": right, "difference": largest, **times, "examples": examples}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all of it, print a table, and write it down; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "build" / "models" / "SmolLM2-135M-Instruct", help="(%(default)s)")
    add("--output", type=Path, default=ROOT / "build" / "demo-real", help="(%(default)s)")
    add("--packages", type=Path, help="what apt-cache dumpavail prints, in a file, instead of asking it")
    add(
        "--each",
        type=int,
        default=140,
        help="packages of each section, 6 of them to watch and 12 to test (%(default)s)",
    )
    add("--steps", type=int, default=64, help="of each prompt (%(default)s)")
    add("--virtual-tokens", type=int, default=20, help="(%(default)s)")
    add("--timed", type=int, default=5, help="training steps that are timed (%(default)s)")
    options = parser.parse_args(argv)
    if options.packages is None:
        apt = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    else:
        apt = options.packages.read_text()
    start, rows = time.perf_counter(), packages(apt, options.each, letters=200)
    held_out, tested = 6 * len(SECTIONS), 12 * len(SECTIONS)
    parts = {"test": rows[:tested], "held-out": rows[tested : tested + held_out], "train": rows[tested + held_out :]}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print({name: len(part) for name, part in parts.items()}, "descriptions of packages of", ", ".join(SECTIONS))
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        base = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        found: dict[str, Any] = {"without a prompt": count_right(base, tokenizer, parts["test"])[0]}
        for method in METHODS:
            found[method] = learn(method, options.model, options.output, parts["test"], options)
    print(f"\nRight of {tested} packages that were not trained on: {found['without a prompt']} without a prompt.")
    for method in METHODS:
        one = found[method]
        print(
            f"{method}: {one['right']}; a training step takes PEFT {one['PEFT']:.2f} s and fusedprompt "
            f"{one['fusedprompt']:.2f} s: {one['PEFT'] / one['fusedprompt']:.2f} times as fast. PEFT reads it back: "
            f"logits differ by at most {one['difference']:.1g}."
        )
        for text, section, answer in one["examples"]:
            print(f"    {answer!r} ({section}) for {text!r}")
    found["seconds"] = time.perf_counter() - start
    (options.output / "summary.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"{found['seconds']:.0f} s. Prompts with their curves are in {options.output}.")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
