"""The server and the models of the page that enlarges and draws images in a browser. Its source is in a clone."""
