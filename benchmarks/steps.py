"""What is timed of the models: the encoder's forward pass, that and its backward pass, a whole pretraining step."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.backends.masked import MaskedPatches
from sparse_fcmae.benchmarks.config import GflopsConfig, ThroughputConfig
from sparse_fcmae.benchmarks.engine import Run, torch_threads
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.convnext import SIZES, SparseEncoder
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.flops import decoder_products, stage_products, visible_patches
from sparse_fcmae.model.masking import random_mask
from sparse_fcmae.runtime.options import image_size_of, listed, shown_size
from sparse_fcmae.tasks.pretraining import BETAS, PretrainingObjective
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep

LIMITS = ("matrix products", "1x1 convolutions")
ONCE = "once behind the stem"
LR = 1e-5  # so small that the candidates, which share their weights, hardly change them
# kinds of work, and the one by whose results backends are checked
WORKS = {"forward": "step", "step": "step", "pretrain": "pretrain"}


@dataclass(frozen=True)
class Case:
    """The setting of what is timed. image_size: (height, width) in pixels. batch_size: images. threads: that torch
    computes by, None for as many as it does otherwise.

    Raises UserError for an unknown model, and where size and ratio do not fit together.
    """

    model: str
    image_size: tuple[int, int]
    mask_ratio: float
    batch_size: int
    bf16: bool
    device: torch.device
    threads: int | None = None

    def __post_init__(self) -> None:
        _ = self.num_visible

    @classmethod
    def of(cls, config: Any, device: torch.device) -> "Case":
        """The case that the options of a benchmark describe."""
        size = image_size_of(config.image_size)
        return cls(config.model, size, config.mask_ratio, config.batch_size, config.dtype == "bf16", device)

    @property
    def setting(self) -> Row:
        """The columns that say what is timed."""
        row = {"model": self.model, "batch_size": self.batch_size, "image_size": shown_size(self.image_size)}
        row |= {"mask_ratio": self.mask_ratio, "dtype": "bf16" if self.bf16 else "fp32"}
        return row | {"threads": self.threads} if self.threads else row

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        with torch.device("meta"):
            return SparseEncoder(self.model, image_size=self.image_size).grid(*self.image_size)

    @cached_property
    def num_visible(self) -> int:
        """Visible patches of each image."""
        return visible_patches(self.grid, self.mask_ratio)

    @cached_property
    def encoder(self) -> SparseEncoder:
        """The encoder that all candidates share."""
        return move_parameters(SparseEncoder(self.model, image_size=self.image_size)).to(self.device)

    @cached_property
    def fcmae(self) -> FCMAE:
        """The pretraining model that all candidates share."""
        fcmae = FCMAE(self.model, image_size=self.image_size, mask_ratio=self.mask_ratio)
        return move_parameters(fcmae).to(self.device)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """The images and masks that all candidates share."""
        return torch.randn(self.batch_size, 3, *self.image_size, device=self.device), self.masks()

    @cached_property
    def pixels(self) -> Tensor:
        """The images that all candidates train on, uint8 [batch, height, width, 3]."""
        size = (self.batch_size, *self.image_size, 3)
        return torch.randint(256, size, dtype=torch.uint8, device=self.device)

    def masks(self) -> Tensor:
        """Random masks bool [batch, rows, cols], which at a ratio of 0 hide nothing."""
        if not self.mask_ratio:
            return torch.zeros(self.batch_size, *self.grid, dtype=torch.bool, device=self.device)
        return random_mask(self.batch_size, self.grid, self.mask_ratio).to(self.device)


def listed_cases(config: GflopsConfig | ThroughputConfig) -> Iterable[tuple[str, tuple[int, int], float]]:
    """Every model, image size and mask ratio that the options of a benchmark list."""
    models = listed("model", config.model, str, SIZES)
    sizes = listed("image_size", config.image_size, image_size_of)
    return product(models, sizes, listed("mask_ratio", config.mask_ratio, float))


@torch.no_grad()
def move_parameters(module: Any) -> Any:
    """Moves every parameter of a new module: GRN and biases start at zero and would go untested."""
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def run_of(case: Case, work: str, backend: str, variant: str | None = None) -> Run:
    """What does a kind of work by a backend, or by one of its `variants_of`.

    It returns what it has computed: features, gradients or, of a pretraining step, the loss. That of an encoder without
    a variant is a partial function with the arguments of `computed`, where the case leaves the threads as they are.
    """
    if work == "pretrain":
        run = pretraining_step(case, backend, GraphedTrainStep if variant else TrainStep)
    else:
        encoder = case.encoder.with_backend(backend)
        if variant == "compiled":
            encoder = compile_whole(encoder)
        elif variant == ONCE:
            encoder = MaskedOnce.of(encoder)
        run = partial(run_forward if work == "forward" else run_step, encoder, *case.inputs, case)
    if variant == "graph":
        run = graphed(run, case.device)
    return torch_threads(case.threads)(run) if case.threads else run


def variants_of(case: Case, work: str, backend: str, compiled: bool) -> list[str]:
    """In which other ways a backend can do a kind of work, torch.compile among them if asked for."""
    graphs = {"step": ["graph"], "pretrain": ["graphs"]} if case.device.type == "cuda" and backend == "native" else {}
    of_encoder = work != "pretrain"
    compilable = compiled and of_encoder and BACKENDS[backend].compilable
    once = of_encoder and backend == "masked" and case.mask_ratio
    return graphs.get(work, []) + (["compiled"] if compilable else []) + ([ONCE] if once else [])


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


class MaskedOnce(SparseEncoder):
    """An encoder that masks once, behind the stem, and is dense from there on. It computes another function.

    The first block's convolution already spreads features into masked patches, and the response norms count them.
    """

    def patches(self, images: Tensor, mask: Tensor, num_visible: int) -> "MaskedBehindStem":
        return MaskedBehindStem(mask, mask[0].numel())

    @classmethod
    def of(cls, encoder: SparseEncoder) -> "MaskedOnce":
        """The same layers and parameters, not copies."""
        other = cls(encoder.name, image_size=encoder.image_size)
        other.downsample_layers, other.stages = encoder.downsample_layers, encoder.stages
        return other


class MaskedBehindStem(MaskedPatches):
    """Takes all patches for visible, but for zeros in place of masked ones behind the stem and in the result."""

    def stem(self, *arguments: Any) -> Tensor:
        x = super().stem(*arguments)
        side = x.shape[1] // self.mask.shape[1]
        return x.masked_fill(self.mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None], 0)

    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        return super().scatter(x, fill).masked_fill(self.mask[:, None], 0)


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

    def run(step: Run) -> list[Tensor]:  # the step holds the tensors that the graph works on
        graph.replay()
        return gradients

    return partial(run, step)


@dataclass
class Training:
    """Training of an objective by AdamW: a call takes a step, on what `inputs` gives, and returns the loss.

    kind: how its steps are launched.
    """

    objective: nn.Module
    inputs: Callable[[], tuple[Tensor, ...]]
    betas: tuple[float, float]
    lr: float
    bf16: bool
    kind: type[TrainStep] = TrainStep

    @cached_property
    def step(self) -> TrainStep:
        """What adds up a step's gradients and changes the weights."""
        optimizer = adamw(self.objective, 0.05, self.betas, capturable=self.kind is GraphedTrainStep)
        set_lr(optimizer, self.lr)
        return self.kind(self.objective, optimizer, images_per_rank=len(self.inputs()[0]), bf16=self.bf16)

    def __call__(self) -> list[Tensor]:
        self.objective.train()
        self.step.add(*self.inputs(), last=True)
        return [self.step.finish().loss]


