"""What a user can mend. A module of its own, so that the losses need nothing but torch."""


class ConfigError(ValueError):
    """A setting that its user can mend: the message names setting, value, rule and remedy."""
