"""From an upstream and a recipe to finished cells."""
