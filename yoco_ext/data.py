"""Byte-level text: reading files, holding some out, cutting the rest into training windows."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
END_OF_TEXT = 0  # NUL, which text files do not contain, stands between files

_SUFFIXES = {".py", ".txt", ".md", ".rst", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".java", ".js", ".ts"}
_SUFFIXES |= {".rs", ".go", ".html", ".css", ".json", ".toml", ".yaml", ".yml", ".tex", ".csv", ".xml", ".sh"}
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# Of the standard library only code that people wrote to be read: no tests, no generated tables.
_SKIPPED_IN_STANDARD_LIBRARY = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}


@dataclass
class Corpus:
    """Training bytes, and files that the training never sees."""

    name: str
    train: Tensor  # uint8 [bytes]
    held_out: dict[str, bytes]  # by relative path, sorted

    @property
    def held_out_bytes(self) -> bytes:
        return bytes([END_OF_TEXT]).join(self.held_out.values())


def load_corpus(path: str | Path | None = None) -> Corpus:
    """Text of a file or of a folder's text files; without a path, the source of Python's standard library.

    Of a folder about one file in 25 is held out, chosen by name alone; of a single file the last 4 %.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    skipped = _SKIPPED if path is not None else _SKIPPED | _SKIPPED_IN_STANDARD_LIBRARY
    suffixes = _SUFFIXES if path is not None else {".py"}
    if root.is_file():
        text = root.read_bytes().replace(b"\0", b"")
        cut = len(text) - len(text) // 25
        train, held_out = [text[:cut]], {root.name: text[cut:]}
    elif root.is_dir():
        train, held_out = [], {}
        for file in sorted(root.rglob("*"), key=lambda file: file.relative_to(root).as_posix()):
            parts = file.relative_to(root).parts
            if file.suffix not in suffixes or not skipped.isdisjoint(parts[:-1]) or not file.is_file():
                continue
            name, text = "/".join(parts), file.read_bytes()
            if not text or b"\0" in text:
                continue
            if zlib.crc32(name.encode()) % 25 == 0:
                held_out[name] = text
            else:
                train.append(text)
        if train and not held_out:
            held_out["(last file)"] = train.pop()
    else:
        raise ValueError(f"{root} is neither a file nor a folder")
    if sum(map(len, train)) < 1024 or not sum(map(len, held_out.values())):
        raise ValueError(
            f"{root} holds too little text: at least 1 KiB to train on and something to hold out is needed"
        )
    joined = bytearray(bytes([END_OF_TEXT]).join(train))
    return Corpus(
        "Python standard library" if path is None else str(path), torch.frombuffer(joined, dtype=torch.uint8), held_out
    )


class Batches:
    """Random windows [batch_size, seq_len + 1] of a token stream: every window once per epoch, new cuts each epoch.

    A batch is a function of its index alone, so training resumes anywhere.
    """

    def __init__(self, tokens: Tensor, batch_size: int, seq_len: int, seed: int = 0) -> None:
        if tokens.numel() < 2 * seq_len + 1:
            raise ValueError(f"the text ({tokens.numel()} tokens) must be longer than two windows of {seq_len}")
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        self.windows = (tokens.numel() - 1) // seq_len - 1  # one less: room for the epoch's shift
        self._epoch: tuple[int, Tensor] | None = None

    def __getitem__(self, index: int) -> Tensor:
        rows = [self._window(index * self.batch_size + row) for row in range(self.batch_size)]
        return torch.stack(rows).long()

    def _window(self, number: int) -> Tensor:
        epoch, position = divmod(number, self.windows)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shift = torch.randint(self.seq_len, (), generator=generator)
            self._epoch = epoch, torch.randperm(self.windows, generator=generator) * self.seq_len + shift
        start = int(self._epoch[1][position])
        return self.tokens[start : start + self.seq_len + 1]
