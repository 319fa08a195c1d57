"""How good a model is, on labelled images or without labels.

`run` runs a model over the images of a source; `accuracy` and `probes` judge what it gives; `evaluate` is the command.
"""
