"""From a model's config and a GPU to bytes, time, cost and energy, before anything is bought (docs/planning.md)."""
