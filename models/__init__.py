"""Models: each file only composes mixins on the backbone."""
