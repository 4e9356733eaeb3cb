"""A model card: what a folder of adapters is, for the people and the pages of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.tasks import TaskType
from .adapters import PromptAdapters

FILE = "README.md"
_PIPELINES: dict[str, str] = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}


def create_or_update(model: PromptAdapters, folder: str | os.PathLike[str], tags: Sequence[str] = ()) -> None:
    """Write a card into a folder; of one that is there, complete the metadata and leave the text."""
    path = Path(folder, FILE)
    if not path.exists():
        path.write_text(_text(model), encoding="utf-8")
        if not tags:
            return
    from huggingface_hub import ModelCard

    page = ModelCard.load(path, ignore_metadata_errors=True)
    for name, value in _metadata(model).items():
        if name == "tags":
            page.data.tags = list(dict.fromkeys([*(page.data.tags or []), *value, *tags]))
        elif name == "library_name" or not getattr(page.data, name, None):
            page.data[name] = value
    page.save(path)


def _metadata(model: PromptAdapters) -> dict[str, Any]:
    configs = [*model.peft_config.values()]
    base = next((config.base_model_name_or_path for config in configs if config.base_model_name_or_path), None)
    pipeline = _PIPELINES.get(configs[0].task_type) if configs and configs[0].task_type is not None else None
    tags = ["fusedprompt", *([f"base_model:adapter:{base}"] if base else [])]
    tags += [tag for tag in getattr(model.base_model, "model_tags", None) or [] if tag not in tags]
    found = {"base_model": base, "library_name": "peft", "pipeline_tag": pipeline, "tags": tags}
    return {name: value for name, value in found.items() if value}


def _text(model: PromptAdapters) -> str:
    # JSON is YAML.
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in _metadata(model).items())
    base = _metadata(model).get("base_model", "the base model")
    return f"""---
{head}
---

# Soft prompts for {base}

Trained with fusedprompt; `adapter_config.json` has method and settings. With `base_model` loaded by transformers:

```python
import fusedprompt

model = fusedprompt.PromptModel.from_pretrained(base_model, "<this repository or folder>")
```

PEFT loads adapters whose prompt stands in front of the text: `peft.PeftModel.from_pretrained(base_model, ...)`.
"""
