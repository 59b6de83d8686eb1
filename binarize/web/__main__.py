"""``python -m binarize.web`` adds the default models to the page that Vite has built, as ``make web`` does."""

from binarize.web.models import shipped_models, write_models
from binarize.web.server import PAGE, check_page

if __name__ == "__main__":
    check_page()
    write_models(PAGE, shipped_models())
