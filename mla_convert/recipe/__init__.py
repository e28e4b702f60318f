"""The recipe: its YAML, its schema, and the recipes that ship with the package."""
