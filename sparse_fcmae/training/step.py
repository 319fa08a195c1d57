"""One optimiser step over micro-batches, launched kernel by kernel or replayed from CUDA graphs."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_fcmae.data import normalise
from sparse_fcmae.training.optim import clip

WARMUP = 3  # steps before the capture, in which kernels are compiled and timed, and libraries take their memory


class TrainStep:
    """Adds up the gradients of micro-batches, then has the optimiser step.

    loss_of: a micro-batch's mean loss, given its tensors on the device. trained: the model that it calls, be it itself,
    compiled, or wrapped for several processes. share: images of a step on this rank. The loss is the mean over them.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        share: int,
        clip_grad: float | None = None,
        bf16: bool = False,
    ) -> None:
        self.loss_of, self.trained, self.optimizer = loss_of, trained, optimizer
        self.share, self.clip_grad, self.bf16 = share, clip_grad, bf16
        self.device = optimizer.param_groups[0]["params"][0].device
        self.loss = torch.zeros((), device=self.device)

    def add(self, *tensors: Tensor, last: bool) -> None:
        """A micro-batch as `loss_of` takes it, the images in the first dimension of each tensor; `last` of its step."""
        tensors = tuple(t.to(self.device, non_blocking=True) for t in tensors)
        waiting = not last and isinstance(self.trained, nn.parallel.DistributedDataParallel)
        with self.trained.no_sync() if waiting else nullcontext():
            self._differentiate(*tensors)

    def finish(self) -> Tensor:
        """Changes the weights; returns the step's loss, float32 scalar on the device."""
        return self._update(keep_gradients=False)

    def _differentiate(self, *tensors: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss_of(*tensors) * (len(tensors[0]) / self.share)
        loss.backward()
        self.loss += loss.detach()

    def _update(self, keep_gradients: bool) -> Tensor:
        clip((p for group in self.optimizer.param_groups for p in group["params"]), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        loss = self.loss.clone()
        self.loss.zero_()
        return loss


def fcmae_loss(trained: nn.Module, kept: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of pretraining, of uint8 pixels [b, H, W, C] and bool masks [b, H/P, W/P] that keep `kept` patches."""
    return lambda pixels, mask: trained(normalise(pixels), mask, kept=kept).loss


class GraphedTrainStep(TrainStep):
    """The same, replayed from CUDA graphs: one for each size of micro-batch and one for the optimiser's step.

    So the host launches two graphs instead of thousands of kernels. The first WARMUP steps run as usual. For one
    process on a CUDA device, with a capturable optimiser.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stream, self.pool, self.steps = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle(), 0
        self.differentiate: dict[torch.Size, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.update: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def add(self, *tensors: Tensor, last: bool) -> None:
        if self.steps < WARMUP:
            self._warm_up(lambda: super(GraphedTrainStep, self).add(*tensors, last=last))
            return
        shape = tensors[0].shape
        if shape not in self.differentiate:
            held = [torch.empty(t.shape, dtype=t.dtype, device=self.device).copy_(t) for t in tensors]
            graph, _ = self._capture(lambda: self._differentiate(*held))
            self.differentiate[shape] = (graph, held)
        graph, held = self.differentiate[shape]
        for mine, given in zip(held, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()

    def finish(self) -> Tensor:
        self.steps += 1
        if self.steps <= WARMUP:
            return self._warm_up(lambda: self._update(keep_gradients=True))
        if self.update is None:
            self.update = self._capture(lambda: self._update(keep_gradients=True))
        graph, loss = self.update
        graph.replay()
        return loss.clone()

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
