"""From images, wherever they are, to batches of pixels.

An image passes through these files in this order: `sources` (where images are), `decode` (a file's bytes to an image),
`views` (a crop of it, flipped and augmented), `batches` (which images a batch holds, and the processes that load them),
and on the model's device `statistics` (normalised pixels) or `mixing` (images mixed with each other).
"""
