"""Loading a GGUF file: find it, read its configuration, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ferrum_models.checkpoint import CheckpointError
from ferrum_models.qwen3_moe.gguf_file import SPLIT_NAME, find_gguf


def find_gguf_file(name_or_path: str | Path, gguf_file: str | None, hub: dict[str, Any]) -> Path | None:
    """The GGUF file that `from_pretrained(name_or_path, gguf_file=...)` means, or None if it means another checkpoint.

    `gguf_file` names a file in a directory or, looked up and downloaded as transformers does, in a repository.
    """
    path = Path(name_or_path)
    if gguf_file is None:
        return find_gguf(path / hub.get("subfolder", "") if path.is_dir() else path)
    if path.is_dir() or path.is_absolute():
        file = path / hub.get("subfolder", "") / gguf_file
        if not file.is_file():
            raise CheckpointError(file, None, "a GGUF file (gguf_file=)", "no such file")
        return file
    names = [gguf_file]
    if (match := SPLIT_NAME.fullmatch(gguf_file)) is not None:
        count = int(match["count"])
        names = [f"{match['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    first, *_ = [Path(cached_file(str(name_or_path), name, **hub)) for name in names]  # all are downloaded
    return first
