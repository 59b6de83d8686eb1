"""The page that enlarges images in a browser: its server and its models. Its source is in the folder ``web``."""
