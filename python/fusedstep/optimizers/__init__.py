"""The optimizers, one file each: the options and checks of a class, and its update rule."""
