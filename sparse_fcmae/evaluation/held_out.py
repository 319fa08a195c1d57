"""The loss of pretraining on images that are held out, under masks that stay the same."""

import torch
from torch import Tensor, nn

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, check_any, run_on_batches, together
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.streams import Stream, torch_seed


class HeldOutLoss:
    """The mean loss of a model's predictions over a source's images. All ranks compute that of their part.

    A mask follows from the seed and the image's place, and not from the batch, the step or the number of ranks.
    """

    def __init__(self, source: ImageSource, view: EvaluationView, ranks: Ranks, seed: int) -> None:
        self.ranks, self.seed = ranks, seed
        images = Labelled(source, ("images",), torch.zeros(len(source), dtype=torch.int64))
        self.images = EvaluationSet(images.take(range(ranks.rank, len(source), ranks.world)), view, ranks)

    def of(self, model: nn.Module) -> tuple[float, list[BadImage]]:
        """The loss of an FCMAE, and the unreadable images, which are left out. To be called by all ranks.

        Raises UserError where no image is readable.
        """
        losses, index, bad = run_on_batches(self.images, lambda images, batch: self._losses(model, images, batch))
        losses, counts, bad = zip(*self.ranks.gather((losses.double().sum(), len(index), bad)), strict=True)
        bad = together(bad)
        check_any(range(sum(counts)), bad, self.images.source)
        return (sum(losses) / sum(counts)).item(), bad

    def _losses(self, model: nn.Module, images: Tensor, batch: Batch) -> Tensor:
        """The loss of each image of a batch: float32 [B]. Of `images`, which are normalised, the size alone is used."""
        size, form = images.shape[2:], self.images.view.form
        masks = torch.cat([self._mask(model, int(sample), size) for sample in batch.index]).to(images.device)
        pixels = batch.pixels.to(images.device).permute(0, 3, 1, 2)
        errors = model.errors(pixels, masks, model.num_visible(size), form.statistics(images.device))
        return errors.view(len(images), -1).mean(1)

    def _mask(self, model: nn.Module, sample: int, size: tuple[int, int]) -> Tensor:
        """The mask of a sample, bool [1, rows, cols], by its image's number among all ranks' images, and its window."""
        of_image = self.images.image_of
        image = int(of_image[sample]) if len(of_image) else 0  # this rank has none, and only goes along
        window = sample - int(torch.searchsorted(of_image, image))
        place = (image * self.ranks.world + self.ranks.rank, window)
        return model.draw_mask(
            1, size, generator=torch.Generator().manual_seed(torch_seed(self.seed, Stream.HELD_OUT, *place))
        )
