"""What is timed of the models: the encoder's forward pass, that and its backward pass, a whole pretraining step."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.engine import Run
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.flops import decoder_products, stage_products, visible_patches
from sparse_fcmae.model.masking import random_mask
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.tasks.pretraining import PretrainingObjective
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep

LR = 1e-5  # so small that the candidates, which share their weights, hardly change them
# kinds of work, and the one by whose results backends are checked
WORKS = {"forward": "step", "step": "step", "pretrain": "pretrain"}
Builds = dict[str, Callable[[], Run]]


@dataclass(frozen=True)
class Case:
    """The setting of what is timed. size: (height, width) in pixels. batch: images."""

    model_name: str
    size: tuple[int, int]
    mask_ratio: float
    batch: int
    bf16: bool
    device: torch.device

    @classmethod
    def of(cls, config: Any, device: torch.device) -> "Case":
        """The case that the options of a benchmark describe."""
        size = image_size_of(config.image_size)
        return cls(config.model, size, config.mask_ratio, config.batch_size, config.dtype == "bf16", device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        with torch.device("meta"):
            return SparseEncoder("atto", image_size=self.size).grid(*self.size)

    @cached_property
    def num_visible(self) -> int:
        """Visible patches of each image. Raises UserError where size and ratio do not fit together."""
        return visible_patches(self.grid, self.mask_ratio)

    def model(self, work: str) -> SparseEncoder | FCMAE:
        """The model that a kind of work runs."""
        if work == "pretrain":
            model = FCMAE(self.model_name, image_size=self.size, mask_ratio=self.mask_ratio)
        else:
            model = SparseEncoder(self.model_name, image_size=self.size)
        return move_parameters(model).to(self.device)

    def masks(self) -> Tensor:
        """Random masks bool [batch, rows, cols], which at a ratio of 0 hide nothing."""
        if not self.mask_ratio:
            return torch.zeros(self.batch, *self.grid, dtype=torch.bool, device=self.device)
        return random_mask(self.batch, self.grid, self.mask_ratio).to(self.device)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images and masks."""
        return torch.randn(self.batch, 3, *self.size, device=self.device), self.masks()


def setting_of(config: Any) -> Row:
    """The columns that say what was measured, from the options of a benchmark."""
    return {name: getattr(config, name) for name in ("model", "batch_size", "image_size", "mask_ratio", "dtype")}


@torch.no_grad()
def move_parameters(module: Any) -> Any:
    """Moves every parameter of a new module: GRN and biases start at zero and would go untested."""
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def builds(case: Case, work: str, backends: Iterable[str], compiled: bool = False) -> Builds:
    """What makes each candidate of a kind of work: "BACKEND", and its variants as "BACKEND, VARIANT".

    All have the same weights and inputs, and nothing is allocated before the first is made. A run returns what it has
    computed: features, gradients or, of a pretraining step, the loss.
    """
    model, on_gpu = cache(partial(case.model, work)), case.device.type == "cuda" and "native" in backends
    if work == "pretrain":
        found: Builds = {name: partial(pretraining_step, case, model, name) for name in backends}
        if on_gpu:
            found["native, graphs"] = partial(pretraining_step, case, model, "native", GraphedTrainStep)
        return found
    run, inputs = run_forward if work == "forward" else run_step, cache(case.inputs)

    def build(backend: str, wrap: Callable[[SparseEncoder], Any] = lambda encoder: encoder) -> Run:
        return partial(run, wrap(model().with_backend(backend)), *inputs(), case)

    found = {name: partial(build, name) for name in backends}
    if on_gpu and work == "step":
        found["native, graph"] = lambda: graphed(build("native"), case.device)
    for name in backends if compiled else ():
        if BACKENDS[name].compilable:
            found[f"{name}, compiled"] = partial(build, name, compile_whole)
    return found


def computed(model: Any, images: Tensor, mask: Tensor, case: Case) -> Tensor:
    """A model's features, or its loss."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=case.bf16):
        result = model(images, mask, num_visible=case.num_visible)
    return result if isinstance(result, Tensor) else result.loss


@torch.no_grad()
def run_forward(encoder: Any, images: Tensor, mask: Tensor, case: Case) -> list[Tensor]:
    """Returns the features."""
    return [computed(encoder, images, mask, case)]


def run_step(encoder: Any, images: Tensor, mask: Tensor, case: Case) -> list[Tensor]:
    """Returns the gradients of the parameters."""
    computed(encoder, images, mask, case).float().square().mean().backward()
    gradients = [p.grad for p in encoder.parameters()]
    encoder.zero_grad()
    return gradients


def compile_whole(encoder: SparseEncoder) -> Any:
    """A compiled copy of an encoder."""
    return torch.compile(deepcopy(encoder), fullgraph=True, dynamic=False, mode="max-autotune")


def graphed(step: Run, device: torch.device) -> Run:
    """A step replayed from one CUDA graph."""
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


def pretraining_step(case: Case, model: Callable[[], FCMAE], backend: str, kind: type[TrainStep] = TrainStep) -> Run:
    """A whole step: masks, forward and backward pass of encoder and decoder, optimiser. It returns the loss."""
    # a graph accumulates into the same gradients for ever, which another's step would set free
    fcmae = model() if kind is TrainStep else deepcopy(model())
    pixels = torch.randint(256, (case.batch, *case.size, 3), dtype=torch.uint8, device=case.device)
    optimizer = adamw(fcmae, 0.05, (0.9, 0.95), capturable=kind is GraphedTrainStep)
    objective = PretrainingObjective(fcmae.with_backend(backend), case.num_visible)
    step = kind(objective, optimizer, images_per_rank=case.batch, bf16=case.bf16)

    def run() -> list[Tensor]:
        set_lr(optimizer, LR)
        step.add(pixels, fcmae.draw_mask(case.batch, case.size, device=case.device), last=True)
        return [step.finish()]

    for _ in range(WARMUP + 1 if kind is GraphedTrainStep else 0):
        run()
    return run


def matrix_products(case: Case, work: str) -> Run:
    """The matrix products of the visible positions alone, and of the gradients where the work has them.

    Nothing that leaves them to PyTorch can be faster. The images have no gradient.
    """
    visible, every = case.batch * case.num_visible, case.batch * case.grid[0] * case.grid[1]
    jobs = [(visible * side**2, i, o) for stage in range(4) for side, i, o in stage_products(case.model_name, stage)]
    if work == "pretrain":
        jobs += [(every * side**2, i, o) for side, i, o in decoder_products(case.model_name)]

    def tensors(rows: int, inputs: int, outputs: int) -> list[Tensor]:
        shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        given = [torch.randn(*shape, device=case.device).to(case.dtype) for shape in shapes]
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
