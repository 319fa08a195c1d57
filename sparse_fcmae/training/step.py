"""One optimiser step over micro-batches, launched kernel by kernel or replayed from CUDA graphs."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.optim import clipped
from sparse_fcmae.training.parallel import accumulating

WARMUP = 3  # steps before the capture, in which kernels are compiled and timed, and libraries take their memory


class StepResult(NamedTuple):
    """What a step gives, float32 scalars on the device. grad_norm: of all gradients together, before clipping."""

    loss: Tensor
    grad_norm: Tensor


class TrainStep:
    """Adds up the gradients of micro-batches, then has the optimiser step, unless they are not finite.

    objective: a module whose forward takes a micro-batch's tensors on the device and gives its mean loss. It may be
    wrapped for several processes. images_per_rank: of a step on this rank. The loss is the mean over them. divides:
    whether a micro-batch that does not fit into the device's memory is divided, which only a run of one process can do.
    most: images that go through the objective at once.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        images_per_rank: int,
        clip_grad: float | None = None,
        bf16: bool = False,
        divides: bool = False,
    ) -> None:
        self.objective, self.optimizer, self.divides = objective, optimizer, divides
        self.images_per_rank, self.clip_grad, self.bf16 = images_per_rank, clip_grad, bf16
        self.device = optimizer.param_groups[0]["params"][0].device
        self.loss = torch.zeros((), device=self.device)
        self.most, self.begun = images_per_rank, False
        self.statistics = [value for value in objective.buffers() if value.is_floating_point()]  # of batch norms
        self.before: list[Tensor] = []  # their values before a step, which a skipped one leaves as they were

    def add(self, *inputs: Tensor, last: bool) -> None:
        """Adds a micro-batch, the images in the first dimension of each tensor. `last`: of its step.

        Raises UserError where it is to be divided and that does not help, or can't be done, as it can't for any but the
        first of a step.
        """
        inputs = tuple(t.to(self.device, non_blocking=True) for t in inputs)
        if not self.begun:
            self.before = [value.clone() for value in self.statistics]
        drawn = self._random_state() if self.divides else None
        while problem := self._added(inputs, last):
            self._halve(min(self.most, len(inputs[0])), problem)
            self._random_state(drawn)
        self.begun = True

    def finish(self) -> StepResult:
        """Changes the weights, where all gradients are finite; otherwise model and optimiser stay as they are."""
        self.begun = False
        return self._update(keep_gradients=False)

    def _added(self, inputs: tuple[Tensor, ...], last: bool) -> str | None:
        """Adds a micro-batch in parts of `most` images; returns what is wrong where they do not fit into memory."""
        parts = list(zip(*(t.split(self.most) for t in inputs), strict=True))
        try:
            for number, part in enumerate(parts, 1):
                with accumulating(self.objective, last and number == len(parts)):
                    self._run(*part)
        except torch.OutOfMemoryError as error:
            if not self.divides:
                raise
            return str(error).splitlines()[0]
        return None

    def _halve(self, images: int, problem: str) -> None:
        """Begins the step again with half as many images at once. Raises UserError where that is not possible."""
        if images == 1 or self.begun:
            smaller = f"give `micro_batch_size={images // 2}`" if images > 1 else "give `grad_checkpointing=True`"
            raise UserError(
                f"{images} images at once do not fit into the memory of {self.device}: {smaller}, and go on with "
                f"`resume=True`: {problem}"
            )
        self.most = images // 2
        self.optimizer.zero_grad(set_to_none=False)  # a graph may have been captured that adds to them
        self.loss.zero_()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _random_state(self, state: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
        """The state of the random numbers that an objective draws; or sets it, so that they are drawn again."""
        on_gpu = self.device.type == "cuda"
        if state is not None:
            torch.set_rng_state(state[0])
            if on_gpu:
                torch.cuda.set_rng_state(state[1], self.device)
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None

    def _run(self, *inputs: Tensor) -> None:
        self._differentiate(*inputs)

    def _differentiate(self, *inputs: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(*inputs) * (len(inputs[0]) / self.images_per_rank)
        loss.backward()
        self.loss += loss.detach()

    def _update(self, keep_gradients: bool) -> StepResult:
        norm = clipped((p for group in self.optimizer.param_groups for p in group["params"]), self.clip_grad)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):  # fused: it looks on the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~norm.isfinite()).float()
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        for value, before in zip(self.statistics, self.before, strict=True):
            value.copy_(torch.where(norm.isfinite(), value, before))
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        loss = self.loss.clone()
        self.loss.zero_()
        return StepResult(loss, norm.float())


class GraphedTrainStep(TrainStep):
    """The same, replayed from CUDA graphs: one for each size of micro-batch and one for the optimiser's step.

    The host then launches a few graphs instead of thousands of kernels. The first WARMUP steps run as usual. It is for
    one process on a CUDA device, with a capturable optimiser.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stream, self.pool, self.steps = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle(), 0
        self.differentiate: dict[torch.Size, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.update: tuple[torch.cuda.CUDAGraph, StepResult] | None = None

    def _run(self, *inputs: Tensor) -> None:
        if self.steps < WARMUP:
            self._warm_up(lambda: self._differentiate(*inputs))
            return
        shape = inputs[0].shape
        if shape not in self.differentiate:
            held = [torch.empty(t.shape, dtype=t.dtype, device=self.device).copy_(t) for t in inputs]
            graph, _ = self._capture(lambda: self._differentiate(*held))
            self.differentiate[shape] = (graph, held)
        graph, held = self.differentiate[shape]
        for buffer, given in zip(held, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        graph.replay()

    def finish(self) -> StepResult:
        self.steps, self.begun = self.steps + 1, False
        if self.steps <= WARMUP:
            return self._warm_up(lambda: self._update(keep_gradients=True))
        if self.update is None:
            self.update = self._capture(lambda: self._update(keep_gradients=True))
        graph, result = self.update
        graph.replay()
        return StepResult(*(value.clone() for value in result))

    def _warm_up(self, run: Callable[[], Any]) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable.*")  # that these steps are not captured
            result = run()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def _capture(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Records what `run` launches without executing it."""
        graph = torch.cuda.CUDAGraph()
        # other threads, such as the loader's, may go on using the device
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph, result
