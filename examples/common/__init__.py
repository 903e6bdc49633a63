"""What the two fine-tuning scripts share: arguments, documents, the tokenizer, the training loop, the report."""

from .arguments import DataArguments, TrainArguments, parse_arguments
from .data import Document, hold_out, load_documents, make_tokenizer
from .measure import attended_pairs, training_flops
from .report import finish, launch, plot_losses
from .training import clip_gradients, make_accelerator, make_optimizer, tensor_parallel, train

__all__ = [
    "DataArguments",
    "Document",
    "TrainArguments",
    "attended_pairs",
    "clip_gradients",
    "finish",
    "hold_out",
    "launch",
    "load_documents",
    "make_accelerator",
    "make_optimizer",
    "make_tokenizer",
    "parse_arguments",
    "plot_losses",
    "tensor_parallel",
    "train",
    "training_flops",
]
