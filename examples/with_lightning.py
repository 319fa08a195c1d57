"""Pretraining as a LightningModule, for who trains everything by Lightning.

    python examples/with_lightning.py --images photos --out encoder.pt --epochs 100

Afterwards `load_encoder("encoder.pt")`. It needs the library lightning.
"""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from training_loop import STATISTICS, parsed, part_of_rate

from sparse_fcmae import create_fcmae


class Pretraining(lightning.LightningModule):
    """A masked autoencoder, its loss, and its optimiser with warm-up and a cosine."""

    def __init__(self, lr: float, **model) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.fcmae = create_fcmae(**model)
        self.register_buffer("statistics", STATISTICS, persistent=False)

    def training_step(self, pixels: Tensor, number: int) -> Tensor:
        """pixels: uint8 [B, 3, H, W]."""
        loss = self.fcmae(pixels, statistics=self.statistics).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part_of_rate(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: list[str] | None = None) -> lightning.Trainer:
    """Trains and writes the weights."""
    options, images = parsed(arguments)
    batches = DataLoader(images, options.batch_size, shuffle=True, drop_last=True)
    module = Pretraining(options.lr, name=options.model, image_size=options.size, stem_stride=options.stem_stride)
    folder = options.out.with_suffix("")
    trainer = lightning.Trainer(max_epochs=options.epochs, default_root_dir=folder, logger=False)
    trainer.fit(module, batches)
    if trainer.is_global_zero:
        torch.save({"model": module.fcmae.state_dict()}, options.out)
    return trainer


if __name__ == "__main__":
    main()
