"""Documents, their split into training and evaluation, and the tokenizer."""

from __future__ import annotations

import functools
import os
import random
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .arguments import DataArguments, TrainArguments


class Document(NamedTuple):
    """One text, the unit of the split into training and evaluation."""

    text: str
    label: str


#: Standard library packages left out: tests, generated tables, and what newer Pythons no longer have.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
SKIPPED |= {"distutils", "__phello__", "config", "turtledemo"}
#: Files with a document per row, by suffix, and the name that `datasets` has for their format.
ROW_FORMATS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@functools.cache
def _read_folder(root: Path, suffixes: tuple[str, ...]) -> list[Document]:
    """Every text file below a folder; its label is the folder's first-level subfolder ('' for files at the top)."""
    documents = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)  # not even looked into: site-packages may be large
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in suffixes and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                if text.strip():
                    parts = path.relative_to(root).parts
                    documents.append(Document(text, parts[0] if len(parts) > 1 else ""))
    return documents


def _read_rows(args: DataArguments) -> list[Document]:
    """The rows that `datasets` finds under a name, or in a file of a format that it reads."""
    from datasets import load_dataset

    if args.dataset:
        rows = load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)
    else:
        rows = load_dataset(ROW_FORMATS[Path(args.train_file).suffix], data_files=args.train_file, split="train")
    labels = rows[args.label_column] if args.label_column in rows.column_names else [""] * len(rows)
    return [Document(text, str(label)) for text, label in zip(rows[args.text_column], labels)]


def load_documents(args: DataArguments, seed: int) -> list[Document]:
    """The documents that the arguments name, in an order that depends on the seed only."""
    if args.dataset and args.train_file:
        raise SystemExit("give --dataset or --train_file, not both")
    if args.dataset or Path(args.train_file or "").suffix in ROW_FORMATS:
        documents = _read_rows(args)
    elif args.train_file is None:
        documents = _read_folder(Path(sysconfig.get_paths()["stdlib"]), (".py",))
    elif Path(args.train_file).is_dir():
        documents = _read_folder(Path(args.train_file), (".txt", ".md", ".rst", ".py"))
    else:
        documents = [Document(Path(args.train_file).read_text(encoding="utf-8"), "")]
    documents = list(documents)  # the folder's are kept for the next run of --compare
    random.Random(seed).shuffle(documents)
    documents = documents[: args.max_documents or None]
    if not documents:
        raise SystemExit("no documents found")
    return documents


def hold_out(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into training and evaluation by whole documents, the same part of each label.

    A single document is split in two: its tail is held out.
    """
    if len(documents) == 1:
        text, label = documents[0]
        cut = int(len(text) * (1 - fraction))
        return [Document(text[:cut], label)], [Document(text[cut:], label)]
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.label].append(document)
    train: list[Document] = []
    held_out: list[Document] = []
    for group in groups.values():
        count = max(1, round(len(group) * fraction)) if len(group) > 1 else 0
        held_out += group[:count]
        train += group[count:]
    return train, held_out


def make_tokenizer(args: TrainArguments, texts: list[str]) -> PreTrainedTokenizerFast:
    """The pretrained model's tokenizer, or a byte-level BPE trained on the texts (every string is encodable)."""
    if not args.model_name_or_path:
        return _train_tokenizer(tuple(texts), args.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.lru_cache(maxsize=1)  # --compare trains several models on the same texts
def _train_tokenizer(texts: tuple[str, ...], vocab_size: int) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<cls>", "<sep>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    ids = [(token, core.token_to_id(token)) for token in ("<cls>", "<sep>")]
    core.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ids)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "cls_token", "sep_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
