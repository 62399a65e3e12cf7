"""What a user can mend, and what ends a run. A module of its own, so that the losses need nothing but torch."""


class ConfigError(ValueError):
    """A setting that its user can mend: the message names setting, value, rule and remedy."""


class RunError(RuntimeError):
    """A state found at run time that ends the run; raised by all ranks at the same place, with the same text."""
