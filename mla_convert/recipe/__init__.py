"""Read and check recipes: YAML, schema, key reference, and the recipes that ship with the package."""
