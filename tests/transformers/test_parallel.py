"""Several at once: threads that patch different models, DataLoader workers that are forked or spawned."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hf_flash_plus
from hf_flash_plus import patch_model, patched, use_provider
from hf_flash_plus.integration import attention

from .tiny import assert_close, build, ids, padding


def test_threads_patch_and_run_different_models() -> None:
    """Each switches its own model back and forth, under a provider of its own, and always gets its own result."""
    rounds, start, errors = 15, threading.Barrier(4), []
    names = [("llama", "reference"), ("bert", "torch_sdpa"), ("gpt_neo", "reference"), ("mistral", "torch_sdpa")]
    models = {name: build(name) for name, _ in names}
    batch = dict(input_ids=ids(), attention_mask=padding("left"))
    with torch.no_grad():
        expected = {name: model(**batch).logits for name, model in models.items()}

    def work(name: str, provider: str) -> None:
        try:
            start.wait()
            model = models[name]
            for _ in range(rounds):
                with use_provider(provider), patched(model), torch.no_grad():
                    assert hf_flash_plus.dispatch.settings.forced_provider() == provider
                    assert_close(model(**batch).logits, expected[name], batch["attention_mask"])
                assert model.config._attn_implementation == "eager"
                with torch.no_grad():
                    assert torch.equal(model(**batch).logits, expected[name])
        except BaseException as error:
            errors.append((name, error))
            raise

    threads = [threading.Thread(target=work, args=names[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_threads_train_one_model() -> None:
    """Forward in several threads, backward in autograd's: the provider recorded in forward does the backward."""
    model = build("llama", "flash_plus").train()
    batch = dict(input_ids=ids())
    model(**batch).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []

    def work() -> None:
        with use_provider("reference"):
            losses.append(model(**batch).logits.square().mean())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad / 3, expected[name])


class Attended(Dataset[Tensor]):
    """Computes attention where the data are loaded: by a function, and by a model patched in the parent."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        q = torch.randn(1, 6, 2, 8, generator=generator)
        out: Any = hf_flash_plus.flash_attn_func(q, q, q, causal=True)
        with torch.no_grad():
            logits = self.model(input_ids=ids(1, 9, seed=index)).logits
        return torch.cat((out.flatten(), logits.flatten()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str) -> None:
    model = build("llama")
    patch_model(model)
    dataset = Attended(model)
    expected = [dataset[i] for i in range(len(dataset))]  # used before the fork, as in real programs
    loader = DataLoader(dataset, batch_size=1, num_workers=1, multiprocessing_context=method, timeout=120)
    for got, want in zip(loader, expected, strict=True):
        torch.testing.assert_close(got[0], want, atol=1e-6, rtol=1e-6)
    assert model.config._attn_implementation == attention.NAME
