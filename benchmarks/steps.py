"""What is timed: the encoder's forward pass, that and its backward pass, a whole pretraining step, by any backend."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.timing import draw_mask
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.flops import decoder_products, kept, stage_products
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep, fcmae_loss

LR = 1e-5  # so small that the candidates, which share their weights, hardly change them
WORKS = ("forward", "step", "pretrain")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """The setting of what is timed. size: (height, width) pixels. batch: images."""

    model_name: str
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
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def kept(self) -> int:
        """Visible patches of each image."""
        return kept(self.grid, self.mask_ratio)

    def model(self, work: str) -> SparseEncoder | FCMAE:
        """What a kind of work runs, no parameter as it starts: GRN and biases start at zero and would go untested."""
        if work == "pretrain":
            model = FCMAE(self.model_name, image_size=self.size, mask_ratio=self.mask_ratio)
        else:
            model = SparseEncoder(self.model_name, image_size=self.size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model.to(self.device)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images and masks."""
        images = torch.randn(self.batch, 3, *self.size, device=self.device)
        return images, draw_mask(self.batch, self.grid, self.mask_ratio).to(self.device)


def builds(case: Case, work: str, backends: Iterable[str], compiled: bool = False) -> dict[str, Callable[[], Run]]:
    """What makes each candidate of a kind of work: "BACKEND", and its variants as "BACKEND, VARIANT".

    Nothing is allocated before. All have the same weights and inputs. A run returns what it has computed: features,
    gradients or, of a pretraining step, the loss.
    """
    if work == "pretrain":
        return pretraining_builds(case, backends)
    run = run_forward if work == "forward" else run_step
    shared = cache(lambda: (case.model(work), *case.inputs()))

    def build(backend: str, wrap: Callable[[SparseEncoder], Any] = lambda encoder: encoder) -> Run:
        encoder, images, mask = shared()
        return partial(run, wrap(encoder), backend, images, mask, case)

    found: dict[str, Callable[[], Run]] = {name: partial(build, name) for name in backends}
    if case.device.type == "cuda" and "native" in found and work == "step":
        found["native, graph"] = lambda: graphed(build("native"), case.device)
    if compiled:
        for name in backends:
            if BACKENDS[name].compilable:
                found[f"{name}, compiled"] = partial(build, name, compile_whole)
    return found


def computed(model: Any, backend: str, images: Tensor, mask: Tensor, case: Case) -> Tensor:
    """A model's features, or its loss, by a backend."""
    getattr(model, "encoder", model).backend = backend
    with torch.autocast(images.device.type, torch.bfloat16, enabled=case.bf16):
        result = model(images, mask, kept=case.kept)
    return result if isinstance(result, Tensor) else result.loss


@torch.no_grad()
def run_forward(*arguments: Any) -> list[Tensor]:
    return [computed(*arguments)]


def run_step(encoder: Any, *arguments: Any) -> list[Tensor]:
    computed(encoder, *arguments).float().square().mean().backward()
    gradients = [p.grad for p in encoder.parameters()]
    encoder.zero_grad()
    return gradients


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
        gradients = step()

    def run() -> list[Tensor]:
        graph.replay()
        return gradients

    run.holds = step  # and with it the tensors that the graph works on
    return run


def pretraining_builds(case: Case, backends: Iterable[str]) -> dict[str, Callable[[], Run]]:
    """Whole steps: masks, forward and backward pass of encoder and decoder, optimiser."""
    shared = cache(lambda: case.model("pretrain"))

    def build(backend: str, kind: type[TrainStep] = TrainStep) -> Run:
        # a graph accumulates into the same gradients for ever, which another's step would set free
        fcmae = shared() if kind is TrainStep else deepcopy(shared())
        pixels = torch.randint(256, (case.batch, *case.size, 3), dtype=torch.uint8, device=case.device)
        optimizer = adamw(fcmae, 0.05, (0.9, 0.95), capturable=kind is GraphedTrainStep)
        work = kind(fcmae_loss(fcmae, case.kept), fcmae, optimizer, share=case.batch, bf16=case.bf16)

        def run() -> list[Tensor]:
            fcmae.encoder.backend = backend
            set_lr(optimizer, LR)
            work.add(pixels, fcmae.draw_mask(case.batch, case.size, device=case.device), last=True)
            return [work.finish()]

        for _ in range(WARMUP + 1 if kind is GraphedTrainStep else 0):
            run()
        return run

    found: dict[str, Callable[[], Run]] = {name: partial(build, name) for name in backends}
    if case.device.type == "cuda" and "native" in found:
        found["native, graphs"] = partial(build, "native", GraphedTrainStep)
    return found


def matrix_products(case: Case, work: str) -> Run:
    """The matrix products of the visible positions alone, and of the gradients where the work has them.

    Nothing that leaves them to PyTorch can be faster. The images have no gradient.
    """
    visible, every = case.batch * case.kept, case.batch * case.grid[0] * case.grid[1]
    jobs = [(visible * side**2, i, o) for stage in range(4) for side, i, o in stage_products(case.model_name, stage)]
    if work == "pretrain":
        jobs += [(every * side**2, i, o) for side, i, o in decoder_products(case.model_name)]

    def tensors(rows: int, inputs: int, outputs: int) -> list[Tensor]:
        shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        given = [torch.randn(*s, device=case.device).to(case.dtype) for s in shapes]
        return given + [torch.empty_like(given[i]) for i in (2, 0, 1)]

    buffers = {job: tensors(*job) for job in set(jobs)}

    def run() -> None:
        for number, job in enumerate(jobs):
            x, weight, gradient, y, x_gradient, weight_gradient = buffers[job]
            torch.mm(x, weight.t(), out=y)
            if work != "forward":
                torch.mm(gradient.t(), x, out=weight_gradient)
                if number:
                    torch.mm(gradient, weight, out=x_gradient)

    return run
