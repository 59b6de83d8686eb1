"""The trained models that come with the package, a folder each; see `binarize.models.default_model`."""
