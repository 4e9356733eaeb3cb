"""Adapters on disk, in PEFT's format.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads and writes too, and for adapters
that can be trained further `prompt_encoder.safetensors`, which PEFT ignores: it keeps only what the encoder computed,
so training cannot be resumed from its files (huggingface/peft#1607). Adapters with a template have it in
`prompt_template.json`.

Writes are atomic. All files of an adapter are written to a hidden folder, which is then renamed: that rename is the one
moment at which the new adapter replaces the old. A process that dies before it leaves the old adapter whole; after it,
readers take the files from the renamed folder until the next save has moved them to their places.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

ADAPTER_NAME = "adapter_model.safetensors"
ENCODER_NAME = "prompt_encoder.safetensors"
TEMPLATE_NAME = "prompt_template.json"
PROMPT_KEY = "prompt_embeddings"
# Beside PEFT's fields in adapter_config.json, and only where the prompt is not at PEFT's place: PEFT warns of it.
PROMPT_START_KEY = "fusedprompt_prompt_start"
# For adapters that PEFT would misread, such as those in a template: the field that it dispatches on says why it cannot
# load them, and the true value stands under a key of our own.
PEFT_TYPE_KEY = "fusedprompt_peft_type"
_COMMITTED = ".fusedprompt-committed"

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_writes(folder: PathLike) -> Iterator[Path]:
    """Collect files in a hidden folder, and put all of them into `folder` when the block ends without an error."""
    target = Path(folder)
    if target.is_file():
        raise NotADirectoryError(f"save_directory: expected a folder, got the file {target}")
    target.mkdir(parents=True, exist_ok=True)
    _move_committed(target)
    stage = Path(tempfile.mkdtemp(prefix=".fusedprompt-saving-", dir=target))
    try:
        yield stage
        mode = _usual_mode(stage)
        for file in stage.iterdir():
            file.chmod(mode)  # safetensors makes files that their owner alone can read
            flush(file)
        flush(stage)
        os.rename(stage, target / _COMMITTED)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _move_committed(target, undo=True)
    flush(target)


def _usual_mode(folder: Path) -> int:
    """Permissions of a new file, by the process's umask, which can only be read by setting it: threads would notice."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _move_committed(target: Path, undo: bool = False) -> None:
    """Move committed files to their places. With `undo`, give up on the new files if not even the first can move."""
    committed = target / _COMMITTED
    if not committed.is_dir():
        return
    moved = False
    try:
        for file in sorted(committed.iterdir()):
            os.replace(file, target / file.name)
            moved = True
    except OSError:
        if undo and not moved:
            shutil.rmtree(committed, ignore_errors=True)
        raise
    committed.rmdir()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stored(folder: PathLike, name: str) -> Path:
    """Where the current version of a file is: a save may have been interrupted after its files were committed."""
    committed = Path(folder, _COMMITTED, name)
    return committed if committed.is_file() else Path(folder, name)


def read_json(file: PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON object.
    """
    path = stored(Path(file).parent, Path(file).name)
    if not path.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected the configuration of a prompt-learning adapter")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, but it cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file (one in another format is named, and not read).
        ValueError: the file is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        other = path.with_suffix(".bin")
        raise FileNotFoundError(f"{path}: no such file{how_to_convert(other) if other.is_file() else ''}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, but it cannot be read: {error}") from None


def how_to_convert(pickled: Path) -> str:
    """What to do with a file that is there in another format."""
    return (
        f". {pickled.name} is there, but only safetensors files are read: a pickle may run any code. If you trust it, "
        f"convert it: safetensors.torch.save_file(torch.load({str(pickled)!r}, weights_only=True), "
        f"{str(pickled.with_suffix('.safetensors'))!r})"
    )


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors are not exactly those expected, by name and shape."""
    for name, parameter in expected.items():
        if name not in tensors:
            raise ValueError(f"{path}: expected the tensor {name!r}, got {sorted(tensors)}")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: tensor {name!r}: expected shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: tensor {name!r}: expected a floating-point dtype, got {tensors[name].dtype}")
    foreign = sorted(set(tensors) - set(expected))
    if foreign:
        raise ValueError(f"{path}: tensors {foreign} belong to no part of this adapter; expected {sorted(expected)}")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    # A copy of its own per tensor: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(file), metadata={"format": "pt", **metadata})


def read_encoder(folder: PathLike, prompt: Tensor) -> tuple[Path, dict[str, Tensor]] | None:
    """The encoder's parameters, or None if the folder has none.

    Raises:
        ValueError: they belong to another prompt than the folder's, as after PEFT saved over it.
    """
    path = stored(folder, ENCODER_NAME)
    if not path.is_file():
        return None
    tensors, metadata = read_tensors(path)
    if metadata.get("prompt_sha256") != fingerprint(prompt):
        raise ValueError(
            f"{path}: expected the encoder of the prompt in {ADAPTER_NAME}, got that of another prompt. The folder was "
            f"probably saved over by another program; remove {ENCODER_NAME} to load the prompt for inference."
        )
    return path, tensors


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, shape and dtype."""
    import torch

    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    header = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(header + content.numpy().tobytes()).hexdigest()


# Arguments of huggingface_hub for a download. `subfolder` is not among them: a local folder has some too.
DOWNLOAD = ("cache_dir", "endpoint", "etag_timeout", "force_download", "local_files_only", "revision", "token")


def find_folder(path: PathLike, subfolder: str | None = None, **download: Any) -> Path:
    """A local folder: `path` itself, or the files of a repository of that name on the Hugging Face Hub.

    Args:
        subfolder: of either; the result is this one.
        download: huggingface_hub's arguments for the Hub, those of `DOWNLOAD`.

    Raises:
        FileNotFoundError: neither exists.
        TypeError: another argument.
    """
    for name in download:
        if name not in DOWNLOAD:
            raise TypeError(f"got an unexpected argument {name!r}; for downloads there are {', '.join(DOWNLOAD)}")
    inside = subfolder or ""
    folder = Path(path)
    if folder.is_dir():
        return folder / inside
    name = os.fspath(path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or (os.sep != "/" and os.sep in name):
        raise FileNotFoundError(f"path: expected the folder of an adapter, got {name!r}, which does not exist")
    from huggingface_hub import snapshot_download

    names = ("adapter_config.json", ADAPTER_NAME, ENCODER_NAME, TEMPLATE_NAME)
    patterns = [f"{inside.strip('/')}/{one}" if inside else one for one in names]
    given = {name: value for name, value in download.items() if value is not None}
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns, **given)) / inside
        if not (found / ADAPTER_NAME).is_file():  # perhaps it is pickled: whoever reads the folder says so
            pickled = patterns[1].replace(".safetensors", ".bin")
            snapshot_download(name, allow_patterns=[pickled], **given)
        return found
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path: expected a local folder or a repository on the Hub, got {name!r}, which is neither: {error}"
        ) from error
