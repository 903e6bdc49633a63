"""Sequence classification with BERT, or with any encoder, on padded batches.

    accelerate launch examples/finetune_bert.py configs/train/bert_demo.yaml
    python examples/finetune_bert.py --model_name_or_path <model> --train_file labelled.jsonl --snippets_per_label 0

By default the task is to tell which top-level package of Python's standard library a snippet of source comes from.
Evaluation is on snippets of held-out files, as many for each label: chance is 1 / number of labels.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict

import torch
from common import (
    DataArguments,
    Document,
    TrainArguments,
    finish,
    hold_out,
    launch,
    load_documents,
    make_optimizer,
    make_tokenizer,
    parse_arguments,
    train,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, BertConfig, DataCollatorWithPadding

import hf_flash_plus


@dataclasses.dataclass
class BertArguments:
    """The fresh model's sizes (unused with ``model_name_or_path``) and the task."""

    hidden_size: int = dataclasses.field(default=128, metadata={"help": "width"})
    intermediate_size: int = dataclasses.field(default=512, metadata={"help": "width of the MLP"})
    num_layers: int = dataclasses.field(default=3, metadata={"help": "layers"})
    num_heads: int = dataclasses.field(default=4, metadata={"help": "attention heads"})
    dropout: float = dataclasses.field(default=0.1, metadata={"help": "of hidden states and attention weights"})
    max_length: int = dataclasses.field(default=128, metadata={"help": "tokens per row at most"})
    skip_padding: bool = dataclasses.field(
        default=False, metadata={"help": "flash_plus only: no layer computes padding (hf_flash_plus.skip_padding)"}
    )
    num_labels: int = dataclasses.field(default=8, metadata={"help": "the labels with most text; 0: all"})
    snippets_per_label: int = dataclasses.field(
        default=400, metadata={"help": "training snippets drawn for each label; 0: every document once, whole"}
    )
    eval_snippets_per_label: int = dataclasses.field(default=50, metadata={"help": "the same, from held-out documents"})
    snippet_chars: int = dataclasses.field(default=500, metadata={"help": "longest snippet; the shortest is a fifth"})


def choose_labels(documents: list[Document], count: int) -> list[str]:
    """The ``count`` labels with most text among those with at least two documents, in alphabetical order."""
    documents_of = Counter(document.label for document in documents if document.label)
    size_of: Counter[str] = Counter()
    for document in documents:
        if documents_of[document.label] > 1:
            size_of[document.label] += len(document.text)
    labels = sorted(label for label, _ in size_of.most_common(count or None))
    if len(labels) < 2:
        raise SystemExit("classification needs two labels with two documents each, at least")
    return labels


def draw_snippets(documents: list[Document], per_label: int, longest: int, seed: int) -> list[Document]:
    """``per_label`` pieces of text for each label, from random lines, of random length; 0: the documents themselves."""
    if not per_label:
        return documents
    rng = random.Random(seed)
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.label].append(document)
    snippets = []
    for label, group in sorted(groups.items()):
        weights = [len(document.text) for document in group]
        for document in rng.choices(group, weights, k=per_label):
            length = rng.randint(longest // 5, longest)
            start = rng.randint(0, max(0, len(document.text) - length))
            start = document.text.rfind("\n", 0, start) + 1  # the start of a line
            snippets.append(Document(document.text[start : start + length], label))
    return snippets


def encode(snippets: list[Document], tokenizer, labels: list[str], max_length: int) -> list[dict]:
    """Tokens and label index of each snippet, unpadded: the collator pads each batch to its longest row."""
    encoded = tokenizer([s.text for s in snippets], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": ids, "labels": labels.index(s.label)} for ids, s in zip(encoded, snippets)]


@torch.no_grad()
def evaluate(accelerator, model, loader, num_labels: int) -> tuple[float, float]:
    """Accuracy on the held-out snippets of all processes, and F1 averaged over the labels that occur (macro)."""
    model.eval()
    counts = torch.zeros(num_labels, num_labels, dtype=torch.long)  # rows: the label, columns: what the model says
    for batch in tqdm(loader, disable=not accelerator.is_main_process, desc="eval", leave=False):
        predicted = model(**batch).logits.argmax(dim=-1)
        predicted, expected = accelerator.gather_for_metrics((predicted, batch["labels"]))
        pairs = (expected * num_labels + predicted).cpu()
        counts += torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels)
    model.train()
    right, occurrences = counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1)
    f1 = 2 * right[occurrences > 0] / occurrences[occurrences > 0]
    return (right.sum() / counts.sum()).item(), f1.mean().item()


def make_model(accelerator, args: TrainArguments, sizes: BertArguments, tokenizer, labels: list[str]):
    """The pretrained model with a new head, or a fresh BERT, with the attention implementation of the arguments."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation, dtype=torch.float32, **names
        )
    else:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            max_position_embeddings=sizes.max_length,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            pad_token_id=tokenizer.pad_token_id,
            **names,
        )
        with accelerator.device:  # a GPU draws weights much faster
            model = AutoModelForSequenceClassification.from_config(config, attn_implementation=args.attn_implementation)
    if sizes.skip_padding and args.attn_implementation == "flash_plus":
        hf_flash_plus.skip_padding(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return torch.compile(model, backend=args.compile_backend) if args.compile else model


def run(accelerator, arguments: tuple) -> dict:
    """Train, evaluate before and after; returns what ``result.json`` holds."""
    data, args, sizes = arguments
    documents = load_documents(data, args.seed)
    labels = choose_labels(documents, sizes.num_labels)
    train_documents, eval_documents = hold_out([d for d in documents if d.label in labels], data.eval_fraction)
    tokenizer = make_tokenizer(args, [document.text for document in train_documents])
    train_rows, eval_rows = (
        encode(draw_snippets(part, count, sizes.snippet_chars, args.seed), tokenizer, labels, sizes.max_length)
        for part, count in (
            (train_documents, sizes.snippets_per_label),
            (eval_documents, sizes.eval_snippets_per_label if sizes.snippets_per_label else 0),
        )
    )
    model = make_model(accelerator, args, sizes, tokenizer, labels)
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    train_loader = DataLoader(train_rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(eval_rows, batch_size=args.batch_size, collate_fn=collate)
    accelerator.print(f"{len(train_rows)} training and {len(eval_rows)} held-out snippets of: {', '.join(labels)}")
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, make_optimizer(model, args), train_loader, eval_loader
    )
    accuracy_start, f1_start = evaluate(accelerator, model, eval_loader, len(labels))
    log = train(accelerator, model, optimizer, train_loader, args, causal=False)
    accuracy_end, f1_end = evaluate(accelerator, model, eval_loader, len(labels))
    extra = {"labels": labels, "accuracy_start": accuracy_start, "accuracy_end": accuracy_end}
    extra |= {"f1_start": f1_start, "f1_end": f1_end}
    accelerator.print(f"accuracy     {accuracy_start:.3f} -> {accuracy_end:.3f} (held out, {len(labels)} labels)")
    accelerator.print(f"F1           {f1_start:.3f} -> {f1_end:.3f} (mean over the labels)")
    return finish(accelerator, model, tokenizer, log, arguments, extra)


def main(argv: list[str] | None = None) -> dict:
    """Run with the arguments of the command line."""
    return launch(run, parse_arguments(DataArguments, TrainArguments, BertArguments, argv=argv))


if __name__ == "__main__":
    main()
