import torch

from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.evaluation.probes import KNNMonitor, linear_probe, nearest_neighbours
from sparse_fcmae.evaluation.run import EvaluationView


def test_neighbours_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(50, 6, generator=generator), torch.randn(9, 6, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    mean = known.mean(0)
    expected = []
    for query in asked:
        cosine = torch.nn.functional.cosine_similarity(known - mean, query - mean)
        votes = torch.zeros(4)
        for i in cosine.argsort(descending=True)[:7]:
            votes[labels[i]] += torch.exp(cosine[i] / 0.07)
        expected.append(int(votes.argmax()))
    assert nearest_neighbours(known, labels, asked, k=7).tolist() == expected
    assert len(nearest_neighbours(known[:3], labels[:3], asked)) == 9


def test_linear_probe_separates_what_a_line_can():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 10, generator=generator) + 4 * torch.nn.functional.one_hot(labels, 10)
    assert (linear_probe(x[:200], labels[:200], x[200:]) == labels[200:]).float().mean() > 0.95


def test_neighbours_are_the_same_for_any_number_of_ranks(colours, on_ranks):
    view = EvaluationView(
        size=(16, 16),
        form=ImageFormat.imagenet(),
        reading=PHOTOGRAPHS,
        crop_fraction=1.0,
        device=torch.device("cpu"),
        batch_size=5,
    )
    encoder = torch.nn.Conv2d(3, 4, 8, 8)
    alone = on_ranks(1, lambda ranks: KNNMonitor(colours, view, ranks).top1(encoder))
    assert alone == [(1.0, [])]
    assert on_ranks(3, lambda ranks: KNNMonitor(colours, view, ranks).top1(encoder)) == 3 * alone