def pretraining_step(case: Case, backend: str, kind: type[TrainStep]) -> Training:
    """A whole step: masks, forward and backward pass of encoder and decoder, optimiser. It returns the loss."""
    # a graph accumulates into the same gradients for ever, which another's step would set free
    fcmae = case.fcmae if kind is TrainStep else deepcopy(case.fcmae)

    def inputs() -> tuple[Tensor, Tensor]:
        return case.pixels, fcmae.draw_mask(case.batch_size, case.image_size, device=case.device)

    objective = PretrainingObjective(fcmae.with_backend(backend), ImageFormat.imagenet(), case.num_visible)
    run = Training(objective, inputs, BETAS, LR, case.bf16, kind)
    for _ in range(WARMUP + 1 if kind is GraphedTrainStep else 0):
        run()
    return run


def limits_of(case: Case, work: str) -> dict[str, Callable[[], Run]]:
    """What runs the matrix products of a kind of work alone, by the name of the way in which PyTorch does so.

    On a CPU a product is also a convolution with windows of one position, which another library computes: oneDNN.
    """
    mm, conv = LIMITS
    ways = {mm: multiplied} | ({conv: convolved} if case.device.type == "cpu" else {})
    return {name: partial(matrix_products, case, work, way) for name, way in ways.items()}


def matrix_products(case: Case, work: str, way: Callable[..., None]) -> Run:
    """The matrix products of the visible positions alone, and of the gradients where the work has them.

    Nothing that leaves them to PyTorch can be faster than the faster of its ways. The images have no gradient.
    """
    visible, every = case.batch_size * case.num_visible, case.batch_size * case.grid[0] * case.grid[1]
    jobs = [(visible * side**2, i, o) for stage in range(4) for side, i, o in stage_products(case.model, stage)]
    if work == "pretrain":
        project, *blocks, predict = decoder_products(case.model)
        rows = [visible, *[every] * len(blocks), every - visible]
        jobs += [(n, i, o) for n, (_, i, o) in zip(rows, (project, *blocks, predict), strict=True)]

    def tensors(rows: int, inputs: int, outputs: int) -> list[Tensor]:
        shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        given = [torch.randn(*shape, device=case.device).to(case.dtype) for shape in shapes]
        return [*given, *map(torch.empty_like, given)]

    largest_first = sorted(set(jobs), key=lambda job: job[0] * max(job[1:]), reverse=True)  # too large is known at once
    given = {job: tensors(*job) for job in largest_first}

    def run() -> None:
        for number, job in enumerate(jobs):
            way(*given[job], backward=work != "forward", of_images=not number)

    return run


def multiplied(x: Tensor, weight: Tensor, grad: Tensor, *results: Tensor, backward: bool, of_images: bool) -> None:
    """The products of a layer: x [M, K] by weight [N, K], and with grad [M, N] those of the gradients of both."""
    x_grad, weight_grad, y = results
    torch.mm(x, weight.t(), out=y)
    if backward:
        torch.mm(grad.t(), x, out=weight_grad)
        if not of_images:
            torch.mm(grad, weight, out=x_grad)


def convolved(x: Tensor, weight: Tensor, grad: Tensor, *_: Tensor, backward: bool, of_images: bool) -> None:
    """What `multiplied` computes, as convolutions of one column of positions, channels last in memory."""
    column, y_grad = (t[None, :, None].permute(0, 3, 1, 2) for t in (x, grad))
    window = weight[:, :, None, None]
    F.conv2d(column, window)
    if backward:
        wanted = (not of_images, True, False)
        torch.ops.aten.convolution_backward(
            y_grad, column, window, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
        )
