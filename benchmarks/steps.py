"""What is timed: the encoder's forward pass, that and its backward pass, a whole pretraining step, by any backend."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.timing import draw_mask
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.flops import decoder_products, kept, stage_products
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep, fcmae_loss

WORKS = ("forward", "step", "pretrain")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """The setting of what is timed. size: (height, width) pixels. batch: images."""

    model: str
    size: tuple[int, int]
    mask_ratio: float
    batch: int
    bf16: bool
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        with torch.device("meta"):
            return SparseEncoder("atto", image_size=self.size).grid(*self.size)

    @property
    def kept(self) -> int:
        """Visible patches of each image."""
        return kept(self.grid, self.mask_ratio)

    def encoder(self) -> SparseEncoder:
        """One with no parameter where it starts: GRN and biases start at zero and would go untested."""
        encoder = SparseEncoder(self.model, image_size=self.size).to(self.device)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return encoder

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images and masks."""
        images = torch.randn(self.batch, 3, *self.size, device=self.device)
        return images, draw_mask(self.batch, self.grid, self.mask_ratio).to(self.device)


def builds(case: Case, work: str, backends: Iterable[str], compiled: bool) -> dict[str, Callable[[], Run]]:
    """What makes each candidate of a kind of work, those of the backends' names first. They share their weights."""
    if work == "pretrain":
        return pretraining_builds(case, backends)
    encoder, (images, mask), count = case.encoder(), case.inputs(), case.kept
    arguments = (images, mask, count, case.bf16)
    run = run_forward if work == "forward" else run_step
    found = {name: lambda name=name: partial(run, encoder, name, *arguments) for name in backends}
    if case.device.type == "cuda" and "native" in found and work == "step":
        found["native, graph"] = lambda: graphed(partial(run_step, encoder, "native", *arguments), case.device)
    if compiled:
        for name in backends:
            if BACKENDS[name].compilable:
                found[f"{name}, compiled"] = lambda name=name: partial(run, compile_whole(encoder), name, *arguments)
    return found


def forward(encoder: Any, backend: str, images: Tensor, mask: Tensor, kept: int, bf16: bool) -> Tensor:
    """The features by a backend."""
    encoder.backend = backend
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return encoder(images, mask, kept)


@torch.no_grad()
def run_forward(*arguments: Any) -> None:
    forward(*arguments)


def run_step(encoder: Any, *arguments: Any) -> None:
    encoder.zero_grad()
    forward(encoder, *arguments).float().square().mean().backward()


def compile_whole(encoder: SparseEncoder) -> Any:
    return torch.compile(deepcopy(encoder), fullgraph=True, dynamic=False, mode="max-autotune")


def graphed(step: Run, device: torch.device) -> Run:
    """A step from one CUDA graph."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        step()
    return lambda: (graph.replay(), step)  # which holds the tensors that the graph works on


def pretraining_builds(case: Case, backends: Iterable[str]) -> dict[str, Callable[[], Run]]:
    """Whole steps: masks, forward and backward pass of encoder and decoder, optimiser."""
    if not case.mask_ratio:
        raise UserError("pretraining needs masks: give a --mask-ratio greater than 0, or another --work")
    fcmae = FCMAE(case.model, image_size=case.size, mask_ratio=case.mask_ratio).to(case.device)
    pixels = torch.randint(256, (case.batch, *case.size, 3), dtype=torch.uint8, device=case.device)

    def build(backend: str, kind: type[TrainStep] = TrainStep) -> Run:
        optimizer = adamw(fcmae, 0.05, (0.9, 0.95), capturable=kind is GraphedTrainStep)
        work = kind(fcmae_loss(fcmae, case.kept), fcmae, optimizer, share=case.batch, bf16=case.bf16)

        def run() -> None:
            fcmae.encoder.backend = backend
            set_lr(optimizer, 1e-5)
            work.add(pixels, fcmae.draw_mask(case.batch, case.size, device=case.device), last=True)
            work.finish()

        for _ in range(WARMUP + 1 if kind is GraphedTrainStep else 0):
            run()
        return run

    found = {name: partial(build, name) for name in backends}
    if case.device.type == "cuda" and "native" in found:
        found["native, graphs"] = partial(build, "native", GraphedTrainStep)
    return found


def matrix_products(case: Case, work: str) -> Run:
    """The matrix products of the visible positions alone, and of the gradients where the work has them.

    Nothing that leaves them to PyTorch can be faster.
    """
    visible, every = case.batch * case.kept, case.batch * case.grid[0] * case.grid[1]
    jobs = [(visible * side**2, i, o) for stage in range(4) for side, i, o in stage_products(case.model, stage)]
    if work == "pretrain":
        with torch.device("meta"):
            fcmae = FCMAE(case.model, image_size=case.size)
        jobs += [(every * side**2, i, o) for side, i, o in decoder_products(fcmae)]
    dtype = torch.bfloat16 if case.bf16 else torch.float32

    def tensors(rows: int, inputs: int, outputs: int) -> list[Tensor]:
        shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        given = [torch.randn(*s, device=case.device).to(dtype) for s in shapes]
        return given + [torch.empty_like(given[i]) for i in (2, 0, 1)]

    buffers = {job: tensors(*job) for job in set(jobs)}

    def run() -> None:
        for job in jobs:
            x, weight, gradient, y, x_gradient, weight_gradient = buffers[job]
            torch.mm(x, weight.t(), out=y)
            if work != "forward":
                torch.mm(gradient, weight, out=x_gradient)
                torch.mm(gradient.t(), x, out=weight_gradient)

    return run
