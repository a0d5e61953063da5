"""What computes attention, each way against the others; decoding with a cache against reading the
whole text at once; compiled against eager.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.mathematics import (
    OBJECTIVES,
    distance,
    loss_and_gradient,
    model_for,
    relative,
)
from benchmarks.gpu.models import MASK, PROVEN, batch_of, decoder
from benchmarks.gpu.report import Case, Finding, within
from tokendiff.diffusion.attention_masks import (
    MaskRule,
    block_causal,
    block_diffusion,
    causal,
    causal_by_position,
    positions_in_document,
    whole_documents,
)
from tokendiff.models.layers import find_layers
from tokendiff.models.masked_attention import under_rule
from tokendiff.models.tiled_attention import tiled_attention

_LIMIT = 1e-4  # float32
_BLOCK = 16

_Rule = Callable[[Tensor, Tensor], MaskRule]
# Name -> (rule of document and block, how many times a row's length there are positions).
RULES: dict[str, tuple[_Rule, int]] = {
    "whole documents": (lambda document, block: whole_documents(document), 1),
    "causal": (lambda document, block: causal(document), 1),
    "block causal": (block_causal, 1),
    "block diffusion": (block_diffusion, 2),
}


def cases(machine: Machine) -> Iterator[Case]:
    device = machine.device
    for name in RULES:
        for is_packed in (False, True):
            rows = "packed" if is_packed else "one document"
            # On a card each costs a compilation, and packed rows are the harder ones.
            has_flex = is_packed or not machine.is_cuda
            yield Case(
                name=f"{'flex, ' if has_flex else ''}tiles, {name}, {rows}",
                compared="dense in float64 on the CPU; backward too"
                + ("" if machine.is_cuda else ", but of flex"),
                run=partial(_kernels, name, is_packed, has_flex, machine),
                is_proof=True,
            )
    for name in ("block_diffusion", "dflash"):
        yield Case(
            name=f"objective {name} by each kernel",
            compared="dense; loss and gradient",
            run=partial(_model_kernels, name, machine),
            is_proof=True,
        )
    yield Case(
        name="decoding with a cache, ragged rows",
        compared="the text read at once",
        run=partial(_cache, device),
        is_proof=True,
    )
    backend = "inductor" if machine.is_cuda else "aot_eager"
    yield Case(
        name=f"compiled encoder ({backend})",
        compared="eager; loss and gradient",
        run=partial(_compiled, machine, backend),
        is_proof=True,
    )


def _kernels(name: str, is_packed: bool, has_flex: bool, machine: Machine) -> Finding:
    """Grouped keys (4 heads, 2 of keys); 160 positions, which no tile divides."""
    rule_of, times = RULES[name]
    length, device = 160 // times, machine.device
    batch = batch_of(2, length, 64, is_packed=is_packed)
    block = positions_in_document(batch.document) // _BLOCK
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 160, 16), (2, 2, 160, 16), (2, 2, 160, 16), (2, 160, 4, 16))
    q, k, v, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    exact = _attended("dense", rule_of(batch.document, block), (q, k, v), grad, needs_grad=True)
    rule = rule_of(batch.document.to(device), block.to(device))
    inputs = tuple(x.to(device, torch.float32) for x in (q, k, v))
    errors = {}
    for kernel in ("dense", "tiles", *(["flex"] if has_flex else [])):
        needs_grad = kernel != "flex" or machine.is_cuda
        ours = _attended(kernel, rule, inputs, grad.to(inputs[0]), needs_grad=needs_grad)
        pairs = zip(ours, exact, strict=False)
        errors[kernel] = max(distance(a, b) for a, b in pairs)
    return within(max(errors.values()), _LIMIT, **errors)


def _attended(
    kernel: Any,
    rule: MaskRule,
    states: tuple[Tensor, ...],
    grad: Tensor,
    *,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    """[B, Q, heads, D], and the gradients of query, key and value where they are wanted."""
    query, key, value = leaves = [x.detach().clone().requires_grad_(needs_grad) for x in states]
    inputs = under_rule(
        rule, kernel, batch_size=len(query), length=query.shape[2], device=query.device
    )
    if kernel == "tiles":
        output, _ = tiled_attention(
            torch.nn.Module(), query, key, value, None, tiles=inputs["tiles"]
        )
    elif kernel == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # each rule is compiled anew, and the compiler gives up after some
        attend: Any = torch.compile(flex_attention) if needs_grad else flex_attention
        mask = inputs["attention_mask"]
        with torch.set_grad_enabled(needs_grad):
            output = attend(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=inputs["attention_mask"]
        ).transpose(1, 2)
    if not needs_grad:
        return (output,)
    return output, *torch.autograd.grad(output, leaves, grad)


def _model_kernels(name: str, machine: Machine) -> Finding:
    kind, objective = OBJECTIVES[name]
    batch = batch_of(3, 48, PROVEN.vocab_size, is_packed=True, device=machine.device)
    found = {}
    for kernel in ("dense", "tiles", *(["flex"] if machine.is_cuda else [])):
        model = model_for(kind, machine.device, torch.float32)
        model._kernel = kernel  # as its argument attention_kernel
        found[kernel] = loss_and_gradient(model, objective, batch)
    dense = found.pop("dense")
    errors = {
        kernel: max(relative(a, b) for a, b in zip(ours, dense, strict=True))
        for kernel, ours in found.items()
    }
    return within(max(errors.values()), _LIMIT, **errors)


@torch.no_grad()
def _cache(device: torch.device) -> Finding:
    """Rows of three lengths, in pieces of 1 to 7 tokens, one row cut back and read on."""
    model, lengths = decoder(PROVEN, device, torch.float32), torch.tensor([37, 20, 29])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(MASK + 1, PROVEN.vocab_size, (3, 37), generator=generator)
    rows = torch.arange(3)
    cache = model.new_cache(3)
    pieces = torch.zeros(3, 37, PROVEN.hidden_size, device=device)
    for turn in range(40):
        begin = cache.lengths.clone()
        size = 1 + turn % 7
        counts = (lengths - begin).clamp(min=0, max=size)
        if not bool(counts.any()):
            break
        at = begin[:, None] + torch.arange(size)
        part = tokens.gather(1, at.clamp(max=36))
        hidden = model.encode(part, counts, cache, rows, causal_by_position)
        cache.extend(rows, counts)
        for row in range(3):
            count, first = int(counts[row]), int(begin[row])
            pieces[row, first : first + count] = hidden[row, :count]
        if turn == 4:
            cache.crop(rows[:1], cache.lengths[:1] - 3)
    whole = model.encode(tokens, lengths, model.new_cache(3), rows, causal_by_position)
    is_text = (torch.arange(37) < lengths[:, None]).to(device)
    return within(distance(pieces[is_text], whole[is_text]), _LIMIT)


def _compiled(machine: Machine, backend: str) -> Finding:
    kind, objective = OBJECTIVES["mdlm"]
    batch = batch_of(3, 48, PROVEN.vocab_size, is_packed=False, device=machine.device)
    eager, compiled = (model_for(kind, machine.device, torch.float32) for _ in range(2))
    if machine.is_cuda:
        compiled.compile_encoder()
    else:  # as it does, with a compiler that takes no minute
        for layer in find_layers(compiled.model, field="compile"):
            layer.compile(backend=backend)
    results = [loss_and_gradient(model, objective, batch) for model in (compiled, eager)]
    return within(max(relative(a, b) for a, b in zip(*results, strict=True)), _LIMIT)
