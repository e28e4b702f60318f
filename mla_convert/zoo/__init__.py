"""Small pretrained models that ship with the package."""
