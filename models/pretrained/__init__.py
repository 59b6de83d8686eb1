"""The trained models that come with the package, a folder for each scale; see `binarize.models.default_model`."""
