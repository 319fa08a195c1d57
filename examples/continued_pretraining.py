"""Pretraining that goes on from released weights, on images of one's own.

    python examples/continued_pretraining.py --images scans --init convnextv2_atto_1k_224_fcmae.pt --out runs/more

--init takes the files as their authors name them. From the official code: convnextv2_atto_1k_224_fcmae.pt, an encoder
that was pretrained on ImageNet. From timm and Hugging Face, which are downloaded: timm:convnextv2_atto.fcmae and
hf:facebook/convnextv2-atto-1k-224. The decoder is new where the weights have none, so the encoder begins at a tenth of
the learning rate that new weights would take.
"""

import argparse

from sparse_fcmae import load_encoder, pretrain


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--init", required=True)
    parser.add_argument("--out", default="runs/more")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    exported = pretrain(
        data=options.images,
        init=options.init,
        out=options.out,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    print(f"{load_encoder(exported).name} goes on in {exported}")


if __name__ == "__main__":
    main()
