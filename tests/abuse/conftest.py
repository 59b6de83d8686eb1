from cli_fixtures import model, packed, photos, small

__all__ = ["model", "packed", "photos", "small"]
