"""One optimiser step over micro-batches, launched kernel by kernel or replayed from CUDA graphs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    wrapped for several processes. images_per_rank: of a step on this rank. The loss is the mean over them.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        images_per_rank: int,
        clip_grad: float | None = None,
        bf16: bool = False,
    ) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.images_per_rank, self.clip_grad, self.bf16 = images_per_rank, clip_grad, bf16
        self.device = optimizer.param_groups[0]["params"][0].device
        self.loss = torch.zeros((), device=self.device)

    def add(self, *inputs: Tensor, last: bool) -> None:
        """Adds a micro-batch, the images in the first dimension of each tensor. `last`: of its step."""
        with naming_batch(len(inputs[0]), self.device), accumulating(self.objective, last):
            self._differentiate(*(t.to(self.device, non_blocking=True) for t in inputs))

    def finish(self) -> StepResult:
        """Changes the weights, where all gradients are finite; otherwise they and the optimiser stay as they are."""
        return self._update(keep_gradients=False)

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
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        loss = self.loss.clone()
        self.loss.zero_()
        return StepResult(loss, norm.float())


@contextmanager
def naming_batch(images: int, device: torch.device) -> Iterator[None]:
    """Turns what is raised where so many images do not fit into a device's memory into a UserError that says so."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = f"give `micro_batch_size={images // 2}`" if images > 1 else "give `grad_checkpointing=True`"
        size = f" of {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB" if device.type == "cuda" else ""
        more = f", which changes rounding at most, and go on with `resume=auto`: {str(error).splitlines()[0]}"
        raise UserError(f"{images} images at once do not fit into the memory of {device}{size}: {half}{more}") from None


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

    def add(self, *inputs: Tensor, last: bool) -> None:
        if self.steps < WARMUP:
            self._warm_up(lambda: super(GraphedTrainStep, self).add(*inputs, last=last))
            return
        shape = inputs[0].shape
        if shape not in self.differentiate:
            held = [torch.empty(t.shape, dtype=t.dtype, device=self.device).copy_(t) for t in inputs]
            with naming_batch(len(inputs[0]), self.device):
                graph, _ = self._capture(lambda: self._differentiate(*held))
            self.differentiate[shape] = (graph, held)
        graph, held = self.differentiate[shape]
        for buffer, given in zip(held, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        graph.replay()

    def finish(self) -> StepResult:
        self.steps += 1
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
